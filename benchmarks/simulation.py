"""What does a time step cost: heat in two and three dimensions, Gray-Scott, and a state so small that the step itself is nothing?

    python benchmarks/simulation.py [--small] [heat2d] [grayscott] [heat3d] [tiny] [memory]

All peers compute the same steps, in double precision, and end with the same state (checked). NumPy: slices, two arrays that swap.
dask: `map_overlap` of that NumPy step, chunks of a quarter of the state, a few steps (it is slow), computed at the end as dask users do
in a loop of `persist`. numba: loops by hand with `prange`, two arrays that swap. JAX: jit of the whole loop (`fori_loop`) in x64.
Times are those of one step, after one run that does not count (which compiles).
"""

from __future__ import annotations

import os
import sys
import time

import measure
import numpy as np

import shmarray as sa

SMALL = "--small" in sys.argv
ROUNDS = 3 if SMALL else 5
FEW_STEPS = 5  # of dask
F, K, DU, DV = 0.0367, 0.0649, 0.16, 0.08  # Gray-Scott: Pearson (1993), mitosis


def only(name):
    named = [a for a in sys.argv[1:] if not a.startswith("--")]
    return not named or name in named


def optional(name):
    try:
        return __import__(name)
    except ImportError:
        print(f"  {name} is not installed", flush=True)
        return None


# --- heat, two dimensions: fixed borders ---------------------------------------------------------------------------------------------


def heat2d_numpy(u, v):
    v[1:-1, 1:-1] = u[1:-1, 1:-1] + 0.2 * (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1])


def heat2d(u):
    v = u.copy()
    v[1:-1, 1:-1] = u[1:-1, 1:-1] + 0.2 * (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1])
    return v


def heat2d_numba(numba):
    @numba.njit(parallel=True)
    def step(u, v):
        for i in numba.prange(1, u.shape[0] - 1):
            for j in range(1, u.shape[1] - 1):
                v[i, j] = u[i, j] + 0.2 * (u[i + 1, j] + u[i - 1, j] + u[i, j + 1] + u[i, j - 1] - 4 * u[i, j])

    return step


def heat2d_jax(u):
    inner = u[1:-1, 1:-1] + 0.2 * (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1])
    return u.at[1:-1, 1:-1].set(inner)


# --- heat, three dimensions ----------------------------------------------------------------------------------------------------------


def heat3d_numpy(u, v):
    c = u[1:-1, 1:-1, 1:-1]
    around = u[2:, 1:-1, 1:-1] + u[:-2, 1:-1, 1:-1] + u[1:-1, 2:, 1:-1] + u[1:-1, :-2, 1:-1] + u[1:-1, 1:-1, 2:] + u[1:-1, 1:-1, :-2]
    v[1:-1, 1:-1, 1:-1] = c + 0.1 * (around - 6 * c)


def heat3d(u):
    v = u.copy()
    heat3d_numpy(u, v)
    return v


def heat3d_numba(numba):
    @numba.njit(parallel=True)
    def step(u, v):
        for i in numba.prange(1, u.shape[0] - 1):
            for j in range(1, u.shape[1] - 1):
                for k in range(1, u.shape[2] - 1):
                    around = u[i + 1, j, k] + u[i - 1, j, k] + u[i, j + 1, k] + u[i, j - 1, k] + u[i, j, k + 1] + u[i, j, k - 1]
                    v[i, j, k] = u[i, j, k] + 0.1 * (around - 6 * u[i, j, k])

    return step


def heat3d_jax(u):
    c = u[1:-1, 1:-1, 1:-1]
    around = u[2:, 1:-1, 1:-1] + u[:-2, 1:-1, 1:-1] + u[1:-1, 2:, 1:-1] + u[1:-1, :-2, 1:-1] + u[1:-1, 1:-1, 2:] + u[1:-1, 1:-1, :-2]
    return u.at[1:-1, 1:-1, 1:-1].set(c + 0.1 * (around - 6 * c))


# --- Gray-Scott: two fields, periodic ------------------------------------------------------------------------------------------------


def around(module, u):
    return module.roll(u, 1, 0) + module.roll(u, -1, 0) + module.roll(u, 1, 1) + module.roll(u, -1, 1) - 4 * u


def gray_scott(u, v, module=sa):
    uvv = u * v * v
    return u + DU * around(module, u) - uvv + F * (1 - u), v + DV * around(module, v) + uvv - (F + K) * v


