"""Time stepping: `iterate` against NumPy loops, whatever the state, the executor and the way the steps are cut up.

Never put here: what waits for what in a chain (`tests/scheduler/test_repeat.py`), deaths of workers (`tests/faults/test_iterate_kill.py`).
"""

from __future__ import annotations

import gc
import math
import threading
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import shmarray as sa
from scheduler import repeat
from shmarray import templates
from shmarray.iterate import _Loop

pytestmark = pytest.mark.timeout(120)


def loop(step: Callable[..., Any], *state: Any, steps: int) -> Any:
    """Do with NumPy what `iterate` does; the same function serves both."""
    arrays: Any = tuple(np.array(x) for x in state)
    for _ in range(steps):
        found = step(*arrays)
        arrays = found if isinstance(found, tuple) else (found,)
    return arrays if len(state) > 1 else arrays[0]


def heat(u: Any) -> Any:
    v = u.copy()
    v[1:-1] = u[1:-1] + 0.25 * (u[2:] - 2 * u[1:-1] + u[:-2])
    return v


def heat_2d(u: Any) -> Any:
    v = u.copy()
    v[1:-1, 1:-1] += 0.2 * (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1])
    return v


def advect(u: Any) -> Any:
    return u - 0.4 * (u - np.roll(u, 1))


def diffuse_3d(u: Any) -> Any:
    return u + 0.1 * sum(np.roll(u, 1, axis) + np.roll(u, -1, axis) - 2 * u for axis in range(3))


def wave(u: Any, before: Any) -> Any:
    """Leapfrog: what it was given comes back as the second array."""
    v = 2 * u - before
    v[1:-1] += 0.25 * (u[2:] - 2 * u[1:-1] + u[:-2])
    return v, u


def gray_scott(u: Any, v: Any) -> Any:
    reaction = u * v * v
    spread_u, spread_v = (np.roll(x, 1, 0) + np.roll(x, -1, 0) + np.roll(x, 1, 1) + np.roll(x, -1, 1) - 4 * x for x in (u, v))
    return u + 0.16 * spread_u - reaction + 0.035 * (1 - u), v + 0.08 * spread_v + reaction - 0.1 * v


def life(cells: Any) -> Any:
    near = sum(np.roll(np.roll(cells, i, 0), j, 1).astype(np.int8) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j)
    return (near == 3) | (cells & (near == 2))


def values(shape: Any, seed: int = 0, dtype: Any = float) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random(shape).astype(dtype)


PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[np.ndarray[Any, Any], ...]]] = {
    "heat": (heat, (values(300),)),
    "heat in 2-D": (heat_2d, (values((40, 30)),)),
    "advection": (advect, (values(257),)),
    "diffusion in 3-D": (diffuse_3d, (values((7, 8, 9)),)),
    "leapfrog": (wave, (values(200), values(200, 1))),
    "Gray-Scott": (gray_scott, (values((20, 24)), values((20, 24), 1))),
    "swap": (lambda a, b: (b, a), (values(30), values(30, 1))),
    "turn": (lambda a, b, c: (b, c, a + 1), (values(30), values(30, 1), values(30, 2))),
    "one thing twice": (lambda a, b: (a + b,) * 2, (values(30), values(30, 1))),
    "never changed": (lambda a, c: (a * c, c), (values(30), values(30, 1))),
    "nothing changes": (lambda a: a, (values(30),)),
    "constant": (lambda a: a * 0 + 3, (values(30),)),
    "reversed": (lambda a: a[::-1] + 1, (values(30),)),
    "transposed": (lambda a: a.T * 0.5 + a, (values((20, 20)),)),
    "mean taken off": (lambda a: a - a.mean() * 0.5, (values((30, 40)),)),
    "rows": (lambda a: a / (1 + a.sum(axis=1, keepdims=True)), (values((30, 40)),)),
    "running sum": (lambda a: np.cumsum(a, axis=0) * 0.1, (values((30, 40)),)),
    "put together": (lambda a: np.concatenate([a[-3:], a[:-3] * 0.5]), (values(100),)),
    "stacked": (lambda a: np.stack([a[1], a[0] * 0.5]), (values((2, 50)),)),
    "a time step from the state": (
        lambda u, t: (u * (1 - 0.1 / (1 + abs(u).max())), t + 0.1 / (1 + abs(u).max())),
        (values(100), np.array(0.0)),
    ),
    "0-d": (lambda a: a * 0.5 + 1, (np.array(3.0),)),
    "empty": (lambda a: a + 1, (np.zeros((0, 4)),)),
    "one empty": (lambda a, b: (a + 1, b * 2), (np.zeros((0, 4)), values(5))),
    "one item": (lambda a: a + 1, (np.zeros((1, 1)),)),
    "integers": (lambda a: (a * 3 + np.roll(a, 1)) % 1009, (np.arange(100),)),
    "small integers": (lambda a: a * np.int8(3) + 1, (np.arange(100).astype(np.int8),)),
    "complex": (lambda a: a * (0.6 + 0.8j) + np.conj(np.roll(a, 3)) * 0.1, (values(100) + 1j * values(100, 1),)),
    "float32": (lambda a: a * 0.5 + np.roll(a, 2) * 0.25 + 1, (values(100, dtype=np.float32),)),
    "life": (life, (values((20, 30)) < 0.4,)),
    "fields of several kinds": (lambda a, n, m: (np.where(m, a * 2, a), n + m, ~m), (values(50), np.arange(50), values(50) < 0.5)),
}


def through_a_name(u: Any, v: Any) -> Any:
    inner = v[1:-1]
    inner[...] = u[2:] * 0.5 + u[:-2] * 0.25
    inner += 0.125
    return v, u


def through_a_view_of_a_view(u: Any, v: Any) -> Any:
    v[1:][::-2].T[2] = u[::2, 0]
    return v, u


def through_out(u: Any, v: Any) -> Any:
    np.add(u[1:], u[:-1], out=v[1:])
    np.multiply(u, 0.5, out=u)
    return v, u


def both_ways(u: Any, v: Any) -> Any:
    """What is written into the array is seen in the view, and read before it was written over."""
    top, all_of_it = v[:2], v[:]
    v[0] = u[1]
    top *= 0.5
    v[-1] = top[0] + all_of_it[1]
    row = u[2]
    u += 1
    return v + row, u


def halves(u: Any, v: Any) -> Any:
    a, b = v[:3], v[3:]
    a *= 0.5
    b[:] = a + u[:3]
    return v, u


def reshaped(u: Any, v: Any) -> Any:
    v.reshape(-1)[3:9] = u[0, :6]
    v.ravel()[0] = 2
    v[None, :, :, None][0, 1, 2, 0] = u[0, 0]
    return v, u


def in_new_arrays(u: Any, v: Any) -> Any:
    w = np.empty_like(u)
    inner = w[1:-1]
    inner[...] = u[1:-1]
    w[0] = w[-1] = 0
    return w, v


