"""What a run is told to do, as plain values: buffers, layers of tasks, the dependencies between them, a plan.

A *task* is one kernel on one tile, named by its index in its *layer*. A layer of a million tasks is one object and the
integers ``range(ntasks)``; nothing here, nor in the scheduler, makes an object per task.

Relies on nothing of this package. Never put here: processes, clocks, memory, or anything that knows of expressions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import networkx

__all__ = [
    "ARENA",
    "DRIVER",
    "SPILL",
    "Address",
    "Buffer",
    "Context",
    "Dependency",
    "Kernel",
    "Layer",
    "LockRequest",
    "Outcome",
    "Plan",
    "Progress",
    "Report",
    "Tally",
]

ARENA = 0  # offset counts from the start of the pool's arena
DRIVER = 1  # offset is an address in the driver's private memory
SPILL = 2  # offset counts from the start of the pool's spill file


class Address(NamedTuple):
    """Where a buffer starts: a segment, and a byte offset in it."""

    segment: int
    offset: int


@dataclass(frozen=True, slots=True)
class Buffer:
    """One contiguous piece of memory that layers read or write.

    ``address`` None: a temporary, which the run allocates when the first layer that writes it opens, and frees when the last
    layer that reads it has finished: in the arena, or, ``is_spilled``, in the spill file.
    """

    nbytes: int
    address: Address | None = None
    is_spilled: bool = False

    @property
    def room_nbytes(self) -> int:
        """The bytes of memory it takes as a temporary."""
        return 0 if self.is_spilled else self.nbytes


class Context(Protocol):
    """What a kernel is given in the process where it runs."""

    @property
    def memory(self) -> Any:
        """The process's `scheduler.segments.Memory`."""

    @property
    def addresses(self) -> Mapping[int, Address]:
        """Where each buffer of the layer lies: those it reads and those it writes."""

    @property
    def redo(self) -> Any:
        """The lane's `scheduler.redo.Redo`: what tasks of layers that are ``in_place`` write through."""

    def beside(self, addresses: Mapping[int, Address]) -> Context:
        """Return the same with other buffers: for a kernel that is made of kernels."""

    def warn(self, category: str, message: str, line: str = "") -> None:
        """Report a warning to the driver, once per text and line; ``category`` names a builtin warning class."""

    def answer(self, blob: bytes) -> None:
        """Send the driver bytes that no buffer has room for: they arrive in `Report.answers`.

        They travel in the worker's message that its tasks are done. A worker that dies before that is sent has done them all the
        same, so that an answer can be missing: a kernel says in a buffer that it has sent one.
        """


class Kernel(Protocol):
    """The work of a layer; it travels by cloudpickle, holds no addresses, and is the same bytes for the same work."""

    def bind(self, context: Context) -> Callable[[int], None]:
        """Return the function that runs task ``i``; called once per process, plan and layer.

        Where several tasks are done sooner together than one after the other, it has an attribute ``many(start, stop)`` that does so. One
        that raises has done none of them, or can do them again.
        """


@dataclass(frozen=True, slots=True)
class Dependency:
    """That a layer needs tasks of an earlier one.

    ``requires(start, stop)`` gives the range (low, high) of tasks of ``layer`` that tasks [start, stop) need; it must be
    monotone: a wider range never needs less. None: all of them.
    """

    layer: int
    requires: Callable[[int, int], tuple[int, int]] | None = None


