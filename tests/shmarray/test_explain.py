"""What `explain` says: the plan, its traffic, its reasons; and that nothing runs for it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import shmarray as sa
from scheduler.results import ResultMemory


@pytest.fixture(autouse=True)
def in_numpy() -> Iterator[None]:
    with sa.config.set(engine="numpy"):
        yield


@pytest.fixture
def big() -> Any:
    """An array of many tiles that no test ever computes."""
    return sa.array(np.ones((1, 1))) + sa.ones((4000, 1000))


class Source:
    shape, dtype, ndim = (1000, 500), np.dtype(float), 2

    def __getitem__(self, key: Any) -> Any:
        raise AssertionError("explain read a source")


def lines(text: object, label: str) -> list[str]:
    """Return what stands behind a label, continued lines joined."""
    joined = re.sub(r"\n {10}(?=\S)", " ", str(text))
    return re.findall(rf"^ *{label}  +(.*)$", joined, re.MULTILINE)


def test_it_shows_itself() -> None:
    told = sa.ones(3).explain()

    assert str(told) == repr(told) == told.text
    assert told.text.startswith("result  (3,) float64, 1 chunk\n")


def test_nothing_runs_and_no_result_gets_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("explain asked for memory, or ran")

    with sa.Pool(workers=2, memory_limit="16MiB") as pool:
        x = sa.ones((1 << 20, 1 << 10)).map_blocks(refuse, dtype=float) + 1  # 8 GiB
        monkeypatch.setattr(ResultMemory, "empty", refuse)
        monkeypatch.setattr(sa.Pool, "run", refuse)
        told = sa.explain(x, x.T, sa.from_array(Source()))

        assert "8 GiB of temporaries" in str(told)
        assert pool.statistics().starts == 0
        assert pool.statistics().peak_nbytes == 0


def test_what_is_stored_or_empty_has_nothing_to_run() -> None:
    stored = sa.array(np.zeros((2, 3)))

    assert str(stored.explain()) == "result  (2, 3) float64, 1 chunk: is stored, nothing to run"
    assert str((sa.zeros((0, 3)) + 1).explain()) == "result  (0, 3) float64, 1 chunk: is empty, nothing to run"
    assert str(sa.explain(stored, 3)).endswith("result 2  int: is no array, comes back as it is")
    assert str(sa.explain()) == ""


def test_results_keep_their_numbers_beside_stored_ones() -> None:
    stored = sa.array(np.zeros((2, 3)))

    told = sa.explain(stored, stored + 1)

    assert lines(told, "moves") == ["reads 48 B (1 stored array), writes 48 B (result 2)"]


def test_an_array_without_axes() -> None:
    told = (sa.asarray(np.arange(3.0)).sum() + 1).explain()

    assert str(told).startswith("result  () float64, 1 chunk\n")
    assert "1 task over ()" in str(told)


def test_the_numbers_are_those_of_the_plan(big: Any) -> None:
    x = ((big - big.mean(axis=0)) ** 2).sum()
    plan = x.plan()

    told = str(x.explain())

    assert f"{len(plan.layers)} layers, {sum(layer.ntasks for layer in plan.layers)} tasks, engine 'numpy'" in told
    for number, layer in enumerate(plan.layers, 1):
        assert re.search(rf"^{number}  {re.escape(layer.name)}  .*test_explain.py:\d+$", told, re.MULTILINE)
    assert max(map(len, told.splitlines())) <= 100


def test_a_broadcast_operand_counts_once() -> None:
    a, row = sa.array(np.ones((100, 50))), sa.array(np.ones(50))

    told = (a * row + row).explain()

    assert lines(told, "moves") == ["reads 39.5 KiB (2 stored arrays), writes 39.1 KiB (result)"]
    assert "\nbytes   39.5 KiB read, 39.1 KiB written\n" in str(told)


def test_views_of_one_array_count_no_more_than_it_has() -> None:
    a = sa.array(np.ones(1024))

    assert lines((a[1:] - a[:-1]).explain(), "moves") == ["reads 8 KiB (1 stored array), writes 8 KiB (result)"]


def test_where_arrays_lie_is_told() -> None:
    told = (sa.asarray(np.ones(1024)) + sa.array(np.ones(1024))).explain()

    assert lines(told, "moves") == ["reads 16 KiB (1 NumPy array, 1 stored array), writes 8 KiB (result)"]


def test_the_temporaries_of_a_reduction_are_named_and_followed(big: Any) -> None:
    told = big.mean().explain()

    assert lines(told, "why") == ["t1 has memory: partial results, for layer 2"]
    assert lines(told, "after") == ["all of layer 1"]
    assert lines(told, "moves")[1].startswith("reads ") and "(t1), writes 8 B (result)" in lines(told, "moves")[1]


def test_a_layer_that_needs_a_part_of_another_says_so(big: Any) -> None:
    costly = sa.exp(big) * sa.sin(big)

    told = sa.explain(costly.sum(axis=1), costly.max(axis=0))

    assert "the matching part of layer 1" in lines(told, "after")


def test_what_several_passes_read_says_why_it_has_memory(big: Any) -> None:
    costly = sa.exp(big) * sa.sin(big)

    told = sa.explain(costly.sum(axis=1), costly.max(axis=0))

    assert lines(told, "why")[0] == "t1 has memory: read by 2 passes; computing it again in each costs more"
    assert re.search(r"^2  sum ", str(told), re.MULTILINE)  # what it reads is no part of its name


def test_what_several_views_read_says_why_it_has_memory(big: Any) -> None:
    costly = sa.exp(big) * sa.sin(big)

    assert lines((costly[1:] - costly[:-1]).explain(), "why") == [
        "t1 has memory: seen through several views; computing it again for each costs more"
    ]


def test_what_a_reshape_reads_says_why_it_has_memory(big: Any) -> None:
    assert lines((big.T.reshape(-1) + 1).explain(), "why") == ["t1 has memory: reshape needs it in C order"]


def test_what_a_product_reads_says_why_it_has_memory() -> None:
    a = sa.array(np.ones((30, 30)))

    assert lines(((a + 1) @ a).explain(), "why") == ["t1 has memory: matmul needs it as an array"]


@pytest.mark.parametrize(
    "build, why",
    [
        (lambda a: a.map_blocks(np.sort, dtype=float).T + 1, "a user's function"),
        (lambda a: sa.cumsum(a) + 1, "a running result"),
        (lambda a: a.sum() + a, "a reduction"),
    ],
)
def test_operations_with_memory_of_their_own_say_so(build: Any, why: str) -> None:
    assert f"t1 has memory: {why}" in lines(build(sa.array(np.ones((20, 30)))).explain(), "why")


def test_a_source_is_read_by_this_process_alone() -> None:
    told = (sa.from_array(Source()) + 1).explain()

    assert "in this process: no other can read the source" in str(told)
    assert "reads 3.8 MiB (a Source), writes 3.8 MiB (result)" in lines(told, "moves")


@pytest.mark.parametrize(
    "build, why",
    [
        (lambda a, b: (a + 1, b[0] + 1), "another iteration space"),
        (lambda a, b: (a.sum(axis=0), a.sum(axis=1)), "reduced over other axes"),
        (lambda a, b: (a + 1, b + 1), "nothing is read by both"),
        (lambda a, b: (a + 1, b.sum(axis=0)), "nothing is read by both"),
    ],
)
def test_layers_that_share_no_pass_say_why(build: Any, why: str) -> None:
    a, b = sa.array(np.ones((20, 30))), sa.array(np.ones((20, 30)))

    assert lines(sa.explain(*build(a, b)), "why") == [f"apart from layer 1: {why}"]


def test_layers_that_share_a_pass_are_one() -> None:
    a = sa.array(np.ones((20, 30)))

    told = sa.explain(a + 1, a.mean(axis=0), a.std(axis=0))

    assert "1 layer, 1 task" in str(told)
    assert lines(told, "why") == []


def test_long_chains_list_their_operations() -> None:
    x = sa.array(np.ones(10))
    for _ in range(5):
        x = x * 2 + 1

    assert lines(x.explain(), "does") == ["10 operations: 5 multiply, 5 add"]


def test_the_line_is_the_users() -> None:
    told = (sa.array(np.ones(3)) + 1).explain()

    assert re.search(r"^1  add +.*test_explain\.py:\d+$", str(told), re.MULTILINE)


def test_why_a_layer_is_not_compiled_is_told() -> None:
    told = (sa.array(np.ones(10)) + 1).explain()

    assert lines(told, "numpy") == ["1 task over (10,); not compiled: engine='numpy'"]


def test_it_works_without_llvmlite() -> None:
    program = """if True:
        import sys
        sys.modules["llvmlite"] = None  # an import of it fails
        import shmarray as sa
        sa.config.set(engine="auto")
        print((sa.ones(10) * 2).explain(code=True))
    """
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert "not compiled: llvmlite is not installed" in " ".join(told.split())
    assert lines(told, "code") == ["none: not compiled"]


def test_code_is_the_assembly_of_compiled_layers() -> None:
    pytest.importorskip("llvmlite")
    x = (sa.array(np.ones(10)) * 2 + 1).map_blocks(np.sort, dtype=float)

    with sa.config.set(engine="llvm"):
        plain, told = sa.explain(x, x.T * 2), sa.explain(x, x.T * 2, code=True)

    assert "define" not in str(plain)
    assert lines(plain, "llvm") == ["1 task over (10,)"]
    assert str(told).count("define i32 @kernel") + str(told).count('define i32 @"kernel"') == 1
    assert lines(told, "code") == ["none: not compiled"]
