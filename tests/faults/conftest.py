"""What tests of faults share: whole scripts in processes of their own, and the proof that nothing is left behind.

Promises: `script` runs a program under a hard limit, and fails when a process, a file or an entry in /dev/shm outlives it; around
every test of this folder this process itself is compared with what it held before.
Never put here: tests, or knowledge of single faults.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from soak import SOAK_MINUTES as SOAK_MINUTES

import scheduler
from scheduler import extents as scheduler_extents
from scheduler import faults, hugepages
from scheduler import pool as scheduler_pool
from scheduler.extents import Extents

ROOT = str(Path(scheduler.__file__).parent.parent)
LIMIT_S = 90  # of a script: far beyond what any needs
SETTLE_S = 10  # for the kernel, and threads that are ending, to take back what was let go
MARK = "SHMARRAY_TEST_MARK"
EMPTY: Mapping[int, int] = {}

# What stands in front of every script: stacks when it hangs, Ctrl-C also where a shell ignores it, and `check_nothing_left`.
PROLOGUE = """
import resource
for name, most in {limits}.items():
    resource.setrlimit(getattr(resource, name), (most, most))
import atexit, faulthandler, gc, os, select, signal, sys, threading, time
faulthandler.dump_traceback_later({limit_s} - 5, exit=True)
sys.path.insert(0, {root!r})
signal.signal(signal.SIGINT, signal.default_int_handler)
from collections import Counter
import numpy as np
import psutil
import shmarray as sa
from scheduler import faults

def held():
    "What this process holds: descriptors by what they lead to, mappings of shared memory, children, threads."
    gc.collect()
    with open("/proc/self/maps") as file:
        files = Counter("mapping of " + line.split(maxsplit=5)[5] for line in file if line.split()[1][3] == "s")
    for number in os.listdir("/proc/self/fd"):
        try:
            files[os.readlink("/proc/self/fd/" + number).split(":[")[0]] += 1
        except OSError:
            pass  # of the listing itself
    files.pop("/", None)  # where memory files of huge pages are made: once, kept as long as the process
    children = Counter("child" for c in psutil.Process().children(recursive=True) if c.status() != psutil.STATUS_ZOMBIE)
    return files + children + Counter(thread.name for thread in threading.enumerate())

def wait_until(condition, what, deadline_s=20):
    until = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(what + " did not happen")
        select.select([], [], [], 0.005)

with sa.Pool(workers=0):
    float(sa.ones(3).persist().sum())  # what a process makes once and keeps: the file of its locks
_before = held()
# Registered last, so called first: the pools close after it.
atexit.register(lambda path=os.path.abspath("ending"): os.close(os.open(path, os.O_CREAT, 0o600)))

def check_nothing_left():
    "Call it when every pool is closed and no variable holds one: a closed pool stays mapped for the arrays in it."
    wait_until(lambda: not held() - _before, "the end of all that was begun: " + str(held() - _before), {settle_s})

"""


@dataclass(frozen=True)
class Outcome:
    """How a script ended."""

    stdout: str
    stderr: str
    returncode: int
    exit_s: float  # from the beginning of the interpreter's end to the end of the process; nan when it was killed

    @property
    def lines(self) -> list[str]:
        return self.stdout.split("\n")[:-1]


class Script:
    """A script that runs in a process of its own, in its own session, with files for its output: a worker that outlives it
    must be found, not waited for. ``limits``, by name, as of the resource module: set before anything is imported."""

    def __init__(
        self,
        directory: Path,
        shm_entries: Callable[[], set[str]],
        body: str,
        *flags: str,
        limit_s: float = LIMIT_S,
        limits: Mapping[str, int] = EMPTY,
        **environment: str,
    ) -> None:
        self.limit_s = limit_s
        self.directory = directory / f"run-{uuid.uuid4().hex[:8]}"
        self.temporary = self.directory / "tmp"
        self.temporary.mkdir(parents=True)
        path = self.directory / "script.py"
        path.write_text(PROLOGUE.format(root=ROOT, limit_s=limit_s, settle_s=SETTLE_S, limits=dict(limits)) + textwrap.dedent(body))
        self.mark = uuid.uuid4().hex
        self.shm_entries = shm_entries
        self.shm = shm_entries()
        with open(self.directory / "out", "w") as out, open(self.directory / "err", "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *flags, str(path)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self.directory,
                env={**os.environ, "TMPDIR": str(self.temporary), MARK: self.mark, **environment},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return (self.directory / "out").read_text()

    def wait_for(self, text: str) -> None:
        """Wait until the script has printed ``text``."""

        def is_there() -> bool:
            assert self.process.poll() is None or text in self.output(), (self.process.returncode, self.errors())
            return text in self.output()

        wait_until(is_there, f"the printing of {text!r}", self.limit_s)

    def errors(self) -> str:
        return (self.directory / "err").read_text()

    def processes(self) -> list[psutil.Process]:
        """Return every process that was started with the script's environment, itself included, zombies not."""
        found = []
        wanted = f"{MARK}={self.mark}".encode()
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if wanted in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(psutil.Process(pid))
        return found

    def end(self, *, continue_stopped: bool = False) -> Outcome:
        """Wait for the end; fail when it hangs, or when anything is left. ``continue_stopped``: SIGCONT for what stops itself."""
        try:
            until = time.monotonic() + self.limit_s
            while self.process.poll() is None:
                assert time.monotonic() < until, f"the script hangs\n{self.output()[-2000:]}\n{self.errors()}"
                if continue_stopped:
                    for each in self.processes():
                        with contextlib.suppress(psutil.NoSuchProcess):
                            if each.status() == psutil.STATUS_STOPPED:
                                each.send_signal(signal.SIGCONT)
                _pause(0.02)
            ended = time.time()
            self.check_nothing_left()
        finally:
            for each in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            self.process.kill()
            self.process.wait()
        told = self.directory / "ending"
        exit_s = ended - told.stat().st_mtime if told.exists() else math.nan
        return Outcome(self.output(), self.errors(), self.process.returncode, exit_s)

    def check_nothing_left(self) -> None:
        """Wait until no process of the script is left; then neither a file nor an entry in /dev/shm may be."""
        wait_until(lambda: not self.processes(), f"the end of {self.processes()}", SETTLE_S)
        left = [str(p) for p in self.temporary.rglob("*")]
        assert not left, f"temporary files were left: {left}"
        left_in_shm = self.shm_entries() - self.shm
        assert not left_in_shm, f"left in /dev/shm: {left_in_shm}"


