"""Ctrl-C: in the seconds in which the fastvae command imports torch, one line and exit code 130, no traceback; in a
training, an end between two updates.

Imported by the command before anything else; in any other program the import does nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any


def _quit(*_: Any) -> None:
    os.write(2, b"fastvae: stopped\n")
    os._exit(130)


def _is_the_command() -> bool:
    """Whether this process is fastvae or python -m fastvae; its arguments are not complete yet in the second case."""
    program = next(iter(getattr(sys, "argv", [])), "")
    called = getattr(sys, "orig_argv", [])
    as_module = program == "-m" and called[called.index("-m") + 1 :][:1] == ["fastvae"]
    return PurePath(program).stem == "fastvae" or as_module


def restore() -> None:
    """Let Ctrl-C be a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# a shell's background jobs ignore Ctrl-C, and shall go on doing so
if (
    _is_the_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _quit)


@contextlib.contextmanager
def held_interrupt(terminated: bool = False) -> Iterator[Any]:
    """Ctrl-C only sets a flag, which is read between two updates; a second Ctrl-C interrupts at once.

    terminated  whether SIGTERM sets it too, as torchrun sends it 30 seconds before it kills
    """
    flag = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    # signals reach the main thread only; a background job that ignores Ctrl-C goes on ignoring it, and a handler that
    # another language has set (None) could not be put back
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or before in (signal.SIG_IGN, None):
        yield flag.is_set
        return

    def handle(*_):
        flag.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    before_term = signal.signal(signal.SIGTERM, lambda *_: flag.set()) if terminated else None
    try:
        yield flag.is_set
    finally:
        signal.signal(signal.SIGINT, before)
        if terminated:
            signal.signal(signal.SIGTERM, before_term)
