"""Prints which of the packages that are not required an import of fastvae brings in."""

import sys

import torch  # noqa: F401

before = set(sys.modules)
import fastvae  # noqa: E402, F401

new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"triton", "polars", "typer", "rich", "matplotlib"}))
