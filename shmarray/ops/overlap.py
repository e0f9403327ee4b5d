"""Functions of chunks that see some of their neighbours: ``map_overlap``, and the arrays with halos that it is made of, as in dask.

    stored array        chunk 0   |   chunk 1   |   chunk 2         the neighbours of chunk 1 lie next to it: what the function sees
                              [------ halo ------]                  is a view; only at the ends of an axis halos are made in scratch

Promises: the function sees read-only arrays; of a stored array nothing is copied but for chunks at the ends of an axis with a boundary.
Never put here: stencils of slices, which need no function (`hoist`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from shmarray.chunks import Chunks
from shmarray.errors import ChunkError
from shmarray.expr import Block, BlockOperation, make
from shmarray.handle import Handle, as_handle, wrap
from shmarray.ops.blocks import MapBlocks, map_blocks, planned
from shmarray.region import Box

__all__ = ["map_overlap", "overlap", "trim_internal", "trim_overlap"]

BOUNDARIES = ("none", "periodic", "reflect", "nearest")
_INT = (int, np.integer)
Depth = tuple[tuple[int, int], ...]  # per axis, before and after
Boundary = tuple[Any, ...]  # per axis, one of `BOUNDARIES` or a number


class _Halo:
    """Which boxes of an array hold a chunk with its halo, and how these become one array."""

    def __init__(self, chunks: Chunks, depth: Depth, boundary: Boundary) -> None:
        self.starts = [(0, *itertools.accumulate(sizes)) for sizes in chunks]
        self.depth, self.boundary = depth, boundary
        self.chunks: Chunks = tuple(
            tuple(size + sum(self._margin(axis, j)) for j, size in enumerate(sizes)) for axis, sizes in enumerate(chunks)
        )
        # Along these the far end of the array is next to a chunk: the array is read in more than one box.
        self.rounds = [axis for axis, kind in enumerate(boundary) if kind == "periodic" and any(depth[axis]) and len(self.starts[axis]) > 2]
        self.nboxes = 1 << len(self.rounds)

    def _margin(self, axis: int, j: int) -> tuple[int, int]:
        """Return how wide the halo of chunk ``j`` is before and after it."""
        before, after = self.depth[axis]
        if self.boundary[axis] != "none":
            return before, after
        return before if j else 0, after if j < len(self.starts[axis]) - 2 else 0

    def is_local(self, axis: int, j: int) -> tuple[bool, bool]:
        """Return whether the halo before chunk ``j``, and that behind it, is beyond the array and made of what is near."""
        if self.boundary[axis] == "none" or axis in self.rounds:
            return False, False
        before, after = self.depth[axis]
        return j == 0 and before > 0, j == len(self.starts[axis]) - 2 and after > 0

    def _pieces(self, axis: int, j: int) -> tuple[slice, slice]:
        """Return what of the axis is near chunk ``j``, and what is at the other end."""
        cuts, (before, after) = self.starts[axis], self.depth[axis]
        n, low, high = cuts[-1], cuts[j] - before, cuts[j + 1] + after
        near = slice(max(0, low), min(n, high))
        if axis in self.rounds and low < 0:
            return near, slice(n + low, n)
        if axis in self.rounds and high > n:
            return near, slice(0, high - n)
        return near, slice(0, 0)

    def boxes(self, index: tuple[int, ...]) -> tuple[Box, ...]:
        """Return the boxes of the array to be read for a chunk, some of them empty."""
        pieces = [self._pieces(axis, j) for axis, j in enumerate(index)]
        result = []
        for ends in itertools.product((0, 1), repeat=len(self.rounds)):
            end = dict(zip(self.rounds, ends, strict=True))
            result.append(tuple(piece[end.get(axis, 0)] for axis, piece in enumerate(pieces)))
        return tuple(result)

    def joined(self, index: tuple[int, ...], parts: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """Return the chunk with its halo: the first part as it is, where that is all."""
        local = [self.is_local(axis, j) for axis, j in enumerate(index)]
        if not any(map(any, local)) and not any(part.size for part in parts[1:]):
            return parts[0]
        near = parts[0].shape
        out = np.empty([self.chunks[axis][j] for axis, j in enumerate(index)], parts[0].dtype)
        # The far end comes before the first chunk of an axis and after the last one.
        firsts = [self.depth[axis][0] if (axis in self.rounds and j == 0) or local[axis][0] else 0 for axis, j in enumerate(index)]
        for ends, part in zip(itertools.product((0, 1), repeat=len(self.rounds)), parts, strict=True):
            if part.size:
                end = dict(zip(self.rounds, ends, strict=True))
                starts = [first if not end.get(axis) else (0 if index[axis] == 0 else near[axis]) for axis, first in enumerate(firsts)]
                out[tuple(slice(s, s + n) for s, n in zip(starts, part.shape, strict=True))] = part
        for axis, sides in enumerate(local):
            if any(sides):
                before, after = (width if here else 0 for width, here in zip(self.depth[axis], sides, strict=True))
                _fill(out.swapaxes(0, axis), self.boundary[axis], before, after)
        out.flags.writeable = False
        return out


def _fill(out: np.ndarray[Any, Any], kind: Any, before: int, after: int) -> None:
    """Fill the first and the last rows from those between."""
    stop = len(out) - after
    match kind:
        case "reflect":  # with the last item, which NumPy calls symmetric
            out[:before] = out[before : 2 * before][::-1]
            out[stop:] = out[stop - after : stop][::-1]
        case "nearest":
            out[:before] = out[before : before + 1]
            out[stop:] = out[stop - 1 : stop]
        case "periodic":
            out[:before] = out[stop - before : stop]
            out[stop:] = out[before : before + after]
        case _:
            out[:before] = kind
            out[stop:] = kind


class _Overlap(BlockOperation):
    """Every chunk with its halo, one after the other."""

    name = "overlap"

    def __init__(self, halo: _Halo) -> None:
        self.halo = halo
        self.starts = [(0, *itertools.accumulate(sizes)) for sizes in halo.chunks]

    def grid(self) -> Chunks:
        return self.halo.chunks

    def needs(self, at: Box) -> tuple[Box, ...]:
        return self.halo.boxes(self._index(at))

    def run(self, out: np.ndarray[Any, Any], inputs: tuple[np.ndarray[Any, Any], ...], at: Box) -> None:
        out[...] = self.halo.joined(self._index(at), inputs)

    def _index(self, at: Box) -> tuple[int, ...]:
        return tuple(cuts.index(piece.start) for cuts, piece in zip(self.starts, at, strict=True))


class _MapOverlap(MapBlocks):
    """A user's function of chunks with halos; ``trims``: what of its result, per axis and chunk, to leave away before and behind."""

    called = "map_overlap"

    def __init__(self, fields: tuple[Any, ...], halos: Sequence[_Halo], trims: Sequence[Sequence[tuple[int, int]]] | None) -> None:
        super().__init__(*fields)
        self.halos, self.trims = halos, trims
        if trims is not None:
            self.sizes = tuple(
                tuple(size - sum(trim) for size, trim in zip(sizes, axis, strict=True))
                for sizes, axis in zip(self.sizes, trims, strict=True)
            )
            self.starts = [[0, *itertools.accumulate(sizes)] for sizes in self.sizes]

    def needs(self, at: Box) -> tuple[Box, ...]:
        chunks = self._chunks(self._index(at))
        return tuple(box for halo, chunk in zip(self.halos, chunks, strict=True) for box in halo.boxes(chunk))

    def asks_once(self, k: int) -> tuple[tuple[int, ...], ...] | None:
        return None

    def run(self, out: np.ndarray[Any, Any], inputs: tuple[np.ndarray[Any, Any], ...], at: Box) -> None:
        index = self._index(at)
        parts = iter(inputs)
        whole = [
            halo.joined(chunk, [next(parts) for _ in range(halo.nboxes)])
            for halo, chunk in zip(self.halos, self._chunks(index), strict=True)
        ]
        result = self._result(whole, at)
        if self.trims is not None and result.ndim == len(index):
            trims = [axis[j] for axis, j in zip(self.trims, index, strict=True)]
            full = tuple(n + sum(trim) for n, trim in zip(out.shape, trims, strict=True))
            if result.shape != full and math.prod(result.shape) != 1:
                raise ValueError(
                    f"{self.name} gave shape {result.shape} for chunk {index}, expected {full}: what it was given, halo and all. "
                    f"Say what it gives with chunks=, drop_axis= or new_axis=, or give it trim=False and let it leave the halo away."
                )
            if result.shape == full:
                result = result[tuple(slice(b, n - a) for n, (b, a) in zip(full, trims, strict=True))]
        self._put(result, out, at)

    def scratch(self, at: Box) -> int:
        # A chunk at an end of the array with its halo, of each input.
        return sum(math.prod(max(sizes) for sizes in halo.chunks) * self.dtype.itemsize for halo in self.halos)


