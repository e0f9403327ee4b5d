"""Comparison, logic, bits, casts and selection, lane by lane. Values are NumPy's, bit by bit.

NaN and signs of zero are as NumPy's loops have them. Where those depend on the processor or on the place in an array (which of 0.0 and -0.0
`fmax` gives), so does what is here, but not on the place.
Never put here: arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir

from shmarray.kernels.llvm.lanes import BOOL, FLOAT16, Lanes, NotLowered, Vec, part_dtype
from shmarray.kernels.llvm.lowering import Call, Dtypes, as_given, lowers, to_result

Vecs = Sequence[Vec]


def _parts(x: Vec) -> list[Vec]:
    """Return the real parts of a value: one, or two."""
    return [Vec(part_dtype(x.dtype), p) for p in x.parts]


# ------------------------------------------------------------------------------------------------------------ comparison


def _compare(k: Lanes, op: str, x: Vec, y: Vec, *, complains: bool = False) -> ir.Value:
    """Return i1 lanes; complex values are ordered by their real, then by their imaginary parts, those with NaN not at all.

    ``complains``: of these, as NumPy's comparisons of complex values, and of them alone, do.
    """
    build = k.builder
    if x.imag is None:
        if x.dtype.kind != y.dtype.kind:  # int64 with uint64, which no dtype holds
            return _compare_signs(k, op, x, y)
        return k.compare(op, x, y)
    (a, b), (c, d) = _parts(x), _parts(y)
    if op == "==":
        return build.and_(k.compare(op, a, c), k.compare(op, b, d))
    if op == "!=":
        return build.or_(k.compare(op, a, c), k.compare(op, b, d))
    number = build.not_(build.or_(k.is_nan(b), k.is_nan(d)))
    first = build.and_(k.compare(op[0], a, c, complains=complains), number)
    return build.or_(first, build.and_(k.compare("==", a, c), k.compare(op, b, d, complains=complains)))


def _compare_signs(k: Lanes, op: str, x: Vec, y: Vec) -> ir.Value:
    signed = x if x.dtype.kind == "i" else y
    is_below = k.compare("<", signed, k.constant(0, signed.dtype))  # then it is less than any unsigned number
    unsigned = np.dtype(np.uint64)
    plain = k.compare(op, Vec(unsigned, x.real), Vec(unsigned, y.real))
    holds = {"==": False, "!=": True, "<": signed is x, "<=": signed is x, ">": signed is y, ">=": signed is y}[op]
    return k.builder.select(is_below, ir.Constant(is_below.type, [int(holds)] * k.count), plain)


def _comparison(name: str, op: str) -> None:
    @lowers(name)
    def emit(k: Lanes, xs: Vecs, call: Call) -> Vec:
        return Vec(BOOL, _compare(k, op, xs[0], xs[1], complains=True))


for _name, _op in {"equal": "==", "not_equal": "!=", "less": "<", "less_equal": "<=", "greater": ">", "greater_equal": ">="}.items():
    _comparison(_name, _op)


def _extreme(name: str, op: str, *, prefers_nan: bool) -> None:
    @lowers(name)
    def emit(k: Lanes, xs: Vecs, call: Call) -> Vec:
        x, y = xs
        if x.dtype.kind == "b":
            return Vec(BOOL, (k.builder.and_ if op == "<" else k.builder.or_)(x.real, y.real))
        # Of equal zeros the second, as processors' instructions do; loops of float16 and complex values take the first.
        takes_first = call.outs[0] == FLOAT16 or x.imag is not None
        take = _compare(k, op + "=" * takes_first, x, y)
        if x.dtype.kind in "fc":
            for part in _parts(x if prefers_nan else y):
                take = k.builder.or_(take, k.is_nan(part))
        return k.select(take, x, y)


for _name, _op in {"minimum": "<", "maximum": ">", "fmin": "<", "fmax": ">"}.items():
    _extreme(_name, _op, prefers_nan=not _name.startswith("f"))


@lowers("clip", dtypes=to_result)
def _clip(k: Lanes, xs: Vecs, call: Call) -> Vec:
    x = xs[0]
    if x.dtype.kind == "c":
        raise NotLowered("clip of complex")
    for op, bound in zip("<>", xs[1:], strict=True):
        take = k.compare(op, x, bound)
        if x.dtype.kind == "f":  # NaN in any of the three is NaN
            take = k.builder.or_(take, k.is_nan(bound))
        x = k.select(take, bound, x)
    return x


@lowers("heaviside")
def _heaviside(k: Lanes, xs: Vecs, call: Call) -> Vec:
    x, at_zero = xs
    zero, one = k.constant(0, x.dtype), k.constant(1, x.dtype)
    found = k.select(k.compare(">", x, zero), one, k.select(k.compare("<", x, zero), zero, x))
    return k.select(k.compare("==", x, zero), at_zero, found)


# ----------------------------------------------------------------------------------------------------------------- logic


def _logical(name: str, make: str) -> None:
    @lowers(name)
    def emit(k: Lanes, xs: Vecs, call: Call) -> Vec:
        return Vec(BOOL, getattr(k.builder, make)(*(k.truth(x) for x in xs)))


for _name, _make in {"logical_and": "and_", "logical_or": "or_", "logical_xor": "xor", "logical_not": "not_"}.items():
    _logical(_name, _make)


# ------------------------------------------------------------------------------------------------------------------ bits


def _bitwise(name: str, make: str) -> None:
    @lowers(name)
    def emit(k: Lanes, xs: Vecs, call: Call) -> Vec:
        return Vec(xs[0].dtype, getattr(k.builder, make)(*(x.real for x in xs)))


for _name, _make in {"bitwise_and": "and_", "bitwise_or": "or_", "bitwise_xor": "xor", "invert": "not_"}.items():
    _bitwise(_name, _make)


@lowers("bitwise_count")
def _bitwise_count(k: Lanes, xs: Vecs, call: Call) -> Vec:
    return k.convert(Vec(xs[0].dtype, k.intrinsic("llvm.ctpop", k.absolute(xs[0]).real)), call.outs[0])


@lowers("left_shift", "right_shift")
def _shift(k: Lanes, xs: Vecs, call: Call) -> Vec:
    """By the width or more, or by less than nothing: as NumPy, all bits are shifted out."""
    x, y = xs
    build, dtype = k.builder, x.dtype
    last = k.constant(8 * dtype.itemsize - 1, dtype)
    fits = build.icmp_unsigned("<=", y.real, last.real)
    by = build.select(fits, y.real, last.real)
    if call.name == "right_shift" and dtype.kind == "i":
        return Vec(dtype, build.ashr(x.real, by))
    shifted = Vec(dtype, (build.shl if call.name == "left_shift" else build.lshr)(x.real, by))
    return k.select(fits, shifted, k.constant(0, dtype))


# --------------------------------------------------------------------------------------------------------- kinds of value


def _kind(name: str, *, all_parts: bool, test: Any) -> None:
    @lowers(name)
    def emit(k: Lanes, xs: Vecs, call: Call) -> Vec:
        (x,) = xs
        if x.dtype.kind in "biu":  # always finite
            return k.constant(all_parts, BOOL)
        found = [test(k, part) for part in _parts(x)]
        return Vec(BOOL, found[0] if len(found) == 1 else (k.builder.and_ if all_parts else k.builder.or_)(*found))


def _is_infinite(k: Lanes, x: Vec) -> ir.Value:
    return k.compare("==", k.fabs(x), k.constant(np.inf, x.dtype))


_kind("isnan", all_parts=False, test=lambda k, x: k.is_nan(x))
_kind("isinf", all_parts=False, test=_is_infinite)
_kind("isfinite", all_parts=True, test=lambda k, x: k.compare("<", k.fabs(x), k.constant(np.inf, x.dtype)))


@lowers("signbit")
def _signbit(k: Lanes, xs: Vecs, call: Call) -> Vec:
    return Vec(BOOL, k.sign_bit(xs[0]))


@lowers("isposinf", "isneginf", dtypes=as_given)
def _is_one_infinity(k: Lanes, xs: Vecs, call: Call) -> Vec:
    (x,) = xs
    if x.dtype.kind != "f":
        return k.constant(False, BOOL)
    return Vec(BOOL, k.compare("==", x, k.constant(np.inf if call.name == "isposinf" else -np.inf, x.dtype)))


@lowers("isreal", "iscomplex", dtypes=as_given)
def _is_real(k: Lanes, xs: Vecs, call: Call) -> Vec:
    (x,) = xs
    if x.imag is None:
        return k.constant(call.name == "isreal", BOOL)
    imag = _parts(x)[1]
    return Vec(BOOL, k.compare("==" if call.name == "isreal" else "!=", imag, k.constant(0, imag.dtype)))


# --------------------------------------------------------------------------------------------------------- casts, choice


def _cast_dtypes(given: Sequence[Any], outs: Dtypes) -> tuple[Dtypes, Dtypes]:
    (x,), _ = as_given(given, outs)
    if x.kind == "c" and outs[0].kind not in "bc":
        raise NotLowered("cast of complex values to real ones, of which NumPy warns")
    return outs, outs


@lowers("astype", dtypes=_cast_dtypes)
def _astype(k: Lanes, xs: Vecs, call: Call) -> Vec:
    return xs[0]


def _where_dtypes(given: Sequence[Any], outs: Dtypes) -> tuple[Dtypes, Dtypes]:
    return (BOOL, outs[0], outs[0]), outs


@lowers("where", dtypes=_where_dtypes)
def _where(k: Lanes, xs: Vecs, call: Call) -> Vec:
    return k.select(xs[0].real, xs[1], xs[2])


@lowers("nan_to_num", dtypes=as_given)
def _nan_to_num(k: Lanes, xs: Vecs, call: Call) -> Vec:
    (x,) = xs
    if x.dtype.kind not in "fc":
        return x
    limits = np.finfo(part_dtype(call.outs[0]))
    settings = {"nan": 0.0, **dict(call.params)}
    instead = [settings["nan"], settings.get("posinf"), settings.get("neginf")]
    if not all(value is None or isinstance(value, (int, float)) for value in instead):
        raise NotLowered("nan_to_num with arrays")
    nan, above, below = (float(d if v is None else v) for v, d in zip(instead, (0.0, limits.max, limits.min), strict=True))
    parts = []
    for part in _parts(x):
        dtype = part.dtype
        found = k.select(k.compare("==", part, k.constant(np.inf, dtype)), k.constant(above, dtype), part)
        found = k.select(k.compare("==", part, k.constant(-np.inf, dtype)), k.constant(below, dtype), found)
        parts.append(k.select(k.is_nan(part), k.constant(nan, dtype), found).real)
    return Vec(x.dtype, *parts)


def _isclose_dtypes(given: Sequence[Any], outs: Dtypes) -> tuple[Dtypes, Dtypes]:
    """As `np.isclose`: the second operand becomes inexact, the difference has the dtype of both, and so must have the tolerance here."""
    x, y = (np.zeros(1, d) if isinstance(d, np.dtype) else d() for d in given)
    right = np.result_type(y, 1.0) if isinstance(y, np.ndarray) else np.dtype(np.float64)
    both = np.result_type(x, right if isinstance(y, np.ndarray) else y, 1.0)
    if both != right or both.kind != "f" or both.itemsize == 2:
        raise NotLowered(f"isclose of {given[0]} and {given[1]}")
    return (both, both), outs


@lowers("isclose", dtypes=_isclose_dtypes)
def _isclose(k: Lanes, xs: Vecs, call: Call) -> Vec:
    x, y = xs
    build, dtype = k.builder, x.dtype
    settings = {"rtol": 1e-5, "atol": 1e-8, "equal_nan": False, **dict(call.params)}
    if not all(isinstance(value, (int, float)) and np.isfinite(value) for value in settings.values()):
        raise NotLowered("isclose with tolerances that are no finite numbers")
    relative, absolute = (k.constant(settings[name], dtype).real for name in ("rtol", "atol"))
    allowed = Vec(dtype, build.fadd(absolute, build.fmul(relative, k.fabs(y).real)))
    is_near = k.compare("<=", k.fabs(Vec(dtype, build.fsub(x.real, y.real))), allowed)
    is_finite = k.compare("<", k.fabs(y), k.constant(np.inf, dtype))
    found = build.or_(build.and_(is_near, is_finite), k.compare("==", x, y))
    if settings["equal_nan"]:
        found = build.or_(found, build.and_(k.is_nan(x), k.is_nan(y)))
    return Vec(BOOL, found)
