"""Plans used again: equal forms on other bytes share one, and nothing else does."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shmarray as sa
from shmarray import templates


def reused(call: Callable[[], Any]) -> bool:
    """Return whether a call took all its plans from templates."""
    before = templates.statistics()
    call()
    after = templates.statistics()
    return after["reused"] > before["reused"] and after["built"] == before["built"]


def stored(n: int = 1000, seed: int = 0) -> Any:
    return sa.asarray(np.random.default_rng(seed).random(n)).persist()


def chain(x: Any, y: Any, factor: float = 2.0) -> Any:
    return (x * factor + y) * (x - y)


def test_other_bytes_take_the_same_plan(executor: str) -> None:
    arrays = [stored(seed=k) for k in range(4)]
    result = []

    def average(x: Any, y: Any) -> None:
        result.append(chain(x, y).mean().compute())

    average(*arrays[:2])
    assert reused(lambda: average(*arrays[2:]))
    np.testing.assert_allclose(result[1], chain(arrays[2].compute(), arrays[3].compute()).mean(), rtol=1e-14)


def test_numpy_arrays_and_results_are_bound_anew(executor: str) -> None:
    a, b = np.arange(600.0).reshape(20, 30), np.ones((20, 30))
    first = (sa.asarray(a) * 3).compute()
    kept = first.copy()

    second = (sa.asarray(b) * 3).compute()
    third = (sa.asarray(a.T.copy().T) * 3).compute()

    assert second is not first
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(second, b * 3)
    np.testing.assert_array_equal(third, a * 3)
    assert third.flags.f_contiguous


def test_a_loop_in_place_plans_once() -> None:
    x, y = stored(), stored(seed=1)
    expected, other = x.compute().copy(), y.compute()
    for step in range(5):
        before = templates.statistics()
        x += y
        expected += other
        assert (templates.statistics()["built"] == before["built"]) == (step > 0)
    np.testing.assert_array_equal(x.compute(), expected)


def test_a_loop_that_persists_plans_once_and_sees_the_new_values() -> None:
    u = stored()
    expected = u.compute()
    for step in range(6):
        before = templates.statistics()
        u = ((u[1:-1] + u[:-2] + u[2:]) / 3).persist() if step % 2 else (u * 0.5).persist()
        expected = (expected[1:-1] + expected[:-2] + expected[2:]) / 3 if step % 2 else expected * 0.5
        if step in (2, 4):
            np.testing.assert_array_equal(u.compute(), expected)
        del before
    np.testing.assert_array_equal(u.compute(), expected)


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: (x * 3.0 + y) * (x - y),
        lambda x, y: (x * 2.0 + x) * (x - y),
        lambda x, y: (x * 2 + y) * (x - y),
        lambda x, y: (x * np.float32(2.0) + y) * (x - y),
        lambda x, y: (x[::-1] * 2.0 + y) * (x - y),
        lambda x, y: (x[:500] * 2.0 + y[:500]) * (x[:500] - y[:500]),
        lambda x, y: (x[1:501] * 2.0 + y[:500]) * (x[:500] - y[:500]),
    ],
)
def test_another_form_takes_another_plan(other: Callable[[Any, Any], Any]) -> None:
    x, y = stored(), stored(seed=1)
    ((x * 2.0 + y) * (x - y)).compute()

    result = []
    assert not reused(lambda: result.append(other(x, y).compute()))
    np.testing.assert_array_equal(result[0], other(x.compute(), y.compute()))


def test_which_operands_are_one_is_part_of_the_form() -> None:
    x, y = stored(), stored(seed=1)

    def both(a: Any, b: Any) -> Any:
        return (a + b * 2.0).compute()

    both(x, y)
    values = x.compute()
    np.testing.assert_array_equal(both(x, x), values + values * 2.0)
    np.testing.assert_array_equal(both(y, x), y.compute() + values * 2.0)


def test_a_target_that_is_read_elsewhere_is_part_of_the_form() -> None:
    x, y = stored(), stored(seed=1)

    def shift(target: Any, source: Any) -> None:
        np.multiply(source[:-1], 2.0, out=target[1:])

    shift(x, y)
    expected = y.compute().copy()
    expected[1:] = expected[:-1].copy() * 2.0
    shift(y, y)
    np.testing.assert_array_equal(y.compute(), expected)


def test_settings_are_part_of_the_form() -> None:
    x = stored()
    with sa.config.set(engine="numpy"):
        (x * 2).sum().compute()
    with sa.config.set(engine="llvm"):
        assert not reused(lambda: (x * 2).sum().compute())


def test_an_array_that_has_moved_is_found() -> None:
    x, y = stored(), stored(seed=1)

    def total() -> Any:
        return (x + y).sum().compute()

    total()
    view = x.compute()  # a value: the next write moves the array
    x += 1
    assert total() == (view + 1 + y.compute()).sum()


def test_warnings_come_from_the_line_of_this_expression() -> None:
    x = sa.asarray(np.array([-1.0, 4.0])).persist()
    lines = []
    for expression in (sa.sqrt(x), sa.sqrt(x * 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            expression.compute()
        lines += [w.lineno for w in caught]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sa.sqrt(sa.asarray(np.array([-2.0, 4.0])).persist()).compute()
    assert len(lines) == 2 and [w.lineno for w in caught] == [max(lines) + 7]


def test_templates_hold_no_array() -> None:
    x, a = stored(300_000), np.ones(300_000)
    result = (x * 2 + sa.asarray(a)).compute()
    watched = [weakref.ref(x._storage), weakref.ref(a), weakref.ref(result if result.base is None else result.base)]

    del x, a, result
    gc.collect()

    assert [w() for w in watched] == [None, None, None]


def test_what_a_user_wrote_is_planned_each_time() -> None:
    x = sa.array(np.arange(6.0), chunks=3)
    for factor in (2, 3):
        result = x.map_blocks(lambda b, factor=factor: b * factor, dtype=float).sum().compute()
        assert result == 15 * factor


UNARY: list[Callable[[Any], Any]] = [
    lambda v: v * 2.5,
    lambda v: v + v.T if v.ndim == 2 and v.shape[0] == v.shape[1] else v + 1,
    lambda v: v[::-1],
    lambda v: v.T,
    lambda v: v[..., 1:] if v.shape[-1] > 1 else v,
    lambda v: v.sum(axis=0, keepdims=True) + v,
    lambda v: -v,
]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_plans_from_templates_give_numpys_values(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=2)))
    steps = data.draw(st.lists(st.sampled_from(range(len(UNARY))), min_size=1, max_size=4))
    kinds = data.draw(st.lists(st.sampled_from(["stored", "memory"]), min_size=2, max_size=3))
    for k, kind in enumerate(kinds):
        a = np.arange(float(np.prod(shape))).reshape(shape) + k
        v: Any = sa.asarray(a) if kind == "memory" else sa.asarray(a).persist()
        for step in steps:
            v, a = UNARY[step](v), UNARY[step](a)
        found = v.compute()
        np.testing.assert_allclose(found, a, rtol=1e-14)
        total, most = sa.compute(v.sum(), v.max())
        np.testing.assert_allclose((total, most), (a.sum(), a.max()), rtol=1e-13)


def test_records_of_other_fields_take_another_plan() -> None:
    for fields in ([("a", "i8"), ("b", "f8")], [("a", "f8"), ("b", "i8")]):
        a = np.ones(4, fields)
        look = sa.asarray(a).persist()[::-1]
        assert look.plan().layers[0].kernel.program.operands[0].dtype == a.dtype
        np.testing.assert_array_equal(look.compute(), a)
