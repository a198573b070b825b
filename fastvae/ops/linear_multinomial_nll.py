"""linear_multinomial_nll: the last layer and log-softmax x clicks in one op; logits never leave it.

CUDA tensors take the Triton kernels of fastvae.kernels.linear_multinomial_nll. CPU tensors take the functions below. Both
keep one [n_users, n_items] buffer, of scaled exponentials

    D[u, i] = exp(logits[u, i] - k[u]) - x[u, i] / v[u],    v[u] = N_u / sum_i exp(logits[u, i] - k[u])

so that dlogits = g v D and the upstream gradient g is a factor of a row: the backward is two plain GEMMs.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .._checks import check_clicks, check_integer
from ..clicks import Clicks, Csr
from . import _buffers
from ._checks import (
    autocast_dtype,
    check_devices,
    check_dtypes,
    check_kernel_dtypes,
    check_tensor,
    reduce_users,
    sum_dtype,
)
from ._dispatch import Op, needing_triton
from ._rows import Rows
from .multinomial_nll import row_blocks

# items of one product: a [500, 600] x [600, 20108] one takes 101 ms whole in fp32 and 70 ms in pieces (2 cores)
ITEMS_PER_GEMM = 512
# a piece of a bf16 weight gradient is widened to fp32 while it is in the cache
ITEMS_PER_GRADIENT = 1024
MAX_BYTES = 4 * 2**30


def linear_multinomial_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    clicks: Clicks,
    *,
    reduction: str = "none",
    user_weights: Tensor | None = None,
    max_bytes: int = MAX_BYTES,
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
    max_bytes     of the [n_users, n_items] buffer; above it the backward computes it anew in chunks of users
    returns       [n_users] or a scalar; fp32 (fp64 for fp64 input), nats

    Differentiable, in reverse mode and once, in hidden, weight, bias and user_weights. Under autocast the products run
    in its dtype with fp32 sums, and hidden, weight and bias may each have any dtype. The CPU path computes fp16 in fp32.
    Raises: TypeError (clicks, dtypes), ValueError (shapes, reduction), RuntimeError (mixed devices).
    Source: Liang et al. 2018 (arXiv:1802.05814), eq. 2; reference: fastvae.reference.linear_multinomial_nll.
    """
    op = "linear_multinomial_nll"
    check_clicks(op, "clicks", clicks)
    check_tensor(op, "hidden", hidden, (clicks.n_users, None))
    check_tensor(op, "weight", weight, (clicks.n_items, hidden.shape[1]))
    if bias is not None:
        check_tensor(op, "bias", bias, (clicks.n_items,))
    max_bytes = check_integer(op, "max_bytes", max_bytes, 1, None)
    compute = autocast_dtype(hidden.device)
    if compute is None:
        check_dtypes(op, hidden.dtype, weight=weight, bias=bias)
    check_kernel_dtypes(op, hidden=hidden)
    check_devices(op, clicks, hidden=hidden, weight=weight, bias=bias, user_weights=user_weights)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    )
    compute = compute or hidden.dtype
    nll = _LINEAR_MULTINOMIAL_NLL(hidden, weight, bias, *clicks.csr, compute, needs_grad, max_bytes)
    return reduce_users(op, nll, reduction, user_weights)


