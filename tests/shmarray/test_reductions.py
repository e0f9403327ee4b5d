"""Reductions give NumPy's values, dtypes, warnings and errors over any axes, and the same bits whoever computes them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmarray as sa

COMMON = settings(derandomize=True, deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
DTYPES = ["?", "i1", "u1", "i2", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]
ORDERED = [d for d in DTYPES if d[0] != "c"]
NAMES = [
    "sum",
    "prod",
    "mean",
    "std",
    "var",
    "min",
    "max",
    "any",
    "all",
    "argmin",
    "argmax",
    "count_nonzero",
    "ptp",
    "nansum",
    "nanprod",
    "nanmean",
    "nanstd",
    "nanvar",
    "nanmin",
    "nanmax",
]
ONE_AXIS = ("argmin", "argmax")
SPREADS = ("std", "var", "nanstd", "nanvar")


@pytest.fixture(autouse=True)
def _in_this_process() -> Any:
    with sa.config.set(scheduler="synchronous"):
        yield


def values(shape: tuple[int, ...], dtype: Any, seed: int, special: bool = False) -> np.ndarray[Any, Any]:
    """Small numbers with ties; with ``special`` NaN, infinities and zeros of both signs among floats."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype).kind
    if kind == "c":
        found = (rng.integers(-3, 4, shape) + 1j * rng.integers(-3, 4, shape)).astype(dtype)
    elif kind == "f":
        found = (rng.integers(-8, 9, shape) / 4).astype(dtype)
    else:
        found = rng.integers(0 if kind in "ub" else -3, 2 if kind == "b" else 4, shape).astype(dtype)
    if special and kind in "fc" and found.size:
        places = rng.integers(0, found.size, 4)
        found.flat[places] = rng.choice([np.nan, np.inf, -np.inf, -0.0], 4)
    return found


def tolerance(name: str, dtype: np.dtype[Any]) -> float:
    if dtype.kind not in "fc" or name in ("min", "max", "nanmin", "nanmax"):
        return 0.0
    return {2: 1e-2, 4: 1e-4, 8: 1e-10, 16: 1e-10}[np.dtype(dtype).itemsize if dtype.kind == "f" else np.dtype(dtype).itemsize // 2]


def check(name: str, found: Any, expected: Any, assert_same: Any) -> None:
    expected = np.asarray(expected)
    rtol = tolerance(name, expected.dtype)
    assert_same(found, expected, rtol=rtol, atol=rtol)


@st.composite
def axes(draw: Any, ndim: int, one: bool = False) -> Any:
    """None, an int of either sign, or a tuple of some axes in any order."""
    if ndim == 0 or draw(st.integers(0, 4)) == 0:
        return None
    if one or draw(st.booleans()):
        return draw(st.integers(-ndim, ndim - 1))
    chosen = draw(st.permutations(range(ndim)))[: draw(st.integers(0, ndim))]
    return tuple(a - ndim if draw(st.booleans()) else a for a in chosen)


SHAPES = st.one_of(
    st.tuples(),
    st.tuples(st.integers(1, 100)),
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    st.tuples(st.integers(1, 7), st.sampled_from([1, 5]), st.integers(1, 8)),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.sampled_from([1, 3]), st.integers(1, 6)),
)
EMPTY_SHAPES = st.sampled_from([(0,), (0, 3), (3, 0), (2, 0, 3), (0, 0), (1, 2, 3, 0)])


# --- against NumPy ---------------------------------------------------------------------------------------------------------------


