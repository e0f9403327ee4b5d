"""How fast is work on arrays that do not fit the memory limit, and how much memory does it take?

Several GB under a limit of one, most of it in the spill file (``TMPDIR`` says on which disk). Memory is measured from outside, by a
process of its own: the PSS of the measured process and its workers, where shared pages count once; but the arena as a whole, from
its descriptor, for pages that no process has mapped count as well. What the processes take before any array is made is shown, too.
Run with the number of GB (8 if not said) and, after it, the limit.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import measure
import numpy as np
import psutil

import shmarray as sa
from scheduler.limits import parse_bytes

EVERY_S = 0.05
ARENA = re.compile(r"/(memfd:shmarray|shmarray\.\d+) \(deleted\)")  # without huge pages and with them


def private_nbytes(pid):
    """Return the PSS of a process without its pages of the arena, and the bytes the arena holds where this one has it mapped."""
    nbytes, is_arena, counted = 0, False, 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_arena = ARENA.search(line) is not None
        elif line.startswith("Pss:") and not is_arena:
            nbytes += 1024 * int(line.split()[1])
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if ARENA.match(os.readlink(entry)):
                counted = os.stat(entry).st_blocks * 512
        except OSError:
            pass  # closed meanwhile
    return nbytes, counted


def watch(pid):
    """The measuring process: for each line read, print the peak in bytes since the last one."""
    measured, peak = psutil.Process(pid), 0
    while True:
        if select.select([sys.stdin], [], [], EVERY_S)[0]:
            if os.read(0, 1) != b"\n":
                return
            print(peak, flush=True)
            peak = 0
        total = arena = 0
        for each in [measured, *measured.children(recursive=True)]:
            if each.pid != os.getpid():
                try:
                    nbytes, counted = private_nbytes(each.pid)
                except OSError:
                    continue  # it has ended
                total, arena = total + nbytes, max(arena, counted)
        peak = max(peak, total + arena)


class Watcher:
    """The handle on the measuring process."""

    def __init__(self):
        command = [sys.executable, __file__, "watch", str(os.getpid())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def peak_nbytes(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        self.process.communicate()


def run(gigabytes, limit):
    rows, columns = int(gigabytes * 1e9) // 8_000, 1_000
    nbytes = rows * columns * 8
    measure.start(f"{nbytes / 1e9:.1f} GB under memory_limit={limit!r}: GB of arrays that are read and written, per second; peak memory")
    watcher = Watcher()
    with sa.Pool(memory_limit=limit) as pool:
        (sa.random.default_rng(0).random((500, columns)).persist() @ sa.ones((columns, 8))).sum().compute(scheduler="processes")
        sa.exp(sa.ones((4_000, columns)).persist()).sum(axis=0).compute(scheduler="processes")
        time.sleep(4 * EVERY_S)
        watcher.peak_nbytes()
        time.sleep(4 * EVERY_S)
        idle = watcher.peak_nbytes()
        print(f"  idle: {idle / 1e6:.0f} MB in {pool.workers + 1} processes; the limit is {parse_bytes(limit) / 1e6:.0f} MB", flush=True)
        peaks = []

        def step(name, moved, function):
            watcher.peak_nbytes()
            seconds, result = measure.timed(function)
            peak = watcher.peak_nbytes()
            peaks.append(peak)
            spilled = pool.statistics().spilled_nbytes
            print(
                f"  {name:34} {seconds:7.1f} s  {moved * nbytes / 1e9 / seconds:5.2f} GB/s   peak {peak / 1e6:5.0f} MB, "
                f"beyond idle {(peak - idle) / 1e6:5.0f} MB   spilled {spilled / 1e9:4.1f} GB",
                flush=True,
            )
            return result

        x = step("make: random, persist", 1, lambda: sa.random.default_rng(0).random((rows, columns)).persist())
        y = step("elementwise: x * 2 + 1, persist", 2, lambda: (x * 2 + 1).persist())
        total = step("(x + y).sum()", 2, lambda: float((x + y).sum().compute()))
        step("x.sum(axis=0)", 1, lambda: x.sum(axis=0).compute())
        step("x.mean(axis=1), x.std(axis=1)", 1, lambda: sa.compute(x.mean(axis=1), x.std(axis=1)))

        def add():
            nonlocal y
            y += x

        step("in place: y += x", 3, add)
        y = None
        z = step(
            "rechunk to columns, chunk means", 1, lambda: x.rechunk((rows // 64, 250)).map_blocks(chunk_mean, dtype=float).max().compute()
        )
        assert 0 < z < 1
        c = step("cumsum(axis=0), persist", 2, lambda: x.cumsum(axis=0).persist())
        last = c[-1].compute()
        c = None
        c = step("cumsum(axis=1), persist", 2, lambda: x.cumsum(axis=1).persist())
        c = None
        b = sa.random.default_rng(1).random((columns, columns)).persist()
        p = step("matmul by 1000 x 1000, persist", 2, lambda: (x @ b).persist())
        first = x[:4].compute() @ b.compute()
        np.testing.assert_allclose(p[:4].compute(), first)
        p = None
        np.testing.assert_allclose(float(last.sum()) * 3 + rows * columns, total)
        print(f"  the highest peak: {max(peaks) / 1e6:.0f} MB, the limit and {(max(peaks) - parse_bytes(limit)) / 1e6:.0f} MB", flush=True)
    watcher.end()


def chunk_mean(block):
    """Give the mean of a chunk in its first element, and zeros."""
    out = np.zeros_like(block)
    out[0, 0] = block.mean()
    return out


if sys.argv[1:2] == ["watch"]:
    watch(int(sys.argv[2]))
else:
    run(float(sys.argv[1]) if sys.argv[1:] else 8, sys.argv[2] if sys.argv[2:] else "1GiB")