def _linear_multinomial_nll_cpu(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    rows: Tensor | None,
    compute: torch.dtype,
    needs_grad: bool,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll [n_users]; for the backward v [n_users], D [n_users, n_items], and the weight in compute's dtype.

    D has no rows where no gradient is needed or it would be over max_bytes; the weight is empty where nothing was cast.
    """
    compute = _cpu_dtype(compute)
    cast_weight = _cast(weight, compute)
    nll, v = (hidden.new_empty(len(hidden), dtype=sum_dtype(compute)) for _ in range(2))
    csr = (indptr, indices, values, rows)
    parts = _parts(len(hidden), len(weight), compute, max_bytes)
    for part in parts:
        targets = Rows(_clicks_of(part, csr), sum_dtype(compute))
        # dtypes are settled
        with torch.autocast("cpu", enabled=False):
            nll[part], v[part], d = _exp_rows(hidden[part], cast_weight, bias, targets)
    if not needs_grad or len(parts) > 1:
        d = hidden.new_empty((0, len(weight)), dtype=compute)
    return nll, v, d, hidden.new_empty(0) if cast_weight is weight else cast_weight


def _linear_multinomial_nll_fake(
    hidden, weight, bias, indptr, indices, values, rows, compute, needs_grad, max_bytes
):
    n_users, n_items = len(hidden), len(weight)
    if hidden.device.type == "cpu":
        compute = _cpu_dtype(compute)
        stored = needs_grad and len(_parts(n_users, n_items, compute, max_bytes)) == 1
        shape, dtype = (n_users if stored else 0, n_items), compute
    else:
        with needing_triton("linear_multinomial_nll"):
            from ..kernels.linear_multinomial_nll import stored_dtype, stored_shape
        shape = stored_shape(n_users, n_items, compute, needs_grad, max_bytes)
        dtype = stored_dtype(compute)
    nll, v = (hidden.new_empty((n_users,), dtype=sum_dtype(compute)) for _ in range(2))
    cast_weight = hidden.new_empty(0)
    if weight.dtype != compute:
        cast_weight = weight.new_empty(weight.shape, dtype=compute)
    return nll, v, hidden.new_empty(shape, dtype=dtype), cast_weight


def _gradients_cpu(
    dnll: Tensor,
    v: Tensor,
    d: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    rows: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    weight_dtype: torch.dtype,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for hidden, weight (in weight_dtype) and bias (fp32 at least); empty where not needed."""
    nothing = hidden.new_empty(0)
    dhidden = torch.empty_like(hidden) if need_hidden else nothing
    dweight = _buffers.empty(tuple(weight.shape), weight_dtype) if need_weight else nothing.clone()
    dbias = v.new_zeros(len(weight)) if need_bias else nothing.clone()
    stored = len(d) > 0 or len(hidden) == 0
    parts = _parts(len(hidden), len(weight), weight.dtype, max_bytes)
    for part in parts[:1] if stored else parts:
        h, v_part = hidden[part], v[part]
        # dtypes are settled
        with torch.autocast("cpu", enabled=False):
            if not stored:
                targets = Rows(_clicks_of(part, (indptr, indices, values, rows)), v.dtype)
                _, v_part, d = _exp_rows(h, weight, bias, targets)
            # 0 for a user without clicks, whose D is not the gradient
            factor = dnll[part] * v_part
            if need_hidden:
                dhidden[part] = torch.mm(d, weight) * factor[:, None]
            if need_weight:
                scaled = (h * factor[:, None]).to(d.dtype)
                _add_gradient(dweight, d, scaled, first=part.start == 0)
            if need_bias:
                dbias += _row_times(factor, d)
    return dhidden, dweight, dbias


def _gradients_fake(
    dnll, v, d, hidden, weight, bias, indptr, indices, values, rows,
    need_hidden, need_weight, need_bias, weight_dtype, max_bytes,
):  # fmt: skip
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight, dtype=weight_dtype) if need_weight else hidden.new_empty(0),
        v.new_empty(len(weight)) if need_bias else hidden.new_empty(0),
    )


def _exp_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Rows
) -> tuple[Tensor, Tensor, Tensor]:
    """nll, v and D of some users; k is the log-sum-exp, so the exponentials are probabilities and v is N_u."""
    total = sum_dtype(weight.dtype)
    d = _logits(hidden.to(weight.dtype), weight)
    peak, highest = (hidden.new_empty(len(hidden), dtype=total) for _ in range(2))
    clicked = torch.empty(len(targets.item), dtype=total)
    flat = targets.user * len(weight) + targets.item
    for block in row_blocks(d):
        first, last = int(targets.offsets[block.start]), int(targets.offsets[block.stop])
        z = d[block].to(total)
        if bias is not None:
            z += bias
        local = flat[first:last] - block.start * len(weight)
        torch.take(z, local, out=clicked[first:last])
        torch.amax(z, 1, out=peak[block])
        torch.softmax(z, 1, out=z)
        # 1 / sum_i exp(logits[u, i] - peak[u])
        torch.amax(z, 1, out=highest[block])
        if d.dtype != total:
            d[block] = z
    n_clicks = targets.n_clicks()
    d.view(-1)[flat] -= targets.times_value(n_clicks.reciprocal()[targets.user]).to(d.dtype)
    return targets.nll(clicked, peak, highest.log().neg_()), n_clicks, d


def _add_gradient(dweight: Tensor, d: Tensor, scaled: Tensor, first: bool) -> None:
    """dweight = D^T scaled, or dweight += where not first."""
    if dweight.dtype == d.dtype:
        dweight.addmm_(d.t(), scaled, beta=0 if first else 1)
        return
    for start in range(0, len(dweight), ITEMS_PER_GRADIENT):
        piece = slice(start, start + ITEMS_PER_GRADIENT)
        product = torch.mm(d[:, piece].t(), scaled)
        dweight[piece] = product if first else product + dweight[piece]


