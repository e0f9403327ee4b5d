"""Which bytes of the arena are whose: an allocator whose bookkeeping lies in the driver's private heap, out of workers' reach.

Promises: live extents never overlap; memory that was touched before is used first; the arena stays bounded under any sequence
of allocate and free; Ctrl-C at any instant, a garbage collection in the middle of `allocate`, and a fork leave the books right.
Relies on an arena with ``nbytes`` and ``punch(offset, nbytes)``, nothing more. Never put here: budgets (`limits`), locks
(`locks`), who still uses what, or anything that reads the bytes: an extent lives as long as its object, so whoever has bytes
written to holds that until the writing has ended.

    0                                                                   high water                        arena.nbytes
    +-------+------+------+----------------------+-------+--------------+---------------------------------------+
    | live  | warm | cold | slab: live|warm|live | live  | warm         | cold, never touched                   |
    +-------+------+------+----------------------+-------+--------------+---------------------------------------+
            '---- gap ----'                              '------------------ gap -------------------------------'

*Warm*: free and touched before, so its pages exist (writing cold pages costs ten times as much). *Cold*: free, without pages.
A *gap* is free from end to end, warm or cold. Extents of 1 MiB and more are page-aligned; smaller ones share *slabs*.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import weakref
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from scheduler.errors import SchedulerError, SharedMemoryError, SpillError
from scheduler.limits import format_bytes
from scheduler.task import ARENA, Address

__all__ = ["Extent", "ExtentStatistics", "Extents"]

PAGE_NBYTES = mmap.PAGESIZE
LINE_NBYTES = 64  # a cache line: two extents never share one
LARGE_NBYTES = 1 << 20  # from here on page-aligned, outside slabs
SLAB_NBYTES = 4 << 20
STEPS_PER_DOUBLING = 16  # size classes: at most 1/16 is wasted (below 1 KiB the cache line decides)
FEW = 64  # gaps: looking at each is cheaper than walking through the addresses

_identities = itertools.count(1)  # next() is atomic; numbers are never used again, so a stale one can name nothing else
_live_extents: weakref.WeakSet[Extents] = weakref.WeakSet()


class _ArenaLike(Protocol):
    @property
    def nbytes(self) -> int: ...

    def punch(self, offset: int, nbytes: int) -> None: ...


class Extent:
    """A contiguous range of the arena, its holder's until this object is collected, or freed.

    ``nbytes`` is what was asked for; ``identity`` is unique for ever in this process, unlike ``offset``. ``was_cold``: nobody
    had touched the bytes when they were given, so that all of them were zero.
    """

    __slots__ = ("__weakref__", "extents", "identity", "nbytes", "offset", "was_cold")

    def __init__(self, extents: Extents, identity: int, offset: int, nbytes: int, was_cold: bool) -> None:
        self.was_cold = was_cold
        self.identity = identity
        self.extents = extents
        self.offset = offset
        self.nbytes = nbytes

    @property
    def address(self) -> Address:
        """Where it starts, for tasks of the pool whose extent it is."""
        return Address(self.extents.segment, self.offset)

    def free(self) -> None:
        """Give the bytes back; they may change from now on. Calling it again does nothing."""
        self.extents._dead.append(self.identity)

    def __repr__(self) -> str:
        return f"Extent({self.identity}: {self.nbytes} bytes at {self.offset})"


class _Tombstone(weakref.ref[Extent]):
    """What is left of an extent: its ``identity``.

    A weak reference whose callback is the C function `deque.append`, and not a ``__del__``: the garbage collector runs it
    wherever it likes, also in the middle of `allocate` in this very thread, so it must take no lock; and Ctrl-C that strikes as
    a function written in Python begins would be swallowed there, and the extent lost.
    """

    __slots__ = ("identity",)
    identity: int


@dataclass(frozen=True, slots=True)
class ExtentStatistics:
    """A snapshot of the allocator, in bytes as rounded to size classes.

    ``peak_nbytes``: the most that was live at once. ``high_water_nbytes``: addresses above were never used.
    """

    live_nbytes: int
    live_extents: int
    warm_nbytes: int
    peak_nbytes: int
    high_water_nbytes: int


class _Ranges:
    """Disjoint ranges [start, stop) that never touch each other, in order of address and of size.

    Plain sorted lists: inserting moves memory, which stays cheaper than a tree in Python up to some 100,000 ranges.
    """

    __slots__ = ("nbytes", "sizes", "starts", "stops")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.stops: list[int] = []  # stops[i] belongs to starts[i]
        self.sizes: list[tuple[int, int]] = []  # (nbytes, start), sorted
        self.nbytes = 0

    def add(self, start: int, stop: int) -> tuple[int, int]:
        """Add a range that overlaps none, and return the range of which it is now a part."""
        starts, stops = self.starts, self.stops
        at = bisect_left(starts, start)
        if at < len(starts) and starts[at] == stop:
            stop = stops[at]
            self._drop(at)
        if at and stops[at - 1] == start:
            at -= 1
            start = starts[at]
            self._drop(at)
        self._insert(at, start, stop)
        return start, stop

    def remove(self, start: int, stop: int) -> None:
        """Remove [start, stop), which lies in one of the ranges."""
        at = bisect_right(self.starts, start) - 1
        low, high = self.starts[at], self.stops[at]
        self._drop(at)
        if stop < high:
            self._insert(at, stop, high)
        if low < start:
            self._insert(at, low, start)

    def clip(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Remove whatever lies in [start, stop), and return it."""
        pieces = []
        at = bisect_right(self.stops, start)
        while at < len(self.starts) and self.starts[at] < stop:
            pieces.append((max(self.starts[at], start), min(self.stops[at], stop)))
            at += 1
        for piece in pieces:
            self.remove(*piece)
        return pieces

    def _drop(self, at: int) -> None:
        start = self.starts[at]
        nbytes = self.stops[at] - start
        del self.starts[at], self.stops[at], self.sizes[bisect_left(self.sizes, (nbytes, start))]
        self.nbytes -= nbytes

    def _insert(self, at: int, start: int, stop: int) -> None:
        self.starts.insert(at, start)
        self.stops.insert(at, stop)
        insort(self.sizes, (stop - start, start))
        self.nbytes += stop - start

    def check(self) -> None:
        assert len(self.starts) == len(self.stops)
        assert all(start < stop for start, stop in zip(self.starts, self.stops, strict=True)), "an empty range"
        assert all(stop < start for stop, start in zip(self.stops, self.starts[1:], strict=False)), "neighbours not coalesced"
        assert self.sizes == sorted((stop - start, start) for start, stop in zip(self.starts, self.stops, strict=True))
        assert self.nbytes == sum(nbytes for nbytes, _ in self.sizes)


