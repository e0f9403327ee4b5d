"""`shared.Store`, `shared.List`, `sa.attach`: names that processes share, related ones and others, and what is left when they die."""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing.managers
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from soak import SOAK_MINUTES

import shmarray as sa
from scheduler import rendezvous
from scheduler.journal import Journal
from scheduler.ownership import Table
from shmarray import __main__ as command
from shmarray import shared
from shmarray import store as stores
from shmarray.shared_memory import lease_of

pytestmark = pytest.mark.timeout(180 + 6 * SOAK_MINUTES)

LONG_S = 90.0
LEAST_KILLS = 60
METHODS = ("fork", "spawn", "forkserver")


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has names of its own, and leaves no array, store or socket."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(rendezvous, "LOGINS", str(tmp_path / "logins"))
    monkeypatch.setattr(rendezvous, "TEMPORARY", str(tmp_path))
    gc.collect()
    before = shared.report()
    yield
    gc.collect()
    report = shared.report()
    assert report["arrays"] <= before["arrays"] and report["stores"] == []
    assert report["handles_on_their_way"] <= before["handles_on_their_way"]  # those of other tests take a minute to expire
    shared.family().check()
    assert not (tmp_path / "shmarray").exists() or os.listdir(tmp_path / "shmarray") == []


@pytest.fixture(params=METHODS)
def context(request: pytest.FixtureRequest) -> Any:
    return multiprocessing.get_context(request.param)


@pytest.fixture
def store() -> Iterator[shared.Store]:
    with shared.Store() as made:
        yield made
        if made._collection is not None:
            made._collection.check()


def finish(processes: list[Any]) -> None:
    for process in processes:
        process.join(LONG_S)
    assert [process.exitcode for process in processes] == [0] * len(processes)
    for process in processes:
        process.close()


def environment() -> dict[str, str]:
    """Return that of a process that is no relative."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("SHMARRAY_SHARED")}
    return {**found, "PYTHONPATH": os.pathsep.join(sys.path)}


@contextlib.contextmanager
def script(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run an unrelated Python program, which prints a line when it is ready; have it end, unless it was killed."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
            assert process.stdin is not None
            if process.poll() is None:
                process.stdin.close()
                assert process.wait(LONG_S) == 0
        finally:
            process.kill()


def tell(process: subprocess.Popen[str], text: str = "go") -> str:
    """Send a line, and return the one that comes back."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(text + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


# What other processes do: found by name there.


def write_into(store: Any) -> None:
    store["a"][2:4] = 7
    store["new"] = np.arange(3)
    store["number"] += 1
    store.list("log").append(os.getpid())


def count_under_lock(store: Any, names: list[str], n: int, start: Any) -> None:
    start.wait()
    for i in range(n):
        name = names[i % len(names)]
        with store.lock(name):
            store[name] += 1


def append_to(log: Any, who: int, n: int, start: Any) -> None:
    start.wait()
    for i in range(n):
        log.append((who, i))
        if i % 10 == 0:
            log.extend([(who, f"{i}a"), (who, f"{i}b"), (who, f"{i}c")])


def pop_all(store: Any, log: Any, got: Any) -> None:
    found = []
    while True:
        try:
            found.append(log.pop())
        except IndexError:
            break
    got.send((found, store.pop("once", None)))
    got.close()


def set_after(store: Any, go: Any) -> None:
    go.recv()
    store["late"] = np.full(3, 5.0)


# A mapping.


def test_it_is_a_mapping_as_that_of_a_manager(store: shared.Store) -> None:
    with multiprocessing.Manager() as manager:
        results = []
        for d in (store, manager.dict()):
            found: list[Any] = []
            d["a"] = 1
            d.update({"b": [1, {"x": (2, 3)}], "c": None}, d="text")
            d.update([("e", 2.5)])
            found += [sorted(d.keys()), d["b"], len(d), "a" in d, "z" in d, d.get("z"), d.get("z", 5), dict(d.items()) == d.copy()]
            found += [d.pop("a"), d.pop("a", 9), d.setdefault("a", 4), d.setdefault("a", 5), sorted(map(str, d.values()))]
            found += [d.popitem(), list(d.keys())]
            del d["b"]
            for act in (lambda d=d: d["b"], lambda d=d: d.pop("b"), lambda d=d: d.__delitem__("b")):
                with pytest.raises(KeyError):
                    act()
            d.clear()
            found += [len(d), list(d.keys())]
            with pytest.raises(KeyError):
                d.popitem()
            results.append(found)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "value",
    [
        None, True, -5, 1 << 62, 1 << 70, 2.5, math.inf, "text", "ümläut \ud800 \0", "long" * 5000, b"", b"bytes" * 999, 1j, (1, 2), [1],
        {3: {4}}, np.float32(1.5), np.int8(-3), np.datetime64("2024-01-01", "s"), np.bool_(True), np.complex64(2j), np.str_("x"), range(5),
        Path("/x"), ValueError("v"),
    ],
    ids=lambda v: repr(v)[:20],
)  # fmt: skip
def test_values_come_back_as_they_are(store: shared.Store, value: Any) -> None:
    store["x"] = value

    found = store["x"]
    assert type(found) is type(value) and (repr(found) == repr(value))
    store.list("log").append(value)
    assert repr(store.list("log")[0]) == repr(value)