def _describe(index: int) -> str:
    return f"task {index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The family of tasks of one fused operation.

    ``place`` is "worker", or "driver" for work only the driver can do (reading a source that no worker reaches), or does sooner.
    ``in_place``: a task reads what it writes. It goes in steps through `Context.redo`, and after a death goes on where it was; any
    other task is run again, unless ``retry`` is False, for one that must not be.
    ``nbytes_per_task`` is a hint of a task's cost (bytes moved, weighted); 0 means unknown, as for a user's function.
    ``names``: (number, buffer) where the kernel knows buffers by other numbers than the plan.
    ``describe(i)`` names a task in an error; ``line`` is the user's line ``file:number`` that built the expression.
    """

    name: str
    kernel: Kernel
    ntasks: int
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    names: tuple[tuple[int, int], ...] = ()
    dependencies: tuple[Dependency, ...] = ()
    nbytes_per_task: int = 0
    place: str = "worker"
    retry: bool = True
    in_place: bool = False
    describe: Callable[[int], str] = _describe
    line: str = ""


class LockRequest(NamedTuple):
    """Cells [start, stop) of an extent, to read ("r") or to write ("w")."""

    extent: int
    start: int
    stop: int
    mode: str


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run that was cut short has done, and the next run of the plan goes on from.

    ``finished``: ranges (layer, start, stop); ``steps``: (layer, task, first step to do) of tasks in place; ``unfinished``: ranges
    that may be half done, and have to be run again. ``temporaries``: by buffer, the extents that hold what was computed.
    """

    finished: tuple[tuple[int, int, int], ...] = ()
    steps: tuple[tuple[int, int, int], ...] = ()
    unfinished: tuple[tuple[int, int, int], ...] = ()
    temporaries: Mapping[int, Any] = field(default_factory=dict)


class Tally:
    """How far a run is: ``done`` of ``total`` tasks. Written by whoever drives the state machine alone; any thread may look."""

    __slots__ = ("done", "total")

    def __init__(self) -> None:
        self.done = self.total = 0


