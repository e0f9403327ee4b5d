"""A stored array's bytes: one extent that aliases and views share, its versions, its cells, the NumPy views lent out.

Promises: a write is seen by every alias; a NumPy array handed out before it keeps its values (the bytes move to a new extent
first); an expression built before it finds out (`changed_since`). What did not fit the memory budget lies in the pool's spill file
(`is_spilled`): its bytes are copied in and out, there are no views. Cells, the unit of locks and of torn marks, are boxes of the
chunk grid the array had when it was stored, and stay while views, rechunks and transposes come and go.
Never put here: expressions, plans, who may write (the plan's locks).
"""

from __future__ import annotations

import itertools
import math
import os
import select
import threading
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scheduler.limits import format_bytes
from scheduler.locks import process_locks
from scheduler.run import Pool
from scheduler.task import DRIVER, SPILL, Address, LockRequest
from shmarray.chunks import Chunks
from shmarray.errors import MemoryBudgetError, SpillError, TornChunkError
from shmarray.region import Box, c_strides, is_broadcast
from shmarray.tiles import slab_sizes

if TYPE_CHECKING:
    from shmarray.expr import Stored

__all__ = ["Layout", "Storage"]

NDArray = np.ndarray[Any, Any]

MOST_CELLS = 1 << 16
MOST_WRITES_KEPT = 64
MOST_LAYOUTS_KEPT = 64
LONGEST_FORK_WAIT_S = 5.0  # for a thread that moves an array
_identities = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Layout:
    """A strided array inside a storage."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    @staticmethod
    def of(node: Stored) -> Layout:
        """Return where in its storage a node of an expression lies."""
        return Layout(node.offset, node.shape, node.strides, node.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def bounds(self) -> tuple[int, int]:
        """Return the first byte and the one after the last."""
        low = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True) if s < 0)
        high = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True) if s > 0)
        return low, high + self.dtype.itemsize


class _Lease:
    """What keeps an extent alive for the NumPy arrays lent out over it."""

    __slots__ = ("__weakref__", "extent", "start")

    def __init__(self, extent: Any, start: int) -> None:
        self.extent = extent
        self.start = start

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.extent.nbytes,), "typestr": "|u1", "data": (self.start, True), "version": 3}


class _Outline:
    """Says where a layout would lie, had its storage begun at a round address. Nothing is there to be read."""

    __slots__ = ("__array_interface__",)

    def __init__(self, layout: Layout) -> None:
        start = (1 << 45) + layout.offset
        typestr = f"|V{layout.dtype.itemsize}"
        self.__array_interface__ = {
            "shape": layout.shape, "typestr": typestr, "data": (start, True), "strides": layout.strides, "version": 3
        }  # fmt: skip


def _outline(layout: Layout) -> NDArray:
    return np.asarray(_Outline(layout))


class _Child:
    """A process that was forked from this one, and the leases on all that it can read."""

    __slots__ = ("fd", "leases")

    def __init__(self, fd: int, leases: list[_Lease]) -> None:
        self.fd = fd  # the reading end of a pipe whose other end only the child, and its children, have
        self.leases = leases


class Storage:
    """The bytes of a stored array. C-ordered, ``shape`` and ``dtype`` as they were when it was made."""

    is_shared = False  # between processes, so that others write it
    is_role = False  # a place that storages take, of no values

    def __init__(self, pool: Pool, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: Chunks, *, may_spill: bool = True) -> None:
        self._stand_in(shape, dtype, chunks)
        self.pool = pool
        _forget_ended_children()  # for what was kept for them
        self.extent = pool.allocate(self.nbytes, may_spill=may_spill)
        pool.locks.forget_after(self, self.identity)
        _live.add(self)

    def _stand_in(self, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: Chunks) -> None:
        """Set what does not depend on where the bytes lie."""
        self.shape = shape
        self.dtype = dtype
        self.nbytes = max(1, math.prod(shape) * dtype.itemsize)
        self.identity = next(_identities)
        self.version = 0
        # (version, the user's line, what was written); appended to under the mutex, by who holds the write locks.
        self.writes: list[tuple[int, str, Layout]] = []
        self.forgotten = 0  # writes up to this version are no longer listed
        self.torn: dict[int, str] = {}  # cell -> what happened
        self.cells = _cell_starts(shape, chunks)
        self._touched: dict[Layout, list[tuple[int, int]]] = {}
        # Copies that `window` gave of the spill file, and who has them: (thread, where, values, extent).
        self._windows: list[tuple[int, Layout, NDArray, Any]] = []
        # Both under the mutex. While anybody writes nothing is leased, so that the bytes never move under a writer: a plan
        # on other cells, or an open `Array.lock`, would go on writing the old ones.
        self._leases: weakref.WeakSet[_Lease] = weakref.WeakSet()
        self._writers = 0
        self._mutex = threading.Lock()

    @property
    def layout(self) -> Layout:
        """All of it."""
        return Layout(0, self.shape, c_strides(self.shape, self.dtype.itemsize), self.dtype)

    def address(self, pool: Pool) -> tuple[Address, Any]:
        """Return where the bytes are for tasks of ``pool`` (its own arena, or the driver's mapping of another pool's), and what to
        hold so that they stay."""
        extent = self.extent
        if pool is self.pool:
            return extent.address, extent
        if self.is_spilled:
            raise SpillError(
                f"an array of shape {self.shape} lies in the spill file of one pool, another array of the same computation in that of "
                f"another, and no worker reaches both. Store one of them anew where the other is: from x.compute(), or part by part."
            )
        return Address(DRIVER, self.pool.arena.start + extent.offset), extent

    @property
    def is_spilled(self) -> bool:
        """Whether the bytes lie in the spill file."""
        return self.extent.address.segment == SPILL

    def require_readable(self) -> None:
        """Raise SpillError where this process cannot read what is spilled: in a forked child, or when the pool was closed."""
        if self.is_spilled and self.pool.memory.spill is not None:
            self.pool.memory.spill.require_usable()

    def array(self, layout: Layout) -> NDArray:
        """Return the live, writable bytes in this process. Not for users: nothing guards it. Not for what is spilled: see `read`."""
        assert not self.is_spilled, self.shape
        return np.ndarray(layout.shape, layout.dtype, self.pool.arena.bytes, self.extent.offset + layout.offset, layout.strides)

    def read(self, layout: Layout) -> NDArray:
        """Return the bytes as they are now: the live ones, or a copy of what is spilled. Nothing guards it.

        Raises MemoryBudgetError when that copy would exceed the memory limit.
        """
        if not self.is_spilled:
            return self.array(layout)
        self.require_readable()
        limit = self.pool.budget.limit_nbytes
        if layout.nbytes > limit:
            raise MemoryBudgetError(
                f"an array of shape {layout.shape} and {format_bytes(layout.nbytes)} lies in the spill file; the memory limit of "
                f"{format_bytes(limit)} does not hold a copy of it. Take a part of it (x[a:b]), reduce it, write it chunk by chunk "
                f"(x.lock(chunk, 'r'), x.map_blocks), give compute() an out=, or raise memory_limit."
            )
        values: NDArray = self._remote(layout).read()
        return values

    def fill(self, layout: Layout, values: NDArray) -> None:
        """Copy values of its shape and dtype over ``layout``. Nothing guards it."""
        if self.is_spilled:
            self._remote(layout).write(values)
        else:
            np.copyto(self.array(layout), values)

    def _remote(self, layout: Layout, extent: Any = None) -> Any:
        return self.pool.memory.window((extent or self.extent).address, layout.offset, layout.shape, layout.strides, layout.dtype)

    def window(self, layout: Layout) -> tuple[NDArray, Any]:
        """Return the live bytes, and what to hold so that they stay: a write of other cells may move the array meanwhile.

        Of what is spilled a copy, to be given to `put_back`, with what was held, if it was written.
        """
        with self._mutex:
            if not self.is_spilled:
                return self.array(layout), self.extent
            if is_broadcast(layout.shape, layout.strides):
                raise ValueError(f"shape {layout.shape} is a broadcast, whose elements share memory, of an array in the spill file")
            self.save_windows()
            values = np.array(self.read(layout))
            self._windows.append((threading.get_ident(), layout, values, self.extent))
            return values, self.extent

    def put_back(self, layout: Layout, values: NDArray, held: Any) -> None:
        """Write what `window` gave back to where it is from, if that is spilled. A write that fails leaves its cells torn."""
        if held.address.segment != SPILL:
            return
        self._windows = [window for window in self._windows if window[2] is not values]
        try:
            if values.flags.writeable:
                self._remote(layout, held).write(values)
                self._load_windows()
        except BaseException as error:
            self.tear(dict.fromkeys(self.cells_of(layout), f"Writing a locked part back to the spill file failed ({error})."))
            raise

    def save_windows(self) -> None:
        """Write what this thread has open of the spill file: who holds a lock may use the array, and sees what is there."""
        for thread, layout, values, held in list(self._windows):
            if thread == threading.get_ident() and values.flags.writeable:
                self._remote(layout, held).write(values)

    def _load_windows(self) -> None:
        for thread, layout, values, held in list(self._windows):
            if thread == threading.get_ident() and values.flags.writeable:
                np.copyto(values, self._remote(layout, held).read())

    def lend(self, layout: Layout) -> NDArray:
        """Return a read-only array over the bytes, whose values stay what they are now: a later write moves the bytes first.

        While somebody writes, be it this thread under its own lock, it is a copy, of what is there when ``layout`` is free; so it is
        of what is spilled.
        """
        self.check_whole(layout)
        self.save_windows()
        with self._mutex:
            if not self._writers and not self.is_spilled:
                lease = self._lease()
                return np.ndarray(layout.shape, layout.dtype, np.asarray(lease), layout.offset, layout.strides)
        with self.hold(layout, "r"):
            self.check_whole(layout)
            with self._mutex:
                values = self.read(layout) if self.is_spilled else self.array(layout).copy()
        values.flags.writeable = False
        return values

    def _lease(self) -> _Lease:
        """Return what keeps the bytes as they are while it lives. Under the mutex, while nobody writes."""
        lease = next(iter(self._leases), None)
        if lease is None:
            lease = _Lease(self.extent, self.pool.arena.start + self.extent.offset)
            self._leases.add(lease)
        return lease

    def keep_for_child(self) -> _Lease | None:
        """Return a lease for a process that is about to be forked; None where the bytes are being written, or lie in a file."""
        if self.is_spilled or not self._mutex.acquire(timeout=LONGEST_FORK_WAIT_S):
            return None
        try:
            return None if self._writers else self._lease()
        finally:
            self._mutex.release()

    def start_anew_in_child(self, *, is_kept: bool) -> None:
        """In a forked child: the mutex may be held by a thread that is not here; what is not kept may change under its eyes."""
        self._mutex = threading.Lock()
        self._writers = 0
        if not is_kept and not self.is_spilled:
            why = f"Process {self.pool.pid} was writing it, or had no descriptor left, when this one, {os.getpid()}, was forked from it."
            self.tear(dict.fromkeys(range(math.prod(self.counts)), why))

    def begin_write(self, *, stays: bool = False) -> None:
        """Move the bytes to a new extent when NumPy arrays over them, or forked processes, can see them.

        The caller holds the write locks until `end_write`. ``stays``: in memory, as the kernels of a plan that goes on expect;
        MemoryBudgetError where there is too little.
        """
        _forget_ended_children()
        self.save_windows()
        with self._mutex:
            if len(self._leases):
                old, keep = self.array(self.layout), self.extent
                self.extent = self.pool.allocate(self.nbytes, may_spill=not stays)
                try:
                    self.fill(self.layout, old)
                except BaseException:
                    self.extent = keep
                    raise
                self._leases = weakref.WeakSet()
                del keep
            self._writers += 1

    def end_write(self, layout: Layout, line: str | None) -> None:
        """Note that ``layout`` was written at the user's line; None: it was not, after all."""
        self._load_windows()
        with self._mutex:
            self._writers -= 1
            if line is not None:
                self._note(layout, line)

    def _note(self, layout: Layout, line: str) -> None:
        self.version += 1
        self.writes.append((self.version, line, layout))
        if len(self.writes) > MOST_WRITES_KEPT:
            self.forgotten = self.writes.pop(0)[0]

    def exchange(self, other: Storage, line: str) -> bool:
        """Have each the bytes of the other, with the views lent out over them; False, and nothing done, where that cannot be.

        It is a write of both, at the user's line. They have one shape and dtype; the caller holds this one's write locks, and nobody
        who still cares for its values knows of the other.
        """
        if self.pool is not other.pool or self.is_shared or other.is_shared:
            return False
        if self._windows or other._windows or self.torn or other.torn:
            return False
        first, second = sorted((self, other), key=lambda storage: storage.identity)
        with first._mutex, second._mutex:
            if first._writers or second._writers:
                return False
            self.extent, other.extent = other.extent, self.extent
            self._leases, other._leases = other._leases, self._leases
            self._note(self.layout, line)
            other._note(other.layout, line)
            return True

    def changed_since(self, version: int, layout: Layout) -> str | None:
        """Return the line of a write since ``version`` that may have touched ``layout``, or None."""
        if self.version == version:
            return None
        for at, line, written in reversed(self.writes):
            if at <= version:
                return None
            if self.overlap(written, layout):
                return line or "an earlier line"
        return "an earlier line" if self.forgotten > version else None

    def overlap(self, a: Layout, b: Layout) -> bool:
        """Return whether two layouts have bytes in common (or may have, where that is too hard to tell)."""
        if not math.prod(a.shape) or not math.prod(b.shape):
            return False
        try:
            return bool(np.shares_memory(_outline(a), _outline(b), max_work=10_000))  # type: ignore[arg-type]  # the stubs know two values only
        except np.exceptions.TooHardError:
            return True

    def cells_of(self, layout: Layout) -> list[int]:
        """Return the numbers of the cells that ``layout`` touches, ascending."""
        return [cell for start, stop in self.touched_cells(layout) for cell in range(start, stop)]

    def check_whole(self, layout: Layout) -> None:
        """Raise TornChunkError when ``layout`` touches a cell that a dead worker left half written."""
        if not self.torn:
            return
        for cell in self.cells_of(layout):
            if cell in self.torn:
                raise TornChunkError(
                    f"{self.torn[cell]} Chunk {self.cell_index(cell)} of the array of shape {self.shape} holds neither its old nor "
                    f"its new values. Call resume() of the PartialUpdateError that was raised then, overwrite the chunk as a whole "
                    f"(x[...] = ...), or take it as it is with x.lock(..., accept_torn=True)."
                )

    def tear(self, cells: Mapping[int, str]) -> None:
        """Mark cells, by number, as half written, and say why."""
        self.torn.update(cells)

    def mend(self, layout: Layout) -> None:
        """Forget torn marks of the cells that a whole overwrite of ``layout`` has filled."""
        if self.torn:
            filled = self.base_box(layout)
            counts = math.prod(s.stop - s.start for s in filled)
            if counts != math.prod(layout.shape):
                return  # a strided or reshaped write: it may have skipped part of a cell
            for cell in list(self.torn):
                box = self.cell_box(cell)
                if all(f.start <= b.start and b.stop <= f.stop for f, b in zip(filled, box, strict=True)):
                    del self.torn[cell]

    def requests(self, layout: Layout, mode: str) -> list[LockRequest]:
        """Return what to lock to read ("r") or write ("w") ``layout``."""
        return [LockRequest(self.identity, start, stop, mode) for start, stop in self.touched_cells(layout)]

    def hold(self, layout: Layout, mode: str, timeout: float | None = None) -> Any:
        """Return a lock of ``layout``, to read or to write, that is held already; a context manager."""
        return process_locks().acquire(self.requests(layout, mode), timeout=timeout)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many cells along each axis."""
        return tuple(len(starts) - 1 for starts in self.cells)

    def cell_index(self, cell: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(cell, self.counts)) if self.counts else ()

    def cell_box(self, cell: int) -> Box:
        return tuple(slice(starts[i], starts[i + 1]) for starts, i in zip(self.cells, self.cell_index(cell), strict=True))

    def base_box(self, layout: Layout) -> Box:
        """Return a box of the storage's own index space that holds every element of ``layout``; as small as is easy to tell."""
        if not self.shape:
            return ()
        low, high = layout.bounds()
        itemsize = max(1, self.dtype.itemsize)
        first = np.unravel_index(min(low // itemsize, self.nbytes // itemsize - 1), self.shape)
        own = c_strides(self.shape, itemsize)
        span = [0] * len(self.shape)
        for n, stride in zip(layout.shape, layout.strides, strict=True):
            step = abs(stride)
            if n <= 1 or step == 0:
                continue
            axis = next((a for a, s in enumerate(own) if self.shape[a] > 1 and s <= step), None)
            if axis is None or step % own[axis]:
                break
            span[axis] += step // own[axis] * (n - 1)
        else:
            stops = [int(f) + s + 1 for f, s in zip(first, span, strict=True)]
            if all(stop <= n for stop, n in zip(stops, self.shape, strict=True)):
                return tuple(slice(int(f), stop) for f, stop in zip(first, stops, strict=True))
        last = np.unravel_index(min(-(-high // itemsize) - 1, self.nbytes // itemsize - 1), self.shape)
        box = [slice(0, n) for n in self.shape]
        for axis, (f, t) in enumerate(zip(first, last, strict=True)):  # equal leading indices, then a range, then all
            box[axis] = slice(int(f), int(t) + 1)
            if f != t:
                break
        return tuple(box)

    def touched_cells(self, layout: Layout) -> list[tuple[int, int]]:
        """Return the ranges of cell numbers that ``layout`` touches, ascending."""
        found = self._touched.get(layout)  # asked for several times in each run, and by every time step again
        if found is None:
            if len(self._touched) >= MOST_LAYOUTS_KEPT:
                self._touched.clear()
            found = self._touched[layout] = self._find_cells(layout)
        return found

    def _find_cells(self, layout: Layout) -> list[tuple[int, int]]:
        if not math.prod(layout.shape):
            return []
        counts = self.counts
        if math.prod(counts) == 1:  # a small array: of a time step that makes a new one this would be a fifth of the time
            return [(0, 1)]
        box = self.base_box(layout)
        ranges = [
            (bisect_right(starts, piece.start) - 1, bisect_left(starts, piece.stop)) for starts, piece in zip(self.cells, box, strict=True)
        ]
        # Trailing axes that are taken whole, and the axis before them, form one run of numbers.
        inner = len(ranges)
        run = 1
        while inner and ranges[inner - 1] == (0, counts[inner - 1]):
            inner -= 1
            run *= counts[inner]
        if inner == 0:
            return [(0, run)]
        start, stop = ranges[inner - 1]
        result = []
        for outer in itertools.product(*(range(a, b) for a, b in ranges[: inner - 1])):
            base = 0
            for index, count in zip(outer, counts[: inner - 1], strict=True):
                base = base * count + index
            base *= counts[inner - 1]
            result.append(((base + start) * run, (base + stop) * run))
        return result


def _cell_starts(shape: tuple[int, ...], chunks: Chunks) -> list[list[int]]:
    if math.prod(len(c) for c in chunks) > MOST_CELLS:
        sizes = slab_sizes(shape, max(1, -(-math.prod(shape) // (MOST_CELLS // 2))))
        return [[*range(0, n, s), n] if n else [0, 0] for n, s in zip(shape, sizes, strict=True)]
    return [[0, *itertools.accumulate(sizes)] for sizes in chunks]


_live: weakref.WeakSet[Storage] = weakref.WeakSet()
_children: list[_Child] = []  # that may still run; any thread appends, and takes out those that have ended
_forking = threading.local()  # between the two halves of a fork: the ends of the pipe, and by storage what keeps it for the child


def _forget_ended_children() -> None:
    for child in list(_children):
        poll = select.poll()
        poll.register(child.fd, 0)  # the hang-up is told in any case
        if poll.poll(0):
            try:
                _children.remove(child)
            except ValueError:
                continue  # another thread was faster
            os.close(child.fd)


def _before_fork() -> None:
    """Have everything stay as it is for a process that is about to be forked, as private memory would.

    Its mapping of the arena is private, but that keeps only what it writes itself: pages that it has not touched are the parent's,
    with what is written there later. So a write in this process moves the array first, while the child, or a child of it, lives.
    """
    _forget_ended_children()
    try:
        ends = os.pipe2(os.O_CLOEXEC)
    except OSError:
        return  # no descriptor left: the child is told that nothing was kept
    found: dict[int, _Lease | None] = {}
    for storage in list(_live):
        # What this process has from its own parent is private already, and of the child from now on.
        lease = storage.keep_for_child() if storage.pool.pid == os.getpid() else None
        if lease is not None or storage.pool.pid != os.getpid():
            found[storage.identity] = lease
    _forking.now = *ends, found


def _after_fork_in_parent() -> None:
    if (now := _forking.__dict__.pop("now", None)) is not None:
        reader, writer, leases = now
        os.close(writer)
        _children.append(_Child(reader, [lease for lease in leases.values() if lease is not None]))


def _after_fork_in_child() -> None:
    kept: dict[int, _Lease | None] = {}
    if (now := _forking.__dict__.pop("now", None)) is not None:
        reader, _writer, kept = now  # the writer stays open until this process ends
        os.close(reader)
    for child in _children:
        os.close(child.fd)
    _children.clear()
    for storage in list(_live):
        storage.start_anew_in_child(is_kept=storage.identity in kept)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
