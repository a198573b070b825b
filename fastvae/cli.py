"""The fastvae command: prepare, train, evaluate, recommend, demo."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import scipy.sparse as sp
import torch
import typer
from rich.console import Console
from rich.table import Table

from .checkpoint import load_model
from .clicks import Clicks
from .data import Dataset, check_writable, map_items, split_dataset
from .evaluate import METRICS, Evaluation, Popularity, evaluate
from .events import DROPPED, Events, read_events
from .export import write_recommendations
from .models import MultiDAE, MultiVAE
from .recommend import Recommendations, recommend_blocks
from .run_folder import read_config
from .train import fit

app = typer.Typer(
    name="fastvae",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train Mult-VAE and Mult-DAE recommenders on a click log.\n\n"
    "fastvae prepare clicks.csv data/  then  fastvae train data/ run/  then  "
    "fastvae evaluate run/ data/  and  fastvae recommend run/ clicks.csv top.csv",
)
out, err = Console(), Console(stderr=True)
DEFAULT_METRICS = list(METRICS)

DatasetArg = Annotated[Path, typer.Argument(help="Dataset folder that fastvae prepare wrote.")]
RunArg = Annotated[
    Path, typer.Argument(help="Run folder that fastvae train wrote, or a checkpoint file.")
]
UserColumn = Annotated[
    str | None, typer.Option("--user", help="Column of the user ids.", show_default="guessed")
]
ItemColumn = Annotated[
    str | None, typer.Option("--item", help="Column of the item ids.", show_default="guessed")
]
RatingColumn = Annotated[
    str | None, typer.Option("--rating", help="Column of the ratings.", show_default="guessed")
]
MinRating = Annotated[
    float | None, typer.Option(help="Keep events rated at least this.", show_default="all but 0")
]
Separator = Annotated[str | None, typer.Option(help="Column separator.", show_default="guessed")]
Header = Annotated[
    bool | None,
    typer.Option(help="Whether the first line names the columns.", show_default="guessed"),
]
Device = Annotated[
    str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is one")
]
Quirk = Annotated[
    bool, typer.Option(help="For a bare state_dict whose code applied tanh after each dropout.")
]


@app.command()
def prepare(
    events: Annotated[Path, typer.Argument(help="Click log: CSV, TSV, .inter or Parquet; text may be gzipped.")],
    folder: Annotated[Path, typer.Argument(help="Dataset folder to write.")],
    user: UserColumn = None,
    item: ItemColumn = None,
    rating: RatingColumn = None,
    min_rating: MinRating = None,
    min_user_clicks: Annotated[int, typer.Option(help="Drop users with fewer items.")] = 5,
    min_item_clicks: Annotated[int, typer.Option(help="Drop items with fewer users, before the users are counted.")] = 0,
    heldout: Annotated[str, typer.Option(help="Users for validation, and as many for test: a count, or a fraction such as 0.1.")] = "0.1",
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    counts: Annotated[bool, typer.Option("--counts", help="Keep how often a user clicked an item.")] = False,
    separator: Separator = None,
    header: Header = None,
) -> None:  # fmt: skip
    """Turn a click log into a dataset folder: train, validation and test users, with what was dropped and why."""
    check_writable(folder)  # before minutes of work
    log = read_events(
        events, user, item, rating, min_rating, separator=separator, header=header, counts=counts
    )
    dataset = split_dataset(
        log,
        _heldout(heldout),
        seed,
        min_user_clicks=min_user_clicks,
        min_item_clicks=min_item_clicks,
    )
    dataset.save(folder)
    show_dataset(dataset)
    out.print(f"wrote {folder}; next: fastvae train {folder} RUN", highlight=False, soft_wrap=True)


@app.command()
def train(
    dataset: DatasetArg,
    run: Annotated[Path, typer.Argument(help="Run folder to write.")],
    model: Annotated[str, typer.Option(help="vae (Mult-VAE) or dae (Mult-DAE).")] = "vae",
    hidden: Annotated[str, typer.Option(help="Widths of the hidden layers from items to latent, such as 600 or 1000,600; none for no hidden layer.")] = "600",
    latent: Annotated[int, typer.Option(help="Width of the latent layer.")] = 200,
    dropout: Annotated[float, typer.Option(help="Probability to drop an input click.")] = 0.5,
    epochs: Annotated[int, typer.Option(help="Passes over the users.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Users per update.")] = 500,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    anneal_cap: Annotated[float, typer.Option(help="Largest weight beta of the KL term.")] = 0.2,
    total_anneal_steps: Annotated[int, typer.Option(help="Updates after which beta would be 1. The default is the paper's, for a million users; 0, beta at the cap from the start, suits small data.")] = 200_000,
    patience: Annotated[int | None, typer.Option(help="Stop after so many epochs without a better NDCG@100.", show_default="never")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16, or tf32 on a GPU.")] = "fp32",
    seed: Annotated[int, typer.Option(help="Of initial weights, order of users, dropout and noise.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder; give the same options again, epochs and patience may differ.")] = False,
    device: Device = None,
) -> None:  # fmt: skip
    """Train a model; the run folder gets config, metrics, best and last checkpoint and the learning curve."""
    data = Dataset.load(dataset)
    if not 0 <= seed < 2**63:
        raise ValueError(f"train: seed must lie in [0, 2**63), got {seed}")
    if len(data.users_vad) and not data.info["n_evaluated"]["vad"]:
        raise ValueError(
            f"train: dataset must have a validation user with held-out clicks, got none of {len(data.users_vad):,}; prepare "
            "it with a larger --heldout, or with --heldout 0 to train without validation"
        )
    torch.manual_seed(seed)
    net = _model(model, hidden, latent, dropout, data.n_items).to(_device(device))
    result = _saying_where_it_stopped(
        fit,
        net,
        data.train,
        (data.vad_tr, data.vad_te) if len(data.users_vad) else None,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        anneal_cap=anneal_cap,
        total_anneal_steps=total_anneal_steps,
        patience=patience,
        precision=precision,
        seed=seed,
        run_dir=run,
        resume=resume,
        items=list(data.items),
        progress=True,
    )
    if not result.history:
        out.print("no epoch trained", highlight=False)
        return
    best = f"best epoch {result.best_epoch}"
    if len(data.users_vad):
        best += f", validation NDCG@100 {result.best_metric:.4f}"
    out.print(
        f"{best}; wrote {run / 'best.pt'} and {run / 'curve.png'}; next: fastvae evaluate {run} {dataset}",
        highlight=False,
        soft_wrap=True,
    )


@app.command("evaluate")
def evaluate_command(
    run: RunArg,
    dataset: DatasetArg,
    users: Annotated[str, typer.Option(help="test or vad (validation).")] = "test",
    metric: Annotated[list[str], typer.Option(help="Such as ndcg@100 or recall@20; may be given several times.")] = DEFAULT_METRICS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    tanh_after_dropout: Quirk = False,
    device: Device = None,
) -> None:  # fmt: skip
    """Measure a model on held-out users, beside the popularity baseline."""
    if users not in ("test", "vad"):
        raise ValueError(f"evaluate: users must be test or vad, got {users}")
    data = Dataset.load(dataset)
    net, vocabulary = _load(run, tanh_after_dropout)
    _check_catalogue(run, net.n_items, vocabulary, data.items)
    _warn_of_other_split(run, data)
    parts = (data.test_tr, data.test_te) if users == "test" else (data.vad_tr, data.vad_te)
    # the checkpoint's order of the items counts, not the dataset's
    train_clicks, fold_in, held_out = (
        map_items(x, data.items, vocabulary or data.items)[0] for x in (data.train, *parts)
    )
    net = net.to(_device(device))
    results = {
        type(net).__name__: evaluate(net, fold_in, held_out, metrics=metric),
        "popularity": evaluate(Popularity(train_clicks), fold_in, held_out, metrics=metric),
    }
    if as_json:
        print(json.dumps({name: result.to_dict() for name, result in results.items()}))
    else:
        show_results(results)


@app.command()
def recommend(
    run: RunArg,
    histories: Annotated[Path, typer.Argument(help="Click log of the users to recommend to, or a dataset folder.")],
    output: Annotated[Path, typer.Argument(help="File to write: .csv, .jsonl or .parquet.")],
    k: Annotated[int, typer.Option("-k", help="Items per user.")] = 10,
    keep_seen: Annotated[bool, typer.Option("--keep-seen", help="Also recommend items of the history.")] = False,
    users: Annotated[str | None, typer.Option(help="Of a dataset folder: train, vad, test (their fold-in clicks) or all.", show_default="all")] = None,
    user: UserColumn = None,
    item: ItemColumn = None,
    rating: RatingColumn = None,
    min_rating: MinRating = None,
    separator: Separator = None,
    header: Header = None,
    tanh_after_dropout: Quirk = False,
    device: Device = None,
) -> None:  # fmt: skip
    """Write the top k items of each user, best first, with external ids; items of the history are left out."""
    if output.resolve() == histories.resolve():
        raise ValueError(
            f"recommend: output must be another file than the histories, got {output} for both"
        )
    net, vocabulary = _load(run, tanh_after_dropout)
    if histories.is_dir():
        given = {"--user": user, "--item": item, "--rating": rating, "--min-rating": min_rating, "--separator": separator, "--header": header}  # fmt: skip
        if named := [option for option, value in given.items() if value is not None]:
            raise ValueError(
                f"recommend: histories must be a click log where {named[0]} is given, got a dataset folder"
            )
        x, user_ids, item_ids = _dataset_histories(histories, users or "all")
    elif users is not None:
        raise ValueError(
            f"recommend: users must not be given with a click log, got {users}; it is for dataset folders"
        )
    else:
        log = read_events(
            histories, user, item, rating, min_rating, separator=separator, header=header
        )
        x, user_ids, item_ids = log.x, log.users, log.items
        _say_what_was_dropped(log)
    if vocabulary is None:
        if not histories.is_dir():
            raise ValueError(
                f"recommend: histories must be the dataset folder where {run} does not hold the item ids, "
                f"got {histories}"
            )
        _check_catalogue(run, net.n_items, None, item_ids)
        vocabulary = list(item_ids)
    x = _in_vocabulary(x, item_ids, vocabulary)
    k = min(k, len(vocabulary))
    blocks = recommend_blocks(net.to(_device(device)), x, k, items=vocabulary, keep_seen=keep_seen)
    n_empty: list[int] = []
    n = write_recommendations(output, user_ids, _counting_empty(blocks, n_empty), vocabulary)
    out.print(f"wrote the top {k} of {n:,} users to {output}", highlight=False, soft_wrap=True)
    if sum(n_empty):
        _note(
            f"{sum(n_empty):,} users have no recommendation: their history holds every item of the model"
        )


@app.command()
def demo(
    events: Annotated[
        Path | None, typer.Argument(help="Your own click log.", show_default="MovieLens-100K")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the dataset and the run go.")] = Path(
        "fastvae-demo"
    ),
) -> None:
    """Prepare, train, evaluate and recommend in about a minute, on MovieLens-100K or on your own log."""
    from .demo import run_demo

    run_demo(events, folder, out)


def main() -> None:
    """Entry point: what the user can mend is one sentence and exit code 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without the sign ±
    try:
        app(prog_name="fastvae")
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        err.print(f"fastvae: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)


def show_dataset(dataset: Dataset) -> None:
    """Print what became of every event."""
    joined = dataset.info["source"].get("lines_joined_by_quotes", 0)
    if joined:
        _note(
            f"{joined:,} line ends lie inside double quotes and were read as part of an id; look for a stray quote"
        )
    table = Table("events", "number", box=None)
    table.columns[1].justify = "right"
    for text, n in dataset.report():
        table.add_row(text, f"{n:,}")
    odd = dataset.info["source"].get("kept_without_a_number", 0)
    if odd:
        _note(
            f"{odd:,} events have a rating that is not a number and were kept as clicks; with --min-rating they would be dropped"
        )
    out.print(table)
    sizes = (len(ids) for ids in (dataset.users_train, dataset.users_vad, dataset.users_test))
    out.print(
        "users: {:,} train, {:,} validation, {:,} test; ".format(*sizes)
        + f"{len(dataset.items):,} items",
        highlight=False,
    )


def show_results(results: dict[str, Evaluation]) -> None:
    """Print a table of metrics, a row for each model."""
    first = next(iter(results.values()))
    table = Table("", *first.mean)
    for name, result in results.items():
        table.add_row(
            name, *(f"{result.mean[m]:.4f} ± {result.stderr[m]:.4f}" for m in result.mean)
        )
    out.print(table)
    out.print(
        f"{first.n_evaluated:,} users evaluated, {first.n_skipped:,} skipped", highlight=False
    )


def _note(text: str) -> None:
    """A line on stderr, of what a user should know and need not mend."""
    err.print(text, highlight=False, soft_wrap=True)


def _heldout(text: str) -> float:
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ValueError(f"prepare: heldout must be a count or a fraction, got {text}") from None


def _model(
    kind: str, hidden: str, latent: int, dropout: float, n_items: int
) -> MultiVAE | MultiDAE:
    if kind not in ("vae", "dae"):
        raise ValueError(f"train: model must be vae or dae, got {kind}")
    try:
        widths = [] if hidden == "none" else [int(width) for width in hidden.split(",")]
    except ValueError:
        raise ValueError(
            f"train: hidden must be widths such as 600 or 1000,600, or none, got {hidden}"
        ) from None
    p_dims = [latent, *widths[::-1], n_items]
    dropout_enc = [dropout] + [0.0] * len(widths)
    try:
        return (MultiVAE if kind == "vae" else MultiDAE)(p_dims, dropout_enc)
    except (RuntimeError, OverflowError, TypeError) as error:  # torch's words for too many bytes
        raise ValueError(
            f"train: hidden and latent must be widths whose weights fit in memory, got {p_dims}"
        ) from error


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must be cpu where torch finds no GPU, got {name}")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu or cuda, got {name}") from None


