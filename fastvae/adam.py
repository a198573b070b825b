"""Adam, as torch.optim.Adam: on a GPU one kernel for all weights, on a CPU torch's own fused one.

A weight stored item-major stays as it is: torch's fused Adam copies it to and fro (35 ms a step at 20,108 items).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as adam_by_torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._checks import check_flag, check_number, shown
from ._shadows import Shadow, is_being_captured, row_major
from .ops._dispatch import needing_triton, uses_kernels

_MEANS = ("exp_avg", "exp_avg_sq")
_ABSENT = ("amsgrad", "maximize", "differentiable")  # options of torch's Adam


class Adam(torch.optim.Adam):
    """torch.optim.Adam's update, or with weight_decay torch.optim.AdamW's, fast for the models' weights.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = Adam([weight], lr=0.1)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0.9000, 0.9000])

    params  weights of any shape, or groups of them, as torch.optim takes them
    lr      learning rate; a tensor on the weights' device where a captured CUDA graph shall follow its changes
    betas   decay rates of the two means, in [0, 1)
    eps     added to the denominator
    shadow  keep a bf16 copy of each fp32 weight on a GPU, 2 bytes a number, written by the same kernel. The ops take it
            under bf16 autocast in place of a cast, unless the weight has been changed since, as torch counts changes:
            after one through .data or a collective call torch.autograd.graph.increment_version(weights)
    weight_decay  decoupled: before its update a weight loses lr * weight_decay of itself

    On a GPU the counts of steps lie on the device: a step can be captured in a CUDA graph once an eager one has run.
    state_dict() is torch.optim.Adam's, and each loads the other's, on any device; shadows are not in it.
    Raises: ValueError and TypeError for arguments that do not fit, RuntimeError in a capture before the first step.
    Source: Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1; the decay: Loshchilov and Hutter 2019 (arXiv:1711.05101),
    algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        shadow: bool = False,
        weight_decay: float = 0.0,
    ):
        if not isinstance(lr, Tensor):
            lr = check_number("Adam", "lr", lr, 0)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"Adam: betas must be two numbers, got {shown(betas)}")
        beta1, beta2 = (check_number("Adam", "betas", beta, 0, 1) for beta in betas)
        eps = check_number("Adam", "eps", eps, 0)
        self.shadow = check_flag("Adam", "shadow", shadow)
        self._shadows: dict[Tensor, Shadow] = {}
        decay = check_number("Adam", "weight_decay", weight_decay, 0)
        super().__init__(params, lr, (beta1, beta2), eps, decay, fused=True)
        # a GradScaler unscales the gradients itself then
        self._step_supports_amp_scaling = False

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"shadow": self.shadow}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_shadows", {})  # a copy makes its own

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; amsgrad and maximize are not to be had, and weight_decay is decoupled."""
        # torch's own would add it to the gradient
        if param_group.get("weight_decay", self.defaults["weight_decay"]):
            param_group.setdefault("decoupled_weight_decay", True)
        _check_group(param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights that have a gradient; closure, where given, computes loss and gradients anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # one launch for each device, of all groups that differ in weight_decay alone; torch takes what the kernel does not
        alike: dict[tuple, tuple[dict[str, Any], list[Tensor]]] = {}
        for group in self.param_groups:
            trained = [weight for weight in group["params"] if weight.grad is not None]
            if group["weight_decay"] and trained:
                _decay(group, trained)
            for weight in trained:
                place = weight.device if _takes_kernel(weight) else _has_no_gap(weight)
                key = (place, _rate_of(group), tuple(group["betas"]), group["eps"])
                alike.setdefault(key, (group, []))[1].append(weight)
        for (place, *_), (group, weights) in alike.items():
            if isinstance(place, torch.device):
                self._step_by_kernel(group, weights)
            else:
                self._step_by_torch(group, weights, fused=place)
        return loss

    def _step_by_kernel(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        with needing_triton("Adam"):
            from .kernels.adam import adam, has_gaps
        states = [self._state_of(weight) for weight in weights]
        shadows = [self._shadow_for(weight) for weight in weights] if self.shadow else []
        lr = group["lr"]
        adam(
            weights,
            [_gradient_of(weight, has_gaps) for weight in weights],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            [shadow.rows for shadow in shadows] or None,
            lr=float(lr) if isinstance(lr, Tensor) and not lr.is_cuda else lr,
            betas=group["betas"],
            eps=group["eps"],
        )
        torch.autograd.graph.increment_version([*weights, *(shadow.rows for shadow in shadows)])
        for shadow in shadows:
            shadow.has_written()

    def _step_by_torch(self, group: dict[str, Any], weights: list[Tensor], fused: bool) -> None:
        states = [self._state_of(weight) for weight in weights]
        adam_by_torch(
            [row_major(weight) for weight in weights],
            [row_major(_gradient_of(weight)) for weight in weights],
            [row_major(state["exp_avg"]) for state in states],
            [row_major(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        torch.autograd.graph.increment_version(weights)  # torch's fused kernels leave it

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        """A weight's two means, laid out as it is, and its count of steps."""
        state = self.state[weight]
        if not state:
            if is_being_captured(weight):
                raise RuntimeError(
                    "Adam: a step must run before a CUDA graph is captured, got a weight without one"
                )
            state |= {name: torch.zeros_like(weight) for name in _MEANS}
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            _settle(weight, state)
        elif not _is_laid_out_as(weight, state["exp_avg"]):
            _settle(weight, state)
        return state

    def _shadow_for(self, weight: Tensor) -> Shadow:
        shadow = self._shadows.get(weight)
        if shadow is None or not shadow.fits():
            _watch_optimizers()
            shadow = self._shadows[weight] = Shadow(weight)
        return shadow

    def refresh_shadows(self) -> None:
        """Write the shadows anew of weights that have been changed: before a replay of a graph that reads them."""
        for shadow in self._shadows.values():
            shadow.refresh()

    def state_dict(self) -> dict[str, Any]:
        """torch.optim.Adam's."""
        packed = super().state_dict()
        packed["state"] = {
            n: state | {"step": state["step"].reshape(-1)[0].clone()}
            for n, state in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the state_dict of this class or of torch.optim.Adam, on any device."""
        for group in state_dict["param_groups"]:
            _check_group(group)
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["fused"] = True
        for weight, state in self.state.items():
            _settle(weight, state)


@functools.cache
def _watch_optimizers() -> None:
    """torch's fused optimisers change weights without raising their version; from now on it is raised for them."""

    def raise_versions(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not isinstance(optimizer, Adam):
            for group in optimizer.param_groups:
                torch.autograd.graph.increment_version(group["params"])

    register_optimizer_step_post_hook(raise_versions)


def _check_group(group: dict[str, Any]) -> None:
    for name in _ABSENT:
        if group.get(name):
            raise ValueError(
                f"Adam: {name} must be False, got {group[name]}; torch.optim.Adam has it"
            )
    if group.get("weight_decay") and not group.get("decoupled_weight_decay"):
        raise ValueError(
            f"Adam: weight_decay must be decoupled, as AdamW's, got {group['weight_decay']} of torch.optim.Adam, which "
            "adds it to the gradient; torch.optim.Adam has that"
        )


def _rate_of(group: dict[str, Any]) -> Any:
    """What tells a group's learning rate from another's; of a tensor, which may change in place, its identity."""
    lr = group["lr"]
    return (id(lr),) if isinstance(lr, Tensor) else lr


def _decay(group: dict[str, Any], weights: list[Tensor]) -> None:
    """Shrink weights by lr * weight_decay; a learning rate on the device stays there, for a graph that reads it."""
    torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])


