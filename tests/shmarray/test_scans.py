"""Running sums and other accumulations along any axis, on the path of one task per lane and on the segmented one."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmarray as sa

COMMON = settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
DTYPES = ["?", "i1", "u2", "i4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]
UFUNCS = [
    "add",
    "multiply",
    "minimum",
    "maximum",
    "fmin",
    "fmax",
    "logical_or",
    "logical_and",
    "bitwise_or",
    "bitwise_xor",
    "subtract",
    "divide",
    "hypot",
    "logaddexp",
]
SHAPES = st.sampled_from([(1,), (7,), (130,), (16, 9), (1, 40), (40, 1), (3, 60), (60, 3), (3, 4, 15), (2, 25, 3), (0,), (0, 4), (4, 0)])


@pytest.fixture(autouse=True)
def _in_this_process() -> Any:
    with sa.config.set(scheduler="synchronous"):
        yield


def values(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype).kind
    if kind == "b":
        return rng.random(shape) < 0.5
    if kind in "fc":
        return (rng.random(shape) + 0.5).astype(dtype)
    return rng.integers(0, 5, shape).astype(dtype)


def rtol(dtype: np.dtype[Any]) -> float:
    return {np.dtype("f2"): 2e-2, np.dtype("f4"): 1e-5, np.dtype("c8"): 1e-5}.get(dtype, 1e-12) if dtype.kind in "fc" else 0.0


@COMMON
@given(data=st.data(), name=st.sampled_from(["cumsum", "cumprod"]), dtype=st.sampled_from(DTYPES), shape=SHAPES, seed=st.integers(0, 99))
def test_cumsum_and_cumprod_along_any_axis_agree_with_numpy(
    small_grids: Any, assert_same: Any, data: Any, name: str, dtype: str, shape: Any, seed: int
) -> None:
    a = values(shape, dtype, seed)
    axis = data.draw(st.one_of(st.none(), st.integers(-a.ndim, a.ndim - 1)))
    kwargs = {"dtype": data.draw(st.sampled_from(["f8", "c16", "i8"]))} if data.draw(st.booleans()) else {}
    with np.errstate(all="ignore"):
        try:
            expected = getattr(np, name)(a, axis=axis, **kwargs)
        except TypeError:
            with pytest.raises(TypeError):
                getattr(sa, name)(sa.asarray(a), axis=axis, **kwargs)
            return
        with small_grids(), sa.config.set(scheduler=data.draw(st.sampled_from(["synchronous", "threads"]))):
            x = data.draw(st.sampled_from([sa.asarray(a), sa.array(a), sa.array(a.T.copy()).T, sa.array(a[::-1].copy())[::-1]]))
            found = getattr(data.draw(st.sampled_from([sa, np])), name)(x, axis=axis, **kwargs).compute()
    tolerance = rtol(expected.dtype)
    assert_same(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", UFUNCS)
@pytest.mark.parametrize("shape", [(150,), (5, 40), (40, 5)])
def test_accumulate_of_any_ufunc_agrees_with_numpy(name: str, shape: Any, small_grids: Any, assert_same: Any, outcome: Any) -> None:
    ufunc = getattr(np, name)
    for dtype in ("?", "i4", "f8"):
        a = values(shape, dtype, 1)
        for axis in range(a.ndim):
            expected, error, _ = outcome(lambda x=a, k=axis: ufunc.accumulate(x, axis=k))
            with small_grids():
                found, our_error, _ = outcome(lambda x=a, k=axis: ufunc.accumulate(sa.asarray(x), axis=k))
            assert our_error is error
            if error is None:
                assert_same(found, expected, rtol=rtol(expected.dtype))


def test_nan_and_infinity_carry_over_segments(small_grids: Any) -> None:
    a = np.ones(100)
    a[[30, 60]] = np.inf, np.nan
    with small_grids():
        for ufunc in (np.add, np.maximum, np.fmax):
            np.testing.assert_array_equal(ufunc.accumulate(sa.asarray(a)).compute(), ufunc.accumulate(a))


def test_out_is_written(small_grids: Any) -> None:
    a = np.arange(90).reshape(9, 10)
    with small_grids():
        for out in (np.zeros((9, 10), int), sa.array(np.zeros((9, 10), int)), sa.zeros((9, 10), int)):
            assert np.cumsum(sa.asarray(a), axis=1, out=out) is out
            np.testing.assert_array_equal(np.asarray(out), a.cumsum(axis=1))
        own = sa.array(a)
        np.add.accumulate(own, axis=0, out=own)
        np.testing.assert_array_equal(own.compute(), a.cumsum(axis=0))


def test_scans_of_expressions_and_expressions_of_scans(small_grids: Any) -> None:
    a = np.arange(120.0).reshape(6, 20)
    with small_grids():
        x = sa.asarray(a)
        np.testing.assert_allclose(((x * 2).cumsum(axis=1) + x).compute(), (a * 2).cumsum(axis=1) + a)
        np.testing.assert_allclose(x.cumsum(axis=0).sum(axis=1).compute(), a.cumsum(axis=0).sum(axis=1))
        np.testing.assert_allclose(x[::-1, ::3].cumsum(axis=1).cumsum(axis=0).compute(), a[::-1, ::3].cumsum(axis=1).cumsum(axis=0))


def test_misuse_raises_numpys_errors() -> None:
    with pytest.raises(np.exceptions.AxisError):
        sa.cumsum(sa.ones((2, 3)), axis=2)
    with pytest.raises(TypeError):
        np.add.accumulate(sa.asarray(np.float64(1)))


def test_segmented_scans_of_real_size_are_right_in_every_executor(executor: str) -> None:
    for shape in ((1_300_001,), (2, 700_000), (700_000, 2)):
        a = np.arange(np.prod(shape)).reshape(shape) % 17
        axis = int(np.argmax(shape))
        np.testing.assert_array_equal(sa.cumsum(sa.asarray(a), axis=axis).compute(), a.cumsum(axis=axis))
        np.testing.assert_array_equal(np.maximum.accumulate(sa.asarray(a), axis=axis).compute(), np.maximum.accumulate(a, axis=axis))


def test_scans_have_the_same_bits_for_any_workers_and_chunks() -> None:
    a = np.random.default_rng(3).standard_normal(1_100_003)
    expected = sa.cumsum(sa.asarray(a)).compute().tobytes()
    for workers in (1, 2, 3):
        with sa.Pool(workers=workers), sa.config.set(scheduler="processes"):
            assert sa.cumsum(sa.array(a, chunks=77_777 * workers)).compute().tobytes() == expected
    np.testing.assert_allclose(np.frombuffer(expected), a.cumsum(), atol=1e-8)


@pytest.mark.parametrize("n", [3000, 1_100_003])
def test_running_results_warn_as_numpys(n: int) -> None:
    a = np.full(n, 1e308)
    caught = []
    for call in (lambda: np.cumsum(a), lambda: sa.cumsum(sa.asarray(a).persist()).compute()):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
        caught.append({str(w.message) for w in seen})
    assert caught[1] == caught[0] == {"overflow encountered in accumulate"}


@pytest.mark.parametrize("items", [100, 600_000])
def test_scans_heed_errstate_as_it_was_when_they_were_built(items: int) -> None:
    a = np.full(items, 1e307)
    with pytest.warns(RuntimeWarning, match="overflow encountered in accumulate") as caught:
        sa.cumsum(sa.array(a)).compute()
    assert {w.filename for w in caught} == {__file__}
    with np.errstate(over="ignore"):
        quiet = sa.cumsum(sa.array(a))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(quiet.compute()[50:], np.inf)
    with np.errstate(over="raise"):
        loud = sa.cumsum(sa.array(a))
    with pytest.raises(FloatingPointError, match="overflow"):
        loud.compute()