@pytest.mark.parametrize("dtype", ["?", "i1", ">i4", "f8", "c16", "S5", "U3", "M8[ns]", [("a", "<i4"), ("b", "<f8", (2,))]])
@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (2, 3, 4)])
def test_arrays_of_any_kind_are_stored_as_the_memory_they_are(store: shared.Store, dtype: Any, shape: tuple[int, ...]) -> None:
    a = shared.zeros(shape, dtype)
    store["a"] = a
    store["copied"] = np.zeros(shape, dtype)

    for name in ("a", "copied"):
        found = store[name]
        assert type(found) is shared.SharedArray and (found.shape, found.dtype, found.strides) == (a.shape, a.dtype, a.strides)
    assert not a.size or (np.shares_memory(store["a"], a) and np.shares_memory(store["copied"], store["copied"]))
    assert store["a"].chunks == a.chunks


def test_views_are_stored_as_views_and_read_only_ones_stay_so(store: shared.Store) -> None:
    a = shared.array(np.arange(60.0).reshape(10, 6), chunks=(5, 6))
    frozen = a[1:3]
    frozen.flags.writeable = False
    store.update(part=a[2:8:2, ::-1], turned=a.T, frozen=frozen)
    a[4, 5] = -1

    np.testing.assert_array_equal(store["part"], a[2:8:2, ::-1])
    assert np.shares_memory(store["turned"], a) and store["turned"].shape == (6, 10)
    with pytest.raises(ValueError, match="read-only"):
        store["frozen"][0] = 1


def test_what_an_array_is_made_of_is_kept_by_the_store_alone(store: shared.Store) -> None:
    a = shared.full(1000, 3.0)
    store["a"] = a
    store["nested"] = {"part": a[5:], "same": a[5:], "number": shared.Value("i", 4)}
    store["lazy"] = sa.ones((20, 30)) * 2
    del a
    gc.collect()
    shared.report()
    others = [shared.full(1000, 9.0) for _ in range(10)]  # would take its place

    assert (store["a"] == 3).all() and (store["nested"]["part"] == 3).all() and store["nested"]["number"].add(1) == 5
    assert store["nested"]["number"].value == 5 and np.shares_memory(store["nested"]["part"], store["nested"]["same"])
    assert store["lazy"].sum() == 1200
    before = shared.report()["arrays"]
    del store["nested"], store["lazy"]
    assert shared.report()["arrays"] == before - 2, "the Value and the lazy one's"
    assert (store.pop("a") == 3).all()
    assert shared.report()["arrays"] == before - 3
    del others


def test_numbers_arrays_lists_and_stores_are_shared_in_a_store(store: shared.Store) -> None:
    store.update(v=shared.Value("q", 5), numbers=shared.Array("d", [1, 2]), inner=shared.Store(), log=shared.List([1]), me=store)

    store["v"].add(2)
    store["numbers"][1] = 7
    store["inner"]["x"] = 1
    store["log"].append(2)

    assert (store["v"].value, store["numbers"][:], store["inner"]["x"], store["log"][:]) == (7, [1.0, 7.0], 1, [1, 2])
    assert type(store["v"]) is shared.Value and type(store["numbers"]) is shared.Array
    assert store["me"]["me"]["v"].value == 7, "a circle, which is freed all the same"
    store["all"] = [store["inner"], store["log"]]
    assert store["all"][0]["x"] == 1 and store["all"][1][1] == 2


def test_an_update_of_several_is_one_step_and_one_that_fails_is_none(store: shared.Store) -> None:
    store["a"] = 1
    tail = store._live.tail

    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        store.update(a=2, b=lambda: 1)

    assert dict(store) == {"a": 1} and store._live.tail == tail


