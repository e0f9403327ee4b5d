"""How long the pool is patient: tasks that hang, workers that are stopped, that die as they start, or that the system kills."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from test_pool import count, one_layer, run, stored, wait_all_at_work, wait_until

from scheduler import pool as scheduler_pool
from scheduler import watch
from scheduler.errors import TornChunkError, WorkerDied, WorkerStartError
from scheduler.run import Pool
from scheduler.task import Context, Layer, Plan

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [pytest.mark.timeout(90), pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="worker processes need Linux")]


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


# ---------------------------------------------------------------------------------------------------- task_timeout


def hanging(array: Any, i: int) -> None:
    array[i] += 1
    if i == 20:
        time.sleep(60)


def test_a_task_that_hangs_is_ended_three_times_and_named() -> None:
    with Pool(2, memory_limit="8 MiB", task_timeout=0.2) as made:
        _extent, buffer, array = stored(made, 40)
        with pytest.raises(WorkerDied) as caught:
            run(made, one_layer(buffer, hanging, 40, describe=lambda i: f"chunk {i}", line="script.py:8"))
        assert array[20] == 3 and array.max() == 3
        assert str(caught.value).count("task_timeout of 0.2 s") == 3
        assert all(part in str(caught.value) for part in ("chunk 20", "script.py:8", "raise that"))
        array[...] = 0
        run(made, one_layer(buffer, count, 40))
        assert (array == 1).all()


def test_a_task_that_hangs_once_is_done_again_and_others_are_not() -> None:
    def body(array: Any, i: int) -> None:
        array[i] += 1
        if i == 20 and array[i] == 1:
            time.sleep(60)

    with Pool(2, memory_limit="8 MiB", task_timeout=0.3) as made:
        _extent, buffer, array = stored(made, 40)
        assert run(made, one_layer(buffer, body, 40)).deaths == 1
        assert array[20] == 2 and (np.delete(array, 20) == 1).all()


def test_the_plan_has_a_timeout_of_its_own_and_the_shorter_counts() -> None:
    for of_pool, of_plan in ((None, 0.2), (60.0, 0.2), (0.2, 60.0)):
        with Pool(1, memory_limit="8 MiB", task_timeout=of_pool) as made:
            _extent, buffer, _array = stored(made, 40)
            layers = one_layer(buffer, hanging, 40).layers
            with pytest.raises(WorkerDied, match=r"task_timeout of 0\.2 s"):
                run(made, Plan(buffers=(buffer,), layers=layers, task_timeout_s=of_plan))


def test_many_short_tasks_may_take_longer_than_one_is_given() -> None:
    def body(array: Any, i: int) -> None:
        time.sleep(0.01)
        array[i] += 1

    with Pool(1, memory_limit="8 MiB", task_timeout=0.4) as made:
        _extent, buffer, array = stored(made, 100)
        assert run(made, one_layer(buffer, body, 100, nbytes_per_task=1)).deaths == 0  # a hint so low that it is one or two ranges
        assert (array == 1).all()


def test_loading_a_function_is_given_longer_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __init__(self, bind_s: float) -> None:
            self.bind_s = bind_s

        def bind(self, context: Context) -> Any:
            time.sleep(self.bind_s)
            return lambda i: None

    with Pool(1, memory_limit="8 MiB", task_timeout=0.2) as made:
        assert run(made, Plan(buffers=(), layers=(Layer(name="slow", kernel=Slow(0.6), ntasks=4),))).deaths == 0
    monkeypatch.setattr(scheduler_pool, "STALLED_S", 0.3)
    with Pool(1, memory_limit="8 MiB", task_timeout=0.2) as made:
        with pytest.raises(WorkerDied, match="task_timeout"):
            run(made, Plan(buffers=(), layers=(Layer(name="slow", kernel=Slow(60), ntasks=4),)))


def test_what_the_driver_does_itself_has_no_timeout() -> None:
    class Slow:
        def bind(self, context: Context) -> Any:
            return lambda i: time.sleep(0.4)

    with Pool(1, memory_limit="8 MiB", task_timeout=0.1) as made:
        for executor, place in (("processes", "driver"), ("synchronous", "worker"), ("threads", "worker")):
            plan = Plan(buffers=(), layers=(Layer(name="slow", kernel=Slow(), ntasks=2, place=place),))
            assert made.run(plan, executor).deaths == 0


def test_a_timeout_in_an_update_in_place_is_a_torn_chunk() -> None:
    with Pool(1, memory_limit="8 MiB", task_timeout=0.2) as made:
        _extent, buffer, array = stored(made, 40)
        with pytest.raises(TornChunkError, match=r"task_timeout of 0\.2 s"):
            run(made, one_layer(buffer, hanging, 40, retry=False))
        assert array[20] == 1


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_timeout_that_is_none_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match="task_timeout"):
        Pool(1, task_timeout=timeout)


def test_a_stopped_worker_is_replaced_when_there_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_pool, "STALLED_S", 0.2)
    with Pool(2, memory_limit="8 MiB", task_timeout=0.2) as made:
        _extent, buffer, array = stored(made, 64)
        wait_all_at_work(made)
        with stopped(made.statistics().pids[0]):
            report = run(made, one_layer(buffer, count, 64))
        assert report.deaths == 1 and (array == 1).all()


def test_a_worker_killed_for_one_task_does_not_charge_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker goes on between the decision and the signal: every time, here."""

    def late(member: Any) -> None:
        before = member_place(member)
        wait_until(lambda: member_place(member) != before, "the next task", 10)
        os.kill(member.process.pid, signal.SIGKILL)

    def member_place(member: Any) -> tuple[int, int]:
        place: tuple[int, int] = made._worker_pool._loop._place(member)  # type: ignore[union-attr]
        return place

    def body(array: Any, i: int) -> None:
        array[i] += 1
        if i < 2 or array[i] < 5:
            time.sleep(0.3)

    monkeypatch.setattr(scheduler_pool._Member, "kill", late)
    with Pool(1, memory_limit="8 MiB", task_timeout=0.1) as made:
        _extent, buffer, array = stored(made, 3)
        run(made, one_layer(buffer, body, 3, nbytes_per_task=1))
        assert made.statistics().starts > 1
        monkeypatch.undo()
    assert (array > 0).all()


