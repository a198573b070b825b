"""fit(on_epoch=): when a callback is called, what its answer and its exceptions do."""

import json
import sys

import numpy as np
import pytest
import torch
from training import assert_equal_weights, forced_metrics, learnable, model, weights

from fastvae import fit


def test_each_epoch_is_told_once_its_checkpoint_is_written(tmp_path):
    train, validation = learnable()
    told, lines, reached = [], [], []

    def on_epoch(row):
        told.append(row)
        lines.append((tmp_path / "metrics.jsonl").read_text().splitlines())
        reached.append(torch.load(tmp_path / "last.pt", weights_only=True)["position"][0])

    result = fit(model(), train, validation, epochs=3, run_dir=tmp_path, on_epoch=on_epoch)
    assert told == result.history and [row["epoch"] for row in told] == reached == [1, 2, 3]
    assert [json.loads(line) for line in lines[-1]] == told


def test_a_callback_cannot_change_the_history():
    result = fit(model(), learnable()[0], epochs=2, on_epoch=dict.clear)
    assert [row["epoch"] for row in result.history] == [1, 2]


@pytest.mark.parametrize(
    ("answer", "epochs"),
    [(True, 1), (np.True_, 1), (False, 3), (None, 3), (0.5, 3), ([1], 3)],
    ids=["true", "numpys-true", "false", "none", "a-number", "a-list"],
)
def test_only_true_ends_the_training(answer, epochs):
    result = fit(model(), learnable()[0], epochs=3, on_epoch=lambda row: answer)
    assert len(result.history) == epochs


def test_a_training_that_was_ended_has_the_best_weights_and_goes_on_when_resumed(
    monkeypatch, tmp_path
):
    seen = forced_metrics(monkeypatch, [0.5, 0.4, 0.3, 0.2])
    train, validation = learnable()
    net, told = model(), []
    options = {"epochs": 4, "run_dir": tmp_path}
    result = fit(net, train, validation, on_epoch=lambda row: row["epoch"] == 2, **options)
    assert (result.best_epoch, len(result.history)) == (1, 2)
    assert_equal_weights(weights(net), seen[0])
    again = fit(net, train, validation, resume=True, on_epoch=told.append, **options)
    assert [row["epoch"] for row in told] == [3, 4] and len(again.history) == 4


def test_what_a_callback_raises_leaves_fit_and_a_resume_goes_on_bit_for_bit(tmp_path):
    train, validation = learnable()
    straight, stopped, resumed = model(), model(), model(seed=9)
    options = {"epochs": 3, "batch_size": 30}
    fit(straight, train, validation, **options)

    def on_epoch(row):
        if row["epoch"] == 2:
            raise KeyError("pruned")

    with pytest.raises(KeyError, match="pruned"):
        fit(stopped, train, validation, run_dir=tmp_path, on_epoch=on_epoch, **options)
    fit(resumed, train, validation, run_dir=tmp_path, resume=True, **options)
    assert_equal_weights(weights(straight), weights(resumed))


def test_a_callback_must_be_callable():
    with pytest.raises(TypeError) as caught:
        fit(model(), learnable()[0], epochs=1, on_epoch=3)
    assert str(caught.value) == "fit: on_epoch must be callable, got 3"


def test_without_the_extra_tensorboard_says_what_to_install(monkeypatch, tmp_path):
    from fastvae.tensorboard import TensorBoard

    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError) as caught:
        TensorBoard(tmp_path)
    assert str(caught.value) == (
        "TensorBoard: tensorboard must be installed, got none; pip install 'fastvae-cf[tensorboard]'"
    )


def test_tensorboard_shows_each_epoch_once_after_a_resume_too(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install 'fastvae-cf[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from fastvae.tensorboard import TensorBoard

    train, validation = learnable()
    options = {"epochs": 4, "run_dir": tmp_path / "run"}
    board = TensorBoard(tmp_path / "board")

    def killed_before_its_checkpoint(row):
        board(row)
        if row["epoch"] == 2:
            board({**row, "epoch": 3, "loss": 7.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model(), train, validation, on_epoch=killed_before_its_checkpoint, **options)
    again = TensorBoard(tmp_path / "board")
    result = fit(model(), train, validation, resume=True, on_epoch=again, **options)
    shown = EventAccumulator(str(tmp_path / "board")).Reload()
    assert set(shown.Tags()["scalars"]) == result.history[0].keys() - {"epoch", "update"}
    for name in ("loss", "lr", "ndcg@100"):
        events = [(event.step, event.value) for event in shown.Scalars(name)]
        assert events == [
            (row["epoch"], pytest.approx(row[name], rel=1e-6)) for row in result.history
        ]
