"""Reductions in the NumPy engine: the partial step of each tile, fused with the program before it; the fold of the partials.

    tile (kept box x reduced box)  --blocks in C order-->  leaves  --pairwise tree-->  states  -->  partial[split, kept box]
    finish: for a kept box, partial[0..S)  --pairwise tree-->  states  -->  result

A task may walk through several tiles along the reduced axes, in order, where part of its input is made tile by tile: the trees of
its kept box then grow from tile to tile.

Promises: the tree over leaves is fixed by the grid, so results are bit-identical whoever computes which tile. Extra memory is the
partials: a constant (`tiles.MOST_PARTIAL_ITEMS`), however large the input; none when no reduced axis is cut.
Never put here: what a reduction means (`ops.reductions_table`), grids (`tiles`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from scheduler.segments import Remote
from scheduler.task import Context
from shmarray.kernels.numpy import Evaluator, Staged, Window, floating_state, open_window, put, stage
from shmarray.kernels.program import Operand, Program
from shmarray.ops.reductions_table import REDUCTIONS, Part, States
from shmarray.region import Box
from shmarray.tiles import Grid, blocks

__all__ = ["FinishKernel", "ReduceKernel", "ReduceSpec", "Tree", "split_number"]

NDArray = np.ndarray[Any, Any]


class Tree:
    """Pairwise merging of states that arrive in order: the binary counter of merge sort, log2(n) states deep."""

    __slots__ = ("combine", "stack")

    def __init__(self, combine: Callable[[States, States, int, int], States]) -> None:
        self.combine = combine
        self.stack: list[tuple[int, States, int]] = []  # (level, states, items seen)

    def push(self, states: States, count: int) -> None:
        level = 0
        stack = self.stack
        while stack and stack[-1][0] == level:
            _, before, seen = stack.pop()
            states = self.combine(before, states, seen, count)
            count += seen
            level += 1
        stack.append((level, states, count))

    def result(self) -> tuple[States, int]:
        _, states, count = self.stack.pop()
        while self.stack:
            _, before, seen = self.stack.pop()
            states = self.combine(before, states, seen, count)
            count += seen
        return states, count


@dataclass(frozen=True, slots=True)
class ReduceSpec:
    """One reduction of a layer: of register ``register``, into ``partials`` (one per state: split, then axes) or ``out``."""

    kind: str
    register: int
    dtype: np.dtype[Any]
    params: tuple[tuple[str, Any], ...]
    state_dtypes: tuple[np.dtype[Any], ...]
    partials: tuple[Operand, ...]
    out: Operand | None
    label: str
    line: str
    errstate: tuple[tuple[str, str], ...] = ()  # what np.errstate said, where that is not the default

    def guard(self, context: Context) -> np.errstate:
        """Return the floating-point state to merge and finish under: what NumPy would warn of is reported to the driver."""
        return floating_state(context, self.errstate, self.label, self.line)


@dataclass(frozen=True, slots=True)
class ReduceKernel:
    """Computes a program and, in the same pass, the partial step of reductions over ``axes``; stores of the program run, too."""

    program: Program
    grid: Grid
    axes: tuple[int, ...]
    specs: tuple[ReduceSpec, ...]

    def bind(self, context: Context) -> Callable[[int], None]:
        grid, axes = self.grid, self.axes
        evaluator = Evaluator(self.program, context, math.prod(grid.sizes), [spec.register for spec in self.specs])
        sizes = grid.block_sizes
        rows = [REDUCTIONS[spec.kind] for spec in self.specs]
        params = [dict(spec.params) for spec in self.specs]
        partials = [[open_window(context, operand) for operand in spec.partials] for spec in self.specs]
        outs = [None if spec.out is None else stage(open_window(context, spec.out)) for spec in self.specs]
        labels = [(spec.label, spec.line) for spec in self.specs]

        kept_sizes = tuple(1 if a in axes else size for a, size in enumerate(sizes))
        reduced_sizes = tuple(size if a in axes else 1 for a, size in enumerate(sizes))

        def run(index: int) -> None:
            split = split_number(grid, axes, index)
            whole = grid.box(index)
            kept = tuple([slice(0, 1) if a in axes else piece for a, piece in enumerate(whole)])
            kept_blocks = list(blocks(kept, kept_sizes))
            growing: list[list[Tree]] = [[] for _ in kept_blocks]  # trees, while a task walks through its tiles
            for out in outs:
                if isinstance(out, Staged):
                    out.begin(kept)
            for tile in grid.tiles(index):
                reduced = tuple([piece if a in axes else slice(0, 1) for a, piece in enumerate(tile)])
                is_last = all(tile[a].stop == whole[a].stop for a in axes)
                evaluator.begin(tile)
                with evaluator.errstate():
                    for number, kept_block in enumerate(kept_blocks):
                        trees = growing[number] or [Tree(row.combine) for row in rows]
                        for reduced_block in blocks(reduced, reduced_sizes):
                            box = tuple([r if a in axes else k for a, (k, r) in enumerate(zip(kept_block, reduced_block, strict=True))])
                            values = evaluator.run(box)
                            shape = tuple([piece.stop - piece.start for piece in box])
                            count = math.prod([shape[a] for a in axes])
                            part = Part(box, grid.shape, axes)
                            for spec, row, extra, tree, label in zip(self.specs, rows, params, trees, labels, strict=True):
                                value = values[spec.register]
                                if value.shape != shape:
                                    value = np.broadcast_to(value, shape)
                                evaluator.current = label
                                if not spec.errstate:
                                    tree.push(row.leaf(value, part, spec.state_dtypes, extra), count)
                                    continue
                                with spec.guard(context):
                                    tree.push(row.leaf(value, part, spec.state_dtypes, extra), count)
                        if not is_last:
                            growing[number] = trees
                            continue
                        growing[number] = []
                        for spec, row, extra, tree, windows, out in zip(self.specs, rows, params, trees, partials, outs, strict=True):
                            with spec.guard(context):
                                states, count = tree.result()
                                if out is not None:
                                    put(out, kept_block, row.finish(states, count, spec.dtype, extra))
                            for window, state in zip(windows, states, strict=False):
                                put(window, (slice(split, split + 1), *kept_block), state[None])
                evaluator.end(tile)
            for out in outs:
                if isinstance(out, Staged):
                    out.flush(kept)

        return run


def split_number(grid: Grid, axes: tuple[int, ...], index: int) -> int:
    """Return which part of the reduced axes a task has: the row of the partial results it writes."""
    split = 0
    place, counts = grid.index(index), grid.counts
    for a in axes:
        split = split * counts[a] + place[a]
    return split


@dataclass(frozen=True, slots=True)
class FinishKernel:
    """Folds the partials of one reduction and writes the result, box by box of the kept axes."""

    spec: ReduceSpec
    out: Operand
    splits: tuple[int, ...]  # items each split has seen, per output item
    grid: Grid

    def bind(self, context: Context) -> Callable[[int], None]:
        spec = self.spec
        row, params = REDUCTIONS[spec.kind], dict(spec.params)
        windows = [open_window(context, operand) for operand in spec.partials]
        out = open_window(context, self.out)

        def run(index: int) -> None:
            box = self.grid.box(index)
            with spec.guard(context):
                tree = Tree(row.combine)
                for split, count in enumerate(self.splits):
                    tree.push(tuple([_get(window, split, box) for window in windows]), count)
                states, total = tree.result()
                put(out, box, row.finish(states, total, spec.dtype, params))

        return run


def _get(window: Window, split: int, box: Box) -> NDArray:
    part = window[(slice(split, split + 1), *box)]
    values: NDArray = part.read() if isinstance(part, Remote) else part
    first: NDArray = values[0]
    return first
