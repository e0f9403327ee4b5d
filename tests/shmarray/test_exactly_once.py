"""Updates in place that are cut short, by SIGKILL, exceptions and Ctrl-C: the array ends bit-identical to the undisturbed run."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import gc
import os
import pickle
import random
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shmarray as sa
from scheduler.executors import synchronous
from scheduler.redo import Redo
from scheduler.running import Lane, Running
from scheduler.worker import WORDS_PER_SLOT
from shmarray import plan
from shmarray.engines import plain_kernel
from shmarray.errors import cut_short
from shmarray.storage import Storage

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
def test_an_update_is_applied_exactly_once_under_sigkill(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "llvm":
        pytest.importorskip("llvmlite")
    update = UPDATES[name]
    kernels = kernels_of_plans(monkeypatch)
    rng = np.random.default_rng(3)
    start, other = rng.random((1111, 1003)), rng.random((1111, 1003))
    with sa.config.set(engine=engine), sa.Pool(workers=2) as pool:
        y = sa.array(other)
        expected, x = sa.array(start), sa.array(start)
        for _ in range(5):
            update(expected, y)
        killer = Killer(pool, 11)
        while killer.killed < 3:
            x = sa.array(start)
            for _ in range(5):
                with killer:
                    update(x, y)
            np.testing.assert_array_equal(np.asarray(x), np.asarray(expected))
        pool.check()
    assert {type(kernel).__name__ for kernel in kernels} == {"MapKernel" if engine == "numpy" else "CompiledKernel"}


class Storm:
    """Kills, every 20 to 50 ms inside ``with``, a worker that has begun a range: while it loads its kernel or in the middle of it.

    Three of four are spared while they load, however long that takes on a busy machine: else none would ever get to its tasks.
    """

    def __init__(self, pool: sa.Pool, seed: int) -> None:
        self.loop = pool.worker_pool()._loop
        self.rng = random.Random(seed)
        self.binding = self.working = 0
        self.spared: dict[int, bool] = {}  # by pid

    def __enter__(self) -> Storm:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._rage)
        self._thread.start()
        return self

    def _rage(self) -> None:
        while not self._ended.wait(self.rng.uniform(0.02, 0.05)):
            for member in self.rng.sample(members := list(self.loop.members.values()), len(members)):
                run_id, is_binding = self.loop.words[WORDS_PER_SLOT * member.slot + 1 : WORDS_PER_SLOT * member.slot + 3]
                spared = self.spared.setdefault(member.process.pid, self.rng.random() < 0.75)
                if not run_id or (is_binding and spared) or (not is_binding and self.rng.random() < 0.5):
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.process.pid, signal.SIGKILL)
                    self.binding += bool(is_binding)
                    self.working += not is_binding
                break

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.parametrize("engine", ["numpy", "llvm"])
def test_updates_get_through_a_storm_of_kills_and_are_applied_exactly_once(engine: str) -> None:
    """For a while no worker lives long: each kill is somebody else's doing, and the updates get on in between."""
    if engine == "llvm":
        pytest.importorskip("llvmlite")
    rng = np.random.default_rng(5)
    start, other = rng.random((3000, 1000)), rng.random((3000, 1000))
    with sa.config.set(engine=engine), sa.Pool(workers=2) as pool:
        x, y, expected = sa.array(start), sa.array(other), start.copy()
        updates = 0
        until = time.monotonic() + 2
        with Storm(pool, 17) as storm:
            while time.monotonic() < until or not (storm.binding and storm.working):
                x[...] = x * 0.75 + y
                updates += 1
        for _ in range(updates):
            expected = expected * 0.75 + other
        np.testing.assert_array_equal(np.asarray(x), expected)
        pool.check()


