"""What does it cost a simulation that somebody looks at it: nobody, 1 MB a frame at 30 Hz, all of its 128 MB at 30 Hz?

    python benchmarks/live_reader.py [--small]

Heat in two dimensions in this process, published; the reader is another process, that reads frames with `sa.attach`, 30 times a second
or as often as it can. Ways are taken in turn; the ratio to the simulation that publishes nothing is of the same round.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import numpy as np

import shmarray as sa

SMALL = "--small" in sys.argv
SIDE = 1024 if SMALL else 4096
STEPS = 100 if SMALL else 60
WARM = 20  # steps that do not count
ROUNDS = 2 if SMALL else 5
FRAME = (256, 512)  # 1 MB of float64
READER = """
import sys, time
import shmarray as sa
rows, columns = map(int, sys.argv[1:])
sa.config.set(workers=1)
with sa.attach("live-reader-benchmark", timeout=60) as run:
    run.wait("finished", 60)
    frame = run["u"][:rows, :columns]
    frames = 0
    began = due = time.monotonic()
    while "enough" not in run:
        frame.compute(scheduler="synchronous")
        frames += 1
        due = max(due + 1 / 30, time.monotonic())
        time.sleep(max(0, due - time.monotonic()))
    print(frames / (time.monotonic() - began))
"""


def heat(u):
    v = u.copy()
    v[1:-1, 1:-1] = u[1:-1, 1:-1] + 0.2 * (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1])
    return v


class Enough(Exception):
    pass


def run(u, frame, publish):
    """Return (seconds a step, frames a second of the reader)."""
    times = []  # of every tenth step, from when the reader reads, or is taken to
    reader = None
    if frame:
        reader = subprocess.Popen([sys.executable, "-c", READER, *map(str, frame)], stdout=subprocess.PIPE, text=True)

    def callback(f):
        is_read = bool(store["u"]._board.header[2]) if reader and not times else f.step >= WARM
        if is_read:
            times.append((f.step, time.perf_counter()))
        if len(times) > STEPS // 10:
            raise Enough

    store = sa.shared.Store("live-reader-benchmark", create=True) if publish else None
    try:
        sa.iterate(heat, u, steps=10**6, every=10, callback=callback, publish=store)
    except Enough:
        pass
    if store is not None:
        store["enough"] = True
    rate = float(reader.communicate()[0]) if reader else 0.0
    if store is not None:
        store.close()
    (first, began), *_, (last, ended) = times
    return (ended - began) / (last - first), rate


def main():
    print(f"{os.cpu_count()} cores; heat, {SIDE} x {SIDE} float64 = {SIDE * SIDE * 8 / 1e6:.0f} MB; seconds a step, median of {ROUNDS}")
    u = sa.array(np.random.default_rng(0).random((SIDE, SIDE)))
    ways = {
        "not published": (None, False),
        "published, nobody looks": (None, True),
        "1 MB at 30 Hz": (FRAME, True),
        "all of it at 30 Hz": ((SIDE, SIDE), True),
    }
    found = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (frame, publish) in ways.items():
            found[name].append(run(u, frame, publish))
    base = [seconds for seconds, _ in found["not published"]]
    for name, results in found.items():
        seconds = [s for s, _ in results]
        more = statistics.median(s / b - 1 for s, b in zip(seconds, base, strict=True))
        rate = statistics.median(r for _, r in results)
        print(
            f"{name:26s} {1e3 * statistics.median(seconds):8.2f} ms ({1e3 * min(seconds):.2f} to {1e3 * max(seconds):.2f})  "
            f"{100 * more:+6.1f} %" + (f"  reader: {rate:.1f} frames a second" if rate else "")
        )


if __name__ == "__main__":
    main()
