"""Argument checks and dtype rules that the ops share; none looks at the data, so none waits for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_choice
from ..clicks import Clicks, dtype_name

REDUCTIONS = ("none", "sum", "mean")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(op: str, name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """ValueError unless tensor has this shape (None: any size), TypeError unless it is a floating tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    sizes = tensor.shape
    if len(sizes) != len(shape) or any(map(_differs, shape, sizes)):
        want = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise ValueError(f"{op}: {name} must have shape {want}, got {list(sizes)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {dtype_name(tensor.dtype)}")


def _differs(want: int | None, size: int) -> bool:
    return want is not None and want != size


def check_devices(op: str, clicks: Clicks, **tensors: Tensor | None) -> None:
    """RuntimeError that names the first tensor on another device than the clicks."""
    device = clicks.device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise RuntimeError(f"{op}: {name} must be on {device} like clicks, got {tensor.device}")


def check_dtypes(op: str, want: torch.dtype, **tensors: Tensor | None) -> None:
    """TypeError that names the first tensor of another dtype."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != want:
            raise TypeError(
                f"{op}: {name} must be {dtype_name(want)}, got {dtype_name(tensor.dtype)}"
            )


def check_kernel_dtypes(op: str, **tensors: Tensor) -> None:
    """TypeError that names the first tensor of a dtype that the GPU kernels do not have."""
    for name, tensor in tensors.items():
        if tensor.is_cuda and tensor.dtype not in KERNEL_DTYPES:
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16, float16 on a GPU, got {dtype_name(tensor.dtype)}"
            )


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: fp32 for everything but fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class without_autocast:
    """What is computed inside has settled its dtypes; a class, since a generator takes 3 us."""

    def __init__(self, device: torch.device):
        self.kind = device.type

    def __enter__(self) -> None:
        self.was_on = self.kind != "meta" and torch.is_autocast_enabled(self.kind)
        if self.was_on:
            torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *_: object) -> None:
        if self.was_on:
            torch.set_autocast_enabled(self.kind, True)


def reduce_users(op: str, nll: Tensor, reduction: str, user_weights: Tensor | None) -> Tensor:
    """Weigh and reduce one value per user: none [n_users], sum or mean over users (scalar)."""
    check_choice(op, "reduction", reduction, REDUCTIONS)
    if user_weights is not None:
        check_tensor(op, "user_weights", user_weights, (len(nll),))
        nll = nll * user_weights
    return nll if reduction == "none" else nll.sum() if reduction == "sum" else nll.mean()
