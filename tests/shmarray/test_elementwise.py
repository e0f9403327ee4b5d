"""Elementwise operations give NumPy's values, dtypes, shapes, warnings and errors: every ufunc, every operand layout."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmarray as sa

NAMES = sorted(name for name in dir(np) if isinstance(getattr(np, name), np.ufunc))
PLAIN = [name for name in NAMES if getattr(np, name).signature is None]
DTYPES = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]
ALL_DTYPES = [*DTYPES, "M8[s]", "m8[s]", "S4", "U4"]
# Correctly rounded, or exact: the same bits wherever an item lies. The rest (libm, SIMD) may differ in the last places.
EXACT = {
    "add", "subtract", "multiply", "divide", "true_divide", "negative", "positive", "sqrt", "square", "floor", "ceil", "rint", "trunc",
    "maximum", "minimum", "fmax", "fmin", "copysign", "nextafter", "frexp", "ldexp", "modf", "fabs", "sign",
}  # fmt: skip
COMMON = settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def _in_this_process() -> Any:
    with sa.config.set(scheduler="synchronous"):
        yield


def values(shape: tuple[int, ...], dtype: Any, seed: int = 0, special: bool = True) -> np.ndarray[Any, Any]:
    """Values of every size and sign that the dtype has, NaN, inf and -0.0 among them."""
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if dtype.kind in "iu":
        low, high = (0 if dtype.kind == "u" else -9), 10
        found = rng.integers(low, high, shape).astype(dtype)
        if special and found.size > 3:
            found.flat[0], found.flat[1] = np.iinfo(dtype).min, np.iinfo(dtype).max
        return found
    if dtype.kind == "f":
        found = (rng.standard_normal(shape) * 3).astype(dtype)
        if special and found.size > 5:
            found.flat[:5] = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0], dtype)
        return found
    if dtype.kind == "c":
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)
    if dtype.kind in "mM":
        found = rng.integers(-5, 1000, shape).astype(dtype)
        if special and found.size > 2:
            found.flat[0] = np.array("NaT", dtype)
        return found
    return rng.integers(0, 30, shape).astype(dtype)


def tolerance(name: str, dtype: np.dtype[Any]) -> float:
    if name in EXACT and dtype.kind != "c":
        return 0.0
    return 8 * float(np.finfo(dtype).eps) if dtype.kind in "fc" else 0.0


def kinds(warned: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Warnings without the operation's name: NumPy names a step inside (cast, sin), this library what the user called (add, sinc)."""
    return {(category, message.partition(" encountered")[0]) for category, message in warned}


def compare(assert_same: Any, name: str, found: Any, expected: Any) -> None:
    for one, other in zip(
        found if isinstance(found, tuple) else (found,), expected if isinstance(expected, tuple) else (expected,), strict=True
    ):
        assert_same(one, other, rtol=tolerance(name, np.asarray(other).dtype))


# --- every ufunc -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_every_loop_of_every_ufunc_gives_numpys_values_and_warnings(name: str, assert_same: Any, outcome: Any, small_grids: Any) -> None:
    ufunc = getattr(np, name)
    for signature in ufunc.types:
        codes = signature.split("->")[0]
        if "O" in signature or "g" in signature.lower():
            continue
        operands = [values((5, 7), c + ("8[s]" if c in "mM" else ""), seed=k) for k, c in enumerate(codes)]
        expected, error, warned = outcome(lambda o=operands: ufunc(*o))
        with small_grids():
            for call in (ufunc, getattr(sa, name)):
                found, our_error, we_warned = outcome(lambda c=call, o=operands: sa.compute(c(*[sa.asarray(x) for x in o]))[0])
                assert our_error is error, signature
                if error is None:
                    compare(assert_same, name, found, expected)
                    assert we_warned == warned, signature


