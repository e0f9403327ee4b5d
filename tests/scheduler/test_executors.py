"""The kit that every executor passes: same results, same errors, same notes, whoever runs the tasks."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import numpy as np
import pytest

from scheduler import run as scheduler_run
from scheduler.errors import LockError, MemoryBudgetError, PoolClosed, SharedMemoryError, TaskError
from scheduler.extents import Extent
from scheduler.run import Pool, configure_default, default_pool
from scheduler.task import ARENA, DRIVER, Address, Buffer, Context, Dependency, Layer, LockRequest, Outcome, Plan

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.timeout(60)

EXECUTORS = ("synchronous", "threads", "processes")
INT = np.dtype(np.int64)
Body = Callable[[Any, int], None]


class Over:
    """Calls ``body(arrays, i)``: one int64 array per buffer."""

    def __init__(self, buffers: tuple[int, ...], length: int, body: Callable[[list[Any], int], None]) -> None:
        self.buffers, self.length, self.body = buffers, length, body

    def bind(self, context: Context) -> Callable[[int], None]:
        arrays = [context.memory.window(context.addresses[b], 0, (self.length,), (8,), INT) for b in self.buffers]
        return lambda i: self.body(arrays, i)


class Warns:
    def bind(self, context: Context) -> Callable[[int], None]:
        return lambda i: context.warn("RuntimeWarning", "divide by zero", "script.py:7")


class Answers:
    def bind(self, context: Context) -> Callable[[int], None]:
        return lambda i: context.answer(bytes([i]) * (i * 10_000))


def stored(pool: Pool, length: int) -> tuple[Extent, Buffer, Any]:
    """Return an extent of int64, its buffer, and an array over it, of zeros."""
    extent = pool.allocate(8 * length)
    address = Address(ARENA, extent.offset)
    array = pool.memory.window(address, 0, (length,), (8,), INT)
    array[...] = 0
    return extent, Buffer(8 * length, address), array


def fill(arrays: list[Any], i: int) -> None:
    arrays[0][i] = 3 * i


def double(arrays: list[Any], i: int) -> None:
    arrays[1][i] = 2 * arrays[0][i]


def count(arrays: list[Any], i: int) -> None:
    arrays[0][i] += 1


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, memory_limit="64 MiB") as made:
        yield made


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _leaves_nothing(pool: Pool) -> Iterator[None]:
    yield
    pool.check()


def one_layer(buffer: Buffer, body: Callable[[list[Any], int], None], ntasks: int, **more: Any) -> Plan:
    kernel = Over((0,), buffer.nbytes // 8, body)
    return Plan(buffers=(buffer,), layers=(Layer(name="layer", kernel=kernel, ntasks=ntasks, writes=(0,), **more),))


def test_every_task_runs_once(pool: Pool, executor: str) -> None:
    _extent, buffer, array = stored(pool, 1000)
    pool.run(one_layer(buffer, count, 1000), executor)
    assert (array == 1).all()


def test_layers_see_what_earlier_ones_wrote(pool: Pool, executor: str) -> None:
    _extent, buffer, array = stored(pool, 500)
    same = (Dependency(0, lambda a, b: (a, b)),)

    def reverse(arrays: list[Any], i: int) -> None:
        arrays[1][i] = arrays[0][499 - i]

    plan = Plan(
        buffers=(Buffer(4000), Buffer(4000), buffer),
        layers=(
            Layer(name="fill", kernel=Over((0,), 500, fill), ntasks=500, writes=(0,)),
            Layer(name="double", kernel=Over((0, 1), 500, double), ntasks=500, reads=(0,), writes=(1,), dependencies=same),
            Layer(
                name="reverse",
                kernel=Over((1, 2), 500, reverse),
                ntasks=500,
                reads=(1,),
                writes=(2,),
                dependencies=(Dependency(1),),
            ),
        ),
    )
    plan.check()
    for _ in range(3):
        array[...] = -1
        pool.run(plan, executor)
        assert (array == 6 * np.arange(500)[::-1]).all()
    assert pool.statistics().temporary_nbytes == 0


def test_answers_arrive_once_whatever_their_length(pool: Pool, executor: str) -> None:
    plan = Plan(buffers=(), layers=(Layer(name="layer", kernel=Answers(), ntasks=20),))
    for _ in range(2):  # nothing of the first run is told again
        report = pool.run(plan, executor)
        assert sorted(report.answers) == [bytes([i]) * (i * 10_000) for i in range(20)]
        assert report.busy_s > 0


def test_driver_layers_run_in_this_process(pool: Pool, executor: str) -> None:
    _extent, buffer, array = stored(pool, 20)

    def pid(arrays: list[Any], i: int) -> None:
        arrays[0][i] = os.getpid()

    def after(arrays: list[Any], i: int) -> None:
        arrays[0][10 + i] = arrays[0][i] + 1

    plan = Plan(
        buffers=(buffer,),
        layers=(
            Layer(name="read", kernel=Over((0,), 20, pid), ntasks=10, writes=(0,), place="driver"),
            Layer(name="work", kernel=Over((0,), 20, after), ntasks=10, writes=(0,), dependencies=(Dependency(0),)),
        ),
    )
    pool.run(plan, executor)
    assert (array[:10] == os.getpid()).all() and (array[10:] == os.getpid() + 1).all()


def test_the_drivers_private_memory_is_reached(pool: Pool, executor: str) -> None:
    source = np.arange(100, dtype=np.int64)
    target = np.zeros(100, np.int64)

    class Copy:
        def bind(self, context: Context) -> Callable[[int], None]:
            windows = [context.memory.window(context.addresses[b], 0, (100,), (8,), INT) for b in (0, 1)]

            def task(i: int) -> None:
                box = (slice(10 * i, 10 * i + 10),)
                piece = windows[0][box]
                piece = piece if isinstance(piece, np.ndarray) else piece.read()
                if isinstance(windows[1], np.ndarray):
                    windows[1][box] = piece
                else:
                    windows[1][box].write(piece)

            return task

    buffers = (Buffer(800, Address(DRIVER, source.ctypes.data)), Buffer(800, Address(DRIVER, target.ctypes.data)))
    layer = Layer(name="copy", kernel=Copy(), ntasks=10, reads=(0,), writes=(1,))
    pool.run(Plan(buffers=buffers, layers=(layer,), keep=(source, target)), executor)
    assert (target == source).all()


class CountsBinds:
    """Adds one to the first buffer's first item at each bind, and i to its second for task i."""

    def bind(self, context: Context) -> Callable[[int], None]:
        array: Any = context.memory.window(context.addresses[0], 0, (2,), (8,), INT)
        array[0] += 1

        def add(i: int) -> None:
            array[1] += i

        return add


