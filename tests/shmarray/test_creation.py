"""Arrays from nothing and from data equal NumPy's, whatever their chunks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shmarray as sa

COMMON = settings(derandomize=True, deadline=None, max_examples=150)
NUMBERS = st.one_of(st.integers(-60, 60), st.floats(-20, 20, allow_nan=False, width=32))


@pytest.fixture(autouse=True)
def _in_this_process() -> Any:
    with sa.config.set(scheduler="synchronous"):
        yield


# --- ranges ----------------------------------------------------------------------------------------------------------------------


@COMMON
@given(start=NUMBERS, stop=NUMBERS, step=NUMBERS.filter(lambda s: abs(s) > 0.05), cut=st.integers(1, 50))
def test_arange_agrees_with_numpy(small_grids: Any, assert_same: Any, start: Any, stop: Any, step: Any, cut: int) -> None:
    with small_grids():
        assert_same(sa.arange(start, stop, step, chunks=cut).compute(), np.arange(start, stop, step))


@pytest.mark.parametrize(
    "args",
    [
        (5,),
        (0,),
        (-3,),
        (2.5,),
        (10, 2),
        (10, 2, -3),
        (0, 1, 0.1),
        (1, 0, -0.1),
        (0, 10, 3),
        (2**62, 2**62 + 5),
        (1e300, 3e300, 1e299),
        (True,),
        (7, None),
    ],
)
@pytest.mark.parametrize("dtype", [None, "i1", "u8", "f2", "f4", "f8", "c16"])
def test_arange_of_any_dtype_agrees_with_numpy(args: Any, dtype: Any, assert_same: Any, outcome: Any) -> None:
    expected, error, _ = outcome(lambda: np.arange(*args, dtype=dtype))
    found, our_error, _ = outcome(lambda: sa.arange(*args, dtype=dtype))
    assert our_error is error
    if error is None and np.isfinite(expected).all():  # NumPy goes on from inf and inf with NaN
        assert_same(found, expected)


def test_arange_of_dates_agrees_with_numpy(assert_same: Any) -> None:
    day, hour = np.datetime64("2020-02-27"), np.timedelta64(7, "h")
    assert_same(sa.arange(day, day + 9).compute(), np.arange(day, day + 9))
    assert_same(sa.arange(day, day + 9, hour).compute(), np.arange(day, day + 9, hour))


def test_a_step_of_zero_raises_numpys_error() -> None:
    with pytest.raises(ZeroDivisionError):
        sa.arange(0, 5, 0)


@COMMON
@given(start=NUMBERS, stop=NUMBERS, num=st.integers(0, 90), endpoint=st.booleans(), dtype=st.sampled_from([None, "f4", "i4", "c16"]))
def test_linspace_agrees_with_numpy(
    small_grids: Any, assert_same: Any, start: Any, stop: Any, num: int, endpoint: bool, dtype: Any
) -> None:
    with small_grids():
        assert_same(sa.linspace(start, stop, num, endpoint, dtype=dtype).compute(), np.linspace(start, stop, num, endpoint, dtype=dtype))


def test_linspace_gives_its_step_and_numpys_errors(assert_same: Any) -> None:
    found, step = sa.linspace(1, 2, 7, retstep=True)
    expected, expected_step = np.linspace(1, 2, 7, retstep=True)
    assert step == expected_step
    assert_same(found.compute(), expected)
    assert_same(sa.linspace(1, 2j, 7).compute(), np.linspace(1, 2j, 7))
    with pytest.raises(ValueError):
        sa.linspace(0, 1, -1)
    with pytest.raises(TypeError):
        sa.linspace(0, 1, 2.5)


# --- constants and patterns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), 0, 7, (3, 4), (2, 0), (2, 3, 4), np.int64(5), [2, 2]])
@pytest.mark.parametrize("dtype", ["?", "u1", "i8", "f2", "f8", "c8", "M8[s]", "m8[ms]", "S3", "U3", "i4,f8", ">f8"])
def test_zeros_ones_full_empty_agree_with_numpy(shape: Any, dtype: str, assert_same: Any, outcome: Any) -> None:
    if isinstance(shape, tuple) and not shape and dtype[0] in "SU>":
        pytest.skip("a NumPy scalar has no such dtype")
    assert_same(sa.zeros(shape, dtype).compute(), np.zeros(shape, dtype))
    assert sa.empty(shape, dtype).compute().shape == np.empty(shape, dtype).shape
    expected, error, _ = outcome(lambda: np.ones(shape, dtype))
    found, our_error, _ = outcome(lambda: sa.ones(shape, dtype))
    assert our_error is error
    if error is None:
        assert_same(found, expected)


@pytest.mark.parametrize("value", [1, 2.5, True, -1, 1j, np.float32(3), np.nan, -0.0, 2**63, "abc", np.datetime64("2020-01-01"), [1, 2, 3]])
@pytest.mark.parametrize("dtype", [None, "f4", "i8"])
def test_full_agrees_with_numpy(value: Any, dtype: Any, assert_same: Any, outcome: Any) -> None:
    expected, error, _ = outcome(lambda: np.full((2, 3), value, dtype))
    found, our_error, _ = outcome(lambda: sa.full((2, 3), value, dtype))
    assert our_error is error
    if error is None:
        assert_same(found, expected)
        if expected.dtype.kind == "f":
            np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


@pytest.mark.parametrize("name", ["zeros_like", "ones_like", "empty_like", "full_like"])
def test_like_functions_take_shape_dtype_and_chunks(name: str, assert_same: Any) -> None:
    a = np.arange(12, dtype="i2").reshape(3, 4)
    x = sa.asarray(a, chunks=2)
    extra = (7.9,) if name == "full_like" else ()
    for module, kwargs in itertools.product((np, sa), ({}, {"dtype": "f4"}, {"shape": (5,)}, {"shape": (5, 2), "dtype": "?"})):
        found, expected = getattr(module, name)(x, *extra, **kwargs), getattr(np, name)(a, *extra, **kwargs)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        if "shape" not in kwargs:
            assert found.chunks == x.chunks
        if name != "empty_like":
            assert_same(found.compute(), expected)


@pytest.mark.parametrize("args", [(3,), (3, 5), (5, 3), (0,), (4, None, 1), (4, 6, -2), (4, 4, 9), (40, 30, 3)])
def test_eye_and_identity_agree_with_numpy(args: Any, small_grids: Any, assert_same: Any) -> None:
    with small_grids():
        assert_same(sa.eye(*args).compute(), np.eye(*args))
        assert_same(sa.eye(*args, dtype="i1", chunks=3).compute(), np.eye(*args, dtype="i1"))
        assert_same(sa.eye(*args)[::-2, 1:].T.compute(), np.eye(*args)[::-2, 1:].T)
        assert_same(sa.identity(args[0]).compute(), np.identity(args[0]))


@pytest.mark.parametrize("chunks", ["auto", 2, -1])
def test_fromfunction_and_indices_agree_with_numpy(chunks: Any, assert_same: Any) -> None:
    def function(i: Any, j: Any) -> Any:
        return i * 10 + j

    assert_same(sa.fromfunction(function, (5, 7), chunks=chunks).compute(), np.fromfunction(function, (5, 7)))
    assert_same(sa.fromfunction(function, (5, 7), dtype=int, chunks=chunks).compute(), np.fromfunction(function, (5, 7), dtype=int))
    for dimensions in ((5,), (3, 4), (2, 3, 4), (2, 0)):
        assert_same(sa.indices(dimensions).compute(), np.indices(dimensions))


def test_bad_shapes_and_dtypes_raise_numpys_errors() -> None:
    for make in (sa.zeros, sa.ones, sa.empty, lambda s, d=float: sa.full(s, 1, d)):
        with pytest.raises(ValueError):
            make((2, -1))
        with pytest.raises(TypeError):
            make((2.5, 1))
        with pytest.raises(TypeError):
            make((2, 1), "no such dtype")
        with pytest.raises(TypeError):
            make((2, 1), object)


# --- from data -----------------------------------------------------------------------------------------------------------------------


class Recorder:
    """The least that h5py and zarr arrays have: shape, dtype and basic slicing."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.values, self.shape, self.dtype, self.ndim = values, values.shape, values.dtype, values.ndim
        self.asked: list[Any] = []

    def __getitem__(self, key: Any) -> Any:
        self.asked.append(key)
        return self.values[key]


