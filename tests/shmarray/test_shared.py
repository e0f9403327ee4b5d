"""`shmarray.shared`: NumPy arrays, numbers and locks that processes hand to each other, however these are started."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import itertools
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shmarray as sa
from shmarray import shared
from shmarray.shared_memory import lease_of

pytestmark = pytest.mark.timeout(180)

LONG_S = 90.0
METHODS = ("fork", "spawn", "forkserver")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    gc.collect()
    before = shared.report()["arrays"]
    yield
    gc.collect()
    assert shared.report()["arrays"] <= before
    shared.family().check()


@pytest.fixture(params=METHODS)
def context(request: pytest.FixtureRequest) -> Any:
    return multiprocessing.get_context(request.param)


def run(context: Any, act: Any, *args: Any) -> None:
    """Run ``act`` in another process, to its end."""
    process = context.Process(target=act, args=args)
    process.start()
    process.join(LONG_S)
    assert process.exitcode == 0
    process.close()


# What other processes do: found by name there.


def add_to(a: np.ndarray, n: float) -> None:
    a += n


def put_new(q: Any, value: float) -> None:
    a = shared.full((100, 100), value)
    q.put(a)
    q.close()
    q.join_thread()


def total(a: np.ndarray) -> float:
    return float(a.sum())


def made(n: int) -> np.ndarray:
    return shared.full(n, float(n))


def echo(a: Any) -> Any:
    return a


def kind(a: Any) -> str:
    return type(a).__name__


def count_up(v: Any, n: int) -> None:
    for _ in range(n):
        v.add(1)


def count_up_under_lock(v: Any, n: int) -> None:
    for _ in range(n):
        with v.get_lock():
            v.value += 1


def count_chunks(a: Any, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for i in rng.integers(0, 4, n):
        with a.lock(int(i)) as chunk:
            chunk += 1


def set_number_and_squares(num: Any, arr: Any) -> None:
    """The tutorial of multiprocessing, as it is."""
    num.value = 3.1415927
    for i in range(len(arr)):
        arr[i] = -arr[i]


def die_holding(a: Any, q: Any) -> None:
    a.lock(1).__enter__()
    a[4:] = -1
    q.put(os.getpid())
    q.close()
    q.join_thread()
    os.kill(os.getpid(), 9)


# Handing over.


def test_another_process_has_the_same_memory(context: Any) -> None:
    a = shared.zeros((100, 50))

    run(context, add_to, a, 2.0)
    run(context, add_to, a[10:20, ::2], 1.0)

    expected = np.full((100, 50), 2.0)
    expected[10:20, ::2] += 1
    np.testing.assert_array_equal(a, expected)


def test_the_maker_may_end_first(context: Any) -> None:
    q = context.Queue()

    run(context, put_new, q, 3.0)
    a = q.get(timeout=LONG_S)

    assert type(a) is shared.SharedArray and (a == 3).all()
    assert list(shared.report()["owners"]) == [os.getpid()]
    del a
    q.close()
    q.join_thread()


def test_through_a_pool_and_back(context: Any) -> None:
    a = shared.array(np.arange(10.0))
    with context.Pool(2) as pool:
        assert pool.map(total, [a, a[:5], a[[1, 2]]]) == [45.0, 10.0, 3.0]
        assert pool.map(kind, [a, a[::2], a[[1, 2]]]) == ["SharedArray", "SharedArray", "ndarray"]
        results = pool.map(made, range(1, 6))
    assert [float(r[0]) for r in results] == [1.0, 2.0, 3.0, 4.0, 5.0], "the pool has ended; what it made has not"


def test_through_concurrent_futures(context: Any) -> None:
    a = shared.full(1000, 2.0)
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        assert list(executor.map(total, [a, a[:10]])) == [2000.0, 20.0]
        b = executor.submit(echo, a).result(LONG_S)
    assert np.shares_memory(a, b)


def test_through_joblib() -> None:
    joblib = pytest.importorskip("joblib")
    a = shared.full(1000, 2.0)

    assert joblib.Parallel(n_jobs=2)(joblib.delayed(total)(x) for x in (a, a[:10])) == [2000.0, 20.0]


SCRIPT = """
import pickle, sys
from shmarray import shared
with open(sys.argv[1], "rb") as file:
    a = pickle.load(file)
a *= 10
with open(sys.argv[2], "wb") as file:
    pickle.dump(a[1:], file)
    pickle.dump(shared.full(3, 7.0), file)
