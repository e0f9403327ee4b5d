"""Plans done one after the other on bytes they share, as the steps of a simulation are: in one plan, or in the calling thread.

    step 0:  layer a ─▶ layer b           every layer of a later step waits, task by task, for what touched its bytes before:
    step 1:            layer a ─▶ layer b  a task begins as soon as its neighbours of the step before are done

Promises: `chain` does what running its plans in order does; cost grows with steps, layers and tasks of a layer, not with their product.
Never put here: what a step is, how many there are, buffers that swap.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from scheduler import faults
from scheduler.executors.processes import pickle_kernels
from scheduler.redo import Redo
from scheduler.running import Host, Running
from scheduler.task import Address, Buffer, Dependency, Layer, Outcome, Plan, Report
from scheduler.worker import TaskContext, annotate

__all__ = ["Prepared", "Spans", "Step", "chain", "with_pickles"]

Requires = Callable[[int, int], tuple[int, int]]


class Spans:
    """Which bytes of a buffer the tasks of a layer touch: task i all, or part, of [lows[i], highs[i])."""

    __slots__ = ("covered", "highs", "highs_before", "lows", "lows_behind")

    def __init__(self, lows: Sequence[int], highs: Sequence[int]) -> None:
        self.lows, self.highs = list(lows), list(highs)
        self.highs_before = list(accumulate(self.highs, max))  # ascending: of tasks up to this one
        self.lows_behind = list(accumulate(reversed(self.lows), min))[::-1]  # ascending: of this task and those behind
        self.covered = _merged(zip(self.lows, self.highs, strict=True))

    def meeting(self, low: int, high: int) -> tuple[int, int]:
        """Return the smallest range that holds every task that touches [low, high); an empty one when there is none."""
        return bisect_right(self.highs_before, low), bisect_left(self.lows_behind, high)


@dataclass(frozen=True, slots=True)
class Step:
    """A plan, and for each of its layers which bytes of the buffers it reads, and writes, each task touches (None: any of them)."""

    plan: Plan
    reads: tuple[Mapping[int, Spans | None], ...]
    writes: tuple[Mapping[int, Spans | None], ...]


def with_pickles(step: Step) -> Step:
    """Return the step with its kernels pickled, once for all chains that it will be part of."""
    return replace(step, plan=replace(step.plan, pickles=pickle_kernels(step.plan.layers)))


@dataclass(slots=True)
class _Uses:
    """Who touched a buffer of a chain: layers, with the spans of their tasks."""

    writers: list[tuple[int, Spans | None]]
    readers: list[tuple[int, Spans | None]]


def chain(steps: Sequence[Step]) -> Plan:
    """Return one plan that does the plans of ``steps`` in this order. Buffers with an address are one where the address is."""
    buffers: list[Buffer] = []
    layers: list[Layer] = []
    pickles: dict[int, tuple[bytes, bytes]] = {}
    numbers: dict[Address, int] = {}
    uses: dict[int, _Uses] = {}
    for step in steps:
        first = len(layers)
        mine: list[int] = []  # of each buffer of this plan, its number in the chain
        for one in step.plan.buffers:
            mine.append(len(buffers) if one.address is None else numbers.setdefault(one.address, len(buffers)))
            if mine[-1] == len(buffers):
                buffers.append(one)
        touched: dict[int, _Uses] = {}
        for index, layer in enumerate(step.plan.layers):
            after: dict[int, list[Requires] | None] = {}
            for buffer, spans in step.reads[index].items():
                touched.setdefault(mine[buffer], _Uses([], [])).readers.append((first + index, spans))
                if mine[buffer] in uses:
                    _wait(after, uses[mine[buffer]].writers, spans)
            for buffer, spans in step.writes[index].items():
                touched.setdefault(mine[buffer], _Uses([], [])).writers.append((first + index, spans))
                if mine[buffer] in uses:
                    _wait(after, uses[mine[buffer]].writers, spans)
                    _wait(after, uses[mine[buffer]].readers, spans)
            dependencies = [Dependency(layer, None if each is None else _all_of(each)) for layer, each in sorted(after.items())]
            dependencies += [Dependency(first + d.layer, d.requires) for d in layer.dependencies]
            reads, writes = (tuple(dict.fromkeys(mine[b] for b in some)) for some in (layer.reads, layer.writes))
            if index in step.plan.pickles:
                pickles[len(layers)] = step.plan.pickles[index]
            names = tuple((b, mine[b]) for b in dict.fromkeys((*layer.reads, *layer.writes)))
            layers.append(replace(layer, reads=reads, writes=writes, names=names, dependencies=tuple(dependencies)))
        for buffer, now in touched.items():
            before = uses.get(buffer)
            if before is None or _cover(now.writers, buffers[buffer].nbytes):
                uses[buffer] = now  # who comes later waits for these writers, and they waited for those before
            else:
                before.writers += now.writers
                before.readers += now.readers
    plans = [step.plan for step in steps]
    return Plan(
        buffers=tuple(buffers),
        layers=tuple(layers),
        scratch_nbytes=max(plan.scratch_nbytes for plan in plans),
        isolated=any(plan.isolated for plan in plans),
        keep=tuple(plan.keep for plan in plans),
        pickles=pickles if len(pickles) == sum(layer.place == "worker" for layer in layers) else {},
    )


def _merged(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges [low, high) joined where they meet, ascending."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(pieces):
        if joined and low <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(high, joined[-1][1])
        else:
            joined.append((low, high))
    return joined


def _cover(writers: list[tuple[int, Spans | None]], nbytes: int) -> bool:
    """Return whether whoever touches any of the bytes waits for one of ``writers`` that has waited for the same bytes."""
    if any(spans is None for _, spans in writers):
        return True  # for a whole layer, which waited for whole layers
    return _merged(piece for _, spans in writers if spans is not None for piece in spans.covered)[:1] == [(0, nbytes)]


def _wait(after: dict[int, list[Requires] | None], others: list[tuple[int, Spans | None]], mine: Spans | None) -> None:
    """Have a layer, whose tasks touch ``mine``, wait for those that touched the same bytes; None: for a whole layer."""
    for layer, theirs in others:
        if mine is None or theirs is None:
            after[layer] = None
            continue
        low, high = theirs.meeting(min(mine.lows), max(mine.highs))
        each = after.setdefault(layer, []) if low < high else None
        if each is not None:
            each.append(_requires(mine, theirs))


def _requires(mine: Spans, theirs: Spans) -> Requires:
    def requires(start: int, stop: int) -> tuple[int, int]:
        return theirs.meeting(min(mine.lows[start:stop]), max(mine.highs[start:stop]))

    return requires


def _all_of(each: list[Requires]) -> Requires:
    """Return the smallest range that holds those of several; at least one task, for nothing is begun before a layer it waits for is."""

    def requires(start: int, stop: int) -> tuple[int, int]:
        ranges = [(low, high) for low, high in (one(start, stop) for one in each) if low < high]
        return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else (0, 1)

    return requires


class Prepared:
    """A plan bound in this thread, to be run again and again: each time costs what its kernels do, and a microsecond or two.

    For small work, and not for layers in place: who is cut short does not learn what was done. All temporaries live as long as it does.
    ``beside``: the same plan on other buffers, prepared in this thread, which lends its temporaries and its room: they take turns, and
    who waited for room that the same thread holds would wait for ever. A context manager.
    """

    def __init__(self, host: Host, plan: Plan, beside: Prepared | None = None) -> None:
        assert not any(layer.in_place for layer in plan.layers)
        if beside is not None:
            lent = beside.running.addresses
            buffers = tuple(replace(b, address=lent[k]) if b.address is None else b for k, b in enumerate(plan.buffers))
            plan = replace(plan, buffers=buffers, scratch_nbytes=0)
        self.plan = plan
        self.running: Running = Running(host, plan, Outcome())
        try:
            redo = Redo(memoryview(bytearray(8)).cast("q"), 0)
            self.bound: list[Callable[[int], None]] = []
            for index, layer in enumerate(plan.layers):
                self.running.open(index)
                self.bound.append(
                    layer.kernel.bind(TaskContext(host.memory, self.running.addresses_of(index), self.running.warnings, redo))
                )
        except BaseException:
            self.running.close()
            raise

    def run(self) -> None:
        """Do all layers, one after the other."""
        layer, task = self.plan.layers[0] if self.plan.layers else None, 0
        try:
            for layer, function in zip(self.plan.layers, self.bound, strict=True):
                for task in range(layer.ntasks):
                    faults.point("task")
                    function(task)
        except Exception as error:
            assert layer is not None
            annotate(error, layer, task)
            raise

    def report(self) -> Report:
        """Return the warnings since the last report."""
        report = self.running.report()
        self.running.warnings.clear()
        return report

    def close(self) -> None:
        """Give back what it holds."""
        self.bound.clear()
        self.running.close()

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
