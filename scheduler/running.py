"""What a plan holds while it runs, and how a range of it is run in a thread of this process.

Promises: what a plan was given (locks, room, temporaries) is given back once, whoever closes it; errors say where they are from.
Relies on `scheduler.state` for words and `scheduler.worker` for the context. Never put here: processes, threads, choices.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from scheduler import faults
from scheduler.errors import RunCancelled
from scheduler.redo import NOT_BEGUN, Redo, unpack
from scheduler.segments import Memory
from scheduler.state import (
    Event,
    PlanFailed,
    RangeFailed,
    RangeFinished,
    RangeStopped,
    SendRange,
    Submitted,
)
from scheduler.task import Address, Outcome, Plan, Progress, Report
from scheduler.worker import TaskContext, annotate, contain, run_some, settled, unpack_error

if TYPE_CHECKING:
    from scheduler.extents import Extent
    from scheduler.locks import CellLocks, Hold

__all__ = [
    "GIVE_UP_AFTER_S",
    "Host",
    "Lane",
    "RemoteError",
    "Room",
    "RunGroup",
    "Running",
    "Signal",
    "current_group",
    "is_inline",
    "raise_failure",
    "set_inline",
    "start_thread",
]

GIVE_UP_AFTER_S = 0.8  # waiting for a cancelled plan: what is left ends in the background

_plan_ids = itertools.count(1)  # one sequence for all pools: an id is never used twice
_inline = threading.local()


def is_inline() -> bool:
    """Return whether this thread runs tasks for a pool: what it computes itself must not wait for that pool."""
    return getattr(_inline, "busy", False)


def set_inline() -> None:
    """Say that this thread runs tasks, from now on."""
    _inline.busy = True


class Signal:
    """Says once, to the one thread that waits, that something is done.

    Not a `threading.Event`: that holds a lock in code written in Python, where Ctrl-C in the waiting thread can leave it held,
    and whoever calls ``set`` would then wait for ever.
    """

    __slots__ = ("_gate", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._gate = threading.Lock()
        self._gate.acquire()

    def set(self) -> None:
        """Say it. From one thread at a time; calling it again does nothing."""
        if not self.is_set:
            self.is_set = True
            self._gate.release()

    def wait(self, timeout: float = -1) -> bool:
        """Wait until it is said, or for ``timeout`` seconds; return whether it was."""
        return self.is_set or self._gate.acquire(timeout=timeout) or self.is_set


def start_thread(thread: threading.Thread) -> None:
    """Start a thread; a Ctrl-C meanwhile is a KeyboardInterrupt, whatever `threading` makes of it."""
    try:
        thread.start()
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # "release unlocked lock": it struck inside a Condition
            raise error.__context__ from None
        raise


class RunGroup:
    """Runs of several threads in worker processes that another thread can end together.

    A run belongs to the group whose `enter` was called in its context. Without locks: `cancel` and `add` both write before they look.
    """

    __slots__ = ("_cancels", "is_cancelled")

    def __init__(self) -> None:
        self.is_cancelled = False  # written once, by `cancel`
        self._cancels: dict[int, Callable[[BaseException], object]] = {}

    def enter(self) -> None:
        """Have all runs of this context, from now on, belong to it."""
        _group.set(self)

    def add(self, key: int, cancel: Callable[[BaseException], object]) -> None:
        """Note how a run is cancelled; raise RunCancelled when it is too late to begin one."""
        self._cancels[key] = cancel
        if self.is_cancelled:
            del self._cancels[key]
            raise RunCancelled(_CANCELLED)

    def discard(self, key: int) -> None:
        """Forget a run that has ended."""
        self._cancels.pop(key, None)

    def cancel(self) -> None:
        """Have every run, also those to come, raise RunCancelled within a second; workers that go on with a task all the same are killed.

        From any thread; calling it again does nothing more.
        """
        self.is_cancelled = True
        for cancel in list(self._cancels.values()):
            cancel(RunCancelled(_CANCELLED))


_CANCELLED = "this run was cancelled by another thread, together with the group it belongs to."
_group: ContextVar[RunGroup | None] = ContextVar("run_group", default=None)


def current_group() -> RunGroup | None:
    """Return the group that runs of this context belong to."""
    return _group.get()


class Room:
    """What a pool has reserved for a plan, until `Host.leave`, or until nobody holds this: Ctrl-C can strike in between.

    ``nbytes`` of memory; ``spilled``: for each temporary that is to lie in the spill file and has not yet been allocated, its extent,
    which another may use before it: only if layers run ``in_order``.
    """

    __slots__ = ("__weakref__", "has_disk", "in_order", "nbytes", "spilled")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.spilled: dict[int, Extent] = {}
        self.has_disk = self.in_order = False


class Host(Protocol):
    """What a plan needs of the pool that runs it."""

    workers: int
    memory: Memory
    locks: CellLocks

    def admit(self, plan: Plan) -> tuple[int | None, Room | None]:
        """Return the room for the plan's temporaries (None: it has none) and what was reserved; wait for it; raise when none.

        What the plan will spill is reserved on the disk.
        """

    def leave(self, room: Room) -> None:
        """Give back what `admit` gave; calling it again does nothing."""

    def allocate_temporary(self, nbytes: int) -> Extent: ...

    def free_temporary(self, extent: Extent) -> None: ...

    def keep_temporary(self, extent: Extent) -> Extent: ...

    def take_temporary(self, extent: Extent) -> None: ...


class Running:
    """All that a plan holds while it runs: its locks, its room, its temporaries, the warnings of its tasks.

    Written by whoever drives the state machine. ``close`` may be called from any thread, more than once.
    """

    def __init__(self, host: Host, plan: Plan, outcome: Outcome) -> None:
        self.plan = plan  # and with it ``plan.keep``
        self.outcome = outcome
        self.plan_id = next(_plan_ids)
        self.host = host
        self.is_stopping = False  # read by lanes in this process between tasks
        self.warnings: dict[tuple[str, str, str], None] = {}
        self.answers: list[bytes] = []
        self.busy_s = 0.0  # written by who drives the state machine
        self.addresses: dict[int, Address] = {i: b.address for i, b in enumerate(plan.buffers) if b.address is not None}
        self.temporaries: dict[int, Extent] = dict(plan.progress.temporaries) if plan.progress else {}
        self.addresses.update({buffer: extent.address for buffer, extent in self.temporaries.items()})
        for extent in self.temporaries.values():
            host.take_temporary(extent)
        # Locks before room: who waits for room holds its locks, who has room waits for nothing. The other way round two
        # plans could wait for each other.
        faults.point("lock")
        self.hold: Hold | None = host.locks.acquire(plan.locks) if plan.locks else None
        try:
            faults.point("locked")
            self.room_nbytes, self._room = host.admit(plan)
        except BaseException:
            for extent in self.temporaries.values():
                host.keep_temporary(extent)
            if self.hold is not None:
                self.hold.release()
            raise

    def submission(self) -> Submitted:
        """Return what the state machine is told of the plan."""
        done = self.plan.progress or Progress()
        in_order = self._room is not None and self._room.in_order
        tally = self.outcome.tally
        return Submitted(self.plan_id, self.plan, self.room_nbytes, done.finished, done.steps, in_order, tally)

    def open(self, index: int) -> None:
        """Allocate what the layer touches and has no address yet. Comes before the first of its tasks."""
        self.outcome.began = True
        layer = self.plan.layers[index]
        for buffer in (*layer.reads, *layer.writes):
            if buffer not in self.addresses:
                faults.point("allocate")
                wanted = self.plan.buffers[buffer]
                if wanted.is_spilled:
                    assert self._room is not None
                    extent = self._room.spilled.pop(buffer)
                else:
                    extent = self.host.allocate_temporary(wanted.nbytes)
                self.temporaries[buffer] = extent
                self.addresses[buffer] = extent.address

    def buffer_done(self, buffer: int) -> None:
        extent = self.temporaries.pop(buffer)
        del self.addresses[buffer]
        if self._room is None or all(extent is not waits for waits in self._room.spilled.values()):
            self.host.free_temporary(extent)

    def addresses_of(self, index: int) -> dict[int, Address]:
        """Return where the buffers of a layer are, by the numbers that its kernel has for them."""
        layer = self.plan.layers[index]
        names = layer.names or [(b, b) for b in (*layer.reads, *layer.writes)]
        return {name: self.addresses[b] for name, b in names}

    def abandon(self) -> None:
        """Let the caller go while tasks of the plan still run: what it locked stays locked, for the caller's thread as well."""
        if self.hold is not None:
            self.hold.give_away()

    def close(self, failure: PlanFailed | None = None, *, is_done: bool = False) -> None:
        """Let everything go. Only when no lane can run a task of this plan any more.

        ``is_done``: all of it was done; ``failure``: how it ended if not. Neither: that is not known.
        """
        outcome = self.outcome
        if outcome.began and not outcome.finished and outcome.progress is None:
            if is_done:
                outcome.finished = True
            elif failure is not None:
                # What was computed stays with whoever holds the outcome, so that the plan can go on.
                kept = {b: self.host.keep_temporary(extent) for b, extent in self.temporaries.items()}
                outcome.progress = Progress(failure.finished, failure.steps, failure.unfinished, kept)
                self.temporaries.clear()
        # Each step may be done twice: cut short by a Ctrl-C, whoever closes it next, or the garbage collector, does the rest.
        while self.temporaries:
            self.host.free_temporary(self.temporaries.popitem()[1])
        if self._room is not None:
            self.host.leave(self._room)
        if self.hold is not None:
            self.hold.release()

    def noted(self, event: Event) -> Event:
        """Return an event of a lane in this process, with the time it took counted. No variable of a caller may hold it: see Lane.run."""
        if isinstance(event, RangeFinished):
            self.busy_s += event.elapsed_s
        return event

    def report(self, deaths: int = 0) -> Report:
        return Report(tuple(self.warnings), deaths, tuple(self.answers), self.busy_s)