def _pause(seconds: float) -> None:
    select.select([], [], [], seconds)


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 20) -> float:
    """Wait for a state; return how long it took, in seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < deadline_s, f"{what} did not happen within {deadline_s} s"
        _pause(0.002)
    return time.monotonic() - began


@pytest.fixture
def start(tmp_path: Path, shm_entries: Callable[[], set[str]]) -> Callable[..., Script]:
    """``start(body, *flags, limit_s=, **environment)`` starts a script and returns it running."""
    return lambda body, *flags, **more: Script(tmp_path, shm_entries, body, *flags, **more)


@pytest.fixture
def script(tmp_path: Path, shm_entries: Callable[[], set[str]]) -> Callable[..., Outcome]:
    """``script(body, *flags, ...)`` runs a script to its end; it must exit with 0 and, unless ``is_silent=False``, in silence."""

    def run(body: str, *flags: str, returncode: int = 0, continue_stopped: bool = False, is_silent: bool = True, **more: Any) -> Outcome:
        outcome = Script(tmp_path, shm_entries, body, *flags, **more).end(continue_stopped=continue_stopped)
        told = outcome.stderr if is_silent else ""
        assert (outcome.returncode, told) == (returncode, ""), outcome.stdout[-2000:] + outcome.stderr[-2000:]
        return outcome

    return run


# ------------------------------------------------------------------------------------------------- this process itself


def _owned() -> tuple[set[int], set[int], set[str]]:
    """Return descriptors, children and thread names of pools that are open: they are warm for the next test, not leaked."""
    fds: set[int] = {hugepages._root} if hugepages._root is not None else set()  # made once, kept as long as the process
    children: set[int] = set()
    names: set[str] = set()
    for loop in list(scheduler_pool._loops):
        if loop._is_closing:
            continue
        names |= {"shmarray-loop", "shmarray-driver"}
        fds |= {loop.arena_fd, loop.control_fd, loop._wake_fd, loop.epoll.fileno()}
        if loop.memory.spill is not None:
            fds.add(loop.memory.spill.fd)
        for member in list(loop.members.values()):
            children.add(member.process.pid)
            fds |= {member.link.fileno(), member.life.fileno(), member.pidfd, member.capture}
    return fds, children, names


def _mappings() -> Iterator[tuple[str, str]]:
    """Yield (which file, what it is called) of each file or shared memory that this process has mapped for others to see, once.

    Not `Shmem:` of the machine, to which every program beside this one adds: shared memory lives as long as a process, which would be
    left, a name in /dev/shm, or a descriptor or a mapping holds it, and each of these is looked for.
    """
    rows = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    yield from {(f"{row[3]} {row[4]}", row[5]) for row in rows if row[1][3] == "s"}


def held() -> Counter[str]:
    """Return what this process holds beside its open pools."""
    gc.collect()
    fds, children, names = _owned()
    found: Counter[str] = Counter()
    files = [os.fstat(number) for number in fds]
    owned = {f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x} {file.st_ino}" for file in files}
    for number, name in _mappings():
        if number not in owned:
            found[f"mapping of {name}"] += 1
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{number}").partition(":[")[0]
            if int(number) not in fds and "shmarray-locks" not in target:  # made once, kept as long as the process
                found[f"descriptor of {target}"] += 1
    # The mapping of an open pool's control file has a descriptor of its own, whose number nobody knows.
    found["descriptor of /memfd:shmarray-control (deleted)"] -= sum(not loop._is_closing for loop in list(scheduler_pool._loops))
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.pid not in children and child.status() != psutil.STATUS_ZOMBIE:
                found[f"process {child.pid} {child.name()}"] += 1
    for thread in threading.enumerate():
        if thread.name not in names:
            found[f"thread {thread.name.partition('-')[0]}"] += 1
    return found


def arena_nbytes() -> dict[Extents, int]:
    """Return how much of each arena and spill file is live."""
    gc.collect()
    return {extents: extents.statistics().live_nbytes for extents in list(scheduler_extents._live_extents)}


@pytest.fixture(autouse=True)
def nothing_is_left(shm_entries: Callable[[], set[str]]) -> Iterator[None]:
    """Compare this process with itself before; no fault may stay armed."""
    before, shm, nbytes = held(), shm_entries(), arena_nbytes()
    yield
    faults.arm(None, who="driver")
    try:
        wait_until(lambda: not held() - before, "the end of what the test began", SETTLE_S)
    except AssertionError as error:
        raise AssertionError(f"left behind: {dict(held() - before)}") from error
    more = {extents: live - nbytes.get(extents, 0) for extents, live in arena_nbytes().items()}
    assert not [each for each in more.values() if each > 0], f"bytes of arenas that are still live: {more}"
    assert not shm_entries() - shm, f"left in /dev/shm: {shm_entries() - shm}"
    for loop in list(scheduler_pool._loops):
        assert loop._is_closing or not loop.tickets, f"plans that still run: {list(loop.tickets)}"
