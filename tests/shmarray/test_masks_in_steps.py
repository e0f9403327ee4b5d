"""Masks and index arrays in steps of simulations: what is picked and assigned is what NumPy picks and assigns, warnings included."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shmarray as sa

pytestmark = pytest.mark.usefixtures("pool")
RNG = np.random.default_rng(7)
SQUARE = RNG.random((9, 12)) - 0.3
SQUARE[3, 4:7] = 0
STACK = RNG.random((5, 9, 12)) - 0.3
SOLID = RNG.random((9, 12)) < 0.3
ROWS = SOLID[:, 0]
Step = Callable[[Any], Any]


def written(change: Callable[[Any, Any], None]) -> Step:
    """Return the step that copies its array and has ``change(copy, array)`` write into the copy."""

    def step(u: Any) -> Any:
        v = u.copy()
        change(v, u)
        return v

    return step


def scalar(v: Any, u: Any) -> None:
    v[u > 0.2] = 0.1
    v[v < 0] = -1


def elements(v: Any, u: Any) -> None:
    m = u > 0.2
    v[m] = u[m] * 0.5 - 3 * np.sqrt(u[m])


def in_place(v: Any, u: Any) -> None:
    v[u > 0.2] -= 0.3
    v[1:-1, 1:-1][u[1:-1, 1:-1] < 0] *= -0.5


def quotient(v: Any, u: Any) -> None:
    v[u != 0] = 0.1 / u[u != 0]


def sums(v: Any, u: Any) -> None:
    m = u > 0.1
    v[m] += u[m].mean() - 0.1 * u[m].max() + u[m].min() + u[~m].sum() * 0.01 + u[m].std() + u[m].var() + u[m].prod()
    v[0, 0] = u[m].any() & u[m].all()


def constant(v: Any, u: Any) -> None:
    v[SOLID] = -u[SOLID]
    v[~SOLID] += 1


def rows_by_mask(v: Any, u: Any) -> None:
    v[u[:, 0] > 0] = u[u[:, 0] > 0] * np.arange(12.0)
    v[u[:, 1] > 0, 2:5] = 7
    v[u[:, 2] > 0] = np.arange(12.0)


def constant_rows(v: Any, u: Any) -> None:
    v[ROWS] = u[ROWS] * 2
    v[:, SOLID[0]] = u[:, SOLID[1]][:, : SOLID[0].sum()] if SOLID[1].sum() >= SOLID[0].sum() else 1


def indices(v: Any, u: Any) -> None:
    v[[0, -1]] = u[[1, -2]]
    v[:, [0, -1]] = 0
    v[[1, 2, 1], [3, 4, 3]] = u[:3, 0]
    v[np.arange(9)[:, None], [1, 5]] = u[:, :1] * 0.5
    v[np.array([[2, 3], [4, 5]])] = u[0]


def number_and_mask(v: Any, u: Any) -> None:
    v[0, u[1] > 0] = u[0, u[1] > 0] + 1
    v[2][u[2] > 0] = 5
    v[u[:, 3] > 0, 3] = -2


def other_dtypes(v: Any, u: Any) -> None:
    m = u > 0.2
    n = v * 0
    n[~m] = np.nan
    k = (u * 10).astype(int)
    k[m] = n[m] + 2.7
    v[...] = k


def picked_before(v: Any, u: Any) -> None:
    m = u > 0.2
    w, total = v[m], v[m]
    v[m] = 0
    v[m] = w + 1
    picked = v[m]
    m[:4] = False
    v[0, 0] += total.sum() + picked.sum()


def number_and_indices(v: Any, u: Any) -> None:
    v[[3, 6, 7], 0] = u[[1, 5, 8], 0]
    v[2, [3, 4]] *= 2
    v[np.array([[2, 3], [4, 5]]), 1] += 0.5


def values_by_place(v: Any, u: Any) -> None:
    v[SOLID] += SQUARE[SOLID]
    v[~SOLID] = u[~SOLID] * SQUARE[~SOLID] - 1
    v[np.zeros(SOLID.shape, bool)] -= np.zeros(0)


def spread(v: Any, u: Any) -> None:
    v[u > 0.1] -= np.std(u[u > 0.1]) + u[u > 0.1].var(ddof=1)


CHANGES = (scalar, elements, in_place, quotient, sums, constant, rows_by_mask, constant_rows, indices, number_and_mask, other_dtypes)
CHANGES += (picked_before, number_and_indices, values_by_place, spread)
ON_SQUARES = {f.__name__: f for f in CHANGES}


def bounced(v: Any, u: Any) -> None:
    solid = u[0] > 0.2
    v[:, solid] = u[::-1][:, solid]
    v[..., u[1] > 0.4] *= 0.5


def constant_bounced(v: Any, u: Any) -> None:
    v[:, SOLID] = u[::-1][:, SOLID]
    v[:, ~SOLID] += np.arange(5.0)[:, None]


def in_the_middle(v: Any, u: Any) -> None:
    m = u[:, :, 0] > 0
    v[m] = u[m] * np.linspace(0, 1, 12) + 0.1
    v[m, 3] = 4
    v[1, u[2, :, 0] > 0] = u[3, u[2, :, 0] > 0]
    v[:, u[0, :, 1] > 0] = np.arange(5.0)[:, None, None]
    v[:, u[0, :, 2] > 0, 1:4] -= u[:, u[0, :, 2] > 0, 2:5]


def directions(v: Any, u: Any) -> None:
    solid = u[0] > 0.2
    back = u[:, solid][[0, 2, 1, 4, 3]]
    v[:, solid] = back * 0.5
    v[:, SOLID] = u[:, SOLID][::-1, :]
    v[0, solid] += u[:, solid][1, :] - u[:, solid][-1]
    rows = u[:, :, 0] > 0
    v[rows] += u[rows][:, ::-1]
    v[rows, 1] = u[rows][..., 2] * v[rows, 3]
    v[:, SOLID] += SQUARE[SOLID] * np.arange(5.0)[:, None]


ON_STACKS = {f.__name__: f for f in (bounced, constant_bounced, in_the_middle, directions)}


def check(step: Step, state: np.ndarray, steps: int = 3, **options: Any) -> None:
    expected = state
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(steps):
            expected = step(expected)
        got = sa.iterate(step, sa.array(state, chunks=5), steps=steps, **options)
        np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", ON_SQUARES)
def test_steps_on_squares_are_numpys(executor: str, name: str) -> None:
    check(written(ON_SQUARES[name]), SQUARE, scheduler=executor)


@pytest.mark.parametrize("name", ON_STACKS)
def test_steps_on_stacks_are_numpys(executor: str, name: str) -> None:
    check(written(ON_STACKS[name]), STACK, scheduler=executor)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_masks_are_numpys(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), "shape"))
    first = data.draw(st.integers(0, len(shape) - 1), "first axis of the mask")
    last = data.draw(st.integers(first + 1, len(shape)), "after its last")
    state = (
        np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
        .integers(-4, 5, shape)
        .astype(data.draw(st.sampled_from("fdiq"), "dtype"))
    )
    dots = data.draw(st.booleans(), "dots") and last == len(shape)
    front: tuple[Any, ...] = (Ellipsis,) if dots else (slice(None),) * first
    limit = data.draw(st.integers(-5, 5), "limit")
    how = data.draw(st.sampled_from(("number", "elements", "in place", "of the last axis")), "how")

    def step(u: Any) -> Any:
        v = u.copy()
        m = u[(0,) * first + (slice(None),) * (last - first) + (0,) * (len(shape) - last)] > limit
        key = (*front, m)
        if how == "number":
            v[key] = 3
        elif how == "elements":
            v[key] = u[key] * 2 + 1
        elif how == "in place":
            v[key] -= u[key] // 2
        elif last < len(shape):
            v[key] = np.arange(shape[-1])
        else:
            v[key] = u[key].max()
        return v

    expected = state
    if how != "of the last axis" or last < len(shape):
        for _ in range(2):
            expected = step(expected)
        got = np.asarray(sa.iterate(step, state, steps=2, scheduler="synchronous"))
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def test_masks_are_one_kernel_and_block_by_block(monkeypatch: pytest.MonkeyPatch, small_grids: Callable[..., Any]) -> None:
    """Also with arrays of NumPy's, which are copied to where workers reach them, and again when a callback has written them."""
    pytest.importorskip("llvmlite", reason="steps go block by block in compiled code (extra jit)")
    loops = sys.modules["shmarray.iterate"]  # the package's `iterate` is the function
    blocks: list[int] = []
    blocked = loops.blocked

    def counted(steps: Any, workers: int) -> Any:
        blocks.append(len(steps))
        assert all(len(step.plan.layers) == 1 for step in steps)
        return blocked(steps, workers)

    monkeypatch.setattr(loops, "blocked", counted)
    monkeypatch.setattr(loops, "SMALL_NBYTES", 0)
    monkeypatch.setattr(loops._Loop, "_batch", lambda self, *, is_short: ("pool", 10))
    hot, factor = np.zeros(4000, bool), np.linspace(0.5, 1, 4000)
    hot[::7] = True

    def step(u: Any) -> Any:
        v = u.copy()
        v[1:-1] = u[1:-1] + 0.2 * (u[2:] - 2 * u[1:-1] + u[:-2])
        v[v > 0.6] = u[v > 0.6] * 0.5
        v[hot & (u < 0.4)] += 0.1
        return v * factor

    def callback(frame: Any) -> None:
        factor[::3] *= 0.9
        hot[frame.step :: 11] = True

    state = np.random.default_rng(0).random(4000)
    expected = state
    for k in range(40):
        expected = step(expected)
        if k % 10 == 9:
            callback(SimpleNamespace(step=k + 1))
    factor[:], hot[:] = np.linspace(0.5, 1, 4000), False
    hot[::7] = True
    with small_grids(TILE_ITEMS=512, BLOCK_ITEMS=1 << 16, THIN_ITEMS=64):
        got = sa.iterate(step, state, steps=40, every=10, callback=callback, scheduler="processes")
    np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-12)
    assert set(blocks) == {10}