DATA = [
    3,
    2.5,
    True,
    1j,
    [1, 2, 3],
    [[1, 2.5], [3, 4]],
    (),
    [],
    [[]],
    "abc",
    b"abc",
    ["a", "bcd"],
    np.float32(3),
    np.array(5),
    range(4),
    [True, 2],
]


@pytest.mark.parametrize("data", DATA, ids=repr)
def test_array_and_asarray_of_any_data_agree_with_numpy(data: Any, assert_same: Any) -> None:
    assert_same(np.asarray(sa.array(data)), np.array(data))
    assert_same(np.asarray(sa.asarray(data)), np.array(data))
    assert sa.array(data, ndmin=3).shape == np.array(data, ndmin=3).shape


@pytest.mark.parametrize("data", [Ellipsis, None, [None], {"a": 1}, [[1, 2], [3]], [1, Ellipsis]], ids=repr)
def test_what_is_no_array_of_numbers_is_refused_at_once(data: Any) -> None:
    for make in (sa.array, sa.asarray, sa.from_array):
        with pytest.raises((TypeError, ValueError)):
            make(data)


def test_array_copies_and_asarray_reads_where_the_data_lies() -> None:
    a = np.arange(5)
    copy, view = sa.array(a), sa.asarray(a)
    a[0] = 99
    assert copy.compute()[0] == 0
    assert view.compute()[0] == 99
    assert copy.is_stored and not view.is_stored
    assert sa.asarray(copy) is copy
    assert sa.array(copy) is not copy
    assert sa.asarray(copy, dtype="f4").dtype == "f4"


