"""A structure (program, loops, folds) as an LLVM module with one function, ``kernel(args)``.

The structure is all that the code depends on; addresses, counts, strides and scalars are arguments, so that one kernel serves every
array of a kind and every time step.

    map                       reduction along the inner loop        reduction across it
    for outer loops:          for kept loops:                       for kept loops, blocks of the inner loop:
      for strips:               for reduced loops, strips:            for reduced loops, some rows at a time:
        load, compute, store      load, compute, step                   for strips, rows: load, compute, step
                                  after LEAF_STRIPS: close, push         after LEAF_STRIPS rows: close, push
                                merge lanes, store states             store states

Maps that update operands in place go in steps (`updates`).

Never put here: what an operation or a reduction is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import ir

from shmarray.kernels.llvm.folds import Fold, folds_of
from shmarray.kernels.llvm.lanes import FLOAT64, I64, Lanes
from shmarray.kernels.llvm.structure import BLOCK_ITEMS, LEAF_STRIPS, Structure
from shmarray.kernels.llvm.target import Machine
from shmarray.kernels.llvm.updates import map_in_steps
from shmarray.kernels.llvm.writer import PTR, Writer, i64

__all__ = ["write_module"]

ROWS = 8  # rows a strip goes through before its accumulators go back to memory
Values = list[ir.Value]
Dtypes = Sequence[np.dtype[Any]]


def write_module(s: Structure, machine: Machine) -> str:
    """Return the LLVM assembly of a structure. Raises NotLowered."""
    writer = Writer(s, machine)
    if s.updated:
        map_in_steps(writer)
    elif not s.folds:
        _map(writer)
    elif s.reduced[-1]:
        _reduce_along(writer)
    else:
        _reduce_across(writer)
    return str(writer.finish())


def _map(w: Writer) -> None:
    must_align = any(o.streams for o in w.s.operands)
    with w.loops(range(len(w.s.reduced) - 1), w.pointers) as (here, _):
        if must_align:
            w.strips(here, w.counts[-1], lambda j, row: None)
        else:
            w.overlapping_strips(here, w.counts[-1])


def _reduce_along(w: Writer) -> None:
    """The inner loop is reduced: accumulators are registers, one leaf after the other; lanes are merged at the end."""
    build, k, inner = w.builder, w.lanes, len(w.s.reduced) - 1
    kept = [d for d in range(inner) if not w.s.reduced[d]]
    outer = [d for d in range(inner) if w.s.reduced[d]]
    folds = _Folds(w)
    accumulators = _Variables(w, folds.accumulators)
    seen = w.variable(k.type(FLOAT64))  # how many values each lane of the leaf has seen
    strips = w.variable(I64)
    tree = _Tree(w, folds, w.argument(w.args.scratch), 2 * w.s.lanes)

    def restart() -> None:
        accumulators.write(folds.start(k))
        build.store(k.constant(0.0, FLOAT64).real, seen)
        build.store(i64(0), strips)

    def close() -> None:
        tree.push(folds.close(k, accumulators.read(), build.load(seen, typ=k.type(FLOAT64))), i64(0))
        tree.grow()
        restart()

    with w.loops(kept, w.pointers) as (at_kept, kept_indices):
        restart()
        tree.clear()
        with w.loops(outer, at_kept) as (here, outer_indices):
            first = w.offset(outer, outer_indices, w.args.place_strides, w.argument(w.args.first_place))
            gap = w.argument(w.args.place_strides + inner)
            # Rows longer than a leaf are cut into leaves, shorter ones share one.
            with w.loop(w.counts[inner], LEAF_STRIPS * w.s.lanes) as low:

                def step(j: ir.Value, row: ir.Value | None) -> None:
                    place = None
                    if folds.need_places:
                        start = build.add(first, build.mul(build.add(low, j), gap))
                        place = build.add(k.splat(start), build.mul(k.iota(), k.splat(gap)))
                    old = accumulators.read()
                    new = folds.step(w, old, place)
                    accumulators.write([build.select(w.counted, a, b) for a, b in zip(new, old, strict=True)])
                    count = build.load(seen, typ=k.type(FLOAT64))
                    build.store(build.select(w.counted, build.fadd(count, k.constant(1.0, FLOAT64).real), count), seen)

                width = w.least(build.sub(w.counts[inner], low), LEAF_STRIPS * w.s.lanes)
                w.strips([w.step_by(p, operand, inner, low) for operand, p in enumerate(here)], width, step)
                more = build.sdiv(build.add(width, i64(w.s.lanes - 1)), i64(w.s.lanes))
                number = build.add(build.load(strips, typ=I64), more)
                build.store(number, strips)
                is_last = w.is_last([*outer, inner], [*outer_indices, build.add(low, build.sub(width, i64(1)))])
                with w.when(build.or_(is_last, build.icmp_signed(">=", number, i64(LEAF_STRIPS)))):
                    close()
        at = w.offset(kept, kept_indices, w.args.state_strides, i64(0))
        folds.store(w, k.narrower(1), tree.one_lane(), at)


def _reduce_across(w: Writer) -> None:
    """The inner loop is kept: accumulators of a block of it lie in scratch; some rows at a time are added to them."""
    build, k, inner = w.builder, w.lanes, len(w.s.reduced) - 1
    kept = [d for d in range(inner) if not w.s.reduced[d]]
    *outer, last = [d for d in range(inner) if w.s.reduced[d]] or [-1]
    folds = _Folds(w)
    scratch = w.argument(w.args.scratch)
    memory = _Columns(w, folds.accumulators, BLOCK_ITEMS)
    accumulators = _Variables(w, folds.accumulators)
    rows = w.variable(I64)
    tree = _Tree(w, folds, build.add(scratch, i64(memory.nbytes)), BLOCK_ITEMS)
    count = w.counts[last] if last >= 0 else i64(1)

    def restart(width: ir.Value) -> None:
        with w.loop(width, w.s.lanes) as j:
            memory.write(scratch, j, folds.start(k))
        build.store(i64(0), rows)

    def close(width: ir.Value) -> None:
        seen = k.splat(build.sitofp(build.load(rows, typ=I64), ir.DoubleType()))
        with w.loop(width, w.s.lanes) as j:
            tree.push(folds.close(k, memory.read(scratch, j), seen), j)
        tree.grow()
        restart(width)

    @contextmanager
    def in_registers(j: ir.Value) -> Iterator[None]:
        accumulators.write(memory.read(scratch, j))
        yield
        memory.write(scratch, j, accumulators.read())

    with w.loops(kept, w.pointers) as (at_kept, kept_indices), w.loop(w.counts[inner], BLOCK_ITEMS) as low:
        width = w.least(build.sub(w.counts[inner], low), BLOCK_ITEMS)
        restart(width)
        tree.clear()
        block = [w.step_by(p, operand, inner, low) for operand, p in enumerate(at_kept)]
        with w.loops(outer, block) as (at_outer, outer_indices), w.loop(count, ROWS) as top:
            some = w.least(build.sub(count, top), ROWS)
            here = at_outer if last < 0 else [w.step_by(p, operand, last, top) for operand, p in enumerate(at_outer)]
            first = w.offset(outer, outer_indices, w.args.place_strides, w.argument(w.args.first_place))

            def step(j: ir.Value, row: ir.Value | None) -> None:
                place = None
                if folds.need_places:
                    place = first
                    if last >= 0:
                        assert row is not None
                        place = build.add(first, build.mul(build.add(top, row), w.argument(w.args.place_strides + last)))
                    place = k.splat(place)
                accumulators.write(folds.step(w, accumulators.read(), place))

            w.strips(here, width, step, rows=(last, some), around=in_registers)
            number = build.add(build.load(rows, typ=I64), some)
            build.store(number, rows)
            reached = build.add(top, build.sub(some, i64(1)))
            is_last = w.is_last(outer, outer_indices) if last < 0 else w.is_last([*outer, last], [*outer_indices, reached])
            with w.when(build.or_(is_last, build.icmp_signed(">=", number, i64(LEAF_STRIPS)))):
                close(width)
        at = w.offset([*kept, inner], [*kept_indices, low], w.args.state_strides, i64(0))
        with w.loop(width, w.s.lanes) as j:
            folds.store(w, k, tree.root(j), build.add(at, j))


class _Folds:
    """All folds of a kernel as one: accumulators and nodes of the first, then of the second, ..."""

    def __init__(self, w: Writer) -> None:
        self.forms = w.s.folds
        self.folds = folds_of(w.s)
        self.accumulators = [a for fold in self.folds for a in fold.accumulators()]
        self.nodes = [n for fold in self.folds for n in fold.nodes()]
        self.need_places = any(fold.needs_index for fold in self.folds)

    def _each(self, make: Callable[[Fold], Sequence[ir.Value]]) -> Values:
        return [value for fold in self.folds for value in make(fold)]

    def start(self, k: Lanes) -> Values:
        return self._each(lambda fold: fold.start(k))

    def step(self, w: Writer, accumulators: Values, place: ir.Value | None) -> Values:
        rest, registers = iter(accumulators), iter([w.value(form.register) for form in self.forms])
        return self._each(lambda fold: fold.step(w.lanes, [next(rest) for _ in fold.accumulators()], next(registers), place))

    def close(self, k: Lanes, accumulators: Values, seen: ir.Value) -> Values:
        rest = iter(accumulators)
        return self._each(lambda fold: fold.close(k, [next(rest) for _ in fold.accumulators()], seen))

    def merge(self, k: Lanes, a: Values, b: Values) -> Values:
        first, second = iter(a), iter(b)
        return self._each(lambda fold: fold.merge(k, [next(first) for _ in fold.nodes()], [next(second) for _ in fold.nodes()]))

    def store(self, w: Writer, k: Lanes, nodes: Values, at: ir.Value) -> None:
        """Write the states of lanes ``k`` at item ``at`` of their arrays."""
        rest, word = iter(nodes), w.args.states
        for form, fold in zip(self.forms, self.folds, strict=True):
            for value, dtype in zip(fold.result(k, [next(rest) for _ in fold.nodes()]), map(np.dtype, form.states), strict=True):
                address = w.builder.add(w.argument(word), w.builder.mul(at, i64(dtype.itemsize)))
                w.store_lanes(k.convert(value, dtype), w.builder.inttoptr(address, PTR))
                word += 1


class _Variables:
    """Lanes in variables, which LLVM turns into registers."""

    def __init__(self, w: Writer, dtypes: Dtypes) -> None:
        self.w = w
        self.types = [w.lanes.type(d) for d in dtypes]
        self.slots = [w.variable(t) for t in self.types]

    def read(self) -> Values:
        return [self.w.builder.load(slot, typ=t) for slot, t in zip(self.slots, self.types, strict=True)]

    def write(self, values: Values) -> None:
        for slot, value in zip(self.slots, values, strict=True):
            self.w.builder.store(value, slot)


class _Columns:
    """Lanes in memory, one column of ``items`` items after the other."""

    def __init__(self, w: Writer, dtypes: Dtypes, items: int) -> None:
        self.w, self.dtypes = w, dtypes
        self.starts = np.cumsum([0, *(items * d.itemsize for d in dtypes)]).tolist()
        self.nbytes: int = self.starts[-1]

    def _places(self, start: ir.Value, j: ir.Value) -> Values:
        build = self.w.builder
        gaps = [build.add(i64(at), build.mul(j, i64(d.itemsize))) for at, d in zip(self.starts, self.dtypes, strict=False)]
        return [build.inttoptr(build.add(start, gap), PTR) for gap in gaps]

    def read(self, start: ir.Value, j: ir.Value, k: Lanes | None = None) -> Values:
        """Return the lanes from item ``j`` on of columns that begin at address ``start``."""
        values = []
        for place, dtype in zip(self._places(start, j), self.dtypes, strict=True):
            values.append(self.w.builder.load(place, typ=(k or self.w.lanes).type(dtype)))
            values[-1].align = dtype.itemsize
        return values

    def write(self, start: ir.Value, j: ir.Value, values: Values) -> None:
        for place, value, dtype in zip(self._places(start, j), values, self.dtypes, strict=True):
            self.w.builder.store(value, place, align=dtype.itemsize)


class _Tree:
    """Pairwise merging of nodes that arrive one after the other, as `kernels.reduce.Tree`; scratch from ``start`` on.

    Level i + 1 holds the node of 2**i leaves, where bit i of the number of leaves is set; level 0 is where nodes are merged.
    """

    def __init__(self, w: Writer, folds: _Folds, start: ir.Value, items: int) -> None:
        self.w, self.folds, self.start = w, folds, start
        self.columns = _Columns(w, folds.nodes, items)
        self.leaves, self.level, self.bits = (w.variable(I64) for _ in range(3))
        with w.function_of_its_own("merge", 5) as (first, first_item, second, second_item, out):
            a, b = self.columns.read(first, first_item), self.columns.read(second, second_item)
            self.columns.write(out, first_item, folds.merge(w.lanes, a, b))

    def clear(self) -> None:
        self.w.builder.store(i64(0), self.leaves)

    def grow(self) -> None:
        """Count a leaf, after it was pushed for every item."""
        build = self.w.builder
        build.store(build.add(build.load(self.leaves, typ=I64), i64(1)), self.leaves)

    def _at(self, level: ir.Value) -> ir.Value:
        build = self.w.builder
        return build.add(self.start, build.mul(build.add(level, i64(1)), i64(self.columns.nbytes)))

    def _merge(self, j: ir.Value) -> None:
        level = self._at(self.w.builder.load(self.level, typ=I64))
        self.w.call("merge", level, j, self.start, j, self.start)

    @contextmanager
    def _while(self, level: ir.Value, bits: ir.Value, *, up_to_gap: bool) -> Iterator[ir.Value]:
        """Go up the levels, lowest bit first: while bits are set, or while any is left; give whether this one is."""
        build = self.w.builder
        build.store(level, self.level)
        build.store(bits, self.bits)
        head, body, after = (self.w.block(name) for name in ("climb", "level", "top"))
        build.branch(head)
        build.position_at_end(head)
        left = build.load(self.bits, typ=I64)
        is_set = build.icmp_unsigned("!=", build.and_(left, i64(1)), i64(0))
        build.cbranch(is_set if up_to_gap else build.icmp_unsigned("!=", left, i64(0)), body, after)
        build.position_at_end(body)
        yield is_set
        build.store(build.lshr(build.load(self.bits, typ=I64), i64(1)), self.bits)
        build.store(build.add(build.load(self.level, typ=I64), i64(1)), self.level)
        build.branch(head)
        build.position_at_end(after)

    def push(self, nodes: Values, j: ir.Value) -> None:
        """Add a leaf of the strip at item ``j``."""
        build = self.w.builder
        self.columns.write(self.start, j, nodes)
        with self._while(i64(0), build.load(self.leaves, typ=I64), up_to_gap=True):
            self._merge(j)
        self.columns.write(self._at(build.load(self.level, typ=I64)), j, self.columns.read(self.start, j))

    def root(self, j: ir.Value) -> Values:
        """Return the node of all leaves, of which there is at least one."""
        build = self.w.builder
        leaves = build.load(self.leaves, typ=I64)
        low = self.w.lanes.call("llvm.cttz.i64", I64, leaves, ir.Constant(ir.IntType(1), 1))
        self.columns.write(self.start, j, self.columns.read(self._at(low), j))
        above = build.add(low, i64(1))
        with self._while(above, build.lshr(leaves, above), up_to_gap=False) as is_set, self.w.when(is_set):
            self._merge(j)
        return self.columns.read(self.start, j)

    def one_lane(self) -> Values:
        """Return the node of all leaves and lanes: halves are merged, again and again. Columns have room for twice the lanes."""
        build, lanes = self.w.builder, self.w.s.lanes
        self.columns.write(self.start, i64(lanes), self.root(i64(0)))  # lanes past the last, merged along: any good values
        width = self.w.variable(I64)
        build.store(i64(lanes // 2), width)
        with self.w.loop(i64(lanes.bit_length() - 1)):
            half = build.load(width, typ=I64)
            self.w.call("merge", self.start, i64(0), self.start, half, self.start)
            build.store(build.lshr(half, i64(1)), width)
        return self.columns.read(self.start, i64(0), self.w.lanes.narrower(1))
