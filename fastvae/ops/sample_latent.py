"""sample_latent: the encoder's output to a sample of the latent and its divergence from the prior, in one op.

CUDA tensors take the Triton kernels of fastvae.kernels.sample_latent. CPU tensors take the functions below.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ._checks import check_dtypes, check_kernel_dtypes, check_tensor, sum_dtype
from ._dispatch import Op, needing_triton


def sample_latent(encoded: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A sample z of each user's latent, and the divergence of its distribution from N(0, 1).

        z   = mu + exp(logvar / 2) * noise
        kld = -1/2 sum_j (1 + logvar - mu^2 - exp(logvar)),    (mu, logvar) = encoded

    >>> z, kld = sample_latent(torch.tensor([[3.0, 0.0]]), torch.ones(1, 1))
    >>> z, kld
    (tensor([[4.]]), tensor([4.5000]))

    encoded  [n_users, 2 n_latent]  float: mu and logvar side by side
    noise    [n_users, n_latent]    encoded's dtype: a standard normal draw, or None for z = mu
    returns  z [n_users, n_latent] in encoded's dtype; kld [n_users] in nats, fp32 (fp64 for fp64 input)

    Differentiable in encoded, by z and by kld. Half precision is computed in fp32 and rounded once; autocast changes
    nothing.
    Raises: TypeError (dtypes), ValueError (shapes), RuntimeError (mixed devices).
    Source: Liang et al. 2018 (arXiv:1802.05814), section 2.2; reference: fastvae.reference.sample_latent.
    """
    op = "sample_latent"
    check_tensor(op, "encoded", encoded, (None, None))
    n_users, width = encoded.shape
    if width % 2:
        raise ValueError(f"{op}: encoded must have an even number of columns, got {width}")
    if noise is not None:
        check_tensor(op, "noise", noise, (n_users, width // 2))
        check_dtypes(op, encoded.dtype, noise=noise)
        if noise.device != encoded.device:
            raise RuntimeError(
                f"{op}: noise must be on {encoded.device} like encoded, got {noise.device}"
            )
    check_kernel_dtypes(op, encoded=encoded)
    return _SAMPLE_LATENT(encoded, noise)


def _sample_latent_cpu(encoded: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """z and kld."""
    mu, logvar = encoded.to(sum_dtype(encoded.dtype)).contiguous().chunk(2, dim=1)
    std = torch.mul(logvar, 0.5).exp_()
    # exp(logvar) - 1 first: near zero it has no rounding of its own
    kld = torch.mul(std, std).sub_(1).sub_(logvar).addcmul_(mu, mu).sum(1).mul_(0.5)
    z = mu.clone() if noise is None else std.mul_(noise).add_(mu)
    return z.to(encoded.dtype), kld


def _sample_latent_fake(encoded, noise):
    n_users, width = encoded.shape
    kld = encoded.new_empty((n_users,), dtype=sum_dtype(encoded.dtype))
    return encoded.new_empty((n_users, width // 2)), kld


def _dencoded_cpu(
    encoded: Tensor, noise: Tensor | None, dz: Tensor | None, dkld: Tensor | None
) -> Tensor:
    """dencoded [n_users, 2 n_latent] from the gradients of z and kld; None stands for zeros."""
    mu, logvar = encoded.to(sum_dtype(encoded.dtype)).contiguous().chunk(2, dim=1)
    grad = mu.new_empty(encoded.shape)
    dmu, dlogvar = grad.chunk(2, dim=1)
    dz = mu.new_zeros(()) if dz is None else dz.to(mu.dtype)
    dkld = mu.new_zeros(()) if dkld is None else dkld[:, None]
    torch.addcmul(dz.expand_as(mu), mu, dkld, out=dmu)
    # 1/2 (dz noise std + dkld (std^2 - 1))
    std = torch.mul(logvar, 0.5).exp_()
    slope = torch.mul(std, dkld)
    slope = slope if noise is None else slope.addcmul_(dz, noise)
    torch.mul(slope.mul_(std).sub_(dkld), 0.5, out=dlogvar)
    return grad.to(encoded.dtype)


def _dencoded_fake(encoded, noise, dz, dkld):
    return torch.empty_like(encoded, memory_format=torch.contiguous_format)


@functools.cache
def _kernels():
    with needing_triton("sample_latent"):
        from ..kernels import sample_latent as kernels
    return kernels


def _sample_latent_cuda(encoded, noise):
    noise = None if noise is None else noise.contiguous()
    return _kernels().sample_latent_fwd(encoded.contiguous(), noise)


def _dencoded_cuda(encoded, noise, dz, dkld):
    noise = None if noise is None else noise.contiguous()
    dz = None if dz is None else dz.contiguous()
    return _kernels().sample_latent_bwd(encoded.contiguous(), noise, dz, dkld)


_DENCODED = Op("sample_latent_backward", _dencoded_cpu, _dencoded_cuda, _dencoded_fake)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, dz, dkld):
    if dz is None and dkld is None:
        return None, None
    return _DENCODED(*ctx.saved_tensors, dz, dkld), None


_SAMPLE_LATENT = Op(
    "sample_latent",
    _sample_latent_cpu,
    _sample_latent_cuda,
    _sample_latent_fake,
    _setup_context,
    _backward,
    n_differentiable=2,
)
