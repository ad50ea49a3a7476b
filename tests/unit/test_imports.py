"""No module of the package imports itself by way of others, imports inside functions included."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import image_classifier

PACKAGE = Path(image_classifier.__file__).parent


def read_imports(path: Path, modules: set[str]) -> set[str]:
    """Read which modules of the package a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {node.module} & modules
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    modules = {path: name.removesuffix(".__init__") for path, name in names.items()}
    graph = {name: read_imports(path, set(modules.values())) for path, name in modules.items()}
    assert len(graph) > 100 and sum(map(len, graph.values())) > 500
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"these modules import each other: {' -> '.join(error.args[1])}") from error
    assert set(order) == set(graph)
