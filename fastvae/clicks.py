"""Clicks: the click matrix x (users x items) as CSR tensors on one device.

The whole matrix lives on the device and a batch is a vector of row ids: ``clicks.rows(ids)`` shares the
three arrays and costs nothing, and the ops read ``indptr[rows[u]] .. indptr[rows[u] + 1]`` themselves.
Everything that would need a look at the data (order, range, duplicates, zeros) is settled once, here, when
the matrix is built; the ops never check it again.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from ._csr import canonical, check_csr, index_array, size_of, value_array
from ._matrices import csr_of, csr_of_pairs

Csr = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # indptr, indices, values, row_ids


class Clicks:
    """A click matrix x [n_users, n_items] in canonical CSR: sorted rows, no duplicates, no stored zeros.

    >>> x = Clicks([0, 2, 2, 3], [4, 0, 1], n_items=5)
    >>> x
    Clicks(n_users=3, n_items=5, nnz=3, binary, cpu)
    >>> x.rows([2, 0]).to_dense().tolist()
    [[0.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 1.0]]

    indptr   [n_users + 1]  int64   row u is indices[indptr[u]:indptr[u + 1]]
    indices  [nnz]          int32   item of each click
    values   [nnz]          float32 in [1e-12, 1e12], or None where every click counts one
    n_items  int            number of columns, below 2**31
    row_ids  [n] int64, or None: this object is that choice of rows of the shared arrays

    Duplicates given to the constructor are added up and stored zeros are dropped.

    Raises: ValueError where the arrays do not describe such a matrix, or a value is negative, not finite or out of
    range: beyond it the square sum of a row leaves fp32. TypeError where the indices are not integers.
    Source: scipy.sparse.csr_array for the layout.
    """

    @torch.inference_mode(False)  # training must be able to keep the arrays
    def __init__(self, indptr: Any, indices: Any, values: Any = None, n_items: int | None = None):
        indptr, indices = index_array("indptr", indptr), index_array("indices", indices)
        values = None if values is None else value_array(values)
        n_items = size_of("items", indices, n_items)
        check_csr(indptr, indices, values, n_items)
        indptr, indices, values = canonical(indptr, indices, values, n_items)
        self._set(
            torch.from_numpy(indptr.astype(np.int64)),
            torch.from_numpy(indices.astype(np.int32)),
            None if values is None else torch.from_numpy(values.astype(np.float32)),
            n_items,
        )

    def _set(
        self,
        indptr: Tensor,
        indices: Tensor,
        values: Tensor | None,
        n_items: int,
        row_ids: Tensor | None = None,
    ) -> None:
        self.indptr, self.indices, self.values = indptr, indices, values
        self.n_items, self.row_ids = n_items, row_ids

    @staticmethod
    def of_checked(indptr, indices, values, n_items, row_ids=None) -> Clicks:
        """Clicks of arrays that are canonical already: nothing is looked at."""
        other = object.__new__(Clicks)
        other._set(indptr, indices, values, n_items, row_ids)
        return other

    _like = of_checked

    @classmethod
    def from_matrix(cls, x: Any) -> Clicks:
        """Clicks from any container: scipy sparse (any format and dtype), torch CSR / CSC / COO / dense, numpy.

        >>> Clicks.from_matrix(np.array([[0, 2], [1, 0]])).values
        tensor([2., 1.])

        A torch tensor's device is kept. Raises: TypeError for any other container, ValueError as the constructor.
        """
        if isinstance(x, Clicks):
            return x
        clicks = cls(*csr_of(x))
        return clicks.to(x.device) if isinstance(x, Tensor) else clicks

    @classmethod
    def from_pairs(
        cls,
        users: Any,
        items: Any,
        n_users: int | None = None,
        n_items: int | None = None,
        counts: bool = False,
    ) -> Clicks:
        """Clicks from two equally long integer arrays of users and items.

        >>> Clicks.from_pairs([0, 0, 0], [0, 0, 1]).nnz
        2
        >>> Clicks.from_pairs([0, 0, 0], [0, 0, 1], counts=True).values
        tensor([2., 1.])

        A pair that comes twice counts once, or twice with counts=True. n_users and n_items default to the
        largest index plus one. Raises: ValueError for lengths that differ or an index out of range; ids of another
        kind, or with wide gaps, have to be numbered first (fastvae.data does).
        """
        users, items = index_array("users", users), index_array("items", items)
        if users.shape != items.shape:
            raise ValueError(
                f"Clicks: users and items must be equally long, got {len(users)} and {len(items)}"
            )
        n_users, n_items = size_of("users", users, n_users), size_of("items", items, n_items)
        ones, names = np.ones(len(users)), ("users", "items")
        clicks = cls(*csr_of_pairs(users, items, ones, (n_users, n_items), names))
        return clicks if counts else clicks.binary()

    # sizes

    @property
    def n_users(self) -> int:
        """Number of rows of this batch or matrix."""
        return len(self.indptr) - 1 if self.row_ids is None else len(self.row_ids)

    @property
    def shape(self) -> tuple[int, int]:
        """(n_users, n_items)."""
        return self.n_users, self.n_items

    @property
    def csr(self) -> Csr:
        """indptr, indices, values and row_ids: the clicks as the ops take them.

        Raises: ValueError where other values have been put in place that do not fit the indices.
        """
        # the kernels read one number after the other, whatever has been put in an attribute's place
        values = None if self.values is None else self.values.contiguous()
        if values is not None and (
            values.shape != self.indices.shape or values.device != self.indices.device
        ):
            raise ValueError(
                f"Clicks: values must have shape {list(self.indices.shape)} on {self.indices.device} like indices, "
                f"got {list(values.shape)} on {values.device}"
            )
        row_ids = None if self.row_ids is None else self.row_ids.contiguous()
        return self.indptr.contiguous(), self.indices.contiguous(), values, row_ids

    @property
    def nnz(self) -> int:
        """Number of clicks; of a choice of rows on a GPU this waits for the device."""
        return len(self.indices) if self.row_ids is None else int(self.row_lengths().sum())

    @property
    def device(self) -> torch.device:
        """Device of the arrays."""
        return self.indptr.device

    def __len__(self) -> int:
        return self.n_users

    def __repr__(self) -> str:
        kind = "binary" if self.values is None else "counts"
        return f"Clicks(n_users={self.n_users}, n_items={self.n_items}, nnz={self.nnz}, {kind}, {self.device})"

    def row_lengths(self) -> Tensor:
        """Distinct items of each user, int64 [n_users]."""
        lengths = self.indptr[1:] - self.indptr[:-1]
        return lengths if self.row_ids is None else lengths[self.row_ids]

    def row_sums(self) -> Tensor:
        """Clicks N_u of each user, float32 [n_users]; the row length where all values are one."""
        if self.values is None:
            return self.row_lengths().float()
        # on a GPU over the whole matrix: to gather the batch's clicks would wait for the device to count them
        part = self.compact() if self.device.type == "cpu" else self
        values = part.values.detach().double()  # type: ignore[union-attr]
        sums = torch.segment_reduce(values, "sum", offsets=part.indptr, unsafe=True).float()
        return sums if part.row_ids is None else sums[part.row_ids]

    def fingerprint(self) -> str:
        """A digest of the matrix: equal for equal clicks, and for no others that anybody will meet."""
        part = self.compact().to("cpu")
        digest = hashlib.sha256(repr((part.shape, part.values is None)).encode())
        for array in (part.indptr, part.indices, part.values):
            if array is not None:
                digest.update(array.numpy().tobytes())
        return digest.hexdigest()[:32]

    # moving and choosing

    @torch.inference_mode(False)
    def to(self, device: Any, non_blocking: bool = False) -> Clicks:
        """The same clicks on another device; non_blocking as torch's Tensor.to.

        Raises: TypeError where device is none.
        """
        try:
            device = torch.device(device)
        except (TypeError, RuntimeError):
            raise TypeError(
                f"Clicks: device must be a torch device such as 'cuda', got {device!r}"
            ) from None
        arrays = (self.indptr, self.indices, self.values, self.row_ids)
        indptr, indices, values, row_ids = (
            None if array is None else array.to(device, non_blocking=non_blocking)
            for array in arrays
        )
        return self._like(indptr, indices, values, self.n_items, row_ids)

    def rows(self, ids: Any) -> Clicks:
        """Rows ids (any order, repeats allowed) as a view that shares the arrays; nothing is copied.

        ids  [n] integers in [0, n_users); a row that comes twice has the same dropout mask twice. Their range is
             checked on the CPU; on a GPU that would make the host wait.
        Raises: ValueError for ids out of range, TypeError for ids that are not integers.
        """
        if not isinstance(ids, Tensor):
            # by numpy: torch would read a pandas.Series by its labels, and make a tensor on its default device
            ids = torch.from_numpy(index_array("rows", ids))
        if ids.numel() == 0:
            ids = ids.long()
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"Clicks: rows must be integers, got {dtype_name(ids.dtype)}")
        # torch cannot compare its uint16, uint32, uint64; the kernels read ids one after the other
        ids = ids.long().contiguous()
        if ids.ndim != 1:
            raise ValueError(f"Clicks: rows must have 1 dimension, got {ids.ndim}")
        if ids.device.type == "cpu" and len(ids) and not 0 <= ids.min() <= ids.max() < self.n_users:
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise ValueError(f"Clicks: rows must lie in [0, {self.n_users}), got {bad}")
        # memory of its own: whoever fills an array of ids anew would choose other rows, which nobody has checked
        ids = ids.clone() if ids.device == self.device else ids.to(self.device)
        row_ids = ids if self.row_ids is None else self.row_ids.index_select(0, ids)
        return self._like(self.indptr, self.indices, self.values, self.n_items, row_ids)

    def compact(self) -> Clicks:
        """The chosen rows with arrays of their own; a whole matrix returns itself."""
        if self.row_ids is None:
            return self
        indptr, position = gather_rows(self.indptr, self.row_ids)
        values = None if self.values is None else self.values[position]
        return self._like(indptr, self.indices[position], values, self.n_items)

    def where(self, keep: Tensor) -> Clicks:
        """Only the clicks where keep [nnz] is true; the shape stays."""
        part = self.compact()
        before = torch.nn.functional.pad(torch.cumsum(keep, 0), (1, 0))
        values = None if part.values is None else part.values[keep]
        return self._like(before[part.indptr], part.indices[keep], values, self.n_items)

    def binary(self) -> Clicks:
        """The same clicks, each counted once."""
        return self._like(self.indptr, self.indices, None, self.n_items, self.row_ids)

    def transpose(self) -> Clicks:
        """Clicks of items: row i holds the users of item i [n_items, n_users]."""
        part = self.compact()
        users = torch.repeat_interleave(part.row_lengths())
        order = torch.argsort(part.indices, stable=True)
        indptr = torch.zeros(self.n_items + 1, dtype=torch.int64, device=self.device)
        counts = torch.bincount(part.indices, minlength=self.n_items)
        torch.cumsum(counts, 0, out=indptr[1:])
        values = None if part.values is None else part.values[order]
        return self._like(indptr, users[order].int(), values, self.n_users)

    def to_scipy(self) -> sp.csr_array:
        """A scipy.sparse.csr_array of float32 on the host."""
        part = self.compact().to("cpu")
        values = (
            np.ones(part.nnz, np.float32) if part.values is None else part.values.numpy().copy()
        )
        arrays = (values, part.indices.numpy().copy(), part.indptr.numpy().copy())
        return sp.csr_array(arrays, shape=self.shape)

    def to_dense(self) -> Tensor:
        """A dense float32 tensor [n_users, n_items]; for tests and for models that need it."""
        part = self.compact()
        dense = torch.zeros(self.shape, dtype=torch.float32, device=self.device)
        users = torch.repeat_interleave(part.row_lengths())
        dense[users, part.indices.long()] = 1.0 if part.values is None else part.values
        return dense


def gather_rows(indptr: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Offsets of a choice of rows and, for each of its clicks, the position in the whole matrix.

    indptr   [n_users + 1] int64
    rows     [n] int64, or None for all rows in order
    returns  offsets [n + 1] int64, position [nnz of the choice] int64
    """
    if rows is None:
        return indptr, torch.arange(int(indptr[-1]), device=indptr.device)
    begin = indptr[rows]
    lengths = indptr[rows + 1] - begin
    offsets = torch.zeros(len(rows) + 1, dtype=torch.int64, device=indptr.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    position = torch.repeat_interleave(begin - offsets[:-1], lengths)
    position += torch.arange(len(position), device=indptr.device)
    return offsets, position


def dtype_name(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")
