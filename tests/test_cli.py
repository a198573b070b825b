"""The fastvae command, from a click log to recommendations; errors are one sentence and exit code 2."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae import Clicks, Dataset, MultiDAE, MultiVAE, evaluate, load_model
from fastvae.checkpoint import read_checkpoint
from fastvae.evaluate import Popularity

pytest.importorskip("polars")


@pytest.fixture
def run(monkeypatch, capsys):
    """Call main() as the shell would; returns exit code, stdout, stderr."""
    from rich.console import Console

    from fastvae import cli, console

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastvae", *map(str, arguments)])
        monkeypatch.setattr(console, "out", Console(width=100))
        monkeypatch.setattr(console, "err", Console(stderr=True, width=100))
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def write_log(path, n_users=120, seed=0):
    """A log with string ids, duplicates and missing values; users of one of two tastes."""
    rng = np.random.default_rng(seed)
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["userId", "movieId", "rating"])
        for u in range(n_users):
            for i in rng.choice(30, 10, replace=False):
                rows.writerow([f"user {u}", f"film, {i + 30 * (u % 2)}", rng.integers(4, 6)])
        rows.writerow(["user 0", "", 5])
        rows.writerow(["", "film, 1", 5])
        rows.writerow(["user 1", "film, 31", 1])
        rows.writerow(["user 1", "film, 31", ""])
    return path


@pytest.fixture
def prepared(tmp_path, run):
    log, data = write_log(tmp_path / "log.csv"), tmp_path / "data"
    assert run("prepare", log, data, "--heldout", 15, "--min-rating", 4)[0] == 0
    return log, data


def train(run, data, folder, *more):
    narrow = ("--hidden", 16, "--latent", 8, "--lr", 0.01, "--batch-size", 30)
    return run("train", data, folder, "--epochs", 4, *narrow, *more)


def test_from_a_log_to_recommendations(tmp_path, run, prepared):
    log, data = prepared
    folder = tmp_path / "run"
    code, out, err = train(run, data, folder)
    assert code == 0 and "best epoch" in out and "NDCG@100" in err and "users/s" in err
    assert (folder / "curve.png").exists()

    code, out, _ = run("evaluate", folder, data, "--metric", "ndcg@10", "--json")
    results = json.loads(out)
    dataset = Dataset.load(data)
    model, items = load_model(folder / "best.pt")
    assert items == list(dataset.items)
    expected = evaluate(model, *dataset.test, metrics=["ndcg@10"])
    assert results["MultiVAE"] == expected.to_dict()
    assert set(results) == {"MultiVAE", "popularity"}
    code, out, _ = run("evaluate", folder, data)
    assert code == 0 and "recall@50" in out and "15 users evaluated, 0 skipped" in out

    top = tmp_path / "top.csv"
    code, out, _ = run("recommend", folder, log, top, "-k", 3)
    assert code == 0 and "wrote the top 3 of 120 users" in out
    rows = list(csv.DictReader(top.open(newline="")))
    assert len(rows) == 3 * 120 and {row["user"] for row in rows} == {
        f"user {u}" for u in range(120)
    }
    seen = {(row["userId"], row["movieId"]) for row in csv.DictReader(log.open(newline=""))}
    assert not {(row["user"], row["item"]) for row in rows} & seen
    kept = tmp_path / "kept.csv"
    assert run("recommend", folder, log, kept, "-k", 3, "--keep-seen")[0] == 0
    assert {(row["user"], row["item"]) for row in csv.DictReader(kept.open(newline=""))} & seen


def test_recommendations_for_a_datasets_test_users_reach_the_metrics_of_evaluate(
    tmp_path, run, prepared
):
    _, data = prepared
    train(run, data, tmp_path / "run", "--model", "dae")
    top = tmp_path / "top.jsonl"
    assert run("recommend", tmp_path / "run", data, top, "-k", 20, "--users", "test")[0] == 0
    dataset, recalls = Dataset.load(data), []
    lines = [json.loads(line) for line in top.read_text().splitlines()]
    assert [line["user"] for line in lines] == list(dataset.users_test)
    for u, line in enumerate(lines):
        held_out = {dataset.items[i] for i in dataset.test_te.rows([u]).compact().indices}
        recalls.append(len(held_out & set(line["items"])) / min(20, len(held_out)))
    model, _ = load_model(tmp_path / "run" / "best.pt")
    assert isinstance(model, MultiDAE)
    recall = evaluate(model, *dataset.test, metrics=["recall@20"])["recall@20"]
    assert np.mean(recalls) == pytest.approx(recall)


def test_prepare_reports_what_was_dropped(tmp_path, run):
    log = write_log(tmp_path / "log.csv")
    code, out, _ = run("prepare", log, tmp_path / "data", "--min-rating", 4, "--heldout", "0.1")
    assert code == 0
    for reason in ("no user id", "no item id", "a rating below min_rating", "not a number"):
        assert reason in out or reason == "not a number"
    assert "96 train, 12 validation, 12 test" in out


def test_resume_through_the_command_line(tmp_path, run, prepared):
    _, data = prepared
    train(run, data, tmp_path / "a")
    narrow = ("--hidden", 16, "--latent", 8, "--lr", 0.01, "--batch-size", 30)
    assert run("train", data, tmp_path / "b", "--epochs", 2, *narrow)[0] == 0
    assert run("train", data, tmp_path / "b", "--epochs", 4, "--resume", *narrow)[0] == 0
    a, b = (read_checkpoint(tmp_path / name / "last.pt")["model"] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    code, _, err = train(run, data, tmp_path / "a")
    assert code == 2 and "run_dir must be a new folder" in err


def test_a_full_disk_is_one_sentence_with_the_files_name(tmp_path, run, prepared, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        code, _, err = train(run, prepared[1], tmp_path / "run")
    best = tmp_path / "run" / "best.pt"
    assert code == 2
    assert err.splitlines()[-1] == f"fastvae: [Errno 28] No space left on device: '{best}'"
    assert "Traceback" not in err and not best.exists()


def test_a_checkpoint_of_other_code(tmp_path, run, prepared):
    _, data = prepared
    n_items = Dataset.load(data).n_items
    model = MultiVAE([4, 6, n_items])
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    code, out, _ = run("evaluate", tmp_path / "theirs.pt", data, "--json")
    assert code == 0 and json.loads(out)["MultiVAE"]["n_evaluated"] == 15
    assert run("recommend", tmp_path / "theirs.pt", data, tmp_path / "top.parquet")[0] == 0
    code, _, err = run(
        "recommend", tmp_path / "theirs.pt", tmp_path / "log.csv", tmp_path / "t.csv"
    )
    assert code == 2 and "histories must be the dataset folder" in err
    torch.save(MultiVAE([4, 6, 5]).state_dict(), tmp_path / "small.pt")
    code, _, err = run("evaluate", tmp_path / "small.pt", data)
    assert code == 2 and f"checkpoint has 5 items, data has {n_items}" in err


def test_a_dataset_in_another_order_of_items_gives_the_same_metrics(tmp_path, run, prepared):
    _, data = prepared
    train(run, data, tmp_path / "run")
    dataset = Dataset.load(data)
    order = np.random.default_rng(0).permutation(dataset.n_items)

    def shuffled(x):
        return Clicks.from_matrix(x.to_scipy()[:, order])

    dataset.train = shuffled(dataset.train)
    dataset.validation, dataset.test = (
        tuple(map(shuffled, pair)) for pair in (dataset.validation, dataset.test)
    )
    dataset.items = dataset.items[order]
    dataset.save(tmp_path / "shuffled")
    plain, other = (
        json.loads(run("evaluate", tmp_path / "run", folder, "--json")[1])
        for folder in (data, tmp_path / "shuffled")
    )
    assert plain["MultiVAE"] == other["MultiVAE"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("prepare", "missing.csv", "out"), "missing.csv"),
        (("prepare", "log.csv", "out", "--heldout", "many"), "prepare: heldout must be a count or a fraction, got many"),
        (("prepare", "log.csv", "out", "--user", "nobody"), "the columns are"),
        (("prepare", "log.csv", "out", "--heldout", 500), "prepare: "),
        (("train", "missing", "run"), "write one with fastvae prepare"),
        (("train", "data", "run", "--model", "gan"), "train: model must be vae or dae, got gan"),
        (("train", "data", "run", "--latent", 10**12), "train: hidden and latent must be widths whose weights fit in memory, got [1000000000000, 600, 60]"),
        (("train", "data", "run", "--latent", 10**30), "train: hidden and latent must be widths whose weights fit in memory"),
        (("train", "data", "run", "--hidden", "wide"), "train: hidden must be widths such as"),
        (("train", "data", "run", "--batch-size", 0), "fit: batch_size must be at least 1, got 0"),
        (("train", "data", "run", "--resume"), "fit: run_dir must hold a run to resume"),
        (("train", "data", "run", "--device", "cpu:abc"), "device must be cpu or cuda, got cpu:abc"),
        (("train", "data", "run", "--batch-size", 10**23), "fit: batch_size must lie below 2**31, got 100000000000000000000000"),
        *([] if torch.cuda.is_available() else [(("train", "data", "run", "--device", "cuda"), "device must be cpu where torch finds no GPU, got cuda")]),
        (("train", "data", "run", "--device", "tpu"), "device must be cpu or cuda, got tpu"),
        (("evaluate", "missing", "data"), "run must be a run folder or a checkpoint, got nothing at missing"),
        (("evaluate", "log.csv", "data"), "checkpoint: log.csv must be a whole checkpoint"),
        (("evaluate", "missing", "data", "--users", "all"), "evaluate: users must be test or vad, got all"),
        (("demo", "one_user.csv"), "got 1 of 1 users with at least 5 clicks; add data"),
        (("recommend", "missing", "log.csv", "top.csv"), "run must be a run folder or a checkpoint, got nothing at missing"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence_and_exit_code_2(
    prepared, run, monkeypatch, tmp_path, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    Path("one_user.csv").write_text("user,item\n" + "".join(f"u,{i}\n" for i in range(9)))
    code, out, err = run(*arguments)
    assert code == 2 and out == ""
    assert sentence in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["", "prepare", "train", "evaluate", "recommend", "demo"])
def test_help(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0 and "Usage: fastvae" in out


def test_the_installed_command_runs():
    done = subprocess.run(
        [sys.executable, "-m", "fastvae", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "recommend" in done.stdout


def test_demo_on_an_own_log(tmp_path, run, monkeypatch):
    import fastvae.demo

    monkeypatch.setattr(fastvae.demo, "MAX_EPOCHS", 2)
    log = write_log(tmp_path / "log.csv")
    code, out, _ = run("demo", log, "--folder", tmp_path / "demo")
    assert code == 0
    for text in ("popularity", "Mult-VAE", "-> recommended film, ", "run-1", "curve.png"):
        assert text in out
    assert (tmp_path / "demo" / "run-1" / "curve.png").exists()


def test_demo_without_a_network_uses_synthetic_data_and_says_so(tmp_path, run, monkeypatch):
    import fastvae.demo

    def no_network():
        raise RuntimeError("movielens_100k: pip could not fetch the data")

    monkeypatch.setattr(fastvae.demo, "movielens_100k", no_network)
    monkeypatch.setattr(fastvae.demo, "MAX_EPOCHS", 1)
    code, out, _ = run("demo", "--folder", tmp_path / "demo")
    assert code == 0 and "using synthetic data instead" in out and "-> recommended item " in out


def test_recommend_never_overwrites_its_input_and_says_what_it_drops(tmp_path, run, prepared):
    log, data = prepared
    train(run, data, tmp_path / "run")
    before = log.read_bytes()
    code, _, err = run("recommend", tmp_path / "run", log, log)
    assert code == 2 and "output must be another file" in err and log.read_bytes() == before
    code, _, err = run("recommend", tmp_path / "run", log, tmp_path / "t.csv", "--min-rating", 4)
    assert code == 0 and "1 with no user id" in err and "1 with a rating below min_rating" in err
    odd = tmp_path / "odd.csv"
    odd.write_text("a;nothing known\nb;film, 3\n")
    arguments = ("--no-header", "--separator", ";", "--user", "1", "--item", "2")
    code, _, err = run("recommend", tmp_path / "run", odd, tmp_path / "t.csv", *arguments)
    assert code == 0 and "1 of 2 clicks" in err and "1 users have no other" in err
    code, _, err = run("recommend", tmp_path / "run", log, tmp_path / "t.csv", "--users", "test")
    assert code == 2 and "it is for dataset folders" in err


def test_recommend_says_how_many_it_wrote_and_who_got_nothing(tmp_path, run, prepared):
    train(run, prepared[1], tmp_path / "run")
    items = load_model(tmp_path / "run" / "best.pt")[1]
    with open(tmp_path / "all.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("user", "item"), *(("full", item) for item in items), ("new", items[0])]
        )
    code, out, err = run(
        "recommend", tmp_path / "run", tmp_path / "all.csv", tmp_path / "t.csv", "-k", 500
    )
    assert code == 0 and f"wrote the top {len(items)} of 2 users" in out
    assert err == "1 users have no recommendation: their history holds every item of the model\n"
    code, _, err = run("recommend", tmp_path / "run", tmp_path / "none.csv", tmp_path / "t.csv")
    assert (
        code == 2
        and err == f"fastvae: events: path must be a file, got nothing at {tmp_path}/none.csv\n"
    )


def test_recommend_from_a_dataset_folder_takes_no_options_of_a_log_and_any_k(
    tmp_path, run, prepared
):
    train(run, prepared[1], tmp_path / "run")
    arguments = ("recommend", tmp_path / "run", prepared[1], tmp_path / "t.csv")
    code, out, err = run(*arguments, "--min-rating", 5, "--no-header")
    assert (
        code == 2
        and out == ""
        and err
        == (
            "fastvae: recommend: histories must be a click log where --min-rating is given, got a dataset folder\n"
        )
    )
    code, out, _ = run(*arguments, "-k", 10**23)
    assert code == 0 and "wrote the top 60 of" in out


def test_a_terminal_without_the_sign_for_plus_minus(tmp_path, run, prepared):
    train(run, prepared[1], tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "fastvae", "evaluate", tmp_path / "run", prepared[1]],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "popularity" in done.stdout and " ? " in done.stdout


def test_every_option_of_train_reaches_fit(tmp_path, run, prepared, monkeypatch):
    from fastvae import cli
    from fastvae.train import FitResult

    calls = []
    monkeypatch.setattr(cli, "fit", lambda *a, **k: calls.append((a, k)) or FitResult())
    settings = {
        "epochs": 3, "batch_size": 7, "lr": 0.5, "anneal_cap": 0.7, "total_anneal_steps": 9, "patience": 2,
        "precision": "bf16", "seed": 4,
    }  # fmt: skip
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
    layers = ("--hidden", "30,20", "--latent", 5, "--dropout", 0.25, "--model", "dae")
    assert run("train", prepared[1], tmp_path / "run", "--resume", *layers, *options)[0] == 0
    (net, train, validation), passed = calls[0]
    data = Dataset.load(prepared[1])
    expected = settings | {"run_dir": tmp_path / "run", "resume": True, "items": list(data.items), "progress": True}  # fmt: skip
    assert passed == expected
    assert isinstance(net, MultiDAE) and net.p_dims == [5, 20, 30, data.n_items]
    assert net.dropout_enc == [0.25, 0.0, 0.0] and net.q_dims == net.p_dims[::-1]
    given = [clicks.fingerprint() for clicks in (train, *validation)]
    assert given == [clicks.fingerprint() for clicks in (data.train, *data.validation)]


def test_every_option_of_prepare_reaches_its_function(tmp_path, run, monkeypatch):
    from fastvae import cli

    calls = []

    def record(function):
        def call(*arguments, **settings):
            calls.append((arguments[1:], settings))
            return function(*arguments, **settings)

        return call

    monkeypatch.setattr(cli, "read_events", record(cli.read_events))
    monkeypatch.setattr(cli, "split_dataset", record(cli.split_dataset))
    rows = "".join(f"u{u};i{i};5\n" for u in range(9) for i in range(6))
    (tmp_path / "log.csv").write_text("a;b;c\n" + rows)
    columns = {"user": "a", "item": "b", "rating": "c", "min_rating": 4.0}
    options = ("--user", "a", "--item", "b", "--rating", "c", "--min-rating", 4)
    text = ("--separator", ";", "--header")
    split = ("--min-user-clicks", 2, "--min-item-clicks", 3, "--heldout", 2, "--seed", 6)
    arguments = (tmp_path / "log.csv", tmp_path / "data", *options, *text, *split, "--counts")
    assert run("prepare", *arguments)[0] == 0
    assert calls == [
        ((), columns | {"separator": ";", "header": True, "counts": True}),
        ((2, 6), {"min_user_clicks": 2, "min_item_clicks": 3}),
    ]


def test_evaluate_prints_the_baseline_and_the_errors_that_evaluate_gives(tmp_path, run, prepared):
    train(run, prepared[1], tmp_path / "run")
    data = Dataset.load(prepared[1])
    expected = evaluate(Popularity(data.train), *data.test).to_dict()
    _, out, _ = run("evaluate", tmp_path / "run", prepared[1], "--json")
    assert json.loads(out)["popularity"] == expected
    _, out, _ = run("evaluate", tmp_path / "run", prepared[1])
    row = next(line for line in out.splitlines() if "popularity" in line)
    for name in ("ndcg@100", "recall@20", "recall@50"):
        assert f"{expected[name]:.4f} ± {expected[f'{name}_stderr']:.4f}" in row


def test_a_dataset_with_as_many_but_other_items_is_refused(tmp_path, run, prepared):
    log, data = prepared
    train(run, data, tmp_path / "run")
    (tmp_path / "other.csv").write_text(log.read_text().replace("film, 7", "film, seven"))
    arguments = ("--heldout", 15, "--min-rating", 4)
    assert run("prepare", tmp_path / "other.csv", tmp_path / "other", *arguments)[0] == 0
    code, _, err = run("evaluate", tmp_path / "run", tmp_path / "other")
    assert code == 2 and "checkpoint has other items than the data, which has 'film, seven'" in err


def test_the_checkpoint_of_a_run_warns_of_another_split_as_its_folder_does(tmp_path, run, prepared):
    log, data = prepared
    train(run, data, tmp_path / "run")
    run("prepare", log, tmp_path / "other", "--heldout", 15, "--min-rating", 4, "--seed", 5)
    for path in (tmp_path / "run", tmp_path / "run" / "best.pt"):
        assert "was trained on other clicks" in run("evaluate", path, tmp_path / "other")[2]
        assert run("evaluate", path, data)[2] == ""


def test_a_broken_config_is_named_where_it_is_read(tmp_path, run, prepared):
    train(run, prepared[1], tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text("{")
    code, out, err = run("evaluate", tmp_path / "run", prepared[1])
    assert code == 2 and out == ""
    assert err.startswith(f"fastvae: run: {config} must be a run's settings in JSON")
    config.unlink()
    assert run("evaluate", tmp_path / "run", prepared[1])[0] == 0


def test_users_of_one_click_leave_nothing_to_validate_on(tmp_path, run):
    lines = "".join(f"u{u},i{u % 3}\n" for u in range(30))
    (tmp_path / "log.csv").write_text("user,item\n" + lines)
    data, folder = tmp_path / "data", tmp_path / "run"
    assert run("prepare", tmp_path / "log.csv", data, "--min-user-clicks", 1)[0] == 0
    code, _, err = train(run, data, folder)
    assert code == 2 and err == (
        "fastvae: train: dataset must have a validation user with held-out clicks, got none of 3; prepare it with a "
        "larger --heldout, or with --heldout 0 to train without validation\n"
    )
    assert not folder.exists()


def test_another_split_of_the_log_is_warned_about_and_not_resumed(tmp_path, run, prepared):
    log, data = prepared
    train(run, data, tmp_path / "run")
    run("prepare", log, tmp_path / "other", "--heldout", 15, "--min-rating", 4, "--seed", 5)
    code, _, err = run("evaluate", tmp_path / "run", tmp_path / "other")
    same_items = set(Dataset.load(data).items) == set(Dataset.load(tmp_path / "other").items)
    assert code == 0 and "was trained on other clicks" in err if same_items else code == 2
    assert run("evaluate", tmp_path / "run", data)[2] == ""
    code, _, err = train(run, tmp_path / "other", tmp_path / "run", "--resume")
    assert (
        code == 2 and "fit: train must be the clicks of the run to resume" in err
    ) or not same_items


def test_train_leaves_other_peoples_folders_alone(tmp_path, run, prepared):
    _, data = prepared
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text('{"mine": 1}')
    for folder in (mine, data):
        code, _, err = train(run, data, folder)
        assert code == 2 and "run_dir must be a new or empty folder" in err
    assert (mine / "config.json").read_text() == '{"mine": 1}'
    code, _, err = train(run, data, tmp_path / "log.csv")
    assert code == 2 and "run_dir must be a folder, got a file" in err
    code, out, _ = train(run, data, tmp_path / "none", "--epochs", 0)
    assert code == 0 and out == "no epoch trained\n"


def test_ctrl_c_says_where_the_run_stands(tmp_path, run, prepared, monkeypatch):
    _, data = prepared
    terms, calls = MultiVAE.loss_terms, []

    def interrupting(self, *arguments):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return terms(self, *arguments)

    monkeypatch.setattr(MultiVAE, "loss_terms", interrupting)
    code, _, err = train(run, data, tmp_path / "run")
    assert code == 130 and "stopped after 1 epochs and 2 batches; saved in" in err
    assert "resume to go on" in err and "Traceback" not in err


def test_ratings_that_are_no_numbers_are_pointed_out(tmp_path, run):
    lines = [f"u{u};i{i};4,5" for u in range(20) for i in range(8)]
    (tmp_path / "log.csv").write_text("user;item;rating\n" + "\n".join(lines) + "\n")
    code, _, err = run("prepare", tmp_path / "log.csv", tmp_path / "data", "--heldout", 2)
    assert code == 0 and "160 events have a rating that is not a number and were kept" in err


def test_a_stray_quote_is_pointed_out(tmp_path, run):
    lines = [f"u{u},i{i}" for u in range(20) for i in range(8)]
    lines[10], lines[30] = 'u1,"i2', 'u3,i6"'
    (tmp_path / "log.csv").write_text("user,item\n" + "\n".join(lines) + "\n")
    code, _, err = run("prepare", tmp_path / "log.csv", tmp_path / "data", "--heldout", 2)
    assert code == 0 and "20 line ends lie inside double quotes" in err
