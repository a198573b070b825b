"""Run folders: their files, exact resume, interruption at any moment, and who may write to them."""

import json
import os
import re

import matplotlib.figure
import pytest
import torch
from helpers import run_child
from training import N_ITEMS, assert_equal_weights, forced_metrics, learnable, model, weights

from fastvae import MultiDAE, MultiVAE, fit
from fastvae.checkpoint import load_model, read_checkpoint


def test_run_folder(tmp_path):
    train, validation = learnable()
    items = [f"item {i}" for i in range(N_ITEMS)]
    net, run = model(), tmp_path / "run"
    result = fit(net, train, validation, epochs=3, run_dir=run, items=items)
    names = {"config.json", "metrics.jsonl", "best.pt", "last.pt", "curve.png"}
    assert {path.name for path in run.iterdir()} == names
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history and [line["epoch"] for line in lines] == [1, 2, 3]
    fields = {"epoch", "update", "loss", "nll", "kld", "beta", "lr", "users_per_second", "ndcg@100"}
    assert set(lines[0]) == fields
    config = json.loads((run / "config.json").read_text())
    assert config["p_dims"] == [8, 16, N_ITEMS] and config["batch_size"] == 20
    assert (config["epochs"], config["patience"]) == (3, 5)
    assert (run / "curve.png").read_bytes()[:4] == b"\x89PNG"
    best, ids = load_model(run / "best.pt")
    assert ids == items and not best.training
    assert_equal_weights(weights(best), weights(net))
    # tensors and JSON only: torch itself refuses anything else with weights_only
    assert set(torch.load(run / "best.pt", weights_only=True)) == {"meta", "model"}
    with pytest.raises(ValueError, match="run_dir must be a new folder"):
        fit(net, train, validation, epochs=3, run_dir=run)


@pytest.mark.parametrize("make", [MultiVAE, MultiDAE])
def test_resume_is_bit_for_bit_the_uninterrupted_run(tmp_path, make):
    train, validation = learnable()
    options = {"batch_size": 30, "lr": 1e-2, "total_anneal_steps": 50, "seed": 5}
    straight, halves = model(make=make), model(make=make)
    one = fit(straight, train, validation, epochs=4, run_dir=tmp_path / "a", **options)
    fit(halves, train, validation, epochs=2, run_dir=tmp_path / "b", **options)
    fresh = model(seed=99, make=make)
    two = fit(fresh, train, validation, epochs=4, run_dir=tmp_path / "b", resume=True, **options)
    assert_equal_weights(weights(straight), weights(fresh))
    for name in ("beta", "loss", "ndcg@100", "update"):
        assert [row[name] for row in one.history] == [row[name] for row in two.history]
    assert (one.best_epoch, one.best_metric) == (two.best_epoch, two.best_metric)
    last = [read_checkpoint(tmp_path / run / "last.pt") for run in "ab"]
    assert_equal_weights(last[0]["model"], last[1]["model"])
    for a, b in zip(*(part["optimizer"]["state"].values() for part in last), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    # a finished run has nothing left to do
    again = fit(fresh, train, validation, epochs=4, run_dir=tmp_path / "b", resume=True, **options)
    assert again.history == two.history
    assert_equal_weights(weights(straight), weights(fresh))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_twenty_times_ends_bit_equal_to_one_that_was_not(tmp_path):
    one, two = tmp_path / "straight", tmp_path / "killed"
    # a process that has seen a GPU cannot fork
    done = run_child("killed.py", one, two, CUDA_VISIBLE_DEVICES="", PYTHONWARNINGS="ignore")
    assert done.stdout == "killed 20\n", done.stderr
    for name in ("best.pt", "last.pt"):
        a, b = (read_checkpoint(folder / name) for folder in (one, two))
        assert_equal_weights(a["model"], b["model"])
    for x, y in zip(*(part["optimizer"]["state"].values() for part in (a, b)), strict=True):
        assert all(torch.equal(x[key], y[key]) for key in x)
    assert (a["position"], a["best"]) == (b["position"], b["best"])
    one_lines, two_lines = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, two)
    )
    for row in (*one_lines, *two_lines):
        del row["users_per_second"]
    assert one_lines == two_lines
    assert sorted(os.listdir(one)) == sorted(os.listdir(two)), "no temporary file is left behind"


