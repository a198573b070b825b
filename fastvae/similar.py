"""Vectors of items and users for nearest-neighbour indexes, and items that are like an item.

    logits[u, i] = hidden[u] . weight[i] + bias[i] = [hidden[u] | 1] . [weight[i] | bias[i]]

weight and bias are the decoder's last layer, hidden what goes into it. So an index that finds the largest inner products
(faiss, hnswlib, usearch) gives a model's recommendations, and by the same rows items are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_ids, check_integer
from ._last_layer import has_last_layer, hidden
from .clicks import Clicks
from .ranking import (
    BLOCK_BYTES,
    MIN_ROWS,
    block_of,
    check_model,
    evaluating,
    is_not_finite,
    top_k,
)
from .recommend import Recommendations, read_histories


def item_vectors(model: nn.Module) -> Tensor:
    """[weight | bias] of each item: its inner product with a user's vector is the user's logit of the item.

    >>> from fastvae import MultiVAE
    >>> model = MultiVAE([8, 16, 100])
    >>> item_vectors(model).shape
    torch.Size([100, 17])

    model    a MultiVAE or MultiDAE whose last layer is an nn.Linear alone
    returns  [n_items, d + 1] fp32 on the CPU, a copy; d is the width of the last hidden layer

    An index ranks all items: those of the history are left out of what it finds, so ask it for as many more.
    Raises: TypeError for another model.
    """
    last = _checked("item_vectors", model).decode.output
    bias = last.weight.new_zeros(len(last.weight)) if last.bias is None else last.bias
    return torch.cat([last.weight, bias[:, None]], dim=1).detach().float().cpu()


def user_vectors(
    model: nn.Module,
    histories: Clicks | Sequence[Iterable[Any]],
    *,
    items: Iterable[Any] | None = None,
) -> Tensor:
    """[hidden | 1] of each history: its inner products with item_vectors(model) are the logits.

    >>> from fastvae import MultiVAE
    >>> model, x = MultiVAE([8, 16, 100]).eval(), Clicks([0, 2, 3], [4, 7, 99], n_items=100)
    >>> logits = user_vectors(model, x) @ item_vectors(model).t()
    >>> torch.allclose(logits, model(x)[0], atol=1e-5)
    True

    model             as item_vectors takes it; called in eval mode, and given back as it was
    histories, items  as recommend takes them
    returns           [n_users, d + 1] fp32 on the CPU

    Raises: as recommend for histories and items; TypeError for another model. Memory beside the result is one block.
    """
    where = "user_vectors"
    net = _checked(where, model)
    vocabulary = None if items is None else check_ids(where, "items", items, net.n_items)
    clicks, _ = read_histories(where, model, histories, vocabulary, stacklevel=4)
    # each layer's output and its activation; a first layer of another kind takes dense rows
    widths = net.n_items + sum(net.q_dims[1:]) + net.q_dims[-1] + sum(net.p_dims[:-1])
    size = max(MIN_ROWS, BLOCK_BYTES // (8 * widths))
    width = net.decode.output.in_features + 1
    vectors = torch.ones(len(clicks), width, dtype=torch.float32, device="cpu")
    for start in range(0, len(clicks), size):
        stop = min(start + size, len(clicks))
        with evaluating(net):
            block = hidden(net, block_of(clicks, start, stop))
        vectors[start:stop, :-1] = block[: stop - start]
    return vectors


def similar_items(
    model: nn.Module, item: Any, k: int = 10, *, items: Iterable[Any] | None = None
) -> Recommendations:
    """The k items most like an item, itself left out: by the cosine of the decoder's rows about their mean.

        r[i]      = weight[i] - mean over all items of weight
        cos(i, j) = r[i] . r[j] / (|r[i]| |r[j]|)

    >>> from fastvae import MultiDAE
    >>> model = MultiDAE([2, 4])
    >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> _ = model.decode.output.weight.data.copy_(weight)
    >>> list(similar_items(model, "b", k=3, items=["a", "b", "c", "d"]))
    [[('a', 0.0), ('c', 0.0), ('d', -1.0)]]

    model    as item_vectors takes it
    item     an id where items is given, else a position; or a list of them
    k        int >= 1; lists are shorter where the model has no more than k items
    items    external ids, str or int, position = item index. Ids are compared as text
    returns  Recommendations, a row for each item asked for; scores are the cosines

    Two items are alike where the same users are recommended both, which is what the rows say of them. A vector added to
    all rows changes no probability of the softmax, so the cosine is taken about their mean. The bias, an item's general
    popularity, is left out: with it popular items would be like each other. Ties: the lower item index first.
    Raises: ValueError for an unknown item, a k below 1, or weights that are not finite; TypeError for other kinds.
    """
    where = "similar_items"
    weight = _checked(where, model).decode.output.weight.detach()
    k = check_integer(where, "k", k, 1)
    vocabulary = None if items is None else check_ids(where, "items", items, len(weight))
    asked = _positions(item, vocabulary, len(weight)).to(weight.device)
    rows = weight.float() - weight.float().mean(0)
    rows = F.normalize(rows, dim=1)
    size = max(MIN_ROWS, BLOCK_BYTES // (32 * len(rows)))
    parts = [_nearest(rows, part, k) for part in asked.split(size)]
    nothing = torch.empty(0, k, dtype=torch.float32, device="cpu")
    scores = torch.cat([nothing, *(values for values, _ in parts)])
    found = torch.cat([nothing.long(), *(found for _, found in parts)])
    return Recommendations(found, scores, vocabulary)


def _nearest(rows: Tensor, asked: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and positions [n, k] of the rows nearest to those asked for [n], on the CPU, padded to k columns."""
    # a product of fewer rows would round otherwise
    padded = F.pad(asked, (0, max(0, MIN_ROWS - len(asked))))
    cosines = (rows[padded] @ rows.t())[: len(asked)]
    cosines.scatter_(1, asked[:, None], -torch.inf)
    values, found = (tensor.cpu() for tensor in top_k(cosines, k))
    if is_not_finite(values).any():
        raise ValueError(
            "similar_items: model must have finite weights in its last layer, got nan or inf; "
            "load a checkpoint from before the loss diverged"
        )
    missing = k - values.shape[1]
    return F.pad(values, (0, missing), value=-torch.inf), F.pad(found, (0, missing), value=-1)


def _checked(where: str, model: Any) -> Any:
    """The model, where its last layer may be read instead of called."""
    check_model(where, model)
    if not has_last_layer(model):
        raise TypeError(
            f"{where}: model must be a MultiVAE or MultiDAE whose last layer is an nn.Linear alone, "
            f"got {type(model).__name__}"
        )
    return model


def _positions(item: Any, vocabulary: list[Any] | None, n_items: int) -> Tensor:
    """Positions of the items asked for, int64."""
    one = isinstance(item, str) or not isinstance(item, Iterable)
    asked = check_ids("similar_items", "item", [item] if one else item, distinct=False)
    if vocabulary is None:
        for position in asked:
            if isinstance(position, str) or not 0 <= position < n_items:
                raise ValueError(
                    f"similar_items: item must be a position in [0, {n_items}) where items is None, got {position!r}"
                )
        return torch.tensor(asked, dtype=torch.int64, device="cpu")
    places = {str(name): position for position, name in enumerate(vocabulary)}
    for text in map(str, asked):
        if text not in places:
            raise ValueError(
                f"similar_items: item must be one of the model's {n_items} items, got {text!r}"
            )
    return torch.tensor([places[str(name)] for name in asked], dtype=torch.int64, device="cpu")
