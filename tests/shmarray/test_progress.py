"""Progress bars: they say what is so, where somebody looks, and leave the terminal whole."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shmarray as sa
from scheduler.run import is_watched
from shmarray import progress
from shmarray.progress import Meter

ROOT = Path(sa.__file__).parent.parent
DEADLINE_S = 30
CURSOR_OFF, CURSOR_ON = "\x1b[?25l", "\x1b[?25h"


def wait_until(condition: Callable[[], object], what: str) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until, f"{what} did not happen"
        select.select([], [], [], 0.005)


@pytest.fixture(params=["rich", "tqdm", "text"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have one of the three draw."""
    if request.param != "text":
        pytest.importorskip(request.param)
    for name in ("rich", "tqdm"):
        if name != request.param:
            monkeypatch.setitem(sys.modules, f"{name}.progress" if name == "rich" else "tqdm.auto", None)
    return str(request.param)


class Recorder:
    """A display that notes what it is to show, and leaves word of it in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.shown: list[tuple[int, int | None, str]] = []
        self.made = self.closed = 0

    def __call__(self, *args: Any) -> Recorder:
        self.made += 1
        return self

    def show(self, *reading: Any) -> None:
        self.shown.append(reading)
        self.file.touch()

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder(tmp_path / "drawn")
    monkeypatch.setattr(progress, "_display", made)
    return made


def waiting(path: Path) -> Callable[[Any], Any]:
    """Return a function of chunks that ends when there is a file."""
    name = str(path)

    def wait(block: Any) -> Any:
        until = time.monotonic() + 30
        while not os.path.exists(name):
            assert time.monotonic() < until
            select.select([], [], [], 0.002)
        return block

    return wait


def bar_of(terminal: Any, **more: Any) -> sa.ProgressBar:
    return sa.ProgressBar(minimum=0.01, dt=0.01, out=terminal.out, **more)


# ------------------------------------------------------------------------------------------------- what it says is so


def test_all_tasks_are_counted(executor: str, terminal: Any, recorder: Recorder) -> None:
    x = sa.ones((40, 5), chunks=(1, 5)).map_blocks(waiting(recorder.file), dtype=float)
    ntasks = sum(layer.ntasks for layer in x.plan().layers)
    with bar_of(terminal):
        x.compute()
    counts = [done for done, _, _ in recorder.shown]
    assert counts == sorted(counts)
    assert counts[0] < ntasks
    assert {total for _, total, _ in recorder.shown} <= {0, ntasks}
    assert recorder.shown[-1][:2] == (ntasks, ntasks)
    assert f"{ntasks}/{ntasks} tasks, " in recorder.shown[-1][2]
    assert (recorder.made, recorder.closed) == (1, 1)
    assert not is_watched()


def test_computations_are_summed_up(terminal: Any, recorder: Recorder) -> None:
    x = sa.ones((10, 5), chunks=(1, 5)).map_blocks(waiting(recorder.file), dtype=float)
    each = sum(layer.ntasks for layer in x.plan().layers)
    with bar_of(terminal):
        others = [threading.Thread(target=lambda: x.compute(scheduler="threads")) for _ in range(3)]
        for other in others:
            other.start()
        for other in others:
            other.join()
        x.compute(scheduler="synchronous")
    assert recorder.shown[-1][:2] == (4 * each, 4 * each)


def test_progress_of_a_call_is_that_of_its_thread(recorder: Recorder, monkeypatch: pytest.MonkeyPatch, terminal: Any) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.out)
    monkeypatch.setattr(sa.ProgressBar.__init__, "__defaults__", (0.01, 40, 0.01, None))
    x = sa.ones((10, 5), chunks=(1, 5)).map_blocks(waiting(recorder.file), dtype=float)
    each = sum(layer.ntasks for layer in x.plan().layers)
    other = threading.Thread(target=lambda: x.compute(scheduler="threads"))
    other.start()
    x.compute(scheduler="threads", progress=True)
    other.join()
    assert recorder.shown[-1][:2] == (each, each)
    for call in (
        lambda: x.persist(progress=True),
        lambda: sa.compute(x, x + 1, progress=True),
        lambda: sa.persist(x + 2, progress=True),
        lambda: x.compute(out=np.empty(x.shape), progress=True),
    ):
        before = recorder.made
        recorder.file.unlink()
        call()
        assert recorder.made == before + 1


def test_only_one_bar_at_a_time(recorder: Recorder, monkeypatch: pytest.MonkeyPatch, terminal: Any) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.out)
    x = sa.ones((10, 5), chunks=(1, 5)).map_blocks(waiting(recorder.file), dtype=float)
    with bar_of(terminal), sa.config.set(progress=True):
        x.compute(scheduler="threads")
    assert recorder.made == 1


def test_config_asks_for_it_and_a_call_does_not(recorder: Recorder, monkeypatch: pytest.MonkeyPatch, terminal: Any) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.out)
    monkeypatch.setattr(sa.ProgressBar.__init__, "__defaults__", (0.01, 40, 0.01, None))
    slow = waiting(recorder.file)
    x = sa.ones((4, 5), chunks=(1, 5)).map_blocks(slow, dtype=float)
    with sa.config.set(progress=True):
        x.compute()
        assert recorder.made == 1
        x.compute(progress=False)
    x.compute()
    assert recorder.made == 1


@pytest.mark.parametrize("text, value", [("1", True), ("off", False), ("True", True), ("no", False)])
def test_the_environment_sets_it(text: str, value: bool) -> None:
    from shmarray.config import Config

    assert Config({"SHMARRAY_PROGRESS": text}).progress is value
    with pytest.raises(ValueError, match="expected True or False"):
        Config({"SHMARRAY_PROGRESS": "perhaps"})


def test_an_error_ends_the_bar(executor: str, terminal: Any, recorder: Recorder) -> None:
    wait = waiting(recorder.file)

    def fail(block: Any) -> Any:
        raise ZeroDivisionError(float(wait(block).sum()))

    with pytest.raises(ZeroDivisionError), bar_of(terminal):
        sa.ones((4, 5), chunks=(1, 5)).map_blocks(fail, dtype=float).compute()
    assert recorder.closed == 1
    assert not is_watched()
    assert not [thread for thread in threading.enumerate() if thread.name == "shmarray-progress"]


def test_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    state: list[Any] = [0, 100, {"change": 0.25, "": "3 MiB"}]
    painter = progress._Painter(lambda: tuple(state), "steps", "", 0.3, 40, 0.1, io.StringIO())  # type: ignore[arg-type]
    painter.began_s = 100.0
    assert painter.look() == (0, 100, "0/100 steps, 0/s, 0.0 s, change 0.25, 3 MiB")
    now[0], state[0] = 102.0, 20
    assert painter.look()[2] == "20/100 steps, 10/s, 2.0 s, 8.0 s left, change 0.25, 3 MiB"
    for second in range(3, 63):  # slower from here on: one in two seconds
        now[0], state[0] = 100.0 + second, 20 + second // 2
        painter.look()
    assert painter.look()[2].startswith("51/100 steps, 0.5/s, 1:02, 1:38 left")
    state[1] = None
    assert painter.look()[2].startswith("51 steps, 0.5/s, 1:02, change")


# ---------------------------------------------------------------------------------------------- what is in the terminal


def test_what_a_terminal_shows(backend: str, terminal: Any) -> None:
    with Meter(total=50, unit="steps", description="heat", minimum=0, dt=0.01, out=terminal.out) as meter:
        meter.update(7, change=0.125)
        wait_until(lambda: "7/50 steps" in terminal.text, "the drawing of 7")
        meter.update(50, change=0.5, braces="{x}")
    shown = terminal.text
    assert "heat" in shown
    assert "14%" in shown
    assert "50/50 steps" in shown[shown.rindex("14%") :]  # at the end
    assert "change 0.125" in shown
    assert "braces {x}" in shown
    assert shown.count(CURSOR_OFF) == shown.count(CURSOR_ON)
    assert shown.removesuffix(CURSOR_ON).endswith("\n")


def test_a_bar_of_unknown_length(backend: str, terminal: Any) -> None:
    with Meter(minimum=0, dt=0.01, out=terminal.out) as meter:
        meter.update(7)
        wait_until(lambda: "7 steps" in terminal.text, "the drawing of 7")


def test_no_line_is_longer_than_the_terminal(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich.progress", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    with Meter(total=50, description="long " * 30, minimum=0, dt=0.01, out=terminal.out) as meter:
        meter.update(1, fact="x" * 200)
        wait_until(lambda: terminal.text.count("\r") > 2, "the drawing")
    lines = terminal.text.split("\r")
    assert max(len(line.rstrip("\n")) for line in lines) == 99


def test_what_is_soon_done_shows_nothing(terminal: Any) -> None:
    with sa.ProgressBar(minimum=1000, out=terminal.out):
        sa.ones(10).sum().compute()
    with Meter(total=3, minimum=1000, out=terminal.out) as meter:
        meter.update(3)
    assert terminal.text == ""


def test_a_terminal_that_is_closed_is_no_error(backend: str, terminal: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with Meter(total=50, minimum=0, dt=0.01, out=terminal.out) as meter:
        wait_until(lambda: "0/50" in terminal.text, "the first drawing")
        terminal.hang_up()
        meter.update(50)
    terminal.close()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["pipe", "StringIO", "closed", "none"])
def test_nothing_is_written_where_nobody_looks(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out: Any = io.StringIO() if kind == "StringIO" else open(tmp_path / "out", "w+")  # noqa: SIM115  # closed below
    if kind == "closed":
        out.close()
    if kind == "none":
        out = None
        monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    with sa.ProgressBar(minimum=0, dt=0.01, out=out) as bar, Meter(minimum=0, dt=0.01, out=out) as meter:
        assert not is_watched()
        sa.ones(10).sum().compute()
        meter.update(1)
        assert bar._painter.thread is None
        assert meter._painter.thread is None
    if kind in ("pipe", "StringIO"):
        out.seek(0)
        assert out.read() == ""
        out.close()


def run(script: str, terminal: Any = None, *, interrupt_at: str = "") -> subprocess.CompletedProcess[str]:
    """Run a script, with stderr in a terminal; with a Ctrl-C when that shows something."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=terminal.out if terminal else subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        if interrupt_at:
            assert terminal is not None
            wait_until(lambda: interrupt_at in terminal.text or process.poll() is not None, "the drawing")
            process.send_signal(signal.SIGINT)
        # A terminal that nobody reads takes no more than some KB.
        wait_until(lambda: ((terminal and terminal.text), process.poll() is not None)[1], "the end")
        out, err = process.communicate()
    finally:
        process.kill()
    return subprocess.CompletedProcess([], process.returncode, out, err)


