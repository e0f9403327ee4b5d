"""`Array`: what the user holds. NumPy's operators, attributes and protocols on a handle; each method is one line of ``ops``.

Promises: lazy unless it is stored; ``+=`` and ``x[...] =`` on a stored array write its bytes, seen by every alias and view, at
once; on an expression they put a new expression into this handle.
Never put here: what an operation means, how it runs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scheduler.limits import format_bytes
from shmarray import compute as running
from shmarray.chunks import Chunks, chunk_box, normalize_chunks
from shmarray.explain import Explanation, explain
from shmarray.expr import Expr, line_of, postorder, user_line
from shmarray.handle import Handle, Link, as_handle, is_linking, register, value_of, wrap, wrap_linked, wrap_stored
from shmarray.ops import accumulators, blocks, creation, elementwise, linalg, masked, overlap, reductions, shaping
from shmarray.ops.gather import is_traced
from shmarray.ops.table import ROWS
from shmarray.plan import Target
from shmarray.region import broadcast_shape, index_map, is_broadcast
from shmarray.shared_memory import SharedArray, SharedStorage, allocate, stored, view_of_storage
from shmarray.storage import Layout
from shmarray.travel import pack, unpack

if TYPE_CHECKING:
    import networkx

__all__ = ["Array"]

NDArray = np.ndarray[Any, Any]


class Array(Handle):
    """A chunked array: lazy, or stored in shared memory. Made by functions such as `zeros`, `asarray` and `from_array`.

    >>> import shmarray as sa
    >>> x = sa.ones((1000, 1000), chunks=(100, 1000))
    >>> y = (x + 1).sum(axis=0)
    >>> y.compute()[:3]
    array([2000., 2000., 2000.])
    """

    __slots__ = ()

    __array_priority__ = 100

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("Array is not made directly; use sa.array, sa.asarray, sa.from_array, sa.zeros, ...")

    # --- what it is --------------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """The bytes of one element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """The bytes of all elements, stored or not."""
        return self.size * self.dtype.itemsize

    @property
    def chunksize(self) -> tuple[int, ...]:
        """The largest chunk along each axis."""
        return tuple(max(c, default=0) for c in self.chunks)

    @property
    def numblocks(self) -> tuple[int, ...]:
        """How many chunks along each axis."""
        return tuple(len(c) for c in self.chunks)

    @property
    def npartitions(self) -> int:
        """How many chunks."""
        return math.prod(self.numblocks)

    @property
    def is_stored(self) -> bool:
        """Whether its bytes lie in shared memory, so that computing it costs nothing."""
        return self._storage is not None

    @property
    def blocks(self) -> blocks.BlockView:
        """The chunks, by index: ``x.blocks[0, 1]``."""
        return blocks.BlockView(self)

    @property
    def T(self) -> Array:  # noqa: N802  # NumPy's name
        """The array with its axes reversed."""
        return self.transpose()

    @property
    def mT(self) -> Array:  # noqa: N802  # NumPy's name
        """The array with its last two axes exchanged."""
        exchanged: Array = shaping.swapaxes(self, -1, -2)
        return exchanged

    @property
    def real(self) -> Any:
        """The real part; of a stored array a view."""
        return self._part(0) if self.dtype.kind == "c" else self

    @real.setter
    def real(self, value: Any) -> None:
        self._set_part("real", value)

    @property
    def imag(self) -> Any:
        """The imaginary part; of a stored complex array a view."""
        return self._part(1) if self.dtype.kind == "c" else creation.zeros_like(self)

    @imag.setter
    def imag(self, value: Any) -> None:
        self._set_part("imag", value)

    def _part(self, which: int) -> Any:
        name = "imag" if which else "real"
        if self._storage is None or self._layout is None:
            if not is_linking():
                return elementwise.apply(name, self)

            def refuse(node: Expr, values: Expr) -> Expr:
                raise TypeError(
                    f"writing the {name} part of an array in a step of iterate(), at {user_line()}: write the whole of it, v + 1j * w"
                )

            return wrap_linked(Link(self, lambda node: elementwise.apply(name, wrap(node)).node, refuse), self.chunks)
        half = np.empty(0, self.dtype).real.dtype
        layout = Layout(self._layout.offset + which * half.itemsize, self.shape, self._layout.strides, half)
        return wrap_stored(self._storage, layout, self.chunks, live=self._live)

    def _set_part(self, name: str, value: Any) -> None:
        if self._storage is not None and self.dtype.kind == "c":
            getattr(self, name)[...] = value
        else:
            state = "stored" if self.is_stored else "an expression"
            raise TypeError(f"the {name} part can be set on a stored complex array; this one is {state}, of dtype {self.dtype}")

    @property
    def live(self) -> Array:
        """This stored array for expressions meant to read whatever is there when they are computed."""
        if self._storage is None or self._layout is None:
            raise TypeError("only a stored array is live; an expression has no memory that could change")
        live: Array = wrap_stored(self._storage, self._layout, self.chunks, live=True)
        return live

    @property
    def flat(self) -> Iterator[Any]:
        """An iterator over the elements, computed first."""
        return iter(np.asarray(self).flat)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __repr__(self) -> str:
        if self._storage is not None:
            state = "stored on disk" if self._storage.is_spilled else "stored"
        else:
            pending = sum(1 for n in postorder([self.node]) if n.inputs)
            state = f"{pending} operation{'s' * (pending != 1)} pending"
        grid = "x".join(str(n) for n in self.numblocks) or "1"
        return (
            f"shmarray.Array(shape={self.shape}, dtype={self.dtype}, chunksize={self.chunksize}, "
            f"{grid} chunk{'s' * (self.npartitions != 1)}, {format_bytes(self.nbytes)}, {state})"
        )

    # --- computing ---------------------------------------------------------------------------------------------------------

    def compute(self, scheduler: str | None = None, out: Any = None, progress: bool | None = None) -> Any:
        """Return the values: a fresh, writable NumPy array of the caller's own; a NumPy scalar when 0-d.

        Of a stored array: a read-only view, without a copy, whose values never change (a later write moves the array). ``out``: a
        stored array or a NumPy array to write the values to, which is returned. ``scheduler``: "processes", "threads" or
        "synchronous"; None: ``config.scheduler``, else by the amount of work. ``progress``: whether to show how far it is, as in
        `ProgressBar`; None: ``config.progress``.
        """
        if out is not None:
            with running.asked(progress):
                self._compute_into(out, scheduler)
            return out
        return running.compute(self, scheduler=scheduler, progress=progress)[0]

    def _compute_into(self, out: Any, scheduler: str | None) -> None:
        if not isinstance(out, (Array, np.ndarray)):
            raise TypeError(f"compute(out=...) takes a stored array or a NumPy array, got {type(out).__name__}")
        if out.shape != self.shape:
            raise ValueError(f"compute(out=...) of shape {self.shape} into an array of shape {out.shape}")
        if not np.can_cast(self.dtype, out.dtype, "same_kind"):
            raise TypeError(f"Cannot cast output from {self.dtype!r} to {out.dtype!r} with casting rule 'same_kind'")
        if isinstance(out, Array):
            out._overwrite(self.node, scheduler)
        elif running.goes_straight(self.node, out):
            node = elementwise.astype(wrap(self.node), out.dtype).node
            running.run([node], [Target(out.shape, out.dtype, array=out)], scheduler)
        else:
            np.copyto(out, running.values_of(self, scheduler), casting="same_kind")

    def _overwrite(self, node: Expr, scheduler: str | None = None) -> None:
        """Make this array's values those of ``node``: in its memory when stored, else in this handle."""
        if node.shape != self.shape:
            node = shaping.broadcast_to(wrap(node), self.shape).node
        if self._storage is not None:
            self._check_writable()
            running.write(self, node, scheduler)
        else:
            self._assign(elementwise.astype(wrap(node), self.dtype).node)

    def _check_writable(self) -> None:
        if self._layout is not None and self.size and is_broadcast(self.shape, self._layout.strides):
            raise ValueError(f"assignment destination is read-only: shape {self.shape} is a broadcast, whose elements share memory")

    def persist(self, scheduler: str | None = None, progress: bool | None = None) -> Array:
        """Return it as a stored array, computed now; itself when it is stored. ``progress`` as in `compute`."""
        persisted: Array = running.persist(self, scheduler=scheduler, progress=progress)[0]
        return persisted

    def copy(self, order: str = "C") -> Array:
        """Return a stored copy, computed now; within a step that is being traced, a copy of the expression."""
        if is_linking() or (self._storage is None and running.is_traced(self.node)):
            traced: Array = wrap(self.node, self.chunks)
            return traced
        if self._storage is None:
            return self.persist()
        copied: Array = running.copied(self)
        return copied

    __copy__ = copy

    def shared(self) -> SharedArray:
        """Return the values as a NumPy array of `shmarray.shared`: a view of the same memory where this is over some, else a copy."""
        if isinstance(self._storage, SharedStorage) and self._layout is not None:
            return view_of_storage(self._storage, self._layout)
        array = allocate(self.shape, self.dtype, self.chunks)
        stored(array)._overwrite(self.node)
        return array

    def __deepcopy__(self, memo: dict[int, Any]) -> Array:
        return self.copy() if self.is_stored else wrap(self.node, self.chunks)

    def __reduce__(self) -> Any:
        if isinstance(self._storage, SharedStorage):
            return stored, (self.shared(), self.chunks, self._storage.is_watched)
        if self._storage is not None:
            return running.new_stored, (np.asarray(self), self.chunks)
        return _rebuild, (pack(self.node), self.chunks)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        if copy is False and self._storage is None:
            raise ValueError("an expression has no memory to give without computing: np.asarray(x, copy=False) needs a stored array")
        if copy is False and self._storage is not None and self._storage.is_spilled:
            raise ValueError(f"np.asarray(x, copy=False) of an array of shape {self.shape} in the spill file: its bytes have to be copied")
        if copy is False and dtype is not None and np.dtype(dtype) != self.dtype:
            raise ValueError(f"np.asarray(x, {np.dtype(dtype)}, copy=False) of an array of {self.dtype}: another dtype needs a copy")
        values = running.values_of(self)
        wanted = values if dtype is None else values.astype(dtype, copy=False)
        return wanted.copy() if copy and wanted is values and self._storage is not None else wanted

    def _scalar(self, kind: Callable[[Any], Any]) -> Any:
        if self.size != 1:
            if kind is bool:
                raise ValueError("The truth value of an array with more than one element is ambiguous. Use a.any() or a.all()")
            raise TypeError(f"only length-1 arrays can be converted to Python scalars, this one has shape {self.shape}")
        return kind(running.values_of(self).reshape(())[()])

    def __bool__(self) -> bool:
        return bool(self._scalar(bool))

    def __float__(self) -> float:
        return float(self._scalar(float))

    def __int__(self) -> int:
        return int(self._scalar(int))

    def __complex__(self) -> complex:
        return complex(self._scalar(complex))

    def __index__(self) -> int:
        if self.ndim or self.dtype.kind not in "iub":
            raise TypeError("only integer scalar arrays can be converted to a scalar index")
        return int(running.values_of(self)[()].__index__())

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec and not self.shape else super().__format__(spec)

    def item(self, *args: int) -> Any:
        """Return one element as a Python number."""
        return np.asarray(self).item(*args)

    def tolist(self) -> Any:
        """Return the values as nested lists."""
        return np.asarray(self).tolist()

    def __iter__(self) -> Iterator[Any]:
        if not self.shape:
            raise TypeError("iteration over a 0-d array")
        source = self if self.is_stored or running.is_traced(self.node) else self.persist()
        return (source[i] for i in range(len(self)))

    def __contains__(self, value: Any) -> bool:
        return bool((self == value).any())

    def graph(self) -> networkx.DiGraph[int]:
        """Return the expression as a graph: a node per operation (name, shape, dtype, line), an edge from each input."""
        import networkx  # 0.13 s: only for whoever asks

        graph: networkx.DiGraph[int] = networkx.DiGraph()
        numbers: dict[Expr, int] = {}
        for node in postorder([self.node]):
            numbers[node] = len(numbers)
            graph.add_node(numbers[node], name=node.name, shape=node.shape, dtype=str(node.dtype), line=line_of(node))
            for position, x in enumerate(node.inputs):
                graph.add_edge(numbers[x], numbers[node], input=position)
        return graph

    def plan(self) -> Any:
        """Return what computing would run: layers, buffers, dependencies. ``to_networkx()`` gives its graph."""
        return running.plan_of([self.node])

    def explain(self, code: bool = False) -> Explanation:
        """Return, as text, what computing would run: layers, engines, bytes moved, why each is one of its own. ``code``: see `explain`."""
        return explain(self, code=code)

    # --- chunks ------------------------------------------------------------------------------------------------------------

    def rechunk(self, chunks: Any = "auto", balance: bool = False, **ignored: Any) -> Array:
        """Return the array under another chunk grid. Nothing is computed and no bytes move.

        ``balance``: sizes along an axis that differ by at most one. Raises ChunkError when chunks do not tile the shape.
        """
        sizes = normalize_chunks(chunks, self.shape, self.dtype, self.chunks)
        if balance:
            sizes = tuple(_balanced(sum(c), len(c)) for c in sizes)
        if self._storage is not None and self._layout is not None:
            stored: Array = wrap_stored(self._storage, self._layout, sizes, live=self._live)
            return stored
        lazy: Array = wrap(self.node, sizes)
        return lazy

    def map_blocks(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Array:
        """Return an array whose chunks are ``func`` of this one's; see `map_blocks`."""
        mapped: Array = blocks.map_blocks(func, self, *args, **kwargs)
        return mapped

    def map_overlap(self, func: Callable[..., Any], depth: Any, boundary: Any = None, trim: bool = True, **kwargs: Any) -> Array:
        """Return an array whose chunks are ``func`` of this one's with items of their neighbours; see `map_overlap`."""
        mapped: Array = overlap.map_overlap(func, self, depth=depth, boundary=boundary, trim=trim, **kwargs)
        return mapped

    @contextlib.contextmanager
    def lock(self, chunk: Any = None, mode: str = "w", timeout: float | None = None, *, accept_torn: bool = False) -> Iterator[NDArray]:
        """Give chunk ``chunk`` of a stored array (None: all of it) as a live NumPy view, under its lock, for a ``with`` block.

        ``mode`` "w": one writer and nobody else; "r": readers together, the view is read-only. Others that touch these cells,
        computations as well, wait meanwhile; this thread does not wait for itself. While a writer is inside, the array's values
        are copies, not views. Of an array in the spill file it is a copy, which is written back at the end of the block. Do not use
        the view after the block. ``accept_torn``: take chunks that an update left half written as they are; after a block in mode "w"
        that raises nothing they count as whole. Raises IndexError when there is no such chunk, TypeError for an expression,
        TimeoutError after ``timeout`` seconds, TornChunkError.
        """
        if mode not in ("r", "w"):
            raise ValueError(f"lock(mode={mode!r}): the mode is 'r' to read or 'w' to write")
        if self._storage is None or self._layout is None:
            raise TypeError("lock() needs a stored array: persist() it first; an expression has no memory to guard")
        part = self if chunk is None else self[chunk_box(self.chunks, chunk if isinstance(chunk, (tuple, list)) else (chunk,))]
        storage, layout = part._storage, part._layout
        assert storage is not None and layout is not None
        with storage.hold(layout, mode, timeout):
            torn = [cell for cell in storage.cells_of(layout) if cell in storage.torn]
            if not accept_torn:
                storage.check_whole(layout)
            if mode == "w":
                storage.begin_write()
            try:
                view, held = storage.window(layout)
                view.flags.writeable = mode == "w"
                try:
                    yield view
                finally:
                    if mode == "w":
                        storage.put_back(layout, view, held)
                for cell in torn if mode == "w" else ():
                    storage.torn.pop(cell, None)
            finally:
                if mode == "w":
                    storage.end_write(layout, user_line())

    # --- indexing ----------------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Any:
        chosen = masked.choose(self, key) if is_linking() else None
        return shaping.getitem(self, key) if chosen is None else chosen

    def __setitem__(self, key: Any, value: Any) -> None:
        """Write ``value``, cast and broadcast, at ``key``: into the memory of a stored array, else into this handle's expression."""
        parts = key if isinstance(key, tuple) else (key,)
        if any(isinstance(p, (list, np.ndarray, Handle, bool, np.bool_)) for p in parts):
            if not masked.assign(self, key, value):
                self._set_fancy(key, as_handle(value))
            return
        value = as_handle(value)
        if self._storage is None:
            if value._link is None or value.node is not shaping.view_of(self, index_map(key, self.shape)).node:
                self._assign(shaping.setitem_node(self.node, key, value))
            # Else the last step of ``x[key] += y``: it has been written.
            return
        view = shaping.view_of(self, index_map(key, self.shape))
        if value._storage is view._storage and value._layout == view._layout:
            return  # the last step of ``x[key] += y``, which Python ends with an assignment: it has been written
        shaping._check_fits(value.shape, view.shape)
        while value.ndim > view.ndim:
            value = value[0]
        if view.size:
            view._overwrite(elementwise.astype(value, self.dtype).node)

    def _set_fancy(self, key: Any, value: Any) -> None:
        """A mask of this shape becomes a ``where``; integer arrays are one call of NumPy on the whole."""
        if isinstance(key, (Handle, np.ndarray)) and key.dtype == bool and key.shape == self.shape and value.ndim == 0:
            chosen = elementwise.where(key, elementwise.astype(value, self.dtype), self)
            self._overwrite(chosen.node)
            return
        parts = tuple(np.asarray(p) if isinstance(p, Handle) else p for p in (key if isinstance(key, tuple) else (key,)))
        given = np.asarray(value)
        if self._storage is None:
            values = np.array(running.values_of(self))
            values[parts if isinstance(key, tuple) else parts[0]] = given
            self._assign(as_handle(values).node)
            return
        self._check_writable()
        with self.lock() as memory:
            memory[parts if isinstance(key, tuple) else parts[0]] = given

    # --- NumPy's protocols -------------------------------------------------------------------------------------------------

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        outs = kwargs.pop("out", None)
        operands = (inputs[0], *inputs[2:]) if method == "at" else inputs  # the second is a key: slices, masks, ...
        if any(not _is_operand(x) for x in operands) or any(not isinstance(x, (Handle, np.ndarray)) and x is not None for x in outs or ()):
            return NotImplemented
        if method == "reduce":
            return _call_reduce(ufunc, inputs[0], outs, kwargs)
        if method == "accumulate":
            return reductions.accumulate(ufunc, inputs[0], **kwargs, out=outs[0] if outs else None)
        if method == "at" and isinstance(inputs[0], Array):
            x, *rest = inputs
            if x._storage is not None:
                x._check_writable()
                return accumulators.at(ufunc, x, *rest)
            parts = rest[0] if isinstance(rest[0], tuple) else rest[:1]
            if any(is_traced(p) for p in (x, *parts, *rest[1:])):
                return accumulators.at_traced(ufunc, x, *rest)
            values = np.array(running.values_of(x))
            ufunc.at(values, *[np.asarray(r) if isinstance(r, Handle) else r for r in rest], **kwargs)
            return x._overwrite(as_handle(values).node)
        if method == "outer":
            a, b = (as_handle(x) for x in inputs)
            wide = a[(..., *(None,) * b.ndim)] if a.ndim and b.ndim else a
            return self.__array_ufunc__(ufunc, "__call__", wide, b, **kwargs, **({"out": outs} if outs else {}))
        if method != "__call__" or ufunc.signature is not None:
            if method == "__call__" and ufunc is np.matmul and not kwargs:
                return linalg.matmul(inputs[0], inputs[1], out=outs)
            return _fallback(getattr(ufunc, method), inputs, {**kwargs, **({"out": outs} if outs else {})})
        if ufunc.__name__ not in ROWS or ROWS[ufunc.__name__].function is not ufunc:
            return _fallback(ufunc, inputs, {**kwargs, **({"out": outs} if outs else {})})
        kwargs = {k: v for k, v in kwargs.items() if not (k == "where" and v is True)}
        kwargs.pop("subok", None)
        kwargs.pop("order", None)
        casting = kwargs.get("casting", "same_kind")
        mask = kwargs.pop("where", None)
        if mask is None:
            result = elementwise.apply(ufunc.__name__, *inputs, **kwargs)
        else:
            other = outs[0] if outs and outs[0] is not None else 0
            if ufunc.nout > 1:
                raise TypeError(f"{ufunc.__name__}(where=...) of an shmarray array: ufuncs with several outputs take no where=")
            result = elementwise.apply(f"masked:{ufunc.__name__}", *inputs, mask, other, **kwargs)
        if not outs:
            return result
        results = result if isinstance(result, tuple) else (result,)
        if ufunc.nout > 1:
            results = running.persist(*results)  # all before the first is written: an output may be an input
        given = [elementwise.write_out(r, o, ufunc, casting) for r, o in zip(results, outs, strict=True)]
        return tuple(given) if ufunc.nout > 1 else given[0]

    def __array_function__(self, func: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
        if any(not issubclass(t, (Handle, np.ndarray)) and not hasattr(t, "__array__") for t in types):
            return NotImplemented
        ours = _table.get(func)
        if ours is not None and _takes(ours, args, kwargs):
            return ours(*args, **kwargs)
        return _fallback(func, args, kwargs)

    # --- methods -----------------------------------------------------------------------------------------------------------

    def astype(self, dtype: Any, order: str = "K", casting: str = "unsafe", subok: bool = True, copy: bool = True) -> Array:
        """Return the array with another dtype."""
        cast: Array = elementwise.astype(self, dtype, casting=casting, copy=copy)
        return cast

    def transpose(self, *axes: Any) -> Array:
        """Return the array with its axes reversed, or in the given order."""
        order = axes[0] if len(axes) == 1 and not isinstance(axes[0], (int, np.integer)) else (axes or None)
        moved: Array = shaping.transpose(self, order)
        return moved

    def reshape(self, *shape: Any, order: str = "C") -> Array:
        """Return the elements in C order under another shape; a view of a stored array where NumPy makes one."""
        new = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        reshaped: Array = shaping.reshape(self, new, order)
        return reshaped

    def flatten(self, order: str = "C") -> Array:
        """Return the elements in C order along one axis."""
        return value_of(shaping.ravel(self, order))  # type: ignore[no-any-return]

    def clip(self, min: Any = None, max: Any = None, out: Any = None) -> Any:
        """Return the array limited to [``min``, ``max``]."""
        result = elementwise.clip(self, min, max)
        return result if out is None else elementwise.write_out(result, out, np.positive, "same_kind")

    def round(self, decimals: int = 0, out: Any = None) -> Any:
        """Return the array rounded to ``decimals`` places."""
        return elementwise.round(self, decimals, out)

    def conj(self) -> Array:
        """Return the complex conjugate: of real numbers this array itself, as in NumPy."""
        return self if self.dtype.kind != "c" else elementwise.apply("conjugate", self)

    conjugate = conj

    def dot(self, b: Any, out: Any = None) -> Any:
        """Return the dot product with ``b``."""
        return linalg.dot(self, b, out)

    def nonzero(self) -> tuple[NDArray, ...]:
        """Return the indices of the elements that are not zero, computed now: how many there are decides the shape."""
        return np.asarray(self).nonzero()


def _delegate(module: Any, names: str) -> None:
    for name in names.split():
        setattr(Array, name, _method_of(name, getattr(module, name)))


def _method_of(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    method.__name__, method.__qualname__, method.__doc__ = name, f"Array.{name}", function.__doc__
    return method


_delegate(reductions, "sum prod mean std var min max any all argmin argmax cumsum cumprod ptp")
_delegate(shaping, "ravel squeeze swapaxes take")


def _operators() -> None:
    binary = {
        "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "floordiv": "floor_divide", "mod": "remainder",
        "pow": "power", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "lshift": "left_shift", "rshift": "right_shift",
        "divmod": "divmod", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal",
    }  # fmt: skip
    for short, name in binary.items():
        forward, backward, in_place = _binary_operator(name)
        setattr(Array, f"__{short}__", forward)
        if short not in ("lt", "le", "gt", "ge"):
            setattr(Array, f"__r{short}__", backward)
            if short != "divmod":
                setattr(Array, f"__i{short}__", in_place)
    for short, name in {"neg": "negative", "pos": "positive", "abs": "absolute", "invert": "invert"}.items():
        setattr(Array, f"__{short}__", _unary_operator(name))
    for short, name in {"eq": "equal", "ne": "not_equal"}.items():
        setattr(Array, f"__{short}__", _equality(name))

    def multiply(self: Any, other: Any) -> Any:
        return linalg.matmul(self, other) if _is_operand(other) else NotImplemented

    def multiply_right(self: Any, other: Any) -> Any:
        return linalg.matmul(other, self) if _is_operand(other) else NotImplemented

    def multiply_in_place(self: Any, other: Any) -> Any:
        self._overwrite(elementwise.astype(linalg.matmul(self, other), self.dtype, casting="same_kind").node)
        return self

    for name, method in (("matmul", multiply), ("rmatmul", multiply_right), ("imatmul", multiply_in_place)):
        setattr(Array, f"__{name}__", method)
    Array.__hash__ = None  # type: ignore[assignment]  # equality is elementwise, as for ndarray


def _binary_operator(name: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    apply = elementwise.power if name == "power" else functools.partial(elementwise.apply, name)

    def forward(self: Any, other: Any) -> Any:
        return apply(self, other) if _is_operand(other) else NotImplemented

    def backward(self: Any, other: Any) -> Any:
        return elementwise.apply(name, other, self) if _is_operand(other) else NotImplemented

    def in_place(self: Any, other: Any) -> Any:
        if not _is_operand(other):
            return NotImplemented
        # Live: what is updated is read under the locks of the write, so that two threads that add are both counted.
        mine = self if self._storage is None else self.live
        elementwise.write_out(apply(mine, other), self, getattr(np, name), "same_kind")
        return self

    return forward, backward, in_place


def _unary_operator(name: str) -> Callable[[Any], Any]:
    return lambda self: elementwise.apply(name, self)


def _equality(name: str) -> Callable[[Any, Any], Any]:
    """``==`` or ``!=``: elements that cannot be compared, such as numbers and strings, differ, as in NumPy; None differs from all."""

    def compare(self: Any, other: Any) -> Any:
        if _is_operand(other):
            try:
                return elementwise.apply(name, self, other)
            except np._core._exceptions._UFuncNoLoopError:  # type: ignore[attr-defined]  # NumPy's own comparison catches the same
                theirs = as_handle(other)
                if "V" in (self.dtype.kind, theirs.dtype.kind):
                    raise  # records, which NumPy compares field by field
                shape = broadcast_shape(self.shape, theirs.shape)
                return creation.full(shape, name == "not_equal", chunks=self.chunks if shape == self.shape else "auto")
        if other is None:
            return creation.full(self.shape, name == "not_equal", chunks=self.chunks)
        answer = getattr(type(other), "__eq__" if name == "equal" else "__ne__")(other, self)
        if answer is NotImplemented:  # Python would go on to compare identities, and give one bool for all
            raise TypeError(f"an array cannot be compared with {type(other).__name__}: {other!r}"[:300])
        return answer

    return compare


_operators()
register(Array)


def _is_operand(value: Any) -> bool:
    """Whether a value can stand in an expression; others get their say through ``NotImplemented``."""
    if isinstance(value, (Handle, np.ndarray, np.generic, bool, int, float, complex, str, bytes, list, tuple)):
        return True
    return hasattr(value, "__array__") and not hasattr(type(value), "__array_ufunc__")


def _call_reduce(ufunc: np.ufunc, x: Any, outs: Any, kwargs: dict[str, Any]) -> Any:
    kwargs = {k: v for k, v in kwargs.items() if not (k == "initial" and v is np._NoValue) and not (k == "where" and v is True)}
    return reductions.reduce_ufunc(ufunc, x, **kwargs, out=outs[0] if outs else None)


def _fallback(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a NumPy function that nobody has parallelised once, on the values; array results become Arrays."""

    def lower(value: Any) -> Any:
        if isinstance(value, Handle):
            return running.values_of(value) if value.ndim else running.values_of(value)[()]
        if isinstance(value, (list, tuple)) and any(isinstance(v, (Handle, list, tuple)) for v in value):
            lowered = [lower(v) for v in value]
            return type(value)(lowered) if type(value) in (list, tuple) else value
        return value

    def lift(value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.ndim and not value.dtype.hasobject:
            return as_handle(value)
        return tuple(lift(v) for v in value) if type(value) is tuple else value

    # An out= given by position gets its name.
    parameters = () if isinstance(func, np.ufunc) else _signature(func).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    place = names.index("out") if "out" in names else len(args)
    args, kwargs = args[:place], {**kwargs, **dict(zip(names[place:], args[place:], strict=False))}
    outs = kwargs.get("out")
    single = outs if not isinstance(outs, tuple) else outs[0]
    if isinstance(single, Array):
        rest = {k: v for k, v in kwargs.items() if k != "out"}
        return elementwise.write_out(as_handle(_fallback(func, args, rest)), single, np.positive, "same_kind")
    result = func(*lower(tuple(args)), **{k: lower(v) for k, v in kwargs.items()})
    return result if isinstance(single, np.ndarray) and result is single else lift(result)


@functools.lru_cache(maxsize=1024)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # written in C, and silent about it
        return _ANY_SIGNATURE


_ANY_SIGNATURE = inspect.signature(lambda *args, **kwargs: None)


def _takes(function: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a function of ours knows these arguments; what NumPy alone knows (``correction=``) is one call of NumPy."""
    try:
        _signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


_table: dict[Callable[..., Any], Callable[..., Any]] = {}


def answer_for(names: Mapping[str, Any]) -> None:
    """Let NumPy's functions of these names, called with an `Array`, be ours. The package says which, when it is imported."""
    for name, ours in names.items():
        theirs = getattr(np, name, None)
        if callable(theirs) and callable(ours) and not isinstance(theirs, (type, np.ufunc)):
            _table[theirs] = ours
    _table[np.shape] = lambda a: a.shape
    _table[np.ndim] = lambda a: a.ndim
    _table[np.size] = lambda a, axis=None: a.size if axis is None else a.shape[axis]
    _table[np.copyto] = _copyto


def _copyto(dst: Any, src: Any, casting: str = "same_kind", where: Any = True) -> None:
    source = as_handle(src)
    if where is not True:
        source = elementwise.where(where, source, dst)
    elementwise.write_out(source, dst, np.positive, casting)


def array_equal(a1: Any, a2: Any, equal_nan: bool = False) -> bool:
    """Return whether two arrays have the same shape and elements, computed now."""
    a, b = as_handle(a1), as_handle(a2)
    if a.shape != b.shape:
        return False
    same = a == b
    if equal_nan:
        same = same | ((a != a) & (b != b))
    return bool(same.all())


def allclose(a: Any, b: Any, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False) -> bool:
    """Return whether all elements are close, computed now; see `isclose`."""
    return bool(elementwise.isclose(a, b, rtol, atol, equal_nan).all())


def _balanced(n: int, count: int) -> tuple[int, ...]:
    size, extra = divmod(n, count)
    return tuple(size + (k < extra) for k in range(count))


def _rebuild(packed: Any, chunks: Chunks) -> Any:
    return wrap(unpack(packed), chunks)
