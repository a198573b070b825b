"""linear_multinomial_nll: the last layer and log-softmax x clicks in one op; logits never leave it.

CUDA tensors take the Triton kernels of fastvae.kernels.linear_multinomial_nll. CPU tensors take the functions below.
Both keep one [n_users, n_items] buffer, of scaled exponentials

    D[u, i] = exp(logits[u, i] - k[u]) - x[u, i] / v[u],    v[u] = N_u / sum_i exp(logits[u, i] - k[u])

so that dlogits = g v D and the upstream gradient g is a factor of a row: the backward is two plain GEMMs.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from .._checks import check_clicks, check_integer
from .._shadows import shadow_of
from ..clicks import Clicks, Csr
from . import _linear_multinomial_nll_cpu as cpu_way
from ._checks import (
    check_devices,
    check_dtypes,
    check_kernel_dtypes,
    check_tensor,
    reduce_users,
    sum_dtype,
    without_autocast,
)
from ._dispatch import Op, autocast_dtype, needing_triton, uses_kernels

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

    Differentiable, in reverse mode and once, in hidden, weight, bias and user_weights. Under autocast the products
    run in its dtype with fp32 sums, and hidden, weight and bias may each have any dtype. The CPU path computes fp16 in
    fp32.
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
    cast = cast_bias = None
    if compute == torch.bfloat16 and uses_kernels(weight):
        # copies that the optimiser has written already
        cast, cast_bias = shadow_of(weight), None if bias is None else shadow_of(bias)
    nll = _LINEAR_MULTINOMIAL_NLL(
        hidden, weight, bias, cast, cast_bias, *clicks.csr, compute, needs_grad, max_bytes
    )
    return reduce_users(op, nll, reduction, user_weights)


class _Way(Protocol):
    """What the two devices do apart: fastvae.kernels.linear_multinomial_nll, and _linear_multinomial_nll_cpu."""

    Gradients: Any

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype: ...
    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype: ...
    def stored_width(self, n_items: int) -> int: ...
    def cast_weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor: ...
    def empty(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor: ...
    def exp_rows(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, csr: Csr, n_items: int, d: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@functools.cache
def _kernels() -> _Way:
    with needing_triton("linear_multinomial_nll"):
        from ..kernels import linear_multinomial_nll as kernels
    return kernels


def _way(t: Tensor) -> _Way:
    return _kernels() if uses_kernels(t) else cpu_way


# whether gradients are taken as they come, and the weight's rows may lie apart
_apart: ContextVar[bool] = ContextVar("fastvae_apart", default=False)


@contextlib.contextmanager
def gradients_as_they_come() -> Iterator[None]:
    """For the forward of a step whose gradients nobody copies, as torch's own backward would, to lay them out anew."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def _forward(
    way: _Way, hidden, weight, bias, cast, csr: Csr, compute, needs_grad: bool, max_bytes: int
):
    compute = way.compute_dtype(compute)
    n_users, n_items = hidden.shape[0], weight.shape[0]
    used = way.cast_weight(weight, compute) if cast is None else cast
    same = hidden.to(compute).contiguous()
    bias = None if bias is None else bias.contiguous()
    parts = _parts(n_users, _row_bytes(way, n_items, compute), max_bytes)
    stored = needs_grad and len(parts) == 1
    shape = (n_users if stored else 0, way.stored_width(n_items))
    d = way.empty(shape, way.stored_dtype(compute), hidden.device)
    if len(parts) == 1:
        nll, v = way.exp_rows(same, used, bias, csr, n_items, d if stored else None)
    else:
        each = [
            way.exp_rows(same[part], used, bias, _clicks_of(part, csr), n_items, None)
            for part in parts
        ]
        nll, v = (torch.cat(values) for values in zip(*each, strict=True))
    is_own = cast is None and weight.dtype != compute
    return nll, v, d, used if is_own else hidden.new_empty(0)


