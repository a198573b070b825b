"""The fastvae command: prepare, train, evaluate, recommend, demo."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from . import _interrupt, console
from .checkpoint import load_model
from .data import Dataset, map_items, split_dataset
from .dataset_folder import check_writable, is_dataset_folder
from .evaluate import METRICS, Popularity, evaluate
from .events import Events, read_events
from .export import recommend_to_file
from .models import MultiDAE, MultiVAE
from .options import (
    DatasetArg,
    Device,
    FitOptions,
    LogOptions,
    ModelOptions,
    Quirk,
    RunArg,
    with_options,
)
from .run_folder import BEST, read_config
from .train import fit
from .words import in_command_words, name_of, usage_error

app = typer.Typer(
    name="fastvae",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train Mult-VAE and Mult-DAE recommenders on a click log.\n\n"
    "fastvae prepare clicks.csv data/  then  fastvae train data/ run/  then  "
    "fastvae evaluate run/ data/  and  fastvae recommend run/ clicks.csv top.csv",
)
DEFAULT_METRICS = list(METRICS)
# typer has no name of its own for what all errors of a command line are
UsageError: Any = typer.BadParameter.__base__


@app.command()
@with_options
def prepare(
    events: Annotated[
        Path, typer.Argument(help="Click log: CSV, TSV, .inter or Parquet; text may be gzipped.")
    ],
    folder: Annotated[Path, typer.Argument(help="Dataset folder to write.")],
    log_options: LogOptions,
    min_user_clicks: Annotated[int, typer.Option(help="Drop users with fewer items.")] = 5,
    min_item_clicks: Annotated[
        int, typer.Option(help="Drop items with fewer users, before the users are counted.")
    ] = 0,
    heldout: Annotated[
        str,
        typer.Option(
            help="Users for validation, and as many for test: a count, or a fraction such as 0.1."
        ),
    ] = "0.1",
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    counts: Annotated[
        bool, typer.Option("--counts", help="Keep how often a user clicked an item.")
    ] = False,
) -> None:
    """Turn a click log into a dataset folder: train, validation and test users, with what was dropped and why."""
    # before minutes of work
    check_writable(folder)
    log = read_events(events, **asdict(log_options), counts=counts)
    console.note_doubts(log)
    dataset = split_dataset(
        log,
        _heldout(heldout),
        seed,
        min_user_clicks=min_user_clicks,
        min_item_clicks=min_item_clicks,
    )
    dataset.save(folder)
    console.show_dataset(dataset)
    console.say(f"wrote {folder}; next: fastvae train {folder} RUN")


@app.command()
@with_options
def train(
    dataset: DatasetArg,
    run: Annotated[Path, typer.Argument(help="Run folder to write.")],
    model_options: ModelOptions,
    fit_options: FitOptions,
    device: Device = None,
) -> None:
    """Train a model; the run folder gets config, metrics, best and last checkpoint and the learning curve."""
    data = Dataset.load(dataset)
    seed = fit_options.seed
    if not 0 <= seed < 2**63:
        raise ValueError(f"train: seed must lie in [0, 2**63), got {seed}")
    if len(data.users_vad) and not data.info["n_evaluated"]["vad"]:
        raise ValueError(
            f"train: dataset must have a validation user with held-out clicks, got none of {len(data.users_vad):,}; "
            "prepare it with a larger --heldout, or with --heldout 0 to train without validation"
        )
    torch.manual_seed(seed)
    net = _model(**asdict(model_options), n_items=data.n_items).to(_device(device))
    result = fit(
        net,
        data.train,
        data.validation if len(data.users_vad) else None,
        **asdict(fit_options),
        run_dir=run,
        items=list(data.items),
        progress=True,
    )
    if not result.history:
        console.say("no epoch trained")
        return
    best = f"best epoch {result.best_epoch}"
    if len(data.users_vad):
        best += f", validation NDCG@100 {result.best_metric:.4f}"
    console.say(
        f"{best}; wrote {run / 'best.pt'} and {run / 'curve.png'}; next: fastvae evaluate {run} {dataset}"
    )


@app.command("evaluate")
def evaluate_command(
    run: RunArg,
    dataset: DatasetArg,
    users: Annotated[str, typer.Option(help="test or vad (validation).")] = "test",
    metric: Annotated[
        list[str],
        typer.Option(help="Such as ndcg@100 or recall@20; may be given several times."),
    ] = DEFAULT_METRICS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    tanh_after_dropout: Quirk = False,
    device: Device = None,
) -> None:
    """Measure a model on held-out users, beside the popularity baseline."""
    if users not in ("test", "vad"):
        raise ValueError(f"evaluate: users must be test or vad, got {users}")
    net, vocabulary = _load(run, tanh_after_dropout)
    data = Dataset.load(dataset)
    _check_catalogue(run, net.n_items, vocabulary, data.items)
    _warn_of_other_split(run, data)
    parts = data.test if users == "test" else data.validation
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
        console.show_results(results)


@app.command()
@with_options
def recommend(
    run: RunArg,
    histories: Annotated[
        Path, typer.Argument(help="Click log of the users to recommend to, or a dataset folder.")
    ],
    output: Annotated[Path, typer.Argument(help="File to write: .csv, .jsonl or .parquet.")],
    log_options: LogOptions,
    k: Annotated[int, typer.Option("-k", help="Items per user.")] = 10,
    keep_seen: Annotated[
        bool, typer.Option("--keep-seen", help="Also recommend items of the history.")
    ] = False,
    users: Annotated[
        str | None,
        typer.Option(
            help="Of a dataset folder: train, vad, test (their fold-in clicks) or all.",
            show_default="all",
        ),
    ] = None,
    tanh_after_dropout: Quirk = False,
    device: Device = None,
) -> None:
    """Write the top k items of each user, best first, with external ids; items of the history are left out."""
    if output.resolve() == histories.resolve():
        raise ValueError(
            f"recommend: output must be another file than the histories, got {output} for both"
        )
    net, vocabulary = _load(run, tanh_after_dropout)
    log = _histories(histories, log_options, users)
    if vocabulary is None:
        if not histories.is_dir():
            raise ValueError(
                f"recommend: histories must be the dataset folder where {run} does not hold the item ids, "
                f"got {histories}"
            )
        _check_catalogue(run, net.n_items, None, log.items)
    net = net.to(_device(device))
    done = recommend_to_file(output, net, log, k, items=vocabulary, keep_seen=keep_seen)
    if done.n_unknown:
        console.note(
            f"{done.n_unknown:,} of {done.n_clicks:,} clicks are on items that the model does not know "
            f"and are ignored; {done.n_new:,} users have no other"
        )
    console.say(f"wrote the top {done.k} of {done.n_users:,} users to {output}")
    if done.n_empty:
        console.note(
            f"{done.n_empty:,} users have no recommendation: their history holds every item of the model"
        )


def _histories(path: Path, log_options: LogOptions, users: str | None) -> Events:
    """The clicks of a log's or of a dataset folder's users."""
    if path.is_dir():
        for name, value in asdict(log_options).items():
            if value is not None:
                raise ValueError(
                    f"recommend: histories must be a click log where --{name.replace('_', '-')} is given, "
                    "got a dataset folder"
                )
        return Dataset.load(path).histories("all" if users is None else users)
    if users is not None:
        raise ValueError(
            f"recommend: users must not be given with a click log, got {users}; it is for dataset folders"
        )
    log = read_events(path, **asdict(log_options))
    console.note_doubts(log)
    console.note_dropped(log)
    return log


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

    run_demo(events, folder)


def main() -> None:
    """Entry point: what the user can mend is one sentence and exit code 2, never a traceback."""
    _interrupt.restore()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal may lack the sign ±
            stream.reconfigure(errors="replace")
    group = typer.main.get_command(app)
    context = None
    try:
        # not by calling app: typer's own way out drops the words of Ctrl-C
        with warnings.catch_warnings(), group.make_context("fastvae", sys.argv[1:]) as context:
            warnings.showwarning = _note_warning
            group.invoke(context)
            # here, where a full disk behind > is told as any other
            sys.stdout.flush()
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except KeyboardInterrupt as interrupt:
        console.note(f"fastvae: {_in_words(str(interrupt) or 'stopped', group, context)}")
        sys.exit(130)
    except BrokenPipeError:
        # nobody reads on
        _forget_output()
        sys.exit(1)
    except UsageError as error:
        _refuse_usage(error, context)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        console.complain(_in_words(text, group, context))
        _forget_output()
        sys.exit(2)


def _forget_output() -> None:
    """Let what cannot be written go: python would complain once more when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _note_warning(
    message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Ours as a note; others as python shows them."""
    if Path(filename).parent == Path(__file__).parent:
        console.note(str(message))
    else:
        console.note(warnings.formatwarning(message, category, filename, lineno).rstrip())


def _refuse_usage(error: Any, context: Any) -> None:
    if error.__class__.__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        console.complain(usage_error(error, context and context.invoked_subcommand, sys.argv[1:]))
    sys.exit(2)


def _in_words(text: str, group: Any, context: Any) -> str:
    """A message with the options of the command that was asked for."""
    name = context and context.invoked_subcommand
    if name is None:
        return text
    options = {option.name: name_of(option) for option in group.commands[name].params}
    return in_command_words(text, name, options)


def _heldout(text: str) -> float:
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ValueError(f"prepare: heldout must be a count or a fraction, got {text}") from None


def _model(
    model: str, hidden: str, latent: int, dropout: float, n_items: int
) -> MultiVAE | MultiDAE:
    if model not in ("vae", "dae"):
        raise ValueError(f"train: model must be vae or dae, got {model}")
    try:
        widths = [] if hidden == "none" else [int(width) for width in hidden.split(",")]
    except ValueError:
        raise ValueError(
            f"train: hidden must be widths such as 600 or 1000,600, or none, got {hidden}"
        ) from None
    p_dims = [latent, *widths[::-1], n_items]
    dropout_enc = [dropout] + [0.0] * len(widths)
    try:
        return (MultiVAE if model == "vae" else MultiDAE)(p_dims, dropout_enc)
    except (RuntimeError, OverflowError, TypeError) as error:
        # torch's words for too many bytes
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
    path = run / BEST if run.is_dir() else run
    if not path.exists():
        got = "a dataset folder" if is_dataset_folder(run) else f"a folder without {BEST}"
        raise ValueError(
            f"run must be a run folder or a checkpoint, got {got} at {run}; the run comes first"
        )
    return load_model(path, tanh_after_dropout)


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
        console.note(
            f"{run} was trained on other clicks than this dataset's train users; users that it knows may be among "
            "those measured here"
        )