# --- arguments ---------------------------------------------------------------------------------------------------------------


def _depth_of(depth: Any, ndim: int) -> Depth:
    """Return the depth per axis, from an int, a tuple of one per axis, or a dict; each an int or (before, after)."""
    if depth is None or isinstance(depth, _INT):
        each: dict[int, Any] = dict.fromkeys(range(ndim), depth or 0)
    elif isinstance(depth, Mapping):
        each = {_axis(axis, ndim, "depth", depth): value for axis, value in depth.items()}
    else:
        each = dict(enumerate(depth))
        if len(each) > ndim:
            raise ValueError(f"depth={depth!r} has {len(each)} entries, the array {ndim} axes")
    result = []
    for axis in range(ndim):
        value = each.get(axis, 0)
        pair = (value, value) if isinstance(value, _INT) else tuple(value)
        if len(pair) != 2 or any(not isinstance(v, _INT) or v < 0 for v in pair):
            raise ValueError(f"depth={depth!r}: along axis {axis} it is {value!r}; give an int from 0 on, or such a pair (before, after)")
        result.append((int(pair[0]), int(pair[1])))
    return tuple(result)


def _boundary_of(boundary: Any, ndim: int) -> Boundary:
    """Return the boundary per axis, from one for all, a tuple of one per axis, or a dict."""
    if isinstance(boundary, Mapping):
        each = {_axis(axis, ndim, "boundary", boundary): value for axis, value in boundary.items()}
    elif isinstance(boundary, tuple):
        each = dict(enumerate(boundary))
    else:
        each = dict.fromkeys(range(ndim), boundary)
    kinds = tuple("none" if each.get(axis) is None else each[axis] for axis in range(ndim))
    for kind in kinds:
        if isinstance(kind, str) and kind not in BOUNDARIES:
            raise ValueError(f"boundary={boundary!r}: give {', '.join(map(repr, BOUNDARIES))} or a number, not {kind!r}")
    return kinds