class _Space:
    """Free memory of one kind: its gaps, and which parts of them are warm."""

    __slots__ = ("gaps", "warm")

    def __init__(self) -> None:
        self.gaps = _Ranges()
        self.warm = _Ranges()

    def find(self, nbytes: int) -> int | None:
        """Return where ``nbytes`` go: the smallest warm range that holds them, else the lowest gap, else None."""
        sizes = self.warm.sizes
        at = bisect_left(sizes, (nbytes, 0))
        if at < len(sizes):
            return sizes[at][1]
        sizes = self.gaps.sizes
        at = bisect_left(sizes, (nbytes, 0))
        if at == len(sizes):
            return None
        if len(sizes) - at <= FEW:
            return min(start for _, start in sizes[at:])
        # Many gaps fit, so one of the lowest does.
        gaps = zip(self.gaps.starts, self.gaps.stops, strict=True)
        return next(start for start, stop in gaps if stop - start >= nbytes)

    def take(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Make a part of a gap not free, and return which pieces of it are warm."""
        self.gaps.remove(start, stop)
        return self.warm.clip(start, stop)

    def give(self, start: int, stop: int, warm: Iterable[tuple[int, int]]) -> tuple[int, int]:
        """Make a range free, with these warm pieces, and return the gap of which it is now a part."""
        gap = self.gaps.add(start, stop)
        for piece in warm:
            self.warm.add(*piece)
        return gap

    def check(self) -> None:
        self.gaps.check()
        self.warm.check()
        for start, stop in zip(self.warm.starts, self.warm.stops, strict=True):
            at = bisect_right(self.gaps.starts, start) - 1
            assert at >= 0 and stop <= self.gaps.stops[at], f"warm range [{start}, {stop}) is not free"


class Extents:
    """The allocator of one arena, for any thread of the driver.

    The truth is in two dictionaries (``_taken``, ``_slabs``), each changed by one atomic step; all else can be
    derived from them. So an exception in the middle of a change (Ctrl-C arrives between any two instructions) costs no
    more than building the indexes again.
    """

    def __init__(self, arena: _ArenaLike, *, warm_limit_nbytes: int, segment: int = ARENA) -> None:
        """``warm_limit_nbytes``: more free memory than this does not stay warm but goes back to the system."""
        self.arena = arena
        self.segment = segment
        self.warm_limit_nbytes = warm_limit_nbytes
        # Every field below is written under the lock, but for _dead. The lock is re-entrant, for the garbage collector may run
        # the finalizer of anything in the middle of a change, in the thread that makes it, and that finalizer may come back
        # here: with a plain lock it would wait for itself. `_changing` tells such a call from others: it may read and append,
        # and must not change the indexes that the frame below it is changing.
        self._lock = threading.RLock()
        self._changing = False
        self._damaged = False  # a change was cut short: the indexes must be built again
        self._is_child = False  # of a fork, which must never punch
        self._punches_unasked = True
        self._dead: deque[int | _Tombstone] = deque()  # freed and collected extents; any thread, any time, without the lock
        self._taken: dict[int, tuple[int, int]] = {}  # identity -> (offset, nbytes) of what is live
        self._tombstones: dict[int, _Tombstone] = {}  # kept here, for a weak reference that is gone calls nobody
        self._slabs: dict[int, int] = {}  # start -> nbytes
        self._high_water = 0
        self._peak_nbytes = 0
        self._rebuild()
        _live_extents.add(self)

    def allocate(self, nbytes: int) -> Extent:
        """Return an extent of at least ``nbytes`` (possibly 0), with whatever bytes the last holder left in it.

        Raises SharedMemoryError when no gap is large enough.
        """
        if nbytes < 0:
            raise ValueError(f"allocating {nbytes} bytes of shared memory: the number must not be negative.")
        needed = _size_class(nbytes)
        with self._lock:
            if self._changing:
                raise SchedulerError(
                    f"allocating {nbytes} bytes of shared memory from a finalizer, which the garbage collector ran in the middle "
                    f"of another allocation: a __del__ method or weakref callback must not compute; do it from a plain call."
                )
            self._changing = True  # nothing may stand between this and try: Ctrl-C there would leave it set for ever
            try:
                freed = self._bury()
                offset, was_cold = self._take(needed)
                if offset is not None:
                    # Written down last: cut short before, the bytes are free; after, it is freed like any other.
                    identity = next(_identities)
                    extent = Extent(self, identity, offset, nbytes, was_cold)
                    tombstone = self._tombstones[identity] = _Tombstone(extent, self._dead.append)
                    tombstone.identity = identity
                    self._taken[identity] = (offset, needed)
                    self._live_nbytes += needed
                    self._peak_nbytes = max(self._peak_nbytes, self._live_nbytes)
                if freed:
                    self._keep_warm_limit()  # only now: what was just freed may just have been used again
            except BaseException:
                self._damaged = True
                raise
            finally:
                self._changing = False
            if offset is not None:
                return extent
            free, largest = self._large.gaps.nbytes + self._small.gaps.nbytes, self._largest_gap(needed)
        raise SharedMemoryError(
            f"allocating an extent of shared memory needs {format_bytes(needed)}; {format_bytes(free)} free of "
            f"{format_bytes(self.arena.nbytes)}, largest gap {format_bytes(largest)}. Drop arrays that are no longer used (live: "
            f"{len(self._taken)} extents), use smaller chunks, or a pool with a larger arena."
        )

    def trim(self, keep_nbytes: int = 0) -> int:
        """Give warm free memory beyond ``keep_nbytes`` back to the system, largest ranges first, and return how much that was.

        Costs some 0.2 ms per MiB. Pages that live extents share with free ones stay.
        """
        with self._lock:
            if self._changing:
                return 0  # from a finalizer in the middle of a change: whoever wants memory back can ask again
            self._changing = True
            try:
                self._bury()
                self._return_slabs(spare_nbytes=0)
                return self._punch(keep_nbytes)
            except BaseException:
                self._damaged = True
                raise
            finally:
                self._changing = False

    def drain(self) -> None:
        """Make the bytes of extents that were freed or collected available again."""
        with self._lock:
            if self._changing:
                return
            self._changing = True
            try:
                if self._bury():
                    self._keep_warm_limit()
            except BaseException:
                self._damaged = True
                raise
            finally:
                self._changing = False

    def statistics(self) -> ExtentStatistics:
        """Return a snapshot, with all that was freed counted as free."""
        with self._lock:
            self.drain()
            before, self._changing = self._changing, True  # a finalizer must not change what is being read
            try:
                return ExtentStatistics(
                    live_nbytes=self._live_nbytes,
                    live_extents=len(self._taken),
                    warm_nbytes=self._large.warm.nbytes + self._small.warm.nbytes,
                    peak_nbytes=self._peak_nbytes,
                    high_water_nbytes=self._high_water,
                )
            finally:
                self._changing = before

    def taken_nbytes(self, identities: Iterable[int]) -> int:
        """Return how much of ``live_nbytes`` these extents are: as rounded to size classes, and 0 for those that are gone."""
        with self._lock:
            return sum(self._taken[identity][1] for identity in identities if identity in self._taken)

    def check(self) -> None:
        """Assert that the books are right: everything below the high water is taken or free, once, and all indexes agree."""
        with self._lock:
            assert not self._changing, "check() from a finalizer"
            self._changing = True
            try:
                if self._damaged:
                    self._rebuild()
                self._check()
            finally:
                self._changing = False

    def _check(self) -> None:
        self._large.check()
        self._small.check()
        small = [taken for taken in self._taken.values() if taken[1] < LARGE_NBYTES]
        large = [taken for taken in self._taken.values() if taken[1] >= LARGE_NBYTES]
        assert all(offset % LINE_NBYTES == 0 and nbytes % LINE_NBYTES == 0 for offset, nbytes in small)
        assert all(offset % PAGE_NBYTES == 0 and nbytes % PAGE_NBYTES == 0 for offset, nbytes in large)
        end = _page_floor(self.arena.nbytes)
        _check_tiles([(0, end)], [*large, *self._slabs.items()], self._large.gaps)
        slabs = _Ranges()
        for start, nbytes in self._slabs.items():
            slabs.add(start, start + nbytes)
        _check_tiles(zip(slabs.starts, slabs.stops, strict=True), small, self._small.gaps)
        assert self._slab_starts == sorted(self._slabs)
        for ranges in (self._large.warm, slabs):
            assert not ranges.stops or ranges.stops[-1] <= self._high_water, "in use above the high water"
        assert all(offset + nbytes <= self._high_water for offset, nbytes in large), "live above the high water"
        assert self._live_nbytes == sum(nbytes for _, nbytes in self._taken.values())
        assert self._live_nbytes <= self._peak_nbytes
        assert self._tombstones.keys() == self._taken.keys()

    def _bury(self) -> bool:
        """Free what is dead, and return whether there was anything. Caller has set `_changing`, as for all that follow."""
        if self._damaged:
            self._rebuild()
        freed = False
        dead = self._dead
        while dead:
            # Taken off the queue last: when an exception comes between, doing it again does no harm.
            corpse = dead[0]
            self._free(corpse if isinstance(corpse, int) else corpse.identity)
            dead.popleft()
            freed = True
        return freed

    def _free(self, identity: int) -> None:
        if identity not in self._taken:
            return  # freed by hand more than once
        offset, nbytes = self._taken.pop(identity)  # first: cut short from here on, `_rebuild` finds the bytes free
        self._tombstones.pop(identity, None)
        self._live_nbytes -= nbytes
        if nbytes >= LARGE_NBYTES:
            self._large.give(offset, offset + nbytes, ((offset, offset + nbytes),))
            return
        start, stop = self._small.give(offset, offset + nbytes, ((offset, offset + nbytes),))
        if stop - start >= SLAB_NBYTES:
            # One slab's worth of free memory stays, else a lone small extent made and freed makes and frees a slab each time.
            self._return_slabs(spare_nbytes=SLAB_NBYTES, within=(start, stop))

    def _take(self, nbytes: int) -> tuple[int | None, bool]:
        """Take ``nbytes`` out of free memory, and return where, and whether they were cold; None when no gap holds them."""
        space = self._large if nbytes >= LARGE_NBYTES else self._small
        offset = space.find(nbytes)
        if offset is None:
            if space is self._small:
                if not self._make_slab(SLAB_NBYTES) and not self._make_slab(_page_ceil(nbytes)):
                    return None, False
            else:
                self._return_slabs(spare_nbytes=0)
            offset = space.find(nbytes)
            if offset is None:
                return None, False
        warm = space.take(offset, offset + nbytes)
        if space is self._large:
            self._high_water = max(self._high_water, offset + nbytes)
        return offset, not warm

    def _make_slab(self, nbytes: int) -> bool:
        start = self._large.find(nbytes)
        if start is None:
            return False
        warm = self._large.take(start, start + nbytes)
        self._high_water = max(self._high_water, start + nbytes)
        self._slabs[start] = nbytes
        insort(self._slab_starts, start)
        self._small.give(start, start + nbytes, warm)
        return True

    def _return_slabs(self, spare_nbytes: int, within: tuple[int, int] | None = None) -> None:
        """Make slabs without a live extent free for large ones, as long as ``spare_nbytes`` stay free for small ones."""
        small = self._small
        for low, high in [within] if within else list(zip(small.gaps.starts, small.gaps.stops, strict=True)):
            at = bisect_left(self._slab_starts, low)
            while at < len(self._slab_starts):
                start = self._slab_starts[at]
                stop = start + self._slabs[start]
                if stop > high or small.gaps.nbytes - (stop - start) < spare_nbytes:
                    break
                # A page is warm as soon as a byte of it was touched; pages of neighbours then meet.
                pieces, last = [], start
                for piece in small.take(start, stop):
                    first, last = max(_page_floor(piece[0]), last), _page_ceil(piece[1])
                    if first < last:
                        pieces.append((first, last))
                del self._slabs[start], self._slab_starts[at]
                self._large.give(start, stop, pieces)

    def _keep_warm_limit(self) -> None:
        if self._punches_unasked and self._large.warm.nbytes + self._small.warm.nbytes > self.warm_limit_nbytes:
            try:
                # An eighth more than needed: a system call now and then, not one for every extent freed from here on.
                self._punch(self.warm_limit_nbytes - self.warm_limit_nbytes // 8)
            except (SharedMemoryError, SpillError):
                self._punches_unasked = False  # this system cannot; nobody asked, so whoever calls `trim` is told

    def _punch(self, keep_nbytes: int) -> int:
        """Make warm memory beyond ``keep_nbytes`` cold; the highest pages of a range go first, for the lowest are used first."""
        if self._is_child:
            return 0
        excess = self._large.warm.nbytes + self._small.warm.nbytes - keep_nbytes
        victims = []
        large, small = self._large.warm.sizes, self._small.warm.sizes  # both ascending: the largest are at their ends
        i, j = len(large) - 1, len(small) - 1
        while excess > 0 and (i >= 0 or j >= 0):
            if j < 0 or (i >= 0 and large[i] >= small[j]):
                space, (nbytes, start), i = self._large, large[i], i - 1
            else:
                space, (nbytes, start), j = self._small, small[j], j - 1
            if nbytes < PAGE_NBYTES:
                break
            high = _page_floor(start + nbytes)
            low = max(_page_ceil(start), high - _page_ceil(excess))
            if low < high:
                victims.append((low, high, space))
                excess -= high - low
        given = 0
        for low, high, space in victims:
            self.arena.punch(low, high - low)
            space.warm.remove(low, high)  # after: what is called warm and is not costs time only
            given += high - low
        return given

    def _largest_gap(self, needed: int) -> int:
        spaces = (self._large,) if needed >= LARGE_NBYTES else (self._large, self._small)
        return max((space.gaps.sizes[-1][0] for space in spaces if space.gaps.sizes), default=0)

    def _rebuild(self) -> None:
        """Derive all indexes from what is taken. Free memory below the high water counts as warm: that errs on the safe side."""
        self._large, self._small = _Space(), _Space()
        large = sorted([*(t for t in self._taken.values() if t[1] >= LARGE_NBYTES), *self._slabs.items()])
        small = sorted(t for t in self._taken.values() if t[1] < LARGE_NBYTES)
        self._slab_starts = sorted(self._slabs)
        self._high_water = max([self._high_water, *(start + nbytes for start, nbytes in large)])
        at = 0
        for start, nbytes in [*large, (_page_floor(self.arena.nbytes), 0)]:
            if at < start:
                self._large.give(at, start, [(at, min(start, self._high_water))] if at < self._high_water else [])
            at = start + nbytes
        for start in self._slab_starts:
            stop = start + self._slabs[start]
            self._small.give(start, stop, [(start, stop)])
        for start, nbytes in small:
            self._small.take(start, start + nbytes)
        self._tombstones = {i: stone for i, stone in self._tombstones.items() if i in self._taken}
        self._live_nbytes = sum(nbytes for _, nbytes in self._taken.values())
        self._peak_nbytes = max(self._peak_nbytes, self._live_nbytes)
        self._damaged = False

    def _start_anew_in_child(self) -> None:
        """After a fork: the lock may belong to a thread that is not here, and the arena's file to the parent alone."""
        self._lock = threading.RLock()
        self._changing = False
        self._damaged = True
        # The child's mapping is its own copy, but a hole would be punched in the file: in the parent's live arrays.
        self._is_child = True


def _start_anew_in_child() -> None:
    for extents in list(_live_extents):
        extents._start_anew_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew_in_child)