@pytest.mark.parametrize("name", PLAIN)
def test_unsuitable_dtypes_raise_numpys_error_when_the_expression_is_built(name: str, outcome: Any) -> None:
    ufunc = getattr(np, name)
    pairs = itertools.product(["?", "u1", "i8", "f4", "c16", "M8[s]", "m8[s]", "S4", "U4"], repeat=min(ufunc.nin, 2))
    for dtypes in pairs:
        operands = [values((3,), d, seed=k, special=False) for k, d in enumerate(dtypes)]
        operands = [np.abs(x) if x.dtype == np.int64 else x for x in operands]  # the error for negative powers depends on values
        operands += [operands[-1]] * (ufunc.nin - len(operands))
        expected, error, _ = outcome(lambda o=operands: ufunc(*o))
        found, our_error, _ = outcome(lambda o=operands: _dtypes(ufunc(*[sa.asarray(x) for x in o])))
        assert our_error is error, dtypes
        if error is None:
            assert tuple(str(d) for d in found) == tuple(str(e.dtype) for e in (expected if isinstance(expected, tuple) else (expected,)))


def _dtypes(result: Any) -> tuple[str, ...]:
    return tuple(str(r.dtype) for r in (result if isinstance(result, tuple) else (result,)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", PLAIN)
def test_every_ufunc_takes_out_where_and_dtype(name: str, assert_same: Any, outcome: Any) -> None:
    ufunc = getattr(np, name)
    code = next((t.split("->") for t in ufunc.types if t[0] in "dlqm?" and "O" not in t), None)
    if code is None:
        pytest.skip("no loop for float, integer or bool")
    operands = [np.abs(values((4, 6), c + ("8[s]" if c in "mM" else ""), seed=k, special=False)) for k, c in enumerate(code[0])]
    ours = [sa.asarray(x) for x in operands]
    results = ufunc(*operands)
    results = results if isinstance(results, tuple) else (results,)

    # out= a NumPy array, a stored array, an expression
    for make in (np.zeros, lambda s, d: sa.array(np.zeros(s, d)), lambda s, d: sa.zeros(s, d)):
        outs = tuple(make(r.shape, r.dtype) for r in results)
        given = ufunc(*ours, out=outs)
        assert all(a is b for a, b in zip(given if isinstance(given, tuple) else (given,), outs, strict=True))
        compare(assert_same, name, tuple(np.asarray(o) for o in outs), results)

    # where=, with and without out=
    mask = np.arange(24).reshape(4, 6) % 3 == 0
    if ufunc.nout == 1:
        base = np.full(results[0].shape, np.ones((), results[0].dtype))
        expected = ufunc(*operands, out=base.copy(), where=mask)
        for given_mask in (mask, sa.asarray(mask)):
            target = sa.array(base)
            getattr(sa, name)(*ours, out=target, where=given_mask)
            compare(assert_same, name, target.compute(), expected)
            kept = base.copy()
            ufunc(*ours, out=kept, where=given_mask)
            compare(assert_same, name, kept, expected)

    # dtype=
    for dtype in ("f4", "f8", "c16", "i8", "?"):
        expected, error, _ = outcome(lambda d=dtype: ufunc(*operands, dtype=d))
        found, our_error, _ = outcome(lambda d=dtype: sa.compute(ufunc(*ours, dtype=d))[0])
        assert our_error is error, dtype
        if error is None:
            compare(assert_same, name, found, expected)


@pytest.mark.parametrize("name", [n for n in PLAIN if getattr(np, n).nin == 2 and getattr(np, n).nout == 1])
def test_methods_of_binary_ufuncs_agree_with_numpy(name: str, assert_same: Any, outcome: Any) -> None:
    ufunc = getattr(np, name)
    for dtype in ("i8", "f8", "?"):
        a, b = values((4, 5), dtype, 1, special=False), values((3,), dtype, 2, special=False)
        x, y = sa.asarray(a), sa.asarray(b)
        calls = [
            lambda u, p, q: u.reduce(p),
            lambda u, p, q: u.reduce(p, axis=1, keepdims=True),
            lambda u, p, q: u.reduce(p, axis=(0, 1)),
            lambda u, p, q: u.accumulate(p),
            lambda u, p, q: u.accumulate(p, axis=-1),
            lambda u, p, q: u.outer(p, q),
            lambda u, p, q: u.reduceat(p, np.array([0, 2, 2]), axis=1),
        ]
        for k, call in enumerate(calls):
            expected, error, _ = outcome(lambda c=call, p=a, q=b: c(ufunc, p, q))
            found, our_error, _ = outcome(lambda c=call, p=x, q=y: np.asarray(c(ufunc, p, q)))
            assert our_error is error, (dtype, k)
            if error is None:
                rtol = 4 * float(np.finfo(expected.dtype).eps) if expected.dtype.kind in "fc" else 0
                assert_same(found, expected, rtol=rtol)


@pytest.mark.parametrize("name", ["add", "maximum", "negative", "power"])
def test_at_writes_a_stored_array(name: str) -> None:
    ufunc = getattr(np, name)
    expected = np.arange(1, 9)
    stored = sa.array(expected)
    extra = (np.array([2, 3, 1]),) if ufunc.nin == 2 else ()
    index = np.array([0, 0, 5])
    ufunc.at(stored, index, *extra)
    ufunc.at(expected, index, *extra)
    np.testing.assert_array_equal(stored.compute(), expected)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in PLAIN])
