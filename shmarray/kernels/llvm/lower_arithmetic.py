"""Arithmetic, lane by lane: ``+ - * / // % **``, complex values, signs. Values are NumPy's, those of integers modulo 2**bits.

Never put here: functions of libm, but for what arithmetic is made of (``fmod``, ``pow``, ``hypot``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir

from shmarray.kernels.llvm.lanes import BOOL, FLOAT16, FLOAT32, FLOAT64, Lanes, NotLowered, Vec, part_dtype
from shmarray.kernels.llvm.lowering import Call, Outs, as_given, lowers

Vecs = Sequence[Vec]


# ------------------------------------------------------------------------------------------------- sums, products, quotients


def _each_part(k: Lanes, xs: Vecs, floats: str, integers: str) -> Vec:
    dtype = xs[0].dtype
    make = getattr(k.builder, floats if dtype.kind in "fc" else integers)
    return Vec(dtype, *(make(*parts) for parts in zip(*(x.parts for x in xs), strict=True)))


@lowers("add")
def _add(k: Lanes, xs: Vecs, call: Call) -> Vec:
    if xs[0].dtype.kind == "b":
        return Vec(BOOL, k.builder.or_(xs[0].real, xs[1].real))
    return _each_part(k, xs, "fadd", "add")


@lowers("subtract")
def _subtract(k: Lanes, xs: Vecs, call: Call) -> Vec:
    return _each_part(k, xs, "fsub", "sub")


@lowers("multiply")
def _multiply(k: Lanes, xs: Vecs, call: Call) -> Vec:
    x, y = xs
    if x.dtype.kind == "b":
        return Vec(BOOL, k.builder.and_(x.real, y.real))
    if x.imag is None or y.imag is None:
        return _each_part(k, xs, "fmul", "mul")
    build = k.builder
    cross, mixed = build.fmul(x.imag, y.imag), build.fmul(x.imag, y.real)
    if k.has_fma:  # as NumPy's loops on processors that have it
        return Vec(x.dtype, *(k.intrinsic("llvm.fma", x.real, p, q) for p, q in ((y.real, build.fneg(cross)), (y.imag, mixed))))
    return Vec(x.dtype, build.fsub(build.fmul(x.real, y.real), cross), build.fadd(build.fmul(x.real, y.imag), mixed))


@lowers("square")
def _square(k: Lanes, xs: Vecs, call: Call) -> Outs:
    return _multiply(k, (xs[0], xs[0]), call)


@lowers("divide")
def _divide(k: Lanes, xs: Vecs, call: Call) -> Vec:
    x, y = xs
    if x.imag is None or y.imag is None:
        return Vec(x.dtype, k.builder.fdiv(x.real, y.real))
    return _complex_quotient(k, x, y)


def _complex_quotient(k: Lanes, x: Vec, y: Vec) -> Vec:
    """Smith's algorithm (CACM 5, 1962, no. 435), term by term as NumPy's loop: both parts are scaled by the divisor's larger one."""
    build = k.builder
    part = part_dtype(x.dtype)
    a, b, c, d = (Vec(part, p) for p in (*x.parts, *y.parts))
    size_c, size_d = k.fabs(c), k.fabs(d)
    is_first = k.compare(">=", size_c, size_d, complains=True)  # as NumPy's comparison does
    large, small = k.select(is_first, c, d).real, k.select(is_first, d, c).real
    u, v = k.select(is_first, a, b).real, k.select(is_first, b, a).real
    ratio = build.fdiv(small, large)
    scale = build.fdiv(k.constant(1, part).real, build.fadd(large, build.fmul(small, ratio)))
    real = build.fmul(build.fadd(u, build.fmul(v, ratio)), scale)
    product = build.fmul(u, ratio)
    imag = build.fmul(build.select(is_first, build.fsub(v, product), build.fsub(product, v)), scale)
    # Division by zero gives a complex infinity or NaN.
    zero = k.constant(0, part)
    is_zero = build.and_(k.compare("==", size_c, zero), k.compare("==", size_d, zero))
    return k.select(is_zero, Vec(x.dtype, build.fdiv(a.real, size_c.real), build.fdiv(b.real, size_c.real)), Vec(x.dtype, real, imag))


@lowers("reciprocal")
def _reciprocal(k: Lanes, xs: Vecs, call: Call) -> Vec:
    (x,) = xs
    if x.dtype.kind == "f":
        return Vec(x.dtype, k.builder.fdiv(k.constant(1, x.dtype).real, x.real))
    if x.dtype.kind == "c":
        return _complex_reciprocal(k, x)
    # As NumPy: the quotient of doubles, cast; that of zero is the cast of infinity.
    one = k.constant(1, FLOAT64)
    return k.convert(Vec(FLOAT64, k.builder.fdiv(one.real, k.convert(x, FLOAT64).real)), x.dtype)


