"""How far a computation is, in a line of the terminal or the notebook.

Promises: nothing is drawn where nobody looks (no terminal, no notebook), and nothing is imported for it before something is drawn;
what is drawn is drawn by a thread of the bar's own, so that a terminal is whole again after a Ctrl-C; a bar that cannot draw
(any more) is silent. Relies on `scheduler.run.watch` for plans, and on rich or tqdm where they are installed.
Never put here: who counts (the scheduler's `Tally`, the loop that calls `Meter.update`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from scheduler.limits import format_bytes
from scheduler.run import Pool, is_watched, unwatch, watch
from scheduler.task import Tally
from shmarray.config import config

__all__ = ["Meter", "ProgressBar", "shown"]

TEXT_COLUMNS = 72  # left for what stands beside the bar
RATE_S = 10.0  # the rate is that of the last so many seconds


class ProgressBar:
    """While in ``with ProgressBar():``, computations show how far they are: tasks, rate, time left, memory of the pool.

    Several computations, one after the other or of several threads at once, are summed up. ``minimum``: seconds for which nothing is
    shown, that what is soon done does not flicker; ``width``: characters of the bar itself; ``dt``: seconds from one look to the
    next; ``out``: where to, if not `sys.stderr`. Nothing is shown, nor imported, where that is no terminal and this no notebook.
    With rich or tqdm (``pip install shmarray[progress]``) it is theirs, else plain text.

    >>> import shmarray as sa
    >>> with sa.ProgressBar():
    ...     total = sa.ones((1000, 1000)).sum().compute()
    """

    def __init__(self, minimum: float = 0.3, width: int = 40, dt: float = 0.1, out: Any = None, *, only_this_thread: bool = False) -> None:
        self._thread = threading.get_ident() if only_this_thread else None
        self._painter = _Painter(self._reading, "tasks", "", minimum, width, dt, out)
        self._running: dict[int, tuple[Pool, Tally]] = {}  # by identity; written by threads that run plans, each its own
        self._ended: deque[tuple[int, int]] = deque()  # done and total of those that have ended, not yet added up
        self._done = self._total = 0  # of what was added up, by who draws
        self._memory = ""

    def began(self, pool: Pool, tally: Tally) -> None:
        """Be told of a plan that runs from now on."""
        if self._thread in (None, threading.get_ident()):
            self._running[id(tally)] = pool, tally
            self._painter.start()

    def ended(self, tally: Tally) -> None:
        """Be told that it does not any more."""
        if self._running.pop(id(tally), None) is not None:
            self._ended.append((tally.done, tally.total))

    def _reading(self) -> tuple[int, int | None, Mapping[str, Any]]:
        running = list(self._running.values())
        while self._ended:
            done, total = self._ended.popleft()
            self._done += done
            self._total += total
        pools = {id(pool): pool for pool, _ in running}
        if pools:
            self._memory = format_bytes(sum(pool.statistics().live_nbytes for pool in pools.values()))
        done, total = (sum(getattr(tally, name) for _, tally in running) for name in ("done", "total"))
        return self._done + done, self._total + total, {"": self._memory} if self._memory else {}

    def __enter__(self) -> ProgressBar:
        if self._painter.is_shown:
            watch(self)
        return self

    def __exit__(self, *error: object) -> None:
        unwatch(self)
        self._painter.stop()


class Meter:
    """Shows how far a loop is: ``update(done, **facts)`` as often as you like, `close` at the end, or ``with``.

    ``total``: how many there will be; None: not known. ``unit``: what is counted; ``description`` stands in front; facts behind, as
    ``name value``. The others are those of `ProgressBar`.

    >>> from shmarray.progress import Meter
    >>> with Meter(total=100, unit="steps") as meter:
    ...     for step in range(100):
    ...         meter.update(step + 1, change=0.5**step)
    """

    def __init__(
        self,
        total: int | None = None,
        unit: str = "steps",
        description: str = "",
        minimum: float = 0.3,
        width: int = 40,
        dt: float = 0.1,
        out: Any = None,
    ) -> None:
        self.total = total
        self._state: tuple[int, Mapping[str, Any]] = (0, {})  # replaced as a whole by who counts, read by who draws
        self._painter = _Painter(lambda: (self._state[0], self.total, self._state[1]), unit, description, minimum, width, dt, out)
        self._painter.start()

    def update(self, done: int, **facts: Any) -> None:
        """Say how many are done, and what else is worth knowing. Costs less than a microsecond."""
        self._state = done, facts

    def close(self) -> None:
        """Draw it for the last time, and leave it there. Calling it again does nothing."""
        self._painter.stop()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def shown() -> contextlib.AbstractContextManager[Any]:
    """Return what shows how far the computations of this thread are, when `config.progress` asks for it and no bar does already."""
    if not config.progress or is_watched():
        return contextlib.nullcontext()
    return ProgressBar(only_this_thread=True)


# ----------------------------------------------------------------------------------------------------------- drawing


class _Painter:
    """A thread that looks, and has it drawn. Whoever stops it waits until it is drawn for the last time."""

    def __init__(
        self,
        reading: Callable[[], tuple[int, int | None, Mapping[str, Any]]],
        unit: str,
        description: str,
        minimum: float,
        width: int,
        dt: float,
        out: Any,
    ) -> None:
        self.reading, self.unit, self.description = reading, unit, description
        self.minimum, self.width, self.dt = minimum, width, max(dt, 0.01)
        self.out = sys.stderr if out is None else out
        self.is_shown = _is_terminal(self.out) or (out is None and _in_notebook())
        self.thread: threading.Thread | None = None
        self.began_s = 0.0
        self.samples: deque[tuple[float, int]] = deque()
        # Held until the end; a plain lock, as Ctrl-C in a function written in Python can leave an Event's own one locked.
        self.gate = threading.Lock()
        self.gate.acquire()

    def start(self) -> None:
        """Begin to look, unless nobody would see it or it has begun."""
        if self.is_shown and self.thread is None:
            self.began_s = time.monotonic()
            self.thread = threading.Thread(target=self.run, name="shmarray-progress", daemon=True)
            self.thread.start()

    def stop(self) -> None:
        """End the thread, which leaves the terminal whole."""
        if self.gate.locked():
            self.gate.release()
        if self.thread is not None:
            self.thread.join()

    def run(self) -> None:
        """Look and draw until the gate opens."""
        display: _Display | None = None
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone, or closed
            try:
                is_over = self.gate.acquire(timeout=max(self.minimum, self.dt))
                while not is_over:
                    done, total, text = self.look()
                    display = display or _display(self.out, self.width, self.description)
                    display.show(done, total, text)
                    is_over = self.gate.acquire(timeout=self.dt)
                if display is not None:
                    display.show(*self.look())
            finally:
                if display is not None:
                    display.close()

    def look(self) -> tuple[int, int | None, str]:
        """Return what is to be drawn now: how many are done, of how many, and the text behind the bar."""
        done, total, facts = self.reading()
        now = time.monotonic()
        self.samples.append((now, done))
        while now - self.samples[0][0] > RATE_S:
            self.samples.popleft()
        since, before = self.samples[0]
        if now - since < RATE_S / 2:  # as of the beginning
            since, before = self.began_s, 0
        rate = (done - before) / (now - since) if now > since else 0.0
        parts = [f"{done}{'' if total is None else f'/{total}'} {self.unit}", f"{_number(rate)}/s", _clock(now - self.began_s)]
        if total is not None and rate > 0 and done < total:
            parts.append(f"{_clock((total - done) / rate)} left")
        parts.extend(f"{name} {_number(value)}".strip() for name, value in facts.items())
        return done, total, ", ".join(parts)


def _is_terminal(out: Any) -> bool:
    try:
        return bool(out.isatty())
    except (AttributeError, ValueError, OSError):  # nothing like a file, or a closed one
        return False


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(out: Any) -> int:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.get_terminal_size(out.fileno()).columns or 80
    return 80


class _Display(Protocol):
    def show(self, done: int, total: int | None, text: str) -> None: ...

    def close(self) -> None: ...


def _display(out: Any, width: int, description: str) -> _Display:
    """Return the first of rich, tqdm and plain text that there is. In notebooks the former two need ipywidgets."""
    if not _is_terminal(out) and importlib.util.find_spec("ipywidgets") is None:
        return _Text(out, width, description)
    width = max(min(width, _columns(out) - TEXT_COLUMNS - len(description)), 5)
    for made in (_Rich, _Tqdm):
        with contextlib.suppress(ImportError):
            return made(out, width, description)
    return _Text(out, width, description)


class _Rich:
    def __init__(self, out: Any, width: int, description: str) -> None:
        from rich.console import Console  # 0.07 s, and an extra: only when something is drawn
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn  # as above
        from rich.table import Column  # as above

        console = Console(file=out) if _is_terminal(out) else Console(stderr=True)
        name = TextColumn("{task.description}", markup=False)
        text = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        columns = [BarColumn(width), TaskProgressColumn(), text]
        # The user's own streams stay what they are: they may be exchanged by others meanwhile.
        self.progress = Progress(
            *([name] if description else []), *columns, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self.task = self.progress.add_task(description, total=None, text="")
        self.progress.start()

    def show(self, done: int, total: int | None, text: str) -> None:
        self.progress.update(self.task, completed=done, total=total, text=text, refresh=True)

    def close(self) -> None:
        self.progress.stop()


class _Tqdm:
    def __init__(self, out: Any, width: int, description: str) -> None:
        from tqdm.auto import tqdm  # an extra, and only when something is drawn

        self.form = f"{{desc}}{{percentage:3.0f}}%|{{bar:{width}}}| "
        file = {"file": out} if _is_terminal(out) else {}
        self.bar: Any = tqdm(total=1, desc=description or None, bar_format=self.form, mininterval=0, miniters=1, dynamic_ncols=True, **file)

    def show(self, done: int, total: int | None, text: str) -> None:
        self.bar.total, self.bar.n = total or max(done, 1), done
        self.bar.bar_format = self.form + text.replace("{", "{{").replace("}", "}}")
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()


class _Text:
    """A line that is written over itself."""

    def __init__(self, out: Any, width: int, description: str) -> None:
        self.out, self.width, self.description = out, width, description
        self.written = 0

    def show(self, done: int, total: int | None, text: str) -> None:
        if total:
            full = min(done * self.width // total, self.width)
            text = f"[{'#' * full}{' ' * (self.width - full)}] {100 * done // total:3d}% {text}"
        line = f"{self.description} {text}".strip()[: _columns(self.out) - 1]  # a line that is broken cannot be written over
        self.out.write(f"\r{line}{' ' * (self.written - len(line))}")
        self.out.flush()
        self.written = len(line)

    def close(self) -> None:
        self.out.write("\n")
        self.out.flush()