def _load(run: Path, tanh_after_dropout: bool) -> tuple[MultiVAE | MultiDAE, list[str] | None]:
    if not run.exists():
        raise ValueError(
            f"run must be a run folder or a checkpoint, got nothing at {run}; fastvae train writes one"
        )
    return load_model(run / "best.pt" if run.is_dir() else run, tanh_after_dropout)


def _check_catalogue(run: Path, n_items: int, vocabulary: list[str] | None, items: Any) -> None:
    if n_items != len(items):
        raise ValueError(
            f"checkpoint has {n_items} items, data has {len(items)}: {run} was trained on other data"
        )
    known = set(items if vocabulary is None else vocabulary)
    other = next((item for item in items if item not in known), None)
    if other is not None:
        raise ValueError(
            f"checkpoint has other items than the data, which has {other!r}: {run} was trained on other data"
        )


def _warn_of_other_split(run: Path, data: Dataset) -> None:
    """A line on stderr where the run was trained on other users than the dataset's: test users may be among them."""
    folder = run.parent if run.name in ("best.pt", "last.pt") else run
    if not (folder / "config.json").is_file():
        return
    if read_config(folder).get("train") != data.train.fingerprint():
        _note(
            f"{run} was trained on other clicks than this dataset's train users; users that it knows may be among "
            "those measured here"
        )


