"""Which engine runs a kernel: compiled code where it has one and the work pays for compiling, else NumPy.

Promises: the choice depends on the plan and the configuration alone, never on what is cached, on workers or on the machine's load,
because engines differ in the last bits.
Never put here: what an engine does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from scheduler.limits import format_bytes
from scheduler.task import Kernel
from shmarray.config import config
from shmarray.kernels.numpy import MapKernel
from shmarray.kernels.parts import PartsKernel
from shmarray.kernels.reduce import FinishKernel, ReduceKernel

__all__ = ["COMPILING_PAYS_NBYTES", "engine_for", "plain_kernel", "why_not_compiled"]

OLDEST_LLVMLITE = (0, 46)
COMPILING_PAYS_NBYTES = 1 << 29  # of traffic, operations weighted: some 50 ms of one core in NumPy, of which code saves half or more


def engine_for(kernel: Kernel, nbytes: float, is_remote: Callable[[int], bool]) -> Kernel:
    """Return the kernel, compiled where that is possible and wanted. ``nbytes``: what all its tasks are worth."""
    result: Kernel = _choose(kernel, nbytes, is_remote)[0]
    return result


def plain_kernel(kernel: Kernel) -> Kernel:
    """Return the kernel of the NumPy engine that a compiled one stands for; others themselves."""
    plain: Kernel = getattr(kernel, "plain", kernel)
    return plain


def why_not_compiled(kernel: Kernel, nbytes: float, is_remote: Callable[[int], bool]) -> str:
    """Return why a kernel runs in NumPy; empty when it is compiled."""
    return _choose(kernel, nbytes, is_remote)[1]


@cache
def _lacks_llvmlite() -> str:
    """Return why there is no llvmlite to compile with; empty when there is."""
    try:
        import llvmlite  # an extra; by itself it loads nothing of LLVM
    except ImportError:
        return "llvmlite is not installed (pip install shmarray[jit])"
    found = str(llvmlite.__version__)
    number = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    return "" if number >= OLDEST_LLVMLITE else f"llvmlite {found} is too old (pip install shmarray[jit])"


def _choose(kernel: Any, nbytes: float, is_remote: Callable[[int], bool]) -> tuple[Any, str]:
    if isinstance(kernel, FinishKernel):
        return kernel, "folding partial results never is"
    if not isinstance(kernel, (MapKernel, ReduceKernel, PartsKernel)):
        return kernel, "only chains of operations and reductions are"
    if config.engine == "numpy":
        return kernel, "engine='numpy'"
    if _lacks_llvmlite():
        return kernel, _lacks_llvmlite()
    if config.engine == "auto" and nbytes < COMPILING_PAYS_NBYTES:
        return (
            kernel,
            f"too little work to pay for it ({format_bytes(int(nbytes))} of {format_bytes(COMPILING_PAYS_NBYTES)}, operations weighted)",
        )
    from shmarray.kernels.llvm import engine  # needs llvmlite, and takes 0.1 s

    try:
        if isinstance(kernel, PartsKernel):  # all of them or none: engines differ in the last bits
            return replace(kernel, parts=engine.compiled_parts(kernel.parts, is_remote)), ""
        return engine.compiled(kernel, is_remote), ""
    except engine.NotLowered as error:
        return kernel, str(error)
