"""Expressions: immutable, interned nodes. Equal nodes are one object, so that shared work is found by identity.

Promises: a node knows its shape, dtype and inputs, and never changes. Two nodes are the same object exactly when operation,
inputs and the type and bit pattern of every parameter agree (1, True and 1.0 differ; so do 0.0 and -0.0).
Nothing here runs, allocates or knows of chunks. Walks are iterative: a loop of a thousand ``x = x + 1`` is a deep graph.
Never put here: what an operation means (``ops``), how nodes become work (``optimise``, ``plan``).
"""

from __future__ import annotations

import struct
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from shmarray.region import Box, IndexMap

if TYPE_CHECKING:
    from shmarray.storage import Storage

__all__ = [
    "Accumulate",
    "Assemble",
    "Block",
    "BlockOperation",
    "Elementwise",
    "Expr",
    "Fill",
    "FillOperation",
    "Foreign",
    "Held",
    "InMemory",
    "Reduction",
    "Reshape",
    "Scan",
    "Stored",
    "View",
    "exact",
    "inherit_line",
    "line_of",
    "make",
    "postorder",
    "user_line",
]

_interned: weakref.WeakValueDictionary[tuple[Any, ...], Expr] = weakref.WeakValueDictionary()
_lines: weakref.WeakKeyDictionary[Expr, str] = weakref.WeakKeyDictionary()
_NOT_THE_USER = ("shmarray", "scheduler", "numpy", "contextlib", "functools")  # whose frames are passed over


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Expr:
    """A node: what it gives (shape, dtype)."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def inputs(self) -> tuple[Expr, ...]:
        """The nodes this one is made of."""
        return ()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def name(self) -> str:
        """What errors, graphs and ``repr`` call it."""
        return type(self).__name__.lower()


@dataclass(frozen=True, slots=True, eq=False)
class Stored(Expr):
    """Bytes of a stored array, as they were at ``version`` (None: as they are when read)."""

    storage: Storage
    offset: int  # bytes from the start of the extent
    strides: tuple[int, ...]
    version: int | None


class Held:
    """A NumPy array of the user's, known by identity: read where it lies, kept alive as long as it is needed.

    ``file``: that of a mapped one (`np.memmap`), which is read from outside alone: where the file has become shorter, a worker that
    copies gets an error, and whoever touches the memory a SIGBUS.
    """

    __slots__ = ("__weakref__", "array", "file")

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.file = _mapped_file(array)


def _mapped_file(array: Any) -> str:
    """Return the file that an array is a mapping of; empty for memory."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return str(array.filename or "an open file")
        array = array.base
    return ""


@dataclass(frozen=True, slots=True, eq=False)
class InMemory(Expr):
    """A NumPy array in the driver's private memory."""

    held: Held


@dataclass(frozen=True, slots=True, eq=False)
class Foreign(Expr):
    """A box, from index ``origin`` on, of something with shape, dtype and slicing that only the driver can read: h5py, zarr, ..."""

    source: Any
    origin: tuple[int, ...]


