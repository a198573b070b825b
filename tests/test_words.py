"""fastvae.words: messages name what was typed, and what was not asked for stays."""

import pytest

pytest.importorskip("typer")

from fastvae.words import in_command_words

OPTIONS = {"run": "run", "batch_size": "--batch-size", "lr": "--lr", "patience": "--patience"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fit: batch_size must be at least 1, got 0", "train: --batch-size must be at least 1, got 0"),
        ("fit: run_dir must be a folder, got a file", "train: run must be a folder, got a file"),
        # no option of this command: the sentence stays
        ("fit: items must be a list of ids, got int", "fit: items must be a list of ids, got int"),
        ("fit: loss must be finite, got nan; lower lr", "fit: loss must be finite, got nan; lower --lr"),
        ("device must be cpu or cuda, got tpu", "train: device must be cpu or cuda, got tpu"),
        ("stopped after 1 epochs, resume to go on", "stopped after 1 epochs, --resume goes on"),
        # a folder may be called like an argument
        (
            "dataset: x must be there, got nothing at /tmp/batch_size/run_dir; lower batch_size",
            "dataset: x must be there, got nothing at /tmp/batch_size/run_dir; lower --batch-size",
        ),
        ("[Errno 28] No space left on device: 'a'", "[Errno 28] No space left on device: 'a'"),
        ("fit: lr must be 1, got 'lower\nlr must'", "train: --lr must be 1, got 'lower\nlr must'"),
    ],
)  # fmt: skip
def test_messages_of_the_library_are_said_with_the_options_of_the_command(text, expected):
    assert in_command_words(text, "train", OPTIONS) == expected
