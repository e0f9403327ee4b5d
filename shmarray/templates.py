"""Plans used again: where an expression of the same form is computed on other bytes, only addresses, locks and results are new.

    roots, targets --form--> key, places (storages and arrays, in the order they are met)
    key --known--> template --places--> plan            (0.1 ms)
        --new----> build_plan (1 ms), kept as a template

The form is everything that planning looks at: operations, parameters, scalars, shapes, strides, which operands are one, the user's lines,
the settings. Expressions with a user's function or a source are planned each time.
Promises: a plan from a template equals the one that `plan.build_plan` would make. Never put here: what a plan is.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scheduler.run import Pool
from scheduler.task import Plan
from shmarray import engines
from shmarray.config import config
from shmarray.expr import (
    Accumulate,
    Assemble,
    Elementwise,
    Expr,
    Fill,
    InMemory,
    Reduction,
    Reshape,
    Scan,
    Stored,
    View,
    exact,
    line_of,
    postorder,
)
from shmarray.fuse import constant_of
from shmarray.plan import ANY_ROOM, Target, buffer_of, build_plan, lock_requests, make_result
from shmarray.storage import Layout, Storage

__all__ = ["forget", "plan_for", "statistics"]

MOST_TEMPLATES = 256
Place = Storage | np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class _Template:
    """A plan without what is of one time.

    ``numbers``: the buffer of each place, or None; ``uses``: (place, part, mode); ``orders``: of the axes of results made with the plan.
    """

    plan: Plan
    numbers: tuple[int | None, ...]
    uses: tuple[tuple[int, Layout, str], ...]
    orders: tuple[tuple[int, ...] | None, ...]
    held: tuple[Any, ...]  # whose identity is in the key
    room: tuple[int, float]  # see `plan.Bindings`

    def fits(self, pool: Pool) -> bool:
        """Whether the plan would be the same again: which temporaries are spilled depends on what is free now."""
        least, below = self.room
        return self.room == ANY_ROOM or least <= pool.free_nbytes() < below


_mutex = threading.Lock()
_templates: OrderedDict[Any, _Template] = OrderedDict()
_counts = {"built": 0, "reused": 0}


def statistics() -> dict[str, int]:
    """Return how many plans were built, and how many were made from a template."""
    return dict(_counts)


def forget() -> None:
    """Drop all templates: for tests that change what planning looks at."""
    with _mutex:
        _templates.clear()


def plan_for(roots: Sequence[Expr], targets: Sequence[Target], pool: Pool) -> Plan:
    """Return the plan that fills ``targets`` with ``roots``, as `plan.build_plan` does."""
    is_fresh = [target.array is None and target.storage is None for target in targets]
    form = _Form(pool)
    key = form.key(roots, targets)
    template = None
    if key is not None:
        with _mutex:
            template = _templates.get(key)
            if template is not None:
                _templates.move_to_end(key)
    if template is not None and template.fits(pool):
        for target, order in zip(targets, template.orders, strict=True):
            if order is not None:
                make_result(target, order)
        plan = _bound(template, [*form.places, *_results(targets, is_fresh)], pool)
        if plan is not None:
            _counts["reused"] += 1
            return plan
    plan, bindings = build_plan(roots, targets, pool)
    _counts["built"] += 1
    if key is not None:
        places = [*form.places, *_results(targets, is_fresh)]
        numbers = tuple(
            bindings.storages.get(place.identity) if isinstance(place, Storage) else bindings.arrays.get(id(place)) for place in places
        )
        slots = {place.identity: slot for slot, place in enumerate(places) if isinstance(place, Storage)}
        known = sum(number is not None for number in numbers) == sum(buffer.address is not None for buffer in plan.buffers)
        if known and all(identity in slots for identity, _, _ in bindings.uses):
            uses = tuple((slots[identity], layout, mode) for identity, layout, mode in bindings.uses)
            with _mutex:
                _templates[key] = _Template(
                    replace(plan, keep=(), locks=()), numbers, uses, tuple(t.order for t in targets), tuple(form.held), bindings.room
                )
                while len(_templates) > MOST_TEMPLATES:
                    _templates.popitem(last=False)
    return plan


def _results(targets: Sequence[Target], is_fresh: Sequence[bool]) -> list[np.ndarray[Any, Any]]:
    return [target.array for target, fresh in zip(targets, is_fresh, strict=True) if fresh and target.array is not None]


def _bound(template: _Template, places: Sequence[Place], pool: Pool) -> Plan | None:
    """Return the plan for these places; None: an array has moved to another kind of memory since its form was written down."""
    buffers = list(template.plan.buffers)
    keep: list[Any] = []
    for place, number in zip(places, template.numbers, strict=True):
        if number is None:
            continue
        buffer, held = buffer_of(place, pool)
        known = buffers[number].address
        if known is None or buffer.address is None or known.segment != buffer.address.segment:
            return None
        buffers[number] = buffer
        keep += held
    uses = []
    for slot, layout, mode in template.uses:
        storage = places[slot]
        assert isinstance(storage, Storage)
        uses.append((storage, layout, mode))
    return replace(template.plan, buffers=tuple(buffers), locks=lock_requests(uses), keep=tuple(keep))


class _Form:
    """Writes down the form of expressions: nodes by number, storages and arrays by the order they are met in."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.places: list[Place] = []
        self.held: list[Any] = []
        self._slots: dict[int, int] = {}  # id() of a place, which `places` keeps alive
        self._numbers: dict[Expr, int] = {}

    def key(self, roots: Sequence[Expr], targets: Sequence[Target]) -> Any:
        """Return a hashable that is equal for equal forms; None where there is none."""
        pool = self.pool
        parts: list[Any] = [config.engine, engines.COMPILING_PAYS_NBYTES, pool.workers, pool.budget.limit_nbytes, pool.spill_directory]
        for node in postorder(roots):
            part = self._node(node)
            if part is None:
                return None
            self._numbers[node] = len(self._numbers)
            parts.append((part, node.shape, exact(node.dtype)))
        parts.append(tuple(self._numbers[root] for root in roots))
        for target in targets:
            if target.storage is not None and target.layout is not None:
                parts.append((self._storage(target.storage), self._layout(target.layout), target.is_new))
            elif target.array is not None:
                parts.append((self._slot(target.array), target.array.shape, target.array.strides, exact(target.array.dtype)))
            else:
                parts.append(None)
        return tuple(parts)

    def _slot(self, place: Place) -> int:
        slot = self._slots.get(id(place))
        if slot is None:
            slot = self._slots[id(place)] = len(self.places)
            self.places.append(place)
        return slot

    def _storage(self, storage: Storage) -> Any:
        return self._slot(storage), storage.pool is self.pool, storage.is_spilled

    def _layout(self, layout: Layout) -> Any:
        return layout.offset, layout.shape, layout.strides, exact(layout.dtype)

    def _node(self, node: Expr) -> Any:
        number = self._numbers
        match node:
            case Stored():
                return "stored", self._storage(node.storage), node.offset, node.strides
            case InMemory():
                return "memory", self._slot(node.held.array), node.held.array.strides, bool(node.held.file)
            case Fill():
                constant = constant_of(node)
                if constant is not None:
                    return "constant", exact(constant)
                self.held.append(node.operation)
                return "fill", id(node.operation)
            case Elementwise():
                args = tuple(number[a] if isinstance(a, Expr) else exact(a) for a in node.args)
                return node.op, args, exact(node.params), node.index, node.errstate, line_of(node)
            case Reduction():
                return "reduction", node.kind, number[node.x], node.axes, exact(node.params), line_of(node)
            case Scan():
                return "scan", node.ufunc, number[node.x], node.axis, node.errstate, line_of(node)
            case Accumulate():
                data, tables = (tuple(number[n] for n in nodes) for nodes in (node.data, node.tables))
                return "accumulate", node.label, node.ufunc, data, tables, node.has_values, node.is_at, line_of(node)
            case View():
                return "view", number[node.x], exact(node.map)
            case Reshape():
                return "reshape", number[node.x]
            case Assemble():
                pieces = tuple(number[p] for p in node.pieces)
                return "assemble", pieces, exact(node.maps), node.label, node.disjoint, line_of(node)
            case _:
                return None
