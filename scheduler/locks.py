"""Who may read or write which cells of an extent now: reader/writer locks over ranges of cells, for threads and processes.

Promises: a request is granted whole or not at all, in order of arrival among those that conflict; no thread waits for ever for
itself (a thread reuses what it holds; an upgrade or a deadlock raises at once, naming who holds what); a waiting thread can be
interrupted, and leaves nothing behind; nothing is ever taken from its holder. Between processes, when asked for: POSIX byte
locks, which the kernel drops when the holder is killed. Relies on fcntl and `scheduler.task.LockRequest`. Never put here: what
cells are made of, or a repair of what a dead holder left behind.

    table    extent 7:  thread A  w [0, 4)     r [8, 16)           granted
                        thread B  r [12, 20)                       granted
             waiting:   thread C  w [0, 2) of extent 7             behind A
    memfd    ----+-- base(7) + 0 ... base(7) + cell ... ----       one byte a cell, of those that asked for os_lock; its
                                                                   turnstile, for who waits, 2**62 bytes further on
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import struct
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from sys import is_finalizing
from types import TracebackType
from typing import Any, Protocol, TypeVar

from scheduler.errors import LockError
from scheduler.task import LockRequest

__all__ = ["CellLocks", "Hold", "LockStatistics", "process_locks"]

T = TypeVar("T")
Run = tuple[int, int, bool]  # cells [start, stop), and whether to write
Runs = tuple[Run, ...]  # in order, without overlap

CELLS_PER_EXTENT = 1 << 32  # how far apart the bytes of two extents lie: an address in a file has 63 bits
LAST_BYTE = 1 << 62
TURNSTILE = LAST_BYTE  # the byte of a cell's turnstile lies so far behind its own: bytes of adjacent cells stay adjacent
LOOK_AGAIN_S = 0.5  # how long a Hold that was dropped, not released, can go unnoticed
ASK_CANCELLED_S = 0.05
SHORTEST_POLL_S, LONGEST_POLL_S = 0.0005, 0.01
MOST_ATTEMPTS = 20  # to take a cell for a moment, before waiting in turn
MOST_REFUSALS = 3  # of EDEADLK, which the kernel finds between processes and cannot tell apart from threads

_live_tables: weakref.WeakSet[CellLocks] = weakref.WeakSet()


class _Owner:
    """A thread. Not its ident, which the system gives to another thread as soon as this one has ended."""

    __slots__ = ("ident", "name")

    def __init__(self) -> None:
        self.ident = threading.get_ident()
        self.name = threading.current_thread().name

    def __str__(self) -> str:
        return f"thread {self.name!r} ({self.ident})"


class _Ticket:
    """One request, waiting or granted."""

    __slots__ = ("is_granted", "lost", "os_lock", "owner", "wake", "wanted")

    def __init__(self, owner: _Owner, wanted: dict[int, Runs], os_lock: bool) -> None:
        self.owner = owner
        self.wanted = wanted
        self.os_lock = os_lock
        self.is_granted = False
        self.lost: tuple[_Lost, weakref.ref[Hold]] | None = None  # kept here, for a weak reference that is gone calls nobody
        self.wake: threading.Lock | None = None  # made, and locked, by the thread that has to wait; unlocked by the grant


class Hold:
    """Cells that are locked until `release`, or the end of a ``with`` block; the thread ``owner`` may lock them again.

    A Hold that nobody keeps is released too: Ctrl-C can strike between the grant and the ``with``.
    """

    __slots__ = ("__weakref__", "_locks", "_ticket", "owner")

    def __init__(self, locks: CellLocks, ticket: _Ticket) -> None:
        self.owner = ticket.owner.ident
        self._locks = locks
        self._ticket: _Ticket | None = ticket
        # The youngest is called first: by then it is in the queue, and if Ctrl-C strikes in the other, it stays there.
        after = weakref.ref(self, locks._look_after)
        lost = _Lost(self, locks._released.append)
        lost.ticket = ticket
        ticket.lost = lost, after

    @property
    def is_released(self) -> bool:
        """Whether the cells have been given back."""
        return self._ticket is None

    def release(self) -> None:
        """Give the cells back, from any thread; calling it again does nothing."""
        ticket = self._ticket
        if ticket is not None:
            self._locks._released.append(ticket)  # before the ticket is forgotten: interrupted between, it is done twice
            self._ticket = None
            self._locks._settle()

    def give_away(self) -> None:
        """Have the cells held by nobody's thread until `release`: the caller's thread, too, waits for them from now on."""
        ticket = self._ticket
        if ticket is not None:
            ticket.owner = _Owner()
            ticket.owner.name = "of a plan that was abandoned and still runs"

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


H = TypeVar("H", bound=Hold)


class _Lost(weakref.ref[Hold]):
    """What is left of a Hold that was dropped and not released: its ``ticket``.

    A weak reference whose callback is the C function `deque.append`, and not a ``__del__``: the garbage collector runs it
    wherever it likes, also in the middle of any function below, so it must wait for no lock; and Ctrl-C that strikes as a
    function written in Python begins would be swallowed there, and the cells locked for ever. A second reference then calls
    `CellLocks._look_after`, which does the rest, unless somebody is inside, who does it on leaving.
    """

    __slots__ = ("ticket",)
    ticket: _Ticket


class _Gone(weakref.ref[Any]):
    """What is left of the owner of an extent: the ``extent``. Its callback is `deque.append`, for the same reasons."""

    __slots__ = ("extent",)
    extent: int


class Crowd(Protocol):
    """What the processes of a lock file tell each other. A hint: turns are fair when it is right, and locks hold when it is wrong."""

    def anybody_waits(self) -> bool:
        """Return whether any thread of any of them waits for bytes."""

    def say_waits(self, waits: bool) -> None:
        """Tell that the calling thread does, or does not any more."""

    def settled(self) -> None:
        """Hear that cells of this process may have been given back. Called from finalizers, too: it waits for nothing."""


@dataclass(frozen=True, slots=True)
class LockStatistics:
    """A snapshot: requests granted and waiting now, extents that are locked somewhere, and grants that had to wait so far."""

    granted: int
    waiting: int
    extents: int
    contended: int


class CellLocks:
    """The lock table of a process.

    Of the threads of this process the table keeps account. ``os_lock=True`` takes a byte lock in a file as well, per process:
    POSIX locks do not exclude threads of one process, and vanish as soon as the process closes *any* descriptor of the file.
    So the file is made for this alone, has no name, and is never mapped, duplicated, or closed before the table is gone.
    """

    def __init__(self, fd: int | None = None, crowd: Crowd | None = None) -> None:
        """``fd``: the lock file of another process, inherited or received, which belongs to the table from now on.

        ``crowd``: with it, who finds the bytes free while nobody waits takes them without standing in the turnstile: half the calls.
        """
        self._fd = _make_file() if fd is None else fd
        self._crowd = crowd
        # Not at exit: daemon threads may still be in here, and the system closes it soon enough.
        weakref.finalize(self, os.close, self._fd).atexit = False
        self._start_anew()
        self._bases: dict[int, int] = {}  # extent -> its first byte in the file
        self._free_bases: list[int] = []
        self._next_base = 0
        self._owned: dict[int, _Gone] = {}  # kept here, for a weak reference that is gone calls nobody
        self._gone: deque[_Gone] = deque()  # owners that were collected; any thread, any time, without the mutex
        _live_tables.add(self)

    def _start_anew(self) -> None:
        """Make an empty table; in a forked child, where neither the holding threads nor the byte locks of the parent exist."""
        # Guards every field here but _released and _is_awaited. Re-entrant, as the garbage collector may run a finalizer that
        # releases a Hold (a generator suspended in a `with`) while this thread is inside; `_changing` tells that call to leave the
        # work to the frame below it.
        self._mutex = threading.RLock()
        self._changing = False
        self._is_awaited = False  # whether somebody waits for an extent to be held no more; set without the mutex
        self._granted: dict[int, dict[_Ticket, Runs]] = {}  # extent -> tickets, none of them empty
        self._waiting: dict[_Ticket, None] = {}  # in order of arrival
        self._contended = 0
        # What was released and is still in the tables above. A ticket leaves this queue only after it has left those, and
        # doing it twice does no harm: so an exception between any two steps loses nothing.
        self._released: deque[_Ticket | _Lost] = deque()
        self._threads = threading.local()

    def fileno(self) -> int:
        """Return the descriptor of the lock file, to be inherited by other processes. Never close or duplicate it here."""
        return self._fd

    def base(self, extent: int) -> int:
        """Return the byte of the lock file that is cell 0 of an extent; it stays until `forget`."""
        with self._mutex:
            base = self._bases.get(extent)
            if base is None:
                self._forget_gone()
                if self._free_bases:
                    base = self._free_bases.pop()
                else:
                    base, self._next_base = self._next_base, self._next_base + CELLS_PER_EXTENT
                    assert self._next_base <= LAST_BYTE, "2**30 extents have os locks at once"
                self._bases[extent] = base
        self._look_after()
        return base

    def place(self, extent: int, base: int) -> None:
        """Use, for an extent that another process shares, the bytes from that process's ``base``."""
        if self._bases.get(extent) == base:
            return  # nearly always: numbers of objects are used again
        with self._mutex:
            if self._bases.setdefault(extent, base) != base:
                raise LockError(
                    f"placing the lock bytes of extent {extent} at {base}: they are at {self._bases[extent]} already; place an "
                    f"extent before it is locked, and once."
                )
            self._next_base = max(self._next_base, base + CELLS_PER_EXTENT)
        self._look_after()

    def forget(self, extent: int) -> None:
        """Let the bytes of an extent that is gone be used for another."""
        self._read(lambda: self._forget(extent))

    def forget_after(self, owner: object, extent: int) -> None:
        """Forget an extent once ``owner`` is collected and nobody holds cells of it: quietly, at no certain time."""
        gone = _Gone(owner, self._gone.append)
        gone.extent = extent
        with self._mutex:
            self._owned[extent] = gone
            self._forget_gone()
        self._look_after()

    def _forget_gone(self) -> None:
        if self._changing:
            return  # from a finalizer: another call does it
        for _ in range(len(self._gone)):
            gone = self._gone[0]  # taken off the queue last: done twice, it does no harm
            if gone.extent in self._granted:
                self._gone.append(gone)  # a Hold outlives the array, in a traceback for one: next time
            else:
                self._forget(gone.extent)
                self._owned.pop(gone.extent, None)
            self._gone.popleft()

    def _forget(self, extent: int) -> None:
        holders = self._granted.get(extent)
        if holders:
            raise LockError(f"forgetting the locks of extent {extent}: {_name_holders(extent, holders)}. Release them first.")
        base = self._bases.pop(extent, None)
        if base is not None:
            self._free_bases.append(base)

    def acquire(
        self,
        requests: Sequence[LockRequest],
        *,
        os_lock: bool = False,
        timeout: float | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Hold:
        """Return a Hold of all the cells asked for, once no other thread holds any of them in a way that conflicts.

        Raises LockError at once where waiting would be for ever: to write cells that this thread holds to read, or cells of a
        thread that waits for this one. Raises TimeoutError, naming the holders, after ``timeout`` seconds, and CancelledError
        when ``cancelled``, called now and then while waiting, returns True. After any exception nothing is held or queued.

        With ``os_lock``, a deadlock with another process is found by the system only while neither ``timeout`` nor ``cancelled``
        is given; with one of them the bytes are polled for, at most 10 ms apart, and the timeout ends it.
        """
        return self.acquire_runs(_merge(requests), Hold, os_lock=os_lock, timeout=timeout, cancelled=cancelled)

    def acquire_runs(
        self,
        wanted: dict[int, Runs],
        kind: type[H],
        *,
        os_lock: bool = False,
        timeout: float | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> H:
        """`acquire` of runs (start, stop, write) by extent, which are in order, not empty, and do not overlap; as a Hold of that kind."""
        ticket = _Ticket(self._owner(), wanted, os_lock)
        try:
            deadline = None if timeout is None else time.monotonic() + timeout
            if not self._admit(ticket):
                self._wait(ticket, deadline, cancelled)
            if os_lock and not self._take_free_bytes(ticket):
                if self._crowd is not None:
                    self._crowd.say_waits(True)
                try:
                    self._take_bytes(ticket, deadline, cancelled)
                finally:
                    if self._crowd is not None:
                        self._crowd.say_waits(False)
            return kind(self, ticket)
        except BaseException:
            self._released.append(ticket)
            self._settle()
            raise

    def briefly(self, extent: int, cell: int, do: Callable[[], T]) -> T:
        """Return ``do()``, some microseconds of work, called while nobody else holds the cell: cheaper than `acquire`.

        Raises BlockingIOError when it is held, or wanted, here or elsewhere, and calls nothing then. The extent is one that was placed.
        """
        fd, byte = self._fd, self._bases[extent] + cell
        try:
            for attempt in range(MOST_ATTEMPTS):
                # The mutex stands in for a ticket: no other thread is granted the cell meanwhile, and no finalizer grants it.
                with self._mutex:
                    if self._changing or self._released or extent in self._granted:
                        raise BlockingIOError
                    self._changing = True
                    try:
                        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
                        return do()
                    except BlockingIOError:
                        if attempt == MOST_ATTEMPTS - 1:
                            raise
                    finally:
                        self._changing = False
                        fcntl.lockf(fd, fcntl.LOCK_UN, 1, byte)  # if it was not taken, nothing of this process lies there
                os.sched_yield()
        finally:
            if self._released or self._is_awaited:
                self._look_after()
        raise AssertionError(extent)

    def is_held(self, extent: int) -> bool:
        """Return whether cells of an extent are held in this process, or were, by Holds that nobody keeps, and are not given back yet.

        Of what nobody can lock any more False stays true; after True `Crowd.settled` is called when it may have changed. Waits for nothing.
        """
        if extent not in self._granted:
            return False
        self._is_awaited = True  # before looking again: whoever takes the last one out now sees it
        return extent in self._granted

    def holds(self, extent: int, beside: Hold | None = None) -> list[Hold]:
        """Return the Holds, still kept and not released, that the calling thread has of an extent; or that the owner of one has beside it.

        Waits for nothing.
        """
        tickets = list(self._granted.get(extent, ()))  # of C: no other thread comes between
        if beside is None:
            owner: _Owner | None = self._owner()
        else:
            if len(tickets) == 1:
                return []  # nearly always
            owner = None if beside._ticket is None else beside._ticket.owner
        lost = [ticket.lost for ticket in tickets if ticket.owner is owner]
        found = [each[0]() for each in lost if each is not None]
        return [hold for hold in found if hold is not None and hold is not beside and not hold.is_released]

    def held_by_caller(self, extent: int, start: int, stop: int) -> str | None:
        """Return "w" when this thread holds all of the cells to write, "r" when it holds all of them somehow, else None."""
        owner = self._owner()
        held = self._read(lambda: self._runs_of(owner, extent))
        if not held:
            return None
        if not _subtract((start, stop), [run for run in held if run[2]]):
            return "w"
        return None if _subtract((start, stop), held) else "r"

    def statistics(self) -> LockStatistics:
        """Return a snapshot."""
        return self._read(self._count)

    def _count(self) -> LockStatistics:
        tickets = {ticket for holders in self._granted.values() for ticket in holders}
        return LockStatistics(len(tickets), len(self._waiting), len(self._granted), self._contended)

    def check(self) -> None:
        """Assert that nobody holds what another writes, and that nobody waits without a reason."""
        self._read(self._check)

    def _check(self) -> None:
        for extent, holders in self._granted.items():
            assert holders, f"extent {extent} is in the table without a holder"
            for ticket, runs in holders.items():
                assert ticket.wanted[extent] is runs
                assert self._released or (ticket.is_granted and ticket not in self._waiting)
                assert all(start < stop for start, stop, _ in runs)
                assert all(left[1] <= right[0] for left, right in itertools.pairwise(runs)), runs
            for (one, these), (other, those) in itertools.combinations(holders.items(), 2):
                assert one.owner is other.owner or not _conflict(these, those), f"{one.owner} and {other.owner}: {extent}"
        for ticket in self._waiting:
            assert not ticket.is_granted
            assert not self._may_grant(ticket), f"{ticket.owner} waits for nothing"
            assert not self._cycle(ticket), f"{ticket.owner} waits for itself"
        assert len(set(self._bases.values()) | set(self._free_bases)) == len(self._bases) + len(self._free_bases)

    def _read(self, look: Callable[[], T]) -> T:
        """Return ``look()`` of a table that stays as it is meanwhile, with all that was released taken out.

        Otherwise a finalizer, in this thread, could change it under the eyes of the loop that reads it. Not a context manager
        of ours: Ctrl-C as its ``__exit__`` begins would leave `_changing` set.
        """
        self._settle()
        with self._mutex:
            before, self._changing = self._changing, True
            try:
                found = look()
            finally:
                self._changing = before
        self._look_after()
        return found

    def _owner(self) -> _Owner:
        try:
            owner: _Owner = self._threads.owner
        except AttributeError:
            owner = self._threads.owner = _Owner()
        return owner

    def _admit(self, ticket: _Ticket) -> bool:
        """Grant a new ticket and return True, or put it in the queue and return False."""
        with self._mutex:
            if self._changing:
                raise LockError(
                    f"locking {_name(ticket.wanted)} from a finalizer, which the garbage collector ran in the middle of another "
                    f"lock operation: a __del__ method or weakref callback must not lock; do it from a plain call."
                )
            self._changing = True  # nothing may stand between this and try: Ctrl-C there would leave it set for ever
            try:
                if self._released:
                    self._clear()
                if not self._waiting and self._granted.keys().isdisjoint(ticket.wanted):  # nearly always
                    self._grant(ticket)
                else:
                    self._refuse_upgrade(ticket)
                    if self._may_grant(ticket):
                        self._grant(ticket)
                    else:
                        self._enqueue(ticket)
                while self._released:  # by finalizers, meanwhile
                    self._clear()
            finally:
                self._changing = False
            is_granted = ticket.is_granted
        if self._released or self._is_awaited:
            self._look_after()
        return is_granted

    def _settle(self) -> None:
        """Take out what was released, and grant what became possible."""
        with self._mutex:
            if self._changing:
                return  # from a finalizer: the frame below looks at the queue again before it leaves
            self._settle_inside()
        if self._released or self._is_awaited:
            self._look_after()

    def _settle_inside(self) -> None:
        self._changing = True
        try:
            while self._released:
                self._clear()
        finally:
            self._changing = False

    def _look_after(self, _: object = None) -> None:
        """Take out what finalizers released, unless somebody is in here, who then does it as he leaves. Waits for nothing.

        After the mutex was left, therefore, everybody calls this: a finalizer in another thread may have been turned away.
        """
        while self._released and not is_finalizing():
            if not self._mutex.acquire(blocking=False):
                return
            try:
                if self._changing:
                    return
                self._settle_inside()
            finally:
                self._mutex.release()
        if self._is_awaited and self._crowd is not None:
            self._is_awaited = False
            self._crowd.settled()

    def _clear(self) -> None:
        """Take out what was released, then grant in order of arrival. Caller has set `_changing`, as for all that follow."""
        granted = self._granted
        # The last ticket stays queued until the grants are made: interrupted, whoever comes next makes them.
        while self._released:
            ticket = self._released[0]
            if isinstance(ticket, _Lost):
                ticket = ticket.ticket
            ticket.lost = None  # it would call again; and they refer to each other
            self._waiting.pop(ticket, None)
            for extent, runs in ticket.wanted.items():
                holders = granted.get(extent)
                if holders is not None and ticket in holders:
                    if ticket.os_lock:
                        # Under the mutex: a reader who comes now finds either this ticket's bytes or its own way to take them.
                        self._give_bytes(ticket, extent, runs, holders)
                    del holders[ticket]
                    if not holders:
                        del granted[extent]
                elif holders is not None and not holders:
                    del granted[extent]  # an exception came between the two lines above
            if self._waiting and len(self._released) == 1:
                self._grant_waiting()
            self._released.popleft()

    def _grant_waiting(self) -> None:
        for ticket in list(self._waiting):
            if self._may_grant(ticket):
                self._grant(ticket)

    def _grant(self, ticket: _Ticket) -> None:
        for extent, runs in ticket.wanted.items():
            holders = self._granted.get(extent)
            if holders is None:
                self._granted[extent] = {ticket: runs}
            else:
                holders[ticket] = runs
        self._waiting.pop(ticket, None)
        if not ticket.is_granted:
            ticket.is_granted = True
            if ticket.wake is not None:
                ticket.wake.release()

    def _enqueue(self, ticket: _Ticket) -> None:
        self._contended += 1
        ticket.wake = threading.Lock()
        ticket.wake.acquire()
        self._waiting[ticket] = None
        cycle = self._cycle(ticket)
        if cycle:
            del self._waiting[ticket]
            raise LockError(_tell_deadlock(ticket, cycle))
        # Someone may now wait only because it is polite to a ticket that waits, over several corners, for this one: see
        # _may_grant. That becomes known here, as every wait for a thread begins with that thread's own.
        if self._holds_anything(ticket.owner):
            self._grant_waiting()

    def _holds_anything(self, owner: _Owner) -> bool:
        return any(ticket.owner is owner for holders in self._granted.values() for ticket in holders)

    def _refuse_upgrade(self, ticket: _Ticket) -> None:
        for extent, runs in ticket.wanted.items():
            holders = self._granted.get(extent)
            if holders is None:
                continue
            held = [run for other, theirs in holders.items() if other.owner is ticket.owner for run in theirs]
            if not held:
                continue
            written = [run for run in held if run[2]]
            for start, stop in ((max(run[0], low), min(run[1], high)) for run in runs if run[2] for low, high, _ in held):
                if start < stop and _subtract((start, stop), written):
                    raise LockError(
                        f"locking {_name_cells(extent, start, stop)} to write, while {ticket.owner} holds them to read: two "
                        f"threads that did so would wait for each other for ever. Ask for them to write from the start, or "
                        f"release them first."
                    )

    def _may_grant(self, ticket: _Ticket) -> bool:
        """Return whether no other thread holds what conflicts, and nobody who came earlier waits for it.

        Those who came first go first, so that readers who keep coming do not shut a writer out. But one who waits for this very
        thread is passed: he can only go on when this thread does.
        """
        owner = ticket.owner
        for extent, runs in ticket.wanted.items():
            holders = self._granted.get(extent)
            if holders is not None:
                for other, theirs in holders.items():
                    if other.owner is not owner and _conflict(runs, theirs):
                        return False
        if self._waiting:
            for earlier in self._waiting:
                if earlier is ticket:
                    break
                if earlier.owner is not owner and _tickets_conflict(ticket, earlier) and not self._waits_for(earlier, owner):
                    return False
        return True

    def _blockers(self, ticket: _Ticket, *, polite: bool) -> Iterator[_Ticket]:
        """Yield the tickets of others that keep one waiting: granted ones, and (polite) those that wait since earlier."""
        for extent, runs in ticket.wanted.items():
            for other, theirs in self._granted.get(extent, {}).items():
                if other.owner is not ticket.owner and _conflict(runs, theirs):
                    yield other
        if polite:
            for earlier in self._waiting:
                if earlier is ticket:
                    return
                if earlier.owner is not ticket.owner and _tickets_conflict(ticket, earlier):
                    yield earlier

    def _waits_for(self, ticket: _Ticket, target: _Owner) -> bool:
        """Return whether a waiting ticket can only be granted after something that the thread ``target`` does."""
        seen, stack = {ticket}, [ticket]
        while stack:
            for blocker in self._blockers(stack.pop(), polite=True):
                if blocker.owner is target:
                    return True
                for other in self._waiting:
                    if other.owner is blocker.owner and other not in seen:
                        seen.add(other)
                        stack.append(other)
        return False

    def _cycle(self, ticket: _Ticket) -> list[_Ticket]:
        """Return [holder's ticket, his waiting ticket, ..., a ticket of this thread] when waiting would be for ever, else [].

        Only locks that are held count: waits out of politeness are given up where they close a circle.
        """
        seen = {ticket}
        stack: list[list[_Ticket]] = [[ticket]]
        while stack:
            path = stack.pop()
            for blocker in self._blockers(path[-1], polite=False):
                if blocker.owner is ticket.owner:
                    return [*path[1:], blocker]
                for other in self._waiting:
                    if other.owner is blocker.owner and other not in seen:
                        seen.add(other)
                        stack.append([*path, blocker, other])
        return []

    def _wait(self, ticket: _Ticket, deadline: float | None, cancelled: Callable[[], bool] | None) -> None:
        assert ticket.wake is not None
        longest = LOOK_AGAIN_S if cancelled is None else ASK_CANCELLED_S
        while not ticket.is_granted:
            if cancelled is not None and cancelled():
                raise CancelledError(f"locking {_name(ticket.wanted)} was cancelled while it waited")
            left = longest if deadline is None else min(longest, deadline - time.monotonic())
            if left <= 0:
                reason = self._read(lambda: "" if ticket.is_granted else self._tell_timeout(ticket))
                if reason:
                    raise TimeoutError(reason)
                continue
            # A plain lock, not a condition: signals interrupt it, and the granting thread needs no lock of ours to open it.
            if ticket.wake.acquire(timeout=left):
                return
            self._settle()

    def _tell_timeout(self, ticket: _Ticket) -> str:
        lines = []
        for extent in ticket.wanted:
            holders = self._granted.get(extent, {})
            conflicting = {t: r for t, r in holders.items() if t.owner is not ticket.owner and _conflict(ticket.wanted[extent], r)}
            if conflicting:
                lines.append(_name_holders(extent, conflicting))
        if not lines:
            lines = [f"{t.owner} asked first, and waits" for t in self._blockers(ticket, polite=True)]
        return (
            f"locking {_name(ticket.wanted)} was not granted in time: {'; '.join(lines[:4])}. A lock is never taken from its "
            f"holder: release it there, or wait longer."
        )

    def _take_free_bytes(self, ticket: _Ticket) -> bool:
        """Take the bytes past the turnstile and return True, if they are free, nobody waits, and this ticket alone has such cells here."""
        if self._crowd is None or self._crowd.anybody_waits():
            return False
        taken = False
        try:
            for extent, runs in ticket.wanted.items():
                base = self._bases.get(extent)
                if base is None or len(self._granted[extent]) != 1:
                    break
                for start, stop, write in runs:
                    fcntl.lockf(self._fd, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB, stop - start, base + start)
                    taken = True
            else:
                return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if taken:  # who holds bytes while he waits must have them by the rules
            self._read(lambda: self._give_all_bytes(ticket))
        return False

    def _take_bytes(self, ticket: _Ticket, deadline: float | None, cancelled: Callable[[], bool] | None) -> None:
        """Take the byte locks of a granted ticket, in ascending order of extents and cells."""
        refusals, pause_s = 0, SHORTEST_POLL_S
        while True:
            try:
                for extent in sorted(ticket.wanted, key=self.base):
                    base = self.base(extent)
                    for start, stop, write in self._missing_bytes(ticket, extent):
                        self._pass_turnstile(ticket, base + start, stop - start, write, deadline, cancelled)
                return
            except OSError as error:
                if error.errno != errno.EDEADLK:  # of a TimeoutError errno is None
                    raise
                # The kernel sees processes: a circle through two threads that do not wait for each other looks the same to it.
                # So let go and let others pass. A thread that then holds no bytes cannot be part of a circle; one that does
                # is believed to be when the kernel says so again and again.
                refusals += self._read(lambda: self._give_all_bytes(ticket))
                if refusals == MOST_REFUSALS:
                    raise LockError(
                        f"locking {_name(ticket.wanted)} between processes: the system found a deadlock {refusals} times. "
                        f"{self._name_blocker(ticket)} holds some of them, and waits for cells that {ticket.owner} holds. Take all "
                        f"cells in one call, everywhere, or in the same order."
                    ) from error
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_POLL_S)

    def _pass_turnstile(
        self, ticket: _Ticket, byte: int, nbytes: int, write: bool, deadline: float | None, cancelled: Callable[[], bool] | None
    ) -> None:
        """Take a run of bytes in turn: who waits to write stands in the turnstile, so that readers who come later wait behind.

        Without it, readers of several processes that overlap shut a writer out for ever. A thread that holds other bytes goes
        past it: the writer may be waiting for those.
        """
        if self._read(lambda: self._holds_other_bytes(ticket)):
            self._take_run(ticket, byte, nbytes, write, deadline, cancelled)
            return
        try:
            self._take_run(ticket, TURNSTILE + byte, nbytes, write, deadline, cancelled)
            self._take_run(ticket, byte, nbytes, write, deadline, cancelled)
        finally:
            # A thread that stands there too, to read the same cells, loses its turn by that, and nothing else.
            fcntl.lockf(self._fd, fcntl.LOCK_UN, nbytes, TURNSTILE + byte)

    def _holds_other_bytes(self, ticket: _Ticket) -> bool:
        return any(
            other.owner is ticket.owner and other.os_lock and other is not ticket for holders in self._granted.values() for other in holders
        )

    def _give_all_bytes(self, ticket: _Ticket) -> bool:
        """Give back the bytes of a granted ticket, and return whether its thread holds others."""
        for extent, holders in self._granted.items():
            if ticket in holders:
                self._give_bytes(ticket, extent, ticket.wanted[extent], holders)
        return self._holds_other_bytes(ticket)

    def _runs_of(self, owner: _Owner, extent: int, *, byte_locks_but: _Ticket | None = None) -> list[Run]:
        """Return what a thread holds of an extent; with ``byte_locks_but``, by tickets with os locks, and not that one."""
        return [
            run
            for ticket, runs in self._granted.get(extent, {}).items()
            if ticket.owner is owner and (byte_locks_but is None or (ticket.os_lock and ticket is not byte_locks_but))
            for run in runs
        ]

    def _missing_bytes(self, ticket: _Ticket, extent: int) -> list[Run]:
        """Return the runs to lock: one call for adjacent cells, and none for cells that this thread locked to write.

        Taking those again to read would give the writing up: to the kernel a process has one lock on a byte, the last.
        """
        held = self._read(lambda: self._runs_of(ticket.owner, extent, byte_locks_but=ticket))
        written = [run for run in held if run[2]]
        missing: list[Run] = []
        for start, stop, write in ticket.wanted[extent]:
            pieces = [(start, stop)] if write else _subtract((start, stop), written)
            for low, high in pieces:
                if missing and missing[-1][1] == low and missing[-1][2] == write:
                    missing[-1] = (missing[-1][0], high, write)
                else:
                    missing.append((low, high, write))
        return missing

    def _take_run(
        self, ticket: _Ticket, byte: int, nbytes: int, write: bool, deadline: float | None, cancelled: Callable[[], bool] | None
    ) -> None:
        mode = fcntl.LOCK_EX if write else fcntl.LOCK_SH
        pause_s = SHORTEST_POLL_S
        while True:
            try:
                fcntl.lockf(self._fd, mode | fcntl.LOCK_NB, nbytes, byte)
                return
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
            if deadline is None and cancelled is None:
                # Waits in the kernel, in order of arrival. Ctrl-C interrupts it: Python calls the handler, which raises.
                fcntl.lockf(self._fd, mode, nbytes, byte)
                return
            # The call has no timeout, and nothing but a signal ends it: ask again and again, seldom.
            if cancelled is not None and cancelled():
                raise CancelledError(f"locking {_name(ticket.wanted)} was cancelled while another process held it")
            left = LONGEST_POLL_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(
                    f"locking {_name(ticket.wanted)} was not granted in time: {self._name_process(byte, nbytes, write)} holds "
                    f"cells of it. A lock is never taken from its holder: release it there, or wait longer."
                )
            time.sleep(min(pause_s, left))
            pause_s = min(2 * pause_s, LONGEST_POLL_S)

    def _give_bytes(self, ticket: _Ticket, extent: int, runs: Runs, holders: dict[_Ticket, Runs]) -> None:
        """Unlock the bytes of a ticket that no other ticket of this process locks too; those that others read stay read."""
        base = self._bases.get(extent)
        if base is None:
            return  # it was granted, and interrupted before it took any
        if len(holders) == 1:  # nearly always: this ticket alone
            for start, stop, _ in runs:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, stop - start, base + start)
            return
        others = [run for other, theirs in holders.items() if other is not ticket and other.os_lock for run in theirs]
        written = [run for run in others if run[2]]
        for start, stop, write in runs:
            for low, high in _subtract((start, stop), others):
                fcntl.lockf(self._fd, fcntl.LOCK_UN, high - low, base + low)
            if write and others:
                for low, high, _ in others:
                    for first, last in _subtract((max(low, start), min(high, stop)), written):
                        # From writing to reading never waits.
                        fcntl.lockf(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB, last - first, base + first)

    def _name_blocker(self, ticket: _Ticket) -> str:
        for extent, runs in ticket.wanted.items():
            for start, stop, write in runs:
                name = self._name_process(self.base(extent) + start, stop - start, write)
                if name != "another process":
                    return name
        return "another process"

    def _name_process(self, byte: int, nbytes: int, write: bool) -> str:
        # struct flock differs between systems; this is only for the message, so only where it is known.
        if sys.platform == "linux" and struct.calcsize("P") == 8:
            kind = fcntl.F_WRLCK if write else fcntl.F_RDLCK
            flock = struct.Struct("hhqqi4x")
            try:
                answer = fcntl.fcntl(self._fd, fcntl.F_GETLK, flock.pack(kind, os.SEEK_SET, byte, nbytes, 0))
            except OSError:
                return "another process"
            held, _, _, _, pid = flock.unpack(answer)
            if held != fcntl.F_UNLCK:
                return f"process {pid}"
        return "another process"


