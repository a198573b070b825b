"""The commands under torchrun: this process' place among the others, and what they agree on before they begin."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import console
from ..ranking import MIN_ROWS
from ..run_folder import LAST
from ._common import device_named

if TYPE_CHECKING:
    from ..parallel import Processes

SHARED = ("train", "evaluate", "recommend")


def are_several() -> bool:
    """Whether torchrun, or who sets what it sets, has started more than one process."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def one_voice() -> None:
    """For what all processes say alike: let the first of them alone say it."""
    console.out.quiet = console.err.quiet = are_several() and os.environ["RANK"] != "0"


def refuse_several(arguments: list[str]) -> None:
    """ValueError where several processes are started with a command that they cannot share: each would do all of it."""
    if are_several() and arguments[:1] and arguments[0] not in SHARED and "--help" not in arguments:
        one_voice()
        raise ValueError(
            f"fastvae: WORLD_SIZE must be 1 but for train, evaluate and recommend, got {os.environ['WORLD_SIZE']}; "
            "start the command without torchrun"
        )


def own_device(name: str | None) -> torch.device:
    """The device of this process: with several on GPUs the one of its own number."""
    device = device_named(name)
    if are_several() and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def several(command: str, parallel: str | None, device: str | None) -> Iterator[Processes | None]:
    """The processes for the block, of which the first alone prints; None where this one is alone.

    Raises: ValueError where parallel is given to one process, RuntimeError where another process has ended.
    """
    if not are_several():
        # torchrun's one process needs no other words than its many
        if parallel is not None and "RANK" not in os.environ:
            raise ValueError(
                f"{command}: parallel must be left out in one process, got {parallel}; start several by torchrun"
            )
        yield None
        return
    import torch.distributed as dist

    from ..parallel import Processes

    # its functions keep, as a default, the group that is there when it is imported, as torch.compile does: a group
    # that never ends, whose thread may abort the process when python is gone
    importlib.import_module("torch.distributed.nn.functional")
    own = own_device(device)
    # torchrun's store outlives a restart: without a name of this start the addresses of dead processes would be read
    try:
        store, rank, size = next(dist.rendezvous("env://"))
    except ValueError as error:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        got = " ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise ValueError(
            f"{command}: {', '.join(names)} must be as torchrun sets them, got {got}; unset RANK to run one process"
        ) from error
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if own.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"fastvae-{start}", store),
        rank=rank,
        world_size=size,
    )
    processes = Processes(command, parallel or "users")
    one_voice()
    try:
        yield processes
        # who ends takes along what another has yet to read of it
        ended = dist.PrefixStore(f"fastvae-{start}-ended", store)
        ended.set(str(rank), "")
        ended.wait([str(other) for other in range(size)])
    except KeyboardInterrupt:
        # the first to leave lets torchrun end the others, who have yet to say where they stopped
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    except (RuntimeError, dist.DistError) as error:
        if not _is_of_another(error):
            raise
        raise RuntimeError(
            f"{command}: all processes must go on, got one that has ended; its own words come first"
        ) from error
    finally:
        dist.destroy_process_group()


def _is_of_another(error: Exception) -> bool:
    """Whether an error only says that another process is not there any more."""
    words = ("gloo", "connection closed by peer", "connection reset", "nccl")
    return any(word in str(error).lower() for word in words)


def together(processes: Processes | None) -> contextlib.AbstractContextManager[None]:
    """For a block that may fail: what one process refuses, all do, before one waits for another."""
    return contextlib.nullcontext() if processes is None else processes.together()


def is_first(processes: Processes | None) -> bool:
    """Whether this is the process that writes and prints."""
    return processes is None or processes.rank == 0


def shared_training(
    processes: Processes, parallel: str | None, batch_size: int, n_items: int
) -> dict[str, Any]:
    """What fit takes for several processes; a line says how the work is cut, and why."""
    way = parallel or ("items" if batch_size < n_items else "users")
    reason = "as asked for"
    if parallel is None:
        smaller = "smaller" if way == "items" else "not smaller"
        reason = f"the batch of {batch_size:,} users is {smaller} than the {n_items:,} items"
    return _told(processes, way, reason)


def shared_scores(
    processes: Processes | None, parallel: str | None, n_users: int
) -> dict[str, Any]:
    """What evaluate and recommend take for several processes; a line says how the work is cut, and why."""
    if processes is None:
        return {}
    # a model scores so many rows at least: of fewer users the others would be for nothing
    are_few = n_users < MIN_ROWS * processes.size
    way = parallel or ("items" if are_few else "users")
    reason = "as asked for"
    if parallel is None:
        share = "fewer than" if are_few else "at least"
        reason = f"{n_users:,} users, {share} {MIN_ROWS} for each process"
    return _told(processes, way, reason)


def _told(processes: Processes, way: str, reason: str) -> dict[str, Any]:
    console.note(f"{processes.size} processes, by {way}: {reason}")
    return {"parallel": way}


def resumes(processes: Processes | None, resume: bool, run: Path) -> bool:
    """Whether to resume: a restart by torchrun, with --resume, may come before the first checkpoint."""
    if processes is None or not resume:
        return resume
    return processes.objects((run / LAST).exists())[0]