@pytest.mark.parametrize("chunks", ["auto", 4, (3, 5), {0: 2}, ((1, 9), (11,))])
def test_sources_that_only_slice_are_read_by_their_slices(chunks: Any, assert_same: Any, executor: str) -> None:
    a = np.arange(110.0).reshape(10, 11)
    source = Recorder(a)
    x = sa.from_array(source, chunks)
    assert not source.asked
    assert_same(x.compute(), a)
    assert_same(x[2:5, ::-2].compute(), a[2:5, ::-2])
    assert_same((x + x.T[:10, :1]).sum(axis=0).compute(), (a + a.T[:10, :1]).sum(axis=0))
    assert_same(sa.asarray(source).persist().compute(), a)


def test_memory_maps_and_views_are_read_in_place(tmp_path: Path, assert_same: Any, executor: str) -> None:
    a = np.arange(60_000.0).reshape(300, 200)
    np.save(tmp_path / "a.npy", a)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    for source, expected in (
        (mapped, a),
        (a.T, a.T),
        (a[::-2, ::3], a[::-2, ::3]),
        (np.broadcast_to(a[0], (300, 200)), np.broadcast_to(a[0], (300, 200))),
    ):
        x = sa.from_array(source, chunks=50)
        assert_same(x.compute(), expected)
        assert_same((x * 2 + 1).compute(), expected * 2 + 1)
    assert_same(sa.from_array(a.astype(">f8")).sum(axis=0).compute(), a.sum(axis=0))


def test_from_array_takes_the_chunks_of_its_source() -> None:
    source = Recorder(np.zeros((10, 12)))
    source.chunks = (5, 4)  # type: ignore[attr-defined]  # as h5py and zarr have it
    assert sa.from_array(source).chunks == ((5, 5), (4, 4, 4))
    assert sa.from_array(source, chunks=(10, 6)).chunks == ((10,), (6, 6))


def test_a_source_that_fails_raises_its_own_error() -> None:
    class Broken(Recorder):
        def __getitem__(self, key: Any) -> Any:
            raise OSError("the disk is gone")

    for scheduler in ("synchronous", "threads", "processes"):
        with pytest.raises(OSError, match="the disk is gone"):
            sa.from_array(Broken(np.zeros((4, 4)))).sum().compute(scheduler=scheduler)


@pytest.mark.parametrize("kind", [str, "S", "U", np.bytes_, np.dtype("U0")])
@pytest.mark.parametrize("values", [[1, 22, -3], [1.5, 2.0], [True, False], ["abc", "d"], [1j]])
def test_a_string_dtype_without_a_length_gets_the_length_numpy_gives(kind: Any, values: list[Any]) -> None:
    data = np.array(values)

    for ours, theirs in [
        (sa.array(data).astype(kind), data.astype(kind)),
        (sa.asarray(data, dtype=kind), np.asarray(data, dtype=kind)),
        (sa.asarray(sa.array(data), dtype=kind), np.asarray(data, dtype=kind)),
        (sa.array(values, dtype=kind), np.array(values, dtype=kind)),
        (sa.zeros(3, kind), np.zeros(3, kind)),
        (sa.ones(3, kind), np.ones(3, kind)),
        (sa.zeros_like(data, dtype=kind), np.zeros_like(data, dtype=kind)),
    ]:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours.compute(), theirs)


def test_dates_cast_to_dates_without_a_unit_keep_theirs() -> None:
    days = np.array(["2020-01-01", "2021-02-03"], "M8[D]")

    cast = sa.array(days).astype("M8")

    assert cast.dtype == days.dtype
    np.testing.assert_array_equal(cast.compute(), days)


@pytest.mark.parametrize("make", [sa.asarray, sa.array, sa.from_array, lambda m: sa.ones(3) + m, lambda m: np.add(sa.ones(3), m), sa.sum])
def test_masked_arrays_are_refused_for_their_masks_would_be_lost(make: Any) -> None:
    with pytest.raises(TypeError, match="filled"):
        make(np.ma.masked_array([1, 2, 3], [0, 1, 0]))
