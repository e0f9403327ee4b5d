"""The compiled engine: loops over every layout, folds, bits that depend on operands alone, what is kept on disk, which engine runs."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shmarray as sa
from shmarray import engines, templates
from shmarray.compute import current_pool, plan_of
from shmarray.plan import Target, build_plan

pytest.importorskip("llvmlite", reason="the compiled engine needs llvmlite (extra jit)")

from shmarray.kernels.llvm import engine, objects
from shmarray.kernels.llvm import kernel as kernels
from shmarray.kernels.llvm.kernel import CompiledKernel
from shmarray.kernels.llvm.nest import Traffic, choose_nest


@pytest.fixture(scope="module", autouse=True)
def compiled_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("kernels")
    with sa.config.set(engine="llvm", scheduler="synchronous", cache_directory=str(directory)):
        yield directory


def kernels_of(*arrays: Any) -> list[Any]:
    return [layer.kernel for layer in plan_of([a.node for a in arrays]).layers]


def is_compiled(*arrays: Any) -> bool:
    kernel = kernels_of(*arrays)[0]
    return all(isinstance(part, CompiledKernel) for part in getattr(kernel, "parts", (kernel,)))


def values(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray[Any, Any]:
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if dtype.kind in "iu":
        return rng.integers(0, 50, shape).astype(dtype)
    x = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape)).astype(dtype) if dtype.kind == "c" else x.astype(dtype)


# ------------------------------------------------------------------------------------------------------------- layouts

VIEWS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.T,
    "backward": lambda x: x[..., ::-1],
    "upside down": lambda x: x[::-1],
    "every other": lambda x: x[..., ::2],
    "every third row": lambda x: x[::3],
    "a column": lambda x: x[..., 1:2],
    "a row": lambda x: x[1:2],
    "inner part": lambda x: x[1:-1, 1:-2],
}


@pytest.mark.parametrize("where", ["stored", "numpy"])
@pytest.mark.parametrize("shape", [(7, 9), (40, 33), (3, 200), (130, 5)])
@pytest.mark.parametrize("view", VIEWS)
def test_every_layout_is_read_and_written(view: str, shape: tuple[int, ...], where: str) -> None:
    look = VIEWS[view]
    a, b = values(shape, float), values(shape, np.float32, 1)
    x, y = (sa.asarray(v).persist() if where == "stored" else sa.asarray(v) for v in (a, b))

    result = look(x) * 2 + look(y)

    assert is_compiled(result)
    np.testing.assert_array_equal(result.compute(), look(a) * 2 + look(b))
    target = sa.zeros(shape).persist()
    np.add(look(x), look(y), out=look(target))
    expected = np.zeros(shape)
    np.add(look(a), look(b), out=look(expected))
    np.testing.assert_array_equal(target.compute(), expected)


@pytest.mark.parametrize("n", [*range(1, 35), 1023, 1024, 1025])
@pytest.mark.parametrize("dtype", ["?", "i1", "i2", "f4", "f8", "c8", "c16"])
def test_every_length_of_a_row(dtype: str, n: int) -> None:
    a, b = values((n,), dtype), values((n,), dtype, 1)
    x, y = sa.asarray(a).persist(), sa.asarray(b).persist()

    sums, most = (x + y).sum(), (x == y).any()

    assert is_compiled(sums) and is_compiled(x + y)
    np.testing.assert_array_equal((x + y).compute(), a + b)
    np.testing.assert_allclose(sums.compute(), (a + b).sum(), rtol=1e-5, atol=1e-5)
    assert most.compute() == (a == b).any()


def test_operands_that_broadcast_and_run_across_each_other() -> None:
    a, row, column, square = values((50, 60), float), values((60,), float, 1), values((50, 1), float, 2), values((60, 50), float, 3)
    x, r, c, s = (sa.asarray(v).persist() for v in (a, row, column, square))

    result = (x + r) * c - s.T

    assert is_compiled(result)
    np.testing.assert_array_equal(result.compute(), (a + row) * column - square.T)


def test_values_made_from_positions_are_operands() -> None:
    a = values((70, 90), float)
    x = sa.asarray(a).persist()

    result = x * sa.arange(90.0) + sa.arange(70.0)[:, None]

    assert is_compiled(result)
    np.testing.assert_array_equal(result.compute(), a * np.arange(90.0) + np.arange(70.0)[:, None])
    np.testing.assert_allclose(result.sum(axis=0).compute(), (a * np.arange(90.0) + np.arange(70.0)[:, None]).sum(axis=0))


@pytest.mark.parametrize("dtype", ["f8", "f4", "i2", "?", "c16"])
@pytest.mark.parametrize("shape", [(700_001,), (1000, 1024), (999, 1000), (3, 500, 600)])
def test_large_results_are_written_past_the_caches(shape: tuple[int, ...], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "STREAMED_NBYTES", 1 << 20)
    a = values(shape, dtype)
    x = sa.asarray(a).persist()
    target = sa.zeros((shape[0] + 1, *shape[1:]), dtype=dtype).persist()

    np.testing.assert_array_equal((x + x).persist().compute(), a + a)
    np.add(x, x, out=target[1:])  # may begin anywhere in a line of cache
    np.testing.assert_array_equal(target[1:].compute(), a + a)
    np.add(x.T, x.T, out=target[:-1].T)
    np.testing.assert_array_equal(target[:-1].compute(), a + a)


def test_results_that_are_small_or_not_aligned_stay_in_cache() -> None:
    def streams(expression: Any, target: Any) -> bool:
        layers, _ = build_plan(
            [expression.node], [Target(target.shape, target.dtype, storage=target._storage, layout=target._layout)], current_pool()
        )
        (form,) = [o for o in layers.layers[0].kernel.structure.operands if o.is_stored]
        return form.streams

    x = sa.zeros(9_000_001).persist()
    assert streams(x[1:] * 2, x.copy().persist()[:-1])
    assert not streams(x[1:] * 2, x.copy().persist()[1:])
    assert not streams(x[:1000] * 2, x.copy().persist()[:1000])


# ------------------------------------------------------------------------------------------------------------ reductions

NAMES = ["sum", "prod", "mean", "min", "max", "any", "all", "argmin", "argmax", "var", "std", "nanmean", "nanmax", "nansum"]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_reductions_of_any_axes_agree_with_numpy(data: st.DataObject, small_grids: Any) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    dtype = np.dtype(data.draw(st.sampled_from(["?", "i1", "u2", "i4", "i8", "u8", "f4", "f8", "c16"])))
    name = data.draw(st.sampled_from(NAMES))
    if dtype.kind == "c" and name in ("min", "max", "argmin", "argmax", "nanmax"):
        return
    axes = tuple(data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)))
    axis: Any = axes[0] if name.startswith("arg") else data.draw(st.sampled_from([axes, None]))
    a = values(shape, dtype, data.draw(st.integers(0, 3)))
    if dtype.kind == "f" and data.draw(st.booleans()):
        a.flat[data.draw(st.integers(0, a.size - 1))] = np.nan
    if data.draw(st.booleans()):
        a = a.T.copy().T
    with small_grids() if data.draw(st.booleans()) else warnings.catch_warnings():
        x = sa.asarray(a).persist() if data.draw(st.booleans()) else sa.asarray(a)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = getattr(sa, name)(x, axis=axis).compute()
            expected = getattr(np, name)(a, axis=axis)
    assert np.asarray(result).dtype == np.asarray(expected).dtype
    if dtype.kind in "fc" or name in ("var", "std", "mean"):
        np.testing.assert_allclose(
            result, expected, rtol=2e-5 if dtype == np.float32 else 1e-11, atol=1e-6 if dtype == np.float32 else 1e-13
        )
    else:
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_several_reductions_of_one_input_are_one_kernel(axis: Any) -> None:
    a = values((300, 400), float)
    x = sa.asarray(a).persist()
    results = [x.mean(axis=axis), x.std(axis=axis), x.min(axis=axis), x.argmax(axis=axis)]

    assert sum(isinstance(k, CompiledKernel) for k in kernels_of(*results)) == 1
    found = sa.compute(*results)
    for value, expected in zip(found, (a.mean(axis), a.std(axis), a.min(axis), a.argmax(axis)), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_variance_keeps_its_digits_where_the_mean_is_large() -> None:
    a = 1e8 + np.random.default_rng(0).standard_normal(200_003)
    spike = a.copy()
    spike[::1024] = 0.0  # the first value of leaves, far from the others

    np.testing.assert_allclose(sa.asarray(a).persist().var().compute(), a.var(), rtol=1e-9)
    np.testing.assert_allclose(sa.asarray(spike).persist().var().compute(), spike.var(), rtol=1e-9)


def test_sums_are_pairwise() -> None:
    a = np.full(1 << 21, 0.1, np.float32)

    exact = (1 << 21) * float(np.float32(0.1))
    assert abs(float(sa.asarray(a).persist().sum().compute()) - exact) < 2e-6 * exact  # one after the other: 5e-2


@pytest.mark.parametrize("first", [np.nan, 5.0])
def test_extremes_of_special_values(first: float) -> None:
    a = np.array([[0.0, -0.0, np.inf, -np.inf, 1.0], [first, 2.0, np.nan, 3.0, np.inf]] * 40)
    x = sa.asarray(a).persist()

    for name in ("min", "max", "argmin", "argmax", "nanmin", "nanmax"):
        for axis in (0, 1, None):
            np.testing.assert_array_equal(
                getattr(sa, name)(x, axis=axis).compute(), getattr(np, name)(a, axis=axis), err_msg=f"{name} {axis}"
            )


# ------------------------------------------------------------------------------------------------------------------ bits


def test_bits_depend_on_the_operands_alone() -> None:
    a, b = values((1000, 700), float), values((1000, 700), float, 1)

    def chains(x: Any, y: Any) -> list[Any]:
        z = sa.sqrt(x * x + y * y) - sa.exp(-x) * y
        return [z, z.sum(), z.std(axis=0), z.mean(axis=1), z[3:].sum(axis=0)]

    expected = [v.tobytes() for v in map(np.asarray, sa.compute(*chains(sa.asarray(a).persist(), sa.asarray(b).persist())))]

    for scheduler, workers, chunk in (("processes", 2, 77), ("threads", 3, 400), ("processes", 1, 1000)):
        with sa.Pool(workers=workers), sa.config.set(scheduler=scheduler):
            x, y = sa.array(a, chunks=chunk), sa.asarray(b)
            assert [v.tobytes() for v in map(np.asarray, sa.compute(*chains(x, y)))] == expected


@pytest.mark.parametrize("function", ["exp", "sin", "log", "sqrt"])
def test_a_value_has_the_same_bits_wherever_it_stands(function: str) -> None:
    a = np.full((37, 53), 0.7310585)
    x = sa.asarray(a).persist()
    f = getattr(sa, function)

    found = {v for y in (x, x[:, ::-1], x.T, x[::3, ::5], x[:1, :1]) for v in f(y).compute().ravel().tolist()}

    assert len(found) == 1


# ------------------------------------------------------------------------------------------------------- in place, flags


def test_in_place_updates(executor: str) -> None:
    a, b = values((300, 500), float), values((300, 500), float, 1)
    x, y = sa.asarray(a).persist(), sa.asarray(b)
    x += y
    x[:, ::2] *= 3
    x[::-1] += x[0]

    expected = a + b
    expected[:, ::2] *= 3
    expected[::-1] += expected[0].copy()
    np.testing.assert_array_equal(x.compute(), expected)


@pytest.mark.parametrize("where", ["stored", "numpy"])
def test_warnings_are_numpys(where: str) -> None:
    a = np.array([1.0, 0.0, -1.0, 1000.0, np.nan] * 50)
    x = sa.asarray(a).persist() if where == "stored" else sa.asarray(a)
    for function in (
        lambda v, m: m.log(v),
        lambda v, m: 1 / v,
        lambda v, m: m.exp(v) * 2,
        lambda v, m: m.sqrt(v).sum(),
        lambda v, m: v + 1,
    ):
        with warnings.catch_warnings(record=True) as ours:
            warnings.simplefilter("always")
            function(x, sa).compute()
        with warnings.catch_warnings(record=True) as numpys:
            warnings.simplefilter("always")
            function(a, np)
        assert {str(w.message) for w in ours} == {str(w.message) for w in numpys}
        assert all(w.filename == __file__ for w in ours)


def test_numpy_arrays_are_updated_in_place(executor: str) -> None:
    a, b = values((300, 1000), float), values((300, 1000), float, 1)
    target, other = a.copy(), a.copy()

    sa.add(sa.asarray(target), sa.asarray(b), out=target)
    (sa.asarray(other) * 2 - sa.asarray(b)).compute(out=other)

    np.testing.assert_array_equal(target, a + b)
    np.testing.assert_array_equal(other, a * 2 - b)


def test_updates_in_place_warn_as_numpy_does() -> None:
    for update in (lambda v: np.divide(v, 0.0, out=v), lambda v: np.multiply(v, 1e200, out=v), lambda v: np.add(v, -v, out=v)):
        a = np.array([1e300, -np.inf, 0.0, 1.0] * 100)
        x = sa.asarray(a).persist()
        caught = []
        for target in (a, x):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                update(target)
            caught.append({str(w.message) for w in seen})
        assert caught[0] == caught[1] and caught[0]
        np.testing.assert_array_equal(x.compute(), a)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("error")
        x /= 0


def test_errstate_raise_is_raised() -> None:
    x = sa.asarray(np.arange(300_000, dtype=float)).persist()

    with np.errstate(divide="raise"), pytest.raises(FloatingPointError, match="divide by zero encountered in divide"):
        (1.0 / x).compute()
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (1.0 / x).max().compute() == np.inf


def test_harmless_values_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[object] = []
    monkeypatch.setattr(kernels._Bound, "_replay", lambda self, piece: replayed.append(piece))
    x = sa.asarray(values((200, 300), float)).persist()

    sa.compute(sa.exp(x) / (2 + sa.cos(x)), sa.log(x * x + 1).mean(), sa.sqrt(x * x).std(axis=0))

    assert replayed == []


# ---------------------------------------------------------------------------------------------------------- choice, disk


def test_a_scalar_that_varies_needs_no_new_code() -> None:
    x = sa.asarray(values((1000,), float)).persist()
    sa.compute(x * 0.25 + 1.5)
    before = objects.statistics()

    for step in range(5):
        np.testing.assert_array_equal((x * (step / 7) + step).compute(), x.compute() * (step / 7) + step)

    after = objects.statistics()
    assert (after["compiled"], after["read"]) == (before["compiled"], before["read"])


def test_auto_compiles_where_the_work_pays_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x = sa.zeros((1000, 1000)).persist()
    with sa.config.set(engine="auto"):
        assert not is_compiled(x * 2 + 1)
        monkeypatch.setattr(engines, "COMPILING_PAYS_NBYTES", 1000)
        assert is_compiled(x * 2 + 1)
    with sa.config.set(engine="numpy"):
        assert not is_compiled(x * 2 + 1)
    with pytest.raises(ValueError, match="engine 'fortran' is not known"):
        sa.config.set(engine="fortran")


def test_what_has_no_lowering_runs_in_numpy() -> None:
    text = sa.asarray(np.array(["a", "b"]))
    wide = sa.asarray(np.arange(5, dtype=np.longdouble))

    assert not is_compiled(text == "a") and (text == "a").compute().tolist() == [True, False]
    assert not is_compiled(wide + 1) and (wide + 1).sum().compute() == 15


def test_code_is_kept_on_disk_and_bad_files_are_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sa.asarray(values((64,), float)).persist()

    def run() -> dict[str, int]:
        objects._objects.clear()
        templates.forget()
        before = objects.statistics()
        np.testing.assert_array_equal((x * 3.5 - x).compute(), x.compute() * 3.5 - x.compute())
        return {k: v - before[k] for k, v in objects.statistics().items() if k != "loaded"}

    with sa.config.set(cache_directory=str(tmp_path)):
        assert run() == {"compiled": 1, "read": 0}
        (file,) = (tmp_path / "kernels").iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert run() == {"compiled": 0, "read": 1}
        good = file.read_bytes()
        for bad in (good[:-1], good[:40], b"", good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]):
            file.write_bytes(bad)
            assert run() == {"compiled": 1, "read": 0}
            assert file.read_bytes() == good
        file.chmod(0o666)  # anyone may have written it
        assert run() == {"compiled": 1, "read": 0}
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert run() == {"compiled": 1, "read": 0}
    with sa.config.set(cache_directory="/proc/nowhere"):
        assert run() == {"compiled": 1, "read": 0}


# ----------------------------------------------------------------------------------------------------------------- loops


def traffic(*strides: int) -> Traffic:
    return Traffic(strides, 8)


def test_axes_that_run_on_are_one_loop() -> None:
    nest = choose_nest((10, 20, 30), (10, 20, 30), [traffic(4800, 240, 8), traffic(4800, 240, 8)], 16)
    assert [loop.axes for loop in nest.loops] == [(0, 1, 2)]


def test_a_tile_that_cuts_an_axis_keeps_it_apart() -> None:
    nest = choose_nest((10, 20, 30), (10, 5, 30), [traffic(4800, 240, 8)], 16)
    assert [loop.axes for loop in nest.loops] == [(0,), (1, 2)]


def test_the_inner_loop_is_contiguous_and_long() -> None:
    assert choose_nest((500, 600), (500, 600), [traffic(8, 4000), traffic(8, 4000)], 16).inner.axes == (0,)
    assert choose_nest((5000, 3), (5000, 3), [traffic(24, 8), traffic(0, 8)], 16).inner.axes == (0,)


def test_reduced_and_kept_axes_are_never_merged() -> None:
    nest = choose_nest((10, 20, 30), (10, 20, 30), [traffic(4800, 240, 8)], 16, (1, 2))
    assert [(loop.axes, loop.reduced) for loop in nest.loops] == [((0,), False), ((1, 2), True)]
    nest = choose_nest((10, 20, 30), (10, 20, 30), [traffic(4800, 240, 8)], 16, (0,))
    assert [(loop.axes, loop.reduced) for loop in nest.loops] == [((0,), True), ((1, 2), False)]


# ------------------------------------------------------------------------------------------------------- made in the task


def test_what_is_made_within_tasks_is_an_operand(executor: str) -> None:
    a = values((300, 70), float)
    x, calls = sa.array(a, chunks=(40, 70)), []

    def double(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        calls.append(block.shape)
        return block * 2

    blocks = sa.log(x.map_blocks(double, dtype=float)) + 1
    rolled = x * 3 + sa.roll(x, 1, axis=0)
    pieces = sa.concatenate([x[k : k + 7] for k in range(0, 300, 7)]) - 0.5

    assert all(is_compiled(y) and is_compiled(y.std(axis=0)) for y in (blocks, rolled, pieces))
    with np.errstate(invalid="ignore"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_allclose(blocks.mean(axis=1).compute(), (np.log(a * 2) + 1).mean(axis=1))
    assert [str(w.message) for w in caught] == ["invalid value encountered in log"]  # and not called again to say so:
    assert len(calls) == (0 if executor == "processes" else 8)
    expected = a * 3 + np.roll(a, 1, axis=0)
    np.testing.assert_array_equal(rolled.compute(), expected)
    np.testing.assert_allclose(rolled.std(axis=0).compute(), expected.std(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sa.compute(pieces.sum(), pieces.max())[0], (a - 0.5).sum(), rtol=1e-12)
    np.testing.assert_array_equal(pieces.compute(), a - 0.5)


def test_a_reduced_register_is_not_written_over() -> None:
    a = values((500, 60), float)
    y = sa.asarray(a).persist() + 1

    np.testing.assert_allclose(sa.compute(y.sum(), (y * 2).std()), ((a + 1).sum(), ((a + 1) * 2).std()), rtol=1e-12)


# ------------------------------------------------------------------------------------------------------- what reviews found


@pytest.mark.parametrize("engine_name", ["numpy", "llvm"])
def test_casts_of_one_array_to_several_dtypes_are_several(engine_name: str) -> None:
    a = np.arange(1.0, 25.0)
    with sa.config.set(engine=engine_name):
        x = sa.asarray(a).persist()
        np.testing.assert_array_equal(((x / 8).astype("i4") + (x / 8).astype("f4")).compute(), (a / 8).astype("i4") + (a / 8).astype("f4"))
        assert sa.compute(x.astype("?").sum(), x.astype("f4"))[0] == 24


def test_tiles_of_uneven_chunks_are_not_written_past_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "STREAMED_NBYTES", 1 << 10)
    sizes = (1 << 17, 1001) * 3
    a = np.ones(sum(sizes))

    y = (sa.array(a, chunks=(sizes,)).map_blocks(lambda b: b * 2, dtype=float) + 1).persist()

    np.testing.assert_array_equal(y.compute(), a * 2 + 1)


def test_places_of_chunks_of_one_item_along_a_middle_axis() -> None:
    a = values((60, 5, 70), float)
    y = sa.array(a, chunks=(60, 1, 70)).map_blocks(lambda b: b + 0.0, dtype=float)

    assert sa.compute(y.argmax(), y.argmin()) == (a.argmax(), a.argmin())


def test_casts_out_of_range_are_the_same_whatever_uses_them() -> None:
    a, i = np.array([1.5, 1e30, np.inf, np.nan, -1e30]), np.arange(-3, 4)
    x, j = sa.asarray(a).persist(), sa.asarray(i).persist()
    with np.errstate(all="ignore"):
        pairs = [
            (sa.where(j, j, sa.reciprocal(j)), np.where(i, i, np.reciprocal(i))),
            (sa.where(sa.isposinf(x), x.astype("i8"), 7), np.where(np.isposinf(a), a.astype("i8"), 7)),
            (abs(x.astype("i4").astype("f8")), abs(a.astype("i4").astype("f8"))),
            (sa.copysign(x.astype("i8"), x), np.copysign(a.astype("i8"), a)),
        ]
        for found, expected in pairs:
            np.testing.assert_array_equal(found.compute(), expected)


def messages(call: Any) -> set[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return {str(w.message) for w in caught}


def test_flags_are_of_whoever_raised_them() -> None:
    half = [np.full((40, n), v, "f2") for n, v in ((1, 1.065), (1, 1.5), (70, 0.0))]
    c, d, target = (sa.asarray(v).persist() for v in half)
    big = sa.asarray(np.full(100, 1e308)).persist()
    ends = np.zeros(1 << 17)
    ends[0] = ends[-1] = 1.2e308
    late = np.ones(1 << 22)
    late[: 1 << 21] = -1
    late[-1] = 0

    assert messages(lambda: np.divide(c, d, out=target)) == set()
    assert messages(lambda: (big * 1.0).sum().compute()) == {"overflow encountered in reduce"}
    assert messages(lambda: sa.asarray(ends).persist().sum().compute()) == {"overflow encountered in reduce"}
    assert messages(lambda: (sa.log(sa.asarray(late).persist()) * 2).compute()) == {
        "invalid value encountered in log",
        "divide by zero encountered in log",
    }


def test_exponents_that_vary_need_no_new_code() -> None:
    x = sa.asarray(np.abs(values((1000,), float))).persist()
    (x**1.75).compute()
    before = objects.statistics()

    for exponent in (1.1, 2.3, -0.7):
        np.testing.assert_allclose((x**exponent).compute(), x.compute() ** exponent, rtol=1e-14)

    assert objects.statistics()["compiled"] == before["compiled"]


@pytest.mark.parametrize("where", ["stored", "numpy"])
def test_reductions_of_an_array_in_memory_and_of_a_stored_one_have_the_same_bits(where: str) -> None:
    a = np.random.default_rng(0).standard_normal((122, 133))
    looks = [lambda v: v[::-1], lambda v: v.T, lambda v: v[:, ::2], lambda v: v[3:, 5:].T]
    for look in looks:
        for axis in (0, 1, None):
            stored, private = (look(v) * 1.1 for v in (sa.asarray(a).persist(), sa.asarray(a)))
            with sa.config.set(scheduler="processes"):
                one, other = stored.sum(axis=axis).compute(), private.sum(axis=axis).compute()
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_file_of_another_kernel_is_not_run(tmp_path: Path) -> None:
    x = sa.asarray(np.arange(64.0)).persist()
    objects._objects.clear()
    with sa.config.set(cache_directory=str(tmp_path)):
        (x * 3.5 - x).compute()
        (first,) = (tmp_path / "kernels").iterdir()
        (x * 3.5 + x).compute()
        (second,) = set((tmp_path / "kernels").iterdir()) - {first}
        second.write_bytes(first.read_bytes())
        objects._objects.clear()
        templates.forget()
        np.testing.assert_array_equal((x * 3.5 + x).compute(), np.arange(64.0) * 4.5)
        first.unlink()
        os.mkfifo(first)
        second.unlink()
        second.mkdir()
        objects._objects.clear()
        templates.forget()
        np.testing.assert_array_equal((x * 3.5 - x).compute(), np.arange(64.0) * 2.5)
        np.testing.assert_array_equal((x * 3.5 + x).compute(), np.arange(64.0) * 4.5)
