"""torch's default dtype and device, which other libraries set on import, change nothing: the model's count."""

import ast
import json

from helpers import run_child
from test_layout import TREES

FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
    "tensor", "zeros",
}  # fmt: skip


def test_the_models_dtype_and_device_count():
    child = run_child("other_defaults.py", "float64", "float16", "meta", "float32")
    assert child.returncode == 0, child.stderr
    usual, others = (results := json.loads(child.stdout)).pop("float32"), results
    assert others.keys() == {"float64", "float16", "meta"}
    for default, found in others.items():
        assert found == usual, default


def test_every_tensor_is_made_on_a_device_that_is_named():
    silent = {
        f"{module}: {ast.unparse(node)}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}
        and "device" not in {keyword.arg for keyword in node.keywords}
    }
    # a new model's own weights are made where torch's default says
    assert silent == {
        "fastvae.models: torch.empty(n_items, out_features)",
        "fastvae.models: torch.empty(out_features)",
    }
