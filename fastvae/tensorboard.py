"""A callback for fit(on_epoch=) that writes each epoch's metrics for TensorBoard (extra tensorboard)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes each epoch's loss, nll, kld, beta, lr, users per second and NDCG@100 into a folder that TensorBoard reads.

    fit(model, train, validation, on_epoch=TensorBoard("run/tensorboard"))    then: tensorboard --logdir run

    folder  made by the first epoch. A resumed run goes on in the same: epochs that it trains again take the place of the
            earlier ones

    Raises: ValueError where the package tensorboard is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "TensorBoard: tensorboard must be installed, got none; pip install 'fastvae-cf[tensorboard]'"
            ) from None
        self.folder = Path(folder)
        self._writer: Any = None
        self._open = SummaryWriter

    def __call__(self, row: dict[str, Any]) -> None:
        """Write an epoch's row of metrics.jsonl."""
        epoch = row["epoch"]
        if self._writer is None:
            self._writer = self._open(str(self.folder), purge_step=epoch)
        for name, value in row.items():
            if name not in ("epoch", "update"):
                self._writer.add_scalar(name, value, epoch)
        # now: a training may be watched, or killed
        self._writer.flush()
