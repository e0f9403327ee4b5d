"""How much memory does a reduction of a stored array take beyond the array itself?

Measured from outside: the sum of the PSS of a process and its workers (shared pages count once), sampled while the computation is
repeated. What the process held before it made its input (interpreter, libraries, idle workers) is subtracted.
"""

from __future__ import annotations

import subprocess
import sys
import time

import measure

SHAPE = (32_000, 2_000)
NBYTES = 512_000_000
PEERS = {"shmarray": None, "NumPy": None, "dask, 16 MB": (1_000, 2_000), "dask, auto": "auto"}  # and dask's chunks


def say(word):
    print(word, flush=True)
    sys.stdin.readline()


def work(peer):
    """The measured process: say what has been reached, wait for a line, go on."""
    import dask.array as da
    import numpy as np

    import shmarray as sa

    if peer == "shmarray":
        (sa.ones((4_000, 2_000)).persist() * 2).sum().compute(scheduler="processes")  # starts the workers
        say("warm")
        x = sa.random.default_rng(0).random(SHAPE).persist()
    elif peer == "NumPy":
        say("warm")
        x = np.random.default_rng(0).random(SHAPE)
    else:
        da.ones((4_000, 2_000), chunks=(1_000, 2_000)).sum().compute(scheduler="threads")
        say("warm")
        x = da.random.default_rng(0).random(SHAPE, chunks=PEERS[peer]).persist(scheduler="threads")
    say("stored")
    begin = time.perf_counter()
    while time.perf_counter() - begin < 3:
        mean = (x * 1.8 + 32).mean()
        if peer != "NumPy":
            mean.compute()
    say("done")


if sys.argv[1:]:
    work(sys.argv[1])
    sys.exit()

measure.start("(x * 1.8 + 32).mean(), x of 512 MB stored; peak memory / 512 MB")
for peer in PEERS:
    process = subprocess.Popen([sys.executable, __file__, peer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None

    def go_on(process=process):
        process.stdin.write("\n")
        process.stdin.flush()

    assert process.stdout.readline() == "warm\n"
    before = measure.pss_nbytes(process.pid)
    go_on()
    assert process.stdout.readline() == "stored\n"
    held = measure.pss_nbytes(process.pid)
    go_on()
    samples = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < 2.7:
        samples.append(measure.pss_nbytes(process.pid))
        time.sleep(0.003)
    assert process.stdout.readline() == "done\n"
    go_on()
    process.wait()
    peak = max(samples)
    print(
        f"  {peer:13} {(peak - before) / NBYTES:5.2f} x the input"
        f"   (idle {before / 1e6:.0f} MB, with the input {held / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, {len(samples)} samples)",
        flush=True,
    )
