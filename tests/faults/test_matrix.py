"""Whatever goes wrong with a user's function, and wherever: an error that says so, never a hang, and the pool works on.

    {error, exit, crash}  x  {pickle task, unpickle task, run, convert the result, pickle error, unpickle error}

and errors that cannot be carried as they are. After the cross product in CPython's test_concurrent_futures.test_deadlock.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import numpy as np
import pytest

import shmarray as sa
from scheduler import worker

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [pytest.mark.timeout(60), pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="worker processes need Linux")]


@pytest.fixture(scope="module")
def pool() -> Iterator[sa.Pool]:
    with sa.Pool(workers=2, memory_limit="64MiB") as made:
        yield made
        made.check()


def error() -> Any:
    raise ZeroDivisionError("as planned")


def leave() -> Any:
    raise SystemExit(3)


def crash() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def vanish() -> Any:
    os._exit(0)


HOWS: dict[str, Callable[[], Any]] = {"error": error, "exit": leave, "crash": crash, "exit 0": vanish}
ENDS = {"crash": "killed by SIGKILL", "exit 0": "exit code 0"}


def in_a_worker(how: str) -> Any:
    """Do it, but only where it may: a crash here would be the user's own."""
    return HOWS[how]() if worker.IN_WORKER else None


class PicklesBadly:
    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        HOWS[self.how]()
        return str, ()


class LoadsBadly:
    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return in_a_worker, (self.how,)


class Converts:
    def __init__(self, how: str) -> None:
        self.how = how

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        HOWS[self.how]()
        raise AssertionError


class BadToPickle(Exception):
    def __reduce__(self) -> Any:
        return HOWS[self.args[0]]()


class BadToLoad(Exception):
    def __reduce__(self) -> Any:
        return in_a_worker, (self.args[0],)


class BadToLoadInTheDriver(Exception):
    def __reduce__(self) -> Any:
        return load_but_not_in_the_driver, (self.args[0],)


def load_but_not_in_the_driver(how: str) -> Any:
    return BadToLoadInTheDriver(how) if worker.IN_WORKER else HOWS[how]()


def compute(function: Callable[[np.ndarray], Any]) -> np.ndarray:
    result: np.ndarray = sa.ones(8, chunks=2).map_blocks(function, dtype=float).compute(scheduler="processes")
    return result


def assert_usable(pool: sa.Pool) -> None:
    np.testing.assert_array_equal(compute(lambda b: b * 2), np.full(8, 2.0))
    pool.check()


def told(caught: pytest.ExceptionInfo[BaseException]) -> str:
    return str(caught.value) + "\n".join(getattr(caught.value, "__notes__", ()))


