"""MultiVAE and MultiDAE, the models of Liang et al. 2018 (arXiv:1802.05814). Start here.

    h        = tanh(W (dropout(x / ||x||)) + b)        sparse_linear: reads the clicks, not a dense row
    mu, logvar = W h + b                               (MultiDAE: tanh of one vector instead)
    z        = mu + exp(logvar / 2) * noise            sample_latent, in training; mu in evaluation
    logits   = W tanh(W z + b) + b
    loss     = mean over users of nll + beta * kld     linear_multinomial_nll: no logits, no dense target

Names, shapes and state_dict keys follow the public PyTorch code whose checkpoints people have:
encode.q_layers.linear_0.weight and so on, every weight [out, in].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_catalogue, check_choice, check_flag, check_per_click
from ._dense import clicks_in
from ._draws import Drawing
from ._layers import ACTIVATIONS, Decoder, Encoder, dtype_of
from ._model_checks import check_beta, check_dims, check_dropout, described
from .clicks import Clicks, dtype_name
from .ops import linear_multinomial_nll, multinomial_nll, sample_latent
from .ops._dispatch import is_watched
from .ops._linear import is_only

_ARGUMENTS = (
    "p_dims", "dropout_enc", "dropout_dec", "q_dims",
    "tanh_after_dropout", "normalize_input", "activation",
)  # fmt: skip


class _MultiModel(Drawing):
    """What the two models share; latent and forward differ."""

    # whether the encoder gives mu and logvar
    two_heads: bool
    # where other processes hold the other items: parallel.ItemPart
    part: Any = None

    def __init__(
        self,
        p_dims: Sequence[int],
        dropout_enc: Sequence[float] | None = None,
        dropout_dec: Sequence[float] | None = None,
        q_dims: Sequence[int] | None = None,
        tanh_after_dropout: bool = False,
        normalize_input: bool = True,
        activation: str = "tanh",
        item_major: bool = True,
    ):
        super().__init__()
        name = type(self).__name__
        self.p_dims, self.q_dims = p_dims, q_dims = check_dims(name, p_dims, q_dims)
        self.n_items = p_dims[-1]
        enc = check_dropout(name, "dropout_enc", dropout_enc, len(q_dims) - 1, 0.5)
        dec = check_dropout(name, "dropout_dec", dropout_dec, len(p_dims) - 1, 0.0)
        self.dropout_enc, self.dropout_dec = enc, dec
        self.tanh_after_dropout = check_flag(name, "tanh_after_dropout", tanh_after_dropout)
        self.normalize_input = check_flag(name, "normalize_input", normalize_input)
        self.activation = check_choice(name, "activation", activation, tuple(ACTIVATIONS))
        out_dims = [*q_dims[:-1], 2 * q_dims[-1]] if self.two_heads else q_dims
        self.encode = Encoder(
            out_dims, enc, not self.two_heads, tanh_after_dropout, normalize_input, activation,
            check_flag(name, "item_major", item_major),
        )  # fmt: skip
        self.decode = Decoder(p_dims, dec, tanh_after_dropout, activation)

    def config(self) -> dict:
        """The constructor's arguments, for a checkpoint; JSON values only."""
        return {name: getattr(self, name) for name in _ARGUMENTS}

    def latent(self, x: Tensor | Clicks) -> tuple[Tensor, Tensor | None]:
        """z, and the kld of each user [n_users] or None for a model without."""
        raise NotImplementedError

    def loss_terms(
        self, clicks: Clicks, per_click: bool = False, normalize: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """nll and kld of each user, both [n_users] in nats, fp32 (fp64 in an fp64 model).

        loss is mean(nll + beta * kld).
        per_click=True divides both by the user's clicks N_u (a user without clicks counts 0).
        """
        per_click = check_per_click("loss", per_click, normalize)
        check_catalogue("loss", "clicks", clicks, self.n_items)
        z, kld = self.latent(clicks)
        nll = self._nll(z, clicks)
        kld = torch.zeros_like(nll) if kld is None else kld
        if per_click:
            n_clicks = clicks.row_sums()
            share = torch.where(n_clicks > 0, 1 / n_clicks.clamp_min(1e-30), 0)
            nll, kld = nll * share, kld * share
        return nll, kld

    def _nll(self, z: Tensor, clicks: Clicks) -> Tensor:
        if not (is_only(self.decode, Decoder) and is_only(self.decode.output, nn.Linear)):
            return multinomial_nll(self.decode(z), clicks)
        hidden, last = self.decode.hidden(z), self.decode.output
        if self.part is not None:
            return self.part.nll(hidden, last, clicks)
        return linear_multinomial_nll(hidden, last.weight, last.bias, clicks)

    def loss(
        self,
        clicks: Clicks,
        beta: float | Tensor = 0.0,
        per_click: bool = False,
        normalize: str | None = None,
    ) -> Tensor:
        """Mean over users of nll + beta * kld, a scalar in nats per user: the fast path, no logits leave it.

        A first or last layer that is not an nn.Linear alone (LoRA in its place, hooks on it) is called on dense rows.

        >>> model = MultiVAE([8, 16, 100])
        >>> x = Clicks([0, 2, 3], [4, 7, 99], n_items=100)
        >>> model.loss(x, beta=0.2).backward()

        clicks     [n_users, n_items] on the model's device; train.rows(ids) for a batch
        beta       weight of kld, a float or a scalar tensor
        per_click  False, as the paper and its results; True divides a user's two terms by N_u
        normalize  older words for it, "none" or "clicks"; they go on working with a DeprecationWarning
        Raises: ValueError, TypeError or RuntimeError for arguments that do not fit.
        Source: Liang et al. 2018, eq. 7 with beta; reference: fastvae.reference.
        """
        check_beta("loss", "beta", beta)
        per_click = check_per_click("loss", per_click, normalize)
        return _mean_loss(*self.loss_terms(clicks, per_click), beta)


class MultiVAE(_MultiModel):
    """Variational autoencoder with a multinomial likelihood (Mult-VAE).

    >>> model = MultiVAE(p_dims=[8, 16, 100])
    >>> logits, mu, logvar = model(Clicks([0, 2, 3], [4, 7, 99], n_items=100))
    >>> logits.shape, mu.shape
    (torch.Size([2, 100]), torch.Size([2, 8]))

    p_dims       decoder widths, latent first, n_items last: [200, 600, n_items] in the paper; [200, n_items] has no
                 hidden layer
    dropout_enc  dropout in front of each encoder layer, default 0.5 on the clicks and 0 elsewhere
    dropout_dec  dropout in front of each decoder layer, default 0
    q_dims       encoder widths, n_items first; default p_dims reversed
    tanh_after_dropout  apply tanh also after every dropout (but the last layer's output stays as it is), a quirk of one
                 public implementation whose checkpoints need it
    normalize_input  divide a user's row by its L2 norm first, as the paper does
    item_major   store the first weight item by item, as its gather wants it; False: row by row as nn.Linear, for what
                 flattens weights (parameters_to_vector, LBFGS). Slower, and not kept in checkpoints
    activation   "tanh", as the paper, or "relu": of every layer but those that give mu, logvar and the logits
    Raises: ValueError where dims or dropouts do not fit.
    Source: Liang et al. 2018 (arXiv:1802.05814), sections 2.1 to 2.3.
    """

    two_heads = True

    def _sample(self, x: Tensor | Clicks) -> tuple[Tensor, Tensor, Tensor]:
        encoded = self.encode(x)
        mu, logvar = encoded.chunk(2, dim=1)
        z = sample_latent(encoded, self.draw_noise(mu))[0] if self.training else mu
        return z, mu, logvar

    def latent(self, x: Tensor | Clicks) -> tuple[Tensor, Tensor | None]:
        """z [n_users, n_latent] and kld [n_users] in fp32, or in fp64 where the model is."""
        encoded = self.encode(x)
        noise = self.draw_noise(encoded[:, : self.p_dims[0]]) if self.training else None
        return sample_latent(encoded, noise)

    def forward(
        self,
        x: Tensor | Clicks,
        beta: float | Tensor | None = None,
        per_click: bool = False,
        normalize: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | Tensor:
        """logits [n_users, n_items], mu and logvar [n_users, n_latent]; x dense float or Clicks.

        On a CPU a dense x that is mostly zeros goes by its clicks, as Clicks do: derivatives are taken once, and
        dropout's mask is drawn from torch's generator by another rule than F.dropout's. An x that requires grad stays
        dense.

        With beta given, what loss(x, beta, per_click) returns, for wrappers such as DistributedDataParallel that see
        nothing but forward. There each process must draw dropout and noise of its own: torch.manual_seed(rank).
        """
        per_click = check_per_click("loss", per_click, normalize, stacklevel=5)
        if _wants_loss(self, beta, per_click):
            return self.loss(x, beta, per_click)  # type: ignore[arg-type]
        z, mu, logvar = self._sample(_check_input(self, x))
        return self.decode(z), mu, logvar


class MultiDAE(_MultiModel):
    """Denoising autoencoder with a multinomial likelihood (Mult-DAE): no sampling, no kld, tanh on its latent too.

    >>> model = MultiDAE(p_dims=[8, 100])
    >>> model(torch.zeros(2, 100)).shape
    torch.Size([2, 100])

    Arguments as MultiVAE. Source: Liang et al. 2018 (arXiv:1802.05814), section 4.3.
    """

    two_heads = False

    def latent(self, x: Tensor | Clicks) -> tuple[Tensor, Tensor | None]:
        """z [n_users, n_latent] and None."""
        return self.encode(x), None

    def forward(
        self,
        x: Tensor | Clicks,
        beta: float | Tensor | None = None,
        per_click: bool = False,
        normalize: str | None = None,
    ) -> Tensor:
        """logits [n_users, n_items]; x dense float or Clicks. With beta given the loss, see MultiVAE.forward."""
        per_click = check_per_click("loss", per_click, normalize, stacklevel=5)
        if _wants_loss(self, beta, per_click):
            return self.loss(x, beta, per_click)  # type: ignore[arg-type]
        return self.decode(self.encode(_check_input(self, x)))


def vae_loss_fn(
    inp: Tensor | Clicks, out: Tensor, mu: Tensor, logvar: Tensor, anneal: float | Tensor
) -> Tensor:
    """Mean over users of nll + anneal * kld, from logits: for code that already calls it.

    inp     [n_users, n_items]  Clicks, or dense; on a CPU a dense one that is mostly zeros goes by its clicks
    out     [n_users, n_items]  logits
    mu, logvar  [n_users, n_latent]
    anneal  weight beta of the kld, a float or a scalar tensor
    returns a scalar, nats per user; 0 without users
    Source: Liang et al. 2018 (arXiv:1802.05814), eq. 7 with beta.
    """
    check_beta("vae_loss_fn", "anneal", anneal)
    for name, tensor in (("inp", inp), ("out", out), ("mu", mu), ("logvar", logvar)):
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.ndim == 2
        if not dense and not (name == "inp" and isinstance(tensor, Clicks)):
            raise TypeError(
                f"vae_loss_fn: {name} must be a dense tensor of 2 dimensions"
                f"{' or Clicks' if name == 'inp' else ''}, got {described(tensor)}"
            )
    if not (len(mu) == len(out) and logvar.shape == mu.shape):
        raise ValueError(
            f"vae_loss_fn: mu and logvar must have one shape [{len(out)}, n_latent], "
            f"got {list(mu.shape)} and {list(logvar.shape)}"
        )
    if inp.shape != out.shape:
        raise ValueError(
            f"vae_loss_fn: inp must have shape {list(out.shape)} like out, got {list(inp.shape)}"
        )
    if isinstance(inp, Tensor) and not is_watched((out,)):
        clicks = clicks_in(inp)
        inp = inp if clicks is None else clicks
    nll = multinomial_nll(out, inp) if isinstance(inp, Clicks) else _dense_nll(inp, out)
    return _mean_loss(nll, _kld(mu, logvar), anneal)


def _dense_nll(x: Tensor, logits: Tensor) -> Tensor:
    # 0 * -inf counts 0; a row of -inf alone, which has no softmax, costs inf where x > 0 and has no gradient
    dead = (logits == -torch.inf).all(1, keepdim=True)
    log_p = F.log_softmax(logits.masked_fill(dead, 0), dim=1).masked_fill(dead, -torch.inf)
    return -(log_p.masked_fill((x == 0) & (log_p == -torch.inf), 0) * x).sum(1)


def _kld(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)


def _mean_loss(nll: Tensor, kld: Tensor, beta: float | Tensor) -> Tensor:
    # an empty batch, the rest of some loaders, counts 0 and not the nan of an empty mean
    return (nll + beta * kld).mean() if nll.shape[0] else nll.sum()


def _wants_loss(model: _MultiModel, beta: float | Tensor | None, per_click: bool) -> bool:
    if beta is None and per_click:
        name = type(model).__name__
        raise ValueError(f"{name}: beta must be given where per_click is True, got None")
    return beta is not None


def _check_input(model: _MultiModel, x: Tensor | Clicks) -> Tensor | Clicks:
    name = type(model).__name__
    if not isinstance(x, Tensor | Clicks):
        got = type(x).__name__
        raise TypeError(
            f"{name}: x must be a dense tensor or Clicks, got {got}; pass Clicks.from_matrix(x)"
        )
    if len(x.shape) != 2 or x.shape[1] != model.n_items:
        raise ValueError(f"{name}: x must have shape [any, {model.n_items}], got {list(x.shape)}")
    if isinstance(x, Tensor) and x.layout != torch.strided:
        raise TypeError(
            f"{name}: x must be a dense tensor or Clicks, got a sparse one; pass Clicks.from_matrix(x)"
        )
    if isinstance(x, Tensor) and x.is_complex():
        raise TypeError(f"{name}: x must be real, got {dtype_name(x.dtype)}")
    # integers, truth values, and float64, which numpy makes of everything
    return x.to(dtype_of(model)) if isinstance(x, Tensor) else x
