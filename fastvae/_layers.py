"""The parts of the models: stacks of linear layers with their dropouts, the encoder and the decoder.

A layer that is an nn.Linear alone is computed by its weights, the first one on sparse clicks; any other one is called.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._dense import clicks_in
from ._draws import Drawing
from .clicks import Clicks
from .ops import sparse_linear
from .ops._dispatch import is_watched
from .ops._linear import is_only, linear

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


class ItemMajorLinear(nn.Linear):
    """nn.Linear over the items whose weight [out, n_items] is stored item by item: .weight.t() is contiguous.

    One item's numbers then lie side by side for the gather of sparse_linear; shape, key and loading stay nn.Linear's.
    What flattens weights by .view(-1), as parameters_to_vector and LBFGS of torch do, refuses it; so do safetensors'
    save_file and FSDP2. A copy in its place in state_dict() would be 48 MB at 20,108 items, and what is written into
    it would be lost.
    """

    def __init__(self, n_items: int, out_features: int):
        super().__init__(n_items, out_features, device="meta")
        self.weight = nn.Parameter(torch.empty(n_items, out_features).t())
        self.bias = nn.Parameter(torch.empty(out_features))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        # load_state_dict(assign=True) puts a file's row-major tensor in the weight's place
        is_assigned = local_metadata.get("assign_to_params_buffers", False)
        if is_assigned and not self.weight.t().is_contiguous():
            weight = self.weight.detach().t().contiguous().t()
            self.weight = nn.Parameter(weight, self.weight.requires_grad)


class _Stack(nn.Module):
    """Linear layers linear_0, linear_1, ... each behind a dropout of its own."""

    def __init__(self, dims: Sequence[int], dropout: Sequence[float], item_major_first: bool):
        super().__init__()
        self.dropout = list(dropout)
        for n, (n_in, n_out) in enumerate(itertools.pairwise(dims)):
            item_major = item_major_first and n == 0
            layer = ItemMajorLinear(n_in, n_out) if item_major else nn.Linear(n_in, n_out)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=0.001)
            self.add_module(f"linear_{n}", layer)

    def __len__(self) -> int:
        return len(self.dropout)

    def layer(self, n: int) -> nn.Linear:
        """linear_n."""
        # get_submodule, which parses its path, takes 8 us
        return self._modules[f"linear_{n}"]  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


class Encoder(Drawing):
    """Clicks or a dense x to the last encoder layer's output."""

    # where other processes hold the other items: parallel.ItemPart
    part: Any = None

    def __init__(
        self,
        q_dims,
        dropout,
        active_last: bool,
        tanh_after_dropout: bool = False,
        normalize_input: bool = True,
        activation: str = "tanh",
        item_major: bool = True,
    ):
        super().__init__()
        self.active_last, self.tanh_after_dropout = active_last, tanh_after_dropout
        self.normalize_input, self.activation = normalize_input, activation
        self.q_layers = _Stack(q_dims, dropout, item_major_first=item_major)

    def forward(self, x: Tensor | Clicks) -> Tensor:
        """[n_users, q_dims[-1]]: mu and logvar side by side, or MultiDAE's latent; x [n_users, n_items]."""
        n_layers = len(self.q_layers)
        h = self._first(x, active=n_layers > 1 or self.active_last)
        for n in range(1, n_layers):
            h = _dropout(self, h, self.q_layers.dropout[n])
            active = n < n_layers - 1 or self.active_last
            h = _linear(self, self.q_layers.layer(n), h, active)
        return h

    def _first(self, x: Tensor | Clicks, active: bool) -> Tensor:
        layer, dropout = self.q_layers.layer(0), self.q_layers.dropout[0]
        plain = is_only(layer, nn.Linear)
        if isinstance(x, Clicks) and not plain:
            x = x.to_dense().to(dtype_of(self))
        # not layer.weight, which is asked for once below: a parametrization computes it each time
        elif isinstance(x, Tensor) and plain and not is_watched(tuple(layer.parameters())):
            clicks = clicks_in(x)
            x = x if clicks is None else clicks
        if isinstance(x, Clicks):
            drops = self.training and dropout > 0
            options: dict[str, Any] = {
                "dropout": dropout if drops else 0.0,
                "seed": self.draw_seed(x.device) if drops else None,
                "normalize": self.normalize_input,
                "tanh": active and self.activation == "tanh",
                "tanh_input": self.tanh_after_dropout,
            }
            if self.part is None:
                h = sparse_linear(x, layer.weight, layer.bias, **options)
            else:
                h = self.part.first_layer(layer, x, **options)
            return torch.relu(h) if active and self.activation == "relu" else h
        h = F.normalize(x, dim=1) if self.normalize_input else x
        h = layer(_dropout(self, h, dropout))
        return ACTIVATIONS[self.activation](h) if active else h


class Decoder(Drawing):
    """z to logits, or to the last hidden layer, which the loss takes."""

    def __init__(self, p_dims, dropout, tanh_after_dropout: bool = False, activation: str = "tanh"):
        super().__init__()
        self.tanh_after_dropout, self.activation = tanh_after_dropout, activation
        self.p_layers = _Stack(p_dims, dropout, item_major_first=False)

    def hidden(self, z: Tensor) -> Tensor:
        """Input of the last layer [n_users, n_hidden]."""
        last = len(self.p_layers) - 1
        for n in range(last):
            z = _dropout(self, z, self.p_layers.dropout[n])
            z = _linear(self, self.p_layers.layer(n), z, active=True)
        return _dropout(self, z, self.p_layers.dropout[last])

    def forward(self, z: Tensor) -> Tensor:
        """Logits [n_users, n_items] of z [n_users, n_latent]."""
        return self.output(self.hidden(z))

    @property
    def output(self) -> nn.Linear:
        """The last layer, hidden to items."""
        return self.p_layers.layer(len(self.p_layers) - 1)


def dtype_of(module: nn.Module) -> torch.dtype:
    """What a module computes in."""
    floats = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(floats, torch.float32)


def _linear(module: Encoder | Decoder, layer: nn.Linear, h: Tensor, active: bool) -> Tensor:
    h = linear(layer, h, tanh=active and module.activation == "tanh")
    return torch.relu(h) if active and module.activation == "relu" else h


def _dropout(module: Encoder | Decoder, h: Tensor, dropout: float) -> Tensor:
    if dropout > 0 and module.training:  # with nothing to drop the call alone takes its time
        h = module.drop(h, dropout)
    return torch.tanh(h) if module.tanh_after_dropout else h
