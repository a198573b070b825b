"""sample_latent's kernels: against the plain reference in fp64, on edges of a block, and at the ends of the range."""

import math

import pytest
import torch
from helpers import DEVICE, KERNEL_DTYPES, assert_as_accurate_as_torch

from fastvae import reference
from fastvae.kernels.sample_latent import MAX_BLOCK_D, sample_latent_bwd, sample_latent_fwd
from fastvae.ops import _dispatch, sample_latent

SHAPES = [
    pytest.param(0, 4, id="no-users"),
    pytest.param(3, 0, id="no-latents"),
    pytest.param(2, 1, id="one-latent"),
    pytest.param(5, 3, id="no-power-of-two"),
    pytest.param(3, 32, id="a-warp"),
    pytest.param(24, 200, id="the-papers-width"),
    pytest.param(2, MAX_BLOCK_D, id="exactly-a-block"),
    pytest.param(2, 2 * MAX_BLOCK_D + 7, id="blocks-and-a-tail"),
]


def draw(n_users, n_latent, dtype=torch.float32, spread=1.0):
    """encoded, noise, dz and dkld."""
    torch.manual_seed(0)
    encoded = spread * torch.randn(n_users, 2 * n_latent)
    noise, dz = torch.randn(2, n_users, n_latent)
    tensors = (encoded.to(dtype), noise.to(dtype), dz.to(dtype), torch.randn(n_users))
    return [t.to(DEVICE) for t in tensors]


def run(encoded, noise, dz, dkld):
    """z, kld and dencoded by the kernels."""
    z, kld = sample_latent_fwd(encoded, noise)
    return z, kld, sample_latent_bwd(encoded, noise, dz, dkld)


def by_torch(encoded, noise, dz, dkld, dtype):
    """The same by the reference, computed in dtype."""
    leaf = encoded.detach().to(dtype).requires_grad_()
    outputs = reference.sample_latent(leaf, None if noise is None else noise.to(dtype))
    given = [(y, dy) for y, dy in zip(outputs, (dz, dkld), strict=True) if dy is not None]
    grads = [dy.to(y.dtype) for y, dy in given]
    return *outputs, *torch.autograd.grad([y for y, _ in given], leaf, grads)


def check(encoded, noise, dz, dkld, slack=2.0):
    actual = run(encoded, noise, dz, dkld)
    assert [t.dtype for t in actual] == [encoded.dtype, torch.float32, encoded.dtype]
    same = by_torch(encoded, noise, dz, dkld, encoded.dtype)
    truth = by_torch(encoded, noise, dz, dkld, torch.float64)
    for a, s, t in zip(actual, same, truth, strict=True):
        assert_as_accurate_as_torch(a, s, t, slack)


@pytest.mark.parametrize(("n_users", "n_latent"), SHAPES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_equals_the_reference(n_users, n_latent, dtype):
    check(*draw(n_users, n_latent, dtype))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_without_noise_z_is_mu(dtype):
    encoded, _, dz, dkld = draw(5, 200, dtype)
    check(encoded, None, dz, dkld)
    assert torch.equal(sample_latent_fwd(encoded, None)[0], encoded[:, :200])


@pytest.mark.parametrize("given", ["z", "kld"])
@pytest.mark.parametrize("with_noise", [True, False])
def test_the_gradient_of_one_output_alone(given, with_noise):
    encoded, noise, dz, dkld = draw(5, 200)
    dz, dkld = (dz, None) if given == "z" else (None, dkld)
    check(encoded, noise if with_noise else None, dz, dkld)


def test_an_encoder_just_initialised():
    # a kld of logvar^2 / 2: a difference of rounded exponentials keeps no digit of it
    encoded, noise, dz, dkld = draw(5, 200, spread=1e-3)
    kld, dencoded = run(encoded, noise, dz, dkld)[1:]
    truth = by_torch(encoded, noise, dz, dkld, torch.float64)
    torch.testing.assert_close(kld.double(), truth[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(dencoded.double(), truth[2], rtol=1e-5, atol=1e-9)


def test_by_hand():
    # std e, noise 2, and dkld 10: dmu = 1 + 10 * 3, dlogvar = 1/2 (1 * 2 * e + 10 * (e^2 - 1))
    encoded = torch.tensor([[3.0, 2.0]], device=DEVICE)
    noise, one = torch.full((1, 1), 2.0, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    z, kld, dencoded = run(encoded, noise, one, torch.full((1,), 10.0, device=DEVICE))
    assert z.item() == pytest.approx(3 + 2 * math.e, rel=1e-6)
    assert kld.item() == pytest.approx(-0.5 * (1 + 2 - 9 - math.exp(2)), rel=1e-6)
    expected = [31.0, math.e + 5 * (math.exp(2) - 1)]
    assert dencoded[0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("logvar", [200.0, -200.0, math.inf, -math.inf, math.nan])
def test_beyond_the_range_as_plain_torch(logvar):
    encoded = torch.tensor([[0.0, 1.0, logvar, 0.0]], device=DEVICE)
    noise, dz = torch.ones(1, 2, device=DEVICE), torch.ones(1, 2, device=DEVICE)
    dkld = torch.ones(1, device=DEVICE)
    actual, same = run(encoded, noise, dz, dkld), by_torch(encoded, noise, dz, dkld, torch.float32)
    for a, s in zip(actual, same, strict=True):
        torch.testing.assert_close(a, s, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_half_precision_does_not_overflow_on_the_way():
    # a standard deviation of exp(12), beyond fp16, times a small noise
    encoded = torch.tensor([[0.0, 24.0]], device=DEVICE).half()
    noise = torch.full((1, 1), 1e-3, device=DEVICE).half()
    z, kld = sample_latent_fwd(encoded, noise)
    assert z.item() == pytest.approx(math.exp(12) * noise.item(), rel=1e-3)
    assert kld.item() == pytest.approx(0.5 * (math.exp(24) - 25), rel=1e-5)


def test_upstream_gradients_of_any_stride():
    encoded, noise, dz, _ = draw(3, 200)
    weights = torch.tensor([0.5, 1.0, 2.0], device=DEVICE)
    plain = sample_latent_bwd(encoded, noise, dz, weights)
    strided = torch.stack([weights, weights + 7], 1)[:, 0]
    assert torch.equal(sample_latent_bwd(encoded, noise, dz, strided), plain)
    ones = sample_latent_bwd(encoded, noise, dz, torch.ones(3, device=DEVICE))
    expanded = torch.ones((), device=DEVICE).expand(3)
    assert torch.equal(sample_latent_bwd(encoded, noise, dz, expanded), ones)


def test_nothing_given_is_written_to():
    given = draw(3, 200)
    before = [t.clone() for t in given]
    first, second = run(*given), run(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("with_noise", [True, False])
def test_the_op_on_a_gpu(monkeypatch, with_noise):
    # its registered functions, which the interpreter lets run on any tensor
    monkeypatch.setattr(_dispatch, "uses_kernels", lambda _: True)
    encoded, noise, dz, dkld = draw(5, 7)
    noise = noise if with_noise else None
    leaf = torch.stack([encoded, encoded + 7], 2)[:, :, 0].requires_grad_()
    outputs = sample_latent(leaf, None if noise is None else noise.t().contiguous().t())
    dz_apart = dz.t().contiguous().t()
    actual = (*outputs, *torch.autograd.grad(outputs, leaf, (dz_apart, dkld)))
    for a, b in zip(actual, run(encoded, noise, dz, dkld), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_shapes_on_a_gpu(dtype):
    check(*draw(24_576, 200, dtype))
