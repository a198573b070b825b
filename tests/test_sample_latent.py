"""sample_latent, CPU path and op: against the plain reference in fp64, by hand, gradcheck, opcheck."""

import math

import pytest
import torch
from helpers import assert_as_accurate_as_torch

from fastvae import reference
from fastvae.ops import sample_latent
from fastvae.ops.sample_latent import _DENCODED, _SAMPLE_LATENT

SHAPES = [
    pytest.param(0, 4, id="no-users"),
    pytest.param(3, 0, id="no-latents"),
    pytest.param(2, 1, id="one-latent"),
    pytest.param(5, 3, id="no-power-of-two"),
    pytest.param(24, 200, id="the-papers-width"),
]


def run(call, encoded, noise, dz, dkld):
    """z, kld and the gradient for encoded."""
    leaf = encoded.detach().requires_grad_()
    outputs = call(leaf, noise)
    grads = [dy.to(y.dtype) for y, dy in zip(outputs, (dz, dkld), strict=True)]
    return *outputs, *torch.autograd.grad(outputs, leaf, grads)


def draw(n_users, n_latent, dtype=torch.float32):
    torch.manual_seed(0)
    encoded = torch.randn(n_users, 2 * n_latent).to(dtype)
    noise, dz = torch.randn(2, n_users, n_latent).to(dtype)
    return encoded, noise, dz, torch.randn(n_users)


@pytest.mark.parametrize(("n_users", "n_latent"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_noise", [True, False])
def test_equals_the_reference(n_users, n_latent, dtype, with_noise):
    encoded, noise, dz, dkld = draw(n_users, n_latent, dtype)
    noise = noise if with_noise else None
    actual = run(sample_latent, encoded, noise, dz, dkld)
    same = run(reference.sample_latent, encoded, noise, dz, dkld)
    wide = [None if t is None else t.double() for t in (encoded, noise, dz, dkld)]
    truth = run(reference.sample_latent, *wide)
    assert [t.dtype for t in actual] == [dtype, torch.float32, dtype]
    for a, s, t in zip(actual, same, truth, strict=True):
        assert_as_accurate_as_torch(a, s, t)


def test_by_hand():
    encoded = torch.tensor([[3.0, 2.0]], requires_grad=True)
    z, kld = sample_latent(encoded, torch.full((1, 1), 2.0))
    (z.sum() + 10 * kld.sum()).backward()
    assert z.item() == pytest.approx(3 + 2 * math.e, rel=1e-6)
    assert kld.item() == pytest.approx(-0.5 * (1 + 2 - 9 - math.exp(2)), rel=1e-6)
    expected = [31.0, math.e + 5 * (math.exp(2) - 1)]
    assert encoded.grad[0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("logvar", [200.0, -200.0, math.inf, -math.inf, math.nan])
def test_beyond_the_range_as_plain_torch(logvar):
    encoded, ones = torch.tensor([[0.0, 1.0, logvar, 0.0]]), torch.ones(1, 2)
    given = (encoded, ones, ones, torch.ones(1))
    for a, s in zip(run(sample_latent, *given), run(reference.sample_latent, *given), strict=True):
        torch.testing.assert_close(a, s, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_an_encoder_just_initialised():
    # a kld of logvar^2 / 2, the difference of numbers near one
    encoded, noise, dz, dkld = draw(500, 200)
    given = (1e-2 * encoded, noise, dz, dkld)
    actual, same = run(sample_latent, *given), run(reference.sample_latent, *given)
    truth = run(reference.sample_latent, *(t.double() for t in given))
    for a, s, t in zip(actual, same, truth, strict=True):
        assert_as_accurate_as_torch(a, s, t)


def test_autocast_changes_nothing():
    encoded, noise, dz, dkld = draw(5, 200)
    plain = run(sample_latent, encoded, noise, dz, dkld)
    with torch.autocast("cpu", torch.bfloat16):
        under = run(sample_latent, encoded, noise, dz, dkld)
    assert all(torch.equal(a, b) for a, b in zip(under, plain, strict=True))


def test_one_output_alone_and_columns_apart():
    _, noise, dz, dkld = draw(5, 200)
    encoded = torch.randn(400, 5).t().requires_grad_()
    z, kld = sample_latent(encoded, noise.t().contiguous().t())
    both = torch.autograd.grad((z, kld), encoded, (dz, dkld), retain_graph=True)[0]
    of_z = torch.autograd.grad(z, encoded, dz, retain_graph=True)[0]
    of_kld = torch.autograd.grad(kld, encoded, dkld)[0]
    torch.testing.assert_close(of_z + of_kld, both)
    assert not of_kld[:, :200].equal(of_z[:, :200])


@pytest.mark.parametrize("with_noise", [True, False])
def test_gradcheck(with_noise):
    torch.manual_seed(0)
    encoded = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 3, dtype=torch.float64) if with_noise else None
    assert all(t.dtype == torch.float64 for t in sample_latent(encoded, noise))
    assert torch.autograd.gradcheck(lambda e: sample_latent(e, noise), encoded)


@pytest.mark.parametrize("with_noise", [True, False])
def test_opcheck(with_noise):
    encoded, noise, dz, dkld = draw(3, 4)
    encoded.requires_grad_()
    noise = noise if with_noise else None
    torch.library.opcheck(_SAMPLE_LATENT.registered, (encoded, noise))
    for upstream in ((dz, dkld), (dz, None), (None, dkld)):
        torch.library.opcheck(_DENCODED.registered, (encoded.detach(), noise, *upstream))


@pytest.mark.parametrize(
    ("encoded", "noise", "error", "message"),
    [
        ([[1.0, 2.0]], None, TypeError, "encoded must be a tensor, got list"),
        (torch.ones(2), None, ValueError, "encoded must have shape [any, any], got [2]"),
        (torch.ones(2, 3), None, ValueError, "encoded must have an even number of columns, got 3"),
        (torch.ones(2, 4).int(), None, TypeError, "encoded must be floating point, got int32"),
        (torch.ones(2, 4), torch.ones(2, 4), ValueError, "noise must have shape [2, 2], got [2, 4]"),
        (torch.ones(2, 4).half(), torch.ones(2, 2), TypeError, "noise must be float16, got float32"),
        (torch.ones(2, 4), torch.ones(2, 2, device="meta"), RuntimeError,
         "noise must be on cpu like encoded, got meta"),
    ],
)  # fmt: skip
def test_bad_input_is_named(encoded, noise, error, message):
    with pytest.raises(error) as caught:
        sample_latent(encoded, noise)
    assert str(caught.value) == f"sample_latent: {message}"