@COMMON
@given(data=st.data(), name=st.sampled_from(NAMES), shape=SHAPES, seed=st.integers(0, 999), special=st.booleans(), keepdims=st.booleans())
def test_reductions_over_any_axes_agree_with_numpy(
    small_grids: Any, assert_same: Any, outcome: Any, data: Any, name: str, shape: Any, seed: int, special: bool, keepdims: bool
) -> None:
    dtype = data.draw(st.sampled_from(ORDERED if "arg" in name or name in ("ptp",) else DTYPES))
    a = values(shape, dtype, seed, special and name not in SPREADS)
    if name in ("prod", "nanprod"):
        a = np.sign(a) if a.dtype.kind not in "bc" else a
    kwargs = {"axis": data.draw(axes(len(shape), name in ONE_AXIS)), "keepdims": keepdims}
    if name in SPREADS:
        kwargs["ddof"] = data.draw(st.sampled_from([0, 1, 2]))
    layout = data.draw(st.sampled_from(["view", "stored", "transposed", "reversed", "chunked"]))
    expected, error, warned = outcome(lambda: getattr(np, name)(a, **kwargs))
    with small_grids(), sa.config.set(scheduler=data.draw(st.sampled_from(["synchronous", "threads"]))):
        x = {
            "view": lambda: sa.asarray(a),
            "stored": lambda: sa.array(a),
            "transposed": lambda: sa.array(a.T.copy()).T,
            "reversed": lambda: sa.array(a[..., ::-1].copy())[..., ::-1] if shape else sa.array(a),
            "chunked": lambda: sa.asarray(a, chunks=3) if shape else sa.asarray(a),
        }[layout]()
        found, our_error, we_warned = outcome(lambda: getattr(sa, name)(x, **kwargs))
        through_numpy, _, _ = outcome(lambda: getattr(np, name)(x, **kwargs))
    assert our_error is error
    if error is None:
        check(name, found, expected, assert_same)
        np.testing.assert_array_equal(found, through_numpy)
        if a.dtype != np.float16 and not special:
            assert {c for c, _ in we_warned} == {c for c, _ in warned}


@COMMON
@given(data=st.data(), name=st.sampled_from(NAMES), shape=EMPTY_SHAPES, keepdims=st.booleans())
def test_empty_reductions_give_numpys_values_warnings_and_errors(
    assert_same: Any, outcome: Any, data: Any, name: str, shape: Any, keepdims: bool
) -> None:
    a = np.empty(shape, data.draw(st.sampled_from(["f8", "i4", "?"] if name != "ptp" else ["f8", "i4"])))
    kwargs = {"axis": data.draw(axes(len(shape), name in ONE_AXIS)), "keepdims": keepdims}
    expected, error, warned = outcome(lambda: getattr(np, name)(a, **kwargs))
    found, our_error, we_warned = outcome(lambda: getattr(sa, name)(sa.asarray(a), **kwargs))
    assert our_error is error
    if error is None:
        assert_same(found, expected)
        assert bool(we_warned) == bool(warned)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ORDERED)
def test_every_dtype_gives_numpys_dtype(name: str, dtype: str, assert_same: Any, outcome: Any, small_grids: Any) -> None:
    a = values((9, 8), dtype, 1)
    with small_grids():
        for axis in (None, 0, 1):
            expected, error, _ = outcome(lambda k=axis: getattr(np, name)(a, axis=k))
            found, our_error, _ = outcome(lambda k=axis: getattr(sa, name)(sa.asarray(a), axis=k))
            assert our_error is error
            if error is None:
                check(name, found, expected, assert_same)


@pytest.mark.parametrize("name", ["min", "max", "argmin", "argmax", "sum", "mean", "any", "all", "ptp", "std"])
@pytest.mark.parametrize("dtype", ["M8[s]", "m8[s]", "S4", "U4", "c16"])
def test_unusual_dtypes_give_numpys_values_or_its_error(name: str, dtype: str, assert_same: Any, outcome: Any, small_grids: Any) -> None:
    a = np.random.default_rng(2).integers(1, 90, (9, 8)).astype(dtype)
    expected, error, _ = outcome(lambda: getattr(np, name)(a, axis=0))
    with small_grids():
        found, our_error, _ = outcome(lambda: getattr(sa, name)(sa.asarray(a), axis=0))
    assert our_error is error
    if error is None:
        check(name, found, expected, assert_same)