def test_generalised_ufuncs_agree_with_numpy(name: str, assert_same: Any) -> None:
    ufunc = getattr(np, name)
    rng = np.random.default_rng(0)
    shapes = {"matmul": [(3, 4), (4, 2)], "vecdot": [(3, 4), (3, 4)], "matvec": [(3, 4), (4,)], "vecmat": [(4,), (4, 3)]}[name]
    operands = [rng.random(s) for s in shapes]
    found = ufunc(*[sa.asarray(x) for x in operands])
    assert isinstance(found, sa.Array) or np.ndim(found) == 0
    assert_same(np.asarray(found), ufunc(*operands), rtol=1e-12)


# --- operands of every kind --------------------------------------------------------------------------------------------------------


def grids(draw: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """A chunk grid of the shape, cut anywhere."""
    result = []
    for n in shape:
        cuts = sorted(draw(st.lists(st.integers(1, max(1, n - 1)), max_size=3, unique=True))) if n > 1 else []
        edges = [0, *cuts, n]
        result.append(tuple(b - a for a, b in itertools.pairwise(edges)))
    return tuple(result)


@st.composite
def layouts(draw: Any, shape: tuple[int, ...], dtypes: list[str] = DTYPES) -> tuple[Any, Any]:
    """(NumPy's array, ours) of equal values, ours lying in memory in any way."""
    dtype, seed = draw(st.sampled_from(dtypes)), draw(st.integers(0, 99))
    kind = draw(
        st.sampled_from(["view", "stored", "transposed", "reversed", "strided", "broadcast", "fill", "random", "numpy", "expression"])
    )
    if kind == "fill" and dtype[0] in "iuf" and dtype[0] != "?":
        n = int(np.prod(shape, dtype=int))
        n = min(n, 100)
        shape_of = (*((1,) * (len(shape) - 1)), shape[-1]) if shape else ()
        n = shape[-1] if shape else 1
        a = np.arange(n).astype(dtype).reshape(shape_of)
        x = sa.arange(n).astype(dtype).reshape(shape_of)
        return a, x
    if kind == "random":
        x = sa.random.default_rng(seed).random(shape, chunks=grids(draw, shape))
        return x.compute(), x
    if kind == "broadcast":
        inner = tuple(1 if draw(st.booleans()) else n for n in shape)
        a = values(inner, dtype, seed)
        return np.broadcast_to(a, shape), sa.broadcast_to(sa.array(a), shape)
    a = values(shape, dtype, seed)
    if kind == "numpy":
        return a, a
    if kind == "transposed":
        x = sa.array(a.T.copy()).T
    elif kind == "reversed":
        x = sa.array(a[(slice(None, None, -1),) * a.ndim].copy())[(slice(None, None, -1),) * a.ndim]
    elif kind == "strided":
        wide = np.zeros(tuple(2 * n + 1 for n in shape), a.dtype)
        wide[(slice(1, None, 2),) * a.ndim] = a
        x = sa.array(wide)[(slice(1, None, 2),) * a.ndim]
    elif kind == "expression":
        x = sa.where(True, sa.asarray(a), sa.asarray(a))
    else:
        x = sa.array(a) if kind == "stored" else sa.asarray(a)
    return a, x.rechunk(grids(draw, shape)) if x.shape else x


SHAPES = st.one_of(
    st.tuples(),
    st.tuples(st.integers(0, 70)),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.integers(1, 5), st.sampled_from([0, 1, 4]), st.integers(1, 6)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 2]), st.integers(1, 5)),
)


