"""A middle layer of the models on a GPU under autocast, in one dtype.

torch's own nn.Linear casts weight and bias anew at each call and its gradients back to fp32, each cast a launch: here
the products give fp32 gradients by themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as nn_module

from .._shadows import shadow_of
from ._bias_gradient import pre_activation
from ._dispatch import autocast_dtype, is_watched, uses_kernels

HALF = (torch.bfloat16, torch.float16)


def linear(layer: nn.Linear, h: Tensor, tanh: bool) -> Tensor:
    """layer(h), and tanh of it: [n_users, n_in] to [n_users, n_out] in layer's dtype, or in autocast's."""
    dtype = autocast_dtype(h.device)
    if dtype in HALF and uses_kernels(h) and is_only(layer, nn.Linear):
        weight, bias = layer.weight, layer.bias
        if weight.dtype == torch.float32 and not is_watched((h, weight)):
            return _Linear.apply(h, weight, bias, dtype, tanh)
    y = layer(h)
    return torch.tanh(y) if tanh else y


def is_only(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of module is kind's forward and nothing else, so that its weights may be read instead.

    Not so with another forward (LoRA, quantisation) and with hooks, which may change what comes out (pruning).
    """
    return (
        type(module).forward is kind.forward
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not _has_global_hooks()
    )


def _has_global_hooks() -> bool:
    m = nn_module
    return bool(
        m._global_forward_hooks
        or m._global_forward_pre_hooks
        or m._global_backward_hooks
        or m._global_backward_pre_hooks
    )


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in dtype: the optimiser's copy of it, where there is one."""
    shadow = shadow_of(weight) if dtype == torch.bfloat16 else None
    return weight.to(dtype) if shadow is None else shadow[: weight.shape[0]]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, dtype, tanh: bool):
        ctx.dtype = h.dtype
        h, weight = h.to(dtype), _cast(weight, dtype)
        if bias is None:
            y = torch.mm(h, weight.t())
        else:
            y = torch.addmm(_cast(bias, dtype), h, weight.t())
        y = y.tanh_() if tanh else y
        ctx.save_for_backward(h, weight, y if tanh else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        h, weight, y = ctx.saved_tensors
        need_h, need_weight, need_bias, *_ = ctx.needs_input_grad
        dpre, dbias = pre_activation(dy, y, dy.dtype, need_bias)
        dh = dweight = None
        if need_h:
            dh = torch.mm(dpre, weight).to(ctx.dtype)
        if need_weight:
            dweight = torch.mm(dpre.t(), h, out_dtype=torch.float32)
        return dh, dweight, dbias, None, None
