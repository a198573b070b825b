"""Trains, evaluates and recommends under each of torch's defaults that are named, and prints what came out."""

import copy
import json
import sys
import tempfile
from pathlib import Path

import torch

from fastvae import (
    Adam,
    Clicks,
    Dataset,
    GraphedStep,
    MultiDAE,
    MultiVAE,
    evaluate,
    fit,
    linear_multinomial_nll,
    load_model,
    multinomial_nll,
    recommend,
    sparse_linear,
    vae_loss_fn,
)
from fastvae.similar import item_vectors, similar_items, user_vectors

torch.manual_seed(0)
hidden, weight, bias = torch.randn(2, 4), torch.randn(9, 4), torch.randn(9)
untrained = [make([3, 4, 9]) for make in (MultiVAE, MultiDAE)]
pairs = [(u, i) for u in range(40) for i in range(9) if (u + i) % 3]


def told(*tensors):
    """What another default might have changed."""
    return [[str(t.dtype), str(t.device), t.tolist()] for t in tensors]


def ops(batch):
    """Values and gradients of each op, of a backward in chunks too."""
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    h, w, b = leaves
    logits, seed = h @ w.t() + b, torch.ones(1, dtype=torch.int64, device="cpu")
    values = [
        multinomial_nll(logits, batch),
        linear_multinomial_nll(h, w, b, batch, user_weights=h.detach()[:, 0]),
        linear_multinomial_nll(h, w, b, batch, max_bytes=1),
        sparse_linear(batch, w.t(), h[0], dropout=0.5, seed=seed),
        vae_loss_fn(batch, logits, h[:, :2], h[:, 2:], 0.2),
        vae_loss_fn(batch.to_dense(), logits, h[:, :2], h[:, 2:], 0.2),
    ]
    return told(*values, *torch.autograd.grad(sum(v.sum() for v in values), leaves))


def steps(model, train):
    """Sums, weights and the optimiser's state after two steps of a loop of one's own."""
    model = copy.deepcopy(model)
    optimizer = Adam(model.parameters(), lr=0.1)
    step = GraphedStep(model, optimizer, max_norm=1.0)
    for ids in ([0, 3, 5], [7, 1]):
        step(train.rows(ids), beta=0.2)
    again = Adam(model.parameters())
    again.load_state_dict(optimizer.state_dict())
    means = [state["exp_avg"] for state in again.state.values()]
    return told(step.sums, *means, *(p.detach() for p in model.parameters()))


def trained(model, data, x):
    """A run that is resumed, and what its model then finds."""
    folder = Path(tempfile.mkdtemp())
    options = {"batch_size": 5, "per_click": True, "run_dir": folder / "run"}
    fit(model, data.train, data.validation, epochs=1, **options)
    fitted = fit(model, data.train, data.validation, epochs=2, resume=True, **options)
    loaded, _ = load_model(folder / "run" / "best.pt")
    torch.save(model.state_dict(), folder / "plain.pt")
    plain, _ = load_model(folder / "plain.pt")
    found = recommend(model, x.rows([3, 1]), k=2)
    assert evaluate(loaded, *data.test) == evaluate(model, *data.test)
    return [
        [row["ndcg@100"] for row in fitted.history],
        evaluate(model, *data.test).to_dict(),
        recommend(model, [], k=2, items=list("abcdefghi")).scores.tolist(),
        told(*loaded.state_dict().values(), *plain.state_dict().values()),
        told(found.items, found.scores, x.rows([2, 0]).transpose().row_sums()),
        told(user_vectors(model, x), item_vectors(model), similar_items(model, 3, k=2).scores),
        recommend(
            model, x, k=2, allowed=[1, 2], popularity_penalty=0.3, popularity=x
        ).scores.tolist(),
    ]


def everything():
    torch.manual_seed(1)
    models = copy.deepcopy(untrained)
    x = Clicks.from_pairs(*zip(*pairs, strict=True), counts=True)
    data = Dataset.from_matrix(x, n_heldout=8)
    yield ops(x.rows([3, 1]))
    yield ops(Clicks([0, 2, 3], [4, 7, 8], [2.0, 1.0, 3.0], 9))
    for model in models:
        yield told(model.loss(x, beta=0.2).detach())
        yield steps(model, data.train)
        yield trained(model, data, x)


results = {}
for default in sys.argv[1:]:
    set_default = torch.set_default_device if default == "meta" else torch.set_default_dtype
    set_default(default if default == "meta" else getattr(torch, default))
    results[default] = list(everything())
    set_default(None if default == "meta" else torch.float32)
print(json.dumps(results))
