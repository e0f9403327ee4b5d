"""Compiled updates in place, step by step: stopped anywhere, torn as a death would tear them, settled, and gone on with."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmarray as sa
from scheduler.redo import COPY, HEADER_NBYTES, SLOT_NBYTES, Redo, pack, unpack
from scheduler.segments import Memory
from scheduler.task import DRIVER, Address
from scheduler.worker import TaskContext
from shmarray.compute import current_pool
from shmarray.plan import Target, build_plan
from shmarray.tiles import blocks

pytest.importorskip("llvmlite", reason="the compiled engine needs llvmlite (extra jit)")

from shmarray.kernels.llvm import engine, structure
from shmarray.kernels.llvm.engine import assembly
from shmarray.kernels.llvm.kernel import CompiledKernel
from shmarray.kernels.llvm.steps import boxes_from


@pytest.fixture(scope="module", autouse=True)
def compiled_engine() -> Iterator[None]:
    with sa.config.set(engine="llvm", scheduler="synchronous"):
        yield


class Lane:
    """A compiled update bound to a lane whose cursor and slot can be looked at."""

    def __init__(self, expression: Any, target: Any) -> None:
        self.target = target
        place = Target(target.shape, target.dtype, storage=target._storage, layout=target._layout)
        pool = current_pool()
        self.plan, self.bindings = build_plan([expression.node], [place], pool)
        (self.layer,) = self.plan.layers
        assert self.layer.in_place and isinstance(self.layer.kernel, CompiledKernel)
        assert self.layer.kernel.structure.updated
        self.memory = pool.memory
        self.words = np.zeros(1, np.int64)
        self.slot = np.zeros(SLOT_NBYTES, np.uint8)
        self.redo = Redo(self.words.data, 0, self.slot)
        addresses = {k: buffer.address for k, buffer in enumerate(self.plan.buffers) if buffer.address is not None}
        self.warned: dict[Any, None] = {}
        self.bound = self.layer.kernel.bind(TaskContext(self.memory, addresses, self.warned, self.redo)).__self__

    def run(self, task: int, first: int = 0, stop: int | None = None) -> int:
        """Do the steps of a task from ``first`` on and before ``stop``; return the next one, as the cursor says it."""
        self.redo.begin(task, first)
        update = type(self.bound)._update
        self.bound._update = lambda *args: update(self.bound, *args, *(() if stop is None else (stop,)))
        self.bound.run(task)
        found, step, phase = unpack(int(self.words[0]))
        assert (found, phase) == (task, 0)
        return step

    def fill_slot(self, value: int) -> None:
        """Leave nothing in the slot of what it held."""
        self.slot[HEADER_NBYTES:] = value


def values(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind in "iu":
        return rng.integers(1, 50, shape).astype(dtype)
    x = rng.random(shape) + 0.5
    return (x + 1j * rng.random(shape)).astype(dtype) if np.dtype(dtype).kind == "c" else x.astype(dtype)


VIEWS: dict[str, Callable[[Any], Any]] = {
    "all": lambda x: x,
    "reversed": lambda x: x[::-1],
    "backward": lambda x: x[..., ::-1],
    "strided": lambda x: x[..., 1::2],
    "backward and strided": lambda x: x[..., ::-3],
    "part": lambda x: x[1:, ..., :-1] if x.ndim > 1 else x[1:-1],
    "rows": lambda x: x[::2],
    "transposed": lambda x: x.T,
}
FORMULAS: dict[str, Callable[[Any, Any], Any]] = {
    "x + y": lambda x, y: x + y,
    "x - (y*2+3)*y": lambda x, y: x - (y * 2 + 3) * y,
    "x * y[:1]": lambda x, y: x * y[:1],
    "x - y.T": lambda x, y: x - y.T if x.shape == x.shape[::-1] else x - y,
    "y[..., ::-1] - x": lambda x, y: y[..., ::-1] - x,
}
SHAPES = st.one_of(
    st.tuples(st.integers(3, 900)),
    st.tuples(st.integers(2, 60), st.integers(3, 60)),
    st.integers(3, 40).map(lambda n: (n, n)),
    st.tuples(st.integers(2, 5), st.integers(2, 12), st.integers(3, 40)),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_an_update_that_died_anywhere_goes_on_to_the_same_bits(data: st.DataObject, small_grids: Any) -> None:
    shape = data.draw(SHAPES, "shape")
    dtype = data.draw(st.sampled_from(["f8", "f4", "i2", "i8", "c16", "u1"]), "dtype")
    view, formula = VIEWS[data.draw(st.sampled_from(list(VIEWS)))], FORMULAS[data.draw(st.sampled_from(list(FORMULAS)))]
    start, other = values(shape, dtype, 0), values(shape, dtype, 1)
    oracle = start.copy()
    view(oracle)[...] = formula(view(oracle), view(other))
    with pytest.MonkeyPatch.context() as patch, small_grids(TILE_ITEMS=256) if data.draw(st.booleans()) else contextlib.nullcontext():
        patch.setattr(structure, "STEP_NBYTES", data.draw(st.sampled_from([128, 512, 2048]), "step"))
        x, y, undisturbed = sa.array(start), sa.array(other), sa.array(start)
        lane = Lane(formula(view(undisturbed), view(y)), view(undisturbed))
        counts = [lane.run(task) for task in range(lane.layer.ntasks)]
        expected = np.array(undisturbed)
        np.testing.assert_allclose(expected, oracle, rtol=1e-5 if dtype == "f4" else 1e-13)

        lane = Lane(formula(view(x), view(y)), view(x))
        for task, count in enumerate(counts):
            stop = data.draw(st.integers(0, count), "stop")
            if data.draw(st.booleans(), "copying") and stop:
                die_copying(lane, x, task, stop - 1, data)
            else:
                assert lane.run(task, 0, stop) == stop
                lane.fill_slot(0xA5)  # computed halfway
                assert lane.redo.settle(lane.memory) == (task, stop)
            lane.fill_slot(0x5A)
            assert lane.run(task, stop) == count
    assert np.array(x).tobytes() == expected.tobytes()


def die_copying(lane: Lane, x: Any, task: int, step: int, data: st.DataObject) -> None:
    """Leave what a death in the middle of copying ``step`` leaves, and settle it."""
    bytes_of = memory_of(x)
    assert lane.run(task, 0, step) == step
    before = bytes_of.copy()
    assert lane.run(task, step, step + 1) == step + 1
    after = bytes_of.copy()
    changed = np.flatnonzero(before != after)
    torn = changed[np.random.default_rng(data.draw(st.integers(0, 99))).random(changed.size) < 0.5]
    bytes_of[torn] = before[torn] ^ 0xFF
    lane.words[0] = pack(task, step, COPY)
    assert lane.redo.settle(lane.memory) == (task, step + 1)
    assert lane.redo.settle(lane.memory) == (task, step + 1)
    np.testing.assert_array_equal(bytes_of, after)


def memory_of(x: Any) -> np.ndarray[Any, Any]:
    """Return the bytes of a stored array, to be written over."""
    array: np.ndarray[Any, Any] = x._storage.array(x._storage.layout)
    return array.reshape(-1).view(np.uint8)


@pytest.mark.parametrize("view", ["all", "backward", "strided"])
@pytest.mark.parametrize("place", [0, 100, 255, 256, 1000, 2999])
def test_where_numpy_raises_nothing_of_the_step_is_written(place: int, view: str) -> None:
    look = VIEWS[view]
    a, b = values((6000,), "f8", 0), values((6000,), "f8", 1)
    look(b)[place] = 0.0
    x, y = sa.array(a), sa.array(b)
    with np.errstate(divide="raise"):
        lane = Lane(look(x) / look(y), look(x))
    expected = a.copy()
    n = structure.STEP_NBYTES // 8
    count = look(a).size
    width = math.ceil(math.ceil(count / math.ceil(count / n)) / 16) * 16
    done = place // width * width
    look(expected)[:done] = look(a)[:done] / look(b)[:done]

    with pytest.raises(FloatingPointError, match="divide by zero encountered in divide"):
        lane.run(0)

    assert lane.redo.settle(lane.memory) == (0, place // width)
    np.testing.assert_array_equal(np.array(x), expected)
    look(b)[place] = 2.0
    memory_of(y)[:] = b.view(np.uint8)
    lane.run(0, place // width)
    look(a)[...] = look(a) / look(b)
    np.testing.assert_array_equal(np.array(x), a)


def test_what_numpy_warns_of_is_computed_again_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    a = np.full(5000, 2.0)
    a[3000] = a[4000] = -1.0
    x = sa.array(a)
    lane = Lane(sa.sqrt(x) + 1, x)
    replays: list[tuple[int, np.ndarray]] = []
    replay = type(lane.bound)._replay

    def spy(bound: Any, piece: Any, boxes: Any) -> None:
        boxes = list(boxes)
        replays.append((sum(math.prod(b.stop - b.start for b in box) for box in boxes), np.array(x)))
        replay(bound, piece, boxes)

    monkeypatch.setattr(type(lane.bound), "_replay", spy)
    lane.run(0)

    ((count, seen),) = replays
    done = 5000 - count
    assert 2000 < done <= 3000
    np.testing.assert_array_equal(seen[done:], a[done:])
    assert [text for _, text, _ in lane.warned] == ["invalid value encountered in sqrt"]
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(np.array(x), np.sqrt(a) + 1)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_what_can_only_be_copied_is_updated_piece_by_piece(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(2000,), (40, 50), (7, 11, 13)]), "shape")
    view, formula = VIEWS[data.draw(st.sampled_from(list(VIEWS)))], FORMULAS[data.draw(st.sampled_from(list(FORMULAS)))]
    start, other = values(shape, "f8", 0), values(shape, "f8", 1)
    expected, there = start.copy(), start.copy()
    view(expected)[...] = formula(view(expected), view(other))
    x, y = sa.array(start), sa.array(other)
    lane = Lane(formula(view(x), view(y)), view(x))
    # The target is this process's memory, reached as a worker reaches its driver's.
    (k,) = lane.layer.kernel.structure.updated
    buffer = lane.layer.kernel.program.operands[k].buffer
    addresses = {b: made.address for b, made in enumerate(lane.plan.buffers)}
    addresses[buffer] = Address(DRIVER, there.ctypes.data)
    memory = Memory(lane.memory.arena, driver=os.getpid())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "STAGED_ITEMS", 200)
        kernel = engine.compiled(lane.layer.kernel.plain, lambda b: b == buffer)
    assert kernel.aside == (k,) and not kernel.structure.updated
    run = kernel.bind(TaskContext(memory, addresses, {}, lane.redo))
    computed = run.__self__._compute
    left = count = len(list(blocks(kernel.grid.box(0), kernel.piece_sizes)))
    assert count > 1

    def die(piece: Any) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        computed(piece)

    run.__self__._compute = die
    left = stop = data.draw(st.integers(1, count - 1), "stop")
    lane.redo.begin(0)
    with pytest.raises(KeyboardInterrupt):
        run(0)
    assert lane.redo.settle(memory) == (0, stop)
    lane.fill_slot(0x5A)
    left = count
    lane.redo.begin(0, stop)
    run(0)
    np.testing.assert_allclose(there, expected, rtol=1e-13)
    assert lane.redo.settle(memory) == (0, count)


def test_the_cursor_is_set_twice_a_step_whatever_is_optimised() -> None:
    x = sa.array(np.ones(5000))
    text = assembly(Lane(x + 1, x).layer.kernel)

    stores = [line.split()[:2] for line in text.splitlines() if line.strip().startswith(("store atomic", "fence"))]

    assert stores == [["fence", 'syncscope("singlethread")'], ["store", "atomic"], ["fence", 'syncscope("singlethread")']] * 2


@given(st.lists(st.integers(1, 5), max_size=4), st.integers(0, 700))
def test_boxes_from_an_item_on_are_the_items_behind_it(shape: list[int], start: int) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)

    found = [n for box in boxes_from(shape, start) for n in numbers[box].ravel().tolist()]

    assert sorted(found) == list(range(start, numbers.size))