@pytest.mark.parametrize("name", ["sum", "prod", "mean", "std", "var"])
@pytest.mark.parametrize("given", ["i1", "u8", "f4", "c8", "?"])
@pytest.mark.parametrize("dtype", ["i4", "f4", "f8", "c16"])
def test_dtype_argument_as_in_numpy(name: str, given: str, dtype: str, assert_same: Any, outcome: Any, small_grids: Any) -> None:
    a = values((9, 8), given, 1)
    expected, error, _ = outcome(lambda: getattr(np, name)(a, axis=0, dtype=dtype))
    with small_grids():
        found, our_error, _ = outcome(lambda: getattr(sa, name)(sa.asarray(a), axis=0, dtype=dtype))
    assert our_error is error
    if error is None:
        check(name, found, expected, assert_same)


@pytest.mark.parametrize("name", ["sum", "prod", "min", "max", "any", "all", "mean", "std", "var", "nansum", "nanmax", "nanmin", "nanmean"])
@pytest.mark.parametrize("axis", [None, 0, (1, 0)])
def test_where_initial_and_out_as_in_numpy(name: str, axis: Any, assert_same: Any, outcome: Any, small_grids: Any) -> None:
    a = values((9, 8), "f8", 3)
    mask = a > -0.5
    initial = {"initial": 2.0} if name in ("sum", "prod", "min", "max", "nansum", "nanmax", "nanmin") else {}
    for kwargs in (
        {},
        {"where": mask},
        {"where": mask[:1]},
        initial,
        {**initial, "where": mask},
        {**initial, "where": mask, "keepdims": True},
    ):
        expected, error, _ = outcome(lambda k=kwargs: getattr(np, name)(a, axis=axis, **k))
        with small_grids():
            for module in (sa, np):
                for lift in (np.asarray, sa.asarray):
                    given = {k: lift(v) if k == "where" else v for k, v in kwargs.items()}
                    found, our_error, _ = outcome(lambda m=module, g=given: getattr(m, name)(sa.asarray(a), axis=axis, **g))
                    assert our_error is error, kwargs
                    if error is None:
                        check(name, found, expected, assert_same)
            if error is None:
                for make in (np.zeros, sa.zeros, lambda s, d: sa.array(np.zeros(s, d))):
                    out = make(expected.shape, expected.dtype)
                    assert getattr(np, name)(sa.asarray(a), axis=axis, out=out, **kwargs) is out
                    check(name, np.asarray(out), expected, assert_same)


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(np.ndarray, n)])
def test_methods_are_the_functions(name: str, assert_same: Any) -> None:
    a = values((9, 8), "f8", 3)
    check(name, getattr(sa.asarray(a), name)(), getattr(a, name)(), assert_same)
    check(name, getattr(sa.asarray(a), name)(1), getattr(a, name)(1), assert_same)
    check(name, getattr(sa.asarray(a), name)(axis=-1, keepdims=True), getattr(a, name)(axis=-1, keepdims=True), assert_same)


@pytest.mark.parametrize("name", NAMES)
def test_misused_axes_raise_numpys_error_when_built(name: str, outcome: Any) -> None:
    a = np.ones((3, 4))
    for axis in (2, -3, (0, 0), (0, 5), 1.5, "x"):
        _, error, _ = outcome(lambda k=axis: getattr(np, name)(a, axis=k))
        with pytest.raises(error or AssertionError):
            getattr(sa, name)(sa.asarray(a), axis=axis)


# --- what is delicate --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["argmin", "argmax", "nanargmin", "nanargmax"])
def test_the_first_of_equal_or_nan_elements_is_found(name: str, small_grids: Any) -> None:
    for seed, axis in itertools.product(range(6), (None, 0, 1, 2)):
        a = values((5, 6, 7), "f8", seed)
        if seed % 2:
            a.flat[[17, 40, 200]] = np.nan
        with small_grids():
            found = np.asarray(getattr(np, name)(sa.asarray(a), axis=axis))
        np.testing.assert_array_equal(found, getattr(np, name)(a, axis=axis))


