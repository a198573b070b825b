"""Which cosine finds items that are alike: MovieLens-100K, on the splits of the study of defaults, the model by fit alone.

found      share of the pairs (item i folded in, item j held out, of one test user) with j among the 20 items nearest to i
clicks     mean number of training clicks of those 20
catalogue  share of the items that are among the 20 of some item
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.quality_baselines import rows_of
from bench.quality_defaults import CASES, load_case
from fastvae import Clicks, Dataset, MultiVAE, fit
from fastvae.ranking import top_k
from fastvae.similar import item_vectors, similar_items

K = 20


def similar(load: Callable[[str], sp.csr_array]) -> dict[str, Any]:
    """Means over the splits, by what the likeness is of."""
    case = CASES["ml100k"]
    splits = [measure(load_case(load, case, split), split) for split in range(case.splits)]
    means = {
        name: {
            key: statistics.mean(split[name][key] for split in splits) for key in splits[0][name]
        }
        for name in splits[0]
    }
    return {"k": K, "data": "ml100k", "means": means, "splits": splits}


def measure(data: Dataset, seed: int, epochs: int | None = None) -> dict[str, dict[str, float]]:
    """Found, clicks and catalogue of each kind of likeness on the test users."""
    torch.manual_seed(seed)
    model = MultiVAE([200, 600, data.n_items])
    fit(model, data.train, data.validation, epochs=epochs, precision="bf16", seed=seed)
    with_bias = item_vectors(model)
    encoder = model.get_parameter("encode.q_layers.linear_0.weight").detach().t()
    train = rows_of(data.train)
    columns = torch.from_numpy(train.T.toarray()).float()
    clicks = torch.from_numpy(np.bincount(train.indices, minlength=data.n_items)).float()
    alone = Clicks.from_matrix(sp.eye_array(data.n_items, format="csr", dtype=np.float32))
    with torch.no_grad():
        model.eval()
        recommended = model(alone)[0]
    nearest = {
        "decoder rows about their mean: similar_items": similar_items(model, range(data.n_items), K).items,
        "decoder rows": _by_cosine(with_bias[:, :-1]),
        "decoder rows with the bias as one more number": _by_cosine(with_bias),
        "encoder columns about their mean": _by_cosine(encoder - encoder.mean(0)),
        "columns of the training clicks": _by_cosine(columns),
        "no cosine: recommend to a history of i alone": _best(recommended),
        "no cosine: the most popular, whatever i is": _best(clicks.expand(data.n_items, -1)),
    }  # fmt: skip
    fold_in, held_out = (rows_of(part) for part in data.test)
    pairs = (fold_in.T @ held_out).toarray()
    return {name: _told(found, pairs, clicks) for name, found in nearest.items()}


def _by_cosine(vectors: Tensor) -> Tensor:
    vectors = F.normalize(vectors, dim=1)
    return _best(vectors @ vectors.t())


def _best(scores: Tensor) -> Tensor:
    """The K best columns of each row, itself left out; ties: the lower one."""
    return top_k(scores.clone().fill_diagonal_(-torch.inf), K)[1]


def _told(found: Tensor, pairs: np.ndarray, clicks: Tensor) -> dict[str, float]:
    """pairs [n_items, n_items]: test users with row folded in and column held out."""
    return {
        "found": float(np.take_along_axis(pairs, found.numpy(), 1).sum() / pairs.sum()),
        "clicks": float(clicks[found].mean()),
        "catalogue": len(found.unique()) / len(found),
    }
