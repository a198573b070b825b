"""The encoder's output to a sample of the latent and its divergence from the prior, in one launch each way.

    (mu, logvar) = encoded          the two halves of a row
    z      = mu + exp(logvar / 2) * noise                       without noise z = mu
    kld    = 1/2 sum_j (mu^2 + exp(logvar) - 1 - logvar)        over the latents of a user
    dmu    = dz + dkld * mu
    dlogvar = 1/2 (dz * noise * exp(logvar / 2) + dkld * (exp(logvar) - 1))

Nothing but the inputs is kept for the backward, and neither half is copied out of encoded.
Math: Liang et al. 2018, section 2.2 (arXiv:1802.05814). Reference: fastvae.reference.sample_latent.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .launch import launch

MAX_BLOCK_D = 1024  # latents that a program reads at once; more go round a loop


@triton.jit
def _expm1(x):
    """exp(x) - 1 and exp(x) - 1 - x; near zero by a series, where the differences would keep no digit."""
    p = 1.0 / 5040.0 + x * (1.0 / 40320.0 + x * (1.0 / 362880.0))
    p = 1.0 / 24.0 + x * (1.0 / 120.0 + x * (1.0 / 720.0 + x * p))
    excess = x * x * (0.5 + x * (1.0 / 6.0 + x * p))
    far = tl.exp(x) - 1.0
    near = tl.abs(x) < 1.0
    return tl.where(near, x + excess, far), tl.where(near, excess, far - x)


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sample_latent_fwd_kernel(
    encoded_ptr, noise_ptr,  # inputs
    z_ptr, kld_ptr,  # outputs
    N_LATENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(0).to(tl.int64)
    kld = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, N_LATENT, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = d < N_LATENT
        mu = _load(encoded_ptr + u * 2 * N_LATENT + d, mask)
        logvar = _load(encoded_ptr + u * 2 * N_LATENT + N_LATENT + d, mask)
        _, excess = _expm1(logvar)
        kld += mu * mu + excess
        z = mu
        if noise_ptr is not None:
            z += tl.exp(0.5 * logvar) * _load(noise_ptr + u * N_LATENT + d, mask)
        tl.store(z_ptr + u * N_LATENT + d, z, mask=mask)
    tl.store(kld_ptr + u, 0.5 * tl.sum(kld, axis=0))


@triton.jit
def _sample_latent_bwd_kernel(
    encoded_ptr, noise_ptr, dz_ptr, dkld_ptr,  # inputs
    dencoded_ptr,  # outputs
    stride_dkld_u,  # strides, in elements
    N_LATENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < N_LATENT
    mu_offset, z_offset = u * 2 * N_LATENT + d, u * N_LATENT + d
    logvar = _load(encoded_ptr + mu_offset + N_LATENT, mask)
    dmu, dlogvar = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    if dz_ptr is not None:
        dmu = _load(dz_ptr + z_offset, mask)
        if noise_ptr is not None:
            dlogvar = 0.5 * dmu * _load(noise_ptr + z_offset, mask) * tl.exp(0.5 * logvar)
    if dkld_ptr is not None:
        dkld = tl.load(dkld_ptr + u * stride_dkld_u).to(tl.float32)
        dmu += dkld * _load(encoded_ptr + mu_offset, mask)
        slope, _ = _expm1(logvar)
        dlogvar += 0.5 * dkld * slope
    tl.store(dencoded_ptr + mu_offset, dmu, mask=mask)
    tl.store(dencoded_ptr + mu_offset + N_LATENT, dlogvar, mask=mask)


def block_of(n_latent: int) -> tuple[int, int]:
    """Latents that a program reads at once, and its warps: 16 bytes of bf16 a thread."""
    block_d = min(MAX_BLOCK_D, tiles.next_power_of_2(n_latent))
    return block_d, max(1, block_d // 256)


def sample_latent_fwd(encoded: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel. Arguments are already checked by fastvae.ops.

    encoded  [n_users, 2 n_latent]  fp32, bf16 or fp16; contiguous: mu and logvar side by side
    noise    [n_users, n_latent]    dtype of encoded; contiguous, or None for z = mu
    returns  z [n_users, n_latent] dtype of encoded, kld [n_users] fp32 (nats)
    """
    n_users, n_latent = encoded.shape[0], encoded.shape[1] // 2
    z = torch.empty(n_users, n_latent, dtype=encoded.dtype, device=encoded.device)
    kld = torch.empty(n_users, dtype=torch.float32, device=encoded.device)
    if n_users > 0:
        block_d, num_warps = block_of(n_latent)
        with tiles.device_guard(encoded):
            launch(
                _sample_latent_fwd_kernel, (n_users,),
                encoded, noise,
                z, kld,
                N_LATENT=n_latent, BLOCK_D=block_d, num_warps=num_warps,
            )  # fmt: skip
    return z, kld


def sample_latent_bwd(
    encoded: Tensor, noise: Tensor | None, dz: Tensor | None, dkld: Tensor | None
) -> Tensor:
    """Launch the backward kernel. Arguments are already checked by fastvae.ops.

    encoded, noise  as in sample_latent_fwd
    dz       [n_users, n_latent]    any float; contiguous, or None for zeros
    dkld     [n_users]              any float, any stride, 0 included, or None for zeros
    returns  dencoded [n_users, 2 n_latent] dtype of encoded
    """
    n_users, n_latent = encoded.shape[0], encoded.shape[1] // 2
    dencoded = torch.empty_like(encoded)
    if dencoded.numel() > 0:
        block_d, num_warps = block_of(n_latent)
        with tiles.device_guard(encoded):
            launch(
                _sample_latent_bwd_kernel, (n_users, tiles.cdiv(n_latent, block_d)),
                encoded, noise, dz, dkld,
                dencoded,
                0 if dkld is None else dkld.stride(0),
                N_LATENT=n_latent, BLOCK_D=block_d, num_warps=num_warps,
            )  # fmt: skip
    return dencoded
