"""What the user holds, without its methods: an expression, or a part of a stored array, under a chunk grid.

Promises: a handle on an expression can be given another expression (``x += 1``); one on a stored array always reads what is
there now. `wrap` makes the public `Array`, which `array` registers here, so that ``ops`` can return one without knowing it.
While a step is traced (`linking`), a view of an expression is linked to it, and each sees what is written into the other, as in memory.
Never put here: operations, computing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from shmarray.chunks import Chunks, default_chunks
from shmarray.dtypes import checked_dtype
from shmarray.expr import Expr, Held, InMemory, Stored, make
from shmarray.storage import Layout, Storage

__all__ = [
    "Chosen",
    "Handle",
    "Link",
    "as_handle",
    "as_node",
    "in_memory",
    "is_linking",
    "linking",
    "note_values",
    "refuse_masked",
    "register",
    "value_of",
    "wrap",
    "wrap_linked",
    "wrap_stored",
]

_factory: list[type[Handle]] = []
_held: weakref.WeakValueDictionary[int, Held] = weakref.WeakValueDictionary()
Looked = list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
_looked_at: ContextVar[Looked | None] = ContextVar("shmarray_looked_at", default=None)


@contextmanager
def linking() -> Iterator[Looked]:
    """Have views of expressions that are made inside be linked to these: for code written for arrays that have memory.

    Gives a list of the NumPy arrays whose values are part of what was made, each with a copy (`note_values`).
    """
    looked: Looked = []
    token = _looked_at.set(looked)
    try:
        yield looked
    finally:
        _looked_at.reset(token)


def is_linking() -> bool:
    """Whether views of expressions are linked to these here."""
    return _looked_at.get() is not None


def note_values(value: Any) -> None:
    """Note that values of an array of NumPy's are looked at here, once, by code that is called once for many times."""
    looked = _looked_at.get()
    if looked is None:
        return
    if isinstance(value, Handle) and value._storage is None and isinstance(value.node, InMemory):
        value = value.node.held.array
    if isinstance(value, np.ndarray):
        looked.append((value, value.copy()))


@dataclass(frozen=True, slots=True)
class Link:
    """What a view is a view of; ``read``: the view of an expression; ``write``: an expression with another where the view is."""

    base: Handle
    read: Callable[[Expr], Expr]
    write: Callable[[Expr, Expr], Expr]


class Handle:
    """An expression, or a part of a storage, with the visible chunk grid."""

    __slots__ = ("__weakref__", "_chunks", "_layout", "_link", "_live", "_node", "_storage")

    _node: Expr | None
    _storage: Storage | None
    _layout: Layout | None
    _link: Link | None
    _chunks: Chunks
    _live: bool

    @property
    def node(self) -> Expr:
        """The expression; of a stored array its bytes as they are at this moment."""
        if self._storage is None:
            if self._link is not None:
                return self._link.read(self._link.base.node)
            assert self._node is not None
            return self._node
        layout = self._layout
        assert layout is not None
        version = None if self._live else self._storage.version
        return make(Stored, layout.shape, layout.dtype, self._storage, layout.offset, layout.strides, version)

    def _assign(self, node: Expr) -> None:
        """Have the values of this handle on an expression be those of ``node``, of the same shape and dtype."""
        if self._link is None:
            self._node = node
        else:
            self._link.base._assign(self._link.write(self._link.base.node, node))

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each axis."""
        return self._layout.shape if self._layout is not None else self._node.shape  # type: ignore[union-attr]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the elements."""
        return self._layout.dtype if self._layout is not None else self._node.dtype  # type: ignore[union-attr]

    @property
    def chunks(self) -> Chunks:
        """The sizes of the chunks along each axis."""
        return self._chunks

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)


class Chosen:
    """What stands for elements of which it is not known yet how many there are; `apply` computes with them, elementwise."""

    __slots__ = ()

    def apply(self, name: str, args: tuple[Any, ...], params: dict[str, Any]) -> Any:
        raise NotImplementedError


def register(cls: type[Handle]) -> None:
    """Name the class that `wrap` makes."""
    _factory[:] = [cls]


def wrap(node: Expr, chunks: Chunks | None = None) -> Any:
    """Return an `Array` on an expression."""
    handle = _factory[0].__new__(_factory[0])
    handle._node, handle._storage, handle._layout, handle._live, handle._link = node, None, None, False, None
    handle._chunks = default_chunks(node.shape, node.dtype) if chunks is None else chunks
    return handle


def wrap_stored(storage: Storage, layout: Layout, chunks: Chunks | None = None, *, live: bool = False) -> Any:
    """Return an `Array` on part of a storage."""
    handle = _factory[0].__new__(_factory[0])
    handle._node, handle._storage, handle._layout, handle._live, handle._link = None, storage, layout, live, None
    handle._chunks = default_chunks(layout.shape, layout.dtype) if chunks is None else chunks
    return handle


def wrap_linked(link: Link, chunks: Chunks | None = None) -> Any:
    """Return an `Array` on a view of an expression, through which that is written."""
    handle = wrap(link.read(link.base.node), chunks)
    handle._link = link
    return handle


def value_of(x: Handle) -> Any:
    """Return an `Array` of the values ``x`` has now, on a handle of its own: what is done to it in place does not reach ``x``."""
    return wrap(x.node, x.chunks)


def in_memory(array: np.ndarray[Any, Any]) -> InMemory:
    """Return the node of a NumPy array, read where it lies."""
    held = _held.get(id(array))
    if held is None or held.array is not array:
        held = _held[id(array)] = Held(array)
    return make(InMemory, array.shape, array.dtype, held)


def refuse_masked(value: Any, what: str = "operand") -> None:
    """Raise TypeError for a masked array: its mask would be dropped in silence."""
    if type(value) is not np.ndarray and isinstance(value, np.ndarray) and hasattr(value, "filled"):
        raise TypeError(f"{what} is a masked array, whose mask would be lost: give m.filled(value), or np.asarray(m)")


def as_node(value: Any, what: str = "operand") -> Expr | Any:
    """Return the node of an array-like, or the scalar itself. Raises TypeError for what is no array and no number."""
    if isinstance(value, Handle):
        return value.node
    if isinstance(value, (bool, int, float, complex, np.generic)):
        if isinstance(value, np.generic):
            checked_dtype(value.dtype, what)
        return value
    refuse_masked(value, what)
    array = np.asarray(value)
    try:
        checked_dtype(array.dtype, what)
    except TypeError:
        raise TypeError(f"{what} of type {type(value).__name__} is not an array of numbers: {value!r}"[:300]) from None
    return in_memory(array) if array.ndim else array[()]


def as_handle(value: Any) -> Any:
    """Return an `Array` over any array-like; NumPy arrays are read where they lie."""
    if isinstance(value, Handle):
        return value
    node = as_node(value)
    return wrap(node if isinstance(node, Expr) else in_memory(np.asarray(node)))
