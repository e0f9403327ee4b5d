"""The arrows between files: who may import whom. Reads the imports; runs nothing.

A file may import files of its own package that stand below it in the table, and, from shmarray, the files of scheduler named as
doors. Imports for annotations alone (``if TYPE_CHECKING``) do not count.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first; files of one line know nothing of each other.
SCHEDULER = """
__init__ executors.__init__ errors faults limits hugepages
task spill
state segments extents results locks watch
redo ownership rendezvous
shared journal
collection
worker
running
pool
executors.synchronous executors.threads executors.processes
repeat
blocking
run
"""

SHMARRAY = """
errors dtypes region kernels.__init__ kernels.llvm.__init__ ops.__init__
config ops.table ops.reductions_table tiles kernels.llvm.target kernels.llvm.structure kernels.llvm.nest
chunks expr kernels.llvm.lanes kernels.llvm.objects
kernels.llvm.lowering
kernels.llvm.lower_arithmetic kernels.llvm.lower_choice kernels.llvm.lower_math
kernels.llvm.lower
kernels.llvm.folds kernels.llvm.writer kernels.llvm.steps
kernels.llvm.updates
kernels.llvm.module
storage kernels.program
handle travel
shared_memory
packing
publish
store
shared optimise kernels.numpy fuse
kernels.reduce kernels.scan kernels.sources kernels.parts kernels.accumulate kernels.calls hoist passes
kernels.llvm.kernel
kernels.llvm.engine
engines
plan
templates partial npy progress
compute watching
explain checkpoint stages
pipeline
ops.elementwise ops.random ops.gather
ops.shaping
ops.creation ops.reductions ops.blocks ops.lines ops.sampled
ops.linalg ops.accumulators ops.masked ops.padding ops.overlap iterate
array
__init__ doctor
__main__
"""

# What shmarray takes from scheduler: words of plans (task), the door (run), names of errors, bytes as text, and in the kernels
# memory that lies in another process, and what makes updates happen once.
DOORS = {
    "scheduler.task": {
        "compute",
        "doctor",
        "explain",
        "iterate",
        "partial",
        "plan",
        "progress",
        "shared_memory",
        "stages",
        "storage",
        "templates",
        "engines",
        "kernels.accumulate",
        "kernels.calls",
        "kernels.numpy",
        "kernels.parts",
        "kernels.reduce",
        "kernels.scan",
        "kernels.sources",
        "kernels.llvm.kernel",
    },
    "scheduler.blocking": {"iterate"},
    "scheduler.repeat": {"iterate", "plan"},
    "scheduler.redo": {"kernels.numpy", "kernels.llvm.kernel", "kernels.llvm.engine"},
    "scheduler.worker": {"doctor"},  # the life socket, to try it
    "scheduler.run": {
        "__init__",
        "compute",
        "doctor",
        "explain",
        "iterate",
        "plan",
        "progress",
        "stages",
        "storage",
        "templates",
        "watching",
    },
    "scheduler.running": {"pipeline", "stages"},  # to end several runs together
    "scheduler.errors": {"compute", "errors", "store"},
    "scheduler.executors": {"config"},  # their names
    "scheduler.limits": {
        "array",
        "chunks",
        "compute",
        "config",
        "doctor",
        "engines",
        "explain",
        "pipeline",
        "progress",
        "shared",
        "storage",
        "store",
        "watching",
    },
    "scheduler.segments": {
        "doctor",
        "kernels.accumulate",
        "kernels.numpy",
        "kernels.reduce",
        "kernels.scan",
        "kernels.sources",
        "kernels.llvm.kernel",
    },
    "scheduler.locks": {"shared_memory", "storage"},
    "scheduler.shared": {"packing", "publish", "shared", "shared_memory", "store"},
    "scheduler.collection": {"store"},
    "scheduler.journal": {"packing", "store"},
    "scheduler.rendezvous": {"store"},
    "scheduler.hugepages": {"doctor"},
    "scheduler.spill": {"doctor"},
    "scheduler.results": {"plan", "stages"},
}

# Imports inside functions, each with its reason in a comment beside it: (file, module).
LATE = {
    ("scheduler.task", "networkx"),
    ("shmarray.array", "networkx"),
    ("shmarray.doctor", "llvmlite"),
    ("shmarray.doctor", "shmarray.kernels.llvm.target"),
    ("shmarray.engines", "llvmlite"),
    ("shmarray.engines", "shmarray.kernels.llvm.engine"),
    ("shmarray.explain", "shmarray.kernels.llvm.engine"),
    ("shmarray.ops.linalg", "threadpoolctl"),
    ("shmarray.progress", "rich.console"),
    ("shmarray.progress", "rich.progress"),
    ("shmarray.progress", "rich.table"),
    ("shmarray.progress", "tqdm.auto"),
}


def files(package: str) -> list[str]:
    """Return the modules of a package, without its name: ``ops.shaping``."""
    return sorted(".".join(path.relative_to(ROOT / package).with_suffix("").parts) for path in (ROOT / package).rglob("*.py"))


def imports(package: str, file: str) -> Iterator[tuple[str, str, bool]]:
    """Yield (module, source line, whether within a function) of what a file imports at run time."""
    path = ROOT / package / Path(*file.split(".")).with_suffix(".py")
    text = path.read_text()
    lines = text.splitlines()

    def walk(node: ast.AST, late: bool) -> Iterator[tuple[str, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for branch in child.orelse:
                    yield from walk(branch, late)
            elif isinstance(child, ast.If) and "__main__" in ast.unparse(child.test):
                continue  # a file run as a script imports itself by name
            elif isinstance(child, ast.Import):
                for name in child.names:
                    yield name.name, lines[child.lineno - 1], late
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: a relative import"
                assert child.module is not None
                for name in child.names:
                    inner = f"{child.module}.{name.name}"
                    yield (inner if exists(inner) else child.module), lines[child.lineno - 1], late
            else:
                yield from walk(child, late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    return walk(ast.parse(text), False)


def exists(module: str) -> bool:
    path = ROOT / Path(*module.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def own(package: str, module: str) -> str | None:
    """Return a module of ``package`` without its name; None when it is of another."""
    if module != package and not module.startswith(package + "."):
        return None
    rest = module.removeprefix(package).lstrip(".")
    path = ROOT / package / Path(*rest.split(".")) if rest else ROOT / package
    return ".".join(filter(None, [rest, "__init__"])) if path.is_dir() else rest


def ranks(table: str) -> dict[str, int]:
    return {name: rank for rank, line in enumerate(table.split("\n")) for name in line.split()}


TABLES = {"scheduler": ranks(SCHEDULER), "shmarray": ranks(SHMARRAY)}
MODULES = [(package, file) for package in TABLES for file in files(package)]


@pytest.mark.parametrize("package", TABLES)
def test_the_table_names_every_file_and_no_other(package: str) -> None:
    assert sorted(TABLES[package]) == files(package)


@pytest.mark.parametrize("package, file", MODULES, ids=lambda v: v)
def test_a_file_knows_only_files_below_it(package: str, file: str) -> None:
    table = TABLES[package]

    for module, _, _ in imports(package, file):
        below = own(package, module)
        if below is not None and (f"{package}.{file}", module) not in LATE:
            if below in ("__init__", "ops.__init__", "kernels.__init__", "kernels.llvm.__init__", "executors.__init__"):
                continue  # the folder itself, which imports nothing that its own files do not
            assert table[below] < table[file], f"{package}.{file} imports {module}, which stands beside or above it"


@pytest.mark.parametrize("package", TABLES)
def test_no_imports_go_in_circles(package: str) -> None:
    graph = {file: {b for m, _, _ in imports(package, file) if (b := own(package, m)) and "__init__" not in b} for file in files(package)}

    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(graph)


@pytest.mark.parametrize("file", files("scheduler"))
def test_the_scheduler_knows_nothing_of_arrays(file: str) -> None:
    assert not [module for module, _, _ in imports("scheduler", file) if module.partition(".")[0] == "shmarray"]


def test_arrays_use_the_scheduler_through_its_doors_alone() -> None:
    found: dict[str, set[str]] = {}
    for file in files("shmarray"):
        for module, _, _ in imports("shmarray", file):
            if module.partition(".")[0] == "scheduler":
                found.setdefault(module, set()).add(file)

    assert found == DOORS


def test_the_deciding_part_of_the_scheduler_touches_no_process_clock_or_memory() -> None:
    acting = {"os", "time", "threading", "multiprocessing", "subprocess", "socket", "mmap", "numpy", "signal", "ctypes", "asyncio"}

    for file in ("state", "task", "errors"):
        assert not acting & {module.partition(".")[0] for module, _, _ in imports("scheduler", file)}, file


@pytest.mark.parametrize("package, file", MODULES, ids=lambda v: v)
def test_imports_stand_at_the_top_but_for_those_with_a_reason(package: str, file: str) -> None:
    for module, line, late in imports(package, file):
        if late:
            assert (f"{package}.{file}", module) in LATE, f"{package}.{file} imports {module} inside a function"
            assert "#" in line, f"{package}.{file}: say why {module} is imported late: {line.strip()}"


def test_late_imports_that_are_allowed_are_there() -> None:
    assert {(f"{p}.{f}", m) for p, f in MODULES for m, _, late in imports(p, f) if late} == LATE
