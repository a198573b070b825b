"""fastvae warmup: compile a training's kernels, for the image of a machine that has a GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import torch
import typer

from .. import console
from ..options import ModelOptions, with_options
from ..warmup import warm_up
from ._common import new_model


@with_options
def warmup(
    n_items: Annotated[int, typer.Argument(help="Items of the data that will be trained on.")],
    model_options: ModelOptions,
    batch_size: Annotated[
        int, typer.Option(help="Users per update; one below 2,048 stands for all of them.")
    ] = 500,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or tf32.")] = "fp32",
    counts: Annotated[
        bool, typer.Option("--counts", help="For a dataset prepared with --counts.")
    ] = False,
    capability: Annotated[
        str | None,
        typer.Option(
            help="Compute capability of the GPU that will train, such as 9.0 for an H100.",
            show_default="of the GPU here",
        ),
    ] = None,
) -> None:
    """Compile what train will launch on a GPU into Triton's cache (TRITON_CACHE_DIR), also where there is no GPU."""
    if n_items < 1:
        raise ValueError(f"warmup: n_items must be at least 1, got {n_items}")
    if capability is None and not torch.cuda.is_available():
        raise ValueError(
            "warmup: capability must be given where torch finds no GPU, got none; 9.0 is an H100"
        )
    with torch.device("meta"):
        net = new_model("warmup", **asdict(model_options), n_items=n_items)
    number = warm_up(
        net,
        [batch_size],
        precision=precision,
        counts=counts,
        capability=None if capability is None else _number(capability),
    )
    console.say(f"{number} kernels are in Triton's cache; train finds them there")


def _number(capability: str) -> int:
    major, _, minor = capability.partition(".")
    if not (major.isdigit() and minor.isdigit() and len(minor) == 1):
        raise ValueError(
            f"warmup: capability must be a compute capability such as 9.0, got {capability}"
        )
    number = 10 * int(major) + int(minor)
    if not 75 <= number < 130:
        raise ValueError(f"warmup: capability must lie in 7.5 to 12.9, got {capability}")
    return number
