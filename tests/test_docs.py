"""What the documentation shows is run: examples in docstrings, and every command and snippet of the pages."""

import doctest
import importlib
import importlib.util
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


# packages that the extras of their names bring, where make test has no need of them
OF_EXTRAS = ("recbole", "lenskit", "lightning")


def missing(text):
    """Those of the packages that a text names and that are not installed."""
    named = [name for name in OF_EXTRAS if re.search(rf"\b{name}\b", text)]
    return [name for name in named if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    if missing(name):
        pytest.skip(f"the extra {name.removeprefix('fastvae.')} is not installed")
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_there_are_examples():
    modules = [importlib.import_module(name) for name in MODULES if not missing(name)]
    examples = [doctest.DocTestFinder().find(module) for module in modules]
    assert sum(len(test.examples) for tests in examples for test in tests) > 30


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def commands(page):
    lines = "".join(blocks(page, "sh")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_run(page):
    fences = re.findall(r"^```(.*)$", PAGES[page], re.MULTILINE)
    assert set(fences[::2]) <= {"sh", "python", "diff"} and set(fences[1::2]) <= {""}


PLANNED = [(page, c) for page in PAGES for c in commands(page) if c[0] != "fastvae"]


@pytest.mark.parametrize("page, command", PLANNED, ids=lambda value: "".join(value[:60]))
def test_commands_that_take_long_exist(page, command):
    """Those of make, pip, python and torchrun: each names targets, extras, modules, options and files that are there."""
    if command[0] == "make":
        planned = subprocess.run(
            ["make", "-n", *command[1:]], cwd=ROOT, capture_output=True, text=True
        )
        assert planned.returncode == 0 and ".venv/bin/" in planned.stdout
    elif command[0] == "pip":
        extras = re.findall(r"\[(\w+)\]", command[-1])
        declared = (ROOT / "pyproject.toml").read_text()
        assert extras and all(f"\n{extra} = [" in declared for extra in extras)
    elif command[0] == "torchrun":
        assert_torchrun_takes(command[1:])
    else:
        assert command[:2] == ["python", "-m"], command
        assert_module_takes(command[2], command[3:])


def assert_torchrun_takes(arguments):
    import typer
    from torch.distributed.run import get_args_parser

    from fastvae.cli import app

    given = get_args_parser().parse_args(arguments)
    assert given.module and given.training_script == "fastvae"
    name, *options = given.training_script_args
    known = [option for p in typer.main.get_command(app).commands[name].params for option in p.opts]
    assert {option for option in options if option.startswith("--")} <= set(known)


def assert_module_takes(name, arguments):
    assert importlib.util.find_spec(name) is not None
    if ">" in arguments:
        arguments, into = arguments[: arguments.index(">")], arguments[-1]
        assert (ROOT / into).is_file(), into
    if name == "pytest":
        files = [argument for argument in arguments if argument.startswith(("tests", "bench"))]
        assert files and all(list(ROOT.glob(file)) for file in files), arguments
    elif name == "bench":
        from bench.__main__ import COMMANDS

        module = importlib.import_module(f"bench.{arguments[0]}")
        assert arguments[0] in COMMANDS
        if hasattr(module, "argparse"):
            # wrong options and choices are refused before --help is answered
            with pytest.raises(SystemExit) as end:
                module.main([*arguments[1:], "--help"])
            assert end.value.code == 0
        else:
            assert arguments[1:] == []
    else:
        assert arguments == []


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_and_snippets_run(page, tmp_path, monkeypatch):
    """In the order of the page, the commands first."""
    pytest.importorskip("polars")
    if page == "docs/tuning.md":
        pytest.importorskip("optuna", reason="optuna is not installed: the extra tune brings it")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    lines = ["userId,movieId,rating,timestamp"]
    lines += [
        f"u{u},m{i},{rng.integers(1, 6)},{1_577_836_800 + (u * 7919 + i * 104_729) * 2_654_435_761 % 20_000_000}"
        for u in range(60)
        for i in rng.choice(40, 12, replace=False)
    ]
    Path("clicks.csv").write_text("\n".join(lines) + "\n")
    Path("stock.txt").write_text("".join(f"m{i}\n" for i in range(20)))
    Path("banned.txt").write_text("m7\nm9\n")
    for command in commands(page):
        if command[0] == "fastvae":
            assert not exit_code(command, monkeypatch), command
    names: dict = {}
    for snippet in blocks(page, "python"):
        if missing(snippet):
            continue
        exec(compile(snippet, page, "exec"), names)
    for name in WRITTEN.get(page, ()):
        assert Path(name).stat().st_size > 0, name


# what a reader then looks for
WRITTEN = {
    "README.md": ("run/best.pt", "run/curve.png", "first/best.pt", "top.csv", "top.jsonl"),
    "docs/tuning.md": ("runs/trials.csv", "runs/tune.png", "runs/anneal/best.pt", "best/best.pt"),
    "docs/new-data.md": ("run2/best.pt", "run2/curve.png"),
    "docs/data.md": ("timed/info.json", "late/info.json", "last/info.json", "run/best.pt"),
    "docs/comparing.md": ("vae/best.pt", "dae/best.pt", "users.csv"),
    "docs/cli.md": (
        "counted/ids.npz", "thinned/info.json", "run/config.json", "run/metrics.jsonl", "run/last.pt",
        "dae/best.pt", "small/best.pt", "top.csv", "top.jsonl", "seen.parquet",
    ),
    "docs/recommending.md": ("stock.csv", "mild.csv", "mild.jsonl"),
}  # fmt: skip


def exit_code(command, monkeypatch):
    from fastvae import cli

    monkeypatch.setattr(sys, "argv", command)
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    return 0


def test_every_page_with_files_to_look_for_is_there():
    assert set(WRITTEN) < set(PAGES)


def test_tables_are_the_committed_results():
    from bench import report

    tables = []
    for path in report.PAGES:
        text = path.read_text(encoding="utf-8")
        assert report.render(text) == text, path
        tables += report.marks(text)
    assert sorted(tables) == sorted(report.TABLES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", PAGES[page]):
        assert target.startswith("https://") or (folder / target).exists(), target


@pytest.mark.parametrize("page", [*PAGES, "bench/NOTES.md"])
def test_files_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"\b(?:fastvae|kernels|bench|tests|docs)/[\w./]+\.\w+", text)
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_the_readme_is_short_and_its_first_screen_shows_it_all():
    assert len(README.splitlines()) < 150
    first = README[: README.index("## Install")]
    shown = [line for line in first.splitlines() if not line.startswith(("<!--", "```"))]
    assert len(shown) <= 25
    assert "bench:" in first and "make demo" in first and "Where things are" in first
    call = blocks("README.md", "python")[0]
    assert call in first and len(call.splitlines()) == 5


def test_where_things_are_names_every_module_once():
    """Those with a leading underscore are found from the others; the ops and the kernels are folders."""
    table = README[README.index("## Where things are") :]
    first_cells = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|"))
    named = [Path(name).name for name in re.findall(r"`([\w/]+\.py)`", first_cells)]
    modules = [path.name for path in (ROOT / "fastvae").glob("[a-z]*.py")]
    assert sorted(named) == sorted(modules)


def test_one_name_leads_from_the_readme_to_the_line_that_reads_a_weight_row():
    """The README's three hops by the name sparse_linear, walked."""
    hops = re.findall(r"^\d\. (.*)$", README[: README.index("**`linear_multinomial_nll`")], re.M)
    assert len(hops) == 3 and all("sparse_linear" in hop for hop in hops)
    files = [re.findall(r"\]\((\S+\.py)\)", hop) for hop in hops]
    sources = [(ROOT / file).read_text() for (file,) in files[:2]]
    assert files[2] == [] and "in the same file" in hops[2]
    sources.append(sources[1])
    for hop, source in zip(hops, sources, strict=True):
        for name in re.findall(r"`(_?sparse_linear\w*)`", hop):
            assert f"\ndef {name}(" in source, name
    (line,) = re.findall(r"`(weight = tl\.load\([^`]*), \.\.\.\)`", hops[2])
    kernel = sources[2].split("\ndef _sparse_linear_fwd_kernel(")[1].split("\n@triton.jit")[0]
    assert line in kernel
