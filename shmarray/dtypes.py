"""Which dtypes an array may have, and which dtype an operation gives: NumPy is asked, on arrays of no elements.

Never put here: a promotion rule of our own. `result_dtypes` runs the operation itself on empty arrays, so that NEP 50, the
errors for unsupported types and for Python integers out of bounds are NumPy's to the letter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["checked_dtype", "result_dtypes"]


def checked_dtype(dtype: Any, what: str = "array") -> np.dtype[Any]:
    """Return the NumPy dtype, refusing those whose elements are not plain bytes.

    Raises TypeError for an unknown dtype, and for object and variable-width string dtypes.
    """
    result: np.dtype[Any] = np.dtype(dtype)
    if result.hasobject or result.kind == "T":
        raise TypeError(
            f"{what} has dtype {result}, whose elements are Python objects: they cannot lie in shared memory. "
            f"Convert first, for example with astype(float) or to a fixed-width string such as 'U16'."
        )
    return result


def result_dtypes(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[np.dtype[Any], ...]:
    """Return the dtypes of what ``function`` gives for arguments that are dtypes (arrays) or scalars (taken as they are)."""
    empty = [np.empty(0, a) if isinstance(a, np.dtype) else a for a in args]
    with np.errstate(all="ignore"):
        result = function(*empty, **kwargs)
    outputs = result if isinstance(result, tuple) else (result,)
    return tuple(checked_dtype(np.asarray(out).dtype, "the result") for out in outputs)
