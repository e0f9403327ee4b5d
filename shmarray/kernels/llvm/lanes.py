"""Values in vector registers: a fixed number of lanes, whatever the CPU; LLVM cuts them into what it has.

Promises: every lane is computed by the same instructions wherever it stands, so that results do not depend on position; casts are
NumPy's. Never put here: loops, memory, what an operation means (`lower`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir

from shmarray.kernels.llvm.target import Machine

__all__ = ["BOOL", "FLOAT16", "FLOAT32", "FLOAT64", "I32", "I64", "Lanes", "NotLowered", "Vec", "element_type", "part_dtype"]

I1, I8, I32, I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOATS = {2: ir.HalfType(), 4: ir.FloatType(), 8: ir.DoubleType()}
_NAMES = {I1: "i1", I8: "i8", ir.IntType(16): "i16", I32: "i32", I64: "i64", _FLOATS[2]: "f16", _FLOATS[4]: "f32", _FLOATS[8]: "f64"}
_ORDERED = {"<": "olt", "<=": "ole", ">": "ogt", ">=": "oge"}
BOOL = np.dtype(np.bool_)
FLOAT16, FLOAT32, FLOAT64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
UINT32 = np.dtype(np.uint32)


class NotLowered(Exception):
    """Says what has no lowering: the NumPy engine runs it."""


@dataclass(frozen=True, slots=True)
class Vec:
    """The lanes of one value; booleans are i1 lanes, complex values two vectors."""

    dtype: np.dtype[Any]
    real: ir.Value
    imag: ir.Value | None = None

    @property
    def parts(self) -> tuple[ir.Value, ...]:
        return (self.real,) if self.imag is None else (self.real, self.imag)


def element_type(dtype: np.dtype[Any]) -> ir.Type:
    """Return the LLVM type of one lane (of the real part, where complex). Raises NotLowered for dtypes without one."""
    if not dtype.isnative:
        raise NotLowered(f"dtype {dtype.str} is not in native byte order")
    if dtype.kind == "b":
        return I1
    if dtype.kind in "iu":
        return ir.IntType(8 * dtype.itemsize)
    if dtype.kind == "f" and dtype.itemsize in _FLOATS:
        return _FLOATS[dtype.itemsize]
    if dtype.kind == "c" and dtype.itemsize in (8, 16):
        return _FLOATS[dtype.itemsize // 2]
    raise NotLowered(f"dtype {dtype} has no lowering")


def part_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of the parts of a complex dtype; others as they are."""
    return np.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else dtype


