"""The errors of the array side; those of a run come from `scheduler.errors` and are re-exported, so that users need one place.

Where NumPy has a type for a mistake (``ValueError``, ``IndexError``, ``TypeError``, ``AxisError``), that type is raised, not one of these.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from scheduler.errors import (
    AbandonedLockError,
    HandleExpired,
    LockError,
    MemoryBudgetError,
    PoolClosed,
    SharedMemoryError,
    SpillError,
    TaskError,
    TornChunkError,
    WorkerDied,
    WorkerStartError,
)

__all__ = [
    "AbandonedLockError",
    "ChangedInput",
    "CheckpointError",
    "ChunkError",
    "DamagedFile",
    "HandleExpired",
    "LockError",
    "MemoryBudgetError",
    "PartialUpdateError",
    "PoolClosed",
    "SharedMemoryError",
    "SpillError",
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

        Raises ChangedInput when the array, or a stored one that is read, was written meanwhile; the end of a block ``with x.lock(...)``
        counts as a write, so that an update inside is resumed inside. RuntimeError when it was resumed before, or cannot be; the same
        error as before, with what is done by then, when its cause is still there.
        """
        finish = self._finish  # which takes itself away when it begins
        if finish is None:
            raise RuntimeError("this update cannot be resumed (any more): it was resumed before, or what it had done is not known.")
        finish()

    def __reduce__(self) -> tuple[Any, ...]:
        # What it would take to resume stays in this process.
        return _rebuild, (_kind_of(self), str(self), [*self.updated], [*self.untouched], [*self.torn])


def cut_short(error: BaseException, message: str) -> PartialUpdateError:
    """Return a `PartialUpdateError` of the kind of ``error``."""
    kind = _kind_of(error)
    for base in (kind, KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else Exception):
        try:
            both = _both(base)
            make = OSError.__new__ if issubclass(base, OSError) else both.__new__  # a class of two builtin ones knows the first only
            found: PartialUpdateError = make(both, message)
            if base is kind:
                found.__dict__.update({name: value for name, value in error.__dict__.items() if not hasattr(PartialUpdateError, name)})
                _copy_fields(error, found)
            found.args = (message,)
        except Exception:
            continue  # a class that cannot be derived from, or made without more
        return found
    raise AssertionError(error)


def _copy_fields(error: BaseException, found: BaseException) -> None:
    """Copy what is not in ``__dict__``: an OSError's errno, slots."""
    for base in type(error).__mro__:
        if base in (BaseException, object):
            continue
        for name, field in vars(base).items():
            if inspect.ismemberdescriptor(field) or (inspect.isgetsetdescriptor(field) and not name.startswith("__")):
                with contextlib.suppress(Exception):
                    setattr(found, name, getattr(error, name))


def _kind_of(error: BaseException) -> type[BaseException]:
    """Return the class of an error, of a `PartialUpdateError` that of its cause."""
    kind = type(error)
    return kind.__bases__[1] if issubclass(kind, PartialUpdateError) and len(kind.__bases__) == 2 else kind


_classes: dict[Any, type[PartialUpdateError]] = {}  # by kind: what is pickled must be found again


def _both(kind: type[BaseException]) -> type[PartialUpdateError]:
    found = _classes.get(kind)
    if found is None:
        found = type("PartialUpdateError", (PartialUpdateError, kind), {"__module__": PartialUpdateError.__module__})
        _classes[kind] = found
    return found


def _rebuild(kind: type[BaseException], message: str, updated: Any, untouched: Any, torn: Any) -> PartialUpdateError:
    both = _both(kind if kind is not PartialUpdateError else Exception)
    found: PartialUpdateError = (OSError.__new__ if issubclass(kind, OSError) else both.__new__)(both, message)
    found.args = (message,)
    found.updated, found.untouched, found.torn = updated, untouched, torn
    return found


class ChunkError(ValueError):
    """Chunks that do not tile the shape, or that do not match the blocks of another argument."""


class DamagedFile(ValueError):
    """A file does not hold what was written to it."""


class CheckpointError(RuntimeError):
    """There are checkpoints, but none that was asked for is whole; the text says what is wrong with each."""
