"""What all tests share: the executors, internal grids cut small, a thread, a terminal, and one way to compare with NumPy.

Fixtures that tests under hypothesis use are of session scope and give a function or a context manager.
Never put here: tests, sleeps, anything that starts a process before a test asks for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import pty
import signal
import struct
import tempfile
import termios
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import shmarray as sa
from scheduler.shared import ROOT as FAMILY
from shmarray import passes, plan, templates, tiles
from shmarray.ops import linalg

EXECUTORS = ("synchronous", "threads", "processes")
GRIDS = {  # constant -> a value so small that arrays of a few hundred items are cut in every way
    "BLOCK_ITEMS": 8,
    "TILE_ITEMS": 32,
    "REDUCTION_TILE_ITEMS": 16,
    "MOST_PARTIAL_ITEMS": 256,
    "ENOUGH_TASKS": 4,
    "NARROWEST_ITEMS": 2,
}
PRODUCTS = {"EDGE_ITEMS": 4, "SPLIT_ITEMS": 8}
LONG_S = 90.0


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled kernels out of the user's cache: here, and in the scripts that tests start. Let Ctrl-C come, which tests send."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by a shell, for what it runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    directory = tempfile.TemporaryDirectory(prefix="shmarray-tests-")
    config.add_cleanup(directory.cleanup)
    os.environ["SHMARRAY_CACHE_DIRECTORY"] = directory.name
    sa.config.set(cache_directory=directory.name)


def pytest_collection_finish() -> None:
    """Spare the collector what stays anyhow, modules and collected tests: a test that asks for a collection waits for its own objects."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Let go of the shared memory that children find in the environment: processes that run tests side by side are no family."""
    os.environ.pop(FAMILY, None)


@pytest.fixture(autouse=True)
def fresh_plans() -> None:
    """Begin without templates: a test may have changed what planning looks at."""
    templates.forget()


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with each executor; the default pool stays warm from test to test."""
    with sa.config.set(scheduler=request.param):
        yield request.param


@pytest.fixture(scope="module")
def pool() -> Iterator[sa.Pool]:
    """Compute in a pool of the module's own; at its end nothing of it may be held."""
    with sa.Pool(workers=2, memory_limit="256MiB") as made:
        yield made
        gc.collect()
        made.check()


@contextlib.contextmanager
def _small_grids(**sizes: int) -> Iterator[None]:
    values = {**GRIDS, **PRODUCTS, **sizes}
    templates.forget()
    with pytest.MonkeyPatch.context() as patch:
        for module in (tiles, passes, plan, linalg):
            for name, value in values.items():
                if hasattr(module, name):
                    patch.setattr(module, name, value)
        patch.setattr(tiles.block_sizes, "__defaults__", (values["BLOCK_ITEMS"],))
        yield
    templates.forget()


@pytest.fixture(scope="session")
def small_grids() -> Callable[..., contextlib.AbstractContextManager[None]]:
    """A context in which this process cuts tiny arrays into many tiles and blocks. For executors that stay in this process."""
    return _small_grids


def _assert_same(found: Any, expected: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    if isinstance(expected, tuple):
        assert isinstance(found, tuple) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _assert_same(one, other, rtol, atol)
        return
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if expected.dtype.kind in "fc" and (rtol or atol):
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, equal_nan=True)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """``assert_same(found, expected, rtol=0, atol=0)``: dtype, shape and values agree; tuples element by element."""
    return _assert_same


def _outcome(call: Callable[[], Any]) -> tuple[Any, type[BaseException] | None, set[tuple[str, str]]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = call()
            value = tuple(np.asarray(v) for v in value) if isinstance(value, tuple) else np.asarray(value)
        except Exception as error:
            return None, type(error), set()
    return value, None, {(w.category.__name__, str(w.message)) for w in caught}


@pytest.fixture(scope="session")
def outcome() -> Callable[[Callable[[], Any]], tuple[Any, type[BaseException] | None, set[tuple[str, str]]]]:
    """``outcome(call)`` gives (values as NumPy arrays, type of the error, warnings as (category, message))."""
    return _outcome


def _in_thread(act: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(act()))
    thread.start()
    thread.join(LONG_S)
    return results[0]


@pytest.fixture(scope="session")
def in_thread() -> Callable[[Callable[[], Any]], Any]:
    """``in_thread(act)`` gives what ``act()`` gave in another thread."""
    return _in_thread


def _shm_entries() -> set[str]:
    with contextlib.suppress(OSError):
        return {name for name in os.listdir("/dev/shm") if "shmarray" in name}  # other programs, and other tests, come and go there
    return set()


@pytest.fixture(scope="session")
def shm_entries() -> Callable[[], set[str]]:
    """``shm_entries()`` gives what is in /dev/shm and has our name."""
    return _shm_entries


class Terminal:
    """A pseudo-terminal of 100 columns: ``out`` is its file, ``text`` what was written so far."""

    def __init__(self) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        os.set_blocking(self.master, False)
        self.out = os.fdopen(slave, "w")
        self.data = b""

    @property
    def text(self) -> str:
        with contextlib.suppress(OSError):  # nothing more, or nobody at the other end
            while more := os.read(self.master, 1 << 16):
                self.data += more
        return self.data.decode(errors="replace")  # the last character may be half here

    def hang_up(self) -> None:
        """Have nobody at the other end."""
        os.close(self.master)
        self.master = -1

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is still to be written, and nobody there
            self.out.close()
        if self.master >= 0:
            self.hang_up()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """A `Terminal` that a test draws in."""
    made = Terminal()
    yield made
    made.close()
