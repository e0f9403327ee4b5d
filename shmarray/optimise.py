"""Rewrites an expression so that views sit on memory: slices, transposes and broadcasts move down to what they read.

Law: the rewritten roots have the values of the given ones; nothing is computed for elements that no root needs, except where
computing a costly node once and reading views of it is cheaper than computing it once per view (`RECOMPUTE_LIMIT`).
After it, a `View` stands only on a leaf or on a node that gets memory of its own (reduction, scan, block, assemble, reshape, kept).
Never put here: layers, tiles, memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from shmarray.expr import Elementwise, Expr, Fill, Foreign, Held, InMemory, Reshape, Stored, View, inherit_line, make, postorder
from shmarray.ops.table import row_for
from shmarray.region import IndexMap, reshape_strides

__all__ = ["RECOMPUTE_LIMIT", "Demand", "Optimised", "compose", "for_input", "optimise", "substitute", "viewed", "weight_below"]

RECOMPUTE_LIMIT = 24  # additions per element: up to here computing again beats writing and reading memory

Demand = IndexMap | None  # None: all of it, as it is


@dataclass(frozen=True, slots=True)
class Optimised:
    """``roots`` rewritten; ``kept`` are elementwise nodes that must be computed once, into memory."""

    roots: tuple[Expr, ...]
    kept: frozenset[Expr]


def weight_below(nodes: list[Expr]) -> dict[Expr, int]:
    """Return, for nodes in postorder, what computing an element costs down to the next memory, in additions."""
    weights: dict[Expr, int] = {}
    for node in nodes:
        if isinstance(node, Elementwise):
            weight = row_for(node.op).weight + sum(weights[x] for x in node.inputs if x.size == node.size)
            weights[node] = min(weight, 1 << 20)  # x = x + x a hundred times has 2^100 paths
        elif isinstance(node, View):
            weights[node] = weights[node.x]
        elif isinstance(node, Fill):
            weights[node] = node.operation.cost
        else:
            weights[node] = 0
    return weights


def optimise(roots: tuple[Expr, ...]) -> Optimised:
    """Return the roots with views pushed down."""
    nodes = list(postorder(roots))
    weights = weight_below(nodes)
    demands: dict[Expr, dict[Demand, None]] = {node: {} for node in nodes}
    for root in roots:
        demands[root][None] = None
    pushed: set[Expr] = set()
    for node in reversed(nodes):  # those that use a node before the node
        wanted = demands[node]
        if isinstance(node, View):
            for demand in wanted:
                demands[node.x][compose(demand, node.map, node.x)] = None
        elif isinstance(node, Elementwise) and (len(wanted) == 1 or weights[node] * len(wanted) <= RECOMPUTE_LIMIT):
            pushed.add(node)
            for demand in wanted:
                for x in node.inputs:
                    demands[x][for_input(demand, x, node)] = None
        else:
            for x in node.inputs:
                demands[x][None] = None
    done: dict[tuple[Expr, Demand], Expr] = {}
    kept: set[Expr] = set()
    for node in nodes:
        for demand in demands[node]:
            done[node, demand] = inherit_line(_rebuild(node, demand, done, node in pushed), node)
        if isinstance(node, Elementwise) and node not in pushed:
            base = inherit_line(_rebuild(node, None, done, True), node)
            kept.add(base)
            for demand in demands[node]:
                done[node, demand] = base if demand is None else make(View, demand.shape, node.dtype, base, demand)
    return Optimised(tuple(done[root, None] for root in roots), frozenset(kept))


def compose(demand: Demand, inner: IndexMap, x: Expr) -> Demand:
    """Return what of ``x`` is demanded where ``demand`` is of its view ``inner``."""
    composed = inner if demand is None else demand.after(inner)
    return None if composed.is_identity(x.shape) else composed


def for_input(demand: Demand, x: Expr, node: Expr) -> Demand:
    """Return what of its operand ``x`` is demanded where ``demand`` is of an elementwise node."""
    if demand is None:
        return None
    mine = demand.for_operand(x.shape, node.shape)
    return None if mine.is_identity(x.shape) else mine


def _rebuild(node: Expr, demand: Demand, done: dict[tuple[Expr, Demand], Expr], push: bool) -> Expr:
    match node:
        case View():
            return done[node.x, compose(demand, node.map, node.x)]
        case Elementwise() if push:
            args = tuple(done[a, for_input(demand, a, node)] if isinstance(a, Expr) else a for a in node.args)
            if demand is None and args == node.args:
                return node
            shape = node.shape if demand is None else demand.shape
            return make(Elementwise, shape, node.dtype, node.op, args, node.params, node.index, node.errstate)
        case Elementwise():
            return node  # replaced by the caller
        case Reshape():
            base = _reshaped(done[node.x, None], node.shape)
            if demand is not None and isinstance(base, Elementwise):
                return _push(base, demand.shape, lambda leaf: viewed(leaf, demand))
            return viewed(base, demand)
        case _ if node.inputs:
            return viewed(_with_inputs(node, {x: done[x, None] for x in node.inputs}), demand)
        case _:
            return viewed(node, demand)


def _with_inputs(node: Expr, new: dict[Expr, Expr]) -> Expr:
    """Return ``node`` over other inputs of the same shapes and values."""
    if all(new[x] is x for x in node.inputs):
        return node
    fields = {}
    for name in (f for cls in type(node).__mro__ for f in getattr(cls, "__dataclass_fields__", {})):
        value = getattr(node, name)
        if isinstance(value, Expr):
            value = new[value]
        elif isinstance(value, tuple) and any(isinstance(v, Expr) for v in value):
            value = tuple(new[v] if isinstance(v, Expr) else v for v in value)
        fields[name] = value
    return make(type(node), **fields)


def substitute(roots: Sequence[Expr], new: dict[Expr, Expr]) -> list[Expr]:
    """Return the roots over other nodes of the same shapes, dtypes and values."""
    done = dict(new)
    for node in postorder(roots, lambda n: () if n in new else n.inputs):
        if node not in done:
            done[node] = inherit_line(_with_inputs(node, done), node)
    return [done[root] for root in roots]


def viewed(node: Expr, demand: Demand) -> Expr:
    """Return a view of a node, as an address where its bytes are stored already."""
    if demand is None:
        return node
    if isinstance(node, Stored):
        offset, strides = demand.apply_strides(node.strides)
        return make(Stored, demand.shape, node.dtype, node.storage, node.offset + offset, strides, node.version)
    if isinstance(node, View):
        return make(View, demand.shape, node.dtype, node.x, demand.after(node.map))
    if isinstance(node, Foreign):
        return _read_less(node, demand)
    return make(View, demand.shape, node.dtype, node, demand)


def _read_less(node: Foreign, demand: IndexMap) -> Expr:
    """Return a view of a source from which only the box that the view needs is read."""
    low, high = list(demand.offsets), list(demand.offsets)
    for n, (axis, step) in zip(demand.shape, demand.axes, strict=True):
        if axis >= 0 and n:
            low[axis] = min(low[axis], low[axis] + step * (n - 1))
            high[axis] = max(high[axis], high[axis] + step * (n - 1))
    shape = tuple(b - a + 1 for a, b in zip(low, high, strict=True))
    origin = tuple(o + a for o, a in zip(node.origin, low, strict=True))
    part = make(Foreign, shape, node.dtype, node.source, origin)
    map = IndexMap(demand.shape, tuple(o - a for o, a in zip(demand.offsets, low, strict=True)), demand.axes)
    return part if map.is_identity(shape) else make(View, map.shape, node.dtype, part, map)


def _lying(x: Expr) -> np.ndarray[Any, Any] | None:
    """Return the NumPy array that a node or a view of one is, or None."""
    if isinstance(x, InMemory):
        return x.held.array
    if isinstance(x, View) and isinstance(x.x, InMemory) and x.size:
        array = x.x.held.array
        first = array[tuple(slice(o, o + 1) for o in x.map.offsets)]
        return as_strided(first, x.shape, x.map.apply_strides(array.strides)[1])
    return None


def _reshaped(x: Expr, shape: tuple[int, ...]) -> Expr:
    """Return ``x`` under another shape: the same bytes where that can be, else a node that gets them in C order first."""
    if isinstance(x, Stored):
        strides = reshape_strides(x.shape, x.strides, shape)
        if strides is not None:
            return make(Stored, shape, x.dtype, x.storage, x.offset, strides, x.version)
    lying = _lying(x)
    if lying is not None:
        strides = reshape_strides(x.shape, lying.strides, shape)
        if strides is not None:
            return make(InMemory, shape, x.dtype, Held(as_strided(lying, shape, strides)))
    if isinstance(x, Reshape):
        return make(Reshape, shape, x.dtype, x.x)
    without = tuple(n for n in shape if n != 1)
    if without == tuple(n for n in x.shape if n != 1):  # only axes of length 1 come and go
        kept = [a for a, n in enumerate(x.shape) if n != 1]
        source = iter(kept)
        axes = tuple((next(source), 1) if n != 1 else (-1, 0) for n in shape)
        map = IndexMap(shape, (0,) * len(x.shape), axes)
        if not isinstance(x, Elementwise):
            return viewed(x, map)
    if isinstance(x, Elementwise) and _leaves_reshape(x, shape):
        return _push(x, shape, lambda leaf: _reshaped(leaf, shape))
    return make(Reshape, shape, x.dtype, x)


def _same_space(node: Elementwise) -> bool:
    return all(x.shape == node.shape for x in node.inputs)


def _leaves_reshape(node: Elementwise, shape: tuple[int, ...]) -> bool:
    """Whether every leaf of a chain has the chain's shape and takes the new one without a copy."""
    for x in postorder([node], lambda n: n.inputs if isinstance(n, Elementwise) else ()):
        if isinstance(x, Elementwise):
            if not _same_space(x):
                return False
        elif isinstance(x, Stored):
            if reshape_strides(x.shape, x.strides, shape) is None:
                return False
        elif isinstance(x, InMemory):
            if reshape_strides(x.shape, x.held.array.strides, shape) is None:
                return False
        else:
            return False
    return True


def _push(root: Elementwise, shape: tuple[int, ...], change: Callable[[Expr], Expr]) -> Expr:
    """Return a chain whose nodes all have one shape, which becomes ``shape``, over changed leaves."""
    new: dict[Expr, Expr] = {}
    for x in postorder([root], lambda n: n.inputs if isinstance(n, Elementwise) else ()):
        if isinstance(x, Elementwise):
            args = tuple(new[a] if isinstance(a, Expr) else a for a in x.args)
            new[x] = make(Elementwise, shape, x.dtype, x.op, args, x.params, x.index, x.errstate)
        else:
            new[x] = change(x)
    return new[root]
