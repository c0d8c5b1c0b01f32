"""The house's arrows: a module imports what lies below it or beside it, and no imports lead in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = (  # from the ground up
    "errors files", "losses plan rows _native",
    "tail engine arguments ops sharded head trunk modules", "data attention",
    "report", "train", "rounds integrations", "__init__ __main__ cli",
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
FILES = {str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
         for path in (ROOT / "fastpref").rglob("*.py")}


def imports(path):
    """The modules of ours that a file imports, in functions and under TYPE_CHECKING too."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            above = package[: len(package) + 1 - node.level] if base and node.level else ()
            for alias in node.names:
                name = ".".join(filter(None, [*above, *base, alias.name]))
                while name.startswith("fastpref.") and name not in {*FILES, "fastpref._native"}:
                    name = name.rpartition(".")[0]  # of what is in the module
                if name.split(".")[0] == "fastpref":
                    yield name


def test_arrows_run_down_and_in_no_circle():
    graph = {module: set(imports(path)) - {module} for module, path in FILES.items()}
    room = {module: (module.split(".") + ["__init__"])[1] for module in {*FILES, "fastpref._native"}}
    arrows = [(a, b) for a, others in graph.items() for b in others]
    assert not [(a, b) for a, b in arrows if LEVEL[room[a]] < LEVEL[room[b]]]
    assert not [(a, b) for a, b in arrows if room[b] == "integrations" != room[a]]  # for users alone
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them
