"""Reading a click matrix in CSR: what the kernels of several ops share.

A launcher takes the matrix as one tuple, Csr: user u of the batch is matrix row rows[u], whose clicks lie at the
positions indptr[rows[u]] .. indptr[rows[u] + 1] of indices and values.
"""

import triton
import triton.language as tl
from torch import Tensor

# indptr [n_rows + 1] int64; indices [nnz] int32, sorted and distinct in each row; values [nnz] fp32, or None where
# every click counts one; rows [n_users] int64, contiguous, or None for all rows in order
Csr = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def n_users_of(csr: Csr) -> int:
    """Users of the batch."""
    indptr, _, _, rows = csr
    return (indptr.shape[0] - 1) if rows is None else rows.shape[0]


def check_rows(csr: Csr) -> None:
    """Refuse row ids that don't lie side by side: a kernel would read other users."""
    rows = csr[3]
    if rows is not None and not rows.is_contiguous():
        raise ValueError(f"kernels: rows must be contiguous, got stride {rows.stride(0)}")


@triton.jit
def row_clicks(u, indptr_ptr, rows_ptr):
    """Where the clicks of the batch's user u begin and end; without rows_ptr user u is matrix row u."""
    row = u
    if rows_ptr is not None:
        row = tl.load(rows_ptr + u)
    return tl.load(indptr_ptr + row), tl.load(indptr_ptr + row + 1)


@triton.jit
def click_values(values_ptr, n, mask_n):
    """Values of clicks n, and 0 outside the mask; without values_ptr every click counts one."""
    x = mask_n.to(tl.float32)
    if values_ptr is not None:
        x = tl.load(values_ptr + n, mask=mask_n, other=0.0)
    return x


@triton.jit
def row_sum(values_ptr, begin, end, BLOCK_NNZ: tl.constexpr):
    """N[u], the sum of a row's values; its length without values_ptr."""
    total = (end - begin).to(tl.float32)
    if values_ptr is not None:
        x = tl.zeros([BLOCK_NNZ], tl.float32)
        for start in range(begin, end, BLOCK_NNZ):
            n = start + tl.arange(0, BLOCK_NNZ)
            x += click_values(values_ptr, n, n < end)
        total = tl.sum(x, axis=0)
    return total