@pytest.mark.parametrize("by", ["callback", "step"])
def test_whoever_changes_an_array_that_says_where_is_told(by: str) -> None:
    places = np.array([1, 3])

    def step(u: Any) -> Any:
        v = u.copy()
        v[places] = u[places[::-1]] + 1
        if by == "step":
            places[0] = 2
        return v

    def callback(frame: Any) -> None:
        if by == "callback":
            places[0] = 2

    with pytest.raises(sa.ChangedInput, match=rf"{by}.* wrote an array of shape \(2,\), int64"):
        sa.iterate(step, np.arange(5.0), steps=4, every=2, callback=callback)
    places[0] = 1
    if by == "callback":  # after the last step it is nobody's business
        sa.iterate(step, np.arange(5.0), steps=2, every=2, callback=callback)


def test_several_index_arrays_together_are_followed() -> None:
    rows, columns = np.array([0, 1]), np.array([0, 1])

    def step(u: Any) -> Any:
        v = u.copy()
        v[1, :2] = u[rows, columns]
        return v

    def callback(frame: Any) -> None:
        rows[:] = 2

    found = sa.iterate(step, np.arange(9.0).reshape(3, 3), steps=2, callback=callback)
    np.testing.assert_array_equal(found, [[0, 1, 2], [6, 7, 5], [6, 7, 8]])


