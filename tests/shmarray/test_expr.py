"""Expressions: equal ones are one node, different ones never; deep ones build and run; they die with the last handle."""

from __future__ import annotations

import gc
import inspect
import itertools
import warnings
from typing import Any

import numpy as np
import pytest

import shmarray as sa
from shmarray.expr import Expr, exact, line_of, postorder

pytestmark = pytest.mark.usefixtures("pool")


def count_nodes() -> int:
    gc.collect()
    return sum(1 for o in gc.get_objects() if isinstance(o, Expr))


def test_equal_expressions_are_one_node() -> None:
    a = np.arange(6.0)
    x = sa.array(a, chunks=2)

    def build() -> list[Any]:
        return [
            x + 1, np.sin(x)[1:3].sum(), sa.asarray(a) * 2, x.reshape(2, 3).T, sa.zeros((3, 4)), sa.ones(3, "i4") * 2.5, sa.arange(1000),
            sa.concatenate([x, x + 1]), sa.where(x > 1, x, 0), x.astype("f4"), x.cumsum(0), np.add(x, 1, dtype="f4"),
            sa.eye(4), sa.linspace(0, 1, 9), x.std(ddof=1), np.clip(x, 1, 2),
        ]  # fmt: skip

    for one, two in zip(build(), build(), strict=True):
        assert one is not two
        assert one.node is two.node, one


SCALARS = [
    1,
    True,
    1.0,
    1 + 0j,
    0.0,
    -0.0,
    0,
    False,
    np.float32(1),
    np.float64(1),
    np.int8(1),
    np.True_,
    float("nan"),
    np.float64("nan"),
    2**53,
    2.0**53,
]


def test_parameters_count_by_type_and_bits() -> None:
    x = sa.array(np.arange(3.0))

    kept = [(x * s) for s in SCALARS]
    nodes = [y.node for y in kept]

    assert len(set(map(id, nodes))) == len(SCALARS)
    assert (x * float("nan")).node is nodes[SCALARS.index(SCALARS[12])]
    for one, two in itertools.combinations(SCALARS, 2):
        assert exact(one) != exact(two)
    assert np.signbit((x * -0.0).compute()).all() and not np.signbit((x * 0.0).compute()).any()
    assert sa.full(3, 0.0).node is not sa.full(3, -0.0).node
    assert sa.full(3, 1).node is not sa.full(3, True).node


def test_python_numbers_stay_weak_and_numpy_numbers_do_not() -> None:
    x = sa.ones(3, "f4")

    assert (x * 2).dtype == (x * 2.5).dtype == np.float32
    assert (x * np.float64(2)).dtype == np.float64
    assert (sa.ones(3, "i2") + True).dtype == np.int16
    with pytest.raises(OverflowError):
        sa.ones(3, "u1") + 300


def test_common_parts_are_one_in_a_graph() -> None:
    x = sa.array(np.arange(6.0))
    y = np.sin(x) + 1

    assert len(list(postorder([(y * y + (np.sin(x) + 1)).node]))) == 5


@pytest.mark.parametrize("start", ["stored", "memory", "fill"])
def test_a_chain_of_thousands_of_operations_builds_and_computes(start: str) -> None:
    a = np.arange(4.0)
    x = {"stored": lambda: sa.array(a), "memory": lambda: sa.asarray(a), "fill": lambda: sa.arange(4.0)}[start]()

    y = x
    for _ in range(5000):
        y = y + 1

    np.testing.assert_array_equal(y.compute(), a + 5000)
    assert "5000 operations" in repr(y)
    assert y.graph().number_of_nodes() == 5001
    del y
    gc.collect()


def test_deep_chains_of_other_operations_compute() -> None:
    a = np.arange(6.0)
    y: Any = sa.array(a)
    expected = a
    for k in range(300):
        y, expected = (y[::-1] + k).reshape(2, 3).T.reshape(-1), (expected[::-1] + k).reshape(2, 3).T.reshape(-1)
    z: Any = sa.array(a)
    for _ in range(100):
        z = z - z.mean()
    w: Any = sa.arange(6.0) + 0
    for k in range(200):
        w[k % 6] = k
        w += 1

    np.testing.assert_array_equal(y.compute(), expected)
    np.testing.assert_allclose(z.compute(), a - a.mean())
    assert w.compute()[5] == 197 + 3


def test_an_expression_that_doubles_at_each_step_stays_small() -> None:
    y: Any = sa.array(np.ones(3))

    for _ in range(60):
        y = y * 0.5 + y * 0.5

    np.testing.assert_array_equal(y.compute(), np.ones(3))


def test_nodes_die_with_their_handles() -> None:
    x = sa.array(np.arange(6.0))
    before = count_nodes()

    y = [(x + k).sum() for k in range(20)]
    during = count_nodes()
    sa.compute(*y)
    del y

    assert during >= before + 40
    assert count_nodes() <= before


def test_updates_in_a_loop_leave_no_nodes_behind() -> None:
    x = sa.array(np.zeros(4))
    x += 1
    before = count_nodes()

    for _ in range(50):
        x += 1

    assert count_nodes() <= before + 5


def test_the_line_that_built_an_expression_is_remembered() -> None:
    y = sa.array(np.arange(3.0)) * 17.25
    line = inspect.currentframe().f_lineno - 1

    assert line_of(y.node) == f"{__file__}:{line}"
    graph = y.graph()
    assert {graph.nodes[n]["line"] for n in graph if graph.nodes[n]["name"] == "multiply"} == {f"{__file__}:{line}"}


@pytest.mark.parametrize("executor", ["synchronous", "threads", "processes"])
def test_warnings_arrive_at_the_line_that_built_the_expression(executor: str) -> None:
    y = 1 / sa.array(np.zeros(3))
    line = inspect.currentframe().f_lineno - 1

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y.compute(scheduler=executor)

    (warning,) = caught
    assert issubclass(warning.category, RuntimeWarning) and "divide by zero" in str(warning.message)
    assert (warning.filename, warning.lineno) == (__file__, line)


@pytest.mark.parametrize("executor", ["synchronous", "threads", "processes"])
def test_the_error_state_is_that_of_the_building_line(executor: str) -> None:
    x = sa.array(np.zeros(3))
    with np.errstate(divide="raise"):
        strict = 1 / x
    with np.errstate(divide="ignore"):
        quiet = 1 / x

    assert strict.node is not quiet.node
    with pytest.raises(FloatingPointError):
        strict.compute(scheduler=executor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isinf(quiet.compute(scheduler=executor)).all()
