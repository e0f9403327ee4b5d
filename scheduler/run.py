"""The door: a pool of memory and workers, and running a plan on it.

Promises: a plan that cannot fit the budget is refused before anything runs; a plan that was started ends, and then holds
nothing; after an error, a death or a Ctrl-C the pool is usable. Costs microseconds where the plan is tiny.
Relies on everything below: executors, pool, extents, locks, limits. Never put here: what an executor does, or arrays.
"""

from __future__ import annotations

import errno
import gc
import importlib
import logging
import math
import os
import pkgutil
import threading
import weakref
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from scheduler import executors, faults, worker
from scheduler.errors import MemoryBudgetError, PoolClosed, SharedMemoryError, SpillError
from scheduler.extents import Extent, Extents
from scheduler.limits import Budget, cpu_count, format_bytes, parse_bytes
from scheduler.locks import process_locks
from scheduler.pool import WorkerPool, can_start_workers
from scheduler.running import Room, is_inline
from scheduler.segments import Arena, Memory, permit_workers
from scheduler.spill import OFF, SpillFile, default_directory
from scheduler.task import SPILL, Outcome, Plan, Report, Tally

__all__ = ["RESERVED_SHARE", "Pool", "PoolStatistics", "Watcher", "configure_default", "default_pool", "is_watched", "unwatch", "watch"]

TINY_NBYTES = 2 << 20  # moved: done in the driver sooner than told to a worker
LONE_NBYTES = 4 * TINY_NBYTES  # the same where one worker would do it, one task after the other, while the driver waits
LARGE_NBYTES = 1 << 20  # from here on an allocation looks after the warm memory as well
RESERVED_SHARE = 8  # an eighth of the limit is not given to stored arrays that can go to the spill file: plans need scratch
LOOK_AGAIN_S = 0.5  # how long room that was dropped, not given back, can go unnoticed