class Lane:
    """Runs ranges in a thread of this process. One per thread: what is bound is not shared."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.bound: dict[tuple[int, int], Callable[[int], None]] = {}
        self.redo = Redo(memoryview(bytearray(8)).cast("q"), 0)
        # What `account` goes by; the cursor is that of the last command.
        self.command: SendRange | None = None
        self.done: list[SendRange] = []

    def run(self, running: Running, command: SendRange, *, interruptible: bool = False) -> Event:
        """Run a range; return what is to be told to the state. ``interruptible``: a Ctrl-C is the user's, not the task's."""
        task = command.start
        is_bound = False
        began = time.perf_counter()
        self.redo.words[0] = NOT_BEGUN
        self.command = command
        try:
            key = command.plan_id, command.layer
            faults.point("bind")
            function = self.bound.get(key)
            if function is None:
                context = TaskContext(self.memory, running.addresses_of(command.layer), running.warnings, self.redo, running.answers)
                function = self.bound[key] = running.plan.layers[command.layer].kernel.bind(context)
            is_bound = True
            faults.point("bound")
            while task < command.stop:
                if running.is_stopping:
                    return RangeStopped(command.worker, command.run_id, task)
                self.redo.begin(task, command.step if task == command.start else 0)
                faults.point("task")
                task = run_some(function, task, command.stop)
                faults.point("ran")
        except BaseException as error:
            told = error if interruptible and isinstance(error, KeyboardInterrupt) else contain(error)
            try:
                step = settled(self.redo, self.memory, task, command.step if task == command.start else 0)
                return RangeFailed(command.worker, command.run_id, task, told, is_bound, step)
            finally:
                del told  # its traceback holds this frame: in a circle they would keep the plan's arrays until a collection
        self.done.append(command)
        return RangeFinished(command.worker, command.run_id, time.perf_counter() - began)

    def account(self, running: Running, error: BaseException) -> PlanFailed:
        """Return what this lane, the only one of a plan, has done of it until ``error`` cut it short."""
        plan = running.plan
        before = plan.progress or Progress()
        finished = {*before.finished, *((c.layer, c.start, c.stop) for c in self.done)}
        steps = {(layer, task): step for layer, task, step in before.steps}
        unfinished = []
        command = self.command
        if command is not None and command not in self.done and self.redo.words[0] != NOT_BEGUN:
            task = unpack(self.redo.words[0])[0]
            step = settled(self.redo, self.memory, task, 0)
            if task > command.start:
                finished.add((command.layer, command.start, task))
            if plan.layers[command.layer].in_place and step >= 0:
                steps[command.layer, task] = step
            else:
                unfinished.append((command.layer, task, task + 1))
        left = [(i, t, s) for (i, t), s in steps.items() if s and not any(i == j and a <= t < b for j, a, b in finished)]
        return PlanFailed(running.plan_id, error, -1, -1, tuple(unfinished), tuple(sorted(finished)), tuple(sorted(left)))

    def forget(self, plan_id: int) -> None:
        self.done = [command for command in self.done if command.plan_id != plan_id]
        for key in [k for k in self.bound if k[0] == plan_id]:
            del self.bound[key]


class RemoteError(Exception):
    """An error as a worker sent it. Unpacked by the waiting thread alone: unpickling runs user code."""

    def __init__(self, blob: bytes | None, summary: str, trace: str) -> None:
        super().__init__(summary)
        self.blob, self.summary, self.trace = blob, summary, trace


def raise_failure(plan: Plan, failure: PlanFailed) -> None:
    """Raise what a plan failed with, saying where."""
    error, trace = failure.error, ""
    if isinstance(error, RemoteError):
        trace, error = error.trace, unpack_error(error.blob, error.summary)
    if failure.layer >= 0 and not isinstance(error, KeyboardInterrupt):
        annotate(error, plan.layers[failure.layer], failure.task, trace)
    try:
        raise error
    finally:
        del error, failure  # no circle with the traceback: see Lane.run. Callers drop the failure as well
