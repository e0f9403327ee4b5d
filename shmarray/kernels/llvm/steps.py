"""The steps of one piece of an update in place: how large they are, how many, and which boxes of the piece are left from one on.

A step is a range of the items of a piece in the order of the loops: whole rows of the inner loop, or part of one. Promises: steps depend on
the piece's shape, the loops and the structure alone, so whoever goes on with a task means the same by a step's number.
Never put here: addresses, the cursor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shmarray.kernels.llvm.structure import Structure
from shmarray.region import Box

__all__ = ["Steps", "boxes_from"]


@dataclass(frozen=True, slots=True)
class Steps:
    """``rows`` of the last loop but one and ``width`` items of the inner one make a step; ``counts``: rounds of each loop."""

    axes: tuple[int, ...]  # of the piece, in the order of the loops
    counts: tuple[int, ...]
    rows: int
    width: int
    count: int  # of steps

    @staticmethod
    def of(shape: Sequence[int], loops: Sequence[tuple[int, ...]], s: Structure) -> Steps:
        counts = tuple(math.prod(shape[a] for a in axes) for axes in loops)
        inner = counts[-1]
        width, rows = inner, 1
        if inner > s.step_items:
            each = -(-inner // -(-inner // s.step_items))  # no step much shorter than the others
            width = -(-each // s.lanes) * s.lanes
        elif len(counts) > 1:
            rows = max(1, min(counts[-2], s.step_items // max(1, inner)))
        width = max(1, width)
        number = math.prod(counts[:-2]) * math.prod(_per_row_loop(counts, rows, width))
        return Steps(tuple(a for axes in loops for a in axes), counts, rows, width, number)

    def start(self, step: int) -> int:
        """Return how many items of the piece come before a step, in the order of the loops."""
        tops, lows = _per_row_loop(self.counts, self.rows, self.width)
        outer, rest = divmod(step, tops * lows)
        top, low = divmod(rest, lows)
        return outer * math.prod(self.counts[-2:]) + top * self.rows * self.counts[-1] + low * self.width

    def boxes(self, piece: Box, step: int) -> Iterator[Box]:
        """Yield boxes that together are what is left of a piece from ``step`` on."""
        shape = [piece[a].stop - piece[a].start for a in self.axes]
        for box in boxes_from(shape, self.start(step)):
            whole = list(piece)
            for a, part in zip(self.axes, box, strict=True):
                whole[a] = slice(piece[a].start + part.start, piece[a].start + part.stop)
            yield tuple(whole)


def _per_row_loop(counts: tuple[int, ...], rows: int, width: int) -> tuple[int, int]:
    """Return how many steps the last loop but one takes, and how many a row takes."""
    return -(-counts[-2] // rows) if len(counts) > 1 else 1, -(-counts[-1] // width)


def boxes_from(shape: Sequence[int], start: int) -> Iterator[Box]:
    """Yield boxes that together are the items of ``shape``, in C order, from number ``start`` on.

    shape (3, 4), start 5:  [1, 1..4]  and  [2..3, 0..4]
    """
    index = []
    for n in reversed(shape):
        start, k = divmod(start, n)
        index.append(k)
    index.reverse()
    if start:
        return  # past the end
    for axis in reversed(range(len(shape))):
        is_last = axis == len(shape) - 1
        low = index[axis] if is_last else index[axis] + 1
        if low < shape[axis]:
            before = [slice(k, k + 1) for k in index[:axis]]
            yield (*before, slice(low, shape[axis]), *(slice(0, n) for n in shape[axis + 1 :]))
    if not shape:
        yield ()
