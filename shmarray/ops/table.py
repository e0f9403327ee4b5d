"""The table of elementwise operations: one row each, and the one place to add one.

A row is a NumPy function of operands that broadcast, with ``out=``. Its dtype rules, its casting and its warnings are NumPy's,
because the row *is* NumPy's function. Every ufunc of NumPy without a core signature has a row, with its own name.
Never put here: how rows become kernels (``kernels``), how arrays call them (``elementwise``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

__all__ = ["ROWS", "Row", "row_for"]

NDArray = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """``function(*operands, out=...)`` fills ``out`` (a tuple of arrays when ``nout`` > 1); ``numpy`` is NumPy's own function.

    ``in_place``: ``out`` may be an operand itself, as for every ufunc. ``weight``: time per item, in units of an addition.
    """

    name: str
    function: Callable[..., Any]
    nin: int
    numpy: Callable[..., Any]
    nout: int = 1
    in_place: bool = True
    weight: int = 1


_HEAVY = frozenset(
    {
        "sin",
        "cos",
        "tan",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
        "arcsinh",
        "arccosh",
        "arctanh",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "power",
        "float_power",
        "cbrt",
        "hypot",
        "arctan2",
        "logaddexp",
        "logaddexp2",
        "gcd",
        "lcm",
        "floor_divide",
        "remainder",
    }
)
_MIDDLE = frozenset(
    {
        "sqrt",
        "divide",
        "fmod",
        "divmod",
        "modf",
        "frexp",
        "ldexp",
        "reciprocal",
        "heaviside",
        "nextafter",
        "spacing",
    }
)


def _ufunc_rows() -> list[Row]:
    rows = {}
    for _, function in sorted(vars(np).items()):  # not dir(np): asking for each of those imports f2py, ma and more
        if isinstance(function, np.ufunc) and function.signature is None:
            canonical = function.__name__
            weight = 10 if canonical in _HEAVY else 4 if canonical in _MIDDLE else 1
            rows[canonical] = Row(canonical, function, function.nin, function, function.nout, True, weight)
    return list(rows.values())


def _cast(x: Any, out: NDArray) -> None:
    np.copyto(out, x, casting="unsafe")


def _where(condition: Any, x: Any, y: Any, out: NDArray) -> None:
    np.copyto(out, y, casting="unsafe")
    np.copyto(out, x, where=np.asarray(condition).astype(bool, copy=False), casting="unsafe")


def _masked(name: str) -> Callable[..., None]:
    """A ufunc with ``where=``: the last two operands are the mask and what stands where it is False."""
    ufunc = getattr(np, name)

    def run(*args: Any, out: NDArray) -> None:
        *operands, mask, other = args
        np.copyto(out, other, casting="unsafe")
        ufunc(*operands, out=out, where=mask, casting="unsafe")

    return run


def _masked_like(ufunc: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: ufunc(*args[:-2], **kwargs)


def _by_result(function: Callable[..., Any]) -> Callable[..., None]:
    """A NumPy function without ``out=``."""

    def run(*args: Any, out: NDArray, **kwargs: Any) -> None:
        np.copyto(out, function(*args, **kwargs), casting="unsafe")

    return run


def _out(function: Callable[..., Any]) -> Callable[..., None]:
    def run(*args: Any, out: NDArray, **kwargs: Any) -> None:
        function(*args, out=out, **kwargs)

    return run


def _round(x: Any, out: NDArray, **kwargs: Any) -> None:
    if out.dtype.kind in "iu":  # tens of integers: NumPy divides on the way, and not into an integer ``out``
        np.copyto(out, np.round(x, **kwargs), casting="unsafe")
    else:
        np.round(x, out=out, **kwargs)


def _digitize(x: Any, edges: bytes, edges_dtype: str, right: bool) -> Any:
    return np.digitize(x, np.frombuffer(edges, edges_dtype), right)


_REST = [
    Row("astype", _cast, 1, np.asarray, in_place=False),
    Row("where", _where, 3, np.where, in_place=False, weight=2),
    Row("clip", _out(np.clip), 3, np.clip, in_place=False, weight=2),
    Row("round", _round, 1, np.round, in_place=False, weight=4),
    Row("fix", _by_result(np.fix), 1, np.fix, in_place=False, weight=2),
    Row("real", _by_result(np.real), 1, np.real, in_place=False),
    Row("imag", _by_result(np.imag), 1, np.imag, in_place=False),
    Row("angle", _by_result(np.angle), 1, np.angle, in_place=False, weight=10),
    Row("isclose", _by_result(np.isclose), 2, np.isclose, in_place=False, weight=6),
    Row("nan_to_num", _by_result(np.nan_to_num), 1, np.nan_to_num, in_place=False, weight=4),
    Row("isneginf", _by_result(np.isneginf), 1, np.isneginf, in_place=False, weight=2),
    Row("isposinf", _by_result(np.isposinf), 1, np.isposinf, in_place=False, weight=2),
    Row("iscomplex", _by_result(np.iscomplex), 1, np.iscomplex, in_place=False),
    Row("isreal", _by_result(np.isreal), 1, np.isreal, in_place=False),
    Row("sinc", _by_result(np.sinc), 1, np.sinc, in_place=False, weight=12),
    Row("digitize", _by_result(_digitize), 1, _digitize, in_place=False, weight=12),
    Row("i0", _by_result(np.i0), 1, np.i0, in_place=False, weight=20),
]

ROWS = MappingProxyType({row.name: row for row in (*_ufunc_rows(), *_REST)})


def row_for(name: str) -> Row:
    """Return the row; ``masked:NAME`` is the ufunc NAME with a mask."""
    if name.startswith("masked:"):
        base = ROWS[name[7:]]
        return Row(name, _masked(base.name), base.nin + 2, _masked_like(base.numpy), 1, False, base.weight + 1)
    return ROWS[name]
