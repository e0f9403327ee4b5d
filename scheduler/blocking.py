"""Temporal blocking: several steps of a chain done block by block, while the bytes of a block are in cache.

    level 3          a a                 a a              first every block as far as it gets by itself, each level in fewer tasks,
    level 2        a a a a    b b      a a a a            for those at its ends wait for the neighbours (sweeps a); then, between two
    level 1      a a a a a a  b b b  a a a a a a          blocks, what is left, each level in more (sweeps b). Where both ends of
    level 0    a a a a a a a a  |  a a a a a a a a        the space are neighbours, they have a sweep of their own (c).
               tasks of one layer ─▶

This is split tiling: T. Grosser et al., Split Tiling for GPUs, GPGPU-6, 2013, in one dimension: that of the tasks. A *level* is a layer of
a step; a *sweep* is a task that goes through levels as updates in place go through their steps: its cursor says which level it is at,
and whoever takes over after a death does that level again.

Promises: `blocked` does what its steps do in order, each task of them once, after those it waits for; it gives None where it cannot.
Relies on what `repeat.Step` says of the bytes that tasks touch. Never put here: kernels, boxes, how long steps take.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scheduler import faults
from scheduler.repeat import FAR, Spans, Step, merged
from scheduler.task import Buffer, Context, Dependency, Kernel, Layer, Plan

if TYPE_CHECKING:
    NDArray = np.ndarray[Any, np.dtype[np.int64]]

__all__ = ["DEPTH", "blocked"]

DEPTH = 16  # levels: beyond, little is won, and sweeps take long
LEAST_BLOCK_NBYTES = 2 << 20  # of all buffers: a smaller block takes less time than what a sweep costs besides
MOST_BLOCK_NBYTES = 8 << 20
FEWEST_BLOCKS = 4  # for each worker
ENOUGH_DEPTH = 4  # of levels
NARROWEST = 4  # a level has a task for so many of level 0, at least: else a block loads more than it computes


@dataclass(frozen=True, slots=True)
class _Sweep:
    """Tasks of several layers, level by level. ``levels``: number of a kernel, and (number in it, buffer).

    ``ranges``: of which tasks, [sweep, level, piece, (start, stop)].
    """

    kernels: tuple[Kernel, ...]
    levels: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
    ranges: np.ndarray[Any, np.dtype[np.int32]]

    def bind(self, context: Context) -> Callable[[int], None]:
        made: dict[Any, Callable[[int], None]] = {}
        functions = []
        for number, names in self.levels:
            addresses = {name: context.addresses[buffer] for name, buffer in names}
            key = number, tuple(addresses.items())
            if key not in made:
                made[key] = self.kernels[number].bind(context.beside(addresses))
            functions.append(made[key])
        redo, ranges = context.redo, self.ranges.tolist()
        many = [_several(function) for function in functions]

        def run(sweep: int) -> None:
            levels = ranges[sweep]
            for level in range(redo.first_step, len(levels)):
                redo.at(level)
                for start, stop in levels[level]:
                    if start < stop:
                        many[level](start, stop)

        return run


def _several(function: Callable[[int], None]) -> Callable[[int, int], None]:
    """Return what runs several tasks of a layer."""
    together: Callable[[int, int], None] | None = getattr(function, "many", None)
    if together is not None and faults.ARMED is None:  # faults are counted by task
        return together

    def run(start: int, stop: int) -> None:
        for task in range(start, stop):
            faults.point("part")
            function(task)

    return run


@dataclass(frozen=True, slots=True)
class _Level:
    """A layer of a step, and what its tasks touch, by the chain's numbers of buffers. ``names``: (number in the kernel, buffer)."""

    layer: Layer
    reads: Mapping[int, tuple[Spans, ...]]
    writes: Mapping[int, tuple[Spans, ...]]
    names: tuple[tuple[int, int], ...]


