"""The gradient before a layer's tanh and that of its bias, of one gradient behind the layer.

CUDA tensors take the Triton kernel of fastvae.kernels.bias_gradient. CPU tensors take torch's own functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import sum_dtype
from ._dispatch import Op, needing_triton, uses_kernels


def pre_activation(
    dy: Tensor, y: Tensor | None, dtype: torch.dtype, need_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """dpre [n_users, n_columns], contiguous, and dbias [n_columns] where it is needed.

    dy     [n_users, n_columns]  any float
    y      [n_users, n_columns]  what the layer gave, of dtype; None where it has no tanh
    dtype  of the layer: dpre's on a GPU, whose kernels widen what they read. All else is fp32 (fp64 for fp64)
    """
    total = dtype if uses_kernels(dy) else sum_dtype(dtype)
    dy, y = dy.to(total).contiguous(), None if y is None else y.to(total).contiguous()
    if not need_bias:
        return dy if y is None else torch.ops.aten.tanh_backward.default(dy, y), None
    dpre, dbias = _BIAS_GRADIENT(dy, y)
    return dy if y is None else dpre, dbias


def _bias_gradient_cpu(dy: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """dpre, empty without y; and dbias, fp32 at least."""
    dpre = dy if y is None else torch.ops.aten.tanh_backward.default(dy, y)
    dbias = dpre.sum(0, dtype=sum_dtype(dy.dtype))
    return dy.new_empty(0) if y is None else dpre, dbias


def _bias_gradient_cuda(dy, y):
    with needing_triton("linear"):
        from ..kernels.bias_gradient import bias_gradient
    dpre, dbias = bias_gradient(dy, y)
    return dy.new_empty(0) if dpre is None else dpre, dbias


def _bias_gradient_fake(dy, y):
    dbias = dy.new_empty((dy.shape[1],), dtype=sum_dtype(dy.dtype))
    return dy.new_empty(0) if y is None else torch.empty_like(y), dbias


_BIAS_GRADIENT = Op("bias_gradient", _bias_gradient_cpu, _bias_gradient_cuda, _bias_gradient_fake)
