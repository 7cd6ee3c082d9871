"""The package is a house of rooms: a room imports only from those below it, nobody imports Snakemake, none is long."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "workflow/scripts/stepdown"
# From the top down; what is not in a room is the ground that all stand on.
ROOMS = ("report", "recover", "prune", "measure", "packed", "models", "tensors", "plan", "ground")
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(PACKAGE.parent.glob("*.py"))
# What a reader takes in: a function on a screen, a module that is one thing.
FUNCTION_LINES, MODULE_LINES = 60, 480


def place(module):
    """Where a module is, from the package down: ("models", "decoder"), of a folder's __init__ the folder."""
    parts = module.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def room(parts):
    return parts[0] if parts and parts[0] in ROOMS else "ground"


def imports(module):
    """Of each import in a module, wherever it stands: its name from the package down, or that of another package."""
    package = module.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (("", *alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ("",)
            start += tuple(node.module.split(".")) if node.module else ()
            yield from ((*start, alias.name) for alias in node.names)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: ".".join(place(module)))
def test_imports_go_down(module):
    for name in imports(module):
        if name[0]:
            assert ROOMS.index(room(name)) >= ROOMS.index(room(place(module))), f"{module.name} imports {name}"
        assert name[:2] != ("", "snakemake") and name[:2] != ("", "stepdown"), f"{module.name} imports {name}"


def test_no_module_imports_itself_over_others():
    known = {place(module) for module in MODULES}
    graph = {}
    for module in MODULES:
        named = {part for name in imports(module) for part in (name, name[:-1])}
        graph[place(module)] = named & known - {(), place(module)}
    TopologicalSorter(graph).prepare()


def test_every_room_is_a_folder():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS) - {"ground"}


@pytest.mark.parametrize("module", [*MODULES, *SCRIPTS], ids=lambda module: str(module.relative_to(PACKAGE.parent)))
def test_nothing_is_longer_than_a_reader_takes_in(module):
    text = module.read_text()
    assert len(text.splitlines()) <= MODULE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{node.name} has {lines} lines"
