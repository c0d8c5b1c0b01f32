"""Draws docs/architecture.svg, the rooms of fastpref/ and their arrows, from the imports: python docs/architecture.py.

A room is a file or package of fastpref/, an arrow an import. A room stands above all that it imports. Of arrows that
others imply (a to b to c, so a to c) only the others are drawn. tests/test_architecture.py keeps arrows down.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = (  # from the ground up
    "cpu errors files", "losses plan rows _native", "tail engine workspace arguments ops sharded head trunk modules",
    "data attention", "report", "train", "rounds integrations", "__init__ __main__ cli",
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
FILES = {str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
         for path in (ROOT / "fastpref").rglob("*.py")}
HIDDEN = ("__init__", "__main__", "_native")  # of the picture: the face of everything, and a compiled one


def imports(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, in functions and under TYPE_CHECKING too."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            above = package[: len(package) + 1 - node.level] if base and node.level else ()
            for alias in node.names:
                name = ".".join(filter(None, [*above, *base, alias.name]))
                while name.startswith("fastpref.") and name not in {*FILES, "fastpref._native"}:
                    name = name.rpartition(".")[0]  # of what is in the module
                if name.split(".")[0] == "fastpref":
                    yield name


def room(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


def rooms() -> tuple[dict[str, int], dict[str, set[str]]]:
    """Lines of each room, and the rooms that each imports."""
    lines: dict[str, int] = defaultdict(int)
    graph: dict[str, set[str]] = defaultdict(set)
    for module, path in FILES.items():
        lines[room(module)] += len(path.read_text(encoding="utf-8").splitlines())
        graph[room(module)] |= {room(other) for other in imports(path)} - {room(module)}
    return dict(lines), dict(graph)


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that others imply."""
    reach: dict[str, set[str]] = {}

    def beyond(name: str) -> set[str]:
        if name not in reach:
            reach[name] = set().union(*({b} | beyond(b) for b in graph.get(name, set())), set())
        return reach[name]

    return {a: {b for b in there if not any(b in beyond(c) for c in there - {b})} for a, there in graph.items()}


def floors_of(graph: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by the longest way down from them; the top floor first."""
    depth: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((of(other) for other in graph.get(name, ())), default=-1)
        return depth[name]

    for name in graph:
        of(name)
    return [[name for name in graph if depth[name] == level] for level in range(max(depth.values()), -1, -1)]


def draw() -> str:
    lines, graph = rooms()
    graph = {a: {b for b in there if b not in HIDDEN} for a, there in sorted(graph.items()) if a not in HIDDEN}
    width, floor, height = 900, 66, 34
    place: dict[str, tuple[float, float, float]] = {}  # middle, top, width
    floors = floors_of(graph)
    for level, names in enumerate(floors):
        sizes = [8 * len(f"{name} {lines[name]:,}") + 24 for name in names]
        gap = min(60.0, (width - sum(sizes) - 80) / max(1, len(names) - 1))
        x = (width - sum(sizes) - gap * (len(names) - 1)) / 2 + (30 if level % 2 else -30)
        for name, size in zip(names, sizes, strict=True):
            place[name] = (x + size / 2, 20 + level * floor, size)
            x += size + gap
    body = []
    for a, there in sorted(reduced(graph).items()):
        for b in sorted(there):
            (x1, y1, _), (x2, y2, _) = place[a], place[b]
            start, end = y1 + height, y2 - 3
            way = f"M{x1:.0f} {start:.0f} C{x1:.0f} {start + 40:.0f} {x2:.0f} {end - 40:.0f} {x2:.0f} {end:.0f}"
            body.append(f'<path class="arrow" d="{way}" marker-end="url(#tip)"/>')
    for name, (x, y, size) in place.items():
        kind = "core" if LEVEL[name] in (1, 2) else "room"
        left, label = x - size / 2, f"{escape(name)} <tspan class='soft'>{lines[name]:,}</tspan>"
        body.append(f'<rect class="{kind}" x="{left:.0f}" y="{y:.0f}" width="{size:.0f}" height="{height}" rx="6"/>')
        body.append(f'<text x="{x:.0f}" y="{y + 22:.0f}">{label}</text>')
    tall = 40 + len(floors) * floor
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" role="img" aria-labelledby="title" \
font-family="system-ui, sans-serif" font-size="14">
<title id="title">The rooms of fastpref/ with their lines, from what users call down to what knows nothing of ours; \
arrows are imports.</title>
<style>
svg {{ --ink: #1f2430; --soft: #5b6275; --line: #9aa1b2; --room: #eef1f6; --core: #d9e6fb; background: #ffffff; }}
@media (prefers-color-scheme: dark) {{
svg {{ --ink: #e8eaf0; --soft: #a7adbd; --line: #666d80; --room: #2b303b; --core: #26405f; background: #16181d; }} }}
text {{ fill: var(--ink); text-anchor: middle; }} .soft {{ fill: var(--soft); }}
.room, .core {{ stroke: var(--line); fill: var(--room); }} .core {{ fill: var(--core); }}
.arrow {{ fill: none; stroke: var(--line); }} #tip path {{ fill: var(--line); }}
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">\
<path d="M0 0L8 4L0 8z"/></marker></defs>
{chr(10).join(body)}
</svg>
"""


if __name__ == "__main__":
    (ROOT / "docs" / "architecture.svg").write_text(draw(), encoding="utf-8")
