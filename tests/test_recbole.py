"""fastvae.recbole against RecBole's own classes, in RecBole's own trainer; needs the extra recbole."""

import copy
import importlib.util

import numpy as np
import pytest
import torch
from helpers import assert_as_accurate_as_torch

pytest.importorskip("recbole", reason="RecBole is not installed: the extra recbole brings it")

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.model.general_recommender import multidae, multivae
from recbole.quick_start import load_data_and_model, run_recbole
from recbole.trainer import Trainer
from recbole.trainer import trainer as trainers
from recbole.utils import get_flops, get_model, init_seed

import fastvae.recbole as ours
from fastvae import Adam

N_USERS, N_ITEMS = 60, 40
NAMES = ["MultiVAE", "MultiDAE"]
SMALL = {
    "data_path": ".", "use_gpu": False, "show_progress": False, "mlp_hidden_size": [16], "latent_dimension": 8,
    "train_batch_size": 20, "eval_batch_size": 2**16, "topk": [10], "valid_metric": "NDCG@10", "metrics": ["NDCG"],
    "load_col": {"inter": ["user_id", "item_id"]}, "epochs": 3,
}  # fmt: skip


def of_recbole(module):
    """A module of RecBole as its file has it, under another name: ours are in the place of its classes."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_of_recbole", module.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    return again


def class_of_recbole(name):
    return getattr(of_recbole({"MultiVAE": multivae, "MultiDAE": multidae}[name]), name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tastes, each of half the items; a click that comes twice."""
    folder = tmp_path_factory.mktemp("recbole")
    (folder / "clicks").mkdir()
    rng = np.random.default_rng(0)
    lines = ["user_id:token\titem_id:token", "u0\ti0", "u0\ti0"]
    for u in range(N_USERS):
        liked = rng.choice(N_ITEMS // 2, 10, replace=False) + N_ITEMS // 2 * (u % 2)
        lines += [f"u{u}\ti{i}" for i in liked]
    (folder / "clicks" / "clicks.inter").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["run"])


def prepared(name, **settings):
    config = Config(model=name, dataset="clicks", config_dict=SMALL | settings)
    init_seed(config["seed"], True)
    return config, data_preparation(config, create_dataset(config))


def made(model, config, train):
    init_seed(1, True)
    return model(config, train._dataset)


def pair(name, **settings):
    """Ours and RecBole's on the same data, of the same seed; users of a batch, padding and a repeated one among them."""
    config, (train, *_) = prepared(name, **settings)
    mine, theirs = (
        made(kind, config, train) for kind in (getattr(ours, name), class_of_recbole(name))
    )
    users = torch.tensor([0, 5, 1, 59, 5, 17])
    return mine, theirs, Interaction({"user_id": users})


@pytest.mark.parametrize("name", NAMES)
def test_the_name_leads_to_ours(name):
    assert get_model(name) is getattr(ours, name)
    assert get_model(name) is not class_of_recbole(name)


@pytest.mark.parametrize("hidden", [[16], [16, 12], []], ids=["paper", "deep", "no-hidden-layer"])
@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_recboles_initial_weights_and_their_names(name, hidden):
    mine, theirs, _ = pair(name, mlp_hidden_size=hidden)
    expected = theirs.state_dict()
    assert list(mine.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in mine.state_dict().items())


