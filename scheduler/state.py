"""The scheduler's brain: events go in, commands come out, and nothing else happens.

Promises: every task of a plan is handed out once (again only after a death), never before what it depends on has finished;
`PlanFinished` or `PlanFailed` comes exactly once per plan, and only when no range of that plan is in anyone's hands; the
same events give the same commands. Cost grows with ranges and layers, never with tasks.
Relies on plain values (`scheduler.task`) alone. Never put here: clocks, processes, threads, memory, randomness.

Words: a *lane* is whoever runs ranges: worker slots 0..W-1, and `DRIVER_LANE` for work only the driver can do. A *range* is
[start, stop) of one layer's tasks. A layer is *fresh* when something of it may be ready and it was never begun, *opened* from
its first range on.

    tasks of a layer, W = 2:    0 ........ n//2 ........ n
    parts not handed out          [lo0 >  hi0)[lo1 >  hi1)      each slot eats its own part from the left,
                                             < steal            and then the largest other part from the right
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from scheduler.errors import TaskError, TornChunkError, WorkerDied
from scheduler.task import Dependency, Layer, Plan, Tally

__all__ = [
    "DRIVER_LANE",
    "OUT_OF_MEMORY",
    "BufferDone",
    "CancelRequested",
    "Command",
    "Event",
    "IntervalSet",
    "OpenLayer",
    "PlanFailed",
    "PlanFinished",
    "RangeFailed",
    "RangeFinished",
    "RangeStopped",
    "SendRange",
    "StartWorker",
    "State",
    "StopPlan",
    "Submitted",
    "WorkerJoined",
    "WorkerLost",
    "WorkerNotStarted",
]

DRIVER_LANE = -1
MOST_QUEUED = 2  # one running, one waiting: a worker never waits for the driver between short ranges
MOST_DEATHS = 3  # of one task
MOST_KILLS_BINDING = 20  # in a row, of one layer: somebody else's doing, as in `scheduler.watch`
BINDING = -1  # stands for a task among deaths: those that came before any task's own code
OUT_OF_MEMORY = "out-of-memory killer"  # part of a reason
RANGE_S = 0.008  # aimed at: long enough to drown the round trip (0.1 ms), short enough to balance and to cancel
PREFETCH_S = 0.02  # a second range is queued only behind one that is known to be shorter: nobody waits behind a long task
PREFETCH_GUESS_S = 0.002  # the same while the cost is only a hint, which may be wrong by a thousand
BYTES_PER_S = 2e9  # what a hint of bytes moved is worth before anything was measured
FIRST_RANGE = 16  # tasks, at most, of a layer of unknown cost


# ---------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Submitted:
    """A plan is to be run. ``room_nbytes``: how much its temporaries may occupy at once; None: no limit.

    ``finished`` and ``steps`` as in `PlanFailed`: what an earlier run of the plan has done, and this one goes on from. ``tally`` is kept
    up to date for others to look at; nothing here depends on it. ``in_order``: a layer opens when all before it have finished, so that
    no more temporaries live at once than the plan says.
    """

    plan_id: int
    plan: Plan
    room_nbytes: int | None = None
    finished: tuple[tuple[int, int, int], ...] = ()
    steps: tuple[tuple[int, int, int], ...] = ()
    in_order: bool = False
    tally: Tally | None = None


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker is ready, in slot ``worker``."""

    worker: int