@pytest.mark.parametrize("step", [through_a_name, through_a_view_of_a_view, through_out, both_ways, halves, reshaped, in_new_arrays])
def test_views_of_the_state_are_written_as_in_numpy(executor: str, step: Callable[..., Any]) -> None:
    state = values((6, 7)), values((6, 7), 1)
    for steps in (1, 2, 5):
        found = sa.iterate(step, *state, steps=steps)
        for mine, numpys in zip(found, loop(step, *state, steps=steps), strict=True):
            np.testing.assert_allclose(mine, numpys, rtol=1e-14)


def test_copies_of_arrays_with_values_are_written_in_a_step(executor: str) -> None:
    constant = values((6, 7), 9)

    def into_a_copy(of: Any, u: Any, v: Any) -> Any:
        w = of.copy()
        w[1:-1] += u[1:-1]
        z = np.array(constant) if isinstance(of, np.ndarray) else sa.array(constant)
        z[1:-1] = v[:-2]
        return w, z

    stored = sa.array(constant)
    state = values((6, 7)), values((6, 7), 1)
    found = sa.iterate(lambda u, v: into_a_copy(stored, u, v), *state, steps=3)
    for mine, numpys in zip(found, loop(lambda u, v: into_a_copy(constant, u, v), *state, steps=3), strict=True):
        np.testing.assert_array_equal(mine, numpys)
    np.testing.assert_array_equal(stored, constant)


def test_views_of_expressions_are_values_outside_steps() -> None:
    sa.iterate(through_a_name, values(9), values(9, 1), steps=1)
    x = sa.ones(5)
    view = x[1:]
    view += 1
    np.testing.assert_array_equal(x, np.ones(5))
    np.testing.assert_array_equal(view, np.full(4, 2.0))


# Reductions and sums over several chunks are not NumPy's bits.
@pytest.mark.parametrize("name", PROGRAMS)
def test_iterate_gives_what_a_loop_in_numpy_gives(executor: str, assert_same: Callable[..., None], name: str) -> None:
    step, state = PROGRAMS[name]
    for steps in (0, 1, 2, 7):
        with np.errstate(all="ignore"):
            expected = loop(step, *state, steps=steps)
            found = sa.iterate(step, *state, steps=steps)
        found = tuple(map(np.asarray, found)) if isinstance(found, tuple) else np.asarray(found)
        assert_same(found, expected, rtol=1e-12 if name != "float32" else 1e-6)


@pytest.mark.parametrize("name", PROGRAMS)
def test_iterate_in_many_tiles_gives_what_a_loop_in_numpy_gives(
    small_grids: Callable[..., Any], assert_same: Callable[..., None], name: str
) -> None:
    step, state = PROGRAMS[name]
    with np.errstate(all="ignore"):
        expected = loop(step, *state, steps=9)
        for scheduler in ("synchronous", "threads"):
            with small_grids(), sa.config.set(scheduler=scheduler):
                found = sa.iterate(step, *state, steps=9)
                found = tuple(map(np.asarray, found)) if isinstance(found, tuple) else np.asarray(found)
            assert_same(found, expected, rtol=1e-12 if name != "float32" else 1e-6)


# ----------------------------------------------------------------------------------------------------- the first state


