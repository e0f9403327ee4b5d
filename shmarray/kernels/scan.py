"""Scans in the NumPy engine: the running result of a ufunc along one axis, fused with the program before it.

Where the other axes give enough tasks, a task walks its axis alone. Otherwise the axis is cut into segments: partials of each
segment (`reduce`), their running result (`CarryKernel`), then every segment from its carry, all at once.
Never put here: what to cut (`plan`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scheduler.segments import Remote
from scheduler.task import Context
from shmarray.kernels.numpy import MOST_STAGED_ITEMS, Evaluator, Staged, Window, floating_state, open_window, put, stage
from shmarray.kernels.program import Operand, Program
from shmarray.tiles import Grid, blocks

__all__ = ["CarryKernel", "ScanKernel"]


@dataclass(frozen=True, slots=True)
class ScanKernel:
    """Writes the running ``ufunc`` of register ``register`` along ``axis``, tile by tile; ``carry``: what came before a tile."""

    program: Program
    grid: Grid
    axis: int
    ufunc: str
    register: int
    out: Operand
    carry: Operand | None
    line: str = ""
    errstate: tuple[tuple[str, str], ...] = ()  # what np.errstate said, where that is not the default

    def bind(self, context: Context) -> Callable[[int], None]:
        evaluator = Evaluator(self.program, context, math.prod(self.grid.sizes))
        ufunc = getattr(np, self.ufunc)
        axis, dtype = self.axis, self.out.dtype
        target: Window | Staged = open_window(context, self.out)
        if math.prod(self.grid.sizes) <= MOST_STAGED_ITEMS:
            target = stage(target)
        carries = None if self.carry is None else open_window(context, self.carry)
        sizes = self.grid.block_sizes
        across = tuple(1 if a == axis else size for a, size in enumerate(sizes))

        def run(index: int) -> None:
            tile = self.grid.box(index)
            kept = tuple([slice(0, 1) if a == axis else piece for a, piece in enumerate(tile)])
            segment = tile[axis].start // self.grid.sizes[axis]
            with evaluator.errstate():
                evaluator.begin(tile)
                if isinstance(target, Staged):
                    target.begin(tile)
                for lanes in blocks(kept, across):
                    carry = None
                    if carries is not None and segment:
                        part = carries[(slice(segment - 1, segment), *lanes)]
                        carry = (part.read() if isinstance(part, Remote) else part)[0]
                    for low in range(tile[axis].start, tile[axis].stop, sizes[axis]):
                        piece = slice(low, min(low + sizes[axis], tile[axis].stop))
                        box = tuple([piece if a == axis else lane for a, lane in enumerate(lanes)])
                        value = evaluator.run(box)[self.register]
                        shape = tuple([p.stop - p.start for p in box])
                        if value.shape != shape:
                            value = np.broadcast_to(value, shape)
                        with floating_state(context, self.errstate, "accumulate", self.line):
                            result = ufunc.accumulate(value, axis=axis, dtype=dtype)
                            if carry is not None:
                                result = ufunc(carry, result)
                        put(target, box, result)
                        carry = result[tuple([slice(-1, None) if a == axis else slice(None) for a in range(len(box))])]
                evaluator.end(tile)
                if isinstance(target, Staged):
                    target.flush(tile)

        return run


@dataclass(frozen=True, slots=True)
class CarryKernel:
    """Turns the partials of segments (axis 0) into their running result."""

    ufunc: str
    partials: Operand
    out: Operand
    grid: Grid
    line: str = ""
    errstate: tuple[tuple[str, str], ...] = ()

    def bind(self, context: Context) -> Callable[[int], None]:
        ufunc = getattr(np, self.ufunc)
        source, target = open_window(context, self.partials), open_window(context, self.out)

        def run(index: int) -> None:
            box = (slice(0, self.partials.shape[0]), *self.grid.box(index))
            part = source[box]
            with floating_state(context, self.errstate, "accumulate", self.line):
                put(target, box, ufunc.accumulate(part.read() if isinstance(part, Remote) else part, axis=0))

        return run
