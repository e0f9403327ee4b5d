"""What a simulation publishes, read in the process that runs it."""

from __future__ import annotations

import numpy as np
import pytest

import shmarray as sa
from shmarray import publish, shared

pytestmark = pytest.mark.usefixtures("pool")


def test_a_field_without_axes_is_published_and_of_one_step_with_the_others() -> None:
    with shared.Store() as store:
        seen = []

        def look(frame: sa.Frame) -> None:
            seen.append((frame.step, store["n"][...], store["u"][0]))

        sa.iterate(lambda u, n: (u + 1, n + 1), np.zeros(5), np.array(0), steps=3, callback=look, publish=store)

        assert (store["n"].shape, store["n"].dtype) == ((), np.int64)
        assert store["n"][...] == store["u"][4] == 3
    assert [step for step, _, _ in seen] == [1, 2, 3]
    assert all(n == u for _, n, u in seen)


@pytest.mark.parametrize("cells", [1, 4])
def test_a_field_for_which_there_are_no_addresses_is_a_memory_error(cells: int) -> None:
    entry = publish._Entry(np.dtype(float), (1 << 50,), ((1 << 50,),), (1 << 48,), 0, 0)
    with pytest.raises(MemoryError):
        publish._room(entry, cells)
