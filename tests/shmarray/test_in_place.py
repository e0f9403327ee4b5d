"""Writing stored arrays and expressions: a NumPy array and ours undergo the same program and agree after each step.

The programs are random; what must hold beside the values (errors, `ChangedInput`, handles, exclusion) has tests of its own below.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import shmarray as sa

EXECUTORS = ("synchronous", "threads", "processes")
EXAMPLES = {"synchronous": 150, "threads": 50, "processes": 20}
DTYPES = ("i8", "f8", "c16", "i2", "f4")


@pytest.fixture(scope="module", autouse=True)
def pool() -> Iterator[sa.Pool]:
    with sa.Pool(workers=2, memory_limit="256MiB") as made:
        yield made
        gc.collect()
        made.check()


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Iterator[str]:
    with sa.config.set(scheduler=request.param):
        yield request.param


def same(ours: Any, theirs: np.ndarray) -> None:
    got = np.asarray(ours)
    assert got.dtype == theirs.dtype
    np.testing.assert_array_equal(got, theirs)


def here() -> str:
    """Return file:line of the caller."""
    frame = inspect.currentframe().f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


# --- random programs -------------------------------------------------------------------------------------------------------


class Twins:
    """A NumPy array and a stored array, views of both, and values lent out on the way."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = data.draw
        shape = self.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=5), "shape")
        dtype = self.draw(st.sampled_from(DTYPES), "dtype")
        values = np.arange(np.prod(shape)).reshape(shape) % 11 - 3
        values = values.astype(dtype)
        if dtype == "c16":
            values = values + 1j * (np.arange(values.size).reshape(shape) % 5)
        chunks = self.draw(st.integers(1, 4), "chunks")
        self.pairs: list[tuple[np.ndarray, Any]] = [(values, sa.array(values, chunks=chunks))]
        self.lent: list[tuple[np.ndarray, np.ndarray]] = []

    def pair(self, label: str) -> tuple[np.ndarray, Any]:
        return self.pairs[self.draw(st.integers(0, len(self.pairs) - 1), label)]

    def operand(self, into: tuple[int, ...]) -> tuple[Any, Any]:
        """Return what broadcasts to ``into``: a number, an array, or an expression of the arrays themselves."""
        kind = self.draw(st.sampled_from(["number", "array", "view", "sum", "max", "mean", "where"]), "operand")
        if kind == "number":
            number = self.draw(st.sampled_from([2, -3, 1.5, np.float32(0.5), np.int8(7)]), "number")
            return number, number
        if kind == "array":
            shape = tuple(n if self.draw(st.booleans(), "keep") else 1 for n in into)
            shape = shape[self.draw(st.integers(0, len(shape)), "drop") :]
            array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(self.draw(st.sampled_from(["i4", "f8"]), "of")) - 2
            return array, array
        a, x = self.pair("source")
        if kind in ("view", "where"):
            for b, y in ((a, x), (a.T, x.T)):
                with contextlib.suppress(ValueError):
                    if np.broadcast_shapes(b.shape, into) == into:
                        return (b, y) if kind == "view" else (np.where(b != 1, b, 4), sa.where(y != 1, y, 4))
            kind = "sum"
        if kind == "mean":
            return np.round(a.astype("f8" if a.dtype.kind != "c" else "c16").mean()), np.round(x.astype(f"{'c16' if a.dtype.kind == 'c' else 'f8'}").mean())
        if kind == "max" and a.size and a.dtype.kind != "c":
            return a.max(), x.max()
        return a.sum(), x.sum()

    # Each step does the same to both; an error of NumPy's must be ours, and nothing be changed by it.

    def step_operator(self) -> None:
        (a, x), name = self.pair("target"), self.draw(st.sampled_from(["add", "subtract", "multiply", "maximum"]), "ufunc")
        b, y = self.operand(a.shape)
        self.both(lambda: getattr(np, name)(a, b, out=a, casting="same_kind"), lambda: getattr(np, name)(x, y, out=x, casting="same_kind"))

    def step_augmented(self) -> None:
        a, x = self.pair("target")
        b, y = self.operand(a.shape)

        def theirs(a: Any = a) -> None:
            a += b

        def ours(x: Any = x) -> None:
            x += y

        self.both(theirs, ours)

    def step_region(self) -> None:
        a, x = self.pair("target")
        key = self.draw(hnp.basic_indices(a.shape, allow_newaxis=True, max_dims=4), "region")
        b, y = self.operand(a[key].shape)
        self.both(lambda: a.__setitem__(key, b), lambda: x.__setitem__(key, y))

    def step_compute_out(self) -> None:
        a, x = self.pair("target")
        b, y = self.operand(a.shape)
        with contextlib.suppress(TypeError):
            theirs = np.add(a, b)
            ours = x + y
            if theirs.shape == a.shape and np.can_cast(theirs.dtype, a.dtype, "same_kind"):
                a[...] = theirs
                ours.compute(out=x)

    def step_mask(self) -> None:
        a, x = self.pair("target")
        if a.dtype.kind != "c":
            a[a > 3], x[x > 3] = 1, 1
        else:
            a[a.real > 3], x[x.real > 3] = 1j, 1j

    def step_itself(self) -> None:
        (a, x), kind = self.pair("target"), self.draw(st.sampled_from(["shift", "flip", "cumsum", "swap", "transpose", "roll"]), "itself")
        for z in (a, x):
            if kind == "shift":
                z[1:] = z[:-1] + z.dtype.type(1)
            elif kind == "flip":
                z[...] = z[::-1]
            elif kind == "cumsum":
                z[...] = z.cumsum(0)
            elif kind == "swap":
                z[0], z[-1] = np.array(z[-1]), np.array(z[0])
            elif kind == "transpose" and z.shape == z.T.shape:
                z += z.T
            elif kind == "roll":
                z[...] = np.roll(z, 2, 0) + z

    def step_view(self) -> None:
        a, x = self.pair("base")
        kind = self.draw(st.sampled_from(["index", "T", "reshape", "part", "rechunk"]), "view")
        if kind == "index":
            key = self.draw(hnp.basic_indices(a.shape, allow_newaxis=True, max_dims=4), "key")
            parts = key if isinstance(key, tuple) else (key,)
            b, y = a[key if Ellipsis in parts else (*parts, ...)], x[key]  # the dots: 0-d views, not scalars
        elif kind == "T":
            b, y = a.T, x.T
        elif kind == "reshape":
            b, y = a.reshape(-1), x.reshape(-1)
            assert y.is_stored or b.size == 0 or not np.shares_memory(a, b)
            if not y.is_stored:
                return
            assert b.size == 0 or np.shares_memory(a, b), "ours is a view where NumPy's is a copy"
        elif kind == "part" and a.dtype.kind == "c":
            b, y = (a.real, x.real) if self.draw(st.booleans(), "real") else (a.imag, x.imag)
        else:
            b, y = a[...], x.rechunk(self.draw(st.integers(1, 5), "rechunk"))
        assert y.is_stored
        if b.size and len(self.pairs) < 5:
            self.pairs.append((b, y))

    def step_lend(self) -> None:
        a, x = self.pair("lent")
        values = np.asarray(x)
        self.lent.append((values, a.copy()))

    def both(self, theirs: Callable[[], Any], ours: Callable[[], Any]) -> None:
        before = [a.copy() for a, _ in self.pairs]
        with np.errstate(all="ignore"):
            try:
                theirs()
            except Exception as error:
                for (a, _), old in zip(self.pairs, before):
                    np.testing.assert_array_equal(a, old)
                with pytest.raises(type(error)):
                    ours()
            else:
                ours()

    def check(self) -> None:
        for a, x in self.pairs:
            assert x.is_stored and x.shape == a.shape and tuple(map(sum, x.chunks)) == a.shape
            same(x, a)
        for values, copy in self.lent:
            np.testing.assert_array_equal(values, copy)


STEPS = sorted(name for name in dir(Twins) if name.startswith("step_"))


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::numpy.exceptions.ComplexWarning")
def test_the_same_program_gives_the_same_values_as_in_numpy(name: str) -> None:
    @settings(derandomize=True, deadline=None, max_examples=EXAMPLES[name], suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        with sa.config.set(scheduler=name):
            twins = Twins(data)
            for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=8), "steps"):
                getattr(twins, step)()
                twins.check()

    run()