def test_iterating_passes_over_what_is_taken_out(store: shared.Store) -> None:
    store.update(a=1, b=2, c=3)

    found = []
    for name, value in store.items():
        found.append((name, value))
        store.pop("b", None)

    assert found == [("a", 1), ("c", 3)] and list(store.values()) == [1, 3]


@pytest.mark.parametrize(
    "act, error, text",
    [
        (lambda s: s.__setitem__(3, 1), TypeError, "names in a store are str; got 3"),
        (lambda s: s.__setitem__("", 1), ValueError, "is not empty"),
        (lambda s: s["missing"], KeyError, "missing"),
        (lambda s: s.list("n"), TypeError, "has a int under 'n', no list"),
        (lambda s: s.wait("missing", timeout=0.02), TimeoutError, "waiting 0.02 s for 'missing' in a store without a name: .* There is: n"),
        (lambda s: s.lock("n", mode="rw"), ValueError, "'r' to read or 'w' to write"),
        (lambda s: s.__setitem__("x" * 5000, 1), ValueError, "names take up to 4096 bytes"),
        (lambda s: shared.Store("a/b"), ValueError, "'a/b' is no name for a store"),
        (lambda s: shared.Store(3), TypeError, "a str; got int"),
        (lambda s: shared.Store("nobody"), FileNotFoundError, r"opening store 'nobody': there is none\. Looked for"),
        (lambda s: sa.attach("nobody"), FileNotFoundError, "there is none"),
        (lambda s: sa.attach("nobody", timeout=0.02), TimeoutError, "waited 0.02 s for store 'nobody'"),
        (lambda s: pickle.loads(pickle.dumps(shared.List([1])))[5], IndexError, "index 5 out of range: it has 1 items"),
    ],
)  # fmt: skip
def test_mistakes_are_told(store: shared.Store, act: Any, error: type[Exception], text: str) -> None:
    store["n"] = 1
    with pytest.raises(error, match=text):
        act(store)


def test_a_closed_store_says_so_and_what_was_got_stays_good() -> None:
    store = shared.Store("run", create=True)
    store["a"] = np.arange(5)
    a = store["a"]
    store.close()
    store.close()

    assert a.sum() == 10 and "closed" in repr(store)
    with pytest.raises(ValueError, match="store 'run' was closed here"):
        store["a"]
    with pytest.raises(FileNotFoundError):
        shared.Store("run")


# A list.


def test_it_is_a_list(store: shared.Store) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = store.list("x"), []
    acts: list[Any] = [
        lambda x, i, v: x.append(v), lambda x, i, v: x.extend([v, v + 1]), lambda x, i, v: x.insert(i, v), lambda x, i, v: x.pop(),
        lambda x, i, v: x.pop(i), lambda x, i, v: x.__setitem__(i, v), lambda x, i, v: x.__delitem__(i), lambda x, i, v: x.remove(v % 5),
        lambda x, i, v: x.__setitem__(slice(i, i + 3), [v] * (v % 4)), lambda x, i, v: x.__delitem__(slice(i, None, 2)),
        lambda x, i, v: x.reverse(), lambda x, i, v: x.__setitem__(slice(None, None, 2), [v] * 3),
        lambda x, i, v: x.__delitem__(slice(None)), lambda x, i, v: x.clear(), lambda x, i, v: x.insert(-100, v),
        lambda x, i, v: x.__setitem__(slice(5, 2), [v]), lambda x, i, v: x[i], lambda x, i, v: x.index(v % 5),
        lambda x, i, v: x.sort(key=lambda n: n % 4, reverse=v % 2 == 0), lambda x, i, v: x.__imul__(i % 3 if len(x) < 40 else 0) is x,
        lambda x, i, v: [x + [v], x * 2, 2 * x, x.copy(), list(reversed(x)), x.index(v % 5, i), x.count(v)],
    ]  # fmt: skip
    weights = np.array([6, 6, 4, 2, 2, 3, 2, 1, 1, 0.4, 0.3, 1, 0.1, 0.1, 1, 1, 1, 1, 1, 0.3, 1])
    for _ in range(600):
        act = acts[rng.choice(len(acts), p=weights / weights.sum())]
        i, v = int(rng.integers(-12, 12)), int(rng.integers(0, 20))
        outcomes = []
        for x in (theirs, ours):
            try:
                outcomes.append(act(x, i, v))
            except (IndexError, ValueError) as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]
        assert ours == theirs and len(ours) == len(theirs)
    assert theirs[1:5] == ours[1:5] and theirs[::-1] == ours[::-1] and list(ours) == theirs and (3 in ours) == (3 in theirs)
    assert repr(ours).startswith(("shared.List([", "<shared.List of"))


