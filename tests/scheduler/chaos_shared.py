"""Processes that allocate, send, receive, drop, lock and fork at random, and are killed at random. Run by test_shared_segments.py.

    python chaos_shared.py SECONDS SEED

Prints what happened, and ends with 0 if no array ever held another's values, none overlapped another, no handle expired whose sender
lived, nobody made a file that has a name, and nothing was left in the end. It goes on for longer where the machine is too busy for
enough to happen.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import mmap
import os
import random
import signal
import socket
import sys
import time
from typing import Any

import numpy as np

from scheduler import shared
from scheduler.errors import AbandonedLockError, HandleExpired, SharedMemoryError

SECONDS, SEED = float(sys.argv[1]), int(sys.argv[2])
shared.HANDLE_TTL_NS = 300 * 10**6
shared.WARM_LIMIT_NBYTES = 1 << 20
shared.EAGER_NBYTES = 1 << 16
shared.REAP_EVERY_NS = 2 * 10**6
MOST, FEWEST = 9, 5  # processes
ENOUGH = 10  # kills, and handles received: with fewer nothing was tried
LONGEST_S = SECONDS + 40
DEATH = 3  # the exit code of a process that has seen what must not be

counts = memoryview(mmap.mmap(-1, 4096)).cast("q")  # shared by fork; racy, so approximate
NAMES = ("operations", "allocated", "sent", "received", "expired", "forks", "abandoned", "full", "violations")
box = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
begin = time.monotonic()


def count(name: str) -> None:
    counts[NAMES.index(name)] += 1


def violation(text: str) -> None:
    count("violations")
    print(f"process {os.getpid()}: {text}", file=sys.stderr, flush=True)
    os._exit(DEATH)


def pattern(lease: shared.Lease) -> int:
    return (lease.number << 32 | lease.generation) * 0x9E3779B97F4A7C15 & (1 << 64) - 1


def values(lease: shared.Lease) -> np.ndarray:
    return np.asarray(lease).view(np.uint64)


def look(lease: shared.Lease) -> None:
    if not (values(lease) == pattern(lease)).all():
        table = lease.segment.table
        violation(f"array {lease.number}.{lease.generation} holds {values(lease)[:3]}, held by {table.holders(lease.number)}")


def one_step(mine: list[shared.Lease], rnd: random.Random) -> None:
    count("operations")
    draw = rnd.random()
    if draw < 0.25 and len(mine) < 5:
        try:
            lease = shared.family().allocate(rnd.randint(1, 48) * 4096, cells=2, meta=b"pattern")
        except SharedMemoryError:
            count("full")
            return
        values(lease)[:] = pattern(lease)
        mine.append(lease)
        count("allocated")
    elif draw < 0.45 and mine:
        mine.pop(rnd.randrange(len(mine)))
    elif draw < 0.65 and mine:
        with contextlib.suppress(BlockingIOError):
            handle = rnd.choice(mine).handle()
            copies = 2 if rnd.random() < 0.1 else 1  # the second to arrive may find it gone
            for _ in range(copies):
                box[0].send(handle + b"again" * (copies - 1), socket.MSG_DONTWAIT)
            count("sent")
    elif draw < 0.85:
        with contextlib.suppress(BlockingIOError):
            receive(mine, box[1].recv(100, socket.MSG_DONTWAIT))
    elif draw < 0.95 and mine:
        lease = rnd.choice(mine)
        try:
            with lease.lock([(0, 2)], "w", timeout=0.01):
                look(lease)
        except AbandonedLockError:
            count("abandoned")
        except TimeoutError:
            pass  # its holder is slow, or was stopped in here
    elif draw < 0.955:
        fork(mine, rnd)
    elif draw < 0.98:
        shared.family().check()
        shared.family().statistics()
    else:
        gc.collect()


def receive(mine: list[shared.Lease], message: bytes) -> None:
    handle, is_again = message[: shared.HANDLE.size], len(message) > shared.HANDLE.size
    sender = shared.HANDLE.unpack(handle)[5]
    before = shared.identity_of(sender)
    try:
        lease = shared.receive(handle)
    except HandleExpired:
        count("expired")
        if not is_again and before and shared.identity_of(sender) == before and before != shared.identity_of(os.getpid()):
            violation(f"a handle expired though its sender {sender} lives")
        return
    count("received")
    look(lease)
    if lease not in mine:
        mine.append(lease)


def fork(mine: list[shared.Lease], rnd: random.Random) -> None:
    if os.fork() == 0:
        for lease in mine:
            look(lease)
        live(mine, random.Random(os.getpid() * 7919 + SEED))
    count("forks")


def live(mine: list[shared.Lease], rnd: random.Random) -> None:
    try:
        while time.monotonic() < begin + LONGEST_S:  # until it is killed: who ended by himself would have to be replaced for ever
            one_step(mine, rnd)
    except BaseException as error:
        violation(f"{type(error).__name__}: {error}")
    os._exit(0)


def descendants() -> list[int]:
    found, stack = [], [os.getpid()]
    while stack:
        pid = stack.pop()
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/task/{pid}/children") as file:
                children = [int(word) for word in file.read().split()]
            found += children
            stack += children
    return found


def refuse_names(event: str, arguments: tuple[Any, ...]) -> None:
    """Be the audit hook of all processes: what has no name goes with who has it open, whoever is killed."""
    if event == "open" and isinstance(flags := arguments[2], int) and flags & (os.O_CREAT | os.O_TMPFILE) & ~os.O_DIRECTORY:
        violation(f"the file {arguments[0]!r} is made")


def is_enough(kills: int) -> bool:
    if counts[NAMES.index("violations")]:
        return True
    past_s = time.monotonic() - begin
    return past_s > LONGEST_S or (past_s > SECONDS and min(kills, counts[NAMES.index("received")]) > ENOUGH)


def main() -> int:
    faulthandler.dump_traceback_later(LONGEST_S + 25, exit=True)  # where it hangs, if it does
    sys.addaudithook(refuse_names)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans are ours, and found
    rnd = random.Random(SEED)
    segment = shared.family()
    kills = 0
    while not is_enough(kills):
        for _ in range(FEWEST - len(descendants())):
            if os.fork() == 0:
                live([], random.Random(os.getpid() * 31 + SEED))
        pids = descendants()
        if pids and (rnd.random() < 0.5 or len(pids) > MOST):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rnd.choice(pids), signal.SIGKILL)
                kills += 1
        time.sleep(rnd.expovariate(1 / 0.006))  # what is random here is when they die
    while pids := descendants():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)  # they need a processor to die
    segment.check()
    deadline = time.monotonic() + 20
    while segment.statistics()["arrays"] and time.monotonic() < deadline:
        time.sleep(0.01)  # until handles of the dead expire
    segment.trim()
    left = segment.statistics()
    for end_of_it in box:
        end_of_it.close()
    result = dict(zip(NAMES, counts, strict=False)) | {"kills": kills, "left": left["arrays"], "resident": left["resident_nbytes"]}
    print(json.dumps(result))
    return 1 if result["violations"] or left["arrays"] or left["resident_nbytes"] else 0


if __name__ == "__main__":
    sys.exit(main())
