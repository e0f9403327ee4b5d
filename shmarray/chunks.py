"""The visible chunk grid: sizes per axis, in every form that dask takes.

Promises: chunks always tile the shape. A grid of a million chunks is two tuples of a thousand ints.
Never put here: tiles (the planner's own grid, in `tiles`), cells (a stored array's locking grid, in `storage`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scheduler.limits import parse_bytes
from shmarray.config import config
from shmarray.errors import ChunkError
from shmarray.region import Box

__all__ = ["Chunks", "broadcast_chunks", "chunk_box", "default_chunks", "normalize_chunks"]

Chunks = tuple[tuple[int, ...], ...]


def normalize_chunks(chunks: Any = "auto", shape: Sequence[int] = (), dtype: Any = float, previous: Chunks | None = None) -> Chunks:
    """Return the sizes of the chunks along each axis, which tile ``shape``.

    ``chunks`` is ``"auto"`` (contiguous slabs of about ``config.chunk_size`` bytes, by shape and dtype alone), a byte string
    such as ``"16MiB"``, an int for every axis, a tuple with one entry per axis (an int, a tuple of sizes, -1 for the
    whole axis, None for ``previous`` or else the whole axis, ``"auto"`` or a byte string), or a dict from axes to such entries (axes
    left out: None).

    Raises ChunkError (a ValueError) when sizes do not add up to the shape, and for a wrong number of axes.

    >>> normalize_chunks((2, -1), (5, 3))
    ((2, 2, 1), (3,))
    """
    shape = tuple(operator.index(n) for n in shape)
    dtype = np.dtype(dtype)
    if chunks is None:
        chunks = previous if previous is not None else "auto"
    if isinstance(chunks, Mapping):
        given = {operator.index(k) + (len(shape) if k < 0 else 0): v for k, v in chunks.items()}
        unknown = [k for k in given if not 0 <= k < len(shape)]
        if unknown:
            raise ChunkError(f"chunks {chunks!r} name axis {unknown[0]}, but the array has {len(shape)} dimensions")
        chunks = tuple(given.get(k) for k in range(len(shape)))
    elif isinstance(chunks, (str, int, float, np.integer)):
        chunks = (chunks,) * len(shape)
    elif len(shape) == 1 and len(chunks) != 1 and all(isinstance(c, (int, np.integer)) for c in chunks):
        chunks = (tuple(chunks),)  # as in dask: one axis, its sizes
    chunks = tuple(chunks)
    if len(chunks) != len(shape):
        raise ChunkError(f"chunks {chunks!r} have {len(chunks)} entries; shape {shape} has {len(shape)} dimensions")
    if previous is not None:
        chunks = tuple(old if c is None else c for c, old in zip(chunks, previous, strict=True))
    limit = config.chunk_size
    texts = {parse_bytes(c) for c in chunks if isinstance(c, str) and c != "auto"}
    if len(texts) > 1:
        raise ChunkError(f"chunks {chunks!r} give more than one size in bytes; give one")
    if texts:
        limit = texts.pop()
    sizes = [_axis_sizes(c, n, axis, chunks, shape) for axis, (c, n) in enumerate(zip(chunks, shape, strict=True))]
    automatic = [axis for axis, size in enumerate(sizes) if size is None]
    if automatic:
        fixed = math.prod(max(size, default=1) for size in sizes if size is not None)
        room = max(1, limit // max(1, dtype.itemsize * fixed))
        for axis in reversed(automatic):  # inner axes whole as long as they fit: slabs that are contiguous in memory
            size = min(max(shape[axis], 1), room)
            room = max(1, room // size)
            sizes[axis] = _even_sizes(shape[axis], size)
    return tuple(size for size in sizes if size is not None)


def _axis_sizes(chunk: Any, n: int, axis: int, chunks: Any, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the sizes along one axis; None where they are to be chosen."""
    if isinstance(chunk, str):
        return None
    if chunk is None:
        return (n,)
    if isinstance(chunk, (tuple, list, np.ndarray)):
        try:
            sizes = tuple(operator.index(c) for c in chunk)
        except TypeError:
            raise ChunkError(f"chunk sizes {chunk!r} of axis {axis} are not whole numbers") from None
        if any(c < 0 for c in sizes) or sum(sizes) != n:
            raise ChunkError(f"chunks {chunks!r} do not tile shape {shape}: along axis {axis} they add up to {sum(sizes)}, not {n}")
        return sizes or (0,)
    try:
        size = operator.index(chunk)
    except TypeError:
        raise ChunkError(
            f"chunks {chunks!r}: entry {chunk!r} is neither a whole number, a tuple of sizes, -1, None, 'auto' nor bytes such as '16MiB'"
        ) from None
    if size == -1:
        return (n,)
    if size < 1:
        raise ChunkError(f"chunks {chunks!r} have size {size} along axis {axis}; sizes are positive, or -1 for the whole axis")
    return _even_sizes(n, size)


def _even_sizes(n: int, size: int) -> tuple[int, ...]:
    if n == 0:
        return (0,)
    whole, rest = divmod(n, size)
    return (size,) * whole + ((rest,) if rest else ())


def default_chunks(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Chunks:
    """Return what ``"auto"`` gives."""
    return normalize_chunks("auto", shape, dtype)


def broadcast_chunks(shape: tuple[int, ...], operands: Sequence[tuple[tuple[int, ...], Chunks]]) -> Chunks:
    """Return the chunks of an elementwise result: per axis those of the operand that has most of them there."""
    result: list[tuple[int, ...]] = []
    for axis, n in enumerate(shape):
        best: tuple[int, ...] = (n,)
        for operand, chunks in operands:
            mine = axis - len(shape) + len(operand)
            if mine >= 0 and operand[mine] == n and len(chunks[mine]) > len(best):
                best = chunks[mine]
        result.append(best)
    return tuple(result)


def chunk_box(chunks: Chunks, index: Sequence[int]) -> Box:
    """Return the box of the chunk at ``index`` (one int per axis, negative ones from the end).

    Raises IndexError when there is no such chunk.
    """
    if len(index) != len(chunks):
        raise IndexError(f"chunk index {tuple(index)} has {len(index)} entries; the chunk grid has {len(chunks)} dimensions")
    box = []
    for axis, (sizes, i) in enumerate(zip(chunks, index, strict=True)):
        k = operator.index(i)
        if not -len(sizes) <= k < len(sizes):
            raise IndexError(f"chunk index {tuple(index)} is out of bounds: axis {axis} has {len(sizes)} chunks")
        k %= len(sizes)
        start = sum(sizes[:k])
        box.append(slice(start, start + sizes[k]))
    return tuple(box)
