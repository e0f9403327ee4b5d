"""Fault points: named places of driver and worker where a test can have the process die, stop, or meet an error.

Promises: `point` does nothing, at the price of one call and one truth test, unless ``SHMARRAY_FAULT`` was set when the process
started; then the Nth passage of one point, counted over all processes together, acts, and no other ever does.
Relies on nothing. Never put here: anything that a run without faults needs.

    SHMARRAY_FAULT=worker.task:3:kill            the third task begun, whoever begins it, is the end of that process
    SHMARRAY_FAULT=task:3:raise:driver           the same, of tasks that the driver runs itself
    SHMARRAY_FAULT_COUNT=/path/of/a/file         one byte for each passage: who wrote the Nth byte acts. A worker that was
                                                 killed is replaced, and the replacement must not die at *its* Nth

Actions: ``kill`` (SIGKILL), ``stop`` (SIGSTOP), ``raise`` (`InjectedFault`), ``enospc`` (OSError, no space left on device).
Who: ``worker``, ``driver``, or ``any`` (when left out). The points:

    worker   start     the process runs, and has not read its hello
             hello     before it says that it is there
             bind      before a function is loaded and bound to memory; nothing was written
             bound     after that; nothing was written
             task      before each task, the cursor at it
             ran       after each task, the cursor still at it
             results   in a step of an update in place: its results lie in the redo slot, the cursor does not say so yet
             copy      the cursor says so, nothing is copied
             half      in the middle of the copy over the target
             copied    after it, the cursor still says that it goes on
             part      before each task of several steps that are done block by block
             spill     before bytes are written to the spill file
             unspill   before bytes are read from it
             reply     before what came of a range is sent: the cursor is past it, the driver not told
             replied   after that
    driver   spawn     before a worker process is started
             send      before a range is sent to a worker
             lock      before a plan takes its locks
             locked    after that; nothing else is held
             allocate  before the temporaries of a layer are allocated
             bury      before a dead worker's part is sorted out
             repair    before a step that it was copying is finished for it
             repaired  after that
             buried    after all of this
             settle    before a plan's end is made known
             return    before a result is returned
             bind, bound, task, ran, part, spill, unspill, results, copy, half,
             copied: as in a worker, in threads of the driver that run tasks
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass

__all__ = ["ACTIONS", "Fault", "InjectedFault", "arm", "point", "read_environment"]

ACTIONS = ("kill", "stop", "raise", "enospc")
WHO = ("any", "worker", "driver")


class InjectedFault(OSError):
    """What the action ``raise`` raises: like an I/O error, and like nothing else."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is to happen at the ``nth`` passage of a point."""

    point: str
    nth: int
    action: str
    who: str
    count: str  # path of the file that counts passages


ARMED: Fault | None = None  # loops that are too hot for a call per step ask this themselves
_who = "driver"


def point(name: str) -> None:
    """Pass a place where something may go wrong."""
    if ARMED is not None:
        _pass(ARMED, name)


def arm(fault: Fault | None, *, who: str | None = None) -> None:
    """Set what this process does at which point; ``who`` says what kind of process it is."""
    global ARMED, _who
    _who = who or _who
    ARMED = fault


def read_environment() -> Fault | None:
    """Return what the environment asks for; raise ValueError for what cannot be meant."""
    text = os.environ.get("SHMARRAY_FAULT")
    if not text:
        return None
    name, nth, action, who = (*text.split(":"), "any")[:4] if text.count(":") in (2, 3) else ("", "", "", "")
    if not (name and nth.isdigit() and int(nth) and action in ACTIONS and who in WHO):
        raise ValueError(
            f"SHMARRAY_FAULT={text!r}: write point:N:action or point:N:action:who, N from 1, action one of {', '.join(ACTIONS)}, "
            f"who one of {', '.join(WHO)}. It is meant for tests; unset it."
        )
    count = os.environ.get("SHMARRAY_FAULT_COUNT")
    if not count:
        raise ValueError(f"SHMARRAY_FAULT={text!r} without SHMARRAY_FAULT_COUNT: set that to the path of a new file, which counts.")
    return Fault(name, int(nth), action, who, count)


def _pass(fault: Fault, name: str) -> None:
    if fault.point not in (name, f"{_who}.{name}") or fault.who not in ("any", _who):
        return
    # Opened anew each time: the position after an append is then the number of this very byte, whoever else appends.
    file = os.open(fault.count, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, b".")
        number = os.lseek(file, 0, os.SEEK_CUR)
    finally:
        os.close(file)
    if number == fault.nth:
        _act(fault)


def _act(fault: Fault) -> None:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise InjectedFault(errno.EIO, f"injected at {fault.point!r}, passage {fault.nth}")
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


arm(read_environment())
