"""Rounding, libm's functions and what is made of them, lane by lane.

``docs/accuracy.md`` says how accurate, ``benchmarks/accuracy.py`` measures it. Special values are NumPy's, of all of libmvec's functions.
Never put here: how a function is called, lane by lane or as a vector (`lanes.Lanes.math`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from shmarray.kernels.llvm.lanes import FLOAT16, FLOAT32, Lanes, NotLowered, Vec, part_dtype
from shmarray.kernels.llvm.lowering import Call, Dtypes, as_given, lowers, to_result

Vecs = Sequence[Vec]


# -------------------------------------------------------------------------------------------------------------- rounding


def _rounding(name: str, intrinsic: str, *more: str) -> None:
    @lowers(name, *more)
    def emit(k: Lanes, xs: Vecs, call: Call) -> Vec:
        (x,) = xs
        if x.dtype.kind in "biu":
            return x
        return Vec(x.dtype, *(k.intrinsic(intrinsic, part) for part in x.parts))


_rounding("floor", "llvm.floor")
_rounding("ceil", "llvm.ceil")
_rounding("trunc", "llvm.trunc")
_rounding("rint", "llvm.rint")


@lowers("fix", dtypes=to_result)
def _fix(k: Lanes, xs: Vecs, call: Call) -> Vec:
    (x,) = xs
    return x if x.dtype.kind in "biu" else Vec(x.dtype, k.intrinsic("llvm.trunc", x.real))


@lowers("round", dtypes=to_result)
def _round(k: Lanes, xs: Vecs, call: Call) -> Vec:
    """As NumPy: multiplied by a power of ten, rounded to even, divided by it; or the other way round."""
    (x,) = xs
    decimals = dict(call.params).get("decimals", 0)
    if x.dtype.kind in "biu":
        if decimals < 0:
            raise NotLowered("round of integers to tens")
        return x
    if not decimals:
        return Vec(x.dtype, *(k.intrinsic("llvm.rint", part) for part in x.parts))
    if call.outs[0] == FLOAT16:
        raise NotLowered("round of float16 to decimals")  # each of the three steps rounds
    power = k.constant(math.pow(10.0, abs(decimals)), part_dtype(x.dtype)).real
    first, last = (k.builder.fmul, k.builder.fdiv) if decimals > 0 else (k.builder.fdiv, k.builder.fmul)
    return Vec(x.dtype, *(last(k.intrinsic("llvm.rint", first(part, power)), power) for part in x.parts))


@lowers("modf")
def _modf(k: Lanes, xs: Vecs, call: Call) -> tuple[Vec, Vec]:
    (x,) = xs
    whole = Vec(x.dtype, k.intrinsic("llvm.trunc", x.real))
    # Of infinity zero is left, and the quiet way there is not to subtract.
    is_whole = k.compare("==", whole, x)
    rest = k.select(is_whole, k.constant(0, x.dtype), Vec(x.dtype, k.builder.fsub(x.real, whole.real)))
    return k.copysign(rest, x), whole


# ------------------------------------------------------------------------------------------------------------------ libm


@lowers("sqrt")
def _sqrt(k: Lanes, xs: Vecs, call: Call) -> Vec:
    (x,) = xs
    if x.dtype.kind == "c":
        raise NotLowered("sqrt of complex")
    return Vec(x.dtype, k.intrinsic("llvm.sqrt", x.real))


def _libm(name: str, function: str) -> None:
    @lowers(name)
    def emit(k: Lanes, xs: Vecs, call: Call) -> Vec:
        return k.math(function, *xs)


@lowers("exp")
def _exp(k: Lanes, xs: Vecs, call: Call) -> Vec:
    """libmvec overflows on its way for -inf and for what is far below all numbers whose exponential is not zero."""
    (x,) = xs
    least = k.constant(-1000, x.dtype)
    return k.math("exp", k.select(k.compare("<", x, least), least, x))


for _name in ("exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "sinh", "cosh", "tanh", "cbrt", "hypot"):
    _libm(_name, _name)
for _name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "tan2"):
    _libm(f"arc{_name}", f"a{_name}")


# ----------------------------------------------------------------------------------------------------------- made of them


def _scaled(name: str, double: float, single: np.float32) -> None:
    @lowers(name)
    def emit(k: Lanes, xs: Vecs, call: Call) -> Vec:
        (x,) = xs
        factor = k.constant(single if x.dtype == FLOAT32 else double, x.dtype)
        return Vec(x.dtype, k.builder.fmul(x.real, factor.real))


for _name in ("deg2rad", "radians"):
    _scaled(_name, math.pi / 180.0, np.float32(math.pi) / np.float32(180))
for _name in ("rad2deg", "degrees"):
    _scaled(_name, 180.0 / math.pi, np.float32(180) / np.float32(math.pi))


@lowers("logaddexp")
def _logaddexp(k: Lanes, xs: Vecs, call: Call) -> Vec:
    """npy_logaddexp: the larger one and what the difference adds to it. Infinities of one sign have no difference."""
    x, y = xs
    build, dtype = k.builder, x.dtype
    gap = Vec(dtype, build.fsub(x.real, y.real))
    larger = k.select(k.compare(">", gap, k.constant(0, dtype), complains=True), x, y)  # as NumPy's comparison does
    more = k.math("log1p", k.math("exp", Vec(dtype, build.fneg(k.fabs(gap).real))))
    found = k.select(k.is_nan(gap), gap, Vec(dtype, build.fadd(larger.real, more.real)))
    double = Vec(dtype, build.fadd(x.real, k.constant(math.log(2.0), dtype).real))
    return k.select(k.compare("==", x, y), double, found)


@lowers("sinc", dtypes=to_result)
def _sinc(k: Lanes, xs: Vecs, call: Call) -> Vec:
    (x,) = xs
    if call.outs[0].kind != "f" or call.outs[0] == FLOAT16:
        raise NotLowered(f"sinc of {call.outs[0]}")
    angle = Vec(x.dtype, k.builder.fmul(k.constant(math.pi, x.dtype).real, x.real))
    is_zero = k.compare("==", angle, k.constant(0, x.dtype))
    angle = k.select(is_zero, k.constant(np.finfo(x.dtype).eps, x.dtype), angle)
    return Vec(x.dtype, k.builder.fdiv(k.math("sin", angle).real, angle.real))


def _angle_dtypes(given: Sequence[Any], outs: Dtypes) -> tuple[Dtypes, Dtypes]:
    (given_dtype,), _ = as_given(given, outs)
    return (given_dtype if given_dtype.kind == "c" else outs[0],), outs


@lowers("angle", dtypes=_angle_dtypes)
def _angle(k: Lanes, xs: Vecs, call: Call) -> Vec:
    (x,) = xs
    if dict(call.params).get("deg"):
        raise NotLowered("angle in degrees")
    part = part_dtype(x.dtype)
    return k.math("atan2", k.constant(0, part) if x.imag is None else Vec(part, x.imag), Vec(part, x.real))


@lowers("ldexp")
def _ldexp(k: Lanes, xs: Vecs, call: Call) -> Vec:
    """Products by powers of two, as musl's scalbn: one that is exact, or two, before the one that may round."""
    x, n = xs
    build, dtype = k.builder, x.dtype
    mantissa = int(np.finfo(dtype).nmant)
    integer = np.dtype(f"i{dtype.itemsize}")
    bias = (1 << (8 * dtype.itemsize - mantissa - 2)) - 1  # the largest exponent, too
    lowest, step_down = 1 - bias, mantissa + 2 - bias  # a step down leaves so much that only the last product rounds

    def number(value: int) -> Vec:
        return k.constant(value, integer)

    def steps(left: Vec, low: int, high: int, between: Vec) -> Vec:
        found = k.select(k.compare("<", left, number(lowest)), number(low), between)
        return k.select(k.compare(">", left, number(bias)), number(high), found)

    most = k.constant(3 * bias, n.dtype)
    least = k.constant(-3 * bias, n.dtype)
    n = k.select(k.compare(">", n, most), most, k.select(k.compare("<", n, least), least, n))
    left = k.convert(n, integer)
    for is_last in (False, False, True):
        power = steps(left, lowest, bias, left) if is_last else steps(left, step_down, bias, number(0))
        left = Vec(integer, build.sub(left.real, power.real))
        shifted = build.shl(build.add(power.real, number(bias).real), number(mantissa).real)
        x = Vec(dtype, build.fmul(x.real, build.bitcast(shifted, k.type(dtype))))
    return x