def _make_file() -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("shmarray-locks", os.MFD_CLOEXEC)
        os.fchmod(fd, 0o600)  # a memfd is 0777 when made
        return fd
    fd, path = tempfile.mkstemp(prefix="shmarray-locks-")  # 0600
    os.unlink(path)
    return fd


_of_process: list[CellLocks] = []
_of_process_mutex = threading.Lock()


def process_locks() -> CellLocks:
    """Return the table of this process: an array of one pool may be read by a plan of another."""
    if not _of_process:
        with _of_process_mutex:
            if not _of_process:
                _of_process.append(CellLocks())
    return _of_process[0]


def _start_anew_in_child() -> None:
    global _of_process_mutex
    _of_process_mutex = threading.Lock()  # its holder may not exist here
    for locks in list(_live_tables):
        locks._start_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew_in_child)


def _merge(requests: Sequence[LockRequest]) -> dict[int, Runs]:
    """Return the runs of each extent, in order, without overlap; to write wins over to read."""
    wanted: dict[int, list[Run]] = {}
    for extent, start, stop, mode in requests:
        if not 0 <= start <= stop <= CELLS_PER_EXTENT or mode not in ("r", "w"):
            raise ValueError(
                f"locking cells [{start}, {stop}) of extent {extent} in mode {mode!r}: the rule is 0 <= start <= stop <= "
                f"{CELLS_PER_EXTENT}, and mode 'r' or 'w'."
            )
        if start < stop:
            wanted.setdefault(extent, []).append((start, stop, mode == "w"))
    return {extent: tuple(runs) if len(runs) == 1 else _merge_runs(runs) for extent, runs in wanted.items()}


