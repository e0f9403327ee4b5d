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
from scheduler.worker import TaskContext, annotate, run_some

__all__ = ["FAR", "Prepared", "Spans", "Step", "chain", "merged", "with_pickles"]

FAR = 1 << 62  # where what a task does not touch begins; it ends at -1
Requires = Callable[[int, int], tuple[int, int]]


class Spans:
    """Which bytes of a buffer the tasks of a layer touch: task i all, or part, of [lows[i], highs[i]); nothing where that is empty."""

    __slots__ = ("covered", "highs", "highs_before", "lows", "lows_behind")

    def __init__(self, lows: Sequence[int], highs: Sequence[int]) -> None:
        self.lows, self.highs = list(lows), list(highs)
        self.highs_before = list(accumulate(self.highs, max))  # ascending: of tasks up to this one
        self.lows_behind = list(accumulate(reversed(self.lows), min))[::-1]  # ascending: of this task and those behind
        self.covered = _joined(zip(self.lows, self.highs, strict=True))

    def meeting(self, low: int, high: int) -> tuple[int, int]:
        """Return the smallest range that holds every task that touches [low, high); an empty one when there is none."""
        return bisect_right(self.highs_before, low), bisect_left(self.lows_behind, high)


@dataclass(frozen=True, slots=True)
class Step:
    """A plan, and for each of its layers which bytes of the buffers it reads, and writes, each task touches.

    Several `Spans` where these lie far apart, as both ends of an array that has none; None: any bytes.
    """

    plan: Plan
    reads: tuple[Mapping[int, tuple[Spans, ...] | None], ...]
    writes: tuple[Mapping[int, tuple[Spans, ...] | None], ...]


def with_pickles(step: Step) -> Step:
    """Return the step with its kernels pickled, once for all chains that it will be part of."""
    return replace(step, plan=replace(step.plan, pickles=pickle_kernels(step.plan.layers)))


@dataclass(slots=True)
class _Uses:
    """Who touched a buffer of a chain: layers, with the spans of their tasks."""

    writers: list[tuple[int, tuple[Spans, ...] | None]]
    readers: list[tuple[int, tuple[Spans, ...] | None]]


def chain(steps: Sequence[Step]) -> Plan:
    """Return one plan that does the plans of ``steps`` in this order. Buffers with an address are one where the address is."""
    plans = [step.plan for step in steps]
    buffers, numbers = merged(plans)
    layers: list[Layer] = []
    pickles: dict[int, tuple[bytes, bytes]] = {}
    uses: dict[int, _Uses] = {}
    for step, mine in zip(steps, numbers, strict=True):
        first = len(layers)
        touched: dict[int, _Uses] = {}
        for index, layer in enumerate(step.plan.layers):
            after: dict[int, _Waits | None] = {}
            for buffer, spans in step.reads[index].items():
                touched.setdefault(mine[buffer], _Uses([], [])).readers.append((first + index, spans))
                if mine[buffer] in uses:
                    _wait(after, uses[mine[buffer]].writers, spans)
            for buffer, spans in step.writes[index].items():
                touched.setdefault(mine[buffer], _Uses([], [])).writers.append((first + index, spans))
                if mine[buffer] in uses:
                    _wait(after, uses[mine[buffer]].writers, spans)
                    _wait(after, uses[mine[buffer]].readers, spans)
            dependencies = [Dependency(at, one) for at, each in sorted(after.items()) for one in ((None,) if each is None else each.all())]
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
    return Plan(
        buffers=tuple(buffers),
        layers=tuple(layers),
        scratch_nbytes=max(plan.scratch_nbytes for plan in plans),
        isolated=any(plan.isolated for plan in plans),
        keep=tuple(plan.keep for plan in plans),
        pickles=pickles if len(pickles) == sum(layer.place == "worker" for layer in layers) else {},
    )


def merged(plans: Iterable[Plan]) -> tuple[list[Buffer], list[list[int]]]:
    """Return the buffers of several plans, and for each plan the numbers of its own; those with an address are one where it is."""
    buffers: list[Buffer] = []
    known: dict[Address, int] = {}
    numbers: list[list[int]] = []
    for plan in plans:
        mine: list[int] = []
        for one in plan.buffers:
            mine.append(len(buffers) if one.address is None else known.setdefault(one.address, len(buffers)))
            if mine[-1] == len(buffers):
                buffers.append(one)
        numbers.append(mine)
    return buffers, numbers


def _joined(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges [low, high) joined where they meet, ascending."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(piece for piece in pieces if piece[0] < piece[1]):
        if joined and low <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(high, joined[-1][1])
        else:
            joined.append((low, high))
    return joined


def _cover(writers: list[tuple[int, tuple[Spans, ...] | None]], nbytes: int) -> bool:
    """Return whether whoever touches any of the bytes waits for one of ``writers`` that has waited for the same bytes."""
    if any(spans is None for _, spans in writers):
        return True  # for a whole layer, which waited for whole layers
    return _joined(piece for _, some in writers for spans in some or () for piece in spans.covered)[:1] == [(0, nbytes)]


class _Waits:
    """What the tasks of a layer wait for of another: what is near them, and, each by itself, what is far away."""

    def __init__(self) -> None:
        self.near: list[tuple[Spans, Spans]] = []
        self.far: list[tuple[Spans, Spans]] = []

    def all(self) -> list[Requires]:
        return [_requires(pairs) for pairs in (self.near, *([pair] for pair in self.far)) if pairs]


def _wait(after: dict[int, _Waits | None], others: list[tuple[int, tuple[Spans, ...] | None]], mine: tuple[Spans, ...] | None) -> None:
    """Have a layer, whose tasks touch ``mine``, wait for those that touched the same bytes; None: for a whole layer."""
    for layer, theirs in others:
        if mine is None or theirs is None:
            after[layer] = None
            continue
        for i, one in enumerate(mine):
            for j, other in enumerate(theirs):
                low, high = other.meeting(min(one.lows), max(one.highs))
                waits = after.setdefault(layer, _Waits()) if low < high else None
                if waits is not None:
                    (waits.far if i or j else waits.near).append((one, other))


def _requires(pairs: Sequence[tuple[Spans, Spans]]) -> Requires:
    def requires(start: int, stop: int) -> tuple[int, int]:
        ranges = [theirs.meeting(min(mine.lows[start:stop]), max(mine.highs[start:stop])) for mine, theirs in pairs]
        met = [(low, high) for low, high in ranges if low < high]
        if met:
            return min(low for low, _ in met), max(high for _, high in met)
        # Of tasks that meet none: one, for nothing is begun before a layer that it waits for is.
        at = min(ranges[0][0], len(pairs[0][1].lows) - 1)
        return at, at + 1

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
                task = 0
                while task < layer.ntasks:
                    faults.point("task")
                    task = run_some(function, task, layer.ntasks)
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
