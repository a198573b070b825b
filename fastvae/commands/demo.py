"""fastvae demo: all four in a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    events: Annotated[
        Path | None, typer.Argument(help="Your own click log.", show_default="MovieLens-100K")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the dataset and the run go.")] = Path(
        "fastvae-demo"
    ),
) -> None:
    """Prepare, train, evaluate and recommend in about a minute, on MovieLens-100K or on your own log."""
    from ..demo import run_demo

    run_demo(events, folder)