def _complex_reciprocal(k: Lanes, x: Vec) -> Vec:
    """Smith's algorithm with a numerator of one."""
    build = k.builder
    part = part_dtype(x.dtype)
    c, d = (Vec(part, p) for p in x.parts)
    is_first = k.compare("<=", k.fabs(d), k.fabs(c), complains=True)
    large, small = k.select(is_first, c, d).real, k.select(is_first, d, c).real
    ratio = build.fdiv(small, large)
    total = build.fadd(large, build.fmul(small, ratio))
    one = k.constant(1, part).real
    inverse, scaled = build.fdiv(one, total), build.fdiv(ratio, total)
    return Vec(x.dtype, build.select(is_first, inverse, scaled), build.fneg(build.select(is_first, scaled, inverse)))


# ------------------------------------------------------------------------------------------- quotient and rest of integers


def _integer_divmod(k: Lanes, x: Vec, y: Vec, rounding: str, *, overflows: bool = False) -> tuple[Vec, Vec]:
    """Return x / y rounded ("floor" or "trunc"), and what is left of x; zeros, and a flag, where y is zero.

    Up to 32 bits the quotient of floats that hold both exactly will do: an inexact quotient is at least 1/y from any integer, and its
    rounding error is below that. Processors divide 64-bit integers one by one.
    """
    build, dtype = k.builder, x.dtype
    zero = k.constant(0, dtype)
    by_zero = k.compare("==", y, zero)
    k.flag(by_zero, "divide")
    unfit = by_zero
    if dtype.kind == "i":  # the smallest number by -1 does not fit, and stops the program: it stays as it is, as by 1
        smallest, minus_one = k.constant(np.iinfo(dtype).min, dtype), k.constant(-1, dtype)
        does_overflow = build.and_(k.compare("==", x, smallest), k.compare("==", y, minus_one))
        unfit = build.or_(by_zero, does_overflow)
        if overflows:
            k.flag(does_overflow, "over")
    divisor = k.select(unfit, k.constant(1, dtype), y)
    if dtype.itemsize < 8:
        wide = FLOAT32 if dtype.itemsize < 4 else FLOAT64
        exact = build.fdiv(k.convert(x, wide).real, k.convert(divisor, wide).real)
        quotient = k.convert(Vec(wide, k.intrinsic(f"llvm.{rounding}", exact)), dtype).real
    else:
        quotient = (build.sdiv if dtype.kind == "i" else build.udiv)(x.real, divisor.real)
    rest = build.sub(x.real, build.mul(quotient, divisor.real))
    if rounding == "floor" and dtype.kind == "i" and dtype.itemsize == 8:
        differ = k.compare("<", Vec(dtype, build.xor(rest, divisor.real)), zero)
        is_above = build.and_(differ, k.compare("!=", Vec(dtype, rest), zero))
        quotient = build.select(is_above, build.sub(quotient, k.constant(1, dtype).real), quotient)
        rest = build.select(is_above, build.add(rest, divisor.real), rest)
    return k.select(by_zero, zero, Vec(dtype, quotient)), k.select(by_zero, zero, Vec(dtype, rest))


@lowers("floor_divide")
def _floor_divide(k: Lanes, xs: Vecs, call: Call) -> Outs:
    return _divmod(k, xs, call)[0]


@lowers("remainder")
def _remainder(k: Lanes, xs: Vecs, call: Call) -> Vec:
    if xs[0].dtype.kind == "f":
        return _float_divmod(k, xs[0], xs[1])[1]
    return _integer_divmod(k, xs[0], xs[1], "floor")[1]


@lowers("divmod")
def _divmod(k: Lanes, xs: Vecs, call: Call) -> tuple[Vec, Vec]:
    if xs[0].dtype.kind == "f":
        return _float_divmod(k, xs[0], xs[1])
    return _integer_divmod(k, xs[0], xs[1], "floor", overflows=True)


@lowers("fmod")
def _fmod(k: Lanes, xs: Vecs, call: Call) -> Vec:
    if xs[0].dtype.kind == "f":
        return _float_rest(k, xs[0], xs[1])
    return _integer_divmod(k, xs[0], xs[1], "trunc")[1]


