"""Slopes and values in between: `gradient` and `interp` are NumPy's to the bit, lazy, in steps too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmarray as sa

COMMON = settings(derandomize=True, deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])


def numbers(shape: Any, dtype: str, seed: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 20, shape) + (1j * rng.normal(size=shape) if np.dtype(dtype).kind == "c" else 0)
    return np.asarray(np.abs(values) if np.dtype(dtype).kind == "u" else values).astype(dtype)


# --- gradient ---------------------------------------------------------------------------------------------------------------------


@COMMON
@given(
    shape=st.sampled_from([(2,), (3,), (50,), (2, 3), (7, 9), (4, 0), (3, 4, 5)]),
    dtype=st.sampled_from(["f8", "f4", "f2", "i4", "u1", "c16"]),
    spacing=st.sampled_from([(), (2,), (0.3,), (np.float64(0.1),), (np.float32(0.7),), "each", "coordinates", "too many"]),
    axis=st.sampled_from([None, 0, -1, (0,), (1, 0), (-1, -2), 3]),
    edge_order=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_gradient_is_numpys(small_grids: Any, shape: Any, dtype: str, spacing: Any, axis: Any, edge_order: int, seed: int) -> None:
    x = numbers(shape, dtype, seed)
    axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    if spacing == "each":
        spacing = tuple(0.25 * (k + 1) for k in range(len(axes)))
    elif spacing == "coordinates":
        spacing = tuple(np.arange(x.shape[a] if a < x.ndim else 2) ** 1.5 for a in axes if -x.ndim <= a)
    elif spacing == "too many":
        spacing = (1.0,) * (len(axes) + 1 + (len(axes) == 0))

    def outcome(lib: Any, x: Any) -> Any:
        try:
            found = lib.gradient(x, *spacing, axis=axis, edge_order=edge_order)
            return tuple(map(np.asarray, found)) if isinstance(found, tuple) else (np.asarray(found), "alone")
        except (ValueError, TypeError, IndexError) as error:
            return type(error)

    with small_grids(), np.errstate(all="ignore"), sa.config.set(scheduler="synchronous"):
        expected = outcome(np, x)
        for found in (outcome(sa, sa.array(x)), outcome(np, sa.array(x))):
            if isinstance(expected, type):
                assert found is expected
                continue
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                if not isinstance(other, str):
                    assert one.dtype == other.dtype
                    np.testing.assert_array_equal(one, other)


def test_gradients_fuse_with_what_reads_them() -> None:
    u = sa.array(numbers((300, 200), "f8", 1))
    down, along = sa.gradient(u, 0.1)
    steepness = sa.sqrt(down**2 + along**2)
    assert len(steepness.plan().layers) == 1
    expected = np.gradient(np.asarray(u), 0.1)
    np.testing.assert_array_equal(steepness, np.sqrt(expected[0] ** 2 + expected[1] ** 2))


@pytest.mark.parametrize("edge_order", [1, 2])
def test_gradients_stand_in_steps(executor: str, edge_order: int) -> None:
    def step(u: Any, h: Any = 0.5) -> Any:
        return u + 0.01 * np.gradient(np.gradient(u, h, edge_order=edge_order), h, edge_order=edge_order)

    u = numbers(400, "f8", 2)
    expected = u
    for _ in range(6):
        expected = step(expected)
    np.testing.assert_array_equal(sa.iterate(step, u, steps=6), expected)
    np.testing.assert_array_equal(sa.iterate(step, u, steps=6, scalars={"h": lambda k: 0.5}), expected)


# --- interp -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
@COMMON
@given(
    shape=st.sampled_from([(), (0,), (1,), (200,), (9, 11)]),
    count=st.sampled_from([0, 1, 2, 30, 300]),
    dtypes=st.tuples(st.sampled_from(["f8", "f4", "i4", "c16"]), st.sampled_from(["f8", "f4", "i2", "c16"])),
    ends=st.sampled_from([(), (0.0,), (-0.0, 7.5), (None, 3), (1 + 2j,), (None, None, 25.0), (None, None, 0)]),
    kind=st.sampled_from(["numpy", "stored", "lazy", "list"]),
    through_numpy=st.booleans(),
    seed=st.integers(0, 99),
)
def test_interp_is_numpys(
    small_grids: Any, shape: Any, count: int, dtypes: Any, ends: Any, kind: str, through_numpy: bool, seed: int
) -> None:
    x = numbers(shape, dtypes[0], seed)
    xp, fp = np.sort(numbers(count, "f8", seed + 1)), numbers(count, dtypes[1], seed + 2)
    give = {"numpy": lambda a: a, "stored": sa.array, "lazy": lambda a: sa.asarray(a)[::-1][::-1] + 0, "list": lambda a: a.tolist()}[kind]

    def outcome(call: Any) -> Any:
        try:
            return np.asarray(call())
        except (ValueError, TypeError) as error:
            return type(error)

    with small_grids(), sa.config.set(scheduler="synchronous"):
        lib = np if through_numpy else sa
        found = outcome(lambda: lib.interp(sa.asarray(x), give(xp), give(fp), *ends))
        expected = outcome(lambda: np.interp(x, xp, np.asarray(give(fp)), *ends))
    if isinstance(expected, type):
        assert found is expected
        return
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)
    if expected.dtype.kind == "f":
        np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def test_interp_needs_points_of_one_length() -> None:
    with pytest.raises(ValueError, match="fp and xp are not of the same length"):
        sa.interp(sa.zeros(3), np.arange(4.0), np.arange(5.0))
    with pytest.raises(ValueError):
        sa.interp(sa.zeros(3), np.zeros((2, 2)), np.zeros((2, 2)))


def test_interp_keeps_chunks_and_reads_points_as_they_are_then(executor: str) -> None:
    x, points = sa.array(numbers(500_000, "f8", 3), chunks=77_777), sa.array(np.arange(-50.0, 50.0))
    values = sa.array(np.arange(100.0) ** 2)
    found = sa.interp(x, points, values.live)
    values += 1
    assert found.chunks == x.chunks
    np.testing.assert_array_equal(found, np.interp(x.compute(), np.arange(-50.0, 50.0), np.arange(100.0) ** 2 + 1))


def test_interp_in_steps_follows_the_state(executor: str) -> None:
    grid = np.linspace(0, 1, 33)

    def step(x: Any, f: Any) -> Any:
        return (x + 0.01 * np.interp(x, grid, f)) % 1.0, f * 0.75 + np.interp(grid, grid[::2], f[::2]) * 0.25

    x, f = np.random.default_rng(4).random(2000), np.sin(7 * grid)
    found = sa.iterate(step, x, f, steps=7)
    for _ in range(7):
        x, f = step(x, f)
    np.testing.assert_array_equal(found[0], x)
    np.testing.assert_array_equal(found[1], f)