"""


@pytest.mark.parametrize("is_related", [True, False])
def test_through_files_with_an_unrelated_script(tmp_path: Path, is_related: bool) -> None:
    """It finds the memory through the environment, or, where that was cleared, through the process that sent it."""
    a = shared.array(np.arange(4.0))
    (tmp_path / "in").write_bytes(pickle.dumps(a))
    environment = {name: value for name, value in os.environ.items() if is_related or not name.startswith("SHMARRAY_SHARED")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(tmp_path / "in"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=LONG_S,
    )

    assert (done.returncode, done.stderr) == (0, "")
    np.testing.assert_array_equal(a, [0, 10, 20, 30])
    with (tmp_path / "out").open("rb") as file:
        assert np.shares_memory(pickle.load(file), a[1:])
        if is_related:
            np.testing.assert_array_equal(pickle.load(file), [7, 7, 7])
        else:
            with pytest.raises(sa.HandleExpired, match="Both have ended"):
                pickle.load(file)


PROGRAM = """
import multiprocessing, os, sys
import numpy as np
from shmarray import shared

def work(a, q):
    a[...] = os.getpid()
    q.put(shared.full(100000, 1.0))

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    a, q = shared.zeros((1000, 100)), multiprocessing.Queue()
    p = multiprocessing.Process(target=work, args=(a, q))
    p.start()
    b = q.get()
    p.join()
    assert (a == p.pid).all() and (b == 1).all()
    keep = [a, b, shared.Value("i", 1), shared.Array("d", 3)]
    with open("/proc/self/maps") as maps:
        print([line for line in maps if "/dev/shm/" in line and "/dev/shm/sem." not in line])  # the queue has semaphores
"""


@pytest.mark.parametrize("method", METHODS)
def test_a_program_is_silent_and_leaves_nothing(tmp_path: Path, method: str) -> None:
    """With arrays alive at its end, no warning, no resource tracker's complaint, nothing in /dev/shm."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHMARRAY_SHARED")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)

    done = subprocess.run(
        [sys.executable, "-W", "error", str(tmp_path / "program.py"), method],
        capture_output=True,
        text=True,
        env=environment,
        timeout=LONG_S,
    )

    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[]\n")
    assert [name for name in os.listdir("/dev/shm") if "shmarray" in name] == []


LATE = """
import builtins, os
from scheduler.shared import family
from shmarray import shared

a = shared.zeros(4_000_000)
pid = os.fork()
if pid == 0:
    os._exit(0)  # leaves a row in the table, which a sweep looks at
os.waitpid(pid, 0)
family()._reaped_ns = 0
builtins.kept = a  # goes when `open` has gone
"""


def test_an_array_that_goes_last_goes_in_silence() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHMARRAY_SHARED")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)

    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, env=environment, timeout=LONG_S)

    assert (done.returncode, done.stderr) == (0, "")


# Pickles.


@pytest.mark.parametrize(
    "dtype", ["?", "i1", "<f8", ">i4", "c16", "S5", "U3", "M8[ns]", [("a", "<i4"), ("b", "<f8", (2,))], [("x", [("y", "u1")])]]
)
@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (0, 3), (2, 3, 4)])
def test_a_handle_brings_shape_dtype_and_memory(dtype: Any, shape: tuple[int, ...]) -> None:
    a = shared.zeros(shape, dtype)

    b = pickle.loads(pickle.dumps(a))

    assert type(b) is shared.SharedArray and (b.shape, b.dtype, b.strides, b.chunks) == (a.shape, a.dtype, a.strides, a.chunks)
    assert not a.size or np.shares_memory(a, b)


