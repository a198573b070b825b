"""The model and its ops in plain dense torch: the specification, and the oracle of the tests.

    s[u]      = 1 / (||x[u]|| (1 - p))
    h[u]      = tanh(W (keep[u] * x[u] * s[u]) + b)                 sparse_linear
    nll[u]    = sum_i x[u, i] * (logsumexp(logits[u]) - logits[u, i])   nats
    kld[u]    = -1/2 sum_j (1 + logvar - mu^2 - exp(logvar))            nats
    loss      = mean over users of nll + beta * kld

Everything here builds the dense [n_users, n_items] matrices that the rest of the package avoids; run it in fp64
for the truth. Math: Liang et al. 2018 (arXiv:1802.05814), sections 2.2 to 2.4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MASK_32 = 0xFFFFFFFF


def dropout_keep(seed: Tensor, position: Tensor, dropout: float) -> Tensor:
    """Keep mask of the input dropout: a pure function of seed and click, the same on every device.

    Click n of the matrix is kept where the first word r of Philox-4x32-10 with key seed and counter
    (n mod 2^32, n div 2^32, 0, 0) fulfils (r >> 8) >= round(dropout * 2^24).

    seed      [1]  int64
    position  [n]  int64: position of each click in the whole matrix's indices
    dropout   probability to drop, 0..1
    returns   [n]  bool
    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
    """
    c0, c1 = position & _MASK_32, position >> 32
    c2 = c3 = torch.zeros_like(position)
    k0, k1 = seed & _MASK_32, (seed >> 32) & _MASK_32
    for _ in range(10):
        # a product of two 32-bit numbers wraps into the sign bit of int64, but its bits are right
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((b >> 32) & _MASK_32) ^ c1 ^ k0,
            b & _MASK_32,
            ((a >> 32) & _MASK_32) ^ c3 ^ k1,
            a & _MASK_32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK_32, (k1 + 0xBB67AE85) & _MASK_32
    return (c0 >> 8) >= round(dropout * 2**24)


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
    normalize: bool = True,
    tanh: bool = True,
    tanh_input: bool = False,
) -> Tensor:
    """act(W (dropout(x / ||x||)) + b): the first layer on a dense x.

    x         [n_users, n_items]
    weight    [n_hidden, n_items]
    bias      [n_hidden], or None
    keep      [n_users, n_items] bool, or None to keep every click; kept clicks are divided by 1 - dropout
    normalize divide each row by its L2 norm first; a row without clicks stays zero
    tanh      apply tanh to the result
    tanh_input  apply tanh to the normalised, dropped-out x (a quirk of one public implementation)
    returns   [n_users, n_hidden]
    """
    if normalize:
        x = x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    if keep is not None:
        x = x * keep * (1 / (1 - dropout) if dropout < 1 else 0.0)
    if tanh_input:
        x = torch.tanh(x)
    y = F.linear(x, weight, bias)
    return torch.tanh(y) if tanh else y


def multinomial_nll(logits: Tensor, x: Tensor) -> Tensor:
    """nll[u] = sum_i x[u, i] * (lse[u] - logits[u, i]), from dense logits and x [n_users, n_items]; nats."""
    return -(torch.log_softmax(logits, dim=1) * x).sum(1)


def linear_multinomial_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """multinomial_nll of the last layer's logits = hidden W^T + b; weight [n_items, n_hidden]."""
    return multinomial_nll(F.linear(hidden, weight, bias), x)


def kld(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of N(mu, exp(logvar)) from N(0, I), summed over latents; [n_users], nats."""
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)
