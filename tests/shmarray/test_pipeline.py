"""Pipelines: nothing lost or out of place, a slow end slows the beginning, and an end by error, death or leaving is a clean one.

What runs beside what is forced by named pipes: opening one waits for who opens its other end.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

import shmarray as sa
from scheduler.running import set_inline
from shmarray import stages, templates

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.timeout(90)

NDArray = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def nothing_is_left(pool: sa.Pool) -> Iterator[None]:
    """No thread, no byte of shared memory."""
    yield
    wait_until(lambda: not threads(), f"the end of {threads()}")
    gc.collect()
    assert pool.statistics().live_nbytes == 0
    pool.check()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("shmarray-pipeline")]


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 20) -> None:
    until = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until, f"{what} did not happen"
        select.select([], [], [], 0.002)


def meet(path: str, mode: str) -> None:
    """Wait for whoever opens the other end of a named pipe."""
    with open(path, mode):
        pass


def frames(n: int, shape: tuple[int, ...] = (30, 40)) -> list[NDArray]:
    rng = np.random.default_rng(0)
    return [rng.random(shape) for _ in range(n)]


def collected(source: Any, *stages: Any, **options: Any) -> list[Any]:
    results: list[Any] = []
    report = sa.pipeline(source, *stages, results.append, **options)
    assert report.frames == len(results)
    return results


# -------------------------------------------------------------------------------------------------- results, in order


def test_results_are_those_of_a_loop_in_every_executor(pool: sa.Pool, executor: str) -> None:
    given = frames(20)

    def peaks(x: NDArray) -> dict[str, Any]:
        return {"at": np.argwhere(x > 0.99), "mean": x.mean()}

    found = collected(given, lambda x: x[::2] * 2, sa.expression(lambda x: (x + x[::-1]) / 4), sa.ordered(lambda x: x), peaks)
    assert len(found) == 20
    for one, x in zip(found, given, strict=True):
        expected = peaks((x[::2] * 2 + x[::2][::-1] * 2) / 4)
        np.testing.assert_array_equal(one["at"], expected["at"])
        assert one["mean"] == expected["mean"]


@pytest.mark.parametrize("depth", [1, 2, 3, 9])
def test_any_depth_gives_all_frames_in_order(pool: sa.Pool, depth: int) -> None:
    assert collected(range(57), lambda k: k, sa.ordered(lambda k: k), lambda k: [k], depth=depth) == [[k] for k in range(57)]
    assert list(sa.stream(range(57), lambda k: k, depth=depth)) == list(range(57))


def test_no_frames_and_no_stages(pool: sa.Pool) -> None:
    assert collected([]) == []
    assert collected([], lambda k: k) == []
    assert collected([1, 2]) == [1, 2]
    assert list(sa.stream([3])) == [3]


def test_a_later_frame_that_is_done_sooner_waits_for_its_turn(pool: sa.Pool, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)

    def stage(k: int) -> int:
        if k < 2:  # frame 0 is not done before frame 1 is at the same stage, in another worker
            meet(gate, "r" if k == 0 else "w")
        return k

    assert collected(range(10), stage) == list(range(10))


def test_two_stages_are_at_work_at_once(pool: sa.Pool, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)

    def first(k: int) -> int:
        if k == 1:
            meet(gate, "r")
        return k

    def second(k: int) -> int:
        if k == 0:  # while frame 1 is at the first stage
            meet(gate, "w")
        return k

    assert collected(range(6), first, second) == list(range(6))


def test_the_source_goes_on_while_the_sink_works(pool: sa.Pool) -> None:
    went_on = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        yield 1
        went_on.set()
        yield 2

    arrived = []

    def sink(k: int) -> None:
        assert went_on.wait(20)
        arrived.append(k)

    sa.pipeline(source(), lambda k: k, sink)
    assert arrived == [0, 1, 2]


VALUES = [
    np.arange(6.0).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0)[::-1, ::2],
    np.zeros((0, 3)),
    np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
    np.array(["one", "three"]),
    np.array([None, 1, "x"], dtype=object),
    np.ma.masked_array([1, 2, 3], [0, 1, 0]),
    {"a": np.arange(3), "b": [np.ones(2), (np.float32(1.5), "text")], 3: None},
    (),
    b"\0" * 70_000,
    "text",
    range(3),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_frames_of_any_kind_come_back_as_they_were(pool: sa.Pool, value: Any) -> None:
    for stage in (lambda x: x, sa.ordered(lambda x: x)):
        for found in collected([value, value], stage):
            assert type(found) is type(value)
            np.testing.assert_equal(found, value)
            if isinstance(value, np.ndarray):
                assert found.dtype == value.dtype and found.flags.writeable


@dataclass
class Measured:
    where: NDArray
    label: str


def test_objects_of_the_scripts_own_classes_keep_their_class(pool: sa.Pool) -> None:
    found = collected([Measured(np.arange(3), "a")], lambda m: Measured(m.where + 1, m.label + "b"))
    assert isinstance(found[0], Measured) and found[0].label == "ab"
    np.testing.assert_array_equal(found[0].where, [1, 2, 3])


def test_a_source_may_fill_one_buffer_again_and_again(pool: sa.Pool) -> None:
    buffer = np.empty(1000)

    def source() -> Iterator[NDArray]:
        for k in range(30):
            buffer[:] = k
            yield buffer

    for found in (collected(source(), lambda x: x), collected(source()), collected(source(), sa.expression(lambda x: x + 0))):
        assert [set(x) for x in found] == [{float(k)} for k in range(30)]


def test_lazy_and_stored_arrays_are_frames(pool: sa.Pool) -> None:
    stored = sa.arange(12).reshape(3, 4).persist()
    assert [x.tolist() for x in collected(stored, lambda x: x + 1)] == (np.arange(12).reshape(3, 4) + 1).tolist()
    assert collected([(stored.sum(), stored * 2)], lambda t: int(t[0] + t[1].sum())) == [66 * 3]
    del stored


def test_results_are_the_receivers_own(pool: sa.Pool) -> None:
    for stage in (lambda x: x, lambda x: x + 1, sa.expression(lambda x: x + 1), sa.ordered(lambda x: x)):
        found = collected(frames(12), stage, depth=2)
        before = [x.copy() for x in found]
        for x in found:
            x += 1
        np.testing.assert_array_equal(found, [x + 1 for x in before])


def test_stages_see_read_only_arrays(pool: sa.Pool) -> None:
    def spoil(x: NDArray) -> None:
        x[0] = 1

    with pytest.raises(ValueError, match="read-only"):
        collected(frames(1), spoil)


def test_a_result_that_outgrows_its_buffer_arrives_without_a_second_call(pool: sa.Pool, tmp_path: Path) -> None:
    def grow(k: int) -> NDArray:
        with open(tmp_path / str(k), "a") as file:
            file.write("x")
        return np.full(20_000 * k, k)

    found = collected(range(20), grow)
    assert [(len(x), set(x.tolist())) for x in found] == [(20_000 * k, {k} if k else set()) for k in range(20)]
    assert [(tmp_path / str(k)).read_text() for k in range(20)] == ["x"] * 20


def test_warnings_of_stages_come_here(pool: sa.Pool) -> None:
    def stage(k: int) -> int:
        warnings.warn(f"frame {k} is dark", stacklevel=1)
        return k

    with pytest.warns(UserWarning) as caught:
        collected(range(3), stage)
    assert sorted(str(one.message) for one in caught) == [f"frame {k} is dark" for k in range(3)]


# --------------------------------------------------------------------------------------------------------- expressions


def test_expressions_take_and_give_collections(pool: sa.Pool) -> None:
    given = [{"x": x, "k": k} for k, x in enumerate(frames(10, (300, 200)))]

    def stage(frame: dict[str, Any]) -> Any:
        x = frame["x"]
        assert isinstance(x, sa.Array)
        return {"sum": x.sum(axis=0), "all": [(x - x.mean()) * frame["k"], x.max()], "k": frame["k"], "none": x[:0]}

    twice = collected(given, sa.expression(stage), sa.expression(lambda f: (f["sum"] + 1, f["all"][0] * f["all"][1], f["none"], f["k"])))
    for k, (found, frame) in enumerate(zip(twice, given, strict=True)):
        x = frame["x"]
        assert all(type(one) is np.ndarray for one in found[:3]) and found[3] == k
        np.testing.assert_allclose(found[0], x.sum(axis=0) + 1, rtol=1e-12)
        np.testing.assert_allclose(found[1], (x - x.mean()) * k * x.max(), rtol=1e-9, atol=1e-12)
        assert found[2].shape == (0, 200)


def test_expressions_of_dates_go_on_to_the_next_stage(pool: sa.Pool) -> None:
    days = np.array(["2020-01-01", "2021-06-30"], "M8[D]")
    stage = sa.expression(lambda x: {"next": x + np.timedelta64(1, "D"), "n": sa.ones(2)})
    for found in (*collected([days], stage), *collected([days], stage, lambda f: f)):
        np.testing.assert_equal(found, {"next": days + np.timedelta64(1, "D"), "n": np.ones(2)})


def test_an_expression_is_planned_once_for_frames_of_one_form(pool: sa.Pool) -> None:
    marked = sa.expression(lambda x: (x * 2 + 1).sum(axis=0))
    collected(frames(4), marked, marked)
    before = templates.statistics()
    collected(frames(40), marked, marked)
    after = templates.statistics()
    assert after["built"] - before["built"] <= 2 * 6  # buffers met in another order, at most
    assert after["reused"] - before["reused"] >= 60


def test_an_expression_kept_from_an_earlier_frame_says_that_it_is_void(pool: sa.Pool) -> None:
    kept: list[Any] = []

    def stage(x: Any) -> Any:
        kept.append(x * 2)
        return x

    collected(frames(12), sa.expression(stage), depth=1)
    with pytest.raises(sa.ChangedInput):
        kept[0].compute()
    kept.clear()


def test_a_stage_can_be_called_and_marked_by_decorators() -> None:
    @sa.expression
    def twice(x: Any) -> Any:
        return x * 2

    @sa.ordered
    def same(x: Any) -> Any:
        return x

    assert twice(2) == 4 and same(3) == 3


# ---------------------------------------------------------------------------------------------------------- in order


def test_an_ordered_stage_sees_all_frames_in_order_and_may_keep_them(pool: sa.Pool) -> None:
    given = frames(40)
    seen: list[NDArray] = []

    def difference(x: NDArray) -> NDArray:
        seen.append(x)
        return x - seen[-2] if len(seen) > 1 else x * 0

    def delayed(x: NDArray) -> NDArray:  # frames overtake each other here
        for _ in range(random.Random(x[0, 0]).randrange(2000)):
            x.sum()
        return x

    found = collected(given, delayed, sa.ordered(difference), delayed, sa.ordered(lambda x: x))
    np.testing.assert_array_equal(seen, given)
    np.testing.assert_array_equal(found, [given[0] * 0, *(b - a for a, b in itertools.pairwise(given))])
    seen.clear()


def test_an_ordered_stage_that_fails_sees_no_later_frame(pool: sa.Pool) -> None:
    seen = []

    def stage(k: int) -> int:
        seen.append(k)
        if k == 5:
            raise KeyError(k)
        return k

    with pytest.raises(KeyError) as caught:
        collected(range(30), lambda k: k, sa.ordered(stage), sa.ordered(lambda k: k))
    assert seen == list(range(6))
    assert "in frame 5 of 'stage 2 of 3, stage'" in caught.value.__notes__


# ------------------------------------------------------------------------------------------------------ back-pressure


@pytest.mark.parametrize("depth", [1, 3, None])
def test_a_slow_sink_stops_the_source(pool: sa.Pool, depth: int | None) -> None:
    pulled, sunk = 0, 0
    most = max(4, pool.workers + 2) if depth is None else depth
    ahead = []

    def source() -> Iterator[int]:
        nonlocal pulled
        for k in range(40):
            pulled += 1
            ahead.append(pulled - sunk)
            yield k

    def sink(k: int) -> None:
        nonlocal sunk
        # The source comes as far as it may, and has stopped there whenever anybody looks.
        wait_until(lambda: pulled == min(40, k + most), "the source at its limit")
        sunk += 1

    sa.pipeline(source(), lambda k: k, sink, depth=depth)
    assert sunk == 40
    assert max(ahead) == most


def test_what_iterates_slowly_stops_the_source(pool: sa.Pool) -> None:
    pulled: list[int] = []

    def source() -> Iterator[int]:
        for k in range(30):
            pulled.append(k)
            yield k

    results = sa.stream(source(), lambda k: k, depth=3)
    assert not pulled  # begins with the first that is asked for
    for k in range(20):
        assert next(results) == k
        wait_until(lambda k=k: len(pulled) == k + 3, "the source at its limit")  # type: ignore[misc]
    results.close()  # type: ignore[attr-defined]
    assert len(pulled) <= 23


def test_buffers_are_used_again(pool: sa.Pool) -> None:
    nbytes = 1 << 20
    most = 0

    def sink(_: Any) -> None:
        nonlocal most
        most = max(most, pool.statistics().live_nbytes)

    source = (np.full(nbytes, k, np.uint8) for k in range(60))
    sa.pipeline(source, lambda x: x + 1, lambda x: x, sa.expression(lambda x: x * 2), lambda x: x, sink, depth=3)
    assert nbytes < most <= (2 * 3 + 1) * (nbytes + 65_536)


def test_frames_beyond_the_memory_limit_are_refused_with_advice(pool: sa.Pool) -> None:
    with sa.Pool(workers=1, memory_limit="16MiB") as small:
        with pytest.raises(sa.MemoryBudgetError) as caught:
            collected((np.zeros(4 << 20, np.uint8) for _ in range(9)), lambda x: x, depth=8)
        assert any("smaller depth=" in note for note in caught.value.__notes__)
        found = collected((np.full(4 << 20, k, np.uint8) for k in range(9)), lambda x: x[0], depth=1)
        assert found == list(range(9))
        wait_until(lambda: small.statistics().live_nbytes == 0, "the end")


# ------------------------------------------------------------------------------------------------------------- errors


class Source:
    """Counts up for ever, and notes when it is closed."""

    def __init__(self) -> None:
        self.is_closed = False
        self.pulled = 0

    def __call__(self, ends: BaseException | None = None, at: int = -1) -> Iterator[int]:
        try:
            for k in itertools.count():
                if k == at:
                    assert ends is not None
                    raise ends
                self.pulled += 1
                yield k
        finally:
            self.is_closed = True


def works_after() -> None:
    assert collected(range(10), lambda k: k + 1, sa.expression(lambda k: k)) == list(range(1, 11))


def broken(k: int) -> int:
    if k >= 7:
        raise ZeroDivisionError(f"frame {k} is bad")
    return k


STAGES: dict[str, Any] = {
    "function": broken,
    "expression": sa.expression(broken),
    "ordered": sa.ordered(broken),
    "computing": sa.expression(lambda k: sa.ones(4, chunks=2).map_blocks(lambda b: b * (1 // max(0, 7 - k)), dtype=float)),
}


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_that_fails_names_itself_and_the_frame(pool: sa.Pool, kind: str) -> None:
    source, arrived = Source(), []
    with pytest.raises(ZeroDivisionError) as caught:
        sa.pipeline(source(), lambda k: k, STAGES[kind], lambda k: k, arrived.append)
    name = "<lambda>" if kind == "computing" else "broken"
    assert f"in frame 7 of 'stage 2 of 3, {name}'" in caught.value.__notes__
    assert len(arrived) == 7  # all before it, none after
    wait_until(lambda: source.is_closed, "the end of the source")
    gc.collect()
    assert pool.statistics().live_nbytes == 0  # though the error, with its traceback, is still held
    del caught
    works_after()


def test_the_source_that_fails(pool: sa.Pool) -> None:
    source, arrived = Source(), []
    with pytest.raises(OSError, match="camera") as caught:
        sa.pipeline(source(OSError("camera"), 5), lambda k: k, arrived.append)
    assert arrived == [0, 1, 2, 3, 4]
    assert "in frame 5 of the source, generator" in caught.value.__notes__
    assert source.is_closed
    works_after()


def test_a_source_that_is_none_is_told_at_once(pool: sa.Pool) -> None:
    with pytest.raises(TypeError, match="iterable of frames"):
        sa.pipeline(3, lambda k: k, print)


@pytest.mark.parametrize("error", [ValueError("full"), SystemExit(3)])
def test_the_sink_that_fails(pool: sa.Pool, error: BaseException) -> None:
    source, arrived = Source(), []

    def sink(k: int) -> None:
        if k == 5:
            raise error
        arrived.append(k)

    with pytest.raises(type(error)) as caught:
        sa.pipeline(source(), lambda k: k, sink)
    assert arrived == [0, 1, 2, 3, 4]
    if isinstance(error, Exception):
        assert caught.value.__notes__ == ["in frame 5 of 'sink, sink'"]
    wait_until(lambda: source.is_closed, "the end of the source")
    works_after()


def test_a_source_that_never_goes_on_does_not_delay_the_error(pool: sa.Pool) -> None:
    goes_on = threading.Event()
    closed = []

    def source() -> Iterator[int]:
        try:
            yield 0
            goes_on.wait()
            yield 1
        finally:
            closed.append(True)

    with pytest.raises(ZeroDivisionError):
        collected(source(), lambda k: 1 // k)
    assert not closed
    goes_on.set()
    wait_until(lambda: closed == [True], "the end of the source")
    works_after()


def test_the_first_of_several_frames_that_fail_is_told(pool: sa.Pool, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)

    def stage(k: int) -> int:
        if k == 2:  # fails later than frame 3
            meet(gate, "r")
            raise KeyError("two")
        if k == 3:
            meet(gate, "w")
            raise KeyError("three")
        return k

    arrived: list[int] = []
    with pytest.raises(KeyError, match="two"):
        sa.pipeline(range(20), stage, arrived.append)
    assert arrived == [0, 1]


def test_after_an_error_a_stage_that_runs_is_left_to_end(pool: sa.Pool, tmp_path: Path) -> None:
    gate, done = str(tmp_path / "gate"), tmp_path / "done"
    os.mkfifo(gate)

    def stage(k: int) -> None:
        if k == 0:
            meet(gate, "r")
            raise KeyError(k)
        if k == 1:
            meet(gate, "w")
            x = np.random.default_rng(0).random(1000)
            for _ in range(3000):  # it takes a while
                x.sum()
            done.touch()

    with pytest.raises(KeyError):
        collected(range(2), stage)
    assert done.exists()


def test_a_stage_that_never_ends_is_killed_after_an_error(pool: sa.Pool, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)

    def stage(k: int) -> None:
        if k == 0:
            meet(gate, "r")
            raise KeyError(k)
        if k == 1:
            meet(gate, "w")
            while True:
                select.select([], [], [], 60)

    with pytest.raises(KeyError):
        collected(range(2), stage)
    works_after()


def test_leaving_the_loop_ends_the_stream(pool: sa.Pool) -> None:
    source = Source()
    for k in sa.stream(source(), lambda k: k):
        if k == 5:
            break
    gc.collect()
    wait_until(lambda: source.is_closed, "the end of the source")
    assert source.pulled <= 6 + max(4, pool.workers + 2)
    works_after()


def test_a_stream_can_be_ended_by_another_thread(pool: sa.Pool, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)

    def stage(k: int) -> int:
        if k == 1:
            meet(gate, "w")
            while True:
                select.select([], [], [], 60)
        return k

    source = Source()
    results = sa.stream(source(), stage)
    assert next(results) == 0
    meet(gate, "r")
    thread = threading.Thread(target=results.close)  # type: ignore[attr-defined]
    thread.start()
    thread.join()
    wait_until(lambda: not threads(), "the end of the stream")
    assert source.is_closed
    works_after()


def test_what_cannot_travel_is_named(pool: sa.Pool) -> None:
    with pytest.raises(TypeError) as caught:
        collected([threading.Lock()], lambda k: k)
    assert "in frame 0 of the source, list_iterator" in caught.value.__notes__
    lock = threading.Lock()
    with pytest.raises(TypeError) as caught:
        collected([1], lambda k: lock)
    assert any("while pickling the function of 'stage 1 of 1, <lambda>'" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError) as caught:
        collected([1], lambda k: threading.Lock())
    assert any("while pickling what the function returned, a lock" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sa.pipeline([1]), "has no sink"),
        (lambda: sa.pipeline([1], lambda k: k, [1]), "the last argument is the sink"),
        (lambda: sa.pipeline([1], "blur", print), "stage 1 of 1 is a str"),
        (lambda: sa.stream([1], 3), "stream: stage 1 of 1 is a int"),
    ],
)
def test_what_is_no_function_is_refused(pool: sa.Pool, call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("depth", [0, -1, 1.5, "four"])
def test_a_depth_that_is_none_is_refused(pool: sa.Pool, depth: Any) -> None:
    with pytest.raises(ValueError, match="number of frames"):
        sa.pipeline([1], print, depth=depth)


# ------------------------------------------------------------------------------------------------------------- deaths


def test_a_frame_whose_worker_was_killed_is_done_again(pool: sa.Pool, tmp_path: Path) -> None:
    def stage(k: int) -> NDArray:
        if k % 5 == 0:
            with contextlib.suppress(FileExistsError):
                (tmp_path / str(k)).touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return np.full(1000, k)

    found = collected(range(12), lambda k: k, stage)
    np.testing.assert_array_equal(found, [np.full(1000, k) for k in range(12)])


def test_a_frame_that_kills_three_workers_is_named(pool: sa.Pool) -> None:
    def stage(k: int) -> int:
        if k == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return k

    arrived: list[int] = []
    with pytest.raises(sa.WorkerDied) as caught:
        sa.pipeline(range(10), lambda k: k, stage, arrived.append)
    assert arrived == [0, 1, 2]
    assert "frame 3 of 'stage 2 of 2, stage'" in str(caught.value) + "".join(caught.value.__notes__)
    works_after()


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_an_answer_that_dies_with_its_worker_is_made_again(
    pool: sa.Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    monkeypatch.setenv("SHMARRAY_FAULT", f"worker.reply:{nth}:kill")
    monkeypatch.setenv("SHMARRAY_FAULT_COUNT", str(tmp_path / "count"))
    with sa.Pool(workers=2, memory_limit="64MiB"):
        found = collected(range(8), lambda k: np.full(50_000 << k // 3, k))  # outgrows its buffer at frames 0, 3, 6
    assert [(len(x), set(x.tolist())) for x in found] == [(50_000 << k // 3, {k}) for k in range(8)]
    assert (tmp_path / "count").stat().st_size > nth


@pytest.mark.slow
def test_workers_killed_at_any_time_lose_no_frame(pool: sa.Pool) -> None:
    rng = random.Random(4)
    given = frames(75, (100, 100))
    found: list[NDArray] = []

    def work(x: NDArray) -> NDArray:
        for _ in range(rng.randrange(400)):
            x.sum()
        return x * 2

    def sink(x: NDArray) -> None:
        found.append(x)
        if not rng.randrange(8):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(pool.statistics().pids), signal.SIGKILL)

    sa.pipeline(given, work, sa.expression(lambda x: x + 1), work, sink)
    np.testing.assert_array_equal(found, [(x * 2 + 1) * 2 for x in given])


# ------------------------------------------------------------------------------------------------------------- nested


def test_a_pipeline_within_a_stage(pool: sa.Pool) -> None:
    def stage(k: int) -> list[int]:
        found: list[int] = []
        sa.pipeline(range(k), lambda j: j * j, sa.expression(lambda j: j), found.append)
        return found

    assert collected(range(4), stage) == [[], [0], [0, 1], [0, 1, 4]]


def test_a_pipeline_in_a_thread_that_runs_tasks_does_not_wait_for_itself(pool: sa.Pool) -> None:
    found = []

    def lane() -> None:
        set_inline()
        found.append(collected(range(5), lambda k: os.getpid()))

    thread = threading.Thread(target=lane)
    thread.start()
    thread.join(30)
    assert found == [[os.getpid()] * 5]


def test_pipelines_side_by_side(pool: sa.Pool) -> None:
    found: dict[int, list[int]] = {}

    def one(k: int) -> None:
        with sa.config.set(scheduler="processes"):
            found[k] = collected(range(k, k + 30), lambda j: j, sa.ordered(lambda j: j), lambda j: j)

    side = [threading.Thread(target=one, args=(k,)) for k in range(4)]
    for thread in side:
        thread.start()
    for thread in side:
        thread.join(60)
    assert found == {k: list(range(k, k + 30)) for k in range(4)}


# ------------------------------------------------------------------------------------------------------------- report


def test_the_report_names_the_bottleneck(pool: sa.Pool) -> None:
    def busy(x: NDArray) -> NDArray:
        for _ in range(400):
            x.sum()
        return x

    report = sa.pipeline(frames(10, (100, 100)), lambda x: x, busy, lambda x: None)
    assert report.frames == 10 and report.workers == 2
    assert [stage.name for stage in report.stages] == ["source", "stage 1 of 2, <lambda>", "stage 2 of 2, busy", "sink, <lambda>"]
    assert report.bottleneck == "stage 2 of 2, busy"
    assert "<- bottleneck" in str(report) and "10 frames in" in str(report)


def test_buffers_too_small_give_way() -> None:
    with sa.Pool(workers=0) as pool:
        ring = stages.Ring(pool, "line")
        first = ring.take(100)
        assert first.nbytes == 4096
        ring.returned.append(first)
        assert ring.take(4096) is first
        ring.returned.append(first)
        larger = ring.take(4097)
        assert larger is not first and larger.nbytes == 8192
        del first
        gc.collect()
        assert ring.take(1) is not larger
        ring.clear()


def test_a_stage_that_raises_stop_iteration_is_named() -> None:
    def stage(k: int) -> Any:
        return next(iter([])) if k == 3 else k

    results: list[int] = []
    with pytest.raises(RuntimeError, match="raised StopIteration") as caught:
        sa.pipeline(range(9), stage, results.append)
    assert "in frame 3 of 'stage 1 of 1, stage'" in caught.value.__notes__
    assert results == [0, 1, 2]


def test_a_source_that_is_no_iterable_is_told() -> None:
    with pytest.raises(TypeError, match=r"pipeline\(5\): the source is an iterable of frames.*not a int"):
        sa.pipeline(5, print)  # type: ignore[arg-type]