def test_it_has_every_method_that_the_list_of_a_manager_has() -> None:
    exposed = set(dir(multiprocessing.managers.ListProxy)) & set(dir(list))

    assert {"sort", "__mul__", "__iadd__"} <= exposed
    assert exposed <= set(dir(shared.List))


@pytest.mark.parametrize("act, left", [(lambda x, key: x.sort(key=key), [0, 1, 2, 3]), (lambda x, key: x.remove(Like(3, key)), [1, 2, 0])])
def test_what_looks_before_it_changes_begins_again_after_another_change(act: Any, left: list[int]) -> None:
    ours, other = shared.List([3, 1, 2]), []

    def key(value: int) -> int:
        if not other:
            other.append(True)
            ours.append(0)
            ours.insert(0, ours.pop(1))
        return value

    act(ours, key)

    assert ours[:] == left


class Like:
    """What is equal to ``value``, and calls ``key`` to find out."""

    def __init__(self, value: int, key: Any) -> None:
        self.value = value
        self.key = key

    def __eq__(self, other: object) -> bool:
        return bool(self.key(other) == self.value)

    __hash__ = None  # type: ignore[assignment]


def test_arrays_stay_the_memory_they_are_when_their_order_changes() -> None:
    ours = shared.List([shared.full(10, float(n)) for n in (3, 1, 2)])
    first = ours[0]
    arrays = shared.report()["arrays"]
    ours.sort(key=lambda a: a[0])
    ours.reverse()
    ours *= 2
    first[:] = 9

    assert [a[0] for a in ours] == [9, 2, 1] * 2
    assert shared.report()["arrays"] <= arrays + 1, "none was copied; the journal may have grown"
    ours._collection.check()


def test_appending_does_not_write_the_list_again(store: shared.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    write = Journal._write
    monkeypatch.setattr(Journal, "_write", lambda self, offset, values: (written.append(len(values)), write(self, offset, values))[1])
    log = store.list("log")
    for i in range(5000):
        log.append(i)

    assert sum(written) < 6 * 5000 * 32, "a constant for each, on average"
    assert log[4999] == 4999 and len(log) == 5000


def test_items_that_are_arrays_are_memory_and_go_when_taken_out(store: shared.Store) -> None:
    log = store.list("log")
    before = shared.report()["arrays"]
    for i in range(5):
        log.append({"i": i, "values": shared.full(10, float(i))})

    log[2]["values"][:] = 9
    assert log[2]["values"].sum() == 90 and shared.report()["arrays"] == before + 5
    assert log.pop(2)["values"].sum() == 90
    log[0] = "nothing"
    assert shared.report()["arrays"] == before + 3
    log.clear()
    assert shared.report()["arrays"] == before


# Processes of one family.


def test_another_process_has_the_same_store(context: Any, store: shared.Store) -> None:
    store.update(a=shared.zeros(10), number=1)
    process = context.Process(target=write_into, args=(store,))
    process.start()
    pid = process.pid
    finish([process])

    assert store["a"].sum() == 14 and store["number"] == 2 and store["log"][:] == [pid]
    np.testing.assert_array_equal(store["new"], [0, 1, 2])


def test_eight_processes_count_exactly_under_locks(context: Any, store: shared.Store) -> None:
    names = ["counter", "other", "third"]
    store.update(dict.fromkeys(names, 0))
    start = context.Barrier(8)
    processes = [context.Process(target=count_under_lock, args=(store, names, 60, start)) for _ in range(8)]
    for process in processes:
        process.start()
    finish(processes)

    assert [store[name] for name in names] == [160] * 3


def test_four_processes_append_and_all_arrives_in_their_order(context: Any, store: shared.Store) -> None:
    log, start = store.list("log"), context.Barrier(4)
    processes = [context.Process(target=append_to, args=(log, who, 200, start)) for who in range(4)]
    for process in processes:
        process.start()
    finish(processes)

    found = log[:]
    assert len(found) == 4 * 260
    for who in range(4):
        mine = [i for w, i in found if w == who]
        assert [i for i in mine if isinstance(i, int)] == list(range(200))
    for at, (who, i) in enumerate(found):
        if str(i).endswith("a"):
            assert found[at + 1 : at + 3] == [(who, f"{i[:-1]}b"), (who, f"{i[:-1]}c")], "several at once stay together"


def test_what_several_take_out_one_gets(context: Any, store: shared.Store) -> None:
    store["once"] = "it"
    log = store.list("log")
    log.extend(range(300))
    pipes = [context.Pipe(duplex=False) for _ in range(3)]
    processes = [context.Process(target=pop_all, args=(store, log, writer)) for _, writer in pipes]
    for process in processes:
        process.start()
    results = [reader.recv() for reader, _ in pipes]
    finish(processes)
    for pipe in pipes:
        for end in pipe:
            end.close()

    assert sorted(item for found, _ in results for item in found) == list(range(300))
    assert sorted(str(once) for _, once in results) == ["None", "None", "it"]


def test_waiting_ends_when_another_process_sets_it(context: Any, store: shared.Store) -> None:
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=set_after, args=(store, reader))
    process.start()
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(store.wait("late", timeout=LONG_S)))
    thread.start()
    with pytest.raises(TimeoutError):
        store.wait("late", timeout=0.05)
    writer.send("go")
    thread.join(LONG_S)
    finish([process])
    reader.close()
    writer.close()
    assert (results[0] == 5).all() and store.wait("late") is not None


