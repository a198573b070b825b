"""Trains, evaluates and recommends under another default dtype or device, and prints what came out."""

import json
import sys
import tempfile
from pathlib import Path

import torch

from fastvae import Clicks, MultiDAE, MultiVAE, evaluate, fit, load_model, recommend
from fastvae.data import Dataset

kind, value = sys.argv[1:]
torch.manual_seed(0)
models = [make([3, 4, 9]) for make in (MultiVAE, MultiDAE)]
if kind == "dtype":
    torch.set_default_dtype(getattr(torch, value))
else:
    torch.set_default_device(value)
pairs = [(u, i) for u in range(40) for i in range(9) if (u + i) % 3]
x = Clicks.from_pairs(*zip(*pairs, strict=True), counts=True)
data = Dataset.from_matrix(x, n_heldout=8)
results = []
for model in models:
    folder = Path(tempfile.mkdtemp())
    options = {"epochs": 2, "batch_size": 5, "per_click": True, "run_dir": folder / "run"}
    fitted = fit(model, data.train, data.validation, **options)
    loaded, _ = load_model(folder / "run" / "best.pt")
    results.append([str(p.dtype) for p in loaded.parameters()])
    results.append([row["ndcg@100"] for row in fitted.history])
    assert evaluate(loaded, *data.test) == evaluate(model, *data.test)
    results.append(evaluate(model, *data.test).to_dict())
    found = recommend(model, x.rows([3, 1]), k=2)
    results += [found.items.tolist(), str(found.scores.dtype), str(found.scores.device)]
    results.append(x.rows([2, 0]).transpose().row_sums().tolist())
    results.append(recommend(model, [], k=2, items=list("abcdefghi")).scores.tolist())
print(json.dumps(results))