def _say_what_was_dropped(log: Events) -> None:
    dropped = [f"{n:,} with {DROPPED[why]}" for why, n in log.info["dropped"].items() if n]
    if dropped:
        text = f"of {log.info['n_events']:,} events, dropped {'; '.join(dropped)}"
        _note(text)


def _saying_where_it_stopped(train_it: Any, *arguments: Any, **settings: Any) -> Any:
    """Call fit; after Ctrl-C say where the run stands and exit as shells expect."""
    try:
        return train_it(*arguments, **settings)
    except KeyboardInterrupt as interrupt:
        message = f"fastvae: {str(interrupt) or 'stopped'}"
        err.print(message, highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(130) from None


def _in_vocabulary(x: Clicks, item_ids: Any, vocabulary: list[str]) -> Clicks:
    """The clicks in the model's items; a line on stderr where some are on others."""
    known, n_unknown = map_items(x, item_ids, vocabulary)
    if n_unknown:
        n_empty = int((known.row_lengths() == 0).sum())
        _note(
            f"{n_unknown:,} of {x.nnz:,} clicks are on items that the model does not know and are ignored; "
            f"{n_empty:,} users have no other"
        )
    return known


def _counting_empty(
    blocks: Iterator[Recommendations], n_empty: list[int]
) -> Iterator[Recommendations]:
    """The blocks, with the number of users who got nothing added to n_empty for each."""
    for block in blocks:
        n_empty.append(int((block.items[:, 0] < 0).sum()))
        yield block


def _dataset_histories(path: Path, users: str) -> tuple[Clicks, Any, Any]:
    """Clicks, external user ids and external item ids of a dataset folder."""
    data = Dataset.load(path)
    parts = {
        "train": (data.train, data.users_train),
        "vad": (data.vad_tr, data.users_vad),
        "test": (data.test_tr, data.users_test),
    }
    if users != "all" and users not in parts:
        raise ValueError(f"recommend: users must be train, vad, test or all, got {users}")
    chosen = list(parts.values()) if users == "all" else [parts[users]]
    ids = np.concatenate([ids for _, ids in chosen])
    stacked = sp.vstack([x.to_scipy() for x, _ in chosen], format="csr")
    return Clicks.from_matrix(stacked), ids, data.items