def test_threads_change_it_together(store: shared.Store) -> None:
    failures: list[BaseException] = []
    log = store.list("log")

    def work(who: int) -> None:
        try:
            for i in range(50):
                store[f"{who}-{i % 5}"] = np.full(10, who)
                assert (store[f"{who}-{i % 5}"] == who).all()
                log.append(who)
                with store.lock("sum"):
                    store["sum"] = store.get("sum", 0) + 1
                store.pop(f"{who}-{(i + 1) % 5}", None)
                list(store.items())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert store["sum"] == 300 and sorted(log) == sorted([*range(6)] * 50)


def test_a_lock_of_a_name_goes_with_its_holder_and_the_next_is_told_once(store: shared.Store) -> None:
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def hold() -> None:
        with store.lock("name"):
            writer.send(1)
            signal.pause()

    process = context.Process(target=hold)
    process.start()
    reader.recv()
    assert not store.lock("name").acquire(timeout=0.02)
    assert store.lock("other").acquire(timeout=0.02), "another name, another lock"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with pytest.raises(sa.AbandonedLockError, match=f"process {process.pid}"):
        store.lock("name").__enter__()
    with store.lock("name"):
        pass
    reader.close()
    writer.close()


def test_the_lock_of_an_array_is_the_arrays_own(store: shared.Store, in_thread: Any) -> None:
    store.update(a=shared.zeros((4, 4), chunks=(2, 2)), v=shared.Value("i"))
    with store.lock("a") as view:
        assert view.shape == (4, 4) and in_thread(lambda: store["a"].lock((1, 1)).acquire(timeout=0.02)) is False
    with store.lock("v"):
        assert in_thread(lambda: store["v"].acquire(timeout=0.02)) is False


def test_a_forked_child_goes_on_with_a_named_store_and_does_not_end_it() -> None:
    store = shared.Store("run", create=True)
    store["a"] = shared.zeros(3)
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            store["a"][:] = 4
            store["child"] = shared.Store("run")["a"]
            store.close()
            status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with shared.Store("run") as again:
        assert again["a"].sum() == 12 and np.shares_memory(again["child"], store["a"])
    store.close()


# Unrelated processes.

SIMULATION = """
import sys
import numpy as np
from shmarray import shared
store = shared.Store(sys.argv[1], create=True)
store["temperature"] = np.zeros((100, 100))
store["params"] = {"dt": 0.5}
store["step"] = 0
print("ready", flush=True)
for line in sys.stdin:
    store["temperature"] += 1
    store["step"] += 1
    store.list("log").append(f"step {store['step']}")
    print(float(store["temperature"].sum()), sorted(store), flush=True)
store.close()
"""