class Lanes:
    """Builds instructions on vectors of ``count`` lanes at the builder's position."""

    def __init__(self, builder: ir.IRBuilder, count: int, machine: Machine, flag: Callable[[ir.Value, str], None] | None = None) -> None:
        self.builder = builder
        self.count = count
        self.machine = machine
        self._flag = flag

    def narrower(self, count: int) -> Lanes:
        """Return the same for another number of lanes."""
        return Lanes(self.builder, count, self.machine, self._flag)

    def without_flags(self) -> Lanes:
        """Return the same, noting nothing."""
        return Lanes(self.builder, self.count, self.machine)

    # --- types and constants ----------------------------------------------------------------------------------------------

    def type(self, dtype: np.dtype[Any]) -> ir.VectorType:
        return ir.VectorType(element_type(dtype), self.count)

    def constant(self, value: Any, dtype: np.dtype[Any]) -> Vec:
        """Return lanes that all hold ``value``, part of the code."""
        if dtype.kind == "c":
            part, number = part_dtype(dtype), complex(value)
            return Vec(dtype, self._constant(number.real, part), self._constant(number.imag, part))
        return Vec(dtype, self._constant(value, dtype))

    def _constant(self, value: Any, dtype: np.dtype[Any]) -> ir.Constant:
        element = element_type(dtype)
        if dtype.kind == "f":
            # By bits: llvmlite prints floats by value, and NaN has many.
            exact = np.array(value).astype(dtype)
            bits = int(exact.view(f"u{dtype.itemsize}"))
            integer = ir.VectorType(ir.IntType(8 * dtype.itemsize), self.count)
            return self.builder.bitcast(ir.Constant(integer, [bits] * self.count), ir.VectorType(element, self.count))
        return ir.Constant(ir.VectorType(element, self.count), [int(value)] * self.count)

    def splat(self, scalar: ir.Value) -> ir.Value:
        """Return lanes that all hold a scalar."""
        vector = ir.VectorType(scalar.type, self.count)
        first = self.builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
        if self.count == 1:
            return first
        zeros = ir.Constant(ir.VectorType(I32, self.count), [0] * self.count)
        return self.builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)

    def iota(self) -> ir.Constant:
        """Return the lanes' numbers, as int64."""
        return ir.Constant(ir.VectorType(I64, self.count), list(range(self.count)))

    def pick(self, vector: ir.Value, lanes: list[int]) -> ir.Value:
        """Return some lanes of a vector."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
        return self.builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)

    def join(self, vectors: list[ir.Value]) -> ir.Value:
        """Return the lanes of several vectors (a power of two of equal ones), one after the other."""
        while len(vectors) > 1:
            vectors = [self._join(a, b) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        return vectors[0]

    def _join(self, a: ir.Value, b: ir.Value) -> ir.Value:
        width = 2 * a.type.count
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, width), list(range(width))))

    # --- calls ------------------------------------------------------------------------------------------------------------

    def call(self, name: str, result: ir.Type, *values: ir.Value) -> ir.Value:
        """Return what function ``name`` of the module, or of LLVM, gives."""
        module = self.builder.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(result, [v.type for v in values]), name)
            if not name.startswith("llvm."):
                function.attributes.add("nounwind")
        return self.builder.call(function, values)

    def intrinsic(self, name: str, *values: ir.Value, extra: tuple[ir.Value, ...] = (), result: ir.Type | None = None) -> ir.Value:
        """Return LLVM's ``name`` ("llvm.sqrt") of vectors of one type; ``extra`` arguments follow."""
        vector = values[0].type
        mangled = f"{name}.v{vector.count}{_NAMES[vector.element]}"
        return self.call(mangled, result or vector, *values, *extra)

    def math(self, name: str, *xs: Vec) -> Vec:
        """Return libm's function ``name`` (the C name of the one of doubles), lane by lane alike: float16 by way of float32."""
        dtype = xs[0].dtype
        if dtype.kind != "f":
            raise NotLowered(f"{name} of {dtype}")
        if dtype.itemsize == 2:
            return self.convert(self.math(name, *(self.convert(x, FLOAT32) for x in xs)), dtype)
        found = self.machine.vector_function(name, dtype, len(xs))
        element = element_type(dtype)
        values = [x.real for x in xs]
        if found is None:
            scalar = name + ("f" if dtype.itemsize == 4 else "")
            result: ir.Value = ir.Constant(values[0].type, ir.Undefined)
            for k in range(self.count):
                lane = ir.Constant(I32, k)
                one = self.call(scalar, element, *(self.builder.extract_element(v, lane) for v in values))
                result = self.builder.insert_element(result, one, lane)
            return Vec(dtype, result)
        symbol, lanes = found
        whole = max(self.count, lanes)  # fewer lanes than the function has: the first again
        pieces = []
        for low in range(0, whole, lanes):
            index = [min(k, self.count - 1) for k in range(low, low + lanes)]
            vector = ir.VectorType(element, lanes)
            parts = [v if lanes == self.count else self.pick(v, index) for v in values]
            pieces.append(self.call(symbol, vector, *parts))
        joined = self.join(pieces)
        return Vec(dtype, joined if whole == self.count else self.pick(joined, list(range(self.count))))

    @property
    def has_fma(self) -> bool:
        """Whether the processor multiplies and adds at once; elsewhere libm does, which is slow."""
        return "+fma" in self.machine.features.split(",") or self.machine.triple.startswith("aarch64")

    @property
    def has_quiet_order(self) -> bool:
        """Whether the processor has comparisons of order that NaN does not disturb, and LLVM uses them."""
        return "+avx" in self.machine.features.split(",")

    # --- signs ------------------------------------------------------------------------------------------------------------

    def sign_bit(self, x: Vec) -> ir.Value:
        """Return i1 lanes: whether the sign of a float is set, that of zero and NaN as well."""
        bits = self.builder.bitcast(x.real, self.type(np.dtype(f"i{x.dtype.itemsize}")))
        return self.builder.icmp_signed("<", bits, ir.Constant(bits.type, [0] * self.count))

    def fabs(self, x: Vec) -> Vec:
        return Vec(x.dtype, self.intrinsic("llvm.fabs", x.real))

    def absolute(self, x: Vec) -> Vec:
        """Return the size of real ``x``; of the smallest integer, itself."""
        if x.dtype.kind == "f":
            return self.fabs(x)
        if x.dtype.kind == "i":
            return self.select(self.compare("<", x, self.constant(0, x.dtype)), Vec(x.dtype, self.builder.neg(x.real)), x)
        return x

    def copysign(self, x: Vec, sign: Vec) -> Vec:
        return Vec(x.dtype, self.intrinsic("llvm.copysign", x.real, sign.real))

    # --- choices ----------------------------------------------------------------------------------------------------------

    def compare(self, op: str, x: Vec, y: Vec, *, complains: bool = False) -> ir.Value:
        """Return i1 lanes of ``x op y`` (real dtypes): with NaN only ``!=`` holds. ``complains``: of NaN, as "invalid"."""
        if x.dtype == FLOAT16:  # only processors with arithmetic of it compare it quietly
            return self.compare(op, self.convert(x, FLOAT32), self.convert(y, FLOAT32), complains=complains)
        if x.dtype.kind == "f":
            if complains:
                self.flag(self.builder.fcmp_unordered("uno", x.real, y.real), "invalid")
            if op == "!=":
                return self.builder.fcmp_unordered(op, x.real, y.real)
            if op != "==" and self.has_quiet_order:
                return self._quietly_ordered(op, x, y)
            return self.builder.fcmp_ordered(op, x.real, y.real)
        if x.dtype.kind == "i":
            return self.builder.icmp_signed(op, x.real, y.real)
        return self.builder.icmp_unsigned(op, x.real, y.real)

    def _quietly_ordered(self, op: str, x: Vec, y: Vec) -> ir.Value:
        """Compare without raising the "invalid" flag for NaN, of which NumPy does not warn: only as a constrained operation is it quiet."""
        vector, module = x.real.type, self.builder.module
        words = [ir.MetaDataString(module, word) for word in (_ORDERED[op], "fpexcept.ignore")]
        name = f"llvm.experimental.constrained.fcmp.v{vector.count}{_NAMES[vector.element]}"
        return self.call(name, self.type(BOOL), x.real, y.real, *words)

    def select(self, condition: ir.Value, x: Vec, y: Vec) -> Vec:
        """Return ``x`` where the i1 lanes hold, else ``y``."""
        parts = [self.builder.select(condition, a, b) for a, b in zip(x.parts, y.parts, strict=True)]
        return Vec(x.dtype, *parts)

    def is_nan(self, x: Vec) -> ir.Value:
        """Return i1 lanes: whether ``x``, real, is NaN."""
        return self.builder.fcmp_unordered("uno", x.real, x.real)

    def truth(self, x: Vec) -> ir.Value:
        """Return i1 lanes: whether ``x`` is not zero."""
        if x.dtype.kind == "b":
            return x.real
        found = [self.compare("!=", Vec(part_dtype(x.dtype), p), self.constant(0, part_dtype(x.dtype))) for p in x.parts]
        return found[0] if len(found) == 1 else self.builder.or_(*found)

    def any(self, condition: ir.Value) -> ir.Value:
        """Return one i1: whether any of the i1 lanes holds."""
        bits = self.builder.bitcast(condition, ir.IntType(self.count))
        return self.builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    def flag(self, condition: ir.Value, problem: str) -> None:
        """Note "divide" or "over" or "invalid" where any lane holds: what integers do without the processor's flags."""
        if self._flag is not None:
            self._flag(self.any(condition), problem)

    def where_any(self, condition: ir.Value, make: Callable[[], Vec], other: Vec) -> Vec:
        """Return what ``make`` gives, for all lanes, if any of the i1 lanes holds, else ``other``.

        So as not to depend on a value's neighbours, both must agree, bit by bit, where the condition does not hold.
        """
        build = self.builder
        before = build.block
        then, after = build.append_basic_block("some"), build.append_basic_block("none")
        build.cbranch(self.any(condition), then, after)
        build.position_at_end(then)
        made = make()
        last = build.block
        build.branch(after)
        build.position_at_end(after)
        parts = []
        for new, old in zip(made.parts, other.parts, strict=True):
            phi = build.phi(old.type)
            phi.add_incoming(old, before)
            phi.add_incoming(new, last)
            parts.append(phi)
        return Vec(other.dtype, *parts)

    def repeat(
        self, start: list[ir.Value], again: Callable[[list[ir.Value]], ir.Value], step: Callable[[list[ir.Value]], list[ir.Value]]
    ) -> list[ir.Value]:
        """Return ``start`` after as many steps as it takes until ``again`` holds in no lane. Lanes that are done must stay as they are."""
        build = self.builder
        before = build.block
        head, body, after = (build.append_basic_block(name) for name in ("repeat", "again", "done"))
        build.branch(head)
        build.position_at_end(head)
        values = [build.phi(value.type) for value in start]
        for phi, value in zip(values, start, strict=True):
            phi.add_incoming(value, before)
        build.cbranch(self.any(again(values)), body, after)
        build.position_at_end(body)
        for phi, value in zip(values, step(values), strict=True):
            phi.add_incoming(value, build.block)
        build.branch(head)
        build.position_at_end(after)
        return values

    # --- casts ------------------------------------------------------------------------------------------------------------

    def convert(self, x: Vec, dtype: np.dtype[Any]) -> Vec:
        """Return ``x`` cast as NumPy casts it (unsafe casting). What is out of range of an integer is what x86-64's C gives."""
        if x.dtype == dtype:
            return x
        if dtype.kind == "b":
            return Vec(dtype, self.truth(x))
        if dtype.kind == "c":
            part = part_dtype(dtype)
            real = self.convert(Vec(part_dtype(x.dtype), x.real), part).real
            imag = self.constant(0, part).real if x.imag is None else self.convert(Vec(part_dtype(x.dtype), x.imag), part).real
            return Vec(dtype, real, imag)
        if x.dtype.kind == "c":
            return self.convert(Vec(part_dtype(x.dtype), x.real), dtype)
        value, vector, builder = x.real, self.type(dtype), self.builder
        if x.dtype.kind in "iub":
            if dtype.kind == "f":
                if dtype.itemsize == 2:  # by way of float32, as NumPy: int32 and int64 are rounded twice
                    return self.convert(self.convert(x, FLOAT32), dtype)
                return Vec(dtype, builder.sitofp(value, vector) if x.dtype.kind == "i" else builder.uitofp(value, vector))
            return Vec(dtype, self._resize(value, vector, x.dtype.kind == "i"))
        if dtype.kind == "f":
            return self._convert_float(x, dtype)
        return self._float_to_integer(x, dtype)

    def _resize(self, value: ir.Value, vector: ir.VectorType, signed: bool) -> ir.Value:
        have, want = value.type.element.width, vector.element.width
        if have == want:
            return value
        if have > want:
            return self.builder.trunc(value, vector)
        return self.builder.sext(value, vector) if signed else self.builder.zext(value, vector)

    def _convert_float(self, x: Vec, dtype: np.dtype[Any]) -> Vec:
        if 2 in (x.dtype.itemsize, dtype.itemsize) and not self.machine.has_half:
            raise NotLowered("float16 on a CPU without conversions of it")
        if dtype.itemsize > x.dtype.itemsize:
            return Vec(dtype, self.builder.fpext(x.real, self.type(dtype)))
        if dtype.itemsize == 2 and x.dtype.itemsize == 8:
            x = self._odd_float32(x)
        return Vec(dtype, self.builder.fptrunc(x.real, self.type(dtype)))

    def _odd_float32(self, x: Vec) -> Vec:
        """Return float64 rounded to float32 "to odd": cut off, the last bit set where that lost anything.

        Rounded once more, to float16, it gives what rounding once would have (Boldo and Melquiond, 2008).
        """
        build = self.builder
        near = Vec(FLOAT32, build.fptrunc(x.real, self.type(FLOAT32)))
        back = self.convert(near, FLOAT64)
        bits = build.bitcast(near.real, self.type(UINT32))
        one = self.constant(1, UINT32).real
        is_above = self.compare(">", self.fabs(back), self.fabs(x))
        is_inexact = build.or_(is_above, self.compare("<", self.fabs(back), self.fabs(x)))
        cut = build.select(is_above, build.sub(bits, one), bits)
        odd = build.select(is_inexact, build.or_(cut, one), cut)
        return Vec(FLOAT32, build.bitcast(odd, self.type(FLOAT32)))

    def _float_to_integer(self, x: Vec, dtype: np.dtype[Any]) -> Vec:
        """Out of range it is what C's casts give on this processor, which is what NumPy's give."""
        builder, vector = self.builder, self.type(dtype)
        if x.dtype.itemsize == 2:
            x = self.convert(x, FLOAT32)
        if dtype.itemsize < 4:  # by way of int32, as C compilers do
            return Vec(dtype, builder.trunc(self._truncated(x, 32), vector))
        if dtype.kind == "i":
            return Vec(dtype, self._truncated(x, 8 * dtype.itemsize))
        if dtype.itemsize == 4:
            return Vec(dtype, builder.trunc(self._truncated(x, 64), vector))
        half = self.constant(math.ldexp(1.0, 63), x.dtype)
        is_large = self.compare(">=", x, half)
        low = self._truncated(Vec(x.dtype, builder.select(is_large, builder.fsub(x.real, half.real), x.real)), 64)
        return Vec(dtype, builder.select(is_large, builder.xor(low, self.constant(1 << 63, dtype).real), low))

    def _truncated(self, x: Vec, width: int) -> ir.Value:
        """Return ``x`` as signed integers of ``width`` bits; what is out of range as the least of them, as x86-64's instructions do.

        To LLVM that would be any value, another one wherever it is used.
        """
        limit = math.ldexp(1.0, width - 1)
        above, below = self.compare(">=", x, self.constant(-limit, x.dtype)), self.compare("<", x, self.constant(limit, x.dtype))
        is_in = self.builder.and_(above, below)
        self.flag(self.builder.not_(is_in), "invalid")
        safe = self.builder.select(is_in, x.real, self.constant(0, x.dtype).real)
        least = self.constant(-(1 << (width - 1)), np.dtype(f"i{width // 8}")).real
        return self.builder.select(is_in, self.builder.fptosi(safe, ir.VectorType(ir.IntType(width), self.count)), least)
