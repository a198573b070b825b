"""linear_multinomial_nll: the last layer and log-softmax x clicks in one op; logits never leave it.

CUDA tensors take the Triton kernels of fastvae.kernels.linear_multinomial_nll. CPU tensors take the functions below. Both
keep one [n_users, n_items] buffer, of scaled exponentials

    E[u, i] = exp(logits[u, i] - k[u]) - x[u, i] / v[u],    v[u] = N_u / sum_i exp(logits[u, i] - k[u])

so that dlogits = g v E and the upstream gradient g is a factor of a row: the backward is two plain GEMMs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..clicks import Clicks
from . import _buffers
from ._checks import (
    autocast_dtype,
    check_clicks,
    check_devices,
    check_dtypes,
    check_tensor,
    reduce_users,
)
from .multinomial_nll import Targets, row_blocks, sum_dtype

ITEMS_PER_GEMM = (
    512  # a [500, 600] x [600, 20108] product takes 101 ms whole, 70 ms in these pieces (2 cores)
)


def linear_multinomial_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    clicks: Clicks,
    *,
    reduction: str = "none",
    user_weights: Tensor | None = None,
) -> Tensor:
    """Multinomial negative log-likelihood of each user's clicks under softmax(hidden W^T + b).

        nll[u] = sum_i x[u, i] * (logsumexp(logits[u]) - logits[u, i]),    logits = hidden W^T + b

    >>> x = Clicks([0, 1], [2], n_items=4)
    >>> linear_multinomial_nll(torch.ones(1, 2), torch.zeros(4, 2), None, x)
    tensor([1.3863])

    hidden        [n_users, n_hidden]  float
    weight        [n_items, n_hidden]  hidden's dtype
    bias          [n_items]            hidden's dtype, or None
    clicks        [n_users, n_items]   a user without clicks gives 0
    reduction     "none", "sum" or "mean" over users
    user_weights  [n_users]            factor of each user's nll, or None
    returns       [n_users] or a scalar; fp32 (fp64 for fp64 input), nats

    Differentiable in hidden, weight, bias and user_weights. Under autocast the products run in its dtype with fp32
    sums, and hidden, weight and bias may each have any dtype. The CPU path computes fp16 in fp32.
    Raises: TypeError (clicks, dtypes), ValueError (shapes, reduction), RuntimeError (mixed devices).
    Source: Liang et al. 2018 (arXiv:1802.05814), eq. 2; reference: fastvae.reference.linear_multinomial_nll.
    """
    op = "linear_multinomial_nll"
    check_clicks(op, clicks)
    check_tensor(op, "hidden", hidden, (clicks.n_users, None))
    check_tensor(op, "weight", weight, (clicks.n_items, hidden.shape[1]))
    if bias is not None:
        check_tensor(op, "bias", bias, (clicks.n_items,))
    compute = autocast_dtype(hidden.device)
    if compute is None:
        check_dtypes(op, hidden.dtype, weight=weight, bias=bias)
    check_devices(op, clicks, hidden=hidden, weight=weight, bias=bias, user_weights=user_weights)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    )
    compute = compute or hidden.dtype
    if compute == torch.float16 and hidden.device.type == "cpu":
        compute = torch.float32  # E reaches past 65504, and CPUs have no fast fp16 product
    nll, *_ = _linear_multinomial_nll(
        hidden,
        weight,
        bias,
        clicks.indptr,
        clicks.indices,
        clicks.values,
        clicks.row_ids,
        compute,
        needs_grad,
    )
    return reduce_users(op, nll, reduction, user_weights)


@torch.library.custom_op("fastvae::linear_multinomial_nll", mutates_args=(), device_types="cpu")
def _linear_multinomial_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    rows: Tensor | None,
    compute: torch.dtype,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll [n_users] and, for the backward, E [n_users, n_items], v [n_users] and the weight in compute's dtype.

    E, v and weight are empty where no gradient is needed, weight also where it has that dtype already.
    """
    targets = Targets(indptr, indices, values, rows, len(weight))
    cast_weight = _cast(weight, compute)
    total = sum_dtype(compute)
    nothing = hidden.new_empty(0)
    e = _logits(hidden.to(compute), cast_weight)
    peak, row_sum = (hidden.new_empty(len(hidden), dtype=total) for _ in range(2))
    clicked = torch.empty(len(targets.item), dtype=total)
    for block in row_blocks(e):
        first, last = int(targets.offsets[block.start]), int(targets.offsets[block.stop])
        z = e[block].to(total)
        if bias is not None:
            z += bias
        local = targets.flat[first:last] - block.start * len(weight)
        torch.take(z, local, out=clicked[first:last])
        torch.amax(z, 1, out=peak[block])
        z.sub_(peak[block, None]).exp_()
        if e.dtype != total:
            e[block] = z  # sums of the rounded values: dlogits then adds up to zero over a row
            z = e[block].to(total)
        torch.sum(z, 1, out=row_sum[block])
    nll = targets.nll(clicked, peak, row_sum.log())
    if not needs_grad:
        return nll, nothing, nothing.clone(), nothing.clone()
    v = targets.n_clicks(total) / row_sum
    flat = e.view(-1)
    flat[targets.flat] -= targets.times_value(v.reciprocal()[targets.user]).to(e.dtype)
    return nll, e, v, nothing if cast_weight is weight else cast_weight


