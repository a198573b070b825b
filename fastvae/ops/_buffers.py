"""Reused CPU buffers of tens of megabytes: a fresh one costs more in page faults than the arithmetic on it.

A buffer is handed out again only when nothing else holds its memory, so it behaves like one of torch.empty.
"""

import math
import threading

import torch
from torch import Tensor

# malloc recycles smaller ones; larger ones are not worth keeping
MIN_BYTES, MAX_BYTES = 2**20, 2**28
# one [n_users, n_items], two weight gradients, and one to spare
KEPT_PER_DTYPE = 4
# torch's only way to ask who holds a storage is private; where it is gone, nothing is recycled
_use_count = getattr(torch._C, "_storage_Use_Count", None)

_pool: dict[torch.dtype, list[Tensor]] = {}
_lock = threading.Lock()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like torch.empty on the CPU, from recycled memory where some is free."""
    numel = math.prod(shape)
    if _use_count is None or not MIN_BYTES <= numel * dtype.itemsize <= MAX_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    with _lock:
        storage = _take(numel, dtype).untyped_storage()
        # set_ makes a tensor of its own on the storage: as long as it lives, the memory counts as held
        buffer = torch.empty(0, dtype=dtype, device="cpu")
        buffer.set_(storage, 0, shape)  # type: ignore[call-overload]
    if torch.are_deterministic_algorithms_enabled():
        # torch.empty fills likewise then, which shows a store that was forgotten
        buffer.fill_(math.nan)
    return buffer


def release() -> None:
    """Keep none of them: what somebody still holds goes when they let it go."""
    with _lock:
        _pool.clear()


def _take(numel: int, dtype: torch.dtype) -> Tensor:
    kept = _pool.setdefault(dtype, [])
    # the tightest fit first: a large one given to a small request is missing at the next large one
    for n, buffer in sorted(enumerate(kept), key=lambda place: place[1].numel()):
        # one more than twice too large would hold memory that the caller did not ask for
        if numel <= buffer.numel() <= 2 * numel and _holders(buffer) == 1:
            del kept[n]
            break
    else:
        buffer = torch.empty(numel, dtype=dtype, device="cpu")
    kept.append(buffer)
    del kept[:-KEPT_PER_DTYPE]  # the longest unused ones; whoever holds their memory keeps it
    return buffer


def _holders(buffer: Tensor) -> int:
    # the storage object made here counts as one holder itself
    assert _use_count is not None
    return _use_count(buffer.untyped_storage()._cdata) - 1
