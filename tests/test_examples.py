"""The examples, each run as a newcomer runs it: a script in a process of its own, here on small data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
CASES = {  # file -> (arguments, the packages it needs, what it must print)
    "quickstart.py": ((), (), "451.0"),
    "land_mask.py": (("--small",), ("global_land_mask", "matplotlib"), "every number agrees with NumPy"),
    "shared_simulation.py": (("--small",), (), "have the same bits"),
    "shared_data_processing.py": (("--small",), (), "every mean agrees with NumPy"),
    "shared_minibatches.py": (("--small",), ("sklearn",), "learns the same weights, to the bit"),
    "shared_search.py": (("--small",), (), "dynamic programming finds the same value"),
    "galaxies.py": ((), ("skimage", "matplotlib"), "scikit-image finds the same"),
    "image_pipeline.py": ((), ("skimage",), "one frame after the other"),
    "heat_equation.py": (("--small",), (), "the largest difference from the solution of the difference equations"),
    "gray_scott.py": (("--small",), (), "the first 100 steps agree with NumPy"),
    "wave.py": (("--small",), (), "the largest difference from the solution by Fourier transforms"),
    "lattice_boltzmann.py": (("--small",), (), "and stays so to"),
    "ensemble.py": (("--small",), (), "agree with NumPy"),
    "pi.py": (("--small",), (), "standard errors from pi"),
    "ising.py": (("--small",), (), "exact"),
    "particles.py": (("--small",), (), "those of NumPy"),
    "plasma.py": (("--small",), (), "forces at the end: those of NumPy"),
    "option_pricing.py": (("--small",), (), "formula"),
    "live_monitor.py": (("--small",), (), "of the exact ones"),
}
MARK = "SHMARRAY_TEST_RUN"  # an environment variable that all descendants of a run inherit


def leftovers(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue  # not ours, or gone
    return found


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_example_runs_in_silence_and_leaves_no_process(name: str, tmp_path: Path) -> None:
    arguments, packages, expected = CASES[name]
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}: pip install 'shmarray[demo]'")
    mark = f"{os.getpid()}-{name}"

    done = subprocess.run(
        [sys.executable, shutil.copy(EXAMPLES / name, tmp_path), *arguments],  # a copy, for it writes its picture beside itself
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, MARK: mark},
    )

    assert done.stderr == ""
    assert done.returncode == 0
    assert expected in done.stdout
    psutil.wait_procs([psutil.Process(pid) for pid in leftovers(mark) if psutil.pid_exists(pid)], timeout=5)
    assert leftovers(mark) == []


@pytest.mark.parametrize("name", CASES)
def test_example_has_no_main_guard(name: str) -> None:
    assert "if __name__" not in (EXAMPLES / name).read_text()