@pytest.mark.parametrize("name", ["min", "max", "fmin", "fmax"])
def test_signed_zeros_compare_equal(name: str, small_grids: Any) -> None:
    a = np.array([0.0, -0.0] * 20)
    ufunc = {"min": np.minimum, "max": np.maximum}.get(name) or getattr(np, name)
    with small_grids():
        assert ufunc.reduce(sa.asarray(a)) == 0.0


def test_variance_of_a_small_spread_about_a_large_mean_is_right(small_grids: Any) -> None:
    a = 1e8 + np.random.default_rng(0).standard_normal((40, 50))
    truth = np.var(a.astype(np.longdouble))
    with small_grids():
        assert abs(float(sa.var(sa.asarray(a))) - float(truth)) < 1e-6 * float(truth)
        np.testing.assert_allclose(sa.var(sa.asarray(a), axis=1).compute(), a.astype(np.longdouble).var(axis=1).astype(float), rtol=1e-6)
        assert abs(float(sa.nanstd(sa.asarray(a))) - float(truth) ** 0.5) < 1e-6


def test_sums_of_many_items_lose_no_more_than_numpys() -> None:
    a = np.full(3_000_001, 0.1)
    assert abs(float(sa.sum(sa.asarray(a))) - 300000.1) <= abs(float(a.sum()) - 300000.1) + 1e-9
    b = np.full(3_000_001, 0.1, "f4")
    assert abs(float(sa.mean(sa.asarray(b))) - 0.1) < 1e-6


def test_integer_sums_wrap_as_numpys(small_grids: Any) -> None:
    a = np.full((30, 4), 2**62)
    with small_grids():
        np.testing.assert_array_equal(sa.sum(sa.asarray(a), axis=0).compute(), a.sum(axis=0))
        np.testing.assert_array_equal(sa.asarray(a).prod(axis=1).compute(), a.prod(axis=1))


@pytest.mark.parametrize("name", ["nansum", "nanmean", "nanstd", "nanvar", "nanmin", "nanmax"])
def test_slices_of_nan_alone_warn(name: str, small_grids: Any, outcome: Any) -> None:
    a = values((12, 10), "f8", 1)
    a[3] = np.nan
    with small_grids():
        _, _, expected = outcome(lambda: getattr(np, name)(a, axis=1))
        _, _, found = outcome(lambda: getattr(sa, name)(sa.asarray(a), axis=1))
    assert {c for c, _ in found} == {c for c, _ in expected}


@pytest.mark.parametrize("name", ["nansum", "nanmean", "nanstd", "nanvar", "nanmin", "nanmax"])
def test_slices_of_nan_alone(name: str, small_grids: Any, assert_same: Any, outcome: Any) -> None:
    a = values((12, 10), "f8", 1)
    a[3] = np.nan
    a[:, 2] = np.nan
    a[5, ::2] = np.nan
    for axis in (None, 0, 1):
        expected, error, _ = outcome(lambda k=axis: getattr(np, name)(a, axis=k))
        with small_grids():
            found, our_error, _ = outcome(lambda k=axis: getattr(sa, name)(sa.asarray(a), axis=k))
        assert our_error is error
        check(name, found, expected, assert_same)


def test_average_agrees_with_numpy(small_grids: Any, assert_same: Any, outcome: Any) -> None:
    a, w = values((9, 8), "f8", 1), np.arange(1.0, 73).reshape(9, 8)
    calls = [
        lambda m, x, y: m.average(x),
        lambda m, x, y: m.average(x, axis=0),
        lambda m, x, y: m.average(x, weights=y),
        lambda m, x, y: m.average(x, axis=1, weights=y),
        lambda m, x, y: m.average(x, axis=0, weights=y[:, 0]),
        lambda m, x, y: m.average(x, axis=-1, weights=y[0], keepdims=True),
        lambda m, x, y: m.average(x, weights=y[0]),
        lambda m, x, y: m.average(x, axis=0, weights=y[0]),
    ]
    for k, call in enumerate(calls):
        expected, error, _ = outcome(lambda c=call: c(np, a, w))
        for module in (np, sa):
            with small_grids():
                found, our_error, _ = outcome(lambda c=call, m=module: c(m, sa.asarray(a), sa.asarray(w)))
            assert our_error is error, k
            if error is None:
                check("mean", found, expected, assert_same)