def _backward_products(
    way: _Way, dnll, v, d, hidden, weight, bias, csr: Csr, n_items: int, needs, apart, weight_dtype, max_bytes
):  # fmt: skip
    """Gradients for hidden, weight (in weight_dtype) and bias (fp32 at least); None where not needed."""
    gradients = way.Gradients(hidden, weight, n_items, needs, weight_dtype, apart)
    n_users = hidden.shape[0]
    if d.shape[0] == n_users:
        gradients.add(slice(0, n_users), d, v, dnll)
        return gradients.results()
    # D again, some users at a time
    bias = None if bias is None else bias.contiguous()
    parts = _parts(n_users, _row_bytes(way, n_items, weight.dtype), max_bytes)
    longest = max(part.stop - part.start for part in parts)
    d = way.empty((longest, d.shape[1]), d.dtype, d.device)
    for part in parts:
        h, rows = hidden[part].to(weight.dtype).contiguous(), d[: part.stop - part.start]
        _, v_part = way.exp_rows(h, weight, bias, _clicks_of(part, csr), n_items, rows)
        gradients.add(part, rows, v_part, dnll[part])
    return gradients.results()


def _row_bytes(way: _Way, n_items: int, compute: torch.dtype) -> int:
    return way.stored_width(n_items) * way.stored_dtype(compute).itemsize


