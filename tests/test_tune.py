"""tune(): the cap of beta from an annealing run, trials, pruning, going on, several processes; needs the extra tune."""

import csv
import json
import math
import sys
from dataclasses import astuple

import numpy as np
import pytest
import torch

import fastvae.tune
from fastvae import Dataset, MultiVAE, fit
from fastvae.run_folder import METRIC
from fastvae.train import FitResult
from fastvae.trials import SPACE, Trial, Tuning
from fastvae.tune import PAPER, tune

optuna = pytest.importorskip("optuna", reason="optuna is not installed: the extra tune brings it")
FAST = {"epochs": 2, "batch_size": 40}


def write_data(folder, n_heldout=15):
    """Users of one of two tastes."""
    rng = np.random.default_rng(0)
    x = np.zeros((100, 40), int)
    for u in range(100):
        x[u, rng.choice(20, 10, replace=False) + 20 * (u % 2)] = 1
    Dataset.from_matrix(x, n_heldout, 0).save(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("tune") / "data")


@pytest.fixture(scope="module")
def searched(data, tmp_path_factory):
    """A search of three trials, what it said, and its folder."""
    runs, said = tmp_path_factory.mktemp("tune") / "runs", []
    result = tune(data, runs, trials=3, on_trial=lambda trial, _: said.append(trial), **FAST)
    return result, said, runs


def faked(monkeypatch, curves):
    """Let each trial have the next of these validation curves, or raise what is in its place."""
    curves = iter(curves)

    def fake(model, train, validation, *, on_epoch=None, **_):
        curve = next(curves)
        if not isinstance(curve, list):
            raise curve
        done = []
        for epoch, value in enumerate(curve, 1):
            done.append({"epoch": epoch, "beta": epoch / 10, METRIC: value})
            if on_epoch is not None and on_epoch(done[-1]):
                break
        best = max(done, key=lambda row: row[METRIC])
        return FitResult(done, best["epoch"], best[METRIC])

    monkeypatch.setattr(fastvae.tune, "fit", fake)
    monkeypatch.setattr(Tuning, "draw", lambda *_: None)


def test_the_cap_is_beta_of_the_annealing_runs_best_epoch(searched):
    result, _, runs = searched
    lines = (runs / "anneal" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert result.annealing == [(row["beta"], row[METRIC]) for row in rows] and len(rows) == 2
    assert [beta for beta, _ in result.annealing] == [1 / 4, 3 / 4]  # two updates an epoch
    best = max(rows, key=lambda row: row[METRIC])
    assert result.anneal_cap == best["beta"] and result.total_anneal_steps == 4


def test_the_papers_trial_goes_as_the_annealing_run_up_to_the_cap(searched):
    result, said, _ = searched
    assert said[0].ndcg >= max(ndcg for _, ndcg in result.annealing)


def test_trials_begin_with_the_papers_settings_and_stay_inside_the_space(searched):
    result, said, runs = searched
    assert sorted(t.number for t in result.trials) == [0, 1, 2] == [t.number for t in said]
    assert {name: getattr(said[0], name) for name in SPACE} == PAPER
    for trial in result.trials:
        for name, (low, high, step) in SPACE.items():
            value = getattr(trial, name)
            assert low <= value <= high
            assert step is None or (value - low) / step == pytest.approx(round((value - low) / step))  # fmt: skip
    assert len({astuple(t)[5:] for t in result.trials}) == 3
    values = [t.ndcg for t in result.trials]
    assert values == sorted(values, reverse=True) and result.best == result.trials[0]
    with open(runs / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["number"]), float(row["ndcg"])) for row in rows] == [
        (t.number, t.ndcg) for t in result.trials
    ]
    assert (runs / "tune.png").stat().st_size > 10_000


def test_the_best_trial_is_what_fit_gives_with_its_settings(searched, data):
    best, loaded = searched[0].best, Dataset.load(data)
    torch.manual_seed(0)
    model = MultiVAE([best.latent, best.hidden, loaded.n_items], [best.dropout, 0.0])
    again = fit(
        model,
        loaded.train,
        loaded.validation,
        lr=best.lr,
        anneal_cap=searched[0].anneal_cap,
        total_anneal_steps=searched[0].total_anneal_steps,
        patience=5,
        **FAST,
    )
    assert (again.best_epoch, again.best_metric) == (best.best_epoch, best.ndcg)


