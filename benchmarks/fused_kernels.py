"""How fast are fused kernels, against peers that compile or block too, and against what the memory can deliver?

Everything is measured in turn within one run, after the results have been found to agree. Each row of the table has its goals: how many
times as long a peer takes, by the medians (the ratio of the best times stands beside it). Goals are for the LLVM engine where there
is one; the NumPy engine is a second line.

    fused_kernels.py [--items 40000000] [--rounds 9] [--only 1,2]

A peer that is not installed is left out, and so are its goals. Below the default number of items the fixed costs of a call show: such
runs test this script, nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import math
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import measure
import numpy as np

import shmarray as sa

WORKERS = 2
PAUSE_S = 0.03
BLOCK_ITEMS = 1 << 20  # compared at a time
PACKAGES = ("jax", "jaxlib", "numba", "llvmlite", "blosc2")
IS_CHILD = sys.argv[1:2] == ["--child"]  # a fresh process of this script, which needs few of the peers

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_X64", "1")


def optional(name: str) -> Any:
    """Return the module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"without {name}: {error}", file=sys.stderr)
        return None


numba = optional("numba")
prange = numba.prange if numba else range
dask, da, numexpr, blosc2, jax, jnp = (
    None if IS_CHILD else optional(name) for name in ("dask", "dask.array", "numexpr", "blosc2", "jax", "jax.numpy")
)

Case = Callable[[], Any]
Cases = dict[str, Case]

# What is computed: for modules with NumPy's names, as text, and as the loops one would write for numba.

CHAIN = "(a*2+b)*(a-b)+a*0.5"
EXPONENTIAL = "sqrt(a*a+b*b)-2*exp(-a)*b"


def chain(xp, a, b):
    return (a * 2 + b) * (a - b) + a * 0.5


def exponential(xp, a, b):
    return xp.sqrt(a * a + b * b) - 2 * xp.exp(-a) * b


def chain_mean_loop(a, b):
    total = 0.0
    for k in prange(a.size):
        total += (a[k] * 2 + b[k]) * (a[k] - b[k]) + a[k] * 0.5
    return total / a.size


def exponential_mean_loop(a, b):
    total = 0.0
    for k in prange(a.size):
        total += math.sqrt(a[k] * a[k] + b[k] * b[k]) - 2 * math.exp(-a[k]) * b[k]
    return total / a.size


def chain_loop(a, b, out):
    for k in prange(a.size):
        out[k] = (a[k] * 2 + b[k]) * (a[k] - b[k]) + a[k] * 0.5


def sum_loop(x):
    total = 0.0
    for k in prange(x.size):
        total += x[k]
    return total


