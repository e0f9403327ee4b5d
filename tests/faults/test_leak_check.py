"""The check around every test of this folder, and that at the end of scripts: what is left behind, here on purpose, is told by name."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from conftest import Script, arena_nbytes, held

import shmarray as sa

NBYTES = 1 << 20


@contextlib.contextmanager
def a_descriptor() -> Iterator[None]:
    fd = os.memfd_create("leaked")
    yield
    os.close(fd)


@contextlib.contextmanager
def a_mapping() -> Iterator[None]:
    with mmap.mmap(-1, NBYTES) as mapped:  # shared memory without a descriptor
        mapped[:] = b"x" * NBYTES
        yield


@contextlib.contextmanager
def a_process() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE):
        yield


@contextlib.contextmanager
def a_thread() -> Iterator[None]:
    may_end = threading.Event()
    thread = threading.Thread(target=may_end.wait, name="leaked-1")
    thread.start()
    yield
    may_end.set()
    thread.join()


LEAKS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "descriptor of /memfd:leaked (deleted)": a_descriptor,
    "mapping of /dev/zero (deleted)": a_mapping,
    "process": a_process,
    "thread leaked": a_thread,
}


@pytest.mark.parametrize("name", LEAKS)
def test_what_a_test_leaves_behind_is_told_by_name(name: str) -> None:
    before = held()
    with LEAKS[name]():
        assert any(found.startswith(name) for found in held() - before)
    assert not held() - before


def test_an_array_that_is_left_in_a_pool_is_told_in_bytes_and_then_keeps_the_memory_mapped() -> None:
    before, nbytes = held(), arena_nbytes()
    with sa.Pool(workers=1, memory_limit="64MiB"):
        x = sa.array(np.ones(NBYTES // 8))
        assert sum(arena_nbytes().values()) - sum(nbytes.values()) == NBYTES
    assert any(re.match(r"mapping of /(memfd:shmarray|shmarray\.\d+) ", what) for what in held() - before)
    del x
    assert not held() - before


def test_a_name_in_shared_memory_is_seen(shm_entries: Callable[[], set[str]]) -> None:
    before = shm_entries()
    path = f"/dev/shm/shmarray-leaked-{os.getpid()}"
    open(path, "w").close()
    try:
        assert shm_entries() - before == {os.path.basename(path)}
    finally:
        os.unlink(path)


IN_A_SCRIPT = {
    "leaked = os.memfd_create('leaked'); check_nothing_left()": "memfd:leaked",
    "import mmap; leaked = mmap.mmap(-1, 4096); check_nothing_left()": "mapping of /dev/zero",
    "leaked = sa.array(np.ones(9)); check_nothing_left()": "shmarray",
    "import tempfile; tempfile.mkstemp()": "temporary files were left",
    "os.posix_spawn(sys.executable, [sys.executable, '-c', 'import select; select.select([], [], [], 60)'], os.environ)": "the end of",
}


@pytest.mark.parametrize("body", IN_A_SCRIPT)
def test_what_a_script_leaves_behind_fails_it(start: Callable[..., Script], body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conftest.SETTLE_S", 0.1)
    running = start(body)
    try:
        told = running.end().stderr
    except AssertionError as error:
        told = str(error)
    assert IN_A_SCRIPT[body] in told