# ------------------------------------------------------------------------------------------------ stopped workers


def test_a_stopped_worker_is_told_of_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(scheduler_pool, "STALLED_S", 0.3)
    monkeypatch.setattr(watch, "LOOK_S", 0.05)

    def body(array: Any, i: int) -> None:
        if i == 0:
            array[-1] = os.getpid()
            os.kill(os.getpid(), signal.SIGSTOP)
        array[i] = 1

    with Pool(1, memory_limit="8 MiB") as made, caplog.at_level(logging.WARNING, "shmarray"):
        _extent, buffer, array = stored(made, 9)
        thread = threading.Thread(target=run, args=(made, one_layer(buffer, body, 8, line="script.py:3", describe=lambda i: f"chunk {i}")))
        thread.start()
        try:
            wait_until(lambda: any("stopped (T)" in text for text in caplog.messages), "the warning")
            loop, told_s = made.worker_pool()._loop, time.monotonic()
            wait_until(lambda: told_s + 0.3 < loop.look_at_s < math.inf, "a few more looks")  # infinite while it looks
        finally:
            wait_until(lambda: array[-1] != 0, "the stop")
            os.kill(int(array[-1]), signal.SIGCONT)
            thread.join()
    (text,) = [text for text in caplog.messages if "(D)" not in text]  # a busy disk may have it wait as well
    assert all(part in text for part in ("chunk 0", "'layer'", "script.py:3", str(array[-1]), "stopped (T)", "kill -CONT", "task_timeout"))
    assert (array[:8] == 1).all()