def test_layers_that_call_one_kernel_on_the_same_bytes_are_bound_once_and_run_each() -> None:
    with Pool(1, memory_limit="64 MiB") as pool:
        _one, first, ones = stored(pool, 2)
        _two, second, twos = stored(pool, 2)
        layers = tuple(
            Layer(
                name=f"step {n}",
                kernel=CountsBinds(),
                ntasks=3,
                writes=(n % 2,),
                names=((0, n % 2),),
                dependencies=(Dependency(n - 1, None),) if n else (),
            )
            for n in range(6)
        )
        for runs in (1, 2):  # another run binds anew: its bytes may be others
            pool.run(Plan(buffers=(first, second), layers=layers), "processes")
            assert (ones.tolist(), twos.tolist()) == ([runs, 9 * runs], [runs, 9 * runs])


def test_kernel_warnings_are_reported_once(pool: Pool, executor: str) -> None:
    report = pool.run(Plan(buffers=(), layers=(Layer(name="warns", kernel=Warns(), ntasks=50),)), executor)
    assert list(report.warnings) == [("RuntimeWarning", "divide by zero", "script.py:7")]


def test_python_warnings_of_tasks_come_to_the_driver(pool: Pool, executor: str) -> None:
    _extent, buffer, _array = stored(pool, 4)

    class Strange(UserWarning):
        pass

    def warn(arrays: list[Any], i: int) -> None:
        warnings.warn("careful", Strange, stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = pool.run(one_layer(buffer, warn, 4), executor)
    told = {(c, m) for c, m, _ in report.warnings} | {("UserWarning", str(w.message)) for w in caught}
    assert told == {("UserWarning", "careful")}


# ------------------------------------------------------------------------------------------------------- errors


class TwoArguments(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class BadReduce(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("no")


class BadRepr(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


def unpicklable() -> Exception:
    return ValueError(threading.Lock())


def caused() -> Exception:
    error, cause = ValueError("outer"), KeyError("inner")
    error.__cause__ = cause
    cause.__cause__ = error
    return error


CASES: dict[str, tuple[Callable[[], BaseException], type[BaseException] | None]] = {
    "plain": (lambda: ValueError("plain"), ValueError),
    "arithmetic": (lambda: ZeroDivisionError("division by zero"), ZeroDivisionError),
    "group": (lambda: ExceptionGroup("several", [ValueError("a"), KeyError("b")]), ExceptionGroup),
    "recursive cause": (caused, ValueError),
    "huge": (lambda: ValueError("x" * 3_000_000), ValueError),
    "memory": (lambda: MemoryError("much"), MemoryError),
    "two arguments": (lambda: TwoArguments(1, 2), None),
    "unpicklable": (unpicklable, None),
    "bad reduce": (lambda: BadReduce("x"), None),
    "bad repr": (lambda: BadRepr("x"), None),
    "exit": (lambda: SystemExit(3), TaskError),
    "generator exit": (lambda: GeneratorExit(), TaskError),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_come_back_with_task_and_line(pool: Pool, executor: str, case: str) -> None:
    make, expected = CASES[case]
    _extent, buffer, array = stored(pool, 10)

    def fail(arrays: list[Any], i: int) -> None:
        if i == 5:
            raise make()
        arrays[0][i] = 1

    plan = one_layer(buffer, fail, 10, describe=lambda i: f"chunk ({i},)", line="script.py:42")
    outcome = Outcome()
    with pytest.raises(BaseException) as caught:  # SystemExit must not come out either
        pool.run(plan, executor, outcome)
    error = caught.value
    if expected is not None:
        assert type(error) is expected
    elif executor == "processes":
        assert type(error) in (TaskError, BadRepr)
    assert not isinstance(error, SystemExit)
    notes = "\n".join(error.__notes__)
    assert "chunk (5,)" in notes and "script.py:42" in notes and "'layer'" in notes
    if executor == "processes":
        assert "in fail" in notes or case == "bad repr"
    assert outcome.progress is not None and (0, 5, 6) in outcome.progress.unfinished
    array[...] = 0
    pool.run(one_layer(buffer, count, 10), executor)  # usable at once
    assert (array == 1).all()


def test_a_bind_that_fails_is_an_error_like_others(pool: Pool, executor: str) -> None:
    class Broken:
        def bind(self, context: Context) -> Callable[[int], None]:
            raise KeyError("bind")

    for _ in range(2):
        with pytest.raises(KeyError, match="bind"):
            pool.run(Plan(buffers=(), layers=(Layer(name="broken", kernel=Broken(), ntasks=4),)), executor)


def test_a_failing_plan_gives_back_temporaries_and_locks(pool: Pool, executor: str) -> None:
    def fail(arrays: list[Any], i: int) -> None:
        raise ValueError("no")

    plan = Plan(
        buffers=(Buffer(8000),),
        layers=(Layer(name="fails", kernel=Over((0,), 1000, fail), ntasks=8, writes=(0,)),),
        locks=(LockRequest(1, 0, 10, "w"),),
    )
    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            pool.run(plan, executor)
    pool.locks.acquire((LockRequest(1, 0, 10, "w"),), timeout=0).release()
    assert pool.statistics().temporary_nbytes == 0


def test_a_layer_that_cannot_be_opened_fails_the_plan(pool: Pool, executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Pool, nbytes: int) -> Extent:
        raise SharedMemoryError("needs much; little is free")

    monkeypatch.setattr(Pool, "allocate_temporary", full)
    plan = Plan(buffers=(Buffer(800),), layers=(Layer(name="fill", kernel=Over((0,), 100, fill), ntasks=100, writes=(0,)),))
    with pytest.raises(SharedMemoryError, match="needs much"):
        pool.run(plan, executor)


def test_a_run_inside_a_task_is_done_inline(pool: Pool, executor: str) -> None:
    _extent, buffer, array = stored(pool, 6)

    def nested(arrays: list[Any], i: int) -> None:
        inner = default_pool()
        _extent, buffer, array = stored(inner, 5)
        inner.run(one_layer(buffer, count, 5, nbytes_per_task=8))
        arrays[0][i] = array.sum()

    with contextlib.ExitStack() as stack:
        if executor != "processes":  # there it is another process, and has its own
            stack.enter_context(Pool(0, memory_limit="8 MiB"))
        pool.run(one_layer(buffer, nested, 6), executor)
    assert (array == 5).all()


def test_threads_share_a_pool_and_one_failure_stays_alone(pool: Pool, executor: str) -> None:
    problems: list[str] = []

    def work(number: int) -> None:
        _extent, buffer, array = stored(pool, 200)

        def body(arrays: list[Any], i: int) -> None:
            if number == 3 and i == 150:
                raise ValueError("mine")
            arrays[0][i] += i * number

        for _ in range(5):
            array[...] = 0
            try:
                pool.run(one_layer(buffer, body, 200), executor)
                if number == 3 or not (array == number * np.arange(200)).all():
                    problems.append(f"{number} is wrong")
            except ValueError:
                if number != 3:
                    problems.append(f"{number} failed")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


# --------------------------------------------------------------------------------------------- budget and choice


def test_a_plan_that_cannot_fit_is_refused_before_anything_runs(pool: Pool, executor: str) -> None:
    ran: list[int] = []

    class Ran:
        def bind(self, context: Context) -> Callable[[int], None]:
            return ran.append

    layers = (
        Layer(name="small", kernel=Ran(), ntasks=1, writes=(0,)),
        Layer(name="greedy", kernel=Ran(), ntasks=1, writes=(1,), line="script.py:9"),
    )
    with pytest.raises(MemoryBudgetError) as caught:
        pool.run(Plan(buffers=(Buffer(8), Buffer(100 << 20)), layers=layers), executor)
    for part in ("'greedy'", "script.py:9", "100 MiB", "64 MiB", "memory_limit"):
        assert part in str(caught.value)
    assert ran == []


def test_plans_that_do_not_fit_together_wait_for_each_other(pool: Pool, executor: str) -> None:
    plan = Plan(buffers=(Buffer(40 << 20),), layers=(Layer(name="fill", kernel=Over((0,), 10, fill), ntasks=10, writes=(0,)),))
    done: list[int] = []

    def work(number: int) -> None:
        for _ in range(3):
            pool.run(plan, executor)
        done.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2]


def test_temporaries_count_as_they_were_rounded(pool: Pool, executor: str) -> None:
    other = pool.allocate_temporary((33 << 20) + 1)  # 34 MiB are taken: none of them is stored
    try:
        plan = Plan(buffers=(Buffer(64 << 20),), layers=(Layer(name="fill", kernel=Over((0,), 10, fill), ntasks=10, writes=(0,)),))
        pool.run(plan, executor)
    finally:
        pool.free_temporary(other)


def test_an_allocation_beyond_the_budget_says_what_is_in_use() -> None:
    with Pool(0, memory_limit="64 MiB", spill_directory="off") as pool:
        with pytest.raises(MemoryBudgetError, match=r"100 MiB.*64 MiB"):
            pool.allocate(100 << 20)
        pieces = [pool.allocate(16 << 20) for _ in range(3)]
        with pytest.raises(MemoryBudgetError, match="48 MiB"):
            pool.allocate(20 << 20)
        pieces.clear()
        pool.allocate(20 << 20)


def test_scratch_counts(pool: Pool) -> None:
    layers = (Layer(name="map", kernel=Warns(), ntasks=1),)
    with pytest.raises(MemoryBudgetError, match="scratch for 2 workers"):
        pool.run(Plan(buffers=(), layers=layers, scratch_nbytes=40 << 20), "synchronous")


class Where:
    def bind(self, context: Context) -> Callable[[int], None]:
        return lambda i: context.warn("UserWarning", f"{os.getpid()} {threading.get_ident()}")


def where(pool: Pool, **more: Any) -> str:
    nbytes = more.pop("nbytes_per_task", 0)
    layer = Layer(name="where", kernel=Where(), ntasks=1, nbytes_per_task=nbytes)
    pid, thread = pool.run(Plan(buffers=(), layers=(layer,), **more)).warnings[0][1].split()
    if int(pid) != os.getpid():
        return "processes"
    return "synchronous" if int(thread) == threading.get_ident() else "threads"


def test_tiny_work_runs_here_and_user_functions_never_do(pool: Pool) -> None:
    assert where(pool, nbytes_per_task=1000) == "synchronous"
    assert where(pool, nbytes_per_task=1000, isolated=True) == "processes"
    assert where(pool, nbytes_per_task=100 << 20) == "processes"
    assert where(pool) == "processes"  # unknown cost


def test_a_pool_without_workers_runs_here() -> None:
    with Pool(0, memory_limit="8 MiB") as empty:
        assert where(empty, isolated=True) == "synchronous"
        assert empty.statistics().starts == 0


def test_without_process_support_threads_are_used_and_it_is_said_once(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scheduler_run, "can_start_workers", lambda: False)
    monkeypatch.setattr(scheduler_run, "_said", set())
    with caplog.at_level(logging.WARNING, "shmarray"):
        assert where(pool) == where(pool) == "threads"
    assert len(caplog.records) == 1


def test_an_unknown_executor_is_refused_with_the_known_ones(pool: Pool) -> None:
    with pytest.raises(ValueError, match=r"'quantum'.*'processes', 'synchronous', 'threads'"):
        pool.run(Plan(buffers=(), layers=()), "quantum")


def test_an_empty_plan_is_done(pool: Pool, executor: str) -> None:
    assert pool.run(Plan(buffers=(), layers=()), executor).warnings == ()


# -------------------------------------------------------------------------------------------------------- locks


def test_locks_are_held_for_the_run_and_reused_by_the_holder(pool: Pool, executor: str) -> None:
    _extent, buffer, _array = stored(pool, 10)
    wanted = (LockRequest(5, 0, 3, "w"),)
    plan = Plan(buffers=(buffer,), layers=(Layer(name="count", kernel=Over((0,), 10, count), ntasks=10, writes=(0,)),), locks=wanted)
    with pool.locks.acquire(wanted):
        pool.run(plan, executor)
        assert pool.locks.held_by_caller(5, 0, 3) == "w"
    with pool.locks.acquire((LockRequest(5, 0, 3, "r"),)), pytest.raises(LockError):
        pool.run(plan, executor)
    pool.locks.acquire(wanted, timeout=0).release()


# --------------------------------------------------------------------------------------------------------- life


def test_a_closed_pool_says_so() -> None:
    made = Pool(2, memory_limit="8 MiB")
    made.close()
    made.close()
    with pytest.raises(PoolClosed, match="closed"):
        made.run(Plan(buffers=(), layers=()))
    with pytest.raises(PoolClosed, match="closed"):
        made.allocate(8)


def test_the_innermost_entered_pool_is_the_default() -> None:
    with Pool(0, memory_limit="8 MiB") as outer:
        assert default_pool() is outer
        with Pool(0, memory_limit="8 MiB") as inner:
            assert default_pool() is inner
        assert default_pool() is outer
        assert inner.closed


def test_the_default_pool_is_made_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_run, "_default", None)
    monkeypatch.setattr(scheduler_run, "_default_values", {})
    token = scheduler_run._entered.set(())
    try:
        configure_default(workers=3, memory_limit="16 MiB")
        made = default_pool()
        assert made is default_pool()
        assert made.workers == 3 and made.budget.limit_nbytes == 16 << 20
        made.close()
        again = default_pool()
        assert again is not made
        again.close()
    finally:
        scheduler_run._entered.reset(token)
