"""Indices of every kind give what NumPy gives, of expressions and of stored arrays, and NumPy's errors where they are written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import shmarray as sa

EXECUTORS = ("synchronous", "threads", "processes")
KINDS = ("stored", "memory", "expression", "fill", "scan")

pytestmark = pytest.mark.usefixtures("pool")


def twins(kind: str, shape: tuple[int, ...], chunk: int, dtype: str = "f8") -> tuple[np.ndarray, Any]:
    """Return an array of NumPy's and the same of ours, which is stored, computed from something, or made from positions."""
    a = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    if kind == "stored":
        return a, sa.array(a, chunks=chunk)
    if kind == "fill":
        return a, sa.arange(a.size, dtype=dtype).reshape(shape).rechunk(chunk)
    x = sa.asarray(a, chunks=chunk)
    if kind == "memory":
        return a, x
    if kind == "scan" and a.ndim:
        return a.cumsum(0), x.cumsum(0)
    return a * 2 - 3, x * 2 - 3


def agree(ours: Any, theirs: Any) -> None:
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert tuple(map(sum, ours.chunks)) == theirs.shape
    np.testing.assert_array_equal(np.asarray(ours), theirs)


@settings(derandomize=True, deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from(KINDS), st.integers(1, 4))
def test_basic_indices_and_indices_of_those(data: st.DataObject, kind: str, chunk: int) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    a, x = twins(kind, shape, chunk)
    with sa.config.set(scheduler="synchronous"):
        for _ in range(3):
            key = data.draw(hnp.basic_indices(a.shape, allow_newaxis=True, allow_ellipsis=True, max_dims=6))
            a, x = np.asarray(a[key]), x[key]
            agree(x, a)
            assert x.is_stored or kind != "stored"
        agree(x + 1, a + 1)
        agree(x.sum(), a.sum())


@settings(derandomize=True, deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from(KINDS), st.integers(1, 4))
def test_integer_arrays_and_masks(data: st.DataObject, kind: str, chunk: int) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=5))
    a, x = twins(kind, shape, chunk)
    key: Any = data.draw(
        st.one_of(
            hnp.integer_array_indices(shape, result_shape=hnp.array_shapes(max_dims=2, max_side=4)),
            hnp.arrays(bool, shape),
            st.just((data.draw(hnp.arrays(bool, shape[0])), ...)),
            st.lists(st.integers(-shape[0], shape[0] - 1), min_size=1, max_size=4),
            st.just((..., [0, -1])),
        )
    )
    with sa.config.set(scheduler="synchronous"):
        agree(x[key], a[key])
        agree(x[key] + 1, a[key] + 1)
        if isinstance(key, np.ndarray):
            agree(x[sa.array(key)], a[key])
            agree(x[sa.asarray(key)], a[key])


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("kind", KINDS)
def test_indices_under_every_executor(kind: str, executor: str) -> None:
    a, x = twins(kind, (5, 7, 3), 2)

    with sa.config.set(scheduler=executor):
        for key in (
            3, (..., 1), (slice(None, None, -2), None, 2), (slice(4, 1, -1), slice(1, 6, 3)), (None, ..., None), (slice(3, 3),),
            (1, 2, 0), a > 20, (slice(1, 4), [0, -1, 0]), (np.int64(2), np.array(1)), [],
        ):  # fmt: skip
            agree(x[key], a[key])
            agree(2 * x[key] - 1, 2 * a[key] - 1)
            agree(x[key].sum(), a[key].sum())
        agree(x[x > 20], a[a > 20])


@pytest.mark.parametrize(
    "key",
    [
        5,
        -6,
        (0, 9),
        (0, 0, 0),
        (..., ...),
        "a",
        1.5,
        (slice(None), 2.0),
        np.array([7]),
        [0, 99],
        np.zeros((2, 2), bool),
        (None, 8),
        object,
    ],
    ids=repr,
)
def test_a_wrong_index_fails_as_in_numpy_at_once(key: Any) -> None:
    a = np.zeros((5, 4))

    with pytest.raises(Exception) as theirs:
        a[key]

    for x in (sa.array(a), sa.asarray(a) + 1):
        with pytest.raises(type(theirs.value)) as ours:
            x[key]
        assert type(ours.value) is type(theirs.value)


def test_an_index_out_of_bounds_names_index_axis_and_size() -> None:
    with pytest.raises(IndexError, match=r"index 9 is out of bounds for axis 1 with size 4"):
        sa.zeros((5, 4))[0, 9]
    with pytest.raises(IndexError, match=r"2-dimensional, but 3"):
        sa.zeros((5, 4))[0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_iteration_goes_along_the_first_axis(kind: str) -> None:
    a, x = twins(kind, (3, 4), 2)

    rows = list(x)

    assert len(rows) == len(x) == 3
    for ours, theirs in zip(rows, a):
        agree(ours, theirs)
    with pytest.raises(TypeError, match="0-d"):
        iter(sa.zeros(()))
    with pytest.raises(TypeError, match="unsized"):
        len(sa.zeros(()))


def test_iteration_in_a_step_gives_rows_of_what_has_no_values_yet() -> None:
    def step(x: sa.Array) -> sa.Array:
        left, right = x * 2
        return sa.stack([right + 1, left])

    x = sa.iterate(step, np.array([[1.0, 2.0], [3.0, 4.0]]), steps=2)

    np.testing.assert_array_equal(x.compute(), [[5, 9], [14, 18]])


def test_chunks_of_a_slice_are_what_is_left_of_those_it_cuts() -> None:
    x = sa.zeros((10, 6), chunks=((4, 4, 2), (3, 3)))

    assert x[3:9].chunks == ((1, 4, 1), (3, 3))
    assert x[::-1].chunks == ((2, 4, 4), (3, 3))
    assert x[1::3, 5].chunks == ((1, 2),)
    assert x[4:4].chunks == ((0,), (3, 3))
    assert x[None, 2].chunks == ((1,), (3, 3))


def test_a_slice_of_much_reads_little(pool: sa.Pool) -> None:
    x = sa.ones((1 << 20, 1 << 12)) * 2  # 32 GiB, were it computed

    assert x[5, 7].compute() == 2
    agree(x[:: 1 << 18, -1], np.full(4, 2.0))
