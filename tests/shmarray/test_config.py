"""Settings: from the environment, for good, for a block in one thread; bad ones are refused with their name."""

from __future__ import annotations

import contextvars
import threading
from typing import Any

import numpy as np
import pytest

import shmarray as sa
from shmarray.config import Config


def test_the_environment_sets_what_is_there_at_first() -> None:
    made = Config(
        {"SHMARRAY_WORKERS": "3", "SHMARRAY_MEMORY_LIMIT": "2 GiB", "SHMARRAY_CHUNK_SIZE": "1MiB", "SHMARRAY_SCHEDULER": "threads"}
    )

    assert (made.workers, made.memory_limit, made.chunk_size, made.scheduler) == (3, 2 << 30, 1 << 20, "threads")
    assert made.spill_directory is None
    assert Config({}).workers is None
    assert Config({"SHMARRAY_WORKERS": ""}).workers is None


@pytest.mark.parametrize(
    "name, value", [("WORKERS", "many"), ("WORKERS", "-1"), ("WORKERS", "1.5"), ("MEMORY_LIMIT", "2 apples"), ("CHUNK_SIZE", "0")]
)
def test_a_bad_variable_is_named_with_its_value(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"SHMARRAY_{name}.*{value}"):
        Config({f"SHMARRAY_{name}": value})


@pytest.mark.parametrize(
    "name, value", [("workers", 0), ("workers", 2.5), ("workers", "x"), ("memory_limit", -1), ("chunk_size", []), ("scheduler", 5)]
)
def test_a_bad_value_is_refused_and_changes_nothing(name: str, value: Any) -> None:
    made = Config({})

    with pytest.raises(ValueError, match=name):
        made.set(**{name: value})

    assert dict(made) == dict(Config({}))


def test_an_unknown_setting_is_refused_with_those_there_are() -> None:
    made = Config({})

    with pytest.raises(KeyError, match="workers"):
        made.set(wrokers=3)
    with pytest.raises(AttributeError, match="wrokers"):
        made.wrokers
    with pytest.raises(KeyError):
        made.wrokers = 3
    with pytest.raises(KeyError):
        made.set(workers=3, wrokers=3)
    assert made.workers is None


def test_settings_hold_for_good_or_for_a_block() -> None:
    made = Config({})

    made.set(workers=2)
    made.chunk_size = "1 KiB"
    with made.set(workers=5, scheduler="threads"):
        with made(workers=6):
            assert (made.workers, made.scheduler, made.chunk_size) == (6, "threads", 1024)
        assert made.workers == 5

    assert (made.workers, made.scheduler, made.chunk_size) == (2, None, 1024)
    assert "workers=2" in repr(made)


def test_a_block_that_fails_gives_its_settings_back() -> None:
    made = Config({})

    with pytest.raises(ZeroDivisionError), made.set(workers=5):
        1 / 0

    assert made.workers is None


def test_a_block_holds_in_its_own_thread_alone() -> None:
    made = Config({})
    inside, seen = threading.Event(), []
    seen_in_copy: list[Any] = []

    def other() -> None:
        inside.wait(30)
        seen.append(made.workers)
        with made.set(workers=9):
            seen.append(made.workers)

    thread = threading.Thread(target=other)
    thread.start()
    with made.set(workers=5):
        inside.set()
        thread.join(30)
        contextvars.copy_context().run(lambda: seen_in_copy.append(made.workers))
        assert made.workers == 5

    assert seen == [None, 9]
    assert seen_in_copy == [5]


def test_the_scheduler_is_taken_from_the_settings_and_a_wrong_one_is_named() -> None:
    with sa.Pool(workers=1, memory_limit="64MiB"):
        x = sa.arange(10) + 1
        with pytest.raises(ValueError, match=r"quantum.*synchronous"):
            sa.config.set(scheduler="quantum")
        with pytest.raises(ValueError, match="quantum"):
            x.compute(scheduler="quantum")
        with sa.config.set(scheduler="threads"):
            np.testing.assert_array_equal(x.compute(), np.arange(1, 11))


def test_the_default_pool_is_made_with_the_settings() -> None:
    with sa.config.set(workers=1, memory_limit="48MiB"):
        x = sa.arange(3.0).persist()
        pool = x._storage.pool

    assert (pool.workers, pool.statistics().limit_nbytes) == (1, 48 << 20)
    np.testing.assert_array_equal((x + 1).compute(), [1, 2, 3])  # computed in another pool
    pool.close()


def test_an_unknown_scheduler_is_refused_where_it_is_set() -> None:
    with pytest.raises(ValueError, match=r"SHMARRAY_SCHEDULER.*'quantum'.*'processes', 'synchronous', 'threads'"):
        Config({"SHMARRAY_SCHEDULER": "quantum"})
    made = Config({})
    with pytest.raises(ValueError, match="quantum"):
        made.scheduler = "quantum"
    assert made.scheduler is None


@pytest.mark.parametrize("workers", ["a", 2.0, "2"])
def test_a_pool_of_workers_that_are_no_number_is_refused_with_the_value(workers: object) -> None:
    with pytest.raises(TypeError, match=repr(workers)):
        sa.Pool(workers=workers)  # type: ignore[arg-type]
