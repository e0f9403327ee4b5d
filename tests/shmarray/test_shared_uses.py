"""Shared arrays as programs with processes of their own use them: at full counts, beside other libraries, under SIGKILL.

Promises: what is counted is exact; a kill loses what it interrupted and nothing else, and says so; nothing is left behind.
Never put here: what one call does (`test_shared`), programs of tutorials (`test_tutorial_programs`).
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scheduler.shared import ROOT as FAMILY
from shmarray import shared

pytestmark = pytest.mark.timeout(180)

LONG_S = 90.0
HERE = Path(__file__).parents[2]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    gc.collect()
    before = shared.report()["arrays"]
    yield
    gc.collect()
    wait_until(lambda: shared.report()["arrays"] <= before)  # a pool's worker lets go of its arguments after it has answered
    shared.family().check()


def wait_until(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LONG_S
    while not is_so():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.005)


def run_all(processes: list[Any]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join(LONG_S)
    assert [process.exitcode for process in processes] == [0] * len(processes)


# --- exact ------------------------------------------------------------------------------------------------------------------------


def increment_chunks(a: Any, n: int, seed: int) -> None:
    for i, j in np.random.default_rng(seed).integers(0, (4, 2), (n, 2)).tolist():
        with a.lock((i, j)) as chunk:
            chunk += 1


def test_eight_processes_increment_random_chunks_exactly() -> None:
    a = shared.zeros((40, 60), "i8", chunks=(10, 30))

    run_all([FORK.Process(target=increment_chunks, args=(a, 1000, seed)) for seed in range(8)])

    expected = np.zeros((4, 2), "i8")
    for seed in range(8):
        np.add.at(expected, tuple(np.random.default_rng(seed).integers(0, (4, 2), (1000, 2)).T), 1)
    np.testing.assert_array_equal(a, expected.repeat(10, axis=0).repeat(30, axis=1))


def add_ones(v: Any, n: int) -> None:
    for _ in range(n):
        v.add(1)


def test_four_processes_add_a_hundred_thousand_each_exactly() -> None:
    v = shared.Value("q")

    run_all([FORK.Process(target=add_ones, args=(v, 100_000)) for _ in range(4)])

    assert v.value == 400_000


# --- beside other libraries -------------------------------------------------------------------------------------------------------


def write_row(a: np.ndarray, i: int) -> float:
    a[i] = i
    return float(a[i].sum())


def test_joblib_workers_write_into_the_array_itself() -> None:
    """Larger than what joblib would map from a file, read-only."""
    joblib = pytest.importorskip("joblib")
    executors = pytest.importorskip("joblib.externals.loky")
    a = shared.full((8, 1 << 18), -1.0)

    found = joblib.Parallel(n_jobs=2)(joblib.delayed(write_row)(a, i) for i in range(8))

    assert found == [float(i << 18) for i in range(8)]
    np.testing.assert_array_equal(a, np.arange(8.0)[:, None].repeat(1 << 18, axis=1))
    executors.get_reusable_executor().shutdown(wait=True)


FUNCTIONS: list[Callable[[Any], Any]] = [
    np.linalg.inv,
    np.linalg.eigvals,
    np.fft.rfft2,
    np.cov,
    np.argsort,
    np.unique,
    np.diff,
    np.tril,
    lambda x: np.median(x, axis=1),
    lambda x: np.einsum("ij,kj->ik", x, x),
    lambda x: np.histogram(x, 5)[0],
    lambda x: np.percentile(x, [5, 95]),
    lambda x: np.interp(x[0], np.sort(x[1]), x[2]),
    lambda x: np.random.default_rng(1).permutation(x),
    lambda x: np.apply_along_axis(np.cumsum, 0, x),
    lambda x: np.vstack([x, x]),
    lambda x: np.pad(x, 2),
    np.zeros_like,
    np.gradient,
    np.nan_to_num,
    lambda x: x.argsort(axis=0),
    lambda x: x.take([1, 2], axis=0),
    lambda x: x.repeat(2),
    lambda x: np.roll(x, 1),
    lambda x: np.tile(x, 2),
]
IN_PLACE: list[Callable[[Any], Any]] = [
    lambda x: np.random.default_rng(1).shuffle(x),
    lambda x: x.sort(axis=1),
    lambda x: np.put(x, [3], 7),
    lambda x: np.fill_diagonal(x, 1),
    lambda x: np.add.at(x, ([0, 0], [1, 1]), 1),
    lambda x: np.random.default_rng(1).random(out=x),
]


def test_numpy_takes_it_as_its_own() -> None:
    values = np.random.default_rng(5).random((20, 20))
    a = shared.array(values)

    for f in FUNCTIONS:
        found = f(a)
        np.testing.assert_array_equal(found, f(values))
        assert all(type(part) is np.ndarray for part in (found if isinstance(found, tuple) else (found,))), "memory of its own"
    for f in IN_PLACE:
        f(a)
        f(values)
        np.testing.assert_array_equal(a, values)
    windows = np.lib.stride_tricks.sliding_window_view
    np.testing.assert_array_equal(windows(a, 3, axis=0), windows(values, 3, axis=0))
    np.testing.assert_array_equal(np.from_dlpack(a), values)


def test_pandas_scipy_matplotlib_and_scikit_learn_take_it() -> None:
    values = np.random.default_rng(6).random((30, 3))
    a = shared.array(values)

    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(a, columns=["x", "y", "z"], copy=False)
    assert np.shares_memory(frame.to_numpy(), a)
    pandas.testing.assert_frame_equal(
        frame.groupby(a[:, 0] > 0.5).mean(), pandas.DataFrame(values, columns=["x", "y", "z"]).groupby(values[:, 0] > 0.5).mean()
    )
    pandas.testing.assert_frame_equal(pickle.loads(pickle.dumps(frame)), frame)

    linalg, stats, sparse = (pytest.importorskip(f"scipy.{name}") for name in ("linalg", "stats", "sparse"))
    np.testing.assert_array_equal(linalg.svdvals(a), linalg.svdvals(values))
    assert stats.pearsonr(a[:, 0], a[:, 1]).statistic == stats.pearsonr(values[:, 0], values[:, 1]).statistic
    np.testing.assert_array_equal((sparse.eye(30) @ a), values)

    linear = pytest.importorskip("sklearn.linear_model")
    model = linear.SGDClassifier(random_state=0).partial_fit(a, a[:, 0] > 0.5, classes=[False, True])
    np.testing.assert_array_equal(
        model.coef_, linear.SGDClassifier(random_state=0).partial_fit(values, values[:, 0] > 0.5, classes=[False, True]).coef_
    )

    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.add_subplot()
    axes.plot(a[:, 0], a[:, 1])
    axes.imshow(a)
    figure.savefig(io.BytesIO())


# --- killed -----------------------------------------------------------------------------------------------------------------------


def count_until_killed(a: Any, done: Any, told: Any, row: int) -> None:
    """Increment chunks under their locks for ever, and count in ``done`` what is finished."""
    rng = np.random.default_rng()
    while True:
        i = int(rng.integers(len(a)))
        try:
            with a.lock((i, 0)) as chunk:
                chunk += 1
                done[row, i] += 1
        except shared.AbandonedLockError:
            told.add(1)


def test_a_kill_costs_at_most_the_increment_it_interrupts_and_blocks_nobody() -> None:
    kills, workers = 40, 3
    a = shared.zeros((2, 50_000), "i8", chunks=(1, 50_000))
    done, told = shared.zeros((kills + workers, 2), "i8"), shared.Value("q")
    rng = random.Random(0)

    def start(row: int) -> Any:
        process = FORK.Process(target=count_until_killed, args=(a, done, told, row))
        process.start()
        return process

    running = [start(row) for row in range(workers)]
    for kill in range(kills + workers):
        target = int(done.sum()) + rng.randrange(1, 20)
        wait_until(lambda target=target: done.sum() >= target)  # the survivors go on
        victim = running.pop(0)
        victim.kill()
        victim.join(LONG_S)
        if kill < kills:
            running.append(start(workers + kill))
        elif len(running) == 0:
            break

    for i in range(2):
        lock = a.lock((i, 0))
        try:
            assert lock.acquire(timeout=LONG_S)
        except shared.AbandonedLockError:
            told.add(1)
            assert lock.acquire(timeout=LONG_S)
        lock.release()
    surplus = a - done.sum(axis=0)[:, None]  # of each element: increments that were interrupted after it
    assert surplus.min() >= 0, "what was counted is there"
    assert 0 < told.value <= kills + workers
    assert surplus.max(axis=1).sum() <= kills + workers


# With pipes: the semaphores of a multiprocessing.Queue have names, which nobody removes when all are killed.
KILLED = """
import multiprocessing, os, sys
from multiprocessing.connection import wait
from shmarray import shared

