"""Random arrays: ``sa.random.default_rng(seed)``, with NumPy's methods.

Promises: the numbers depend on the seed and on how many arrays were drawn before, never on chunks, tiles or workers. An array is cut,
in C order, into blocks of `STREAM_ITEMS` items; each block has a Philox stream of its own: key from the seed, counter from (draw,
block). Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
Never put here: global state; there is no ``sa.random.seed``.
"""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from shmarray.chunks import normalize_chunks
from shmarray.dtypes import checked_dtype
from shmarray.expr import Block, BlockOperation, Expr, Fill, FillOperation, make
from shmarray.handle import wrap
from shmarray.region import Box
from shmarray.tiles import map_grid

__all__ = ["Generator", "default_rng", "stepped"]

STREAM_ITEMS = 1 << 15  # changing this changes every random number
KEPT_BLOCKS = 8
_WITH_OUT = ("random", "standard_normal")

_step: ContextVar[Expr | None] = ContextVar("shmarray_step", default=None)


@contextmanager
def stepped(number: Expr) -> Iterator[None]:
    """Have arrays that are drawn inside be drawn anew for each step of a simulation, of which ``number``, without axes, is the number."""
    token = _step.set(number)
    try:
        yield
    finally:
        _step.reset(token)


class _Stream(FillOperation):
    """One draw: a method of ``numpy.random.Generator`` and its arguments, over the items of ``shape``."""

    cost = 10

    def __init__(
        self, key: tuple[int, int], draw: int, method: str, kwargs: dict[str, Any], shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self.key, self.draw, self.method, self.kwargs, self.shape, self.dtype = key, draw, method, kwargs, shape, dtype
        self.step = 0  # the fourth word of the counter: 0 outside simulations
        self.name = f"random.{method}"
        self.blocks: OrderedDict[int, np.ndarray[Any, Any]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "blocks": OrderedDict()}

    def _block(self, number: int) -> np.ndarray[Any, Any]:
        """Return the items of block ``number``; neighbours are asked for one after the other, so a few are kept."""
        found = self.blocks.get(number)
        if found is None:
            count = min(STREAM_ITEMS, math.prod(self.shape) - number * STREAM_ITEMS)
            found = self._bits(number, count)
            self.blocks[number] = found
            while len(self.blocks) > KEPT_BLOCKS:
                try:
                    self.blocks.popitem(last=False)
                except KeyError:
                    break  # another thread was quicker
        return found

    def _bits(self, number: int, into: np.ndarray[Any, Any] | int) -> np.ndarray[Any, Any]:
        """Draw block ``number``, into an array or as a new one of so many items."""
        bits = np.random.Philox(key=np.array(self.key, np.uint64), counter=np.array([0, number, self.draw, self.step], np.uint64))
        method = getattr(np.random.Generator(bits), self.method)
        return np.asarray(method(size=into, **self.kwargs) if isinstance(into, int) else method(out=into, **self.kwargs))

    def _run(self, out: np.ndarray[Any, Any], start: int) -> None:
        """Write consecutive items from flat index ``start``."""
        done = 0
        while done < len(out):
            number, offset = divmod(start + done, STREAM_ITEMS)
            if offset == 0 and len(out) - done >= STREAM_ITEMS and self.method in _WITH_OUT and out.dtype == self.dtype:
                self._bits(number, out[done : done + STREAM_ITEMS])  # a whole block: no copy
                done += STREAM_ITEMS
                continue
            piece = self._block(number)[offset : offset + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)

    def fill(self, out: np.ndarray[Any, Any], starts: tuple[int, ...], steps: tuple[int, ...]) -> None:
        if not out.size:
            return
        # Axes from the innermost outwards that are taken whole and in order make runs of consecutive items.
        inner = out.ndim
        run = 1
        while inner and steps[inner - 1] == 1 and out.shape[inner - 1] == self.shape[inner - 1]:
            inner -= 1
            run *= out.shape[inner]
        if inner and steps[inner - 1] == 1:
            inner -= 1
            run *= out.shape[inner]
        flat = np.zeros((), np.int64)
        for axis in range(out.ndim):
            count = out.shape[axis] if axis < inner else 1
            flat = flat[..., None] * self.shape[axis] + (starts[axis] + np.arange(count) * steps[axis])
        heads = flat.reshape(-1)
        target = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
        rows = target.reshape(len(heads), run)
        if run > 1 or len(heads) < 64:
            for row, head in zip(rows, heads.tolist(), strict=True):
                self._run(row, head)
        else:
            numbers, offsets = np.divmod(heads, STREAM_ITEMS)
            for number in np.unique(numbers):
                mine = numbers == number
                rows[mine, 0] = self._block(int(number))[offsets[mine]]
        if target is not out:
            out[...] = target


class _SteppedStream(BlockOperation):
    """One draw in each step: the number of the step, an input without axes, is part of the counter."""

    def __init__(self, stream: _Stream) -> None:
        self.stream = stream
        self.name = stream.name
        grid = map_grid(stream.shape)
        self.sizes = tuple(tuple(grid.lengths(axis)) for axis in range(len(stream.shape)))

    def grid(self) -> tuple[tuple[int, ...], ...]:
        return self.sizes

    def needs(self, at: Box) -> tuple[Box, ...]:
        return ((),)

    def run(self, out: np.ndarray[Any, Any], inputs: tuple[np.ndarray[Any, Any], ...], at: Box) -> None:
        step = int(inputs[0]) + 1
        stream = self.stream
        if stream.step != step:  # threads have steps of their own at hand
            stream = _Stream(stream.key, stream.draw, stream.method, stream.kwargs, stream.shape, stream.dtype)
            stream.step = step
            self.stream = stream
        stream.fill(out, tuple(piece.start for piece in at), (1,) * out.ndim)

    def cost(self, at: Box) -> int:
        items: int = math.prod(piece.stop - piece.start for piece in at)
        return 8 * _Stream.cost * items


class Generator:
    """Draws arrays. Two generators of one seed draw the same arrays in the same order of calls."""

    def __init__(self, seed: Any = None) -> None:
        sequence = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
        first, second = sequence.generate_state(2, np.uint64).tolist()
        self._key = (first, second)
        self._draws = 0

    def __repr__(self) -> str:
        return f"Generator(Philox, {self._draws} drawn)"

    def _draw(self, method: str, size: Any, chunks: Any, **kwargs: Any) -> Any:
        shape = () if size is None else tuple(operator.index(n) for n in (size if isinstance(size, (tuple, list)) else (size,)))
        if any(n < 0 for n in shape):
            raise ValueError(f"negative dimensions are not allowed: size {shape}")
        for name, value in kwargs.items():
            if np.ndim(value):
                raise TypeError(
                    f"{method}({name}=...) takes a number here, got an array of shape {np.shape(value)}; scale the result instead"
                )
        probe = np.asarray(getattr(np.random.Generator(np.random.Philox(0)), method)(size=1, **kwargs))  # the errors are NumPy's
        kind = checked_dtype(probe.dtype)
        operation = _Stream(self._key, self._draws, method, kwargs, shape, kind)
        self._draws += 1
        sizes = normalize_chunks(chunks, shape, kind)
        number = _step.get()
        if number is not None:
            drawn = _SteppedStream(operation)
            return wrap(make(Block, shape, kind, drawn, (number,), (drawn,)), sizes)
        return wrap(make(Fill, shape, kind, operation, (operation,)), sizes)

    def random(self, size: Any = None, dtype: Any = np.float64, *, chunks: Any = "auto") -> Any:
        """Return floats in [0, 1).

        >>> import shmarray as sa
        >>> x = sa.random.default_rng(7).random(1000)
        >>> y = sa.random.default_rng(7).random(1000, chunks=10)
        >>> bool((x == y).all())
        True
        """
        return self._draw("random", size, chunks, dtype=np.dtype(dtype))

    def integers(
        self, low: int, high: int | None = None, size: Any = None, dtype: Any = np.int64, endpoint: bool = False, *, chunks: Any = "auto"
    ) -> Any:
        """Return integers in [low, high), or [0, low) when ``high`` is None; with ``high`` when ``endpoint``."""
        return self._draw("integers", size, chunks, low=low, high=high, dtype=np.dtype(dtype), endpoint=endpoint)

    def uniform(self, low: float = 0.0, high: float = 1.0, size: Any = None, *, chunks: Any = "auto") -> Any:
        """Return floats in [low, high)."""
        return self._draw("uniform", size, chunks, low=low, high=high)

    def normal(self, loc: float = 0.0, scale: float = 1.0, size: Any = None, *, chunks: Any = "auto") -> Any:
        """Return normally distributed floats of mean ``loc`` and standard deviation ``scale``."""
        return self._draw("normal", size, chunks, loc=loc, scale=scale)

    def standard_normal(self, size: Any = None, dtype: Any = np.float64, *, chunks: Any = "auto") -> Any:
        """Return normally distributed floats of mean 0 and standard deviation 1."""
        return self._draw("standard_normal", size, chunks, dtype=np.dtype(dtype))

    def exponential(self, scale: float = 1.0, size: Any = None, *, chunks: Any = "auto") -> Any:
        """Return exponentially distributed floats of mean ``scale``."""
        return self._draw("exponential", size, chunks, scale=scale)

    def poisson(self, lam: float = 1.0, size: Any = None, *, chunks: Any = "auto") -> Any:
        """Return Poisson-distributed integers of mean ``lam``."""
        return self._draw("poisson", size, chunks, lam=lam)


def default_rng(seed: Any = None) -> Generator:
    """Return a `Generator`; ``seed`` as for ``numpy.random.default_rng`` (an int, a sequence of ints, a SeedSequence, None)."""
    return seed if isinstance(seed, Generator) else Generator(seed)
