"""Elementwise functions of arrays: every row of the table under NumPy's name, and those made of rows.

Promises: NumPy's promotion, broadcasting and errors at the line that builds the expression; nothing runs.
To add an operation, add a row to ``ops/table.py``: its function appears here by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from shmarray.chunks import broadcast_chunks
from shmarray.dtypes import cast_dtype, checked_dtype, result_dtypes
from shmarray.expr import Elementwise, Expr, exact, make
from shmarray.handle import Chosen, Handle, as_handle, as_node, value_of, wrap
from shmarray.ops.table import ROWS, row_for
from shmarray.region import broadcast_shape

__all__ = ["ELEMENTWISE", "apply", "astype", "clip", "current_errstate", "isclose", "nan_to_num", "power", "round", "where", "write_out"]

_DEFAULT_ERRSTATE = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}


def apply(name: str, *args: Any, **params: Any) -> Any:
    """Return row ``name`` of array-likes and scalars: an `Array`, or a tuple of them where the row has several outputs."""
    row = row_for(name)
    for a in args:
        if isinstance(a, Chosen):
            return a.apply(name, args, params)
        if isinstance(a, np.matrix):
            raise TypeError(f"operand of {name} is a np.matrix, whose operators mean other things than an array's: give np.asarray(m)")
    nodes = [as_node(a, f"operand of {name}") for a in args]
    shape = broadcast_shape(*(n.shape for n in nodes if isinstance(n, Expr)))
    if "dtype" in params:
        params["dtype"] = checked_dtype(params["dtype"])
    given = tuple(n.dtype if isinstance(n, Expr) else n for n in nodes)
    dtypes = _inferred(_Call(name, given, tuple(params.items())))
    errstate = current_errstate()
    chunks = broadcast_chunks(shape, [(a.shape, a.chunks) for a in args if isinstance(a, Handle)])
    outputs = tuple(
        wrap(make(Elementwise, shape, dtypes[k], name, tuple(nodes), tuple(sorted(params.items())), k, errstate), chunks)
        for k in range(row.nout)
    )
    return outputs if row.nout > 1 else outputs[0]


def power(x: Any, exponent: Any) -> Any:
    """Return ``x ** exponent`` as NumPy's operator gives it: its square, square root or reciprocal, where that is what is asked."""
    name = "power"
    if isinstance(x, Handle) and type(exponent) in (int, float):
        if x.dtype.kind in "fc":
            name = {2: "square", 0.5: "sqrt", 1: "positive"}.get(exponent, name)
            if type(exponent) is int and exponent == -1:
                name = "reciprocal"
        elif x.dtype.kind in "biu" and type(exponent) is int and exponent == 2:
            name = "square"
    return apply(name, x, exponent) if name == "power" else apply(name, x)


def current_errstate() -> tuple[tuple[str, str], ...]:
    """Return what np.errstate says here, where that is not the default."""
    state = np.geterr()
    return () if state == _DEFAULT_ERRSTATE else tuple((k, str(v)) for k, v in state.items() if _DEFAULT_ERRSTATE[k] != v)


class _Call:
    """A hashable question to NumPy: which dtypes does this give?"""

    __slots__ = ("args", "key", "name", "params")

    def __init__(self, name: str, args: tuple[Any, ...], params: tuple[tuple[str, Any], ...]) -> None:
        self.name, self.args, self.params = name, args, params
        self.key = (name, exact(args), exact(params))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Call) and self.key == other.key


@lru_cache(maxsize=4096)
def _inferred(call: _Call) -> tuple[np.dtype[Any], ...]:
    return result_dtypes(row_for(call.name).numpy, call.args, dict(call.params))


def astype(x: Any, dtype: Any, *, casting: str = "unsafe", copy: bool = True) -> Any:
    """Return ``x`` with another dtype; ``copy=False``: ``x`` itself when it has that dtype.

    Raises TypeError when ``casting`` forbids it, as NumPy does.
    """
    x = as_handle(x)
    result = cast(x, dtype, casting)
    return value_of(x) if copy and result is x else result


def cast(x: Any, dtype: Any, casting: str = "unsafe") -> Any:
    """Return ``x`` with another dtype; ``x`` itself when it has that dtype."""
    x = as_handle(x)
    dtype = cast_dtype(x.dtype, dtype)
    if not np.can_cast(x.dtype, dtype, casting=casting):  # type: ignore[arg-type]
        raise TypeError(f"Cannot cast array data from {x.dtype!r} to {dtype!r} according to the rule {casting!r}")
    if dtype == x.dtype:
        return x
    return wrap(make(Elementwise, x.shape, dtype, "astype", (x.node,), (), 0, current_errstate()), x.chunks)


def where(condition: Any, x: Any = None, y: Any = None, /) -> Any:
    """Return elements of ``x`` where ``condition`` holds and of ``y`` elsewhere.

    >>> import shmarray as sa
    >>> sa.where(sa.arange(4) > 1, 10, 20).compute()
    array([20, 20, 10, 10])
    """
    if x is None and y is None:
        return tuple(as_handle(i) for i in np.nonzero(np.asarray(as_handle(condition))))
    if x is None or y is None:
        raise ValueError("either both or neither of x and y should be given")
    return apply("where", condition, x, y)


