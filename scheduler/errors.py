"""The errors that running a plan can raise, each distinguishing misuse, a world gone wrong, or a bug of ours.

Relies on nothing. Never put here: anything that formats arrays or knows of expressions.
"""

from __future__ import annotations

__all__ = [
    "AbandonedLockError",
    "HandleExpired",
    "LockError",
    "MemoryBudgetError",
    "PoolClosed",
    "RunCancelled",
    "SchedulerError",
    "SharedMemoryError",
    "SpillError",
    "TaskError",
    "TornChunkError",
    "UnreachableMemory",
    "WorkerDied",
    "WorkerStartError",
]


class SchedulerError(RuntimeError):
    """What every error of this package is, unless NumPy or the user's function has a type for it."""


class MemoryBudgetError(SchedulerError, MemoryError):
    """A plan cannot fit the memory budget; nothing of it has run."""


class SharedMemoryError(SchedulerError, MemoryError):
    """The arena has no room left, or the system refuses shared memory."""


class UnreachableMemory(SharedMemoryError):
    """The system forbids workers to read and write the driver's memory (Yama, seccomp); it has to be staged."""


class SpillError(SchedulerError, OSError):
    """The spill file cannot be made, extended, read or written.

    ``path`` is its directory; ``needed_nbytes`` and ``free_nbytes`` what was wanted and what the disk has left, where that is the matter.
    """

    def __init__(self, message: str, *, path: str = "", needed_nbytes: int = 0, free_nbytes: int = 0, errno: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.needed_nbytes = needed_nbytes
        self.free_nbytes = free_nbytes
        self.errno = errno

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_spill, (str(self), self.path, self.needed_nbytes, self.free_nbytes, self.errno)


def _rebuild_spill(message: str, path: str, needed_nbytes: int, free_nbytes: int, errno: int | None) -> SpillError:
    return SpillError(message, path=path, needed_nbytes=needed_nbytes, free_nbytes=free_nbytes, errno=errno)


class PoolClosed(SchedulerError):
    """The pool was closed; what lived only in its arena is gone."""


class RunCancelled(SchedulerError):
    """Another thread has ended the run, with all of its group."""


class WorkerStartError(SchedulerError):
    """Workers fail to start; the message holds what they wrote to stderr."""


class WorkerDied(SchedulerError):
    """One task took several workers down with it, and is refused from now on."""


class TaskError(SchedulerError):
    """A task raised something that cannot travel between processes; the message says what."""


class LockError(SchedulerError):
    """A lock was asked for in a way that could only deadlock."""


class AbandonedLockError(LockError):
    """Whoever held a lock to write died without releasing it: what it guards may be half written. Told once, to the next owner."""


class HandleExpired(SchedulerError):
    """A handle of a shared array that was freed: nobody holds it any more, and nobody who lives has sent it."""


class TornChunkError(SchedulerError):
    """A worker died in the middle of an update in place: part of a chunk is old, part new.

    ``tasks`` are the indices, in the layer ``layer`` of the plan, that may be half done; ``finished`` those that are done.
    """

    def __init__(self, message: str, *, layer: int = -1, tasks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.layer = layer
        self.tasks = tasks

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_torn, (str(self), self.layer, self.tasks)


def _rebuild_torn(message: str, layer: int, tasks: tuple[int, ...]) -> TornChunkError:
    return TornChunkError(message, layer=layer, tasks=tasks)
