"""The rooms of the library and the imports between them, read from syntax trees: edges, order, circles.

A *room* is a module or a folder directly in `dapt_jax`. Imports count wherever they stand in a file, but
those under `if TYPE_CHECKING`; several between the same two rooms are one edge.
"""

import ast
import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

PACKAGE = "dapt_jax"
ROOMS: tuple[str | tuple[str, ...], ...] = (
    "main",
    "export",
    "aot",
    "study",
    "settings",
    "training",
    "objectives",
    "losses",
    "monitoring",
    "report",
    "records",
    "transferability",
    "weights",
    "cost",
    "models",
    "data",
    "metrics",
    "statistics",
    "runtime",
    "ops",
    ("errors", "formatting"),
)
"""The order of the rooms, top to bottom, where neither a test nor CONTRIBUTING.md says it; those in a tuple
are level."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Module:
    """A file of the library.

    Attributes:
        path: Relative to the checkout.
        room: Module or folder directly in the package; empty for its `__init__`.
        text: The source.
        tree: Its syntax tree.
    """

    path: Path
    room: str
    text: str
    tree: ast.Module

    @functools.cached_property
    def functions(self) -> list[tuple[Function, bool, bool]]:
        """All functions, nested ones included: each with whether it is a method, and whether it is public."""
        return list(_functions(self.tree, in_class=False, is_public=True))

    def at(self, node: ast.AST, what: str) -> str:
        """Return a place in the file."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"


def _functions(parent: ast.AST, *, in_class: bool, is_public: bool) -> Iterator[tuple[Function, bool, bool]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Function):
            yield node, in_class, is_public and not node.name.startswith("_")
            yield from _functions(node, in_class=False, is_public=False)
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, in_class=True, is_public=is_public and not node.name.startswith("_"))
        else:
            yield from _functions(node, in_class=in_class, is_public=is_public)


def modules(root: Path) -> list[Module]:
    """Read the library of a checkout."""
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        inside = path.relative_to(root / PACKAGE)
        room = inside.parts[0].removesuffix(".py")
        text = path.read_text()
        found.append(
            Module(path.relative_to(root), "" if room == "__init__" else room, text, ast.parse(text))
        )
    return found


def imports(library: Sequence[Module]) -> dict[tuple[str, str], list[str]]:
    """Return the edges between rooms: (importing, imported) -> places."""
    rooms = {module.room for module in library}
    edges: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in library:
        for node in _at_run_time(module.tree):
            for name in _imported(node, module):
                parts = name.split(".")
                room = parts[1] if len(parts) > 1 and parts[1] in rooms else ""
                if parts[0] == PACKAGE and room != module.room:
                    edges[module.room, room].append(module.at(node, f"imports {name}"))
    return edges


def _at_run_time(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from _at_run_time(other)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from _at_run_time(node)


def _imported(node: ast.Import | ast.ImportFrom, module: Module) -> list[str]:
    """Dotted names; of `from a import b`, `a.b`, since `b` may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = module.path.parts[: -node.level]
        base = ".".join([*package, base] if base else package)
    return [f"{base}.{alias.name}" for alias in node.names]


def order(root: Path, rooms: Iterable[str]) -> tuple[dict[str, int], str]:
    """Return the level of each room, 0 for the top, and where it is said."""
    rooms = {room for room in rooms if room}
    for path in sorted((root / "tests").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and target.id == "ROOMS":
                return _levels(ast.literal_eval(node.value), rooms), str(path.relative_to(root))  # type: ignore[attr-defined]
    contributing = root / "CONTRIBUTING.md"
    _, _, block = (
        contributing.read_text().partition(f"{PACKAGE}/\n") if contributing.exists() else ("", "", "")
    )
    lines = block.partition("\n```")[0].splitlines()
    written = _levels([tuple(re.findall(r"(\w+)(?:\.py|/)(?![\w/])", line)) for line in lines], rooms)
    if len(written) >= 0.8 * len(rooms):
        return written, contributing.name
    return _levels(ROOMS, rooms), "benchmarks/rooms.py"


def _levels(tiers: Iterable[str | tuple[str, ...]], rooms: Iterable[str]) -> dict[str, int]:
    known, levels = set(rooms), dict[str, int]()
    for level, tier in enumerate(tiers):
        for room in (tier,) if isinstance(tier, str) else tier:
            if room in known:
                levels.setdefault(room, level)
    return levels


def floors(rooms: Iterable[str], edges: Iterable[tuple[str, str]]) -> int:
    """The rooms on the longest way down; of rooms without circles."""
    below = defaultdict(list)
    for above, room in edges:
        below[above].append(room)

    @functools.cache
    def depth(room: str) -> int:
        return 1 + max(map(depth, below[room]), default=0)

    return max(map(depth, rooms))


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the sets of nodes that reach one another, of two or more.

    >>> circles([("a", "b"), ("b", "c"), ("c", "b")])
    [['b', 'c']]
    """
    after: dict[str, set[str]] = defaultdict(set)
    for above, below in edges:
        after[above].add(below)

    def reached(start: str) -> set[str]:
        seen, pending = set[str](), [start]
        while pending:
            for node in after.get(pending.pop(), set()) - seen:
                seen.add(node)
                pending.append(node)
        return seen

    reach = {node: reached(node) for node in after}
    sets = {frozenset(b for b in reach[a] if a in reach.get(b, set())) for a in reach if a in reach[a]}
    return sorted(sorted(each) for each in sets if len(each) > 1)