def _axis(axis: Any, ndim: int, name: str, given: Any) -> int:
    if not isinstance(axis, _INT) or not -ndim <= axis < ndim:
        raise ValueError(f"{name}={given!r}: {axis!r} is no axis of an array of {ndim}")
    return int(axis) % ndim


def _wide_enough(x: Handle, depth: Depth, allow_rechunk: bool) -> Chunks:
    """Return the chunks of ``x``, small ones put together until none is smaller than the halo. Raises ChunkError."""
    result = []
    for axis, (sizes, pair) in enumerate(zip(x.chunks, depth, strict=True)):
        least = max(pair)
        if least > x.shape[axis]:
            raise ChunkError(f"depth {least} along axis {axis} is more than the {x.shape[axis]} items the array has there")
        if min(sizes) >= least:
            result.append(sizes)
            continue
        if not allow_rechunk:
            raise ChunkError(
                f"depth {least} along axis {axis} is more than the smallest of its chunks {sizes}: rechunk the array, or give "
                f"allow_rechunk=True"
            )
        wide: list[int] = []
        for size in sizes:
            if wide and wide[-1] < least:
                wide[-1] += size
            else:
                wide.append(size)
        if wide[-1] < least:
            wide[-2:] = [sum(wide[-2:])]
        result.append(tuple(wide))
    return tuple(result)


def _aligned(arrays: Sequence[Any]) -> list[Any]:
    """Return the arrays with chunks that begin where those of any of them do, axis by axis from the last."""
    edges: dict[int, set[int]] = {}
    for a in arrays:
        for k, sizes in enumerate(reversed(a.chunks)):
            edges.setdefault(k, set()).update(itertools.accumulate(sizes) if sum(sizes) != 1 else ())
    result = []
    for a in arrays:
        chunks = []
        for k, (n, sizes) in enumerate(zip(reversed(a.shape), reversed(a.chunks), strict=True)):
            cuts = sorted({0, n, *(edge for edge in edges[k] if edge < n)})
            chunks.append(tuple(b - a for a, b in itertools.pairwise(cuts)) if n > 1 else sizes)
        result.append(a.rechunk(tuple(reversed(chunks))))
    return result


# --- what users call ---------------------------------------------------------------------------------------------------------


