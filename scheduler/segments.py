"""Memory that several processes reach: the pool's arena, the driver's private memory read and written from outside, the spill file.

Promises: an `Address` resolves, in any process of a pool, to a NumPy array over the very bytes (arena, or the driver's own
memory in the driver) or to a `Remote`, which copies boxes of the driver's memory, with one system call and no page faults here, or
of the spill file.
Relies on Linux: memory files, seals, process_vm_readv. Where there is no memfd the arena is anonymous memory of this process.
Never put here: who owns which bytes (`extents`), who may touch them now (`locks`).

    driver                       arena (memory file, sparse)                worker
    +-----------------+         +-----------------------------+         +-----------------+
    | mapping --------+-------> | extent | hole | extent | ... | <-------+-- mapping       |
    | private ndarray <---------+------- process_vm_readv/writev ---------+-- scratch       |
    | scratch --------+-------> +--- spill file: pread, pwrite ---+ <-----+-- scratch       |
    +-----------------+         +-----------------------------+         +-----------------+
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil

from scheduler.errors import SharedMemoryError, UnreachableMemory
from scheduler.hugepages import huge_file
from scheduler.spill import SpillFile
from scheduler.task import ARENA, DRIVER, SPILL, Address

__all__ = ["Arena", "Memory", "Remote", "advise_huge_pages", "permit_workers"]

type_u8 = np.dtype(np.uint8)
PAGE_NBYTES = mmap.PAGESIZE
LARGEST_ARENA_NBYTES = 1 << 40  # mapping 1 TiB costs 16 us
NO_PROCESS_VM = "SHMARRAY_NO_PROCESS_VM"  # an environment variable: behave as where the kernel refuses, for tests and doubts
MOST_VECTORS = 1024  # IOV_MAX on Linux
WIDEST_INNER_STRIDE = 8  # items: up to here reading the gaps too is cheaper than a vector per item
WIDEST_GAP_NBYTES = 8 << 10  # of a file: copying two pages of the cache takes less time than a call
LONGEST_RUN_NBYTES = 64 << 10  # of runs that are read with what is between them: beyond, a call costs less than copying twice
READ_AT_ONCE_NBYTES = 1 << 20  # of runs and the gaps between them

_libc = ctypes.CDLL(None, use_errno=True)
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 1, 2, 4
_PR_SET_PTRACER = 0x59616D61
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_FALLOC_PUNCH = 0x1 | 0x2  # keep size, punch hole

_live_arenas: weakref.WeakSet[Arena] = weakref.WeakSet()


class Arena:
    """The pool's memory: one sparse memory file, mapped once, far larger than RAM, of which only touched pages cost anything.

    It has no name, so nothing is left when every process is gone; it does not lie in /dev/shm, so the size of that does not
    matter. Size never changes after creation: a shrunk file would be a SIGBUS for its readers. A memfd is sealed against that; a file
    of huge pages (`hugepages`) cannot be, and has but this process and its workers that could.
    """

    def __init__(self, nbytes: int | None = None, *, shared: bool = True) -> None:
        wanted = nbytes or min(4 * psutil.virtual_memory().total, LARGEST_ARENA_NBYTES)
        wanted = -(-wanted // PAGE_NBYTES) * PAGE_NBYTES
        self.fd = -1
        is_sealed = False
        if shared and hasattr(os, "memfd_create"):
            huge = huge_file()
            is_sealed = huge is None
            self.fd = os.memfd_create("shmarray", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) if huge is None else huge
            os.fchmod(self.fd, 0o600)  # a memfd is 0777 when made
        self.map, self.nbytes = _map_as_much(self.fd, wanted)
        if self.fd >= 0:
            os.ftruncate(self.fd, self.nbytes)
        if is_sealed:
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _F_SEAL_GROW | _F_SEAL_SHRINK | _F_SEAL_SEAL)
        _advise(self.map, "MADV_DONTDUMP")
        advise_huge_pages(self.map)
        self.bytes = np.frombuffer(self.map, type_u8)
        self.start = int(self.bytes.ctypes.data)
        self.pid = os.getpid()
        self.is_private = False  # True in a forked child
        _live_arenas.add(self)

    @property
    def is_shared(self) -> bool:
        """Whether worker processes can map it."""
        return self.fd >= 0

    def punch(self, offset: int, nbytes: int) -> None:
        """Give the pages of a page-aligned range back to the system; it reads as zeros from then on."""
        if self.fd < 0:
            _libc.madvise(ctypes.c_void_p(self.start + offset), ctypes.c_size_t(nbytes), mmap.MADV_DONTNEED)
            return
        result = _libc.fallocate(self.fd, _FALLOC_PUNCH, ctypes.c_int64(offset), ctypes.c_int64(nbytes))
        if result:
            code = ctypes.get_errno()
            raise SharedMemoryError(f"giving back {nbytes} bytes of the arena at {offset} failed: {os.strerror(code)}")

    def resident_nbytes(self) -> int:
        """Return the bytes of memory the arena occupies now."""
        return os.fstat(self.fd).st_blocks * 512 if self.fd >= 0 else 0

    def close(self) -> None:
        """Close the descriptor. The mapping goes when the last array over it does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _map_as_much(fd: int, wanted: int) -> tuple[mmap.mmap, int]:
    """Map ``wanted`` bytes, or the largest half, quarter, ... of it that the limits of this process (ulimit -v) allow."""
    nbytes = wanted
    while True:
        try:
            if fd < 0:
                return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE), nbytes
            os.ftruncate(fd, nbytes)  # unsealed until the size is settled
            return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED), nbytes
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.EFBIG, errno.EINVAL) or nbytes <= 64 * PAGE_NBYTES:
                raise SharedMemoryError(
                    f"mapping an arena of {wanted} bytes failed, and so did {nbytes}: {error.strerror}. Raise the limits on "
                    f"address space and file size (ulimit -v, ulimit -f)."
                ) from error
            nbytes = nbytes // 2 // PAGE_NBYTES * PAGE_NBYTES