def blocked(steps: Sequence[Step], workers: int) -> tuple[list[Step], int]:
    """Return steps that do ``steps`` from the first on, several at once and block by block, and how many of them that can be said of."""
    found = _together(steps, workers)
    if found is None:
        return [], 0
    most = -(-len(steps) // -(-len(steps) // found[1]))  # alike: a short rest would load all of the memory for itself
    if found[1] != most:
        found = _together(steps[:most], workers)
    done: list[Step] = []
    at = 0
    while found is not None:
        done.append(found[0])
        at += found[1]
        found = _together(steps[at : at + most], workers)
    return done, at


def _together(steps: Sequence[Step], workers: int) -> tuple[Step, int] | None:
    """Return a step that does the first few of ``steps``, and how many; None where they cannot be cut into blocks."""
    each = len(steps[0].plan.layers) if steps else 0
    if not each:
        return None
    some = steps[: max(1, DEPTH // each)]
    buffers, numbers = _merged([step.plan for step in some])
    levels: list[_Level] = []
    for step, mine in zip(some, numbers, strict=True):
        new = _levels_of(step, mine)
        if new is None or len(new) != each or (levels and new[0].layer.ntasks != levels[0].layer.ntasks):
            break
        levels += new
    if len(levels) < 2 * each:
        return None
    cut = _cut(levels, each, sum(buffers[b].nbytes for b in {b for level in levels for _, b in level.names}), workers)
    if cut is None:
        return None
    depth = len(cut[0][0])
    return _step_of(levels[:depth], cut, [step.plan for step in some[: depth // each]], buffers), depth // each


def _merged(plans: Sequence[Plan]) -> tuple[list[Buffer], list[list[int]]]:
    """Return buffers as `merged` does, but that one temporary serves all steps: they wait for each other as for any buffer."""
    buffers, numbers = merged(plans)
    shared: dict[int, int] = {}
    for plan, mine in zip(plans, numbers, strict=True):
        for k, one in enumerate(plan.buffers):
            if one.address is None:
                mine[k] = shared.setdefault(k, mine[k])
    used = sorted({b for mine in numbers for b in mine})
    return [buffers[b] for b in used], [[used.index(b) for b in mine] for mine in numbers]


def _levels_of(step: Step, numbers: Sequence[int]) -> list[_Level] | None:
    levels = []
    for layer, reads, writes in zip(step.plan.layers, step.reads, step.writes, strict=True):
        if layer.place != "worker" or layer.in_place or not layer.retry or layer.ntasks != step.plan.layers[0].ntasks:
            return None
        read = {numbers[b]: spans for b, spans in reads.items() if spans is not None}
        written = {numbers[b]: spans for b, spans in writes.items() if spans is not None}
        if len(read) < len(reads) or len(written) < len(writes):
            return None
        names = tuple((b, numbers[b]) for b in dict.fromkeys((*layer.reads, *layer.writes)))
        levels.append(_Level(layer, read, written, names))
    return levels


class _Needs:
    """Which tasks of another level each task of a level waits for, [low, high); empty where low >= high."""

    def __init__(self, levels: Sequence[_Level]) -> None:
        self.levels = levels
        self.known: dict[tuple[int, int], tuple[NDArray, NDArray]] = {}

    def of(self, level: int) -> Iterator[tuple[int, NDArray, NDArray]]:
        """Yield (earlier level, low, high). Of levels that wait for the same tasks the latest alone: regions only get narrower."""
        seen: set[tuple[int, int]] = set()
        mine = self.levels[level]
        for earlier in reversed(range(level)):
            theirs = self.levels[earlier]
            for ours, others in ((mine.reads, theirs.writes), (mine.writes, theirs.writes), (mine.writes, theirs.reads)):
                for buffer in ours.keys() & others.keys():
                    for one, other in itertools.product(ours[buffer], others[buffer]):
                        pair = id(one), id(other)
                        if pair not in seen:
                            seen.add(pair)
                            yield earlier, *self._pair(one, other)

    def _pair(self, mine: Spans, theirs: Spans) -> tuple[NDArray, NDArray]:
        pair = id(mine), id(theirs)
        if pair not in self.known:
            lows, highs = np.array(mine.lows, np.int64), np.array(mine.highs, np.int64)
            first = np.searchsorted(np.array(theirs.highs_before, np.int64), lows, "right")
            stop = np.searchsorted(np.array(theirs.lows_behind, np.int64), highs, "left")
            self.known[pair] = first, np.where(lows < highs, stop, 0)
        return self.known[pair]


Cut = tuple["NDArray", ...]  # ranges of sweeps a, b and, where there are any, c: [sweep, level, piece, (start, stop)]


def _cut(levels: Sequence[_Level], each: int, nbytes: int, workers: int) -> Cut | None:
    """Return the ranges of the sweeps of as many levels as it pays to do together; None where that is less than two steps.

    ``each``: levels of a step; ``nbytes``: of all buffers.
    """
    ntasks, needs = levels[0].layer.ntasks, _Needs(levels)
    best: Cut | None = None
    aimed = _aimed_nbytes(max(1, workers))
    count = min(max(nbytes // aimed, FEWEST_BLOCKS * max(1, workers)), ntasks // 2)
    while count >= 2:
        lows, highs = _regions(levels, needs, ntasks, count)
        depth = len(lows) // each * each
        if depth >= 2 * each and (best is None or depth > len(best[0][0])):
            best = _ranges(lows[:depth], highs[:depth], ntasks)
        # Wider blocks go deeper: worth a place in the cache as long as they are shallow, and there are enough of them.
        count //= 2
        if depth >= min(len(levels), ENOUGH_DEPTH) or count < FEWEST_BLOCKS * workers or nbytes // max(1, count) > 2 * aimed:
            break
    return best


@cache
def _aimed_nbytes(workers: int) -> int:
    """Return of how many bytes a block should be: half of what a worker has of the last cache."""
    try:
        cores = os.cpu_count() or 1
        nbytes = 0
        for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):  # sizes in KiB: 32768K
            sharing = (index / "shared_cpu_map").read_text().replace(",", "")
            share = int((index / "size").read_text().rstrip("K\n")) << 10
            nbytes = max(nbytes, share // max(1, min(workers * int(sharing, 16).bit_count() // cores, workers)))
    except (OSError, ValueError):
        nbytes = MOST_BLOCK_NBYTES
    return min(max(LEAST_BLOCK_NBYTES, nbytes // 2), MOST_BLOCK_NBYTES)


def _regions(levels: Sequence[_Level], needs: _Needs, ntasks: int, count: int) -> tuple[list[NDArray], list[NDArray]]:
    """Return, level by level, where the range of tasks begins and ends that each of ``count`` blocks can do by itself."""
    edges = np.arange(count + 1) * ntasks // count
    lows, highs = [edges[:-1]], [edges[1:]]
    inside = [np.repeat(np.arange(count), np.diff(edges))]  # by level and task: the block, -1 where it is in a gap
    least = max(1, ntasks // count // NARROWEST)
    for level in range(1, len(levels)):
        now = inside[-1]
        waits = list(needs.of(level))
        fits = now >= 0
        for earlier, first, stop in waits:
            there = inside[earlier]
            fits &= (first >= stop) | ((there[np.minimum(first, ntasks - 1)] == now) & (there[np.maximum(stop, 1) - 1] == now))
        tasks = np.flatnonzero(fits)
        sizes = np.bincount(now[tasks], minlength=count)
        if sizes.min() < least:
            break
        low = tasks[np.cumsum(sizes) - sizes]
        high = tasks[np.cumsum(sizes) - 1] + 1
        if (high - low != sizes).any() or not _closes(waits, np.flatnonzero(~fits), lows, highs, high, ntasks):
            break
        lows.append(low)
        highs.append(high)
        inside.append(np.where(fits, now, -1))
    return lows, highs


def _closes(waits: Sequence[Any], tasks: NDArray, lows: list[NDArray], highs: list[NDArray], high: NDArray, ntasks: int) -> bool:
    """Return whether ``tasks``, those of a level in the gaps behind ``high``, wait for their gap and both blocks beside it alone."""
    gap = np.searchsorted(high, tasks, "right")  # the one before this block; 0 and the number of blocks: at the ends
    at_end = (gap == 0) | (gap == len(high))
    for earlier, first, stop in waits:
        first, stop = first[tasks], stop[tasks]
        low, end = lows[earlier], highs[earlier]
        between = (low[np.maximum(gap, 1) - 1] <= first) & (stop <= end[np.minimum(gap, len(high) - 1)])
        around = (stop <= end[0]) | (low[-1] <= first)
        if not ((first >= stop) | np.where(at_end, around, between)).all():
            return False
    return True


def _ranges(lows: list[NDArray], highs: list[NDArray], ntasks: int) -> Cut:
    low, high = np.array(lows), np.array(highs)  # [level, block]
    blocks = np.stack([low, high], -1).swapaxes(0, 1)
    gaps = np.stack([high[:, :-1], low[:, 1:]], -1).swapaxes(0, 1)
    if not low[:, 0].any() and (high[:, -1] == ntasks).all():
        return blocks[:, :, None], gaps[:, :, None]
    start, end = np.zeros(len(low), np.int64), np.full(len(low), ntasks)
    ends = np.stack([np.stack([start, low[:, 0]], -1), np.stack([high[:, -1], end], -1)], 1)
    return blocks[:, :, None], gaps[:, :, None], ends[None]


def _step_of(levels: Sequence[_Level], cut: Cut, plans: Sequence[Plan], buffers: Sequence[Buffer]) -> Step:
    kernels: dict[int, Kernel] = {id(level.layer.kernel): level.layer.kernel for level in levels}
    numbers = {kernel: number for number, kernel in enumerate(kernels)}
    named = tuple((numbers[id(level.layer.kernel)], level.names) for level in levels)
    reads = tuple(dict.fromkeys(b for level in levels for b in level.reads if buffers[b].address is not None))
    writes = tuple(dict.fromkeys(b for level in levels for b in level.writes))
    blocks = len(cut[0])
    after: tuple[tuple[Dependency, ...], ...] = (
        (),
        (Dependency(0, lambda start, stop: (start, stop + 1)),),
        (Dependency(0, lambda start, stop: (0, 1)), Dependency(0, lambda start, stop: (blocks - 1, blocks))),
    )
    first = levels[0].layer
    layers = []
    for ranges, dependencies in zip(cut, after, strict=False):
        done = (ranges[..., 1] - ranges[..., 0]).sum(axis=(0, 2)).tolist()
        layers.append(
            Layer(
                name=f"{first.name}, {len(plans)} steps",
                kernel=_Sweep(tuple(kernels.values()), named, ranges.astype(np.int32)),
                ntasks=len(ranges),
                reads=reads,
                writes=writes,
                dependencies=dependencies,
                nbytes_per_task=sum(n * level.layer.nbytes_per_task for n, level in zip(done, levels, strict=True)) // len(ranges),
                in_place=True,
                line=first.line,
            )
        )
    plan = Plan(
        buffers=tuple(buffers),
        layers=tuple(layers),
        scratch_nbytes=max(plan.scratch_nbytes for plan in plans),
        isolated=any(plan.isolated for plan in plans),
        keep=tuple(plan.keep for plan in plans),
    )
    touched = [
        tuple(_touched([getattr(level, way) for level in levels], ranges) for ranges, _ in zip(cut, layers, strict=True))
        for way in ("reads", "writes")
    ]
    return Step(plan, *touched)


def _touched(uses: Sequence[Mapping[int, tuple[Spans, ...]]], ranges: NDArray) -> dict[int, tuple[Spans, ...]]:
    """Return, per buffer, which bytes each sweep touches in all its levels: for each piece, and what is near and far in it, apart."""
    found: dict[int, dict[tuple[int, int], tuple[NDArray, NDArray]]] = {}
    known: dict[int, tuple[NDArray, NDArray]] = {}
    for level, by_buffer in enumerate(uses):
        for buffer, spans in by_buffer.items():
            for (place, one), piece in itertools.product(enumerate(spans), range(ranges.shape[2])):
                start, stop = ranges[:, level, piece, 0], ranges[:, level, piece, 1]
                if id(one) not in known:
                    known[id(one)] = np.array([*one.lows, FAR], np.int64), np.array([*one.highs, -1], np.int64)
                low = _over(np.minimum, known[id(one)][0], start, stop, FAR)
                high = _over(np.maximum, known[id(one)][1], start, stop, -1)
                mine = found.setdefault(buffer, {})
                if (piece, place) in mine:
                    low, high = np.minimum(low, mine[piece, place][0]), np.maximum(high, mine[piece, place][1])
                mine[piece, place] = low, high
    return {b: tuple(Spans(low.tolist(), high.tolist()) for _, (low, high) in sorted(mine.items())) for b, mine in found.items()}


def _over(best: np.ufunc, values: NDArray, start: NDArray, stop: NDArray, otherwise: int) -> NDArray:
    """Return the best of ``values`` from each start to its stop; what ``otherwise`` is where there are none."""
    first = np.minimum(start, len(values) - 2)  # one behind the last stands at the end
    pairs = np.stack([first, np.maximum(stop, first + 1)], -1).reshape(-1)
    return np.where(start < stop, best.reduceat(values, pairs)[::2], otherwise)