def gray_scott_slices(u, v, newu, newv):
    """NumPy as people write it who care: arrays with a border of ghost cells, which is filled first."""
    for a in (u, v):
        a[0], a[-1], a[:, 0], a[:, -1] = a[-2], a[1], a[:, -2], a[:, 1]
    c, d = u[1:-1, 1:-1], v[1:-1, 1:-1]
    uvv = c * d * d
    newu[1:-1, 1:-1] = c + DU * (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * c) - uvv + F * (1 - c)
    newv[1:-1, 1:-1] = d + DV * (v[2:, 1:-1] + v[:-2, 1:-1] + v[1:-1, 2:] + v[1:-1, :-2] - 4 * d) + uvv - (F + K) * d


def gray_scott_numba(numba):
    @numba.njit(parallel=True)
    def step(u, v, newu, newv):
        n, m = u.shape
        for i in numba.prange(n):
            up, down = (i - 1) % n, (i + 1) % n
            for j in range(1, m - 1):
                uvv = u[i, j] * v[i, j] * v[i, j]
                lu = u[up, j] + u[down, j] + u[i, j - 1] + u[i, j + 1] - 4 * u[i, j]
                lv = v[up, j] + v[down, j] + v[i, j - 1] + v[i, j + 1] - 4 * v[i, j]
                newu[i, j] = u[i, j] + DU * lu - uvv + F * (1 - u[i, j])
                newv[i, j] = v[i, j] + DV * lv + uvv - (F + K) * v[i, j]
            for j in (0, m - 1):
                left, right = (j - 1) % m, (j + 1) % m
                uvv = u[i, j] * v[i, j] * v[i, j]
                lu = u[up, j] + u[down, j] + u[i, left] + u[i, right] - 4 * u[i, j]
                lv = v[up, j] + v[down, j] + v[i, left] + v[i, right] - 4 * v[i, j]
                newu[i, j] = u[i, j] + DU * lu - uvv + F * (1 - u[i, j])
                newv[i, j] = v[i, j] + DV * lv + uvv - (F + K) * v[i, j]

    return step


# --- running -------------------------------------------------------------------------------------------------------------------------


def swap(step, state, steps):
    """Run a step that writes into arrays it is given."""
    now, then = [a.copy() for a in state], [a.copy() for a in state]
    began = time.perf_counter()
    for _ in range(steps):
        step(*now, *then)
        now, then = then, now
    return time.perf_counter() - began, now


def ours(step, state, steps):
    stored = [sa.array(a) for a in state]
    began = time.perf_counter()
    result = sa.iterate(step, *stored, steps=steps)
    seconds = time.perf_counter() - began
    return seconds, [np.asarray(a) for a in (result if len(state) > 1 else (result,))]


def persisted(step, state, steps):
    u = sa.array(state[0])
    began = time.perf_counter()
    for _ in range(steps):
        u = step(u).persist()
    return time.perf_counter() - began, [np.asarray(u)]


def by_jax(jax, step, state, steps):
    import jax.numpy as jnp

    def loop(*fields):
        def body(_, fields):
            made = step(*fields)
            return made if isinstance(made, tuple) else (made,)

        return jax.lax.fori_loop(0, steps, body, fields)

    key = step, steps
    if key not in JITTED:
        JITTED[key] = jax.jit(loop)
    fields = tuple(jnp.asarray(a) for a in state)
    jax.block_until_ready(fields)
    began = time.perf_counter()
    made = jax.block_until_ready(JITTED[key](*fields))
    return time.perf_counter() - began, [np.asarray(a) for a in made]


JITTED: dict = {}


