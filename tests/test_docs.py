"""What the documentation shows is run: examples in docstrings, and every command and snippet of the README."""

import doctest
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
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


README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands():
    lines = "".join(blocks("sh")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_readme_make_and_pip_commands_exist():
    root = Path(__file__).parent.parent
    others = [command for command in commands() if command[0] != "fastvae"]
    assert {command[0] for command in others} == {"make", "pip"}
    for command in others:
        if command[0] == "make":
            planned = subprocess.run(
                [command[0], "-n", *command[1:]], cwd=root, capture_output=True, text=True
            )
            assert planned.returncode == 0 and "fastvae demo" in planned.stdout
        else:
            extras = re.findall(r"\[(\w+)\]", command[-1])
            assert extras == ["cli"] and "\ncli = [" in (root / "pyproject.toml").read_text()


@pytest.mark.slow
def test_readme_commands_and_snippets_run(tmp_path, monkeypatch):
    pytest.importorskip("polars")
    from fastvae import cli

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    lines = ["userId,movieId,rating"]
    lines += [
        f"u{u},m{i},{rng.integers(1, 6)}"
        for u in range(60)
        for i in rng.choice(40, 12, replace=False)
    ]
    Path("clicks.csv").write_text("\n".join(lines) + "\n")
    for command in commands():
        if command[0] == "fastvae":
            monkeypatch.setattr(sys, "argv", command)
            code = 0
            try:
                cli.main()
            except SystemExit as end:
                code = end.code
            assert not code, command
    for name in ("run/best.pt", "run/curve.png", "top.csv", "top.jsonl"):
        assert Path(name).stat().st_size > 0, name
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) >= 6
    snippets = blocks("python")
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
    assert len(snippets[1].strip().splitlines()) <= 18


def test_readme_tables_are_the_committed_results():
    from bench.report import render

    assert render(README) == README


def test_readme_is_short_and_its_links_lead_somewhere():
    lines = README.splitlines()
    assert len(lines) <= 200
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
