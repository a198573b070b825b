"""RecBole's MultiVAE and MultiDAE by fastvae: import fastvae.recbole, and nothing else changes.

    import fastvae.recbole
    from recbole.quick_start import run_recbole
    run_recbole(model="MultiVAE", dataset="ml-100k")

RecBole finds a model by its name and gives its loader of users to these two names alone, so the classes here take the
places of its own. Settings, weights and their names, initial weights of a seed and loss stay RecBole's: latent_dimension
counts mu and logvar together, item 0 is padding, and noise has a standard deviation of .01 where the paper has 1.
That one is a setting here: `noise_std: 1` is the paper's model.
Source: RecBole 1.2.1, model/general_recommender/multivae.py and multidae.py.
"""

from __future__ import annotations

import itertools
from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_number
from ._draws import Drawing
from .adam import Adam
from .clicks import Clicks
from .ops import linear_multinomial_nll, multinomial_nll, sample_latent, sparse_linear
from .ops._linear import is_only, linear

try:
    import recbole.model.general_recommender as models_of_recbole
    import recbole.utils.enum_type as enums_of_recbole
    import yaml
    from recbole.config import Config
    from recbole.model.abstract_recommender import AutoEncoderMixin, GeneralRecommender
    from recbole.model.init import xavier_normal_initialization
    from recbole.model.layers import MLPLayers
    from recbole.trainer import Trainer
    from recbole.utils import InputType, set_color
except ModuleNotFoundError as error:
    if error.name != "recbole":
        raise
    raise ImportError(
        "recbole: the models need RecBole, which is missing; run pip install 'fastvae-cf[recbole]'"
    ) from error

NOISE_STD = 0.01  # RecBole's


