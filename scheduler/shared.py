"""Shared segments: memory that a family of processes (a script and its children) owns together, without a server or names.

Promises: an allocation lives as long as any process holds a `Lease` of it, or a handle of it is on its way; who made it may end
first; when every process is gone, SIGKILLed or not, the kernel takes everything. Relies on Linux (memfd, seals, POSIX and OFD locks,
/proc) and on the rules of `ownership`. The table is changed under one POSIX lock between processes and one mutex between threads;
a finalizer only appends to a deque, for the garbage collector runs it in the middle of anything.
Never put here: which word means what (`ownership`), what an array is.

    data    sparse, mapped, sealed    | bytes of an object | state of its cells | what its owner wrote about it | ... hole ... |
    table   mapped, sealed            ownership.Table
    lock    never mapped, duplicated or closed: byte 0 the table, bytes from (object + 1) << 32 its cells
    embryo  byte p locked, by descriptions that a fork inherits: the child that will be participant p lives, or its parent forks
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import re
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from sys import is_finalizing
from typing import Any, TypeVar

import numpy as np
import psutil

from scheduler.errors import AbandonedLockError, HandleExpired, LockError, SharedMemoryError
from scheduler.limits import format_bytes
from scheduler.locks import CELLS_PER_EXTENT, TURNSTILE, CellLocks, Hold, Runs, _merge
from scheduler.ownership import INODES, MAGIC, NBYTES, TABLE_NBYTES, UUID, Table
from scheduler.segments import (
    _F_ADD_SEALS,
    _F_SEAL_GROW,
    _F_SEAL_SEAL,
    _F_SEAL_SHRINK,
    _FALLOC_PUNCH,
    LARGEST_ARENA_NBYTES,
    PAGE_NBYTES,
    _advise,
    _libc,
    _map_as_much,
)
from scheduler.task import LockRequest

__all__ = ["CellHold", "Lease", "Segment", "family", "prepare", "receive"]

T = TypeVar("T")

ROOT = "SHMARRAY_SHARED"  # in the environment: where children find the segment of their family, "pid:descriptor:uuid"
WARM_LIMIT_NBYTES = 256 << 20  # of freed memory, kept because touching it anew costs some 1.2 ms a MiB
HANDLE_TTL_NS = 60 * 10**9
REAP_EVERY_NS = 50 * 10**6  # looking at a process costs 10 us
EAGER_NBYTES = 8 << 20  # a drop of that much is swept at once, if nobody else has the table
ATTEMPTS = 20
LINE_NBYTES = 64
HANDLE = struct.Struct("<QIIIIIH")  # uuid, object, generation, token, nonce, pid and descriptor of the sender
NO_TOKEN = 0  # a nonce that no token has
_TRAILER = struct.Struct("QQ")  # how many cells, how many bytes of meta
LAST_BYTE = (1 << 63) - 1
FLOCK = struct.Struct("hhqqi4x")
EXTENT = re.compile(r"extent (\d+)")  # as errors of locks name it, one more than the object
START_BITS = 40  # a pid has at most 22

_segments: dict[int, Segment] = {}  # uuid -> what this process has mapped; they stay
_segments_mutex = threading.RLock()
_family: list[Segment] = []
_serials = itertools.count(int.from_bytes(os.urandom(4), "little"))


def identity_of(pid: int) -> int:
    """Return a number that no other process has, then or later: its pid and when it started; 0 when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = text[text.rindex(b")") + 2 :].split()
    if fields[0] in b"ZX" and int(fields[17]) <= 1:  # a zombie; one with threads has lost its first thread only
        return 0
    return pid << START_BITS | int(fields[19])


def is_alive(identity: int) -> bool:
    """Return whether the process of that identity lives."""
    return identity_of(identity >> START_BITS) == identity


