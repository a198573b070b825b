"""Any container of a matrix as CSR arrays. Neither scipy nor torch validates sparse matrices, and both read them in C.

So the arrays of a container are checked as they are, before anything converts them: a wrong offset or index would
otherwise read other users' clicks or foreign memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from ._csr import check_offsets, host_array, index_array, value_array

_ACCEPTED = "a scipy sparse matrix, a torch tensor (dense, CSR or COO), a 2-D numpy array or Clicks"
_PAIR = "row indices", "column indices"
_TORCH_COMPRESSED = {
    torch.sparse_csr: "row", torch.sparse_bsr: "row", torch.sparse_csc: "column", torch.sparse_bsc: "column",
}  # fmt: skip
_SCIPY_COMPRESSED = {"csr": "row", "bsr": "row", "csc": "column"}


class CsrArrays(NamedTuple):
    """What Clicks is made of; the constructor checks and sorts."""

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    n_items: int


def csr_of(x: Any) -> CsrArrays:
    """CSR arrays of a scipy sparse matrix, a torch tensor or a numpy array, on the host.

    Raises: TypeError for any other container; ValueError where its arrays do not describe a matrix of its shape.
    """
    if isinstance(x, Tensor):
        return _of_torch(x)
    is_array = isinstance(x, np.ndarray) and not np.ma.isMaskedArray(x)
    if not (sp.issparse(x) or is_array) or x.ndim != 2:
        got = type(x).__name__ + (f" of {x.ndim} dimensions" if hasattr(x, "ndim") else "")
        raise TypeError(f"Clicks: x must be {_ACCEPTED}, got {got}")
    return _of_dense(np.asarray(x)) if is_array else _of_scipy(x)


def csr_of_pairs(
    rows: Any, columns: Any, values: Any, shape: tuple[int, int], names: tuple[str, str] = _PAIR
) -> CsrArrays:
    """CSR arrays of equally long coordinate lists, which may be in any order and repeat; their range is checked."""
    rows, columns = index_array(names[0], rows), index_array(names[1], columns)
    if not len(rows) == len(columns) == len(values):
        raise ValueError(
            f"Clicks: {names[0]}, {names[1]} and values must be equally long, "
            f"got {len(rows)}, {len(columns)} and {len(values)}"
        )
    for name, indices, size in zip(names, (rows, columns), shape, strict=True):
        wrong = (indices < 0) | (indices >= size)
        if wrong.any():
            n = int(np.argmax(wrong))
            raise ValueError(
                f"Clicks: {name} must lie in [0, {size}), got {indices[n]} at position {n}"
            )
    order = np.argsort(rows, kind="stable")
    indptr = np.zeros(shape[0] + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=shape[0]), out=indptr[1:])
    return CsrArrays(indptr, columns[order], values[order], int(shape[1]))


def _of_dense(x: np.ndarray) -> CsrArrays:
    value_array(x[:0])  # refuses what are no numbers
    rows, columns = np.nonzero(x)
    return csr_of_pairs(rows, columns, x[rows, columns], x.shape)


def _of_scipy(x: Any) -> CsrArrays:
    if x.format in _SCIPY_COMPRESSED:
        indptr, indices, data = index_array("indptr", x.indptr), x.indices, x.data
        # room beyond the last offset is scipy's to keep
        end = int(indptr[-1]) if len(indptr) and 0 <= indptr[-1] <= len(indices) else None
        axis = _SCIPY_COMPRESSED[x.format]
        return _of_compressed(indptr, indices[:end], host_array(data[:end]), x.shape, axis)
    if x.format == "lil":
        sizes, others = (np.array([len(row) for row in part]) for part in (x.rows, x.data))
        if len(sizes) != x.shape[0] or not np.array_equal(sizes, others):
            raise ValueError(
                f"Clicks: x must hold {x.shape[0]} rows with a value for each index, "
                f"got {sizes.sum()} indices in {len(sizes)} rows and {others.sum()} values"
            )
        rows = np.repeat(np.arange(len(sizes)), sizes)
        columns = [column for row in x.rows for column in row]
        values = np.array([value for row in x.data for value in row])
        return csr_of_pairs(rows, columns, values, x.shape)
    if x.format == "dok":
        pairs = np.array(list(x.keys()), np.int64).reshape(-1, 2)
        return csr_of_pairs(pairs[:, 0], pairs[:, 1], np.array(list(x.values())), x.shape)
    if x.format == "dia" and len(x.offsets) != len(x.data):
        raise ValueError(
            f"Clicks: x must hold a diagonal for each of {len(x.offsets)} offsets, got {len(x.data)}"
        )
    x = x.tocoo()
    return csr_of_pairs(x.row, x.col, host_array(x.data), x.shape)


def _of_torch(x: Tensor) -> CsrArrays:
    # tensors without numbers of their own, and those of other libraries that only torch's calls can read
    kinds = {"nested": x.is_nested, "meta": x.is_meta, "quantized": x.is_quantized}
    is_wrapper = type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if is_wrapper or any(kinds.values()):
        got = next((kind for kind, holds in kinds.items() if holds), type(x).__name__)
        raise TypeError(f"Clicks: x must be {_ACCEPTED}, got a {got} one")
    if x.ndim != 2:
        raise ValueError(f"Clicks: x must have 2 dimensions, got {x.ndim}")
    x = x.detach()
    if x.layout == torch.strided:
        return _of_dense(host_array(x))
    if x.layout not in (torch.sparse_coo, *_TORCH_COMPRESSED):
        layout = str(x.layout).removeprefix("torch.")
        raise TypeError(f"Clicks: x must be {_ACCEPTED}, got a tensor of layout {layout}")
    shape = int(x.shape[0]), int(x.shape[1])
    values = x._values() if x.layout == torch.sparse_coo else x.values()
    dims = 3 if x.layout in (torch.sparse_bsr, torch.sparse_bsc) else 1
    if values.ndim != dims:
        raise ValueError(
            f"Clicks: x must hold numbers, got vectors of shape {list(values.shape[dims:])}"
        )
    if x.layout == torch.sparse_coo:
        rows, columns = host_array(x._indices())
        return csr_of_pairs(rows, columns, host_array(values), shape)
    axis = _TORCH_COMPRESSED[x.layout]
    offsets = x.crow_indices() if axis == "row" else x.ccol_indices()
    indices = x.col_indices() if axis == "row" else x.row_indices()
    return _of_compressed(host_array(offsets), host_array(indices), host_array(values), shape, axis)


def _of_compressed(indptr, indices, values, shape, axis: str) -> CsrArrays:
    """CSR arrays of compressed rows or columns; values [nnz], or [nnz, r, c] for blocks."""
    indptr, indices = index_array("indptr", indptr), index_array("indices", indices)
    height, width = values.shape[1:] or (1, 1)
    rows, columns = shape[0] // height, shape[1] // width
    n, size = (rows, columns) if axis == "row" else (columns, rows)
    if len(indptr) != n + 1 or len(values) != len(indices):
        raise ValueError(
            f"Clicks: x must hold {n + 1} offsets, and a value for each index, "
            f"got {len(indptr)} offsets, {len(indices)} indices and {len(values)} values"
        )
    check_offsets(indptr, indices, size, axis)
    if axis == "row" and values.ndim == 1:
        return CsrArrays(indptr, indices, values, int(shape[1]))
    places = np.repeat(np.arange(n), np.diff(indptr))
    row, column = (places, indices) if axis == "row" else (indices, places)
    row = row[:, None, None] * height + np.arange(height)[:, None]
    column = column[:, None, None] * width + np.arange(width)
    row, column = (part.ravel() for part in np.broadcast_arrays(row, column))
    return csr_of_pairs(row, column, values.ravel(), shape)
