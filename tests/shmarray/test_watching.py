"""A simulation that is watched: frames in whole cells whoever is stopped or killed meanwhile, and a line in the terminal.

The state of the simulations here is the number of the step, everywhere: a cell that holds two numbers is torn.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shmarray as sa
from scheduler import rendezvous
from shmarray import publish, shared, watching
from shmarray.publish import CELL_NBYTES, Published, Publisher, Seqlocks, cell_sizes

pytestmark = pytest.mark.timeout(180)

LONG_S = 90.0
FOR_EVER = 10**9  # steps
DRIVER = """
import os, signal, sys
import shmarray as sa
from shmarray import publish

name, steps, every, death = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def step(u, v):
    return u + 1, v + 1

def callback(frame):
    print("at", frame.step, flush=True)
    sys.stdin.readline()

def die_while_copying(self, step, state):
    if self.board.header[publish._ASKED] != self.seen:
        self.locks[0].begin(0)
        os.kill(os.getpid(), getattr(signal, death))
        self.locks[0].end(0, step)
    look(self, step, state)

look = publish.Publisher.look
if death != "-":
    publish.Publisher.look = die_while_copying
with sa.shared.Store(name, create=True) as store:
    sa.iterate(step, sa.zeros((700, 600)), sa.zeros((30, 40)), steps=steps, every=every, callback=callback, publish=store)
    print("done", flush=True)
    sys.stdin.readline()
"""
READER = """
import os, signal, sys
import shmarray as sa
from shmarray import publish

name, stop_at = sys.argv[1:]
run = sa.attach(name)
assert run["u"][:5].max().compute() >= 0
stop = lambda: os.kill(os.getpid(), signal.SIGSTOP)
if stop_at == "waiting":
    publish.time.sleep = lambda s: stop()
elif stop_at == "copying":
    publish.np.copyto = lambda target, source: stop()
else:
    print("reading", flush=True)
    consistent = sa.attach(name, consistent=True)
    while True:
        u, v = sa.compute(consistent["u"], consistent["v"])
        assert u.min() == u.max() == v.min() == v.max(), (u.min(), u.max(), v.min(), v.max())
print("reading", flush=True)
run["u"].compute()
"""


@pytest.fixture(autouse=True)
def names_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shm_entries: Any) -> Iterator[None]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(rendezvous, "LOGINS", str(tmp_path / "logins"))
    monkeypatch.setattr(rendezvous, "TEMPORARY", str(tmp_path))
    before = shm_entries()
    yield
    assert shared.report()["stores"] == []
    assert shm_entries() <= before


@contextlib.contextmanager
def script(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run an unrelated Python program, and kill it at the end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHMARRAY_SHARED")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "SHMARRAY_WORKERS": "2"}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def simulation(steps: int = FOR_EVER, every: int = FOR_EVER, death: str = "-") -> Any:
    """Run a simulation as "run", which says "at STEP" every so many steps, and waits for a line."""
    return script(DRIVER, "run", steps, every, death)


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def attached(**options: bool) -> Any:
    """Attach to the simulation as soon as its fields are there."""
    run = sa.attach("run", timeout=LONG_S, **options)
    run.wait("finished", LONG_S)
    return run


def wait_until_stopped(process: subprocess.Popen[str]) -> None:
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def boxes(shape: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    return itertools.product(*([slice(at, min(at + s, n)) for at in range(0, n, s)] for n, s in zip(shape, sizes, strict=True)))


def steps_of(values: np.ndarray[Any, Any]) -> list[float]:
    """Return the step of each cell of a frame, each of which is whole."""
    cells = [values[box] for box in boxes(values.shape, cell_sizes(values.shape, values.itemsize))]
    assert all(cell.min() == cell.max() for cell in cells)
    return [float(cell.flat[0]) for cell in cells]


# --- the protocol -----------------------------------------------------------------------------------------------------------------


def test_a_read_is_whole_or_refused_wherever_the_writer_is_between_its_loads() -> None:
    """Two writes of four moves each; the reader's four moves stand anywhere between them."""
    outcomes = set()
    for places in itertools.combinations_with_replacement(range(9), 4):  # of the writer's moves done before each of the reader's
        locks, data, copied = Seqlocks(bytearray(Seqlocks.nbytes(1)), 1), [0, 0], [-1, -1]

        def first(step: int, locks: Seqlocks = locks, data: list[int] = data) -> Iterator[Callable[[], None]]:
            yield lambda: locks.begin(0)
            yield lambda: data.__setitem__(0, step)
            yield lambda: data.__setitem__(1, step)
            yield lambda: locks.end(0, step)

        moves = [*first(1), *first(2)]
        done = 0

        def until(n: int, moves: list[Callable[[], None]] = moves) -> None:
            nonlocal done
            while done < n:
                moves[done]()
                done += 1

        def copy(places: tuple[int, ...] = places, until: Any = until, data: list[int] = data, copied: list[int] = copied) -> None:
            until(places[1])
            copied[0] = data[0]
            until(places[2])
            copied[1] = data[1]
            until(places[3])

        until(places[0])
        step = locks.read(0, copy)

        assert step is None or copied == [step, step], places
        outcomes.add(step)

    assert outcomes == {None, 0, 1, 2}