def test_a_search_that_goes_on_has_the_trials_of_one_that_did_not_stop(searched, data, tmp_path):
    for trials in (1, 1, 3):
        result = tune(data, tmp_path / "runs", trials=trials, **FAST)
        assert len(result.trials) == trials
    assert result == searched[0]


def test_a_killed_trial_does_not_count(data, tmp_path, monkeypatch):
    faked(monkeypatch, [[0.1, 0.3, 0.2], [0.4], [0.5]])
    assert tune(data, tmp_path / "runs", trials=1, **FAST).anneal_cap == 0.2
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "runs" / "journal.log"))
    )
    study = optuna.load_study(study_name="fastvae", storage=storage)
    study.ask()
    result = tune(data, tmp_path / "runs", trials=2, **FAST)
    assert [(t.number, t.ndcg) for t in result.trials] == [(2, 0.5), (0, 0.4)]
    assert [t.state.name for t in study.get_trials()] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_a_trial_that_falls_behind_is_pruned(data, tmp_path, monkeypatch):
    good = [[0.3, 0.4, 0.5]] * 5
    faked(monkeypatch, [[0.1], *good, [0.1, 0.1, 0.9], [0.6, 0.6, 0.6]])
    result = tune(data, tmp_path / "runs", trials=7, **FAST)
    assert [(t.state, t.epochs, t.ndcg) for t in result.trials[:2]] == [
        ("complete", 3, 0.6),
        ("complete", 3, 0.5),
    ]
    assert [(t.state, t.epochs, t.ndcg, t.number) for t in result.trials[6:]] == [
        ("pruned", 2, 0.1, 5)
    ]


def test_a_trial_whose_loss_is_not_finite_counts_as_failed(data, tmp_path, monkeypatch):
    faked(monkeypatch, [[0.1], RuntimeError("fit: loss must be finite, got nan"), [0.2]])
    result = tune(data, tmp_path / "runs", trials=2, **FAST)
    assert [t.state for t in result.trials] == ["complete", "failed"]
    assert math.isnan(result.trials[1].ndcg) and result.best.ndcg == 0.2
    failed = Tuning(0.2, 0, [], result.trials[1:])
    with pytest.raises(ValueError) as error:
        _ = failed.best
    assert str(error.value) == ("tune: trials must hold one that is complete, got none; add trials")


def test_ctrl_c_keeps_what_has_ended_and_tries_the_papers_settings_again(
    data, tmp_path, monkeypatch
):
    faked(monkeypatch, [[0.1], KeyboardInterrupt(), [0.2], [0.3], KeyboardInterrupt()])
    runs = tmp_path / "runs"
    with pytest.raises(KeyboardInterrupt) as stopped:
        tune(data, runs, trials=3, **FAST)
    assert str(stopped.value) == f"stopped after 0 trials; saved in {runs}, the same command goes on"  # fmt: skip
    with pytest.raises(KeyboardInterrupt, match="stopped after 2 trials"):
        tune(data, runs, trials=3, **FAST)
    rows = (runs / "trials.csv").read_text().splitlines()
    assert rows[2].endswith(",600,200,0.5,0.001") and len(rows) == 3


@pytest.mark.slow
def test_two_trials_at_once(data, tmp_path):
    result = tune(data, tmp_path / "runs", trials=2, jobs=2, epochs=1, batch_size=40)
    assert sorted(t.number for t in result.trials) == [0, 1]
    assert {t.state for t in result.trials} == {"complete"}
    with open(tmp_path / "runs" / "trials.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_a_dae_has_no_beta(data, tmp_path):
    result = tune(data, tmp_path / "runs", trials=1, model="dae", epochs=1, batch_size=40)
    assert (result.anneal_cap, result.annealing) == (0.0, []) and len(result.trials) == 1
    assert not (tmp_path / "runs" / "anneal").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trials": 0}, "tune: trials must be at least 1, got 0"),
        ({"jobs": 0}, "tune: jobs must be at least 1, got 0"),
        ({"model": "gan"}, "tune: model must be one of vae, dae, got 'gan'"),
        ({"precision": "fp8"}, "tune: precision must be one of fp32, bf16, got 'fp8'"),
        ({"progress": 1}, "tune: progress must be True or False, got 1"),
        (
            {"runs": "{file}"},
            "tune: runs must be a folder, got a file at {file}",
        ),
        (
            {"runs": "{data}"},
            "tune: runs must be new, empty or a search to go on with, got {data} with ids.npz in it",
        ),
        ({"epochs": 3}, "tune: epochs must be 2 as in the search in {runs}, got 3"),
        (
            {"dataset": "{other}"},
            "tune: dataset must be that of the search in {runs}, got other clicks",
        ),
        (
            {"dataset": "{without}"},
            "tune: dataset must have a validation user with held-out clicks, got none; "
            "prepare it with a larger --heldout",
        ),
    ],
)
def test_what_is_refused(arguments, message, data, searched, tmp_path):
    (tmp_path / "file").touch()
    places = {
        "file": tmp_path / "file",
        "data": data,
        "runs": searched[2],
        "other": write_data(tmp_path / "other", 20),
        "without": write_data(tmp_path / "without", 0),
    }
    filled = {
        name: value.format(**places) if isinstance(value, str) else value
        for name, value in arguments.items()
    }
    with pytest.raises((TypeError, ValueError)) as error:
        tune(**{"dataset": data, "runs": searched[2], **FAST, **filled})
    assert str(error.value) == message.format(**places)


