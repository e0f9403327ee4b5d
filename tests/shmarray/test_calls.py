"""Values laid down in memory, without processes: they come back as they were, and where their arrays lie depends on sizes alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shmarray.kernels.calls import ALIGNMENT, HEADER_NBYTES, laid_nbytes, make_room, map_leaves, packed, unpacked

NDArray = np.ndarray[Any, Any]

arrays = hnp.arrays(hnp.scalar_dtypes() | hnp.unicode_string_dtypes(), hnp.array_shapes(min_dims=1, min_side=0, max_side=5))
leaves = arrays | st.none() | st.integers() | st.text() | st.binary()
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def laid(value: Any) -> NDArray:
    parcel = packed(value)
    memory = np.full(parcel.nbytes + 100, 255, np.uint8)
    parcel.lay(memory)
    assert (memory[parcel.nbytes :] == 255).all()
    assert laid_nbytes(memory) == parcel.nbytes
    return memory


@given(values)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    np.testing.assert_equal(unpacked(laid(value)), value)


# Those of dates and times are part of the pickle: they have no buffer that NumPy would give.
numbers = hnp.arrays(hnp.integer_dtypes() | hnp.floating_dtypes(), hnp.array_shapes(min_dims=1, min_side=0, max_side=5))


@given(st.lists(numbers, min_size=1, max_size=5), st.text(max_size=300))
def test_where_arrays_lie_depends_on_their_sizes_alone(some: list[NDArray], text: str) -> None:
    parcel, other = packed(tuple(some)), packed({"text": text, "arrays": [x.copy().view(np.uint8) if x.size else x for x in some]})
    assert len(parcel.buffers) == len(some)
    assert parcel.offsets() == other.offsets()
    assert all(start % ALIGNMENT == 0 for start in parcel.offsets())


def test_arrays_are_read_only_views_of_the_memory() -> None:
    x = np.arange(100.0).reshape(4, 25)
    memory = laid([x, x.T])
    for found in unpacked(memory):
        assert np.shares_memory(found, memory) and not found.flags.writeable
    memory[HEADER_NBYTES : HEADER_NBYTES + 8].view(np.float64)[:] = -1
    assert unpacked(memory)[0][0, 0] == -1


def test_arrays_of_no_axes_are_scalars() -> None:
    found = unpacked(laid([np.array(3, np.int16), np.float32(2)]))
    assert [type(x) for x in found] == [np.int16, np.float32]


def test_memory_says_that_nothing_lies_in_it() -> None:
    memory = laid(np.arange(10))
    make_room(memory)
    assert laid_nbytes(memory) == 0


def test_leaves_are_what_is_in_plain_collections() -> None:
    class Pair(tuple[int, int]):
        pass

    pair = Pair((1, 2))
    assert map_leaves([1, (2, {"a": 3}), pair], lambda x: x * 2) == [2, (4, {"a": 6}), pair * 2]


def test_what_cannot_be_pickled_raises_as_pickle_does() -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        packed(iter(x for x in ()))