def assert_told(caught: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    """The error says this, and where it is from: chunk and line."""
    for part in (*parts, "chunk (", __file__):
        assert part in told(caught)


@pytest.mark.parametrize("how", ["error", "exit"])
def test_while_the_task_is_pickled(pool: sa.Pool, how: str) -> None:
    """In the driver, by the user's own thread: it is the user's error, or exit."""
    bad = PicklesBadly(how)
    with pytest.raises((ZeroDivisionError, SystemExit)) as caught:
        compute(lambda b: (bad, b)[1])
    assert caught.type is {"error": ZeroDivisionError, "exit": SystemExit}[how]
    assert_usable(pool)


# An exit of the process with code 0 is a death like others but for its name: it is told once.
@pytest.mark.parametrize(
    ("where", "how"), [*itertools.product(("unpickle task", "run", "convert the result"), ("error", "exit", "crash")), ("run", "exit 0")]
)
def test_while_the_task_runs(pool: sa.Pool, where: str, how: str) -> None:
    bad = LoadsBadly(how)

    def run(b: np.ndarray) -> Any:
        return in_a_worker(how)

    def convert(b: np.ndarray) -> Any:
        return Converts(how)

    def load(b: np.ndarray) -> Any:
        return (bad, b)[1]

    with pytest.raises((ZeroDivisionError, sa.TaskError, sa.WorkerDied)) as caught:
        compute({"unpickle task": load, "run": run, "convert the result": convert}[where])
    if how == "error":
        assert caught.type is ZeroDivisionError
        assert_told(caught, "as planned")
    elif how == "exit":
        assert caught.type is sa.TaskError
        assert_told(caught, "SystemExit(3)", "cannot travel")
    else:
        assert caught.type is sa.WorkerDied
        assert_told(caught, ENDS[how])
        assert str(caught.value).count(f": {ENDS[how]}") == 3
    assert_usable(pool)


@pytest.mark.parametrize("how", ["error", "exit", "crash"])
@pytest.mark.parametrize("kind", [BadToPickle, BadToLoad])
def test_while_an_error_travels(pool: sa.Pool, kind: type[Exception], how: str) -> None:
    def fail(b: np.ndarray) -> Any:
        raise kind(how)

    with pytest.raises((sa.TaskError, sa.WorkerDied)) as caught:
        compute(fail)
    if how in ENDS:
        assert caught.type is sa.WorkerDied
        assert_told(caught, ENDS[how])
    else:
        assert caught.type is sa.TaskError
        assert_told(caught, f"{kind.__name__}('{how}')", "cannot travel", "in fail")
    assert_usable(pool)


@pytest.mark.parametrize("how", ["error", "exit"])
def test_while_an_error_arrives(pool: sa.Pool, how: str) -> None:
    def fail(b: np.ndarray) -> Any:
        raise BadToLoadInTheDriver(how)

    with pytest.raises(sa.TaskError) as caught:
        compute(fail)
    assert_told(caught, f"BadToLoadInTheDriver('{how}')", "cannot travel", "in fail")
    assert_usable(pool)


# ----------------------------------------------------------------------------------- errors that are hard to carry


class TwoArguments(Exception):
    def __init__(self, one: object, two: object) -> None:
        super().__init__(f"{one} and {two}")


class KeywordOnly(ValueError):
    def __init__(self, *, code: int) -> None:
        super().__init__(code)


class Payload(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()  # what cannot be pickled


class BadRepr(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__


class BadReprThatExits(Exception):
    def __repr__(self) -> str:
        raise SystemExit

    __str__ = __repr__

    def __reduce__(self) -> Any:
        raise TypeError


class TextThatLies(str):
    def __format__(self, spec: str) -> str:
        raise RuntimeError

    __str__ = __repr__ = __format__  # type: ignore[assignment]


class StrangeRepr(Exception):
    def __repr__(self) -> str:
        return TextThatLies("strange")

    def __reduce__(self) -> Any:
        raise TypeError


class NoAttributes(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise RuntimeError(f"no {name}")


class NotesOfItsOwn(Exception):
    __notes__ = 5


class ClaimsAnother(Exception):
    def __reduce__(self) -> Any:
        return ValueError, ("another",)


def recursion() -> Any:
    return recursion()


def cycle() -> Any:
    one, two = ValueError("one"), KeyError("two")
    one.__cause__, two.__cause__ = two, one
    raise one


def chain() -> Any:
    last: Exception = ValueError("first")
    for number in range(20_000):
        link = ValueError(f"link {number}")
        link.__cause__ = last
        last = link
    raise last


def deep_group() -> Any:
    inner: Exception = ValueError("innermost")
    for _ in range(5_000):
        inner = ExceptionGroup("group", [inner])
    raise inner


def self_reference() -> Any:
    mine = ValueError("mine")
    mine.args = ("mine", mine)
    raise mine


def raising(make: Callable[[], BaseException]) -> Callable[[], Any]:
    def do() -> Any:
        raise make()

    return do


HUGE = 12_000_000
HARD: dict[str, tuple[Callable[[], Any], type[BaseException], str]] = {
    "two arguments": (raising(lambda: TwoArguments(1, 2)), sa.TaskError, "1 and 2"),
    "keywords only": (raising(lambda: KeywordOnly(code=4)), sa.TaskError, "KeywordOnly(4)"),
    "payload": (raising(lambda: Payload("a lock")), sa.TaskError, "a lock"),
    "lambda": (raising(lambda: ValueError(lambda: 1)), ValueError, "lambda"),
    "huge": (raising(lambda: ValueError("x" * HUGE + "end")), ValueError, "x" * HUGE + "end"),
    "too huge": (raising(lambda: ValueError("x" * (65 << 20) + "end")), sa.TaskError, "characters left out"),
    "huge payload": (raising(lambda: ValueError(np.zeros(HUGE // 8))), ValueError, "0."),
    "lone surrogate": (raising(lambda: ValueError("\ud800")), ValueError, "\ud800"),
    "group": (raising(lambda: ExceptionGroup("several", [ValueError(1), KeyError("k")])), ExceptionGroup, "several"),
    "base group": (raising(lambda: BaseExceptionGroup("b", [KeyboardInterrupt(), ValueError(1)])), sa.TaskError, "KeyboardInterrupt"),
    "deep group": (deep_group, (ExceptionGroup, sa.TaskError), ""),  # type: ignore[dict-item]
    "keyboard interrupt": (raising(KeyboardInterrupt), sa.TaskError, "KeyboardInterrupt"),
    "generator exit": (raising(GeneratorExit), sa.TaskError, "GeneratorExit"),
    "base exception": (raising(lambda: BaseException("base")), sa.TaskError, "base"),
    "stop iteration": (raising(lambda: StopIteration(4)), StopIteration, "4"),
    "memory": (raising(lambda: MemoryError("none")), MemoryError, "none"),
    "recursion": (recursion, RecursionError, "recursion"),
    "cycle of causes": (cycle, ValueError, "one"),
    "chain of causes": (chain, ValueError, "link 19999"),
    "itself among its arguments": (self_reference, (ValueError, sa.TaskError), "mine"),  # type: ignore[dict-item]
    "repr that fails": (raising(lambda: BadRepr("b")), BadRepr, ""),
    "repr that exits": (raising(lambda: BadReprThatExits("b")), sa.TaskError, "BadReprThatExits"),
    "repr of a strange type": (raising(lambda: StrangeRepr("s")), sa.TaskError, "strange"),
    "no attributes": (raising(lambda: NoAttributes("n")), NoAttributes, "n"),
    "notes of its own": (raising(lambda: NotesOfItsOwn("n")), NotesOfItsOwn, "n"),
    "claims another type": (raising(lambda: ClaimsAnother("c")), sa.TaskError, "ClaimsAnother('c')"),
}


@pytest.mark.parametrize("executor", ["processes", "threads", "synchronous"])
@pytest.mark.parametrize("case", HARD)
def test_an_error_arrives_in_some_form(pool: sa.Pool, case: str, executor: str) -> None:
    do, kind, text = HARD[case]
    started = pool.statistics().starts
    with pytest.raises(BaseException) as caught:
        sa.ones(8, chunks=2).map_blocks(lambda b: do(), dtype=float).compute(scheduler=executor)
    if executor == "processes":
        assert isinstance(caught.value, kind)
        if case != "repr that fails":
            assert text in str(caught.value)
    elif (case, executor) == ("keyboard interrupt", "synchronous"):  # in this very thread it is the user's own
        assert caught.type is KeyboardInterrupt
    else:
        assert isinstance(caught.value, Exception)  # here it need not travel: its own, or a TaskError where that would end a thread
    if case not in ("no attributes", "notes of its own") and caught.type is not KeyboardInterrupt:
        notes = "\n".join(caught.value.__notes__)
        assert "chunk (" in notes and __file__ in notes
        assert len(notes) < 1_000_000
    assert_usable(pool)
    if started:
        assert pool.statistics().starts == started, "an error cost a worker"
