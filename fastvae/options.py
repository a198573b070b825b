"""The options of the commands, each listed once, by the names of the functions that take them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .ranking import MIN_ROWS

DatasetArg = Annotated[Path, typer.Argument(help="Dataset folder that fastvae prepare wrote.")]
RunArg = Annotated[
    Path, typer.Argument(help="Run folder that fastvae train wrote, or a checkpoint file.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is one")
]
Parallel = Annotated[
    str | None,
    typer.Option(
        help="Under torchrun: users or items, which the processes share.",
        show_default=f"users, where each process has {MIN_ROWS}",
    ),
]
Quirk = Annotated[
    bool,
    # without a second name for no, which makes the column of names too wide for 80 columns
    typer.Option(
        "--tanh-after-dropout",
        help="For a bare state_dict whose code applied tanh after each dropout.",
    ),
]


BY_SIZE = "by the number of users"


def _log_option(help: str, default: str = "guessed") -> Any:
    return typer.Option(help=help, show_default=default, rich_help_panel="The click log")


def _model_option(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel="The model")


def _fit_option(help: str, default: str | bool = True) -> Any:
    return typer.Option(help=help, show_default=default, rich_help_panel="The training")


@dataclass(frozen=True)
class LogOptions:
    """How to read a click log, by the argument names of read_events."""

    user: Annotated[str | None, _log_option("Column of the user ids.")] = None
    item: Annotated[str | None, _log_option("Column of the item ids.")] = None
    rating: Annotated[str | None, _log_option("Column of the ratings.")] = None
    min_rating: Annotated[
        float | None, _log_option("Keep events rated at least this.", "all but 0")
    ] = None
    separator: Annotated[str | None, _log_option("Column separator.")] = None
    header: Annotated[bool | None, _log_option("Whether the first line names the columns.")] = None


def _rule(help: str, default: str | bool = True) -> Any:
    return typer.Option(help=help, show_default=default, rich_help_panel="Which items")


@dataclass(frozen=True)
class RuleOptions:
    """Which items to recommend, by the argument names of recommend."""

    allowed: Annotated[
        Path | None, _rule("File of the only items to choose from, one id a line.", "all items")
    ] = None
    exclude: Annotated[
        Path | None, _rule("File of items that are never recommended, one id a line.", "none")
    ] = None
    popularity_penalty: Annotated[
        float, _rule("Times log(clicks) to take from an item's score: less of what is popular.")
    ] = 0.0
    popularity: Annotated[
        Path | None,
        _rule(
            "Dataset folder whose train users' clicks are counted for the penalty.",
            "the histories, where they are one",
        ),
    ] = None


@dataclass(frozen=True)
class ModelOptions:
    """The model to train."""

    model: Annotated[str, _model_option("vae (Mult-VAE) or dae (Mult-DAE).")] = "vae"
    hidden: Annotated[
        str,
        _model_option(
            "Widths of the hidden layers from items to latent, such as 600 or 1000,600; "
            "none for no hidden layer."
        ),
    ] = "600"
    latent: Annotated[int, _model_option("Width of the latent layer.")] = 200
    dropout: Annotated[float, _model_option("Probability to drop an input click.")] = 0.5


@dataclass(frozen=True)
class FitOptions:
    """How to train, by the argument names of fit."""

    epochs: Annotated[int | None, _fit_option("Passes over the users, at most.", BY_SIZE)] = None
    batch_size: Annotated[int | None, _fit_option("Users per update.", BY_SIZE)] = None
    lr: Annotated[float, _fit_option("Learning rate of Adam.")] = 1e-3
    anneal_cap: Annotated[float, _fit_option("Largest weight beta of the KL term.")] = 0.2
    total_anneal_steps: Annotated[
        int | None,
        _fit_option("Updates after which beta would be 1; 0: at the cap from the start.", BY_SIZE),
    ] = None
    patience: Annotated[
        int | None,
        _fit_option("Stop after so many epochs without a better NDCG@100; 0: never.", BY_SIZE),
    ] = None
    preset: Annotated[
        str,
        _fit_option(
            "auto: what is not given follows from the number of users; paper: 200 epochs, batch 500, "
            "200,000 anneal steps, never out of patience."
        ),
    ] = "auto"
    lr_schedule: Annotated[
        str, _fit_option("constant, cosine, or plateau (halved where validation stands still).")
    ] = "constant"
    weight_decay: Annotated[float, _fit_option("Of the matrices, decoupled as AdamW's.")] = 0.0
    clip_grad_norm: Annotated[
        float | None, _fit_option("Largest norm of all gradients together.", "not clipped")
    ] = None
    precision: Annotated[str, _fit_option("fp32, bf16, or tf32 on a GPU.")] = "fp32"
    seed: Annotated[int, _fit_option("Of initial weights, order of users, dropout and noise.")] = 0
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in the run folder; give the same options again, "
            "epochs and patience may differ.",
            rich_help_panel="The training",
        ),
    ] = False
    warm_start: Annotated[
        Path | None,
        typer.Option(
            help="Begin with this run folder or checkpoint, matched by the items' ids; the model must be as wide.",
            show_default="a fresh model",
        ),
    ] = None


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field in place of its parameters that are one of these classes."""
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        if kind in (LogOptions, RuleOptions, ModelOptions, FitOptions):
            fields = inspect.signature(kind, eval_str=True).parameters
            groups[parameter.name] = kind, list(fields)
            parameters += fields.values()
        else:
            parameters.append(parameter)

    @functools.wraps(command)
    def taking_options(**arguments: Any) -> None:
        for name, (make, names) in groups.items():
            arguments[name] = make(**{field: arguments.pop(field) for field in names})
        command(**arguments)

    taking_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return taking_options
