"""How a call reaches its functions: straight away, or as a registered torch op where something watches torch's calls.

A registered op costs 150 us of host time with its autograd, an autograd.Function 20: so a plain call goes round the
registration. torch.compile, fake tensors, dispatch modes and functorch's transforms see the registered op.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# types of arguments that nothing watches; a look at all at once is quicker than one at each
_PLAIN = frozenset({Tensor, nn.Parameter, type(None), int, bool, float, torch.dtype})


def has_triton() -> bool:
    """Whether triton can be imported; only a GPU needs it."""
    return importlib.util.find_spec("triton") is not None


@contextlib.contextmanager
def needing_triton(op: str) -> Iterator[None]:
    """Around the import of kernels, which a GPU is the first to need: a sentence where triton is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            f"{op}: a GPU needs triton, which is missing; pip install triton, or move clicks and model to the CPU"
        ) from error


# autocast's dtype, in a tuple, while steps on torch's meta device only compile the kernels of a GPU's
_traced: ContextVar[tuple[torch.dtype | None, ...]] = ContextVar("fastvae_traced", default=())


@contextlib.contextmanager
def traced(dtype: torch.dtype | None) -> Iterator[None]:
    """Let tensors on the meta device take a GPU's way, as under its autocast in dtype."""
    token = _traced.set((dtype,))
    try:
        yield
    finally:
        _traced.reset(token)


def uses_kernels(t: Tensor) -> bool:
    """Whether the Triton kernels compute on this tensor; torch's own CPU kernels do otherwise."""
    return t.is_cuda or (t.is_meta and bool(_traced.get()))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to compute in under autocast, or None outside it."""
    kind = device.type
    if kind == "meta":
        # torch has no autocast for it
        return next(iter(_traced.get()), None)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def is_watched(args: tuple[Any, ...]) -> bool:
    """Whether something looks at torch's calls, which a call round the registration would escape."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, args))
    )


def refuse_tangents(args: tuple[Any, ...]) -> None:
    """RuntimeError where an argument has a tangent, which torch would drop: a derivative of 0 without a word."""
    if forward_ad._current_level < 0:
        return
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise RuntimeError(
                "fastvae: derivatives of the ops must be taken in reverse mode, got an input with a tangent "
                "(torch.func.jvp, jacfwd); use backward or torch.autograd.grad"
            )


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply less the look for functorch's transforms, which is_watched has taken already: 6 us."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """function, whose results may be parts of one buffer, with results that share no memory: torch's rule for ops."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        results = function(*args)
        if not isinstance(results, tuple):
            return results
        owners: dict[int, Tensor] = {}
        return tuple(
            t if owners.setdefault(t.untyped_storage().data_ptr(), t) is t else t.clone()
            for t in results
        )

    return call


class Op:
    """fastvae::name with a function for each device, and a gradient where setup_context and backward are given.

    cpu, cuda, fake  take the same flat arguments; a tensor that says the device comes first
    setup_context, backward  as torch.library.register_autograd takes them
    n_differentiable  results that have a gradient, the first ones
    A call returns all results, with a gradient only those that have one: a tensor, or a tuple of several.
    """

    def __init__(
        self,
        name: str,
        cpu: Callable[..., Any],
        cuda: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        n_differentiable: int = 1,
    ):
        self.registered = torch.library.custom_op(
            f"fastvae::{name}", _apart(cpu), mutates_args=(), device_types="cpu"
        )
        self.registered.register_kernel("cuda", _apart(cuda))
        self.registered.register_fake(fake)
        self.cpu, self.cuda, self.fake = cpu, cuda, fake
        self.n_differentiable = n_differentiable
        self.function: type[torch.autograd.Function] | None = None
        if setup_context is not None and backward is not None:
            self.registered.register_autograd(backward, setup_context=setup_context)
            self.function = _function(self, name, setup_context, backward)
            self.apply = apply_of(self.function)

    def plain(self, *args: Any) -> Any:
        """The device's own function; no autograd, nothing registered."""
        return (self.cuda if uses_kernels(args[0]) else self.cpu)(*args)

    def differentiable(self, result: tuple[Any, ...]) -> Any:
        """What a call with a gradient returns of all results."""
        return result[0] if self.n_differentiable == 1 else result[: self.n_differentiable]

    def __call__(self, *args: Any) -> Any:
        refuse_tangents(args)
        # where a gradient is to be differentiated again, the registered op says that it cannot be
        again = self.function is None and torch.is_grad_enabled()
        if again or is_watched(args):
            result = self.registered(*args)
            return result if self.function is None else self.differentiable(result)
        return self.plain(*args) if self.function is None else self.apply(*args)


def _function(op: Op, name: str, setup_context, backward) -> type[torch.autograd.Function]:
    def forward(ctx, *inputs):
        output = op.plain(*inputs)
        setup_context(ctx, inputs, output)
        return op.differentiable(output)

    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(backward),
    }
    return type(name, (torch.autograd.Function,), members)