class FillOperation:
    """What makes elements from their position alone: ``zeros``, ``arange``, random numbers."""

    name = "fill"
    cost = 1

    def fill(self, out: np.ndarray[Any, Any], starts: tuple[int, ...], steps: tuple[int, ...]) -> None:
        """Write the elements at indices ``starts[a] + k * steps[a]`` into ``out``, whose axes are this array's."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class Fill(Expr):
    """An array made from positions."""

    operation: FillOperation
    key: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.operation.name


@dataclass(frozen=True, slots=True, eq=False)
class View(Expr):
    """A basic index, transpose or broadcast of ``x``."""

    x: Expr
    map: IndexMap

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.x,)


@dataclass(frozen=True, slots=True, eq=False)
class Reshape(Expr):
    """The elements of ``x`` in C order, under another shape."""

    x: Expr

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.x,)


@dataclass(frozen=True, slots=True, eq=False)
class Elementwise(Expr):
    """Output ``index`` of a row of the elementwise table, on operands that broadcast to ``shape``.

    ``args`` mixes nodes and scalars: Python scalars stay Python's (weak), NumPy scalars keep their dtype. ``errstate`` is what
    ``np.errstate`` said, where it differs from the default, when the expression was built.
    """

    op: str
    args: tuple[Any, ...]
    params: tuple[tuple[str, Any], ...] = ()
    index: int = 0
    errstate: tuple[tuple[str, str], ...] = ()

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return tuple(a for a in self.args if isinstance(a, Expr))

    @property
    def name(self) -> str:
        return self.op


@dataclass(frozen=True, slots=True, eq=False)
class Reduction(Expr):
    """A row of the reduction table over ``axes`` of ``x``; reduced axes stay, of length 1 (``keepdims`` is a view on top)."""

    kind: str
    x: Expr
    axes: tuple[int, ...]
    params: tuple[tuple[str, Any], ...] = ()

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.x,)

    @property
    def name(self) -> str:
        return _REDUCTIONS_OF_UFUNCS.get(self.kind, self.kind)


@dataclass(frozen=True, slots=True, eq=False)
class Scan(Expr):
    """The running result of a ufunc along one axis: ``cumsum`` is that of ``add``. ``errstate`` as in `Elementwise`."""

    ufunc: str
    x: Expr
    axis: int
    errstate: tuple[tuple[str, str], ...] = ()

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.x,)

    @property
    def name(self) -> str:
        return f"{self.ufunc}.accumulate"


@dataclass(frozen=True, slots=True, eq=False)
class Accumulate(Expr):
    """Cells, of this shape, that items are added to with ``ufunc``: histograms, ``bincount``, ``ufunc.at``.

    ``data``: of one shape; a coordinate for each of ``tables``, the edges of bins along each axis of the cells (1-d, each a leaf or a
    node with memory), or without tables an index for each axis; then, when ``has_values``, what is added, else 1. ``is_at``: items are
    added as ``ufunc.at`` does, negative indices count from the end.
    """

    label: str
    ufunc: str
    data: tuple[Expr, ...]
    tables: tuple[Expr, ...] = ()
    has_values: bool = False
    is_at: bool = False

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (*self.data, *self.tables)

    @property
    def name(self) -> str:
        return self.label


class BlockOperation:
    """Anything else that can say which part of its inputs a part of its output needs, and fill it in place.

    ``grid`` gives the sizes, per output axis, of the blocks it must be asked for. ``memory_inputs`` says that inputs must lie in
    memory rather than be computed within the task. ``isolated``: a user's function, kept out of the driver.
    """

    name = "block"
    isolated = False
    memory_inputs = False

    def grid(self) -> tuple[tuple[int, ...], ...]:
        raise NotImplementedError

    def needs(self, at: Box) -> tuple[Box, ...]:
        """Return the box of every input that the box ``at`` of the output needs."""
        raise NotImplementedError

    def asks_once(self, k: int) -> tuple[tuple[int, ...], ...] | None:
        """Return, per axis, the edges of the boxes of input ``k`` that `needs` asks for, when each is asked for exactly once."""
        return None

    def run(self, out: np.ndarray[Any, Any], inputs: tuple[np.ndarray[Any, Any], ...], at: Box) -> None:
        """Fill ``out``, the box ``at`` of the output."""
        raise NotImplementedError

    def rounds(self, at: Box) -> Iterator[tuple[Box, ...]]:
        """Yield the boxes that ``run`` is given, and then, one after the other, ``add``. If not said otherwise all at once."""
        yield self.needs(at)

    def add(self, out: np.ndarray[Any, Any], inputs: tuple[np.ndarray[Any, Any], ...], at: Box, k: int) -> None:
        """Go on with ``out``, which holds what the rounds before came to, in round ``k`` (the first one, of ``run``, is 0)."""
        raise NotImplementedError

    def scratch(self, at: Box) -> int:
        """Return the bytes of temporaries a round needs for ``at``."""
        return 0

    def cost(self, at: Box) -> int:
        """Return the bytes that filling ``at`` is worth in time; 0 when unknown."""
        return 0

    def label(self, at: Box) -> str:
        """Name a block in errors."""
        return str(tuple((s.start, s.stop) for s in at))


@dataclass(frozen=True, slots=True, eq=False)
class Block(Expr):
    """An operation with ``needs`` and ``run``."""

    operation: BlockOperation
    args: tuple[Expr, ...]
    key: tuple[Any, ...]

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.args

    @property
    def name(self) -> str:
        return self.operation.name


@dataclass(frozen=True, slots=True, eq=False)
class Assemble(Expr):
    """An array written piece by piece, later pieces over earlier ones: ``concatenate``, ``roll``, ``x[region] = ...``.

    ``maps[k]`` says where in this array the elements of ``pieces[k]`` go (broadcast to the map's shape).
    """

    pieces: tuple[Expr, ...]
    maps: tuple[IndexMap, ...]
    label: str = "assemble"
    disjoint: bool = False  # no piece covers another: they can be written in any order

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.pieces

    @property
    def name(self) -> str:
        return self.label


_REDUCTIONS_OF_UFUNCS = {"add": "sum", "multiply": "prod", "minimum": "min", "maximum": "max", "logical_or": "any", "logical_and": "all"}

N = TypeVar("N", bound=Expr)


def make(cls: Callable[..., N], *args: Any, **fields: Any) -> N:
    """Return the one node with these fields; its line is the user's line that asked for it first."""
    key = (cls, *(exact(a) for a in args), *((k, exact(v)) for k, v in fields.items()))
    node = _interned.get(key)
    if node is None:
        node = cls(*args, **fields)
        _interned[key] = node
    if node not in _lines:
        _lines[node] = user_line()
    return node  # type: ignore[return-value]  # the key holds the class


def inherit_line(node: N, source: Expr) -> N:
    """Return ``node``, made in place of ``source`` by a rewrite, with the line that built that."""
    if node is not source and source in _lines:
        _lines[node] = _lines[source]
    return node


def line_of(node: Expr) -> str:
    """Return the user's line, ``file:number``, that built ``node``."""
    return _lines.get(node, "")


def user_line() -> str:
    """Return ``file:number`` of the innermost caller outside this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_THE_USER:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def exact(value: Any) -> Any:
    """Return a hashable that equals another one exactly when type and bits of the values do.

    Nodes and other objects count by identity; a node that holds them keeps them alive, so that an identity is not reused.
    """
    kind = type(value)
    if kind is tuple:
        return (tuple, *(exact(v) for v in value))
    if kind is int or kind is bool or kind is str or kind is bytes or value is None:
        return (kind, value)
    if kind is float:
        return (float, struct.pack("<d", value))
    if kind is complex:
        return (complex, struct.pack("<dd", value.real, value.imag))
    if isinstance(value, np.dtype):
        return (np.dtype, value.str if value.names is None else value)
    if isinstance(value, np.generic):
        return (kind, value.dtype.str, value.tobytes())
    if isinstance(value, IndexMap):
        return (IndexMap, value.shape, value.offsets, value.axes)
    if isinstance(value, slice):
        return (slice, exact(value.start), exact(value.stop), exact(value.step))
    if isinstance(value, type):
        return value
    return (kind, id(value))


def postorder(roots: Iterable[Expr], inputs: Callable[[Expr], Iterable[Expr]] | None = None) -> Iterator[Expr]:
    """Yield every node below ``roots`` once, inputs before those that use them."""
    seen: set[Expr] = set()
    for root in roots:
        stack: list[tuple[Expr, Iterator[Expr]]] = []
        if root not in seen:
            seen.add(root)
            stack.append((root, iter(root.inputs if inputs is None else inputs(root))))
        while stack:
            node, rest = stack[-1]
            for child in rest:
                if child not in seen:
                    seen.add(child)
                    stack.append((child, iter(child.inputs if inputs is None else inputs(child))))
                    break
            else:
                stack.pop()
                yield node
