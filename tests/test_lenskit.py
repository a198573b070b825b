"""fastvae.lenskit in LensKit's pipelines, by LensKit's own tests of components; needs the extra lenskit."""

import numpy as np
import pytest
import torch

pytest.importorskip("lenskit", reason="LensKit is not installed: the extra lenskit brings it")

import pandas as pd
from lenskit import operations
from lenskit.data import ItemList, RecQuery, from_interactions_df
from lenskit.pipeline import topn_pipeline
from lenskit.testing import BasicComponentTests, ScorerTests
from lenskit.training import TrainingOptions

from fastvae import Clicks
from fastvae.lenskit import MultiDAEConfig, MultiDAEScorer, MultiVAEConfig, MultiVAEScorer

N_USERS, N_ITEMS = 110, 120
SMALL = {
    "embedding_size": 4,
    "hidden_sizes": [8],
    "epochs": 3,
    "batch_size": 50,
    "learning_rate": 0.01,
}


@pytest.fixture(scope="session")
def ml_ds():
    """In the place of LensKit's MovieLens, by its name: two tastes, each of half the items; ratings that differ."""
    rng = np.random.default_rng(0)
    frames = []
    for u in range(N_USERS):
        liked = rng.choice(N_ITEMS // 2, 20, replace=False) + N_ITEMS // 2 * (u % 2)
        frames.append(
            pd.DataFrame({"user_id": u, "item_id": 1000 + liked, "rating": rng.integers(1, 6, 20)})
        )
    return from_interactions_df(pd.concat(frames))


@pytest.fixture
def rng():
    return np.random.default_rng(1)


class TestMultiVAEByLensKit(BasicComponentTests, ScorerTests):
    component = MultiVAEScorer
    config = MultiVAEConfig(**SMALL)
    configs = (SMALL, {"hidden_sizes": [], "anneal_cap": 0.0})
    test_train_recommend = test_run_with_doubles = None  # on MovieLens
    test_batch_prediction_accuracy = test_batch_top_n_accuracy = None


class TestMultiDAEByLensKit(TestMultiVAEByLensKit):
    component = MultiDAEScorer
    config = MultiDAEConfig(**SMALL)
    configs = (SMALL, {"hidden_sizes": [8, 6]})


@pytest.fixture(scope="module", params=[MultiVAEScorer, MultiDAEScorer])
def trained(request, ml_ds):
    scorer = request.param(**SMALL | {"epochs": 60})
    pipe = topn_pipeline(scorer, n=20)
    pipe.train(ml_ds, TrainingOptions(rng=7))
    return pipe


def test_it_learns_each_users_taste(trained, ml_ds):
    """Twenty items that a user has not clicked, all of the user's half: each list by chance would have ten."""
    for user in range(4):
        items = operations.recommend(trained, user)
        half = (items.ids() - 1000) // (N_ITEMS // 2)
        assert len(items) == 20 and (half == user % 2).mean() > 0.9
        assert set(items.ids()).isdisjoint(ml_ds.user_row(user).ids())


def test_scores_are_the_models_logits(trained):
    scorer = trained.component("scorer")
    history = ItemList([1003, 1050, 1003, 5])  # one twice, one unknown
    asked = ItemList([1000, 5, 1119])
    scored = scorer(RecQuery(user_id="nobody", history_items=history), asked)
    places = scorer.items.numbers([1003, 1050])
    result = scorer.model(Clicks([0, 2], places, n_items=N_ITEMS))
    logits = (result[0] if isinstance(result, tuple) else result)[0].detach()
    expected = [logits[scorer.items.number(1000)], np.nan, logits[scorer.items.number(1119)]]
    np.testing.assert_allclose(scored.scores(), expected, rtol=1e-6)
    assert scored.ids().tolist() == asked.ids().tolist()


@pytest.mark.parametrize(
    "history", [None, ItemList(), ItemList([5])], ids=["none", "empty", "unknown"]
)
def test_without_a_known_item_there_is_no_score(trained, history):
    scored = trained.component("scorer")(RecQuery(history_items=history), ItemList([1000, 1001]))
    assert np.isnan(scored.scores()).all()


def test_settings_reach_the_model_and_the_training(ml_ds, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "fastvae.lenskit.fit", lambda model, clicks, **given: seen.update(given, clicks=clicks)
    )
    asked = SMALL | {
        "hidden_sizes": [8, 6],
        "dropout": 0.25,
        "anneal_cap": 0.5,
        "total_anneal_steps": 9,
        "precision": "bf16",
    }
    scorer = MultiVAEScorer(**asked)
    before = torch.get_rng_state()
    scorer.train(ml_ds, TrainingOptions(rng=3, device="cpu"))
    assert torch.equal(before, torch.get_rng_state())
    assert scorer.model.p_dims == [4, 6, 8, N_ITEMS] and scorer.model.dropout_enc == [0.25, 0, 0]
    clicks, seed = seen.pop("clicks"), seen.pop("seed")
    assert clicks.values is None and clicks.nnz == 20 * N_USERS  # ratings are not counts
    assert seen == {
        "epochs": 3, "batch_size": 50, "lr": 0.01, "precision": "bf16", "anneal_cap": 0.5, "total_anneal_steps": 9,
    }  # fmt: skip
    again = MultiVAEScorer(**asked)
    again.train(ml_ds, TrainingOptions(rng=3, device="cpu"))
    assert seen["seed"] == seed
    for a, b in zip(scorer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
