"""Elements that a mask picks, and elements at index arrays that are assigned to, while a step of a simulation is traced.

How many there are is not known before the step runs, so ``u[mask]`` stays where it is: all of ``u``, and the mask beside it.

    w = u[mask] * 2          Selection(u * 2, mask)      computed only where the mask is true: NumPy's warnings, and no others
    v[mask] = w              v = where(mask, w, v)       one pass, in the kernel of the step

Promises: what can be said of such elements alone is what NumPy says; all else (their number, one of them, another mask's) is a TypeError.
Never put here: masks of arrays with values: that is one call of NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shmarray.handle import Chosen, Handle, as_handle, is_linking, note_values, value_of
from shmarray.ops import elementwise, reductions
from shmarray.ops.gather import is_traced
from shmarray.ops.shaping import broadcast_to, reshape, take, view_of
from shmarray.ops.table import ROWS
from shmarray.region import index_map

__all__ = ["Selection", "assign", "choose"]

NDArray = np.ndarray[Any, Any]


class Selection(Chosen, np.lib.mixins.NDArrayOperatorsMixin):
    """``values`` where ``mask``, which broadcasts against them, is true.

    It goes together with numbers, and with what else the same mask picks; it can be reduced, and assigned at that mask.
    """

    __slots__ = ("behind", "mask", "picked", "values")

    def __init__(self, values: Any, mask: Any, behind: int, picked: Any) -> None:
        self.values = values
        self.mask = mask
        self.behind = behind  # axes after those of the mask
        self.picked = picked  # the mask as it was given, by which two that go together are known

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the elements."""
        return self.values.dtype  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"<elements of an array of shape {self.values.shape}, {self.dtype}, where a mask is true>"

    def apply(self, name: str, args: tuple[Any, ...], params: dict[str, Any]) -> Any:
        """Return row ``name`` of operands of which at least one is a selection."""
        operands = [self.operand(a, name) for a in args]
        row = ROWS[name]
        if isinstance(row.function, np.ufunc) and row.nout == 1 and not params:
            return self._like(elementwise.apply(f"masked:{name}", *operands, self.mask, 0))
        found = elementwise.apply(name, *operands, **params)
        return tuple(self._like(f) for f in found) if isinstance(found, tuple) else self._like(found)

    def _like(self, values: Any) -> Selection:
        return Selection(values, self.mask, self.behind, self.picked)

    def operand(self, value: Any, name: str) -> Any:
        """Return an operand as it stands beside `values`."""
        if isinstance(value, Selection):
            if not _is_same(value.picked, self.picked) or value.behind != self.behind:
                raise TypeError(f"{name} of elements that two different masks pick, or along different axes, {_WHY}")
            return value.values
        return self.fitted(value, name)

    def fitted(self, value: Any, name: str) -> Any:
        """Return an array that broadcasts against what is picked as one that does against all of it."""
        if np.ndim(value) <= self.behind:
            return value
        x = as_handle(value)
        cut = x.ndim - self.behind - 1
        if x.shape[cut] == 1:
            return x[(*(slice(None),) * cut, 0, *(None,) * self.picked.ndim)]
        if not is_traced(self.picked):
            note_values(self.picked)
            known = np.asarray(self.picked)
            if x.shape[cut] == np.count_nonzero(known):  # each goes to its place; any to those that are not picked
                places = np.maximum(np.cumsum(known) - 1, 0).reshape(known.shape)
                return take(x, places, cut) if x.shape[cut] else x.dtype.type(0)
        raise TypeError(f"{name} of elements that a mask picks and an array of shape {x.shape} {_WHY}")

    def astype(self, dtype: Any, casting: str = "unsafe") -> Selection:
        """Return the elements with another dtype."""
        return self._like(elementwise.astype(self.values, dtype, casting=casting))

    def copy(self) -> Selection:
        """Return the elements, which may be changed in place."""
        return self._like(self.values)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        (out,) = kwargs.pop("out", (None,))
        if method != "__call__" or ufunc.__name__ not in ROWS or not (out is None or isinstance(out, Selection)):
            raise TypeError(f"np.{ufunc.__name__}, as {method} or with out=, of elements that a mask picks {_WHY}")
        found = self.apply(ufunc.__name__, inputs, kwargs)
        if out is None:
            return found
        out.values = elementwise.astype(found.values, out.dtype, casting="same_kind")
        return out

    def __array__(self, *args: Any, **kwargs: Any) -> NDArray:
        raise TypeError(f"an array of elements that a mask picks {_WHY}")

    def __len__(self) -> int:
        raise TypeError(f"the number of elements that a mask picks {_WHY}; mask.sum() is an array of it")

    def __getitem__(self, key: Any) -> Any:
        """Return ``self[key]`` where ``key`` leaves the axis of the mask whole: directions of a lattice, components."""
        parts = list(key) if isinstance(key, tuple) else [key]
        front = self.values.ndim - self.behind - self.picked.ndim
        dots = [k for k, p in enumerate(parts) if p is Ellipsis] or [len(parts)]
        parts[dots[0] : dots[0] + 1] = [slice(None)] * (front + 1 + self.behind - sum(p is not Ellipsis for p in parts))
        numbers = [isinstance(p, (int, np.integer)) and not isinstance(p, bool) for p in parts]
        lists = [isinstance(p, (list, np.ndarray)) and np.asarray(p).dtype.kind in "iu" and np.ndim(p) == 1 for p in parts]
        is_known = all(isinstance(p, slice) or n or i for p, n, i in zip(parts, numbers, lists, strict=True))
        if len(parts) != front + 1 + self.behind or parts[front] != slice(None) or not is_known or sum(lists) + any(numbers) > 1:
            raise TypeError(f"single elements of those that a mask picks {_WHY}")
        behind = self.behind - sum(numbers[front + 1 :])
        parts[front : front + 1] = [slice(None)] * self.picked.ndim
        return _selection(self.values[tuple(parts)], self.picked, behind)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} of elements that a mask picks {_WHY}", name=name, obj=self)

    def _reduced(self, name: str, axis: Any, dtype: Any, out: Any, **more: Any) -> Any:
        if axis is not None or out is not None:
            raise TypeError(f"{name}(axis={axis!r}, out=...) of elements that a mask picks {_WHY}; without either it can be")
        where = broadcast_to(self.mask, self.values.shape)
        if dtype is not None:
            more["dtype"] = dtype
        return getattr(reductions, name)(self.values, where=where, **more)

    def sum(self, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
        """Return the sum, an array without axes."""
        return self._reduced("sum", axis, dtype, out)

    def prod(self, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
        """Return the product."""
        return self._reduced("prod", axis, dtype, out)

    def mean(self, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
        """Return the mean; of no elements NaN, and a warning."""
        return self._reduced("mean", axis, dtype, out)

    def std(self, axis: Any = None, dtype: Any = None, out: Any = None, ddof: int = 0) -> Any:
        """Return the standard deviation."""
        return self._reduced("std", axis, dtype, out, ddof=ddof)

    def var(self, axis: Any = None, dtype: Any = None, out: Any = None, ddof: int = 0) -> Any:
        """Return the variance."""
        return self._reduced("var", axis, dtype, out, ddof=ddof)

    def any(self, axis: Any = None, out: Any = None) -> Any:
        """Return whether any is true."""
        return self._reduced("any", axis, None, out)

    def all(self, axis: Any = None, out: Any = None) -> Any:
        """Return whether all are true."""
        return self._reduced("all", axis, None, out)

    def min(self, axis: Any = None, out: Any = None) -> Any:
        """Return the least; where there is none, the greatest number of the dtype."""
        return self._reduced("min", axis, None, out, initial=_bound(self.dtype, 1))

    def max(self, axis: Any = None, out: Any = None) -> Any:
        """Return the greatest; where there is none, the least number of the dtype."""
        return self._reduced("max", axis, None, out, initial=_bound(self.dtype, 0))


_WHY = "is not known while a step of iterate() is traced. They go together with numbers and with what else the same mask picks"


def _is_same(a: Any, b: Any) -> bool:
    """Whether two masks are one: the same expression, or of the same values (``~wall`` is a new array each time)."""
    return a.node is b.node or (not (is_traced(a) or is_traced(b)) and np.array_equal(np.asarray(a), np.asarray(b)))


def _bound(dtype: np.dtype[Any], which: int) -> Any:
    """Return the least (0) or the greatest (1) number of a dtype."""
    if dtype.kind == "b":
        return bool(which)
    if dtype.kind in "iu":
        return (np.iinfo(dtype).min, np.iinfo(dtype).max)[which]
    return dtype.type((-np.inf, np.inf)[which])


def choose(x: Any, key: Any) -> Selection | None:
    """Return ``x[key]`` of a step that is traced, where ``key`` has a mask of how many is not known; None: it is another key."""
    place = _place(x, key)
    if place is None:
        return None
    view, mask, behind = place
    if not is_traced(mask) and (mask.ndim == 1 or not is_traced(x)):
        return None  # how many it picks is known
    return _selection(view, mask, behind)


def _selection(view: Any, mask: Any, behind: int) -> Selection:
    view, mask = value_of(view), value_of(mask)  # a copy, in NumPy: what is written into either later does not reach it
    return Selection(view, mask[(..., *(None,) * behind)], behind, mask)


def assign(x: Any, key: Any, value: Any) -> bool:
    """Write ``x[key] = value`` of a step that is traced, for masks and index arrays; return False where all of them have values."""
    if not is_linking() or x._storage is not None:
        return False
    parts = key if isinstance(key, tuple) else (key,)
    has_values = not any(is_traced(p) for p in parts)
    if has_values and not isinstance(value, Selection) and not is_traced(x) and not is_traced(value):
        return False
    place = _place(x, key)
    if place is not None:
        view, mask, behind = place
        here = _selection(view, mask, behind)
        if not has_values or isinstance(value, Selection) or np.ndim(value) <= behind or np.shape(value)[-behind - 1] == 1:
            _overwrite(view, here.mask, here.operand(value, "assignment"))
            return True
    if not has_values:
        return False
    if isinstance(value, Selection):
        raise TypeError(f"assigning elements that a mask picks elsewhere than at that mask {_WHY}")
    for part in parts:
        note_values(part)
    known: Any = tuple(np.asarray(p) if isinstance(p, Handle) else p for p in parts)
    known = known if isinstance(key, tuple) else known[0]
    # Which of the values each element gets: as NumPy has it, the last where there are several.
    source = np.full(x.shape, -1, np.int64)
    taken = source[known]  # raises what NumPy raises
    source[known] = np.arange(taken.size).reshape(taken.shape)
    if np.ndim(value):
        values = broadcast_to(value, taken.shape)
        value = reshape(values, (-1,))[np.maximum(source, 0)] if taken.size else 0
    _overwrite(x, as_handle(source >= 0), value)
    return True


def _overwrite(x: Any, mask: Any, value: Any) -> None:
    value = as_handle(value)
    if value.ndim and value.dtype != x.dtype:  # a NaN that is not picked becomes no integer, and is not warned of
        value = elementwise.where(mask, value, value.dtype.type(0))
    x._overwrite(elementwise.where(mask, elementwise.astype(value, x.dtype), x).node)


def _place(x: Any, key: Any) -> tuple[Any, Any, int] | None:
    """Return (view, mask, axes after its own) of a key of slices, one mask, and numbers beside it; None: it is another."""
    parts = list(key) if isinstance(key, tuple) else [key]
    at = [k for k, p in enumerate(parts) if isinstance(p, (Handle, np.ndarray))]
    if len(at) != 1 or parts[at[0]].dtype != bool or not parts[at[0]].ndim or any(isinstance(p, (list, bool, np.bool_)) for p in parts):
        return None
    (place,) = at
    arrays = [k for k, p in enumerate(parts) if k == place or isinstance(p, (int, np.integer))]
    if arrays != list(range(arrays[0], arrays[-1] + 1)):
        return None  # a number counts as an array here, and what lies between the two moves
    mask = as_handle(parts[place])
    parts[place : place + 1] = [slice(None)] * mask.ndim
    map = index_map(tuple(parts), x.shape)
    view = x if map.is_identity(x.shape) else view_of(x, map)
    after = parts[place + mask.ndim :]
    behind = sum(p is None or isinstance(p, slice) for p in after)
    if Ellipsis in after or Ellipsis not in parts:  # the axes that the key does not name
        behind += x.ndim - sum(p is not None and p is not Ellipsis for p in parts)
    own = view.shape[view.ndim - behind - mask.ndim : view.ndim - behind]
    if own != mask.shape:
        raise IndexError(f"a mask of shape {mask.shape} for axes of lengths {own} of an array of shape {x.shape}: they must be the same")
    return view, mask, behind