def work(a, connection, i):
    while True:
        with a.lock((i % 4, 0)) as chunk:
            chunk += 1
        connection.send(shared.full(50_000, i))
        i += 1

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    a = shared.zeros((4, 200_000), chunks=(1, 200_000))
    pipes = [context.Pipe(duplex=False) for _ in range(3)]
    processes = [context.Process(target=work, args=(a, there, i)) for i, (_, there) in enumerate(pipes)]
    for p in processes:
        p.start()
    readers = [here for here, _ in pipes]
    for n in range(10**9):
        for reader in wait(readers):
            reader.recv().sum()
        if n == 10:
            print(os.getpid(), *(p.pid for p in processes), flush=True)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_all_processes_of_a_program_killed_at_once_leave_nothing(tmp_path: Path, method: str) -> None:
    """In the middle of updates under locks, with arrays on their way in a queue."""
    (tmp_path / "killed.py").write_text(KILLED)
    environment = {name: value for name, value in os.environ.items() if name != FAMILY}
    program = subprocess.Popen(
        [sys.executable, str(tmp_path / "killed.py"), method],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONPATH": str(HERE)},
        start_new_session=True,
    )
    assert program.stdout is not None
    pids = [int(pid) for pid in program.stdout.readline().split()]
    assert len(pids) == 4
    files = {os.readlink(f"/proc/{pids[0]}/fd/{fd}") for fd in os.listdir(f"/proc/{pids[0]}/fd")}
    assert any("memfd:shmarray" in name for name in files) and not any("shmarray" in name for name in os.listdir("/dev/shm"))

    os.killpg(program.pid, signal.SIGKILL)
    program.communicate(timeout=LONG_S)

    wait_until(lambda: not any(is_there(pid) for pid in pids))


def is_there(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
