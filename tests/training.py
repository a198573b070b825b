"""What the tests of training share: clicks that can be learned, a small model, its weights, decreed validation."""

import numpy as np
import torch

from fastvae import Clicks, MultiVAE
from fastvae.data import map_items

N_ITEMS = 40
IDS = [f"i{n}" for n in range(N_ITEMS)]
# others of the 40 in another order, with three that are new; i0 to i4 are gone
LATER = ["new a", *IDS[:4:-1], "new b", "new c"]


def learnable(n_users=120, seed=0):
    """Users of one of two tastes, split into train and (fold_in, held_out)."""
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.choice(20, 8, replace=False)) + 20 * (u % 2) for u in range(n_users)]

    def clicks(rows):
        indptr = np.concatenate(([0], np.cumsum([len(r) for r in rows])))
        return Clicks(indptr, np.concatenate(rows), n_items=N_ITEMS)

    held = rows[100:]
    return clicks(rows[:100]), (clicks([r[::2] for r in held]), clicks([r[1::2] for r in held]))


def later_clicks(seed=1):
    """The users of learnable() with the items of later: some have clicked on new ones, none on the last."""
    x = map_items(learnable()[0], IDS, LATER)[0].to_scipy().tolil()
    rng = np.random.default_rng(seed)
    x[rng.choice(100, 30, replace=False), 0] = 1
    x[rng.choice(100, 5, replace=False), len(LATER) - 2] = 1
    return Clicks.from_matrix(x.tocsr())


def model(seed=0, make=MultiVAE):
    torch.manual_seed(seed)
    return make([8, 16, N_ITEMS])


def weights(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_equal_weights(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def forced_metrics(monkeypatch, values):
    """Let validation return these values, and record the weights at each."""
    import fastvae.trainer

    seen, values = [], iter(values)

    def fake(net, *_, **__):
        seen.append(weights(net))
        return {"ndcg@100": next(values)}

    monkeypatch.setattr(fastvae.trainer, "evaluate", fake)
    return seen
