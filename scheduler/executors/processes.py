"""Runs a plan in the pool's worker processes. What is done here is the pickling; the rest is in `scheduler.pool`.

Promises: a kernel that cannot be pickled raises here, in the submitting thread, before anything has run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import cloudpickle

from scheduler.pool import WorkerPool
from scheduler.running import Host, Running
from scheduler.task import Layer, Outcome, Plan, Report
from scheduler.worker import digest_of

__all__ = ["run"]


class _Host(Host, Protocol):
    def worker_pool(self) -> WorkerPool: ...


def run(pool: _Host, plan: Plan, outcome: Outcome) -> Report:
    """Run the plan in worker processes and wait for it."""
    if not plan.pickles:
        plan.pickles.update(pickle_kernels(plan.layers))
    workers = pool.worker_pool()
    return workers.run(Running(pool, plan, outcome), plan.pickles)


def pickle_kernels(layers: Iterable[Layer]) -> dict[int, tuple[bytes, bytes]]:
    """Return (digest, pickle) per layer that runs on workers; raise, in the caller's thread, for one that cannot travel."""
    kernels = {}
    for index, layer in enumerate(layers):
        if layer.place != "worker":
            continue
        try:
            blob = cloudpickle.dumps(layer.kernel)
        except Exception as error:
            built = f" built at {layer.line}" if layer.line else ""
            error.add_note(
                f"while pickling the function of {layer.name!r}{built} for the worker processes: {_culprit(layer.kernel)} cannot "
                f"be pickled. Make it inside the function, or use scheduler='threads'."
            )
            raise
        kernels[index] = digest_of(blob), blob
    return kernels


def _culprit(kernel: object) -> str:
    """Return the smallest part of a kernel that cannot be pickled, looking one attribute or closure cell deep at a time."""
    value, name = kernel, type(kernel).__name__
    for _ in range(8):
        parts = _parts(value)
        for part_name, part in parts:
            try:
                cloudpickle.dumps(part)
            except Exception:
                value, name = part, f"{name}.{part_name}"
                break
        else:
            break
    return f"{name} ({_short(value)})"


def _parts(value: object) -> list[tuple[str, object]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    closure = getattr(value, "__closure__", None)
    code = getattr(value, "__code__", None)
    if closure and code:
        return [(name, cell.cell_contents) for name, cell in zip(code.co_freevars, closure, strict=False)]
    names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:197] + "..."