@COMMON
@given(data=st.data(), shape=SHAPES, scheduler=st.sampled_from(["synchronous", "threads"]))
def test_binary_operations_on_any_layouts_agree_with_numpy(
    small_grids: Any, assert_same: Any, outcome: Any, data: Any, shape: Any, scheduler: str
) -> None:
    cut = data.draw(st.integers(0, len(shape)))
    other = tuple(1 if data.draw(st.booleans()) else n for n in shape[cut:])
    (a, x), (b, y) = data.draw(layouts(shape)), data.draw(layouts(other))
    operation = data.draw(
        st.sampled_from([operator.add, operator.mul, operator.sub, operator.lt, operator.eq, operator.truediv, np.maximum])
    )
    expected, error, warned = outcome(lambda: operation(a, b))
    with small_grids(), sa.config.set(scheduler=scheduler):
        found, our_error, we_warned = outcome(lambda: operation(x, y))
    assert our_error is error
    if error is None:
        rtol = 8 * float(np.finfo(expected.dtype).eps) if expected.dtype.kind == "c" else 0
        assert_same(found, expected, rtol=rtol)
        if np.ndim(a) and np.ndim(b):
            assert we_warned == warned


@COMMON
@given(data=st.data(), shape=SHAPES, scheduler=st.sampled_from(["synchronous", "threads"]))
def test_chains_of_operations_agree_with_numpy(small_grids: Any, assert_same: Any, data: Any, shape: Any, scheduler: str) -> None:
    leaves = [data.draw(layouts(shape, ["i2", "f4", "f8", "u1", "?"])) for _ in range(3)]
    terms = list(leaves)
    with np.errstate(all="ignore"):
        for _ in range(data.draw(st.integers(1, 7))):
            (a, x), (b, y) = data.draw(st.sampled_from(terms)), data.draw(st.sampled_from(terms))
            operation = data.draw(
                st.sampled_from(
                    [operator.add, operator.mul, operator.gt, np.minimum, np.hypot, np.logical_xor, np.add, np.absolute, np.floor]
                )
            )
            terms.append((operation(a), operation(x)) if operation in (np.absolute, np.floor) else (operation(a, b), operation(x, y)))
        expected = [np.asarray(a) for a, _ in terms[3:]]
        with small_grids(), sa.config.set(scheduler=scheduler):
            found = sa.compute(*[x for _, x in terms[3:]])
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, rtol=1e-2 if other.dtype == np.float16 else 1e-5 if other.dtype == np.float32 else 1e-12)


@COMMON
@given(data=st.data(), shape=SHAPES)
def test_any_chunk_grid_gives_the_same_bits(small_grids: Any, data: Any, shape: Any) -> None:
    a = values(shape, "f8", 3)
    with small_grids(), np.errstate(all="ignore"):
        whole = np.asarray(np.exp(sa.asarray(a)) * 3)
        cut = np.asarray(np.exp(sa.asarray(a).rechunk(grids(data.draw, shape))) * 3)
    assert whole.tobytes() == cut.tobytes()