def strided(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wide = np.zeros((x.shape[0] * 2, x.shape[1] * 3))
    wide[::2, ::3] = x
    return wide[::2, ::3]


FIRST: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
    "NumPy": lambda x: x.copy(),
    "NumPy, strided": strided,
    "NumPy, Fortran": np.asfortranarray,
    "NumPy, backwards": lambda x: x[::-1].copy()[::-1],
    "NumPy, read-only": lambda x: np.broadcast_to(x[:1].copy(), x.shape),
    "lazy": lambda x: sa.asarray(x) * 1.0,
    "stored": sa.array,
    "stored, chunks": lambda x: sa.array(x, chunks=(7, 5)),
    "stored, a view": lambda x: sa.array(np.pad(x, 3))[3:-3, 3:-3],
    "stored, transposed": lambda x: sa.array(x.T.copy()).T,
    "shared": lambda x: sa.shared.copy(x),
    "shared, lazy": lambda x: sa.asarray(sa.shared.copy(x)),
    "list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("kind", FIRST)
def test_the_first_state_may_be_any_array_and_stays_as_it_is(executor: str, kind: str) -> None:
    x = values((20, 15))
    first = FIRST[kind](x)
    expected = loop(heat_2d, np.asarray(first), steps=6)
    before = np.array(first)
    for steps in (1, 2, 6):
        found = sa.iterate(heat_2d, first, steps=steps)
        np.testing.assert_array_equal(np.asarray(first), before)
    np.testing.assert_array_equal(found, expected)
    assert isinstance(found, sa.Array) and found.is_stored


def test_the_result_keeps_the_chunks_of_the_state() -> None:
    u = sa.array(values((20, 15)), chunks=(7, 5))
    assert sa.iterate(heat_2d, u, steps=3).chunks == u.chunks


def test_a_list_of_arrays_is_a_state_and_a_list_may_be_returned() -> None:
    found = sa.iterate(lambda a, b: [a + b, b], [1.0, 2.0], [3.0, 4.0], steps=2)
    assert [x.tolist() for x in map(np.asarray, found)] == [[7.0, 10.0], [3.0, 4.0]]


def test_a_state_of_another_pool_is_copied(pool: sa.Pool) -> None:
    x = values(100)
    with sa.Pool(workers=0):
        first, mask = sa.array(x), sa.array(x < 0.5)
        with pool:
            found = sa.iterate(lambda u: sa.where(mask, u + 1, u), first, steps=5, scheduler="processes")
            assert found._storage.pool is pool
        np.testing.assert_array_equal(found, np.where(x < 0.5, loop(lambda u: u + 1, x, steps=5), x))
        np.testing.assert_array_equal(first, x)


# ---------------------------------------------------------------------------------------------------- buffers, memory


def buffers_of(monkeypatch: pytest.MonkeyPatch) -> list[_Loop]:
    made: list[_Loop] = []
    init = _Loop.__init__

    def noting(self: _Loop, *args: Any) -> None:
        made.append(self)
        init(self, *args)

    monkeypatch.setattr(_Loop, "__init__", noting)
    return made


def test_leapfrog_takes_three_buffers_in_turn_and_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = buffers_of(monkeypatch)
    u, v = values(200), values(200, 1)
    for scheduler in ("synchronous", "processes"):
        sa.iterate(wave, u, v, steps=30, scheduler=scheduler)
        (one,) = made
        assert len(one.own) == 3
        assert len(one.new) == 1
        assert [layer.name for layer in one.plain.step.plan.layers if "copy" in layer.name] == []
        made.clear()


@pytest.mark.parametrize(("step", "nfields", "nbuffers"), [(heat, 1, 2), (lambda a, b: (b, a), 2, 2), (lambda a, b: (a + b,) * 2, 2, 3)])
def test_buffers_are_the_state_twice_at_most(
    monkeypatch: pytest.MonkeyPatch, step: Callable[..., Any], nfields: int, nbuffers: int
) -> None:
    made = buffers_of(monkeypatch)
    sa.iterate(step, *[values(50, k) for k in range(nfields)], steps=40, scheduler="threads")
    assert len(made[0].own) == nbuffers


def test_memory_is_the_state_twice() -> None:
    n = 1 << 20
    with sa.Pool(workers=2, memory_limit="256MiB") as pool:
        for step, nfields in ((heat, 1), (gray_scott_1d, 2)):
            gc.collect()
            before = pool.statistics().live_nbytes
            assert before == 0
            fresh = sa.Pool(workers=2, memory_limit="256MiB")
            with fresh:
                results = sa.iterate(step, *[sa.full(n, 0.5)] * nfields, steps=20)
                state = 8 * n * nfields
                assert 2 * state <= fresh.statistics().peak_nbytes <= 2.1 * state
                del results
                gc.collect()
                fresh.check()


def gray_scott_1d(u: Any, v: Any) -> Any:
    reaction = u * v * v
    return u - reaction + 0.1 * (np.roll(u, 1) - u), v + reaction + 0.1 * (np.roll(v, -1) - v)


def test_memory_with_out_is_the_state_twice() -> None:
    n = 1 << 20
    with sa.Pool(workers=2, memory_limit="256MiB") as pool:
        u = sa.full(n, 0.5).persist()
        assert sa.iterate(heat, u, steps=21, out=u) is u
        assert pool.statistics().peak_nbytes <= 2.1 * 8 * n
        del u
        gc.collect()
        pool.check()
        assert pool.statistics().live_nbytes == 0


def test_steps_that_are_slow_only_at_first_do_not_start_workers() -> None:
    loop = _Loop.__new__(_Loop)
    loop.plain, loop.is_published = Mock(thin=None), False
    loop.rates, loop.warmed_up = {"here": math.inf, "pool": math.inf}, 0
    batches = []

    for seconds in (0.05, 0.03, 7e-4, 6e-5, 5e-5):  # of a step in each batch: code is loaded, then the second set of buffers touched
        batches.append(loop._batch(is_short=False))
        loop.rates["here"] = min(loop.rates["here"], seconds)

    assert batches == [("here", 1), ("here", 1), ("here", 1), ("here", 14), ("here", 256)]


def test_steps_that_stay_slow_are_tried_in_workers() -> None:
    loop = _Loop.__new__(_Loop)
    loop.plain, loop.is_published = Mock(thin=None), False
    loop.rates, loop.warmed_up = {"here": math.inf, "pool": math.inf}, 0

    for _ in range(4):
        assert loop._batch(is_short=False) == ("here", 1)
        loop.rates["here"] = 0.02

    assert loop._batch(is_short=False)[0] == "pool"


def test_the_plan_does_not_grow_with_the_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    made = buffers_of(monkeypatch)
    traced = []

    def step(u: Any) -> Any:
        traced.append(1)
        return heat(u)

    sizes = []
    for steps in (100, 1000):
        sa.iterate(step, values(100), steps=steps, scheduler="threads")
        one = made.pop()
        sizes.append((len(one.plain.step.plan.layers), max(len(p.layers) for p in one.plans.values()) <= 64, len(one.plans) <= 16))
    assert sizes[0] == sizes[1] == (sizes[0][0], True, True)
    assert len(traced) == 2


def test_a_state_that_does_not_fit_says_so() -> None:
    with sa.Pool(workers=0, memory_limit="16MiB") as pool:
        u = sa.full(1_000_000, 0.5).persist()
        with pytest.raises(sa.MemoryBudgetError, match=r"two sets of it, 8000000 bytes each"):
            sa.iterate(heat, u, steps=3)
        assert float(u[3]) == 0.5
        del u
        gc.collect()
        pool.check()


def test_constants_in_the_spill_file_are_read(tmp_path: Any) -> None:
    x = values(400_000)
    with sa.Pool(workers=2, memory_limit="24MiB", spill_directory=tmp_path) as pool:
        big = [sa.array(x + k) for k in range(8)]
        assert pool.statistics().spilled_nbytes
        spilled = next(b for b in big if b._storage.is_spilled)
        offset = float(spilled[0]) - x[0]
        for scheduler in ("synchronous", "processes"):
            with sa.config.set(scheduler=scheduler):
                found = sa.iterate(lambda u: u * 0.5 + spilled[:1000], np.zeros(1000), steps=5)
                np.testing.assert_array_equal(found, loop(lambda u: u * 0.5 + (x + round(offset))[:1000], np.zeros(1000), steps=5))


def test_numpy_arrays_too_large_to_be_copied_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Where nothing can be spilled as well; elsewhere no room on the disk is reserved for a copy."""
    x = values(1_600_000)
    whole = sa.asarray(x)
    expected = loop(lambda u: 0.5 * u + x[:100], np.zeros(100), steps=5)
    for directory in ("off", tmp_path):
        with sa.Pool(workers=2, memory_limit="12MiB", spill_directory=directory) as pool, sa.config.set(scheduler="processes"):
            monkeypatch.setattr(pool, "allocate_spilled", None)  # not called
            np.testing.assert_array_equal(sa.iterate(lambda u: 0.5 * u + whole[:100], np.zeros(100), steps=5), expected)


# -------------------------------------------------------------------------------------------------- constants, scalars


def test_a_constant_written_between_steps_is_noticed(executor: str) -> None:
    mask = sa.array(np.ones(10))

    def write(frame: sa.Frame) -> None:
        mask[3] = 5.0

    with pytest.raises(sa.ChangedInput, match=r"shape \(10,\).*was written"):
        sa.iterate(lambda u: u + mask, np.zeros(10), steps=4, callback=write)


def test_a_live_constant_is_followed(executor: str) -> None:
    mask = sa.array(np.ones(10))

    def write(frame: sa.Frame) -> None:
        mask[:] = 10.0 * frame.step

    found = sa.iterate(lambda u: u + mask.live, np.zeros(10), steps=3, callback=write)
    np.testing.assert_array_equal(found, np.full(10, 1.0 + 10.0 + 20.0))


def test_a_numpy_array_in_a_step_is_read_where_it_lies(executor: str) -> None:
    source = np.ones(10)

    def write(frame: sa.Frame) -> None:
        source[:] = 10.0 * frame.step

    found = sa.iterate(lambda u: u + source, np.zeros(10), steps=3, callback=write)
    np.testing.assert_array_equal(found, np.full(10, 31.0))


@pytest.mark.parametrize("scheduler", ["processes", None])
def test_numpy_arrays_in_a_step_where_workers_may_not_read_them(monkeypatch: pytest.MonkeyPatch, scheduler: str | None) -> None:
    monkeypatch.setenv("SHMARRAY_NO_PROCESS_VM", "1")
    source, x = values(1000, 3), values(1000)
    with sa.Pool(workers=2, memory_limit="64MiB"), sa.Pool(workers=0):
        foreign = sa.array(source)
        with sa.Pool(workers=2, memory_limit="64MiB") as pool:

            def write(frame: sa.Frame) -> None:
                source[:10] += 1

            seen = source.copy()
            found = sa.iterate(
                lambda u: u * 0.5 + source + foreign, x, steps=6, every=2, callback=write, observe={"sum": lambda u: (u + source).sum()},
                scheduler=scheduler,
            )  # fmt: skip
            assert not pool.is_driver_reachable or scheduler is None
            for _ in range(3):
                x = loop(lambda u: u * 0.5 + seen + np.asarray(foreign), x, steps=2)
                seen[:10] += 1
            np.testing.assert_array_equal(found, x)


def test_scalars_come_from_functions_and_sequences(executor: str) -> None:
    dt = [0.5, 0.25, 0.125, 2.0, 1.0]
    found = sa.iterate(
        lambda u, dt, t, n: u * dt + t + n, np.zeros(4), steps=5, scalars={"dt": dt, "t": lambda k: 10.0 * k, "n": np.arange(5)}
    )
    expected = np.zeros(4)
    for k in range(5):
        expected = expected * dt[k] + 10.0 * k + k
    np.testing.assert_array_equal(found, expected)


def test_scalars_are_numbered_from_start() -> None:
    seen = []

    def number(k: int) -> float:
        seen.append(k)
        return float(k)

    found = sa.iterate(lambda u, t: u + t, np.zeros(2), steps=3, start=10, scalars={"t": number})
    assert float(found[0]) == 10 + 11 + 12
    assert [k for k in seen if k > 10] == [11, 12]


def test_python_floats_and_scalars_leave_float32_alone() -> None:
    x = values(10, dtype=np.float32)
    found = sa.iterate(lambda u, dt: u * 0.5 + dt, x, steps=3, scalars={"dt": lambda k: 0.1})
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, loop(lambda u: u * 0.5 + np.float32(0.1), x, steps=3))


def test_elements_are_picked_by_arrays_of_indices(executor: str) -> None:
    rng = np.random.default_rng(3)
    u, left, right = rng.random(500), rng.integers(-500, 500, 500), rng.permutation(500)
    expected = u
    for _ in range(6):
        expected = 0.5 * (expected[left] + np.take(expected, right)) + expected[:, None][right, 0]
    found = sa.iterate(lambda v: 0.5 * (v[left] + sa.take(v, right)) + v[:, None][right][:, 0], u, steps=6, scheduler=executor)
    np.testing.assert_array_equal(found.compute(), expected)
    with pytest.raises(IndexError, match="out of bounds"):
        sa.iterate(lambda v: v[left + 900], u, steps=1)


@pytest.mark.parametrize("steps", [3, 4, 40])
def test_bins_are_those_of_each_step(executor: str, steps: int) -> None:
    def step(u: Any, counts: Any) -> Any:
        return u * 1.25, sa.histogram(u, bins=4)[0]

    _, counts = sa.iterate(step, np.linspace(0, 1, 101), np.zeros(4, np.int64), steps=steps)
    assert counts.compute().tolist() == [25, 25, 25, 26]


@pytest.mark.parametrize("dtype", ["f4", "c8", "i2"])
def test_python_numbers_take_the_dtype_of_the_state(dtype: str) -> None:
    found = sa.iterate(lambda u, n: u + n, np.ones(3, dtype), steps=4, scalars={"n": lambda k: k})
    assert found.dtype == dtype
    assert found.compute().tolist() == [7, 7, 7]


def test_scalars_that_run_out_say_so() -> None:
    with pytest.raises(IndexError, match=r"'dt'.*has 2 numbers, and none for step 2"):
        sa.iterate(lambda u, dt: u * dt, np.ones(3), steps=5, scalars={"dt": [1.0, 2.0]})


# ------------------------------------------------------------------------------------------- split runs, random numbers


def noisy(seed: int) -> Callable[..., Any]:
    def step(u: Any) -> Any:
        rng = sa.random.default_rng(seed)
        return heat(u) + 0.1 * rng.standard_normal(u.shape) - 0.05 * rng.random(u.shape)

    return step


def test_a_run_in_parts_is_bit_identical_with_one_run(executor: str) -> None:
    x = values(500)
    whole = np.array(sa.iterate(noisy(3), x, steps=37))
    for cuts in ([1, 36], [17, 20], [5] * 7 + [2]):
        u: Any = x
        done = 0
        for count in cuts:
            u = sa.iterate(noisy(3), u, steps=count, start=done)
            done += count
        np.testing.assert_array_equal(u, whole)


def test_bits_depend_on_neither_workers_nor_executor_nor_callbacks() -> None:
    x = values(3000)
    found = []
    for workers in (0, 1, 2, 3):
        with sa.Pool(workers=workers, memory_limit="64MiB"):
            for scheduler in (None, "processes", "threads", "synchronous") if workers == 2 else (None, "processes"):
                for more in ({}, {"every": 7, "callback": lambda frame: None}):
                    result = sa.iterate(noisy(5), x, steps=40, scheduler=scheduler, **more)
                    found.append(np.array(result))
                    del result
    for one in found:
        np.testing.assert_array_equal(one, found[0])


def test_random_numbers_are_new_in_every_step() -> None:
    rng = sa.random.default_rng(1)
    frames = []
    sa.iterate(lambda u: rng.random(1000), np.zeros(1000), steps=5, callback=lambda f: frames.append(np.array(f.state[0])))
    assert len({f.tobytes() for f in frames}) == 5
    everything = np.concatenate(frames)
    assert abs(everything.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(frames)[~np.eye(5, dtype=bool)]).max() < 0.15
    outside = np.asarray(sa.random.default_rng(1).random(1000))
    assert all((frame != outside).all() for frame in frames)


def test_random_numbers_of_a_step_do_not_depend_on_tiles(small_grids: Callable[..., Any]) -> None:
    x = values((60, 50))

    def step(u: Any) -> Any:
        return u + sa.random.default_rng(4).normal(0.0, 1.0, u.shape)

    with sa.config.set(scheduler="threads"):
        whole = np.array(sa.iterate(step, x, steps=4))
        with small_grids():
            np.testing.assert_array_equal(sa.iterate(step, x, steps=4), whole)


# ------------------------------------------------------------------------------------------ until, every, callbacks


def test_until_stops_at_the_first_step_that_is_enough(executor: str) -> None:
    frames = []
    found = sa.iterate(lambda u: u * 0.5, np.ones(10), until=lambda new, old: abs(new - old).max() < 0.01, callback=frames.append)
    assert float(found[0]) == 0.5**7  # 2^-6 - 2^-7 < 0.01
    assert [f.step for f in frames] == list(range(1, 8))


def test_until_is_asked_every_so_many_steps_and_steps_are_a_limit(executor: str) -> None:
    for every, expected in ((1, 7), (5, 10), (8, 8), (64, 20)):
        found = sa.iterate(lambda u: u + 1, np.zeros(3), steps=20, every=every, until=lambda new: new.min() >= 7)
        assert float(found[0]) == expected


def test_until_gets_the_state_before_the_step_though_the_step_changes_it_in_place() -> None:
    def step(u: Any) -> Any:
        u += 1
        return u

    found = sa.iterate(step, np.zeros(3), steps=50, until=lambda new, old: (new - old).max() < 0.5)
    assert float(found[0]) == 50


def test_functions_of_the_state_do_not_see_what_others_do_to_it_in_place() -> None:
    def spoil(u: Any) -> Any:
        u *= 0
        return u.sum()

    frames = []
    found = sa.iterate(
        lambda u: u + 1, np.ones(3), steps=2, callback=frames.append, observe={"a": spoil, "b": lambda new, old: (new - old).sum()}
    )
    assert [f.values for f in frames] == [{"a": 0, "b": 3}] * 2
    assert float(found[0]) == 3


def test_until_of_two_fields_gets_both_twice() -> None:
    found = sa.iterate(
        lambda a, b: (a + 1, b), np.zeros(2), np.ones(2), until=lambda a, b, a0, b0: (a > 4).all() & (a > a0).all() & (b == b0).all()
    )
    assert float(found[0][0]) == 5


def test_callbacks_come_every_so_many_steps_and_after_the_last(executor: str) -> None:
    frames: list[sa.Frame] = []
    seen = []

    def look(frame: sa.Frame) -> None:
        frames.append(frame)
        seen.append(float(frame.state[0].sum()))

    sa.iterate(
        lambda u: u + 1,
        np.zeros(4),
        steps=10,
        every=4,
        callback=look,
        start=100,
        observe={"max": lambda u: u.max(), "row": lambda u: u[:2]},
    )
    assert [f.step for f in frames] == [104, 108, 110]
    assert seen == [16.0, 32.0, 40.0]
    assert [float(f.values["max"]) for f in frames] == [4.0, 8.0, 10.0]
    assert [f.values["row"].tolist() for f in frames] == [[4.0, 4.0], [8.0, 8.0], [10.0, 10.0]]
    assert 0 <= frames[0].time <= frames[1].time <= frames[2].time


def test_numpy_arrays_taken_in_a_callback_never_change(executor: str) -> None:
    views: list[np.ndarray[Any, Any]] = []
    copies = []

    def look(frame: sa.Frame) -> None:
        view = np.asarray(frame.state[0])
        views.append(view)
        copies.append(view.copy())

    x = values(300)
    found = sa.iterate(heat, x, steps=25, every=2, callback=look)
    for view, copy in zip(views, copies, strict=True):
        np.testing.assert_array_equal(view, copy)
    np.testing.assert_array_equal(found, loop(heat, x, steps=25))
    assert not (views[0] == views[1]).all()


def test_expressions_on_an_earlier_frame_notice_that_it_is_over(executor: str) -> None:
    kept: list[Any] = []

    def look(frame: sa.Frame) -> None:
        if kept:
            with pytest.raises(sa.ChangedInput, match="was written"):
                kept[0].compute()
            kept.clear()
            errors.append(frame.step)
        else:
            kept.append(frame.state[0] * 2)

    errors: list[int] = []
    sa.iterate(heat, values(30), steps=6, callback=look)
    assert errors == [2, 4, 6]


def test_an_expression_on_the_last_frame_notices_that_out_took_its_memory() -> None:
    noticed = 0
    for steps in range(1, 5):
        x = values(30, 1)
        u = sa.array(values(30))[:]
        kept: list[Any] = []
        sa.iterate(heat, x, steps=steps, every=steps, callback=lambda frame, kept=kept: kept.append(frame.state[0] + 0), out=u)
        try:
            np.testing.assert_array_equal(kept[0].compute(), loop(heat, x, steps=steps))
        except sa.ChangedInput:
            noticed += 1
    assert noticed


def test_a_callback_may_compute_write_and_iterate(executor: str) -> None:
    def look(frame: sa.Frame) -> None:
        u = frame.state[0]
        inner.append(float(sa.iterate(lambda v: v + 1, u, steps=3).sum()))
        u[0] = 100.0

    inner: list[float] = []
    found = sa.iterate(lambda u: u + 1, np.zeros(4), steps=3, callback=look)
    assert found.compute().tolist() == [100.0, 3.0, 3.0, 3.0]
    assert inner == [16.0, 3 * 5 + 104.0, 3 * 6 + 104.0]


# ---------------------------------------------------------------------------------------------------------------- out=


def test_out_is_the_result_and_its_aliases_see_it(executor: str) -> None:
    x = values(40)
    for steps in range(5):
        u, v = sa.array(x), sa.array(np.zeros(40))
        alias, part, view = u[:], v[::-1], np.asarray(u)
        assert sa.iterate(heat, u, steps=steps, out=v) is v
        np.testing.assert_array_equal(v, loop(heat, x, steps=steps))
        np.testing.assert_array_equal(part, loop(heat, x, steps=steps)[::-1])
        np.testing.assert_array_equal(u, x)
        assert sa.iterate(heat, u, steps=steps, out=u) is u
        np.testing.assert_array_equal(alias, loop(heat, x, steps=steps))
        np.testing.assert_array_equal(view, x)


OUTS: dict[str, Callable[..., Any]] = {
    "swap": lambda a, b: (b, a),
    "leapfrog": wave,
    "one thing twice": lambda a, b: (a + b,) * 2,
    "never changed": lambda a, b: (a * b, b),
    "both": lambda a, b: (a + b, a * b),
}


@pytest.mark.parametrize("places", ["state", "state swapped", "others", "views", "shared"])
@pytest.mark.parametrize("name", OUTS)
def test_out_of_several_fields(executor: str, name: str, places: str) -> None:
    x, y = values(40), values(40, 1)
    for steps in range(6):
        u, v, free = sa.array(x), sa.array(y), sa.array(np.zeros((3, 40)))
        outs = {
            "state": (u, v),
            "state swapped": (v, u),
            "others": (sa.array(x * 0), sa.array(x * 0)),
            "views": (free[0], free[2, ::-1]),
            "shared": (sa.asarray(sa.shared.copy(x)), sa.asarray(sa.shared.copy(y))),
        }[places]
        found = sa.iterate(OUTS[name], u, v, steps=steps, out=outs)
        assert found[0] is outs[0] and found[1] is outs[1]
        for one, expected in zip(outs, loop(OUTS[name], x, y, steps=steps), strict=True):
            np.testing.assert_array_equal(one, expected)
        if not places.startswith("state"):
            np.testing.assert_array_equal(u, x)
            np.testing.assert_array_equal(v, y)
        assert not np.asarray(free[1]).any()


def test_out_may_be_what_every_step_reads(executor: str) -> None:
    for steps in (1, 2, 3, 6):
        k = sa.array(np.ones(5))
        sa.iterate(lambda u, k=k: u + k, np.zeros(5), steps=steps, out=k)
        assert np.asarray(k).tolist() == [float(steps)] * 5


def test_an_expression_on_out_notices_the_write() -> None:
    u = sa.array(values(10))
    old = u * 2
    sa.iterate(heat, u, steps=2, out=u)
    with pytest.raises(sa.ChangedInput):
        old.compute()


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (lambda: (sa.array(np.zeros(4)),) * 2, r"of 2 arrays for a state of 1"),
        (lambda: sa.array(np.zeros(5)), r"shape \(5,\), float64 for a field of shape \(4,\)"),
        (lambda: sa.array(np.zeros(4, np.float32)), r"float32 for a field of shape \(4,\), float64"),
        (lambda: np.zeros(4), "takes stored arrays, got ndarray"),
        (lambda: sa.zeros(4) + 1, "takes stored arrays"),
    ],
)
def test_an_out_that_does_not_fit_is_refused(out: Callable[[], Any], error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        sa.iterate(lambda u: u, np.zeros(4), steps=2, out=out())


def test_outs_that_share_memory_are_refused() -> None:
    u = sa.array(np.zeros(8))
    with pytest.raises(ValueError, match="arrays 0 and 1 share memory"):
        sa.iterate(lambda a, b: (b, a), np.zeros(4), np.ones(4), steps=2, out=(u[:4], u[2:6]))
    sa.iterate(lambda a, b: (b, a), np.zeros(4), np.ones(4), steps=2, out=(u[:4], u[4:]))
    assert np.asarray(u).tolist() == [0.0] * 4 + [1.0] * 4


# -------------------------------------------------------------------------------------------------------------- errors


class OopsError(Exception):
    pass


def fail_at(value: float) -> Callable[..., Any]:
    def check(block: Any) -> Any:
        if (block >= value).any():
            raise OopsError(f"reached {block.max()}")
        return block + 1

    return lambda u: u.map_blocks(check, dtype=float)


def test_an_exception_in_a_task_says_at_which_steps(executor: str) -> None:
    with pytest.raises(OopsError, match="reached") as caught:
        sa.iterate(fail_at(9.0), np.zeros(6), steps=50)
    notes = "\n".join(caught.value.__notes__)
    assert "of iterate() at" in notes and "test_iterate.py" in notes
    assert float(sa.iterate(lambda u: u + 1, np.zeros(3), steps=3).sum()) == 9  # nothing is left locked


def test_out_cut_short_says_so_and_can_be_written_anew(executor: str) -> None:
    u = sa.array(np.zeros(6), chunks=2)
    with pytest.raises(OopsError):
        sa.iterate(fail_at(30.0), u, steps=64, out=u)
    try:
        found = np.asarray(u)
        assert set(found.tolist()) == {found[0]} and 0 <= found[0] <= 30  # whole: the state before the step that failed
    except sa.TornChunkError as error:
        assert "iterate() at" in str(error) and "OopsError" in str(error)
    u[...] = 7.0
    assert np.asarray(u).tolist() == [7.0] * 6
    assert sa.iterate(lambda u: u + 1, u, steps=4, out=u).compute().tolist() == [11.0] * 6


def test_a_torn_out_is_made_whole(executor: str) -> None:
    for steps in (1, 2, 3):
        u, v = sa.array(np.zeros(6), chunks=2), sa.array(np.zeros(6))
        u._storage.tear({1: "For a test."})
        sa.iterate(lambda v: v + 1, v, steps=steps, out=u)
        assert np.asarray(u).tolist() == [float(steps)] * 6
    u._storage.tear({1: "For a test."})
    with pytest.raises(sa.TornChunkError, match="For a test"):
        sa.iterate(lambda u: u + 1, u, steps=2)


def test_exceptions_in_callbacks_and_scalars_leave_the_state_usable(executor: str) -> None:
    u = sa.array(np.zeros(5))

    def fails(frame: sa.Frame) -> None:
        if frame.step == 3:
            raise OopsError("enough")

    with pytest.raises(OopsError, match="enough"):
        sa.iterate(lambda v: v + 1, u, steps=10, callback=fails, out=u)
    np.testing.assert_array_equal(u, u)  # readable: no step was under way
    with pytest.raises(OopsError):
        sa.iterate(lambda v, t: v + t, u, steps=10, scalars={"t": raising}, out=u)
    u += 1


def raising(k: int) -> float:
    if k >= 4:
        raise OopsError(str(k))
    return 1.0


def broadcast_written(u: Any) -> Any:
    np.broadcast_to(u, (2, 3))[0] = 1
    return u


def reshaped_slice_written(u: Any) -> Any:
    u[1:].reshape(2, 4)[0] = 1
    return u


def stored_written(other: Any) -> Any:
    def step(u: Any) -> Any:
        other[1:] = u[1:]
        return u

    return sa.iterate(step, np.zeros(3), steps=1)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no function": (lambda: sa.iterate(np.zeros(3), np.zeros(3), steps=1), TypeError, "takes the function of a step first, got ndarray"),
    "no state": (lambda: sa.iterate(heat, steps=1), TypeError, "give at least one array"),
    "no end": (lambda: sa.iterate(heat, np.zeros(3)), TypeError, "say how many steps="),
    "negative": (lambda: sa.iterate(heat, np.zeros(3), steps=-1), ValueError, "steps=-1"),
    "half": (lambda: sa.iterate(heat, np.zeros(3), steps=1.5), ValueError, "steps=1.5"),  # type: ignore[arg-type]
    "every 0": (lambda: sa.iterate(heat, np.zeros(3), steps=1, every=0), ValueError, "every=0"),
    "start": (lambda: sa.iterate(heat, np.zeros(3), steps=1, start=-2), ValueError, "start=-2"),
    "observe alone": (lambda: sa.iterate(heat, np.zeros(3), steps=1, observe={"a": lambda u: u}), TypeError, "there is none"),
    "shape": (lambda: sa.iterate(lambda u: u[1:], np.zeros(3), steps=1), ValueError, r"field 0 of shape \(3,\) and returned shape \(2,\)"),
    "dtype": (lambda: sa.iterate(lambda u: u / 2, np.arange(3), steps=1), TypeError, r"field 0 of int64 and returned float64.*begin with"),
    "count": (lambda: sa.iterate(lambda u: (u, u), np.zeros(3), steps=1), ValueError, "returned 2 arrays for a state of 1"),
    "None": (lambda: sa.iterate(lambda u: None, np.zeros(3), steps=1), TypeError, "returned None"),
    "no array": (lambda: sa.iterate(lambda u: "text", np.zeros(3), steps=1), ValueError, r"returned shape \(\)"),
    "branch": (lambda: sa.iterate(lambda u: u if u.sum() > 0 else -u, np.zeros(3), steps=1), TypeError, "cannot branch on values"),
    "branch on a state": (lambda: sa.iterate(lambda u: u if u[0] > 0 else -u, np.zeros(3), steps=1), TypeError, "cannot branch on values"),
    "float": (lambda: sa.iterate(lambda u: u * float(u.max()), np.zeros(3), steps=1), TypeError, "at .*test_iterate.py"),
    "NumPy": (lambda: sa.iterate(lambda u: np.asarray(u) + 1, np.zeros(3), steps=1), TypeError, "no values"),
    "read-only": (lambda: sa.iterate(broadcast_written, np.zeros(3), steps=1), ValueError, "assignment destination is read-only"),
    "reshaped slice": (lambda: sa.iterate(reshaped_slice_written, np.zeros(9), steps=1), TypeError, "reshaped slice or transpose"),
    "picked": (lambda: sa.iterate(lambda u: u[u > 0], np.zeros(3), steps=1), TypeError, "elements that a mask picks"),
    "real part": (lambda: sa.iterate(lambda u: u.real.__setitem__(0, 7.0), np.zeros(3, complex), steps=1), TypeError, "the real part of"),
    "stored": (lambda: stored_written(sa.zeros(3).persist()), TypeError, r"writing into stored arrays but a copy\(\)"),
    "persist": (lambda: sa.iterate(lambda u: (u + 1).persist(), np.zeros(3), steps=1), TypeError, "no values"),
    "nested": (lambda: sa.iterate(lambda u: sa.iterate(heat, u, steps=2), np.zeros(3), steps=1), TypeError, "no values"),
    "scalar array": (
        lambda: sa.iterate(lambda u, a: u * a, np.zeros(3), steps=1, scalars={"a": lambda k: np.ones(2)}),
        TypeError,
        "one number",
    ),
    "scalar number": (lambda: sa.iterate(lambda u, a: u * a, np.zeros(3), steps=1, scalars={"a": 2.0}), TypeError, "'a'"),
    "until": (lambda: sa.iterate(heat, np.zeros(3), until=lambda u: u > 1), TypeError, r"shape \(3,\) and bool; it must be one boolean"),
    "scheduler": (lambda: sa.iterate(heat, np.zeros(3), steps=1, scheduler="proceses"), ValueError, "proceses"),
}


@pytest.mark.parametrize("name", BAD)
def test_misuse_is_told(name: str) -> None:
    call, kind, text = BAD[name]
    with pytest.raises(kind, match=text):
        call()
    assert float(sa.iterate(lambda u: u + 1, np.zeros(3), steps=3).sum()) == 9


def test_printing_a_traced_array_shows_no_values() -> None:
    shown = []

    def step(u: Any) -> Any:
        shown.append(repr(u))
        return u + 1

    sa.iterate(step, np.zeros(3), steps=1)
    assert "3" in shown[0]


def test_warnings_come_from_the_line_of_the_step(executor: str) -> None:
    def step(u: Any) -> Any:
        return u / (u - u)  # the line

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sa.iterate(step, np.ones(5), steps=3)
    assert {w.category for w in caught} == {RuntimeWarning}
    assert {w.filename for w in caught} == {__file__}
    assert {w.lineno for w in caught} == {step.__code__.co_firstlineno + 1}


def test_errstate_is_that_of_the_step(executor: str) -> None:
    def step(u: Any) -> Any:
        with np.errstate(all="ignore"):
            return 1 / (u - u)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sa.iterate(step, np.ones(5), steps=1)
    assert np.isinf(found).all()

    def raises(u: Any) -> Any:
        with np.errstate(divide="raise"):
            return 1 / (u - 3)

    with pytest.raises(FloatingPointError, match="divide by zero"):
        sa.iterate(raises, np.full(5, 3.0), steps=1)


# ------------------------------------------------------------------------------------------- user functions, threads


def test_user_functions_stand_in_a_step(executor: str) -> None:
    x = values((30, 20))

    def smooth(block: Any) -> Any:
        return block * 0.5 + block.mean(axis=1, keepdims=True)

    u = sa.array(x, chunks=(10, 20))
    found = sa.iterate(lambda u: u.map_blocks(smooth, dtype=float), u, steps=5)
    np.testing.assert_array_equal(found, loop(smooth, x, steps=5))


def test_iterate_within_a_worker(executor: str) -> None:
    def function(block: Any) -> Any:
        return np.asarray(sa.iterate(lambda u: u + 1, block, steps=3))

    assert sa.zeros(8, chunks=2).map_blocks(function, dtype=float).compute().tolist() == [3.0] * 8


def test_threads_iterate_at_once(executor: str) -> None:
    found: dict[int, Any] = {}
    mask = sa.array(np.ones(200))
    begin = threading.Barrier(4)

    def work(k: int) -> None:
        begin.wait()
        found[k] = np.asarray(
            sa.iterate(lambda u: heat(u) + mask * k, values(200, k), steps=30, every=7, callback=lambda f: f.state[0].sum().compute())
        )

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(4):
        np.testing.assert_array_equal(found[k], loop(lambda u, k=k: heat(u) + np.ones(200) * k, values(200, k), steps=30))


@pytest.mark.parametrize("engine", ["numpy", "auto"])
def test_either_engine_steps(engine: str) -> None:
    for name in ("heat", "Gray-Scott", "life", "mean taken off"):
        step, state = PROGRAMS[name]
        with sa.config.set(engine=engine):
            results = [sa.iterate(step, *state, steps=12, scheduler=scheduler) for scheduler in ("synchronous", "processes")]
        expected = loop(step, *state, steps=12)
        for one in results:
            for a, b in zip(
                one if isinstance(one, tuple) else (one,), expected if isinstance(expected, tuple) else (expected,), strict=True
            ):
                np.testing.assert_allclose(np.asarray(a).astype(float), b.astype(float), rtol=1e-11)


def test_nothing_stays_when_iterate_is_over(executor: str) -> None:
    with sa.Pool(workers=2, memory_limit="64MiB") as pool:
        mask = sa.array(np.ones(100))
        with pytest.raises(OopsError):
            sa.iterate(fail_at(5.0), np.zeros(6), steps=50)
        sa.iterate(lambda u: heat(u) * mask, values(100), steps=50, every=9, callback=lambda f: None, until=lambda u: u.max() < 0)
        gc.collect()
        assert pool.statistics().live_nbytes <= 4096  # the mask
        pool.check()


# ---------------------------------------------------------------------------------------------------- plain Python loops


def test_a_loop_of_persist_uses_plans_and_memory_again(executor: str) -> None:
    x = values(1000)
    with sa.Pool(workers=2, memory_limit="64MiB") as pool:
        u = sa.array(x)
        for _ in range(3):
            u = heat(u).persist()
        before, most = templates.statistics(), 0
        for _ in range(50):
            u = heat(u).persist()
            most = max(most, pool.statistics().live_nbytes)
        after = templates.statistics()
        assert after["built"] == before["built"]
        assert after["reused"] >= before["reused"] + 50
        assert most <= 4 * (8 * 1000 + 4096)
        np.testing.assert_array_equal(u, loop(heat, x, steps=53))
        del u
        gc.collect()
        pool.check()


def test_computing_over_its_own_input_takes_new_memory_instead_of_a_copy(executor: str) -> None:
    x = values(1000)
    u = sa.array(x)
    alias, view = u[::2], np.asarray(u)
    for k in range(1, 12):
        heat(u).compute(out=u)
        np.testing.assert_array_equal(u, loop(heat, x, steps=k))
    np.testing.assert_array_equal(alias, loop(heat, x, steps=11)[::2])
    np.testing.assert_array_equal(view, x)


def test_computing_over_its_own_input_under_its_own_lock_is_seen_there() -> None:
    x = values(100)
    u = sa.array(x, chunks=25)
    with u.lock((0,), "w") as block:
        heat(u).compute(out=u)
        np.testing.assert_array_equal(block, loop(heat, x, steps=1)[:25])
        block[:] = 5.0
    np.testing.assert_array_equal(u, np.concatenate([np.full(25, 5.0), loop(heat, x, steps=1)[25:]]))


def test_an_exception_while_computing_over_its_own_input_leaves_it_as_it_was(executor: str) -> None:
    def fails(block: Any) -> Any:
        raise OopsError("no")

    x = values(100)
    u = sa.array(x)
    with pytest.raises(OopsError):
        (u[::-1] + u.map_blocks(fails, dtype=float)).compute(out=u)
    np.testing.assert_array_equal(u, x)


# ------------------------------------------------------------------------------------------------------------ properties

Operation = Callable[[Any], Any]


@st.composite
def operations(draw: st.DrawFn) -> Operation:
    kind = draw(st.sampled_from(["roll", "slice", "flip", "scale", "rows", "where", "write", "mean", "copy"]))
    n, axis = draw(st.integers(-3, 3)), draw(st.integers(0, 1))
    a, b = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    factor = draw(st.sampled_from([0.5, -0.25, 1.0]))

    def roll(u: Any) -> Any:
        return np.roll(u, n, axis)

    def cut(u: Any) -> Any:
        v = u.copy()
        v[a : u.shape[0] - b] = u[: u.shape[0] - a - b] * factor
        return v

    def flip(u: Any) -> Any:
        return (u[::-1] if axis else u[:, ::-1]) * factor

    def scale(u: Any) -> Any:
        return u * factor + n

    def rows(u: Any) -> Any:
        return u * 0.5 + u[:1] if axis else u * 0.5 + u[:, a % 3 : a % 3 + 1]

    def where(u: Any) -> Any:
        return np.where(u > n, u * factor, u - 1)

    def write(u: Any) -> Any:
        v = u.copy()
        v[a::2, b:] = n
        v[:, -1] += u[:, 0]
        return v

    def mean(u: Any) -> Any:
        return u - u.max() * factor

    def copy(u: Any) -> Any:
        return u.copy()

    return {f.__name__: f for f in (roll, flip, scale, rows, where, write, mean, copy)}.get(kind, cut)


@st.composite
def programs(draw: st.DrawFn) -> tuple[Callable[..., Any], int]:
    """A step of one to three fields: each is made of any of them, or is one of them as it was."""
    nfields = draw(st.integers(1, 3))
    recipes = [
        (draw(st.integers(0, nfields - 1)), draw(st.lists(operations(), max_size=3)), draw(st.none() | st.integers(0, nfields - 1)))
        for _ in range(nfields)
    ]

    def step(*fields: Any) -> Any:
        results = []
        for source, chain, other in recipes:
            x = fields[source]
            for operation in chain:
                x = operation(x)
            results.append(x if other is None else x * 0.5 + fields[other] * 0.25)
        return tuple(results)

    return step, nfields


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    program=programs(),
    shape=st.tuples(st.integers(9, 20), st.integers(4, 12)),
    steps=st.integers(0, 12),
    every=st.integers(1, 5),
    scheduler=st.sampled_from(["threads", "synchronous"]),
    is_out=st.booleans(),
)
def test_random_steps_agree_with_numpy(
    small_grids: Callable[..., Any],
    program: tuple[Callable[..., Any], int],
    shape: tuple[int, int],
    steps: int,
    every: int,
    scheduler: str,
    is_out: bool,
) -> None:
    step, nfields = program
    state = [np.random.default_rng(k).integers(-9, 9, shape).astype(float) for k in range(nfields)]
    expected = loop(lambda *fields: step(*fields) if nfields > 1 else step(*fields)[0], *state, steps=steps)
    seen: list[Any] = []
    with small_grids(), sa.Pool(workers=2, memory_limit="64MiB"):
        stored = tuple(map(sa.array, state))
        found = sa.iterate(
            lambda *fields: step(*fields) if nfields > 1 else step(*fields)[0],
            *stored,
            steps=steps,
            every=every,
            callback=lambda frame: seen.append((frame.step, np.asarray(frame.state[0]))),
            scheduler=scheduler,
            out=stored if is_out else None,
        )
        arrays = found if nfields > 1 else (found,)
        for one, other in zip(arrays, expected if nfields > 1 else (expected,), strict=True):
            np.testing.assert_array_equal(one, other)
        for number, view in seen:
            middle = loop(lambda *fields: step(*fields) if nfields > 1 else step(*fields)[0], *state, steps=number)
            np.testing.assert_array_equal(view, middle[0] if nfields > 1 else middle)
        if not is_out:
            for one, other in zip(stored, state, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "step",
    [
        lambda u: sa.map_overlap(lambda block: block * 0.5, u, depth=1, boundary="periodic"),
        lambda u: u.map_blocks(lambda block: block * 0.5),
        lambda u: sa.map_blocks(np.add, u, sa.ones((64, 64), chunks=(8, 64)) * 2),
        lambda u: u * 0.9 + sa.random.default_rng(3).standard_normal(u.shape),
    ],
    ids=["overlap", "blocks", "beside what is made", "random"],
)
def test_tasks_of_any_kind_wait_for_neighbours_alone(monkeypatch: pytest.MonkeyPatch, step: Callable[[Any], Any]) -> None:
    made = buffers_of(monkeypatch)
    with sa.Pool(workers=2):
        sa.iterate(step, sa.ones((64, 64), chunks=(8, 64)), steps=2)
    (loop,) = made
    plan = loop.plain.step
    fields = {number for number in (*loop.plain.fields, *loop.plain.fresh) if number is not None}
    for uses in (*plan.reads, *plan.writes):
        assert all(spans is not None for buffer, spans in uses.items() if buffer in fields)
    waits = repeat.chain([loop._bound(loop.plain, loop.fields, loop._next(loop.fields)[0], 0)] * 2)
    assert all(dependency.requires is not None for dependency in waits.layers[-1].dependencies)