def test_one_search_at_a_time(data, tmp_path):
    runs, refused = tmp_path / "runs", []

    def again(*_):
        with pytest.raises(ValueError) as error:
            tune(data, runs, **FAST)
        refused.append(str(error.value))

    tune(data, runs, trials=1, on_trial=again, epochs=2, batch_size=40)
    assert refused == [
        f"tune: runs must be one that no other search writes to, got {runs}; wait for that one to end"
    ]


def test_without_optuna_the_extra_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError) as error:
        tune(data, tmp_path / "runs")
    assert str(error.value) == (
        "tune: optuna must be there, got none; pip install 'fastvae-cf[tune]'"
    )


def test_the_command_hands_over_its_options_and_says_how_to_train_the_best(
    data, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("typer", reason="typer is not installed: the extra cli brings it")
    from rich.console import Console

    from fastvae import cli, console

    seen = {}
    annealing = [(0.1 * n, 0.3 + 0.01 * n) for n in range(8)]
    trials = [
        Trial(1, "complete", 0.5, 4, 7, 300, 150, 0.3, 0.00123),
        Trial(0, "failed", math.nan, 0, 0, 600, 200, 0.5, 0.001),
    ]

    def fake(dataset, runs, *, on_trial, **options):
        seen.update(options, dataset=dataset, runs=runs)
        result = Tuning(0.17, 35, [(0.1, 0.3)], trials)
        on_trial(trials[0], result)
        return result if dataset.name == "data" else Tuning(0.4, 35, annealing, trials)

    monkeypatch.setattr(fastvae.tune, "tune", fake)
    monkeypatch.setattr(console, "out", Console(width=80))
    options = {
        "trials": 9, "jobs": 3, "model": "dae", "epochs": 8, "batch_size": 7, "patience": 6,
        "precision": "bf16", "seed": 5, "device": "cpu",
    }  # fmt: skip
    words = [str(w) for k, v in options.items() for w in (f"--{k.replace('_', '-')}", v)]
    monkeypatch.setattr(sys, "argv", ["fastvae", "tune", "data", "runs", *words])
    cli.main()
    given = {**options, "device": torch.device("cpu"), "progress": True}
    assert {name: seen[name] for name in given} == given
    assert (str(seen["dataset"]), str(seen["runs"])) == ("data", "runs")
    out, err = capsys.readouterr()
    assert "trial 1, 2 ended: hidden 300" in out and "NDCG@100 0.5000 at epoch 4 of 7" in out
    assert "cap of beta 0.17" in out and err == ""
    assert out.splitlines()[-1] == (
        "fastvae train data run --model dae --hidden 300 --latent 150 --dropout 0.3 --lr 0.00123 --anneal-cap 0.17 "
        "--total-anneal-steps 35 --batch-size 7 --epochs 8 --patience 6 --precision bf16 --seed 5"
    )
    # beta rose to the last epoch, or patience ended it, or it fell before
    for more, is_noted in ((8, True), (7, False), (9, False)):
        del annealing[:]
        annealing += [(0.1 * n, 0.3 + 0.01 * n) for n in range(min(more, 8))] + [(0.9, 0.1)] * (
            more - 8
        )
        monkeypatch.setattr(sys, "argv", ["fastvae", "tune", "other", "runs", *words])
        cli.main()
        assert (
            "the annealing run was best at its last epoch" in capsys.readouterr().err
        ) == is_noted
