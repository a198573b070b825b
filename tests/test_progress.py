"""The progress of a training on stderr."""

import torch
from training import forced_metrics, learnable, model

from fastvae import fit


def test_progress_marks_the_best_epochs_and_counts_a_resumed_run_on(tmp_path, monkeypatch, capsys):
    from rich.progress import Progress

    forced_metrics(monkeypatch, [0.1, 0.3, 0.2])
    train, validation = learnable()
    done, update = [], Progress.update
    monkeypatch.setattr(
        Progress,
        "update",
        lambda self, *a, **k: done.append(k.get("completed")) or update(self, *a, **k),
    )
    monkeypatch.setattr("fastvae.progress.SECONDS_BETWEEN", 0)
    options = {"batch_size": 40, "run_dir": tmp_path / "run", "progress": True}
    fit(model(), train, validation, epochs=2, **options)
    fit(model(), train, validation, epochs=3, resume=True, **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert [line.endswith("best") for line in lines] == [True, True, False]
    assert done == [40, 80, 100, 140, 180, 200, 240, 280, 300]


def test_a_resumed_run_with_nothing_left_says_so(tmp_path, capsys):
    train, validation = learnable()
    options = {"run_dir": tmp_path / "run", "progress": True}
    fit(model(), train, validation, epochs=3, **options)
    assert "nothing left" not in capsys.readouterr().err
    fit(model(), train, validation, epochs=2, resume=True, **options)
    assert "nothing left to train: the run has 3 epochs, asked for are 2" in capsys.readouterr().err
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    state["best"] = [1, 0.5]
    torch.save(state, tmp_path / "run" / "last.pt")
    fit(model(), train, validation, epochs=9, patience=2, resume=True, **options)
    assert "nothing left to train: no better NDCG@100 since epoch 1 of 3" in capsys.readouterr().err