def overlap(x: Any, depth: Any, boundary: Any, *, allow_rechunk: bool = True) -> Any:
    """Return ``x`` with every chunk grown by items of its neighbours: ``depth`` of them, an int, a tuple or a dict of axis to int or pair.

    ``boundary``: what is beyond the array, for all axes, in a tuple or a dict: "reflect" (mirrored with the last item), "periodic",
    "nearest" (the last item), a number, or "none" (nothing: chunks at the ends grow on one side). Shape and chunks grow accordingly.
    Chunks smaller than the depth are put together, or raise ChunkError unless ``allow_rechunk``.

    >>> import shmarray as sa
    >>> x = sa.overlap.overlap(sa.arange(4, chunks=2), depth=1, boundary="periodic")
    >>> x.compute(), x.chunks
    (array([3, 0, 1, 2, 1, 2, 3, 0]), ((4, 4),))
    """
    x = as_handle(x)
    pairs, kinds = _depth_of(depth, x.ndim), _boundary_of(boundary, x.ndim)
    halo = _Halo(_wide_enough(x, pairs, allow_rechunk), pairs, kinds)
    return _grown(x, halo)


def _grown(x: Any, halo: _Halo) -> Any:
    operation = _Overlap(halo)
    shape = tuple(sum(sizes) for sizes in halo.chunks)
    return wrap(make(Block, shape, x.dtype, operation, (x.node,) * halo.nboxes, ("overlap", operation)), halo.chunks)


