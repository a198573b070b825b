"""The last dense layer and the multinomial nll of its logits, which are never returned.

    logits[u, i] = hidden[u] . weight[i] + bias[i]
    nll[u]       = sum_i x[u, i] * (log sum_j exp(logits[u, j]) - logits[u, i])

Scaled exponentials: with any row constant k[u] near the row's largest logit

    E[u, i] = exp(logits[u, i] - k[u])          S[u] = sum_i E[u, i]        v[u] = N[u] / S[u],  N[u] = sum_i x[u, i]
    D[u, i] = E[u, i] - x[u, i] / v[u]          dlogits = dnll * v * D
    dhidden = (dnll v) * (D weight)             dweight = D^T ((dnll v) * hidden)             dbias = D^T (dnll v)

so one [n_users, n_items] buffer serves both products of the backward; dnll is a row factor that need not be known. k
cancels exactly. S sums E as rounded for storage, so D sums to zero over a row and stays exact where one item takes
nearly all of the softmax.

Two ways to E. Where a row fits the cache: the vendor's product into the buffer, and one pass in place (k is the row's
maximum). Where it does not, or no buffer is wanted: a GEMM of our own with the exponential in its epilogue (k from a
probe of some items; a row with a logit far above it is done again).

No product has n_items as a dimension: the vendor's libraries are three times slower where it is no multiple of 8. The
buffer is padded with zeros; a weight that had to be cast is padded likewise, any other is multiplied in two pieces.
fastvae.ops has the same functions for the CPU, by the same names.
Math: Liang et al. 2018, eq. 2 (arXiv:1802.05814). Reference: fastvae.reference.linear_multinomial_nll.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .csr import Csr, check_rows, row_clicks, row_sum
from .exp_gemm import exp_gemm, store_results
from .exp_row import clicked_below, exponentials, largest_logit, subtract_clicks
from .launch import launch
from .products import cast_weight, logits, mm, pieces, stored_width

__all__ = [
    "Gradients",
    "cast_weight",
    "compute_dtype",
    "empty",
    "exp_rows",
    "stored_dtype",
    "stored_width",
]

ALIGN = 8  # columns of hidden's copy: 16 bytes of bf16


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _exp_row_kernel(
    e_ptr,  # in place: logits without bias become D
    bias_ptr, indptr_ptr, indices_ptr, values_ptr, rows_ptr,  # inputs
    results_ptr,  # outputs: nll, and behind all of it v
    n_items,  # sizes
    N_PADDED: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_NNZ: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(0).to(tl.int64)
    row_ptr = e_ptr + u * N_PADDED
    k = largest_logit(row_ptr, bias_ptr, n_items, N_PADDED, BLOCK_I)
    begin, end = row_clicks(u, indptr_ptr, rows_ptr)
    n_clicks = row_sum(values_ptr, begin, end, BLOCK_NNZ)
    # the clicked logits, while they are there
    below = clicked_below(row_ptr, bias_ptr, indices_ptr, values_ptr, begin, end, k, BLOCK_NNZ)
    total = exponentials(row_ptr, bias_ptr, k, n_items, N_PADDED, BLOCK_I)
    per_click = total / tl.maximum(n_clicks, 1e-30)
    store_results(results_ptr, u, n_clicks, total, n_clicks * tl.log(total) + below)
    # D, once all of E is there
    tl.debug_barrier()
    subtract_clicks(row_ptr, indices_ptr, values_ptr, begin, end, per_click, BLOCK_NNZ)


@triton.jit(do_not_specialize_on_alignment=["dnll_ptr", "v_ptr"])
def _scale_hidden_kernel(
    hidden_ptr, dnll_ptr, v_ptr,  # inputs
    scaled_ptr, factor_ptr,  # outputs
    stride_dnll_u,  # strides, in elements
    N_HIDDEN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # (dnll v) * (hidden | 1 | 0): the further columns give dbias out of dweight's product
    u = tl.program_id(0).to(tl.int64)
    factor = tl.load(dnll_ptr + u * stride_dnll_u).to(tl.float32) * tl.load(v_ptr + u)
    tl.store(factor_ptr + u, factor)
    d = tl.arange(0, BLOCK_D)
    scaled = tl.load(hidden_ptr + u * N_HIDDEN + d, mask=d < N_HIDDEN, other=0.0).to(tl.float32)
    scaled *= factor
    # in two halves: a factor rounded to bf16 would tilt a whole row
    high = factor.to(scaled_ptr.dtype.element_ty).to(tl.float32)
    scaled = tl.where(d == N_HIDDEN, high, scaled)
    scaled = tl.where(d == N_HIDDEN + 1, factor - high, scaled)
    tl.store(scaled_ptr + u * WIDTH + d, scaled, mask=d < WIDTH)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What inputs of this type are multiplied in: as they are."""
    return dtype


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the buffer for inputs of this type.

    bf16 keeps bf16. fp16 keeps fp32: fp16 itself ends at exp(11) and loses softmax values below 6e-5, the average at
    16,000 items; bf16 has the range, but not the eleven bits that plain torch works with at fp16.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def empty(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The buffer."""
    return torch.empty(shape, dtype=dtype, device=device)


def exp_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, csr: Csr, n_items: int, d: Tensor | None,
    fused: bool | None = None, tile: tiles.GemmTile | None = None, row_tile: tiles.RowTile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """nll and v of some users, and D in d. Arguments are already checked by fastvae.ops.

    hidden   [n_users, n_hidden]  fp32, bf16 or fp16; contiguous
    weight   [>= n_items, n_hidden]  dtype of hidden, from cast_weight
    bias     [n_items]            any float; contiguous, or None. Padded to the buffer's width and in hidden's dtype, as the
             weight is, it is added in the product of many users
    csr      the clicks of these users, see kernels/csr.py
    d        [n_users, stored_width] of stored_dtype, to be written; without it nothing of its size is made
    fused    exponentials in our GEMM's epilogue, or the vendor's GEMM and a pass over its result; by the table if None
    tile, row_tile  launch configurations of our GEMM and of the pass, from the table by default
    returns  nll [n_users] fp32 (nats), v [n_users] fp32
    """
    check_rows(csr)
    n_users = hidden.shape[0]
    results = torch.empty(2, n_users, dtype=torch.float32, device=hidden.device)
    nll, v = results
    if n_users == 0 or n_items == 0:
        results.zero_()
        return nll, v
    kind = tiles.product_kind(hidden.dtype, torch.get_float32_matmul_precision() != "highest")
    if fused is None:
        fused = d is None or tiles.of(hidden.device).fuses(kind, d.shape[1])
    with tiles.device_guard(hidden):
        if fused or d is None:
            exp_gemm(hidden, weight, bias, csr, n_items, d, results, kind, tile)
        else:
            _product_rows(hidden, weight, bias, csr, n_items, d, results, row_tile)
    return nll, v


def _product_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, csr: Csr, n_items: int, d: Tensor, results: Tensor,
    tile: tiles.RowTile | None,
) -> None:  # fmt: skip
    wide = bias is not None and len(bias) == len(weight) == d.shape[1]
    many = len(hidden) >= tiles.MANY_USERS
    if bias is not None and wide and many and bias.dtype == hidden.dtype == d.dtype:
        # by the library's epilogue: the pass would read 160 KB of a bias for each row of 40 KB. For few users the
        # library's choice with an epilogue takes longer by more than that
        torch.addmm(bias, hidden, weight.t(), out=d)
        bias = None
    else:
        logits(hidden, weight, n_items, d)
    tile = tile or tiles.of(hidden.device).exp_row
    indptr, indices, values, rows = csr
    launch(
        _exp_row_kernel, (hidden.shape[0],),
        d,
        bias, indptr, indices, values, rows,
        results,
        n_items,
        N_PADDED=d.stride(0), BLOCK_I=tile.block_i, BLOCK_NNZ=tile.block_nnz, num_warps=tile.num_warps,
    )  # fmt: skip


def _scale_hidden(
    hidden: Tensor, v: Tensor, dnll: Tensor, dtype: torch.dtype, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """(dnll v) * (hidden | 1 | 0) in dtype, [n_users, n_hidden rounded up], and dnll v [n_users] fp32."""
    n_users, n_hidden = hidden.shape
    width = _scaled_width(n_hidden, need_bias)
    scaled = torch.empty(n_users, width, dtype=dtype, device=hidden.device)
    factor = torch.empty(n_users, dtype=torch.float32, device=hidden.device)
    with tiles.device_guard(hidden):
        launch(
            _scale_hidden_kernel, (n_users,),
            hidden, dnll, v,
            scaled, factor,
            dnll.stride(0),
            N_HIDDEN=n_hidden, WIDTH=width, BLOCK_D=tiles.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
    return scaled, factor


def _scaled_width(n_hidden: int, need_bias: bool) -> int:
    return tiles.cdiv(n_hidden + 2, ALIGN) * ALIGN if need_bias else n_hidden


class Gradients:
    """The products of the backward, some users after the other; nothing given is written to.

    hidden [n_users, n_hidden] any float, weight from cast_weight
    needs         whether the gradients of hidden, weight and bias are asked for
    weight_dtype  of the weight's gradient
    apart         whether the rows of the weight's gradient may lie apart at no cost
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, n_items: int, needs: tuple[bool, bool, bool], weight_dtype: torch.dtype,
        apart: bool = False,
    ):  # fmt: skip
        self.hidden, self.weight = hidden.to(weight.dtype).contiguous(), weight
        self.n_items, self.needs, self.weight_dtype = n_items, needs, weight_dtype
        self.dhidden = None
        if needs[0]:
            self.dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        n_users, n_hidden = hidden.shape
        self.columns = _columns(n_users, n_hidden, weight.dtype, needs[1], needs[2], apart)
        self.products: list[Tensor | None] = [None] * len(self.columns)

    def add(self, part: slice, d: Tensor, v: Tensor, dnll: Tensor) -> None:
        """Take a range of the users along; d and v from exp_rows, dnll [its n_users] of any float and stride."""
        scaled, factor = _scale_hidden(self.hidden[part], v, dnll, d.dtype, self.needs[2])
        if self.dhidden is not None:
            first, *others = pieces(self.n_items, self.weight.shape[0])
            product = mm(d[:, first], self.weight[first].to(d.dtype))
            for piece in others:
                product += mm(d[:, piece], self.weight[piece].to(d.dtype))
            torch.mul(product, factor[:, None], out=self.dhidden[part])
        for n, columns in enumerate(self.columns):
            product, total = mm(d.t(), scaled[:, columns]), self.products[n]
            self.products[n] = product if total is None else total.add_(product)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dhidden in hidden's dtype, dweight in weight_dtype (see new_dweight), dbias in fp32."""
        dweight = dbias = None
        n_hidden = self.hidden.shape[1]
        if self.needs[1]:
            dweight = self.products[0][: self.n_items, :n_hidden].to(self.weight_dtype)  # type: ignore[index]
        if self.needs[2]:
            first = n_hidden - self.columns[-1].start
            halves = self.products[-1][: self.n_items, first : first + 2]  # type: ignore[index]
            dbias = halves[:, 0] + halves[:, 1]
        return self.dhidden, dweight, dbias

    @staticmethod
    def new_dweight(
        hidden: Tensor, weight: Tensor, n_items: int, need_bias: bool, dtype: torch.dtype, apart: bool
    ) -> Tensor:  # fmt: skip
        """An empty dweight with its strides: fp32 rows lie as far apart as the product left them."""
        n_users, n_hidden = hidden.shape
        columns = _columns(n_users, n_hidden, weight.dtype, True, need_bias, apart)[0]
        width = columns.stop if dtype == torch.float32 else n_hidden
        return weight.new_empty((n_items, width), dtype=dtype)[:, :n_hidden]


def _columns(
    n_users: int, n_hidden: int, dtype: torch.dtype, need_weight: bool, need_bias: bool, apart: bool
) -> list[slice]:
    """Columns of the scaled hidden units for one product each with D^T: the weight's gradient, and the bias'."""
    width = _scaled_width(n_hidden, need_bias)
    if not need_weight:
        return [slice(n_hidden, width)] if need_bias else []
    # in one product the bias is free, but the weight's rows come to lie apart, and whoever wants them side by side, as
    # torch does for .grad, reads and writes them once more: 8 n_hidden bytes an item. Another product reads D again
    one = apart or not need_bias or n_users * stored_dtype(dtype).itemsize >= 8 * n_hidden
    return [slice(0, width)] if one else [slice(0, n_hidden), slice(n_hidden, width)]