VIEWS = {
    "slice": lambda a: a[2:5, 1:],
    "steps": lambda a: a[::2, ::3],
    "backwards": lambda a: a[::-1, ::-2],
    "transpose": lambda a: a.T,
    "row": lambda a: a[3],
    "one": lambda a: a[3:4, 2:3],
    "none": lambda a: a[:0],
    "new axis": lambda a: a[:, None],
    "flat": lambda a: a.reshape(-1),
    "broadcast": lambda a: np.broadcast_to(a[0], (4, 6), subok=True),
    "bytes": lambda a: a.view(np.uint8),
    "imaginary": lambda a: a.imag,
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_travel_as_handles(name: str) -> None:
    a = shared.array(np.arange(60).reshape(10, 6).astype(complex))
    view = VIEWS[name](a)

    text = pickle.dumps(view)
    found = pickle.loads(text)

    assert len(text) < 250
    assert (found.shape, found.dtype) == (view.shape, view.dtype) and found.flags.writeable == view.flags.writeable
    np.testing.assert_array_equal(found, view)
    assert not view.size or np.shares_memory(found, a)


def test_a_handle_is_about_a_hundred_bytes() -> None:
    text = pickle.dumps(shared.empty((1000, 1000)), protocol=5)

    assert len(text) <= 110
    pickle.loads(text)  # else it would be kept for whoever is to receive it


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_will_do(protocol: int) -> None:
    a = shared.zeros(10)

    assert np.shares_memory(pickle.loads(pickle.dumps(a, protocol)), a)
    assert type(pickle.loads(pickle.dumps(a[[1, 2]], protocol))) is np.ndarray


def test_what_has_memory_of_its_own_is_an_ordinary_array() -> None:
    a = shared.array(np.arange(12.0).reshape(3, 4))

    for own in (a + 1, -a, a.copy(), copy.copy(a), copy.deepcopy(a), a[[0, 2]], a[a > 3], a.sum(axis=0), np.sort(a), a.astype("f4"),
                a.flatten(), np.concatenate([a, a]), a @ a.T, np.where(a > 1, a, 0), np.cumsum(a, axis=0)):  # fmt: skip
        assert type(own) is np.ndarray, own
    assert type(a.sum()) is np.float64 and type(a[1, 1]) is np.float64
    for same in (a[1:], a.T, a.reshape(4, 3), a.ravel(), np.asanyarray(a), np.add(a, 1, out=a)):
        assert type(same) is shared.SharedArray and np.shares_memory(same, a)
    a += 1
    assert type(a) is shared.SharedArray and lease_of(a) is not None


def test_a_read_only_view_stays_so() -> None:
    a = shared.zeros(5)
    view = a[1:]
    view.flags.writeable = False

    with pytest.raises(ValueError, match="read-only"):
        pickle.loads(pickle.dumps(view))[0] = 1


def test_numpy_saves_it_and_others_take_it(tmp_path: Path) -> None:
    a = shared.array(np.arange(12.0).reshape(3, 4))

    np.save(tmp_path / "a.npy", a)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), a)
    buffer = io.BytesIO()
    np.savez(buffer, a=a)
    assert memoryview(a).nbytes == 96
    scipy = pytest.importorskip("scipy.ndimage")
    np.testing.assert_array_equal(scipy.gaussian_filter(a, 1), scipy.gaussian_filter(np.array(a), 1))


def test_a_freed_array_says_that_its_handle_expired() -> None:
    a = shared.zeros(10)
    text = pickle.dumps(a)
    del a
    pickle.loads(text)  # the handle keeps it until it is received
    gc.collect()
    shared.report()

    with pytest.raises(sa.HandleExpired, match=r"it was freed\. Nobody holds it any more"):
        pickle.loads(text)


# Making.


def test_a_shape_or_values_make_an_array() -> None:
    np.testing.assert_array_equal(shared.array((2, 3)), np.zeros((2, 3)))
    np.testing.assert_array_equal(shared.array(4, "i4"), np.zeros(4, "i4"))
    np.testing.assert_array_equal(shared.array([4]), [4])
    np.testing.assert_array_equal(shared.array([[1, 2]], dtype=float), [[1.0, 2.0]])
    np.testing.assert_array_equal(shared.full((2, 2), 5), [[5, 5], [5, 5]])
    big = np.random.default_rng(0).random((300, 1000))
    np.testing.assert_array_equal(shared.copy(big), big)
    np.testing.assert_array_equal(shared.copy(big.T), big.T)
    assert shared.empty((2, 2), "i2").dtype == "i2"
    again = shared.copy(shared.zeros((4, 4), chunks=(2, 2)))
    assert again.chunks == ((2, 2), (2, 2))