@pytest.mark.parametrize("hidden", [[16], [16, 12], []], ids=["paper", "deep", "no-hidden-layer"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_recboles(name, hidden):
    mine, theirs, batch = pair(
        name, mlp_hidden_size=hidden, dropout_prob=0.0, noise_std=0, total_anneal_steps=20
    )
    if name == "MultiVAE":
        theirs.reparameterize = lambda mu, logvar: mu  # RecBole's noise cannot be turned off
    truth = copy.deepcopy(theirs).double()
    truth.get_rating_matrix = lambda user: theirs.get_rating_matrix(user).double()
    results = {}
    for model in (mine, theirs, truth):
        for _ in range(2):  # of two updates, so of two betas
            model.zero_grad()
            loss = model.calculate_loss(batch)
            loss.backward()
        results[model] = [loss, *(p.grad for p in model.parameters())]
    for actual, same_dtype, true in zip(*results.values(), strict=True):
        assert_as_accurate_as_torch(actual, same_dtype, true)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_recboles(name):
    mine, theirs, batch = pair(name)
    mine.eval(), theirs.eval()
    with torch.no_grad():
        expected = theirs.full_sort_predict(batch)
        torch.testing.assert_close(mine.full_sort_predict(batch), expected, rtol=1e-5, atol=1e-6)
        batch.update(Interaction({"item_id": torch.tensor([0, 1, 2, 40, 7, 0])}))
        chosen = expected.view(6, -1)[torch.arange(6), batch["item_id"]]
        torch.testing.assert_close(mine.predict(batch), chosen, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        mine.get_rating_matrix(batch["user_id"]), theirs.get_rating_matrix(batch["user_id"])
    )


def test_operations_are_counted_as_recbole_counts_them():
    """By hooks on the layers, which the way round the layers must let see their calls."""
    config, (train, *_) = prepared("MultiVAE")
    dataset, identity = train._dataset, lambda _, interaction: interaction
    counts = [
        get_flops(made(model, config, train), dataset, config["device"], None, identity)
        for model in (ours.MultiVAE, class_of_recbole("MultiVAE"))
    ]
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("asked, std", [(None, 0.01), (1.0, 1.0), (0, 0.0)])
def test_noise_has_the_standard_deviation_of_the_setting(asked, std):
    settings = {} if asked is None else {"noise_std": asked}
    model, _, _ = pair("MultiVAE", dropout_prob=0.0, latent_dimension=64, **settings)
    clicks = model.clicks.rows(torch.arange(1, 61))
    mu, logvar = model._encode(clicks).chunk(2, dim=1)
    draws = {"clicks": model._latent(clicks)[0], "dense": model.reparameterize(mu, logvar)}
    for z in draws.values():
        noise = (z - mu) / (logvar / 2).exp()
        assert noise.std().item() == pytest.approx(std, rel=0.05)  # 1,920 draws: 1.6% each way
    model.eval()
    assert torch.equal(model._latent(clicks)[0], model._encode(clicks).chunk(2, dim=1)[0])


def test_dropout_drops_what_the_setting_says():
    model, _, batch = pair("MultiVAE", noise_std=0, dropout_prob=1.0)
    clicks = model.clicks.rows(batch["user_id"])
    nothing = model._encode_dense(torch.zeros(6, model.n_items))
    torch.testing.assert_close(model._encode(clicks), nothing)
    model.eval()
    torch.testing.assert_close(model._encode(clicks), model._encode_dense(clicks.to_dense()))


def test_a_wrong_setting_is_refused():
    with pytest.raises(
        ValueError, match=r"^MultiVAE: noise_std must be a finite number of at least 0, got -1$"
    ):
        pair("MultiVAE", noise_std=-1)
    with pytest.raises(TypeError, match=r"^MultiVAE: noise_std must be a number, got \[1\]$"):
        pair("MultiVAE", noise_std=[1])


@pytest.mark.parametrize("eval_mode", ["full", "uni20"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_trains_stops_early_and_tests_its_best_checkpoint(name, eval_mode):
    settings = SMALL | {
        "epochs": 200, "stopping_step": 2, "learning_rate": 0.01, "checkpoint_dir": f"saved-{name}-{eval_mode}",
        "eval_args": {"mode": {"valid": eval_mode, "test": eval_mode}},
    }  # fmt: skip
    epochs = []
    step = getattr(ours, name).calculate_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            getattr(ours, name), "calculate_loss", lambda *a: epochs.append(1) or step(*a)
        )
        result = run_recbole(model=name, dataset="clicks", config_dict=settings)
    assert 4 * 3 < len(epochs) < 4 * 200  # 61 users in batches of 20
    # 10 of the 18 items of a taste that are not in training are in no list: by chance .1 and less
    assert result["test_result"]["ndcg@10"] > 0.15
    assert result["best_valid_score"] == result["best_valid_result"]["ndcg@10"]


def trained(name, **settings):
    config, (train, valid, test) = prepared(name, **settings)
    trainer = Trainer(config, made(getattr(ours, name), config, train))
    trainer.fit(train, valid, verbose=False)
    return trainer, train, valid, test


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_load_as_torch_loads_by_itself(name):
    """weights_only=True: nothing in the file is run."""
    trainer, _, _, test = trained(name, eval_step=0)
    scores = trainer.evaluate(test)
    config, model, *_, test = load_data_and_model(trainer.saved_model_file)
    assert type(config) is Config and config["latent_dimension"] == 8
    assert type(model) is getattr(ours, name)
    assert Trainer(config, model).evaluate(test, load_best_model=False) == scores


def test_a_resumed_training_goes_on():
    first, train, valid, _ = trained("MultiVAE", eval_step=0)
    again = Trainer(first.config, made(ours.MultiVAE, first.config, train))
    again.resume_checkpoint(first.saved_model_file)
    assert again.start_epoch == 3 and again.model.update == first.model.update == 4 * 3
    for mine, before in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(mine, before) and mine.stride() == before.stride()
        means = (again.optimizer.state[mine], first.optimizer.state[before])
        assert torch.equal(*(state["exp_avg_sq"] for state in means))
    again.epochs = 4
    again.fit(train, valid, verbose=False)
    assert again.model.update == 4 * 4


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_of_recboles_own_class_load_and_ours_in_it(name, monkeypatch):
    """RecBole's files are pickles of protocol 4: torch reads them where the user trusts them, by its own variable."""
    config, (train, _, test) = prepared(name, eval_step=0)
    theirs = Trainer(config, made(class_of_recbole(name), config, train))
    theirs._save_checkpoint = of_recbole(trainers).Trainer._save_checkpoint.__get__(theirs)
    theirs.fit(train, verbose=False)
    mine = Trainer(config, getattr(ours, name)(config, train._dataset))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mine.resume_checkpoint(theirs.saved_model_file)
    assert mine.evaluate(test, load_best_model=False) == theirs.evaluate(test)
    mine.epochs = 4
    mine.saved_model_file = "mine.pth"
    mine.fit(train, verbose=False)
    theirs.resume_checkpoint("mine.pth")
    assert theirs.evaluate(test, load_best_model=False) == mine.evaluate(test)


def test_the_settings_in_a_checkpoint_run_nothing(tmp_path):
    """RecBole's Config evaluates texts given to it; what stands for it in a file has no such constructor."""

    class Evil:
        def __reduce__(self):
            return Config, (
                "MultiVAE",
                "clicks",
                None,
                {"x": f"open({str(tmp_path / 'ran')!r}, 'w')"},
            )

    torch.save(Evil(), tmp_path / "evil.pth")
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    with pytest.raises(Exception, match="takes 1 positional argument"):
        torch.load(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_a_small_model_learns_as_recboles_does():
    """nll of the training clicks after ten epochs, of three seeds each: dropout and noise are drawn apart."""
    config, (train, *_) = prepared("MultiVAE", learning_rate=0.01)
    users, means = torch.arange(1, N_USERS + 1), []
    for model in (ours.MultiVAE, class_of_recbole("MultiVAE")):
        found = []
        for seed in range(3):
            init_seed(seed, True)
            trainer = Trainer(config, model(config, train._dataset))
            x = trainer.model.get_rating_matrix(users)
            for epoch in range(10):
                trainer._train_epoch(train, epoch)
            with torch.no_grad():
                found.append(-(trainer.model.eval()(x)[0].log_softmax(1) * x).sum(1).mean().item())
        means.append(np.mean(found))
    # 29.8 at the start, 24.0 after; a seed moves it by .07
    assert means[0] == pytest.approx(means[1], abs=0.2) and means[1] < 25


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"learner": "sgd"}], ids=str)
def test_the_optimiser_is_recboles_or_one_of_the_same_update(settings):
    config, (train, *_) = prepared("MultiDAE", dropout_prob=0.0, **settings)
    mine = Trainer(config, made(ours.MultiDAE, config, train))
    theirs = of_recbole(trainers).Trainer(config, made(class_of_recbole("MultiDAE"), config, train))
    assert type(mine.optimizer) is (type(theirs.optimizer) if settings else Adam)
    users = Interaction({"user_id": torch.arange(N_USERS + 1)})
    for _ in range(3):
        for trainer in (mine, theirs):
            trainer._train_epoch([users], 0)
    for a, b in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)
    for group, other in zip(
        mine.optimizer.param_groups, theirs.optimizer.param_groups, strict=True
    ):
        assert group["lr"] == other["lr"]
    other_model = Trainer(config, made(class_of_recbole("MultiDAE"), config, train))
    assert type(other_model.optimizer) is type(theirs.optimizer)