class _OnClicks(GeneralRecommender, AutoEncoderMixin, Drawing):
    """What the two models share: first and last layer straight from the clicks, no dense batch between."""

    input_type = InputType.PAIRWISE
    n_users: int
    n_items: int
    encoder: nn.Module
    decoder: nn.Sequential

    def __init__(self, config: Any, dataset: Any, tanh_last: bool):
        super().__init__(config, dataset)
        self.layers = config["mlp_hidden_size"]
        self.lat_dim = config["latent_dimension"]
        self.drop_out = config["dropout_prob"]
        self.tanh_last = tanh_last
        self.build_histroy_items(dataset)
        self.encode_layer_dims = [self.n_items, *self.layers, self.lat_dim]
        latent = self.lat_dim if tanh_last else self.lat_dim // 2
        self.decode_layer_dims = [latent, *self.layers[::-1], self.n_items]
        if tanh_last:
            self.encoder = MLPLayers(self.encode_layer_dims, activation="tanh")
        else:
            self.encoder = self.mlp_layers(self.encode_layer_dims)
        self.decoder = self.mlp_layers(self.decode_layer_dims)
        self.apply(xavier_normal_initialization)
        # item by item, as sparse_linear reads it
        first = _linears(self.encoder)[0]
        first.weight = nn.Parameter(first.weight.detach().t().contiguous().t())

    def build_histroy_items(self, dataset: Any) -> None:
        """The training clicks; the name is RecBole's."""
        users, items = (dataset.inter_feat[name] for name in (self.USER_ID, self.ITEM_ID))
        self.clicks = Clicks.from_pairs(users, items, self.n_users, self.n_items).to(self.device)
        # RecBole shuffles the clicks here: without the draw a seed would give other initial weights
        torch.randperm(len(users), device="cpu")

    def get_rating_matrix(self, user: Tensor) -> Tensor:
        """Dense clicks of some users [n, n_items]."""
        return self.clicks.rows(user).to_dense()

    def mlp_layers(self, layer_dims: list[int]) -> nn.Sequential:
        """Linear layers with tanh between them."""
        pairs = itertools.pairwise(layer_dims)
        parts = [part for pair in pairs for part in (nn.Linear(*pair), nn.Tanh())]
        return nn.Sequential(*parts[:-1])

    def _encode(self, clicks: Clicks) -> Tensor:
        first, *rest = _linears(self.encoder)
        # something is to see the layer's call, such as RecBole's own count of operations
        if not is_only(first, nn.Linear):
            return self._encode_dense(clicks.to_dense())
        dropout = self.drop_out if self.training else 0.0
        h = sparse_linear(
            clicks,
            first.weight,
            first.bias,
            dropout=dropout,
            seed=self.draw_seed(clicks.device) if dropout > 0 else None,
            tanh=self.tanh_last or bool(rest),
        )
        for layer in rest:
            h = linear(layer, h, tanh=self.tanh_last or layer is not rest[-1])
        return h

    def _encode_dense(self, rating_matrix: Tensor) -> Tensor:
        h = F.dropout(F.normalize(rating_matrix), self.drop_out, training=self.training)
        return self.encoder(h)

    def _nll(self, z: Tensor, clicks: Clicks) -> Tensor:
        last = _linears(self.decoder)[-1]
        if not is_only(last, nn.Linear):
            return multinomial_nll(self.decoder(z), clicks)
        return linear_multinomial_nll(self.decoder[:-1](z), last.weight, last.bias, clicks)

    def _latent(self, clicks: Clicks) -> tuple[Tensor, Tensor | None]:
        """z [n_users, n_latent], and kld [n_users] in nats or None for a model without."""
        raise NotImplementedError

    def predict(self, interaction: Any) -> Tensor:
        """Scores of pairs of users and items [n]."""
        z, _ = self._latent(self.clicks.rows(interaction[self.USER_ID]))
        item, last = interaction[self.ITEM_ID], _linears(self.decoder)[-1]
        if not is_only(last, nn.Linear):
            return self.decoder(z).gather(1, item[:, None]).squeeze(1)
        return (self.decoder[:-1](z) * last.weight[item]).sum(1) + last.bias[item]

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores of all items, one user after the other [n_users * n_items]."""
        z, _ = self._latent(self.clicks.rows(interaction[self.USER_ID]))
        return self.decoder(z).view(-1)


class MultiVAE(_OnClicks):
    """RecBole's MultiVAE; noise_std (default .01, as there) is the only new setting.

    Raises: TypeError and ValueError where noise_std is no number of at least 0.
    """

    # RecBole saves and loads it then: a training that is resumed goes on with its beta
    other_parameter_name = ("update",)

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset, tanh_last=False)
        self.anneal_cap = config["anneal_cap"]
        self.total_anneal_steps = config["total_anneal_steps"]
        noise_std = NOISE_STD if config["noise_std"] is None else config["noise_std"]
        self.noise_std = check_number("MultiVAE", "noise_std", noise_std, 0)
        self.update = 0

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """A sample of the latent; mu in evaluation."""
        if not self.training:
            return mu
        return mu + self.noise_std * self.draw_noise(mu) * (logvar / 2).exp()

    def forward(self, rating_matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, mu and logvar of dense clicks, as RecBole computes them."""
        mu, logvar = self._encode_dense(rating_matrix).chunk(2, dim=1)
        return self.decoder(self.reparameterize(mu, logvar)), mu, logvar

    def _latent(self, clicks: Clicks) -> tuple[Tensor, Tensor | None]:
        encoded = self._encode(clicks)
        noise = None
        if self.training:
            noise = self.noise_std * self.draw_noise(encoded[:, : self.lat_dim // 2])
        return sample_latent(encoded, noise)

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Mean over users of nll + beta * kld; beta goes up with each call."""
        clicks = self.clicks.rows(interaction[self.USER_ID])
        self.update += 1
        beta = self.anneal_cap
        if self.total_anneal_steps > 0:
            beta = min(beta, self.update / self.total_anneal_steps)
        z, kld = self._latent(clicks)
        return (self._nll(z, clicks) + beta * kld).mean()


class MultiDAE(_OnClicks):
    """RecBole's MultiDAE."""

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset, tanh_last=True)

    def forward(self, rating_matrix: Tensor) -> Tensor:
        """Logits of dense clicks, as RecBole computes them."""
        return self.decoder(self._encode_dense(rating_matrix))

    def _latent(self, clicks: Clicks) -> tuple[Tensor, Tensor | None]:
        return self._encode(clicks), None

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Mean over users of nll."""
        clicks = self.clicks.rows(interaction[self.USER_ID])
        return self._nll(self._latent(clicks)[0], clicks).mean()


def _linears(part: nn.Module) -> list[nn.Linear]:
    return [module for module in part.modules() if isinstance(module, nn.Linear)]


_build_optimizer_of_recbole = Trainer._build_optimizer


def _build_optimizer(self: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """RecBole's; its Adam, which takes .4 of a step on small data, becomes fastvae's of the same update and state."""
    optimizer = _build_optimizer_of_recbole(self, **kwargs)
    if type(optimizer) is not torch.optim.Adam or not isinstance(self.model, _OnClicks):
        return optimizer
    (group,) = optimizer.param_groups
    return optimizer if group["weight_decay"] else Adam(group["params"], lr=group["lr"])


class _Settings(Config):
    """A Config read from a checkpoint: RecBole's constructor would evaluate texts in it as Python."""

    def __init__(self) -> None:
        pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__class__ = Config


def _save_checkpoint(self: Any, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
    """RecBole's, in torch's own pickle protocol: that of RecBole, 4, is refused by torch.load since torch 2.6."""
    if not self.config["single_spec"] and self.config["local_rank"] != 0:
        return
    path = kwargs.pop("saved_model_file", self.saved_model_file)
    state = {
        "config": self.config,
        "epoch": epoch,
        "cur_step": self.cur_step,
        "best_valid_score": self.best_valid_score,
        "state_dict": self.model.state_dict(),
        "other_parameter": self.model.other_parameter(),
        "optimizer": self.optimizer.state_dict(),
    }
    torch.save(state, path)
    if verbose:
        self.logger.info(set_color("Saving current", "blue") + f": {path}")


def _take_the_places() -> None:
    for model in (MultiVAE, MultiDAE):
        name = model.__name__
        module = getattr(models_of_recbole, name.lower())
        # a checkpoint names the class: by this name it opens without fastvae too
        model.__module__ = module.__name__
        setattr(module, name, model)
        setattr(models_of_recbole, name, model)
    Trainer._build_optimizer = _build_optimizer
    Trainer._save_checkpoint = _save_checkpoint


def _let_checkpoints_load() -> None:
    """Let torch.load read what RecBole's checkpoints hold beside tensors, and nothing that runs code."""
    kinds = [kind for kind in vars(enums_of_recbole).values() if isinstance(kind, type)]
    enums = [kind for kind in kinds if issubclass(kind, Enum)]
    number = np.float64(0)
    numbers: list[Any] = [np.dtype, type(number.dtype), number.__reduce__()[0]]
    torch.serialization.add_safe_globals(
        [
            (_Settings, f"{Config.__module__}.Config"),
            MultiVAE,
            MultiDAE,
            yaml.FullLoader,
            *enums,
            *numbers,
        ]
    )


_take_the_places()
_let_checkpoints_load()
