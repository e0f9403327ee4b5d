"""Which memory nodes share a pass, and which nodes are made within the task of the pass that reads them.

    memory nodes --levels--> groups of one space and source: passes        each becomes one layer (or a few)
    block operations, foreign sources, assemblies that one pass reads  -->  made within its tasks, without memory

A block operation, foreign source or assembly is *made in the task* when one pass alone reads it, as it is, in the shape of that
pass: then ``x.map_blocks(f).sum()`` needs no memory of the size of ``x``. What must be asked for in boxes of its own (chunks, of a
user's function or of a file) gives the pass its tiles; a second one with other boxes keeps memory.
Promises: nothing is made twice, and no user's function is called where only the driver can work. Plain values; cost grows with nodes
and with the chunks along axes.
Never put here: programs, layers, kernels, memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shmarray.expr import (
    Accumulate,
    Assemble,
    Block,
    Elementwise,
    Expr,
    Foreign,
    InMemory,
    Reduction,
    Reshape,
    Scan,
    Stored,
    View,
    postorder,
)
from shmarray.tiles import TILE_ITEMS, Edges, edges_of, slab_sizes

__all__ = ["Division", "Making", "Pass", "divide", "inside", "source_edges"]

MOST_NESTED = 8  # things made within a task of things made within a task: each has scratch, and a few frames of Python


@dataclass(frozen=True, slots=True)
class Making:
    """How a node that is made in the task is made."""

    edges: Edges | None  # of the boxes to ask for; None: any box will do
    is_isolated: bool = False  # a user's function takes part
    is_foreign: bool = False  # something that only the driver can read takes part
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Pass:
    """Memory nodes that are computed together: reductions of one space and elementwise nodes of that shape, assemblies of pieces in the
    same places, or one node of another kind."""

    nodes: tuple[Expr, ...]
    level: int  # how many passes lie below, one above the other

    @property
    def reductions(self) -> list[Reduction]:
        return [n for n in self.nodes if isinstance(n, Reduction)]

    @property
    def maps(self) -> list[Expr]:
        return [n for n in self.nodes if not isinstance(n, Reduction)]

    @property
    def shape(self) -> tuple[int, ...]:
        """The iteration space."""
        first = self.nodes[0]
        return first.x.shape if isinstance(first, Reduction) else first.shape

    @property
    def is_other(self) -> bool:
        """Whether these are neither reductions nor elementwise."""
        return isinstance(self.nodes[0], (Scan, Accumulate, Block, Assemble, Foreign))


@dataclass(frozen=True, slots=True)
class Division:
    """Where a graph is divided: nodes with memory of their own, nodes made within tasks; the passes, in the order they can run in."""

    memory: frozenset[Expr]
    made: dict[Expr, Making]
    passes: list[Pass] = field(default_factory=list)

    def inside(self, node: Expr) -> Iterable[Expr]:
        """Yield the nodes computed within the pass of memory node ``node`` (not itself, unless elementwise)."""
        return inside(node, self.memory)

    def made_below(self, start: Expr) -> list[Expr]:
        """Return the nodes made in the task that are read to compute ``start``."""
        return [n for n in _inside([start], None, self.memory) if n in self.made]

    def feeds(self, node: Expr) -> Iterator[Expr]:
        """Yield the memory nodes that the pass of ``node`` reads."""
        for inner in postorder(node.inputs, lambda n: () if n in self.memory else n.inputs):
            if inner in self.memory:
                yield inner

    def reads_made(self, node: Expr) -> bool:
        """Whether something is made within the tasks of the pass of ``node``."""
        return bool(self.made) and any(n in self.made for n in self.inside(node))

    def sources(self, node: Expr) -> set[Any]:
        """Return what a pass for ``node`` reads, to see which nodes share one."""
        found: set[Any] = set()
        for inner in self.inside(node):
            if isinstance(inner, Stored):
                found.add(inner.storage.identity)
            elif isinstance(inner, InMemory) or inner in self.made or (inner in self.memory and inner is not node):
                found.add(inner)
        # Other tiles are only for those who cannot do without: the rest keep theirs, and so their bits, whatever is computed beside.
        return {n for n in found if n in self.made} or found


def inside(node: Expr, memory: frozenset[Expr] | set[Expr]) -> Iterable[Expr]:
    """Yield the nodes computed within the pass of memory node ``node`` (not itself, unless elementwise)."""
    return _inside([node] if isinstance(node, Elementwise) else node.inputs, node, memory)


def _inside(starts: Iterable[Expr], top: Expr | None, memory: frozenset[Expr] | set[Expr]) -> Iterable[Expr]:
    return postorder(starts, lambda n: n.inputs if (n is top or n not in memory) and isinstance(n, (Elementwise, View)) else ())


def divide(wanted: Sequence[Expr], memory: set[Expr], outputs: set[Expr], barred: Callable[[Expr], bool]) -> Division:
    """Return the division of the graph below ``wanted``, given the nodes that would have memory if nothing were made in the task.

    ``outputs``: nodes stored by the passes that compute them. ``barred``: what must have memory for other reasons.
    """
    nodes = list(postorder(wanted))
    made: set[Expr] = {n for n in memory if isinstance(n, (Block, Foreign, Assemble)) and n.size and n.ndim and not barred(n)}
    for node in nodes if made else ():
        if isinstance(node, (View, Reshape, Scan, Accumulate)) or (isinstance(node, Block) and node.operation.memory_inputs):
            made.difference_update(node.inputs)
    while True:
        ways, misfits = _ways(nodes, frozenset(memory - made), made)
        if not misfits:
            division = Division(frozenset(memory - made), ways)
            division.passes.extend(_passes(division, [n for n in nodes if n in division.memory or n in outputs]))
            misfits = _misfits(division) if made else set()
            if not misfits:
                return division
        made -= misfits


# --- passes -------------------------------------------------------------------------------------------------------------------


def _passes(division: Division, nodes: list[Expr]) -> Iterator[Pass]:
    """Yield the passes for ``nodes``, level by level."""
    levels: dict[Expr, int] = {}
    for node in nodes:
        levels[node] = 1 + max((levels[n] for n in division.feeds(node)), default=-1)
    for level, here in itertools.groupby(sorted(nodes, key=lambda n: levels[n]), key=lambda n: levels[n]):
        yield from _of_one_level(division, list(here), level)


def _of_one_level(division: Division, nodes: list[Expr], level: int) -> Iterator[Pass]:
    groups: dict[Any, list[Expr]] = {}
    spaces: dict[Any, list[Expr]] = {}
    boxes: dict[Any, list[Expr]] = {}
    for node in nodes:
        if isinstance(node, Reduction):
            groups.setdefault((node.x.shape, division.reads_made(node), node.axes), []).append(node)
        elif isinstance(node, Assemble) and node.disjoint:
            boxes.setdefault((node.shape, node.maps), []).append(node)
        elif isinstance(node, (Scan, Accumulate, Block, Assemble, Foreign)):
            yield Pass((node,), level)
        else:
            spaces.setdefault((node.shape, division.reads_made(node)), []).append(node)
    sources = {node: division.sources(node) for node in nodes}
    for (*space, _), members in groups.items():
        key = tuple(space)
        for cluster in _clusters([(m, sources[m]) for m in members]):
            read = set().union(*(sources[m] for m in cluster))
            along = [m for m in spaces.get(key, ()) if read & sources[m]]
            spaces[key] = [m for m in spaces.get(key, ()) if m not in along]
            yield Pass((*cluster, *along), level)
    for mapped in (*boxes.values(), *spaces.values()):
        for cluster in _clusters([(m, sources[m]) for m in mapped]):
            yield Pass(tuple(cluster), level)


def _clusters(members: list[tuple[Expr, set[Any]]]) -> list[list[Expr]]:
    """Group members whose sources meet."""
    clusters: list[tuple[list[Expr], set[Any]]] = []
    for member, sources in members:
        together, seen = [member], set(sources)
        rest = []
        for others, theirs in clusters:
            if theirs & sources:
                together = others + together
                seen |= theirs
            else:
                rest.append((others, theirs))
        clusters = [*rest, (together, seen)]
    return [group for group, _ in clusters]


# --- what is made in the task -----------------------------------------------------------------------------------------------------


def _ways(nodes: list[Expr], memory: frozenset[Expr], made: set[Expr]) -> tuple[dict[Expr, Making], set[Expr]]:
    """Return how each of ``made`` is made, inputs first, and those that cannot be."""
    ways: dict[Expr, Making] = {}
    misfits: set[Expr] = set()
    for node in nodes:
        if node not in made:
            continue
        below = {n: None for start in node.inputs for n in _inside([start], None, memory) if n in made}
        inner = [ways[n] for n in below]
        edges: Edges | None
        match node:
            case Block():
                edges = edges_of(node.operation.grid())
                if any(b <= a for axis in edges for a, b in itertools.pairwise(axis)):
                    misfits.add(node)  # a chunk without elements is asked for, too
                misfits |= _not_for_block(node, ways, memory)
            case Foreign():
                edges = source_edges(node)
            case _:
                assert isinstance(node, Assemble)
                edges, unfit = _assembled_edges(node, ways, memory)
                misfits |= unfit
        depth = 1 + max((w.depth for w in inner), default=0)
        if depth > MOST_NESTED:
            misfits.update(below)
            depth = 1
        ways[node] = Making(
            edges,
            any(w.is_isolated for w in inner) or (isinstance(node, Block) and node.operation.isolated),
            any(w.is_foreign for w in inner) or isinstance(node, Foreign),
            depth,
        )
    return ways, misfits


def _misfits(division: Division) -> set[Expr]:
    """Return nodes that cannot be made in the task after all: read twice, or in another shape, or at odds with what is read beside."""
    readers: dict[Expr, set[Any]] = {n: set() for n in division.made}
    found: set[Expr] = set()

    def read(reader: Any, nodes: Iterable[Expr], shape: tuple[int, ...]) -> None:
        here = list(nodes)
        for n in here:
            readers[n].add(reader)
            if n.shape != shape:
                found.add(n)
        found.update(_at_odds({n: division.made[n] for n in here}))

    for node in (*(n for p in division.passes if p.is_other for n in p.nodes), *division.made):
        if isinstance(node, Block):
            for k, arg in enumerate(node.args):
                read((node, k), division.made_below(arg), arg.shape)
            found |= _not_for_block(node, division.made, division.memory)
        elif isinstance(node, Assemble):
            for k, (piece, map) in enumerate(zip(node.pieces, node.maps, strict=True)):
                read((node, k), division.made_below(piece), map.shape)
        elif isinstance(node, (Scan, Accumulate)):
            found.update(n for n in division.inside(node) if n in division.made)
    for number, one in enumerate(division.passes):
        if one.is_other:
            continue
        here = {n: None for node in one.nodes for n in division.inside(node) if n in division.made}
        read(number, here, one.shape)
        if math.prod(one.shape) > TILE_ITEMS:  # of one chunk alone: what follows has work for all
            found.update(n for n in here if not division.made[n].is_foreign and _is_one_box(division.made[n].edges))
    found.update(n for n, by in readers.items() if len(by) != 1)
    return found


def _not_for_block(node: Block, ways: dict[Expr, Making], memory: frozenset[Expr]) -> set[Expr]:
    """Return what cannot be made within the tasks of a block operation: it asks for other boxes, or for some twice, or in workers."""
    found: set[Expr] = set()
    for k, arg in enumerate(node.args):
        below = [n for n in _inside([arg], None, memory) if n in ways]
        asked = node.operation.asks_once(k) if below else None
        found.update(n for n in below if asked is None or ways[n].is_foreign or ways[n].edges not in (None, asked))
    return found


def _is_one_box(edges: Edges | None) -> bool:
    return edges is not None and all(len(axis) == 2 for axis in edges)


def _at_odds(ways: dict[Expr, Making]) -> Iterator[Expr]:
    """Yield those that cannot be made in one task with the others: a user's function gives the tiles, and does not run in the driver."""
    is_isolated = any(way.is_isolated for way in ways.values())
    edges: Edges | None = None
    for node, way in sorted(ways.items(), key=lambda item: item[1].is_foreign):
        if way.is_foreign and is_isolated:
            yield node
        elif way.edges is not None:
            edges = edges or way.edges
            if way.edges != edges:
                yield node


