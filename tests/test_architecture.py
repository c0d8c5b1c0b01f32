"""The house's arrows: a module imports what lies below it or beside it, and no imports lead in a circle."""

import ast
import importlib.util
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
drawn = importlib.util.module_from_spec(spec)
spec.loader.exec_module(drawn)
FILES, LEVEL, imports = drawn.FILES, drawn.LEVEL, drawn.imports


def test_arrows_run_down_and_in_no_circle():
    graph = {module: set(imports(path)) - {module} for module, path in FILES.items()}
    room = {module: (module.split(".") + ["__init__"])[1] for module in {*FILES, "fastpref._native"}}
    arrows = [(a, b) for a, others in graph.items() for b in others]
    assert not [(a, b) for a, b in arrows if LEVEL[room[a]] < LEVEL[room[b]]]
    assert not [(a, b) for a, b in arrows if room[b] == "integrations" != room[a]]  # for users alone
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_no_function_is_longer_than_100_lines():
    """Signature and docstring and all; but for Triton's kernels, which cannot call on Python."""
    long = []
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 100:
                if not any("triton" in ast.unparse(decorator) for decorator in node.decorator_list):
                    long.append(f"{module}.{node.name}: {node.end_lineno - node.lineno + 1}")
    assert not long


def test_the_picture_is_of_these_imports():
    """Its rooms and arrows; the lines in it may be some commits old."""
    def shape(text):
        return [line for line in text.splitlines() if line.startswith("<path")]

    committed = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert shape(committed) == shape(drawn.draw()), "run: python docs/architecture.py"