class Outcome:
    """How a run went, for whoever meets an exception of it, be it a Ctrl-C: filled in by whichever thread ends the plan.

    ``began``: tasks may have run. ``progress``: what they have done, when the plan did not come to its end. None, though it
    ``began`` and has not ``finished``: it is still running. ``tally``: how far it is, while it runs.
    """

    __slots__ = ("began", "finished", "progress", "tally")

    def __init__(self) -> None:
        self.began = self.finished = False
        self.tally = Tally()
        self.progress: Progress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Layers in an order in which each depends only on earlier ones, and the buffers they use.

    ``scratch_nbytes`` is what one worker may need at once beside the buffers. ``isolated`` plans hold a user's function
    and so never run in the driver by default. ``keep`` is held until the last task that might use it has ended. ``progress``: what an
    earlier run has done. ``task_timeout_s``: how long one task may keep a worker process, if its pool does not allow less; None: no
    limit.
    """

    buffers: tuple[Buffer, ...]
    layers: tuple[Layer, ...]
    scratch_nbytes: int = 0
    isolated: bool = False
    task_timeout_s: float | None = None
    locks: tuple[LockRequest, ...] = ()
    keep: tuple[Any, ...] = field(default=(), compare=False)
    progress: Progress | None = None
    # By layer: (digest, pickle) of its kernel, made when first sent; plans made from one by `dataclasses.replace` share it.
    pickles: dict[int, tuple[bytes, bytes]] = field(default_factory=dict, compare=False, repr=False)

    def check(self) -> None:
        """Assert what every layer relies on."""
        written: set[int] = {i for i, b in enumerate(self.buffers) if b.address is not None}
        for position, layer in enumerate(self.layers):
            assert layer.ntasks > 0, f"layer {layer.name!r} has no tasks"
            assert layer.place in ("worker", "driver"), layer.place
            for dependency in layer.dependencies:
                assert 0 <= dependency.layer < position, f"layer {layer.name!r} depends on a later one"
                if dependency.requires is not None:
                    low, high = dependency.requires(0, layer.ntasks)
                    assert 0 <= low < high <= self.layers[dependency.layer].ntasks, (layer.name, low, high)
            for buffer in (*layer.reads, *layer.writes):
                assert 0 <= buffer < len(self.buffers), f"layer {layer.name!r} names buffer {buffer}"
            missing = set(layer.reads) - written
            assert not missing, f"layer {layer.name!r} reads buffers {sorted(missing)} that nothing wrote"
            written.update(layer.writes)

    def last_readers(self) -> dict[int, int]:
        """Return, per temporary buffer, the last layer that touches it: after that it can be freed."""
        last: dict[int, int] = {}
        for position, layer in enumerate(self.layers):
            for buffer in (*layer.reads, *layer.writes):
                if self.buffers[buffer].address is None:
                    last[buffer] = position
        return last

    def first_writers(self) -> dict[int, int]:
        """Return, per temporary buffer, the first layer that touches it: there it is allocated."""
        first: dict[int, int] = {}
        for position, layer in enumerate(self.layers):
            for buffer in (*layer.reads, *layer.writes):
                if self.buffers[buffer].address is None:
                    first.setdefault(buffer, position)
        return first

    def peak_nbytes(self) -> tuple[int, int]:
        """Return the most bytes of temporaries that live at once, layer after layer, and the layer where that is."""
        last = self.last_readers()
        live: set[int] = set()
        peak, where = 0, 0
        for position, layer in enumerate(self.layers):
            live.update(b for b in (*layer.reads, *layer.writes) if b in last)
            nbytes = sum(self.buffers[b].room_nbytes for b in live)
            if nbytes > peak:
                peak, where = nbytes, position
            live = {b for b in live if last[b] > position}
        return peak, where

    def spilled_in_turn(self) -> tuple[list[int], dict[int, int]]:
        """Return pieces of spill space (sizes) for when layers run strictly one after the other, and the piece each temporary lies in.

        Only for what `progress` has not given space or need of. A piece holds one temporary after the other, so they sum to little
        more than what lives at once; as many pieces as temporaries where all live together.
        """
        progress = self.progress or Progress()
        done = [0] * len(self.layers)
        for layer, start, stop in progress.finished:
            done[layer] += stop - start
        left = [i for i, layer in enumerate(self.layers) if done[i] < layer.ntasks]
        used: dict[int, list[int]] = {}
        for position in left:
            for buffer in dict.fromkeys((*self.layers[position].reads, *self.layers[position].writes)):
                if self.buffers[buffer].is_spilled and self.buffers[buffer].address is None and buffer not in progress.temporaries:
                    used.setdefault(buffer, []).append(position)
        sizes: list[int] = []
        free: list[int] = []
        piece_of: dict[int, int] = {}
        for position in left:
            fresh = [b for b, positions in used.items() if positions[0] == position]
            for buffer in sorted(fresh, key=lambda b: -self.buffers[b].nbytes):
                nbytes = self.buffers[buffer].nbytes
                if free:  # the smallest that has room, else the largest, which is made larger
                    piece = min(free, key=lambda p: (sizes[p] < nbytes, sizes[p] if sizes[p] >= nbytes else -sizes[p]))
                    free.remove(piece)
                    sizes[piece] = max(sizes[piece], nbytes)
                else:
                    piece = len(sizes)
                    sizes.append(nbytes)
                piece_of[buffer] = piece
            free += [piece_of[b] for b, positions in used.items() if positions[-1] == position]
        return sizes, piece_of

    def cost_nbytes(self) -> int:
        """Return the bytes that all tasks are expected to move, -1 when a layer's cost is unknown."""
        if any(layer.nbytes_per_task == 0 for layer in self.layers):
            return -1
        return sum(layer.nbytes_per_task * layer.ntasks for layer in self.layers)

    def to_networkx(self) -> networkx.DiGraph[int]:
        """Return the layers as a graph: a node per layer (attributes name, ntasks, ...), an edge per dependency."""
        import networkx  # 0.13 s: only for whoever asks for the picture

        graph: networkx.DiGraph[int] = networkx.DiGraph()
        for position, layer in enumerate(self.layers):
            graph.add_node(position, name=layer.name, ntasks=layer.ntasks, line=layer.line, reads=layer.reads, writes=layer.writes)
            for dependency in layer.dependencies:
                kind = "all" if dependency.requires is None else "range"
                graph.add_edge(dependency.layer, position, kind=kind)
        return graph


@dataclass(frozen=True, slots=True)
class Report:
    """What a finished run tells: the warnings its tasks raised as (category, message, line), deaths survived, what came by
    `Context.answer`, and ``busy_s``, the seconds that were spent on tasks that were done, in all workers together."""

    warnings: Sequence[tuple[str, str, str]] = ()
    deaths: int = 0
    answers: Sequence[bytes] = ()
    busy_s: float = 0.0
