"""Writes docs/messages.md, the table of every message a user can see: python -m docs.messages.

The messages are read from the source, so that none is missing: every call of a built-in exception or of
warnings.warn in fastvae/ whose first argument is text. {names} in them stand for what the call gave.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "messages.md"
KINDS = (
    "ValueError", "TypeError", "RuntimeError", "OSError", "ImportError", "KeyboardInterrupt",
    "NotFiniteLoss", "NoSuchColumn",
)  # fmt: skip
# what a caller sees of a reason that another message wraps: "..., got {reason}"
REASONS = {
    "checkpoint.py": "checkpoint: {path} must be ..., got ... ({reason})",
    "_checkpoint_parts.py": "checkpoint: {path} must be whole with its folder, got another ({reason}); copy both together",
    "convert.py": "checkpoint: {path} must fit MultiVAE or MultiDAE, got another model ({reason})",
    "dataset_folder.py": "dataset: {file} must be a file of a dataset folder, got ...",
    "parallel_trainer.py": "fit: {path} must hold the state of this run, got another file ({reason})",
    "train.py": "fit: {path} must hold the state of this run, got another file ({reason})",
    "event_table.py": "events: file must be a well-formed table, got {file}: ...",
}
CAUSES = {
    "clicks.py": "Click matrices",
    "_csr.py": "Arrays of a click matrix",
    "_matrices.py": "Containers of a click matrix",
    "ops/": "The ops",
    "models.py": "Models",
    "_model_checks.py": "Arguments of models",
    "train.py": "Training",
    "trainer.py": "A training under way",
    "warm_start.py": "Warm starts",
    "tune.py": "Searches for settings",
    "trials.py": "Trials of a search",
    "parallel.py": "Several processes",
    "parallel_trainer.py": "Training by several processes",
    "_parallel_scores.py": "Ranking by several processes",
    "step.py": "The training step",
    "cuda_graph.py": "CUDA graphs of steps",
    "adam.py": "The optimiser",
    "warmup.py": "Compiling beforehand",
    "run_folder.py": "Run folders and resuming",
    "progress.py": "The progress bar",
    "tensorboard.py": "TensorBoard",
    "checkpoint.py": "Checkpoints",
    "_checkpoint_parts.py": "Checkpoints in parts",
    "convert.py": "Weights of other code",
    "evaluate.py": "Evaluation",
    "metrics.py": "Metrics",
    "baselines.py": "Baselines",
    "compare.py": "Comparison of two models",
    "user_values.py": "Values of users",
    "recommend.py": "Recommendation",
    "rules.py": "Rules of recommendation",
    "similar.py": "Similar items and vectors",
    "ranking.py": "Scores of a model",
    "export.py": "Writing recommendations",
    "events.py": "Events of a click log",
    "frames.py": "DataFrames",
    "event_times.py": "Times of events",
    "event_ids.py": "Columns of a file without a header",
    "event_table.py": "Files of click logs",
    "movielens.py": "MovieLens-100K",
    "data.py": "Splits",
    "click_split.py": "Splits by click",
    "_filter.py": "Thresholds of a split",
    "dataset_folder.py": "Dataset folders",
    "recbole.py": "In RecBole",
    "lenskit.py": "In LensKit",
    "_checks.py": "Arguments of every function",
    "synthetic.py": "Made-up clicks",
    "commands/": "The command",
}


@dataclass(frozen=True)
class Message:
    """A message's text with {names} for what varies, the kind of its error, and its place."""

    text: str
    kind: str
    module: str
    function: str

    @property
    def is_reason(self) -> bool:
        """Whether it only ever shows as the reason within another message."""
        return ": " not in self.text and " must " not in self.text and self.module in REASONS


def collect() -> list[Message]:
    """Every message of fastvae/, in the order of the source; the kernels raise none."""
    paths = [p for p in sorted((ROOT / "fastvae").rglob("*.py")) if "kernels" not in p.parts]
    found = []
    for path in paths:
        module = path.relative_to(ROOT / "fastvae").as_posix()
        for function, call in _calls(ast.parse(path.read_text(encoding="utf-8")), ""):
            kind, text = _kind(call), _text(call.args[0]) if call.args else None
            if kind is not None and text is not None:
                found.append(Message(text, kind, module, function))
    return list(dict.fromkeys(found))


def _calls(node: ast.AST, function: str):
    for child in ast.iter_child_nodes(node):
        name = function
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            name = f"{function}.{child.name}".lstrip(".")
        if isinstance(child, ast.Call):
            yield function, child
        yield from _calls(child, name)


def _kind(call: ast.Call) -> str | None:
    if isinstance(call.func, ast.Name) and call.func.id in KINDS:
        return call.func.id
    if ast.unparse(call.func) != "warnings.warn":
        return None
    given = [arg for arg in call.args[1:2] if isinstance(arg, ast.Name)]
    return given[0].id if given else "UserWarning"


def _text(node: ast.expr) -> str | None:
    """The text of a literal or f-string; None for a computed one, whose parts are literals elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "" for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    return None


def render() -> str:
    """The page."""
    lines = [
        "# Messages",
        "",
        "Every message that fastvae gives, by cause. They have one form, in which names in braces stand for what the",
        "call gave: `<where>: <argument> must <expected>, got <actual>`, and after a semicolon what to do.",
        "",
        "On the command line a message is one line on stderr, with exit code 2 (130 for Ctrl-C), and names the command",
        "and its options: `train: --batch-size must be at least 1, got 0` where Python's is",
        "`fit: batch_size must be at least 1, got 0`. A full disk or a missing right is Python's own OSError with the",
        "file's name; what was saved before is whole then.",
        "",
        "This page is written by `python -m docs.messages`; a test compares it with the source.",
    ]
    messages = collect()
    for prefix, cause in CAUSES.items():
        chosen = [m for m in messages if m.module == prefix or m.module.startswith(prefix)]
        whole, reasons = ([m for m in chosen if m.is_reason is part] for part in (False, True))
        lines += ["", f"## {cause}", ""]
        if whole:
            lines += ["| message | kind | place |", "| --- | --- | --- |"]
            lines += [
                f"| `{_cell(m.text)}` | {m.kind} | `{m.module}` {m.function} |" for m in whole
            ]
        if reasons:
            lines += ["", f"Reasons within `{REASONS[prefix]}`:", ""]
            lines += [f"- `{_cell(m.text)}`" for m in reasons]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
