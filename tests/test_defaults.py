"""torch's default dtype and device, which other libraries set on import, change nothing: the model's count."""

import ast
import json

from helpers import run_child
from test_layout import TREES

# what a call must name; the others make whole numbers, or what they are given
FACTORIES = {
    **{
        f"torch.{name}": {"device", "dtype"}
        for name in ("empty", "eye", "linspace", "ones", "rand", "randn", "tensor", "zeros")
    },
    **{
        f"torch.{name}": {"device"}
        for name in ("arange", "as_tensor", "full", "randint", "randperm")
    },
}


def test_the_models_dtype_and_device_count():
    child = run_child("other_defaults.py", "float64", "float16", "meta", "float32")
    assert child.returncode == 0, child.stderr
    usual, others = (results := json.loads(child.stdout)).pop("float32"), results
    assert others.keys() == {"float64", "float16", "meta"}
    for default, found in others.items():
        assert found == usual, default


def test_every_tensor_is_made_of_a_dtype_and_on_a_device_that_are_named():
    silent = set()
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES:
                named = {keyword.arg for keyword in node.keywords}
                if not named >= FACTORIES[ast.unparse(node.func)]:
                    silent.add(f"{module}: {ast.unparse(node)}")
    # a new model's own weights are made as torch's defaults say
    assert silent == {
        "fastvae._layers: torch.empty(n_items, out_features)",
        "fastvae._layers: torch.empty(out_features)",
    }
