"""Checkpoints: what is saved comes back bit for bit; what is torn is passed over; whoever dies where, the newest whole one is found."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shmarray as sa
from shmarray import npy

STRUCTURED = np.dtype([("a", "i1"), ("b", "f8", (2,)), ("ü", "U3")])
VALUES = {
    "floats": np.arange(600.0).reshape(20, 30),
    "wide": np.arange(24, dtype=">i2").reshape(2, 3, 4),
    "complex": np.array([[1 + 2j, np.nan], [np.inf, -0.0]]),
    "bool": np.arange(100) % 3 == 0,
    "scalar": np.array(7.5),
    "one": np.ones((1, 1, 1), np.float16),
    "empty": np.zeros((0, 5), np.int32),
    "half_empty": np.zeros((3, 0)),
    "fortran": np.asfortranarray(np.arange(77).reshape(7, 11)),
    "strided": np.arange(200)[::-3],
    "structured": np.array([(1, (2, 3), "äöü"), (4, (5, 6), "")], STRUCTURED),
    "dates": np.array(["2020-01-01", "NaT"], "M8[D]"),
    "text": np.array([["a", "bcd"], ["", "ä"]]),
    "bytes": np.array([b"a", b"bc"]),
    "record": np.zeros(3, np.dtype("V5")),
}


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npy, "SLAB_NBYTES", 200)


def values_of(found: sa.Checkpoint) -> dict[str, Any]:
    return {name: np.asarray(value) for name, value in found.items()}


def assert_bits(found: Any, expected: Any) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


# ------------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("slab_nbytes", [200, npy.SLAB_NBYTES])
@pytest.mark.parametrize("name", VALUES)
def test_what_is_saved_comes_back_bit_for_bit(
    tmp_path: Path, executor: str, name: str, slab_nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npy, "SLAB_NBYTES", slab_nbytes)
    value = VALUES[name]

    sa.save_checkpoint(tmp_path, 3, numpy=value, stored=sa.array(value), scalar=value.flat[0] if value.size else np.float64(0))
    found = sa.load_checkpoint(tmp_path)

    assert_bits(found["numpy"], value)
    assert_bits(found["stored"], value)
    assert found["numpy"].is_stored
    assert found.step == 3
    if value.size:
        assert type(found["scalar"]) is type(value.flat[0])


def test_files_are_read_by_numpy_and_json_alone(tmp_path: Path, small_slabs: None) -> None:
    place = Path(sa.save_checkpoint(tmp_path, 12, **VALUES, t=0.1))

    assert place == tmp_path / "step-000000000012"
    document = json.loads((place / "checkpoint.json").read_text())
    assert (document["step"], document["values"]) == (12, {"t": 0.1})
    for name, entry in document["arrays"].items():
        values = np.load(place / entry["file"], allow_pickle=False)
        assert_bits(values, VALUES[name])
        assert tuple(entry["shape"]) == values.shape
        edges = [np.cumsum([0, *sizes]) for sizes in entry["slabs"]]
        boxes = itertools.product(*([slice(a, b) for a, b in itertools.pairwise(axis)] for axis in edges))
        found = [f"{zlib.crc32(np.ascontiguousarray(values[box]).tobytes()):08x}" for box in boxes if values.size]
        assert found == entry["slab_crc32"]
        data = (place / entry["file"]).read_bytes()[entry["offset"] :]
        assert data == np.ascontiguousarray(values).tobytes()  # so slabs follow each other in the file
    assert max(len(entry["slab_crc32"]) for entry in document["arrays"].values()) > 10


@pytest.mark.parametrize("dtype", ["f8", ">c16", STRUCTURED, "U7", "M8[ns]", [(f"field{k}" * 3, "f4") for k in range(3000)]], ids=str)
def test_headers_are_those_of_numpy(dtype: Any, tmp_path: Path) -> None:
    kind = np.dtype(dtype)
    values = np.zeros((3, 2), kind)
    header = npy.header_of(values.shape, npy.storable_descr(kind, "x"))
    (tmp_path / "x.npy").write_bytes(header + values.tobytes())

    assert len(header) % 64 == 0
    assert_bits(np.load(tmp_path / "x.npy", max_header_size=10**6), values)


def test_lazy_arrays_are_computed_together_as_they_are_written(tmp_path: Path, executor: str, small_slabs: None) -> None:
    x = sa.array(np.arange(60.0).reshape(12, 5), chunks=(5, 5))
    calls = tmp_path / "calls"

    def count(block: Any) -> Any:
        with open(calls, "a") as file:
            file.write(".")
        return block + 1

    y = x.map_blocks(count, dtype=float)
    sa.save_checkpoint(tmp_path / "there", 0, y=y, total=y.sum(), twice=y * 2, T=(x * 2).T, part=x[::-2, 1:3], same=x, again=x)
    found = sa.load_checkpoint(tmp_path / "there")

    assert calls.read_text() == "..."  # once per chunk, though three arrays read it
    expected = np.asarray(x) + 1
    assert_bits(found["y"], expected)
    assert_bits(found["total"], expected.sum())
    assert_bits(found["twice"], expected * 2)
    assert_bits(found["T"], (np.asarray(x) * 2).T)
    assert_bits(found["part"], np.asarray(x)[::-2, 1:3])
    assert_bits(found["again"], x)


def test_chunks_come_back(tmp_path: Path) -> None:
    x = sa.zeros((10, 7), chunks=((3, 3, 4), (5, 2))).persist()
    sa.save_checkpoint(tmp_path, x=x, y=x + 1)

    found = sa.load_checkpoint(tmp_path)
    assert found["x"].chunks == found["y"].chunks == x.chunks


def test_plain_values_come_back(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    generator.random(3)
    plain = {
        "t": 0.1 + 0.2,
        "n": 2**200,
        "yes": True,
        "none": None,
        "name": 'ä"\n\ud800',
        "list": [1, {"a": [2.5, None]}],
        "state": generator.bit_generator.state,
        "inf": float("-inf"),
    }
    sa.save_checkpoint(tmp_path, 1, **plain)

    found = sa.load_checkpoint(tmp_path)
    assert dict(found) == plain
    again = np.random.default_rng()
    again.bit_generator.state = found["state"]
    assert again.random() == generator.random()


def test_a_run_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path, executor: str, small_slabs: None) -> None:
    def step(u: Any, v: Any, t: float) -> tuple[Any, Any, float]:
        u += 0.1 * (v - u**3 / 3)
        v -= 0.1 * u.mean() * t
        return u, v, t * 1.01 + 0.1

    def begin() -> tuple[Any, Any, float]:
        generator = np.random.default_rng(0)
        return sa.array(generator.random((40, 25)), chunks=(7, 25)), sa.array(generator.random(25)), 0.0

    state = begin()
    for _ in range(20):
        state = step(*state)
    other = begin()
    for _ in range(9):
        other = step(*other)
    sa.save_checkpoint(tmp_path, 9, u=other[0], v=other[1], t=other[2])
    del other
    found = sa.load_checkpoint(tmp_path)
    other = found["u"], found["v"], found["t"]
    for _ in range(found.step, 20):
        other = step(*other)

    assert_bits(other[0], state[0])
    assert_bits(other[1], state[1])
    assert other[2] == state[2]


def test_shared_arrays_are_saved_under_their_locks(tmp_path: Path) -> None:
    x = sa.shared.zeros((30, 4), chunks=(3, 4))
    x += 2
    held, done = threading.Event(), threading.Event()

    def write() -> None:
        with x.lock((0, 0)) as chunk:
            held.set()
            chunk[:] = 1
            assert not done.wait(0.2)  # it cannot be saved by now
            chunk[:] = 3

    writer = threading.Thread(target=write)
    writer.start()
    held.wait()
    sa.save_checkpoint(tmp_path, x=x)
    done.set()
    writer.join()
    assert_bits(sa.load_checkpoint(tmp_path)["x"], x)


def test_arrays_of_one_checkpoint_are_of_one_moment(tmp_path: Path) -> None:
    """A writer changes both under the locks of both; what is saved never has one new and one old."""
    u, v = sa.zeros((64, 8), chunks=(8, 8)).persist(), sa.zeros((64, 8), chunks=(8, 8)).persist()
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            with u.lock() as a, v.lock() as b:
                a += 1
                b += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for step in range(10):
            sa.save_checkpoint(tmp_path, step, u=u, v=v)
            found = values_of(sa.load_checkpoint(tmp_path))
            assert (found["u"] == found["u"][0, 0]).all()
            assert_bits(found["u"], found["v"])
    finally:
        stop.set()
        writer.join()


def test_arrays_in_the_spill_file_and_larger_than_memory(tmp_path: Path) -> None:
    with sa.Pool(workers=2, memory_limit="12MiB"):
        x = sa.arange(2_000_000.0).persist()
        assert "on disk" in repr(x)
        sa.save_checkpoint(tmp_path, x=x, y=x + 1)
        found = sa.load_checkpoint(tmp_path)
        assert "on disk" in repr(found["y"])
        assert float((found["y"] - found["x"]).min()) == float((found["y"] - found["x"]).max()) == 1
        assert float(found["x"][1_999_999]) == 1_999_999


# ------------------------------------------------------------------------------------------------- which are there


def steps_in(directory: Path) -> list[int]:
    return [info.step for info in sa.list_checkpoints(directory)]


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    for step in (1, 5, 3):
        sa.save_checkpoint(tmp_path, step, keep=None, x=np.array(step))
    assert steps_in(tmp_path) == [1, 3, 5]
    sa.save_checkpoint(tmp_path, 4, x=np.array(4))
    assert steps_in(tmp_path) == [3, 4, 5]  # later ones are not touched
    sa.save_checkpoint(tmp_path, 6, keep=1, x=np.array(6))
    assert steps_in(tmp_path) == [6]
    assert sorted(os.listdir(tmp_path)) == ["step-000000000006"]


def test_torn_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in range(3):
        sa.save_checkpoint(tmp_path, step, keep=None, x=np.arange(5))
    (tmp_path / "step-000000000002" / "x.npy").unlink()
    sa.save_checkpoint(tmp_path, 3, keep=2, x=np.arange(5))
    assert steps_in(tmp_path) == [1, 2, 3]
    assert [bool(info.problem) for info in sa.list_checkpoints(tmp_path)] == [False, True, False]


def test_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    for value in range(4):
        place = sa.save_checkpoint(tmp_path, 7, x=np.full(5, value))
        assert place == str(tmp_path / "step-000000000007")
        assert_bits(sa.load_checkpoint(tmp_path)["x"], np.full(5, value))
        assert os.listdir(tmp_path) == ["step-000000000007"]


def test_a_step_can_be_asked_for(tmp_path: Path) -> None:
    for step in range(3):
        sa.save_checkpoint(tmp_path, step, keep=None, x=np.array(step))
    assert int(sa.load_checkpoint(tmp_path, 1)["x"]) == 1
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 9 .* steps 0, 1, 2"):
        sa.load_checkpoint(tmp_path, 9)


def test_where_there_is_none(tmp_path: Path) -> None:
    assert sa.list_checkpoints(tmp_path / "nowhere") == []
    with pytest.raises(FileNotFoundError, match="no checkpoint in this directory"):
        sa.load_checkpoint(tmp_path / "nowhere")


def test_a_checkpoint_is_a_mapping(tmp_path: Path) -> None:
    sa.save_checkpoint(tmp_path, 2, b=1, a=np.arange(3))
    found = sa.load_checkpoint(tmp_path)
    assert list(found) == ["b", "a"]
    assert len(found) == 2
    assert repr(found) == "<Checkpoint of step 2: b, a>"
    with pytest.raises(KeyError, match="'c': the checkpoint of step 2 holds b, a"):
        found["c"]
    sa.save_checkpoint(tmp_path, 3, **found)
    assert_bits(sa.load_checkpoint(tmp_path)["a"], np.arange(3))


# ------------------------------------------------------------------------------------------------------------- damage


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of an array": (lambda d: flip(d / "x.npy", -1000), "checksum"),
    "the last byte": (lambda d: flip(d / "x.npy", -1), "checksum"),
    "the header": (lambda d: flip(d / "x.npy", 70), "header"),
    "a byte less": (lambda d: os.truncate(d / "x.npy", (d / "x.npy").stat().st_size - 1), "bytes, not"),
    "a byte more": (lambda d: os.truncate(d / "x.npy", (d / "x.npy").stat().st_size + 1), "bytes, not"),
    "no array": (lambda d: (d / "x.npy").unlink(), "cannot be read: No such file"),
    "a directory for an array": (lambda d: ((d / "x.npy").rename(d / "y"), (d / "x.npy").mkdir()), "bytes, not"),
    "no json": (lambda d: (d / "checkpoint.json").unlink(), "cannot be read: No such file"),
    "half of the json": (lambda d: os.truncate(d / "checkpoint.json", 300), "torn or changed"),
    "an empty json": (lambda d: os.truncate(d / "checkpoint.json", 0), "torn or changed"),
    "another json": (lambda d: (d / "checkpoint.json").write_text("[1]"), "torn or changed"),
    "a value changed": (lambda d: rewrite(d, '"t": 0.5', '"t": 0.25'), "changed: its checksum"),
    "a later format": (lambda d: rewrite(d, '"version": 1', '"version": 2'), "version 2"),
}


def rewrite(directory: Path, old: str, new: str) -> None:
    text = (directory / "checkpoint.json").read_text()
    assert old in text
    (directory / "checkpoint.json").write_text(text.replace(old, new))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_one_before_taken(tmp_path: Path, damage: str, executor: str) -> None:
    for step in (1, 2):
        sa.save_checkpoint(tmp_path, step, x=np.full(1000, step), t=0.5)
    act, said = DAMAGES[damage]
    act(tmp_path / "step-000000000002")

    with pytest.warns(RuntimeWarning, match=f"step-000000000002 is passed over: .*{said}") as caught:
        found = sa.load_checkpoint(tmp_path)
    assert found.step == 1
    assert caught[0].filename == __file__
    with pytest.raises(sa.CheckpointError, match=f"step-000000000002: .*{said}"):
        sa.load_checkpoint(tmp_path, 2)

    act(tmp_path / "step-000000000001")
    with pytest.warns(RuntimeWarning), pytest.raises(sa.CheckpointError, match=r"none is whole.\n.*0002: (.|\n)*0001: "):
        sa.load_checkpoint(tmp_path)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    place = Path(sa.save_checkpoint(tmp_path, 1, x=np.arange(9, dtype="i2"), t=0.5))
    for file in place.iterdir():
        whole = file.read_bytes()
        for at in range(len(whole)):
            flip(file, at)
            with pytest.raises(sa.CheckpointError), sa.config.set(scheduler="synchronous"):
                sa.load_checkpoint(tmp_path, 1)
            file.write_bytes(whole)
    assert_bits(sa.load_checkpoint(tmp_path)["x"], np.arange(9, dtype="i2"))


def test_memory_that_does_not_suffice_is_no_damage(tmp_path: Path) -> None:
    sa.save_checkpoint(tmp_path, 1, x=sa.zeros(4_000_000))
    with sa.Pool(workers=1, memory_limit="4MiB", spill_directory="off"), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(sa.MemoryBudgetError):
            sa.load_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("x", 1j, "np.complex128"),
        ("x", object(), "of type object"),
        ("x", [1, np.float64(2)], r"x=...\)\[1\] is of type float64"),
        ("x", {1: 2}, "of type dict"),
        ("x", np.array([None]), "dtype object"),
        ("x", np.zeros(3, np.dtypes.StringDType()), "dtype StringDType"),
        ("x", np.ma.masked_array([1, 2], [0, 1]), "masked"),
        ("x", np.zeros(3, np.dtype([])), "at least one each"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path, name: str, value: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        sa.save_checkpoint(tmp_path / "new", **{name: value})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("keywords, said", [({"a/b": 1}, "names of files"), ({".x": 1}, "names"), ({"keep": 0}, "keep at least 1")])
def test_bad_names_and_counts(tmp_path: Path, keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sa.save_checkpoint(tmp_path, 1, **keywords)
    with pytest.raises(TypeError, match=r"step 1\.5: steps are whole numbers, not a float"):
        sa.save_checkpoint(tmp_path, 1.5, a=np.ones(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps are whole numbers"):
        sa.save_checkpoint(tmp_path, -1)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match=r"saving checkpoint 3 in .*not a directory"):
            sa.save_checkpoint(path, 3, x=np.arange(3))


@pytest.mark.parametrize("where", ["pwrite", "write", "fsync", "ftruncate", "mkdir", "rename"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sa.save_checkpoint(tmp_path, 1, x=np.arange(1000))

    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, sa.config.set(scheduler="threads"):
        patch.setattr(npy.os, where, full)
        with pytest.raises(OSError, match=r"saving checkpoint 2 in .*: No space left on device. The newest .*0001. Free some") as caught:
            sa.save_checkpoint(tmp_path, 2, x=np.arange(1000))
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["step-000000000001"]
    assert_bits(sa.load_checkpoint(tmp_path)["x"], np.arange(1000))


def test_a_worker_that_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = npy.write

    def elsewhere(x: Any, file: npy.File, slabs: Any) -> Any:
        return real(x, npy.File(file.path + ".gone", file.shape, file.dtype, file.offset), slabs)

    monkeypatch.setattr(npy, "write", elsewhere)
    with sa.config.set(scheduler="processes"), pytest.raises(FileNotFoundError, match="saving checkpoint 2 in"):
        sa.save_checkpoint(tmp_path, 2, x=np.arange(1000))
    assert os.listdir(tmp_path) == []


def test_what_computing_raises_is_not_touched(tmp_path: Path, executor: str) -> None:
    def fail(block: Any) -> Any:
        raise PermissionError(13, "mine")

    with pytest.raises(PermissionError) as caught:
        sa.save_checkpoint(tmp_path, 2, x=sa.ones(10).map_blocks(fail, dtype=float))
    assert str(caught.value) == "[Errno 13] mine"
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------------ deaths, writers


class Death(BaseException):
    """The end of a process, as far as files go: from here on nothing that it calls does anything."""


CHANGING = ("open", "mkdir", "rename", "unlink", "rmdir", "write", "pwrite", "ftruncate", "fsync")


class Mortal:
    """Has this process seem dead to the file system from the nth call that changes something on."""

    def __init__(self, patch: pytest.MonkeyPatch, nth: int) -> None:
        self.calls = 0
        self.nth = nth
        for name in CHANGING:
            patch.setattr(os, name, self.wrapped(getattr(os, name), name))

    def wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                return function(*args, **kwargs)
            self.calls += 1
            if self.calls >= self.nth:
                raise Death
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("case", ["first", "next", "next, keeping one", "same"])
def test_a_death_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path, case: str, small_slabs: None) -> None:
    old, new = np.arange(100.0), np.arange(100.0) + 0.5
    keep = 1 if "one" in case else 2
    is_new = []
    with sa.config.set(scheduler="synchronous"), warnings.catch_warnings():
        warnings.simplefilter("error")  # none is torn
        for nth in itertools.count(1):
            directory = tmp_path / str(nth)
            if case != "first":
                sa.save_checkpoint(directory, 1, x=old)
            with pytest.MonkeyPatch.context() as patch:
                mortal = Mortal(patch, nth)
                with contextlib.suppress(Death):
                    sa.save_checkpoint(directory, 1 if case == "same" else 2, keep=keep, x=new)
            if case == "first" and not sa.list_checkpoints(directory):
                is_new.append(False)
            else:
                found = np.asarray(sa.load_checkpoint(directory)["x"])
                is_new.append(bool(found[0]))
                assert_bits(found, new if is_new[-1] else old)
            sa.save_checkpoint(directory, 3, keep=1, x=old)
            assert os.listdir(directory) == ["step-000000000003"]  # what the dead left is gone
            if mortal.calls < nth:
                break
    assert len(is_new) > 15
    assert is_new == sorted(is_new)  # the old one up to some call, from there on the new one
    assert is_new[-1]
    assert not is_new[0]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []

    def fsync(number: int, real: Callable[[int], None] = os.fsync) -> None:
        told.append(("fsync", os.readlink(f"/proc/self/fd/{number}")))
        real(number)

    def rename(old: str, new: str, real: Callable[[str, str], None] = os.rename) -> None:
        told.append(("rename", new))
        real(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    root = tmp_path / "above" / "there"
    place = sa.save_checkpoint(root, 1, x=np.arange(3), y=np.arange(4))

    renamed = told.index(("rename", place))
    assert [Path(path).name for act, path in told[:renamed]] == [tmp_path.name, "above", "x.npy", "y.npy", "checkpoint.json", "new"]
    assert told[renamed + 1] == ("fsync", str(root))


def test_nothing_of_a_living_writer_is_swept(tmp_path: Path) -> None:
    begun, go = threading.Event(), threading.Event()

    def wait(block: Any) -> Any:
        begun.set()
        assert go.wait(60)
        return block

    def save() -> None:
        with sa.config.set(scheduler="threads"):
            sa.save_checkpoint(tmp_path, 1, x=sa.ones(10).map_blocks(wait, dtype=float))

    writer = threading.Thread(target=save)
    writer.start()
    try:
        assert begun.wait(60)
        sa.save_checkpoint(tmp_path, 2, x=np.zeros(3))
        assert len([name for name in os.listdir(tmp_path) if name.startswith(".saving")]) == 2
    finally:
        go.set()
        writer.join()
    assert steps_in(tmp_path) == [1, 2]
    assert len(os.listdir(tmp_path)) == 2


def test_writers_at_once(tmp_path: Path) -> None:
    """Several threads save steps of their own and the same one; what is there at the end is whole."""
    failures: list[BaseException] = []

    def save(number: int) -> None:
        try:
            for k in range(8):
                sa.save_checkpoint(tmp_path, 10 * k + number, keep=None, x=np.full(50, number))
                sa.save_checkpoint(tmp_path, 1000, keep=None, x=np.full(50, number))
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=save, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failures == []
    assert steps_in(tmp_path) == sorted([*(10 * k + number for k in range(8) for number in range(4)), 1000])
    assert not any(info.problem for info in sa.list_checkpoints(tmp_path))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    x = np.asarray(sa.load_checkpoint(tmp_path, 1000)["x"])
    assert (x == x[0]).all()


@pytest.mark.parametrize("is_same", [False, True])
def test_a_reader_beside_a_writer_that_keeps_one(tmp_path: Path, is_same: bool) -> None:
    sa.save_checkpoint(tmp_path, 0, keep=1, x=np.full(50, 0))
    done = threading.Event()

    def save() -> None:
        for value in range(1, 40):
            sa.save_checkpoint(tmp_path, 0 if is_same else value, keep=1, x=np.full(50, value))
        done.set()

    writer = threading.Thread(target=save)
    writer.start()
    last = -1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while not done.is_set():
            found = sa.load_checkpoint(tmp_path)
            value = int(found["x"][0])
            assert_bits(found["x"], np.full(50, value))
            assert is_same or found.step == value
            assert value >= last
            last = value
    writer.join()
