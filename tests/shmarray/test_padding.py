"""Borders: `pad` agrees with NumPy, and its errors say what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shmarray as sa


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pad_agrees_with_numpy(data: Any, assert_same: Any) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    a = np.arange(np.prod(shape)).reshape(shape).astype(data.draw(st.sampled_from(["i4", "f8", "c8", "?"])))
    mode = data.draw(st.sampled_from(["constant", "edge", "reflect", "symmetric", "wrap"]))
    width = st.integers(0, 14)
    widths = data.draw(st.one_of(width, st.tuples(width, width), st.lists(st.tuples(width, width), min_size=a.ndim, max_size=a.ndim)))
    given: dict[str, Any] = {}
    if mode == "constant":
        value = st.integers(0, 9)
        given["constant_values"] = data.draw(st.one_of(value, st.tuples(value, value), st.just([(k, k + 1) for k in range(a.ndim)])))
    with sa.config.set(scheduler="synchronous"):
        x = sa.array(a, chunks=data.draw(st.integers(1, 4)))
        padded = sa.pad(x, widths, mode, **given)

        assert_same(padded.compute(), np.pad(a, widths, mode, **given))
        assert tuple(map(sum, padded.chunks)) == padded.shape
        assert [len(c) for c in padded.chunks] == [len(c) for c in x.chunks]
        assert_same(sa.pad(x.T, 2, mode).compute(), np.pad(a.T, 2, mode))


def test_widths_may_be_given_for_some_axes() -> None:
    a = np.arange(6).reshape(2, 3)

    expected = np.pad(a, ((0, 0), (2, 1)), "edge")
    np.testing.assert_array_equal(sa.pad(sa.array(a), {-1: (2, 1)}, "edge").compute(), expected)


def test_numpys_function_of_one_of_our_arrays_is_ours() -> None:
    x = sa.array(np.arange(5))

    padded = np.pad(x, 2, "wrap")

    assert isinstance(padded, sa.Array)
    np.testing.assert_array_equal(padded.compute(), np.pad(np.arange(5), 2, "wrap"))


def test_a_border_of_nothing_is_the_array_and_no_alias() -> None:
    x = sa.array(np.arange(5.0))
    same = sa.pad(x, 0)

    x[0] = 9.0

    with pytest.raises(sa.ChangedInput):
        same.compute()


def test_an_empty_axis_can_be_extended_by_constants_alone() -> None:
    a = np.zeros((0, 3))

    np.testing.assert_array_equal(sa.pad(sa.array(a), 1, constant_values=2).compute(), np.pad(a, 1, constant_values=2))
    with pytest.raises(ValueError, match="axis 0 has no elements to repeat; mode='constant' can extend it"):
        sa.pad(sa.array(a), 1, "edge")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((-1,), ValueError, "narrower than nothing"),
        ((1, "mean"), ValueError, r"pad\(mode='mean'\): the modes are 'constant', 'edge'"),
        (([1, 2, 3],), ValueError, "give one value, a .before, after. pair, or 2 such pairs"),
        ((1.5,), TypeError, "widths are integers"),
    ],
)
def test_misuse_says_what_to_do(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        sa.pad(sa.ones((3, 3)), *arguments)