def finite(path):
    return all(torch.isfinite(t).all() for t in read_checkpoint(path)["model"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    train, _ = learnable()
    net, run = model(), tmp_path / "run"
    fit(net, train, epochs=1, batch_size=100, run_dir=run)
    config = json.loads((run / "config.json").read_text())
    # one update of this size overflows; the loss was finite before it
    (run / "config.json").write_text(json.dumps(config | {"lr": 1e39}))
    state = torch.load(run / "last.pt", weights_only=True)
    state["optimizer"]["param_groups"][0]["lr"] = 1e39
    torch.save(state, run / "last.pt")
    with pytest.raises(RuntimeError) as caught:
        fit(net, train, epochs=2, run_dir=run, lr=1e39, resume=True)
    assert str(caught.value) == (
        "fit: weights must be finite, got nan or inf after update 2 (epoch 2); lower lr; "
        f"the last good checkpoint is {run / 'last.pt'}"
    )
    assert finite(run / "last.pt") and finite(run / "best.pt")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_full_disk_is_reported_and_what_was_saved_is_resumed(tmp_path, monkeypatch):
    import fastvae.run_folder

    train, validation = learnable()
    options = {"batch_size": 30, "total_anneal_steps": 0, "run_dir": tmp_path / "run"}
    fit(model(), train, validation, epochs=2, **options)
    saved = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    fsync, opened = os.fsync, open

    def full(*arguments, **_):
        raise OSError(28, "No space left on device")

    def full_for_metrics(path, mode="r", **others):
        return full() if str(path).endswith("metrics.jsonl") else opened(path, mode, **others)

    for owner, call, fake, name in (
        (fastvae.run_folder, "open", full_for_metrics, "metrics.jsonl"),
        (torch, "save", full, r"(best|last)\.pt"),
    ):
        with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
            patch.setattr(owner, call, fake, raising=False)
            fit(model(), train, validation, epochs=4, resume=True, **options)
        assert re.fullmatch(
            rf"\[Errno 28\] No space left on device: '.*/run/{name}'", str(caught.value)
        )
        assert (tmp_path / "run" / "last.pt").read_bytes() == saved["last.pt"]
        assert (tmp_path / "run" / "best.pt").read_bytes() == saved["best.pt"]
    assert os.fsync is fsync
    resumed, straight = model(), model()
    fit(resumed, train, validation, epochs=4, resume=True, **options)
    fit(straight, train, validation, epochs=4, batch_size=30, total_anneal_steps=0)
    assert_equal_weights(weights(resumed), weights(straight))


def test_str_and_path_name_the_same_run_folder(tmp_path):
    train, _ = learnable()
    fit(model(), train, epochs=1, run_dir=str(tmp_path / "run"))
    net = model()
    result = fit(net, train, epochs=2, run_dir=tmp_path / "run", resume=True)
    assert [row["epoch"] for row in result.history] == [1, 2]


def test_resume_with_other_settings_or_nothing_to_resume_is_refused(tmp_path):
    train, _ = learnable()
    with pytest.raises(ValueError, match="run_dir must hold a run to resume, got nothing at"):
        fit(model(), train, epochs=1, run_dir=tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    fit(model(), train, epochs=1, run_dir=tmp_path / "run", lr=1e-3)
    with pytest.raises(ValueError) as caught:
        fit(model(), train, epochs=2, run_dir=tmp_path / "run", lr=1e-2, resume=True)
    assert str(caught.value) == "fit: lr must be 0.001 as in the run to resume, got 0.01"
    with pytest.raises(ValueError) as caught:
        fit(model(), train, epochs=2, run_dir=tmp_path / "run", per_click=True, resume=True)
    assert str(caught.value) == "fit: per_click must be False as in the run to resume, got True"


def test_a_run_from_before_a_models_options_is_resumed_with_what_was_the_only_way(tmp_path):
    train, _ = learnable()
    fit(model(), train, epochs=1, run_dir=tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["normalize_input"], config["activation"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        relu = MultiVAE([8, 16, N_ITEMS], activation="relu")
        fit(relu, train, epochs=2, run_dir=tmp_path / "run", resume=True)
    assert str(caught.value) == "fit: activation must be tanh as in the run to resume, got relu"
    result = fit(model(), train, epochs=2, run_dir=tmp_path / "run", resume=True)
    assert len(result.history) == 2


def test_a_run_of_the_older_words_for_per_click_is_resumed_by_it(tmp_path):
    train, _ = learnable()
    with pytest.warns(DeprecationWarning, match="fit: normalize must become per_click=True"):
        fit(model(), train, epochs=1, run_dir=tmp_path / "run", normalize="clicks")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["normalize"] == "clicks"
    result = fit(model(), train, epochs=2, run_dir=tmp_path / "run", per_click=True, resume=True)
    assert len(result.history) == 2


@pytest.mark.parametrize("name", ["config.json", "last.pt"])
def test_a_run_folder_that_lost_a_file_is_not_resumed(tmp_path, name):
    train, _ = learnable()
    run = tmp_path / "run"
    fit(model(), train, epochs=1, run_dir=run)
    (run / name).unlink()
    with pytest.raises(ValueError) as caught:
        fit(model(), train, epochs=2, run_dir=run, resume=True)
    assert str(caught.value) == (
        f"fit: run_dir must hold a run to resume, got {run} without {name}; train without resume, in a new folder"
    )


def test_a_run_resumed_without_items_keeps_those_it_had(tmp_path):
    train, validation = learnable()
    ids, run = list(range(100, 100 + N_ITEMS)), tmp_path / "run"
    fit(model(), train, validation, epochs=1, run_dir=run, items=ids)
    fit(model(), train, validation, epochs=3, run_dir=run, resume=True)
    fit(model(), train, validation, epochs=4, run_dir=run, resume=True, items=ids)
    for name in ("best.pt", "last.pt"):
        assert load_model(run / name)[1] == [str(item) for item in ids]
    fit(model(), train, epochs=1, run_dir=tmp_path / "none")
    with pytest.raises(ValueError) as caught:
        fit(model(), train, epochs=2, run_dir=tmp_path / "none", resume=True, items=ids)
    assert str(caught.value) == "fit: items must be None as in the run to resume, got ids"


def test_a_run_is_resumed_with_its_own_validation_only(tmp_path):
    train, validation = learnable()
    fit(model(), train, validation, epochs=1, run_dir=tmp_path / "run")
    before = (tmp_path / "run" / "best.pt").read_bytes()
    for other, got in ((None, "none"), (validation[::-1], "others")):
        with pytest.raises(ValueError) as caught:
            fit(model(), train, other, epochs=2, run_dir=tmp_path / "run", resume=True)
        assert (
            str(caught.value)
            == f"fit: validation must be the clicks of the run to resume, got {got}"
        )
    assert (tmp_path / "run" / "best.pt").read_bytes() == before


def test_a_run_without_its_best_checkpoint_is_refused_before_it_trains(tmp_path, monkeypatch):
    train, validation = learnable()
    fit(model(), train, validation, epochs=1, run_dir=tmp_path / "run")
    (tmp_path / "run" / "best.pt").unlink()
    monkeypatch.setattr(MultiVAE, "loss_terms", None)  # not to be reached
    with pytest.raises(ValueError, match=r"best\.pt"):
        fit(model(), train, validation, epochs=2, run_dir=tmp_path / "run", resume=True)


def test_the_name_of_a_run_folder_is_no_formula(tmp_path):
    run = tmp_path / "a$x_{$"
    fit(model(), learnable()[0], epochs=1, run_dir=run)
    assert (run / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_model_has_its_best_weights_even_where_the_curve_cannot_be_drawn(tmp_path):
    train, validation = learnable()
    net, run = model(), tmp_path / "run"
    fit(net, train, validation, epochs=1, run_dir=run)
    best = load_model(run / "best.pt")[0]
    (run / "curve.png").unlink()
    (run / "curve.png").mkdir()
    again = model(seed=1)
    with pytest.raises(OSError):
        fit(again, train, validation, epochs=1, run_dir=run, resume=True)
    assert_equal_weights(weights(again), weights(best))


def fit_that_died_before_a_checkpoint(train, run):
    fit(model(), train, epochs=1, run_dir=run)
    for name in ("last.pt", "curve.png"):
        (run / name).unlink()


def test_a_run_that_died_before_its_first_checkpoint_is_started_anew(tmp_path):
    train, _ = learnable()
    run = tmp_path / "run"
    fit_that_died_before_a_checkpoint(train, run)
    (run / ".last.pt.12.0.tmp").write_text("half")
    fit(model(), train, epochs=2, run_dir=run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert not list(run.glob(".*"))
    (run / ".best.pt.12.tmp").write_text("half")
    fit(model(), train, epochs=3, run_dir=run, resume=True)
    assert not list(run.glob(".*"))


def test_a_foreign_file_beside_our_config_is_left_alone(tmp_path):
    train, _ = learnable()
    run = tmp_path / "run"
    fit_that_died_before_a_checkpoint(train, run)
    (run / "thesis.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"must be a new or empty folder, got .* with thesis\.txt in it"
    ):
        fit(model(), train, epochs=1, run_dir=run)


def test_only_leftovers_of_our_own_files_are_removed(tmp_path):
    train, _ = learnable()
    run = tmp_path / "run"
    run.mkdir()
    for name in (".notes.tmp", ".best.pt.old.tmp", ".best.pt.12.tmp"):
        (run / name).write_text("x")
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        fit(model(), train, epochs=1, run_dir=run)
    assert sorted(path.name for path in run.iterdir()) == [".best.pt.old.tmp", ".notes.tmp"]


class MyVAE(MultiVAE):
    pass


def test_a_subclass_trains_but_not_into_checkpoints_that_nothing_could_load(tmp_path):
    train, validation = learnable()
    torch.manual_seed(0)
    net = MyVAE([4, N_ITEMS])
    assert fit(net, train, validation, epochs=1).best_epoch == 1
    with pytest.raises(TypeError) as caught:
        fit(net, train, validation, epochs=1, run_dir=tmp_path / "run")
    assert str(caught.value) == (
        "fit: model must be a MultiVAE or MultiDAE itself where run_dir is given, got MyVAE; "
        "load_model could not make it again"
    )
    assert not (tmp_path / "run").exists()


def with_buffer(net):
    net.register_buffer("mean_", torch.zeros(3))


def with_submodule(net):
    net.decode.head = torch.nn.Linear(2, 2)


def with_parametrization(net):
    torch.nn.utils.parametrizations.weight_norm(net.encode.q_layers.linear_1)


def with_wider_layer(net):
    net.decode.p_layers.linear_0 = torch.nn.Linear(8, 20)


def without_bias(net):
    net.decode.output.bias = None


def with_renamed_keys(net):
    net.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update(
            {f"module.{key}": state.pop(key) for key in list(state)}
        )
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (with_buffer, "has mean_"),
        (with_submodule, "has decode.head.weight"),
        (with_parametrization, "has encode.q_layers.linear_1.parametrizations.weight.original0"),
        (with_wider_layer, "reshapes decode.p_layers.linear_0.weight"),
        (without_bias, "lacks decode.p_layers.linear_1.bias"),
        (with_renamed_keys, "has module.encode.q_layers.linear_0.weight"),
    ],
)
@pytest.mark.parametrize("make", [MultiVAE, MultiDAE])
def test_a_model_that_load_model_could_not_make_again_is_refused_before_it_trains(
    tmp_path, monkeypatch, make, change, what
):
    train, validation = learnable()
    net = model(make=make)
    change(net)
    monkeypatch.setattr(make, "loss_terms", None)  # not to be reached
    with pytest.raises(ValueError) as caught:
        fit(net, train, validation, epochs=1, run_dir=tmp_path / "run")
    assert str(caught.value) == (
        f"fit: model must have the weights of a plain {make.__name__} where run_dir is given, got one that {what}; "
        "load_model could not make it again"
    )
    assert not (tmp_path / "run").exists()


def with_a_hook(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


class Scaled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "change", [with_a_hook, lambda layer: Scaled(8, 16)], ids=["hook", "class"]
)
def test_a_layer_that_computes_more_than_its_weights_say_is_refused_too(tmp_path, change):
    net = model()
    net.decode.p_layers.linear_0 = change(net.decode.p_layers.linear_0)
    with pytest.raises(ValueError) as caught:
        fit(net, *learnable(), epochs=1, run_dir=tmp_path / "run")
    assert str(caught.value) == (
        "fit: model must have plain layers where run_dir is given, got decode.p_layers.linear_0 of another class "
        "or with hooks; load_model could not make it again"
    )
    fit(net, *learnable(), epochs=1)  # without a folder it trains


@pytest.mark.parametrize("part", ["decode", "encode", ""])
def test_a_part_that_computes_more_than_its_layers_is_refused_too(tmp_path, part):
    net = model()
    net.get_submodule(part).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError) as caught:
        fit(net, *learnable(), epochs=1, run_dir=tmp_path / "run")
    assert str(caught.value) == (
        f"fit: model must have plain layers where run_dir is given, got {part or 'MultiVAE'} of another class "
        "or with hooks; load_model could not make it again"
    )


@pytest.mark.parametrize(
    ("part", "setting", "value", "then"),
    [
        ("encode", "tanh_after_dropout", True, "False"),
        ("decode", "activation", "relu", "'tanh'"),
        ("encode.q_layers", "dropout", [0.1, 0.0], "[0.5, 0.0]"),
    ],
)
def test_a_part_that_is_set_otherwise_than_the_models_arguments_say_is_refused(
    tmp_path, part, setting, value, then
):
    net = model()
    setattr(net.get_submodule(part), setting, value)
    with pytest.raises(ValueError) as caught:
        fit(net, *learnable(), epochs=1, run_dir=tmp_path / "run")
    assert str(caught.value) == (
        f"fit: model must be as its arguments say where run_dir is given, got {setting} {value!r} for {then} in "
        f"{part}; load_model could not make it again"
    )


def test_what_leaves_no_trace_in_the_weights_trains_into_a_run_folder(tmp_path):
    net, run = model(), tmp_path / "run"
    net.register_buffer("scratch", torch.zeros(3), persistent=False)
    net.decode.quiet = torch.nn.Identity()
    fit(net, *learnable(), epochs=1, run_dir=run)
    assert_equal_weights(weights(load_model(run / "best.pt")[0]), weights(net))


@pytest.mark.parametrize("n_epochs", [1, 2, 3, 40])
def test_the_learning_curve_has_whole_epochs_on_its_axis(tmp_path, monkeypatch, n_epochs):
    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *a, **k: figures.append(self) or save(self, *a, **k),
    )
    forced_metrics(monkeypatch, [0.1] * n_epochs)
    fit(model(), *learnable(), epochs=n_epochs, run_dir=tmp_path / "run")
    axis = figures[0].axes[0]
    low, high = axis.get_xlim()
    shown = [tick for tick in axis.get_xticks() if low <= tick <= high]
    assert shown and all(tick == int(tick) for tick in shown)


@pytest.mark.parametrize("resume", [False, True], ids=["new", "resume"])
def test_a_second_training_in_the_same_folder_is_refused_and_harms_nothing(
    tmp_path, monkeypatch, resume
):
    train, _ = learnable()
    run = tmp_path / "run"
    terms, refused = MultiVAE.loss_terms, []

    def meanwhile(self, *arguments):
        if not refused:
            refused.append(None)
            with pytest.raises(ValueError) as caught:
                fit(model(), train, epochs=1, run_dir=run, resume=resume)
            refused[0] = str(caught.value)
        return terms(self, *arguments)

    if resume:
        fit(model(), train, epochs=1, run_dir=run)
    monkeypatch.setattr(MultiVAE, "loss_terms", meanwhile)
    result = fit(model(), train, epochs=2, run_dir=run, resume=resume)
    assert refused == [
        f"fit: run_dir must be a folder that no other training writes to, got {run}; wait for that one to end, "
        "or name another folder"
    ]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2] and len(result.history) == 2
    # and the folder is free again
    assert len(fit(model(), train, epochs=3, run_dir=run, resume=True).history) == 3
