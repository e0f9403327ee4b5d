"""Updates in place under SIGKILL: the array ends bit-identical to the undisturbed run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import shmarray as sa
from shmarray import plan
from shmarray.engines import plain_kernel

UPDATES: dict[str, Callable[[sa.Array, sa.Array], None]] = {
    "all": lambda x, y: np.add(x, y, out=x),
    "chain": lambda x, y: x.__setitem__(..., x * 1.25 + np.sqrt(y) - 0.5 * x * y),
    "steps": lambda x, y: x.__setitem__((slice(1, None, 2), slice(3, -5)), x[1::2, 3:-5] * y[1::2, 3:-5] + 1),
    "flipped": lambda x, y: x[::-1, ::-1].__setitem__(..., x[::-1, ::-1] * 0.75 + y),
    "transposed": lambda x, y: x.T.__setitem__(..., x.T - y.T),
    "broadcast": lambda x, y: x.__imul__(y[:1]),
}


class Killer:
    """Kills a random worker at a random moment of what runs inside ``with``."""

    def __init__(self, pool: sa.Pool, seed: int) -> None:
        self.pool = pool
        self.rng = random.Random(seed)
        self.killed = 0

    def __enter__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._kill, args=(self.rng.uniform(0, 0.01), self.rng.random()))
        self._thread.start()

    def _kill(self, delay_s: float, which: float) -> None:
        pids = self.pool.statistics().pids
        if pids and not self._ended.wait(delay_s):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[int(which * len(pids))], signal.SIGKILL)
                self.killed += 1

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.parametrize("engine", ["numpy", "llvm"])
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_is_applied_exactly_once_under_sigkill(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "llvm":
        pytest.importorskip("llvmlite")
    update = UPDATES[name]
    kernels = kernels_of_plans(monkeypatch)
    rng = np.random.default_rng(3)
    start, other = rng.random((1111, 1003)), rng.random((1111, 1003))
    with sa.config.set(engine=engine), sa.Pool(workers=2) as pool:
        y = sa.array(other)
        expected, x = sa.array(start), sa.array(start)
        for _ in range(10):
            update(expected, y)
        killer = Killer(pool, 11)
        while killer.killed < 6:
            x = sa.array(start)
            for _ in range(10):
                with killer:
                    update(x, y)
            np.testing.assert_array_equal(np.asarray(x), np.asarray(expected))
        pool.check()
    assert {type(kernel).__name__ for kernel in kernels} == {"MapKernel" if engine == "numpy" else "CompiledKernel"}


def kernels_of_plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of the kernels of all updates in place that are planned from now on."""
    found: list[Any] = []
    engine_for = plan.engine_for

    def record(*args: Any) -> Any:
        kernel = engine_for(*args)
        if plain_kernel(kernel).program.updated:
            found.append(kernel)
        return kernel

    monkeypatch.setattr(plan, "engine_for", record)
    return found