def test_a_busy_worker_is_not_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(scheduler_pool, "STALLED_S", 0.05)
    monkeypatch.setattr(watch, "LOOK_S", 0.02)
    with Pool(1, memory_limit="8 MiB") as made, caplog.at_level(logging.WARNING, "shmarray"):
        _extent, buffer, _array = stored(made, 8)
        run(made, one_layer(buffer, lambda array, i: time.sleep(0.5), 1))
    assert [text for text in caplog.messages if "(D)" not in text] == []


def test_an_idle_pool_sleeps() -> None:
    with Pool(2, memory_limit="8 MiB") as made:
        _extent, buffer, _array = stored(made, 8)
        run(made, one_layer(buffer, count, 8))
        loop = made.worker_pool()._loop
        wait_until(lambda: loop.look_at_s == float("inf"), "the last look")


# ----------------------------------------------------------------------------------------- deaths before any task


def fake_python(tmp_path: Path, body: str) -> str:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{body}\n")
    fake.chmod(0o755)
    return str(fake)


def test_workers_that_die_when_they_are_ready_come_to_an_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They say hello and exit: no task may be charged, and nobody may try for ever."""
    script = "import scheduler.worker as w, sys, os; w._Process.serve = lambda self: os._exit(6); w.main(sys.argv[4:])"
    fake = fake_python(tmp_path, f'exec {sys.executable} -c "{script}" "$@"')
    with Pool(2, memory_limit="8 MiB") as made:
        _extent, buffer, array = stored(made, 8)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", fake)
            with pytest.raises(WorkerStartError, match=r"3 times in a row(?s:.*)exit code 6, before it began its first task"):
                run(made, one_layer(buffer, count, 8))
            assert 3 <= made.statistics().starts <= 6
        run(made, one_layer(buffer, count, 8))
        assert (array == 1).all()


def test_a_worker_that_never_gets_ready_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scheduler_pool, "START_S", 0.2)
    with Pool(1, memory_limit="8 MiB") as made:
        _extent, buffer, array = stored(made, 8)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", fake_python(tmp_path, "echo lost in thought >&2; exec sleep 60"))
            with pytest.raises(WorkerStartError, match=r"(?s)not ready 0 s after its start.*lost in thought"):
                run(made, one_layer(buffer, count, 8))
            assert made.statistics().starts == 3
        monkeypatch.setattr(scheduler_pool, "START_S", 60.0)
        run(made, one_layer(buffer, count, 8))
        assert (array == 1).all()


def test_workers_that_somebody_kills_as_they_start_are_tried_often(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(watch, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(watch, "LONGEST_PAUSE_S", 0.01)
    with Pool(1, memory_limit="8 MiB") as made:
        _extent, buffer, array = stored(made, 8)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", fake_python(tmp_path, "kill -9 $$"))
            with pytest.raises(WorkerStartError, match=r"20 times in a row.*(?s:.*)SIGKILL"):
                run(made, one_layer(buffer, count, 8))
            assert made.statistics().starts == 20
        run(made, one_layer(buffer, count, 8))
        assert (array == 1).all()


def test_one_slot_that_cannot_start_does_not_start_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The other worker's success must not count for it."""
    with Pool(2, memory_limit="8 MiB") as made:
        _extent, buffer, array = stored(made, 8)
        wait_all_at_work(made)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
        victim = made.statistics().pids[0]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in made.statistics().pids, "the burial")
        before = made.statistics().starts

        def body(array: Any, i: int) -> None:
            time.sleep(0.01)

        run(made, one_layer(buffer, body, 8))
        _extent2, buffer2, _array2 = stored(made, 150)
        run(made, one_layer(buffer2, body, 150))
        assert 1 <= made.statistics().starts - before <= 4
        run(made, one_layer(buffer, count, 8))
        assert (array == 1).all()


