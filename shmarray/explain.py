"""What computing would run, in words: the layers of a plan, their engines and traffic, and why the fusion stopped where it did.

Promises: nothing runs and no result gets memory; every reason is the planner's own (`plan.outline`), every number that of the plan.
Never put here: a rule of the planner or of an engine.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler.limits import format_bytes
from scheduler.run import Pool
from scheduler.task import DRIVER, Layer
from shmarray.compute import current_pool
from shmarray.config import config
from shmarray.handle import Handle
from shmarray.kernels.parts import PartsKernel
from shmarray.kernels.program import Apply, Operand
from shmarray.kernels.sources import BlockKernel, ForeignSource
from shmarray.plan import LayerOutline, Outline, Space, outline

__all__ = ["Explanation", "explain"]

WIDTH = 98
MOST_LISTED = 4  # operations that a layer's name lists without leaving any out


@dataclass(frozen=True, slots=True)
class Explanation:
    """A text that shows itself: ``print(x.explain())``, or ``x.explain()`` at a prompt or in a notebook."""

    text: str

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def explain(*args: Any, code: bool = False) -> Explanation:
    """Return, as text, what ``compute(*args)`` would run now: layers, engines, bytes moved, and why each layer is one of its own.

    Nothing runs. ``code``: also the LLVM assembly of each compiled layer.

    >>> import shmarray as sa
    >>> x = sa.ones((1000, 1000)).persist()
    >>> sa.explain(x)
    result  (1000, 1000) float64, 1 chunk: is stored, nothing to run
    """
    lazy = [(k, a) for k, a in enumerate(args) if isinstance(a, Handle) and a._storage is None and 0 not in a.shape]
    names = [f"result {k}" for k in range(1, len(args) + 1)] if len(args) > 1 else ["result"]
    width = max(map(len, names))
    lines = [f"{name:{width}}  {_result(a)}" for name, a in zip(names, args, strict=False)]
    if lazy:
        pool = current_pool()
        found = outline([a.node for _, a in lazy], pool)
        writer = _Writer(found, [names[k] for k, _ in lazy])
        lines += [f"{label:{width}}  {text}" for label, text in writer.summary(pool)]
        for number in range(len(found.layers)):
            lines += ["", *writer.layer(number, code)]
    return Explanation("\n".join(line.rstrip() for line in lines))


def _result(value: Any) -> str:
    if not isinstance(value, Handle):
        return f"{type(value).__name__}: is no array, comes back as it is"
    counts = tuple(len(axis) for axis in value.chunks)
    chunks = "1 chunk"
    if math.prod(counts) > 1:
        sizes = tuple(max(axis) for axis in value.chunks)
        chunks = f"{'x'.join(map(str, counts))} chunks of {'' if _is_regular(value.chunks) else 'up to '}{sizes}"
    state = ""
    if value._storage is not None:
        state = ": is stored, nothing to run"
    elif 0 in value.shape:
        state = ": is empty, nothing to run"
    return f"{value.shape} {value.dtype}, {chunks}{state}"


def _is_regular(chunks: Sequence[Sequence[int]]) -> bool:
    return all(len(set(axis[:-1])) <= 1 and axis[-1] <= axis[0] for axis in chunks)


class _Writer:
    """Writes the parts of one outline. Buffers get names: results by their number in the call, temporaries t1, t2, ..."""

    def __init__(self, found: Outline, results: Sequence[str]) -> None:
        self.found = found
        self.plan = found.plan
        self.names = dict(zip(found.results, results, strict=True))
        temporaries = dict.fromkeys(o.buffer for layer in found.layers for o in layer.stores if self.plan.buffers[o.buffer].address is None)
        self.names |= {buffer: f"t{k}" for k, buffer in enumerate(temporaries, 1)}

    def summary(self, pool: Pool) -> list[tuple[str, str]]:
        """Return the lines on the whole plan, each with its label."""
        plan, layers = self.plan, self.found.layers
        read = sum(self._read_nbytes(number) for number in range(len(layers)))
        written = sum(self._nbytes(layer.stores) for layer in layers)
        peak, where = plan.peak_nbytes()
        ntasks = sum(layer.ntasks for layer in plan.layers)
        spilled = sum(b.nbytes for b in plan.buffers if b.is_spilled)
        temporaries = f"at most {format_bytes(peak)} of temporaries, in layer {where + 1}" if peak else "no temporaries"
        lines = [
            ("plan", f"{_count(len(layers), 'layer')}, {_count(ntasks, 'task')}, engine {config.engine!r}"),
            ("bytes", f"{format_bytes(read)} read, {format_bytes(written)} written"),
            ("memory", f"{temporaries}; {format_bytes(plan.scratch_nbytes)} of scratch per worker"),
        ]
        if spilled:
            lines.append(("", f"{format_bytes(spilled)} of temporaries do not fit the memory limit: they go to the spill file"))
        if not pool.is_driver_reachable:
            lines.append(("", "workers may not reach this process's memory: it is copied through the pool's"))
        return lines

    def layer(self, number: int, code: bool) -> list[str]:
        """Return the lines on one layer."""
        layer, told = self.plan.layers[number], self.found.layers[number]
        head = f"{number + 1}  {layer.name}  "
        lines = [head + _short_line(layer.line, max(20, WIDTH - len(head))).rjust(WIDTH - len(head))]
        traffic = f"reads {self._read_text(number)}, writes {self._written_text(told)}"
        parts = [self._engine(layer, told), ("does", self._operations(told)), ("moves", traffic), ("after", self._waits(layer))]
        for label, text in [*parts, *(("why", reason) for reason in self._reasons(number))]:
            if text:
                first = f"   {label:5}  "
                lines += textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)
        if code:
            lines += _assembly(layer, told)
        return lines

    def _engine(self, layer: Layer, told: LayerOutline) -> tuple[str, str]:
        kernel: Any = told.kernel
        grid = kernel.grid
        first, last = grid.box(0), grid.box(layer.ntasks - 1)
        sizes = tuple(piece.stop - piece.start for piece in first)
        tasks = "1 task" if layer.ntasks == 1 else f"{layer.ntasks:,} tasks of {sizes}"
        where = f"{tasks} over {tuple(piece.stop for piece in last)}"
        if isinstance(kernel, PartsKernel) and len(kernel.parts) > 1:
            where += f", in {len(kernel.parts)} parts"
        if layer.place == "driver":
            where += ", in this process: no other can read the source" if _foreign(told) else ", in this process: sooner done than sent"
        return ("numpy", f"{where}; not compiled: {told.why_not_compiled}") if told.why_not_compiled else ("llvm", where)

    def _operations(self, told: LayerOutline) -> str:
        """Return the operations, where there are more than the layer's name lists."""
        steps = getattr(getattr(told.kernel, "program", None), "steps", ())
        counts = Counter(step.name for step in steps if isinstance(step, Apply))
        if counts.total() <= MOST_LISTED:
            return ""
        return f"{counts.total()} operations: " + ", ".join(name if n == 1 else f"{n} {name}" for name, n in counts.items())

    def _waits(self, layer: Layer) -> str:
        ranges = [d.layer for d in layer.dependencies if d.requires is not None]
        whole = [d.layer for d in layer.dependencies if d.requires is None]
        waits = [f"all of {_layers(whole)}"] if whole else []
        waits += [f"the matching part of {_layers(ranges)}"] if ranges else []
        return ", ".join(waits)

    # --- bytes -----------------------------------------------------------------------------------------------------------

    def _nbytes(self, operands: Iterable[Operand]) -> int:
        """Return the bytes that operands are, without those that broadcasting repeats; of one buffer no more than it has."""
        totals: Counter[int] = Counter()
        for o in dict.fromkeys(operands):
            totals[o.buffer] += o.dtype.itemsize * math.prod(n if stride else 1 for n, stride in zip(o.shape, o.strides, strict=True))
        return sum(min(nbytes, self.plan.buffers[buffer].nbytes) for buffer, nbytes in totals.items())

    def _read_nbytes(self, number: int) -> int:
        told = self.found.layers[number]
        return self._nbytes(told.loads) + sum(nbytes for _, nbytes in _foreign(told))

    def _read_text(self, number: int) -> str:
        told = self.found.layers[number]
        buffers = list(dict.fromkeys(o.buffer for o in told.loads))
        kinds: Counter[str] = Counter()
        for buffer in buffers:
            address = self.plan.buffers[buffer].address
            if buffer not in self.names and address is not None:
                kinds["NumPy array" if address.segment == DRIVER else "stored array"] += 1
        sources = [_count(n, kind) for kind, n in kinds.items()] + [self.names[b] for b in buffers if b in self.names]
        sources += [f"a {name}" for name, _ in _foreign(told)]
        return f"{format_bytes(self._read_nbytes(number))} ({', '.join(sources)})" if sources else "nothing"

    def _written_text(self, told: LayerOutline) -> str:
        names = dict.fromkeys(self.names[o.buffer] for o in told.stores)
        return f"{format_bytes(self._nbytes(told.stores))} ({', '.join(names)})"

    # --- why -------------------------------------------------------------------------------------------------------------

    def _reasons(self, number: int) -> list[str]:
        """Return why what the layer writes to temporaries has memory, and why the layer is not part of another of its level."""
        told = self.found.layers[number]
        mine = [b for b in dict.fromkeys(o.buffer for o in told.stores) if self.plan.buffers[b].address is None]
        several = sum(b in self.found.owners for b in mine) > 1
        reasons: dict[str, list[str]] = {}
        for buffer in mine:
            if buffer in self.found.owners:
                name, why = self.found.owners[buffer]
                reasons.setdefault(f"{name}, {why}" if several else why, []).append(self.names[buffer])
            else:
                readers = [k for k, layer in enumerate(self.plan.layers) if buffer in layer.reads]
                reasons.setdefault(f"partial results, for {_layers(readers)}", []).append(self.names[buffer])
        lines = [f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} memory: {why}" for why, names in reasons.items()]
        if told.space is not None:
            beside = [
                (*_difference(told.space, other.space), k)
                for k, other in enumerate(self.found.layers[:number])
                if other.space is not None and other.level == told.level
            ]
            if beside:
                _, difference, k = min(beside)
                lines.append(f"apart from layer {k + 1}: {difference}")
        return lines