def test_zeros_are_zeros_where_others_have_written() -> None:
    for _ in range(3):
        a = shared.zeros(100_000)
        assert not a.any()
        a += 1
        del a


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: shared.zeros(3, object), TypeError, "Python objects"),
        (lambda: shared.zeros((2, -1)), ValueError, "none of them negative"),
        (lambda: shared.zeros("x"), ValueError, "an int or a tuple of ints"),
        (lambda: shared.zeros((4, 4), chunks=(3, 3, 3)), sa.ChunkError, "3 entries"),
        (lambda: shared.lock(np.zeros(3)), TypeError, "takes an array of sa.shared"),
        (lambda: shared.lock(shared.zeros(3), mode="rw"), ValueError, "'r' to read or 'w' to write"),
        (lambda: shared.lock(shared.zeros(3), 5), IndexError, r"out of bounds. It has 1 chunk, 1. .* such as \(0,\)"),
        (
            lambda: shared.zeros((10, 4), chunks=(2, 4)).lock(2),
            IndexError,
            r"chunk 2 .* 1 entry, the grid 2 axes. It has 5 chunks, 5 x 1. .* such as \(2, 0\) \(the last one is \(4, 0\)\)",
        ),
        (lambda: shared.zeros((10, 4), chunks=(2, 4)).lock((-6, 0)), IndexError, "out of bounds"),
        (lambda: shared.zeros(10, chunks=2).lock(1.5), TypeError, "made of ints"),
        (lambda: shared.zeros(()).lock(1), IndexError, "one chunk, which lock"),
        (lambda: shared.zeros(3).lock().release(), RuntimeError, "keep what you acquire"),
        (lambda: shared.lock(shared.zeros(9)[1:], 0), ValueError, "chunks are those of the whole array"),
        (lambda: shared.zeros(9)[[1]].lock(), AttributeError, "lock"),
        (lambda: shared.zeros(3).copy().chunks, AttributeError, "chunks"),
        (lambda: shared.zeros((), [("a", "O")]), TypeError, "Python objects"),
        (lambda: shared.array("abc"), TypeError, r"array\(\) takes a shape .* got 'abc' \(str\), of which it makes text"),
        (lambda: shared.array(np.str_("abc")), TypeError, "of which it makes text"),
        (lambda: shared.array([b"a", b"b"]), TypeError, r"\(list\), of which it makes text"),
        (lambda: shared.array(None), TypeError, r"None \(NoneType\), of which it makes objects"),
        (lambda: shared.array({"a": 1}), TypeError, r"\{'a': 1\} \(dict\), of which it makes objects"),
        (lambda: shared.array(n for n in range(3)), TypeError, r"\(generator\), of which it makes objects"),
        (lambda: shared.array([1, None]), TypeError, "of which it makes objects"),
        (lambda: shared.array(np.array([1, None])), TypeError, "dtype object: Python objects"),
        (lambda: shared.copy("abc"), TypeError, r"copy\(\) takes values that"),
        (lambda: shared.full(3, "abc"), TypeError, r"full\(\) takes values"),
    ],
)
def test_mistakes_are_told(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    "given, dtype",
    [
        (["ab", "c"], "U2"), (np.array(["ab", "c"]), None), (np.bytes_(b"ab"), "S2"), (np.array([b"ab"]), None), ([True, False], None),
        ([1j], None), (np.datetime64("2026-01-01"), None), ([1.5, 2], None), (2.5, None), (True, None),
        (np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]), None),
    ],
)  # fmt: skip
def test_values_of_a_fixed_size_are_taken_and_text_where_it_is_meant(given: Any, dtype: Any) -> None:
    made, expected = shared.array(given, dtype), np.asarray(given, dtype)

    assert made.dtype == expected.dtype and made.shape == expected.shape and (made == expected).all()
    assert shared.copy(np.asarray(given, dtype)).tobytes() == expected.tobytes()


# Lazy arrays over it.


def test_a_lazy_array_lies_over_the_same_memory() -> None:
    a = shared.array(np.arange(20.0).reshape(4, 5), chunks=(2, 5))
    x = sa.asarray(a)

    assert x.is_stored and x.chunks == a.chunks
    a[0, 0] = 100
    assert float((x * 2).sum().compute()) == 2 * float(a.sum())
    x += 1
    x[1:, ::2] = 0
    assert a[0, 0] == 101 and not a[1:, ::2].any()
    np.testing.assert_array_equal(sa.asarray(a[1:, ::2]).compute(), a[1:, ::2])


def test_what_a_lazy_array_gave_keeps_its_values() -> None:
    a = shared.zeros(1000)
    x = sa.asarray(a)

    before = x.compute()
    a += 1

    assert not before.any() and x.sum().compute() == 1000