def by_dask(step, state, steps, depth, boundary):
    import dask.array as da

    chunks = tuple(-(-n // 2) for n in state[0].shape[:2]) + state[0].shape[2:]
    fields = [da.from_array(a, chunks=chunks) for a in state]
    fields = [f.persist() for f in fields]

    def of(k):
        def one(*blocks):
            return step(*blocks)[k] if len(state) > 1 else step(*blocks)

        return one

    began = time.perf_counter()
    for _ in range(steps):
        made = [da.map_overlap(of(k), *fields, depth=depth, boundary=boundary, dtype=float) for k in range(len(state))]
        fields = list(__import__("dask").persist(*made))
    return time.perf_counter() - began, [f.compute() for f in fields]


def compare(title, state, steps, cases, few):
    """Measure the cases in turn; print the time of a step and how the others compare."""
    print(f"\n{title}")
    times = {name: [] for name in cases}
    found = {}
    for turn in range(ROUNDS + 1):
        for name, case in cases.items():
            count = few.get(name, steps)
            if name in few and turn > 2:
                continue
            seconds, result = case(count)
            if turn:
                times[name].append(seconds / count)
            if count == steps:
                found[name] = result
            del result
    first = next(iter(found.values()))
    for name, result in found.items():
        for a, b in zip(first, result, strict=True):
            inner = tuple(slice(1, -1) for _ in a.shape) if a.shape != b.shape else ...
            np.testing.assert_allclose(
                a[inner] if a.size > b.size else a, b[inner] if b.size > a.size else b, rtol=1e-9, atol=1e-12, err_msg=name
            )
    measure.table(times, reference="shmarray")


def stencil(title, shape, steps, step, numpy_step, numba_step, jax_step):
    numba, jax = optional("numba"), optional("jax")
    state = [np.random.default_rng(0).random(shape)]
    cases = {"shmarray": lambda n: ours(step, state, n), "NumPy slices": lambda n: swap(numpy_step, state, n)}
    if numba is not None:
        compiled = numba_step(numba)
        cases["numba, by hand"] = lambda n: swap(compiled, state, n)
    if jax is not None:
        jax.config.update("jax_enable_x64", True)
        cases["JAX jit"] = lambda n: by_jax(jax, jax_step, state, n)

    def dask_step(u):
        v = u.copy()
        numpy_step(u, v)
        return v

    cases["dask map_overlap"] = lambda n: by_dask(dask_step, state, n, 1, "none")
    compare(title, state, steps, cases, {"dask map_overlap": FEW_STEPS, "NumPy slices": min(steps, 10)})


def grayscott():
    n, steps = (256, 20) if SMALL else (2048, 200)
    numba, jax = optional("numba"), optional("jax")
    rng = np.random.default_rng(1)
    u, v = np.ones((n, n)), np.zeros((n, n))
    middle = slice(n // 2 - 20, n // 2 + 20)
    u[middle, middle], v[middle, middle] = 0.5, 0.25
    u += 0.01 * rng.random((n, n))
    state = [u, v]
    cases = {"shmarray": lambda n: ours(gray_scott, state, n)}
    ghosts = [np.pad(a, 1) for a in state]

    def sliced(n):
        seconds, made = swap(gray_scott_slices, ghosts, n)
        return seconds, [a[1:-1, 1:-1] for a in made]

    cases["NumPy slices"] = sliced
    if numba is not None:
        compiled = gray_scott_numba(numba)
        cases["numba, by hand"] = lambda n: swap(compiled, state, n)
    if jax is not None:
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", True)

        def jax_step(u, v):
            return gray_scott(u, v, jnp)

        cases["JAX jit"] = lambda n: by_jax(jax, jax_step, state, n)

    cases["dask map_overlap"] = lambda n: by_dask(lambda u, v: gray_scott(u, v, np), state, n, 1, "periodic")
    compare(
        f"Gray-Scott, {n} x {n}, {steps} steps, periodic: a step", state, steps, cases, {"dask map_overlap": FEW_STEPS, "NumPy slices": 10}
    )


def tiny():
    steps = 500 if SMALL else 10_000
    numba = optional("numba")
    loops = numba.njit(heat2d_numba(numba).py_func) if numba is not None else None
    for n in 200, 10:  # of the smaller one a step is nothing but what a step costs beside its arithmetic
        state = [np.random.default_rng(0).random((n, n))]
        cases = {
            "shmarray": lambda n, state=state: ours(heat2d, state, n),
            "shmarray, u = step(u).persist()": lambda n, state=state: persisted(heat2d, state, n),
            "NumPy slices": lambda n, state=state: swap(heat2d_numpy, state, n),
        }
        if loops is not None:
            cases["numba, one core"] = lambda n, state=state: swap(loops, state, n)
        few = {"shmarray, u = step(u).persist()": steps // 10}
        compare(f"a small state: heat, {n} x {n}, {steps} steps: a step", state, steps, cases, few)


def memory():
    """Print how much memory iterating takes, beside what there is before."""
    n, steps = (500, 20) if SMALL else (4000, 50)
    print(f"\nmemory: heat, {n} x {n}, from a lazy state")
    with sa.Pool() as pool:
        made = sa.iterate(heat2d, sa.random.default_rng(0).random((n, n)), steps=steps)
        state = made.nbytes
        peak = pool.statistics().peak_nbytes
    print(f"  peak {peak / state:.3f} x the state ({peak / 2**20:.1f} MiB)")


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", "")
    measure.start("one time step: shmarray.iterate and its peers", "numba", "jax")
    if only("heat2d"):
        n, steps = (500, 20) if SMALL else (4000, 100)
        stencil(f"heat, {n} x {n}, {steps} steps: a step", (n, n), steps, heat2d, heat2d_numpy, heat2d_numba, heat2d_jax)
    if only("grayscott"):
        grayscott()
    if only("heat3d"):
        n, steps = (64, 10) if SMALL else (256, 50)
        stencil(f"heat, {n}^3, {steps} steps: a step", (n, n, n), steps, heat3d, heat3d_numpy, heat3d_numba, heat3d_jax)
    if only("tiny"):
        tiny()
    if only("memory"):
        memory()