@lowers("nextafter")
def _nextafter(k: Lanes, xs: Vecs, call: Call) -> Vec:
    """One up or down in the order of the bits, which is that of the sizes."""
    x, y = xs
    if call.outs[0] == FLOAT16:
        raise NotLowered("nextafter of float16")  # it arrives as float32
    build, dtype = k.builder, x.dtype
    integer = np.dtype(f"i{dtype.itemsize}")
    zero, one = k.constant(0, dtype), k.constant(1, integer).real
    bits = build.bitcast(x.real, k.type(integer))
    grows = build.xor(k.compare("<", x, y), k.compare("<", x, zero))
    moved = build.select(grows, build.add(bits, one), build.sub(bits, one))
    moved = build.select(k.compare("==", x, zero), one, moved)
    found = Vec(dtype, build.bitcast(moved, k.type(dtype)))
    found = k.select(k.compare("==", x, zero), k.copysign(found, y), found)
    infinite = k.constant(np.inf, dtype)
    k.flag(build.and_(k.compare("==", k.fabs(found), infinite), k.compare("<", k.fabs(x), infinite)), "over")
    found = k.select(k.compare("==", x, y), y, found)
    return k.select(build.or_(k.is_nan(x), k.is_nan(y)), Vec(dtype, build.fadd(x.real, y.real)), found)
