"""The examples of docs/examples, run on small data; each skips without the extra that it is about."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastvae import Dataset, evaluate
from fastvae.synthetic import synthetic_clicks

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_validates_and_keeps_the_best(tmp_path):
    lightning = pytest.importorskip(
        "lightning", reason="Lightning is not installed: the extra lightning brings it"
    )
    with_lightning = example("with_lightning")
    data = Dataset.from_matrix(synthetic_clicks(400, 60, 6000, kind="latent"), 80, 0)
    lightning.seed_everything(0, verbose=False)
    train, validation = with_lightning.loaders(data, 50, "cpu")
    kept = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, monitor="ndcg@100", mode="max")
    trainer = lightning.Trainer(
        max_epochs=8, accelerator="cpu", callbacks=[kept], logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    model = with_lightning.LitMultiVAE([8, 16, data.n_items], lr=1e-2)
    before = evaluate(model.model, *data.validation).to_dict()["ndcg@100"]
    trainer.fit(model, train, validation)
    assert trainer.global_step == 8 * len(train)
    assert kept.best_model_score > before + 0.05
    best = with_lightning.LitMultiVAE.load_from_checkpoint(kept.best_model_path)
    assert evaluate(best.model, *data.validation).to_dict()["ndcg@100"] == pytest.approx(
        kept.best_model_score.item()
    )
    # 240 users are trained: the matrix is not copied, batches share its arrays
    (batch, *_) = train
    assert batch.indices.data_ptr() == train.collate_fn.__self__.indices.data_ptr()
    assert torch.isfinite(trainer.callback_metrics["loss"])