def _merge_runs(runs: list[Run]) -> Runs:
    written = _union(run for run in runs if run[2])
    merged = [(start, stop, True) for start, stop in written]
    covers = merged.copy()
    for start, stop in _union(run for run in runs if not run[2]):
        merged += [(low, high, False) for low, high in _subtract((start, stop), covers)]
    return tuple(sorted(merged))


def _union(runs: Iterator[Run]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop, _ in sorted(runs):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _subtract(cells: tuple[int, int], runs: Sequence[Run]) -> list[tuple[int, int]]:
    """Return the parts of [start, stop) that no run covers."""
    at, stop = cells
    parts = []
    for low, high, _ in sorted(run for run in runs if run[0] < stop and run[1] > at):
        if at < low:
            parts.append((at, low))
        at = max(at, high)
    if at < stop:
        parts.append((at, stop))
    return parts


def _conflict(one: Runs, other: Runs) -> bool:
    """Return whether both name a cell that at least one of them writes."""
    i = j = 0
    while i < len(one) and j < len(other):
        start, stop, write = one[i]
        low, high, also = other[j]
        if start < high and low < stop and (write or also):
            return True
        if stop <= high:
            i += 1
        else:
            j += 1
    return False


def _tickets_conflict(one: _Ticket, other: _Ticket) -> bool:
    return any(extent in other.wanted and _conflict(runs, other.wanted[extent]) for extent, runs in one.wanted.items())


def _name_cells(extent: int, start: int, stop: int) -> str:
    return f"cells [{start}, {stop}) of extent {extent}"


def _name_run(extent: int, run: Run) -> str:
    return f"{_name_cells(extent, run[0], run[1])} to {'write' if run[2] else 'read'}"


def _name(wanted: dict[int, Runs]) -> str:
    runs = [_name_run(extent, run) for extent, some in wanted.items() for run in some]
    return ", ".join(runs[:3]) + (f" and {len(runs) - 3} more runs" if len(runs) > 3 else "")


def _name_holders(extent: int, holders: dict[_Ticket, Runs]) -> str:
    return "; ".join(f"{ticket.owner} holds {_name({extent: runs})}" for ticket, runs in holders.items())


def _tell_deadlock(ticket: _Ticket, cycle: list[_Ticket]) -> str:
    waits = [f"{ticket.owner} would wait for {_name(ticket.wanted)}"]
    for held, waiting in zip(cycle[::2], [*cycle[1::2], None], strict=False):
        text = f"{held.owner} holds {_name(held.wanted)}"
        waits.append(f"{text} and waits for {_name(waiting.wanted)}" if waiting is not None else text)
    return f"locking would be a deadlock: {'; '.join(waits)}. Take all cells in one call, or release those first."
