"""The spill file: room on disk for extents that the memory budget does not hold.

Promises: a file nobody else can name, so nothing is left when every process is gone; what was reserved can be written, whatever
else fills the disk; each failure is a `SpillError` with the directory and the numbers. It is read and written by copying, never
mapped: pages of a mapped file count as memory, and a disk that fails under a mapping is a SIGBUS, not an error. In a container, whose
memory the page cache counts as, and where little of the machine's is unused, what was written is sent to the disk and dropped from that
cache as it goes; elsewhere it stays, for reading it again is then several times as fast.
Relies on Linux for the last two; elsewhere the page cache does as it likes.
Never put here: who owns which bytes (`extents`), what goes here rather than into memory (`run`, the planner).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import tempfile
import threading
import weakref
from collections import deque
from typing import Any

from scheduler import faults
from scheduler.errors import SpillError
from scheduler.limits import format_bytes, page_cache_has_room

__all__ = ["OFF", "SpillFile", "default_directory"]

OFF = "off"  # a spill directory: do not spill
LARGEST_NBYTES = 1 << 43  # offsets handed out; the file holds only what is reserved, so only the disk is a limit before this
BEHIND_NBYTES = 8 << 20  # written and not yet sent to the disk, per thread; as much again is on its way there
JOINED_NBYTES = 1 << 20  # ranges no farther apart are sent as one: a call per row would cost more than it frees

_libc = ctypes.CDLL(None, use_errno=True)
_FALLOC_PUNCH = 0x1 | 0x2  # keep size, punch hole
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # sync_file_range
_IN_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs", 0x958458F6: "hugetlbfs"}  # file systems that are memory (statfs)
_UNSUPPORTED = (errno.ENOSYS, errno.ESPIPE, errno.EINVAL, errno.EOPNOTSUPP)

_live_files: weakref.WeakSet[SpillFile] = weakref.WeakSet()


def _read_some(fd: int, into: memoryview, offset: int) -> int:
    """Read into ``into`` and return how many bytes: the one place where all reading goes through, for tests of what can fail."""
    return os.preadv(fd, [into], offset)


def _write_some(fd: int, part: memoryview, offset: int) -> int:
    """Write and return how many bytes."""
    return os.pwrite(fd, part, offset)


def default_directory() -> str | None:
    """Return where to spill if nobody says: the first temporary directory that lies on a disk; None: there is none."""
    try:
        temporary = [tempfile.gettempdir()]
    except FileNotFoundError:  # it could not write to any: not allowed, or no descriptor is left, of which the maker of the file will tell
        temporary = []
    for directory in dict.fromkeys((*temporary, "/var/tmp")):
        if os.path.isdir(directory) and os.access(directory, os.W_OK | os.X_OK) and _is_on_disk(directory):
            return directory
    return None


def _is_on_disk(directory: str) -> bool:
    buffer = (ctypes.c_long * 32)()  # a struct statfs is 15 longs; the first is the type
    if not hasattr(_libc, "statfs") or _libc.statfs(os.fsencode(directory), ctypes.byref(buffer)):
        return False
    return (buffer[0] & 0xFFFFFFFF) not in _IN_MEMORY


class SpillFile:
    """An unlinked, sparse file. Any thread may use it; the driver makes it, workers inherit its descriptor."""

    nbytes = LARGEST_NBYTES

    def __init__(self, fd: int, directory: str) -> None:
        """Use an open descriptor, which is closed when this object goes: `make` makes the file."""
        self.fd = fd
        self.directory = directory
        self.is_closed = False  # written once, by `close`
        self.is_foreign = False  # in a forked child
        self._sends_behind = hasattr(_libc, "sync_file_range") and hasattr(os, "posix_fadvise")
        self._local = threading.local()  # what this thread has written and not yet sent
        # Only when nobody can use it any more: a thread in the middle of a write must not find another file under the number.
        weakref.finalize(self, os.close, fd).atexit = False
        _live_files.add(self)

    @classmethod
    def make(cls, directory: str) -> SpillFile:
        """Return a new file in ``directory``. Raises SpillError."""
        try:
            fd = _open_nameless(directory)
        except OSError as error:
            advice = f"Set spill_directory to a directory on a disk that this user may write to, or to {OFF!r} to do without."
            if error.errno in (errno.EMFILE, errno.ENFILE):
                advice = "Close files that are no longer needed, or raise the limit (ulimit -n)."
            raise SpillError(
                f"making a spill file in {directory!r} failed: {error.strerror}. {advice}",
                path=directory,
                errno=error.errno,
            ) from error
        return cls(fd, directory)

    # -- space

    def reserve(self, offset: int, nbytes: int) -> None:
        """Have the file system set aside room for a range, so that writing it cannot find the disk full. Raises SpillError."""
        if nbytes <= 0:
            return
        self.require_usable()
        free = self.free_nbytes()  # before: what was set aside of the range until the disk was full is given back later
        try:
            os.posix_fallocate(self.fd, offset, nbytes)
        except OSError as error:
            raise self.refusal(nbytes, free, error) from error

    def refusal(self, nbytes: int, free_nbytes: int, error: OSError) -> SpillError:
        """Return what is to be told when ``nbytes`` could not be reserved, with what was free."""
        reason = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the user's quota is used up",
            errno.EFBIG: "the file would be larger than the file system or the limit on file sizes (ulimit -f) allows",
        }.get(error.errno or 0, error.strerror)
        return SpillError(
            f"reserving {format_bytes(nbytes)} of spill space in {self.directory!r} failed, {format_bytes(free_nbytes)} are free there: "
            f"{reason}. Nothing was lost. Free space, delete stored arrays, set spill_directory to a larger disk, or raise "
            f"memory_limit.",
            path=self.directory,
            needed_nbytes=nbytes,
            free_nbytes=free_nbytes,
            errno=error.errno,
        )

    def punch(self, offset: int, nbytes: int) -> None:
        """Give the space of a range back to the file system; it reads as zeros from then on."""
        if self.is_closed or self.is_foreign:
            return
        if _libc.fallocate(self.fd, _FALLOC_PUNCH, ctypes.c_int64(offset), ctypes.c_int64(nbytes)):
            code = ctypes.get_errno()
            raise SpillError(
                f"giving back {format_bytes(nbytes)} of spill space in {self.directory!r} failed: {os.strerror(code)}",
                path=self.directory,
                errno=code,
            )

    def free_nbytes(self) -> int:
        """Return what the file system has left for this user."""
        with contextlib.suppress(OSError):
            found = os.fstatvfs(self.fd)
            return found.f_bavail * found.f_frsize
        return 0

    def resident_nbytes(self) -> int:
        """Return the bytes of disk the file occupies now."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Give all space back. Reading and writing raise from now on; calling it again does nothing."""
        if not self.is_closed and not self.is_foreign:
            self.is_closed = True
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, 0)

    # -- bytes

    def read_into(self, into: memoryview, offset: int) -> None:
        """Fill ``into`` (bytes) with what lies at ``offset``. Raises SpillError."""
        done, nbytes = 0, len(into)
        while done < nbytes:
            self.require_usable()
            try:
                faults.point("unspill")
                count = _read_some(self.fd, into[done:] if done else into, offset + done)
            except OSError as error:
                raise self._failure("reading", nbytes, offset, error) from error
            if count <= 0:
                raise self._failure("reading", nbytes, offset, OSError(errno.EIO, f"the file ends after {done} of them"))
            done += count

    def write_from(self, part: memoryview, offset: int) -> None:
        """Write ``part`` (bytes) at ``offset``, which is reserved. Raises SpillError. Call `written` after."""
        done, nbytes = 0, len(part)
        while done < nbytes:
            self.require_usable()
            try:
                faults.point("spill")
                done += _write_some(self.fd, part[done:] if done else part, offset + done)
            except OSError as error:
                raise self._failure("writing", nbytes, offset, error) from error

    def written(self, ranges: list[tuple[int, int]]) -> None:
        """Note that ranges (start, stop), ascending, were written: where the page cache has no room for them they are sent to the disk
        and dropped from it, some MB behind; the thread that writes waits here when it is that far ahead of the disk.
        """
        if not self._sends_behind:
            return
        local = self._local
        if not hasattr(local, "fresh"):
            local.fresh, local.nbytes, local.sent = deque(), 0, deque()
        for start, stop in ranges:
            last = local.fresh[-1] if local.fresh else None
            if last is not None and -JOINED_NBYTES <= start - last[1] <= JOINED_NBYTES and last[0] <= start:
                local.fresh[-1] = (last[0], max(last[1], stop))
            else:
                local.fresh.append((start, stop))
            local.nbytes += stop - start
        if local.nbytes < BEHIND_NBYTES:
            return
        before, local.sent = local.sent, local.fresh
        local.fresh, local.nbytes = deque(), 0
        if page_cache_has_room():
            local.sent = deque()
            return
        for start, stop in local.sent:
            self._send(start, stop, _WRITE)
        for start, stop in before:
            self._send(start, stop, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.fd, start, stop - start, os.POSIX_FADV_DONTNEED)

    def _send(self, start: int, stop: int, flags: int) -> None:
        result = _libc.sync_file_range(self.fd, ctypes.c_int64(start), ctypes.c_int64(stop - start), ctypes.c_uint(flags))
        if result:
            code = ctypes.get_errno()
            if code in _UNSUPPORTED:
                self._sends_behind = False
            elif code != errno.EINTR:  # the next round waits for it, too
                raise self._failure("writing", stop - start, start, OSError(code, os.strerror(code)))

    def _failure(self, what: str, nbytes: int, offset: int, error: OSError) -> SpillError:
        return SpillError(
            f"{what} {format_bytes(nbytes)} of the spill file in {self.directory!r} at {offset} failed: {error.strerror}. "
            f"Look at the disk (dmesg), or set spill_directory to another one.",
            path=self.directory,
            needed_nbytes=nbytes,
            free_nbytes=self.free_nbytes(),
            errno=error.errno,
        )

    def require_usable(self) -> None:
        """Raise SpillError in a forked child, and when the pool was closed."""
        if self.is_closed:
            raise SpillError(
                f"the pool was closed, and with it its spill file in {self.directory!r}: what lay there is gone.", path=self.directory
            )
        if self.is_foreign:
            raise SpillError(
                f"the spill file in {self.directory!r} belongs to the process this one was forked from, which may write it at any "
                f"time: compute() what the child needs before the fork.",
                path=self.directory,
            )

    def __repr__(self) -> str:
        return f"<SpillFile in {self.directory!r}>"


def _open_nameless(directory: str) -> int:
    """Return a descriptor of a new file without a name in ``directory``."""
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):  # not every file system can
                raise
    fd, path = tempfile.mkstemp(prefix="shmarray-spill-", dir=directory)
    os.unlink(path)
    return fd


def _leave_to_the_parent(*_: Any) -> None:
    for file in list(_live_files):
        file.is_foreign = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