def _size_class(nbytes: int) -> int:
    """Return ``nbytes`` rounded up so that freed extents fit later ones: 16 classes to a doubling, whole lines, whole pages."""
    step = max(LINE_NBYTES, (1 << max(nbytes - 1, 1).bit_length() - 1) // STEPS_PER_DOUBLING)
    rounded = max(-(-nbytes // step) * step, LINE_NBYTES)
    return rounded if rounded < LARGE_NBYTES else _page_ceil(rounded)


def _page_floor(nbytes: int) -> int:
    return nbytes // PAGE_NBYTES * PAGE_NBYTES


def _page_ceil(nbytes: int) -> int:
    return -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES


def _check_tiles(outer: Iterable[tuple[int, int]], taken: Iterable[tuple[int, int]], gaps: _Ranges) -> None:
    """Assert that taken pieces (start, nbytes) and gaps fill the outer ranges without overlap."""
    pieces = sorted([*((start, start + nbytes) for start, nbytes in taken), *zip(gaps.starts, gaps.stops, strict=True)])
    position = 0
    for low, high in outer:
        at = low
        while at < high:
            assert position < len(pieces), f"[{at}, {high}) is neither taken nor free"
            start, stop = pieces[position]
            assert start == at and start < stop <= high, f"[{start}, {stop}) follows {at} in [{low}, {high})"
            at = stop
            position += 1
    assert position == len(pieces), f"{pieces[position]} lies outside"
