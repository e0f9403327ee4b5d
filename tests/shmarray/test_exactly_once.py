"""Updates in place that are cut short, by SIGKILL, exceptions and Ctrl-C: the array ends bit-identical to the undisturbed run."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

import shmarray as sa

UPDATES: dict[str, Callable[[sa.Array, sa.Array], None]] = {
    "all": lambda x, y: np.add(x, y, out=x),
    "chain": lambda x, y: x.__setitem__(..., x * 1.25 + np.sqrt(y) - 0.5 * x * y),
    "steps": lambda x, y: x.__setitem__((slice(1, None, 2), slice(3, -5)), x[1::2, 3:-5] * y[1::2, 3:-5] + 1),
    "flipped": lambda x, y: x[::-1, ::-1].__setitem__(..., x[::-1, ::-1] * 0.75 + y),
    "transposed": lambda x, y: x.T.__setitem__(..., x.T - y.T),
    "broadcast": lambda x, y: x.__imul__(y[:1]),
}


class Killer:
    """Kills a random worker at a random moment of what runs inside ``with``."""

    def __init__(self, pool: sa.Pool, seed: int) -> None:
        self.pool = pool
        self.rng = random.Random(seed)
        self.killed = 0

    def __enter__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._kill, args=(self.rng.uniform(0, 0.01), self.rng.random()))
        self._thread.start()

    def _kill(self, delay_s: float, which: float) -> None:
        pids = self.pool.statistics().pids
        if pids and not self._ended.wait(delay_s):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[int(which * len(pids))], signal.SIGKILL)
                self.killed += 1

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.parametrize("engine", ["numpy", "llvm"])
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_is_applied_exactly_once_under_sigkill(name: str, engine: str) -> None:
    if engine == "llvm":
        pytest.importorskip("llvmlite")
    update = UPDATES[name]
    rng = np.random.default_rng(3)
    start, other = rng.random((1111, 1003)), rng.random((1111, 1003))
    with sa.config.set(engine=engine), sa.Pool(workers=2) as pool:
        y = sa.array(other)
        expected, x = sa.array(start), sa.array(start)
        for _ in range(10):
            update(expected, y)
        killer = Killer(pool, 11)
        while killer.killed < 6:
            x = sa.array(start)
            for _ in range(10):
                with killer:
                    update(x, y)
            np.testing.assert_array_equal(np.asarray(x), np.asarray(expected))
        pool.check()


def test_who_holds_the_lock_of_a_chunk_never_sees_it_half_done() -> None:
    n = 600
    with sa.Pool(workers=2) as pool:
        x = sa.zeros((n, 1000), chunks=(100, 1000)).persist()
        alias = x[:]
        seen: list[float] = []
        ended = threading.Event()

        def look() -> None:
            while not ended.is_set():
                with alias.lock((len(seen) % 6, 0), "r") as chunk:
                    low, high = chunk.min(), chunk.max()
                    assert low == high
                    seen.append(low)

        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            reading = reader.submit(look)
            killer = Killer(pool, 3)
            try:
                for _ in range(40):
                    with killer:
                        x += 1
            finally:
                ended.set()
            reading.result()
        assert (np.asarray(x) == 40).all()
        assert killer.killed and len(set(seen)) > 2


def divided(executor: str) -> tuple[sa.Array, sa.Array, np.ndarray, np.ndarray]:
    """Return a stored array, divisors of which one is 0, and the array before and after."""
    a = np.arange(1.0, 700_001.0).reshape(700, 1000)
    b = np.full((700, 1000), 8.0)
    b[333, 444] = 0.0
    with np.errstate(divide="ignore"):
        return sa.array(a, chunks=(100, 1000)), sa.array(b), a, a / b


@pytest.mark.parametrize("executor", ["synchronous", "threads", "processes"])
def test_an_exception_in_an_update_says_what_is_done_and_the_rest_can_be_done(executor: str) -> None:
    with sa.Pool(workers=2), sa.config.set(scheduler=executor):
        x, y, before, after = divided(executor)
        with pytest.raises(sa.PartialUpdateError, match=r"stored array of shape \(700, 1000\) at .*test_exactly_once.py") as caught:
            with np.errstate(divide="raise"):
                x /= y
        error = caught.value
        assert isinstance(error, FloatingPointError) and isinstance(error.__cause__, FloatingPointError)
        assert sorted([*error.updated, *error.untouched, *error.torn]) == [(k, 0) for k in range(7)]
        for chunks, values in ((error.updated, after), (error.untouched, before)):
            for k, _ in chunks:
                np.testing.assert_array_equal(np.asarray(x[100 * k : 100 * k + 100]), values[100 * k : 100 * k + 100])
        assert (3, 0) not in error.updated
        for k, _ in error.torn:
            with pytest.raises(sa.TornChunkError, match="resume"):
                x[100 * k].compute()
        with pytest.raises(sa.PartialUpdateError) as again:
            error.resume()  # still 0
        with pytest.raises(RuntimeError, match="resumed before"):
            error.resume()
        assert set(again.value.updated) >= set(error.updated)
        # What was to be read may not have changed.
        y[333, 444] = 8.0
        with pytest.raises(sa.ChangedInput, match="was written"):
            again.value.resume()


@pytest.mark.parametrize("executor", ["synchronous", "threads", "processes"])
def test_what_fails_before_anything_is_written_is_no_partial_update(executor: str) -> None:
    with sa.Pool(workers=2), sa.config.set(scheduler=executor):
        x = sa.array(np.arange(10.0))
        with np.errstate(divide="raise"), pytest.raises(FloatingPointError) as caught:
            x /= 0
        assert not isinstance(caught.value, sa.PartialUpdateError)
        np.testing.assert_array_equal(np.asarray(x), np.arange(10.0))


def test_a_partial_update_of_a_torn_chunk_is_taken_as_it_is_when_asked_for() -> None:
    with sa.Pool(workers=0):
        x, y, before, after = divided("synchronous")
        with np.errstate(divide="raise"), pytest.raises(sa.PartialUpdateError) as caught:
            x /= y
        torn = caught.value.torn[0][0]
        with pytest.raises(sa.TornChunkError), x.lock((torn, 0), "r"):
            pass
        rows = slice(100 * torn, 100 * torn + 100)
        with x.lock((torn, 0), accept_torn=True) as view:
            assert (view == before[rows]).sum() + (view == after[rows]).sum() >= view.size
            view[...] = 1.0
        assert (np.asarray(x[rows]) == 1.0).all()


def interrupt_after(began: threading.Event, delay_s: float) -> None:
    began.wait()
    time.sleep(delay_s)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("executor", "n", "rounds"), [("synchronous", 250, 60), ("threads", 1111, 15), ("processes", 1111, 15)])
def test_an_update_cut_short_by_ctrl_c_is_resumed_exactly(executor: str, n: int, rounds: int) -> None:
    rng = random.Random(5)
    start = np.random.default_rng(2).random((n, 1003))
    interrupted = resumed = 0
    with sa.Pool(workers=2), sa.config.set(scheduler=executor):
        x, y = sa.array(start), sa.array(start + 1)
        expected = start.copy()
        x += y * 0  # plans, and starts workers
        while interrupted < rounds:
            goal = expected * 0.75 + (start + 1)
            began = threading.Event()
            timer = threading.Thread(target=interrupt_after, args=(began, rng.uniform(0, 0.004)))
            timer.start()
            try:
                try:
                    began.set()
                    x[...] = x * 0.75 + y
                finally:
                    timer.join()
            except sa.PartialUpdateError as error:
                assert isinstance(error, KeyboardInterrupt) and not isinstance(error, Exception)
                interrupted += 1
                resumed += 1
                error.resume()
            except KeyboardInterrupt:
                interrupted += 1
            now = np.asarray(x).copy()
            if not np.array_equal(now, expected):
                np.testing.assert_array_equal(now, goal)
                expected = goal
    assert resumed
