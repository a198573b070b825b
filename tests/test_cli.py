"""The fastvae command, from a click log to recommendations; errors are one sentence and exit code 2."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvae
from fastvae import Clicks, Dataset, MultiDAE, MultiVAE, evaluate, fit, load_model, recommend
from fastvae.checkpoint import read_checkpoint
from fastvae.data import split_dataset
from fastvae.evaluate import Popularity
from fastvae.events import read_events
from fastvae.similar import similar_items

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


NARROW = (
    "--hidden", 16, "--latent", 8, "--lr", 0.01, "--batch-size", 30, "--total-anneal-steps", 0,
)  # fmt: skip


def train(run, data, folder, *more):
    return run("train", data, folder, "--epochs", 4, *NARROW, *more)


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
    assert list(results) == ["MultiVAE", "popularity", "item-kNN", "EASE"]
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


def test_a_warm_start_says_in_one_line_what_it_took_over(tmp_path, run, prepared):
    log, data = prepared
    grown = tmp_path / "grown.csv"
    lines = log.read_text().replace("film, 0", "film, new")
    grown.write_text(lines)
    assert run("prepare", grown, tmp_path / "data2", "--heldout", 15, "--min-rating", 4)[0] == 0
    train(run, data, tmp_path / "a")
    code, _, err = train(
        run, tmp_path / "data2", tmp_path / "b", "--warm-start", tmp_path / "a" / "best.pt"
    )
    said = [line for line in err.splitlines() if "warm start" in line]
    assert code == 0 and said == [
        f"warm start from {tmp_path}/a/best.pt: 59 items taken over, 1 new, 1 gone; "
        f"Adam's moments from {tmp_path}/a/last.pt"
    ]
    first = json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[0])
    assert (
        first["loss"]
        < json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    )


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
    assert run("train", data, tmp_path / "b", "--epochs", 2, *NARROW)[0] == 0
    assert run("train", data, tmp_path / "b", "--epochs", 4, "--resume", *NARROW)[0] == 0
    a, b = (read_checkpoint(tmp_path / name / "last.pt")["model"] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    code, _, err = train(run, data, tmp_path / "a")
    assert code == 2 and "train: run must be a new folder" in err


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


NO_GPU = "train: --device must be cpu where torch finds no GPU, got cuda"
WIDTHS = "train: --hidden and --latent must be widths whose weights fit in memory, got"
# what is typed, and the sentence; the folder holds log.csv, one_user.csv, data (a dataset), trained (a run)
REFUSED = [
    ("prepare missing.csv out", "prepare: events must be a file, got nothing at missing.csv"),
    ("prepare data out", "prepare: events must be a file, got a folder at data"),
    (
        "prepare log.csv out --heldout many",
        "prepare: --heldout must be a count or a fraction, got many",
    ),
    (
        "prepare log.csv out --heldout .5",
        "prepare: --heldout must be a number of users or a fraction in (0, 0.5), got 0.5",
    ),
    (
        "prepare log.csv out --heldout 500",
        "prepare: --heldout must leave users to train, validate and test on, got 500 of 120 users with at least 5 "
        "clicks; lower --heldout, or add data",
    ),
    (
        "prepare log.csv out --min-user-clicks 99",
        "prepare: events must leave a user with at least 99 clicks, got none of 1,204 events "
        "(dropped 1,201 with a user "
        "with fewer than --min-user-clicks; 1 with no user id; 1 with no item id; 1 with the same "
        "user and item again); "
        "lower the thresholds or add data",
    ),
    (
        "prepare log.csv out --user nobody",
        "prepare: --user must name a column of log.csv, got 'nobody'; the columns are 'userId', 'movieId', 'rating'",
    ),
    (
        "prepare log.csv out --separator ab",
        "prepare: --separator must be one ASCII character or '::', got 'ab'",
    ),
    ("prepare log.csv out --seed x", "prepare: --seed must be a whole number, got 'x'"),
    ("prepare log.csv out --min-rating=high", "prepare: --min-rating must be a number, got 'high'"),
    (
        "prepare log.csv trained",
        "prepare: folder must be new, empty or a dataset, got 'best.pt', 'config.json', 'curve.png', 'last.pt', "
        "'metrics.jsonl' in trained; choose another name",
    ),
    (
        "train missing run",
        "train: dataset must be a dataset folder, got nothing at missing; write one with fastvae prepare",
    ),
    (
        "train trained run",
        "train: dataset must be a dataset folder, got a run folder at trained; give the dataset "
        "that it was trained on",
    ),
    ("train data run --model gan", "train: --model must be vae or dae, got gan"),
    (f"train data run --latent {10**12}", f"{WIDTHS} [1000000000000, 600, 60]"),
    (f"train data run --latent {10**30}", f"{WIDTHS} [{10**30}, 600, 60]"),
    (
        "train data run --latent 0",
        "train: --hidden and --latent must be at least two widths above 0, got [0, 600, 60]",
    ),
    (
        "train data run --hidden wide",
        "train: --hidden must be widths such as 600 or 1000,600, or none, got wide",
    ),
    (
        "train data run --dropout 2",
        "train: --dropout must hold probabilities from 0 to 1, got [2.0, 0.0]",
    ),
    ("train data run --batch-size 0", "train: --batch-size must be at least 1, got 0"),
    (
        f"train data run --batch-size {10**23}",
        f"train: --batch-size must lie below 2**31, got {10**23}",
    ),
    ("train data run --lr abc", "train: --lr must be a number, got 'abc'"),
    ("train data run --lr 0", "train: --lr must be a finite number above 0, got 0.0"),
    ("train data run --lr", "train: --lr must have a value, got none; see fastvae train --help"),
    (
        "train data run --lrr 1",
        "train: option must be one of those of --help, got --lrr; did you mean --lr",
    ),
    ("train data", "train: run must be given, got nothing; see fastvae train --help"),
    (
        "train data run more",
        "train: arguments must be those of --help, got more too; see fastvae train --help",
    ),
    ("trian data run", "command must be one of those of --help, got trian; see fastvae --help"),
    ("train data run --resume", "train: run must hold a run to resume, got nothing at run"),
    (
        "train data trained",
        "train: run must be a new folder, got trained with a run in it; go on with it by --resume "
        "or name another folder",
    ),
    (
        "train data trained --resume",
        "train: --hidden and --latent must be [4, 8, 60] as in the run to resume, got [200, 600, 60]",
    ),
    (
        "train data run --warm-start nothing",
        "train: --warm-start must be a run folder or a checkpoint, got nothing at nothing",
    ),
    (
        "train data run --warm-start data",
        "train: --warm-start must be a run folder or a checkpoint, got a folder without best.pt at data",
    ),
    (
        "train data run --warm-start trained",
        "train: --warm-start must have the model's p_dims [200, 600], got [4, 8] in trained/best.pt",
    ),
    ("train data run --device cpu:abc", "train: --device must be cpu or cuda, got cpu:abc"),
    ("train data run --device tpu", "train: --device must be cpu or cuda, got tpu"),
    *([] if torch.cuda.is_available() else [("train data run --device cuda", NO_GPU)]),
    (
        "evaluate missing data",
        "evaluate: run must be a run folder or a checkpoint, got nothing at missing; fastvae train writes one",
    ),
    (
        "evaluate data trained",
        "evaluate: run must be a run folder or a checkpoint, got a dataset folder at data; the run comes first",
    ),
    (
        "evaluate trained trained",
        "evaluate: dataset must be a dataset folder, got a run folder at trained; give the dataset "
        "that it was trained on",
    ),
    (
        "evaluate . data",
        "evaluate: run must be a run folder or a checkpoint, got a folder without best.pt at .; the run comes first",
    ),
    (
        "evaluate log.csv data",
        "checkpoint: log.csv must be a whole checkpoint of tensors and JSON, got a file that torch cannot read so",
    ),
    ("evaluate missing data --users all", "evaluate: --users must be test or vad, got all"),
    (
        "evaluate trained data --metric map",
        "evaluate: --metric must be names like 'ndcg@100' or 'recall@20', got 'map'; the kinds are ndcg, recall, "
        "precision, map, mrr, hit, novelty, coverage",
    ),
    (
        "demo one_user.csv",
        "demo: events must leave users to train, validate and test on, got 1 of 1 users with at "
        "least 5 clicks; add data",
    ),
    (
        "recommend missing log.csv top.csv",
        "recommend: run must be a run folder or a checkpoint, got nothing at missing; fastvae train writes one",
    ),
    ("recommend trained log.csv top.csv -k few", "recommend: -k must be a whole number, got 'few'"),
    ("recommend trained data top.csv -k 0", "recommend: -k must be at least 1, got 0"),
    (
        "recommend trained data top.txt",
        "recommend: output must end in .csv, .jsonl or .parquet, got 'top.txt'",
    ),
    (
        "recommend trained trained top.csv",
        "recommend: histories must be a dataset folder, got a run folder at trained; give the dataset that it was "
        "trained on",
    ),
    (
        "recommend trained data top.csv --users some",
        "recommend: --users must be one of train, vad, test, all, got 'some'",
    ),
    (
        "similar trained nothing",
        "similar: item must be one of the model's 60 items, got 'nothing'",
    ),
    ("similar trained film -k 0", "similar: -k must be at least 1, got 0"),
    (
        "recommend trained log.csv top.csv --allowed missing",
        "recommend: --allowed must be a file of ids, one a line, got nothing at missing",
    ),
    (
        "recommend trained log.csv top.csv --exclude data",
        "recommend: --exclude must be a file of ids, one a line, got a folder at data",
    ),
    (
        "recommend trained log.csv top.csv --allowed trained/best.pt",
        "recommend: --allowed must be a text file in UTF-8, got other bytes in trained/best.pt",
    ),
    (
        "recommend trained data top.csv --allowed one_user.csv",
        "recommend: --allowed must hold ids of the model's items, such as 'film, 0', 'film, 1', 'film, 10', got none "
        "among 10, such as 'user,item', 'u,0', 'u,1'",
    ),
    (
        "recommend trained log.csv top.csv --allowed blank.txt",
        "recommend: --allowed must be a file of ids, one a line, got none in blank.txt",
    ),
    (
        "recommend trained log.csv one_user.csv --exclude one_user.csv",
        "recommend: output must be another file than exclude, got one_user.csv for both",
    ),
    (
        "recommend trained log.csv top.csv --popularity-penalty .5",
        "recommend: --popularity must be a dataset folder where --popularity-penalty is given, got log.csv; name the "
        "one that the run was trained on",
    ),
    (
        "recommend trained data top.csv --popularity-penalty=-1",
        "recommend: --popularity-penalty must be a finite number of at least 0, got -1.0",
    ),
]


@pytest.fixture(scope="module")
def folder_of_everything(tmp_path_factory):
    """A click log, the dataset made of it, and a run trained on that."""
    folder = tmp_path_factory.mktemp("everything")
    log = read_events(write_log(folder / "log.csv"), min_rating=4)
    data = split_dataset(log, 15)
    data.save(folder / "data")
    model = MultiVAE([4, 8, data.n_items])
    items = list(data.items)
    fit(model, data.train, data.validation, epochs=1, run_dir=folder / "trained", items=items)
    (folder / "one_user.csv").write_text("user,item\n" + "".join(f"u,{i}\n" for i in range(9)))
    (folder / "blank.txt").write_text("\n \n")
    return folder


@pytest.mark.parametrize(("typed", "sentence"), REFUSED)
def test_errors_are_one_sentence_of_the_commands_own_words_and_exit_code_2(
    folder_of_everything, run, monkeypatch, typed, sentence
):
    monkeypatch.chdir(folder_of_everything)
    before = sorted(os.listdir())
    code, out, err = run(*typed.split())
    assert code == 2 and out == ""
    assert err == f"fastvae: {sentence}\n"
    assert sorted(os.listdir()) == before


def test_names_with_brackets_are_written_and_shown_as_they_are(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "log.csv")
    for name in ("data[v2]", "wei[/]", "[red]data[/red]"):
        code, out, _ = run("prepare", "log.csv", name, "--heldout", 15)
        assert code == 0 and f"wrote {name}; next: fastvae train {name} RUN\n" in out
        assert Dataset.load(name).info["kept"]["train"] > 0
    code, out, _ = train(run, name, "run[/]", "--epochs", 1)
    assert code == 0 and f"next: fastvae evaluate run[/] {name}\n" in out
    code, out, _ = run("recommend", "run[/]", "log.csv", "top[b].csv")
    assert code == 0 and "users to top[b].csv\n" in out


def parameters_of(command):
    """What typer knows of a command, "" for all of them."""
    import typer

    from fastvae.cli import app

    group = typer.main.get_command(app)
    return list(group.commands) if not command else group.commands[command].params


@pytest.mark.parametrize("command", ["", *parameters_of("")])
def test_help_is_whole_in_a_terminal_of_80_columns(run, monkeypatch, command):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    code, out, _ = run(*command.split(), "--help")
    lines = out.splitlines()
    assert code == 0 and "Usage: fastvae" in out
    assert {len(line) for line in lines if line.startswith("\N{BOX DRAWINGS LIGHT VERTICAL}")} == {
        80
    }
    assert max(map(len, lines)) == 80 and "\N{HORIZONTAL ELLIPSIS}" not in out
    words = set(re.findall(r"[\w-]+", out))
    for parameter in parameters_of(command):
        names = [parameter] if not command else [*parameter.opts, *parameter.secondary_opts]
        assert set(names) <= words
    # names and types leave a third of the line to the texts, as the lines show where one goes on
    indents = [re.match(r"\W\s+(?=[^-\s])", line) for line in lines]
    assert max(len(indent[0]) for indent in indents if indent) < 2 / 3 * 80


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
    assert err == ("1 users have no recommendation: no item is left by their history\n")
    code, _, err = run("recommend", tmp_path / "run", tmp_path / "none.csv", tmp_path / "t.csv")
    assert (
        code == 2
        and err
        == f"fastvae: recommend: histories must be a file, got nothing at {tmp_path}/none.csv\n"
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


def test_every_rule_reaches_recommend_to_file(tmp_path, run, folder_of_everything, monkeypatch):
    from fastvae.commands import recommend
    from fastvae.export import Written

    calls = []
    written = Written(n_users=1, k=1, n_clicks=0, n_unknown=0, n_new=0, n_empty=0)
    monkeypatch.setattr(
        recommend, "recommend_to_file", lambda *a, **k: calls.append((a, k)) or written
    )
    monkeypatch.chdir(folder_of_everything)
    (tmp_path / "a.txt").write_bytes("\ufefffilm, 1\r\n\r\n  \nfilm, 2 \r\nfilm, 1".encode())
    (tmp_path / "e.txt").write_text("film, 1\n")
    lists = ("--allowed", tmp_path / "a.txt", "--exclude", tmp_path / "e.txt")
    penalty = ("--popularity-penalty", 0.5)
    assert run("recommend", "trained", "data", "top.csv", *lists, *penalty)[0] == 0
    both = (*penalty, "--popularity", "data")
    assert run("recommend", "trained", "log.csv", "top.csv", "-k", 3, *both)[0] == 0
    assert run("recommend", "trained", "log.csv", "top.csv")[0] == 0
    data = Dataset.load("data")
    names = ("allowed", "exclude", "popularity_penalty")
    assert [[rules[name] for name in names] for _, rules in calls] == [
        [["film, 1", "film, 2 ", "film, 1"], ["film, 1"], 0.5], [None, None, 0.5], [None, None, 0.0]
    ]  # fmt: skip
    counted = [rules.get("popularity") for _, rules in calls]
    prints = [clicks and clicks.fingerprint() for clicks in counted]
    assert prints == [data.train.fingerprint()] * 2 + [None]


def test_rules_in_the_command_give_what_recommend_gives(tmp_path, run, folder_of_everything):
    folder, top = folder_of_everything / "trained", tmp_path / "top.jsonl"
    data, (model, items) = (
        Dataset.load(folder_of_everything / "data"),
        load_model(folder / "best.pt"),
    )
    (tmp_path / "a.txt").write_text("".join(f"{item}\n" for item in [*items[:9], "sold out"]))
    rules = ("--allowed", tmp_path / "a.txt", "--popularity-penalty", 2)
    code, out, err = run("recommend", folder, folder_of_everything / "data", top, "-k", 12, *rules)
    assert code == 0 and "wrote the top 12 of 120 users" in out
    assert err.splitlines()[0] == (
        "recommend: 1 of 10 ids in allowed are of items that the model does not know, such as 'sold out'; they are ignored"
    )
    found = recommend(
        model, data.histories().x, 12, allowed=range(9), popularity_penalty=2, popularity=data.train
    )
    for line, row in zip(top.read_text().splitlines(), found._indices(), strict=True):
        assert json.loads(line)["items"] == [items[i] for i in row]


def test_lists_are_empty_by_the_rules_and_not_by_the_histories_alone(
    tmp_path, run, folder_of_everything
):
    _, items = load_model(folder_of_everything / "trained/best.pt")
    (tmp_path / "a.txt").write_text(items[0])
    rules = ("--allowed", tmp_path / "a.txt", "--exclude", tmp_path / "a.txt")
    arguments = ("recommend", folder_of_everything / "trained", folder_of_everything / "data")
    code, _, err = run(*arguments, tmp_path / "top.csv", *rules)
    assert code == 0 and err.splitlines() == [
        "recommend: allowed and exclude leave no item, so that every list is empty",
        "120 users have no recommendation: no item is left by --allowed and --exclude and their history",
    ]
    code, _, err = run(
        *arguments, tmp_path / "top.csv", "--exclude", folder_of_everything / "blank.txt"
    )
    assert (code, err) == (0, "")


def test_popularity_without_a_penalty_is_pointed_out(tmp_path, run, folder_of_everything):
    arguments = ("recommend", folder_of_everything / "trained", folder_of_everything / "data")
    code, _, err = run(*arguments, tmp_path / "top.csv", "--popularity", arguments[-1])
    assert (code, err) == (0, "--popularity counts for nothing where --popularity-penalty is 0\n")


def test_similar_prints_what_similar_items_gives(tmp_path, run, folder_of_everything):
    folder = folder_of_everything / "trained"
    model, items = load_model(folder / "best.pt")
    (expected,) = similar_items(model, items[3], 4, items=items)
    code, out, err = run("similar", folder, items[3], "-k", 4)
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"{score:.4f}  {name}" for name, score in expected]
    code, out, _ = run("similar", folder, items[3], "-k", 4, "--json")
    names, scores = zip(*expected, strict=True)
    assert json.loads(out) == {"item": items[3], "similar": [*names], "scores": [*scores]}
    # a file without ids has positions
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    code, out, _ = run("similar", tmp_path / "bare.pt", 3, "-k", 1)
    assert code == 0 and out.split()[-1] == str(items.index(names[0]))


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
    from fastvae.commands import train
    from fastvae.train import FitResult

    calls = []
    monkeypatch.setattr(train, "fit", lambda *a, **k: calls.append((a, k)) or FitResult())
    settings = {
        "epochs": 3, "batch_size": 7, "lr": 0.5, "anneal_cap": 0.7, "total_anneal_steps": 9, "patience": 2,
        "precision": "bf16", "seed": 4, "warm_start": tmp_path / "older",
        "preset": "paper", "lr_schedule": "cosine", "weight_decay": 0.1, "clip_grad_norm": 5.0,
    }  # fmt: skip
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
    layers = ("--hidden", "30,20", "--latent", 5, "--dropout", 0.25, "--model", "dae")
    assert run("train", prepared[1], tmp_path / "run", "--resume", *layers, *options)[0] == 0
    (net, given, validation), passed = calls[0]
    data = Dataset.load(prepared[1])
    expected = {
        "run_dir": tmp_path / "run",
        "resume": True,
        "items": list(data.items),
        "warm_start": None,
    }
    expected |= settings | {"progress": True}
    assert passed == expected
    assert isinstance(net, MultiDAE) and net.p_dims == [5, 20, 30, data.n_items]
    assert net.dropout_enc == [0.25, 0.0, 0.0] and net.q_dims == net.p_dims[::-1]
    prints = [clicks.fingerprint() for clicks in (given, *validation)]
    assert prints == [clicks.fingerprint() for clicks in (data.train, *data.validation)]


def test_every_option_of_prepare_reaches_its_function(tmp_path, run, monkeypatch):
    from fastvae.commands import prepare

    calls = []

    def record(function):
        def call(*arguments, **settings):
            calls.append((arguments[1:], settings))
            return function(*arguments, **settings)

        return call

    monkeypatch.setattr(prepare, "read_events", record(prepare.read_events))
    monkeypatch.setattr(prepare, "split_dataset", record(prepare.split_dataset))
    rows = "".join(f"u{u};i{i};5\n" for u in range(9) for i in range(6))
    (tmp_path / "log.csv").write_text("a;b;c\n" + rows)
    columns = {"user": "a", "item": "b", "rating": "c", "min_rating": 4.0}
    options = ("--user", "a", "--item", "b", "--rating", "c", "--min-rating", 4)
    text = ("--separator", ";", "--header")
    split = ("--min-user-clicks", 2, "--min-item-clicks", 3, "--heldout", 2, "--seed", 6)
    arguments = (tmp_path / "log.csv", tmp_path / "data", *options, *text, *split, "--counts")
    unused = {"held_out_fraction": None, "by": "users", "date": None}
    assert run("prepare", *arguments)[0] == 0
    assert calls == [
        ((), columns | {"separator": ";", "header": True, "counts": True}),
        ((2, 6), {"min_user_clicks": 2, "min_item_clicks": 3, **unused}),
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
        code == 2 and "train: dataset must be the clicks of the run to resume" in err
    ) or not same_items


def test_train_leaves_other_peoples_folders_alone(tmp_path, run, prepared):
    _, data = prepared
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text('{"mine": 1}')
    for folder in (mine, data):
        code, _, err = train(run, data, folder)
        assert code == 2 and "run must be a new or empty folder" in err
    assert (mine / "config.json").read_text() == '{"mine": 1}'
    code, _, err = train(run, data, tmp_path / "log.csv")
    assert code == 2 and "run must be a folder, got a file" in err
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
    assert "--resume goes on" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("typed", "interrupted"),
    [
        ("prepare log.csv out", "split_dataset"),
        ("evaluate trained data", "evaluate"),
        ("recommend trained log.csv top.csv", "recommend_to_file"),
        ("train data run", "fit"),
    ],
)
def test_ctrl_c_is_one_line_and_exit_code_130(
    folder_of_everything, run, monkeypatch, typed, interrupted
):
    from fastvae import commands

    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.chdir(folder_of_everything)
    monkeypatch.setattr(getattr(commands, typed.split()[0]), interrupted, interrupt)
    before = sorted(os.listdir())
    code, out, err = run(*typed.split())
    assert code == 130 and out == ""
    assert err.splitlines()[-1] == "fastvae: stopped" and "Traceback" not in err
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("way", ["script", "module", "other program"])
def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path, way):
    stub = tmp_path / "stub" / "torch"
    stub.mkdir(parents=True)
    stub.joinpath("__init__.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    script = tmp_path / ("other" if way == "other program" else "fastvae")
    script.write_text("from fastvae.cli import main\nmain()\n")
    root = Path(fastvae.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, *(["-m", "fastvae"] if way == "module" else [script]), "--help"],
        env={**os.environ, "PYTHONPATH": f"{stub.parent}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
    )
    if way == "other program":
        assert "KeyboardInterrupt" in done.stderr, "who imports fastvae has Ctrl-C as ever"
    else:
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "fastvae: stopped\n")


@pytest.mark.skipif(os.name == "nt", reason="needs a pipe that closes")
def test_a_reader_that_goes_away_is_no_error(folder_of_everything):
    done = subprocess.run(
        f"{sys.executable} -m fastvae evaluate trained data --json | true; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        cwd=folder_of_everything,
        capture_output=True,
        text=True,
    )
    assert done.stderr == "" and done.stdout in ("1\n", "0\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_results_that_do_not_fit_on_the_disk_are_an_error(folder_of_everything):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastvae", "evaluate", "trained", "data", "--json"],
            cwd=folder_of_everything,
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "fastvae: [Errno 28] No space left on device\n"


def test_a_warning_of_ours_is_a_note(folder_of_everything, run, monkeypatch):
    from fastvae.commands import evaluate

    def warn(*_, **__):
        warnings.warn("evaluate: held_out must hold no clicks of fold_in, got 1 of 2", stacklevel=2)
        raise ValueError("evaluate: that is all")

    monkeypatch.chdir(folder_of_everything)
    monkeypatch.setattr(evaluate, "evaluate", warn)
    _, _, err = run("evaluate", "trained", "data")
    assert err == (
        "evaluate: held_out must hold no clicks of fold_in, got 1 of 2\n"
        "fastvae: evaluate: that is all\n"
    )


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