@dataclass(frozen=True, slots=True)
class WorkerNotStarted:
    """The worker asked for by `StartWorker` will not come; the next plan may ask again."""

    worker: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is gone. ``cursor`` is the task it was at, those before it in its range being done; None: not begun.

    A cursor equal to the range's stop says that all of it was done, only not reported. ``is_bound`` False: it was still binding
    the layer's kernel, for that task, and had written nothing. ``step``: the first step of that task that is still to do, where
    the layer is in place; -1: its target could not be put in order. ``is_charged`` False: it was killed for what it did before.
    ``was_killed``: by a SIGKILL that was neither ours nor the out-of-memory killer's.
    """

    worker: int
    cursor: int | None
    reason: str
    pid: int
    is_bound: bool = True
    step: int = 0
    is_charged: bool = True
    was_killed: bool = False


@dataclass(frozen=True, slots=True)
class RangeFinished:
    worker: int
    run_id: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class RangeFailed:
    """``task`` raised ``error``; those before it in the range are done, those after it were not begun.

    ``is_bound`` False: binding the layer's kernel raised it, and nothing was written. ``step`` as in `WorkerLost`.
    """

    worker: int
    run_id: int
    task: int
    error: BaseException
    is_bound: bool = True
    step: int = 0


@dataclass(frozen=True, slots=True)
class RangeStopped:
    """A range was given back because its plan stops: tasks before ``task`` are done, the others were not begun."""

    worker: int
    run_id: int
    task: int


@dataclass(frozen=True, slots=True)
class CancelRequested:
    plan_id: int
    reason: BaseException | str


Event = Submitted | WorkerJoined | WorkerNotStarted | WorkerLost | RangeFinished | RangeFailed | RangeStopped | CancelRequested


# -------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class OpenLayer:
    """Comes before the first range of a layer: its temporaries are to be allocated now."""

    plan_id: int
    layer: int


@dataclass(frozen=True, slots=True)
class SendRange:
    worker: int
    run_id: int
    plan_id: int
    layer: int
    start: int
    stop: int
    step: int = 0  # of task ``start``, where earlier ones were done before a death


@dataclass(frozen=True, slots=True)
class BufferDone:
    """All layers that touch this temporary have finished: it may be freed."""

    plan_id: int
    buffer: int


@dataclass(frozen=True, slots=True)
class PlanFinished:
    plan_id: int


@dataclass(frozen=True, slots=True)
class PlanFailed:
    """``layer`` and ``task`` say where, -1 when nowhere; ``unfinished`` are ranges that were begun and may be half done.

    ``finished`` are the ranges (layer, start, stop) that are done, ``steps`` the tasks (layer, task, step) of layers in place
    that were left before that step; all others were not begun.
    """

    plan_id: int
    error: BaseException
    layer: int = -1
    task: int = -1
    unfinished: tuple[tuple[int, int, int], ...] = ()
    finished: tuple[tuple[int, int, int], ...] = ()
    steps: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class StopPlan:
    """Ranges of this plan in flight should end at the next task; no new ones follow."""

    plan_id: int


@dataclass(frozen=True, slots=True)
class StartWorker:
    worker: int


Command = OpenLayer | SendRange | BufferDone | PlanFinished | PlanFailed | StopPlan | StartWorker


# ----------------------------------------------------------------------------------------------------------- data


class IntervalSet:
    """A set of integers kept as disjoint, not even touching, ascending [start, stop)."""

    __slots__ = ("count", "starts", "stops")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.stops: list[int] = []
        self.count = 0

    def add(self, start: int, stop: int) -> None:
        """Add [start, stop), which must be new."""
        at = bisect_right(self.starts, start)
        assert (at == 0 or self.stops[at - 1] <= start) and (at == len(self.starts) or stop <= self.starts[at]), (start, stop)
        self.count += stop - start
        left = at > 0 and self.stops[at - 1] == start
        right = at < len(self.starts) and self.starts[at] == stop
        if left and right:
            self.stops[at - 1] = self.stops.pop(at)
            del self.starts[at]
        elif left:
            self.stops[at - 1] = stop
        elif right:
            self.starts[at] = start
        else:
            self.starts.insert(at, start)
            self.stops.insert(at, stop)

    def has(self, start: int, stop: int) -> bool:
        """Return whether all of [start, stop) is in."""
        at = bisect_right(self.starts, start)
        return at > 0 and stop <= self.stops[at - 1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.starts, self.stops, strict=True)


@dataclass(slots=True)
class _Range:
    """A range in somebody's hands."""

    run_id: int
    plan: _PlanState
    layer: _LayerState
    start: int
    stop: int