def test_masks_that_values_are_counted_for_are_told_of_too() -> None:
    mask = np.array([[True, False], [True, True]])

    def step(u: Any) -> Any:
        v = u.copy()
        v[mask] += np.arange(3.0)
        return v

    def callback(frame: Any) -> None:
        mask[0] = mask[0, ::-1].copy()

    with pytest.raises(sa.ChangedInput, match="callback after step 1 wrote"):
        sa.iterate(step, np.zeros((2, 2)), steps=4, callback=callback)


def test_warnings_are_of_what_is_picked_alone() -> None:
    def step(u: Any) -> Any:
        v = u.copy()
        v[u < 1] = 1 / u[u < 1]
        return v

    with pytest.warns(RuntimeWarning, match="divide by zero"):
        sa.iterate(step, np.array([0.0, 2.0]), steps=1)


ERRORS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "returned": (lambda u: u[u > 0], TypeError, "mask"),
    "with an array": (lambda u: u[u > 0] + u, TypeError, "the same mask"),
    "of two masks": (lambda u: u[u > 0] + u[u > 1], TypeError, "two different masks"),
    "counted": (lambda u: len(u[u > 0]), TypeError, r"mask.sum\(\)"),
    "one of them": (lambda u: u[u > 0][0], TypeError, "single elements"),
    "some of them": (lambda u: u[u > 0][1:], TypeError, "single elements"),
    "too many axes": (lambda u: u[u > 0][:, 0], TypeError, "single elements"),
    "its attributes": (lambda u: u * u[u > 0].size, AttributeError, "size of elements that a mask picks"),
    "values of": (lambda u: np.asarray(u[u > 0]), TypeError, "not known"),
    "reduced along an axis": (lambda u: u[u > 0].sum(axis=0), TypeError, "without either"),
    "another shape": (lambda u: u[u[:2] > 0], IndexError, "mask of shape"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_said_is_an_error_that_says_so(name: str) -> None:
    step, kind, said = ERRORS[name]
    with pytest.raises(kind, match=said):
        sa.iterate(step, np.arange(5.0), steps=1)


WRONG: dict[str, tuple[Callable[[Any, Any], None], type[Exception], str]] = {
    "elsewhere": (lambda v, u: v.__setitem__(slice(0, 2), u[u > 0]), TypeError, "mask"),
    "at another mask": (lambda v, u: v.__setitem__(u > 1, u[u > 0]), TypeError, "two different masks"),
    "values for an unknown number": (lambda v, u: v.__setitem__(u > 1, np.arange(3.0)), TypeError, "not known"),
    "out of bounds": (lambda v, u: v.__setitem__([0, 7], 1.0), IndexError, "out of bounds"),
    "of a shape that does not fit": (lambda v, u: v.__setitem__([0, 1], np.arange(3.0)), ValueError, "broadcast"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_assigned_is_an_error_that_says_so(name: str) -> None:
    change, kind, said = WRONG[name]
    with pytest.raises(kind, match=said):
        sa.iterate(written(change), np.arange(5.0), steps=1)