@lowers("gcd")
def _gcd(k: Lanes, xs: Vecs, call: Call) -> Vec:
    """Euclid's algorithm, all lanes until the last is done; of sizes, as NumPy's: unsigned, so that the smallest number has one."""
    dtype = xs[0].dtype
    unsigned = np.dtype(f"u{dtype.itemsize}")
    zero, one = k.constant(0, unsigned), k.constant(1, unsigned)
    quiet = k.without_flags()

    def step(values: list[ir.Value]) -> list[ir.Value]:
        small, large = Vec(unsigned, values[0]), Vec(unsigned, values[1])
        is_done = k.compare("==", small, zero)
        rest = _integer_divmod(quiet, large, k.select(is_done, one, small), "trunc")[1]
        return [k.select(is_done, zero, rest).real, k.select(is_done, large, small).real]

    start = [k.absolute(x).real for x in xs]
    found = k.repeat(start, lambda values: k.compare("!=", Vec(unsigned, values[0]), zero), step)
    return Vec(dtype, found[1])


@lowers("lcm")
def _lcm(k: Lanes, xs: Vecs, call: Call) -> Vec:
    dtype = xs[0].dtype
    unsigned = np.dtype(f"u{dtype.itemsize}")
    divisor = Vec(unsigned, _gcd(k, xs, call).real)
    x, y = (Vec(unsigned, k.absolute(x).real) for x in xs)
    share = _integer_divmod(k.without_flags(), x, divisor, "trunc")[0]  # of 0 and 0: zero, as NumPy says
    return Vec(dtype, k.builder.mul(share.real, y.real))


# --------------------------------------------------------------------------------------------- quotient and rest of floats


def _float_rest(k: Lanes, x: Vec, y: Vec) -> Vec:
    """Return C's fmod, which is exact, in double precision (where quotients of float32 are within reach, too).

    With q = trunc(x / y) below 2**52, x - q * y has no more bits than y, so that one fused operation gives it exactly; a quotient that was
    rounded up to an integer gives it the wrong sign, and y is added, again exactly. Larger quotients are left to libm, with their strip.
    """
    if x.dtype == FLOAT32:
        return k.convert(_float_rest(k, k.convert(x, FLOAT64), k.convert(y, FLOAT64)), FLOAT32)
    build, dtype = k.builder, x.dtype
    exact, zero = build.fdiv(x.real, y.real), k.constant(0, dtype)
    quotient = Vec(dtype, k.intrinsic("llvm.trunc", exact))
    divisor = k.select(k.compare("==", quotient, zero), zero, y)  # it may be infinite, of which zero times is NaN
    rest = Vec(dtype, k.intrinsic("llvm.fma", build.fneg(quotient.real), divisor.real, x.real))
    is_over = build.and_(k.compare("!=", rest, zero), build.xor(k.sign_bit(rest), k.sign_bit(x)))
    moved = k.select(is_over, Vec(dtype, build.fadd(rest.real, k.copysign(k.fabs(y), x).real)), rest)
    is_hard = k.compare(">=", k.fabs(Vec(dtype, exact)), k.constant(2.0**52, dtype))
    return k.where_any(is_hard, lambda: k.math("fmod", x, y), k.copysign(moved, x))  # of zero, too, the sign is that of x


def _float_divmod(k: Lanes, x: Vec, y: Vec) -> tuple[Vec, Vec]:
    """npy_divmod of NumPy's npymath: the rest has the divisor's sign, the quotient is snapped to an integer."""
    build, dtype = k.builder, x.dtype
    zero, one = k.constant(0, dtype), k.constant(1, dtype)
    rest = _float_rest(k, x, y)
    plain = build.fdiv(x.real, y.real)
    quotient = Vec(dtype, build.fdiv(build.fsub(x.real, rest.real), y.real))
    has_rest = k.compare("!=", rest, zero)
    differ = build.and_(has_rest, build.xor(k.compare("<", y, zero), k.compare("<", rest, zero)))
    quotient = k.select(differ, Vec(dtype, build.fsub(quotient.real, one.real)), quotient)
    moved = k.select(differ, Vec(dtype, build.fadd(rest.real, y.real)), rest)
    floor = Vec(dtype, k.intrinsic("llvm.floor", quotient.real))
    is_low = k.compare(">", Vec(dtype, build.fsub(quotient.real, floor.real)), k.constant(0.5, dtype))
    floor = k.select(is_low, Vec(dtype, build.fadd(floor.real, one.real)), floor)
    snapped = k.select(k.compare("!=", quotient, zero), floor, k.copysign(zero, Vec(dtype, plain)))
    by_zero = k.compare("==", y, zero)
    moved = k.select(has_rest, moved, k.copysign(zero, y))
    return k.select(by_zero, Vec(dtype, plain), snapped), k.select(by_zero, rest, moved)


# -------------------------------------------------------------------------------------------------------------------- power