def test_without_the_second_look_a_torn_read_would_pass() -> None:
    locks, data, copied = Seqlocks(bytearray(Seqlocks.nbytes(1)), 1), [0, 0], [0, 0]

    def copy() -> None:
        copied[0] = data[0]
        locks.begin(0)
        data[:] = [1, 1]
        locks.end(0, 1)
        copied[1] = data[1]

    assert locks.read(0, copy) is None
    assert copied == [0, 1]


@pytest.mark.parametrize("shape", [(), (0,), (5,), (100_000,), (700, 600), (3, 0, 4), (40, 50, 60), (2, 1_000_000)])
def test_cells_tile_the_array_and_what_touches_a_box_is_found(shape: tuple[int, ...]) -> None:
    sizes = cell_sizes(shape, 8)
    entry = publish._Entry(np.dtype(float), shape, (), sizes, 0, 0)
    count = np.zeros(shape, int)
    for cell in range(entry.n):
        count[entry.box(cell)] += 1
        assert count[entry.box(cell)].nbytes <= CELL_NBYTES
    rng = np.random.default_rng(0)
    for _ in range(20):
        box = tuple(slice(*sorted(rng.integers(0, n + 1, 2).tolist())) for n in shape)
        filled = np.zeros(shape, int)
        for cell in entry.touched(box):
            filled[entry.box(int(cell))] = 1
        assert filled[box].all()
        far = [cell for cell in range(entry.n) if cell not in entry.touched(box)]
        assert not any(
            np.zeros(shape)[box].size and all(a.start < b.stop and b.start < a.stop for a, b in zip(entry.box(c), box, strict=True))
            for c in far
        )

    assert (count == 1).all()


def publisher(*arrays: np.ndarray[Any, Any]) -> Publisher:
    return Publisher(shared.family(), [(a.shape, a.dtype, tuple((n,) for n in a.shape)) for a in arrays], 0)


def test_only_what_is_wanted_is_copied_and_nothing_while_nobody_asks() -> None:
    state = np.zeros((700, 600))
    made = publisher(state)
    made.publish(0, [state])
    asked_for_state = []

    def give() -> list[np.ndarray[Any, Any]]:
        asked_for_state.append(1)
        return [state]

    state += 1
    made.look(1, give)
    assert not asked_for_state and made.values[0].max() == 0

    made.locks[0].wanted[3] = 1
    made.board.header[publish._ASKED] = 1
    made.look(2, give)
    made.look(3, give)

    assert asked_for_state == [1]
    assert list(made.locks[0].steps) == [2 * (cell == 3) for cell in range(made.entries[0].n)]
    assert made.values[0].sum() == made.values[0][made.entries[0].box(3)].size