def test_a_lazy_array_gives_a_shared_one_back() -> None:
    a = shared.zeros((4, 5))
    assert np.shares_memory(sa.asarray(a).shared(), a)
    assert np.shares_memory(sa.asarray(a)[1:, 2].shared(), a)
    x = sa.array(np.arange(12.0).reshape(3, 4), chunks=(1, 4))

    for made in (x.shared(), shared.array(x), (x + 0).shared()):
        assert type(made) is shared.SharedArray and made.chunks[1] == (4,)
        np.testing.assert_array_equal(made, x.compute())
        assert not np.shares_memory(made, x.compute())


def test_a_lazy_array_over_shared_memory_travels_as_a_handle() -> None:
    a = shared.zeros((100, 100))
    text = pickle.dumps(sa.asarray(a))
    x = pickle.loads(text)
    x += 1
    assert len(text) < 300 and (a == 1).all()


def test_large_work_runs_in_workers_on_it(pool: sa.Pool) -> None:
    with pool:
        a = shared.array(np.random.default_rng(1).random(2_000_000))
        x = sa.asarray(a)
        expected = np.array(a) * 2 + 1
        np.testing.assert_array_equal((x * 2 + 1).compute(scheduler="processes"), expected)
        x *= 2
        np.testing.assert_array_equal(a + 1, expected)


def test_an_update_waits_for_the_lock_of_the_array() -> None:
    a = shared.zeros(100, chunks=50)
    x = sa.asarray(a)
    begun = threading.Event()

    def update() -> None:
        nonlocal x
        begun.set()
        x += 1

    thread = threading.Thread(target=update)
    with a.lock(1) as chunk:
        thread.start()
        assert begun.wait(LONG_S)
        chunk[...] = chunk + 1
        with x.lock(1, timeout=LONG_S) as again:
            again += 1
    thread.join(LONG_S)
    assert (a[:50] == 1).all() and (a[50:] == 3).all()


# Locks.


def test_processes_count_exactly_in_chunks_under_locks(context: Any) -> None:
    a = shared.zeros(40, "i8", chunks=10)
    processes = [context.Process(target=count_chunks, args=(a, 200, seed)) for seed in range(4)]

    for process in processes:
        process.start()
    for process in processes:
        process.join(LONG_S)

    assert [process.exitcode for process in processes] == [0] * 4
    assert a.reshape(4, 10).max(axis=1).sum() == 800 and (a.reshape(4, 10).min(axis=1) == a.reshape(4, 10).max(axis=1)).all()


def test_who_locks_after_a_dead_writer_is_told_once() -> None:
    context = multiprocessing.get_context("fork")
    a, q = shared.zeros(8, chunks=4), context.Queue()
    process = context.Process(target=die_holding, args=(a, q))
    process.start()
    pid = q.get(timeout=LONG_S)
    process.join(LONG_S)

    with a.lock(0):
        pass
    with pytest.raises(shared.AbandonedLockError, match=f"process {pid} held it to write, and died"):
        a.lock().__enter__()
    with a.lock(1) as chunk:
        assert (chunk == -1).all()
    q.close()
    q.join_thread()


def test_a_lock_gives_its_part_and_views_exclude_each_other(in_thread: Any) -> None:
    a = shared.zeros((6, 6), chunks=(3, 3))
    with a.lock((1, 0)) as chunk:
        assert chunk.shape == (3, 3) and np.shares_memory(chunk, a[3:, :3])
    with a.lock((-1, -1), "r") as chunk:
        assert not chunk.flags.writeable and np.shares_memory(chunk, a[3:, 3:])

    def try_to(lock: Any) -> bool:
        return bool(in_thread(lambda: lock.acquire(timeout=0.02) and not lock.release()))

    with a[:, 0].lock():
        assert not try_to(a.lock((0, 0))) and not try_to(a.lock((1, 0), "r")) and not try_to(a[4:5].lock())
        assert try_to(a.lock((0, 1))) and try_to(a.T[3:].lock())
    with shared.lock(a, (0, 0), "r"):
        assert try_to(a.lock((0, 0), "r")) and not try_to(a.lock((0, 0)))


def test_who_waits_too_long_is_told_which_array_in_the_numbers_of_the_report(in_thread: Any) -> None:
    a = shared.zeros((4, 4), chunks=(2, 2))
    with a.lock((1, 1)):
        (held,) = shared.report()["locks"]
        told = in_thread(lambda: str(error_of(lambda: a.lock(timeout=0.01).__enter__())))
        assert f"cells [0, 4) of shared array {held['array']} to write" in told
        assert "holds cells [3, 4)" in told