def kernels_of_plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of the kernels of all updates in place that are planned from now on."""
    found: list[Any] = []
    engine_for = plan.engine_for

    def record(*args: Any) -> Any:
        kernel = engine_for(*args)
        if plain_kernel(kernel).program.updated:
            found.append(kernel)
        return kernel

    monkeypatch.setattr(plan, "engine_for", record)
    return found


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
                for _ in range(20):
                    with killer:
                        x += 1
            finally:
                ended.set()
            reading.result()
        assert (np.asarray(x) == 20).all()
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


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Hypothesis has the collector call it, and what strikes there is swallowed."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize(("executor", "n", "rounds"), [("synchronous", 250, 60), ("threads", 1111, 15), ("processes", 1111, 15)])
def test_an_update_cut_short_by_ctrl_c_is_resumed_exactly(executor: str, n: int, rounds: int) -> None:
    rng = random.Random(5)
    start = np.random.default_rng(2).random((n, 1003))
    interrupted = resumed = 0
    with sa.Pool(workers=2), sa.config.set(scheduler=executor):
        x, y = sa.array(start), sa.array(start + 1)
        expected = start.copy()
        x += y * 0  # plans, and starts workers
        while interrupted < rounds or not resumed:
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


class Strike:
    """Ctrl-C at the ``number``-th instant at which Python looks for one, counted from the moment a plan runs in the calling thread.

    Those are the beginning of each function written in Python and the return of each that is not.
    """

    def __init__(self, number: int) -> None:
        self.left = number
        self.has_begun = False

    def __call__(self, frame: types.FrameType, event: str, _arg: object) -> None:
        self.has_begun = self.has_begun or frame.f_code is synchronous.run.__code__
        if self.has_begun and event in ("call", "c_return"):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt  # which ends the profiling, too


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("engine", ["numpy", "llvm"])
def test_ctrl_c_at_any_instant_of_an_update_is_raised_and_the_rest_can_be_done(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "llvm":
        pytest.importorskip("llvmlite")
    ignored: list[object] = []  # what strikes in a weak reference's callback goes no further, whatever we do
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    start = np.random.default_rng(2).random((20, 1003))
    goal = start * 0.75 + (start + 1)
    seen: set[str] = set()
    number, profile = 0, sys.getprofile()
    with sa.Pool(workers=0) as pool, sa.config.set(scheduler="synchronous", engine=engine):
        y = sa.array(start + 1)
        while "done" not in seen:
            number += 1
            x = sa.array(start)
            strike = Strike(number)
            ignored.clear()

            def update(strike: Strike = strike, x: Any = x) -> None:
                sys.setprofile(strike)
                try:
                    x[...] = x * 0.75 + y
                finally:
                    sys.setprofile(profile)

            try:
                # In a context of its own: one that strikes at the end of `with np.errstate` leaves that as it is, in any program.
                contextvars.copy_context().run(update)
                assert strike.left > 0 or ignored, f"Ctrl-C number {number} was lost"
                seen.add("ignored" if ignored else "done")
            except sa.PartialUpdateError as error:
                error.resume()
                seen.add("partial")
                np.testing.assert_array_equal(np.asarray(x), goal)
            except KeyboardInterrupt:
                now = np.asarray(x)
                seen.add("before" if np.array_equal(now, start) else "after")
                assert np.array_equal(now, start) or np.array_equal(now, goal)
            del x
        pool.check()
    assert seen >= {"before", "after"} and number > 200


class Broken(Exception):
    """What takes two arguments to make, and has a slot."""

    __slots__ = ("code",)

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def fail_at_step(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Have the ``number``-th step of updates in this process raise before anything of it is copied."""
    commit, seen = Redo.commit, [0]

    def broken(self: Redo, *args: object) -> None:
        seen[0] += 1
        if seen[0] == number:
            raise error
        commit(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Redo, "commit", broken)


@pytest.fixture
def torn(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[sa.Array, sa.PartialUpdateError]]:
    """An array of zeros to which an update has added 1 in part, and what that raised."""
    with sa.Pool(workers=0), sa.config.set(engine="numpy"):
        x = sa.zeros((1000, 1000), chunks=(100, 1000)).persist()
        with monkeypatch.context() as patch:
            fail_at_step(patch, 3, Broken(7, "no"))
            with pytest.raises(sa.PartialUpdateError) as caught:
                x += 1
        yield x, caught.value


def test_an_error_of_any_class_stays_of_that_class(torn: tuple[sa.Array, sa.PartialUpdateError]) -> None:
    x, error = torn
    assert isinstance(error, Broken) and error.code == 7
    error.resume()
    assert (np.asarray(x) == 1).all()
    for kind in (FloatingPointError("f"), OSError(28, "full"), KeyboardInterrupt()):
        made = cut_short(kind, "text")
        again = pickle.loads(pickle.dumps(cut_short(made, "text")))
        assert isinstance(again, type(kind)) and isinstance(again, sa.PartialUpdateError) and str(again) == "text"
        assert isinstance(again, Exception) == isinstance(kind, Exception)
    assert cut_short(OSError(28, "full"), "text").errno == 28  # type: ignore[attr-defined]


def test_a_resume_that_cannot_begin_can_be_tried_again(torn: tuple[sa.Array, sa.PartialUpdateError]) -> None:
    x, error = torn
    with x.lock((9, 0), "r"), pytest.raises(sa.LockError):
        error.resume()  # this thread reads a chunk that it would write
    error.resume()
    assert (np.asarray(x) == 1).all()