# --- scalars -----------------------------------------------------------------------------------------------------------------------

SCALARS = [
    True,
    0,
    3,
    -1,
    255,
    256,
    2**40,
    2**63,
    2**64,
    0.0,
    -0.0,
    2.5,
    1e300,
    float("nan"),
    1j,
    np.int8(3),
    np.uint64(3),
    np.float16(2),
    np.float64(1e300),
    np.bool_(True),
    np.complex64(1j),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scalars_promote_and_overflow_as_in_numpy(dtype: str, assert_same: Any, outcome: Any) -> None:
    a = values((7,), dtype, 5, special=False)
    x = sa.asarray(a)
    operations = [
        operator.add,
        operator.mul,
        operator.sub,
        operator.truediv,
        operator.floordiv,
        operator.mod,
        operator.lt,
        operator.eq,
        operator.and_,
        np.maximum,
    ]
    for scalar, operation, swap in itertools.product(SCALARS, operations, (False, True)):
        expected, error, warned = outcome(lambda s=scalar, o=operation, w=swap: o(s, a) if w else o(a, s))
        found, our_error, we_warned = outcome(lambda s=scalar, o=operation, w=swap: o(s, x) if w else o(x, s))
        assert our_error is error, (scalar, operation, swap)
        if error is None:
            assert_same(found, expected, rtol=1e-6 if expected.dtype.kind == "c" else 0)
            assert kinds(we_warned) == kinds(warned), (scalar, operation, swap)


def test_equal_scalars_of_different_types_stay_apart() -> None:
    x = sa.asarray(np.arange(3, dtype="i1"))
    assert [(x * s).dtype for s in (1, True, 1.0, np.int64(1))] == [
        np.arange(3, dtype="i1").__mul__(s).dtype for s in (1, True, 1.0, np.int64(1))
    ]
    ones = sa.ones(2)
    assert np.signbit((ones * -0.0).compute()).all() and not np.signbit((ones * 0.0).compute()).any()


@pytest.mark.parametrize("dtype", ["S4", "U4", "M8[D]", "m8[ms]"])
def test_strings_and_dates_compare_as_in_numpy(dtype: str, small_grids: Any, assert_same: Any) -> None:
    a, b = values((40,), dtype, 1), values((40,), dtype, 2)
    with small_grids():
        for operation in (operator.eq, operator.ne, operator.lt, operator.ge):
            assert_same(np.asarray(operation(sa.asarray(a), sa.array(b))), operation(a, b))


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("operation", [operator.pow, operator.lshift, operator.rshift, operator.or_, operator.xor, divmod, operator.matmul])
def test_remaining_operators_agree_with_numpy(operation: Any, assert_same: Any) -> None:
    a, b = np.arange(1, 7), np.arange(6) % 4
    for one, other in ((sa.asarray(a), sa.asarray(b)), (a, sa.asarray(b)), (sa.asarray(a), b)):
        found = operation(one, other)
        found = tuple(np.asarray(f) for f in found) if isinstance(found, tuple) else np.asarray(found)
        assert_same(found, operation(a, b))


# --- functions that are no ufuncs ------------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "where": lambda m, a: m.where(a > 0, a, -a),
    "where with scalars": lambda m, a: m.where(a > 0, 1, 2.5),
    "clip": lambda m, a: m.clip(a, -1, 2),
    "clip below": lambda m, a: m.clip(a, None, 2),
    "clip above": lambda m, a: m.clip(a, 1, None),
    "clip by arrays": lambda m, a: m.clip(a, a - 1, a[..., :1]),
    "round": lambda m, a: m.round(a, 1),
    "around": lambda m, a: m.around(a),
    "real": lambda m, a: m.real(a),
    "imag": lambda m, a: m.imag(a),
    "conj": lambda m, a: m.conj(a),
    "angle": lambda m, a: m.angle(a),
    "angle in degrees": lambda m, a: m.angle(a, deg=True),
    "isclose": lambda m, a: m.isclose(a, a + 1e-9),
    "isclose of NaN": lambda m, a: m.isclose(a, a, equal_nan=True),
    "nan_to_num": lambda m, a: m.nan_to_num(a, nan=7),
    "fix": lambda m, a: m.fix(a),
    "isreal": lambda m, a: m.isreal(a),
    "iscomplex": lambda m, a: m.iscomplex(a),
    "sinc": lambda m, a: m.sinc(a),
    "i0": lambda m, a: m.i0(a),
    "isposinf": lambda m, a: m.isposinf(a),
    "isneginf": lambda m, a: m.isneginf(a),
    "astype": lambda m, a: a.astype("f4"),
    "astype int": lambda m, a: m.nan_to_num(a).astype("i4"),
}


