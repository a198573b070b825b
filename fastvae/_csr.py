"""What the constructor of Clicks does with arrays on the host: numbers of the right kind, checks, canonical order.

Messages name the row and the position, for the ops never look at the data again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

# the squares of a row and their sum stay within fp32
VALUE_RANGE = 1e-12, 1e12


def _host(array: Any) -> np.ndarray:
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        array = array.double() if array.dtype in (torch.bfloat16, torch.float16) else array
        return array.numpy()
    return np.asarray(array)


def index_array(name: str, array: Any) -> np.ndarray:
    """An int64 array on the host; TypeError unless array holds integers."""
    array = _host(array)
    if array.ndim != 1:
        raise ValueError(f"Clicks: {name} must have 1 dimension, got {array.ndim}")
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"Clicks: {name} must be integers, got {array.dtype}")
    if array.dtype == np.uint64 and len(array) and array.max() >= 2**63:
        raise ValueError(f"Clicks: {name} must lie below 2**63, got {array.max()}")
    return array.astype(np.int64, copy=False)


def value_array(array: Any) -> np.ndarray:
    """A float64 array on the host; TypeError unless array holds real numbers."""
    array = _host(array)
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
    if len(indptr) == 0 or indptr[0] != 0:
        raise ValueError(f"Clicks: indptr must start with 0, got {indptr[:1].tolist()}")
    steps = np.diff(indptr)
    if len(steps) and steps.min() < 0:
        row = int(np.argmax(steps < 0))
        raise ValueError(
            f"Clicks: indptr must not decrease, got {indptr[row]} then {indptr[row + 1]} at row {row}"
        )
    if indptr[-1] != len(indices):
        raise ValueError(
            f"Clicks: indptr must end with the number of indices {len(indices)}, got {indptr[-1]}"
        )
    _check_entries(
        indptr, "indices", indices, (indices < 0) | (indices >= n_items), f"lie in [0, {n_items})"
    )
    if values is not None:
        if values.shape != indices.shape:
            raise ValueError(
                f"Clicks: values must have shape [{len(indices)}], got {list(values.shape)}"
            )
        _check_entries(indptr, "values", values, ~np.isfinite(values), "be finite")
        _check_entries(indptr, "values", values, values < 0, "not be negative")
        _check_range(indptr, values)


def _check_range(indptr: np.ndarray, values: np.ndarray) -> None:
    low, high = VALUE_RANGE
    outside = (values > 0) & (values < low) | (values > high)
    _check_entries(indptr, "values", values, outside, f"be 0 or lie in [{low:g}, {high:g}]")


def _check_entries(indptr, name: str, array, wrong, expected: str) -> None:
    if wrong.any():
        n = int(np.argmax(wrong))
        row = int(np.searchsorted(indptr, n, side="right")) - 1
        raise ValueError(
            f"Clicks: {name} must {expected}, got {array[n]} at row {row}, position {n}"
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
