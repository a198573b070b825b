"""What the constructor of Clicks does with arrays on the host: numbers of the right kind, checks, canonical order.

Messages name the row and the position, for the ops never look at the data again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from torch import Tensor

# the squares of a row and their sum stay within fp32
VALUE_RANGE = 1e-12, 1e12


def host_array(array: Any) -> np.ndarray:
    """The numbers of a tensor or of anything that numpy takes."""
    if not isinstance(array, Tensor):
        return np.asarray(array)
    array = array.detach().cpu().resolve_conj().resolve_neg()
    # numpy has none of torch's newer dtypes
    is_narrow = array.is_floating_point() and array.dtype.itemsize < 4
    return (array.double() if is_narrow else array).numpy()


def index_array(name: str, array: Any) -> np.ndarray:
    """A contiguous int64 array on the host; TypeError unless array holds integers."""
    try:
        array = host_array(array)
    except ValueError:  # rows of several lengths
        raise TypeError(f"Clicks: {name} must be integers, got {repr(array)[:60]}") from None
    array = array.astype(np.int64) if array.size == 0 else array
    if array.dtype == object:  # pandas keeps its nullable integers so
        array = np.asarray(array.tolist())
    if array.dtype.kind not in "iu":
        raise TypeError(f"Clicks: {name} must be integers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"Clicks: {name} must have 1 dimension, got {array.ndim}")
    if array.dtype == np.uint64 and len(array) and array.max() >= 2**63:
        raise ValueError(f"Clicks: {name} must lie below 2**63, got {array.max()}")
    return np.ascontiguousarray(array, np.int64)


def value_array(array: Any) -> np.ndarray:
    """A float64 array on the host; TypeError unless array holds real numbers."""
    array = host_array(array)
    if array.dtype.kind not in "iufb":
        raise TypeError(f"Clicks: values must be real numbers, got {array.dtype}")
    # float64 before any sum: sums of uint8 wrap at 256, of float16 overflow at 65504
    return array.astype(np.float64, copy=False)


def size_of(name: str, ids: np.ndarray, size: int | None) -> int:
    """n_users or n_items: as given, or the largest id plus one."""
    if size is None:
        size = max(int(ids.max()) + 1, 1) if len(ids) else 0
    if not isinstance(size, int | np.integer) or isinstance(size, bool):
        raise TypeError(f"Clicks: n_{name} must be a whole number, got {size!r}")
    if not 0 <= size < 2**31:
        raise ValueError(
            f"Clicks: n_{name} must lie in [0, 2**31), got {size}; number the {name} from 0 without gaps"
        )
    return int(size)


def check_csr(
    indptr: np.ndarray, indices: np.ndarray, values: np.ndarray | None, n_items: int
) -> None:
    """ValueError unless the arrays describe a matrix; its rows need not be sorted."""
    check_offsets(indptr, indices, n_items)
    if values is not None:
        if values.shape != indices.shape:
            raise ValueError(
                f"Clicks: values must have shape [{len(indices)}], got {list(values.shape)}"
            )
        _check_entries(indptr, "values", values, ~np.isfinite(values), "be finite")
        _check_entries(indptr, "values", values, values < 0, "not be negative")
        _check_range(indptr, values)


def check_offsets(indptr: np.ndarray, indices: np.ndarray, size: int, axis: str = "row") -> None:
    """ValueError unless indptr cuts indices into rows (or columns, blocks) and all of them lie in [0, size)."""
    if len(indptr) == 0 or indptr[0] != 0:
        raise ValueError(f"Clicks: indptr must start with 0, got {indptr[:1].tolist()}")
    steps = np.diff(indptr)
    if len(steps) and steps.min() < 0:
        n = int(np.argmax(steps < 0))
        raise ValueError(
            f"Clicks: indptr must not decrease, got {indptr[n]} then {indptr[n + 1]} at {axis} {n}"
        )
    if indptr[-1] != len(indices):
        raise ValueError(
            f"Clicks: indptr must end with the number of indices {len(indices)}, got {indptr[-1]}"
        )
    wrong = (indices < 0) | (indices >= size)
    _check_entries(indptr, "indices", indices, wrong, f"lie in [0, {size})", axis)


def _check_range(indptr: np.ndarray, values: np.ndarray) -> None:
    low, high = VALUE_RANGE
    outside = (values > 0) & (values < low) | (values > high)
    _check_entries(indptr, "values", values, outside, f"be 0 or lie in [{low:g}, {high:g}]")


def _check_entries(indptr, name: str, array, wrong, expected: str, axis: str = "row") -> None:
    if wrong.any():
        n = int(np.argmax(wrong))
        place = int(np.searchsorted(indptr, n, side="right")) - 1
        raise ValueError(
            f"Clicks: {name} must {expected}, got {array[n]} at {axis} {place}, position {n}"
        )


def canonical(indptr, indices, values, n_items):
    """The same matrix with sorted rows, no duplicates and no zeros; values None where all are one."""
    if values is not None and (values == 0).any():
        keep = values != 0
        indptr = np.concatenate(([0], np.cumsum(keep)))[indptr]
        indices, values = indices[keep], values[keep]
    users = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    same_row = users[1:] == users[:-1]
    if not ((indices[1:] > indices[:-1]) | ~same_row).all():
        data = np.ones(len(indices)) if values is None else values
        csr = sp.csr_array((data, indices, indptr), shape=(len(indptr) - 1, n_items))
        csr.sum_duplicates()
        indptr, indices, values = csr.indptr, csr.indices, csr.data
        _check_range(indptr, values)
    if values is not None and (values == 1).all():
        values = None
    return indptr, indices, values