def test_however_often_readers_ask_copying_takes_no_more_than_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    state, now = np.zeros(4), [0.0]
    made = publisher(state)

    def copy(*_: Any) -> None:
        now[0] += 5

    monkeypatch.setattr(publish, "_copy", copy)
    monkeypatch.setattr(publish.time, "perf_counter", lambda: now[0])
    served = []
    for batch in range(1, 31):
        made.locks[0].wanted[0] = 1
        made.board.header[publish._ASKED] = batch
        before = now[0]
        made.look(batch, lambda: [state])
        served.append(now[0] - before)
        now[0] += 1

    assert served.count(5) == 6 and 5 * served.count(5) <= now[0] / 2


def test_a_reader_sleeps_until_the_simulation_looks_again_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks, slept = [10.0], [], []
    monkeypatch.setattr(publish.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(publish.time, "monotonic_ns", lambda: round(now[0] * 1e9))

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds
        while looks and now[0] >= looks[0]:
            now_s, now[0] = now[0], looks.pop(0)
            made.look(3, lambda: [state])
            now[0] = now_s

    monkeypatch.setattr(publish.time, "sleep", sleep)
    state = np.arange(4.0)
    made = publisher(state)
    for now[0] in 10.08, 10.16:
        made.look(1, lambda: [state])
    now[0], looks[:] = 10.18, [10.2405]

    assert list(made.fields[0][1:]) == [1, 2, 3]
    assert slept[0] == pytest.approx(0.06, abs=0.001) and len(slept) < 6 and now[0] < 10.242

    slept.clear()
    now[0] = made.looked_ns / 1e9  # the next look is due in 0.08 s, and never comes
    made.fields[0][...]
    assert slept[0] == pytest.approx(0.0805, abs=0.001) and sum(slept) == pytest.approx(publish.FRESH_S, abs=publish.LONGEST_POLL_S)


# --- watching -----------------------------------------------------------------------------------------------------------------------


def test_frames_are_whole_and_move_on() -> None:
    with simulation(), attached() as run:
        u, part = run["u"], run["u"][100:400:3, ::-2]
        before = [0.0] * len(steps_of(u.compute()))
        for _ in range(25):
            steps = steps_of(u.compute())
            assert all(a <= b for a, b in zip(before, steps, strict=True))
            before = steps
            values = part.compute()
            assert values.shape == (100, 300) and values.min() >= 0
        assert min(before) > 0
        assert run["step"].compute() >= max(before) and not run["finished"].compute() and run["steps"] == FOR_EVER


def test_a_consistent_frame_is_of_one_step_in_all_its_fields() -> None:
    with simulation(), attached(consistent=True) as run:
        seen = set()
        for _ in range(20):
            u, v, total = sa.compute(run["u"], run["v"][3], run["v"].sum())
            assert u.min() == u.max() == v.min() == v.max() == total / 1200
            seen.add(u[0, 0])
        assert len(seen) > 10


def test_two_readers_each_get_frames_of_one_step() -> None:
    with simulation(), attached(consistent=True) as run, script(READER, "run", "never") as other:
        assert heard(other) == "reading"
        for _ in range(10):
            u, v = sa.compute(run["u"], run["v"])
            assert u.min() == u.max() == v.min() == v.max()
        assert other.poll() is None


@pytest.mark.parametrize("place", ["waiting", "copying"])
def test_a_stopped_reader_holds_nothing_up(place: str) -> None:
    with simulation(80, 20) as driver:
        assert heard(driver) == "at 20"
        with script(READER, "run", place) as reader:
            assert heard(reader) == "reading"
            wait_until_stopped(reader)
            for at in (40, 60, 80):
                tell(driver)
                assert heard(driver) == f"at {at}"
            tell(driver)
            assert heard(driver) == "done"
            with sa.attach("run", consistent=True) as run:
                assert set(steps_of(run["u"].compute())) == {80.0} and run["finished"].compute()
            tell(driver)
            assert driver.wait(LONG_S) == 0


def test_a_stopped_simulation_is_read_as_it_was_published_last() -> None:
    with simulation(300, 100) as driver:
        assert heard(driver) == "at 100"
        with sa.attach("run") as run:
            os.kill(driver.pid, signal.SIGSTOP)
            wait_until_stopped(driver)
            assert steps_of(run["u"].compute()) == steps_of(run["u"].compute())
            os.kill(driver.pid, signal.SIGCONT)
            tell(driver)
            assert heard(driver) == "at 200"
            assert min(steps_of(run["u"].compute())) > 100  # asked for while it was stopped


def test_of_a_simulation_that_is_killed_the_last_frame_stays() -> None:
    with simulation(300, 100) as driver:
        assert heard(driver) == "at 100"
        with sa.attach("run") as run:
            driver.kill()
            driver.wait()
            assert set(steps_of(run["u"].compute())) == {0.0}
            assert run["step"].compute() == 100 and not run["finished"].compute()


def test_of_one_that_is_killed_while_it_copies_that_cell_alone_is_lost() -> None:
    with simulation(300, 100, "SIGKILL") as driver:
        assert heard(driver) == "at 100"
        with sa.attach("run") as run:
            run["v"].compute()
            tell(driver)
            assert driver.wait(LONG_S) == -signal.SIGKILL
            with pytest.raises(sa.TornChunkError, match=rf"cell \[0:175, 0:150\].*process {driver.pid}, which was killed"):
                run["u"].sum().compute()
            assert run["u"][175:].sum().compute() == 0 and run["v"].max().compute() == 0


def test_of_one_that_is_stopped_while_it_copies_readers_say_so_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "TORN_S", 0.05)
    with simulation(300, 100, "SIGSTOP") as driver:
        assert heard(driver) == "at 100"
        with sa.attach("run") as run:
            run["v"].compute()
            tell(driver)
            wait_until_stopped(driver)
            with pytest.raises(sa.TornChunkError, match="it is stopped"):
                run["u"][:5].compute()
            os.kill(driver.pid, signal.SIGCONT)
            assert heard(driver) == "at 200"
            assert run["u"][:5].compute().min() > 100


