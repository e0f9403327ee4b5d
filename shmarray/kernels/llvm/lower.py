"""Lowering a step: the table of what each row is in LLVM, NumPy's dtype rules, masks, and float16 by way of float32.

    lowering            what an entry is
    lower_arithmetic    + - * / // % **, complex values, signs            to add an operation, add one entry
    lower_choice        comparison, logic, bits, casts, selection         to the file that it fits
    lower_math          rounding, libm's functions and what is made of them

Promises: values are NumPy's: the same bits, but for libm's functions, which are within the bounds of ``docs/accuracy.md``.
Never put here: loops, memory, dtype rules (NumPy is asked).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shmarray.kernels.llvm import lower_arithmetic, lower_choice, lower_math  # their entries fill the table
from shmarray.kernels.llvm.lanes import BOOL, FLOAT16, FLOAT32, Lanes, NotLowered, Vec
from shmarray.kernels.llvm.lowering import LOWERINGS, Call, Dtypes, Lowering
from shmarray.ops.table import ROWS

__all__ = ["LOWERINGS", "Call", "Lowering", "loop_dtypes", "lower"]

_ = (lower_arithmetic, lower_choice, lower_math)


def loop_dtypes(name: str, given: Sequence[Any], outs: Dtypes, params: tuple[tuple[str, Any], ...]) -> tuple[Dtypes, Dtypes]:
    """Return the dtypes that operands are cast to and that come out. ``given``: a dtype, or a Python scalar's type, per operand.

    Raises NotLowered for what has no lowering.
    """
    base = name.removeprefix("masked:")
    if name != base:
        inputs, results = loop_dtypes(base, given[:-2], outs, params)
        return (*inputs, BOOL, outs[0]), results
    lowering = LOWERINGS.get(name)
    if lowering is None:
        raise NotLowered(f"{name} has no lowering")
    if lowering.dtypes is not None:
        return lowering.dtypes(given, outs)
    settings = dict(params)
    dtype = settings.pop("dtype", None)
    if settings:
        raise NotLowered(f"{name} with {', '.join(settings)}")
    function = ROWS[name].numpy
    if not isinstance(function, np.ufunc):
        raise NotLowered(f"{name} is no ufunc")
    asked: dict[str, Any] = {}
    if dtype is not None:
        asked = {"signature": (*(None,) * function.nin, *(np.dtype(dtype),) * function.nout), "casting": "unsafe"}
    try:
        loop = function.resolve_dtypes((*given, *(None,) * function.nout), **asked)
    except TypeError as error:
        raise NotLowered(f"{name}: {error}") from None
    return loop[: function.nin], loop[function.nin :]


def lower(k: Lanes, xs: Sequence[Vec], call: Call) -> Any:
    """Return what a step gives, a `Vec` or a tuple of them; ``xs`` in the dtypes of `loop_dtypes`."""
    base = call.name.removeprefix("masked:")
    if base != call.name:
        *operands, mask, other = xs
        result = lower(k, operands, Call(base, call.params, call.scalars[:-2], call.outs))
        return k.select(mask.real, k.convert(result, other.dtype), other)
    # As NumPy's loops of float16: each operation in float32, its result rounded.
    found = LOWERINGS[base].emit(k, [k.convert(x, FLOAT32) if x.dtype == FLOAT16 else x for x in xs], call)
    if isinstance(found, tuple):
        return tuple(k.convert(x, dtype) for x, dtype in zip(found, call.outs, strict=True))
    return k.convert(found, call.outs[0]) if call.outs[0] == FLOAT16 else found