# --- determinism -------------------------------------------------------------------------------------------------------------------

FLOATING = ["sum", "prod", "mean", "std", "var", "nansum", "nanmean", "nanvar", "max", "argmin"]


def results(x: Any) -> list[bytes]:
    found = sa.compute(*[getattr(sa, name)(x, axis=axis) for name in FLOATING for axis in ((None, 0) if x.ndim else (None,))])
    return [np.asarray(f).tobytes() for f in found]


@settings(COMMON, max_examples=15)
@given(data=st.data(), shape=st.sampled_from([(211,), (31, 9), (5, 40), (4, 5, 11), (1, 150)]))
def test_any_chunk_grid_and_memory_layout_gives_the_same_bits_under_small_grids(small_grids: Any, data: Any, shape: Any) -> None:
    a = np.random.default_rng(5).standard_normal(shape)
    chunks = tuple(data.draw(st.integers(1, n)) for n in shape)
    with small_grids():
        expected = results(sa.asarray(a))
        assert results(sa.asarray(a, chunks=chunks)) == expected
        assert results(sa.array(a, chunks=chunks)) == expected
        assert results(sa.array(np.repeat(a, 2, axis=0))[::2]) == expected
        with sa.config.set(scheduler="threads"):
            assert results(sa.asarray(a, chunks=chunks)) == expected


def test_one_to_four_workers_and_every_executor_give_the_same_bits() -> None:
    a = np.random.default_rng(5).standard_normal((1201, 703))
    expected = results(sa.asarray(a))
    for workers in (1, 2, 3, 4):
        with sa.Pool(workers=workers):
            for scheduler in ("threads", "processes"):
                with sa.config.set(scheduler=scheduler):
                    assert results(sa.array(a, chunks=(100 * workers, 37))) == expected
                    assert results(sa.asarray(a)) == expected


def test_the_same_reduction_twice_in_one_computation_gives_two_results(small_grids: Any) -> None:
    x = sa.asarray(np.arange(40.0).reshape(4, 10))
    with small_grids():
        for build in (lambda: x.sum(), lambda: x.std(axis=0), lambda: x.cumsum(axis=0), lambda: x + 1, lambda: sa.concatenate([x, x])):
            first, second = sa.compute(build(), build())
            np.testing.assert_array_equal(first, second)
            assert not np.shares_memory(first, second)


def test_reductions_of_one_input_computed_together_or_alone_give_the_same_bits(small_grids: Any) -> None:
    x = sa.asarray(np.random.default_rng(5).standard_normal((40, 30)))
    with small_grids():
        together = sa.compute(x.sum(), x.mean(), x.std(), (x * 2).sum(), x.sum(axis=0))
        alone = (x.sum().compute(), x.mean().compute(), x.std().compute(), (x * 2).sum().compute(), x.sum(axis=0).compute())
    assert [np.asarray(t).tobytes() for t in together] == [np.asarray(t).tobytes() for t in alone]


