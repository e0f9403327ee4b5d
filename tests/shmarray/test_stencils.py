"""Stencils: chains over shifted, rolled, padded and assigned arrays are one layer, and agree with NumPy bit by bit."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmarray as sa
from scheduler.run import Pool
from shmarray.compute import current_pool
from shmarray.engines import plain_kernel
from shmarray.hoist import MOST_BOXES
from shmarray.kernels.parts import PartsKernel
from shmarray.plan import Target, build_plan
from shmarray.tiles import Grid, map_grid, part_grid

RNG = np.random.default_rng(0)
VALUES = RNG.random((61, 83))


def plan(*results: Any) -> Any:
    """Return the plan of results, without running it."""
    return build_plan([r.node for r in results], [Target(r.shape, r.dtype) for r in results], current_pool())[0]


def parts_of(x: Any) -> PartsKernel:
    """Return the kernel of a result that one layer of parts makes."""
    (layer,) = plan(x).layers
    assert isinstance(layer.kernel, PartsKernel)
    return layer.kernel


def periodic(xp: Any, u: Any) -> Any:
    shifted = (xp.roll(u, shift, axis) for axis in range(u.ndim) for shift in (1, -1))
    return u + 0.125 * (sum(shifted) - 2 * u.ndim * u)


def assigned(xp: Any, u: Any) -> Any:
    v = u * 1
    inside = (slice(1, -1),) * u.ndim
    total = -2 * u.ndim * u[inside]
    for axis in range(u.ndim):
        for shift in (slice(2, None), slice(None, -2)):
            total = total + u[(*inside[:axis], shift, *inside[axis + 1 :])]
    v[inside] = u[inside] + 0.125 * total
    return v


# --- the plan ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ndim", "parts"), [(1, 3), (2, 9), (3, 27)])
def test_a_periodic_stencil_is_one_layer_without_temporaries(ndim: int, parts: int) -> None:
    kernel = parts_of(periodic(sa, sa.array(np.ones((7,) * ndim))))

    assert len(kernel.parts) == parts
    assert not any(part.program.made for part in kernel.parts)


def test_assigning_to_a_copy_is_one_layer_and_computes_nothing_that_is_covered() -> None:
    kernel = parts_of(assigned(sa, sa.array(VALUES)))

    assert sorted(len(part.program.steps) for part in kernel.parts) == [3, 3, 3, 3, 13]
    covered = np.zeros(VALUES.shape, int)
    for place in kernel.places:
        covered[place] += 1
    assert (covered == 1).all()


def test_what_would_be_many_boxes_is_made_within_the_tasks() -> None:
    x = sa.array(np.arange(400.0))
    pieces = sa.concatenate([x[k : k + 4] for k in range(0, 400, 4)])

    (layer,) = plan(pieces + x).layers

    assert not isinstance(layer.kernel, PartsKernel) and layer.kernel.program.made
    np.testing.assert_array_equal((pieces + x).compute(), 2 * np.arange(400.0))
    assert MOST_BOXES < 400 // 4


def test_pieces_with_gaps_are_made_within_the_tasks() -> None:
    x = sa.array(VALUES) * 1
    x[::2] = 0.0
    expected = VALUES.copy()
    expected[::2] = 0

    (layer,) = plan(x + 1).layers

    assert layer.kernel.program.made
    np.testing.assert_array_equal((x + 1).compute(), expected + 1)


def test_a_costly_chain_under_rolls_is_computed_once() -> None:
    waves = np.exp(sa.array(VALUES))

    first, second = plan(periodic(sa, waves)).layers

    assert first.name == "exp" and second.name.startswith("roll")
    np.testing.assert_array_equal(periodic(sa, waves).compute(), periodic(np, np.exp(VALUES)))


def test_what_an_assembly_holds_is_kept_when_several_views_would_compute_it_again() -> None:
    v = np.exp(sa.array(VALUES))
    v[0] = 0
    a = np.exp(VALUES)
    a[0] = 0

    layers = plan(v[2:] + v[1:-1] + v[:-2]).layers

    assert [layer.name for layer in layers] == ["exp", "setitem-add-add"]
    np.testing.assert_array_equal((v[2:] + v[1:-1] + v[:-2]).compute(), a[2:] + a[1:-1] + a[:-2])


def test_two_steps_depend_on_each_other_by_ranges() -> None:
    u = sa.array(np.zeros((4096, 512)))

    first, second = plan(periodic(sa, periodic(sa, u))).layers

    (dependency,) = second.dependencies
    assert dependency.layer == 0 and dependency.requires is not None and first.ntasks == 16
    assert dependency.requires(5, 6) == (4, 7)
    assert dependency.requires(0, 1) == (0, first.ntasks)  # row -1 is the last


def test_the_fields_of_one_step_share_a_layer(executor: str) -> None:
    u, v = sa.array(VALUES), sa.array(VALUES[::-1].copy())

    def step(xp: Any, u: Any, v: Any) -> tuple[Any, Any]:
        reaction = np.exp(u * v) * v  # costly, and wanted by both
        return periodic(xp, u) - reaction, periodic(xp, v) + reaction

    both = step(sa, u, v)
    (layer,) = plan(*both).layers

    assert isinstance(layer.kernel, PartsKernel) and len(layer.kernel.outs) == 2
    assert sum(getattr(s, "name", "") == "exp" for s in layer.kernel.program.steps) == 1
    for ours, theirs in zip(sa.compute(*both), step(np, VALUES, VALUES[::-1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-14)
    other = periodic(sa, sa.array(VALUES))
    assert len(plan(both[0], other).layers) == 2  # nothing is read by both


def test_explain_says_how_many_parts() -> None:
    text = str(periodic(sa, sa.array(VALUES)).explain())

    assert "plan    1 layer," in text and "no temporaries" in text and "in 9 parts" in text


def test_narrow_parts_run_the_code_of_the_largest() -> None:
    pytest.importorskip("llvmlite")
    with sa.config.set(engine="llvm"):
        kernel = parts_of(periodic(sa, sa.array(VALUES)))

    assert len({part.code for part in kernel.parts}) == 1
    again = pickle.loads(pickle.dumps(kernel))
    assert [part.code for part in again.parts] == [part.code for part in kernel.parts]
    assert pickle.dumps(kernel).count(kernel.parts[0].code) == 1
    assert plain_kernel(kernel).parts == tuple(part.plain for part in kernel.parts)


def test_a_long_narrow_part_has_code_of_its_own() -> None:
    pytest.importorskip("llvmlite")
    with sa.config.set(engine="llvm"):
        kernel = parts_of(periodic(sa, sa.array(np.ones((2000, 40)))))

    columns = [part for part, place in zip(kernel.parts, kernel.places, strict=True) if place[0].stop - place[0].start > 1]
    assert sorted(part.program.shape for part in columns) == [(1998, 1), (1998, 1), (1998, 38)]
    left, right = (part for part in columns if part.program.shape[1] == 1)
    assert left.code == right.code != kernel.largest.code


def test_what_reads_its_own_target_is_computed_aside(executor: str) -> None:
    u = sa.array(VALUES)

    u[...] = periodic(sa, u)

    np.testing.assert_array_equal(u.compute(), periodic(np, VALUES))


# --- values ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["numpy", "llvm"])
@pytest.mark.parametrize("dtype", ["f8", "f4", "i4", "c16", "f2"])
def test_stencils_have_numpys_bits_in_every_executor(engine: str, dtype: str, executor: str, assert_same: Any) -> None:
    a = (RNG.random((70, 90)) * 9).astype(dtype)

    with sa.config.set(engine=engine):
        for given in (sa.array(a, chunks=(13, 40)), sa.asarray(a), sa.array(a).T, sa.array(a[::-1, ::2].copy())[::-1]):
            theirs = np.asarray(given)
            assert_same(periodic(sa, given).compute(), periodic(np, theirs))
            assert_same(assigned(sa, given).compute(), assigned(np, theirs))
            assert_same(periodic(sa, assigned(sa, given)).compute(), periodic(np, assigned(np, theirs)))


def test_results_keep_the_memory_order_of_what_they_are_computed_from() -> None:
    assert periodic(sa, sa.array(VALUES).T).compute().flags.f_contiguous


def test_a_result_spanning_many_tiles_agrees_with_numpy(executor: str) -> None:
    a = RNG.random((700, 900))

    for engine in ("numpy", "llvm"):
        with sa.config.set(engine=engine):
            np.testing.assert_array_equal(periodic(sa, sa.array(a)).compute(), periodic(np, a))
            np.testing.assert_array_equal(assigned(sa, sa.array(a)).compute(), assigned(np, a))


@pytest.mark.parametrize("engine", ["numpy", "llvm"])
def test_warnings_are_numpys_whichever_part_they_come_from(engine: str, executor: str) -> None:
    a = np.ones((40, 50))

    def given(xp: Any, u: Any) -> Any:
        v = u * 1
        v[0] = 0.0
        return 1 / v

    with sa.config.set(engine=engine):
        with pytest.warns(RuntimeWarning, match="divide by zero encountered in divide"):
            found = given(sa, sa.array(a)).compute()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quiet = periodic(sa, 1 / (sa.array(a) + 1)).compute()
        with np.errstate(divide="ignore"):
            np.testing.assert_array_equal(found, given(np, a))
        np.testing.assert_array_equal(quiet, periodic(np, 1 / (a + 1)))


def padded(xp: Any, u: Any, mode: str) -> Any:
    p = xp.pad(u, 1, mode=mode)
    return p[1:-1, 1:-1] + 0.125 * (p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4 * p[1:-1, 1:-1])


@pytest.mark.parametrize("engine", ["numpy", "llvm"])
@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric", "wrap"])
def test_a_stencil_over_a_padded_array_makes_no_padded_array(mode: str, engine: str, executor: str, assert_same: Any) -> None:
    u = sa.array(VALUES)
    with sa.config.set(engine=engine):
        kernel = parts_of(padded(sa, u, mode))
        found = padded(sa, u, mode).compute()

    assert len(kernel.parts) == 9
    assert {load.buffer for part in kernel.parts for load in part.program.loads} == {kernel.largest.program.loads[0].buffer}
    assert_same(found, padded(np, VALUES, mode))


@st.composite
def stencils(draw: Any) -> tuple[Any, np.ndarray[Any, Any]]:
    """An array of ours and NumPy's: chains over rolled, assigned, sliced, broadcast arrays, in any order."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from(["f8", "i4", "f4"]))
    seed = draw(st.integers(0, 99))

    def leaf() -> tuple[Any, Any]:
        a = np.random.default_rng(seed).integers(-9, 9, shape).astype(dtype)
        match draw(st.sampled_from(["stored", "given", "turned", "fill"])):
            case "stored":
                return sa.array(a), a
            case "turned":
                return sa.array(a.T.copy()).T, a
            case "fill":
                return sa.full(shape, 3, dtype), np.full(shape, 3, dtype)
            case _:
                return sa.asarray(a), a

    x, a = leaf()
    for _ in range(draw(st.integers(1, 5))):
        axis = draw(st.integers(0, len(shape) - 1))
        match draw(st.sampled_from(["roll", "roll", "set", "shift", "pad", "pad", "add", "flip", "join", "row", "turn", "strided"])):
            case "roll":
                n = draw(st.integers(-5, 5))
                x, a = x + sa.roll(x, n, axis), a + np.roll(a, n, axis)
            case "set":
                low, high = sorted(draw(st.tuples(*[st.integers(0, shape[axis])] * 2)))
                key: Any = (*(slice(None),) * axis, slice(low, high))
                if low < high and draw(st.booleans()):
                    key = (*(slice(None),) * axis, slice(high - 1, low - 1 if low else None, -1))
                x, a = x * 1, a.copy()
                value = draw(st.sampled_from(["number", "row", "other"]))
                y: Any = 7
                if value != "number":
                    b = np.arange(a[key].size).reshape(a[key].shape).astype(a.dtype)
                    y = b if value == "other" else b[:1]
                x[key] = sa.asarray(y) if isinstance(y, np.ndarray) and draw(st.booleans()) else y
                a[key] = y
            case "shift" if shape[axis] > 2:
                lead = (slice(None),) * axis
                x, a = x * 1, a.copy()
                one, other, inside = ((*lead, s) for s in (slice(2, None), slice(None, -2), slice(1, -1)))
                x[inside], a[inside] = x[one] - x[other], a[one] - a[other]
            case "add":
                y, b = leaf()
                x, a = x + y, a + b
            case "pad":
                mode = draw(st.sampled_from(["constant", "edge", "reflect", "symmetric", "wrap"]))
                width = draw(st.integers(0, 3))
                widths = [(width, width) if k == axis or draw(st.booleans()) else (0, 0) for k in range(len(shape))]
                inside = tuple(slice(b, n + b) for n, (b, _) in zip(shape, widths, strict=True))
                shifted = (*inside[:axis], slice(0, shape[axis]), *inside[axis + 1 :])
                given: Any = {"constant_values": 5} if mode == "constant" else {}
                y, b = sa.pad(x, widths, mode, **given), np.pad(a, widths, mode, **given)
                x, a = y[inside] + y[shifted], b[inside] + b[shifted]
            case "flip":
                x, a = sa.flip(x, axis) - x, np.flip(a, axis) - a
            case "join":
                k = draw(st.integers(0, shape[axis]))
                first, second = (slice(None),) * axis + (slice(None, k),), (slice(None),) * axis + (slice(k, None),)
                x, a = sa.concatenate([x[second], x[first]], axis), np.concatenate([a[second], a[first]], axis)
            case "row":
                first = (*(slice(None),) * axis, slice(None, 1))
                x, a = x + sa.roll(x, 1, axis)[first], a + np.roll(a, 1, axis)[first]
            case "turn" if len(set(shape)) == 1:
                x, a = x + x.T, a + a.T
            case "strided":
                n = draw(st.integers(0, 3))
                key = (*(slice(None),) * axis, slice(None, None, 2))
                x, a = x * 1, a.copy()
                y, b = sa.roll(x, n, axis)[key], np.roll(a, n, axis)[key]
                x, a = sa.concatenate([y, x], axis), np.concatenate([b, a], axis)
                half = (*(slice(None),) * axis, slice(None, shape[axis]))
                x, a = x[half], a[half]
    return x, a


