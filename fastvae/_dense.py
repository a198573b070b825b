"""Dense batches that are mostly zeros: read once, then the ops take the clicks in them.

Code that swaps the class alone still passes dense rows. On a CPU the first layer of 500 users with 70 clicks among 7,055
items then takes 24 ms forward and backward, 2 of them to find the clicks, and 120 ms by dense products. On a GPU asking how many there are would make the host wait: x stays dense there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._csr import VALUE_RANGE
from .clicks import Clicks
from .ops._dispatch import is_watched

MAX_DENSITY = (
    1 / 20
)  # share of clicks: at 5% the ops take half the time of dense products, at 10% as much
MIN_NUMBERS = 2**16  # fewer are multiplied before their clicks are found
SAMPLED_ROWS = 8
DTYPES = (torch.float32, torch.float64)


def clicks_in(x: Tensor) -> Clicks | None:
    """The clicks of a dense x [n_users, n_items], or None where it has to stay dense or is no slower so.

    Dense stays what is on a GPU, what needs a gradient, what is traced, compiled or transformed, and numbers that Clicks
    does not hold: inf, nan, and those whose square leaves fp32.
    """
    if x.device.type != "cpu" or x.dtype not in DTYPES or x.numel() < MIN_NUMBERS:
        return None
    differentiated = x.requires_grad or x.is_neg() or forward_ad._current_level >= 0
    if differentiated or torch.jit.is_tracing() or is_watched((x,)):
        return None
    array = x.numpy()
    sample = array[:: max(1, len(array) // SAMPLED_ROWS)]
    if np.count_nonzero(sample) > 2 * MAX_DENSITY * sample.size:
        return None
    user, item = np.divmod(np.flatnonzero(array != 0), array.shape[1])
    if len(item) > MAX_DENSITY * array.size:
        return None
    values = array[user, item]
    size = np.abs(values)
    if not ((size >= VALUE_RANGE[0]) & (size <= VALUE_RANGE[1])).all():
        return None
    offsets = np.searchsorted(user, np.arange(len(array) + 1))
    return Clicks.of_checked(
        torch.from_numpy(offsets),
        torch.from_numpy(item.astype(np.int32)),
        None if (values == 1).all() else torch.from_numpy(values),
        array.shape[1],
    )
