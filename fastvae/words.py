"""Errors in the command's words: its options instead of a function's arguments, and one form for those of typer.

fit: batch_size must be at least 1, got 0              train: --batch-size must be at least 1, got 0
'abc' is not a valid float.                            train: --lr must be a number, got 'abc'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# (command, argument of a function) -> parameter of the command that it comes from
_SOURCES = {
    ("prepare", "path"): "events",
    ("prepare", "n_heldout"): "heldout",
    ("prepare", "by"): "split",
    ("train", "folder"): "dataset",
    ("train", "train"): "dataset",
    ("train", "validation"): "dataset",
    ("train", "run_dir"): "run",
    ("train", "path"): "warm_start",
    ("train", "dropout_enc"): "dropout",
    ("train", "p_dims"): "hidden and latent",
    ("tune", "folder"): "dataset",
    ("evaluate", "folder"): "dataset",
    ("evaluate", "metrics"): "metric",
    ("evaluate", "path"): "per_user",
    ("evaluate", "results"): "metric",
    ("compare", "folder"): "dataset",
    ("compare", "metrics"): "metric",
    ("compare", "n_samples"): "samples",
    ("recommend", "path"): "histories",
    ("recommend", "folder"): "histories",
    ("demo", "path"): "events",
    ("demo", "n_heldout"): "events",
}
_PHRASES = {
    "resume that run": "go on with it by --resume",
    "resume to go on": "--resume goes on",
    "train without resume": "train without --resume",
    "lower lr": "lower --lr",
    "leave out strict to drop them": "drop them",
    "it is for a split by ": "it is for --split ",
}
_MESSAGE = re.compile(r"(?:(\w+): )?(\w+(?: and \w+)?)(?:\[\d+\])?( must | has )(.*)", re.DOTALL)


def in_command_words(text: str, command: str, options: Mapping[str, str]) -> str:
    """A message of the library as the command would say it.

    options  by parameter name: "--batch-size", or for an argument its own name
    """
    match = _MESSAGE.fullmatch(text)
    if match:
        where, argument, verb, rest = match.groups()
        if where == "write_recommendations" and argument == "path":
            argument = "output"
        names = _SOURCES.get((command, argument), argument).split(" and ")
        if set(names) <= set(options):
            text = f"{command}: {' and '.join(options[name] for name in names)}{verb}{rest}"
        elif where is None:
            text = f"{command}: {text}"
    for phrase, ours in _PHRASES.items():
        text = text.replace(phrase, ours)
    # names that are no words of English, wherever they come
    for name in {*options, *(name for of, name in _SOURCES if of == command)}:
        if "_" in name:
            option = options.get(_SOURCES.get((command, name), name), name)
            text = re.sub(rf"(?<![\w/.-]){name}(?![\w/.-])", option, text)
    return text


def usage_error(error: Any, command: str | None, arguments: list[str]) -> str:
    """What typer refuses, in our form.

    command    None where it is not known yet
    arguments  of the command line, which typer's error does not hold
    """
    message = " ".join(str(error.message).rstrip(".").split())
    where, see = (
        (f"{command}: ", f"see fastvae {command} --help") if command else ("", "see fastvae --help")
    )
    parameter = getattr(error, "param", None)
    name = None if parameter is None else name_of(parameter)
    if name and (given := _value_of(parameter, arguments)) is not None:
        kind = "a whole number" if "integer" in message else "a number"
        return f"{where}{name} must be {kind}, got {given!r}"
    if name:
        return f"{where}{name} must be given, got nothing; {see}"
    if unknown := re.match(r"No such (option|command):? '?([^' ]+)'?", message):
        near = [*(getattr(error, "possibilities", None) or ())]
        advice = f"did you mean {' or '.join(near)}" if near else see
        return f"{where}{unknown[1]} must be one of those of --help, got {unknown[2]}; {advice}"
    if "requires" in message and (option := re.search(r"-[\w-]+", message)):
        return f"{where}{option[0]} must have a value, got none; {see}"
    if extra := re.search(r"unexpected extra argument\S* \((.*)\)$", message):
        return f"{where}arguments must be those of --help, got {extra[1]} too; {see}"
    return f"{where}{message}; {see}"


def _value_of(parameter: Any, arguments: list[str]) -> str | None:
    """What stands behind an option on the command line, the last time that it comes."""
    found = None
    for option, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, is_joined, value = option.partition("=")
        if name in parameter.opts:
            found = value if is_joined else following
    return found


def name_of(parameter: Any) -> str:
    """What a user types for a parameter: the long option, or the argument's name as the help shows it."""
    if parameter.param_type_name == "argument":
        return parameter.name
    return max(parameter.opts, key=len)
