"""Where several processes share a call: what one of them refuses, all do. One process imports nothing of parallel.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .parallel import Processes


@contextlib.contextmanager
def checked_by_all(where: str, parallel: Any, group: Any) -> Iterator[Processes | None]:
    """For a block that checks: the processes that share a call, of which all refuse what one does; None: there is one."""
    if parallel is None:
        yield None
        return
    from .parallel import Processes

    processes = Processes(where, parallel, group)
    with processes.together():
        yield processes