def _difference(one: Space, other: Space) -> tuple[int, str]:
    """Return what keeps layers of one level apart, smaller differences first."""
    if one[0] != other[0]:
        return 2, "another iteration space"
    if one[1] != other[1] and None not in (one[1], other[1]):
        return 1, "reduced over other axes"
    return 0, "nothing is read by both"


def _assembly(layer: Layer, told: LayerOutline) -> list[str]:
    if told.why_not_compiled:
        return ["   code   none: not compiled"]
    from shmarray.kernels.llvm.engine import assembly  # needs llvmlite, and takes 0.1 s

    kernel: Any = layer.kernel
    if isinstance(kernel, PartsKernel):
        kernel = kernel.largest
    return ["", *assembly(kernel).splitlines()]


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' * (len(numbers) != 1)} {', '.join(str(k + 1) for k in numbers)}"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _short_line(line: str, room: int) -> str:
    """Return ``file:number``, seen from the working directory where it is below it; the end of what is too long."""
    below = os.getcwd() + os.sep
    line = line.removeprefix(below)
    return line if len(line) <= room else "..." + line[3 - room :]


def _foreign(told: LayerOutline) -> list[tuple[str, int]]:
    """Return what only the driver can read of what a layer reads: the type's name, and bytes."""
    kernel: Any = told.kernel
    if isinstance(kernel, BlockKernel):
        made = [(kernel.source, math.prod(kernel.out.shape) * kernel.out.dtype.itemsize)]
    else:
        operands = kernel.program.made if hasattr(kernel, "program") else ()
        made = [(o.source, math.prod(o.shape) * o.dtype.itemsize) for o in operands]
    return [(type(source.source).__name__, nbytes) for source, nbytes in made if isinstance(source, ForeignSource)]
