"""The networks of other Mult-VAE code, rebuilt from their architecture: the keys of their state_dict and their forward.

dims  [n_items, ..., n_latent] of the encoder; the decoder mirrors it
vae   the Mult-VAE, or the Mult-DAE where the code base has one (DAES)

forward(x) of a dense x [n_users, n_items] gives the logits; those of TRAINED give what their training loops take:
logits, mu and logvar. What each does otherwise than the paper is in fastvae/convert.py.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linears(dims: list[int]) -> list[nn.Linear]:
    """A layer from each width to the next."""
    return [nn.Linear(a, b) for a, b in itertools.pairwise(dims)]


def both(dims: list[int], vae: bool) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """Encoder and decoder; a VAE's last encoder layer gives mu and logvar."""
    return linears([*dims[:-1], (1 + vae) * dims[-1]]), linears(dims[::-1])


def chain(layers, h: Tensor, act=torch.tanh, last: bool = False) -> Tensor:
    """The layers one after the other, act between them and, where last is true, behind them."""
    *front, end = layers
    for layer in front:
        h = act(layer(h))
    return act(end(h)) if last else end(h)


def sampled(h: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """z, mu, logvar."""
    mu, logvar = h.chunk(2, dim=1)
    return (mu + torch.randn_like(mu) * (logvar / 2).exp() if training else mu), mu, logvar


class RecoTour(nn.Module):
    def __init__(self, dims: list[int], vae: bool = True):
        super().__init__()
        self.vae = vae
        self.encode, self.decode = nn.Module(), nn.Module()
        q, p = both(dims, vae)
        self.encode.q_layers, self.decode.p_layers = self.stack(q, 0.5), self.stack(p, 0.0)

    @staticmethod
    def stack(layers: list[nn.Linear], dropout: float) -> nn.Sequential:
        rates = [dropout, *[0.0] * (len(layers) - 1)]
        pairs = enumerate(zip(rates, layers, strict=True))
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for n, (rate, layer) in pairs:
            parts |= {f"dropout_{n}": nn.Dropout(rate), f"linear_{n}": layer}
        return nn.Sequential(parts)

    def forward(self, x: Tensor):
        h = chain(self.encode.q_layers, F.normalize(x), last=not self.vae)
        if not self.vae:
            return chain(self.decode.p_layers, h)
        z, mu, logvar = sampled(h, self.training)
        return chain(self.decode.p_layers, z), mu, logvar


class VaeCf(nn.Module):
    def __init__(self, dims: list[int], vae: bool = True):
        super().__init__()
        self.vae, self.drop = vae, nn.Dropout(0.5)
        q, p = both(dims, vae)
        if vae:
            self.q_layers, self.p_layers = nn.ModuleList(q), nn.ModuleList(p)
        else:
            self.layers = nn.ModuleList([*q, *p])

    def forward(self, x: Tensor):
        h = self.drop(F.normalize(x))
        if not self.vae:
            return chain(self.layers, h)
        z, mu, logvar = sampled(chain(self.q_layers, h), self.training)
        return chain(self.p_layers, z), mu, logvar


class RecBole(nn.Module):
    """Column 0 of x is padding."""

    def __init__(self, dims: list[int], vae: bool = True):
        super().__init__()
        q, p = both(dims, vae)
        if vae:
            self.encoder = nn.Sequential(*self.with_tanh(q)[:-1])
        else:
            self.encoder = nn.Module()
            layers = [part for layer in q for part in (nn.Dropout(0.0), layer, nn.Tanh())]
            self.encoder.mlp_layers = nn.Sequential(*layers)
        self.decoder = nn.Sequential(*self.with_tanh(p)[:-1])
        self.vae = vae

    @staticmethod
    def with_tanh(layers: list[nn.Linear]) -> list[nn.Module]:
        return [part for layer in layers for part in (layer, nn.Tanh())]

    def forward(self, x: Tensor) -> Tensor:
        h = F.normalize(x)
        return self.decoder(
            self.encoder(h).chunk(2, dim=1)[0] if self.vae else self.encoder.mlp_layers(h)
        )


class Rectorch(nn.Module):
    def __init__(self, dims: list[int], vae: bool = True):
        super().__init__()
        self.vae = vae
        self.enc_layers, self.dec_layers = map(nn.ModuleList, both(dims, vae))

    def forward(self, x: Tensor) -> Tensor:
        h = chain(self.enc_layers, F.normalize(x), last=not self.vae)
        return chain(self.dec_layers, h.chunk(2, dim=1)[0] if self.vae else h)


class Cornac(nn.Module):
    def __init__(self, dims: list[int], vae: bool = True, act: type[nn.Module] = nn.Tanh):
        super().__init__()
        *q, _ = linears(dims)
        self.encoder, self.decoder = self.stack(q, act), self.stack(linears(dims[::-1]), act)[:-1]
        self.enc_mu, self.enc_logvar = (nn.Linear(*dims[-2:]) for _ in "ab")

    @staticmethod
    def stack(layers: list[nn.Linear], act: type[nn.Module]) -> nn.Sequential:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for n, layer in enumerate(layers):
            parts |= {f"fc{n}": layer, f"act{n}": act()}
        return nn.Sequential(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.enc_mu(self.encoder(x)))


class WarpRec(nn.Module):
    """One hidden layer, no other depth."""

    def __init__(self, dims: list[int], vae: bool = True):
        super().__init__()
        n_items, width, n_latent = dims
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.dense_proj = nn.Sequential(nn.Linear(n_items, width), nn.Tanh())
        mean = nn.Linear(width, n_latent)
        self.encoder.dense_mean = mean if vae else nn.Sequential(mean, nn.Tanh())
        if vae:
            self.encoder.dense_log_var = nn.Linear(width, n_latent)
        self.decoder.dense_proj = nn.Sequential(nn.Linear(n_latent, width), nn.Tanh())
        self.decoder.dense_output = nn.Linear(width, n_items)

    def forward(self, x: Tensor) -> Tensor:
        encoder, decoder = self.encoder, self.decoder
        z = encoder.dense_mean(encoder.dense_proj(F.normalize(x)))
        return decoder.dense_output(decoder.dense_proj(z))


class RePlay(nn.Module):
    def __init__(self, dims: list[int], vae: bool = True):
        super().__init__()
        self.encoder, self.decoder = map(nn.ModuleList, both(dims, vae))

    def forward(self, x: Tensor) -> Tensor:
        h = chain(self.encoder, F.normalize(x), torch.relu)
        return chain(self.decoder, h.chunk(2, dim=1)[0], torch.relu)


class RecPack(nn.Module):
    """One hidden layer, no other depth."""

    def __init__(self, dims: list[int], vae: bool = True):
        super().__init__()
        q, p = both(dims, vae)
        self.q_in_hid_layer, self.q_hid_bn_layer = q
        self.p_bn_hid_layer, self.p_hid_out_layer = p
        self.layers = nn.ModuleList([*q, *p])

    def forward(self, x: Tensor) -> Tensor:
        mu = self.q_hid_bn_layer(torch.tanh(self.q_in_hid_layer(F.normalize(x)))).chunk(2, 1)[0]
        return self.p_hid_out_layer(torch.tanh(self.p_bn_hid_layer(mu)))


class Paper(nn.Module):
    """The TensorFlow code: products from the right, names as its variables have."""

    def __init__(self, dims: list[int], vae: bool = True):
        super().__init__()
        self.vae = vae
        q, p = both(dims, vae)
        parts = {"q_": q, "p_": p} if vae else {"": [*q, *p]}
        self.variables = {
            name: value.detach()
            for part, layers in parts.items()
            for n, layer in enumerate(layers)
            for name, value in (
                (f"weight_{part}{n}to{n + 1}:0", layer.weight.t().contiguous()),
                (f"bias_{part}{n + 1}:0", layer.bias),
            )
        }

    def part(self, part: str, h: Tensor) -> Tensor:
        weights = [v for name, v in self.variables.items() if name.startswith(f"weight_{part}")]
        biases = [v for name, v in self.variables.items() if name.startswith(f"bias_{part}")]
        layers = [
            lambda h, w=w, b=b: h @ w + b  # type: ignore[misc]
            for w, b in zip(weights, biases, strict=True)
        ]
        return chain(layers, h)

    def forward(self, x: Tensor) -> Tensor:
        h = F.normalize(x)
        return self.part("p_", self.part("q_", h).chunk(2, 1)[0]) if self.vae else self.part("", h)


DAES = (RecoTour, VaeCf, RecBole, Rectorch, WarpRec, Paper)
ONE_DEPTH = (WarpRec, RecPack)
TRAINED = (RecoTour, VaeCf)