def _row_times(factor: Tensor, d: Tensor) -> Tensor:
    """factor @ d with the factor's precision."""
    high = factor.to(d.dtype)
    if high.dtype == factor.dtype:
        return torch.mv(d.t(), factor)
    # high and low half: the factor rounded to bf16 alone would tilt a whole row
    low = (factor - high).to(d.dtype)
    return torch.mm(torch.stack((high, low)), d).to(factor.dtype).sum(0)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden W^T in one reused buffer."""
    logits = _buffers.empty((len(hidden), len(weight)), hidden.dtype)
    # bf16 takes 34 ms whole, 38 in pieces
    whole = hidden.dtype == torch.bfloat16
    step = max(1, len(weight)) if whole else ITEMS_PER_GEMM
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        torch.mm(hidden, weight[part].t(), out=logits[:, part])
    return logits


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else _buffers.empty(tuple(t.shape), dtype).copy_(t)


def _cpu_dtype(compute: torch.dtype) -> torch.dtype:
    # D reaches past fp16's 65504, and CPUs have no fast fp16 product
    return torch.float32 if compute == torch.float16 else compute


def _parts(n_users: int, n_items: int, dtype: torch.dtype, max_bytes: int) -> list[slice]:
    """The fewest, evenly long ranges of users whose D fits max_bytes; a single user always does."""
    n_fit = max(1, max_bytes // max(1, n_items * dtype.itemsize))
    n_parts = max(1, -(-n_users // n_fit))
    bounds = [n_users * part // n_parts for part in range(n_parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _clicks_of(part: slice, csr: Csr) -> Csr:
    """The clicks of a range of the batch's users."""
    indptr, indices, values, rows = csr
    if rows is None:
        # as a choice of rows, for which offsets need not start with 0
        rows = torch.arange(len(indptr) - 1)
    return indptr, indices, values, rows[part]


def _linear_multinomial_nll_cuda(
    hidden, weight, bias, indptr, indices, values, rows, compute, needs_grad, max_bytes
):
    with needing_triton("linear_multinomial_nll"):
        from ..kernels.linear_multinomial_nll import linear_multinomial_nll_fwd
    cast_weight = weight.to(compute).contiguous()
    bias = None if bias is None else bias.to(compute).contiguous()
    # dtypes are settled
    with torch.autocast(hidden.device.type, enabled=False):
        nll, v, d = linear_multinomial_nll_fwd(
            hidden.to(compute).contiguous(),
            cast_weight,
            bias,
            (indptr, indices, values, rows),
            needs_grad=needs_grad,
            allow_tf32=_allow_tf32(),
            max_bytes=max_bytes,
        )
    return nll, v, d, hidden.new_empty(0) if weight.dtype == compute else cast_weight


def _gradients_cuda(
    dnll, v, d, hidden, weight, bias, indptr, indices, values, rows,
    need_hidden, need_weight, need_bias, weight_dtype, max_bytes,
):  # fmt: skip
    with needing_triton("linear_multinomial_nll"):
        from ..kernels.linear_multinomial_nll import linear_multinomial_nll_bwd
    with torch.autocast(hidden.device.type, enabled=False):
        dhidden, dweight, dbias = linear_multinomial_nll_bwd(
            hidden.to(weight.dtype).contiguous(),
            weight.contiguous(),
            None if bias is None else bias.to(weight.dtype).contiguous(),
            (indptr, indices, values, rows),
            v,
            d,
            dnll,
            needs=(need_hidden, need_weight, need_bias),
            allow_tf32=_allow_tf32(),
            max_bytes=max_bytes,
        )
    nothing = hidden.new_empty(0)
    return (
        nothing if dhidden is None else dhidden.to(hidden.dtype),
        nothing.clone() if dweight is None else dweight.to(weight_dtype),
        nothing.clone() if dbias is None else dbias,
    )


_GRADIENTS = Op("linear_multinomial_nll_backward", _gradients_cpu, _gradients_cuda, _gradients_fake)


def _allow_tf32() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, *csr, _, _, ctx.max_bytes = inputs
    _, v, d, cast_weight = output
    ctx.mark_non_differentiable(v, d, cast_weight)
    ctx.set_materialize_grads(False)
    ctx.weight_dtype = weight.dtype
    used_weight = cast_weight if cast_weight.numel() > 0 else weight
    ctx.save_for_backward(v, d, hidden, used_weight, bias, *csr)


def _backward(ctx, dnll, *_):
    if dnll is None:
        return (None,) * 10
    v, d, hidden, weight, bias, *csr = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    dhidden, dweight, dbias = _GRADIENTS(
        dnll.contiguous(), v, d, hidden, weight, bias, *csr, *need, ctx.weight_dtype, ctx.max_bytes
    )
    return (
        dhidden if need[0] else None,
        dweight if need[1] else None,
        dbias.to(bias.dtype) if need[2] else None,
        *(None,) * 7,
    )


_LINEAR_MULTINOMIAL_NLL = Op(
    "linear_multinomial_nll",
    _linear_multinomial_nll_cpu,
    _linear_multinomial_nll_cuda,
    _linear_multinomial_nll_fake,
    _setup_context,
    _backward,
)