def error_of(act: Any) -> Exception | None:
    try:
        act()
    except Exception as error:
        return error
    return None


def test_a_lock_can_be_pickled_and_held_by_hand(in_thread: Any) -> None:
    a = shared.zeros((4, 4), chunks=(2, 2))
    lock = a.lock((1, 1))
    assert lock.acquire()
    assert lock.acquire(block=False), "the same thread again"
    other = pickle.loads(pickle.dumps(lock))
    other.acquire(block=False)
    assert in_thread(lambda: other.acquire(timeout=0.02)) is False
    other.release()
    lock.release()
    lock.release()
    with pytest.raises(RuntimeError, match="does not hold"):
        lock.release()


# Numbers.


def test_value_and_array_of_the_tutorial(context: Any) -> None:
    theirs = multiprocessing.Value("d", 0.0), multiprocessing.Array("i", range(10))
    ours = shared.Value("d", 0.0), shared.Array("i", range(10))

    set_number_and_squares(*theirs)
    run(context, set_number_and_squares, *ours)

    assert ours[0].value == theirs[0].value == 3.1415927
    assert ours[1][:] == theirs[1][:] == [0, -1, -2, -3, -4, -5, -6, -7, -8, -9]


@pytest.mark.parametrize("act", [count_up, count_up_under_lock])
def test_a_value_counts_exactly_from_several_processes(context: Any, act: Any) -> None:
    v = shared.Value("q")
    processes = [context.Process(target=act, args=(v, 500)) for _ in range(3)]
    for process in processes:
        process.start()
    act(v, 500)
    for process in processes:
        process.join(LONG_S)
    assert v.value == 2000


def test_a_value_is_changed_in_one_step() -> None:
    v = shared.Value("i", 5)

    assert (v.add(3), v.add(-1), v.max(4), v.max(9), v.value) == (8, 7, 7, 9, 9)
    assert v.compare_and_set(9, 1) and not v.compare_and_set(9, 2) and v.value == 1
    assert pickle.loads(pickle.dumps(v)).add(1) == v.value == 2
    assert shared.Value("b", 127).add(1) == -128, "wraps"
    assert shared.Value(complex, 1j).add(1) == 1 + 1j
    assert shared.Value(ctypes.c_uint16, 7).dtype == np.uint16


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i4", ">i4", "u8", "i8", "f4", "f8", ">f8", "c16", "?"])
def test_adding_gives_what_numpy_gives(dtype: str) -> None:
    n = shared.Value(dtype)
    limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.finfo(dtype) if dtype != "?" else None
    large = [limits.max, limits.min] if limits is not None else []
    numbers = [0, 1, -1, 100, True, 2**70, 0.5, 1e300, -np.inf, np.inf, np.nan, 3j, "x", np.int8(-3), np.uint64(2**63), np.float64(0.25)]
    for start, addend in itertools.product(
        [0, 1, *large], [*numbers, *(limit.item() if hasattr(limit, "item") else limit for limit in large)]
    ):
        expected = np.array(start, dtype)
        n.value = start
        with warnings.catch_warnings(record=True) as ours:
            warnings.simplefilter("always")
            got = type_or_value(lambda addend=addend: n.add(addend))
        with warnings.catch_warnings(record=True) as theirs, np.errstate(over="ignore"):
            warnings.simplefilter("always")
            wanted = type_or_value(lambda addend=addend, expected=expected: np.add(expected, addend, out=expected).item())

        np.testing.assert_equal(got, wanted)
        np.testing.assert_equal(n.value, expected.item())
        assert [str(each.message) for each in ours] == [str(each.message) for each in theirs]


def type_or_value(act: Any) -> Any:
    try:
        return act()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("code", [*"bBhHiIlLqQfd", ctypes.c_double, ctypes.c_int32])
def test_array_does_what_that_of_multiprocessing_does(code: Any) -> None:
    theirs, ours = multiprocessing.Array(code, [1, 2, 3, 4, 5]), shared.Array(code, [1, 2, 3, 4, 5])

    for array in (theirs, ours):
        array[1] = 9
        array[2:4] = [7, 8]
        array[-1] += 1
        with array.get_lock():
            array[0] = 6
        with pytest.raises(IndexError):
            array[5]
        with pytest.raises(ValueError):
            array[:2] = [1]
    assert ours[:] == theirs[:] == [6, 9, 7, 8, 6]
    assert (ours[1], ours[::2], list(ours), len(ours)) == (theirs[1], theirs[::2], list(theirs), len(theirs))
    assert type(ours[1]) is type(theirs[1])
    dtype = np.dtype(code)
    np.testing.assert_array_equal(np.frombuffer(ours.get_obj(), dtype), np.frombuffer(theirs.get_obj(), dtype))