@pytest.mark.parametrize("engine", ["numpy", "llvm"])
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(pair=stencils(), scheduler=st.sampled_from(["synchronous", "threads"]), data=st.data())
def test_whatever_is_put_together_agrees_with_numpy(
    engine: str, pair: Any, scheduler: str, data: Any, small_grids: Any, assert_same: Any
) -> None:
    x, a = pair
    with small_grids(), sa.config.set(scheduler=scheduler, engine=engine):
        assert_same(x.compute(), a)
        assert_same(sa.compute(x, x + sa.roll(x, 1, 0), x.sum()), (a, a + np.roll(a, 1, 0), a.sum()), 1e-5)
        rolled, theirs = sa.roll(x, 1, 0), np.roll(a, 1, 0)
        assert_same(sa.compute(x - rolled, x * rolled, -x), (a - theirs, a * theirs, -a))
        target = sa.array(np.zeros_like(a))
        target[...] = x * 2 - sa.roll(x, -1, 0)
        assert_same(target.compute(), a * 2 - np.roll(a, -1, 0))


# --- grids of parts --------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_part_grid_cuts_the_part_where_the_whole_is_cut(data: Any, small_grids: Any) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    box = tuple(slice(low, data.draw(st.integers(low + 1, n))) for n in shape if (low := data.draw(st.integers(0, n - 1))) >= 0)
    with small_grids():
        across = (0, 1) if len(shape) > 1 and data.draw(st.booleans()) else None
        whole: Grid = map_grid(shape, across)
    part = part_grid(whole, box)

    seen = np.zeros(part.shape, int)
    largest = [0] * len(shape)
    for index in range(whole.ntasks):
        mine, tile = part.box(index), whole.box(index)
        seen[mine] += 1
        for a, (piece, t, b) in enumerate(zip(mine, tile, box, strict=True)):
            meets = max(0, min(t.stop, b.stop) - max(t.start, b.start))
            assert piece.stop - piece.start == meets
            largest[a] = max(largest[a], meets)

    assert (seen == 1).all()
    assert part.sizes == tuple(largest)


# --- deaths ------------------------------------------------------------------------------------------------------------------


def test_a_killed_worker_costs_nothing_but_time() -> None:
    a = RNG.random((900, 1200))
    expected = periodic(np, a)
    begun = threading.Event()
    with Pool(workers=2, memory_limit="256MiB") as pool:
        u = sa.array(a)
        u.sum().compute()  # workers there are

        def kill() -> None:
            for number in range(5):
                begun.wait()
                begun.clear()
                pids = pool.statistics().pids
                if pids:
                    os.kill(pids[number % len(pids)], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            while killer.is_alive():
                begun.set()
                np.testing.assert_array_equal(periodic(sa, u).compute(), expected)
        finally:
            killer.join()
        del u
        gc.collect()
        pool.check()
