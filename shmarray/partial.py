"""What an update of a stored array left behind when it was cut short: which cells are new, which old, which neither.

Never put here: running anything, marking anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from scheduler.task import Address, Layer, Outcome, Plan, Progress
from shmarray.engines import plain_kernel
from shmarray.kernels.numpy import MapKernel
from shmarray.storage import Layout, Storage

__all__ = ["Damage", "damage_of"]

MOST_TASKS_LOOKED_AT = 10_000  # beyond, all of the target is suspect


@dataclass(slots=True)
class Damage:
    """Cells of a storage, by number, after an update that did not come to its end.

    ``new`` hold its values, ``old`` were not touched, ``torn`` hold some of each; of ``half`` (a part of ``torn``) even one element may be
    neither. ``is_known`` False: the update may still be running.
    """

    new: set[int] = field(default_factory=set)
    old: set[int] = field(default_factory=set)
    torn: dict[int, str] = field(default_factory=dict)
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
    cells = set(storage.cells_of(layout))
    progress = outcome.progress or plan.progress or Progress()
    if outcome.finished:
        return Damage(new=cells)
    if outcome.began and outcome.progress is None:
        return Damage(torn=dict.fromkeys(cells, "An update was interrupted, and may still be running."), is_known=False)
    damage = Damage()
    for number, layer in enumerate(plan.layers):
        if any(plan.buffers[b].address == address for b in layer.writes):
            _look_at(storage, layout, address, plan, number, progress, damage)
    damage.old = cells - damage.new - set(damage.torn)
    return damage


def _look_at(storage: Storage, layout: Layout, address: Address, plan: Plan, number: int, progress: Progress, damage: Damage) -> None:
    layer = plan.layers[number]
    done = [(start, stop) for n, start, stop in progress.finished if n == number]
    half = {task for n, start, stop in progress.unfinished if n == number for task in range(start, stop)}
    half |= {task for n, task, _ in progress.steps if n == number}
    if not done and not half:
        return
    kernel = plain_kernel(layer.kernel)
    ndone = sum(stop - start for start, stop in done)
    if ndone < layer.ntasks and (layer.ntasks > MOST_TASKS_LOOKED_AT or not isinstance(kernel, MapKernel)):
        damage.torn.update(dict.fromkeys(storage.cells_of(layout), _why(layer)))
        return
    if ndone == layer.ntasks:
        damage.new.update(storage.cells_of(layout))
        return
    assert isinstance(kernel, MapKernel)
    out = next(o for o in kernel.program.stores if plan.buffers[o.buffer].address == address)
    is_done = np.zeros(layer.ntasks, bool)
    for start, stop in done:
        is_done[start:stop] = True
    new: set[int] = set()
    old: set[int] = set()
    for task in range(layer.ntasks):
        box = kernel.grid.box(task)
        offset = out.offset + sum(piece.start * stride for piece, stride in zip(box, out.strides, strict=True))
        part = Layout(offset, tuple(piece.stop - piece.start for piece in box), out.strides, out.dtype)
        cells = storage.cells_of(part)
        (new if is_done[task] else old).update(cells)
        if task in half:
            damage.torn.update(dict.fromkeys(cells, _why(layer, task)))
    damage.torn.update(dict.fromkeys((new & old) - set(damage.torn), _why(layer)))
    damage.new |= new - old - set(damage.torn)


def _why(layer: Layer, task: int = -1) -> str:
    what = f"{layer.describe(task)} of {layer.name!r}" if task >= 0 else repr(layer.name)
    line = f", built at {layer.line}," if layer.line else ""
    return f"{what}{line} was cut short in the middle of an update."