MODULES = """
import sys
import shmarray as sa
sa.config.set(workers=2)
def slow(block):
    import time
    time.sleep({sleep_s})
    return block
with sa.ProgressBar(minimum=0.01, dt=0.01):
    sa.ones((20, 3), chunks=(1, 3)).map_blocks(slow, dtype=float).sum().compute()
sa.ones((20, 3)).sum().compute(progress=True)
print([name for name in ("rich", "tqdm") if name in sys.modules])
"""


def test_nothing_is_imported_when_nothing_is_drawn() -> None:
    done = run(MODULES.format(sleep_s=0.01))
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)


def test_something_is_imported_when_something_is_drawn(terminal: Any) -> None:
    pytest.importorskip("tqdm")
    done = run(MODULES.format(sleep_s=0.05), terminal)
    assert done.returncode == 0
    assert done.stdout in ("['rich']\n", "['tqdm']\n")
    assert "tasks" in terminal.text


@pytest.mark.parametrize("scheduler", ["processes", "threads", "synchronous"])
def test_ctrl_c_leaves_the_terminal_whole(terminal: Any, scheduler: str) -> None:
    done = run(
        f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import shmarray as sa
sa.config.set(workers=2)
def slow(block):
    time.sleep(0.2)
    return block
try:
    with sa.ProgressBar(minimum=0.01, dt=0.01):
        sa.ones((2000, 3), chunks=(1, 3)).map_blocks(slow, dtype=float).compute(scheduler={scheduler!r})
except KeyboardInterrupt:
    print("interrupted", sa.ones(3).sum().compute())
""",
        terminal,
        interrupt_at=" tasks",
    )
    assert (done.stdout, done.returncode) == ("interrupted 3.0\n", 0)
    shown = terminal.text
    assert "Traceback" not in shown
    assert shown.count(CURSOR_OFF) == shown.count(CURSOR_ON)
    assert shown.rfind(CURSOR_ON) >= shown.rfind(CURSOR_OFF)
