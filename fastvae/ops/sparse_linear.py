"""sparse_linear: the first dense layer on sparse clicks, with L2 norm, input dropout, bias and tanh in one op.

CUDA tensors take the Triton kernels of fastvae.kernels.sparse_linear. CPU tensors take the functions below: a
gather-sum is torch's embedding_bag, and the weight gradient is an embedding_bag too, over the transposed batch.
"""

from __future__ import annotations

import functools

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_clicks
from .._shadows import shadow_of
from ..clicks import Clicks, dtype_name
from . import _buffers
from ._bias_gradient import pre_activation
from ._checks import (
    check_devices,
    check_dtypes,
    check_kernel_dtypes,
    check_tensor,
    sum_dtype,
)
from ._dispatch import Op, autocast_dtype, needing_triton, uses_kernels
from ._dropout import dropout_keep
from ._rows import Rows

# items whose gradient is built at once: 1.2 MB at H = 600, which malloc recycles every time
ITEMS_PER_BLOCK = 512


def sparse_linear(
    clicks: Clicks,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    normalize: bool = True,
    tanh: bool = True,
    tanh_input: bool = False,
    shift: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """First layer of the encoder on a batch of users' clicks, without a dense input.

        y[u] = tanh(W (keep[u] * x[u]) * s[u] + b),    s[u] = 1 / (||x[u]|| (1 - dropout))

    >>> x = Clicks([0, 2, 2], [0, 2], n_items=3)
    >>> sparse_linear(x, torch.ones(1, 3), tanh=False)
    tensor([[1.4142],
            [0.0000]])

    clicks      [n_users, n_items]   a user without clicks gives tanh(b)
    weight      [n_hidden, n_items]  float; fastest where weight.t() is contiguous (item-major), as in the models
    bias        [n_hidden]           weight's dtype, or None
    dropout     probability 0..1 to drop a click, after the norm; kept clicks are scaled by 1 / (1 - dropout)
    seed        [1] int64 on clicks' device, needed where dropout > 0; see fastvae.reference.dropout_keep
    normalize   divide each row by its L2 norm
    tanh        apply tanh to the result
    tanh_input  apply tanh to the normalised, dropped-out clicks too
    shift       [n_users] int64, where clicks holds some columns of a larger matrix: what a click's position here lacks
                to its position there, by which dropout decides; or None
    row_scale   [n_users] fp32, or weight's fp64: in place of 1 / ||x[u]||, there that of the whole row; or None
    returns     [n_users, n_hidden] in weight's dtype, or in autocast's; sums in fp32

    Differentiable, in reverse mode and once, in weight, bias, and clicks.values where that requires grad. Weight's
    gradient has weight's strides.
    Raises: TypeError (clicks, dtypes), ValueError (shapes, dropout, missing seed), RuntimeError (mixed devices).
    Source: Liang et al. 2018 (arXiv:1802.05814), section 2.2; reference: fastvae.reference.sparse_linear.
    """
    _check(clicks, weight, bias, dropout, seed)
    _check_part(clicks, weight, shift, row_scale)
    seed, dtype = seed if dropout > 0 else None, autocast_dtype(weight.device)
    shift = None if seed is None else shift
    # a copy that the optimiser has written already: half the bytes to gather
    bf16 = dtype == torch.bfloat16 and uses_kernels(weight)
    cast = shadow_of(weight, transposed=True) if bf16 else None
    y = _SPARSE_LINEAR(
        *clicks.csr, weight, bias, cast, seed, shift, row_scale, dropout, normalize, tanh, tanh_input
    )  # fmt: skip
    return y if dtype is None else y.to(dtype)


def _check(clicks, weight, bias, dropout, seed) -> None:
    op = "sparse_linear"
    check_clicks(op, "clicks", clicks)
    check_tensor(op, "weight", weight, (None, clicks.n_items))
    if bias is not None:
        check_tensor(op, "bias", bias, (weight.shape[0],))
        check_dtypes(op, weight.dtype, bias=bias)
    if not 0 <= dropout <= 1:
        raise ValueError(f"{op}: dropout must lie in [0, 1], got {dropout}")
    if dropout > 0:
        if seed is None:
            raise ValueError(f"{op}: seed must be given where dropout > 0, got None")
        if not isinstance(seed, Tensor) or seed.shape != (1,) or seed.dtype != torch.int64:
            is_tensor = isinstance(seed, Tensor)
            got = f"{dtype_name(seed.dtype)} {list(seed.shape)}" if is_tensor else repr(seed)
            raise ValueError(f"{op}: seed must be an int64 tensor [1], got {got}")
    check_kernel_dtypes(op, weight=weight)
    check_devices(op, clicks, weight=weight, bias=bias, seed=seed)


def _check_part(clicks, weight, shift, row_scale) -> None:
    dtypes = {"shift": torch.int64, "row_scale": sum_dtype(weight.dtype)}
    for name, t in (("shift", shift), ("row_scale", row_scale)):
        if t is None:
            continue
        is_tensor = isinstance(t, Tensor)
        if not is_tensor or t.shape != (clicks.n_users,) or t.dtype != dtypes[name]:
            got = f"{dtype_name(t.dtype)} {list(t.shape)}" if is_tensor else repr(t)
            raise ValueError(
                f"sparse_linear: {name} must be {dtype_name(dtypes[name])} [{clicks.n_users}], got {got}"
            )
        check_devices("sparse_linear", clicks, **{name: t})


def _sparse_linear_cpu(
    indptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    cast: Tensor | None,
    seed: Tensor | None,
    shift: Tensor | None,
    row_scale: Tensor | None,
    dropout: float,
    normalize: bool,
    tanh: bool,
    tanh_input: bool,
) -> tuple[Tensor, Tensor]:
    """y [n_users, n_hidden] and the row factor s [n_users] (fp32 at least).

    cast is the weight item by item, [>= n_items, n_hidden] in the dtype that y shall have, where a GPU has such a copy.
    """
    batch = Rows((indptr, indices, values, rows), sum_dtype(weight.dtype))
    scale = batch.scale(dropout, normalize, row_scale)
    item, coefficient, offsets, _ = batch.kept(scale, seed, shift, dropout, tanh_input)
    table = weight.t().contiguous()
    if table.dtype != batch.dtype:
        # fp32 sums for half precision: only the rows that occur are widened
        distinct, item = torch.unique(item, return_inverse=True)
        table = table[distinct].to(batch.dtype)
    y = F.embedding_bag(
        item,
        table,
        offsets,
        mode="sum",
        per_sample_weights=coefficient,
        include_last_offset=True,
    )
    if bias is not None:
        y += bias
    return (y.tanh_() if tanh else y).to(weight.dtype), scale


def _sparse_linear_fake(
    indptr, indices, values, rows, weight, bias, cast, seed, shift, row_scale,
    dropout, normalize, tanh, tanh_input,
):  # fmt: skip
    n_users = indptr.shape[0] - 1 if rows is None else rows.shape[0]
    y = (weight if cast is None else cast).new_empty((n_users, weight.shape[0]))
    return y, weight.new_empty((n_users,), dtype=sum_dtype(weight.dtype))


def _dweight_cpu(
    dpre: Tensor,
    scale: Tensor,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    rows: Tensor | None,
    seed: Tensor | None,
    shift: Tensor | None,
    n_items: int,
    dropout: float,
    tanh_input: bool,
) -> Tensor:
    """Gradient for weight from that of the pre-activation, item-major [n_items, n_hidden] in dpre's fp32 or fp64."""
    batch = Rows((indptr, indices, values, rows), dpre.dtype)
    item, coefficient, offsets, _ = batch.kept(scale, seed, shift, dropout, tanh_input)
    csr = (coefficient.to(dpre.dtype).numpy(), item.numpy(), offsets.numpy())
    csc = sp.csr_array(csr, shape=(len(dpre), n_items)).tocsc()
    user, coefficient = torch.from_numpy(csc.indices), torch.from_numpy(csc.data)
    bounds = torch.from_numpy(csc.indptr)
    grad = _buffers.empty((n_items, dpre.shape[1]), dpre.dtype)
    for start in range(0, n_items, ITEMS_PER_BLOCK):
        part = bounds[start : start + ITEMS_PER_BLOCK + 1]
        chosen = slice(int(part[0]), int(part[-1]))
        grad[start : start + ITEMS_PER_BLOCK] = F.embedding_bag(
            user[chosen],
            dpre,
            part - part[0],
            mode="sum",
            per_sample_weights=coefficient[chosen],
            include_last_offset=True,
        )
    return grad


def _dweight_fake(
    dpre, scale, indptr, indices, values, rows, seed, shift, n_items, dropout, tanh_input
):  # fmt: skip
    return dpre.new_empty((n_items, dpre.shape[1]))


def _dvalues_cpu(
    dpre: Tensor,
    scale: Tensor,
    weight: Tensor,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor,
    rows: Tensor | None,
    seed: Tensor | None,
    shift: Tensor | None,
    dropout: float,
    normalize: bool,
    tanh_input: bool,
) -> Tensor:
    """Gradient for the whole matrix's values [nnz]; rows outside the batch get 0, repeated rows add up.

    With c = s v, y_pre = W c and s = a / ||v||:  dv = s dc - v (sum_n dc_n c_n) / ||v||^2.
    """
    batch = Rows((indptr, indices, values, rows), sum_dtype(weight.dtype))
    user, value = batch.user, batch.value
    assert value is not None
    direct = scale[user] * value
    dc = (dpre[user] * weight.t()[batch.item]).sum(1)
    if seed is not None:
        dc = dc * dropout_keep(seed, batch.shifted(shift), dropout)
    if tanh_input:
        dc = dc * (1 - torch.tanh(direct).square())
    grad = scale[user] * dc
    if normalize:
        along = torch.zeros_like(scale).index_add_(0, user, dc * direct)
        squares = torch.zeros_like(scale).index_add_(0, user, value.square())
        grad -= value * (along / squares.clamp_min(torch.finfo(squares.dtype).tiny))[user]
    return torch.zeros_like(values).index_add_(0, batch.position, grad.to(values.dtype))


def _dvalues_fake(
    dpre, scale, weight, indptr, indices, values, rows, seed, shift, dropout, normalize, tanh_input
):  # fmt: skip
    return torch.empty_like(values)


@functools.cache
def _kernels():
    with needing_triton("sparse_linear"):
        from ..kernels import sparse_linear as kernels
    return kernels


def _sparse_linear_cuda(
    indptr, indices, values, rows, weight, bias, cast, seed, shift, row_scale,
    dropout, normalize, tanh, tanh_input,
):  # fmt: skip
    return _kernels().sparse_linear_fwd(
        (indptr, indices, values, rows),
        weight.t().contiguous() if cast is None else cast,
        None if bias is None else bias.contiguous(),
        seed,
        dropout=dropout,
        normalize=normalize,
        tanh=tanh,
        tanh_input=tanh_input,
        shift=shift,
        row_scale=row_scale,
    )


def _dweight_cuda(
    dpre, scale, indptr, indices, values, rows, seed, shift, n_items, dropout, tanh_input
):  # fmt: skip
    return _kernels().sparse_linear_bwd_weight(
        dpre,
        (indptr, indices, values, rows),
        seed,
        scale,
        n_items,
        dropout=dropout,
        tanh_input=tanh_input,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        shift=shift,
    )


def _dvalues_cuda(
    dpre, scale, weight, indptr, indices, values, rows, seed, shift, dropout, normalize, tanh_input
):  # fmt: skip
    with needing_triton("sparse_linear"):
        from ..kernels.sparse_linear_dvalues import sparse_linear_bwd_values
    return sparse_linear_bwd_values(
        dpre,
        weight.t().contiguous(),
        (indptr, indices, values, rows),
        seed,
        scale,
        dropout=dropout,
        normalize=normalize,
        tanh_input=tanh_input,
        shift=shift,
    )


_DWEIGHT = Op("sparse_linear_dweight", _dweight_cpu, _dweight_cuda, _dweight_fake)
_DVALUES = Op("sparse_linear_dvalues", _dvalues_cpu, _dvalues_cuda, _dvalues_fake)


def _setup_context(ctx, inputs, output):
    indptr, indices, values, rows, weight, _, _, seed, shift, row_scale, *ctx.settings = inputs
    y, scale = output
    ctx.mark_non_differentiable(scale)
    ctx.set_materialize_grads(False)
    # a norm that is given is a constant
    ctx.by_own_norm = row_scale is None
    ctx.save_for_backward(indptr, indices, values, rows, weight, seed, shift, y, scale)


def _backward(ctx, dy, *_):
    indptr, indices, values, rows, weight, seed, shift, y, scale = ctx.saved_tensors
    dropout, normalize, tanh, tanh_input = ctx.settings
    if dy is None:
        return (None,) * 14
    _, _, need_values, _, need_weight, need_bias, *_ = ctx.needs_input_grad
    dpre, dbias = pre_activation(dy, y if tanh else None, y.dtype, need_bias)
    dweight = dvalues = None
    if need_weight:
        n_items = weight.shape[1]
        dweight = _DWEIGHT(
            dpre, scale, indptr, indices, values, rows, seed, shift, n_items, dropout, tanh_input
        )
        dweight = dweight.t().to(weight.dtype)
    if dbias is not None:
        dbias = dbias.to(weight.dtype)
    if need_values:
        dvalues = _DVALUES(
            dpre, scale, weight, indptr, indices, values, rows, seed, shift,
            dropout, normalize and ctx.by_own_norm, tanh_input,
        )  # fmt: skip
    return None, None, dvalues, None, dweight, dbias, *(None,) * 8


_SPARSE_LINEAR = Op(
    "sparse_linear",
    _sparse_linear_cpu,
    _sparse_linear_cuda,
    _sparse_linear_fake,
    _setup_context,
    _backward,
)