def test_an_unrelated_process_opens_it_by_name_live() -> None:
    with script(SIMULATION, "run42") as simulation:
        store = shared.Store("run42")
        temperature = store["temperature"]
        assert store["params"] == {"dt": 0.5} and lease_of(temperature).segment is not shared.family()

        assert tell(simulation).startswith("10000.0")
        assert (temperature == 1).all() and store["step"] == 1 and store.list("log")[:] == ["step 1"]
        temperature[0] = 5
        store["mine"] = shared.full((2, 2), 3.0)
        assert tell(simulation) == f"{(99 * 100) * 2.0 + 600} ['log', 'mine', 'params', 'step', 'temperature']"
        assert lease_of(store["mine"]).segment is temperature_segment(store), "a copy in the store's memory"
        with store.lock("step"):
            store["step"] = 100
        tell(simulation)
        assert store["step"] == 101
        report = lease_of(temperature).segment.statistics()
        assert sorted(report["owners"]) == sorted([simulation.pid, os.getpid()])
        store.close()


def temperature_segment(store: shared.Store) -> Any:
    return lease_of(store["temperature"]).segment


def test_attached_arrays_are_live_lazy_and_read_only() -> None:
    with script(SIMULATION, "run42") as simulation, sa.attach("run42", timeout=LONG_S) as run:
        x = run["temperature"]
        mean = (x * 2).mean()
        assert isinstance(x, sa.Array) and x.shape == (100, 100) and mean.compute() == 0
        for step in range(1, 4):
            tell(simulation)
            assert mean.compute() == 2 * step and x.max().compute() == step and run["step"] == step
        assert run["log"] == ["step 1", "step 2", "step 3"] and set(run) == {"temperature", "params", "step", "log"} and len(run) == 4
        assert "temperature  array (100, 100) float64, 78.1 KiB" in repr(run) and "read-only: 4 names" in repr(run)
        for act in (lambda: x.__setitem__(0, 1.0), lambda: x.__iadd__(1), lambda: (x + 1).compute(out=x), lambda: x.lock().__enter__(),
                    lambda: np.add(x, 1, out=x), lambda: x.shared().__setitem__(0, 1),
                    lambda: pickle.loads(pickle.dumps(x)).__setitem__(0, 1)):  # fmt: skip
            with pytest.raises(ValueError, match="read-only"):
                act()
        assert mean.compute() == 6
        with x.lock(mode="r") as view:
            assert not view.flags.writeable

        with sa.attach("run42", writeable=True) as run2:
            y = run2["temperature"]
            y += 10
        assert mean.compute() == 26


def test_a_watcher_takes_no_lock_from_the_simulation(in_thread: Any) -> None:
    with shared.Store("run", create=True) as store:
        store["x"] = shared.zeros(100)
        run = sa.attach("run")
        x = run["x"]
        total = x.sum()
        with store.lock("x") as view:
            view.fill(2)
            assert in_thread(total.compute) == 200, "while it is locked to be written"
        with shared.Store("run") as other:
            assert other["x"].sum() == 200
        run.close()
        assert "closed" in repr(run)


