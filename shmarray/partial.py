"""What an update of a stored array left behind when it was cut short: which cells are new, which old, which neither.

Never put here: running anything, marking anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from scheduler.task import Address, Layer, Outcome, Plan, Progress
from shmarray.engines import plain_kernel
from shmarray.kernels.numpy import MapKernel
from shmarray.kernels.parts import PartsKernel
from shmarray.storage import Layout, Storage

__all__ = ["Damage", "damage_of"]

MOST_TASKS_LOOKED_AT = 10_000  # beyond, all of the target is suspect


@dataclass(frozen=True, slots=True)
class Damage:
    """Cells of a storage, by number, after an update that did not come to its end.

    ``new`` hold its values, ``old`` were not touched, ``torn`` hold some of each, and say why. ``is_known`` False: it may still run.
    """

    new: frozenset[int] = frozenset()
    old: frozenset[int] = frozenset()
    torn: Mapping[int, str] = field(default_factory=dict)
    is_known: bool = True

    @property
    def is_none(self) -> bool:
        """Whether nothing was written."""
        return self.is_known and not self.new and not self.torn

    @property
    def is_whole(self) -> bool:
        """Whether everything was written."""
        return self.is_known and not self.old and not self.torn


def damage_of(storage: Storage, layout: Layout, address: Address, plan: Plan, outcome: Outcome) -> Damage:
    """Return what a run of ``plan`` that ended with ``outcome`` did to ``layout``, which is at ``address`` in the plan."""
    told = outcome.progress  # looked at once: whoever ends the plan may fill it in meanwhile
    cells = frozenset(storage.cells_of(layout))
    if outcome.finished:
        return Damage(new=cells)
    if outcome.began and told is None:
        return Damage(torn=dict.fromkeys(cells, "An update was interrupted, and may still be running."), is_known=False)
    progress = told or plan.progress or Progress()
    new: set[int] = set()
    old: set[int] = set()
    torn: dict[int, str] = {}
    layers = [n for n, layer in enumerate(plan.layers) if any(plan.buffers[b].address == address for b in layer.writes)]
    for number in layers:
        _look_at(storage, layout, address, plan, number, progress, new, old, torn)
    mixed = next((_why(plan.layers[n]) for n in layers), "")
    torn.update(dict.fromkeys((new & old) - set(torn), mixed))
    return Damage(frozenset(new - set(torn)), cells - new - set(torn), torn)


def _look_at(
    storage: Storage,
    layout: Layout,
    address: Address,
    plan: Plan,
    number: int,
    progress: Progress,
    new: set[int],
    old: set[int],
    torn: dict[int, str],
) -> None:
    """Add the cells that the tasks of one layer have written, have not, and have in part."""
    layer = plan.layers[number]
    done = [(start, stop) for n, start, stop in progress.finished if n == number]
    half = {task for n, start, stop in progress.unfinished if n == number for task in range(start, stop)}
    half |= {task for n, task, _ in progress.steps if n == number}
    ndone = sum(stop - start for start, stop in done)
    kernel = plain_kernel(layer.kernel)
    stored = kernel.program.stores if isinstance(kernel, MapKernel) else kernel.outs if isinstance(kernel, PartsKernel) else ()
    out = next((o for o in stored if plan.buffers[o.buffer].address == address), None)
    mine = storage.cells_of(layout if out is None else Layout(out.offset, out.shape, out.strides, out.dtype))
    if ndone == layer.ntasks:
        new.update(mine)
        return
    if not done and not half:
        old.update(mine)
        return
    if out is None or layer.ntasks > MOST_TASKS_LOOKED_AT:
        torn.update(dict.fromkeys(mine, _why(layer)))
        return
    assert isinstance(kernel, (MapKernel, PartsKernel))
    is_done = np.zeros(layer.ntasks, bool)
    for start, stop in done:
        is_done[start:stop] = True
    for task in range(layer.ntasks):
        box = kernel.grid.box(task)
        offset = out.offset + sum(piece.start * stride for piece, stride in zip(box, out.strides, strict=True))
        part = Layout(offset, tuple(piece.stop - piece.start for piece in box), out.strides, out.dtype)
        cells = storage.cells_of(part)
        (new if is_done[task] else old).update(cells)
        if task in half:
            torn.update(dict.fromkeys(cells, _why(layer, task)))


def _why(layer: Layer, task: int = -1) -> str:
    what = f"{layer.describe(task)} of {layer.name!r}" if task >= 0 else repr(layer.name)
    line = f", built at {layer.line}," if layer.line else ""
    return f"{what}{line} was cut short in the middle of an update."
