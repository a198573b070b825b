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

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clicks import Clicks, gather_rows

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
    c0, c1 = position & _MASK_32, (position >> 32) & _MASK_32
    c2, c3 = torch.zeros_like(position), torch.zeros_like(position)
    k0, k1 = int(seed) & _MASK_32, (int(seed) >> 32) & _MASK_32
    for _ in range(10):
        high_0, low_0 = _mul_high_low(0xD2511F53, c0)
        high_1, low_1 = _mul_high_low(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK_32, (k1 + 0xBB67AE85) & _MASK_32
    return (c0 >> 8) >= round(dropout * 2**24)


def _mul_high_low(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the product of two 32-bit numbers, by halves of b, so that nothing leaves 63 bits."""
    by_low, by_high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (by_low >> 16) + by_high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (by_low & 0xFFFF)


def dense_keep(clicks: Clicks, seed: Tensor, dropout: float) -> Tensor:
    """dropout_keep of a batch of clicks as a dense mask, bool [n_users, n_items]; False where there is no click."""
    _, position = gather_rows(clicks.indptr, clicks.row_ids)
    batch = clicks.compact()
    users = torch.repeat_interleave(batch.row_lengths())
    mask = torch.zeros(batch.shape, dtype=torch.bool, device=clicks.device)
    mask[users, batch.indices.long()] = dropout_keep(seed, position, dropout)
    return mask


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


def linear_multinomial_nll(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor
) -> Tensor:
    """multinomial_nll of the last layer's logits = hidden W^T + b; weight [n_items, n_hidden]."""
    return multinomial_nll(F.linear(hidden, weight, bias), x)


def kld(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of N(mu, exp(logvar)) from N(0, I), summed over latents; [n_users], nats."""
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)


def sample_latent(encoded: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """z = mu + exp(logvar / 2) * noise and the kld of each user; without noise z = mu.

    encoded  [n_users, 2 n_latent]: mu and logvar side by side
    noise    [n_users, n_latent], or None
    """
    mu, logvar = encoded.chunk(2, dim=1)
    z = mu if noise is None else mu + torch.exp(logvar / 2) * noise
    return z, kld(mu, logvar)


class MultiVAE(nn.Module):
    """The dense Mult-VAE (with two_heads=False Mult-DAE), as in the paper; keys as fastvae.MultiVAE.

    p_dims   latent, hidden widths, n_items; the encoder mirrors it
    dropout  probability to drop an input click, after the L2 norm
    normalize_input, activation  as fastvae.MultiVAE
    """

    def __init__(
        self,
        p_dims: list[int],
        dropout: float = 0.5,
        two_heads: bool = True,
        normalize_input: bool = True,
        activation: str = "tanh",
    ):
        super().__init__()
        self.dropout, self.two_heads = dropout, two_heads
        self.normalize_input = normalize_input
        self.act = {"tanh": torch.tanh, "relu": torch.relu}[activation]
        q_dims = [*p_dims[:0:-1], (1 + two_heads) * p_dims[0]]
        q_layers, p_layers = _linears(q_dims), _linears(p_dims)
        self.encode = nn.ModuleDict({"q_layers": q_layers})
        self.decode = nn.ModuleDict({"p_layers": p_layers})
        self.encoder: list[Any] = list(q_layers.values())
        self.decoder: list[Any] = list(p_layers.values())

    def latent(self, x: Tensor, keep: Tensor | None, noise: Tensor | None):
        """z, mu, logvar; keep [n_users, n_items] and noise [n_users, n_latent] are drawn where None."""
        dropout = self.dropout if self.training else 0.0
        if keep is None and dropout > 0:
            keep = torch.rand_like(x) >= dropout
        first, *others = self.encoder
        h = sparse_linear(
            x, first.weight, first.bias, keep, dropout, self.normalize_input, tanh=False
        )
        for layer in others:
            h = layer(self.act(h))
        if not self.two_heads:
            return self.act(h), None, None
        mu, logvar = h.chunk(2, dim=1)
        if not self.training:
            return mu, mu, logvar
        noise = torch.randn_like(mu) if noise is None else noise
        return mu + torch.exp(logvar / 2) * noise, mu, logvar

    def logits(self, z: Tensor) -> Tensor:
        """Decoder output [n_users, n_items]."""
        *hidden, last = self.decoder
        for layer in hidden:
            z = self.act(layer(z))
        return last(z)

    def forward(self, x: Tensor, keep: Tensor | None = None, noise: Tensor | None = None):
        """logits, mu, logvar (Mult-DAE: logits) of a dense x."""
        z, mu, logvar = self.latent(x, keep, noise)
        return (self.logits(z), mu, logvar) if self.two_heads else self.logits(z)

    def loss(
        self, x: Tensor, beta: float, keep: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Mean over users of nll + beta * kld; nats per user."""
        z, mu, logvar = self.latent(x, keep, noise)
        nll = multinomial_nll(self.logits(z), x)
        return (nll + beta * kld(mu, logvar)).mean() if self.two_heads else nll.mean()


def _linears(dims: list[int]) -> nn.ModuleDict:
    layers = nn.ModuleDict()
    for n, (n_in, n_out) in enumerate(itertools.pairwise(dims)):
        layer = nn.Linear(n_in, n_out)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(layer.bias, std=0.001)
        layers[f"linear_{n}"] = layer
    return layers
