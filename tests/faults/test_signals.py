"""Signals, threads, forks and runs within runs, in the middle of whatever the library does: the program goes on as if it were alone.

A Ctrl-C at any instant of the scheduler's own code has its tests in tests/scheduler/test_pool.py, as have several threads of which
one fails and one loses a worker.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Outcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

CTRL_C = """
import contextlib, random
rng = random.Random({seed})
values = rng_values = np.random.default_rng(0).random(1_000_000)
ones = np.ones(1_000_000)

def compute(pool):
    return sa.compute((sa.asarray(values) * 2 + 1).sum(), sa.asarray(values) + 1)

def persist(pool):
    return sa.cumsum(sa.asarray(values)).persist()

def update(pool):
    x = sa.array(values, chunks=100_000)
    try:
        x += ones
    except KeyboardInterrupt:
        check(x)
        raise

def pipeline(pool):
    found = []
    try:
        sa.pipeline(range(12), lambda k: values[:30_000] * k, sa.expression(lambda x: x + 1), sa.ordered(lambda x: x[0]), found.append)
    finally:
        assert found == [values[0] * k + 1 for k in range(len(found))], "frames out of order"
    assert len(found) == 12

def stream(pool):
    for number, x in enumerate(sa.stream((values[:30_000] for _ in range(12)), lambda x: x + 1)):
        assert x[0] == values[0] + 1
    assert number == 11

def check(x):
    "Each chunk is old or new, or says that it is torn."
    while True:
        try:
            for start in range(0, 1_000_000, 100_000):
                with contextlib.suppress(sa.TornChunkError):
                    found = np.asarray(x[start : start + 100_000])
                    assert any(np.array_equal(found, values[start : start + 100_000] + k) for k in (0, 1)), "neither old nor new"
            return
        except KeyboardInterrupt:
            pass  # the second one

class Presser:
    "Presses Ctrl-C so many times, the first after a while, the others soon after it, in a thread: at any instant."
    def __init__(self, times, delay_s):
        self.times, self.delay_s, self.pressed, self.ended = times, delay_s, 0.0, threading.Event()
        self.thread = threading.Thread(target=self.press)
    def press(self):
        for number in range(self.times):
            if self.ended.wait(self.delay_s if not number else rng.random() * 0.02):
                return
            self.pressed = self.pressed or time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)

latencies, hits = [], 0
with sa.config.set(scheduler="processes"), sa.Pool(workers=2) as pool:
    operation = {operation}
    operation(pool)
    began = time.monotonic()
    for _ in range(3):
        operation(pool)
    usual = (time.monotonic() - began) / 3
    number = 0
    while number < 8 or hits < 4:
        number += 1
        presser = Presser({times}, rng.random() * usual)
        try:
            try:
                presser.thread.start()
                operation(pool)
                presser.ended.set()
                presser.thread.join()
            except KeyboardInterrupt:
                latencies.append(time.monotonic() - presser.pressed)
                hits += 1
                presser.ended.set()
                presser.thread.join()
        except KeyboardInterrupt:
            pass  # the second one, while the first was dealt with
        presser.ended.set()
        presser.thread.join()
        total = float(sa.asarray(values).sum().compute())
        assert total == float(sa.asarray(values).sum().compute()), "the next compute"
    wait_until(lambda: pool._reserved_nbytes() == 0, "the end of what was interrupted")
    pool.check()
