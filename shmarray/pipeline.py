"""Pipelines: frames from a source go through stages, several at once, and arrive at a sink in order.

    source            frames              carriers: one thread each              results           sink
    +---------+      +-------+      +--------------------------------+      +--------------+      +---------+
    | thread, | ---> | queue | ---> | stage after stage for a frame, | ---> | put in order | ---> | calling |
    | copies  |      +-------+      | in worker processes            |      +--------------+      | thread  |
    +---------+                     +--------------------------------+                            +---------+
         ^                 frames lie in a ring of shared buffers                                      |
         +------------------------------ tokens: ``depth`` of them -------------------------------------+

Promises: at most ``depth`` frames are between source and sink, so that a slow sink stops the source; none is lost, doubled or out of
place; the first frame that fails ends it, after the frames before it have arrived; nothing is left behind, and Ctrl-C comes within a
second. The calling thread waits in C alone (`queue.SimpleQueue`): Ctrl-C in a lock written in Python could leave that locked.
Never put here: what a stage does to a frame (`stages`), how values lie in memory (`kernels.calls`), how tasks run.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import queue
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scheduler.limits import format_bytes
from scheduler.running import GIVE_UP_AFTER_S, RunGroup, is_inline, set_inline, start_thread
from shmarray.compute import current_pool
from shmarray.errors import MemoryBudgetError
from shmarray.expr import user_line
from shmarray.kernels.calls import map_leaves, packed
from shmarray.stages import Call, Dropped, Frame, InOrder, Lazy, Ring, Stage, settled

__all__ = ["PipelineReport", "StageTime", "expression", "ordered", "pipeline", "stream"]

GRACE_S = 2.0  # after an error, for what other frames are at; then their workers are killed
SOURCE_GRACE_S = 0.2  # for a source that may never give another frame: its thread ends when it does


@dataclass(frozen=True, slots=True)
class expression:  # noqa: N801  # read as a function, like `property`
    """Mark a function of lazy arrays as a stage: ``sa.pipeline(source, sa.expression(lambda x: x - x.mean()), sink)``.

    It is given each frame with an `Array` in place of each NumPy array (in tuples, lists and dicts as well), and returns an `Array`, or
    such a collection of them, which the workers compute, fused. It is called once for each frame, in this process, with frames side
    by side in several threads; a plan is made once for frames of one form. Also a decorator.

    >>> import numpy as np, shmarray as sa
    >>> list(sa.stream([np.arange(4)], sa.expression(lambda x: (x * 2).sum())))
    [np.int64(12)]
    """

    function: Callable[[Any], Any]

    def __call__(self, frame: Any) -> Any:
        """Call the function."""
        return self.function(frame)


@dataclass(frozen=True, slots=True)
class ordered:  # noqa: N801  # as above
    """Mark a function as a stage that takes the frames one after the other, in order: it may remember those before.

    It is called in this process, in some thread, with a copy of the frame that is its own to keep or change. Also a decorator.

    >>> import shmarray as sa
    >>> seen = []
    >>> def rank(x):
    ...     seen.append(x)
    ...     return sorted(seen).index(x)
    >>> list(sa.stream([30, 10, 20], sa.ordered(rank)))
    [0, 0, 1]
    """

    function: Callable[[Any], Any]

    def __call__(self, frame: Any) -> Any:
        """Call the function."""
        return self.function(frame)


@dataclass(frozen=True, slots=True)
class StageTime:
    """How long a stage was busy, over all frames. ``where``: "source", "workers", "here" (one frame after the other) or "sink"."""

    name: str
    where: str
    busy_s: float


@dataclass(frozen=True, slots=True)
class PipelineReport:
    """How a pipeline went: ``print`` it for a table.

    ``frames`` arrived at the sink in ``seconds``, with ``workers`` worker processes. ``waited_s``: how long the source was kept waiting
    because ``depth`` frames were on their way. ``stages``: where the time went, source and sink included. Not in them: the start of
    workers, and what frames waited for one.
    """

    frames: int
    seconds: float
    workers: int
    waited_s: float
    stages: tuple[StageTime, ...]

    @property
    def bottleneck(self) -> str:
        """The name of what has to become faster for the whole to become faster."""
        alone = [(stage.busy_s, stage.name) for stage in self.stages if stage.where != "workers"]
        shared = [(stage.busy_s, stage.name) for stage in self.stages if stage.where == "workers"]
        if shared and sum(busy_s for busy_s, _ in shared) / max(1, self.workers) >= max(alone)[0]:
            return max(shared)[1]
        return max(alone)[1]

    def __str__(self) -> str:
        rate = self.frames / self.seconds if self.seconds else math.inf
        lines = [f"{self.frames} frames in {self.seconds:.3g} s, {rate:.3g} per second; the source waited {self.waited_s:.3g} s"]
        wide = max(len(stage.name) for stage in self.stages)
        for stage in self.stages:
            lanes = max(1, self.workers) if stage.where == "workers" else 1
            share = stage.busy_s / (self.seconds * lanes) if self.seconds else 0.0
            of = f" of {lanes} workers" if stage.where == "workers" else ""
            mark = "  <- bottleneck" if stage.name == self.bottleneck else ""
            lines.append(f"  {stage.name:{wide}}  busy {stage.busy_s:8.3f} s, {share:4.0%}{of}{mark}")
        return "\n".join(lines)


def pipeline(source: Iterable[Any], *stages: Any, depth: int | None = None) -> PipelineReport:
    """Send the frames of ``source`` through the stages, several at once, and give each result to the last of them, the sink, in order.

    ``source``: an iterable of NumPy arrays, or of anything that can be pickled: tuples or dicts of arrays, names of files. It runs in
    a thread of its own; frames are copied as they come, so it may fill one buffer again and again.

    A *stage* is a function of one frame, sent to the worker processes once and called there, on several frames at a time. The arrays
    it is given are read-only views of shared memory, good for the call: copy what you keep. It returns anything that can be pickled;
    arrays in it go on without pickling. `expression` marks a function of lazy arrays, `ordered` one that remembers earlier frames.

    The *sink* is called in this thread, with results that are its own: ``results.append`` is one. ``depth``: how many frames may be
    between source and sink, by default two more than there are workers, at least 4. Buffers for about twice as many are held.

    Returns a `PipelineReport`. What a stage, the source or the sink raises is raised here, with notes that name stage and frame
    (counted from 0), after all frames before it have arrived; a generator is closed, later frames are dropped. Should a worker die,
    its frame is done again. Raises MemoryBudgetError when the frames on their way exceed the memory limit.

    >>> import numpy as np, shmarray as sa
    >>> results = []
    >>> report = sa.pipeline((np.full(3, k) for k in range(3)), lambda x: x + 1, lambda x: int(x.sum()), results.append)
    >>> results, report.frames
    ([3, 6, 9], 3)
    """
    if not stages:
        raise TypeError("pipeline(source) has no sink: give a function of one result as the last argument, or iterate over sa.stream(...).")
    *middle, sink = stages
    if not callable(sink):
        raise TypeError(f"pipeline(..., {sink!r}): the last argument is the sink, a function of one result, not a {type(sink).__name__}.")
    flow = _Flow("pipeline", source, middle, depth)
    name, busy_s, frames = f"sink, {_name(sink)}", 0.0, 0
    began = time.perf_counter()
    with flow:
        for result in flow.results():
            at = time.perf_counter()
            try:
                sink(result)
            except Exception as error:
                _note(error, f"in frame {frames} of {name!r}")
                raise
            del result
            busy_s += time.perf_counter() - at
            frames += 1
    times = (StageTime("source", "source", flow.source_s), *flow.times(), StageTime(name, "sink", busy_s))
    return PipelineReport(frames, time.perf_counter() - began, flow.pool.workers, flow.waited_s, times)


def stream(source: Iterable[Any], *stages: Any, depth: int | None = None) -> Iterator[Any]:
    """Return an iterator over what `pipeline` would give its sink: all of ``stages`` are stages.

    Begins with the first result that is asked for, and then runs ahead by ``depth`` frames. Leaving the loop ends it.

    >>> import shmarray as sa
    >>> for square in sa.stream(range(1000), lambda x: x * x):
    ...     if square > 50:
    ...         break
    >>> square
    64
    """
    return _iterate(_Flow("stream", source, stages, depth))


def _iterate(flow: _Flow) -> Iterator[Any]:
    with flow:
        yield from flow.results()


@dataclass(frozen=True, slots=True)
class _Failed:
    """In the place of a result."""

    error: BaseException


_END = object()  # in the place of the result after the last


# ------------------------------------------------------------------------------------------------------------ flow


class _Flow:
    """One run: its threads, and what they hand each other. A context: its end ends them all."""

    def __init__(self, what: str, source: Iterable[Any], stages: Sequence[Any], depth: int | None) -> None:
        for number, stage in enumerate(stages, 1):
            if not callable(stage):
                raise TypeError(
                    f"{what}: stage {number} of {len(stages)} is a {type(stage).__name__}, {stage!r}: give functions of one frame, "
                    f"sa.expression(f) or sa.ordered(f)."
                )
        given: Any = source
        if not isinstance(given, Iterable) and not hasattr(given, "__getitem__"):
            kind = type(source).__name__
            raise TypeError(f"{what}({source!r:.80}): the source is an iterable of frames, such as a list or a generator, not a {kind}.")
        if depth is not None and (not isinstance(depth, (int, np.integer)) or depth < 1):
            raise ValueError(f"{what}(depth={depth!r}): give the number of frames that may be on their way, at least 1.")
        self.line = user_line()
        self.pool = current_pool()
        self.depth = max(4, self.pool.workers + 2) if depth is None else int(depth)
        self.iterator = iter(source)
        self.ring = Ring(self.pool, self.line)
        self.group = RunGroup()
        self.signals = sum(isinstance(stage, ordered) for stage in stages)
        self.stages = self._make(stages)
        # Read by every thread. ``failed_at``: no frame after this one arrives; two that fail at once may leave either number.
        self.is_stopping = False
        self.failed_at = math.inf
        # Written by the source's thread alone.
        self.source_s = self.waited_s = 0.0
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._owner = 0  # the thread that runs it
        self._pullers: list[threading.Thread] = []  # one, when it has begun
        self._carriers: list[threading.Thread] = []

    def _make(self, stages: Sequence[Any]) -> list[Stage]:
        made: list[Stage] = []
        index = 0
        for number, stage in enumerate(stages):
            name = f"stage {number + 1} of {len(stages)}, {_name(stage)}"
            is_laid = number + 1 < len(stages) and not isinstance(stages[number + 1], ordered)
            if isinstance(stage, ordered):
                made.append(InOrder(self, stage.function, name, is_laid=is_laid, index=index, is_last=index == self.signals - 1))
                index += 1
            else:
                kind: type[Stage] = Lazy if isinstance(stage, expression) else Call
                made.append(kind(self, stage.function if isinstance(stage, expression) else stage, name, is_laid=is_laid))
        return made

    def times(self) -> list[StageTime]:
        return [StageTime(stage.name, stage.where, stage.busy_s) for stage in self.stages]

    def is_dropped(self, number: int) -> bool:
        """Whether a frame need not go on."""
        return self.is_stopping or number > self.failed_at

    # -- the calling thread

    def __enter__(self) -> _Flow:
        self._owner = threading.get_ident()
        try:
            for work, threads in [(self._pull, self._pullers), *[(self._carry, self._carriers)] * self.depth]:
                context = contextvars.copy_context()  # the pool, the settings and errstate of the caller
                thread = threading.Thread(target=context.run, args=(self._begin, work, is_inline()), name="shmarray-pipeline", daemon=True)
                threads.append(thread)
                start_thread(thread)
            for _ in range(self.depth):
                self._tokens.put(None)
        except BaseException:
            self._end(0.0)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        is_patient = kind is None or issubclass(kind, (Exception, GeneratorExit))
        self._end(GRACE_S if is_patient else 0.0)

    def results(self) -> Iterator[Any]:
        """Yield the results in order; raise what the first frame that failed did."""
        early: dict[int, Any] = {}
        number = 0
        while True:
            while number not in early:
                at, result = self._results.get()
                early[at] = result
            result = early.pop(number)
            if result is _END:
                return
            if isinstance(result, _Failed):
                try:
                    if isinstance(result.error, StopIteration):  # out of a generator it would come as another error, without its notes
                        wrong = RuntimeError(f"a function of the pipeline raised StopIteration: {result.error!r}")
                        for note in getattr(result.error, "__notes__", ()):
                            wrong.add_note(note)
                        raise wrong from result.error
                    raise result.error
                finally:
                    del result, early  # no circle with the traceback
            yield result
            del result
            number += 1
            self._tokens.put(None)

    def _end(self, grace_s: float) -> None:
        """Have every thread end; tasks that go on for longer than ``grace_s`` are killed. Buffers go when nobody can write them."""
        if sys.is_finalizing():
            return  # a stream that was left behind, when the program ends: these threads never run again
        self.is_stopping = True
        self._tokens.put(None)
        for _ in range(self.depth):
            self._frames.put(None)
        if threading.get_ident() != self._owner:
            # The garbage collector ends a stream that was left behind: it may be in one of these threads, or one they wait for.
            self.group.cancel()
            self.ring.clear()
            return
        self._join(self._carriers, grace_s)
        if any(thread.is_alive() for thread in self._carriers):
            self.group.cancel()
            self._join(self._carriers, GIVE_UP_AFTER_S)
        self._join(self._pullers, SOURCE_GRACE_S)
        self.ring.clear()

    @staticmethod
    def _join(threads: Iterable[threading.Thread], seconds: float) -> None:
        until = time.monotonic() + seconds
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join(max(0.0, until - time.monotonic()))

    # -- the other threads

    def _begin(self, work: Callable[[], None], is_within: bool) -> None:
        if is_within:  # a pipeline within a task
            set_inline()
        self.group.enter()
        work()

    def _fail(self, number: int, error: BaseException, note: str) -> None:
        self.failed_at = min(self.failed_at, number)
        if isinstance(error, MemoryBudgetError):
            held = f"up to {self.depth} frames are on their way: a smaller depth= needs less"
            _note(error, f"{held} ({format_bytes(self.pool.budget.limit_nbytes)} is the memory limit)")
        _note(error, note)
        _forget_locals(error)
        self._results.put((number, _Failed(error)))

    def _pull(self) -> None:
        """Be the source's thread."""
        number = 0
        previous: Frame | None = None
        iterator, self.iterator = self.iterator, iter(())
        try:
            while True:
                began = time.perf_counter()
                self._tokens.get()
                came = time.perf_counter()
                self.waited_s += came - began if number else 0.0
                if self.is_dropped(number):
                    return
                try:
                    value = next(iterator)
                except StopIteration:
                    self._results.put((number, _END))
                    return
                self.source_s += time.perf_counter() - came
                if self.is_dropped(number):
                    return
                slot = self.ring.laid(packed(map_leaves(value, settled)))
                del value
                frame = Frame(number, slot, previous if self.signals else None, self.signals)
                previous = frame
                del slot
                self._frames.put(frame)
                del frame
                number += 1
        except BaseException as error:
            self._fail(number, error, f"in frame {number} of the source, {type(iterator).__name__}")
        finally:
            if isinstance(iterator, types.GeneratorType):
                iterator.close()

    def _carry(self) -> None:
        """Be a carrier: take a frame through all stages, then the next. Frames are begun in order, so the oldest waits for none."""
        while (frame := self._frames.get()) is not None:
            stage: Stage | None = None
            try:
                for stage in self.stages:
                    if self.is_dropped(frame.number):
                        raise Dropped
                    stage.run(frame)
                self._results.put((frame.number, frame.to_value(self.ring)))
            except Dropped:
                pass
            except BaseException as error:
                self._fail(frame.number, error, f"in frame {frame.number} of {stage.name if stage else 'the source'!r}")
            finally:
                for signal in frame.passed:
                    signal.set()
                frame.slot = frame.value = frame.previous = None
            del frame, stage


def _name(function: Any) -> str:
    while not hasattr(function, "__name__"):
        inner = getattr(function, "function", None) or getattr(function, "func", None)  # marked, or functools.partial
        if inner is None:
            return type(function).__name__
        function = inner
    return str(function.__name__)


def _note(error: BaseException, note: str) -> None:
    with contextlib.suppress(Exception):  # a class that takes no notes
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


def _forget_locals(error: BaseException) -> None:
    """Drop the variables of our own functions from a traceback: whoever keeps the error must not keep the buffers."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").partition(".")[0] in ("shmarray", "scheduler"):
            with contextlib.suppress(RuntimeError):  # it is still running
                frame.clear()
