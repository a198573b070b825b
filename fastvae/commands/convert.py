"""fastvae convert: weights of other Mult-VAE code become a checkpoint of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import console
from .._checks import check_ids
from ..checkpoint import load_model, write_checkpoint
from ..options import Quirk

PADDING = "[PAD]"  # how RecBole names the item that stands for none


def convert(
    old: Annotated[
        Path,
        typer.Argument(help="state_dict (.pt, .pth) of other code, or an .npz of TensorFlow's."),
    ],
    new: Annotated[Path, typer.Argument(help="Checkpoint file to write.")],
    items: Annotated[
        Path | None,
        typer.Option(help="Text file of the items' ids, one a line, in the order of the columns."),
    ] = None,
    tanh_after_dropout: Quirk = False,
    activation: Annotated[
        str | None,
        typer.Option(help="tanh or relu, where the code let choose.", show_default="the code's"),
    ] = None,
    normalize_input: Annotated[
        bool | None,
        typer.Option(
            help="Whether the code divides rows by their L2 norm.",
            show_default="the code's",
            metavar="",
            # two long names: of all options' texts they would leave a column of three words
            rich_help_panel="The input",
        ),
    ] = None,
) -> None:
    """Write weights of other Mult-VAE code as a checkpoint that all commands take, and say what was recognised."""
    if old.resolve() == new.resolve():
        raise ValueError(f"convert: new must be another file than the old, got {new} for both")
    model, ids = load_model(
        old,
        tanh_after_dropout,
        activation=activation,
        normalize_input=normalize_input,
        verbose=True,
    )
    if items is not None:
        ids = _ids(items, model.n_items)
    write_checkpoint(new, model, ids)
    console.say(
        f"wrote {new}" + ("" if ids else ", without ids: it takes a dataset folder's items")
    )


def _ids(path: Path, n_items: int) -> list[str]:
    try:
        ids = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"convert: items must be a text file, got {path} ({error})") from None
    if len(ids) == n_items + 1 and ids[0] == PADDING:
        ids = ids[1:]
    return check_ids("convert", "items", ids, n_items)
