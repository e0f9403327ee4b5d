"""Functions of whole chunks: ``map_blocks``, and the ``blocks`` of an array.

Promises: the function sees read-only views of stored data or private arrays of computed data, one chunk at a time, in a worker.
What it returns must have the shape of its chunk; the error names chunk, shapes and the user's line.
Never put here: neighbours of chunks (`overlap`).
"""

from __future__ import annotations

import inspect
import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shmarray.chunks import Chunks, chunk_box
from shmarray.dtypes import checked_dtype
from shmarray.errors import ChunkError
from shmarray.expr import Block, BlockOperation, make
from shmarray.handle import Handle, wrap
from shmarray.ops.shaping import getitem
from shmarray.region import Box, axis_tuple

__all__ = ["BlockView", "MapBlocks", "map_blocks", "planned"]


class MapBlocks(BlockOperation):
    """A user's function of one chunk of each array; what it takes is what `planned` gives."""

    isolated = True
    called = "map_blocks"

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],  # None where an array stands
        kwargs: dict[str, Any],
        inputs: tuple[Chunks, ...],
        sizes: Chunks,
        axes: tuple[tuple[int | None, ...], ...],  # per input, per axis: the output axis whose block number it follows
        dtype: np.dtype[Any],
        wants: tuple[bool, bool],
    ) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.sizes, self.axes, self.dtype, self.wants = sizes, axes, dtype, wants
        self.starts = [_starts(c) for c in sizes]
        self.input_starts = [[_starts(c) for c in chunks] for chunks in inputs]
        self.name = f"{self.called}({getattr(function, '__name__', type(function).__name__)})"

    def grid(self) -> Chunks:
        return self.sizes

    def needs(self, at: Box) -> tuple[Box, ...]:
        return self._boxes(self._index(at))

    def _boxes(self, index: tuple[int, ...]) -> tuple[Box, ...]:
        """Return the box of the chunk of each input."""
        return tuple(
            tuple([slice(cuts[k], cuts[k + 1]) for cuts, k in zip(starts, chunk, strict=True)])
            for starts, chunk in zip(self.input_starts, self._chunks(index), strict=True)
        )

    def _chunks(self, index: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the index of the chunk of each input that goes with a chunk of the result."""
        return [
            tuple([index[axis] if axis is not None and len(cuts) > 2 else 0 for cuts, axis in zip(starts, axes, strict=True)])
            for starts, axes in zip(self.input_starts, self.axes, strict=True)
        ]

    def asks_once(self, k: int) -> tuple[tuple[int, ...], ...] | None:
        several = {axis: len(starts) for axis, starts in enumerate(self.starts) if len(starts) > 2}
        followed = [(axis, len(cuts)) for cuts, axis in zip(self.input_starts[k], self.axes[k], strict=True) if len(cuts) > 2]
        if len(followed) != len(several) or dict(followed) != several:  # a chunk is spread, or never asked for
            return None
        return tuple(tuple(cuts) for cuts in self.input_starts[k])

    def run(self, out: np.ndarray[Any, Any], inputs: tuple[np.ndarray[Any, Any], ...], at: Box) -> None:
        self._put(self._result(inputs, at), out, at)

    def _result(self, inputs: Sequence[np.ndarray[Any, Any]], at: Box) -> np.ndarray[Any, Any]:
        """Return what the function gives for arrays."""
        blocks = iter(inputs)
        args = [next(blocks) if a is None else a[0] for a in self.args]
        kwargs = self.kwargs
        if any(self.wants):
            kwargs = {**kwargs, **self._extras(at)}
        return np.asarray(self.function(*args, **kwargs))

    def _put(self, result: np.ndarray[Any, Any], out: np.ndarray[Any, Any], at: Box) -> None:
        if result.shape != out.shape and (result.ndim != out.ndim or math.prod(result.shape) != 1):
            raise ValueError(
                f"{self.name} gave shape {result.shape} for chunk {self._index(at)}, expected {out.shape}. Say what it gives with "
                f"chunks=, drop_axis= or new_axis=."
            )
        np.copyto(out, result, casting="same_kind" if result.dtype.kind != "O" else "unsafe")

    def _index(self, at: Box) -> tuple[int, ...]:
        return tuple([bisect_left(starts, piece.start) for starts, piece in zip(self.starts, at, strict=True)])

    def _extras(self, at: Box) -> dict[str, Any]:
        index = self._index(at)
        extras: dict[str, Any] = {}
        if self.wants[0]:
            extras["block_id"] = index
        if self.wants[1]:
            info: dict[Any, Any] = {}
            arrays = [k for k, a in enumerate(self.args) if a is None]
            for k, starts, box, chunk in zip(arrays, self.input_starts, self._boxes(index), self._chunks(index), strict=True):
                info[k] = {
                    "shape": tuple(s[-1] for s in starts),
                    "num-chunks": tuple(len(s) - 1 for s in starts),
                    "array-location": [(piece.start, piece.stop) for piece in box],
                    "chunk-location": chunk,
                }
            info[None] = {
                "shape": tuple(s[-1] for s in self.starts),
                "num-chunks": tuple(len(s) - 1 for s in self.starts),
                "array-location": [(piece.start, piece.stop) for piece in at],
                "chunk-shape": tuple(piece.stop - piece.start for piece in at),
                "chunk-location": index,
                "dtype": self.dtype,
            }
            extras["block_info"] = info
        return extras


def _starts(sizes: tuple[int, ...]) -> list[int]:
    return [0, *itertools.accumulate(sizes)]


def map_blocks(
    func: Callable[..., Any],
    *args: Any,
    name: str | None = None,
    token: str | None = None,
    dtype: Any = None,
    chunks: Any = None,
    drop_axis: Any = (),
    new_axis: Any = None,
    enforce_ndim: bool = False,
    meta: Any = None,
    **kwargs: Any,
) -> Any:
    """Return an array whose chunks are ``func`` of the chunks of the arrays in ``args``, called in worker processes.

    Arrays must have the same block grid along shared axes (aligned from the last), or one block there. Other arguments are passed
    as they are. ``dtype`` None: the function is called here on arrays with one element per axis to find it out. ``chunks``: the
    sizes of the result's chunks, where the function changes them; ``drop_axis`` and ``new_axis`` as in dask. A function that
    takes ``block_id`` or ``block_info`` is given them.

    Blocks are read-only. Raises ChunkError when grids do not match, ValueError when the dtype cannot be found out.

    >>> import shmarray as sa
    >>> sa.map_blocks(lambda b: b[::-1], sa.arange(4, chunks=2), dtype=int).compute()
    array([1, 0, 3, 2])
    """
    operation = MapBlocks(*planned("map_blocks", func, args, kwargs, dtype, chunks, drop_axis, new_axis))
    shape = tuple(sum(s) for s in operation.sizes)
    nodes = tuple(a.node for a in args if isinstance(a, Handle))
    return wrap(make(Block, shape, operation.dtype, operation, nodes, ("map_blocks", operation)), operation.sizes)


def planned(
    called: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: Any,
    chunks: Any,
    drop_axis: Any,
    new_axis: Any,
    probe: Sequence[tuple[int, ...]] | None = None,
) -> tuple[Any, ...]:
    """Return what `MapBlocks` takes. ``called``: the public function, for errors; ``probe``: shapes to find out the dtype with."""
    if not callable(func):
        raise TypeError(f"{called} takes a function, got {type(func).__name__}: {func!r}")
    arrays = [a for a in args if isinstance(a, Handle)]
    if not arrays and chunks is None:
        raise ValueError(f"{called} without an array among its arguments needs chunks=")
    ndim = max((a.ndim for a in arrays), default=0)
    drops = sorted({int(k) % max(1, ndim) for k in (drop_axis if isinstance(drop_axis, (tuple, list)) else (drop_axis,))})
    grid = _common_grid(arrays, ndim)
    for k in drops:
        if len(grid[k]) > 1:
            raise ChunkError(f"{called}(drop_axis={drop_axis}): axis {k} has {len(grid[k])} chunks; rechunk it to one first")
    kept = [k for k in range(ndim) if k not in drops]
    added = () if new_axis is None else tuple(new_axis) if isinstance(new_axis, (tuple, list)) else (new_axis,)
    news = sorted(axis_tuple(added, len(kept) + len(added)))
    origin: list[int | None] = list(kept)
    for k in news:
        origin.insert(k, None)
    sizes: Chunks
    if chunks is not None and arrays:
        sizes = _given_chunks(chunks, origin, grid)
    elif chunks is not None:
        given = tuple((c,) if isinstance(c, int) else tuple(c) for c in chunks)
        sizes, origin = given, [None] * len(given)
    else:
        sizes = tuple((1,) if k is None else grid[k] for k in origin)
    wants = _wants(func)
    axes = tuple(tuple(origin.index(k + ndim - a.ndim) if (k + ndim - a.ndim) in origin else None for k in range(a.ndim)) for a in arrays)
    if dtype is not None:
        kind = checked_dtype(dtype)
    else:
        shapes = [(1,) * a.ndim for a in arrays] if probe is None else probe
        kind = _inferred_dtype(called, func, args, kwargs, wants, len(sizes), shapes)
    placed = tuple(None if isinstance(a, Handle) else (a,) for a in args)
    return func, placed, kwargs, tuple(a.chunks for a in arrays), sizes, axes, kind, wants


def _common_grid(arrays: list[Any], ndim: int) -> list[tuple[int, ...]]:
    grid: list[tuple[int, ...]] = [(1,)] * ndim
    for axis in range(ndim):
        for a in arrays:
            mine = axis - ndim + a.ndim
            if mine < 0:
                continue
            sizes = a.chunks[mine]
            if len(sizes) == 1 and (a.shape[mine] == 1 or len(grid[axis]) > 1):
                continue
            if len(grid[axis]) > 1 and len(sizes) != len(grid[axis]):
                raise ChunkError(
                    f"map_blocks: along axis {axis} one array has {len(grid[axis])} chunks {grid[axis]} and another {len(sizes)} {sizes}; "
                    f"rechunk one like the other"
                )
            grid[axis] = sizes
    return grid


def _given_chunks(chunks: Any, origin: list[int | None], grid: list[tuple[int, ...]]) -> Chunks:
    if isinstance(chunks, int):
        chunks = (chunks,) * len(origin)
    if len(chunks) != len(origin):
        raise ChunkError(f"map_blocks(chunks={chunks}) has {len(chunks)} entries, the result {len(origin)} axes")
    sizes = []
    for given, axis in zip(chunks, origin, strict=True):
        count = 1 if axis is None else len(grid[axis])
        one = (int(given),) * count if isinstance(given, (int, np.integer)) else tuple(int(c) for c in given)
        if len(one) != count:
            raise ChunkError(f"map_blocks(chunks={chunks}): {one} has {len(one)} chunks where the arrays have {count}")
        sizes.append(one)
    return tuple(sizes)


def _wants(func: Callable[..., Any]) -> tuple[bool, bool]:
    try:
        parameters = inspect.signature(func).parameters
    except (TypeError, ValueError):
        return False, False
    return "block_id" in parameters, "block_info" in parameters


def _inferred_dtype(
    called: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wants: tuple[bool, bool],
    ndim: int,
    shapes: Sequence[tuple[int, ...]],
) -> np.dtype[Any]:
    """Call the function on small arrays: never of no element, which many functions cannot take."""
    shape = iter(shapes)
    probes = [np.ones(next(shape), a.dtype) if isinstance(a, Handle) else a for a in args]
    extras: dict[str, Any] = {}
    if wants[0]:
        extras["block_id"] = (0,) * ndim
    if wants[1]:
        one = {"shape": (1,) * ndim, "num-chunks": (1,) * ndim, "array-location": [(0, 1)] * ndim, "chunk-location": (0,) * ndim}
        extras["block_info"] = {
            **{k: one for k, a in enumerate(args) if isinstance(a, Handle)},
            None: {**one, "chunk-shape": (1,) * ndim, "dtype": None},
        }
    try:
        with np.errstate(all="ignore"):
            result = func(*probes, **kwargs, **extras)
    except Exception as error:
        raise ValueError(
            f"{called} could not find out the dtype: {getattr(func, '__name__', func)} raised {type(error).__name__}: {error} on "
            f"arrays of shape {', '.join(map(str, shapes))}. Say it with dtype=."
        ) from error
    return checked_dtype(np.asarray(result).dtype, "the result of the function")


class BlockView:
    """``x.blocks[i, j]``: the chunks of an array, by index; slices give arrays of several chunks."""

    __slots__ = ("_x",)

    def __init__(self, x: Any) -> None:
        self._x = x

    @property
    def shape(self) -> tuple[int, ...]:
        """How many chunks along each axis."""
        return tuple(len(c) for c in self._x.chunks)

    @property
    def size(self) -> int:
        """How many chunks."""
        return math.prod(self.shape)

    def __getitem__(self, key: Any) -> Any:
        parts = list(key) if isinstance(key, tuple) else [key]
        ndim = self._x.ndim
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            parts[at : at + 1] = [slice(None)] * (ndim - len(parts) + 1)
        parts += [slice(None)] * (ndim - len(parts))
        if len(parts) != ndim or any(not isinstance(p, (int, np.integer, slice)) for p in parts):
            raise IndexError(f"blocks are indexed by ints and slices, one per axis of {ndim}; got {key!r}")
        box = []
        for part, sizes in zip(parts, self._x.chunks, strict=True):
            starts = _starts(sizes)
            if isinstance(part, slice):
                low, high, step = part.indices(len(sizes))
                if step != 1:
                    raise IndexError(f"slices of blocks have step 1, got {part}")
                box.append(slice(starts[low], starts[max(low, high)]))
            else:
                box.append(chunk_box((sizes,), (part,))[0])
        return getitem(self._x, tuple(box))

    def ravel(self) -> list[Any]:
        """Return all chunks, in C order."""
        return [self[index] for index in np.ndindex(*self.shape)]

    def __iter__(self) -> Any:
        return iter(self.ravel())
