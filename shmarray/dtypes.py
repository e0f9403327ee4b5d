"""Which dtypes an array may have, and which dtype an operation gives: NumPy is asked, on arrays of no elements.

Never put here: a promotion rule of our own. `result_dtypes` runs the operation itself on empty arrays, so that NEP 50, the
errors for unsupported types and for Python integers out of bounds are NumPy's to the letter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["cast_dtype", "checked_dtype", "result_dtypes"]


def checked_dtype(dtype: Any, what: str = "array") -> np.dtype[Any]:
    """Return the NumPy dtype, refusing those whose elements are not plain bytes. A string without a length gets NumPy's.

    Raises TypeError for an unknown dtype, and for object and variable-width string dtypes.
    """
    result: np.dtype[Any] = np.dtype(dtype)
    if result.hasobject or result.kind == "T":
        raise TypeError(
            f"{what} has dtype {result}, whose elements are Python objects: they cannot lie in shared memory. "
            f"Convert first, for example with astype(float) or to a fixed-width string such as 'U16'."
        )
    return result if result.itemsize or result.names is not None else np.empty(0, result).dtype


def cast_dtype(source: np.dtype[Any], dtype: Any) -> np.dtype[Any]:
    """Return the dtype of an array of dtype ``source`` after ``astype(dtype)``: NumPy finds lengths of strings and units of dates."""
    wanted: np.dtype[Any] = np.dtype(dtype)
    has_no_length = wanted.kind in "SUV" and not wanted.itemsize and wanted.names is None
    has_no_unit = wanted.kind in "mM" and source.kind == wanted.kind and np.datetime_data(wanted)[0] == "generic"
    return checked_dtype(np.zeros(1, source).astype(wanted).dtype if has_no_length or has_no_unit else wanted)


def result_dtypes(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[np.dtype[Any], ...]:
    """Return the dtypes of what ``function`` gives for arguments that are dtypes (arrays) or scalars (taken as they are)."""
    empty = [np.empty(0, a) if isinstance(a, np.dtype) else a for a in args]
    with np.errstate(all="ignore"):
        result = function(*empty, **kwargs)
    outputs = result if isinstance(result, tuple) else (result,)
    return tuple(checked_dtype(np.asarray(out).dtype, "the result") for out in outputs)
