"""Ctrl-C in the seconds in which the fastvae command imports torch: one line and exit code 130, no traceback.

Imported before anything else; in any other program it does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
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
