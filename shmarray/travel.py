"""Expressions as plain values, for pickle: a list of nodes in an order in which each refers to earlier ones.

Promises: shared nodes stay shared, depth does not matter (no recursion), stored arrays and NumPy arrays go by value.
Never put here: handles, chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from shmarray.expr import Expr, Held, InMemory, Stored, make, postorder
from shmarray.storage import Layout

__all__ = ["pack", "unpack"]


@dataclass(frozen=True, slots=True)
class _Ref:
    """An earlier node."""

    number: int


def pack(root: Expr) -> list[tuple[type[Expr], dict[str, Any]]]:
    """Return what `unpack` makes ``root`` of again, in this process or another."""
    numbers: dict[Expr, int] = {}
    packed: list[tuple[type[Expr], dict[str, Any]]] = []
    for node in postorder([root]):
        numbers[node] = len(packed)
        if isinstance(node, (Stored, InMemory)):
            packed.append((InMemory, {"shape": node.shape, "dtype": node.dtype, "held": _values(node)}))
            continue
        values = {f.name: getattr(node, f.name) for f in fields(node)}
        packed.append((type(node), {name: _with_refs(value, numbers) for name, value in values.items()}))
    return packed


def unpack(packed: list[tuple[type[Expr], dict[str, Any]]]) -> Expr:
    """Return the root of what `pack` took apart."""
    nodes: list[Expr] = []
    for cls, values in packed:
        restored = {name: _without_refs(value, nodes) for name, value in values.items()}
        if cls is InMemory:
            restored["held"] = Held(restored["held"])
        nodes.append(make(cls, **restored))
    return nodes[-1]


def _values(node: Stored | InMemory) -> np.ndarray[Any, Any]:
    if isinstance(node, InMemory):
        return node.held.array
    return node.storage.lend(Layout.of(node))


def _with_refs(value: Any, numbers: dict[Expr, int]) -> Any:
    if isinstance(value, Expr):
        return _Ref(numbers[value])
    return tuple(_with_refs(v, numbers) for v in value) if type(value) is tuple else value


def _without_refs(value: Any, nodes: list[Expr]) -> Any:
    if isinstance(value, _Ref):
        return nodes[value.number]
    return tuple(_without_refs(v, nodes) for v in value) if type(value) is tuple else value