@lowers("power", "float_power", baked=(1,), bakes=lambda value, dtype: dtype.kind != "f" or value == 0.5 or value in _SHORT)
def _power(k: Lanes, xs: Vecs, call: Call) -> Vec:
    x, y = xs
    exponent = call.scalars[1]
    if x.dtype.kind == "f":
        if exponent == 0.5 and call.name == "power" and call.outs[0] != FLOAT16:  # of -inf and -0.0, too, where C's pow gives others
            return Vec(x.dtype, k.intrinsic("llvm.sqrt", x.real))
        short = _SHORT.get(exponent)
        return k.math("pow", x, y) if short is None else short(k, x)
    if x.dtype.kind == "c":
        raise NotLowered("power of complex")
    if exponent is None and x.dtype.kind == "i":
        raise NotLowered("power with signed exponents: NumPy raises where one is negative")
    if exponent is not None and exponent < 0:
        raise NotLowered("integer power with a negative exponent: NumPy raises")
    return _integer_power(k, x, y) if exponent is None else _chain_power(k, x, exponent)


def _chain_power(k: Lanes, x: Vec, exponent: int) -> Vec:
    """Squaring again and again (modulo 2**bits for integers)."""
    make = k.builder.fmul if x.dtype.kind == "f" else k.builder.mul
    result = None
    square = x.real
    while exponent:
        if exponent & 1:
            result = square if result is None else make(result, square)
        exponent >>= 1
        if exponent:
            square = make(square, square)
    return k.constant(1, x.dtype) if result is None else Vec(x.dtype, result)


def _integer_power(k: Lanes, x: Vec, y: Vec) -> Vec:
    build, dtype = k.builder, x.dtype
    zero, one = k.constant(0, dtype), k.constant(1, dtype)

    def step(values: list[ir.Value]) -> list[ir.Value]:
        result, square, left = values
        is_odd = k.compare("!=", Vec(dtype, build.and_(left, one.real)), zero)
        more = build.select(is_odd, build.mul(result, square), result)
        return [more, build.mul(square, square), build.lshr(left, one.real)]

    return Vec(dtype, k.repeat([one.real, x.real, y.real], lambda values: k.compare("!=", Vec(dtype, values[2]), zero), step)[0])


# Exponents that are part of the code. Up to 4, products lose no more than libm's pow may; with -2 they would lose small results.
_SHORT: dict[Any, Callable[[Lanes, Vec], Vec]] = {
    **{float(n): partial(_chain_power, exponent=n) for n in range(5)},
    -1.0: lambda k, x: Vec(x.dtype, k.builder.fdiv(k.constant(1, x.dtype).real, x.real)),
}


# --------------------------------------------------------------------------------------------------------- signs and sizes


@lowers("negative")
def _negative(k: Lanes, xs: Vecs, call: Call) -> Vec:
    (x,) = xs
    make = k.builder.fneg if x.dtype.kind in "fc" else k.builder.neg
    return Vec(x.dtype, *(make(p) for p in x.parts))


@lowers("absolute", "fabs")
def _absolute(k: Lanes, xs: Vecs, call: Call) -> Vec:
    (x,) = xs
    if x.imag is not None:
        part = part_dtype(x.dtype)
        return k.math("hypot", Vec(part, x.real), Vec(part, x.imag))
    return k.absolute(x)


@lowers("sign")
def _sign(k: Lanes, xs: Vecs, call: Call) -> Vec:
    (x,) = xs
    if x.dtype.kind == "c":
        raise NotLowered("sign of complex")
    zero, one = k.constant(0, x.dtype), k.constant(1, x.dtype)
    above = k.select(k.compare(">", x, zero), one, zero)
    if x.dtype.kind == "u":
        return above
    found = k.select(k.compare("<", x, zero), k.constant(-1, x.dtype), above)
    return k.select(k.is_nan(x), x, found) if x.dtype.kind == "f" else found


@lowers("copysign")
def _copysign(k: Lanes, xs: Vecs, call: Call) -> Vec:
    return k.copysign(xs[0], xs[1])


# ------------------------------------------------------------------------------------------------------------ complex parts


@lowers("positive")
@lowers("real", dtypes=as_given)
def _real(k: Lanes, xs: Vecs, call: Call) -> Vec:
    (x,) = xs
    return x if call.name == "positive" else Vec(part_dtype(x.dtype), x.real)


@lowers("imag", dtypes=as_given)
def _imag(k: Lanes, xs: Vecs, call: Call) -> Vec:
    (x,) = xs
    return k.constant(0, x.dtype) if x.imag is None else Vec(part_dtype(x.dtype), x.imag)


@lowers("conjugate")
def _conjugate(k: Lanes, xs: Vecs, call: Call) -> Vec:
    (x,) = xs
    return x if x.imag is None else Vec(x.dtype, x.real, k.builder.fneg(x.imag))
