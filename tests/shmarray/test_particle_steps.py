"""Steps whose indices are made of the state: picking, counting and adding at them, against NumPy loops, for any executor and workers.

Never put here: what else a step may hold (`test_iterate`), indices with values (`test_accumulators`, `test_indexing`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmarray as sa

COMMON = settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


def loop(step: Callable[..., Any], *state: Any, steps: int) -> tuple[Any, ...]:
    arrays: tuple[Any, ...] = tuple(np.array(x) for x in state)
    for _ in range(steps):
        arrays = step(*arrays)
    return arrays


def assert_steps_agree(step: Callable[..., Any], *state: Any, steps: int = 3, scheduler: str | None = None) -> None:
    """One step function serves NumPy and `iterate`: all it computes here is exact."""
    expected = loop(step, *state, steps=steps)
    found = sa.iterate(step, *state, steps=steps, scheduler=scheduler)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


# --- picking ----------------------------------------------------------------------------------------------------------------------

SHAPE = (6, 7, 5)
KEYS: dict[str, Callable[[Any], Any]] = {  # of an array of SHAPE, by one of integers from -5 to 4 that has that shape, too
    "rows": lambda i: i[:, 0, 0],
    "rows by an array of two axes": lambda i: i[0],
    "two axes": lambda i: (i[0], i[1]),
    "two axes, broadcast": lambda i: (i[:, :1, 0], i[:1, :, 0]),
    "all axes": lambda i: (i, i, i),
    "columns": lambda i: (slice(None), i[0]),
    "behind an ellipsis": lambda i: (..., i[0, 0]),
    "before an ellipsis": lambda i: (i[0, 0], ...),
    "apart": lambda i: (i[0, 0], slice(None), i[0, 0]),
    "apart by an ellipsis": lambda i: (i[0], ..., i[1]),
    "beside a slice backwards": lambda i: (slice(None, None, -1), i[0, 0]),
    "beside a slice in steps": lambda i: (i[0, 0], slice(1, None, 2)),
    "beside a new axis": lambda i: (None, i[0, 0], None),
    "beside a number": lambda i: (2, i[0, 0]),
    "apart from a number": lambda i: (i[0, 0], slice(1, 4), 2),
    "one element of the indices": lambda i: i[0, 0, 0],
    "one row by one element": lambda i: (slice(None), i[0, 0, 0]),
    "by indices that are known, too": lambda i: (i[0, 0], np.array([3])),
    "by a list, too": lambda i: (i[0, 0, :2], [0, -1]),
    "none": lambda i: i[:0, 0, 0],
}


@pytest.mark.parametrize("name", KEYS)
def test_elements_are_picked_as_numpy_picks_them(executor: str, name: str) -> None:
    rng = np.random.default_rng(1)
    x, i = rng.random(SHAPE), rng.integers(-5, 5, SHAPE)
    key = KEYS[name]
    assert_steps_agree(lambda x, i, _: (x * 0.5, (i * 3 + 1) % 5, x[key(i)]), x, i, x[key(i)])


@COMMON
@given(
    shape=st.sampled_from([(60,), (9, 8), (5, 4, 6), (1, 40)]),
    indices=st.sampled_from([(1,), (90,), (7, 9)]),
    count=st.integers(1, 2),
    axis=st.integers(-3, 2),
    dtypes=st.tuples(st.sampled_from(["f8", "f4", "i2", "c16", "?"]), st.sampled_from(["i8", "i4", "u2", "i1"])),
    moved=st.booleans(),
    seed=st.integers(0, 99),
)
def test_picking_agrees_with_numpy_whatever_the_shapes(
    small_grids: Any, shape: Any, indices: Any, count: int, axis: int, dtypes: Any, moved: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 9, shape).astype(dtypes[0])
    count, axis = min(count, len(shape)), axis % len(shape)
    i, j = (rng.integers(0 if dtypes[1] == "u2" else -n, n, indices).astype(dtypes[1]) for n in (shape[axis], shape[-1]))

    def step(x: Any, i: Any, j: Any, *_: Any) -> Any:
        seen = x.T if moved else x
        i, j = i % seen.shape[0], j % seen.shape[-1]  # of the same dtype
        some = seen[i, j] if count == 2 and seen.ndim == 2 else seen[i]
        return x, i, j, some, np.take(x, i % x.shape[axis], axis=axis), np.take(x, j % x.size)

    with small_grids():
        assert_steps_agree(step, *step(x, i, j), steps=2, scheduler="synchronous")


def test_what_is_picked_may_be_known_or_lie_anywhere(executor: str) -> None:
    rng = np.random.default_rng(2)
    table, rows = rng.random(50), rng.random((50, 3))
    stored, ours = sa.array(table, chunks=7), sa.array(rows)
    shared = sa.shared.array(table)

    def step(i: Any, s: Any) -> Any:
        picked = sa.take(table, i) + stored[i] + sa.asarray(shared)[i] + ours[i, 1] + (ours * 2)[i][:, 2] + sa.arange(50.0)[i]
        return (i * 7 + 3) % 50, s + picked

    i, s = rng.integers(0, 50, 400), np.zeros(400)
    found, total = sa.iterate(step, i, s, steps=4)
    for _ in range(4):
        s = s + (table[i] + table[i] + table[i] + rows[i, 1] + (rows * 2)[i][:, 2] + np.arange(50.0)[i])
        i = (i * 7 + 3) % 50
    np.testing.assert_array_equal(found, i)
    np.testing.assert_array_equal(total, s)


def test_what_is_picked_twice_is_picked_once() -> None:
    u, i = sa.array(np.arange(100.0)), sa.array(np.arange(100))
    seen: list[int] = []

    def step(u: Any, i: Any) -> Any:
        one, other = u[i], u[i]
        seen.append(one.node is other.node)
        return one + other, i

    sa.iterate(step, u, i, steps=1)
    assert seen == [True]


@pytest.mark.parametrize("bad", [40, -41])
@pytest.mark.parametrize(
    "pick, axis",
    [
        (lambda x, i: x[i][:, 0], 0),
        (lambda x, i: x[:, i][0], 1),
        (lambda x, i: x[0, i], 1),
        (lambda x, i: x[i * 0, i], 1),
        (lambda x, i: x[..., i][0], 1),
        (lambda x, i: x[None, :, i][0, 0], 1),
        (lambda x, i: sa.take(x, i, axis=-1)[0], 1),
    ],
)
def test_an_index_out_of_bounds_names_index_axis_and_length(executor: str, bad: int, pick: Any, axis: int) -> None:
    with pytest.raises(IndexError, match=f"index {bad} is out of bounds for axis {axis} with size 40"):
        sa.iterate(lambda x, i, y: (x, i, pick(x, i)), np.ones((40, 40)), np.array([0, bad, 3]), np.zeros(3), steps=2)


# --- counting and adding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_counting_agrees_with_numpy(executor: str, weighted: bool) -> None:
    rng = np.random.default_rng(3)
    x, w = rng.integers(0, 20, 500), rng.integers(-4, 9, 500).astype(float)

    def step(x: Any, w: Any, counts: Any) -> Any:
        return (x * 3 + 1) % 20, w + 1, counts + np.bincount(x, w if weighted else None, minlength=24)

    assert_steps_agree(step, x, w, np.zeros(24, float if weighted else np.int64), steps=5)


@pytest.mark.parametrize(
    "bad, message", [(24, "bincount met 24, .*in a step the length must be known: give minlength"), (-1, "no negative")]
)
def test_a_number_that_has_no_place_is_told(executor: str, bad: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sa.iterate(lambda x, c: (x, sa.bincount(x, minlength=24)), np.array([3, bad, 5]), np.zeros(24, np.int64), steps=2)


def test_counting_in_a_step_needs_a_length() -> None:
    with pytest.raises(ValueError, match="in a step the length must be known: give minlength"):
        sa.iterate(lambda x: sa.bincount(x), np.arange(5), steps=1)


UFUNCS = ["add", "subtract", "multiply", "minimum", "maximum", "bitwise_or"]


@COMMON
@given(
    name=st.sampled_from(UFUNCS),
    shape=st.sampled_from([(1,), (20,), (4, 5), (2, 3, 4)]),
    dtypes=st.tuples(st.sampled_from(["i1", "i8", "u2", "f4", "f8", "?"]), st.sampled_from(["i1", "i8", "u2", "f4", "f8", "?"])),
    indices=st.sampled_from([(), (1,), (90,), (6, 15)]),
    axes=st.integers(1, 3),
    target=st.sampled_from(["copy", "expression", "zeros", "view"]),
    scalar=st.booleans(),
    seed=st.integers(0, 99),
)
def test_adding_at_indices_agrees_with_numpy(
    small_grids: Any, name: str, shape: Any, dtypes: Any, indices: Any, axes: int, target: str, scalar: bool, seed: int
) -> None:
    ufunc = getattr(np, name)
    rng = np.random.default_rng(seed)
    axes = min(axes, len(shape))
    x = rng.integers(0, 3, shape).astype(dtypes[0])
    values = rng.integers(0, 3, indices + shape[axes:]).astype(dtypes[1])
    parts = [rng.integers(-n, n, indices) for n in shape[:axes]]

    def step(x: Any, values: Any, *parts: Any) -> Any:
        lib = sa if isinstance(x, sa.Array) else np
        e = {"copy": x.copy, "expression": lambda: x + x, "zeros": lambda: lib.zeros(shape, x.dtype), "view": x.copy}[target]()
        place = e[::-1] if target == "view" else e
        ufunc.at(place, parts if axes > 1 else parts[0], x.dtype.type(2) if scalar else values)
        return e, values, *parts

    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except TypeError as error:
            return error

    # Values that stay small, but for products of them, which wrap alike.
    with small_grids(), np.errstate(all="ignore"):
        expected = outcome(lambda: loop(step, x, values, *parts, steps=2))
        found = outcome(lambda: sa.iterate(step, x, values, *parts, steps=2, scheduler="synchronous"))
    if isinstance(expected, TypeError):
        assert isinstance(found, TypeError)
    elif isinstance(found, TypeError):  # where NumPy casts back after each index, and their order matters
        assert not np.can_cast(np.result_type(*dtypes), dtypes[0]) and "give values of" in str(found)
    else:
        np.testing.assert_allclose(found[0], expected[0], rtol=0 if np.dtype(dtypes[0]).kind in "iub" else 1e-5)
        assert found[0].dtype == x.dtype


def test_adding_goes_through_views_and_keeps_what_the_state_was(executor: str) -> None:
    def step(d: Any, i: Any, w: Any) -> Any:
        e = d.copy()
        inner = e[1:-1]
        np.add.at(inner, i, w)
        np.subtract.at(e, (i + 1) % 40, 3.0)
        np.maximum.at(e, i[:5], 2.0)
        return e + d, (i * 7 + 2) % 38, w

    rng = np.random.default_rng(4)
    assert_steps_agree(step, np.zeros(40), rng.integers(-38, 38, 300), rng.integers(-3, 9, 300).astype(float), steps=5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda e, i: np.divide.at(e, i, 2.0), "divide.at in a step of iterate.*does not depend on the order"),
        (lambda e, i: np.add.at(e, (i, i), 2.0), "or a tuple of up to 1 of them"),
        (lambda e, i: np.add.at(e, i > 2, 2.0), "takes an array of integers"),
        (lambda e, i: np.add.at(e, i, 2j), "what is lost there depends on their order; give values of float64"),
    ],
)
def test_what_cannot_be_added_in_a_step_is_told(call: Any, message: str) -> None:
    def step(d: Any, i: Any) -> Any:
        e = d.copy()
        call(e, i)
        return e, i

    with pytest.raises(TypeError, match=message):
        sa.iterate(step, np.zeros(10), np.arange(10), steps=1)


@pytest.mark.parametrize("bad", [30, -31])
def test_adding_beyond_the_array_is_an_index_error(executor: str, bad: int) -> None:
    def step(d: Any, i: Any) -> Any:
        e = d.copy()
        sa.add.at(e, i, 1.0)
        return e, i

    with pytest.raises(IndexError, match=f"add.at: index {bad} is out of bounds for axis 0 with size 30"):
        sa.iterate(step, np.zeros(30), np.array([1, bad]), steps=2)


# --- the same bits -----------------------------------------------------------------------------------------------------------------


def push(x: Any, v: Any, rho: Any) -> Any:
    """Charges of uneven weight to cells, and a force back: of floats, in several tiles."""
    cell = (x * 100).astype(np.int64)
    share = x * 100 - cell
    e = sa.zeros(101)
    sa.add.at(e, cell, 1 - share)
    sa.add.at(e, cell + 1, share)
    rho = e[:-1] + sa.bincount(cell, v, minlength=100)
    field = rho - rho.mean()
    v = v + 1e-6 * (field[cell] * (1 - share) + field[(cell + 1) % 100] * share)
    return (x + 0.01 * v) % 1.0, v, rho


def test_bits_depend_on_neither_workers_nor_executor() -> None:
    rng = np.random.default_rng(5)
    state = rng.random(700_001), rng.standard_normal(700_001), np.zeros(100)
    found = set()
    for workers, scheduler in ((1, "processes"), (3, "processes"), (2, "threads"), (2, "synchronous"), (2, None)):
        with sa.Pool(workers=workers, memory_limit="256MiB"):
            results = sa.iterate(push, *state, steps=4, scheduler=scheduler)
            found.add(tuple(np.asarray(r).tobytes() for r in results))
    assert len(found) == 1
    with sa.Pool(workers=2, memory_limit="256MiB"):
        half = sa.iterate(push, *sa.iterate(push, *state, steps=1), steps=3)
        assert tuple(np.asarray(r).tobytes() for r in half) in found
