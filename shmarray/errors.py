"""The errors of the array side; those of a run come from `scheduler.errors` and are re-exported, so that users need one place.

Where NumPy has a type for a mistake (``ValueError``, ``IndexError``, ``TypeError``, ``AxisError``), that type is raised, not one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from scheduler.errors import (
    AbandonedLockError,
    HandleExpired,
    LockError,
    MemoryBudgetError,
    PoolClosed,
    SharedMemoryError,
    TaskError,
    TornChunkError,
    WorkerDied,
    WorkerStartError,
)

__all__ = [
    "AbandonedLockError",
    "ChangedInput",
    "ChunkError",
    "HandleExpired",
    "LockError",
    "MemoryBudgetError",
    "PartialUpdateError",
    "PoolClosed",
    "SharedMemoryError",
    "TaskError",
    "TornChunkError",
    "WorkerDied",
    "WorkerStartError",
    "cut_short",
]


class ChangedInput(RuntimeError):
    """A stored array was written after an expression was built on it and before that expression was computed."""


class PartialUpdateError(BaseException):
    """An update of a stored array was cut short by an exception or a Ctrl-C: part of the array is new, part old.

    Always of the kind of what cut it short, as well, which is its ``__cause__``: ``except ZeroDivisionError``, ``except KeyboardInterrupt``
    and ``except Exception`` work as ever. ``updated``, ``untouched`` and ``torn`` list chunks, by index, of the grid the array had when it
    was stored: those with their new values, with their old ones, and with some of each; the latter raise TornChunkError when read.
    """

    updated: Sequence[tuple[int, ...]] = ()
    untouched: Sequence[tuple[int, ...]] = ()
    torn: Sequence[tuple[int, ...]] = ()
    _finish: Callable[[], None] | None = None

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""

    def resume(self) -> None:
        """Do the rest of the update: what is done already is not done again, and the array ends as if nothing had happened.

        Raises ChangedInput when the array, or one that is read, was written meanwhile; RuntimeError when it was resumed before, or cannot
        be; and the same error as before, with what is done by then, when its cause is still there.
        """
        finish, self._finish = self._finish, None
        if finish is None:
            raise RuntimeError("this update cannot be resumed (any more): it was resumed before, or what it had done is not known.")
        finish()

    def __reduce__(self) -> tuple[Any, ...]:
        return PartialUpdateError, self.args  # what it would take to resume stays in this process


def cut_short(error: BaseException, message: str) -> PartialUpdateError:
    """Return a `PartialUpdateError` of the kind of ``error``."""
    for kind in (type(error), Exception):
        try:
            both = _both(kind)
            found = both.__new__(both, message)
            found.args = (message,)
            found.__dict__.update(error.__dict__ if kind is type(error) else {})
        except Exception:
            continue  # a class that cannot be derived from, or made without more
        return found
    raise AssertionError(error)


def _both(kind: Any) -> type[PartialUpdateError]:
    return type("PartialUpdateError", (PartialUpdateError, kind), {"__module__": PartialUpdateError.__module__})


class ChunkError(ValueError):
    """Chunks that do not tile the shape, or that do not match the blocks of another argument."""