class _Trim:
    """Leaves the halo of a chunk away."""

    def __init__(self, trims: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.trims = trims
        self.__name__ = "trim"

    def __call__(self, block: np.ndarray[Any, Any], block_id: tuple[int, ...]) -> np.ndarray[Any, Any]:
        pairs = [axis[j] for axis, j in zip(self.trims, block_id, strict=True)]
        return block[tuple(slice(b, n - a) for n, (b, a) in zip(block.shape, pairs, strict=True))]


def _trims(counts: Sequence[int], depth: Depth, boundary: Boundary) -> list[list[tuple[int, int]]]:
    """Return, per axis and chunk, how wide the halo before and behind it is."""
    return [
        [(b if kind != "none" or j else 0, a if kind != "none" or j < count - 1 else 0) for j in range(count)]
        for count, (b, a), kind in zip(counts, depth, boundary, strict=True)
    ]


def trim_internal(x: Any, axes: Any, boundary: Any = None) -> Any:
    """Return ``x`` without the halos that `overlap` has given its chunks, with the depths ``axes`` and the same ``boundary``.

    >>> import shmarray as sa
    >>> x = sa.overlap.overlap(sa.arange(4, chunks=2), depth=1, boundary=0)
    >>> sa.overlap.trim_internal(x, {0: 1}, 0).compute()
    array([0, 1, 2, 3])
    """
    x = as_handle(x)
    trims = _trims([len(sizes) for sizes in x.chunks], _depth_of(axes, x.ndim), _boundary_of(boundary, x.ndim))
    chunks = tuple(
        tuple(size - b - a for size, (b, a) in zip(sizes, axis, strict=True)) for sizes, axis in zip(x.chunks, trims, strict=True)
    )
    if any(size < 0 for sizes in chunks for size in sizes):
        raise ChunkError(f"trim_internal(axes={axes!r}): chunks {x.chunks} are smaller than what is to be left away")
    return map_blocks(_Trim(trims), x, chunks=chunks, dtype=x.dtype)


def trim_overlap(x: Any, depth: Any, boundary: Any = None) -> Any:
    """Return ``x`` without the halos of its chunks: `trim_internal` under its public name in dask."""
    return trim_internal(x, depth, boundary)


def map_overlap(
    func: Callable[..., Any],
    *args: Any,
    depth: Any = None,
    boundary: Any = None,
    trim: bool = True,
    align_arrays: bool = True,
    allow_rechunk: bool = True,
    name: str | None = None,
    token: str | None = None,
    dtype: Any = None,
    meta: Any = None,
    chunks: Any = None,
    drop_axis: Any = (),
    new_axis: Any = None,
    enforce_ndim: bool = False,
    **kwargs: Any,
) -> Any:
    """Return an array whose chunks are ``func`` of the chunks of the arrays in ``args``, each with ``depth`` items of its neighbours.

    ``depth`` and ``boundary`` as in `overlap`; lists of them, of one for each array. What the function returns has the shape of what
    it is given; with ``trim`` the halo is left away afterwards, without it the function has to (and its result has the chunk's own shape).
    ``align_arrays``: cut the arrays at each other's chunks first. Other arguments are those of `map_blocks`; ``dtype`` None: that of
    ``meta``, or else found out by a call on small arrays.

    The function runs in worker processes and sees read-only arrays: views of a stored array, whose chunks lie side by side, but at the ends
    of an axis with a boundary. What it computes in the halo is thrown away; of an expression the halo is computed once more.
    Raises TypeError, ValueError and ChunkError naming what does not fit.

    >>> import shmarray as sa
    >>> def slope(x):
    ...     return (np.roll(x, -1) - np.roll(x, 1)) / 2
    >>> import numpy as np
    >>> x = sa.array([1.0, 4.0, 9.0, 16.0], chunks=2)
    >>> sa.map_overlap(slope, x, depth=1, boundary="nearest").compute()
    array([1.5, 4. , 6. , 3.5])
    """
    if not callable(func):
        raise TypeError(f"map_overlap takes a function, then arrays: map_overlap(function, x, y); got {type(func).__name__}: {func!r}")
    if not args or not all(isinstance(a, (Handle, np.ndarray)) for a in args):
        kinds = ", ".join(type(a).__name__ for a in args) or "none"
        raise TypeError(
            f"map_overlap({getattr(func, '__name__', func)}, ...) takes arrays after the function, got {kinds}; give others by name"
        )
    arrays = [as_handle(a) for a in args]
    given = [list(v) if isinstance(v, list) else [v] * len(arrays) for v in (depth, boundary)]
    for what, values in zip(("depth", "boundary"), given, strict=True):
        if len(values) != len(arrays):
            raise ValueError(f"map_overlap({what}={values!r}): a list has one entry for each of the {len(arrays)} arrays")
    depths = [_depth_of(d, a.ndim) for d, a in zip(given[0], arrays, strict=True)]
    kinds_of = [_boundary_of(b, a.ndim) for b, a in zip(given[1], arrays, strict=True)]
    if align_arrays:
        arrays = _aligned(arrays)
    # One grid for all: wide enough for the deepest halo along an axis, counted from the last.
    deepest = [
        max((d[-1 - k] for d, a in zip(depths, arrays, strict=True) if k < a.ndim), key=max) for k in range(max(a.ndim for a in arrays))
    ]
    wide = []
    for a in arrays:
        shared = tuple(deepest[a.ndim - 1 - axis] if a.shape[axis] > 1 else (0, 0) for axis in range(a.ndim))
        wide.append(a.rechunk(_wide_enough(a, shared, allow_rechunk)))
    halos = [_Halo(a.chunks, d, kind) for a, d, kind in zip(wide, depths, kinds_of, strict=True)]
    lead = max(range(len(arrays)), key=lambda k: (arrays[k].ndim, -k))  # whose halo is trimmed
    if dtype is None and meta is not None:
        dtype = np.asarray(meta).dtype if not hasattr(meta, "dtype") else meta.dtype
    if not trim and chunks is None:
        chunks = wide[0].chunks
    grown = tuple(_grown(a, halo) for a, halo in zip(wide, halos, strict=True))
    probe = [tuple(1 + b + a for b, a in d) for d in depths]
    fields = planned("map_overlap", func, grown, kwargs, dtype, chunks, drop_axis, new_axis, probe)
    trims = _result_trims(len(fields[4]), fields[4], depths[lead], kinds_of[lead], drop_axis, new_axis) if trim else None
    operation = _MapOverlap(fields, halos, trims)
    if any(size < 0 for sizes in operation.sizes for size in sizes):
        raise ChunkError(f"map_overlap(chunks={chunks!r}) says less than the halo of depth {depth!r} that is left away; give trim=False")
    shape = tuple(sum(sizes) for sizes in operation.sizes)
    nodes = tuple(a.node for a, halo in zip(wide, halos, strict=True) for _ in range(halo.nboxes))
    return wrap(make(Block, shape, operation.dtype, operation, nodes, ("map_overlap", operation)), operation.sizes)


def _result_trims(ndim: int, sizes: Chunks, depth: Depth, boundary: Boundary, drop_axis: Any, new_axis: Any) -> list[list[tuple[int, int]]]:
    """Return the trims of the result, whose axes are those of the array with the most, without dropped and with new ones."""
    listed = [v if isinstance(v, (tuple, list)) else () if v is None else (v,) for v in (drop_axis, new_axis)]
    dropped = {int(v) % len(depth) for v in listed[0]} if depth else set()
    pairs = [(d, kind) for axis, (d, kind) in enumerate(zip(depth, boundary, strict=True)) if axis not in dropped]
    for axis in sorted(int(v) % max(1, ndim) for v in listed[1]):
        pairs.insert(axis, ((0, 0), "none"))
    pairs = (pairs + [((0, 0), "none")] * ndim)[:ndim]
    return _trims([len(axis) for axis in sizes], tuple(d for d, _ in pairs), tuple(kind for _, kind in pairs))
