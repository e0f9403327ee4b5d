"""What the benchmarks share: what machine this is, timing of peers in turn, tables.

Peers are measured in turns within one run, so that whatever else the machine does hits all of them alike. Ratios are of medians:
peer / shmarray, so that above 1 shmarray is faster.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

Times = dict[str, list[float]]
SPREAD_WIDTH = 30  # of "(87.1 ms to 101 ms, n=15)" where columns follow


def machine(*more: str) -> str:
    """Return a line on processor, memory and versions, those of the packages ``more`` too; nothing that names the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = []
    for package in ("shmarray", "numpy", "dask", "numexpr", *more):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    return (
        f"{processor}, {cores} cores, {memory}, {platform.system()} {platform.release().split('-')[0]}; "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def start(question: str, *packages: str) -> None:
    """Print the question and the machine, with the versions of ``packages`` beside the usual ones."""
    print(question)
    print(machine(*packages), flush=True)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return (seconds, result)."""
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def in_turn(
    cases: Mapping[str, Callable[[], Any]],
    rounds: int = 7,
    few: Mapping[str, int] | None = None,
    agree: bool = True,
    pause_s: float = 0.0,
) -> Times:
    """Return the times of each case, measured in turn after one round that does not count and in which results must agree.

    ``few``: fewer rounds for slow cases; one with a single round has no round that does not count. ``pause_s``: sleep before
    each measurement, so that threads of the case before, which spin for a while in case more work comes, have gone to sleep.
    No result is alive while the next is made, except in the first round when they are to agree.
    """
    few = few or {}
    times: Times = {name: [] for name in cases}
    results = {}
    for name, case in cases.items():
        seconds, result = timed(case)
        if few.get(name) == 1:
            times[name].append(seconds)
        if agree:
            results[name] = result
        del result
    if agree:
        first, *others = [np.asarray(r) for r in results.values()]
        for other in others:
            np.testing.assert_allclose(other, first, rtol=1e-6)
    results.clear()
    for k in range(rounds):
        for name, case in cases.items():
            if len(times[name]) < few.get(name, rounds) and k < few.get(name, rounds):
                time.sleep(pause_s)
                times[name].append(timed(case)[0])
    return times


def table(times: Times, per: int = 1, reference: str | Sequence[str] = "shmarray") -> None:
    """Print median, spread (smallest to largest) and the ratio to each ``reference``; of each of ``per`` equal parts.

    With several references, a line above names the columns of ratios.
    """
    references = [reference] if isinstance(reference, str) else list(reference)
    base = {name: statistics.median(times[name]) for name in references}
    width = max(len(name) for name in times)
    columns = [max(10, len(name) + 2) for name in references]
    if len(references) > 1:
        heads = "".join(f"{name:>{column}}" for name, column in zip(references, columns, strict=True))
        print(f"  {'':{width}}  {'':9}  {'ratio to:':<{SPREAD_WIDTH}}{heads}")
    for name, values in times.items():
        middle, low, high = (clock(v / per) for v in (statistics.median(values), min(values), max(values)))
        spread = f"({low} to {high}, n={len(values)})"
        if len(references) > 1:
            spread = f"{spread:<{SPREAD_WIDTH}}"
            ratio = "".join(
                f"{'' if name == other else f'{statistics.median(values) / base[other]:.2f} x':>{column}}"
                for other, column in zip(references, columns, strict=True)
            )
        else:
            ratio = "" if name == references[0] else f"  {statistics.median(values) / base[references[0]]:8.2f} x"
        print(f"  {name:{width}}  {middle:>9}  {spread}{ratio}".rstrip(), flush=True)


def clock(seconds: float) -> str:
    """Return a time with a unit that suits it."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def fresh(script: str, *arguments: str) -> Any:
    """Return what a fresh process that runs ``script`` prints as JSON on its last line."""
    done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def pss_nbytes(pid: int) -> int:
    """Return the memory of a process and all its descendants; pages that they share count once."""
    total = 0
    try:
        family: Sequence[psutil.Process] = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in family:
        try:
            lines = Path("/proc", str(process.pid), "smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has just ended
        total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total
