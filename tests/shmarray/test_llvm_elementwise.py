"""Compiled elementwise operations give NumPy's values, special ones and warnings included: every operation, dtype and layout.

What `PROMISED` names must be compiled: a lowering that is lost fails here. Bounds of floats are those of ``docs/accuracy.md``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmarray as sa
from shmarray import plan

pytest.importorskip("llvmlite", reason="the compiled engine needs llvmlite (extra jit)")

from shmarray.kernels.llvm import kernel as kernels
from shmarray.kernels.llvm.kernel import CompiledKernel
from shmarray.kernels.llvm.nest import lanes_of
from shmarray.kernels.llvm.target import machine

NDArray = np.ndarray[Any, Any]

# --- what is promised --------------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return text.split()


HAS_HALF = machine().has_half  # float16 is compiled where the processor converts it
INTEGERS, FLOATS, COMPLEX = "bBhHiIlL", "efd" if HAS_HALF else "fd", "FD"
REAL = INTEGERS + FLOATS
ALL = "?" + REAL + COMPLEX

# Every ufunc, and the dtypes of its first operand for which all its loops are compiled.
PROMISED = {
    **dict.fromkeys(words("add multiply equal not_equal less less_equal greater greater_equal minimum maximum fmin fmax"), ALL),
    **dict.fromkeys(words("logical_and logical_or logical_xor logical_not isnan isinf isfinite"), ALL),
    **dict.fromkeys(words("subtract square negative positive conjugate reciprocal"), REAL + COMPLEX),
    **dict.fromkeys(words("floor_divide remainder divmod fmod sign"), REAL),
    **dict.fromkeys(words("floor ceil trunc"), "?" + REAL),
    **dict.fromkeys(words("bitwise_and bitwise_or bitwise_xor invert"), "?" + INTEGERS),
    **dict.fromkeys(words("left_shift right_shift gcd lcm bitwise_count"), INTEGERS),
    **dict.fromkeys(words("exp exp2 expm1 log log2 log10 log1p sin cos tan arcsin arccos arctan sinh cosh tanh"), FLOATS),
    **dict.fromkeys(words("arcsinh arccosh arctanh arctan2 hypot cbrt sqrt fabs copysign signbit heaviside modf ldexp"), FLOATS),
    **dict.fromkeys(words("deg2rad rad2deg radians degrees logaddexp"), FLOATS),
    "absolute": ALL,
    "divide": FLOATS + COMPLEX,
    "rint": FLOATS + COMPLEX,
    "power": "BHIL" + FLOATS,  # signed exponents: NumPy raises where one is negative
    "float_power": "d",
    "nextafter": "fd",
}
NOT_LOWERED = {"frexp", "isnat", "logaddexp2", "spacing"}

# Largest distance from NumPy, in ulp, of float32 and float64: both keep to 4 ulp of the true value, and come much closer to each other.
# What is not here has the same bits. float16, rounded from float32, is off by one at most.
ULP = {
    **dict.fromkeys(words("exp expm1 exp2 log2 log10 log1p sin cos tan arcsin arccos arctan sinh cosh tanh"), (4, 4)),
    **dict.fromkeys(words("arcsinh arccosh arctanh arctan2 hypot cbrt power float_power"), (4, 4)),
    "log": (5, 4),  # both are off by up to 3.9
}
# Of sums that cancel: the error is one of the larger operand.
CANCELLING = {"logaddexp"}
# Which of two equal zeros these give depends, in NumPy, on the place in the array.
ANY_ZERO = {"fmin", "fmax"}


@pytest.fixture(scope="module", autouse=True)
def compiled_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with sa.config.set(engine="llvm", scheduler="synchronous", cache_directory=str(tmp_path_factory.mktemp("kernels"))):
        yield


class Chosen(list[Any]):
    """The kernels that were planned."""

    def check(self) -> None:
        assert all(isinstance(kernel, CompiledKernel) for kernel in self)
        self.clear()


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    found = Chosen()
    original = plan.engine_for

    def choose(*args: Any) -> Any:
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(plan, "engine_for", choose)
    return found


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pieces that were computed again because of the processor's flags."""
    found: list[Any] = []
    original = kernels._Bound._replay

    def replay(self: Any, piece: Any) -> None:
        found.append(piece)
        original(self, piece)

    monkeypatch.setattr(kernels._Bound, "_replay", replay)
    return found