def test_the_last_state_stays_with_those_who_attached_before_the_end() -> None:
    found = []

    def look(frame: sa.Frame) -> None:
        found.append(sa.attach("run", consistent=True))

    u = sa.iterate(lambda u: u + 1, sa.zeros((300, 300)), steps=7, every=7, callback=look, publish="run")

    with found[0] as run:
        np.testing.assert_array_equal(run["u"].compute(), u.compute())
        assert run["finished"].compute() and run["step"].compute() == 7
    with pytest.raises(FileNotFoundError):
        sa.attach("run")
    del found[:]


def test_what_ended_in_an_error_is_told_from_what_is_finished() -> None:
    def fail(frame: sa.Frame) -> None:
        with sa.attach("run") as run:
            run["u"][:2].compute()  # is published after the next step
        if frame.step == 2:
            raise ZeroDivisionError

    with shared.Store("run", create=True) as store:
        with pytest.raises(ZeroDivisionError):
            sa.iterate(lambda u: u + 1, sa.zeros((700, 600)), steps=5, callback=fail, publish=store)
        with sa.attach("run") as run:
            assert not run["finished"].compute() and run["step"].compute() == 2
            assert set(steps_of(run["u"].compute())) == {0.0, 2.0}
        with sa.attach("run", consistent=True) as run, pytest.raises(TimeoutError, match="steps 0 to 2, and it has ended, without"):
            run["u"].sum().compute()