def advise_huge_pages(mapping: mmap.mmap) -> None:
    """Ask for huge pages in this process's mapping of an arena: heeded where shmem_enabled is "advise"."""
    _advise(mapping, "MADV_HUGEPAGE")


def _advise(mapping: mmap.mmap, name: str) -> None:
    advice = getattr(mmap, name, None)
    if advice is not None:
        try:
            mapping.madvise(advice)
        except OSError:
            pass  # advice only: an old kernel does without


def _make_arenas_private() -> None:
    """In a forked child: replace each shared mapping by a private one of the same bytes.

    Without this a child that writes an inherited array changes the parent's, and sees what a recycled extent holds next.
    """
    for arena in list(_live_arenas):
        if arena.fd >= 0 and not arena.is_private:
            arena.is_private = True  # once: a child of this child has its pages as it has other memory
            _libc.mmap.restype = ctypes.c_void_p
            _libc.mmap(
                ctypes.c_void_p(arena.start),
                ctypes.c_size_t(arena.nbytes),
                mmap.PROT_READ | mmap.PROT_WRITE,
                mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE,
                arena.fd,
                ctypes.c_int64(0),
            )


os.register_at_fork(after_in_child=_make_arenas_private)


class Memory:
    """One process's reach: the arena it has mapped, the driver's memory (its own, when it is the driver), the spill file."""

    def __init__(self, arena: np.ndarray[Any, np.dtype[np.uint8]], driver: int | None = None, spill: SpillFile | None = None) -> None:
        self.arena = arena
        self.start = int(arena.ctypes.data)  # of the arena, in this process
        self.driver = driver  # pid; None in the driver itself
        self.spill = spill  # in the driver set when the file is made: before any address in it is known

    def window(
        self, address: Address, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]
    ) -> np.ndarray[Any, np.dtype[Any]] | Remote:
        """Return the box that starts ``offset`` bytes after ``address``: an array over the bytes, or a `Remote`."""
        start = address.offset + offset
        if address.segment == ARENA:
            return np.ndarray(shape, dtype, self.arena, start, strides)
        if address.segment == SPILL:
            assert self.spill is not None, address
            return _Spilled(self.spill, start, shape, strides, dtype)
        assert address.segment == DRIVER, address
        if self.driver is not None:
            return _OfDriver(self.driver, start, shape, strides, dtype)
        return _array_at(start, shape, strides, dtype)


def _array_at(start: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, np.dtype[Any]]:
    """Return an array over memory of this process that somebody else keeps alive."""
    low = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s < 0 and n)
    high = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s > 0 and n) + dtype.itemsize
    raw = (ctypes.c_char * (high - low)).from_address(start + low)
    return np.ndarray(shape, dtype, memoryview(raw), -low, strides)