class Lease:
    """An allocation that this process holds until nothing refers to the Lease any more. Exports its bytes to NumPy.

    ``nbytes`` bytes from ``start`` (an address), the state words of its cells, ``meta`` as it was given to `Segment.allocate`.
    ``extra`` and ``memo`` are for whoever asked for it.
    """

    __slots__ = (
        "__array_interface__",
        "__weakref__",
        "cells",
        "extra",
        "generation",
        "memo",
        "meta",
        "nbytes",
        "number",
        "offset",
        "segment",
        "start",
    )

    def __init__(self, segment: Segment, number: int, generation: int) -> None:
        offset, _, nbytes = segment.table.extent(number)
        self.segment = segment
        self.number = number
        self.generation = generation
        self.offset = offset
        self.nbytes = nbytes
        self.start = segment.start + offset
        at = offset + _line_ceil(nbytes)
        count, length = _TRAILER.unpack_from(segment.data, at)
        self.cells: Any = segment.data[at + 16 : at + 16 + 8 * count].cast("Q")
        self.meta = bytes(segment.data[at + 16 + 8 * count : at + 16 + 8 * count + length])
        self.extra: Any = None
        self.memo: Any = None
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (self.start, False), "version": 3}

    def handle(self) -> bytes:
        """Return some 30 bytes that `receive` makes a Lease of, once for sure, and again while anybody holds one."""
        return self.segment._issue(self)

    def reference(self) -> bytes:
        """Return a handle that keeps nothing: `receive` takes it while anybody holds the allocation."""
        segment = self.segment
        pid = os.getpid()
        return HANDLE.pack(segment.uuid, self.number, self.generation, 0, NO_TOKEN, pid, segment.table_fd)

    def is_cold(self) -> bool:
        """Return whether its bytes have never been touched since they were last given back: they are zeros."""
        return next(self.segment._touched(self.offset, self.offset + self.nbytes), None) is None

    def clear(self) -> None:
        """Make its bytes zeros: those that memory was ever taken for, as the others are."""
        segment = self.segment
        for start, stop in segment._touched(self.offset, self.offset + self.nbytes):
            np.frombuffer(segment.data, np.uint8, stop - start, start)[:] = 0

    def lock(self, runs: Sequence[tuple[int, int]], mode: str, timeout: float | None = None) -> CellHold:
        """Return its cells [start, stop), ... locked to read ("r") or write ("w"), against threads and processes.

        Raises as `CellLocks.acquire`; AbandonedLockError, once, when who held one of them to write died: then nothing is held.
        """
        return self.segment.lock(self, runs, mode, timeout)

    def alone(self, do: Callable[[], T]) -> T:
        """Return ``do()``, some microseconds of work, called while nobody else holds cell 0: cheaper than `lock`, and not in turn."""
        mark = self.cells[0]
        if not mark:
            try:
                return self.segment.locks.briefly(self.number + 1, 0, do)
            except BlockingIOError:
                pass
        elif self.segment._is_own(self.number + 1, mark):
            return do()
        with self.lock([(0, 1)], "w"):
            return do()


class _Gone(weakref.ref[Lease]):
    """What is left of a Lease: ``key``. Its callback is the C function `deque.append`; see `extents._Tombstone`."""

    __slots__ = ("key",)
    key: tuple[int, int]


class CellHold(Hold):
    """Cells that are locked until `release`, or the end of a ``with`` block. Keeps the memory that they are of."""

    __slots__ = ("_lease", "_mark", "_pid", "_written")  # set by `Segment.lock`: a call less for each lock
    _lease: Lease
    _mark: int  # of the cells that it writes, 0 of one to read
    _pid: int
    _written: list[tuple[int, int]] | None  # cells with that mark; None of one to read, and when it is being released

    def release(self) -> None:
        """Give the cells back; calling it again does nothing."""
        if self._ticket is not None:
            if self._written is not None and self._pid == os.getpid():  # a forked child holds nothing
                self._lease.segment._end_writing(self)
            Hold.release(self)