def test_a_reader_gives_up_on_one_step_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "CONSISTENT_S", 0.05)
    monkeypatch.setattr(publish, "FRESH_S", 0.01)
    state = np.zeros((700, 600))
    made = publisher(state)
    made.publish(0, [state])
    made.locks[0].end(3, 9)  # a cell of another step; then the driver, this process, does no more
    made.locks[0].sequences[3] = 4

    with pytest.raises(TimeoutError, match=r"16 cells of one step .* steps 0 to 9, and after 0.05 s"):
        made.fields[0].lazy(True).sum().compute()
    assert made.fields[0].lazy(True)[:100, :100].sum().compute() == 0


# --- what is read ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [np.array(3.5), np.zeros((0, 4)), np.arange(10) % 3 == 0, np.arange(60_000.0).reshape(200, 300) * 1j, np.arange(70_000, dtype="i2")],
    ids=str,
)
def test_states_of_all_kinds_are_published(x: np.ndarray[Any, Any]) -> None:
    with shared.Store("run", create=True) as store:
        sa.iterate(lambda u: u.copy(), x, steps=2, publish=store)
        with sa.attach("run", consistent=True) as run:
            found = run["u"]
            assert found.shape == x.shape and found.dtype == x.dtype
            np.testing.assert_array_equal(found.compute(), x)
            np.testing.assert_array_equal((found + 1).compute(), x + 1)


def test_parts_and_expressions_of_a_field_are_those_of_its_values(executor: str) -> None:
    x = np.random.default_rng(0).random((300, 400))
    with shared.Store("run", create=True) as store:
        sa.iterate(lambda u: u.copy(), x, steps=1, publish=store)
        field = store["u"]
        with sa.attach("run", consistent=True) as run:
            u = run["u"]
            for key in (np.s_[5], np.s_[-1, 3], np.s_[10:200:7, ::-3], np.s_[..., 2], np.s_[5:5], np.s_[:, [1, 399]], np.s_[x > 0.5]):
                np.testing.assert_array_equal(field[key], x[key])
                np.testing.assert_array_equal(u[key].compute(), x[key])
            np.testing.assert_array_equal((u[1:] - u[:-1]).T[::2].compute(), (x[1:] - x[:-1]).T[::2])
            np.testing.assert_array_equal(sa.roll(u, 3, axis=0).reshape(-1)[::5].compute(), np.roll(x, 3, axis=0).reshape(-1)[::5])
            np.testing.assert_array_equal(u.map_blocks(np.sqrt).compute(), np.sqrt(x))
            np.testing.assert_array_equal(u.persist().compute(), x)
            y = sa.array(x)
            y += u
            np.testing.assert_array_equal(y.compute(), x + x)
            assert u.chunks == y.chunks
        np.testing.assert_array_equal(np.asarray(field), x)
        with pytest.raises(IndexError):
            field[300]
        with pytest.raises(IndexError):
            field[1, 2, 3]


def test_only_the_cells_that_are_looked_at_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "FRESH_S", 0.001)
    state = np.zeros((700, 600))
    made = publisher(state)
    made.publish(0, [state])
    u = made.fields[0].lazy()

    def wanted() -> list[int]:
        found = np.flatnonzero(np.frombuffer(made.locks[0].wanted, np.uint8)).tolist()
        np.frombuffer(made.locks[0].wanted, np.uint8)[:] = 0
        return found

    for expression, cells in (
        (u[:10, :10].sum(), [0]),
        (u[-1, 149:151] * 2, [12, 13]),
        (u[:10][:, 300:310].T[3:] + u[690:, :10].T[3:], [2, 12]),
        (u, list(range(16))),
    ):
        expression.compute()
        assert wanted() == cells


def test_copied_into_another_store_a_field_is_an_array() -> None:
    x = np.arange(12.0).reshape(3, 4)
    with shared.Store("run", create=True) as store, shared.Store("other", create=True) as other:
        sa.iterate(lambda u: u.copy(), x, steps=1, publish=store)
        assert isinstance(store["u"], Published)
        other["copy"] = sa.attach("run")["u"]
        np.testing.assert_array_equal(other["copy"], x)