@_linear_multinomial_nll.register_fake
def _(hidden, weight, bias, indptr, indices, values, rows, compute, needs_grad):
    n_users, n_items = len(hidden), len(weight)
    nll = hidden.new_empty((n_users,), dtype=sum_dtype(compute))
    if not needs_grad:
        return nll, *(hidden.new_empty(0) for _ in range(3))
    e = hidden.new_empty((n_users, n_items), dtype=compute)
    cast_weight = hidden.new_empty(0) if weight.dtype == compute else weight.to(compute)
    return nll, e, torch.empty_like(nll), cast_weight


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else _buffers.empty(tuple(t.shape), dtype).copy_(t)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden W^T in one reused buffer."""
    logits = _buffers.empty((len(hidden), len(weight)), hidden.dtype)
    for start in range(0, len(weight), ITEMS_PER_GEMM):
        part = slice(start, start + ITEMS_PER_GEMM)
        torch.mm(hidden, weight[part].t(), out=logits[:, part])
    return logits


@torch.library.custom_op(
    "fastvae::linear_multinomial_nll_backward", mutates_args=(), device_types="cpu"
)
def _gradients(
    dnll: Tensor,
    e: Tensor,
    v: Tensor,
    hidden: Tensor,
    weight: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for hidden (e's dtype), weight (weight_dtype) and bias (fp32 at least); empty where not needed."""
    factor = dnll * v
    # a user without clicks has v = 0 and no targets: his row counts nothing
    dhidden, dweight, dbias = (hidden.new_empty(0) for _ in range(3))
    if need_hidden:
        dhidden = (torch.mm(e, weight) * factor[:, None]).to(e.dtype)
    if need_weight:
        scaled = (hidden * factor[:, None]).to(e.dtype)
        dweight = torch.mm(e.t(), scaled, out=_buffers.empty(tuple(weight.shape), e.dtype))
        dweight = _cast(dweight, weight_dtype)
    if need_bias:
        # high and low half of the factor: rounded to bf16 alone, it would tilt a whole row
        high = factor.to(e.dtype)
        dbias = torch.mm(torch.stack((high, (factor - high).to(e.dtype))), e).to(v.dtype).sum(0)
    return dhidden, dweight, dbias


@_gradients.register_fake
def _(dnll, e, v, hidden, weight, need_hidden, need_weight, need_bias, weight_dtype):
    nothing = hidden.new_empty(0)
    return (
        torch.empty_like(hidden, dtype=e.dtype) if need_hidden else nothing,
        torch.empty_like(weight, dtype=weight_dtype) if need_weight else nothing.clone(),
        v.new_empty(len(weight)) if need_bias else nothing.clone(),
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, *_ = inputs
    _, e, v, cast_weight = output
    ctx.mark_non_differentiable(e, v, cast_weight)
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.cast = cast_weight.numel() > 0
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(hidden, cast_weight if ctx.cast else weight, e, v)


def _backward(ctx, dnll, *_):
    if dnll is None:
        return (None,) * 9
    hidden, weight, e, v = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    dhidden, dweight, dbias = _gradients(
        dnll.contiguous(), e, v, hidden, weight, *need, ctx.weight_dtype
    )
    return (
        dhidden.to(hidden.dtype) if need[0] else None,
        dweight if need[1] else None,
        dbias.to(ctx.bias_dtype) if need[2] else None,
        *(None,) * 6,
    )


_linear_multinomial_nll.register_autograd(_backward, setup_context=_setup_context)