@pytest.mark.parametrize("label", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["?", "i4", "u1", "f2", "f4", "f8", "c16"])
def test_functions_agree_with_numpy_in_both_namespaces(label: str, dtype: str, small_grids: Any, assert_same: Any, outcome: Any) -> None:
    call = FUNCTIONS[label]
    a = values((6, 9), dtype, 4)
    expected, error, warned = outcome(lambda: call(np, a))
    with small_grids():
        for module in (np, sa):
            found, our_error, we_warned = outcome(lambda m=module: call(m, sa.asarray(a)))
            assert our_error is error
            if error is None:
                assert_same(found, expected, rtol=tolerance(label, expected.dtype))
                assert kinds(we_warned) == kinds(warned)


# --- executors ---------------------------------------------------------------------------------------------------------------------


def test_executors_give_the_same_bits(executor: str) -> None:
    a = values((700, 300), "f8", 6, special=False)
    x = sa.array(a, chunks=(100, 300))
    found = (np.sin(x) * x[::-1] + sa.arange(300) - sa.random.default_rng(1).random((700, 1))).compute()
    with sa.config.set(scheduler="synchronous"):
        expected = (np.sin(x) * x[::-1] + sa.arange(300) - sa.random.default_rng(1).random((700, 1))).compute()
    assert found.tobytes() == expected.tobytes()
    np.testing.assert_allclose(found, np.sin(a) * a[::-1] + np.arange(300) - sa.random.default_rng(1).random((700, 1)).compute())


def test_warnings_name_the_operation_in_every_executor(executor: str) -> None:
    with pytest.warns(RuntimeWarning, match="divide by zero encountered in divide"):
        (sa.ones(1000) / sa.zeros(1000)).compute()


def test_errstate_of_the_building_line_holds_in_every_executor(executor: str) -> None:
    with np.errstate(divide="ignore"):
        quiet = sa.ones(1000) / sa.zeros(1000)
    with np.errstate(divide="raise"):
        loud = sa.ones(1000) / sa.zeros((1000,), "f4")
    assert np.isinf(quiet.compute()).all()
    with pytest.raises(FloatingPointError):
        loud.compute()


def test_misuse_raises_numpys_error_at_once() -> None:
    x = sa.ones((2, 3))
    with pytest.raises(ValueError, match="broadcast"):
        x + sa.ones((4,))
    with pytest.raises(TypeError):
        x + object()
    with pytest.raises(TypeError):
        sa.asarray(np.array([object()]))
    with pytest.raises(TypeError):
        sa.sin(x, x, x, x)
    with pytest.raises(TypeError):
        x.astype("M8[s]", casting="safe")
    with pytest.raises(TypeError):
        np.add(x, x, out=sa.zeros((2, 3), int))
    with pytest.raises(ValueError):
        np.add(x, x, out=sa.zeros((3,)))


