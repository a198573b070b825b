"""Argument checks and dtype rules that the ops share; none looks at the data, so none waits for a device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
    fits = tensor.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        want = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise ValueError(f"{op}: {name} must have shape {want}, got {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {dtype_name(tensor.dtype)}")


def check_devices(op: str, clicks: Clicks, **tensors: Tensor | None) -> None:
    """RuntimeError that names the first tensor on another device than the clicks."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != clicks.device:
            raise RuntimeError(
                f"{op}: {name} must be on {clicks.device} like clicks, got {tensor.device}"
            )


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


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to compute in under autocast, or None outside it."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """What is computed inside has settled its dtypes."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    torch.set_autocast_enabled(device.type, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device.type, True)


def reduce_users(op: str, nll: Tensor, reduction: str, user_weights: Tensor | None) -> Tensor:
    """Weigh and reduce one value per user: none [n_users], sum or mean over users (scalar)."""
    check_choice(op, "reduction", reduction, REDUCTIONS)
    if user_weights is not None:
        check_tensor(op, "user_weights", user_weights, (len(nll),))
        nll = nll * user_weights
    return nll if reduction == "none" else nll.sum() if reduction == "sum" else nll.mean()