def _takes_kernel(weight: Tensor) -> bool:
    """Whether the kernel can update it: any order of the memory will do, a gap will not."""
    return (
        uses_kernels(weight)
        and weight.dtype == torch.float32
        and weight.numel() > 0
        and _has_no_gap(weight)
    )


def _has_no_gap(weight: Tensor) -> bool:
    """Whether its numbers lie side by side in some order that we know; torch's fused Adam is wrong otherwise."""
    return weight.is_contiguous() or row_major(weight) is not weight


def _settle(weight: Tensor, state: dict[str, Tensor]) -> None:
    """Bring a new or loaded state, or one whose weight has moved, to where and how a step needs it."""
    for name in _MEANS:
        if state[name].shape != weight.shape:
            raise ValueError(
                f"Adam: {name} must have its weight's shape {list(weight.shape)}, got {list(state[name].shape)}"
            )
        state[name] = _laid_out_as(weight, state[name])
    shape: tuple[int, ...] = ()
    if _takes_kernel(weight):
        with needing_triton("Adam"):
            from .kernels.adam import count_shape
        shape = count_shape(weight)
    step = state["step"].reshape(-1)[:1].to(weight.device, torch.float32)
    state["step"] = step.expand(shape).contiguous() if shape else step.reshape(())


def _gradient_of(weight: Tensor, fits: Callable[[Tensor, Tensor], bool] | None = None) -> Tensor:
    """A weight's gradient laid out as it is, or so that it fits."""
    grad = weight.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise TypeError("Adam: gradients must be dense, got a sparse one")
    if _is_laid_out_as(weight, grad) or (fits is not None and fits(weight, grad)):
        return grad
    return _laid_out_as(weight, grad)


def _is_laid_out_as(weight: Tensor, t: Tensor) -> bool:
    return (
        t.stride() == weight.stride()
        and t.shape == weight.shape
        and t.device == weight.device
        and t.dtype == weight.dtype
    )


def _laid_out_as(weight: Tensor, t: Tensor) -> Tensor:
    """t with its numbers in the order of the weight's memory."""
    if _is_laid_out_as(weight, t):
        return t
    like = torch.empty_strided(
        weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device
    )
    return like.copy_(t)


def to_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict as last.pt holds it: the means of an item-major weight transposed, [n_items, n_hidden]; lr a float."""
    state = {
        n: {name: row_major(t) for name, t in parts.items()}
        for n, parts in state_dict["state"].items()
    }
    groups = [group | {"lr": float(group["lr"])} for group in state_dict["param_groups"]]
    return state_dict | {"state": state, "param_groups": groups}


def from_file(state_dict: dict[str, Any], weights: list[Tensor]) -> dict[str, Any]:
    """The state_dict that to_file was given, of these weights, as many processes may hold a part of each."""
    of = dict(enumerate(weights))
    state = {
        n: {name: t.t() if _is_turned(t, of[n]) else t for name, t in parts.items()}
        for n, parts in state_dict["state"].items()
    }
    return state_dict | {"state": state}


def _is_turned(t: Tensor, weight: Tensor) -> bool:
    """Whether a mean of a file is its weight's transposed: by their shapes, which say nothing where they are square."""
    if t.ndim != 2 or t.shape != weight.shape:
        return t.ndim == 2
    return t.shape[0] == t.shape[1] and row_major(weight) is not weight