def test_reductions_agree_with_numpy_at_real_sizes_in_every_executor(executor: str) -> None:
    a = np.random.default_rng(7).standard_normal((1500, 700))
    x = sa.array(a)
    for axis in (None, 0, 1):
        total, mean, std, least, where = sa.compute(x.sum(axis), x.mean(axis), x.std(axis), x.min(axis), x.argmax(axis))
        np.testing.assert_allclose(total, a.sum(axis), rtol=1e-10, atol=1e-9)
        np.testing.assert_allclose(mean, a.mean(axis), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(std, a.std(axis), rtol=1e-10)
        np.testing.assert_array_equal(least, a.min(axis))
        np.testing.assert_array_equal(where, a.argmax(axis))


@pytest.mark.parametrize("dtype", [None, "i1", "u2", "f4", "c8", "?"])
@pytest.mark.parametrize("shape", [(1_000_003,), (3, 100_003), (30, 400, 5)])
def test_sums_of_booleans_agree_with_numpy_where_they_are_counted_and_where_not(shape: tuple[int, ...], dtype: str | None) -> None:
    a = np.random.default_rng(3).random(shape) < 0.3
    x = sa.array(a)

    for axis in (None, *range(a.ndim)):
        total, expected = (~x).sum(axis=axis, dtype=dtype).compute(), (~a).sum(axis=axis, dtype=dtype)
        assert total.dtype == expected.dtype
        np.testing.assert_array_equal(total, expected)
        np.testing.assert_allclose(x.mean(axis=axis).compute(), a.mean(axis=axis), rtol=1e-12)


def test_a_reduction_is_not_of_what_a_longer_chain_of_the_same_pass_writes_over_it(executor: str) -> None:
    a = np.arange(1000.0)
    x = sa.array(a) + sa.array(a)

    assert sa.compute(x.sum(), (x * 2).max(), (x * 2 + 1).min()) == ((a + a).sum(), 4 * a.max(), 1.0)


@pytest.mark.parametrize("engine", ["numpy", "llvm"])
@pytest.mark.parametrize("shape", [(100,), (3, 400_000)])
def test_reductions_heed_errstate(engine: str, shape: tuple[int, ...], outcome: Any) -> None:
    big, infinite = np.full(shape, 1e308), np.full(shape, np.inf)
    with sa.config.set(engine=engine):
        for a, call in (
            (big, lambda v: v.sum()),
            (infinite, lambda v: v.std()),
            (big, lambda v: v.prod()),
            (big, lambda v: v.mean(axis=-1)),
        ):
            x = sa.asarray(a).persist()
            with np.errstate(all="ignore"):
                silent = call(x)
            with np.errstate(over="raise", invalid="raise"):
                loud = call(x)
            assert outcome(silent.compute)[1:] == (None, set())
            assert outcome(loud.compute)[1] is FloatingPointError
            assert outcome(call(x).compute)[2]


@pytest.mark.parametrize("is_numpy", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        lambda x, out: np.sum(x, axis=0, out=out),
        lambda x, out: np.mean(x, axis=0, out=out),
        lambda x, out: np.cumsum(x, axis=0, out=out),
        lambda x, out: np.max(x, axis=0, out=out),
        lambda x, out: np.clip(x, 0, 1, out=out),
        lambda x, out: np.round(x, 1, out=out),
        lambda x, out: np.add(x, 1, out=out),
    ],
)
def test_out_takes_what_numpy_would_write_there(call: Callable[..., Any], is_numpy: bool) -> None:
    a = np.arange(12.0).reshape(3, 4) / 3
    shape = call(a, None).shape
    x = sa.array(a)
    for dtype in (np.float64, np.float32, np.complex128, np.int64, np.bool_):
        theirs, ours = np.ones(shape, dtype), np.ones(shape, dtype)
        target: Any = ours if is_numpy else sa.array(ours)
        try:
            call(a, theirs)
        except TypeError:
            with pytest.raises(TypeError, match=r"Cannot cast .*float64"):
                call(x, target)
            theirs[...] = 1  # NumPy may have begun
        else:
            assert call(x, target) is target
        np.testing.assert_allclose(np.asarray(target), theirs, rtol=1e-6)
    wrong: Any = np.ones((5, 7)) if is_numpy else sa.ones((5, 7)).persist()
    with pytest.raises(ValueError):
        call(x, wrong)
    with pytest.raises(TypeError):
        call(x, [1.0])