def _assembled_edges(node: Assemble, ways: dict[Expr, Making], memory: frozenset[Expr]) -> tuple[Edges | None, set[Expr]]:
    """Return the edges of an assembly some pieces of which have edges, and those of these that do not fit the first one.

    They do where pieces lie one after the other along an axis and have the same edges along the others.
    """
    fixed: dict[int, dict[Expr, None]] = {}
    for k, piece in enumerate(node.pieces):
        mine = {n: None for n in _inside([piece], None, memory) if n in ways and ways[n].edges is not None}
        if mine:
            fixed[k] = mine
    if not fixed:
        return None, set()
    everything = {n for mine in fixed.values() for n in mine}
    along = _axis_along(node)
    if along is None:
        return None, everything
    first = ways[next(iter(fixed[min(fixed)]))].edges
    assert first is not None
    unfit: set[Expr] = set()
    across = [axis for axis in range(node.ndim) if axis != along]
    room = max(1, 2 * TILE_ITEMS // math.prod(max(b - a for a, b in itertools.pairwise(first[axis])) for axis in across))
    cuts: list[int] = [0]
    for k, map in enumerate(node.maps):
        low, n = map.offsets[along], map.shape[along]
        edges = next((ways[m].edges for m in fixed.get(k, ())), None)
        if edges is not None and any(edges[axis] != first[axis] for axis in across):
            unfit.update(fixed[k])
        elif edges is not None and edges[along][-1] == n:
            cuts.extend(low + c for c in edges[along][1:])
            continue
        cuts.extend((*range(low + room, low + n, room), low + n) if n else ())
    return tuple(tuple(cuts) if axis == along else first[axis] for axis in range(node.ndim)), unfit


def _axis_along(node: Assemble) -> int | None:
    """Return the axis along which the pieces of an assembly lie, each after the one before; None when they do not."""
    if not node.disjoint or any(map.axes != tuple((a, 1) for a in range(node.ndim)) for map in node.maps):
        return None
    for axis in range(node.ndim):
        end = 0
        for map in node.maps:
            rest = [a for a in range(node.ndim) if a != axis]
            if map.offsets[axis] != end or any(map.offsets[a] or map.shape[a] != node.shape[a] for a in rest):
                break
            end += map.shape[axis]
        else:
            if end == node.shape[axis]:
                return axis
    return None


def source_edges(node: Foreign) -> Edges:
    """Return the edges of the boxes to read a source in: whole chunks of its own, where it has regular ones."""
    own = getattr(node.source, "chunks", None)
    if not (isinstance(own, tuple) and len(own) == node.ndim and all(isinstance(c, (int, np.integer)) and c > 0 for c in own)):
        return tuple((*range(0, n, s), n) for n, s in zip(node.shape, slab_sizes(node.shape, TILE_ITEMS * 8), strict=True))
    sizes = [int(c) for c in own]
    room = max(1, TILE_ITEMS * 8 // math.prod(min(s, max(n, 1)) for s, n in zip(sizes, node.shape, strict=True)))
    for a in reversed(range(node.ndim)):
        times = max(1, min(room, -(-node.shape[a] // sizes[a])))
        sizes[a] *= times
        room = max(1, room // times)
    return tuple((0, *range(s - o % s, n, s), n) for n, s, o in zip(node.shape, sizes, node.origin, strict=True))