def loops(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return a loop compiled by numba over all cores, free to reorder sums, as one would write it by hand for speed."""
    return numba.njit(**{"parallel": True, "fastmath": True, "error_model": "numpy", **options})(function)


# Goals, and whether they are met.


@dataclass(frozen=True, slots=True)
class Goal:
    """That the fastest of ``peers`` takes at least ``least`` times as long as shmarray."""

    peers: tuple[str, ...]
    least: float
    what: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a goal: the ratio of the medians, that of the best times."""

    row: str
    goal: str
    median: float
    best: float
    is_met: bool

    def __str__(self) -> str:
        return f"{self.goal}: {self.median:.2f} x, best {self.best:.2f} x: {'met' if self.is_met else 'NOT MET'}"


verdicts: list[Verdict] = []


def times_as_fast(least: float, *peers: str) -> Goal:
    return Goal(peers, least, f">= {least:g} x {' and '.join(peers)}")


def judge(row: str, times: measure.Times, lines: Sequence[str], goals: Sequence[Goal]) -> None:
    """Print the table of a row, and what came of its goals for each of ``lines``, which are the first engine's."""
    print(f"{row}:")
    measure.table(times, reference=[name for name in times if name.startswith("shmarray")])
    for line in lines:
        for goal in goals:
            peers = [peer for peer in goal.peers if peer in times]
            if not peers:
                continue
            median, best = (min(f(times[peer]) for peer in peers) / f(times[line]) for f in (statistics.median, min))
            verdicts.append(Verdict(row, f"{line} {goal.what}", median, best, median >= goal.least))
            print(f"    {verdicts[-1]}")
    print(flush=True)


# Agreement.


def check(cases: Mapping[str, Case], rtol: float = 1e-9) -> None:
    """Raise AssertionError unless all give what the first, NumPy's own, does. Two results are alive at a time."""
    names = list(cases)
    expected = cases[names[0]]()
    for name in names[1:]:
        found = cases[name]()
        parts = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
        for one, other in parts:
            compare(name, np.asarray(one), np.asarray(other), rtol)
        del found, parts, one  # now, not in the next turn: its memory is for the next case


def compare(name: str, found: np.ndarray, expected: np.ndarray, rtol: float) -> None:
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    flat, other = found.reshape(-1), expected.reshape(-1)
    for k in range(0, flat.size, BLOCK_ITEMS):
        # Terms are of order 1: where they cancel, to how many of their last bits is a matter of fused multiply-add.
        atol = 1e-12 if other.dtype == np.float64 else 0
        np.testing.assert_allclose(flat[k : k + BLOCK_ITEMS], other[k : k + BLOCK_ITEMS], rtol=rtol, atol=atol, err_msg=name)


# shmarray's lines: one per engine.


def engines() -> list[str]:
    """Return the engines there are, the one that goals are for first."""
    found = []
    for engine in ("llvm", "numpy"):
        try:
            with sa.config.set(engine=engine):
                found.append(engine)
        except (KeyError, ValueError) as error:  # no such setting; no such engine
            print(f"without engine={engine!r}: {error.args[0]}")
    return found or [""]


def under(engine: str, case: Case) -> Case:
    """Return the case, run by that engine; by whichever there is where none can be chosen."""
    if not engine:
        return case

    def run() -> Any:
        with sa.config.set(engine=engine):
            return case()

    return run


def line(engine: str, what: str = "") -> str:
    return " ".join(word for word in ("shmarray", engine, what) if word)


def stored(x: np.ndarray) -> Any:
    """Return a stored copy of ``x``."""
    copy = sa.array(x).persist()
    assert copy.is_stored
    return copy


def for_dask(x: np.ndarray) -> Any:
    """Return ``x`` as a dask array in chunks of 16 MB of float64, as shmarray's own."""
    rows = max(1, 2_000_000 // x.shape[1])
    return da.from_array(x, chunks=(rows, x.shape[1]), name=False)


@dataclass(slots=True)
class Inputs:
    """The two arrays of the first three rows, as each peer has them; None for one that is not installed."""

    a: np.ndarray
    b: np.ndarray
    shmarray: tuple[Any, Any]
    flat: tuple[np.ndarray, np.ndarray]  # views of a and b, for numba's loops
    dask: tuple[Any, Any] | None
    blosc2: dict[str, Any] | None
    jax: tuple[Any, Any] | None

    @classmethod
    def make(cls, items: int) -> Inputs:
        rng = np.random.default_rng(0)
        shape = (max(1, items // 2_000), 2_000)
        a, b = rng.random(shape), rng.random(shape)
        return cls(
            a,
            b,
            (stored(a), stored(b)),
            (a.reshape(-1), b.reshape(-1)),
            (for_dask(a), for_dask(b)) if da else None,
            # Not compressed: these are random numbers, which would only be slower.
            {name: blosc2.asarray(x, cparams={"clevel": 0}) for name, x in (("a", a), ("b", b))} if blosc2 else None,
            jax.block_until_ready((jnp.asarray(a), jnp.asarray(b))) if jax else None,
        )


def mean_cases(inputs: Inputs, formula: Callable[..., Any], text: str, loop: Callable[..., Any], found: Sequence[str]) -> Cases:
    a, b = inputs.a, inputs.b
    cases: Cases = {"NumPy": lambda: formula(np, a, b).mean()}
    if inputs.dask:
        cases["dask threads"] = lambda: formula(da, *inputs.dask).mean().compute()
    if numexpr:
        cases["numexpr"] = lambda: numexpr.evaluate(text, {"a": a, "b": b}).mean()
    if inputs.blosc2:
        cases["blosc2"] = lambda: blosc2.lazyexpr(text, inputs.blosc2).mean()
    if inputs.jax:
        compiled = jax.jit(lambda a, b: formula(jnp, a, b).mean())
        cases["JAX"] = lambda: float(compiled(*inputs.jax))
    if numba:
        cases["numba prange"] = partial(loops(loop), *inputs.flat)
    for engine in found:
        cases[line(engine)] = under(engine, lambda: formula(sa, *inputs.shmarray).mean().compute())
    return cases


def row_1(inputs: Inputs, found: Sequence[str], rounds: int) -> None:
    cases = mean_cases(inputs, chain, CHAIN, chain_mean_loop, found)
    check(cases)
    with readers(inputs) as read:
        if read:
            cases["two readers"] = read
        times = measure.in_turn(cases, rounds=rounds, agree=False, pause_s=PAUSE_S)
    goals = [
        times_as_fast(7, "dask threads"),
        times_as_fast(1.4, "JAX"),
        Goal(("numba prange",), 1 / 1.25, ">= 0.8 x numba prange (at most 1.25 of its time)"),
        Goal(("two readers",), 0.75, ">= 0.75 x two readers (75 % of their bandwidth)"),
    ]
    judge(f"1. ({CHAIN}).mean()", times, [line(found[0])], goals)
    if "two readers" in times:
        nbytes = inputs.a.nbytes + inputs.b.nbytes
        for name in (*(line(engine) for engine in found), "two readers"):
            middle, best = (nbytes / f(times[name]) / 1e9 for f in (statistics.median, min))
            print(f"    read by {name}: {middle:.1f} GB/s, best {best:.1f}")
        print(flush=True)


def row_2(inputs: Inputs, found: Sequence[str], rounds: int) -> None:
    cases = mean_cases(inputs, exponential, EXPONENTIAL, exponential_mean_loop, found)
    check(cases)
    times = measure.in_turn(cases, rounds=rounds, agree=False, pause_s=PAUSE_S)
    judge(f"2. ({EXPONENTIAL}).mean()", times, [line(found[0])], [times_as_fast(8, "dask threads"), times_as_fast(1.7, "JAX")])


def row_3(inputs: Inputs, found: Sequence[str], rounds: int) -> None:
    """Results are dropped as soon as they are timed, so that shmarray's goes where the one before was: memory that is warm."""
    a, b = inputs.a, inputs.b
    kept = np.empty_like(a)  # what the lines "to out" write to, each over the one before
    kept_stored = sa.zeros(a.shape).persist()
    cases: Cases = {"NumPy": lambda: chain(np, a, b)}
    if inputs.dask:
        cases["dask persist()"] = lambda: chain(da, *inputs.dask).persist()
        cases["dask compute()"] = lambda: chain(da, *inputs.dask).compute()
    if numexpr:
        cases["numexpr"] = lambda: numexpr.evaluate(CHAIN, {"a": a, "b": b})
        cases["numexpr to out"] = lambda: numexpr.evaluate(CHAIN, {"a": a, "b": b}, out=kept)
    if inputs.blosc2:
        cases["blosc2"] = lambda: blosc2.lazyexpr(CHAIN, inputs.blosc2).compute(cparams={"clevel": 0})
    if inputs.jax:
        compiled = jax.jit(lambda a, b: chain(jnp, a, b))
        cases["JAX"] = lambda: compiled(*inputs.jax).block_until_ready()
    if numba:
        run = loops(chain_loop)

        def by_numba(out: np.ndarray | None = None) -> np.ndarray:
            out = np.empty_like(a) if out is None else out
            run(*inputs.flat, out.reshape(-1))
            return out

        cases["numba prange"] = by_numba
        cases["numba to out"] = partial(by_numba, kept)
    for engine in found:
        cases[line(engine, "persist()")] = under(engine, lambda: chain(sa, *inputs.shmarray).persist())
        cases[line(engine, "to out")] = under(engine, lambda: chain(sa, *inputs.shmarray).compute(out=kept_stored))
    check(cases)
    times = measure.in_turn(cases, rounds=rounds, agree=False, pause_s=PAUSE_S)
    goals = [times_as_fast(6, "dask persist()", "dask compute()"), times_as_fast(3, "JAX")]
    judge(f"3. {CHAIN}, written to memory", times, [line(found[0], "persist()"), line(found[0], "to out")], goals)


def row_4(items: int, found: Sequence[str], rounds: int) -> None:
    side = max(1, round(8_000 * math.sqrt(items / 40e6)))
    x = np.random.default_rng(0).random((side, side))
    for_shmarray = stored(x)
    for_da = for_dask(x) if da else None
    for_jax = jnp.asarray(x).block_until_ready() if jax else None
    for axis in (0, 1, None):
        cases: Cases = {"NumPy": lambda axis=axis: (x.mean(axis=axis), x.std(axis=axis))}
        if da:
            cases["dask threads"] = lambda axis=axis: dask.compute(for_da.mean(axis=axis), for_da.std(axis=axis))
        if jax:
            compiled = jax.jit(lambda x, axis=axis: (x.mean(axis=axis), x.std(axis=axis)))
            cases["JAX"] = lambda compiled=compiled: jax.block_until_ready(compiled(for_jax))
        peers = tuple(cases)
        for engine in found:
            both = lambda axis=axis: sa.compute(for_shmarray.mean(axis=axis), for_shmarray.std(axis=axis))  # noqa: E731
            cases[line(engine)] = under(engine, both)
        check(cases)
        times = measure.in_turn(cases, rounds=rounds, agree=False, pause_s=PAUSE_S)
        goal = Goal(peers, 1.0, "fastest of all")
        judge(f"4. mean and std of {side} x {side}, axis={axis}", times, [line(found[0])], [goal])


def row_5(items: int, found: Sequence[str], rounds: int) -> None:
    rng = np.random.default_rng(0)
    shape = (max(1, items // 2_000), 2_000)
    for dtype, threshold, rtol in (("float32", 0.5, 1e-5), ("int32", 500, 0), ("int16", 500, 0)):
        x = rng.random(shape, np.float32) if dtype == "float32" else rng.integers(0, 1_000, shape, dtype)
        # As a number of the same type, or numexpr would compare in double precision; it has no int16.
        local = {"x": x, "t": np.dtype(dtype if dtype != "int16" else "int32").type(threshold)}
        small_row(
            f"5. {dtype}: where(x > t, x, 0).sum()",
            lambda xp, x, t=threshold: xp.where(x > t, x, 0).sum(),
            lambda local=local: numexpr.evaluate("where(x > t, x, 0)", local).sum(),
            [x],
            rtol,
            found,
            rounds,
        )
        small_row(
            f"5. {dtype}: (x > t).sum()",
            lambda xp, x, t=threshold: (x > t).sum(),
            lambda local=local: numexpr.evaluate("x > t", local).sum(),
            [x],
            0,
            found,
            rounds,
        )
    masks = [rng.random(shape, np.float32) > threshold for threshold in (0.3, 0.6)]
    small_row(
        "5. bool: (mask & other).sum()",
        lambda xp, mask, other: (mask & other).sum(),
        lambda: numexpr.evaluate("mask & other", {"mask": masks[0], "other": masks[1]}).sum(),
        masks,
        0,
        found,
        rounds,
    )


def small_row(
    row: str,
    formula: Callable[..., Any],
    by_numexpr: Case,
    inputs: Sequence[np.ndarray],
    rtol: float,
    found: Sequence[str],
    rounds: int,
) -> None:
    for_shmarray = [stored(x) for x in inputs]
    cases: Cases = {"NumPy": lambda: formula(np, *inputs)}
    if da:
        for_da = [for_dask(x) for x in inputs]
        cases["dask threads"] = lambda: formula(da, *for_da).compute()
    if numexpr:
        cases["numexpr"] = by_numexpr
    for engine in found:
        cases[line(engine)] = under(engine, lambda: formula(sa, *for_shmarray).compute())
    check(cases, rtol)
    times = measure.in_turn(cases, rounds=rounds, agree=False, pause_s=PAUSE_S)
    judge(row, times, [line(found[0])], [times_as_fast(5, "dask threads")])


# The read bandwidth of two processes.


@contextlib.contextmanager
def readers(inputs: Inputs) -> Iterator[Case | None]:
    """Yield a case: two processes read as much shared memory as the first row does, half each, from the go to the last end.

    The memory is of the kind that shmarray's is, a memory file, and holds the same numbers; each process sums its half with NumPy's
    loop, which reads such memory 5 % faster than numba's plain one. Both wait for a line on a pipe, which is the go, and answer
    with their sum. None where there are no memory files.
    """
    if not hasattr(os, "memfd_create"):
        yield None
        return
    halves = [inputs.a.reshape(-1), inputs.b.reshape(-1)]
    nbytes = halves[0].nbytes
    fd = os.memfd_create("readers")
    processes: list[subprocess.Popen[str]] = []
    try:
        os.ftruncate(fd, 2 * nbytes)
        with mmap.mmap(fd, 2 * nbytes) as mapping:
            for k, half in enumerate(halves):
                np.frombuffer(mapping, half.dtype, half.size, k * nbytes)[:] = half
        for k in range(2):
            arguments = [sys.executable, __file__, "--child", "reader", str(fd), str(k * nbytes), str(nbytes)]
            process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[fd])
            processes.append(process)

        def answers() -> list[float]:
            lines = [process.stdout.readline() for process in processes]
            assert all(lines), f"a reader has ended: {[process.poll() for process in processes]}"
            return [float(text) for text in lines]

        def read() -> list[float]:
            for process in processes:
                process.stdin.write("\n")
                process.stdin.flush()
            return answers()

        answers()  # they are there
        np.testing.assert_allclose(read(), [half.sum() for half in halves], rtol=1e-9)
        yield read
    finally:
        for process in processes:
            process.stdin.close()  # which ends it
            process.wait()
            process.stdout.close()
        os.close(fd)


def child_reader(fd: str, offset: str, nbytes: str) -> None:
    """Sum this process's part each time a line comes in."""
    mapping = mmap.mmap(int(fd), 0, prot=mmap.PROT_READ)
    part = np.frombuffer(mapping, np.float64, int(nbytes) // 8, int(offset))
    while True:
        print(float(part.sum()), flush=True)  # the first one meets the page faults
        if not sys.stdin.readline():
            return


# What compiling costs.


def row_6(found: Sequence[str], rounds: int) -> None:
    """Fresh processes: the first call less a later one, of the chain and its mean, imports not counted.

    "cold" is with nothing in the cache on disk; "cold, after another kernel" leaves out what a compiler sets up once per process.
    """
    print("6. what compiling the chain and its mean costs: the first call in a fresh process less a later one")
    runs = min(rounds, 5)
    times: measure.Times = {}
    if numba:
        for kind in ("serial", "prange"):
            times.update(compile_times(f"numba {kind}", "NUMBA_CACHE_DIR", runs, "numba", kind))
    if importlib.util.find_spec("shmarray.kernels.llvm") is not None and "llvm" in found:
        times.update(shmarray_compile_times(runs))
    else:
        print("    without shmarray: there is no shmarray.kernels.llvm that can be chosen")
    if times:
        ours = [name for name in times if name.startswith("shmarray")]
        measure.table(times, reference=ours or next(iter(times)))
    print(flush=True)


def compile_times(name: str, variable: str, runs: int, *arguments: str) -> measure.Times:
    """Return the seconds that compiling took in fresh processes, with an empty cache on disk and with a filled one.

    ``variable``: the environment variable that says where the cache is. Raises RuntimeError when nothing is written there: then what
    is called cold may not have been.
    """
    after, cold, warm = f"{name}, cold, after another kernel", f"{name}, cold", f"{name}, from its cache"
    times: measure.Times = {after: [], cold: [], warm: []}
    for _ in range(runs):
        for steps in (((after, "after"),), ((cold, "first"), (warm, "first"))):
            with tempfile.TemporaryDirectory() as directory, mock.patch.dict(os.environ, {variable: directory}):
                for step, when in steps:
                    found = measure.fresh(__file__, "--child", *arguments, when)
                    times[step].append(max(1e-9, found["first"] - found["later"]))
                    if not any(path.is_file() for path in Path(directory).rglob("*")):
                        raise RuntimeError(f"nothing was written to {directory}, where {variable} says the cache is.")
    return times


def child_numba(kind: str, when: str) -> None:
    x = np.ones(1_000)
    if when == "after":
        loops(sum_loop, parallel=kind == "prange")(x)
    loop = loops(chain_mean_loop, parallel=kind == "prange", cache=True)
    print_first_and_later(lambda: loop(x, x))


LLVM_CACHE_VARIABLE = "SHMARRAY_CACHE_DIRECTORY"  # the environment variable that says where shmarray keeps compiled kernels
LLVM_ITEMS = 100_000  # so few that running the kernel costs nothing


def shmarray_compile_times(runs: int) -> measure.Times:
    """Return the times of a cold compilation, and of the first use with a warm cache on disk."""
    try:
        return compile_times("shmarray llvm", LLVM_CACHE_VARIABLE, runs, "shmarray")
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"    without shmarray: {error}")
        return {}


def child_shmarray(when: str) -> None:
    """What is timed is a whole ``compute`` in this process; the import of llvmlite is part of the first one if shmarray puts it off."""
    x = stored(np.ones(LLVM_ITEMS))
    with sa.config.set(engine="llvm", scheduler="synchronous"):
        if when == "after":
            (x - 1).max().compute()
        print_first_and_later(lambda: chain(sa, x, x).mean().compute())


def print_first_and_later(function: Case) -> None:
    first = measure.timed(function)[0]
    print(json.dumps({"first": first, "later": statistics.median(measure.timed(function)[0] for _ in range(5))}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=40_000_000, help="float64 per input of the first three rows (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each case (default: %(default)s)")
    parser.add_argument("--only", default="1,2,3,4,5,6", help="which rows, as 1,2 (default: all)")
    options = parser.parse_args()
    only = {int(number) for number in options.only.split(",")}
    if options.items < 2_000 or options.rounds < 1 or not only <= set(range(1, 7)):
        parser.error(f"expected --items >= 2000, --rounds >= 1 and rows from 1 to 6, got {options}")
    measure.start(f"fused kernels and their peers, inputs stored, {options.items:,} items, {WORKERS} workers", *PACKAGES)
    sa.config.set(workers=WORKERS)
    if dask:
        dask.config.set(scheduler="threads", num_workers=WORKERS)
    if numexpr:
        numexpr.set_num_threads(WORKERS)
    if blosc2:
        blosc2.set_nthreads(WORKERS)
    if numba:
        numba.set_num_threads(min(WORKERS, numba.config.NUMBA_NUM_THREADS))
    found = engines()
    print(f"goals are for {line(found[0])}\n", flush=True)
    sa.ones((2_000, 2_000)).persist().sum().compute(scheduler="processes")  # the workers start, before JAX has threads
    if only & {1, 2, 3}:
        inputs = Inputs.make(options.items)
        for number, row in ((1, row_1), (2, row_2), (3, row_3)):
            if number in only:
                row(inputs, found, options.rounds)
        del inputs
        gc.collect()
    for number, row in ((4, row_4), (5, row_5)):
        if number in only:
            row(options.items, found, options.rounds)
            gc.collect()
    if 6 in only:
        row_6(found, options.rounds)
    if verdicts:
        print("goals, medians (best):")
        width = max(len(verdict.row) for verdict in verdicts)
        wider = max(len(verdict.goal) for verdict in verdicts)
        for verdict in verdicts:
            ratios = f"{verdict.median:6.2f} x ({verdict.best:.2f} x)"
            print(f"  {verdict.row:{width}}  {verdict.goal:{wider}}  {ratios:<20}  {'met' if verdict.is_met else 'NOT MET'}")


if __name__ == "__main__":
    if IS_CHILD:
        {"reader": child_reader, "numba": child_numba, "shmarray": child_shmarray}[sys.argv[2]](*sys.argv[3:])
    else:
        main()
