"""Compiled kernels as the scheduler runs them: a plain kernel of the NumPy engine, and the code that does the same in one pass.

What lies in the driver's memory or is made from positions is moved piece by piece through scratch, which the code sees as any other
operand. After each piece the processor's flags are looked at: where NumPy might warn or raise, the NumPy engine computes the piece again
and says what NumPy says. What is written where it is read goes in steps, each exactly once (`scheduler.redo`): the code's own, which stops
at flags before anything of the step is written; pieces are the steps where a place written to is copied, not mapped.

Promises: loading this imports no code generator; a worker needs none.
Never put here: LLVM, files, grids.
"""

from __future__ import annotations

import ctypes
import math
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scheduler.redo import COMPUTE, COPY, MOST_STEPS, address_of, pack
from scheduler.segments import Remote
from scheduler.task import Context
from shmarray.kernels.llvm.objects import load
from shmarray.kernels.llvm.steps import Steps
from shmarray.kernels.llvm.structure import FLAGS, Arguments, Structure
from shmarray.kernels.numpy import (
    Evaluator,
    Made,
    MapKernel,
    Redone,
    Staged,
    Together,
    Window,
    fill_reader,
    open_window,
    put,
    run_step,
    stage,
)
from shmarray.kernels.program import Apply, FillStep, Program, Store
from shmarray.kernels.reduce import ReduceKernel, Tree, split_number
from shmarray.ops.reductions_table import REDUCTIONS, Part
from shmarray.region import Box
from shmarray.tiles import Grid, blocks

__all__ = ["CompiledKernel"]

MOST_REPLAYS = 8  # a layer whose every piece raises flags is computed twice only so often per process
MOST_SHAPES = 64  # of pieces, that are remembered
ALL_FLAGS = sum(FLAGS.values())
_ONE = slice(0, 1)
_PROBLEMS = tuple(
    (kind, FLAGS[kind], problem) for kind, problem in (("divide", "divide by zero"), ("over", "overflow"), ("invalid", "invalid value"))
)
PlainKernel = MapKernel | ReduceKernel


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A plain kernel and its code. ``loops``: the program's axes in each loop; ``fills``: the steps behind the last operands."""

    plain: PlainKernel
    structure: Structure
    loops: tuple[tuple[int, ...], ...]
    fills: tuple[FillStep, ...]
    aside: tuple[int, ...]  # operands updated piece by piece; those of the structure the code updates itself
    ragged: tuple[int, ...]  # operands copied from the driver's memory that are not in C order there
    piece_sizes: tuple[int, ...]
    scalars: bytes
    scratch_nbytes: int  # of accumulators and of the tree above the leaves
    raises: bool  # np.errstate says "raise" somewhere
    blamed: Apply | None  # the step that all flags are of
    quiet: bool  # nothing is to be said of any flag
    code: bytes

    @property
    def program(self) -> Program:
        return self.plain.program

    @property
    def grid(self) -> Grid:
        return self.plain.grid

    @property
    def goes_along(self) -> bool:
        """Whether tasks that lie side by side may run as one: tiles lie one behind the other along one axis, which the code has a
        loop for (it has none where every tile is one item of it wide), and the code takes them whole."""
        along = self.grid.slab_axis() if isinstance(self.plain, MapKernel) else None
        return any(along in axes for axes in self.loops) and self.piece_sizes == self.grid.sizes

    def on(self, grid: Grid) -> CompiledKernel | None:
        """Return the same in tiles of another size along the axis that they are cut along; None where that cannot be."""
        along = self.grid.slab_axis()
        is_one_piece = isinstance(self.plain, MapKernel) and self.piece_sizes == self.grid.sizes
        if along is None or along < 0 or grid.slab_axis() != along or not is_one_piece:
            return None
        if grid.sizes[along] > 1 and not any(along in axes for axes in self.loops):
            return None  # tiles were one item wide so far
        if any(operand.streams for operand in self.structure.operands):
            return None  # aligned in the tiles it was made for; and what goes past the caches is not there for the next step
        return replace(self, plain=replace(self.plain, grid=grid), piece_sizes=grid.sizes)

    def bind(self, context: Context) -> Callable[[int], None]:
        bound = _Bound(self, context)
        return Together(bound.run, bound.run_together) if bound.goes_together else bound.run

    def __reduce__(self) -> tuple[Any, ...]:
        short = replace(self, structure=replace(self.structure, steps=(), registers=()))  # what only the code depends on
        fields = tuple(getattr(short, name) for name in self.__slots__)
        if self.program.made:
            return CompiledKernel, fields  # a user's function may be among them: cloudpickle knows how to send it
        return _loaded, (pickle.dumps(fields, pickle.HIGHEST_PROTOCOL),)  # five times as fast


