"""The models' middle layers on a GPU under autocast: as accurate as torch's, in fewer launches; elsewhere torch's."""

import pytest
import torch
from helpers import assert_as_accurate_as_torch
from torch import nn

from bench.launches import counted_launches, pretended_gpu
from fastvae.ops._linear import _Linear, linear


def layer_of(n_in=24, n_out=40, bias=True):
    torch.manual_seed(0)
    return nn.Linear(n_in, n_out, bias=bias)


def run(call, layer, h, dy):
    """The layer's result and its gradients."""
    h = h.detach().requires_grad_()
    y = call(layer, h)
    return y, *torch.autograd.grad(y, [h, *layer.parameters()], dy.to(y.dtype))


def plain(layer, h, tanh=True):
    return torch.tanh(layer(h)) if tanh else layer(h)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_as_accurate_as_torch(dtype, tanh, bias):
    layer, h, dy = layer_of(bias=bias), torch.randn(500, 24).to(dtype), torch.randn(500, 40)
    with autocast():
        same = run(lambda *a: plain(*a, tanh), layer, h, dy)
        with pretended_gpu():
            actual = run(lambda *a: linear(*a, tanh), layer, h, dy)
    truth = run(lambda *a: plain(*a, tanh), layer.double(), h.double(), dy)
    for a, s, t in zip(actual, same, truth, strict=True):
        assert a.dtype == s.dtype
        assert_as_accurate_as_torch(a, s, t)


def test_no_cast_of_what_is_there_and_none_of_a_gradient():
    layer, h, dy = layer_of(), torch.randn(5, 24).bfloat16(), torch.randn(5, 40).bfloat16()
    with counted_launches() as names, autocast():
        run(lambda *a: linear(*a, True), layer, h, dy)
    assert names == [
        "aten._to_copy", "aten._to_copy", "aten.addmm", "aten.tanh_",  # weight and bias
        "bias_gradient_kernel", "aten.mm", "aten.mm.dtype",
    ]  # fmt: skip


def test_only_the_gradients_that_are_needed():
    layer, h = layer_of(), torch.randn(5, 24).bfloat16().requires_grad_()
    layer.weight.requires_grad_(False)
    with pretended_gpu(), autocast():
        linear(layer, h, True).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad.any() and h.grad.any()
    with pretended_gpu(), autocast(), torch.no_grad():
        assert not linear(layer, h, True).requires_grad


class Twice(nn.Linear):
    def forward(self, h):
        return 2 * super().forward(h)


def hooked(register):
    layer = layer_of()
    getattr(layer, register)(lambda *_: None)
    return layer


def shadowed():
    layer = layer_of()
    layer.forward = lambda h: 2 * h
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: Twice(24, 40),
        lambda: hooked("register_forward_hook"),
        lambda: hooked("register_forward_pre_hook"),
        lambda: hooked("register_full_backward_hook"),
        lambda: hooked("register_full_backward_pre_hook"),
        shadowed,
        lambda: layer_of().bfloat16(),
    ],
)
def test_a_layer_that_does_more_is_called_as_it_is(monkeypatch, make):
    monkeypatch.setattr(_Linear, "apply", None)
    layer, h = make(), torch.randn(5, 24).bfloat16()
    with pretended_gpu(), autocast():
        assert torch.equal(linear(layer, h, True), plain(layer, h))


def test_hooks_of_all_modules_are_called():
    calls, layer, h = [], layer_of(), torch.randn(5, 24).bfloat16()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        with pretended_gpu(), autocast():
            linear(layer, h, True)
    finally:
        handle.remove()
    assert calls == [1]


def test_outside_autocast_and_on_a_cpu_torch_computes():
    layer, h = layer_of(), torch.randn(5, 24)
    with pretended_gpu():
        assert torch.equal(linear(layer, h, True), plain(layer, h))
    with autocast():
        assert torch.equal(linear(layer, h, False), plain(layer, h, False))