del pool
print(round(max(latencies), 3))
check_nothing_left()
"""


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("operation", ["compute", "persist", "update", "pipeline", "stream"])
def test_ctrl_c_at_random_moments_of_what_a_user_does(script: Callable[..., Outcome], operation: str, times: int) -> None:
    out = script(CTRL_C.format(operation=operation, times=times, seed=len(operation) + times))
    latest_s = out.lines[-1]
    assert float(latest_s) < 5  # one second is the promise; the rest is for a machine that does something else
    print(f"Ctrl-C {times} x in {operation}: KeyboardInterrupt after {latest_s} s at most")


def test_ctrl_c_ends_tasks_that_never_end_by_themselves(script: Callable[..., Outcome]) -> None:
    out = script(
        """
        def endless(block):
            open("begun", "w").close()
            time.sleep(600)
        def press():
            wait_until(lambda: os.path.exists("begun"), "the first task")
            pressed.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)
        pressed = []
        with sa.Pool(workers=2) as pool:
            threading.Thread(target=press).start()
            try:
                sa.ones(4, chunks=2).map_blocks(endless, dtype=float).compute()
            except KeyboardInterrupt:
                print(round(time.monotonic() - pressed[0], 2))
            print(float(sa.ones(4, chunks=2).map_blocks(lambda b: b + 1).sum().compute()))
            wait_until(lambda: pool._reserved_nbytes() == 0, "the end of what was interrupted")
            pool.check()
        del pool
        check_nothing_left()
        """
    )
    assert out.lines[1:] == ["8.0"]
    assert float(out.lines[0]) < 5
    print(f"Ctrl-C in endless tasks: KeyboardInterrupt after {out.lines[0]} s")


def test_ctrl_c_ends_a_pipeline_whose_stages_source_or_sink_never_end(script: Callable[..., Outcome]) -> None:
    out = script(
        """
        def stage(k):
            open("begun", "w").close()
            time.sleep(600)
        def source():
            yield 0
            open("begun", "w").close()
            threading.Event().wait()
        def sink(_):
            open("begun", "w").close()
            threading.Event().wait()
        def press():
            wait_until(lambda: os.path.exists("begun"), "the beginning")
            os.unlink("begun")
            pressed.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)
        slow = lambda x: sa.ones(4, chunks=2).map_blocks(lambda b: stage(0), dtype=float)
        nothing = lambda k: None
        latencies = []
        with sa.Pool(workers=2) as pool:
            for each in ((range(9), stage, nothing), (range(9), sa.expression(slow), nothing), (source(), nothing), (range(9), sink)):
                pressed = []
                threading.Thread(target=press).start()
                try:
                    sa.pipeline(*each)
                except KeyboardInterrupt:
                    latencies.append(time.monotonic() - pressed[0])
                results = []
                sa.pipeline(range(9), lambda k: k + 1, results.append)
                assert results == list(range(1, 10))
            wait_until(lambda: pool._reserved_nbytes() == 0 and not pool.statistics().live_nbytes, "the end of what was interrupted")
            pool.check()
            print(len(latencies), round(max(latencies), 2))
        """
    )
    times, latest_s = out.lines[-1].split()
    assert times == "4"
    assert float(latest_s) < 5
    print(f"Ctrl-C in endless pipelines: KeyboardInterrupt after {latest_s} s at most")


def test_a_timer_that_fires_each_millisecond_changes_nothing(script: Callable[..., Outcome]) -> None:
    out = script(
        """
        fired = []
        values = np.random.default_rng(0).random(2_000_000)
        def work():
            x = sa.array(values)
            x += 1
            return x.cumsum().compute(), float((x * 2).std().compute()), np.asarray(x)
        with sa.config.set(scheduler="processes"), sa.Pool(workers=2) as pool:
            quiet = work()
            signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            for _ in range(5):
                for one, other in zip(quiet, work()):
                    assert np.array_equal(one, other)
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(len(fired) > 10)
        """
    )
    assert out.lines == ["True"]


def test_handlers_of_the_user_run_and_what_they_raise_comes_out(script: Callable[..., Outcome]) -> None:
    out = script(
        """
        class Stop(Exception):
            pass
        def handler(number, frame):
            seen.append(number)
            if number == signal.SIGUSR2:
                raise Stop
        seen = []
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, handler)
        def slow(block):
            open("begun", "w").close()
            wait_until(lambda: os.path.exists("go"), "the word to go")
            return block
        def send():
            wait_until(lambda: os.path.exists("begun"), "the first task")
            for number in (signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
                wait_until(lambda: number in seen, "the handler")
            open("go", "w").close()
        with sa.Pool(workers=2):
            threading.Thread(target=send).start()
            print(float(sa.ones(4, chunks=2).map_blocks(slow, dtype=float).sum().compute()))
            os.unlink("go"), os.unlink("begun")
            def stop():
                wait_until(lambda: os.path.exists("begun"), "the first task")
                os.kill(os.getpid(), signal.SIGUSR2)
            threading.Thread(target=stop).start()
            try:
                sa.ones(4, chunks=2).map_blocks(slow, dtype=float).compute()
            except Stop:
                print("stopped")
            print(float((sa.ones(4, chunks=2) + 1).map_blocks(lambda b: b).sum().compute()))
        """
    )
    assert out.lines == ["4.0", "stopped", "8.0"]


def test_a_run_within_a_run_within_a_run_is_done_where_it_is(script: Callable[..., Outcome]) -> None:
    out = script(
        """
        def third(block):
            return block + os.getpid() * 0 + float(sa.ones(300_000).sum().compute())
        def second(block):
            return block + sa.ones(4, chunks=2).map_blocks(third, dtype=float).sum().compute()
        def first(block, block_id):
            open(f"begun-{block_id[0]}", "w").close()
            wait_until(lambda: all(os.path.exists(f"begun-{k}") for k in range(2)), "all workers at work")
            return block + sa.ones(2).map_blocks(second, dtype=float).sum().compute()
        with sa.Pool(workers=2) as pool:
            found = sa.zeros(2, chunks=1).map_blocks(first, dtype=float).compute()
            print(found.tolist(), pool.statistics().starts)
        del pool
        check_nothing_left()
        """
    )
    inner = 4 * 300_001.0  # of `second` per block
    assert out.lines == [f"{[2 * (1 + inner)] * 2} 2"]


FORKS = {
    "os.fork": """
def in_child(child):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = child()
        finally:
            os._exit(code)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
""",
    "multiprocessing": """
import multiprocessing
def in_child(child):
    def run():
        os._exit(child())
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    def wait():
        process.join()
        return process.exitcode
    return wait
""",
}


@pytest.mark.parametrize("how", FORKS)
def test_a_child_forked_in_the_middle_of_a_compute_has_values_of_its_own(script: Callable[..., Outcome], how: str) -> None:
    out = script(
        "import warnings\nwarnings.filterwarnings('ignore', '.*fork', DeprecationWarning)\n"
        + FORKS[how]
        + """
values = np.random.default_rng(0).random(600_000)
from_parent, to_child = os.pipe()
from_child, to_parent = os.pipe()

def slow(block):
    open("begun", "w").close()
    wait_until(lambda: os.path.exists("go"), "the word to go")
    return block + 1

def child():
    if not np.array_equal(np.asarray(x), values):
        return 3
    x[...] = 9.0  # nobody else's
    if float((x + 1).sum().compute(scheduler="processes")) != 10.0 * len(values):
        return 4
    os.write(to_parent, b"x")
    os.read(from_parent, 1)  # by now the parent has written both
    if not (np.asarray(x) == 9.0).all():
        return 5
    return 7 if np.array_equal(computed, values + 2) else 6

sa.config.set(workers=2)
x = sa.array(values)
y = sa.array(values, chunks=100_000)
computed = (y + 2).compute(scheduler="processes")
results = []
thread = threading.Thread(target=lambda: results.append(y.map_blocks(slow, dtype=float).compute()))
thread.start()
wait_until(lambda: os.path.exists("begun"), "the first task")
wait = in_child(child)
os.read(from_child, 1)
with sa.config.set(scheduler="synchronous"):  # the workers are busy
    x += 1
computed[...] = 0
os.write(to_child, b"x")
print(wait())
open("go", "w").close()
thread.join()
print(np.array_equal(results[0], values + 1), np.array_equal(np.asarray(x), values + 1))
print(float((y * 0 + 1).sum().compute(scheduler="processes")))
""",
        "-W",
        "error",
    )
    assert out.lines == ["7", "True True", "600000.0"]


@pytest.mark.parametrize("how", FORKS)
def test_a_child_forked_in_a_task_is_nobody_s_worker(script: Callable[..., Outcome], how: str) -> None:
    out = script(
        FORKS[how]
        + """
def forks(block):
    return block + in_child(lambda: 7)()
with sa.Pool(workers=2) as pool:
    x = sa.array(np.ones(400), chunks=100)
    print(x.map_blocks(forks, dtype=float).compute().sum(), float(x.sum()), pool.statistics().starts)
del pool, x
check_nothing_left()
""",
        "-W",
        "error",
    )
    assert out.lines == ["3200.0 400.0 2"]