class Remote:
    """A strided array that is not mapped here: boxes of it are copied. `_move` says how."""

    __slots__ = ("dtype", "home", "shape", "start", "strides")

    def __init__(self, home: Any, start: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.home = home  # where it lies: for `_move`
        self.start = start
        self.shape = shape
        self.strides = strides
        self.dtype = dtype

    def __getitem__(self, box: tuple[slice, ...]) -> Remote:
        """Return the box [start, stop) per axis, without steps."""
        start = self.start
        shape = []
        for piece, stride in zip(box, self.strides, strict=True):
            start += piece.start * stride
            shape.append(piece.stop - piece.start)
        return type(self)(self.home, start, tuple(shape), self.strides, self.dtype)

    def nbytes_with_gaps(self) -> int:
        """Return the bytes of scratch that `read` may need."""
        _, axes, gaps = self._layout()
        itemsize = self.dtype.itemsize
        nbytes = itemsize * math.prod([self.shape[a] for a in axes])
        gap = gaps[-1] if gaps else itemsize
        return nbytes * (gap // itemsize if itemsize < gap <= WIDEST_INNER_STRIDE * itemsize else 1)

    def read(self, scratch: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, np.dtype[Any]]:
        """Return a copy, in ``scratch`` (uint8, large enough) when given. Broadcast axes are read once."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        start, axes, gaps = self._layout()
        itemsize = self.dtype.itemsize
        gap = gaps[-1] if gaps else itemsize
        wide = 1
        if axes and gap != itemsize and gap <= WIDEST_INNER_STRIDE * itemsize and gap % itemsize == 0:
            wide = gap // itemsize  # fetch the gaps as well, then step over them here
        counts = [self.shape[a] for a in axes]
        run = ((counts[-1] - 1) * wide + 1) if axes else 1
        fetched = (*counts[:-1], run) if axes else ()
        nbytes = itemsize * int(np.prod(fetched, dtype=np.int64))
        if scratch is None or scratch.nbytes < nbytes:
            scratch = np.empty(nbytes, type_u8)
        block = np.ndarray(fetched, self.dtype, scratch)
        if nbytes:
            inner = itemsize if wide > 1 else gap
            self._transfer(block, start, fetched, (*gaps[:-1], inner) if axes else (), is_write=False)
        return self._restore(block[..., ::wide] if axes else block, axes)

    def write(self, block: np.ndarray[Any, np.dtype[Any]]) -> None:
        """Copy ``block``, of this shape and dtype, over the bytes."""
        start, axes, gaps = self._layout()
        flipped = tuple(slice(None, None, -1) if s < 0 else slice(None) for s in self.strides)
        ordered = block[flipped].transpose([*axes, *(a for a in range(block.ndim) if a not in axes)])
        ordered = np.ascontiguousarray(ordered).reshape([self.shape[a] for a in axes])
        if ordered.nbytes:
            self._transfer(ordered, start, ordered.shape, gaps, is_write=True)

    def _layout(self) -> tuple[int, list[int], tuple[int, ...]]:
        """Return the lowest address, the axes that move in memory from the widest stride to the narrowest, their strides."""
        start = self.start + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True) if s < 0 and n)
        axes = [a for a, n in enumerate(self.shape) if self.strides[a] != 0 and n != 1]
        axes.sort(key=lambda a: -abs(self.strides[a]))
        return start, axes, tuple(abs(self.strides[a]) for a in axes)

    def _restore(self, block: np.ndarray[Any, Any], axes: list[int]) -> np.ndarray[Any, Any]:
        """Give a block in memory order back this array's axes, directions and broadcast shape."""
        if axes == list(range(len(self.shape))) and all(s > 0 for s in self.strides):
            return block
        still = [a for a in range(len(self.shape)) if a not in axes]
        block = block.reshape(block.shape + (1,) * len(still)).transpose(np.argsort([*axes, *still]))
        block = block[
            tuple(slice(None, None, -1) if s < 0 and n > 1 else slice(None) for n, s in zip(self.shape, self.strides, strict=True))
        ]
        return np.broadcast_to(block, self.shape) if block.shape != self.shape else block

    def _transfer(self, block: np.ndarray[Any, Any], start: int, shape: tuple[int, ...], gaps: Sequence[int], *, is_write: bool) -> None:
        """Move ``block`` (contiguous) from or to the strided bytes at ``start`` in as few runs as there are."""
        counts, gaps = list(shape), list(gaps)
        run = self.dtype.itemsize
        while counts and gaps[-1] == run:  # axes that continue each other are one run
            run *= counts.pop()
            gaps.pop()
        self._move(block, start, counts, gaps, run, is_write)

    def _move(self, block: np.ndarray[Any, Any], start: int, counts: list[int], gaps: list[int], run: int, is_write: bool) -> None:
        """Copy runs of ``run`` bytes, which lie ``counts`` times ``gaps`` apart from ``start`` on, to ``block``, or from it."""
        raise NotImplementedError


def _starts(start: int, counts: Sequence[int], gaps: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return where each run begins."""
    starts = np.array([start], np.int64)
    for count, gap in zip(counts, gaps, strict=True):
        starts = (starts[:, None] + np.arange(count, dtype=np.int64) * gap).ravel()
    return starts


class _OfDriver(Remote):
    """In the driver's private memory (``home``: its pid), seen from a worker."""

    __slots__ = ()

    def _move(self, block: np.ndarray[Any, Any], start: int, counts: list[int], gaps: list[int], run: int, is_write: bool) -> None:
        call = "process_vm_writev" if is_write else "process_vm_readv"
        starts = _starts(start, counts, gaps)
        vectors = np.empty((len(starts), 2), np.int64)
        vectors[:, 0] = starts
        vectors[:, 1] = run
        if os.environ.get(NO_PROCESS_VM):
            raise UnreachableMemory(f"{call} is switched off by {NO_PROCESS_VM}")
        function = getattr(_libc, call)
        function.restype = ctypes.c_ssize_t
        local = (ctypes.c_uint64 * 2)()
        at = int(block.ctypes.data)
        for first in range(0, len(starts), MOST_VECTORS):
            some = vectors[first : first + MOST_VECTORS]
            nbytes = run * len(some)
            done = 0
            while done < nbytes:  # a short count is possible past 2 GiB, or at a page that is not there
                local[0], local[1] = at + done, nbytes - done
                rest = _skip(some, done, run)
                moved = function(
                    ctypes.c_int(self.home),
                    ctypes.byref(local),
                    ctypes.c_ulong(1),
                    ctypes.c_void_p(int(rest.ctypes.data)),
                    ctypes.c_ulong(len(rest)),
                    ctypes.c_ulong(0),
                )
                if moved <= 0:
                    code = ctypes.get_errno()
                    kind = UnreachableMemory if code in (errno.EPERM, errno.ENOSYS, errno.EACCES) else SharedMemoryError
                    hint = ". If it is a mapped file (np.memmap), that has become shorter: restore it" if code == errno.EFAULT else ""
                    what = f"{call} of {nbytes} bytes at {start:#x} of process {self.home}"
                    raise kind(f"{what} failed after {done}: {os.strerror(code)}{hint}.")
                done += moved
            at += nbytes


class _Spilled(Remote):
    """In the spill file (``home``)."""

    __slots__ = ()

    def _move(self, block: np.ndarray[Any, Any], start: int, counts: list[int], gaps: list[int], run: int, is_write: bool) -> None:
        file: SpillFile = self.home
        flat = block.reshape(-1).view(type_u8)
        if is_write:
            starts = _starts(start, counts, gaps).tolist()
            part = memoryview(flat)  # type: ignore[arg-type]  # the stubs do not know that arrays are buffers
            for number, offset in enumerate(starts):
                file.write_from(part[number * run : (number + 1) * run], offset)
            if run >= LONGEST_RUN_NBYTES or len(starts) == 1:  # else neighbours will write the rest of these pages: they must stay
                file.written([(offset, offset + run) for offset in starts])
            return
        if counts and run <= LONGEST_RUN_NBYTES and gaps[-1] - run <= WIDEST_GAP_NBYTES:
            self._read_across(flat, _starts(start, counts[:-1], gaps[:-1]).tolist(), counts[-1], gaps[-1], run)
            return
        into = memoryview(flat)  # type: ignore[arg-type]  # as above
        for number, offset in enumerate(_starts(start, counts, gaps).tolist()):
            file.read_into(into[number * run : (number + 1) * run], offset)

    def _read_across(self, flat: np.ndarray[Any, Any], starts: list[int], count: int, gap: int, run: int) -> None:
        """Read runs that lie so close together that reading what is between them costs less than a call for each."""
        rows = flat.reshape(len(starts), count, run)
        at_once = min(count, max(1, READ_AT_ONCE_NBYTES // gap))
        scratch = np.empty((at_once - 1) * gap + run, type_u8)
        for row, offset in zip(rows, starts, strict=True):
            for low in range(0, count, at_once):
                n = min(at_once, count - low)
                part = scratch[: (n - 1) * gap + run]
                self.home.read_into(memoryview(part), offset + low * gap)  # type: ignore[arg-type]  # as above
                row[low : low + n] = np.ndarray((n, run), type_u8, part, 0, (gap, 1))


def _skip(vectors: np.ndarray[Any, Any], done: int, run: int) -> np.ndarray[Any, Any]:
    """Return the vectors that are left after ``done`` bytes."""
    if done == 0:
        return vectors
    rest = vectors[done // run :].copy()
    rest[0, 0] += done % run
    rest[0, 1] -= done % run
    return rest


def permit_workers() -> None:
    """Let this process's descendants read and write its memory where Yama asks for that; elsewhere do nothing."""
    _libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(os.getpid()), 0, 0, 0)
