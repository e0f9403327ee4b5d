"""Worker processes: what dies, what is left, what is told. Waits are on pids, pipes and events, each with a deadline."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import psutil
import pytest
from soak import SOAK_MINUTES

import scheduler
from scheduler import pool as scheduler_pool
from scheduler.errors import PoolClosed, RunCancelled, TornChunkError, WorkerDied, WorkerStartError
from scheduler.extents import Extent
from scheduler.run import Pool
from scheduler.running import RunGroup
from scheduler.state import DRIVER_LANE, RangeFinished
from scheduler.task import ARENA, Address, Buffer, Context, Layer, Outcome, Plan

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [pytest.mark.timeout(90), pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="worker processes need Linux")]

INT = np.dtype(np.int64)
ROOT = str(Path(scheduler.__file__).parent.parent)


class Over:
    def __init__(self, length: int, body: Callable[[Any, int], None]) -> None:
        self.length, self.body = length, body

    def bind(self, context: Context) -> Callable[[int], None]:
        array = context.memory.window(context.addresses[0], 0, (self.length,), (8,), INT)
        return lambda i: self.body(array, i)


def stored(pool: Pool, length: int) -> tuple[Extent, Buffer, Any]:
    extent = pool.allocate(8 * length)
    address = Address(ARENA, extent.offset)
    array = pool.memory.window(address, 0, (length,), (8,), INT)
    array[...] = 0
    return extent, Buffer(8 * length, address), array


def one_layer(buffer: Buffer, body: Callable[[Any, int], None], ntasks: int, **more: Any) -> Plan:
    kernel = Over(buffer.nbytes // 8, body)
    return Plan(buffers=(buffer,), layers=(Layer(name="layer", kernel=kernel, ntasks=ntasks, writes=(0,), **more),))


def count(array: Any, i: int) -> None:
    array[i] += 1


def run(pool: Pool, plan: Plan, outcome: Outcome | None = None) -> Any:
    return pool.run(plan, "processes", outcome)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 20) -> None:
    until = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until, f"{what} did not happen within {deadline_s} s"
        select.select([], [], [], 0.01)


def wait_all_at_work(pool: Pool) -> None:
    """Return when every worker of the pool has joined."""
    _extent, buffer, array = stored(pool, pool.workers)

    def body(array: Any, i: int) -> None:
        array[i] = os.getpid()

    def all_here() -> bool:
        run(pool, one_layer(buffer, body, pool.workers))
        return len(set(array.tolist())) == pool.workers

    wait_until(all_here, "the start of all workers")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, memory_limit="256 MiB") as made:
        yield made


# ------------------------------------------------------------------------------------------------------- deaths


def kill(array: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(array: Any) -> None:
    os._exit(0)


def crash(array: Any) -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # quietly: no stack on stderr
    ctypes.string_at(0)


def abort(array: Any) -> None:
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    os.abort()


def shrink(array: Any) -> None:
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    fd = os.memfd_create("shrinks")
    os.ftruncate(fd, mmap.PAGESIZE)
    mapped = mmap.mmap(fd, mmap.PAGESIZE)
    os.ftruncate(fd, 0)
    mapped[0]


DEATHS = {"SIGKILL": kill, "exit code 0": leave, "SIGSEGV": crash, "SIGABRT": abort, "SIGBUS": shrink}


def dying(how: Callable[[Any], None], times: int) -> Callable[[Any, int], None]:
    """Return a body whose task 20 dies the first ``times`` times; how often it was tried is counted in the last word."""

    def body(array: Any, i: int) -> None:
        if i == 20:
            array[-1] += 1
            if array[-1] <= times:
                how(array)
        array[i] = i + 1

    return body


@pytest.mark.parametrize("how", DEATHS)
def test_a_task_that_dies_once_is_run_again(pool: Pool, how: str) -> None:
    _extent, buffer, array = stored(pool, 41)
    report = run(pool, one_layer(buffer, dying(DEATHS[how], 1), 40))
    assert (array[:40] == np.arange(40) + 1).all()
    assert array[-1] == 2
    assert report.deaths >= 1


@pytest.mark.parametrize("how", DEATHS)
def test_a_task_that_dies_three_times_is_refused_by_name(pool: Pool, how: str) -> None:
    _extent, buffer, array = stored(pool, 41)
    with pytest.raises(WorkerDied) as caught:
        run(pool, one_layer(buffer, dying(DEATHS[how], 99), 40, describe=lambda i: f"chunk ({i},)", line="script.py:8"))
    assert array[-1] == 3
    assert str(caught.value).count(how) >= 3
    for part in ("chunk (20,)", "script.py:8", "'layer'"):
        assert part in str(caught.value)
    array[...] = 0
    run(pool, one_layer(buffer, count, 40))
    assert (array[:40] == 1).all()


def test_a_death_in_an_update_in_place_is_a_torn_chunk(pool: Pool) -> None:
    _extent, buffer, array = stored(pool, 41)
    outcome = Outcome()
    with pytest.raises(TornChunkError) as caught:
        run(pool, one_layer(buffer, dying(kill, 1), 40, retry=False, describe=lambda i: f"chunk {i}"), outcome)
    assert caught.value.tasks == (20,) and "chunk 20" in str(caught.value) and "SIGKILL" in str(caught.value)
    assert outcome.progress is not None and (0, 20, 21) in outcome.progress.unfinished
    assert array[-1] == 1  # never run again


class Binding:
    """Adds one to each item; ``bind`` does ``how`` the first time, as a word at the end tells."""

    def __init__(self, length: int, how: Callable[[Any], None]) -> None:
        self.length, self.how = length, how

    def bind(self, context: Context) -> Callable[[int], None]:
        array = context.memory.window(context.addresses[0], 0, (self.length,), (8,), INT)
        array[-1] += 1
        if array[-1] == 1:
            self.how(array)
        return lambda i: count(array, i)


def test_a_death_while_binding_an_update_in_place_tears_nothing(pool: Pool) -> None:
    _extent, buffer, array = stored(pool, 41)
    layer = Layer(name="layer", kernel=Binding(41, kill), ntasks=40, writes=(0,), retry=False)
    report = run(pool, Plan(buffers=(buffer,), layers=(layer,)))
    assert (array[:40] == 1).all() and report.deaths == 1


@pytest.mark.parametrize("executor", ["synchronous", "processes", "threads"])
def test_a_bind_that_raises_leaves_nothing_unfinished(pool: Pool, executor: str) -> None:
    _extent, buffer, _array = stored(pool, 41)

    def fail(array: Any) -> None:
        raise MemoryError("no scratch")

    plan = Plan(buffers=(buffer,), layers=(Layer(name="layer", kernel=Binding(41, fail), ntasks=1, writes=(0,), retry=False),))
    outcome = Outcome()
    with pytest.raises(MemoryError):
        pool.run(plan, executor, outcome)
    assert outcome.progress is not None and outcome.progress.unfinished == ()


def test_a_warning_that_cannot_be_told_costs_no_worker(pool: Pool) -> None:
    _extent, buffer, _array = stored(pool, 4)

    class Mute(UserWarning):
        is_mute = False

        def __str__(self) -> str:
            if self.is_mute:
                raise RuntimeError("no")
            return "careful"

    def body(array: Any, i: int) -> None:
        warning = Mute()
        warnings.warn(warning, stacklevel=1)
        warning.is_mute = True

    report = run(pool, one_layer(buffer, body, 4))
    assert report.deaths == 0
    assert {(c, m) for c, m, _ in report.warnings} == {("UserWarning", "<Mute whose str fails>")}


def test_workers_killed_from_outside_cost_nothing_but_time(pool: Pool) -> None:
    _extent, buffer, array = stored(pool, 3001)
    read, write = os.pipe()

    def body(array: Any, i: int) -> None:
        array[3000] = os.getpid()
        array[i] = 2 * i
        total = sum(range(2000))
        assert total

    def killer() -> None:
        """Each time that some hundred tasks more are done, however long that takes, kill a worker that is at work."""
        done_at_kill = 0
        while not select.select([read], [], [], 0.001)[0]:
            done = int(np.count_nonzero(array[:3000]))
            done_at_kill = min(done_at_kill, done)  # another plan
            if done < done_at_kill + 700:
                continue
            victim, array[3000] = int(array[3000]), 0
            if victim in pool.statistics().pids:
                os.kill(victim, signal.SIGKILL)
                done_at_kill = done

    thread = threading.Thread(target=killer)
    thread.start()
    deaths = 0
    try:
        while deaths < 6:
            array[...] = 0
            deaths += run(pool, one_layer(buffer, body, 3000)).deaths
            assert (array[:3000] == 2 * np.arange(3000)).all()
    finally:
        os.write(write, b"x")
        thread.join()
        os.close(read)
        os.close(write)


def test_a_worker_that_dies_idle_is_replaced_for_the_next_plan(pool: Pool) -> None:
    _extent, buffer, array = stored(pool, 10)
    run(pool, one_layer(buffer, count, 10))
    for pid in pool.statistics().pids:
        os.kill(pid, signal.SIGKILL)
    run(pool, one_layer(buffer, count, 10))
    assert (array == 2).all()


def test_a_kernel_that_kills_whoever_loads_it_is_refused(pool: Pool) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os._exit, (7,)

        def bind(self, context: Context) -> Callable[[int], None]:
            raise AssertionError

    with pytest.raises(WorkerDied, match="exit code 7"):
        run(pool, Plan(buffers=(), layers=(Layer(name="bomb", kernel=Bomb(), ntasks=1),)))


def test_a_stopped_worker_does_not_stop_the_driver(pool: Pool) -> None:
    _extent, buffer, array = stored(pool, 64)
    wait_all_at_work(pool)
    victim = pool.statistics().pids[0]
    os.kill(victim, signal.SIGSTOP)
    blob = np.zeros(4_000_000)  # more than the socket takes

    def body(array: Any, i: int) -> None:
        array[i] = len(blob)

    done = threading.Event()
    thread = threading.Thread(target=lambda: (run(pool, one_layer(buffer, body, 64)), done.set()))
    thread.start()
    try:
        wait_until(lambda: np.count_nonzero(array == len(blob)) >= 30, "the other worker's part")
        assert not done.is_set()
    finally:
        os.kill(victim, signal.SIGCONT)
        thread.join()
    assert (array == len(blob)).all()


# ----------------------------------------------------------------------------------------------------- messages


def test_a_closure_of_50_megabytes_travels_once_per_worker(pool: Pool) -> None:
    _extent, buffer, array = stored(pool, 8)
    big = np.arange(6_250_000)

    def body(array: Any, i: int) -> None:
        array[i] = big[-1]

    plan = one_layer(buffer, body, 8)
    run(pool, plan)
    assert (array == 6_249_999).all()
    run(pool, plan)


def test_a_function_that_cannot_be_pickled_raises_at_once_and_names_it(pool: Pool) -> None:
    _extent, buffer, array = stored(pool, 8)
    lock = threading.Lock()

    def body(array: Any, i: int) -> None:
        with lock:
            array[i] = 1

    with pytest.raises(TypeError, match="pickle") as caught:
        run(pool, one_layer(buffer, body, 8, line="script.py:4"))
    note = "\n".join(caught.value.__notes__)
    assert all(part in note for part in ("'layer'", "script.py:4", "lock"))
    assert (array == 0).all()


def test_a_function_that_cannot_be_loaded_is_an_error_not_a_hang(pool: Pool, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "only_here.py").write_text("class Kernel:\n    def bind(self, context):\n        return lambda i: None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here

    plan = Plan(buffers=(), layers=(Layer(name="layer", kernel=only_here.Kernel(), ntasks=4, line="script.py:5"),))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="only_here") as caught:
            run(pool, plan)
        assert "script.py:5" in "\n".join(caught.value.__notes__)
    sys.path.append(str(tmp_path))  # workers follow the driver's path
    run(pool, plan)


def test_kernels_are_evicted_in_step_on_both_sides(pool: Pool) -> None:
    _extent, buffer, array = stored(pool, 1)

    def made(value: int) -> Plan:
        def body(array: Any, i: int) -> None:
            array[i] = value

        return one_layer(buffer, body, 1)

    for value in [*range(300), 0, 299, 1]:
        run(pool, made(value))
        assert array[0] == value


def test_what_tasks_print_shows_up(tmp_path: Path) -> None:
    out = script(tmp_path, "pool.run(one_layer(buffer, lambda a, i: print(f'{i}\\n', end=''), 2), 'processes')")
    assert sorted(out.stdout.split()) == ["0", "1"]
    assert out.stderr == "" and out.returncode == 0


# ------------------------------------------------------------------------------------------------------ scripts

PROLOGUE = """
import os, signal, sys, threading, time
sys.path.insert(0, {root!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
import numpy as np
from scheduler.errors import *
from scheduler.run import Pool, default_pool
from scheduler.task import *

class Over:
    def __init__(self, length, body):
        self.length, self.body = length, body
    def bind(self, context):
        array = context.memory.window(context.addresses[0], 0, (self.length,), (8,), np.dtype("i8"))
        return lambda i: self.body(array, i)

def one_layer(buffer, body, ntasks, **more):
    kernel = Over(buffer.nbytes // 8, body)
    return Plan(buffers=(buffer,), layers=(Layer(name="layer", kernel=kernel, ntasks=ntasks, writes=(0,), **more),))

def count(array, i):
    array[i] += 1

pool = Pool(2, memory_limit="64 MiB")
extent = pool.allocate(800)
buffer = Buffer(800, Address(0, extent.offset))
array = pool.memory.window(buffer.address, 0, (100,), (8,), np.dtype("i8"))
array[...] = 0
"""


def source(tmp_path: Path, body: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(PROLOGUE.format(root=ROOT) + textwrap.dedent(body))
    return str(path)


def script(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Run a plain script, without a __main__ guard."""
    command = [sys.executable, "-W", "error", source(tmp_path, body)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)


def test_a_plain_script_needs_no_guard_and_ends_silently(tmp_path: Path) -> None:
    out = script(tmp_path, "pool.run(one_layer(buffer, count, 100), 'processes'); print(array.sum(), pool.statistics().starts)")
    assert (out.stdout, out.stderr, out.returncode) == ("100 2\n", "", 0)


def test_modules_beside_the_script_do_not_shadow_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "selectors.py").write_text("raise RuntimeError('shadowed')")
    out = subprocess.run(
        [sys.executable, "-P", source(tmp_path, "pool.run(one_layer(buffer, count, 100), 'processes'); print(array.sum())")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        check=False,
    )
    assert (out.stdout, out.returncode) == ("100\n", 0), out.stderr


CTRL_C = """
    def slow(array, i):
        {pause}
    before = pool.run(one_layer(buffer, count, 100), 'processes')
    read, write = os.pipe()
    def press():
        while not array[99] > 1:
            time.sleep(0.005)
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
    pressed = []
    def body(array, i):
        array[99] += 1
        slow(array, i)
    threading.Thread(target=press).start()
    try:
        pool.run(one_layer(buffer, body, 90), {executor!r})
    except KeyboardInterrupt:
        print("interrupted", time.monotonic() - pressed[0] < 1)
    array[...] = 0
    pool.run(one_layer(buffer, count, 100), {executor!r})
    print(array.sum())
    pool.check()
"""


@pytest.mark.parametrize("executor", ["synchronous", "processes", "threads"])
def test_ctrl_c_comes_within_a_second_and_the_pool_is_usable(tmp_path: Path, executor: str) -> None:
    pause = "time.sleep(60)" if executor == "processes" else "time.sleep(0.2)"
    out = script(tmp_path, CTRL_C.format(pause=pause, executor=executor))
    assert (out.stdout, out.stderr, out.returncode) == ("interrupted True\n100\n", "", 0)


CTRL_C_ANYWHERE = """
    import random
    random.seed(7)
    kernel = Over(100, count)
    layer = Layer(name="layer", kernel=kernel, ntasks=4, writes=(0,), reads=(1,), place={place!r})
    plan = Plan(buffers=(Buffer(800), buffer), layers=(layer,), locks=(LockRequest(1, 0, 9, "w"),))
    pool.run(plan, {executor!r})
    began = time.perf_counter()
    for _ in range(20):
        pool.run(plan, {executor!r})
    usual = (time.perf_counter() - began) / 20
    def press(*_):
        if armed:
            raise KeyboardInterrupt
    armed = False
    signal.signal(signal.SIGALRM, press)
    hits = 0
    tries = 0
    while tries < {tries} or hits < 25:
        tries += 1
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, max(2e-6, random.random() * usual))
            pool.run(plan, {executor!r})
            armed = False
        except KeyboardInterrupt:
            armed = False
            hits += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    def elsewhere():
        pool.run(plan, {executor!r})
        with pool.locks.acquire(plan.locks, timeout=20):
            pass
        done.append(1)
    done = []
    thread = threading.Thread(target=elsewhere, daemon=True)
    thread.start()
    thread.join(30)
    pool.check()
    print(len(done), pool.locks.statistics().granted, flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("executor", "place"), [("synchronous", "worker"), ("processes", "worker"), ("processes", "driver"), ("threads", "worker")]
)
def test_ctrl_c_at_any_instant_leaves_nothing_held(tmp_path: Path, executor: str, place: str) -> None:
    out = script(tmp_path, CTRL_C_ANYWHERE.format(executor=executor, place=place, tries=1200 if SOAK_MINUTES else 300))
    assert (out.stdout, out.returncode) == ("1 0\n", 0), out.stderr
    if executor != "threads":  # `threading` itself says that it ignored one
        assert out.stderr == ""


def test_ctrl_c_before_the_workers_are_there(tmp_path: Path) -> None:
    body = """
        threading.Timer(0.02, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            while True:
                plan = one_layer(Buffer(800, Address(0, 0)), lambda a, i: time.sleep(9), 9)
                Pool(2, memory_limit="8 MiB").run(plan, "processes")
        except KeyboardInterrupt:
            print("interrupted")
        pool.run(one_layer(buffer, count, 100), "processes")
        print(array.sum())
    """
    out = script(tmp_path, body)
    assert (out.stdout, out.stderr, out.returncode) == ("interrupted\n100\n", "", 0)


@pytest.mark.parametrize("end", ["sys.exit(4)", "raise SystemExit(4)", "pool.close(); sys.exit(4)"])
def test_the_exit_code_is_the_scripts_own(tmp_path: Path, end: str) -> None:
    out = script(tmp_path, f"pool.run(one_layer(buffer, count, 100), 'processes'); {end}")
    assert (out.stdout, out.stderr, out.returncode) == ("", "", 4)


@pytest.mark.parametrize("executor", ["processes", "threads", "synchronous", None])
def test_a_daemon_thread_at_work_does_not_disturb_the_exit(tmp_path: Path, executor: str | None) -> None:
    body = f"""
        class Owner:
            pass
        owner = Owner()
        pool.locks.forget_after(owner, 3)
        plan = one_layer(buffer, lambda a, i: (a.__setitem__(0, 1), time.sleep(0.2)), 9)
        def work():
            while True:
                with pool.locks.acquire((LockRequest(3, 0, 9, "w"),)):
                    if {executor!r}:
                        pool.run(plan, {executor!r})
                    else:
                        array[0] = 1
                        time.sleep(60)
        threading.Thread(target=work, daemon=True).start()
        while not array[0]:
            time.sleep(0.005)
        print(time.monotonic(), flush=True)
        sys.exit(5)
    """
    out = script(tmp_path, body)
    assert (out.stderr, out.returncode) == ("", 5)
    assert time.monotonic() - float(out.stdout) < 2


def test_a_forked_child_cannot_use_or_harm_the_pool(tmp_path: Path) -> None:
    body = """
        pool.run(one_layer(buffer, count, 100), "processes")
        child = os.fork()
        if not child:
            try:
                pool.run(one_layer(buffer, count, 100), "processes")
            except PoolClosed as error:
                own = Pool(2, memory_limit="8 MiB")
                extent = own.allocate(800)
                mine = Buffer(800, Address(0, extent.offset))
                own.run(one_layer(mine, lambda a, i: a.__setitem__(i, 5), 100), "processes")
                view = own.memory.window(mine.address, 0, (100,), (8,), np.dtype("i8"))
                os._exit(7 if "forked child" in str(error) and (view == 5).all() else 1)
            os._exit(2)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        pool.run(one_layer(buffer, count, 100), "processes")
        print(array.sum(), pool.statistics().starts)
    """
    out = script(tmp_path, body)
    assert (out.stdout, out.stderr) == ("7\n200 2\n", "")


def test_the_child_of_a_task_that_forks_does_not_speak_for_the_worker(pool: Pool) -> None:
    _extent, buffer, array = stored(pool, 8)

    def body(array: Any, i: int) -> None:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            array[i] += 1

    run(pool, one_layer(buffer, body, 8))
    assert (array == 1).all()


# -------------------------------------------------------------------------------------------------------- start


def test_workers_that_cannot_start_are_told_with_their_stderr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'no such luck' >&2\nexit 3\n")
    fake.chmod(0o755)
    with Pool(2, memory_limit="8 MiB") as made:
        _extent, buffer, array = stored(made, 8)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(fake))
            with pytest.raises(WorkerStartError, match=r"(?s)exit code 3.*no such luck"):
                run(made, one_layer(buffer, count, 8))
            patch.setattr(sys, "executable", str(tmp_path / "missing"))
            with pytest.raises(WorkerStartError, match="missing"):
                run(made, one_layer(buffer, count, 8))
        run(made, one_layer(buffer, count, 8))  # the next plan tries anew
        assert (array == 1).all()


def test_the_pool_goes_on_with_fewer_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Pool(2, memory_limit="8 MiB") as made:
        _extent, buffer, array = stored(made, 8)
        run(made, one_layer(buffer, count, 8))
        wait_all_at_work(made)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
        victim = made.statistics().pids[0]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in made.statistics().pids, "the burial")
        for _ in range(3):
            run(made, one_layer(buffer, count, 8))
        assert (array == 4).all()


# ------------------------------------------------------------------------------------------------- life and leaks


def test_nothing_is_started_before_it_is_needed() -> None:
    with Pool(2, memory_limit="8 MiB") as made:
        _extent, buffer, _array = stored(made, 8)
        made.run(one_layer(buffer, count, 8), "synchronous")
        assert made.statistics().starts == 0
        run(made, one_layer(buffer, count, 8))
        run(made, one_layer(buffer, count, 8))
        assert made.statistics().starts == 2  # and they stay


def test_closing_ends_plans_and_workers() -> None:
    made = Pool(2, memory_limit="8 MiB")
    _extent, buffer, array = stored(made, 8)
    errors: list[BaseException] = []

    def body(array: Any, i: int) -> None:
        array[i] = 1
        time.sleep(60)

    def target() -> None:
        try:
            run(made, one_layer(buffer, body, 8))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    wait_until(lambda: bool((array == 1).any()), "the first task")
    pids = made.statistics().pids
    made.close()
    thread.join(10)
    assert [type(e) for e in errors] == [PoolClosed]
    assert all(map(is_gone, pids))


def test_a_pool_nobody_refers_to_closes() -> None:
    made = Pool(2, memory_limit="8 MiB")
    _extent, buffer, _array = stored(made, 8)
    run(made, one_layer(buffer, count, 8))
    pids = made.statistics().pids
    del made, _extent, _array
    gc.collect()
    wait_until(lambda: all(map(is_gone, pids)), "the end of the workers")


def test_fifty_pools_leave_no_descriptor_process_or_thread() -> None:
    def cycle(use: bool) -> None:
        with Pool(1, memory_limit="8 MiB") as made:
            _extent, buffer, array = stored(made, 8)
            made.run(one_layer(buffer, count, 8), "processes" if use else "synchronous")
            assert (array == 1).all()

    def held() -> tuple[int, int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(psutil.Process().children()), threading.active_count()

    cycle(True)
    before = held()
    for number in range(50):
        cycle(number % 10 == 0)
    assert held() == before


def test_a_failure_leaves_no_circle_that_holds_the_plan(pool: Pool) -> None:
    class Fails:
        def bind(self, context: Context) -> Callable[[int], None]:
            return lambda i: [][i]

    gc.collect()
    gc.disable()
    try:
        for executor in ("processes", "threads", "synchronous"):
            kernel = Fails()
            watch = weakref.ref(kernel)
            plan = Plan(buffers=(), layers=(Layer(name="fails", kernel=kernel, ntasks=4),))
            with contextlib.suppress(IndexError):
                pool.run(plan, executor)
            del plan, kernel
            wait_until(lambda watch=watch: watch() is None, f"the end of the plan in {executor}", 5)  # type: ignore[misc]
    finally:
        gc.enable()


def test_the_helper_thread_lets_go_of_what_it_had_bound(pool: Pool) -> None:
    class Source:
        def bind(self, context: Context) -> Callable[[int], None]:
            return self.read

        def read(self, i: int) -> None:
            pass

    source = Source()
    watch = weakref.ref(source)
    run(pool, Plan(buffers=(), layers=(Layer(name="read", kernel=source, ntasks=4, place="driver"),)))
    del source
    wait_until(lambda: watch() is None, "the end of the source", 5)


def test_a_plan_whose_start_failed_is_not_run_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Pool(1, memory_limit="8 MiB") as made:
        _extent, buffer, array = stored(made, 8)
        with monkeypatch.context() as patch:
            patch.setattr(scheduler_pool, "start_thread", none_left)
            with pytest.raises(RuntimeError, match="new thread"):
                run(made, one_layer(buffer, count, 8))
        made.check()
        run(made, one_layer(buffer, count, 8))
        assert (array == 1).all()


def test_without_descriptors_left_a_loop_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with Pool(1, memory_limit="8 MiB") as made:
        made.can_spill()  # its file stays
        _extent, buffer, array = stored(made, 8)
        gc.collect()
        before = os.listdir("/proc/self/fd")
        with monkeypatch.context() as patch:
            patch.setattr(os, "memfd_create", full)
            for _ in range(3):
                with pytest.raises(OSError, match="Too many open files"):
                    run(made, one_layer(buffer, count, 8))
        assert os.listdir("/proc/self/fd") == before
        run(made, one_layer(buffer, count, 8))
        assert (array == 1).all()


def test_a_word_that_comes_after_the_end_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Pool(1, memory_limit="8 MiB")
    go_on, begun = threading.Event(), threading.Event()

    class Waits:
        def bind(self, context: Context) -> Callable[[int], None]:
            return self.run

        def run(self, i: int) -> None:
            begun.set()
            go_on.wait()

    errors: list[BaseException] = []

    def target() -> None:
        try:
            run(made, Plan(buffers=(), layers=(Layer(name="waits", kernel=Waits(), ntasks=1, place="driver"),)))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    assert begun.wait(20)
    loop = made.worker_pool()._loop
    ((run_id, _, _),) = loop.state.in_flight(DRIVER_LANE)
    # As when the helper posts just before the pool is closed.
    monkeypatch.setattr(loop, "_end_members", lambda: loop.inbox.append(lambda: loop._feed(RangeFinished(DRIVER_LANE, run_id, 0.1))))
    ends: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", ends.append)
    made.close()
    thread.join(20)
    go_on.set()
    assert [type(e) for e in errors] == [PoolClosed] and ends == []


def test_threads_run_plans_at_once_with_one_failing_and_a_worker_killed(pool: Pool) -> None:
    problems: list[str] = []

    def work(number: int) -> None:
        _extent, buffer, array = stored(pool, 101)

        def body(array: Any, i: int) -> None:
            if number == 2 and i == 50:
                raise ValueError("mine")
            if number == 3 and i == 50:
                array[100] += 1
                if array[100] == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            array[i] = i * number

        for _ in range(5):
            array[...] = -1
            array[100] = 0
            try:
                run(pool, one_layer(buffer, body, 100))
                if number == 2 or not (array[:100] == number * np.arange(100)).all():
                    problems.append(f"{number} is wrong")
            except ValueError:
                if number != 2:
                    problems.append(f"{number} failed")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    pool.check()


def test_a_group_of_runs_is_ended_by_another_thread(pool: Pool) -> None:
    _extent, buffer, array = stored(pool, 4)

    def endless(array: Any, i: int) -> None:
        array[i] = 1
        while True:
            select.select([], [], [], 60)

    group = RunGroup()
    caught: list[BaseException] = []

    def member(body: Callable[[Any, int], None]) -> None:
        group.enter()
        try:
            run(pool, one_layer(buffer, body, 2))
        except RunCancelled as error:
            caught.append(error)

    threads = [threading.Thread(target=member, args=(endless,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: bool(array[0]), "the first task")
    others = pool.statistics().plans

    group.cancel()

    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(caught) == 3 and others == pool.statistics().plans
    late = threading.Thread(target=member, args=(count,))  # it comes too late to begin
    late.start()
    late.join(20)
    assert len(caught) == 4
    array[...] = 0
    run(pool, one_layer(buffer, count, 4))  # who is in no group is not concerned
    assert (array == 1).all()
    assert not group._cancels


def test_a_bug_in_the_loop_fails_its_plans_and_no_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("bug")

    with Pool(1, memory_limit="8 MiB") as made:
        _extent, buffer, array = stored(made, 8)
        with monkeypatch.context() as patch:
            patch.setattr(scheduler_pool._Loop, "_start", broken)
            with pytest.raises(RuntimeError, match=r"(?s)a bug of ours.*ZeroDivisionError"):
                run(made, one_layer(buffer, count, 8))
        made.check()
        run(made, one_layer(buffer, count, 8))
        assert (array == 1).all()