def _parts(n_users: int, row_bytes: int, max_bytes: int) -> list[slice]:
    """The fewest, evenly long ranges of users whose D fits max_bytes; a single user always does."""
    n_fit = max(1, max_bytes // max(1, row_bytes))
    n_parts = max(1, -(-n_users // n_fit))
    bounds = [n_users * part // n_parts for part in range(n_parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _clicks_of(part: slice, csr: Csr) -> Csr:
    """The clicks of a range of the batch's users."""
    indptr, indices, values, rows = csr
    if rows is None:
        # as a choice of rows, for which offsets need not start with 0
        rows = torch.arange(len(indptr) - 1, device=indptr.device)
    return indptr, indices, values, rows[part]


def _linear_multinomial_nll_cpu(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cast: Tensor | None,
    cast_bias: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    rows: Tensor | None,
    compute: torch.dtype,
    needs_grad: bool,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll [n_users]; for the backward v [n_users], D [n_users, stored width], and the weight as it was multiplied.

    cast and cast_bias are weight and bias in compute's dtype and padded, where somebody has them. D has no rows where no
    gradient is needed or it would be over max_bytes; the weight is empty where nothing was cast here.
    """
    csr = (indptr, indices, values, rows)
    with without_autocast(hidden.device):
        return _forward(
            cpu_way, hidden, weight, _used(bias, cast_bias), cast, csr, compute, needs_grad, max_bytes
        )  # fmt: skip


def _linear_multinomial_nll_cuda(
    hidden, weight, bias, cast, cast_bias, indptr, indices, values, rows, compute, needs_grad, max_bytes
):  # fmt: skip
    csr = (indptr, indices, values, rows)
    with without_autocast(hidden.device):
        return _forward(
            _kernels(), hidden, weight, _used(bias, cast_bias), cast, csr, compute, needs_grad, max_bytes
        )  # fmt: skip


def _used(bias: Tensor | None, cast_bias: Tensor | None) -> Tensor | None:
    return bias if cast_bias is None else cast_bias


def _linear_multinomial_nll_fake(
    hidden, weight, bias, cast, cast_bias, indptr, indices, values, rows, compute, needs_grad, max_bytes
):  # fmt: skip
    way = _way(hidden)
    compute = way.compute_dtype(compute)
    n_users, n_items = len(hidden), len(weight)
    one_part = len(_parts(n_users, _row_bytes(way, n_items, compute), max_bytes)) == 1
    width = way.stored_width(n_items)
    shape = (n_users if needs_grad and one_part else 0, width)
    if way is cpu_way:
        # item by item
        d = hidden.new_empty(shape[::-1], dtype=way.stored_dtype(compute)).t()
    else:
        d = hidden.new_empty(shape, dtype=way.stored_dtype(compute))
    nll, v = (hidden.new_empty((n_users,), dtype=sum_dtype(compute)) for _ in range(2))
    if cast is not None or weight.dtype == compute:
        return nll, v, d, hidden.new_empty(0)
    return nll, v, d, weight.new_empty((width, weight.shape[1]), dtype=compute)


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
    n_items: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    apart: bool,
    weight_dtype: torch.dtype,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for hidden, weight (in weight_dtype) and bias (fp32 at least); empty where not needed."""
    csr, needs = (indptr, indices, values, rows), (need_hidden, need_weight, need_bias)
    with without_autocast(hidden.device):
        gradients = _backward_products(
            cpu_way, dnll, v, d, hidden, weight, bias, csr, n_items, needs, apart, weight_dtype, max_bytes
        )  # fmt: skip
    return _empty_for_none(gradients, hidden)


def _gradients_cuda(
    dnll, v, d, hidden, weight, bias, indptr, indices, values, rows, n_items,
    need_hidden, need_weight, need_bias, apart, weight_dtype, max_bytes,
):  # fmt: skip
    csr, needs = (indptr, indices, values, rows), (need_hidden, need_weight, need_bias)
    with without_autocast(hidden.device):
        gradients = _backward_products(
            _kernels(), dnll, v, d, hidden, weight, bias, csr, n_items, needs, apart, weight_dtype, max_bytes
        )  # fmt: skip
    return _empty_for_none(gradients, hidden)


def _empty_for_none(gradients, hidden: Tensor):
    # a registered op returns tensors, no two of them the same
    return tuple(hidden.new_empty(0) if g is None else g for g in gradients)


def _gradients_fake(
    dnll, v, d, hidden, weight, bias, indptr, indices, values, rows, n_items,
    need_hidden, need_weight, need_bias, apart, weight_dtype, max_bytes,
):  # fmt: skip
    dweight = dbias = None
    if need_weight:
        dweight = _way(hidden).Gradients.new_dweight(
            hidden, weight, n_items, need_bias, weight_dtype, apart
        )
    if need_bias:
        dbias = v.new_empty((n_items,))
    dhidden = hidden.new_empty(hidden.shape) if need_hidden else None
    return _empty_for_none((dhidden, dweight, dbias), hidden)


_GRADIENTS = Op(
    "linear_multinomial_nll_gradients", _gradients_cpu, _gradients_cuda, _gradients_fake
)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, cast, cast_bias, *csr, _, _, ctx.max_bytes = inputs
    _, v, d, own_cast = output
    ctx.apart, ctx.bias_dtype = _apart.get(), None if bias is None else bias.dtype
    ctx.mark_non_differentiable(v, d, own_cast)
    ctx.set_materialize_grads(False)
    ctx.weight_dtype, ctx.n_items = weight.dtype, weight.shape[0]
    used_weight = cast if cast is not None else own_cast if own_cast.numel() > 0 else weight
    ctx.save_for_backward(v, d, hidden, used_weight, _used(bias, cast_bias), *csr)


def _backward(ctx, dnll, *_):
    if dnll is None:
        return (None,) * 12
    v, d, hidden, weight, bias, *csr = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    dhidden, dweight, dbias = _GRADIENTS(
        dnll, v, d, hidden, weight, bias, *csr,
        ctx.n_items, *need, ctx.apart, ctx.weight_dtype, ctx.max_bytes,
    )  # fmt: skip
    return (
        dhidden if need[0] else None,
        dweight if need[1] else None,
        dbias.to(ctx.bias_dtype) if need[2] else None,
        *(None,) * 9,
    )


_LINEAR_MULTINOMIAL_NLL = Op(
    "linear_multinomial_nll",
    _linear_multinomial_nll_cpu,
    _linear_multinomial_nll_cuda,
    _linear_multinomial_nll_fake,
    _setup_context,
    _backward,
)