def clip(a: Any, a_min: Any = None, a_max: Any = None, out: Any = None, *, min: Any = None, max: Any = None) -> Any:
    """Return ``a`` limited to [``a_min``, ``a_max``]; either may be None. ``min=`` and ``max=`` are accepted as well."""
    a_min, a_max = a_min if min is None else min, a_max if max is None else max
    if a_min is None and a_max is None:
        return write_out(value_of(as_handle(a)), out)
    if a_min is None:
        return write_out(apply("minimum", a, a_max), out)
    if a_max is None:
        return write_out(apply("maximum", a, a_min), out)
    return write_out(apply("clip", a, a_min, a_max), out)


def round(a: Any, decimals: int = 0, out: Any = None) -> Any:
    """Return ``a`` rounded to ``decimals`` places, halves to even."""
    return write_out(apply("round", a, decimals=int(decimals)), out)


def isclose(a: Any, b: Any, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False) -> Any:
    """Return where ``|a - b| <= atol + rtol * |b|``."""
    return apply("isclose", a, b, rtol=rtol, atol=atol, equal_nan=equal_nan)


def nan_to_num(x: Any, copy: bool = True, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> Any:
    """Return ``x`` with NaN and infinities replaced."""
    return apply("nan_to_num", x, nan=nan, posinf=posinf, neginf=neginf)


def write_out(result: Any, out: Any, ufunc: np.ufunc = np.positive, casting: str = "same_kind") -> Any:
    """Return ``out``, an `Array` or a NumPy array, with the result written into it by NumPy's rules; the result itself without one.

    Raises TypeError for what is no array, for dtypes that ``casting`` forbids (``ufunc`` is named then), and ValueError for shapes.
    """
    if isinstance(out, tuple):
        (out,) = out
    if out is None:
        return result
    if not isinstance(out, (Handle, np.ndarray)):
        raise TypeError(f"return arrays must be of ArrayType: out= is {type(out).__name__}")
    result = as_handle(result)
    if broadcast_shape(result.shape, out.shape) != out.shape:
        raise ValueError(f"non-broadcastable output operand with shape {out.shape} doesn't match the broadcast shape {result.shape}")
    if not np.can_cast(result.dtype, out.dtype, casting=casting):  # type: ignore[arg-type]
        raise np._core._exceptions._UFuncOutputCastingError(ufunc, casting, result.dtype, out.dtype, 0)  # type: ignore[attr-defined]
    target: Any = out
    if isinstance(out, Handle):
        target._overwrite(astype(result, out.dtype).node)
    else:
        np.copyto(target, result.compute(), casting=casting)  # type: ignore[arg-type]
    return out


def _function(name: str) -> Callable[..., Any]:
    row = ROWS[name]

    def function(*args: Any, **kwargs: Any) -> Any:
        if len(args) == row.nin and not kwargs:
            return apply(name, *args)
        if isinstance(row.numpy, np.ufunc):
            if len(args) < row.nin:
                raise TypeError(f"{name}() takes {row.nin} positional argument{'s' * (row.nin != 1)} but {len(args)} were given")
            first = as_handle(args[0]) if not any(isinstance(a, Handle) for a in args) else args[0]
            return row.numpy(first, *args[1:], **kwargs)
        params = inspect.signature(row.numpy).bind(*args, **kwargs).arguments
        operands = [params.pop(k) for k in list(inspect.signature(row.numpy).parameters)[: row.nin]]
        out = params.pop("out", None)
        return write_out(apply(name, *operands, **params), out)

    if isinstance(row.numpy, np.ufunc) and row.nout == 1:
        function.at = row.numpy.at  # type: ignore[attr-defined]  # as NumPy's ufunc has it; it finds `Array.__array_ufunc__`
    own = (row.numpy.__doc__ or "").strip().split("\n\n")
    summary = next((p for p in own if p and not p.startswith(name + "(")), f"{name}, element by element.")
    function.__name__ = function.__qualname__ = name
    function.__doc__ = (
        f"{' '.join(summary.split())}\n\n    Lazy; operands broadcast, dtypes as NumPy's ``{name}``. ``out=``, ``where=`` and "
        f"``dtype=`` as there.\n"
    )
    return function


_OWN = {"digitize", "where", "clip", "round", "isclose", "nan_to_num", "astype"}
ELEMENTWISE: dict[str, Callable[..., Any]] = {name: _function(name) for name in ROWS if name not in _OWN}
for _alias, _target in sorted(vars(np).items()):
    if isinstance(_target, np.ufunc) and _target.signature is None and _alias not in ELEMENTWISE:
        ELEMENTWISE[_alias] = ELEMENTWISE[_target.__name__]
ELEMENTWISE |= {
    "where": where,
    "clip": clip,
    "round": round,
    "around": round,
    "isclose": isclose,
    "nan_to_num": nan_to_num,
    "astype": astype,
}