def test_a_plan_survives_kills_of_any_worker_at_any_time() -> None:
    """Every 50 ms somebody kills a worker, be it at work, idle or only starting; what the pool does about it is right and ends."""
    seed = int(os.environ.get("SHMARRAY_SEED", "11"))
    choose = random.Random(seed)
    read, write = os.pipe()

    def body(array: Any, i: int) -> None:
        array[i] = 3 * i
        assert sum(range(3000))

    kills = 0

    def killer() -> None:
        nonlocal kills
        until = time.monotonic() + 2
        while time.monotonic() < until and not select.select([read], [], [], 0.05)[0]:
            for pid in choose.sample(made.statistics().pids, len(made.statistics().pids))[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    kills += 1

    with Pool(2, memory_limit="64 MiB") as made:
        _extent, buffer, array = stored(made, 4000)
        thread = threading.Thread(target=killer)
        thread.start()
        try:
            while thread.is_alive():
                array[...] = 0
                run(made, one_layer(buffer, body, 4000))
                assert (array == 3 * np.arange(4000)).all(), f"seed {seed}"
        finally:
            os.write(write, b"x")
            thread.join()
            os.close(read)
            os.close(write)
        made.check()
    assert kills > 10


class KilledWhileBinding:
    """Adds one to each item; its ``bind`` is the end of the process the first ``times`` times, as a word at the end tells."""

    def __init__(self, length: int, times: int, how: signal.Signals) -> None:
        self.length, self.times, self.how = length, times, how

    def bind(self, context: Context) -> Any:
        array = context.memory.window(context.addresses[0], 0, (self.length,), (8,), np.dtype(np.int64))
        array[-1] += 1
        if array[-1] <= self.times:
            signal.signal(self.how, signal.SIG_DFL) if self.how != signal.SIGKILL else None
            os.kill(os.getpid(), self.how)
        return lambda i: count(array, i)


@pytest.mark.parametrize(
    ("how", "isolated", "times", "deaths"),
    [
        (signal.SIGKILL, False, 6, 0),  # somebody kills workers that load our own code: no task is charged
        (signal.SIGKILL, False, 99, 20),  # again and again: that comes to an end, too
        (signal.SIGKILL, True, 99, 3),  # a user's function may do it itself
        (signal.SIGSEGV, False, 99, 3),  # nobody else does that
    ],
)
def test_kills_while_a_kernel_is_loaded(
    how: signal.Signals, isolated: bool, times: int, deaths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(watch, "LONGEST_PAUSE_S", 0.01)
    with Pool(1, memory_limit="8 MiB") as made:
        _extent, buffer, array = stored(made, 41)
        layer = Layer(name="layer", kernel=KilledWhileBinding(41, times, how), ntasks=40, writes=(0,))
        plan = Plan(buffers=(buffer,), layers=(layer,), isolated=isolated)
        if not deaths:
            assert run(made, plan).deaths == times
            assert (array[:40] == 1).all()
            return
        with pytest.raises(WorkerDied, match=f"{deaths} worker processes") as caught:
            run(made, plan)
        assert array[-1] == deaths == made.statistics().starts and not array[:40].any()
        assert ("while they loaded the code of" in str(caught.value)) == (deaths == 20)


# ---------------------------------------------------------------------------------------------------- out of memory


def test_a_kill_by_the_system_out_of_memory_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    kills = [0]

    def body(array: Any, i: int) -> None:
        if i == 3:
            array[-1] += 1
            os.kill(os.getpid(), signal.SIGKILL)

    with Pool(1, memory_limit="8 MiB") as made:
        _extent, buffer, array = stored(made, 9)
        # As if the kernel had counted each of those deaths.
        monkeypatch.setattr(scheduler_pool, "oom_kills", lambda: kills[0] + int(array[-1]))
        with pytest.raises(WorkerDied) as caught:
            run(made, one_layer(buffer, body, 8))
    assert str(caught.value).count("killed by SIGKILL, by the kernel's out-of-memory killer") == 3
    assert "use smaller chunks, fewer workers" in str(caught.value)


def test_a_kill_by_somebody_else_is_not_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_pool, "oom_kills", lambda: 7)

    def body(array: Any, i: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with Pool(1, memory_limit="8 MiB") as made:
        _extent, buffer, _array = stored(made, 8)
        with pytest.raises(WorkerDied, match="SIGKILL") as caught:
            run(made, one_layer(buffer, body, 8))
    assert "out-of-memory" not in str(caught.value)
