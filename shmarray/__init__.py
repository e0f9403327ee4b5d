"""NumPy for all the cores of one machine: lazy chunked arrays, computed in shared memory by worker processes.

    import shmarray as sa
    x = sa.random.default_rng(0).random((20_000, 10_000)).persist()
    (x * 1.8 + 32).mean(axis=0).compute()

Names and semantics are NumPy's; `chunks`, `compute`, `persist`, `rechunk`, `map_blocks` and `map_overlap` are dask's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy import e, euler_gamma, inf, nan, newaxis, pi

from scheduler.run import Pool
from shmarray import shared
from shmarray.array import Array, allclose, answer_for, array_equal
from shmarray.checkpoint import Checkpoint, CheckpointInfo, list_checkpoints, load_checkpoint, save_checkpoint
from shmarray.chunks import normalize_chunks
from shmarray.compute import compute, persist
from shmarray.config import config
from shmarray.errors import (
    AbandonedLockError,
    ChangedInput,
    CheckpointError,
    ChunkError,
    HandleExpired,
    LockError,
    MemoryBudgetError,
    PartialUpdateError,
    PoolClosed,
    SharedMemoryError,
    SpillError,
    TaskError,
    TornChunkError,
    WorkerDied,
    WorkerStartError,
)
from shmarray.explain import explain
from shmarray.iterate import Frame, iterate
from shmarray.ops import accumulators, creation, elementwise, linalg, lines, overlap, padding, random, reductions, sampled, shaping
from shmarray.ops.blocks import map_blocks
from shmarray.ops.overlap import map_overlap
from shmarray.pipeline import PipelineReport, expression, ordered, pipeline, stream
from shmarray.progress import ProgressBar
from shmarray.store import attach

__version__ = "0.1.0"

_FAMILIES: dict[str, Any] = dict(elementwise.ELEMENTWISE)
for _module, _private in (
    (creation, ()),
    (reductions, ("accumulate", "reduce_ufunc")),
    (shaping, ("getitem", "setitem_node", "view_of")),
    (linalg, ()),
    (padding, ()),
    (accumulators, ("at", "at_traced")),
    (lines, ()),
    (sampled, ()),
):
    _FAMILIES |= {name: getattr(_module, name) for name in _module.__all__ if name not in _private}
globals().update(_FAMILIES)

__all__ = [  # noqa: PLE0604  # the families name their own functions
    "AbandonedLockError",
    "Array",
    "ChangedInput",
    "Checkpoint",
    "CheckpointError",
    "CheckpointInfo",
    "ChunkError",
    "Frame",
    "HandleExpired",
    "LockError",
    "MemoryBudgetError",
    "Pool",
    "PartialUpdateError",
    "PipelineReport",
    "PoolClosed",
    "ProgressBar",
    "SharedMemoryError",
    "SpillError",
    "TaskError",
    "TornChunkError",
    "WorkerDied",
    "WorkerStartError",
    "allclose",
    "array_equal",
    "attach",
    "compute",
    "config",
    "e",
    "euler_gamma",
    "explain",
    "expression",
    "inf",
    "iterate",
    "list_checkpoints",
    "load_checkpoint",
    "map_blocks",
    "map_overlap",
    "nan",
    "newaxis",
    "normalize_chunks",
    "ordered",
    "overlap",
    "persist",
    "pi",
    "pipeline",
    "random",
    "save_checkpoint",
    "shared",
    "stream",
    *sorted(_FAMILIES),
]

answer_for({name: globals()[name] for name in __all__})

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
