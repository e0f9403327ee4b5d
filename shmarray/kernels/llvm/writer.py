"""Building the function of a kernel: arguments, loops, and strips of lanes that are loaded, computed and stored.

A strip of lanes at the end of a row that is shorter is copied into a padded scratch and goes through the very same instructions:
results do not depend on where in a row an element stands.

Never put here: what an operation is (`lower`), which loops there are (`module`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
from llvmlite import ir

from shmarray.kernels.llvm.lanes import I1, I8, I32, I64, Lanes, Vec, element_type
from shmarray.kernels.llvm.lower import Call, lower
from shmarray.kernels.llvm.structure import FLAGS, STRIP_ALIGNMENT, Arguments, OperandForm, StepForm, Structure
from shmarray.kernels.llvm.target import Machine

__all__ = ["PTR", "Writer", "i32", "i64"]

PTR = ir.PointerType()
_ALL_FLAGS = sum(FLAGS.values())


class Writer:
    """Builds one function. ``builder`` stands where the next instruction goes; `setup` is run once, before all others."""

    def __init__(self, s: Structure, machine: Machine) -> None:
        self.s = s
        self.args = Arguments(s)
        self.module = ir.Module("shmarray")
        self.module.triple = machine.triple
        self.function = ir.Function(self.module, ir.FunctionType(I32, [PTR]), "kernel")
        entry = self.block("entry")
        self.setup = ir.IRBuilder(entry)  # allocations and arguments: done once, before `start`
        start = self.block("start")
        self.builder = build = ir.IRBuilder(start)
        self.flags = self.variable(I32)
        self.setup.store(i32(0), self.flags)
        self.results: dict[int, ir.Value] = {}  # of updated operands, where the results of the row that is being built begin
        self.lanes = Lanes(build, s.lanes, machine, self._note)
        self.scalars = [self._scalar_pointer(slot) for slot in range(s.nscalars)]
        self.counts = [self.argument(self.args.counts + d) for d in range(len(s.reduced))]
        self.padded: dict[int, ir.Value] = {k: self._scratch(o) for k, o in enumerate(s.operands) if o.inner != "still"}
        self.padded_results: dict[int, ir.Value] = {k: self._scratch(s.operands[k]) for k in s.updated}
        self.values: list[Vec | None] = [None] * len(s.registers)
        self.counted: ir.Value | None = None  # of the strip that is being built, its i1 lanes that count
        self._clear_flags()
        self.pointers = [self._pointer(k) for k in range(len(s.operands))]
        self._entered = start

    def finish(self) -> ir.Module:
        """Return the module; nothing can be built after."""
        build = self.builder
        if any(o.streams for o in self.s.operands):
            build.fence("seq_cst")  # what streams is not ordered: others may be told of it only when it has arrived
        build.ret(self.raised())
        self.setup.branch(self._entered)
        return self.module

    # --- arguments and memory ---------------------------------------------------------------------------------------------

    def argument(self, word: int) -> ir.Value:
        address = self.setup.gep(self.function.args[0], [i64(word)], source_etype=I64)
        return self.setup.load(address, typ=I64)

    def _pointer(self, operand: int) -> ir.Value:
        return self.setup.inttoptr(self.argument(operand), PTR)

    def _scalar_pointer(self, slot: int) -> ir.Value:
        return self.setup.gep(self.function.args[0], [i64(self.args.scalars + 2 * slot)], source_etype=I64)

    def _scratch(self, o: OperandForm) -> ir.Value:
        """Return room for one strip of an operand."""
        return self.variable(ir.ArrayType(I8, self.s.lanes * np.dtype(o.dtype).itemsize))

    def variable(self, element: ir.Type) -> ir.Value:
        slot = self.setup.alloca(element)
        slot.align = 64
        slot.type = PTR  # llvmlite types the pointer, which cannot be stored to as anything else
        return slot

    def at(self, pointer: ir.Value, nbytes: ir.Value) -> ir.Value:
        return self.builder.gep(pointer, [nbytes], source_etype=I8)

    def step_by(self, pointer: ir.Value, operand: int, loop: int, index: ir.Value) -> ir.Value:
        if not self.s.operands[operand].moves[loop]:
            return pointer
        return self.at(pointer, self.builder.mul(index, self.argument(self.args.stride(operand, loop))))

    # --- the processor's flags --------------------------------------------------------------------------------------------

    def _clear_flags(self) -> None:
        self.lanes.call("feclearexcept", I32, i32(_ALL_FLAGS))

    def _test_flags(self) -> ir.Value:
        return self.lanes.call("fetestexcept", I32, i32(_ALL_FLAGS))

    def raised(self) -> ir.Value:
        """Return the flags that are set."""
        return self.builder.or_(self._test_flags(), self.builder.load(self.flags, typ=I32))

    def _note(self, condition: ir.Value, problem: str) -> None:
        build = self.builder
        bit = build.select(condition, i32(FLAGS[problem]), i32(0))
        build.store(build.or_(build.load(self.flags, typ=I32), bit), self.flags)

    # --- loops ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def loop(self, count: ir.Value, step: int | ir.Value = 1) -> Iterator[ir.Value]:
        """Repeat what is built inside for 0, ``step``, ... below ``count``."""
        build = self.builder
        before = build.block
        head = self.block("head")
        body = self.block("body")
        after = self.block("after")
        build.branch(head)
        build.position_at_end(head)
        index = build.phi(I64)
        index.add_incoming(i64(0), before)
        build.cbranch(build.icmp_signed("<", index, count), body, after)
        build.position_at_end(body)
        yield index
        index.add_incoming(build.add(index, i64(step) if isinstance(step, int) else step), build.block)
        build.branch(head)
        build.position_at_end(after)

    def block(self, name: str) -> ir.Block:
        return self.function.append_basic_block(name)

    def merged(self, incoming: Sequence[tuple[ir.Value, ir.Block]]) -> ir.Value:
        """Return the value that comes with the block control comes from. At the start of a block only."""
        phi = self.builder.phi(incoming[0][0].type)
        for value, block in incoming:
            phi.add_incoming(value, block)
        return phi

    @contextmanager
    def when(self, condition: ir.Value) -> Iterator[None]:
        then = self.block("then")
        after = self.block("after")
        self.builder.cbranch(condition, then, after)
        self.builder.position_at_end(then)
        yield
        self.builder.branch(after)
        self.builder.position_at_end(after)

    @contextmanager
    def loops(self, loops: Sequence[int], pointers: list[ir.Value]) -> Iterator[tuple[list[ir.Value], list[ir.Value]]]:
        """Go through some loops; give the pointers there, and the loops' indices."""
        indices = []
        with ExitStack() as stack:
            for loop in loops:
                index = stack.enter_context(self.loop(self.counts[loop]))
                pointers = [self.step_by(p, k, loop, index) for k, p in enumerate(pointers)]
                indices.append(index)
            yield pointers, indices

    def strips(
        self,
        pointers: list[ir.Value],
        count: ir.Value,
        each: Callable[[ir.Value, ir.Value | None], None],
        rows: tuple[int, ir.Value] | None = None,
        around: Callable[[ir.Value], contextlib.AbstractContextManager[None]] | None = None,
    ) -> None:
        """Compute every register along the inner loop, strip by strip.

        ``each(j, row)`` goes on from item ``j``; `counted` are then the i1 lanes that count, not all in a short strip. ``rows``, a loop and
        a number of its rounds: so many rows are gone through within each strip, and ``around(j)`` is entered once for all of them.
        """
        if rows is None:
            self._phases(pointers, count, lambda j: each(j, None))
            return
        build, s = self.builder, self.s
        moving = [k for k, o in enumerate(s.operands) if o.inner != "still"]
        with self.loop(count, s.lanes) as j:
            rest = build.sub(count, j)
            is_short = build.icmp_signed("<", rest, i64(s.lanes))
            with ExitStack() as stack:
                if around is not None:
                    stack.enter_context(around(j))
                row = stack.enter_context(self.loop(rows[1]))
                here = [self.step_by(p, k, rows[0], row) for k, p in enumerate(pointers)]
                self._steps(here, [], still=True)
                self._strip(here, {k: self._inner(here[k], k, j) for k in moving}, rest, is_short, lambda: each(j, row))

    def _phases(self, pointers: list[ir.Value], count: ir.Value, each: Callable[[ir.Value], None]) -> None:
        """Compute strips in two phases that share one body: all whole ones where they lie, then, in scratch, what is left.

        Nothing but the strip itself is left to the inner loop. Results of operands that are updated go into the redo slot, where they
        lie without gaps, in the order of the target's memory.
        """
        build, s = self.builder, self.s
        moving = [k for k, o in enumerate(s.operands) if o.inner != "still"]
        strided = [k for k in moving if s.operands[k].inner == "strided"]
        self._steps(pointers, [], still=True)
        whole = build.and_(count, i64(-s.lanes))
        before, phase, fill, after = build.block, self.block("phase"), self.block("fill"), self.block("after")
        build.branch(phase)
        build.position_at_end(phase)
        entering: list[tuple[ir.PhiInstr, ir.Value]] = []  # what to come back to this block with

        def either(first: ir.Value, then: ir.Value) -> ir.Value:
            phi = build.phi(first.type)
            phi.add_incoming(first, before)
            entering.append((phi, then))
            return phi

        lanes = ir.VectorType(I1, s.lanes)
        is_short = either(ir.Constant(I1, 0), ir.Constant(I1, 1))
        limit = either(whole, i64(s.lanes))
        first = either(i64(0), whole)
        starts = {k: either(pointers[k], self._padded_start(k)) for k in moving}
        strides = {k: either(self._item_stride(k), self._pad_stride(k)) for k in strided}
        into = {k: either(start, self._padded_start(k, self.padded_results)) for k, start in self.results.items()}
        self.counted = counted = build.phi(lanes)
        counted.add_incoming(ir.Constant(lanes, [1] * s.lanes), before)
        with self.loop(limit, s.lanes) as j:
            places = self._places(pointers, starts, strides, j)
            results = {k: self.at(start, build.mul(j, self._pad_stride(k))) for k, start in into.items()}
            self._steps([p for p, _ in places], [stride for _, stride in places], results, still=False)
            each(build.add(first, j))
        rest = build.sub(count, whole)
        here = {k: self._inner(pointers[k], k, whole) for k in moving}
        stored = {k: p for k, p in here.items() if s.operands[k].is_stored}
        if stored:
            with self.when(is_short):
                self._unpad(stored, {k: self.at(p, build.mul(whole, self._pad_stride(k))) for k, p in self.results.items()}, rest)
        is_done = build.or_(is_short, build.icmp_signed("==", rest, i64(0)))
        build.cbranch(is_done, after, fill)
        build.position_at_end(fill)
        self._pad(here, rest)
        counted.add_incoming(build.icmp_signed("<", self.lanes.iota(), self.lanes.splat(rest)), build.block)
        for phi, value in entering:
            phi.add_incoming(value, build.block)
        build.branch(phase)
        build.position_at_end(after)

    def overlapping_strips(self, pointers: list[ir.Value], count: ir.Value) -> None:
        """Compute strips of a map of which none is short: the last ends where the row does, though it begins before the one before ends.

        What two strips have in common is computed twice, to the same bits, and written twice: not for operands that are updated, nor for
        stores that must be aligned. The second strip begins where stores are aligned: one that crosses from line to line of the cache
        costs twice. A row with fewer items than a strip goes through scratch.
        """
        build, s = self.builder, self.s
        moving = [k for k, o in enumerate(s.operands) if o.inner != "still"]
        strided = [k for k in moving if s.operands[k].inner == "strided"]
        self._steps(pointers, [], still=True)
        lanes = i64(s.lanes)
        second = self._second_strip(pointers)
        is_short = build.icmp_signed("<", count, lanes)
        last_whole = build.sub(count, lanes)
        whole, fill, strips = build.block, self.block("fill"), self.block("strips")
        body, after = self.block("strip"), self.block("after")
        build.cbranch(is_short, fill, strips)
        build.position_at_end(fill)
        self._pad({k: pointers[k] for k in moving}, count)
        filled = build.block
        build.branch(strips)
        build.position_at_end(strips)
        starts = {k: self.merged([(pointers[k], whole), (self._padded_start(k), filled)]) for k in moving}
        strides = {k: self.merged([(self._item_stride(k), whole), (self._pad_stride(k), filled)]) for k in strided}
        last = self.merged([(last_whole, whole), (i64(0), filled)])
        entered = build.block
        build.branch(body)
        build.position_at_end(body)
        j = build.phi(I64)
        j.add_incoming(i64(0), entered)
        following = build.phi(I64)  # the strip behind this one, unless that is the last
        following.add_incoming(second, entered)
        places = self._places(pointers, starts, strides, j)
        self._steps([p for p, _ in places], [stride for _, stride in places], still=False)
        j.add_incoming(build.select(build.icmp_signed("<", following, last), following, last), build.block)
        following.add_incoming(build.add(following, lanes), build.block)
        build.cbranch(build.icmp_signed("<", j, last), body, after)
        build.position_at_end(after)
        stored = {k: pointers[k] for k in moving if s.operands[k].is_stored}
        if stored:
            with self.when(is_short):
                self._unpad(stored, {}, count)

    def _places(
        self, pointers: list[ir.Value], starts: Mapping[int, ir.Value], strides: Mapping[int, ir.Value], j: ir.Value
    ) -> list[tuple[ir.Value, ir.Value]]:
        """Return where item ``j`` of each operand lies, and how far it is to the next; those without a start do not move."""
        places: list[tuple[ir.Value, ir.Value]] = []
        for k, o in enumerate(self.s.operands):
            if k not in starts:
                places.append((pointers[k], i64(0)))
            elif k in strides:
                places.append((self.at(starts[k], self.builder.mul(j, strides[k])), strides[k]))
            else:
                places.append((self._inner(starts[k], k, j), i64(np.dtype(o.dtype).itemsize)))
        return places

    def _second_strip(self, pointers: list[ir.Value]) -> ir.Value:
        """Return the first item behind item 0 at which stores of a whole strip are aligned."""
        build, s = self.builder, self.s
        stored = [k for k, o in enumerate(s.operands) if o.is_stored and o.inner == "forward"]
        if not stored:
            return i64(s.lanes)
        size = np.dtype(s.operands[stored[0]].dtype).itemsize
        address = build.ptrtoint(pointers[stored[0]], I64)
        line = min(STRIP_ALIGNMENT, s.lanes * size)
        items = build.udiv(build.and_(build.sub(i64(0), address), i64(line - 1)), i64(size))
        return build.select(build.icmp_signed("==", items, i64(0)), i64(s.lanes), items)

    def _strip(
        self,
        pointers: list[ir.Value],
        here: dict[int, ir.Value],
        rest: ir.Value,
        is_short: ir.Value,
        each: Callable[[], None],
    ) -> None:
        """Compute one strip of the operands that move, at ``here``; of a short one ``rest`` items count."""
        build, s = self.builder, self.s
        whole, fill, body = build.block, self.block("fill"), self.block("strip")
        build.cbranch(is_short, fill, body)
        build.position_at_end(fill)
        self._pad(here, rest)
        counted = build.icmp_signed("<", self.lanes.iota(), self.lanes.splat(rest))
        filled = build.block
        build.branch(body)
        build.position_at_end(body)
        places: list[tuple[ir.Value, ir.Value]] = []
        lanes = ir.VectorType(I1, s.lanes)
        self.counted = self.merged([(ir.Constant(lanes, [1] * s.lanes), whole), (counted, filled)])
        for k, o in enumerate(s.operands):
            if k not in here:
                places.append((pointers[k], i64(0)))
                continue
            stride: ir.Value = i64(np.dtype(o.dtype).itemsize)
            pointer = self.merged([(here[k], whole), (self._padded_start(k), filled)])
            if o.inner == "strided":
                stride = self.merged([(self.argument(self.args.stride(k, self.args.loops - 1)), whole), (stride, filled)])
            places.append((pointer, stride))
        self._steps([p for p, _ in places], [stride for _, stride in places], still=False)
        each()

    def _inner(self, pointer: ir.Value, operand: int, j: ir.Value) -> ir.Value:
        """Return the address of item ``j`` of the inner loop; for backward operands that of the last item of the strip."""
        o = self.s.operands[operand]
        size = np.dtype(o.dtype).itemsize
        if o.inner == "strided":
            return self.at(pointer, self.builder.mul(j, self.argument(self.args.stride(operand, self.args.loops - 1))))
        if o.inner == "backward":
            return self.at(pointer, self.builder.mul(j, i64(-size)))
        return self.at(pointer, self.builder.mul(j, i64(size)))

    def _padded_start(self, operand: int, padded: dict[int, ir.Value] | None = None) -> ir.Value:
        o, scratch = self.s.operands[operand], (self.padded if padded is None else padded)[operand]
        if o.inner != "backward":
            return scratch
        last = (self.s.lanes - 1) * np.dtype(o.dtype).itemsize
        return self.setup.gep(scratch, [i64(last)], source_etype=I8)

    def _pad(self, here: dict[int, ir.Value], rest: ir.Value) -> None:
        """Copy the rest of a row into scratch, its last item again and again behind it."""
        build = self.builder
        loaded = [k for k in here if self.s.operands[k].is_loaded]
        if not loaded:
            return
        last = build.sub(rest, i64(1))
        with self.loop(i64(self.s.lanes)) as lane:
            item = build.select(build.icmp_signed("<", lane, last), lane, last)
            for k in loaded:
                self._copy_item(here[k], self._item_stride(k), item, self._padded_start(k), self._pad_stride(k), lane, k)

    def _unpad(self, here: dict[int, ir.Value], into: dict[int, ir.Value], rest: ir.Value) -> None:
        with self.loop(rest) as lane:
            for k, pointer in here.items():
                gap = self._pad_stride(k)
                if k in into:
                    self._copy_item(self._padded_start(k, self.padded_results), gap, lane, into[k], gap, lane, k)
                else:
                    self._copy_item(self._padded_start(k), gap, lane, pointer, self._item_stride(k), lane, k)

    def _item_stride(self, operand: int) -> ir.Value:
        o = self.s.operands[operand]
        if o.inner == "strided":
            return self.argument(self.args.stride(operand, self.args.loops - 1))
        return self._pad_stride(operand)

    def _pad_stride(self, operand: int) -> ir.Value:
        o = self.s.operands[operand]
        size = np.dtype(o.dtype).itemsize
        return i64(-size if o.inner == "backward" else size)

    def _copy_item(
        self, source: ir.Value, gap: ir.Value, item: ir.Value, target: ir.Value, target_gap: ir.Value, place: ir.Value, operand: int
    ) -> None:
        build = self.builder
        kind = ir.IntType(8 * np.dtype(self.s.operands[operand].dtype).itemsize)
        value = build.load(self.at(source, build.mul(item, gap)), typ=kind)
        value.align = 1
        build.store(value, self.at(target, build.mul(place, target_gap)), align=1)

    # --- steps ------------------------------------------------------------------------------------------------------------

    def _steps(
        self, pointers: list[ir.Value], strides: list[ir.Value], results: Mapping[int, ir.Value] = MappingProxyType({}), *, still: bool
    ) -> None:
        """Build the steps whose registers do not vary along the inner loop (``still``), or the others."""
        for step in self.s.steps:
            if step.kind == "store":
                k, inner = step.place, self.s.operands[step.place].inner
                if k in results:
                    self._store(self.value(step.outs[0]), k, results[k], i64(0), "backward" if inner == "backward" else "forward")
                elif not still:
                    self._store(self.value(step.outs[0]), k, pointers[k], strides[k], inner)
                continue
            if self.s.registers[step.outs[0]][1] == still:
                continue
            if step.kind == "load":
                stride = None if still else strides[step.place]
                self.values[step.outs[0]] = self._load(step.place, pointers[step.place], stride)
            elif step.kind == "scalar":
                dtype = np.dtype(self.s.registers[step.outs[0]][0])
                self.values[step.outs[0]] = self._scalar(step.place, dtype)
            else:
                self._apply(step)

    def _apply(self, step: StepForm) -> None:
        k = self.lanes
        operands = []
        for (kind, value), dtype in zip(step.args, map(np.dtype, step.dtypes), strict=True):
            if kind == "r":
                operands.append(k.convert(self.value(value), dtype))
            elif kind == "s":
                operands.append(self._scalar(value, dtype))
            else:
                operands.append(k.constant(value, dtype))
        scalars = tuple(value if kind == "v" else None for kind, value in step.args)
        results = tuple(map(np.dtype, step.results))
        found = lower(k, operands, Call(step.name, step.params, scalars, results))
        outs = found if isinstance(found, tuple) else (found,)
        for register, value in zip(step.outs, outs, strict=True):
            self.values[register] = k.convert(value, np.dtype(self.s.registers[register][0]))

    def _scalar(self, slot: int, dtype: np.dtype[Any]) -> Vec:
        return self._spread(self.scalars[slot], dtype)

    def _spread(self, pointer: ir.Value, dtype: np.dtype[Any]) -> Vec:
        """Return lanes that all hold the item at ``pointer``."""
        parts = [self.lanes.splat(p) for p in self._load_item(pointer, dtype)]
        return Vec(dtype, *parts)

    def _load_item(self, pointer: ir.Value, dtype: np.dtype[Any]) -> list[ir.Value]:
        build = self.builder
        element = element_type(dtype)
        if dtype.kind == "b":
            return [build.icmp_unsigned("!=", build.load(pointer, typ=I8), ir.Constant(I8, 0))]
        nparts = 2 if dtype.kind == "c" else 1
        items = []
        for part in range(nparts):
            value = build.load(self.at(pointer, i64(part * dtype.itemsize // 2)) if part else pointer, typ=element)
            value.align = 1
            items.append(value)
        return items

    def _load(self, operand: int, pointer: ir.Value, stride: ir.Value | None) -> Vec:
        o = self.s.operands[operand]
        dtype = np.dtype(o.dtype)
        if stride is None or o.inner == "still":
            return self._spread(pointer, dtype)
        lanes = self.s.lanes
        if o.inner == "strided":
            return self._gather(pointer, stride, dtype)
        if o.inner == "backward":
            pointer = self.at(pointer, i64(-(lanes - 1) * dtype.itemsize))
        found = self._load_lanes(pointer, dtype)
        if o.inner == "backward":
            found = Vec(dtype, *(self.lanes.pick(p, list(reversed(range(lanes)))) for p in found.parts))
        return found

    def _load_lanes(self, pointer: ir.Value, dtype: np.dtype[Any]) -> Vec:
        build, lanes = self.builder, self.s.lanes
        if dtype.kind == "b":
            value = build.load(pointer, typ=ir.VectorType(I8, lanes))
            value.align = 1
            return Vec(dtype, build.icmp_unsigned("!=", value, ir.Constant(value.type, [0] * lanes)))
        element = element_type(dtype)
        if dtype.kind == "c":
            value = build.load(pointer, typ=ir.VectorType(element, 2 * lanes))
            value.align = dtype.itemsize // 2
            return Vec(dtype, self.lanes.pick(value, list(range(0, 2 * lanes, 2))), self.lanes.pick(value, list(range(1, 2 * lanes, 2))))
        value = build.load(pointer, typ=ir.VectorType(element, lanes))
        value.align = 1
        return Vec(dtype, value)

    def _gather(self, pointer: ir.Value, stride: ir.Value, dtype: np.dtype[Any]) -> Vec:
        build, lanes = self.builder, self.s.lanes
        element = element_type(dtype)
        parts: list[ir.Value] = [ir.Constant(ir.VectorType(element, lanes), ir.Undefined)] * (2 if dtype.kind == "c" else 1)
        at = pointer
        for lane in range(lanes):
            items = self._load_item(at, dtype)
            parts = [build.insert_element(p, item, i32(lane)) for p, item in zip(parts, items, strict=True)]
            if lane + 1 < lanes:
                at = self.at(at, stride)
        return Vec(dtype, *parts)

    def _store(self, value: Vec, operand: int, pointer: ir.Value, stride: ir.Value, inner: str) -> None:
        o = self.s.operands[operand]
        dtype = np.dtype(o.dtype)
        value = self.lanes.convert(value, dtype)
        build, lanes = self.builder, self.s.lanes
        if inner == "forward":
            self.store_lanes(value, pointer, streams=o.streams and operand not in self.s.updated)
            return
        if inner == "backward":
            at = self.at(pointer, i64(-(lanes - 1) * dtype.itemsize))
            self.store_lanes(Vec(dtype, *(self.lanes.pick(p, list(reversed(range(lanes)))) for p in value.parts)), at)
            return
        at = pointer
        for lane in range(lanes):
            self._store_item(Vec(dtype, *(build.extract_element(p, i32(lane)) for p in value.parts)), at)
            if lane + 1 < lanes:
                at = self.at(at, stride)

    def store_lanes(self, value: Vec, pointer: ir.Value, *, streams: bool = False) -> None:
        build = self.builder
        lanes = value.real.type.count
        if value.dtype.kind == "b":
            memory = build.zext(value.real, ir.VectorType(I8, lanes))
        elif value.imag is not None:
            mixed = [lane + part * lanes for lane in range(lanes) for part in (0, 1)]
            memory = build.shuffle_vector(value.real, value.imag, ir.Constant(ir.VectorType(I32, 2 * lanes), mixed))
        else:
            memory = value.real
        store = build.store(memory, pointer, align=STRIP_ALIGNMENT if streams else 1)
        if streams:
            self.stream(store)

    def stream(self, store: ir.Instruction) -> None:
        """Have a store, which is aligned, go past the caches."""
        store.set_metadata("nontemporal", self.module.add_metadata([i32(1)]))

    def _store_item(self, value: Vec, pointer: ir.Value) -> None:
        build = self.builder
        if value.dtype.kind == "b":
            build.store(build.zext(value.real, I8), pointer, align=1)
            return
        for part, item in enumerate(value.parts):
            build.store(item, self.at(pointer, i64(part * value.dtype.itemsize // 2)) if part else pointer, align=1)

    def is_last(self, loops: Sequence[int], indices: Sequence[ir.Value]) -> ir.Value:
        """Return whether every loop is in its last round."""
        build = self.builder
        result: ir.Value = ir.Constant(I1, 1)
        for loop, index in zip(loops, indices, strict=True):
            result = build.and_(result, build.icmp_signed("==", index, build.sub(self.counts[loop], i64(1))))
        return result

    @contextmanager
    def function_of_its_own(self, name: str, nargs: int) -> Iterator[Sequence[ir.Value]]:
        """Build a function of int64 arguments beside the kernel, for `call`: code that is needed in several places, and seldom run."""
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [I64] * nargs), name)
        function.linkage = "internal"
        here = self.builder.block
        self.builder.position_at_end(function.append_basic_block("entry"))
        yield function.args
        self.builder.ret_void()
        self.builder.position_at_end(here)

    def call(self, name: str, *values: ir.Value) -> None:
        self.builder.call(self.module.globals[name], values)

    def value(self, register: int) -> Vec:
        value = self.values[register]
        assert value is not None
        return value

    def least(self, value: ir.Value, limit: int) -> ir.Value:
        return self.builder.select(self.builder.icmp_signed("<", value, i64(limit)), value, i64(limit))

    def offset(self, loops: Sequence[int], indices: Sequence[ir.Value], word: int, start: ir.Value) -> ir.Value:
        """Return ``start``, plus for each loop its index times the argument at ``word`` plus its number."""
        build = self.builder
        for loop, index in zip(loops, indices, strict=True):
            start = build.add(start, build.mul(index, self.argument(word + loop)))
        return start


def i32(value: int) -> ir.Constant:
    return ir.Constant(I32, value)


def i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)
