"""Checks of the arguments that models take: widths, dropouts, beta."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from numbers import Real

from torch import Tensor


def check_beta(name: str, label: str, beta: object) -> None:
    """TypeError unless beta is a number or a tensor, ValueError unless it is one number."""
    if isinstance(beta, Tensor) and beta.numel() != 1:
        raise ValueError(f"{name}: {label} must be a scalar, got shape {list(beta.shape)}")
    if not isinstance(beta, Real | Tensor):
        raise TypeError(
            f"{name}: {label} must be a float or a scalar tensor, got {type(beta).__name__}"
        )


def described(x: object) -> str:
    """What a message says of an argument that is no dense tensor of two dimensions."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"a {str(x.layout).removeprefix('torch.')} one of shape {list(x.shape)}"


def check_dims(name: str, p_dims, q_dims) -> tuple[list[int], list[int]]:
    """p_dims and q_dims as lists; q_dims None is p_dims reversed."""
    widths = {}
    for dims, label in ((p_dims, "p_dims"), (q_dims, "q_dims")):
        if dims is None and label == "q_dims":
            continue
        try:
            widths[label] = [operator.index(width) for width in dims]
        except TypeError:
            raise TypeError(
                f"{name}: {label} must be a list of whole widths, got {dims!r}"
            ) from None
    p_dims = widths["p_dims"]
    q_dims = widths.get("q_dims", p_dims[::-1])
    for dims, label in ((p_dims, "p_dims"), (q_dims, "q_dims")):
        if len(dims) < 2 or min(dims) < 1:
            raise ValueError(f"{name}: {label} must be at least two widths above 0, got {dims}")
    if q_dims[0] != p_dims[-1]:
        raise ValueError(
            f"{name}: q_dims must start with the {p_dims[-1]} items of p_dims, got {q_dims}"
        )
    if q_dims[-1] != p_dims[0]:
        raise ValueError(
            f"{name}: q_dims must end with the {p_dims[0]} latents of p_dims, got {q_dims}"
        )
    return p_dims, q_dims


def check_dropout(name: str, label: str, dropout, n_layers: int, first: float) -> list[float]:
    """One probability for each layer; None is first, then zeros."""
    if dropout is None:
        return [first] + [0.0] * (n_layers - 1)
    if not isinstance(dropout, Iterable):
        raise TypeError(
            f"{name}: {label} must be a list of probabilities, one for each layer, got {dropout!r}"
        )
    if not all(isinstance(p, Real) for p in dropout):
        raise TypeError(f"{name}: {label} must hold probabilities from 0 to 1, got {dropout}")
    dropout = [float(p) for p in dropout]
    if len(dropout) != n_layers:
        raise ValueError(
            f"{name}: {label} must hold one probability for each of {n_layers} layers, got {dropout}; "
            "q_dims is the fourth argument"
        )
    if not all(0 <= p <= 1 for p in dropout):
        raise ValueError(f"{name}: {label} must hold probabilities from 0 to 1, got {dropout}")
    return dropout