_log = logging.getLogger("shmarray")


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A snapshot of a pool."""

    workers: int
    pids: tuple[int, ...]  # of the worker processes there are now
    starts: int  # worker processes ever started
    plans: int  # ever run
    limit_nbytes: int
    live_nbytes: int
    temporary_nbytes: int  # of which: of plans that run now
    warm_nbytes: int
    peak_nbytes: int
    spilled_nbytes: int = 0  # live, in the spill file: beside all of the above


class Pool:
    """Shared memory and the workers that fill it. Starts nothing before a plan needs it; stays warm after.

    ``workers`` None: as many as there are cores for this process; 0: everything happens in the calling thread.
    ``memory_limit`` None: a share of what is available now. What exceeds it lies in a file in ``spill_directory``; None: in the
    first temporary directory that lies on a disk, "off": nowhere, it is an error. As a context manager it is the default pool
    inside, closed after.
    ``task_timeout`` in seconds: a worker process that takes longer for one task is killed, as a death of that task; None: never.
    Threads may share a pool; a forked child may not.
    """

    def __init__(
        self,
        workers: int | None = None,
        memory_limit: int | str | None = None,
        spill_directory: str | None = None,
        task_timeout: float | None = None,
    ) -> None:
        if workers is not None and not isinstance(workers, int):
            raise TypeError(f"Pool(workers={workers!r}): give a whole number, or None (one per core), not {type(workers).__name__}.")
        if workers is not None and workers < 0:
            raise ValueError(f"a pool of {workers} workers: give 0 (run in the calling thread), a count, or None (one per core).")
        if task_timeout is not None and not 0 < task_timeout < math.inf:
            raise ValueError(f"Pool(task_timeout={task_timeout!r}): give a positive number of seconds, or None (no limit).")
        self.pid = os.getpid()
        self.task_timeout_s = task_timeout
        self.workers = cpu_count() if workers is None else workers
        self.spill_directory = None if spill_directory is None else os.path.expanduser(os.fspath(spill_directory))
        self.budget = Budget(None if memory_limit is None else parse_bytes(memory_limit))
        # Without workers nobody else maps it, and private memory has huge pages.
        self.arena = Arena(shared=self.workers > 0 and not worker.IN_WORKER)
        self.extents = Extents(self.arena, warm_limit_nbytes=self.budget.limit_nbytes // 2)
        self.locks = process_locks()
        self.memory = Memory(self.arena.bytes)
        self.closed = False
        self.is_driver_reachable = True  # until a worker finds that the system forbids it; any thread may write False
        # Written once, under the mutex, by `can_spill`; what it found: None: not looked for yet.
        self._spill_extents: Extents | None = None
        self._why_no_spill: str | None = None
        # Guards the five below, too. A plain lock, not a Condition: Ctrl-C in a function written in Python would leave that locked.
        self._mutex = threading.RLock()
        self._rooms: list[weakref.ref[Room]] = []  # of plans that run
        self._reserving = threading.Lock()  # held while a plan tries to reserve disk, and for nothing else
        self._temporaries: set[int] = set()  # identities of their extents
        self._waiting: set[threading.Lock] = set()  # of plans for which others leave no room; unlocked to have them look again
        self._plans = 0
        self._worker_pool: WorkerPool | None = None
        self._local = threading.local()  # how deep in `run` this thread is
        self._finalizer = weakref.finalize(self, self.arena.close)
        self._finalizer.atexit = False
        if self.spill_directory not in (None, OFF):
            self.memory.spill = SpillFile.make(self.spill_directory)  # now: a wrong name is told before any work is done

    # -- running

    def run(self, plan: Plan, executor: str | None = None, outcome: Outcome | None = None) -> Report:
        """Run a plan to its end and return its report; raise what its first failing task raised.

        ``executor`` None: "synchronous" for tiny work that calls no user function, else "processes". An error carries notes:
        task, user's line, remote traceback. ``outcome`` then says what was done; a plan with its progress goes on from
        there. KeyboardInterrupt comes within a second.
        """
        self._require_open()
        module = self._executor(plan, executor)
        depth = getattr(self._local, "depth", 0)
        self._plans += 1  # a lost count under a race of threads would harm nobody
        outcome = outcome or Outcome()
        watchers = _watchers
        try:
            self._local.depth = depth + 1
            for watcher in watchers:
                watcher.began(self, outcome.tally)
            report: Report = module.run(self, plan, outcome)
            faults.point("return")
            return report
        finally:
            self._local.depth = depth
            for watcher in watchers:
                watcher.ended(outcome.tally)

    def _executor(self, plan: Plan, name: str | None) -> Any:
        if name is not None and name not in _KNOWN:
            raise ValueError(f"scheduler {name!r} is not known; there are {', '.join(map(repr, sorted(_KNOWN)))}.")
        if name is None:
            most = LONE_NBYTES if all(layer.ntasks == 1 for layer in plan.layers) else TINY_NBYTES
            tiny = not plan.isolated and 0 <= plan.cost_nbytes() <= most
            name = "synchronous" if tiny else "processes"
        if name in ("processes", "threads") and (self.workers == 0 or worker.IN_WORKER or is_inline()):
            name = "synchronous"  # a run inside a task: it must not wait for workers that wait for it
        if name == "processes" and not (self.arena.is_shared and can_start_workers()):
            _say_once("no worker processes on this system (they need Linux with memfd and pidfd): using threads")
            name = "threads"
        module = _modules.get(name)
        if module is None:
            module = _modules[name] = importlib.import_module(f"scheduler.executors.{name}")
        return module

    def worker_pool(self) -> WorkerPool:
        """Return the handle on the worker processes, made on first need."""
        with self._mutex:
            self._require_open()
            # Over while we are open: a bug of ours ended the loop. The plans of then were told; those to come need not suffer.
            if self._worker_pool is None or self._worker_pool.is_over:
                permit_workers()
                self.can_spill()  # before workers start, for they inherit the file
                self._worker_pool = WorkerPool(self.workers, self.arena.fd, self.arena.nbytes, self.memory, self.task_timeout_s)
            return self._worker_pool

    # -- memory

    def allocate(self, nbytes: int, *, may_spill: bool = True) -> Extent:
        """Return an extent for an array that is to stay: in the arena, or in the spill file when that would exceed the budget.

        Raises MemoryBudgetError when it would and there is no spilling (``may_spill`` False: when it would), SpillError when the
        disk is full.
        """
        self._require_open()
        self._drain_spill()
        limit = self.budget.limit_nbytes
        room = limit - limit // RESERVED_SHARE
        live = self.extents.statistics().live_nbytes
        if live + nbytes > room:
            gc.collect()  # arrays in reference cycles are dead, but not yet gone
            live = self.extents.statistics().live_nbytes
            if not (may_spill and self.can_spill()):
                room = limit
        if live + nbytes <= room:
            return self._take(nbytes)
        if not may_spill:
            raise MemoryBudgetError(
                f"allocating {format_bytes(nbytes)} that must lie in memory: {format_bytes(live)} of the {format_bytes(limit)} memory "
                f"limit are in use. Delete stored arrays, or NumPy arrays that compute() gave of them, and try again."
            )
        if self.can_spill():
            return self.allocate_spilled(nbytes)
        raise MemoryBudgetError(
            f"allocating {format_bytes(nbytes)}: {format_bytes(live)} of the {format_bytes(limit)} memory limit are in use, and nothing "
            f"can be spilled: {self._why_no_spill}. Delete stored arrays, persist smaller pieces, raise memory_limit, or set "
            f"spill_directory to a directory on a disk."
        )

    def has_room(self, nbytes: int) -> bool:
        """Return whether an array of that size would lie in memory now, and leave room for temporaries beside it."""
        limit = self.budget.limit_nbytes
        return self.extents.statistics().live_nbytes + nbytes <= limit - limit // RESERVED_SHARE

    def _drain_spill(self) -> None:
        """Give the disk back what was spilled and is no more: only a call of ours finds out."""
        if self._spill_extents is not None:
            self._spill_extents.drain()

    def can_spill(self) -> bool:
        """Return whether there is a spill file; make it on first need. Raises SpillError when no descriptor is left for it."""
        if self._spill_extents is not None:
            return True
        if self._why_no_spill is not None:
            return False
        with self._mutex:
            if self._spill_extents is None and self._why_no_spill is None:
                try:
                    self._open_spill()
                except SpillError as error:
                    if error.errno in (errno.EMFILE, errno.ENFILE):
                        raise  # of this moment; what is found here is for good, as workers inherit the file or do not
                    self._why_no_spill = str(error)
        return self._spill_extents is not None

    def _open_spill(self) -> None:
        if self.memory.spill is None:
            if self.spill_directory == OFF:
                self._why_no_spill = "spill_directory is 'off'"
                return
            directory = default_directory()
            if directory is None:
                self._why_no_spill = "no temporary directory lies on a disk"
                return
            self.memory.spill = SpillFile.make(directory)
        # Nothing stays warm: what is freed goes back to the disk.
        self._spill_extents = Extents(self.memory.spill, warm_limit_nbytes=0, segment=SPILL)

    def allocate_spilled(self, nbytes: int) -> Extent:
        """Return an extent in the spill file, of which every byte is reserved. Raises SpillError."""
        self._require_open()
        if not self.can_spill():
            raise SpillError(f"spilling {format_bytes(nbytes)}: {self._why_no_spill}")
        extents, file = self._spill_extents, self.memory.spill
        assert extents is not None and file is not None
        for is_last in (False, True):
            extents.drain()
            extent = extents.allocate(nbytes)
            try:
                file.reserve(extent.offset, nbytes)
                return extent
            except SpillError:
                extent.free()
                extents.drain()  # gives back what was reserved before the disk was full
                if is_last:
                    raise
                gc.collect()  # arrays in reference cycles
            except BaseException:
                extent.free()
                raise
        raise AssertionError

    def _allocate_all_spilled(self, sizes: Iterable[int]) -> list[Extent]:
        """Return an extent in the spill file for each size, or raise SpillError and have the disk as it was."""
        found: list[Extent] = []
        try:
            for nbytes in sizes:
                found.append(self.allocate_spilled(nbytes))
        except BaseException:
            for extent in found:
                extent.free()
            self._drain_spill()
            raise
        return found

    def _take(self, nbytes: int) -> Extent:
        try:
            extent = self.extents.allocate(nbytes)
        except SharedMemoryError:
            gc.collect()
            self.extents.trim()
            extent = self.extents.allocate(nbytes)
        if nbytes >= LARGE_NBYTES:
            statistics = self.extents.statistics()
            if statistics.live_nbytes + statistics.warm_nbytes > self.budget.limit_nbytes:
                self.extents.trim(max(0, self.budget.limit_nbytes - statistics.live_nbytes))
        return extent

    def allocate_temporary(self, nbytes: int) -> Extent:
        """Return an extent out of the room of a plan that was admitted."""
        # As one step: a temporary that is live and not yet counted would look stored to a plan that asks for room.
        with self._mutex:
            extent = self._take(nbytes)
            self._temporaries.add(extent.identity)
        return extent

    def free_temporary(self, extent: Extent) -> None:
        """Take back what `allocate_temporary` or `allocate_spilled` gave."""
        with self._mutex:
            extent.free()
            self._temporaries.discard(extent.identity)
        if extent.extents is not self.extents:
            extent.extents.drain()  # the disk has it back now, not when something else is spilled

    def keep_temporary(self, extent: Extent) -> Extent:
        """Let the holder of a temporary have it for good; return it."""
        with self._mutex:
            self._temporaries.discard(extent.identity)
        return extent

    def take_temporary(self, extent: Extent) -> None:
        """Have one that was kept count as a temporary again."""
        if extent.extents is self.extents:
            with self._mutex:
                self._temporaries.add(extent.identity)

    def admit(self, plan: Plan) -> tuple[int | None, Room | None]:
        """Return (the room for the plan's temporaries, what is reserved for it); wait while other plans leave too little.

        Half of the memory that is free goes to one plan at most, unless it needs more: room beyond the peak lets layers overlap.
        Raises MemoryBudgetError and SpillError for what can never fit.
        """
        nbytes, room = self._admit_to_memory(plan)
        if any(b.is_spilled and b.address is None for b in plan.buffers):
            if room is None:
                room = Room(0)
                with self._mutex:
                    self._rooms.append(weakref.ref(room))
            try:
                self._reserve_disk(plan, room)
            except BaseException:
                self.leave(room)
                raise
        return nbytes, room

    def _reserve_disk(self, plan: Plan, room: Room) -> None:
        """Reserve what the plan will spill; wait while other plans have reserved what it lacks."""
        wake = threading.Lock()
        while True:
            with self._reserving:  # two at once would each find the disk full with what the other gives back in a moment
                error = self._take_disk(plan, room)
            if error is None:
                return
            with self._mutex:
                self._require_open()
                others = any((there := ref()) is not None and there.has_disk for ref in self._rooms)
                if not others or getattr(self._local, "depth", 0) > 1 or is_inline():
                    raise error
                wake.acquire(blocking=False)
                self._waiting.add(wake)
            wake.acquire(timeout=LOOK_AGAIN_S)

    def _take_disk(self, plan: Plan, room: Room) -> SpillError | None:
        """Fill in the room's extents: one for each temporary or, where the disk is short of that, for several in turn."""
        sizes, piece_of = plan.spilled_in_turn()
        each = {buffer: plan.buffers[buffer].nbytes for buffer in piece_of}
        try:
            room.spilled = dict(zip(each, self._allocate_all_spilled(each.values()), strict=True))
        except SpillError:
            try:
                pieces = self._allocate_all_spilled(sizes)
            except SpillError as error:
                where = plan.layers[next(i for i, layer in enumerate(plan.layers) if piece_of.keys() & {*layer.reads, *layer.writes})]
                line = f" (built at {where.line})" if where.line else ""
                needed, free = sum(sizes), error.free_nbytes
                if self.memory.spill is not None and isinstance(error.__cause__, OSError):
                    free = self.memory.spill.free_nbytes()  # with what was reserved of it and given back
                    error = self.memory.spill.refusal(needed, free, error.__cause__)
                return SpillError(
                    f"running {where.name!r}{line} was not begun: the temporaries for which there is no memory ({len(each)}) need "
                    f"{format_bytes(needed)} of spill space at their peak. {error}",
                    path=error.path,
                    needed_nbytes=needed,
                    free_nbytes=free,
                    errno=error.errno,
                )
            room.spilled = {buffer: pieces[piece] for buffer, piece in piece_of.items()}
            room.in_order = True
        room.has_disk = True
        return None

    def _admit_to_memory(self, plan: Plan) -> tuple[int | None, Room | None]:
        total = sum(b.room_nbytes for b in plan.buffers if b.address is None)
        scratch = plan.scratch_nbytes * max(1, self.workers)
        if not total and not scratch:
            return None, None
        peak, where = plan.peak_nbytes()
        limit = self.budget.limit_nbytes
        wake = threading.Lock()
        while True:
            with self._mutex:
                self._require_open()
                available = limit - self._stored_nbytes()
                if peak + scratch > available:
                    gc.collect()
                    available = limit - self._stored_nbytes()
                if peak + scratch > available:
                    raise self._refusal(plan, where, peak, scratch, available)
                free = available - self._reserved_nbytes()
                # A run inside a task of another must not wait for that one to end.
                if peak + scratch <= free or getattr(self._local, "depth", 0) > 1 or is_inline():
                    nbytes = min(total, max(peak, free // 2 - scratch))
                    room = Room(nbytes + scratch)
                    self._rooms.append(weakref.ref(room))
                    self._keep_within_limit()
                    return nbytes, room
                wake.acquire(blocking=False)
                self._waiting.add(wake)
            wake.acquire(timeout=LOOK_AGAIN_S)

    def _keep_within_limit(self) -> None:
        """Give warm memory back where what is stored and reserved leaves no room for it."""
        excess = self._stored_nbytes() + self._reserved_nbytes() + self.extents.statistics().warm_nbytes - self.budget.limit_nbytes
        if excess > 0:
            self.extents.trim(max(0, self.extents.statistics().warm_nbytes - excess))

    def leave(self, room: Room) -> None:
        """Give back what `admit` reserved; calling it again does nothing."""
        room.spilled = {}
        self._drain_spill()
        with self._mutex:
            room.nbytes, room.has_disk = 0, False
            self._rooms = [ref for ref in self._rooms if (there := ref()) is not None and (there.nbytes or there.has_disk)]
            self._wake_waiting()

    def _wake_waiting(self) -> None:
        while self._waiting:
            wake = self._waiting.pop()
            if wake.locked():
                wake.release()

    def free_nbytes(self) -> int:
        """Return what stored arrays leave of the budget to plans, whatever runs now."""
        with self._mutex:
            return self.budget.limit_nbytes - self._stored_nbytes()

    def _reserved_nbytes(self) -> int:
        return sum(room.nbytes for ref in self._rooms if (room := ref()) is not None)

    def _stored_nbytes(self) -> int:
        return max(0, self.extents.statistics().live_nbytes - self._temporary_nbytes())

    def _temporary_nbytes(self) -> int:
        return self.extents.taken_nbytes(self._temporaries)

    def _refusal(self, plan: Plan, where: int, peak: int, scratch: int, available: int) -> MemoryBudgetError:
        layer = plan.layers[where]
        line = f" (built at {layer.line})" if layer.line else ""
        limit = self.budget.limit_nbytes
        spill = "" if self.can_spill() else f" Nothing can be spilled ({self._why_no_spill}): set spill_directory to a directory on a disk."
        return MemoryBudgetError(
            f"running {layer.name!r}{line} needs {format_bytes(peak + scratch)} at its peak: {format_bytes(peak)} of temporaries "
            f"and {format_bytes(scratch)} of scratch for {max(1, self.workers)} workers; {format_bytes(max(0, available))} of "
            f"the {format_bytes(limit)} memory limit are free. Use smaller chunks, persist the pieces one by one, delete "
            f"stored arrays, or raise memory_limit.{spill}"
        )

    # -- life

    def _require_open(self) -> None:
        if self.pid != os.getpid():
            raise PoolClosed(
                f"this pool belongs to process {self.pid}, and this is its forked child {os.getpid()}: workers and shared memory "
                f"are not inherited. Make a new Pool here, or use the default one."
            )
        if self.closed:
            raise PoolClosed("the pool is closed, and what lived in it is gone; make a new Pool.")

    def close(self) -> None:
        """End the workers and give up the memory; plans that still run raise PoolClosed. Calling it again does nothing."""
        if self.closed or self.pid != os.getpid():
            return
        with self._mutex:
            self.closed = True
            self._wake_waiting()
            workers = self._worker_pool
        if workers is not None:
            workers.close()
        if self.memory.spill is not None:
            self.memory.spill.close()
        self._finalizer()

    def __enter__(self) -> Pool:
        self._require_open()
        _entered.set((*_entered.get(), self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stack = list(_entered.get())
        if self in stack:
            del stack[len(stack) - 1 - stack[::-1].index(self)]
            _entered.set(tuple(stack))
        self.close()

    def statistics(self) -> PoolStatistics:
        """Return a snapshot."""
        extents = self.extents.statistics()
        workers = self._worker_pool
        with self._mutex:
            temporary_nbytes = self._temporary_nbytes()
        return PoolStatistics(
            workers=self.workers,
            pids=workers.pids if workers else (),
            starts=workers.starts if workers else 0,
            plans=self._plans,
            limit_nbytes=self.budget.limit_nbytes,
            live_nbytes=extents.live_nbytes,
            temporary_nbytes=temporary_nbytes,
            warm_nbytes=extents.warm_nbytes,
            peak_nbytes=extents.peak_nbytes,
            spilled_nbytes=self._spill_extents.statistics().live_nbytes if self._spill_extents is not None else 0,
        )

    def check(self) -> None:
        """Assert what must hold while no plan runs."""
        self.extents.check()
        if self._spill_extents is not None:
            self._spill_extents.check()
        assert self._reserved_nbytes() == 0, self._reserved_nbytes()
        assert self._temporary_nbytes() == 0, self._temporary_nbytes()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.workers} workers, {format_bytes(self.budget.limit_nbytes)}"
        return f"<Pool {state}>"


class Watcher(Protocol):
    """Is told, in the thread that runs it, of every plan of this process that is begun while it watches. Must not raise."""

    def began(self, pool: Pool, tally: Tally) -> None:
        """Take note of a plan; ``tally`` says at any time how far it is."""

    def ended(self, tally: Tally) -> None:
        """Take note of its end, however it came."""


_watchers: tuple[Watcher, ...] = ()  # replaced as a whole, under the lock below
_watchers_lock = threading.Lock()


def watch(watcher: Watcher) -> None:
    """Have a watcher told of plans from now on."""
    global _watchers
    with _watchers_lock:
        _watchers = (*_watchers, watcher)


def unwatch(watcher: Watcher) -> None:
    """Tell it of no more. Of one that does not watch, nothing."""
    global _watchers
    with _watchers_lock:
        _watchers = tuple(w for w in _watchers if w is not watcher)


def is_watched() -> bool:
    """Return whether anybody watches."""
    return bool(_watchers)


_KNOWN = frozenset(module.name for module in pkgutil.iter_modules(executors.__path__))
_modules: dict[str, Any] = {}
_said: set[str] = set()
_entered: ContextVar[tuple[Pool, ...]] = ContextVar("entered_pools", default=())
_default: Pool | None = None
_default_values: dict[str, Any] = {}
_default_lock = threading.Lock()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.warning(message)


def configure_default(*, workers: int | None = None, memory_limit: int | str | None = None, spill_directory: str | None = None) -> None:
    """Set what the default pool is made with. One that exists is let go; it lives on as long as arrays in it do."""
    global _default, _default_values
    with _default_lock:
        _default_values = {"workers": workers, "memory_limit": memory_limit, "spill_directory": spill_directory}
        _default = None


def default_pool() -> Pool:
    """Return the innermost pool entered in this context, else one for the whole process, made on first need."""
    global _default
    for pool in reversed(_entered.get()):
        if not pool.closed and pool.pid == os.getpid():
            return pool
    found = _default
    if found is not None and not found.closed and found.pid == os.getpid():
        return found
    with _default_lock:
        if _default is None or _default.closed or _default.pid != os.getpid():
            values = {**_default_values, "workers": 0} if worker.IN_WORKER else _default_values
            _default = Pool(**values)
        return _default


def _start_anew_in_child() -> None:
    global _default_lock, _watchers, _watchers_lock
    _default_lock = threading.Lock()  # its holder may not exist here
    _watchers_lock = threading.Lock()
    _watchers = ()  # the threads that draw are not here


os.register_at_fork(after_in_child=_start_anew_in_child)