# --- values and comparison ---------------------------------------------------------------------------------------------------------


def dtype_of(code: str) -> np.dtype[Any]:
    return np.dtype({"q": "i8", "Q": "u8"}.get(code, code))


def specials(code: str) -> NDArray:
    """Values at every limit that a dtype has, and some between."""
    dtype, rng = dtype_of(code), np.random.default_rng(1)
    if dtype.kind == "b":
        return np.array([False, True])
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        found = [0, 1, 2, 3, 5, 7, 9, limits.max, limits.max - 1, limits.max // 2, limits.min, limits.min + 1]
        found += [-1, -2, -3, -5, -8] if dtype.kind == "i" else []
        return np.unique(np.concatenate([np.array(found, dtype), rng.integers(limits.min, limits.max, 8, dtype, endpoint=True)]))
    if dtype.kind == "f":
        info = np.finfo(dtype)
        sizes = [0, 0.1, 0.5, 1, 1.5, 2, 2.5, 3, 7.25, 100, 1e4, np.inf]
        sizes += [info.max, info.tiny, info.tiny / 4, info.smallest_subnormal, info.eps]
        some = rng.standard_normal(6) * 10 ** rng.uniform(-3, 3, 6)
        return np.concatenate([sizes, np.negative(sizes), [np.nan], some]).astype(dtype)
    real = np.array([0, -0.0, 1, -2.5, 0.1, 70, np.inf, -np.inf, np.nan], f"f{dtype.itemsize // 2}")
    found_complex = np.empty((real.size, real.size), dtype)
    found_complex.real, found_complex.imag = real[:, None], real
    return found_complex.ravel()


def operands_of(codes: str) -> list[NDArray]:
    """Every special value of one operand with every one of the other."""
    found = [specials(c) for c in codes]
    if len(found) == 2:
        found = [np.repeat(found[0], found[1].size), np.tile(found[1], found[0].size)]
    return found


def distances(found: NDArray, expected: NDArray) -> NDArray:
    """Return how many floats lie between each pair; infinity where only one is NaN, or infinite, or signs of zeros differ."""
    unsigned = np.dtype(f"u{found.dtype.itemsize}")
    top = unsigned.type(1 << (8 * unsigned.itemsize - 1))
    places = []  # in the order of the values
    for x in (found, expected):
        b = x.view(unsigned)
        places.append(np.where(b < top, b + top, ~b + unsigned.type(1)))
    gap = (np.maximum(*places) - np.minimum(*places)).astype(float)
    differ = (np.isinf(found) != np.isinf(expected)) | ((found == 0) & (expected == 0) & (np.signbit(found) != np.signbit(expected)))
    nans = np.isnan(found), np.isnan(expected)
    return np.where(nans[0] != nans[1], np.inf, np.where(nans[0], 0, np.where(differ, np.inf, gap)))


def assert_close(found: Any, expected: Any, ulp: float = 0, context: Any = "", any_zero: bool = False) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype, context
    assert found.shape == expected.shape, context
    found, expected = np.ascontiguousarray(found).ravel(), np.ascontiguousarray(expected).ravel()
    if any_zero:
        found, expected = found + 0, expected + 0
    if expected.dtype.kind == "c":
        assert_close(found.real, expected.real, ulp, context)
        assert_close(found.imag, expected.imag, ulp, context)
    elif expected.dtype.kind == "f":
        gap = distances(found, expected)
        worst = int(np.argmax(gap)) if gap.size else 0
        assert not gap.size or gap[worst] <= ulp, (context, worst, found[worst], expected[worst], gap[worst])
    else:
        np.testing.assert_array_equal(found, expected, err_msg=str(context))


def bits(x: Any) -> list[bytes]:
    """The bytes of results, NaN all alike."""
    found = []
    for one in x if isinstance(x, tuple) else (x,):
        one = np.ascontiguousarray(one)
        parts = one.view(f"f{one.itemsize // 2}") if one.dtype.kind == "c" else one
        found.append(np.where(np.isnan(parts), np.nan, parts).astype(parts.dtype).tobytes() if parts.dtype.kind == "f" else parts.tobytes())
    return found


def allowed(name: str, dtype: np.dtype[Any]) -> float:
    if name == "absolute" and dtype.kind == "f":
        return 2  # of complex values; of others it is exact, which `test_signs` sees
    if name not in ULP or dtype.kind != "f":
        return 0
    return 1 if dtype.itemsize == 2 else ULP[name][dtype.itemsize == 8]


def result(function: Callable[..., Any], *operands: Any, **params: Any) -> Any:
    """Return what a function of ours gives, as NumPy's arrays."""
    given = [sa.array(x) if isinstance(x, np.ndarray) else x for x in operands]
    found = function(*given, **params)
    return tuple(sa.compute(*found)) if isinstance(found, tuple) else found.compute()


def loops(name: str) -> list[str]:
    codes = dict.fromkeys(t.split("->")[0] for t in getattr(np, name).types)
    return [c for c in codes if c[0] in PROMISED[name] and not set(c) & set("gGOmM")]


# --- every operation ---------------------------------------------------------------------------------------------------------------


def test_every_ufunc_is_promised_or_known_to_have_no_lowering() -> None:
    names = {u.__name__ for u in vars(np).values() if isinstance(u, np.ufunc) and u.signature is None and u.types != ["OO->O"]}
    assert {n for n in names if any(c[0] in ALL for c in getattr(np, n).types)} - {*PROMISED, *NOT_LOWERED} == set()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", sorted(PROMISED))
def test_all_dtypes_of_all_operations_give_numpys_values(name: str, chosen: Chosen) -> None:
    function, ours = getattr(np, name), getattr(sa, name)
    assert loops(name)
    for codes in loops(name):
        operands = operands_of(codes)
        found, expected = result(ours, *operands), function(*operands)
        chosen.check()
        for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
            if name in CANCELLING:
                scale = np.maximum(1, np.maximum(*np.abs(operands)), where=np.isfinite(other), out=np.ones_like(other))
                one, other = one / scale, other / scale
                np.testing.assert_allclose(one, other, rtol=0, atol=4 * np.finfo(other.dtype).eps, equal_nan=True)
                continue
            assert_close(one, other, allowed(name, other.dtype), (name, codes), name in ANY_ZERO)
        # The place of a value in a row does not matter, nor whether it is in the padded tail.
        lanes = lanes_of([dtype_of(c).itemsize // (1 + (c in "FD")) for c in codes])
        for start, length in ((1, len(operands[0])), (5, 2 * lanes + 1), (0, lanes - 1)):
            part = slice(start, start + length)
            again = result(ours, *(x[part] for x in operands))
            assert bits(again) == bits(tuple(x[part] for x in found) if isinstance(found, tuple) else found[part]), (name, codes, part)


LAYOUTS: dict[str, Callable[[NDArray], Any]] = {
    "reversed": lambda a: sa.array(a[:, ::-1].copy())[:, ::-1],
    "strided": lambda a: sa.array(np.repeat(a, 3, axis=1))[:, ::3],
    "transposed": lambda a: sa.array(a.T.copy()).T,
    "upside down": lambda a: sa.array(a[::-1].copy())[::-1],
    "in NumPy's memory": lambda a: sa.asarray(a),
}
THOROUGH = [("add", "dd"), ("exp", "f"), ("floor_divide", "bb"), ("less", "ff"), ("divide", "FF"), ("logical_not", "d"), ("divmod", "dd")]
SHORT = [(name, loops(name)[k % len(loops(name))]) for k, name in enumerate(sorted(PROMISED))]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "codes"), [*SHORT, *THOROUGH])
def test_layouts_give_the_same_bits(name: str, codes: str, chosen: Chosen) -> None:
    ours = getattr(sa, name)
    operands = operands_of(codes)
    # Rows of an odd number of items, longer than a strip where there are so many.
    operands = [np.resize(x, (3, 37 if len(x) < 99 else 131)) for x in operands]
    contiguous = result(ours, *operands)
    is_thorough = (name, codes) in THOROUGH
    kinds = sorted(LAYOUTS)
    for kind in kinds if is_thorough else kinds[hash_of(name) % len(kinds) :][:1]:
        found = ours(*(LAYOUTS[kind](x) for x in operands))
        found = tuple(sa.compute(*found)) if isinstance(found, tuple) else found.compute()
        assert bits(found) == bits(contiguous), (name, codes, kind)
        chosen.check()
    if not is_thorough:
        return
    first = [x[:1] for x in operands]
    # Broadcast, of no axes, empty.
    if len(operands) == 2:
        found = result(ours, operands[0], first[1])
        assert bits(found) == bits(result(ours, operands[0], np.repeat(first[1], 3, axis=0)))
        chosen.check()
    single = result(ours, *(x[1, 2] for x in map(np.asarray, operands)))
    assert bits(single) == bits(tuple(x[1, 2] for x in contiguous) if isinstance(contiguous, tuple) else contiguous[1, 2])
    chosen.clear()
    nothing = result(ours, *(x[:0] for x in operands))
    assert bits(nothing) == [b""] * (2 if isinstance(nothing, tuple) else 1)


def hash_of(name: str) -> int:
    return sum(map(ord, name))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "codes"), [("add", "bb"), ("exp", "d"), ("floor_divide", "ff"), ("multiply", "DD"), ("sqrt", "d")])
