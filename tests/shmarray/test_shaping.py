"""Moving axes, reshaping and putting together give what NumPy gives; several on top of each other, then arithmetic, then a sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import shmarray as sa

EXECUTORS = ("synchronous", "threads", "processes")
EXAMPLES = {"synchronous": 200, "threads": 30, "processes": 15}

pytestmark = pytest.mark.usefixtures("pool")


def agree(ours: Any, theirs: Any) -> None:
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert tuple(map(sum, ours.chunks)) == theirs.shape
    assert all(n > 0 or s == 0 for chunks, s in zip(ours.chunks, theirs.shape) for n in chunks)
    np.testing.assert_array_equal(np.asarray(ours), theirs)


# --- compositions ----------------------------------------------------------------------------------------------------------

Step = Callable[[Any], Any]  # of a NumPy array or of ours, in NumPy's words


def new_shape(draw: Callable[..., Any], size: int) -> tuple[int, ...]:
    """Return a shape of ``size`` elements, one entry perhaps -1."""
    shape, rest = [], size
    while rest > 1 and len(shape) < 3:
        factors = [n for n in range(1, rest + 1) if rest % n == 0]
        shape.append(draw(st.sampled_from(factors)))
        rest //= shape[-1]
    shape.append(rest)
    if size and draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] = -1
    return tuple(shape)


def draw_step(draw: Callable[..., Any], shape: tuple[int, ...]) -> Step:
    """Return a step that an array of ``shape`` can take."""
    ndim, size = len(shape), int(np.prod(shape, dtype=int))
    axis = draw(st.integers(-ndim, ndim - 1)) if ndim else 0
    other = draw(st.integers(-ndim, ndim - 1)) if ndim else 0
    number = draw(st.integers(-7, 7))
    key = draw(hnp.basic_indices(shape, allow_newaxis=True, max_dims=4))
    steps: list[Step] = [
        lambda v: v.T,
        lambda v: v[key],
        lambda v: v.ravel(),
        lambda v: np.squeeze(v),
        lambda v: v * 2 + 1,
        lambda v: np.flip(v),
        lambda v: np.roll(v, number),
        lambda v: np.stack([v, v + 1], axis=-1) if size < 200 else v,
    ]
    reshaped = new_shape(draw, size)
    steps += [lambda v: v.reshape(reshaped), lambda v: np.reshape(v, reshaped)]
    place = draw(st.integers(-ndim - 1, ndim))
    steps.append(lambda v: np.expand_dims(v, place) if v.ndim < 6 else v)
    wide = (2, *(3 if n == 1 else n for n in shape))
    if size < 200 and ndim < 5:
        steps.append(lambda v: np.broadcast_to(v, wide))
    if ndim:
        order = draw(st.permutations(range(ndim)))
        steps += [
            lambda v: np.swapaxes(v, axis, other),
            lambda v: np.moveaxis(v, axis, other),
            lambda v: np.transpose(v, order),
            lambda v: np.flip(v, axis),
            lambda v: np.roll(v, number, axis),
            lambda v: np.roll(v, (number, 1), (axis, other)),
            lambda v: np.concatenate([v, v[..., :1] if axis % ndim == ndim - 1 else v], axis) if size < 200 else v,
            lambda v: v.cumsum(axis),
            lambda v: v - v.sum(axis, keepdims=True),
        ]
        if shape[axis]:
            picks = draw(st.lists(st.integers(-shape[axis], shape[axis] - 1), min_size=1, max_size=4))
            steps += [lambda v: np.take(v, picks, axis), lambda v: np.take(v, picks[0], axis)]
    return draw(st.sampled_from(steps))


@pytest.mark.parametrize("name", EXECUTORS)
def test_steps_on_top_of_each_other(name: str) -> None:
    @settings(
        derandomize=True, deadline=None, max_examples=EXAMPLES[name], suppress_health_check=list(HealthCheck), report_multiple_bugs=False
    )
    @given(st.data(), st.sampled_from(["stored", "memory", "expression", "fill"]), st.integers(1, 4))
    def run(data: st.DataObject, kind: str, chunk: int) -> None:
        shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5), "shape")
        a = np.arange(np.prod(shape, dtype=int)).reshape(shape) * 3 % 17
        x = sa.array(a, chunks=chunk) if kind == "stored" else sa.asarray(a, chunks=chunk)
        if kind == "fill":
            a = np.arange(a.size).reshape(shape)
            x = sa.arange(a.size).reshape(shape).rechunk(chunk)
        if kind == "expression":
            a, x = a - 4, x - 4
        with sa.config.set(scheduler=name):
            for _ in range(data.draw(st.integers(3, 5), "steps")):
                step = draw_step(data.draw, a.shape)
                a, x = np.asarray(step(a)), step(x)
                if data.draw(st.integers(0, 4), "look") == 0:
                    agree(x, a)
                if data.draw(st.integers(0, 5), "persist") == 0:
                    x = x.persist()
            agree(x, a)
            agree(x * 2 - x, a)
            agree((x + 1).sum(), (a + 1).sum())
            if a.ndim:
                agree((x * x).sum(0), (a * a).sum(0))

    run()


# --- one by one ------------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.data())
def test_a_reshape_of_a_stored_array_shares_bytes_exactly_when_numpys_does(data: st.DataObject) -> None:
    a = np.arange(48.0).reshape(4, 2, 6)
    x = sa.array(a, chunks=2)
    key = data.draw(hnp.basic_indices(a.shape, allow_newaxis=True, max_dims=4))
    order = data.draw(st.permutations(range(np.asarray(a[key]).ndim)))
    b, y = np.asarray(a[key]).transpose(order), x[key].transpose(*order)
    shape = new_shape(data.draw, b.size)
    if not b.size:
        return

    moved, ours = b.reshape(shape), y.reshape(shape)

    agree(ours, moved)
    if b.size > 1:
        assert ours.is_stored == np.shares_memory(moved, a)


@pytest.mark.parametrize("shape", [(12,), (-1,), (2, -1), (-1, 1, 6), (3, 4), (4, 3, 1), [6, 2]])
def test_reshape_in_all_its_forms(shape: Any, executor: str) -> None:
    a = np.arange(12)
    for x in (sa.array(a, chunks=5), sa.asarray(a) + 0, sa.arange(12)):
        agree(x.reshape(shape), a.reshape(shape))
        agree(np.reshape(x, shape), a.reshape(shape))
        agree(x.reshape(*shape), a.reshape(*shape))
        agree(x.reshape(4, 3).T.reshape(shape) + 1, a.reshape(4, 3).T.reshape(shape) + 1)


@pytest.mark.parametrize("axis", [0, 1, -1, None])
def test_concatenate_and_its_relatives(axis: int | None, executor: str) -> None:
    a = np.arange(6.0).reshape(2, 3)
    x, y = sa.array(a, chunks=2), sa.asarray(a) * 2

    agree(np.concatenate([x, y, a, x], axis), np.concatenate([a, a * 2, a, a], axis))
    agree(sa.concatenate([x.sum(0)[None], y], 0), np.concatenate([a.sum(0)[None], a * 2], 0))
    if axis is not None:
        agree(np.stack([x, y, a], axis), np.stack([a, a * 2, a], axis))
    agree(np.vstack([x, y[0]]), np.vstack([a, a[0] * 2]))
    agree(np.hstack([x, y]), np.hstack([a, a * 2]))
    agree(np.block([[x, y], [a, x]]), np.block([[a, a * 2], [a, a]]))
    agree(np.concatenate([x, sa.zeros((0, 3)), sa.ones((1, 3), int)]), np.concatenate([a, np.zeros((0, 3)), np.ones((1, 3), int)]))
    agree(np.concatenate([x, y], dtype="f4"), np.concatenate([a, a * 2], dtype="f4"))


def test_concatenate_keeps_the_chunks_of_its_parts() -> None:
    x = sa.concatenate([sa.zeros((3, 4), chunks=2), sa.zeros((2, 4), chunks=3), sa.zeros((0, 4))])

    assert x.chunks == ((2, 1, 2), (2, 2))


def test_concatenate_writes_into_a_given_array(executor: str) -> None:
    x = sa.array(np.zeros(4))

    assert sa.concatenate([sa.ones(2), sa.arange(2.0)], out=x) is x

    agree(x, np.array([1, 1, 0, 1.0]))


def test_axes_of_length_one_come_and_go(executor: str) -> None:
    a = np.arange(6).reshape(1, 2, 1, 3)
    for x in (sa.array(a), sa.asarray(a) + 0, sa.asarray(a).cumsum(1)):
        b = np.asarray(x)
        agree(np.squeeze(x), b.squeeze())
        agree(np.squeeze(x, 0), b.squeeze(0))
        agree(x.squeeze((0, -2)), b.squeeze((0, -2)))
        agree(np.expand_dims(x, (0, -1)), np.expand_dims(b, (0, -1)))
        agree(np.atleast_2d(x[0, :, 0, 0]), np.atleast_2d(b[0, :, 0, 0]))
        agree(np.broadcast_to(x, (2, 2, 5, 3)), np.broadcast_to(b, (2, 2, 5, 3)))
        for ours, theirs in zip(np.broadcast_arrays(x, np.arange(3)), np.broadcast_arrays(b, np.arange(3))):
            agree(ours, theirs)


def test_turning_and_rolling(executor: str) -> None:
    a = np.arange(24).reshape(4, 6)
    for x in (sa.array(a, chunks=(3, 2)), sa.asarray(a, chunks=3) * 1):
        agree(np.flip(x, (0, 1)), np.flip(a, (0, 1)))
        agree(np.flipud(x), np.flipud(a))
        agree(np.fliplr(x), np.fliplr(a))
        agree(np.rollaxis(x, 1), np.rollaxis(a, 1))
        agree(x.T.mT, a.T.mT)
        for shift, axis in ((5, None), (-30, None), (2, 0), ((1, -2), (0, 1)), ((1, 2), 1), (0, 1)):
            agree(np.roll(x, shift, axis), np.roll(a, shift, axis))


def test_take_follows_the_axis(executor: str) -> None:
    a = np.arange(24).reshape(4, 6)
    x = sa.array(a, chunks=2) + 0

    agree(np.take(x, [5, -1, 0]), np.take(a, [5, -1, 0]))
    agree(np.take(x, [[0, 1], [2, 3]], 1), np.take(a, [[0, 1], [2, 3]], 1))
    agree(x.take(-2, 0), a.take(-2, 0))


@pytest.mark.parametrize(
    "call",
    [
        lambda np, x: x.reshape(5),
        lambda np, x: x.reshape(-1, -1),
        lambda np, x: x.reshape(-1, 5),
        lambda np, x: np.reshape(x, (2, 7)),
        lambda np, x: np.transpose(x, (0, 0)),
        lambda np, x: np.transpose(x, (0,)),
        lambda np, x: x.transpose(0, 2),
        lambda np, x: np.swapaxes(x, 0, 2),
        lambda np, x: np.moveaxis(x, 0, 5),
        lambda np, x: np.moveaxis(x, (0, 1), 0),
        lambda np, x: np.squeeze(x, 0),
        lambda np, x: np.expand_dims(x, 4),
        lambda np, x: np.broadcast_to(x, (3,)),
        lambda np, x: np.broadcast_to(x, (2, 5)),
        lambda np, x: np.concatenate([x, x[0]]),
        lambda np, x: np.concatenate([x, x.T]),
        lambda np, x: np.concatenate([]),
        lambda np, x: np.concatenate([x, x], 2),
        lambda np, x: np.stack([x, x.T]),
        lambda np, x: np.stack([]),
        lambda np, x: np.flip(x, 2),
        lambda np, x: np.roll(x, 1, 2),
        lambda np, x: np.roll(x, (1, 2, 3), (0, 1)),
        lambda np, x: np.take(x, [9], 0),
        lambda np, x: np.take(x, [0], 3),
        lambda np, x: np.broadcast_arrays(x, np.zeros(5)),
    ],
)
def test_what_cannot_be_shaped_fails_as_in_numpy_when_it_is_built(call: Callable[[Any, Any], Any]) -> None:
    a = np.arange(6.0).reshape(2, 3)

    with pytest.raises(Exception) as theirs:
        call(np, a)

    for x in (sa.array(a), sa.asarray(a) + 1):
        with pytest.raises(type(theirs.value)):
            call(sa, x)


def test_errors_name_the_shapes() -> None:
    x = sa.zeros((2, 3))

    for call, words in (
        (lambda: x.reshape(5), ["6", "(5,)", "(2, 3)"]),
        (lambda: sa.broadcast_to(x, (2, 5)), ["(2, 3)", "(2, 5)"]),
        (lambda: sa.stack([x, x.T]), ["(2, 3)", "(3, 2)"]),
        (lambda: sa.concatenate([x, x.T]), ["size 3", "size 2"]),
        (lambda: x + sa.zeros(4), ["(2,3)", "(4,)"]),
    ):
        with pytest.raises(ValueError) as raised:
            call()
        assert all(word in str(raised.value) for word in words), raised.value


def test_results_that_share_inputs_are_computed_together(executor: str) -> None:
    a = np.arange(12.0).reshape(3, 4)
    running = sa.array(a).cumsum(0)
    expected = a.cumsum(0)

    whole, flat, total = sa.compute(running.T, running.reshape(-1) + 1, (running.T.reshape(-1) * np.arange(12)).sum())

    np.testing.assert_array_equal(whole, expected.T)
    np.testing.assert_array_equal(flat, expected.reshape(-1) + 1)
    assert total == (expected.T.reshape(-1) * np.arange(12)).sum()