def _loaded(blob: bytes) -> CompiledKernel:
    return CompiledKernel(*pickle.loads(blob))


class _Bound:
    """A compiled kernel with this process's memory."""

    def __init__(self, kernel: CompiledKernel, context: Context) -> None:
        self.kernel, self.context = kernel, context
        self.plain = kernel.plain
        program = kernel.plain.program
        s = kernel.structure
        self.where = Arguments(s)
        self.words = (ctypes.c_int64 * self.where.count)()
        self.address = ctypes.addressof(self.words)
        self.function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)(load(kernel.code))
        ctypes.memmove(ctypes.addressof(self.words) + 8 * self.where.scalars, kernel.scalars, len(kernel.scalars))
        self.keep: list[Any] = []
        self.fetched: list[tuple[int, Staged]] = []
        self.flushed: list[tuple[int, Staged]] = []
        self.redone: list[Redone] = []  # of what is updated piece by piece
        self.direct: list[tuple[int, int, tuple[int, ...]]] = []  # operand, address, strides
        self.made: dict[int, Made] = {}
        for number, operand in enumerate(program.operands):
            if operand.source is not None:
                self.made[number] = Made(operand, context)
                continue
            window = open_window(context, operand)
            form = s.operands[number]
            if isinstance(window, Remote):
                staged = Staged(window)
                if form.is_stored:
                    self.flushed.append((number, staged))
                elif form.is_loaded:
                    self.fetched.append((number, staged))
            else:
                self._use(number, window)
            if number in kernel.aside:
                self.redone.append(Redone(window, operand, context))
        first_fill = len(program.operands) + len(kernel.aside)
        self.fills = [(first_fill + n, fill_reader(step, program.registers[step.out].dtype)) for n, step in enumerate(kernel.fills)]
        self.evaluator: Evaluator | None = None
        self.replays = 0
        self.explained = 0  # flags of pieces that were computed again
        self.held: list[Any] = []
        self.header: np.ndarray[Any, Any] | None = None
        self.steps: dict[tuple[int, ...], Steps] = {}  # of pieces, by their shape
        if isinstance(self.plain, ReduceKernel):
            self._prepare_states(self.plain)
        if isinstance(self.plain, ReduceKernel):
            self.run = self._run_reduce
        elif kernel.aside:
            self.run = self._run_in_pieces
        else:
            self.run = self._run_in_steps if s.updated else self._run_map
        is_plain = not (self.made or self.fetched or self.flushed or self.fills or kernel.aside or s.updated)
        self.goes_together = is_plain and kernel.goes_along
        if self.goes_together:
            self._prepare_slabs()

    def _prepare_slabs(self) -> None:
        """Note what differs between pieces that are cut along one axis alone, and enter the rest of the arguments."""
        grid, words = self.plain.grid, self.words
        axis = grid.slab_axis()
        assert axis is not None
        self.slab_axis, self.slabs = axis, grid.slabs(axis)
        self.moving = [(number, address, strides[axis]) for number, address, strides in self.direct]
        self.slab_counts: list[tuple[int, int]] = []  # word, items for each one along the axis
        for loop, axes in enumerate(self.kernel.loops):
            each = math.prod(grid.shape[a] for a in axes if a != axis)
            words[self.where.counts + loop] = each
            if axis in axes:
                self.slab_counts.append((self.where.counts + loop, each))

    def run_together(self, start: int, stop: int) -> None:
        """Run tasks that lie one behind the other as one piece."""
        low, high = self.slabs(start, stop)
        if low >= high:
            return
        words = self.words
        for number, address, stride in self.moving:
            words[number] = address + low * stride
        for word, each in self.slab_counts:
            words[word] = (high - low) * each
        flags = self.function(self.address)
        if flags & self._mask():
            shape, axis = self.plain.grid.shape, self.slab_axis
            piece = tuple([slice(low, high) if a == axis else slice(0, n) for a, n in enumerate(shape)])
            self._explain(flags, piece, (piece,))

    def _use(self, number: int, window: np.ndarray[Any, Any]) -> None:
        """Enter an array that lies in this process for the whole run."""
        strides = tuple(0 if n == 1 else stride for n, stride in zip(window.shape, window.strides, strict=True))
        self.direct.append((number, window.ctypes.data, strides))
        self.keep.append(window)
        self._set_strides(number, strides)

    def _set_strides(self, number: int, strides: tuple[int, ...]) -> None:
        words, where = self.words, self.where
        for loop, axes in enumerate(self.kernel.loops):
            words[where.stride(number, loop)] = strides[axes[-1]] if axes else 0

    def _set_copied(self, number: int, array: np.ndarray[Any, Any]) -> None:
        """Enter the array of one piece."""
        form = self.kernel.structure.operands[number]
        strides = tuple(0 if n == 1 else stride for n, stride in zip(array.shape, array.strides, strict=True))
        inner = self.kernel.loops[-1]
        if form.inner == "forward" and inner and array.shape[inner[-1]] != 1 and strides[inner[-1]] != array.itemsize:
            raise AssertionError(f"operand {number} of shape {array.shape} has strides {array.strides}")
        self.words[number] = array.ctypes.data
        self._set_strides(number, strides)

    def _call(self, piece: Box) -> None:
        """Run the code on a piece; results for the driver's memory stay in scratch, those of what is updated in the redo slot."""
        self._enter(piece)
        flags = self.function(self.address)
        if flags & self._mask():
            self._explain(flags, piece, (piece,))

    def _enter(self, piece: Box) -> None:
        """Set the arguments for a piece."""
        words, where = self.words, self.where
        starts = [p.start for p in piece]
        for number, address, strides in self.direct:
            for start, stride in zip(starts, strides, strict=True):
                address += start * stride
            words[number] = address
        held = []
        for number, made in self.made.items():
            self._set_copied(number, made[piece])
        for number, staged in self.fetched:
            staged.fetch(piece)
            array = staged[piece]
            if number in self.kernel.ragged:  # what was fetched may have gaps: loops that are one need it in one piece
                array = array.copy(order="K")
                held.append(array)
            self._set_copied(number, array)
        for number, target in self.flushed:
            target.begin(piece)
            self._set_copied(number, target[piece])
        for number, redone in enumerate(self.redone, len(self.plain.program.operands)):
            self._set_copied(number, redone.tile)
        for number, fill in self.fills:
            array = np.ascontiguousarray(fill(piece))
            held.append(array)
            self._set_copied(number, array)
        for loop, axes in enumerate(self.kernel.loops):
            count = 1
            for a in axes:
                count *= piece[a].stop - piece[a].start
            words[where.counts + loop] = count
        self.held = held  # arrays of this piece, until the next

    def _mask(self) -> int:
        """Return the flags of which there may be something to say."""
        if self.kernel.quiet:
            return 0
        return ALL_FLAGS if self.kernel.raises or self.replays < MOST_REPLAYS else ALL_FLAGS & ~self.explained

    def _explain(self, flags: int, piece: Box, boxes: Iterable[Box]) -> None:
        """Say what NumPy says of the flags that some boxes of a piece have raised."""
        self.replays += 1
        self.explained |= flags
        if self.kernel.blamed is not None:
            self._blame(self.kernel.blamed, flags)
        else:
            self._replay(piece, boxes)

    def _commit(self, piece: Box) -> None:
        for _, target in self.flushed:
            target.flush(piece)

    def _run_map(self, index: int) -> None:
        sizes = self.kernel.piece_sizes
        for tile in self.plain.grid.tiles(index):
            self._make(tile)
            for piece in blocks(tile, sizes) if sizes != self.plain.grid.sizes else (tile,):
                self._call(piece)
                self._commit(piece)

    def _run_in_pieces(self, index: int) -> None:
        """Update what cannot be written by the code: a piece is a step."""
        redo, number = self.context.redo, 0
        for tile in self.plain.grid.tiles(index):
            pieces = list(blocks(tile, self.kernel.piece_sizes))
            todo = pieces[max(0, redo.first_step - number) :]
            number += len(pieces)
            if todo:
                self._make(tile)
            for piece in todo:
                run_step(redo, self.redone, piece, lambda piece=piece: self._compute(piece))  # type: ignore[misc]  # a lambda's default

    def _compute(self, piece: Box) -> None:
        self._call(piece)
        self._commit(piece)  # before the piece is updated: who goes on after this process's end does not come back to it

    def _run_in_steps(self, index: int) -> None:
        """Update in place: the code goes in steps, numbered through all pieces of the task."""
        self._begin_steps()
        first, number, sizes = self.context.redo.first_step, 0, self.kernel.piece_sizes
        for tile in self.plain.grid.tiles(index):
            is_made = False
            for piece in blocks(tile, sizes) if sizes != self.plain.grid.sizes else (tile,):
                steps = self._steps_of(piece)
                if number + steps.count > first:
                    if not is_made:
                        self._make(tile)
                        is_made = True
                    self._update(piece, steps, number, max(number, first))
                number += steps.count

    def _steps_of(self, piece: Box) -> Steps:
        shape = tuple([p.stop - p.start for p in piece])
        found = self.steps.get(shape)
        if found is None:
            if len(self.steps) > MOST_SHAPES:
                self.steps.clear()
            found = self.steps[shape] = Steps.of(shape, self.kernel.loops, self.kernel.structure)
        return found

    def _begin_steps(self) -> None:
        """Enter where the code finds the cursor, the slot and its records, which another layer may have had meanwhile."""
        words, where, redo = self.words, self.where, self.context.redo
        if self.header is None:
            self.header = self._new_header()
        redo.restore(self.header)
        words[where.computing], words[where.copying] = redo.word(COMPUTE), redo.word(COPY)

    def _new_header(self) -> np.ndarray[Any, Any]:
        """Return what the slot holds in front of results, but for what is of one step; enter what is of no task."""
        words, where, s = self.words, self.where, self.kernel.structure
        redo, memory, operands = self.context.redo, self.context.memory, self.plain.program.operands
        words[where.cursor], words[where.each] = redo.cursor_address(), pack(0, 1)
        room = redo.room([(s.step_items,)] * len(s.updated), [operands[k].dtype for k in s.updated])
        for n, (k, results) in enumerate(zip(s.updated, room, strict=True)):
            last = len(self.kernel.loops) - 1
            inner = words[where.stride(k, last)]
            if s.operands[k].inner == "backward":
                inner = -inner  # in the slot and in its record as in memory
            strides = (words[where.stride(k, last - 1)] if last else 0, inner)
            segment = self.context.addresses[operands[k].buffer].segment
            words[where.results + n] = address_of(results)
            words[where.pointers + n], words[where.shapes + n] = redo.outline(n, memory, segment, results, strides)
        header: np.ndarray[Any, Any] = redo.outlined(len(s.updated))
        return header

    def _update(self, piece: Box, steps: Steps, number: int, first: int, stop: int = MOST_STEPS) -> None:
        """Do the steps of a piece, its first being ``number``, from ``first`` on and before ``stop``."""
        words, where = self.words, self.where
        self._enter(piece)
        words[where.rows], words[where.width] = steps.rows, steps.width
        words[where.number], words[where.first_step], words[where.stop] = number, first, min(stop, number + steps.count)
        # Where one operation is all there is, its flags say all: there is nothing to look at before it is written.
        mask = self._mask()
        words[where.mask] = 0 if self.kernel.blamed is not None else mask
        end = words[where.stop]
        flags = self.function(self.address)
        reached = words[where.stop]
        if reached < end:
            # Nothing of what is left is updated: NumPy sees the same operands, and raises before they change.
            self._explain(flags, piece, steps.boxes(piece, reached - number))
            words[where.first_step], words[where.stop], words[where.mask] = reached, end, 0
            self.function(self.address)
        elif flags & mask and self.kernel.blamed is not None:
            self._explain(flags, piece, ())

    def _make(self, tile: Box) -> None:
        for made in self.made.values():
            made.fetch(tile)

    def _blame(self, step: Apply, flags: int) -> None:
        modes = dict(step.errstate)
        for kind, bit, problem in _PROBLEMS:
            if flags & bit and modes.get(kind, "warn") != "ignore":
                self.context.warn("RuntimeWarning", f"{problem} encountered in {step.name}", step.line)

    def _replay(self, piece: Box, boxes: Iterable[Box]) -> None:
        """Let the NumPy engine compute boxes of a piece, write nothing, and say what NumPy says."""
        plain = self.plain
        if self.evaluator is None:
            steps = tuple(step for step in plain.program.steps if not isinstance(step, Store))
            registers = [spec.register for spec in plain.specs] if isinstance(plain, ReduceKernel) else ()
            program = replace(plain.program, steps=steps)
            self.evaluator = Evaluator(program, self.context, math.prod(self.kernel.piece_sizes), registers, self.made)
        evaluator = self.evaluator
        evaluator.begin(piece)
        axes = plain.axes if isinstance(plain, ReduceKernel) else ()
        sizes = plain.grid.block_sizes
        with evaluator.errstate():
            if not isinstance(plain, ReduceKernel):
                for box in boxes:
                    for block in blocks(box, sizes):
                        evaluator.run(block)
                return
            kept = tuple([_ONE if a in axes else p for a, p in enumerate(piece)])
            reduced = tuple([p if a in axes else _ONE for a, p in enumerate(piece)])
            for kept_block in blocks(kept, tuple([1 if a in axes else n for a, n in enumerate(sizes)])):
                trees: list[Tree] = []
                for reduced_block in blocks(reduced, tuple([n if a in axes else 1 for a, n in enumerate(sizes)])):
                    box = tuple([r if a in axes else k for a, (k, r) in enumerate(zip(kept_block, reduced_block, strict=True))])
                    self._replay_reductions(plain, box, evaluator.run(box), trees)
                for tree, spec in zip(trees, plain.specs, strict=True):
                    with spec.guard(self.context):
                        tree.result()

    def _replay_reductions(self, plain: ReduceKernel, box: Box, values: list[Any], trees: list[Tree]) -> None:
        evaluator, shape = self.evaluator, tuple([p.stop - p.start for p in box])
        assert evaluator is not None
        if not trees:
            trees.extend(Tree(row.combine) for row in self.rows)
        for spec, row, tree in zip(plain.specs, self.rows, trees, strict=True):
            evaluator.current = (spec.label, spec.line)
            value = np.broadcast_to(values[spec.register], shape).copy()
            with spec.guard(self.context):
                states = row.leaf(value, Part(box, plain.grid.shape, plain.axes), spec.state_dtypes, dict(spec.params))
                tree.push(states, self._count(box))

    # --- reductions -------------------------------------------------------------------------------------------------------

    def _prepare_states(self, plain: ReduceKernel) -> None:
        """Lay out scratch and the states of a piece: kept axes in the order of the loops, the inner one padded to whole strips."""
        kernel, s, words, where = self.kernel, self.kernel.structure, self.words, self.where
        self.rows = [REDUCTIONS[spec.kind] for spec in plain.specs]
        self.params = [dict(spec.params) for spec in plain.specs]
        is_across = not s.reduced[-1]
        scratch = np.empty(kernel.scratch_nbytes + 64, np.uint8)
        self.keep.append(scratch)
        words[where.scratch] = -(-scratch.ctypes.data // 64) * 64
        self.partials = [[open_window(self.context, o) for o in spec.partials] for spec in plain.specs]
        self.outs: list[Window | Staged | None] = [
            None if spec.out is None else stage(open_window(self.context, spec.out)) for spec in plain.specs
        ]
        # Places count in C order over the reduced axes of the whole array.
        self.place_strides = {}
        step = 1
        for a in reversed(plain.axes):
            self.place_strides[a] = step
            step *= plain.grid.shape[a]
        for loop, axes in enumerate(kernel.loops):
            if s.reduced[loop] and axes:
                words[where.place_strides + loop] = self.place_strides[axes[-1]]
        self.kept_loops = [axes for axes, reduced in zip(kernel.loops, s.reduced, strict=True) if not reduced]
        self.is_across = is_across
        self.is_one_piece = kernel.piece_sizes == plain.grid.sizes and plain.grid.edges is None and not self.made
        self.is_split = any(spec.partials for spec in plain.specs)
        self.layouts: dict[tuple[int, ...], tuple[list[tuple[np.ndarray[Any, Any], ...]], list[tuple[int, int]]]] = {}

    def _states_of(self, piece: Box) -> list[tuple[np.ndarray[Any, Any], ...]]:
        """Enter the arrays for the states of a piece and return them, in the order of its axes; the same for every piece of a shape."""
        words, where = self.words, self.where
        shape = tuple([p.stop - p.start for p in piece])
        found = self.layouts.get(shape)
        if found is None:
            found = self.layouts[shape] = self._new_states(shape)
        states, entries = found
        for word, value in entries:
            words[word] = value
        first = 0
        for a, stride in self.place_strides.items():
            first += piece[a].start * stride
        words[where.first_place] = first
        return states

    def _new_states(self, shape: tuple[int, ...]) -> tuple[list[tuple[np.ndarray[Any, Any], ...]], list[tuple[int, int]]]:
        """Return arrays for the states of pieces of ``shape``, and what to enter for them: (word, value)."""
        s, where = self.kernel.structure, self.where
        order = [a for loop in self.kept_loops for a in loop]
        counts = [shape[a] for a in order]
        grouped = [math.prod(shape[a] for a in loop) for loop in self.kept_loops]
        padded = list(grouped)
        if self.is_across:
            padded[-1] = -(-padded[-1] // s.lanes) * s.lanes
        step = 1
        entries = []
        loops = [loop for loop, reduced in enumerate(s.reduced) if not reduced]
        for loop, n in zip(reversed(loops), reversed(padded), strict=True):
            entries.append((where.state_strides + loop, step))
            step *= n
        others = [a for a in range(len(shape)) if a not in order]  # reduced, or of length 1 in a piece
        back = np.argsort([*order, *others])
        used: Any = (*(slice(0, n) for n in grouped), ...)  # the dots: 0-d stays an array
        states, word = [], where.states
        for form in s.folds:
            mine: list[np.ndarray[Any, Any]] = []
            for name in form.states:
                array = np.empty(step, np.dtype(name))
                entries.append((word, array.ctypes.data))
                word += 1
                whole = array.reshape(padded)[used]
                mine.append(whole.reshape([*counts, *(1 for _ in others)]).transpose(back))
            states.append(tuple(mine))
        return states, entries

    def _run_reduce(self, index: int) -> None:
        plain = self.plain
        assert isinstance(plain, ReduceKernel)
        grid, axes = plain.grid, plain.axes
        whole = grid.box(index)
        split = split_number(grid, axes, index) if self.is_split else 0
        kept = tuple([_ONE if a in axes else p for a, p in enumerate(whole)])
        for out in self.outs:
            if isinstance(out, Staged):
                out.begin(kept)
        if self.is_one_piece:
            states = self._states_of(whole)
            self._call(whole)
            self._commit(whole)
            self._finish(kept, split, [(state, self._count(whole)) for state in states])
        else:
            self._walk(index, kept, split)
        for out in self.outs:
            if isinstance(out, Staged):
                out.flush(kept)

    def _count(self, piece: Box) -> int:
        """Return how many items of a piece go into one result."""
        count = 1
        for a in self.place_strides:
            count *= piece[a].stop - piece[a].start
        return count

    def _walk(self, index: int, kept: Box, split: int) -> None:
        """Compute a box tile by tile and piece by piece, and merge what comes out."""
        grid, sizes, axes = self.plain.grid, self.kernel.piece_sizes, self.place_strides
        kept_sizes = tuple([1 if a in axes else n for a, n in enumerate(sizes)])
        reduced_sizes = tuple([n if a in axes else 1 for a, n in enumerate(sizes)])
        kept_pieces = list(blocks(kept, kept_sizes))
        growing = [[Tree(row.combine) for row in self.rows] for _ in kept_pieces]
        plain = self.plain
        assert isinstance(plain, ReduceKernel)
        for tile in grid.tiles(index):
            self._make(tile)
            reduced = tuple([p if a in axes else _ONE for a, p in enumerate(tile)])
            for kept_piece, trees in zip(kept_pieces, growing, strict=True):
                for reduced_piece in blocks(reduced, reduced_sizes):
                    piece = tuple([r if a in axes else k for a, (k, r) in enumerate(zip(kept_piece, reduced_piece, strict=True))])
                    states = self._states_of(piece)
                    self._call(piece)
                    self._commit(piece)
                    for tree, state, spec in zip(trees, states, plain.specs, strict=True):
                        with spec.guard(self.context):
                            tree.push(tuple([values.copy() for values in state]), self._count(piece))
        for kept_piece, trees in zip(kept_pieces, growing, strict=True):
            results = []
            for tree, spec in zip(trees, plain.specs, strict=True):
                with spec.guard(self.context):
                    results.append(tree.result())
            self._finish(kept_piece, split, results)

    def _finish(self, kept: Box, split: int, results: list[tuple[tuple[np.ndarray[Any, Any], ...], int]]) -> None:
        """Write states to the partial results, or what they come to to the results."""
        plain = self.plain
        assert isinstance(plain, ReduceKernel)
        for spec, row, extra, windows, out, (states, count) in zip(
            plain.specs, self.rows, self.params, self.partials, self.outs, results, strict=True
        ):
            if out is None:
                for window, state in zip(windows, states, strict=True):
                    put(window, (slice(split, split + 1), *kept), state[None])
                continue
            with spec.guard(self.context):
                put(out, kept, row.finish(states, count, spec.dtype, extra))
