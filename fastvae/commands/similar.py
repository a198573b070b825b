"""fastvae similar: the items most like an item."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .. import console
from ..options import Quirk, RunArg
from ..similar import similar_items
from ._common import load_run


def similar(
    run: RunArg,
    item: Annotated[str, typer.Argument(help="Id of an item of the run.")],
    k: Annotated[int, typer.Option("-k", help="Items to find.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
    tanh_after_dropout: Quirk = False,
) -> None:
    """Print the items most like an item, with the cosines of their decoder weights; most like first."""
    net, vocabulary = load_run(run, tanh_after_dropout)
    # a file without ids has positions
    items = range(net.n_items) if vocabulary is None else vocabulary
    (found,) = similar_items(net, item, k, items=items)
    if as_json:
        print(
            json.dumps(
                {
                    "item": item,
                    "similar": [name for name, _ in found],
                    "scores": [score for _, score in found],
                }
            )
        )
        return
    for name, score in found:
        console.say(f"{score:.4f}  {name}")