RARE = {  # arguments that few use: by this library or by one call of NumPy, but never ignored
    "clip dtype": lambda x: np.clip(x, 1, 3, dtype="f4"),
    "clip out": lambda x: np.clip(x, 1, 3, out=np.zeros((3, 4))),
    "clip by keywords": lambda x: np.clip(x, min=1, max=3),
    "round out": lambda x: np.round(x, 1, out=np.zeros((3, 4))),
    "round to tens": lambda x: np.round(x.astype(int), -1),
    "fix out": lambda x: np.fix(x, out=np.zeros((3, 4))),
    "std correction": lambda x: np.std(x, axis=0, correction=1),
    "var mean": lambda x: np.var(x, axis=0, mean=np.mean(x, axis=0, keepdims=True)),
    "average returned": lambda x: np.average(x, axis=0, returned=True)[1],
    "matmul dtype": lambda x: np.matmul(x, x.T, dtype="f4"),
    "signature": lambda x: np.add(x, 1, signature="dd->d"),
    "casting": lambda x: np.add(x, 1, dtype="i8", casting="unsafe"),
    "positional out": lambda x: np.add(x, 1, np.zeros((3, 4))),
    "diff": lambda x: np.diff(x, axis=0),
    "sort": lambda x: np.sort(x, axis=0),
    "histogram": lambda x: np.histogram(x)[0],
    "einsum": lambda x: np.einsum("ij->ji", x),
    "median": lambda x: np.median(x, axis=1),
}


@pytest.mark.parametrize("label", RARE)
def test_rare_arguments_and_functions_are_not_ignored(label: str, assert_same: Any) -> None:
    a = np.arange(12.0).reshape(3, 4)[::-1] * 1.7
    assert_same(np.asarray(RARE[label](sa.asarray(a))), RARE[label](a), rtol=1e-12)


# --- strings, None, matrices, and out= by position ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, scalar", [(["a", "bb", "", "0", " "], "a"), ([b"a", b"bb", b"", b"0"], b"bb"), (["a", "b"], np.str_("b"))]
)
def test_strings_compare_with_scalars_element_by_element(values: list[Any], scalar: Any) -> None:
    theirs = np.array(values)
    ours = sa.array(theirs, chunks=2)

    for compare in (operator.eq, operator.ne, operator.lt, operator.ge, np.equal, np.not_equal):
        for left, right in ((ours, scalar), (ours + ours[0], scalar), (scalar, ours)):
            found = compare(left, right)
            assert isinstance(found, sa.Array)
            np.testing.assert_array_equal(found.compute(), compare(np.asarray(left), np.asarray(right)))
    assert (scalar in ours) and (scalar * 9 not in ours)
    assert sa.count_nonzero(ours).compute() == np.count_nonzero(ours) == np.count_nonzero(theirs)