def test_a_store_says_what_is_published() -> None:
    with shared.Store("run", create=True) as store:
        sa.iterate(lambda u: u + 1, np.zeros((3, 4)), steps=2, publish=store)
        assert "u  published (3, 4) float64" in repr(store)
        assert repr(store["u"]) == "<a field of a simulation that has ended: shape (3, 4), float64, step 2>"
        sa.iterate(lambda u: u + 1, np.zeros((3, 4)), steps=3, start=10, publish=store)
        assert (store["u"][0, 0], store["step"], store["steps"]) == (3, 13, 3)


# --- names ----------------------------------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_parameters_or_given() -> None:
    def step(height, speed, dt=0.1):  # type: ignore[no-untyped-def]
        return height, speed

    assert watching.names_of(step, 2, None) == ("height", "speed")
    assert watching.names_of(step, 2, ["h", "v"]) == ("h", "v")
    assert watching.names_of(lambda u, *others: (u, *others), 3, None) == ("state0", "state1", "state2")
    assert watching.names_of(max, 1, None) == ("state0",)


@pytest.mark.parametrize(
    "arguments, error, told",
    [
        ({"names": ["a", "b"], "publish": "run"}, ValueError, "give 1 different name, one for each array"),
        ({"names": [""], "publish": "run"}, ValueError, "give 1 different name"),
        ({"names": ["step"], "publish": "run"}, ValueError, "'step', which is the name of a fact"),
        ({"names": ["u"]}, TypeError, "publish="),
        ({"publish": 7}, TypeError, "got int"),
        ({"publish": "no/name"}, ValueError, "no/name"),
    ],
)
def test_what_cannot_be_published_is_refused(arguments: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        sa.iterate(lambda u: u, np.zeros(3), steps=1, **arguments)


def test_a_name_that_is_taken_is_refused() -> None:
    with shared.Store("run", create=True), pytest.raises(FileExistsError, match="run"):
        sa.iterate(lambda u: u, np.zeros(3), steps=1, publish="run")


# --- progress -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have meters draw in plain text, at once."""
    for name in ("rich.progress", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    make = watching.Meter
    monkeypatch.setattr(watching, "Meter", lambda total, unit: make(total, unit, minimum=0.0, dt=0.01, out=terminal.out))
    return terminal


def draw(terminal: Any, of: int, **arguments: Any) -> str:
    """Run some steps, of which the last waits until something was drawn."""

    def look(frame: sa.Frame) -> None:
        until = time.monotonic() + 20
        while f"{of} steps" not in terminal.text.replace(f"{of}/{of}", f"{of}"):
            assert time.monotonic() < until, (terminal.text, threading.enumerate())
            select.select([], [], [], 0.005)

    sa.iterate(lambda u: u + 1, np.zeros(5), every=of, callback=look, **arguments)
    return terminal.text


def test_progress_shows_steps_rate_and_memory(terminal: Any) -> None:
    text = draw(terminal, 6, steps=6, progress=True)

    assert "100% 6/6 steps, " in text and "/s, " in text and "B" in text.rsplit(",", 1)[1]


def test_without_a_number_of_steps_progress_has_no_total(terminal: Any) -> None:
    text = draw(terminal, 6, until=lambda u: u[0] >= 6, progress=True)

    assert "6 steps, " in text and "%" not in text


def test_the_configuration_asks_for_it_and_nothing_draws_a_second_bar(terminal: Any) -> None:
    with sa.config.set(progress=True, scheduler="processes"):
        text = draw(terminal, 6, steps=6)

    assert "6/6 steps" in text and "tasks" not in text
    assert not sa.config.progress


def test_progress_that_is_not_asked_for_draws_nothing(terminal: Any) -> None:
    with sa.config.set(progress=True):
        sa.iterate(lambda u: u + 1, np.zeros(5), steps=3, progress=False)

    assert "steps" not in terminal.text