def test_every_length_of_a_tail_gives_the_same_bits(name: str, codes: str) -> None:
    ours = getattr(sa, name)
    operands = operands_of(codes)
    found = result(ours, *operands)
    lanes = lanes_of([dtype_of(c).itemsize // (1 + (c in "FD")) for c in codes])
    for length in range(1, min(2 * lanes + 1, len(operands[0]) - 2) + 1):
        assert bits(result(ours, *(x[2 : 2 + length] for x in operands))) == bits(found[2 : 2 + length]), length


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["absolute", "negative", "sign", "rint", "floor", "trunc", "positive"])
def test_signs_and_rounding_are_exact(name: str) -> None:
    for code in "efd":
        x = specials(code)
        assert_close(result(getattr(sa, name), x), getattr(np, name)(x), 0, (name, code))


# --- rows that are no ufuncs, casts, scalars ---------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "where": (ALL, lambda m, x: m.where(x == x[::-1], x, x[::-1])),
    "where with scalars": (ALL, lambda m, x: m.where(x != x[::-1], x, 1)),
    "where of a number": (REAL, lambda m, x: m.where(x, x, 1)),
    "clip": (REAL, lambda m, x: m.clip(x, 1, 3)),
    "clip by arrays": (REAL, lambda m, x: m.clip(x, x[::-1], x[:1]) + 0),  # of equal zeros NumPy takes the bound here, but not a scalar one
    "round": (ALL if HAS_HALF else REAL + COMPLEX, lambda m, x: m.round(x)),
    "round to decimals": ("fdFD", lambda m, x: m.round(x, 2)),
    "round to tens": ("fdFD", lambda m, x: m.round(x, -1)),
    "fix": ("?" + REAL, lambda m, x: m.fix(x)),
    "real": (ALL, lambda m, x: m.real(x)),
    "imag": (ALL, lambda m, x: m.imag(x)),
    "isreal": (ALL, lambda m, x: m.isreal(x)),
    "iscomplex": (ALL, lambda m, x: m.iscomplex(x)),
    "isneginf": ("?" + REAL, lambda m, x: m.isneginf(x)),
    "isposinf": ("?" + REAL, lambda m, x: m.isposinf(x)),
    "nan_to_num": (ALL, lambda m, x: m.nan_to_num(x)),
    "nan_to_num with values": (FLOATS + COMPLEX, lambda m, x: m.nan_to_num(x, nan=3.0, posinf=7.0, neginf=-7.0)),
    "isclose": (INTEGERS + "fd", lambda m, x: m.isclose(x, x[::-1])),
    "isclose of NaN": ("fd", lambda m, x: m.isclose(x, x[::-1], rtol=0.1, equal_nan=True)),
    "shift by scalars": (INTEGERS, lambda m, x: ((x << 3) ^ (x >> 1)) + (x << 70)),
    "integer powers": (INTEGERS, lambda m, x: x**0 + x**1 + x**2 + x**5),
    "integer division by scalars": (INTEGERS, lambda m, x: x // 3 + x % 7 + m.fmod(x, 5)),
    "square and square root as powers": ("fd", lambda m, x: m.where(x > 0, x**2, x**0.5)),
    "quotient as a power": ("fd", lambda m, x: x**-1),
    "comparison with a scalar": (REAL, lambda m, x: (x < 3) & (x != 1)),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_rows_that_are_no_ufuncs_give_numpys_values(name: str, chosen: Chosen) -> None:
    codes, function = OTHERS[name]
    for code in codes:
        x = specials(code)
        found = np.asarray(function(sa, sa.array(x)))
        chosen.check()
        assert_close(found, function(np, x), 0, (name, code))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("exponent", [3, 4, 5.0, -2, 1.5, -0.5])
def test_powers_with_scalars_keep_their_bounds(exponent: float, chosen: Chosen) -> None:
    for code in FLOATS:
        x = specials(code)
        assert_close(result(lambda a: a**exponent, x), x**exponent, allowed("power", x.dtype), (code, exponent))
        chosen.check()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("source", ALL)
def test_casts_give_numpys_values(source: str, chosen: Chosen) -> None:
    rng = np.random.default_rng(2)
    x = specials(source)
    if x.dtype.kind == "f":  # limits of integers, and halfway between float16s
        limits = [127, 128, 129, 255, 256, 300.7, 32767.5, 32768, 65535, 65536, 2.0**31, 2.0**32 - 1, 2.0**63, 1.5 * 2.0**63, 1e19]
        halves = [65519.99, 65520, 65512, 1 + 2**-11, 1 + 2**-11 + 2**-40, 2**-25, 2**-25 * (1 + 2**-30), 3e-8]
        x = np.concatenate([x, np.array([*limits, *halves]).astype(x.dtype), (rng.standard_normal(300) * 1e3).astype(x.dtype)])
        x = np.concatenate([x, -x])
    for target in "?" + COMPLEX if source in COMPLEX else ALL:  # of complex values cast to real ones NumPy warns, so it makes the casts
        if target == source:
            continue
        chosen.clear()
        y = x
        if target == "I" and source in FLOATS + COMPLEX:  # NumPy's own cast depends on the place in the array where it does not fit
            y = x[(x.real > -1) & (x.real < 2.0**32)]
        found = result(lambda a, t=target: a.astype(t), y)
        chosen.check()
        assert_close(found, y.astype(target), 0, (source, target))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_scaling_by_powers_of_two_rounds_once(dtype: str, chosen: Chosen) -> None:
    powers = np.arange(-2300, 2300, dtype="i4")
    info = np.finfo(dtype)
    for value in (1.0, 1.7, 1 + info.eps, -3.3, info.max, info.smallest_subnormal, info.tiny * 1.37):
        x = np.full(powers.size, value, dtype)
        assert_close(result(sa.ldexp, x, powers), np.ldexp(x, powers), 0, value)
    chosen.check()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", ["fmod", "divmod"])
def test_rests_are_exact_for_quotients_of_any_size(name: str, dtype: str, chosen: Chosen) -> None:
    rng = np.random.default_rng(0)
    for size in (2, 30, 200):  # decimal exponents: quotients within 2**52, around it, and of libm
        x, y = ((rng.standard_normal(5000) * 10.0 ** rng.uniform(-size / 2, size / 2, 5000)).astype(dtype) for _ in range(2))
        y[::7] = x[::7] / rng.integers(1, 1000, x[::7].size)  # close to whole quotients
        for one, other in zip(np.atleast_2d(result(getattr(sa, name), x, y)), np.atleast_2d(getattr(np, name)(x, y)), strict=True):
            assert_close(one, other, 0, (name, size))
    chosen.check()


@pytest.mark.parametrize("name", ["equal", "not_equal", "less", "less_equal", "greater", "greater_equal"])
def test_signed_and_unsigned_integers_compare_by_value(name: str, chosen: Chosen) -> None:
    for codes in ("lL", "Ll"):
        operands = operands_of(codes)
        assert_close(result(getattr(sa, name), *operands), getattr(np, name)(*operands))
        chosen.check()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_masked_operations_leave_the_rest_as_it_was(chosen: Chosen) -> None:
    for name, code in (("add", "d"), ("floor_divide", "i"), ("sqrt", "f"), ("maximum", "F")):
        function = getattr(np, name)
        operands = operands_of(code * function.nin)
        mask = np.arange(operands[0].size) % 3 == 0
        expected = function(*operands, where=mask, out=np.full_like(operands[0], 7))
        target = sa.array(np.full_like(operands[0], 7))
        getattr(sa, name)(*map(sa.array, operands), where=sa.array(mask), out=target)
        assert_close(target.compute(), expected, 0, name)
    chosen.check()


def test_negative_integer_powers_raise_as_in_numpy() -> None:
    x = sa.array(np.arange(1, 5))
    with pytest.raises(ValueError, match="negative integer powers"):
        (x**-1).compute()
    with pytest.raises(ValueError, match="negative integer powers"):
        (x ** sa.array(np.array([1, 2, -1, 0]))).compute()


# --- warnings ----------------------------------------------------------------------------------------------------------------------

COMPLAINTS: dict[str, Callable[[Any, Any], Any]] = {
    "log(-1)": lambda m, a: m.log(a(-1.0)),
    "log(0)": lambda m, a: m.log(a(0.0)),
    "log of float32 0": lambda m, a: m.log(a(np.float32(0))),
    "1/0": lambda m, a: 1 / a(0.0),
    "0/0": lambda m, a: a(0.0) / a(0.0),
    "exp(1000)": lambda m, a: m.exp(a(1000.0)),
    "exp of float32 100": lambda m, a: m.exp(a(np.float32(100))),
    "int // 0": lambda m, a: a(5) // a(0),
    "int % 0": lambda m, a: a(np.int8(5)) % a(np.int8(0)),
    "fmod(int, 0)": lambda m, a: m.fmod(a(np.uint16(5)), a(np.uint16(0))),
    "smallest // -1": lambda m, a: a(np.int64(-(2**63))) // a(np.int64(-1)),
    "smallest % -1": lambda m, a: a(np.int64(-(2**63))) % a(np.int64(-1)),
    "1 / 0 of integers": lambda m, a: m.reciprocal(a(0)),
    "sqrt(-1)": lambda m, a: m.sqrt(a(-1.0)),
    "inf - inf": lambda m, a: a(np.inf) - a(np.inf),
    "inf % 1": lambda m, a: a(np.inf) % a(1.0),
    "1 // 0 of floats": lambda m, a: a(1.0) // a(0.0),
    "fmod(1, 0) of floats": lambda m, a: m.fmod(a(1.0), a(0.0)),
    "arccos(2)": lambda m, a: m.arccos(a(2.0)),
    "arctanh(1)": lambda m, a: m.arctanh(a(1.0)),
    "sin(inf)": lambda m, a: m.sin(a(np.inf)),
    "0 ** -1": lambda m, a: m.power(a(0.0), a(-1.0)),
    "-1 ** 0.5": lambda m, a: m.power(a(-1.0), a(0.5)),
    "expm1(1000)": lambda m, a: m.expm1(a(1000.0)),
    "cosh(1000)": lambda m, a: m.cosh(a(1000.0)),
    "hypot of huge": lambda m, a: m.hypot(a(1e308), a(1.7e308)),
    "ldexp(1, 5000)": lambda m, a: m.ldexp(a(1.0), a(np.int32(5000))),
    "logaddexp of NaN": lambda m, a: m.logaddexp(a(np.nan), a(1.0)),
    "NaN to int64": lambda m, a: a(np.nan).astype("i8"),
    "1e300 to int32": lambda m, a: a(1e300).astype("i4"),
    "1e300 to uint64": lambda m, a: a(1e300).astype("u8"),
    "1e10 to int8": lambda m, a: a(1e10).astype("i1"),
    "1e300 to float32": lambda m, a: a(1e300).astype("f4"),
    "70000 to float16": lambda m, a: a(70000.0).astype("f2"),
    "overflow of float32": lambda m, a: a(np.float32(1e30)) * a(np.float32(1e30)),
    "overflow of float16": lambda m, a: a(np.float16(300)) * a(np.float16(300)),
    "overflow of a square": lambda m, a: m.power(a(1e200), 2),
    "complex / 0": lambda m, a: a(1 + 1j) / a(0j),
    "complex / NaN": lambda m, a: a(1 + 1j) / a(np.nan),
    "1 / complex NaN": lambda m, a: m.reciprocal(a(complex(1, np.nan))),
    "order of complex NaN": lambda m, a: a(complex(np.nan, 1)) < a(1j),
    "complex to float": lambda m, a: m.sqrt(a(1 + 1j).astype("f8")),
}


def warned(call: Callable[[], Any]) -> set[tuple[str, str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return {(w.category.__name__, str(w.message)) for w in caught}


@pytest.mark.parametrize("name", COMPLAINTS)
def test_complaints_are_numpys(name: str, chosen: Chosen) -> None:
    function = COMPLAINTS[name]
    expected = warned(lambda: function(np, lambda value: np.array([value] * 40)))
    assert warned(lambda: function(sa, lambda value: sa.array(np.array([value] * 40))).compute()) == expected
    if name != "complex to float" and ("float16" not in name or HAS_HALF):
        chosen.check()


COMMON = words("add subtract multiply divide sqrt exp log sin cos tan tanh arctan hypot power floor_divide remainder less maximum rint")


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", COMMON)
def test_harmless_values_raise_no_flags(name: str, dtype: str, replays: list[Any]) -> None:
    rng = np.random.default_rng(0)
    for low, high in ((0.01, 0.99), (1.01, 50), (1e-3, 1e4)):
        high = min(high, 5) if name == "power" else min(high, 80) if name == "exp" else high
        operands = [rng.uniform(low, high, 1003).astype(dtype) for _ in range(getattr(np, name).nin)]
        result(getattr(sa, name), *operands)
    assert not replays


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", words("add multiply less greater_equal maximum fmin isnan exp log sin sqrt floor"))
@pytest.mark.skipif("+avx" not in machine().features, reason="comparisons of older processors complain of NaN: pieces are computed twice")
def test_nan_raises_no_flags(name: str, dtype: str, replays: list[Any]) -> None:
    x = np.ones(50, dtype)
    x[7] = np.nan
    result(getattr(sa, name), *[x] * getattr(np, name).nin)
    assert not replays


# --- random programs ---------------------------------------------------------------------------------------------------------------

Operation = tuple[str, Callable[..., Any]]
EXACT: list[Operation] = [
    *((name, getattr(np, name)) for name in words("add subtract multiply divide floor_divide remainder minimum maximum less equal")),
    *((name, getattr(np, name)) for name in words("negative absolute sqrt square floor rint sign isfinite logical_not")),
    ("where", lambda a, b: _of(a, b).where(a > b, a, b)),
    ("narrower", lambda a: a.astype({"f": "f4", "i": "i2", "u": "u1"}.get(a.dtype.kind, a.dtype))),
    ("wider", lambda a: a.astype("f8")),
    ("half", lambda a: a.astype("f2")),
    ("with a scalar", lambda a: a * 3),
]
SMOOTH: list[Operation] = [
    *((name, getattr(np, name)) for name in words("sin cos tanh arctan arcsinh cbrt expm1 negative absolute")),
    ("add", np.add), ("hypot", np.hypot), ("mean", lambda a, b: (a + b) * 0.5), ("near", lambda a: np.exp(np.negative(a * a))),
    ("log", lambda a: np.log1p(a * a)), ("quotient", lambda a, b: a / (b * b + 1)), ("scaled", lambda a: np.tanh(a) * 2.5),
]  # fmt: skip


def _of(*arrays: Any) -> Any:
    return sa if any(isinstance(a, sa.Array) for a in arrays) else np


def nargs(function: Callable[..., Any]) -> int:
    return function.nin if isinstance(function, np.ufunc) else function.__code__.co_argcount


@st.composite
def leaves(draw: Any, shape: tuple[int, ...], codes: str) -> tuple[NDArray, Any]:
    """(NumPy's array, ours): the same values, ours lying anyhow."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    code = draw(st.sampled_from(codes))
    dims = tuple(1 if draw(st.integers(0, 4)) == 0 else n for n in shape)
    pool = specials(code) if len(codes) > 1 and draw(st.booleans()) else (rng.standard_normal(50) * 3).astype(code)
    a = rng.choice(pool, dims)
    axes = draw(st.permutations(range(len(dims))))
    step = draw(st.sampled_from([1, -1, 2]))
    wide = a if step != 2 or not dims else np.repeat(a, 2, axis=-1)
    index = (..., slice(None, None, step)) if dims else ...
    x = sa.array(np.ascontiguousarray(wide.transpose(axes))).transpose(np.argsort(axes).tolist()) if dims else sa.array(a)
    return a if step != -1 or not dims else a[index], x[index] if step != 1 and dims else x


LONG, SMALL = st.integers(0, 140), st.integers(1, 9)
SHAPES = st.one_of(st.tuples(), st.tuples(LONG), st.tuples(SMALL, LONG), st.tuples(SMALL, SMALL, SMALL))
PROGRAMS = settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def programs(data: Any, shape: tuple[int, ...], codes: str, operations: list[Operation]) -> tuple[list[Any], list[Any]]:
    """Return the results of a random program in NumPy and, compiled, here."""
    terms = [data.draw(leaves(shape, codes)) for _ in range(3)]
    with np.errstate(all="ignore"):
        for _ in range(data.draw(st.integers(2, 8))):
            _, function = data.draw(st.sampled_from(operations))
            chosen = [data.draw(st.sampled_from(terms)) for _ in range(nargs(function))]
            try:
                expected = function(*(a for a, _ in chosen))
            except TypeError:  # no such loop, as - of booleans
                continue
            terms.append((np.asarray(expected), function(*(x for _, x in chosen))))
        return [a for a, _ in terms[3:]], list(sa.compute(*(x for _, x in terms[3:])))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@PROGRAMS
@given(data=st.data(), shape=SHAPES)
def test_exact_programs_give_numpys_bits(data: Any, shape: tuple[int, ...]) -> None:
    expected, found = programs(data, shape, "?bBhiIlLefd", EXACT)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@PROGRAMS
@given(data=st.data(), shape=SHAPES)
def test_smooth_programs_come_close_to_numpy(data: Any, shape: tuple[int, ...]) -> None:
    code = data.draw(st.sampled_from("fd"))
    expected, found = programs(data, shape, code, SMOOTH)
    eps = np.finfo(code).eps
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e3 * eps, atol=1e3 * eps)