SMALL = """
import sys
sys.path[:] = [p for p in sys.path if p not in sys.argv[2:]]
from shmarray import shared
store = shared.Store(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    try:
        value = store[line.strip()]
        print(type(value).__name__, value if not hasattr(value, "sum") else value.sum(), flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


class OnlyHere:
    """Of a module that the other process cannot import."""


def test_a_process_without_our_modules_gets_arrays_and_numbers() -> None:
    with shared.Store("run", create=True) as store:
        store.update(a=np.arange(5), n=3, f=np.float64(2.5), text="x", ours=OnlyHere(), v=shared.Value("i", 4))
        OnlyHere.__module__ = "nowhere"
        try:
            with pytest.raises(Exception, match="nowhere"):
                store["bad"] = OnlyHere()
        finally:
            OnlyHere.__module__ = __name__
        with script(SMALL, "run", str(Path(__file__).parent)) as other:
            assert [tell(other, name) for name in ("a", "n", "f", "text")] == ["SharedArray 10", "int 3", "float64 2.5", "str x"]
            assert tell(other, "ours") == "ModuleNotFoundError"
            assert tell(other, "v").startswith("Value") and tell(other, "a") == "SharedArray 10"


# Names.


def test_a_name_is_one_stores_at_a_time() -> None:
    with shared.Store("run", create=True) as store:
        with pytest.raises(FileExistsError, match=f"creating store 'run': process {os.getpid()} has one of that name"):
            shared.Store("run", create=True)
        with shared.Store("run", create=True, exist_ok=True) as same:
            same["x"] = 1
        assert store["x"] == 1
    with shared.Store("run", create=True, exist_ok=True) as new:
        assert list(new) == []


def test_many_who_open_or_create_it_at_once_share_one() -> None:
    for _ in range(5):
        made: list[shared.Store] = []
        barrier = threading.Barrier(5)

        def join(made: list[shared.Store] = made, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            made.append(shared.Store("run", create=True, exist_ok=True))
            with made[-1].lock("n"):
                made[-1]["n"] = made[-1].get("n", 0) + 1

        threads = [threading.Thread(target=join) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [store["n"] for store in made] == [5] * 5
        for store in made:
            store.close()


def test_a_store_that_is_dropped_gives_its_name_back() -> None:
    store = shared.Store("run", create=True)
    store["a"] = np.zeros(10)
    del store
    gc.collect()
    with pytest.raises(FileNotFoundError):
        shared.Store("run")


# Deaths.


def test_users_of_a_store_whose_owner_was_killed_go_on_and_nobody_can_join(tmp_path: Path) -> None:
    with script(SIMULATION, "run42") as simulation:
        store = shared.Store("run42")
        temperature = store["temperature"]
        tell(simulation)
        simulation.kill()
        simulation.wait()

        assert (temperature == 1).all() and store["params"] == {"dt": 0.5}
        temperature += 1
        store["more"] = np.arange(4)
        store.list("log").append("after")
        with store.lock("step"):
            store["step"] += 1
        assert store["more"].sum() == 6 and store["log"][:] == ["step 1", "after"] and store["step"] == 2
        store._live.check()
        assert os.listdir(tmp_path / "shmarray") == ["run42.sock"], "a dead socket, and nothing else"
        with pytest.raises(FileNotFoundError, match="opening store 'run42': the process that served it is gone"):
            shared.Store("run42")
        assert os.listdir(tmp_path / "shmarray") == []
        with pytest.raises(EOFError, match=f"process {simulation.pid}, which created it, has ended, and no other one uses it"):
            store.wait("never")
        on_its_way = pickle.dumps(store)
        with pytest.raises(TimeoutError):
            store.wait("never", timeout=3 * stores.LOOK_FOR_USERS_S)  # whoever receives it may set it
        pickle.loads(on_its_way)
        segment = lease_of(temperature).segment
        store.close()
        del store, temperature
        gc.collect()
        assert segment.statistics()["arrays"] == 0


def die_at(at: int, act: Any) -> None:
    """Do ``act()``, and be killed before the store number ``at`` into memory that others see."""
    left = [at]

    def dying(method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return method(*arguments)

        return call

    Journal._set, Journal._write = dying(Journal._set), dying(Journal._write)  # type: ignore[method-assign]  # in this process, for good
    Table._hold, Table._set = dying(Table._hold), dying(Table._set)  # type: ignore[method-assign]
    act()
    left[0] = -1


@pytest.mark.slow
@pytest.mark.parametrize("op", ["put", "new", "pop", "append", "grow"])
def test_a_user_who_is_killed_in_the_middle_leaves_the_old_or_the_new_and_no_memory(op: str) -> None:
    context = multiprocessing.get_context("fork")
    outcomes = set()
    for at in range(200):
        with shared.Store("run", create=True) as store:
            store["a"] = np.full(1000, 1.0)
            log = store.list("log")
            log.append("first")
            act: Any = {
                "put": lambda s=store: s.__setitem__("a", np.full(1000, 2.0)),
                "new": lambda s=store: s.__setitem__("new", {"x": shared.full(10, 2.0), "large": b"x" * 10000}),
                "pop": lambda s=store: s.pop("a"),
                "append": lambda log=log: log.append(b"y" * 5000),
                "grow": lambda log=log: log.extend([b"y" * 1000] * 40),
            }[op]
            process = context.Process(target=die_at, args=(at, act))
            process.start()
            process.join()
            is_done = process.exitcode == 0
            assert is_done or process.exitcode == -signal.SIGKILL
            store._live.check()
            log._collection.check()
            is_new: Any = {
                "put": lambda s=store: s["a"][0] == 2,
                "new": lambda s=store: "new" in s and len(s["new"]["large"]) == 10000 and s["new"]["x"].sum() == 20,
                "pop": lambda s=store: "a" not in s,
                "append": lambda s=store: s["log"][1:] == [b"y" * 5000],
                "grow": lambda s=store: s["log"][1:] == [b"y" * 1000] * 40,
            }[op]()
            outcomes.add(bool(is_new))
            assert is_new or ((store["a"] == 1).all() and "new" not in store and log[:] == ["first"])
            store["next"] = 1
            log.append("next")
            log.clear()
            del log, act
            store.clear()
            gc.collect()
            shared.report()
            assert shared.report()["arrays"] <= 2, "the root of the store and its block"
        if is_done:
            break
    assert is_done and outcomes == {True, False}


def test_when_all_are_killed_a_dead_socket_is_all_that_is_left(tmp_path: Path) -> None:
    with script(SIMULATION, "run42") as simulation, script(SMALL, "run42") as user:
        assert tell(user, "step") == "int 0"
        for process in (simulation, user):
            process.kill()
        for process in (simulation, user):
            process.wait()
    assert os.listdir(tmp_path / "shmarray") == ["run42.sock"]
    assert not [name for name in os.listdir("/dev/shm") if "shmarray" in name]
    assert "run42: dead; its owner is gone, and its socket is swept" in stores.stores()
    assert os.listdir(tmp_path / "shmarray") == []


@pytest.mark.slow
def test_users_are_killed_again_and_again_and_nothing_is_lost_or_leaks() -> None:
    """Children that change it at random, and are killed at random."""
    context = multiprocessing.get_context("fork")
    rng = np.random.default_rng(1)
    with shared.Store() as store:
        store["log"] = shared.List()
        deadline = time.monotonic() + 6 * SOAK_MINUTES
        kills = 0

        def live(seed: int) -> None:
            mine = np.random.default_rng(seed)
            log = store["log"]
            while True:
                name = f"n{mine.integers(6)}"
                draw = mine.random()
                if draw < 0.4:
                    value = int(mine.integers(100))
                    store[name] = np.full(100, value) if draw < 0.2 else {"values": shared.full(50, value)}
                elif draw < 0.6:
                    store.pop(name, None)
                elif draw < 0.8:
                    log.append(b"z" * int(mine.integers(3000)))
                elif len(log) > 20:
                    with contextlib.suppress(IndexError):
                        log.pop(0)
                found = store.get(name)
                found = found["values"] if isinstance(found, dict) else found
                if found is not None and found.min() != found.max():
                    os._exit(3)

        living = [context.Process(target=live, args=(seed,)) for seed in range(3)]
        for process in living:
            process.start()
        while time.monotonic() < deadline or kills < LEAST_KILLS:
            victim = int(rng.integers(3))
            time.sleep(float(rng.random()) * 0.05)  # when it dies is left to chance
            assert living[victim].is_alive(), living[victim].exitcode
            living[victim].kill()
            living[victim].join()
            kills += 1
            store._live.check()
            store["log"]._collection.check()
            living[victim] = context.Process(target=live, args=(100 + kills,))
            living[victim].start()
        for process in living:
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
        store["next"] = 1
        store["log"].append(1)
        store.clear()
        shared.report()
        assert shared.report()["arrays"] <= 2


# From the shell.


def test_the_command_lists_stores(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["stores"]) == 0
    assert "There are no stores of this user" in capsys.readouterr().out
    with script(SIMULATION, "run42") as simulation, shared.Store("mine", create=True) as mine:
        mine["x"] = OnlyHere()
        mine.list("log")
        assert command.main(["stores"]) == 0
        text = capsys.readouterr().out
        assert f"run42: owner {simulation.pid}; 3 names, 78.2 KiB\n  temperature  array (100, 100) float64, 78.1 KiB\n" in text
        assert f"mine: owner {os.getpid()}; 2 names" in text and "  x  object" in text and "  log  list" in text


def test_the_report_names_stores_and_who_uses_them() -> None:
    with shared.Store("run", create=True) as store:
        store["a"] = np.zeros(10)
        report = shared.report()
        assert [(s["name"], s["kind"], s["users"]) for s in report["stores"]] == [("run", "store", [os.getpid()])]
        assert f"store 'run', which holds 2 of them, is used by {os.getpid()}" in str(report)


def test_exist_ok_is_for_making_one() -> None:
    for mistake in (lambda: shared.Store("run", exist_ok=True), lambda: shared.Store(exist_ok=True)):
        with pytest.raises(ValueError, match="create=True, exist_ok=True"):
            mistake()
    with pytest.raises(FileNotFoundError, match="exist_ok=True beside it, whichever process comes first"):
        shared.Store("run")


def test_a_list_refuses_an_index_that_is_no_integer() -> None:
    with pytest.raises(TypeError, match="must be integers or slices, not str"):
        shared.List([1])["a"]
