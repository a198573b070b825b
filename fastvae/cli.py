"""The fastvae command: its app, and what becomes of errors. The commands are in commands/."""

from __future__ import annotations

import io
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import typer

from . import _interrupt, console
from .commands import (
    compare,
    convert,
    demo,
    evaluate,
    prepare,
    recommend,
    similar,
    train,
    tune,
    warmup,
)
from .commands._processes import are_several, one_voice, refuse_several
from .words import in_command_words, name_of, usage_error

app = typer.Typer(
    name="fastvae",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train Mult-VAE and Mult-DAE recommenders on a click log.\n\n"
    "fastvae prepare clicks.csv data/  then  fastvae train data/ run/  then  "
    "fastvae evaluate run/ data/  and  fastvae recommend run/ clicks.csv top.csv",
)
# typer has no name of its own for what all errors of a command line are
UsageError: Any = typer.BadParameter.__base__

app.command()(prepare.prepare)
app.command()(train.train)
app.command()(tune.tune)
app.command("evaluate")(evaluate.evaluate_command)
app.command("compare")(compare.compare_command)
app.command()(recommend.recommend)
app.command()(similar.similar)
app.command()(convert.convert)
app.command()(warmup.warmup)
app.command()(demo.demo)


def main() -> None:
    """Entry point: what the user can mend is one sentence and exit code 2, never a traceback."""
    if not are_several():
        _run()
        return
    from torch.distributed.elastic.multiprocessing.errors import record

    # what is no sentence of ours is in torchrun's own report
    record(_run)()


def _run() -> None:
    _interrupt.restore()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal may lack the sign ±
            stream.reconfigure(errors="replace")
    group = typer.main.get_command(app)
    context = None
    try:
        # not by calling app: typer's own way out drops the words of Ctrl-C
        with warnings.catch_warnings(), group.make_context("fastvae", sys.argv[1:]) as context:
            warnings.showwarning = _note_warning
            refuse_several(sys.argv[1:])
            group.invoke(context)
            # here, where a full disk behind > is told as any other
            sys.stdout.flush()
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except KeyboardInterrupt as interrupt:
        console.note(f"fastvae: {_in_words(str(interrupt) or 'stopped', group, context)}")
        sys.exit(130)
    except BrokenPipeError:
        # nobody reads on
        _forget_output()
        sys.exit(1)
    except UsageError as error:
        one_voice()
        _refuse_usage(error, context)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        console.complain(_in_words(text, group, context))
        _forget_output()
        sys.exit(2)


def _forget_output() -> None:
    """Let what cannot be written go: python would complain once more when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _note_warning(
    message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Ours as a note; others as python shows them."""
    if Path(__file__).parent in Path(filename).parents:
        console.note(str(message))
    else:
        console.note(warnings.formatwarning(message, category, filename, lineno).rstrip())


def _refuse_usage(error: Any, context: Any) -> None:
    if error.__class__.__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        console.complain(usage_error(error, context and context.invoked_subcommand, sys.argv[1:]))
    sys.exit(2)


def _in_words(text: str, group: Any, context: Any) -> str:
    """A message with the options of the command that was asked for."""
    name = context and context.invoked_subcommand
    if name is None:
        return text
    options = {option.name: name_of(option) for option in group.commands[name].params}
    return in_command_words(text, name, options)
