"""Lifts arrays put together above the operations on them: a chain over rolled, padded or assigned arrays becomes pieces of one array.

    u - roll(u, 1)     a chain over an assembly of u[-1:] and u[:-1]   --hoist-->   an assembly of two chains over memory:

        out[:1]  =  u[:1] - u[-1:]            out[1:]  =  u[1:] - u[:-1]

The space is cut into boxes within which every assembly is one piece only, seen through views; what is read there is memory, so that each
box is a program like any other, and all of them are one layer (`kernels.parts`). Where there would be many boxes, where pieces
go with gaps (``x[::2] = y``), and where something made in the task takes part, everything stays as it is.
Law: values and shapes stay; elementwise operations give the same bits wherever an element stands.
Promises: cost grows with nodes times boxes, of which there are no more than `MOST_BOXES`.
Never put here: layers, tiles, memory.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from shmarray.expr import Assemble, Block, Elementwise, Expr, Foreign, View, inherit_line, make, postorder
from shmarray.ops.table import row_for
from shmarray.optimise import RECOMPUTE_LIMIT, Demand, Optimised, compose, for_input, substitute, viewed
from shmarray.region import Box, IndexMap, full_box, identity_map

__all__ = ["MOST_BOXES", "hoist"]

MOST_BOXES = 81  # a stencil in four dimensions; each is a program of its own
MOST_STATES = 20_000  # nodes in all boxes: a few tenths of a second

State = tuple[Expr, Demand]


class _Cut(Exception):
    """A box meets several pieces of an assembly: it is to be cut along ``axis`` at ``places``, counted from its start."""

    def __init__(self, axis: int, places: list[int]) -> None:
        self.axis, self.places = axis, places


class _Stays(Exception):
    """An assembly is not to be lifted."""


class _Keep(Exception):
    """A node would be computed so often for one element that it had better have memory."""

    def __init__(self, node: Expr) -> None:
        self.node = node


def hoist(given: Optimised) -> Optimised:
    """Return the roots with assemblies lifted above roots and kept nodes; these then are assemblies themselves."""
    if not any(isinstance(n, Assemble) for n in postorder(given.roots)):
        return given
    kept = given.kept
    while True:
        try:
            return _hoisted(given.roots, kept)
        except _Keep as found:
            kept |= {found.node}


def _hoisted(roots: tuple[Expr, ...], kept: frozenset[Expr]) -> Optimised:
    new: dict[Expr, Expr] = {}
    solid = set(kept)
    wanted = set(roots) | kept
    for node in [n for n in postorder(roots) if n in wanted and isinstance(n, (Elementwise, Assemble, View)) and n.size]:
        # What has been lifted below is memory here.
        (here,) = substitute([node], {old: lifted for old, lifted in new.items() if old is not node}) if new else [node]
        lifted = _lifted(here, solid) or here
        if lifted is not node:
            new[node] = lifted
        if node in kept or lifted is not here:
            solid.add(lifted)
    if not new:
        return Optimised(roots, kept)
    return Optimised(tuple(substitute(roots, new)), frozenset(substitute(list(kept), new)))


def _lifted(node: Expr, solid: set[Expr]) -> Expr | None:
    """Return the node as an assembly of chains over memory; None where that cannot or need not be."""
    labels = {n.label: None for n in _seen_through(node, solid) if isinstance(n, Assemble)}
    if not labels or not _may_lift(node, solid):
        return None
    todo = [full_box(node.shape)]
    done: list[tuple[Box, Expr]] = []
    states = 0
    while todo:
        box = todo.pop()
        if len(done) + len(todo) >= MOST_BOXES or states > MOST_STATES:
            return None
        try:
            part, count = _restricted(node, box, solid)
        except _Cut as cut:
            todo.extend(reversed(list(_cut(box, cut))))
        except _Stays:
            return None
        else:
            states += count
            done.append((box, part))
    done.sort(key=lambda found: [(piece.start, piece.stop) for piece in found[0]])  # equal boxes in one order: these share a pass
    maps = tuple(_place(box) for box, _ in done)
    lifted = make(Assemble, node.shape, node.dtype, tuple(part for _, part in done), maps, "-".join(labels), True)
    return None if lifted is node else inherit_line(lifted, node)


def _seen_through(top: Expr, solid: set[Expr]) -> Iterator[Expr]:
    """Yield what is computed or looked through to compute ``top``, and what lies in memory below."""
    kinds = (Elementwise, View, Assemble)
    return postorder([top], lambda n: n.inputs if isinstance(n, kinds) and (n is top or n not in solid) else ())


def _may_lift(top: Expr, solid: set[Expr]) -> bool:
    """Whether nothing that can be made in the task takes part: a box of it would give it memory, or a reader for every box."""
    for node in _seen_through(top, solid):
        if isinstance(node, Foreign) and node not in solid:
            return False
        if isinstance(node, (Elementwise, Assemble)) and (node is top or node not in solid):
            shapes = [m.shape for m in node.maps] if isinstance(node, Assemble) else [node.shape] * len(node.inputs)
            if any(isinstance(x, Block) and x not in solid and x.shape == shape for x, shape in zip(node.inputs, shapes, strict=True)):
                return False
    return True


def _cut(box: Box, cut: _Cut) -> Iterator[Box]:
    piece = box[cut.axis]
    edges = [piece.start, *(piece.start + place for place in cut.places), piece.stop]
    for low, high in itertools.pairwise(edges):
        yield (*box[: cut.axis], slice(low, high), *box[cut.axis + 1 :])


def _place(box: Box) -> IndexMap:
    return IndexMap(tuple(s.stop - s.start for s in box), tuple(s.start for s in box), tuple((a, 1) for a in range(len(box))))


def _restricted(top: Expr, box: Box, solid: set[Expr]) -> tuple[Expr, int]:
    """Return the chain for a box, over memory alone, and how many nodes were looked at. Raises _Cut, _Stays, _Keep."""
    whole = _place(box)
    start: State = (top, None if whole.is_identity(top.shape) else whole)

    def below(state: State) -> list[State]:
        node, demand = state
        if node in solid and node is not top:
            return []
        match node:
            case View():
                return [(node.x, compose(demand, node.map, node.x))]
            case Elementwise():
                return [(x, for_input(demand, x, node)) for x in node.inputs]
            case Assemble():
                return [_piece(node, demand)]
            case _:
                return []

    order = _postorder(start, below)
    _check_repeats([s for s in order if s[0] is top or s[0] not in solid], below)
    done: dict[State, Expr] = {}
    for state in order:
        node, demand = state
        new: Expr
        if node in solid and node is not top:
            new = viewed(node, demand)
        elif isinstance(node, (View, Assemble)):
            new = done[below(state)[0]]
        elif isinstance(node, Elementwise):
            args = tuple(done[a, for_input(demand, a, node)] if isinstance(a, Expr) else a for a in node.args)
            shape = node.shape if demand is None else demand.shape
            new = make(Elementwise, shape, node.dtype, node.op, args, node.params, node.index, node.errstate)
        else:
            new = viewed(node, demand)
        done[state] = inherit_line(new, node)
    return done[start], len(order)


def _postorder(start: State, below: Callable[[State], Iterable[State]]) -> list[State]:
    order: list[State] = []
    seen = {start}
    stack = [(start, iter(below(start)))]
    while stack:
        state, rest = stack[-1]
        for child in rest:
            if child not in seen:
                seen.add(child)
                stack.append((child, iter(below(child))))
                break
        else:
            stack.pop()
            order.append(state)
    return order


def _check_repeats(order: list[State], below: Callable[[State], list[State]]) -> None:
    """Raise _Keep for a node that computing again for each view of it costs more than memory does, the outermost such node."""
    counts: Counter[Expr] = Counter(node for node, _ in order if isinstance(node, Elementwise))
    if max(counts.values(), default=0) < 2:
        return
    weights: dict[State, int] = {}
    for state in order:
        own = row_for(state[0].op).weight if isinstance(state[0], Elementwise) else 0
        weights[state] = min(1 << 20, own + sum(weights.get(child, 0) for child in below(state)))
    for state in reversed(order):
        node = state[0]
        if counts[node] > 1 and counts[node] * weights[state] > RECOMPUTE_LIMIT:
            raise _Keep(node)


def _piece(node: Assemble, demand: Demand) -> State:
    """Return the piece that gives all of what is demanded of an assembly, and what is demanded of it. Raises _Cut, _Stays."""
    wanted = identity_map(node.shape) if demand is None else demand
    low, high = wanted.bounds()
    for piece, map in zip(reversed(node.pieces), reversed(node.maps), strict=True):
        if 0 in map.shape:
            continue
        first, last = map.bounds()
        if any(b <= c or d <= a for a, b, c, d in zip(low, high, first, last, strict=True)):
            continue
        if any(n > 1 and axis >= 0 and abs(step) != 1 for n, (axis, step) in zip(map.shape, map.axes, strict=True)):
            raise _Stays
        for axis, (a, b, c, d) in enumerate(zip(low, high, first, last, strict=True)):
            places = [place for place in (c, d) if a < place < b]
            if places:
                raise _Cut(*_seen_from(wanted, axis, places))
        inner = _into(wanted, map)
        mine = inner if piece.shape == map.shape else inner.for_operand(piece.shape, map.shape)
        return piece, None if mine.is_identity(piece.shape) else mine
    raise _Stays  # nothing is there


def _seen_from(map: IndexMap, axis: int, places: list[int]) -> tuple[int, list[int]]:
    """Return which axis of the output runs along ``axis``, and where on it these places are."""
    k = next(k for k, (a, _) in enumerate(map.axes) if a == axis)
    step, offset = map.axes[k][1], map.offsets[axis]
    seen = {-((offset - place) // step) if step > 0 else (offset - place) // -step + 1 for place in places}
    return k, sorted(seen)


def _into(wanted: IndexMap, map: IndexMap) -> IndexMap:
    """Return where in a piece, that goes where ``map`` says, the elements are that ``wanted`` takes from the assembly."""
    offsets: list[int] = []
    place: dict[int, tuple[int, int]] = {}  # axis of the assembly -> axis of the piece, direction
    for k, (n, (axis, step)) in enumerate(zip(map.shape, map.axes, strict=True)):
        if axis < 0:
            offsets.append(0)
            continue
        direction = -1 if n > 1 and step < 0 else 1
        offsets.append((wanted.offsets[axis] - map.offsets[axis]) * direction)
        place[axis] = k, direction
    axes = []
    for axis, step in wanted.axes:
        k, direction = place.get(axis, (-1, 0))
        axes.append((k, step * direction) if k >= 0 else (-1, 0))
    return IndexMap(wanted.shape, tuple(offsets), tuple(axes))
