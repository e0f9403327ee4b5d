"""The memory budget, and what it is derived from; cgroups are folders in tmp_path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.limits import Budget, available_nbytes, cpu_count, format_bytes, oom_kills, page_cache_has_room, parse_bytes

MIB = 1 << 20
NO_LIMIT_V1 = 9223372036854771712


def write(root: Path, **files: str | int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(f"{text}\n")


def write_v2(root: Path, path: str = "/", **files: str | int) -> Path:
    write(root / "proc/self", cgroup=f"0::{path}")
    folder = root / "sys/fs/cgroup" / path.strip("/")
    write(folder, **files)
    return folder


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (17, 17),
        (np.int64(5), 5),
        ("4096", 4096),
        ("4096B", 4096),
        ("16MiB", 16 << 20),
        (" 16 mib ", 16 << 20),
        ("1.5 GB", 1_500_000_000),
        ("1kB", 1000),
        ("2TB", 2 * 10**12),
        ("1 TiB", 1 << 40),
        ("0.5KiB", 512),
        (".5KiB", 512),
        ("1e9", 10**9),
        ("8796093022207.999 MiB", 9223372036854774759),
    ],
)
def test_text_means_bytes(text: int | str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "16M", "-1", "-1 GB", "MiB", "1 2", "1.2.3 kB", "nan", "inf", "1 PBB", "0x10", -5])
def test_bad_text_is_refused_with_what_was_typed_and_what_is_accepted(text: int | str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_bytes(text)
    assert str(text) in str(caught.value)
    if isinstance(text, str):
        assert "MiB" in str(caught.value) and "GB" in str(caught.value)


def test_neither_text_nor_integer_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"1\.5 \(float\)"):
        parse_bytes(1.5)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (3 << 29, "1.5 GiB"),
        (64 << 20, "64 MiB"),
        ((1 << 20) - 1, "1 MiB"),
        (5 << 50, "5120 TiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_bytes_are_written_as_people_read_them(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(0, 1 << 62))
def test_what_is_written_can_be_read(nbytes: int) -> None:
    assert parse_bytes(format_bytes(nbytes)) == pytest.approx(nbytes, rel=0.06)


def test_without_cgroups_the_machine_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 123 * MIB}))
    assert available_nbytes(tmp_path) == 123 * MIB


def test_v2_limit_less_what_cannot_be_reclaimed(tmp_path: Path) -> None:
    write_v2(tmp_path, memory__max=100 * MIB, memory__current=60 * MIB, memory__stat=f"anon 5\ninactive_file {20 * MIB}\nfile 7")
    assert available_nbytes(tmp_path) == 60 * MIB


def test_v2_smallest_of_all_ancestors_counts(tmp_path: Path) -> None:
    write_v2(tmp_path, "/", memory__max=500 * MIB, memory__current=490 * MIB)
    write_v2(tmp_path, "/a", memory__max=50 * MIB, memory__current=10 * MIB)
    write_v2(tmp_path, "/a/b", memory__max="max", memory__current=10 * MIB)
    assert available_nbytes(tmp_path) == 10 * MIB
    write_v2(tmp_path, "/", memory__max="max", memory__current=490 * MIB)
    write_v2(tmp_path, "/a/b", memory__max="max", memory__current=10 * MIB)
    assert available_nbytes(tmp_path) == 40 * MIB


def test_v2_throttling_limit_counts(tmp_path: Path) -> None:
    write_v2(tmp_path, "/a", memory__max=100 * MIB, memory__high=30 * MIB, memory__current=10 * MIB)
    assert available_nbytes(tmp_path) == 20 * MIB


def test_full_group_has_nothing_available(tmp_path: Path) -> None:
    write_v2(tmp_path, "/a", memory__max=100 * MIB, memory__current=120 * MIB)
    assert available_nbytes(tmp_path) == 0


def test_group_named_as_the_host_sees_it_falls_back_to_what_is_mounted(tmp_path: Path) -> None:
    write_v2(tmp_path, "/", memory__max=70 * MIB, memory__current=0)
    write(tmp_path / "proc/self", cgroup="0::/docker/0123abcd")
    assert available_nbytes(tmp_path) == 70 * MIB
    write(tmp_path / "proc/self", cgroup="0::/../other")
    assert available_nbytes(tmp_path) == 70 * MIB


def test_v1_limit_counts_and_its_none_does_not(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="9:name=systemd:/\n4:cpu,memory:/jobs/7\n0::/")
    mount = tmp_path / "sys/fs/cgroup/memory"
    write(mount, memory__limit_in_bytes=NO_LIMIT_V1, memory__usage_in_bytes=NO_LIMIT_V1 // 2)
    free = available_nbytes(tmp_path)
    assert free > 0
    stat = f"inactive_file 1\ntotal_inactive_file {5 * MIB}"
    write(mount / "jobs", memory__limit_in_bytes=40 * MIB, memory__usage_in_bytes=15 * MIB, memory__stat=stat)
    assert available_nbytes(tmp_path) == 30 * MIB


def test_the_page_cache_has_room_where_much_is_unused_and_no_group_counts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [200 * MIB]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"free": free[0], "total": 1000 * MIB}))
    assert page_cache_has_room(tmp_path)
    free[0] = 100 * MIB
    assert not page_cache_has_room(tmp_path)
    free[0] = 200 * MIB
    write_v2(tmp_path, memory__max="max", memory__high="max")
    assert page_cache_has_room(tmp_path)
    write_v2(tmp_path, memory__max=10_000 * MIB)
    assert not page_cache_has_room(tmp_path)


def test_nonsense_in_files_is_no_limit(tmp_path: Path) -> None:
    write_v2(tmp_path, "/", memory__max="lots", memory__current="?", cpu__max="what ever")
    (tmp_path / "sys/fs/cgroup/memory.high").write_bytes(b"\xff\xfe")
    assert available_nbytes(tmp_path) > 0
    assert cpu_count(tmp_path) >= 1


@pytest.fixture
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight_processors")
@pytest.mark.parametrize(
    ("quota", "count"), [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("9900000 100000", 8)]
)
def test_v2_quota_bounds_processors(tmp_path: Path, quota: str, count: int) -> None:
    write_v2(tmp_path, "/a", cpu__max=quota)
    write_v2(tmp_path, "/a/b", cpu__max="max 100000")
    assert cpu_count(tmp_path) == count


@pytest.mark.usefixtures("eight_processors")
def test_v1_quota_bounds_processors(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="1:cpu,cpuacct:/")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct", cpu__cfs_quota_us=300000, cpu__cfs_period_us=100000)
    assert cpu_count(tmp_path) == 3
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert cpu_count(tmp_path) == 8


def test_this_machine_has_memory_and_a_processor() -> None:
    assert 0 < available_nbytes() <= psutil.virtual_memory().total
    assert cpu_count() >= 1


def test_budget_by_default_is_a_share_of_what_is_available() -> None:
    assert 0 < Budget().limit_nbytes < psutil.virtual_memory().total
    assert Budget("1 kB").limit_nbytes == 1000


def test_kills_for_lack_of_memory_are_those_of_the_own_group(tmp_path: Path) -> None:
    write_v2(tmp_path, "/", memory__events="low 0\noom 9\noom_kill 9")
    write_v2(tmp_path, "/a", memory__events="low 0\nhigh 3\nmax 8\noom 2\noom_kill 2\noom_group_kill 0")
    assert oom_kills(tmp_path) == 2


def test_kills_are_counted_where_the_groups_folder_is_not_mounted(tmp_path: Path) -> None:
    write_v2(tmp_path, "/", memory__events="oom_kill 4")
    write(tmp_path / "proc/self", cgroup="0::/docker/0123abcd")
    assert oom_kills(tmp_path) == 4


def test_v1_kills_and_those_of_the_machine(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) == 0
    write(tmp_path / "proc", vmstat="pgfault 12\noom_kill 5\nx 1")
    assert oom_kills(tmp_path) == 5
    write(tmp_path / "proc/self", cgroup="4:cpu,memory:/jobs\n0::/")
    write(tmp_path / "sys/fs/cgroup/memory/jobs", memory__oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 1")
    assert oom_kills(tmp_path) == 1
