"""What others see of a loop over steps: a line in the terminal, and its state, by name, in other processes.

Promises: where nobody looks, a batch of steps costs a microsecond more; a computation within the loop draws no bar of its own; whatever
ends the loop, readers are told. Relies on `progress.Meter`, `publish` and `store`.
Never put here: how steps run (`iterate`), how cells are copied (`publish`).
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from scheduler.limits import format_bytes
from scheduler.run import Pool, is_watched
from shmarray.config import config
from shmarray.progress import Meter
from shmarray.publish import Publisher
from shmarray.store import Store

__all__ = ["Watch"]

NDArray = np.ndarray[Any, Any]
FACTS = ("step", "steps", "time", "finished")  # names in the store that are not the state's
MEMORY_S = 0.2  # between two looks at how much there is


class Watch:
    """Who watches a loop of ``steps`` steps (None: not known) over ``state``: for ``with``, around the loop.

    ``progress``, ``publish`` and ``names`` are those of `iterate`; ``step`` is its function, whose parameters are the names otherwise.
    Raises ValueError for names that do not fit, and what `Store` raises.
    """

    def __init__(
        self,
        pool: Pool,
        step: Callable[..., Any],
        state: Sequence[Any],
        start: int,
        steps: int | None,
        progress: bool | None,
        publish: str | Store | None,
        names: Sequence[str] | None,
    ) -> None:
        self.pool, self.state, self.start, self.steps = pool, state, start, steps
        if publish is None and names is not None:
            raise TypeError("iterate(names=...) are those of what publish= publishes; it is not given")
        self.names = () if publish is None else names_of(step, len(state), names)
        if publish is not None and not isinstance(publish, (str, Store)):
            raise TypeError(f"iterate(publish=...) takes the name of a store, or an open shared.Store; got {type(publish).__name__}")
        is_shown = config.progress if progress is None else progress
        self.is_shown = is_shown and not is_watched()  # a ProgressBar draws already
        self.place = publish
        self.publisher: Publisher | None = None
        self.meter: Meter | None = None
        self.memory, self.looked_s = "", 0.0
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Watch:
        with contextlib.ExitStack() as stack:
            if self.is_shown:
                self.meter = stack.enter_context(Meter(self.steps, "steps"))
                stack.enter_context(config.set(progress=False))
            if self.place is not None:
                self.store = self.place if isinstance(self.place, Store) else stack.enter_context(Store(self.place, create=True))
                forms = [(x.shape, x.dtype, x.chunks) for x in self.state]
                self.publisher = Publisher(self.store._root().segment, forms, self.start)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.publisher is not None:
            self.publisher.end(is_finished=kind is None)
        self.stack.close()

    def is_asked(self) -> bool:
        """Return whether somebody reads the state every now and then, and waits for the end of a batch."""
        return self.publisher is not None and self.publisher.is_asked()

    def begin(self, state: Callable[[], Sequence[NDArray]]) -> None:
        """Publish the state before the first step."""
        if self.publisher is not None:
            self.publisher.publish(self.start, state())
            published: Mapping[str, Any] = dict(zip(self.names, self.publisher.fields, strict=True))
            self.store.update({**published, **self.publisher.facts, "steps": self.steps})

    def batch(self, done: int, state: Callable[[], Sequence[NDArray]]) -> None:
        """Be told that ``done`` steps are done, between two plans."""
        if self.publisher is not None:
            self.publisher.look(self.start + done, state)
        if self.meter is not None:
            now_s = time.monotonic()
            if now_s - self.looked_s > MEMORY_S:
                self.looked_s = now_s
                self.memory = format_bytes(self.pool.statistics().live_nbytes)
            self.meter.update(done, **{"": self.memory})

    def end(self, done: int, state: Callable[[], Sequence[NDArray]]) -> None:
        """Publish the state after the last step."""
        if self.publisher is not None:
            self.publisher.publish(self.start + done, state())


def names_of(step: Callable[..., Any], n: int, given: Sequence[str] | None) -> tuple[str, ...]:
    """Return names for ``n`` fields: those given, else those of the parameters of ``step``, where it names them."""
    if given is None:
        found = tuple(_parameters(step))[:n]
        names = found if len(found) == n else tuple(f"state{k}" for k in range(n))
    else:
        names = (given,) if isinstance(given, str) else tuple(given)
    if len(names) != n or len(set(names)) != n or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"iterate(names={given!r}): give {n} different name{'s' * (n != 1)}, one for each array of the state")
    taken = [name for name in names if name in FACTS]
    if taken:
        raise ValueError(
            f"iterate(publish=...) would publish a field under {taken[0]!r}, which is the name of a fact ({', '.join(FACTS)}): rename the "
            f"parameter of the step, or give names="
        )
    return names


def _parameters(step: Callable[..., Any]) -> Iterator[str]:
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return
    for p in parameters:
        if p.kind not in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            return
        yield p.name