def test_marks_of_one_update_outlive_the_lock_and_the_resume_of_others(
    torn: tuple[sa.Array, sa.PartialUpdateError], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, error = torn
    first, _ = error.torn[-1]
    with x.lock((9, 0)) as chunk:  # of another chunk
        chunk[...] = 5
    with pytest.raises(sa.TornChunkError):
        np.asarray(x)
    # A blind write of half of the torn chunk and more, cut short and resumed, does not make the other half whole.
    part = x[100 * first + 50 :]
    other = sa.ones((part.shape[0], 1000)).persist()
    with monkeypatch.context() as patch:
        patch.setattr(Redo, "begin", interrupted_at(Redo.begin, 3))
        with pytest.raises(sa.PartialUpdateError) as caught:
            part[...] = other * 3
    assert isinstance(caught.value, KeyboardInterrupt)
    caught.value.resume()
    with pytest.raises(sa.TornChunkError):
        np.asarray(x)
    x[...] = 2
    assert (np.asarray(x) == 2).all()


def interrupted_at(method: Callable[..., object], number: int) -> Callable[..., object]:
    """Return a method that raises KeyboardInterrupt the ``number``-th time it is called."""
    seen: list[int] = []

    def interrupted(*args: object, **kwargs: object) -> object:
        seen.append(1)
        if len(seen) == number:
            raise KeyboardInterrupt
        return method(*args, **kwargs)

    return interrupted


def test_parts_of_an_update_that_are_layers_of_their_own_are_told_apart() -> None:
    with sa.Pool(workers=0):
        a, b, c = sa.ones((400, 1000)).persist(), sa.ones((400, 1000)).persist(), sa.ones((400, 1000)).persist()
        c[399, 0] = 0.0
        x = sa.zeros((800, 1000), chunks=(100, 1000)).persist()
        with np.errstate(divide="raise"), pytest.raises(sa.PartialUpdateError) as caught:
            x[...] = sa.concatenate([a + 1, b / c])
        error = caught.value
        groups = [set(error.updated), set(error.untouched), set(error.torn)]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 8
        for k, _ in error.updated:
            assert (np.asarray(x[100 * k : 100 * k + 100]) == (2 if k < 4 else 1)).all()
        for k, _ in error.untouched:
            assert (np.asarray(x[100 * k : 100 * k + 100]) == 0).all()


def test_an_update_that_was_left_running_is_waited_for_by_the_next_write_and_by_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    commit = Redo.commit

    def slow(self: Redo, *args: object) -> None:
        go_on.wait()
        commit(self, *args)  # type: ignore[arg-type]

    for what in ("write", "resume"):
        with sa.Pool(workers=2), sa.config.set(scheduler="threads", engine="numpy"):
            x = sa.zeros((1000, 1000), chunks=(100, 1000)).persist()
            go_on.clear()
            with monkeypatch.context() as patch:
                patch.setattr(Redo, "commit", slow)
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
                with pytest.raises(sa.PartialUpdateError, match="background") as caught:
                    x += 1
                threading.Timer(0.2, go_on.set).start()
                if what == "write":
                    x[...] = 7
                else:
                    caught.value.resume()
            assert (np.asarray(x) == (7 if what == "write" else 1)).all()


@pytest.mark.parametrize("engine", ["numpy", "llvm"])
@pytest.mark.parametrize(
    ("where", "number"), [((Lane, "run"), 2), ((Redo, "begin"), 1), ((Redo, "begin"), 3), ((Storage, "address"), 2), ((Running, "open"), 1)]
)
def test_ctrl_c_in_the_bookkeeping_of_an_update_and_a_second_while_it_is_accounted_for(
    engine: str, where: tuple[type, str], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "llvm":
        pytest.importorskip("llvmlite")
    with sa.Pool(workers=0), sa.config.set(engine=engine):
        x = sa.zeros((4000, 1000), chunks=(100, 1000)).persist()
        with monkeypatch.context() as patch:
            patch.setattr(*where, interrupted_at(getattr(*where), number))
            patch.setattr(Lane, "account", interrupted_at(Lane.account, 1))
            patch.setattr(Running, "close", interrupted_at(Running.close, 1))
            with pytest.raises(KeyboardInterrupt) as caught:
                x += 1
        if isinstance(caught.value, sa.PartialUpdateError):
            caught.value.resume()
            assert (np.asarray(x) == 1).all()
        else:
            assert (np.asarray(x) == 0).all()


@pytest.mark.parametrize("engine", ["numpy", "llvm"])
def test_a_target_that_had_to_move_is_resumed_in_memory_or_not_at_all(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "llvm":
        pytest.importorskip("llvmlite")
    with sa.Pool(workers=0, memory_limit="40MiB", spill_directory=str(tmp_path)), sa.config.set(engine=engine):
        x = sa.zeros((2000, 1000), chunks=(100, 1000)).persist()
        other = sa.ones((2000, 1000)).persist()
        assert not x._storage.is_spilled and not other._storage.is_spilled
        with monkeypatch.context() as patch:
            patch.setattr(Redo, "begin", interrupted_at(Redo.begin, 3))
            with pytest.raises(sa.PartialUpdateError) as caught:
                x += 1
        view = x[1900:].compute()  # what the resumed update must leave as it is: the target has to move
        with pytest.raises(sa.MemoryBudgetError, match="must lie in memory") as again:
            caught.value.resume()
        del other
        gc.collect()
        assert isinstance(again.value, sa.PartialUpdateError)
        again.value.resume()
        assert (np.asarray(x) == 1).all() and (view == 0).all()
