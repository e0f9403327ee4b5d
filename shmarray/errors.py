"""The errors of the array side; those of a run come from `scheduler.errors` and are re-exported, so that users need one place.

Where NumPy has a type for a mistake (``ValueError``, ``IndexError``, ``TypeError``, ``AxisError``), that type is raised, not one of these.
"""

from __future__ import annotations

from scheduler.errors import (
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
    "ChangedInput",
    "ChunkError",
    "LockError",
    "MemoryBudgetError",
    "PoolClosed",
    "SharedMemoryError",
    "SpillError",
    "TaskError",
    "TornChunkError",
    "WorkerDied",
    "WorkerStartError",
]


class ChangedInput(RuntimeError):
    """A stored array was written after an expression was built on it and before that expression was computed."""


class ChunkError(ValueError):
    """Chunks that do not tile the shape, or that do not match the blocks of another argument."""
