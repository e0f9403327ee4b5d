"""The form of a lowering: what an entry of the table is given and gives, and how it gets into the table.

An entry gets operands in the dtypes of NumPy's own loop and returns lanes in that loop's output dtype, or a tuple where there are
several outputs. It never sees float16: it gets float32, and what it returns is rounded (`lower`). What it cannot do raises
`NotLowered`: the NumPy engine runs that kernel.
Never put here: entries (``lower_*``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shmarray.kernels.llvm.lanes import Lanes, Vec

__all__ = ["LOWERINGS", "Call", "Dtypes", "Emit", "Lowering", "Outs", "as_given", "lowers", "to_result"]

Dtypes = tuple[np.dtype[Any], ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One step to lower: its parameters, the values of the scalars that are part of the code (None: not known), output dtypes."""

    name: str
    params: tuple[tuple[str, Any], ...]
    scalars: tuple[Any, ...]
    outs: Dtypes


Outs = Any  # a Vec, or a tuple of them
Emit = Callable[[Lanes, Sequence[Vec], Call], Outs]
Rule = Callable[[Sequence[Any], Dtypes], tuple[Dtypes, Dtypes]]


@dataclass(frozen=True, slots=True)
class Lowering:
    """``emit(lanes, operands, call)``; ``dtypes(given, outs)``: what operands are cast to.

    ``baked``: scalar arguments that become part of the code, where it ``bakes`` their values.
    """

    emit: Emit
    dtypes: Rule | None = None  # None: as the ufunc's loop
    baked: frozenset[int] = frozenset()
    bakes: Callable[[Any, np.dtype[Any]], bool] = lambda value, dtype: True


LOWERINGS: dict[str, Lowering] = {}


def lowers(
    *names: str,
    dtypes: Rule | None = None,
    baked: Sequence[int] = (),
    bakes: Callable[[Any, np.dtype[Any]], bool] = lambda value, dtype: True,
) -> Callable[[Emit], Emit]:
    """Enter a function as the lowering of rows ``names``."""

    def enter(emit: Emit) -> Emit:
        for name in names:
            assert name not in LOWERINGS, name
            LOWERINGS[name] = Lowering(emit, dtypes, frozenset(baked), bakes)
        return emit

    return enter


def to_result(given: Sequence[Any], outs: Dtypes) -> tuple[Dtypes, Dtypes]:
    """All operands are cast to the result's dtype."""
    return (outs[0],) * len(given), outs


def as_given(given: Sequence[Any], outs: Dtypes) -> tuple[Dtypes, Dtypes]:
    """Operands stay as they are. For rows of arrays alone."""
    return tuple(np.dtype(d) for d in given), outs
