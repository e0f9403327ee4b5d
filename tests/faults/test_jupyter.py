"""A notebook's kernel: interrupted in a compute, a cell run again, restarted; driven through its own protocol."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, wait_until

jupyter_client = pytest.importorskip("jupyter_client", reason="jupyter_client is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

START = """
import os, time
import numpy as np
import shmarray as sa
from shmarray.compute import current_pool
sa.config.set(workers=2)
x = sa.array(np.ones(500_000))
def slow(block):
    open("begun", "w").close()
    time.sleep(600)
    return block
def pids():
    return list(current_pool().statistics().pids)
(x + 1).sum().compute(scheduler="processes")
"""


class Notebook:
    """A kernel and its client."""

    def __init__(self, directory: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": ROOT, "IPYTHONDIR": str(directory / "ipython"), "JUPYTER_RUNTIME_DIR": str(directory)}
        self.manager, self.client = jupyter_client.manager.start_new_kernel(
            kernel_name="python3", cwd=str(directory), env=environment, startup_timeout=90
        )

    def run(self, cell: str, *, wait: bool = True) -> str:
        """Run a cell; return what it showed, errors and stderr included."""
        shown: list[str] = []
        self.message = self.client.execute(cell)
        return self.reply(shown) if wait else ""

    def reply(self, shown: list[str] | None = None) -> str:
        """Return what the cell that is running shows until it is done."""
        shown = [] if shown is None else shown
        until = time.monotonic() + 90
        while True:
            message = self.client.get_iopub_msg(timeout=max(0.1, until - time.monotonic()))
            if message["parent_header"].get("msg_id") != self.message:
                continue
            content: dict[str, Any] = message["content"]
            match message["msg_type"]:
                case "stream":
                    shown.append(content["text"])
                case "execute_result":
                    shown.append(content["data"]["text/plain"])
                case "error":
                    shown.append(content["ename"])
                case "status" if content["execution_state"] == "idle":
                    return "".join(shown).strip()

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()
        self.manager.context.destroy()


@pytest.fixture(autouse=True)
def nothing_is_left() -> None:
    """In place of the folder's: the client keeps sockets of its own, and what is tested runs in the kernel's process."""


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Notebook]:
    made = Notebook(tmp_path)
    yield made
    made.close()


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_kernel_is_interrupted_used_again_and_restarted(notebook: Notebook, tmp_path: Path) -> None:
    assert "1000000.0" in notebook.run(START)

    notebook.run("x.map_blocks(slow, dtype=float).compute()", wait=False)
    wait_until(lambda: (tmp_path / "begun").exists(), "the first task", 60)
    interrupted = time.monotonic()
    notebook.manager.interrupt_kernel()
    assert notebook.reply() == "KeyboardInterrupt"
    print(f"interrupted after {time.monotonic() - interrupted:.2f} s")
    assert notebook.run("float((x + 1).sum().compute(scheduler='processes'))") == "1000000.0"

    # A cell that makes functions, arrays and pools runs again: the newest count, and what was before goes.
    cell = """
def f(block):
    return block + {k}
pool = sa.Pool(workers=1)
with pool:
    pool_result = float(x.map_blocks(f, dtype=float).sum().compute())
pool_result
"""
    for k in (1, 2):
        assert notebook.run(cell.format(k=k)) == f"{(1 + k) * 500_000.0}"

    # However many there were: what is there now must go.
    pids = [int(p) for p in notebook.run("pids()").strip("[]").split(",")]
    assert len(pids) == 2
    notebook.manager.restart_kernel(now=True)
    notebook.client.wait_for_ready(timeout=90)
    wait_until(lambda: all(map(is_gone, pids)), f"the end of {pids}")
    assert "1000000.0" in notebook.run(START)
