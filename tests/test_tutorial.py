"""The tutorial notebook runs from its first cell to its last, and shows what its text says."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs"
NOTEBOOK = json.loads((FOLDER / "tutorial.ipynb").read_text(encoding="utf-8"))
CELLS = {
    kind: ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == kind]
    for kind in ("markdown", "code")
}


def test_it_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        needed = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            needed |= {"execution_count", "outputs"}
            assert cell["execution_count"] is None and cell["outputs"] == []
        assert set(cell) == needed and cell["metadata"] == {}


def test_its_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", "".join(CELLS["markdown"]))
    assert targets and all((FOLDER / target).is_file() for target in targets)


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("polars", reason="polars is not installed: the extra cli has it")
    matplotlib = pytest.importorskip("matplotlib", reason="the extra cli has matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    names: dict = {}
    try:
        for number, source in enumerate(CELLS["code"]):
            exec(compile(source, f"code cell {number}", "exec"), names)
        figures = [plt.figure(number) for number in plt.get_fignums()]
        assert len(figures) == "".join(CELLS["code"]).count("plt.subplots(")
        assert all(axis.has_data() for figure in figures for axis in figure.axes)
    finally:
        plt.close("all")
    results = names["results"]
    assert results["Mult-VAE"]["recall@20"] > 1.5 * results["popularity"]["recall@20"]
    assert names["heard"] == sorted(names["heard"], reverse=True)
    assert names["done"].n_users == 1500 and names["done"].n_empty == 0
    printed = capsys.readouterr().out
    for genre in ("jazz", "choir"):
        (line,) = re.findall(rf"^{genre} \d+ -> (.*)$", printed, re.MULTILINE)
        # another CPU rounds otherwise, so a training ends elsewhere
        assert re.findall(r"'(\w+) \d+ \(", line).count(genre) >= 4
    assert (tmp_path / "tutorial" / "run-1" / "best.pt").is_file()
