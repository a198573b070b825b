"""Baselines that a model has to beat: popularity, item-kNN and EASE. Each is a torch module that maps Clicks to scores.

    popularity  score[u, i] = number of training users who clicked i
    item-kNN    score[u, j] = sum over i clicked by u, j among the nearest of i, of cos(i, j)
    EASE        score[u]    = x[u] B,   B = I - P diag(1 / diag(P)),   P = (X^T X + reg I)^-1

evaluate takes them as any model. Clicks count once, whatever their values. Dacrema et al. 2019, Are we really making much
progress?, is why they are here: neural models are often published beside baselines that nobody tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from ._checks import check_clicks, check_integer, check_number
from .clicks import Clicks
from .ranking import top_k

# of EASE's two matrices [n_items, n_items] fp32: 16,384 items
EASE_BYTES = 2**31
# the command measures item-kNN and EASE by itself up to here: some seconds on two cores
CHEAP_ITEMS, CHEAP_PAIRS = 5_000, 3 * 10**8
# of a block of similarities in item-kNN
_BLOCK_BYTES = 2**26


class Popularity(nn.Module):
    """The baseline that gives every user the same scores: how many users of train clicked each item.

    >>> Popularity(Clicks.from_pairs([0, 0, 1], [0, 1, 1]))(Clicks([0, 0], [], n_items=2))
    tensor([[1., 2.]])

    train  Clicks [n_users, n_items]; how often a user clicked an item does not matter
    """

    counts: Tensor

    def __init__(self, train: Clicks):
        super().__init__()
        check_clicks("Popularity", "train", train)
        self.n_items = train.n_items
        counts = torch.bincount(train.compact().indices, minlength=train.n_items)
        self.register_buffer("counts", counts.float())

    def forward(self, clicks: Clicks) -> Tensor:
        """Logits [n_users, n_items]; one row, repeated without a copy."""
        return self.counts.expand(clicks.n_users, -1)


class ItemKNN(nn.Module):
    """Item-based nearest neighbours by cosine: each clicked item votes for the items that are most like it.

        cos(i, j)   = (users who clicked both) / sqrt(users of i * users of j)
        score[u, j] = sum over i clicked by u of cos(i, j), where j is one of the n_neighbours items nearest to i

    >>> train = Clicks.from_pairs([0, 0, 1, 1, 2], [0, 1, 0, 1, 2], n_items=3)
    >>> ItemKNN(train)(Clicks([0, 1], [0], n_items=3))
    tensor([[0., 1., 0.]])

    train         Clicks [n_users, n_items]; how often a user clicked an item does not matter
    n_neighbours  of each item, itself and items without a common user left out; ties: lower item index

    Memory is n_items * n_neighbours similarities, kept on the CPU, whatever the device of the clicks.
    Raises: TypeError for other kinds, ValueError for n_neighbours below 1.
    Source: Deshpande and Karypis 2004, Item-based top-n recommendation algorithms, section 4, cosine, not normalised.
    """

    def __init__(self, train: Clicks, n_neighbours: int = 20):
        super().__init__()
        check_clicks("ItemKNN", "train", train)
        self.n_neighbours = check_integer("ItemKNN", "n_neighbours", n_neighbours, 1)
        self.n_items = train.n_items
        self.similar = _nearest(train, self.n_neighbours)

    def forward(self, clicks: Clicks) -> Tensor:
        """Scores [n_users, n_items] fp32 on the clicks' device."""
        scores = (_binary(clicks) @ self.similar).toarray()
        return torch.from_numpy(scores).to(clicks.device)