def test_array_of_a_size_is_zero_and_of_characters_is_text() -> None:
    assert shared.Array("d", 3)[:] == [0.0, 0.0, 0.0]
    theirs, ours = multiprocessing.Array("c", b"hello"), shared.Array("c", b"hello")
    for array in (theirs, ours):
        array[0] = b"j"
        array.value = b"jam"
    assert (ours.value, ours.raw, ours[:], len(ours)) == (theirs.value, theirs.raw, theirs[:], len(theirs))
    assert pickle.loads(pickle.dumps(ours)).value == b"jam"


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_double), ("n", ctypes.c_int))


def square_points(points: Any) -> None:
    for point in points:
        point.x **= 2
        point.n += 1


def test_an_array_of_structures_is_changed_in_place(context: Any) -> None:
    theirs, ours = (module.Array(Point, [(1.5, 1), (-2.0, 2)]) for module in (multiprocessing, shared))

    square_points(theirs)
    run(context, square_points, ours)

    assert [(p.x, p.n) for p in ours] == [(p.x, p.n) for p in theirs] == [(2.25, 2), (4.0, 3)]
    assert shared.Array(Point, 2)[1].x == 0


def test_without_a_lock_it_is_the_numpy_array(context: Any) -> None:
    theirs, ours = (module.Array("d", [1.0, 2.0], lock=False) for module in (multiprocessing, shared))
    for array in (theirs, ours):
        np.frombuffer(array)[0] = 7

    run(context, add_to, ours, 1.0)

    assert type(ours) is shared.SharedArray and list(theirs) == [7, 2] and list(ours) == [8, 3]


def count_under(lock: Any, v: Any, a: Any, n: int) -> None:
    for _ in range(n):
        with lock:
            v.value += 1
            a[0] += 1
        v.add(1)


def test_a_lock_of_the_users_own_guards_several(context: Any, in_thread: Any) -> None:
    lock = context.RLock()
    v, a = shared.Value("i", lock=lock), shared.Array("i", 3, lock=lock)
    assert v.get_lock() is a.get_lock() is lock
    processes = [context.Process(target=count_under, args=(lock, v, a, 200)) for _ in range(2)]

    for process in processes:
        process.start()
    for process in processes:
        process.join(LONG_S)

    assert [process.exitcode for process in processes] == [0, 0]
    assert (v.value, a[:]) == (800, [400, 0, 0])
    with lock:
        assert in_thread(lambda: a.acquire(timeout=0.02)) is False
    with pytest.raises(TypeError, match="True, False or a lock"):
        shared.Array("i", 3, lock=1)
    with pytest.raises(TypeError, match="not a type of numbers"):
        shared.Value(ctypes.c_char_p)
    assert shared.Array("u", "häß")[:] == multiprocessing.Array("u", "häß")[:] == "häß"


# Looking.


def test_the_report_counts_what_is_there() -> None:
    before = shared.report()
    a = shared.zeros((1000, 100), chunks=(100, 100))
    a += 1

    with a.lock((3, 0)):
        report = shared.report()

    assert report["arrays"] == before["arrays"] + 1
    assert report["live_nbytes"] == before["live_nbytes"] + 800_000
    assert report["largest_hole_nbytes"] <= report["free_nbytes"]
    assert report["owners"][os.getpid()]["nbytes"] >= 800_000
    assert any(held["cells"] == (3, 4) and held["pid"] == os.getpid() for held in report["locks"])
    text = str(report)
    assert f"process {os.getpid()} (this one) holds" in text and "has locked chunks [3, 4)" in text
    del a
    shared.trim()
    assert shared.report()["warm_nbytes"] == 0


def test_sharing_a_gigabyte_costs_nothing_until_it_is_touched() -> None:
    before = shared.report()["resident_nbytes"]
    a = shared.zeros(1 << 27)

    b = pickle.loads(pickle.dumps(a))
    b[-1] = 1

    assert a[-1] == 1 and a.nbytes == 1 << 30 and math.prod(b.shape) == 1 << 27
    assert shared.report()["resident_nbytes"] - before < 1 << 20
