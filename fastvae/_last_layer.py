"""The last layer of a model apart from the others, for those who need its rows: logits = hidden W^T + b.

Only of a MultiVAE or MultiDAE whose layers compute what their weights say; what else there is, is called as a whole.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ._layers import Decoder
from .clicks import Clicks
from .models import MultiDAE, MultiVAE
from .ops._linear import is_only


def has_last_layer(model: Any) -> bool:
    """Whether the model's logits are those of its hidden layer, weight and bias, with nothing changed on the way."""
    return (
        isinstance(model, MultiVAE | MultiDAE)
        and is_only(model, MultiVAE if model.two_heads else MultiDAE)
        and is_only(model.decode, Decoder)
        and is_only(model.decode.output, nn.Linear)
    )


def hidden(model: MultiVAE | MultiDAE, clicks: Clicks) -> Tensor:
    """Input of the last layer [n_users, n_hidden] of a model in eval mode."""
    return model.decode.hidden(model.latent(clicks)[0])


def logits_of_items(model: MultiVAE | MultiDAE, clicks: Clicks, items: Tensor) -> Tensor:
    """Logits [n_users, len(items)] of some items; items int64, on the model's device."""
    last = model.decode.output
    bias = None if last.bias is None else last.bias[items]
    return F.linear(hidden(model, clicks), last.weight[items], bias)