def test_comparing_with_none_or_another_kind_is_elementwise_and_with_an_object_an_error() -> None:
    class Anything:
        def __eq__(self, other: object) -> bool:
            return True

    theirs = np.arange(6).reshape(2, 3)
    ours = sa.array(theirs)

    for found, expected in [
        (ours == None, theirs == None),  # noqa: E711
        (ours != None, theirs != None),  # noqa: E711
        (operator.eq(None, ours), operator.eq(None, theirs)),
        (ours == "a", theirs == "a"),
        (ours != np.array(["a", "b", "c"]), theirs != np.array(["a", "b", "c"])),
    ]:
        assert isinstance(found, sa.Array)
        np.testing.assert_array_equal(found.compute(), expected)
    with pytest.raises(TypeError, match="compared with dict"):
        _ = ours == {}
    assert (ours == Anything()) is True


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("call", [lambda x, m: x * m, lambda x, m: m * x, lambda x, m: np.add(x, m), lambda x, m: sa.add(x, m)])
def test_a_matrix_is_no_operand(call: Callable[[Any, Any], Any]) -> None:
    with pytest.raises(TypeError, match="asarray"):
        call(sa.ones((2, 2)), np.matrix([[1, 2], [3, 4]]))


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x, o: m.round(x, 1, o),
        lambda m, x, o: np.round(x, 1, o),
        lambda m, x, o: np.round(x, out=o),
        lambda m, x, o: m.clip(x, 0, 1, o),
        lambda m, x, o: np.clip(x, 0, 1, o),
        lambda m, x, o: np.clip(x, 0, 1, out=o),
        lambda m, x, o: m.clip(x, None, 1, o),
        lambda m, x, o: m.add(x, 1, o),
        lambda m, x, o: m.add(x, 1, out=o),
        lambda m, x, o: np.add(x, 1, o),
        lambda m, x, o: np.fix(x, o),
        lambda m, x, o: m.isposinf(x, o),
        lambda m, x, o: x.round(1, o),
        lambda m, x, o: x.clip(-1, 1, o),
        lambda m, x, o: np.take(x, [1, 0], 0, o),
        lambda m, x, o: np.take(x, [1, 0], 0, o, "wrap"),
        lambda m, x, o: np.nanmedian(x, axis=0, keepdims=True, out=o[:1]),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
def test_out_by_position_or_name_is_filled_and_returned(call: Callable[[Any, Any, Any], Any], stored: bool) -> None:
    theirs = np.linspace(-2, 2, 6).reshape(2, 3)
    expected = np.full((2, 3), 9.0)
    if "isposinf" in call.__code__.co_names:
        expected = expected.astype(bool)
    whole = expected.copy()
    target = sa.array(whole) if stored else whole

    call(np, theirs, expected)
    result = call(sa, sa.array(theirs), target)

    assert result is target or "nanmedian" in call.__code__.co_names
    assert isinstance(result, sa.Array if stored else np.ndarray)
    np.testing.assert_array_equal(np.asarray(target), expected)


def test_records_are_not_taken_for_different() -> None:
    x = sa.array(np.array([(1, 2.0), (3, 4.0)], "i4,f8"))

    with pytest.raises(TypeError):
        _ = x == x


@pytest.mark.parametrize("name", ["round", "clip"])
def test_out_of_a_dtype_that_cannot_hold_the_result_is_refused(name: str) -> None:
    args = (1,) if name == "round" else (0, 1)

    with pytest.raises(TypeError, match="same_kind"):
        getattr(sa, name)(sa.ones(3), *args, np.zeros(3, int))


def test_operators_have_no_further_parameters() -> None:
    x = sa.ones(3)

    with pytest.raises(TypeError):
        pow(x, 2, "subtract")
    with pytest.raises(TypeError):
        x.sum(_function=1)


def test_parameters_of_numpys_function_are_taken_by_position() -> None:
    z = np.array([1j, -1, 1 + 1j])

    np.testing.assert_array_equal(sa.angle(z, True).compute(), np.angle(z, True))
    np.testing.assert_array_equal(np.angle(sa.array(z), True).compute(), np.angle(z, True))


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "i8", "f2", "f4", "f8", "c16"])
@pytest.mark.parametrize("exponent", [2, 2.0, 0.5, -1, -1.0, 1, 3, 0])
def test_the_power_operator_is_numpys_with_its_shortcuts(dtype: str, exponent: float, outcome: Any) -> None:
    a = np.array([0, 1, 2, 3, 100]).astype(dtype)
    x = sa.asarray(a).persist()

    (value, error, warned), (expected, its_error, its_warnings) = outcome(lambda: (x**exponent).compute()), outcome(lambda: a**exponent)

    assert (error, warned) == (its_error, its_warnings)
    if error is None:
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected)


def test_casts_heed_errstate() -> None:
    with np.errstate(all="ignore"):
        y = sa.asarray(np.array([np.nan, 1e300])).astype("i4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y.compute()