class Segment:
    """One process's part in a shared segment. Made by `family` and `receive`."""

    def __init__(self, fds: tuple[int, int, int, int], data: mmap.mmap, table: mmap.mmap) -> None:
        self.table_fd, self.data_fd, self.lock_fd, self.embryo_fd = fds
        self.data = memoryview(data)
        self.start = int(np.frombuffer(data, np.uint8, 1).ctypes.data)
        self.table = Table(table)
        self.uuid = int(self.table.words[UUID])
        self.locks = CellLocks(self.lock_fd, crowd=self)
        self.row = -1  # this process's, once it holds anything
        self._identity = 0
        self._leases: weakref.WeakValueDictionary[tuple[int, int], Lease] = weakref.WeakValueDictionary()
        self._refs: dict[tuple[int, int], tuple[Any, ...]] = {}  # a weak reference that is gone calls nobody
        self._dropped: deque[_Gone] = deque()
        self._reaped_ns = 0
        self._freed_nbytes = 0  # since it was last looked how much is warm
        self._embryo: tuple[int, int] | None = None  # row and descriptor, while this thread forks
        self._renew()

    def _renew(self) -> None:
        # Re-entrant, as a signal handler, or a finalizer that the garbage collector runs, may come in again: `_inside` turns it away.
        self._mutex = threading.RLock()
        self._inside = False
        self._pid = os.getpid()
        self._waiting: set[int] = set()  # threads that wait for cells

    # --- the lock of the table ------------------------------------------------------------------------------------------------

    def _locked(self, do: Callable[[], T]) -> T:
        """Return ``do()``, called while no other thread or process changes the table.

        The mutex is left by C code, and what is undone stands in a `finally`: Ctrl-C at any point leaves nothing locked.
        """
        with self._mutex:
            if self._inside:
                raise SharedMemoryError(
                    "making, sending or receiving a shared array from a finalizer or signal handler that ran in the middle of another such "
                    "operation of its thread: do it from a plain call."
                )
            try:
                self._inside = True
                self._take_turn()
                self.table.forget_spare()
                if self.row < 0:
                    self._register()
                done = do()
            finally:
                self._inside = False
                fcntl.lockf(self.lock_fd, fcntl.LOCK_UN, 1, 0)
        if self._dropped:  # after the mutex was left: who was turned away before counts on it
            self._drain()
        return done

    def _take_turn(self) -> None:
        for _ in range(ATTEMPTS):  # it is held for some 10 us; to sleep, and be woken, can take ten times as long
            try:
                fcntl.lockf(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
                return
            except BlockingIOError:
                pass
        while True:
            try:
                fcntl.lockf(self.lock_fd, fcntl.LOCK_EX, 1, 0)
                return
            except OSError as error:
                # The kernel sees processes: another thread of this one waits for cells, whose holder waits for the table. The table is
                # never held while one waits for cells, so that is no circle.
                if error.errno != errno.EDEADLK:
                    raise
                time.sleep(0.0005)

    def _register(self) -> None:
        self._identity = identity_of(os.getpid())
        self._reap()
        where = self.table_fd | self.data_fd << 16 | self.lock_fd << 32 | self.embryo_fd << 48
        self.row = self.table.register(self._identity, where)

    def _reap(self) -> None:
        self._reaped_ns = time.monotonic_ns()
        self.table.reap(self._is_alive, self._is_embryo)

    def _is_alive(self, identity: int) -> bool:
        return identity == self._identity or is_alive(identity)

    def _is_embryo(self, row: int) -> bool:
        fd = os.open(f"/proc/self/fd/{self.embryo_fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, row, 1, 0))
            return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
        finally:
            os.close(fd)

    def _sweep(self, wanted: int = 0) -> None:
        now = time.monotonic_ns()
        if now - self._reaped_ns > REAP_EVERY_NS:
            self._reap()
        freed = self.table.sweep(now, HANDLE_TTL_NS, self._is_alive, wanted)
        if freed:
            self._freed_nbytes += freed
            if self._freed_nbytes > WARM_LIMIT_NBYTES // 8:
                self._freed_nbytes = 0
                if os.fstat(self.data_fd).st_blocks * 512 > WARM_LIMIT_NBYTES:
                    self._punch(WARM_LIMIT_NBYTES - WARM_LIMIT_NBYTES // 8)

    # --- owning -----------------------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int, *, cells: int = 0, meta: bytes = b"") -> Lease:
        """Return a Lease of new memory, with whatever bytes were there, ``cells`` clean cells and ``meta`` for those who receive it.

        Raises SharedMemoryError when there is no room.
        """
        trailer = _line_ceil(nbytes)
        whole = trailer + 16 + 8 * cells + len(meta)

        def do() -> Lease:
            self._sweep(whole)
            number, generation, offset = self.table.allocate(self.row, whole, nbytes)
            try:
                at = offset + trailer
                # Nobody else reads this before a handle is made.
                self.data[at : offset + whole] = _TRAILER.pack(cells, len(meta)) + bytes(8 * cells) + meta
                return self._lease(number, generation)
            except BaseException:
                self.table.drop(self.row, number)
                raise

        return self._locked(do)

    def _lease(self, number: int, generation: int) -> Lease:
        key = (number, generation)
        lease = self._leases.get(key)
        if lease is None:
            lease = Lease(self, number, generation)
            self.locks.place(number + 1, (number + 1) * CELLS_PER_EXTENT)
            # The youngest is called first: by then it is in the queue, and if Ctrl-C strikes in the other, it stays there.
            after = weakref.ref(lease, self._drain)
            gone = _Gone(lease, self._dropped.append)
            gone.key = key
            self._refs[key] = (gone, after)
            self._leases[key] = lease
        return lease

    def _drain(self, _: object = None) -> None:
        """Let go of what was dropped, unless somebody is in here, who then does it."""
        mutex = self._mutex
        if is_finalizing():  # half of Python is gone, and who ends lets go of everything
            return
        while self._dropped and self._is_due():  # looked at again after the mutex was left: somebody may have been turned away meanwhile
            if not mutex.acquire(blocking=False):
                return
            try:
                if self._inside:
                    return
                self._clear_dropped()
            finally:
                mutex.release()

    def _is_due(self) -> bool:
        """Return whether something was dropped that is not locked.

        A lock that was dropped without being released is given back first, whatever order the garbage collector takes: else the next
        object of that number would be born locked. `CellLocks._look_after` then calls `settled`.
        """
        return any(not self.locks.is_held(gone.key[0] + 1) for gone in self._dropped.copy())  # of C: no other thread comes between

    def _clear_dropped(self) -> None:
        """Clear the bytes of what was dropped; sweep at once when that is much, and the table is free. With the mutex."""
        dropped, nbytes = self._dropped, 0
        for _ in range(len(dropped)):
            gone = dropped[0]  # taken off the queue last: done twice, it does no harm
            if self.locks.is_held(gone.key[0] + 1):
                dropped.append(gone)
                dropped.popleft()
                continue
            refs = self._refs.get(gone.key)
            if refs is not None and refs[0] is gone:  # else it was received again meanwhile
                if self.row >= 0 and self.table.is_live(*gone.key):  # else it was let go of before, and its number may be another's by now
                    nbytes += self.table.extent(gone.key[0])[1]
                    self.table.drop(self.row, gone.key[0])
                del self._refs[gone.key]
            dropped.popleft()
        if nbytes >= EAGER_NBYTES and not self._inside:
            try:
                self._inside = True
                fcntl.lockf(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
                self._sweep()
            except BlockingIOError:
                pass  # whoever has it may well do it
            finally:
                self._inside = False
                fcntl.lockf(self.lock_fd, fcntl.LOCK_UN, 1, 0)

    def _issue(self, lease: Lease) -> bytes:
        token, nonce = self._locked(lambda: self.table.issue(lease.number, lease.generation, self._identity))
        pid = self._identity >> START_BITS
        return HANDLE.pack(self.uuid, lease.number, lease.generation, token, nonce, pid, self.table_fd)

    def _receive(self, number: int, generation: int, token: int, nonce: int) -> Lease:
        def do() -> Lease:
            self.table.receive(self.row, number, generation, token, nonce)
            try:
                return self._lease(number, generation)
            except BaseException:
                if (number, generation) not in self._leases:
                    self.table.drop(self.row, number)
                raise

        return self._locked(do)

    def take(self, number: int, generation: int) -> Lease:
        """Return a Lease of an object that somebody is known to hold. Raises HandleExpired when nobody did."""
        return self._receive(number, generation, 0, NO_TOKEN)

    def take_inside(self, number: int, generation: int) -> Lease:
        """`take`, for what is called under the lock of the table."""
        self.table.receive(self.row, number, generation, 0, NO_TOKEN)
        return self._lease(number, generation)

    # --- locks of cells -----------------------------------------------------------------------------------------------------------

    def anybody_waits(self) -> bool:
        """Whether somewhere in the family a thread waits for cells; see `locks.Crowd`."""
        return self.table.anybody_waits()

    def say_waits(self, waits: bool) -> None:
        """Say so, or not any more, for the calling thread."""
        ident = threading.get_ident()
        if waits:
            self._waiting.add(ident)
        else:
            self._waiting.discard(ident)
        if self.row >= 0:
            self.table.say_waits(self.row, bool(self._waiting))

    def settled(self) -> None:
        """Let go of what could not be while cells of it were held."""
        if self._dropped:
            self._drain()

    def lock(self, lease: Lease, runs: Sequence[tuple[int, int]], mode: str, timeout: float | None) -> CellHold:
        """`Lease.lock`."""
        extent = lease.number + 1
        if len(runs) == 1:
            wanted: dict[int, Runs] = {extent: ((*runs[0], mode == "w"),)}
        else:
            wanted = _merge([LockRequest(extent, start, stop, mode) for start, stop in runs])
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                hold = self.locks.acquire_runs(wanted, CellHold, os_lock=True, timeout=timeout)
            except (LockError, TimeoutError) as error:  # in the numbers that `statistics` gives
                raise type(error)(EXTENT.sub(lambda found: f"shared array {int(found[1]) - 1}", str(error))) from None
            try:
                hold._lease = lease
                hold._pid = self._pid
                hold._mark = 0
                hold._written = None
                if mode == "w":
                    self._begin_writing(hold, runs)
                    return hold
                abandoned = self._abandoned(lease, runs)
                if not abandoned:
                    return hold
            except BaseException:
                Hold.release(hold)  # whatever of it is set by now
                raise
            # Somebody died writing. To tell one reader, and one only, takes the lock to write those cells: this thread may read others.
            hold.release()
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            self.lock(lease, [(cell, cell + 1) for cell in abandoned], "w", timeout).release()

    def _abandoned(self, lease: Lease, runs: Sequence[tuple[int, int]]) -> list[int]:
        """Return the cells that a dead writer has left, and those that this thread itself holds to write not."""
        cells = lease.cells
        found: list[int] = []
        if len(runs) == 1 and runs[0][1] - runs[0][0] == 1 and not cells[runs[0][0]]:
            return found  # nearly always
        for start, stop in runs:
            marks = [cells[start]] if stop - start == 1 else cells[start:stop]
            for cell, mark in enumerate(marks, start):
                if mark and not self._is_own(lease.number + 1, mark):
                    found.append(cell)
        return found

    def _is_own(self, extent: int, mark: int) -> bool:
        """Return whether a mark is of a hold of this thread, further out, which still lives."""
        return mark >> 32 == os.getpid() and any(hold._mark == mark for hold in self._holds(extent))

    def _holds(self, extent: int, beside: CellHold | None = None) -> list[CellHold]:
        # One that Ctrl-C has struck as it was made has no mark yet.
        return [hold for hold in self.locks.holds(extent, beside) if isinstance(hold, CellHold) and hasattr(hold, "_mark")]

    def _begin_writing(self, hold: CellHold, runs: Sequence[tuple[int, int]]) -> None:
        """Mark cells, now locked, as being written: a mark that the next owner finds tells that this one died."""
        lease, cells = hold._lease, hold._lease.cells
        single = runs[0][0] if len(runs) == 1 and runs[0][1] - runs[0][0] == 1 else None  # nearly always there is one cell
        if (single is None or cells[single]) and (abandoned := self._abandoned(lease, runs)):
            pid = cells[abandoned[0]] >> 32
            self.locks._read(lambda: self._pass_on(hold, [(cell, cell + 1) for cell in abandoned]))
            some = ", ".join(str(cell) for cell in abandoned[:5]) + (", ..." if len(abandoned) > 5 else "")
            raise AbandonedLockError(
                f"locking {len(abandoned)} cell{'s' * (len(abandoned) > 1)} ({some}) of a shared array: process {pid} held "
                f"{'them' if len(abandoned) > 1 else 'it'} to write, and died or let go without releasing. The values may be half written: "
                f"check them or write them anew. This is told once; lock again to go on."
            )
        hold._mark = mark = hold._pid << 32 | next(_serials) & 0xFFFFFFFF
        hold._written = written = []
        if single is not None:
            if not cells[single]:
                written.append(runs[0])  # before the mark: interrupted between, clearing it does no harm
                cells[single] = mark
            return
        for start, stop in runs:
            since = None
            for cell in range(start, stop):
                if not cells[cell]:
                    cells[cell] = mark
                    since = cell if since is None else since
                elif since is not None:
                    written.append((since, cell))
                    since = None
            if since is not None:
                written.append((since, stop))

    def _end_writing(self, hold: CellHold) -> None:
        """Clear the marks of a hold that is about to be released, but for cells that its thread goes on to hold to write."""
        lease, written = hold._lease, hold._written
        if written is None:
            return
        if not self.locks.holds(lease.number + 1, hold):  # nearly always: no other of this thread
            cells = lease.cells
            for start, stop in written:
                for cell in range(start, stop):
                    cells[cell] = 0
            hold._written = None
        else:
            # Under the mutex of the locks, as another thread may release one of the others now: that goes through here, too.
            self.locks._read(lambda: self._pass_on(hold, written))

    def _pass_on(self, hold: CellHold, written: Sequence[tuple[int, int]]) -> None:
        """Clear marks; of cells that a hold beside ``hold`` still writes, make them that one's: at no moment without."""
        extent, cells = hold._lease.number + 1, hold._lease.cells
        others = [(other._mark, other._written, other._ticket) for other in self._holds(extent, hold)]
        heirs = [(mark, theirs, ticket.wanted[extent]) for mark, theirs, ticket in others if theirs is not None and ticket is not None]
        for start, stop in written:
            for cell in range(start, stop):
                found = 0
                for mark, theirs, runs in heirs:
                    if any(write and first <= cell < last for first, last, write in runs):
                        theirs.append((cell, cell + 1))  # before the mark, as above
                        found = mark
                        break
                cells[cell] = found
        hold._written = None

    # --- looking ------------------------------------------------------------------------------------------------------------------

    def trim(self, keep_nbytes: int = 0) -> int:
        """Give freed memory beyond ``keep_nbytes`` back to the system, and return how much that was."""

        def do() -> int:
            self._reap()
            self._sweep()
            return self._punch(keep_nbytes)

        return self._locked(do)

    def _punch(self, keep_nbytes: int) -> int:
        # Under the lock, and of holes only: cut short, what is left is a hole that is still warm.
        warm = sorted(((stop - start, start) for start, stop in self._warm()), reverse=True)
        excess = sum(nbytes for nbytes, _ in warm) - keep_nbytes
        given = 0
        for nbytes, start in warm:
            if given >= excess:
                break
            if _libc.fallocate(self.data_fd, _FALLOC_PUNCH, ctypes.c_int64(start), ctypes.c_int64(nbytes)):
                break  # this system cannot; the memory is used again all the same
            given += nbytes
        return given

    def _warm(self) -> Iterator[tuple[int, int]]:
        """Yield the parts of holes that occupy memory. The kernel knows; books of ours could be wrong after a kill."""
        for start, stop in self.table.gaps():
            yield from self._touched(start, stop)

    def _touched(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of [start, stop) that occupy memory: the rest are zeros."""
        while start < stop:
            try:
                low = os.lseek(self.data_fd, start, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # no data from there to the end
                    raise
                return
            if low >= stop:
                return
            start = min(os.lseek(self.data_fd, low, os.SEEK_HOLE), stop)
            yield low, start

    def statistics(self) -> dict[str, Any]:
        """Return a snapshot of who owns what, as plain values, after freeing what nobody holds."""
        return self._locked(self._statistics)

    def _statistics(self) -> dict[str, Any]:
        self._reap()
        self._sweep()
        table = self.table
        live = table.live()
        extents = {obj: table.extent(obj) for obj in live}
        gaps = table.gaps()
        owners: dict[int, dict[str, int]] = {}
        for row in table.rows():
            held = [obj for obj in live if table.held[row, obj]]
            if held:
                owners[table.identity(row) >> START_BITS] = {"arrays": len(held), "nbytes": sum(extents[o][2] for o in held)}
        return {
            "arrays": len(live),
            "live_nbytes": sum(used for _, _, used in extents.values()),
            "reserved_nbytes": sum(length for _, length, _ in extents.values()),
            "free_nbytes": sum(stop - start for start, stop in gaps),
            "warm_nbytes": sum(stop - start for start, stop in self._warm()),
            "resident_nbytes": os.fstat(self.data_fd).st_blocks * 512,
            "largest_hole_nbytes": max((stop - start for start, stop in gaps), default=0),
            "high_water_nbytes": max((offset + length for offset, length, _ in extents.values()), default=0),
            "handles_on_their_way": len(table.pending()),
            "owners": owners,
            "stores": self._collections(),
            "locks": self._held_locks(),
        }

    def _collections(self) -> list[dict[str, Any]]:
        """Return what the makers of the collections wrote about them, and who uses each."""
        found = []
        for row, obj in self.table.collections():
            offset, _, nbytes = self.table.extent(obj)
            at = offset + _line_ceil(nbytes)
            count, length = _TRAILER.unpack_from(self.data, at)
            meta = bytes(self.data[at + 16 + 8 * count : at + 16 + 8 * count + length])
            users = [self.table.identity(other) >> START_BITS for other in self.table.rows() if self.table.held[other, obj]]
            found.append({"meta": meta, "holds": len(self.table.held_by(row)), "users": sorted(users)})
        return found

    def _held_locks(self) -> list[dict[str, Any]]:
        """Return who holds cells, and who waits, as the kernel tells."""
        inode = str(os.fstat(self.lock_fd).st_ino).encode()
        found: list[dict[str, Any]] = []
        try:
            with open("/proc/locks", "rb") as file:
                lines = file.read().splitlines()
        except OSError:
            return []  # hidden here
        for line in lines:
            fields = line.split()
            waits = b"->" in fields
            if waits:
                fields.remove(b"->")
            if len(fields) < 8 or fields[5].rpartition(b":")[2] != inode or fields[1] != b"POSIX":
                continue
            start, stop = int(fields[6]), LAST_BYTE if fields[7] == b"EOF" else int(fields[7])
            if start >= TURNSTILE:
                start, stop, waits = start - TURNSTILE, stop - TURNSTILE, True
            if start >= CELLS_PER_EXTENT:
                number, cell = start // CELLS_PER_EXTENT - 1, start % CELLS_PER_EXTENT
                cells = (cell, cell + stop - start + 1)
                mode = "w" if fields[3] == b"WRITE" else "r"
                found.append({"array": number, "cells": cells, "mode": mode, "pid": int(fields[4]), "waits": waits})
        return found

    def check(self) -> None:
        """Assert that no objects overlap, and that the books of this process are right."""
        self._locked(self.table.check)
        self.locks.check()

    # --- forks --------------------------------------------------------------------------------------------------------------------

    def _before_fork(self) -> None:
        """Reserve a row for the child, which holds from its first moment on what this process holds. With the mutex."""
        self._embryo = None
        if self.row < 0 or self._inside or not self._leases:
            return
        held: list[int] = []
        try:
            self._inside = True
            self._take_turn()
            self._clear_dropped()
            row = self.table.conceive(self.row, lambda row: _lock_embryo(self.embryo_fd, row, held))
            self._embryo = row, held[0]
        except (SharedMemoryError, OSError):
            pass  # no row, no descriptor: the child tries by itself
        finally:
            self._inside = False
            fcntl.lockf(self.lock_fd, fcntl.LOCK_UN, 1, 0)
            if self._embryo is None:  # Ctrl-C, for one: a byte that stays locked would be in the way of later forks
                for fd in held:
                    os.close(fd)

    def _after_fork_in_parent(self) -> None:
        embryo, self._embryo = self._embryo, None
        if embryo is not None:
            os.close(embryo[1])

    def _after_fork_in_child(self) -> None:
        embryo, self._embryo = self._embryo, None
        self._renew()
        self.row, self._identity = -1, identity_of(os.getpid())
        if embryo is not None:
            row, fd = embryo
            try:
                self._take_turn()
                self.table.adopt(row, self._identity)
                self.row = row
            finally:
                fcntl.lockf(self.lock_fd, fcntl.LOCK_UN, 1, 0)
                os.close(fd)
        elif self._leases:  # it could not be prepared: hold them now; they are there as long as the parent has them

            def do() -> None:
                for number, generation in list(self._leases):
                    self.table.hold(self.row, number, generation)

            self._locked(do)


def _line_ceil(nbytes: int) -> int:
    return -(-nbytes // LINE_NBYTES) * LINE_NBYTES


def _lock_embryo(embryo_fd: int, row: int, held: list[int]) -> None:
    fd = os.open(f"/proc/self/fd/{embryo_fd}", os.O_RDWR | os.O_CLOEXEC)  # a description of its own, which the child inherits
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, row, 1, 0))
    except BaseException:
        os.close(fd)
        raise
    held.append(fd)


# --- finding ----------------------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Make the segment of this family now, if there is none yet that can be reached: processes started from here on will find it.

    Called when the package is imported: a child that makes an array and ends before its parent has received it leaves it in
    memory that the parent has.
    """
    if hasattr(os, "memfd_create") and not _family and _root() is None:
        with contextlib.suppress(SharedMemoryError, OSError):  # told to whoever asks for shared memory
            family()


def family() -> Segment:
    """Return the segment that this process allocates in: its parents', where the environment names one, else one of its own."""
    if not _family:
        with _segments_mutex:
            if not _family:
                root = _root()
                segment = _segment(*root) if root is not None else None
                if segment is None:
                    segment = _found()
                _family.append(segment)
                _export()
    return _family[0]


def receive(handle: bytes) -> Lease:
    """Return the Lease that a handle stands for, in any process of this user.

    Raises HandleExpired when it was freed, or the family that owned it has ended.
    """
    uuid, number, generation, token, nonce, pid, fd = HANDLE.unpack(handle)
    segment = _segments.get(uuid) or _segment(pid, fd, uuid)
    if segment is None:
        root = _root()
        if root is not None and root[2] == uuid:
            segment = _segment(*root)
    if segment is None:
        raise HandleExpired(
            f"receiving shared array {number}.{generation} from process {pid}: neither that process nor the first of its family can be "
            f"reached (through /proc/{pid}/fd/{fd}). Both have ended, or are another user's. Keep one of them until it is received."
        )
    return segment._receive(number, generation, token, nonce)


def _root() -> tuple[int, int, int] | None:
    """Return pid, descriptor and uuid of the segment that the environment names, if it is still there."""
    try:
        pid, fd, uuid = os.environ.get(ROOT, "").split(":")
        found = int(pid), int(fd), int(uuid, 16)
    except ValueError:
        return None
    return found if found[2] in _segments or os.access(f"/proc/{found[0]}/fd/{found[1]}", os.R_OK | os.W_OK) else None


def _export() -> None:
    segment = _family[0]
    os.environ[ROOT] = f"{os.getpid()}:{segment.table_fd}:{segment.uuid:x}"


def _found() -> Segment:
    if not hasattr(os, "memfd_create"):
        raise SharedMemoryError("sharing arrays between processes: this system has no memfd_create (it takes Linux).")
    fds = tuple(_make_file(name) for name in ("table", "data", "lock", "embryo"))
    table, data = fds[0], fds[1]
    mapped, nbytes = _map_as_much(data, min(4 * psutil.virtual_memory().total, LARGEST_ARENA_NBYTES) // PAGE_NBYTES * PAGE_NBYTES)
    os.ftruncate(data, nbytes)
    os.ftruncate(table, TABLE_NBYTES)
    for fd in fds:
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_GROW | _F_SEAL_SHRINK | _F_SEAL_SEAL)
    words = mmap.mmap(table, TABLE_NBYTES)
    uuid = int.from_bytes(os.urandom(8), "little") | 1
    Table(words).found(uuid, nbytes, tuple(os.fstat(fd).st_ino for fd in fds))
    return _join(fds, mapped, words)  # type: ignore[arg-type]  # four of them


def _make_file(name: str) -> int:
    fd = os.memfd_create(f"shmarray-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(fd, 0o600)  # a memfd is 0777 when made
    return fd


def _segment(pid: int, fd: int, uuid: int) -> Segment | None:
    """Return the segment ``uuid``, of which process ``pid`` has the table open as ``fd``; None when it cannot be had there."""
    with _segments_mutex:
        if uuid in _segments:
            return _segments[uuid]
        opened: list[int] = []
        segment = None
        try:
            opened.append(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC))
            segment = _open_rest(pid, opened, uuid)
        except (FileNotFoundError, ProcessLookupError, PermissionError, NotADirectoryError):
            return None  # it has ended, or is somebody else's
        finally:
            if segment is None:
                for number in opened:
                    os.close(number)
        return segment


def _open_rest(pid: int, opened: list[int], uuid: int) -> Segment | None:
    if os.fstat(opened[0]).st_size != TABLE_NBYTES:
        return None  # the descriptor is another file by now
    words = mmap.mmap(opened[0], TABLE_NBYTES)
    table = Table(words)
    if table.words[0] != MAGIC or table.words[UUID] != uuid:
        return None
    row = next((row for row in table.rows() if table.identity(row) >> START_BITS == pid), None)
    if row is None:
        return None
    where = table.where(row)
    opened += [os.open(f"/proc/{pid}/fd/{where >> shift & 0xFFFF}", os.O_RDWR | os.O_CLOEXEC) for shift in (16, 32, 48)]
    if any(os.fstat(number).st_ino != table.words[INODES + at] for at, number in enumerate(opened)):
        return None
    try:
        data = mmap.mmap(opened[1], int(table.words[NBYTES]))
    except OSError as error:
        raise SharedMemoryError(
            f"mapping the shared memory of process {pid}, {format_bytes(table.words[NBYTES])} of addresses: {error.strerror}. Raise the "
            f"limit on address space (ulimit -v), or set it before the first process of the family starts."
        ) from error
    return _join(tuple(opened), data, words)  # type: ignore[arg-type]  # four of them


def _join(fds: tuple[int, int, int, int], data: mmap.mmap, words: mmap.mmap) -> Segment:
    _advise(data, "MADV_DONTDUMP")
    segment = Segment(fds, data, words)
    segment._locked(lambda: None)  # from now on others may find it here
    _segments[segment.uuid] = segment
    return segment


_forking: list[Segment] = []  # whose mutex the forking thread has; under `_segments_mutex`


def _before_fork() -> None:
    _segments_mutex.acquire()
    _forking.clear()
    for segment in _segments.values():
        segment._mutex.acquire()
        _forking.append(segment)
        segment._before_fork()


def _after_fork_in_parent() -> None:
    for segment in _forking:
        segment._after_fork_in_parent()
        segment._mutex.release()
        segment.settled()  # of what other threads dropped meanwhile
    _segments_mutex.release()


def _after_fork_in_child() -> None:
    global _segments_mutex
    _segments_mutex = threading.RLock()
    for segment in _segments.values():
        segment._after_fork_in_child()
    if _family:
        _export()  # its own children find it when their grandparent has ended


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
