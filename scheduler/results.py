"""Private memory of the driver for results, used again: fresh memory costs a page fault, and a page of zeros, each time.

Promises: an array from `ResultMemory.empty` is its holder's alone until the last array over its bytes is gone; then the bytes
may back a later one. What is kept warm is bounded. Relies on private anonymous mappings with huge pages where the system has them.
Never put here: memory that another process maps (`segments`).
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np
import psutil

__all__ = ["ResultMemory", "result_memory"]

SMALLEST_NBYTES = 4 << 20  # below, malloc does well
HUGE_PAGE_NBYTES = 2 << 20
MOST_WASTE = 8  # a mapping is used for a result that leaves at most an eighth of it unused


class _Lease:
    """What arrays over a mapping keep alive."""

    __slots__ = ("__weakref__", "bytes")

    def __init__(self, mapping: mmap.mmap) -> None:
        self.bytes = np.frombuffer(mapping, np.uint8)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.bytes.size,), "typestr": "|u1", "data": (self.bytes.ctypes.data, False), "version": 3}


class ResultMemory:
    """Mappings for large results; those no array lies over any more are kept, up to ``limit_nbytes``."""

    def __init__(self, limit_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        self._mutex = threading.Lock()  # guards the two below
        self._warm: list[mmap.mmap] = []
        self._lent: dict[weakref.ref[_Lease], mmap.mmap] = {}
        # Appended to by the garbage collector, anywhere, also inside our own methods: a C function that takes no lock.
        self._ended: deque[weakref.ref[_Lease]] = deque()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """Return a C-ordered, writable array with whatever was in its memory before."""
        nbytes = dtype.itemsize
        for n in shape:
            nbytes *= n
        if nbytes < SMALLEST_NBYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
            return np.empty(shape, dtype)
        with self._mutex:
            self._collect()
            fitting = [m for m in self._warm if nbytes <= len(m) <= nbytes + nbytes // MOST_WASTE + HUGE_PAGE_NBYTES]
            mapping = min(fitting, key=len, default=None)
            if mapping is None:
                mapping = _map(nbytes)
            else:
                self._warm.remove(mapping)
            lease = _Lease(mapping)
            self._lent[weakref.ref(lease, self._ended.append)] = mapping
        return np.ndarray(shape, dtype, np.asarray(lease))

    def warm_nbytes(self) -> int:
        """Return the bytes kept for results to come."""
        with self._mutex:
            self._collect()
            return sum(len(m) for m in self._warm)

    def trim(self) -> None:
        """Give what is kept back to the system."""
        with self._mutex:
            self._collect()
            self._warm.clear()

    def _collect(self) -> None:
        while self._ended:
            self._warm.append(self._lent.pop(self._ended.popleft()))
        while sum(len(m) for m in self._warm) > self.limit_nbytes:
            self._warm.pop(0)  # the one that has waited longest

    def check(self) -> None:
        """Assert that no mapping is lent and warm at once."""
        with self._mutex:
            lent = {id(m) for m in self._lent.values()}
            assert not lent & {id(m) for m in self._warm}
            assert len({id(m) for m in self._warm}) == len(self._warm)


def _map(nbytes: int) -> mmap.mmap:
    size = -(-nbytes // HUGE_PAGE_NBYTES) * HUGE_PAGE_NBYTES
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pass  # a kernel without huge pages
    return mapping


_of_process: list[ResultMemory] = []


def result_memory() -> ResultMemory:
    """Return that of this process, which keeps at most a sixteenth of the machine's memory, and 1 GiB."""
    if not _of_process:
        _of_process.append(ResultMemory(min(1 << 30, psutil.virtual_memory().total // 16)))
    return _of_process[0]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_of_process.clear)  # its lock may be held by a thread that is not here