class EASE(nn.Module):
    """Embarrassingly shallow autoencoder: the linear item-item model with a zero diagonal, in closed form.

        P = (X^T X + reg I)^-1,   B[i, j] = -P[i, j] / P[j, j] for i != j, B[j, j] = 0,   score[u] = x[u] B

    >>> train = Clicks.from_pairs([0, 0, 1, 1, 2], [0, 1, 0, 1, 2], n_items=3)
    >>> EASE(train, reg=1.0)(Clicks([0, 1], [0], n_items=3))
    tensor([[0.0000, 0.6667, 0.0000]])

    train      Clicks [n_users, n_items]; how often a user clicked an item does not matter
    reg        L2 weight, above 0: the larger, the more clicks a pair of items needs to count
    max_bytes  of the two [n_items, n_items] fp32 matrices that are held at once: 8 n_items^2 bytes; the default of 2 GiB
               takes 16,384 items
    device     where the matrix is inverted and kept; default: that of train. Time grows with n_items^3

    Raises: ValueError for more items than max_bytes takes, or reg not above 0; TypeError for other kinds.
    Source: Steck 2019, Embarrassingly shallow autoencoders for sparse data, eq. 8 and section 3.1.
    """

    weight: Tensor

    def __init__(
        self,
        train: Clicks,
        reg: float = 200.0,
        *,
        max_bytes: int = EASE_BYTES,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        check_clicks("EASE", "train", train)
        self.reg = check_number("EASE", "reg", reg, 0, above=True)
        self.n_items = train.n_items
        if not ease_fits(train.n_items, check_integer("EASE", "max_bytes", max_bytes, 0, None)):
            raise ValueError(
                f"EASE: train must have at most {int((max_bytes / 8) ** 0.5):,} items for max_bytes={max_bytes:,}, "
                f"got {train.n_items:,}; raise max_bytes where there is memory"
            )
        gram = np.empty((train.n_items, train.n_items), np.float32)
        for start, counts in _shared_users(train):
            gram[start : start + len(counts)] = counts
        # in place from here on: two matrices at most
        p = torch.from_numpy(gram).to(train.device if device is None else device)
        p.diagonal().add_(self.reg)
        p = torch.cholesky_inverse(torch.linalg.cholesky(p, out=p), out=p)
        p /= -p.diagonal().clone()
        p.diagonal().zero_()
        self.register_buffer("weight", p)

    def forward(self, clicks: Clicks) -> Tensor:
        """Scores [n_users, n_items] fp32."""
        part = clicks.compact().to(self.weight.device)
        return nn.functional.embedding_bag(
            part.indices.long(), self.weight, part.indptr[:-1], mode="sum"
        )


def choose_baselines(
    train: Clicks, wanted: bool | None = None
) -> tuple[dict[str, Callable[[Clicks], nn.Module]], list[str]]:
    """What makes each baseline for these training clicks, by its name, and a sentence for each that is left out.

    wanted  True: all that fit in memory; False: popularity alone; None: all that take seconds, which is where train has
            at most CHEAP_ITEMS items and its users' clicks make at most CHEAP_PAIRS pairs of items
    """
    makers: dict[str, Callable[[Clicks], nn.Module]] = {"popularity": Popularity}
    if wanted is False:
        return makers, []
    n_pairs = int((train.row_lengths().double() ** 2).sum())
    if wanted is None and (train.n_items > CHEAP_ITEMS or n_pairs > CHEAP_PAIRS):
        return makers, [
            f"item-kNN and EASE would take longer than seconds for {train.n_items:,} items and are left out; "
            "--baselines measures them too"
        ]
    makers["item-kNN"] = ItemKNN
    if ease_fits(train.n_items):
        makers["EASE"] = EASE
        return makers, []
    gib = 8 * train.n_items**2 / 2**30
    return makers, [
        f"EASE is left out: {train.n_items:,} items take {gib:,.0f} GiB, more than {EASE_BYTES / 2**30:.0f}; "
        "fastvae.baselines.EASE takes max_bytes"
    ]


def ease_fits(n_items: int, max_bytes: int = EASE_BYTES) -> bool:
    """Whether EASE's two fp32 matrices take at most max_bytes."""
    return 8 * n_items**2 <= max_bytes


def _binary(clicks: Clicks) -> Any:
    """The clicks as a scipy CSR matrix of fp32 ones, on the CPU."""
    return clicks.to("cpu").compact().binary().to_scipy().astype(np.float32)


def _shared_users(clicks: Clicks) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks (start, [n, n_items] fp32): how many users clicked both item start + row and item column."""
    x = _binary(clicks)
    by_item, size = x.T.tocsr(), max(1, _BLOCK_BYTES // (4 * max(clicks.n_items, 1)))
    for start in range(0, clicks.n_items, size):
        yield start, (by_item[start : start + size] @ x).toarray()


def _nearest(train: Clicks, n_neighbours: int) -> Any:
    """scipy CSR [n_items, n_items] fp32: row i holds the cosines of the items nearest to i."""
    n_items = train.n_items
    parts: list[Any] = [sp.csr_array((0, n_items), dtype=np.float32)]
    n_users = np.maximum(np.bincount(train.to("cpu").compact().indices, minlength=n_items), 1)
    for start, counts in _shared_users(train):
        item = np.arange(start, start + len(counts))
        counts[item - start, item] = 0
        # whole numbers until here, so that equal similarities are equal to the bit
        cosine = torch.from_numpy(
            (counts / np.sqrt(np.outer(n_users[item], n_users))).astype(np.float32)
        )
        values, found = top_k(cosine.masked_fill_(cosine == 0, -torch.inf), n_neighbours)
        row, place = torch.nonzero(found >= 0, as_tuple=True)
        entries = values[row, place].numpy(), (row.numpy(), found[row, place].numpy())
        parts.append(sp.csr_array(entries, shape=(len(counts), n_items)))
    return sp.vstack(parts, format="csr")
