"""fastvae convert: weights of other Mult-VAE code become a checkpoint of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import console
from .._checks import check_ids
from ..checkpoint import load_model, write_checkpoint
from ..options import Quirk
from ._common import read_lines

PADDING = "[PAD]"  # how RecBole names the item that stands for none


def convert(
    old: Annotated[
        Path,
        typer.Argument(help="state_dict (.pt, .pth) of other code, or an .npz of TensorFlow's."),
    ],
    new: Annotated[
        Path, typer.Argument(help="Checkpoint file to write; one that is there is replaced.")
    ],
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
    _check_new(old, new)
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


def _check_new(old: Path, new: Path) -> None:
    """Before anything is read: a new file in a folder that is there, and not the old one."""
    if old.resolve() == new.resolve():
        raise ValueError(f"convert: new must be another file than the old, got {new} for both")
    if new.exists() and not new.is_file():
        raise ValueError(f"convert: new must be a file, got a folder or a device, {new}")
    if not new.resolve().parent.is_dir():
        raise ValueError(
            f"convert: new must lie in an existing folder, got {new}; create the folder first"
        )


def _ids(path: Path, n_items: int) -> list[str]:
    ids = read_lines("convert", "items", path)
    if len(ids) == n_items + 1 and ids[0] == PADDING:
        ids = ids[1:]
    return check_ids("convert", "items", ids, n_items)