class _LayerState:
    """What is known of one layer: finished tasks, those not handed out, what a task costs."""

    __slots__ = (
        "again",
        "consumers",
        "finished",
        "in_flight",
        "index",
        "is_measured",
        "is_opened",
        "last_size",
        "layer",
        "ntasks",
        "parts",
        "remaining",
        "steps",
        "task_s",
        "waits_for",
    )

    def __init__(self, index: int, layer: Layer) -> None:
        self.index = index
        self.layer = layer
        self.ntasks = layer.ntasks
        self.finished = IntervalSet()
        self.steps: dict[int, int] = {}  # task -> the first step still to do
        self.parts: list[list[int]] = []  # made when opened: [lo, hi) per slot
        self.again: list[tuple[int, int]] = []  # ranges given back by a death, first to be handed out
        self.remaining = layer.ntasks  # in parts and again
        self.in_flight = 0  # tasks
        self.waits_for = len(layer.dependencies)  # those of which nothing (all, where all is needed) has finished
        self.consumers: list[tuple[int, bool]] = []  # (layer, whether a part is enough)
        self.is_opened = False
        self.is_measured = False
        self.task_s = layer.nbytes_per_task / BYTES_PER_S  # 0: unknown
        self.last_size = 0

    def open(self, nslots: int) -> None:
        self.is_opened = True
        slots = nslots if self.layer.place == "worker" else 1
        self.parts = [[k * self.ntasks // slots, (k + 1) * self.ntasks // slots] for k in range(slots)]
        if self.finished.count or self.steps:  # of an earlier run: what is left is handed out as what was given back is
            self.parts = [[0, 0] for _ in self.parts]
            size = -(-self.remaining // (4 * slots))  # small enough for everyone to have some
            self.again = [(at, min(at + size, stop)) for start, stop in self.gaps() for at in range(start, stop, size)]

    def gaps(self) -> list[tuple[int, int]]:
        """Return what is not finished; a task that some steps are done of stands alone."""
        gaps, at = [], 0
        alone = [(task, task + 1) for task in self.steps]
        for start, stop in sorted([*self.finished, *alone]):
            if at < start:
                gaps.append((at, start))
            at = stop
        if at < self.ntasks:
            gaps.append((at, self.ntasks))
        return sorted([*gaps, *alone])

    def size(self, nslots: int) -> int:
        """Return how many tasks the next range should have."""
        if self.is_measured or self.task_s:
            size = int(RANGE_S / self.task_s) if self.task_s > 1e-9 else self.ntasks
            if self.is_measured:  # a lucky first measurement must not hand out everything
                size = min(size, 2 * self.last_size)
        else:
            size = min(FIRST_RANGE, self.ntasks // (nslots * 64))
        if nslots > 1:
            size = min(size, -(-self.remaining // (2 * nslots)))
        return max(size, 1)

    def measured(self, ntasks: int, elapsed_s: float) -> None:
        each = elapsed_s / ntasks
        self.task_s = (self.task_s + each) / 2 if self.is_measured else each
        self.is_measured = True


class _PlanState:
    """One plan: its layers, which of them may be begun, what of its memory is live."""

    __slots__ = (
        "alone",
        "buffer_users",
        "deaths",
        "error",
        "error_at",
        "fresh",
        "in_flight",
        "in_order",
        "is_stopping",
        "layers",
        "live",
        "live_nbytes",
        "ndeaths",
        "opened",
        "plan",
        "plan_id",
        "room_nbytes",
        "tally",
        "unfinished",
        "unfinished_layers",
    )

    def __init__(self, event: Submitted) -> None:
        plan = event.plan
        self.plan_id = event.plan_id
        self.plan = plan
        self.room_nbytes = event.room_nbytes
        self.in_order = event.in_order
        self.layers = [_LayerState(i, layer) for i, layer in enumerate(plan.layers)]
        self.unfinished_layers = len(self.layers)
        # Ascending layer indices, [0] for workers, [1] for the driver: what a lane looks through.
        self.opened: tuple[list[int], list[int]] = ([], [])
        self.fresh: tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]] = (([], []), ([], []))  # consumers, sources
        self.buffer_users: dict[int, int] = {}
        self.live: set[int] = set()
        self.live_nbytes = 0
        self.in_flight = 0  # ranges
        self.is_stopping = False
        self.error: BaseException | None = None
        self.error_at: tuple[int, int] = (-1, -1)
        self.deaths: dict[tuple[int, int], list[tuple[str, int]]] = {}
        self.ndeaths = 0
        self.alone: set[tuple[int, int]] = set()  # tasks that died for lack of memory: nothing else of the plan runs until they are done
        self.unfinished: list[tuple[int, int, int]] = []
        self._resume(event)
        self.tally = event.tally or Tally()
        self.tally.total = sum(layer.ntasks for layer in self.layers)
        self.tally.done = sum(layer.finished.count for layer in self.layers)
        for state in self.layers:
            for dependency in state.layer.dependencies:
                self.layers[dependency.layer].consumers.append((state.index, dependency.requires is not None))
            if not state.ntasks - state.finished.count:
                continue
            for buffer in self.temporaries(state.layer):
                self.buffer_users[buffer] = self.buffer_users.get(buffer, 0) + 1
            if not state.waits_for:
                self._fresh_list(state.layer).append(state.index)
        for state in self.layers if event.finished else ():
            if state.is_opened:
                self.live |= self.temporaries(state.layer) & set(self.buffer_users)
        self.live_nbytes = sum(plan.buffers[b].room_nbytes for b in self.live)

    def _resume(self, event: Submitted) -> None:
        """Enter what an earlier run has done."""
        for index, start, stop in event.finished:
            self.layers[index].finished.add(start, stop)
            self.layers[index].remaining -= stop - start
        for index, task, step in event.steps:
            self.layers[index].steps[task] = step
        for state in self.layers if event.finished else ():
            state.is_opened = not state.remaining
            self.unfinished_layers -= state.is_opened
            state.waits_for = 0
            for dependency in state.layer.dependencies:
                needed = self.layers[dependency.layer]
                state.waits_for += needed.remaining > 0 and (dependency.requires is None or not needed.finished.count)

    def temporaries(self, layer: Layer) -> set[int]:
        buffers = self.plan.buffers
        return {b for b in (*layer.reads, *layer.writes) if buffers[b].address is None}

    # -- readiness

    def is_ready(self, layer: Layer, start: int, stop: int) -> bool:
        return all(self._has(dependency, start, stop) for dependency in layer.dependencies)

    def _has(self, dependency: Dependency, start: int, stop: int) -> bool:
        needed = self.layers[dependency.layer]
        if needed.finished.count == needed.ntasks:
            return True
        if dependency.requires is None:
            return False
        return needed.finished.has(*dependency.requires(start, stop))

    def ready_prefix(self, layer: Layer, start: int, stop: int) -> int:
        """Return the largest ``s`` <= stop such that [start, s) is ready; ``start`` when nothing is."""
        if self.is_ready(layer, start, stop):
            return stop
        low, high = start, stop  # [start, low) is ready, [start, high) is not: a wider range never needs less
        while high - low > 1:
            middle = (low + high) // 2
            if self.is_ready(layer, start, middle):
                low = middle
            else:
                high = middle
        return low

    def ready_suffix(self, layer: Layer, start: int, stop: int) -> int:
        """Return the smallest ``s`` >= start such that [s, stop) is ready; ``stop`` when nothing is."""
        if self.is_ready(layer, start, stop):
            return start
        low, high = start, stop
        while high - low > 1:
            middle = (low + high) // 2
            if self.is_ready(layer, middle, stop):
                high = middle
            else:
                low = middle
        return high

    # -- handing out

    def take(self, lane: int, nslots: int, commands: list[Command]) -> tuple[_LayerState, int, int] | None:
        """Remove a ready range for this lane from what is not handed out, opening a layer only when no opened one has any."""
        kind = lane == DRIVER_LANE
        opened = self.opened[kind]
        slot = 0 if kind else lane
        for look in (self._take_own, self._take_foreign):
            for index in reversed(opened):  # later layers first: what is nearly done frees its inputs
                state = self.layers[index]
                found = look(state, slot, nslots)
                if found is not None:
                    return self._took(state, found, opened)
        for index in self._openable(kind):
            state = self.layers[index]
            # Only what is ready is opened, else its temporaries would lie idle. Nothing is handed out yet, so the ends of
            # the parts are where a lane would begin.
            if not self._has_ready(state, nslots):
                continue
            self._open(state, nslots, commands)
            found = self._take_own(state, slot, nslots) or self._take_foreign(state, slot, nslots)
            assert found is not None, index
            return self._took(state, found, opened)
        return None

    def _took(self, state: _LayerState, found: tuple[int, int], opened: list[int]) -> tuple[_LayerState, int, int]:
        start, stop = found
        state.remaining -= stop - start
        if not state.remaining:
            opened.remove(state.index)
        return state, start, stop

    def _take_own(self, state: _LayerState, slot: int, nslots: int) -> tuple[int, int] | None:
        for at, (start, stop) in enumerate(state.again):
            end = self.ready_prefix(state.layer, start, stop)
            if end > start:
                state.again[at : at + 1] = [(end, stop)] if end < stop else []
                return start, end
        part = state.parts[slot]
        low, high = part
        if low == high:
            return None
        stop = self.ready_prefix(state.layer, low, min(high, low + state.size(nslots)))
        if stop == low:
            return None
        part[0] = stop
        state.last_size = stop - low
        return low, stop

    def _take_foreign(self, state: _LayerState, slot: int, nslots: int) -> tuple[int, int] | None:
        size = state.size(nslots)
        for part in sorted(state.parts, key=lambda p: p[0] - p[1]):  # the largest first; sorted is stable: deterministic
            low, high = part
            if low == high:
                return None
            start = self.ready_suffix(state.layer, max(low, high - size), high)
            if start < high:
                part[1] = start
                state.last_size = high - start
                return start, high
            stop = self.ready_prefix(state.layer, low, min(high, low + size))
            if stop > low:
                part[0] = stop
                state.last_size = stop - low
                return low, stop
        return None

    def _has_ready(self, state: _LayerState, nslots: int) -> bool:
        n = state.ntasks
        slots = nslots if state.layer.place == "worker" else 1
        layer = state.layer
        if not layer.dependencies:
            return True
        if state.finished.count or state.steps:
            return any(self.is_ready(layer, start, start + 1) for start, _ in state.gaps())
        for k in range(slots):
            low, high = k * n // slots, (k + 1) * n // slots
            if low < high and (self.is_ready(layer, low, low + 1) or self.is_ready(layer, high - 1, high)):
                return True
        return False

    def _openable(self, kind: bool) -> Iterator[int]:
        """Yield the fresh layers in the order in which they should be opened.

        Consumers first, the latest first: they free what they read. Then sources in the plan's order, the one for which the
        plan's peak was computed. A layer whose temporaries do not fit the room waits, unless nothing else can go on.
        """
        consumers, sources = self.fresh[kind]
        if self.in_order:
            first = next((state.index for state in self.layers if state.finished.count < state.ntasks), -1)
            if first in consumers or first in sources:
                yield first
            return
        room = self.room_nbytes
        for index in chain(reversed(consumers), sources):
            if room is None or self._fits(index, room):
                yield index
        if room is not None and not self.in_flight:
            yield from sorted([*consumers, *sources])

    def _fits(self, index: int, room: int) -> bool:
        needed = self._needed_nbytes(index)
        return not needed or self.live_nbytes + needed <= room

    def _fresh_list(self, layer: Layer) -> list[int]:
        return self.fresh[layer.place == "driver"][not layer.dependencies]

    def _needed_nbytes(self, index: int) -> int:
        wanted = self.temporaries(self.layers[index].layer) - self.live
        return sum(self.plan.buffers[b].room_nbytes for b in wanted)

    def _open(self, state: _LayerState, nslots: int, commands: list[Command]) -> None:
        self._fresh_list(state.layer).remove(state.index)
        insort(self.opened[state.layer.place == "driver"], state.index)
        state.open(nslots)
        if self.buffer_users:
            self.live_nbytes += self._needed_nbytes(state.index)
            self.live |= self.temporaries(state.layer)
        commands.append(OpenLayer(self.plan_id, state.index))

    # -- taking back

    def finish(self, state: _LayerState, start: int, stop: int, commands: list[Command]) -> None:
        """Mark tasks as done, and what follows from that."""
        if start == stop:
            return
        is_first = not state.finished.count
        state.finished.add(start, stop)
        self.tally.done += stop - start
        if self.deaths:
            self.deaths.pop((state.index, BINDING), None)
        if self.alone:
            self.alone = {(i, task) for i, task in self.alone if i != state.index or not start <= task < stop}
        for task in [t for t in state.steps if start <= t < stop] if state.steps else ():
            del state.steps[task]
        is_last = state.finished.count == state.ntasks
        if is_first or is_last:
            for index, part_is_enough in state.consumers:
                if is_first if part_is_enough else is_last:
                    consumer = self.layers[index]
                    consumer.waits_for -= 1
                    if not consumer.waits_for:
                        insort(self._fresh_list(consumer.layer), index)
        if not is_last:
            return
        self.unfinished_layers -= 1
        if self.buffer_users:
            for buffer in sorted(self.temporaries(state.layer)):
                self.buffer_users[buffer] -= 1
                if not self.buffer_users[buffer]:
                    self.live.discard(buffer)
                    self.live_nbytes -= self.plan.buffers[buffer].room_nbytes
                    commands.append(BufferDone(self.plan_id, buffer))

    def give_back(self, state: _LayerState, start: int, stop: int) -> None:
        """Put a range that nobody ran among those to hand out."""
        if start == stop:
            return
        state.again.append((start, stop))
        opened = self.opened[state.layer.place == "driver"]
        if not state.remaining:
            opened.insert(bisect_left(opened, state.index), state.index)
        state.remaining += stop - start

    def fail(self, error: BaseException, layer: int, task: int) -> None:
        """Keep the error of the lowest (layer, task), so that the same failure is told whoever was faster."""
        if self.error is None or (layer, task) < self.error_at:
            self.error, self.error_at = error, (layer, task)

    def failed(self, error: BaseException, held: Iterable[tuple[int, int, int]] = ()) -> PlanFailed:
        """Return how the plan failed; ``held``: ranges that may be half done beside those known to be."""
        done = tuple((layer.index, start, stop) for layer in self.layers for start, stop in layer.finished)
        steps = tuple((layer.index, task, step) for layer in self.layers for task, step in sorted(layer.steps.items()) if step)
        return PlanFailed(self.plan_id, error, *self.error_at, tuple(sorted([*self.unfinished, *held])), done, steps)


# ------------------------------------------------------------------------------------------------------- machine


@dataclass(slots=True)
class State:
    """The machine. ``handle`` takes one event and returns what is to be done, in order."""

    nslots: int
    lanes: dict[int, list[_Range]] = field(default_factory=dict)  # who is there, and the ranges in their hands, oldest first
    plans: dict[int, _PlanState] = field(default_factory=dict)
    turn: list[int] = field(default_factory=list)  # plan ids that are not stopping: the first is served next
    starting: set[int] = field(default_factory=set)
    next_run_id: int = 1
    counts: dict[str, int] = field(default_factory=lambda: {"ranges": 0, "deaths": 0, "plans": 0})

    def __post_init__(self) -> None:
        self.lanes[DRIVER_LANE] = []

    def handle(self, event: Event) -> list[Command]:
        """Take one event, change the state, return the commands that follow from it."""
        commands: list[Command] = []
        match event:
            case RangeFinished():
                self._finished(event, commands)
            case Submitted():
                self._submitted(event, commands)
            case RangeFailed():
                self._failed(event, commands)
            case RangeStopped():
                self._stopped(event, commands)
            case WorkerJoined():
                assert 0 <= event.worker < self.nslots and event.worker not in self.lanes, event
                self.starting.discard(event.worker)
                self.lanes[event.worker] = []
            case WorkerNotStarted():
                self.starting.discard(event.worker)
            case WorkerLost():
                self._lost(event, commands)
            case CancelRequested():
                plan = self.plans.get(event.plan_id)
                if plan is not None:
                    reason = event.reason
                    plan.fail(reason if isinstance(reason, BaseException) else TaskError(reason), -1, -1)
                    self._stop(plan, commands)
        if self.turn:
            self._dispatch(commands)
        return commands

    def in_flight(self, worker: int) -> Sequence[tuple[int, int, int]]:
        """Return (run id, plan id, layer) of the ranges a lane has, oldest first."""
        return [(r.run_id, r.plan.plan_id, r.layer.index) for r in self.lanes.get(worker, ())]

    def place(self, worker: int, run_id: int, cursor: int) -> str | None:
        """Return the task in words at which a worker is that shows this run id and cursor; None: it is between ranges."""
        queue = self.lanes.get(worker)
        if not queue or queue[0].run_id != run_id or not queue[0].start <= cursor < queue[0].stop:
            return None
        return _where(queue[0].layer, cursor)

    def deaths(self, plan_id: int) -> int:
        """Return how many deaths a running plan has survived."""
        return self.plans[plan_id].ndeaths

    # -- events

    def _submitted(self, event: Submitted, commands: list[Command]) -> None:
        assert event.plan_id not in self.plans, event.plan_id
        plan = _PlanState(event)
        self.counts["plans"] += 1
        if not plan.unfinished_layers:  # no layers, or all done by an earlier run
            commands.append(PlanFinished(plan.plan_id))
            return
        self.plans[plan.plan_id] = plan
        self.turn.append(plan.plan_id)
        if len(self.lanes) <= self.nslots:
            self._start_workers(commands)

    def _start_workers(self, commands: list[Command]) -> None:
        if not any(layer.place == "worker" for plan_id in self.turn for layer in self.plans[plan_id].plan.layers):
            return
        for slot in range(self.nslots):
            if slot not in self.lanes and slot not in self.starting:
                self.starting.add(slot)
                commands.append(StartWorker(slot))

    def _pop(self, worker: int, run_id: int) -> _Range | None:
        queue = self.lanes.get(worker, [])
        for at, piece in enumerate(queue):
            if piece.run_id == run_id:
                del queue[at]
                piece.plan.in_flight -= 1
                piece.layer.in_flight -= piece.stop - piece.start
                return piece
        return None  # a late word about a range that was taken away

    def _finished(self, event: RangeFinished, commands: list[Command]) -> None:
        piece = self._pop(event.worker, event.run_id)
        if piece is None:
            return
        piece.layer.measured(piece.stop - piece.start, event.elapsed_s)
        piece.plan.finish(piece.layer, piece.start, piece.stop, commands)
        self._settle(piece.plan, commands)

    def _failed(self, event: RangeFailed, commands: list[Command]) -> None:
        piece = self._pop(event.worker, event.run_id)
        if piece is None:
            return
        plan = piece.plan
        plan.finish(piece.layer, piece.start, event.task, commands)
        self._left_at(piece, event.task, event.step, event.is_bound)
        plan.fail(event.error, piece.layer.index, event.task)
        self._stop(plan, commands)

    def _stopped(self, event: RangeStopped, commands: list[Command]) -> None:
        piece = self._pop(event.worker, event.run_id)
        if piece is None:
            return
        piece.plan.finish(piece.layer, piece.start, event.task, commands)
        piece.plan.give_back(piece.layer, event.task, piece.stop)
        self._settle(piece.plan, commands)

    def _lost(self, event: WorkerLost, commands: list[Command]) -> None:
        queue = self.lanes.pop(event.worker)
        self.counts["deaths"] += 1
        for plan in {piece.plan.plan_id: piece.plan for piece in queue}.values():
            plan.ndeaths += 1
        for at, piece in enumerate(list(queue)):
            piece.plan.in_flight -= 1
            piece.layer.in_flight -= piece.stop - piece.start
            if at == 0 and event.cursor is not None:
                self._died_in(piece, event, commands)
            else:
                piece.plan.give_back(piece.layer, piece.start, piece.stop)
        for piece in queue:
            if piece.plan.plan_id in self.plans:
                self._settle(piece.plan, commands)
        if self.turn:
            self._start_workers(commands)

    def _died_in(self, piece: _Range, event: WorkerLost, commands: list[Command]) -> None:
        """Sort out the range that a dead worker was running: done, to be charged, not begun."""
        plan, layer, cursor = piece.plan, piece.layer, event.cursor
        assert cursor is not None and piece.start <= cursor <= piece.stop, (piece, cursor)
        plan.finish(layer, piece.start, cursor, commands)
        if cursor == piece.stop:
            return
        # Alone in its range from now on: should it kill again, nobody else is in doubt.
        plan.give_back(layer, cursor, cursor + 1)
        plan.give_back(layer, cursor + 1, piece.stop)
        # A death that came after some more steps were done says nothing against the next one.
        if event.step > layer.steps.get(cursor, 0):
            plan.deaths.pop((layer.index, cursor), None)
            plan.deaths.pop((layer.index, BINDING), None)
        # Loading and binding our own code kills nobody: no task is to blame, yet it must end should it be so after all.
        is_innocent = event.was_killed and not event.is_bound and not plan.plan.isolated
        deaths = plan.deaths.setdefault((layer.index, BINDING if is_innocent else cursor), [])
        if event.is_charged:
            deaths.append((event.reason, event.pid))
        if OUT_OF_MEMORY in event.reason:
            plan.alone.add((layer.index, cursor))
        # Who died while binding had written nothing: then it is run again even where that would be wrong later.
        is_torn = event.is_bound and (event.step < 0 if layer.layer.in_place else not layer.layer.retry)
        is_refused = len(deaths) >= (MOST_KILLS_BINDING if is_innocent else MOST_DEATHS)
        if is_torn or is_refused or plan.is_stopping:
            self._left_at(piece, cursor, event.step, event.is_bound)
        elif layer.layer.in_place:
            layer.steps[cursor] = event.step
        if plan.is_stopping:
            return
        if is_torn:
            plan.fail(_torn(layer, cursor, event), layer.index, cursor)
            self._stop(plan, commands)
        elif is_refused:
            plan.fail((_never_bound if is_innocent else _refused)(layer, cursor, deaths), layer.index, cursor)
            self._stop(plan, commands)

    def _left_at(self, piece: _Range, task: int, step: int, is_bound: bool) -> None:
        """Note how a task was left that is not finished: before one of its steps, or half done."""
        layer = piece.layer
        if not is_bound:
            return
        if layer.layer.in_place and step >= 0:
            layer.steps[task] = step
        else:
            layer.steps.pop(task, None)
            piece.plan.unfinished.append((layer.index, task, task + 1))

    def abandoned(self, plan_id: int, error: BaseException) -> PlanFailed:
        """Return the failure of a plan whose lanes are gone for good: what was in their hands may be half done."""
        plan = self.plans.get(plan_id)
        if plan is None:
            return PlanFailed(plan_id, error)
        held = [piece for queue in self.lanes.values() for piece in queue if piece.plan is plan]
        return plan.failed(error, [(piece.layer.index, piece.start, piece.stop) for piece in held])

    def _stop(self, plan: _PlanState, commands: list[Command]) -> None:
        if not plan.is_stopping:
            plan.is_stopping = True
            self.turn.remove(plan.plan_id)
            commands.append(StopPlan(plan.plan_id))
        self._settle(plan, commands)

    def _settle(self, plan: _PlanState, commands: list[Command]) -> None:
        """Tell the end of a plan, once nothing of it is in anyone's hands."""
        if plan.in_flight or plan.plan_id not in self.plans:
            return
        if plan.is_stopping:
            assert plan.error is not None
            del self.plans[plan.plan_id]
            commands.append(plan.failed(plan.error))
        elif not plan.unfinished_layers:
            del self.plans[plan.plan_id]
            self.turn.remove(plan.plan_id)
            commands.append(PlanFinished(plan.plan_id))

    # -- dispatch

    def _dispatch(self, commands: list[Command]) -> None:
        # Everybody gets a first range before anyone a second: a plan of few tasks uses all workers.
        for queued in range(MOST_QUEUED):
            for lane, queue in self.lanes.items():
                if len(queue) == queued and (not queued or self._may_prefetch(queue[-1])):
                    self._send(lane, queue, commands)

    def _may_prefetch(self, piece: _Range) -> bool:
        layer = piece.layer
        expected_s = layer.task_s * (piece.stop - piece.start)
        return expected_s < (PREFETCH_S if layer.is_measured else PREFETCH_GUESS_S) and (layer.is_measured or expected_s > 0)

    def _send(self, lane: int, queue: list[_Range], commands: list[Command]) -> None:
        for plan_id in self.turn:
            plan = self.plans[plan_id]
            if plan.alone and plan.in_flight:
                continue
            taken = plan.take(lane, self.nslots, commands)
            if taken is None:
                continue
            layer, start, stop = taken
            run_id = self.next_run_id
            self.next_run_id += 1
            self.counts["ranges"] += 1
            queue.append(_Range(run_id, plan, layer, start, stop))
            plan.in_flight += 1
            layer.in_flight += stop - start
            commands.append(SendRange(lane, run_id, plan_id, layer.index, start, stop, layer.steps.get(start, 0)))
            if len(self.turn) > 1:  # fair: the plan just served goes to the end
                self.turn.remove(plan_id)
                self.turn.append(plan_id)
            return

    # -- invariants

    def check(self) -> None:
        """Assert what must hold between any two events."""
        assert sorted(self.turn) == sorted(i for i, p in self.plans.items() if not p.is_stopping)
        assert not self.starting & set(self.lanes)
        held: dict[tuple[int, int], list[tuple[int, int]]] = {}
        ranges = dict.fromkeys(self.plans, 0)
        for lane, queue in self.lanes.items():
            assert lane == DRIVER_LANE or 0 <= lane < self.nslots
            assert len(queue) <= MOST_QUEUED
            assert [r.run_id for r in queue] == sorted(r.run_id for r in queue)
            for piece in queue:
                assert (piece.layer.layer.place == "driver") == (lane == DRIVER_LANE)
                held.setdefault((piece.plan.plan_id, piece.layer.index), []).append((piece.start, piece.stop))
                ranges[piece.plan.plan_id] += 1
        for plan_id, plan in self.plans.items():
            assert plan.in_flight == ranges[plan_id]
            assert plan.in_flight or not plan.is_stopping
            assert (plan.error is not None) == plan.is_stopping
            self._check_plan(plan, held)

    def _check_plan(self, plan: _PlanState, held: dict[tuple[int, int], list[tuple[int, int]]]) -> None:
        users: dict[int, int] = {}
        live: set[int] = set()
        unfinished = 0
        for layer in plan.layers:
            kind = layer.layer.place == "driver"
            mine = held.get((plan.plan_id, layer.index), [])
            left = [(a, b) for a, b in layer.parts if a < b] + layer.again
            if not layer.is_opened:
                left = layer.gaps()
            assert layer.remaining == sum(b - a for a, b in left)
            assert layer.in_flight == sum(b - a for a, b in mine)
            everything = sorted([*layer.finished, *mine, *left])
            if not plan.is_stopping:  # a task that failed is nowhere
                assert sum(b - a for a, b in everything) == layer.ntasks
            at = 0
            for start, stop in everything:
                assert at <= start < stop <= layer.ntasks, (layer.index, everything)
                at = stop
            for start, stop in [*layer.finished, *mine]:
                assert plan.is_ready(layer.layer, start, start + 1) and plan.is_ready(layer.layer, stop - 1, stop)
            assert (layer.index in plan.opened[kind]) == (layer.is_opened and layer.remaining > 0)
            assert (layer.index in plan._fresh_list(layer.layer)) == (not layer.is_opened and layer.waits_for == 0)
            is_done = layer.finished.count == layer.ntasks
            unfinished += not is_done
            if not is_done:
                for buffer in plan.temporaries(layer.layer):
                    users[buffer] = users.get(buffer, 0) + 1
            if layer.is_opened:
                live |= plan.temporaries(layer.layer)
        assert unfinished == plan.unfinished_layers
        assert plan.tally.done == sum(layer.finished.count for layer in plan.layers), plan.tally.done
        assert users == {b: n for b, n in plan.buffer_users.items() if n}
        assert plan.live == {b for b in live if plan.buffer_users.get(b)}
        assert plan.live_nbytes == sum(plan.plan.buffers[b].room_nbytes for b in plan.live)


def _where(layer: _LayerState, task: int) -> str:
    line = f", built at {layer.layer.line}" if layer.layer.line else ""
    return f"{layer.layer.describe(task)} of {layer.layer.name!r} (task {task} of {layer.ntasks}{line})"


def _torn(layer: _LayerState, task: int, event: WorkerLost) -> TornChunkError:
    return TornChunkError(
        f"{_where(layer, task)} was updating its target in place when worker process {event.pid} died ({event.reason}): part of "
        f"it may be old, part new. It is not run again, for that could apply the update twice. Write the chunk anew before "
        f"reading it.",
        layer=layer.index,
        tasks=(task,),
    )


def _refused(layer: _LayerState, task: int, deaths: list[tuple[str, int]]) -> WorkerDied:
    listed = "; ".join(f"process {pid}: {reason}" for reason, pid in deaths)
    advice = []
    if any(OUT_OF_MEMORY in reason for reason, _ in deaths):
        advice.append("The system ran out of memory: use smaller chunks, fewer workers, or a lower memory_limit.")
    if any("task_timeout" in reason for reason, _ in deaths):
        advice.append("It takes longer than task_timeout allows: raise that, use smaller chunks, or find out where it hangs.")
    return WorkerDied(
        f"{_where(layer, task)} ended {len(deaths)} worker processes ({listed}) and is refused from now on. "
        + " ".join(advice or [_CAUSES])
    )


def _never_bound(layer: _LayerState, task: int, deaths: list[tuple[str, int]]) -> WorkerDied:
    reason, pid = deaths[-1]
    return WorkerDied(
        f"{len(deaths)} worker processes in a row were killed while they loaded the code of {_where(layer, task)}, and none of its "
        f"tasks got done in between (the last one, process {pid}: {reason}). Something outside kills them: look who does (an "
        f"administrator, a watchdog, a limit of the container), or use scheduler='threads'."
    )


_CAUSES = (
    "SIGKILL is often the system running out of memory (use smaller chunks or fewer workers); SIGSEGV, SIGABRT or an exit code "
    "come from the function itself: run it with scheduler='synchronous' to see where."
)
