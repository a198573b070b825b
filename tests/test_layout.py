"""The import graph, read from the source: arrows only fall, and files, functions and kernels stay small.

Run with -s to see the graph. An import inside a function counts like any other.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_LINES, MAX_FUNCTION_LINES, MAX_JIT_ARGUMENTS = 420, 60, 16


def module_of(path):
    """fastvae.ops.sparse_linear for fastvae/ops/sparse_linear.py; kernels/ is fastvae.kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("fastvae", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# fastvae/kernels is a link to kernels/: rglob does not follow it, and python below 3.13 lists it
FILES = [
    *(p for p in sorted((ROOT / "fastvae").rglob("*.py")) if "kernels" not in p.parts),
    *sorted((ROOT / "kernels").glob("*.py")),
]
TREES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
PACKAGES = {module_of(path) for path in FILES if path.name == "__init__.py"}


def imports_of(tree, module=""):
    """The modules of fastvae that a tree imports, by their full names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")
            above = above[: len(above) - node.level + (module in PACKAGES)] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            submodules = names & set(TREES)
            # `from . import x` needs the package only for x
            found.update(submodules or {base})
    return {name for name in found if name in TREES}


GRAPH = {module: imports_of(tree, module) for module, tree in TREES.items()}


def reached(module, seen=()):
    """Every module that an import of this one brings in, itself left out unless it is in a circle."""
    found = set(seen)
    for target in GRAPH[module] - found:
        found = reached(target, found | {target})
    return found


def test_no_circle():
    for module, targets in GRAPH.items():
        print(f"{module:40} -> {', '.join(sorted(targets)) or '-'}")
    assert [module for module in GRAPH if module in reached(module)] == []


def test_the_graph_sees_lazy_and_relative_imports():
    inside = ast.parse("def f():\n  from .ops import sparse_linear, has_triton")
    assert imports_of(inside, "fastvae.clicks") == {"fastvae.ops.sparse_linear"}
    beside = ast.parse("from . import _buffers\nfrom ..clicks import Clicks")
    assert imports_of(beside, "fastvae.ops.sparse_linear") == {
        "fastvae.ops._buffers",
        "fastvae.clicks",
    }
    assert imports_of(ast.parse("from ._buffers import empty"), "fastvae.ops") == {
        "fastvae.ops._buffers"
    }
    assert imports_of(ast.parse("import fastvae.clicks, torch"), "any") == {"fastvae.clicks"}


LAYERS = ("fastvae.kernels", "fastvae.ops", "fastvae.models")


def layer(module):
    return next((n for n, name in enumerate(LAYERS) if f"{module}.".startswith(f"{name}.")), -1)


def test_models_import_ops_and_ops_import_kernels():
    wrong = [
        f"{module} brings in {target}"
        for module in GRAPH
        for target in sorted(reached(module))
        if layer(module) >= 0 and layer(target) > layer(module)
    ]
    assert wrong == []


def test_kernels_import_nothing_of_fastvae():
    for module, targets in GRAPH.items():
        if layer(module) == 0:
            assert {target for target in targets if layer(target) != 0} == set(), module


def test_only_tests_bench_and_docs_import_the_reference():
    assert [m for m, targets in GRAPH.items() if "fastvae.reference" in targets] == []


def test_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path.name: n for path, n in lengths.items() if n > MAX_LINES} == {}


def functions():
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{module}.{node.name}", node


def test_functions_are_short():
    """Without the docstring, which is as long as the arguments are many."""
    long = {}
    for name, node in functions():
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node):
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
        if lines > MAX_FUNCTION_LINES:
            long[name] = lines
    assert long == {}


def test_kernels_have_few_arguments():
    many = {}
    for name, node in functions():
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            n = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            if n > MAX_JIT_ARGUMENTS:
                many[name] = n
    assert many == {}
