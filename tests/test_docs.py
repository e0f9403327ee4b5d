"""The pages of the documentation say what is true: their examples run, their links lead somewhere."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shmarray

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))


def test_the_examples_of_the_guide_run() -> None:
    result = doctest.testfile(str(ROOT / "docs" / "guide.md"), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted >= 20
    assert result.failed == 0


@pytest.mark.parametrize("page", GUIDES, ids=lambda p: p.name)
def test_the_examples_of_a_guide_run(page: Path) -> None:
    result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted >= 5
    assert result.failed == 0


def scripts(page: Path) -> list[str]:
    """Return the blocks of a page that are whole programs; the others are for doctest."""
    return [text for text in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S) if ">>>" not in text]


@pytest.mark.parametrize("page", [page for page in GUIDES if scripts(page)], ids=lambda p: p.name)
def test_the_programs_of_a_guide_print_what_it_says(page: Path, tmp_path: Path) -> None:
    for i, text in enumerate(scripts(page)):
        (tmp_path / f"program{i}.py").write_text(text)
        done = subprocess.run(
            [sys.executable, tmp_path / f"program{i}.py"],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert (done.returncode, done.stderr) == (0, ""), text
        assert done.stdout.splitlines() == re.findall(r"^ *print\(.*\)  # (.*)$", text, re.M) != [], text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_error_of_the_guide_can_be_caught() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "guide.md").read_text(), re.M)
    assert len(rows) >= 9
    assert not set(rows) - set(shmarray.__all__)


def test_every_file_the_architecture_names_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for name in re.findall(r"`((?:shmarray|scheduler|tests)/[\w/]+\.py)`", text):
        assert (ROOT / name).exists(), name


def test_every_test_that_reliability_names_exists() -> None:
    file = Path()
    named = re.findall(r"`((?:faults|scheduler|shmarray)/test_\w+\.py)?(?:::(\w+))?`", (ROOT / "docs" / "reliability.md").read_text())
    found = 0
    for path, test in named:
        if not path and not test:
            continue
        file = ROOT / "tests" / path if path else file
        assert file.exists(), file
        assert not test or f"def {test}(" in file.read_text(), f"{file.name} has no {test}"
        found += 1
    assert found >= 25
