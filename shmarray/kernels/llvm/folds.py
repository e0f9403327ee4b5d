"""What each reduction is, lane by lane: accumulators of a leaf, nodes of the tree above the leaves, the states that come out.

    strip --step--> accumulators --close, after LEAF_STRIPS--> node --merge, pairwise--> node --states--> `ops.reductions_table`'s states

Promises: the states mean what the table's ``leaf`` and ``combine`` make, so that the table finishes them.
Never put here: loops, where accumulators lie (`module`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir

from shmarray.kernels.llvm.lanes import BOOL, FLOAT64, Lanes, NotLowered, Vec
from shmarray.kernels.llvm.lower import LOWERINGS, Call
from shmarray.kernels.llvm.structure import LEAF_STRIPS, Structure

__all__ = ["Fold", "fold_of", "folds_of"]

Values = list[ir.Value]
INT64, UINT8 = np.dtype(np.int64), np.dtype(np.uint8)
_MOST_STRIPS = 2 * LEAF_STRIPS - 1  # in a leaf: a row that begins in one that is not full ends there


@dataclass(frozen=True, slots=True)
class Fold:
    """The reduction of values of ``given`` into states of ``states``. The plain one: of an associative row of the elementwise table."""

    kind: str
    given: np.dtype[Any]
    states: tuple[np.dtype[Any], ...]
    row: str
    identity: Any

    needs_index = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """What is accumulated: in memory, booleans are bytes."""
        return self.states[0]

    def accumulators(self) -> tuple[np.dtype[Any], ...]:
        """Return the dtypes of the accumulators, none of them complex or bool."""
        return _parts(self.dtype)

    def nodes(self) -> tuple[np.dtype[Any], ...]:
        return self.accumulators()

    def start(self, k: Lanes) -> Values:
        """Return accumulators that have seen nothing."""
        return list(k.constant(self.identity, self.dtype).parts)

    def step(self, k: Lanes, acc: Values, x: Vec, index: ir.Value | None) -> Values:
        """Return the accumulators with one more value in each lane."""
        return self._apply(k, Vec(self.dtype, *acc), k.convert(x, self.dtype))

    def close(self, k: Lanes, acc: Values, count: ir.Value | None) -> Values:
        """Return the node of a leaf in which each lane has seen ``count`` values (float64)."""
        return acc

    def merge(self, k: Lanes, a: Values, b: Values) -> Values:
        """Return the node of ``a`` and, after it, ``b``."""
        return self._apply(k, Vec(self.dtype, *a), Vec(self.dtype, *b))

    def result(self, k: Lanes, node: Values) -> list[Vec]:
        """Return the states."""
        return [Vec(self.dtype, *node)]

    def _apply(self, k: Lanes, a: Vec, b: Vec) -> Values:
        return list(LOWERINGS[self.row].emit(k, (a, b), Call(self.row, (), (None, None), (self.dtype,))).parts)


def _parts(dtype: np.dtype[Any]) -> tuple[np.dtype[Any], ...]:
    if dtype.kind == "c":
        return (np.dtype(f"f{dtype.itemsize // 2}"),) * 2
    return (dtype,)


class _Count(Fold):
    """The sum of integers or booleans: within a leaf in the narrowest dtype that cannot overflow there, so that more lanes fit."""

    __slots__ = ()

    def accumulators(self) -> tuple[np.dtype[Any], ...]:
        if self.given.kind == "b":
            return (UINT8,)
        return (np.dtype(f"{self.given.kind}{min(8, 2 * self.given.itemsize)}"),)

    def nodes(self) -> tuple[np.dtype[Any], ...]:
        return (self.dtype,)

    def start(self, k: Lanes) -> Values:
        return [k.constant(0, self.accumulators()[0]).real]

    def step(self, k: Lanes, acc: Values, x: Vec, index: ir.Value | None) -> Values:
        return [k.builder.add(acc[0], k.convert(x, self.accumulators()[0]).real)]

    def close(self, k: Lanes, acc: Values, count: ir.Value | None) -> Values:
        return [k.convert(Vec(self.accumulators()[0], acc[0]), self.dtype).real]


class _Truth(Fold):
    """Any, all and xor of what is true; accumulators are bytes."""

    __slots__ = ()

    def accumulators(self) -> tuple[np.dtype[Any], ...]:
        return (UINT8,)

    def start(self, k: Lanes) -> Values:
        return [k.constant(self.identity, UINT8).real]

    def step(self, k: Lanes, acc: Values, x: Vec, index: ir.Value | None) -> Values:
        return self._bits(k, acc[0], k.builder.zext(k.truth(x), k.type(UINT8)))

    def merge(self, k: Lanes, a: Values, b: Values) -> Values:
        return self._bits(k, a[0], b[0])

    def _bits(self, k: Lanes, a: ir.Value, b: ir.Value) -> Values:
        return [getattr(k.builder, {"or": "or_", "and": "and_", "xor": "xor"}[self.row])(a, b)]

    def result(self, k: Lanes, node: Values) -> list[Vec]:
        return [Vec(BOOL, k.truth(Vec(UINT8, node[0])))]


class _Arg(Fold):
    """The place of the first smallest or largest value; of the first NaN, if there is one."""

    __slots__ = ()
    needs_index = True

    def accumulators(self) -> tuple[np.dtype[Any], ...]:
        return (UINT8 if self.given.kind == "b" else self.given, INT64)

    def start(self, k: Lanes) -> Values:
        # The identity has the last place of all, so that any value equal to it, at its own place, is preferred.
        return [k.constant(self.identity, self.accumulators()[0]).real, k.constant(np.iinfo(np.int64).max, INT64).real]

    def step(self, k: Lanes, acc: Values, x: Vec, index: ir.Value | None) -> Values:
        assert index is not None
        value = k.builder.zext(x.real, k.type(UINT8)) if x.dtype.kind == "b" else x.real
        return self.merge(k, acc, [value, index])

    def merge(self, k: Lanes, a: Values, b: Values) -> Values:
        dtype, build = self.accumulators()[0], k.builder
        x, y = Vec(dtype, a[0]), Vec(dtype, b[0])
        is_before = build.icmp_signed("<", b[1], a[1])
        take = build.or_(k.compare(self.row, y, x), build.and_(k.compare("==", y, x), is_before))
        if dtype.kind == "f":
            nan_x, nan_y = k.is_nan(x), k.is_nan(y)
            take = build.or_(take, build.and_(nan_y, build.or_(build.not_(nan_x), is_before)))
        return [build.select(take, b[0], a[0]), build.select(take, b[1], a[1])]

    def result(self, k: Lanes, node: Values) -> list[Vec]:
        value = Vec(BOOL, k.truth(Vec(UINT8, node[0]))) if self.given.kind == "b" else Vec(self.given, node[0])
        return [value, Vec(INT64, node[1])]


class _Spread(Fold):
    """Mean and sum of squared deviations in one pass, in double precision.

    Within a leaf, deviations are from the lane's first value: as that is one of n values, n * (its deviation from their mean)^2 is
    at most n times what is looked for, and cancellation costs at most log2(n) bits. Leaves are merged as in
    `ops.reductions_table` (Chan, Golub and LeVeque, 1979).
    """

    __slots__ = ()

    def accumulators(self) -> tuple[np.dtype[Any], ...]:
        return (FLOAT64, FLOAT64, FLOAT64, INT64)  # the first value, sums of deviations and of their squares, whether there is one

    def nodes(self) -> tuple[np.dtype[Any], ...]:
        return (FLOAT64, FLOAT64, FLOAT64)  # mean, sum of squared deviations, count

    def start(self, k: Lanes) -> Values:
        zero = k.constant(0.0, FLOAT64).real
        return [zero, zero, zero, k.constant(0, INT64).real]

    def step(self, k: Lanes, acc: Values, x: Vec, index: ir.Value | None) -> Values:
        build = k.builder
        value = k.convert(x, FLOAT64).real
        seen = build.icmp_signed("!=", acc[3], k.constant(0, INT64).real)
        first = build.select(seen, acc[0], value)
        deviation = build.fsub(value, first)
        sums, squares = build.fadd(acc[1], deviation), build.fadd(acc[2], build.fmul(deviation, deviation))
        return [first, sums, squares, k.constant(1, INT64).real]

    def close(self, k: Lanes, acc: Values, count: ir.Value | None) -> Values:
        assert count is not None
        build = k.builder
        some = _at_least_one(k, count)
        shift = build.fdiv(acc[1], some)
        squares = build.fsub(acc[2], build.fmul(acc[1], shift))
        zero = k.constant(0.0, FLOAT64)
        below = k.compare("<", Vec(FLOAT64, squares), zero)
        return [build.fadd(acc[0], shift), build.select(below, zero.real, squares), count]

    def merge(self, k: Lanes, a: Values, b: Values) -> Values:
        build = k.builder
        total = build.fadd(a[2], b[2])
        share = build.fdiv(b[2], _at_least_one(k, total))
        delta = build.fsub(b[0], a[0])
        # Lanes that have seen nothing hold anything.
        zero = k.constant(0.0, FLOAT64)
        both = build.and_(k.compare(">", Vec(FLOAT64, a[2]), zero), k.compare(">", Vec(FLOAT64, b[2]), zero))
        delta = build.select(both, delta, zero.real)
        empty = k.compare("==", Vec(FLOAT64, a[2]), zero)
        mean = build.select(empty, b[0], build.fadd(a[0], build.fmul(delta, share)))
        cross = build.fmul(build.fmul(delta, delta), build.fmul(a[2], share))
        return [mean, build.fadd(build.fadd(a[1], b[1]), cross), total]

    def result(self, k: Lanes, node: Values) -> list[Vec]:
        return [k.convert(Vec(FLOAT64, v), s) for v, s in zip(node, self.states, strict=False)]


class _NanMean(Fold):
    """Sum and number of what is not NaN."""

    __slots__ = ()

    def accumulators(self) -> tuple[np.dtype[Any], ...]:
        return (self.states[0], INT64)

    def start(self, k: Lanes) -> Values:
        return [k.constant(-0.0, self.states[0]).real, k.constant(0, INT64).real]

    def step(self, k: Lanes, acc: Values, x: Vec, index: ir.Value | None) -> Values:
        nan = k.is_nan(x)
        value = k.select(nan, k.constant(0, x.dtype), x)
        one = k.builder.zext(k.builder.not_(nan), k.type(INT64))
        return [k.builder.fadd(acc[0], k.convert(value, self.states[0]).real), k.builder.add(acc[1], one)]

    def merge(self, k: Lanes, a: Values, b: Values) -> Values:
        return [k.builder.fadd(a[0], b[0]), k.builder.add(a[1], b[1])]

    def result(self, k: Lanes, node: Values) -> list[Vec]:
        return [Vec(self.states[0], node[0]), Vec(INT64, node[1])]


def _at_least_one(k: Lanes, count: ir.Value) -> ir.Value:
    one = k.constant(1.0, FLOAT64)
    return k.builder.select(k.compare("<", Vec(FLOAT64, count), one), one.real, count)


_TRUTH = {
    "logical_or": ("or", 0),
    "logical_and": ("and", 1),
    "logical_xor": ("xor", 0),
}
_BITS = {"bitwise_or": ("or", 0), "bitwise_and": ("and", 1), "bitwise_xor": ("xor", 0)}


def folds_of(s: Structure) -> list[Fold]:
    """Return the folds of a structure."""
    return [fold_of(form.kind, np.dtype(form.given), [np.dtype(d) for d in form.states]) for form in s.folds]


def fold_of(kind: str, given: np.dtype[Any], states: Sequence[np.dtype[Any]]) -> Fold:
    """Return the fold of a row of the reduction table. Raises NotLowered where there is none."""
    states = tuple(states)
    nothing = f"{kind} of {given} has no lowering"
    if given.kind not in "biufc" or given.itemsize > 8 * (1 + (given.kind == "c")):
        raise NotLowered(nothing)
    if kind in _TRUTH:
        return _Truth(kind, given, states, *_TRUTH[kind])
    if kind in _BITS:
        if given.kind == "b":
            return _Truth(kind, given, states, *_BITS[kind])
        if kind not in LOWERINGS:
            raise NotLowered(nothing)
        return Fold(kind, given, states, kind, -1 if kind == "bitwise_and" else 0)
    if kind == "add" and given.kind in "biu" and states[0].kind in "iu" and states[0].itemsize == 8:
        assert np.iinfo(np.uint8).max >= _MOST_STRIPS  # of booleans; products of integers' limits with it fit twice their width, too
        return _Count(kind, given, states, "add", 0)
    if kind in ("add", "mean", "multiply") and states[0].kind != "b":
        if kind == "multiply":
            return Fold(kind, given, states, "multiply", 1)
        return Fold(kind, given, states, "add", complex(-0.0, -0.0) if states[0].kind == "c" else -0.0 if states[0].kind == "f" else 0)
    if given.kind == "c":
        raise NotLowered(nothing)
    if kind in ("var", "std"):
        return _Spread(kind, given, states, "", None)
    if kind == "nanmean" and given.kind == "f":
        return _NanMean(kind, given, states, "", None)
    is_low = kind in ("minimum", "fmin", "argmin")
    if kind in ("minimum", "maximum", "fmin", "fmax", "argmin", "argmax"):
        row = {"argmin": "<", "argmax": ">"}.get(kind, kind)
        if given.kind == "f":
            identity: Any = np.nan if kind in ("fmin", "fmax") else np.inf if is_low else -np.inf
        elif given.kind == "b":
            identity = int(is_low)
        else:
            identity = np.iinfo(given).max if is_low else np.iinfo(given).min
        if row in "<>":
            return _Arg(kind, given, states, row, identity)
        if given.kind == "b":
            return _Truth(kind, given, states, "and" if is_low else "or", identity)
        return Fold(kind, given, states, row, identity)
    raise NotLowered(nothing)
