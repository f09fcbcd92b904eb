"""The order of the rooms: imports run down, never back up, and no two packages need each other."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_holo

ROOT = Path(hf_holo.__file__).parent
# From the ground up; what stands in one line may know its neighbours, as long as no circle comes of it.
FLOORS = (
    {"errors", "files", "moved", "peft_defaults", "references"},
    {"modeling"},
    {"registry", "data", "recipes", "prefix", "distributed"},
    {"eval"},
    {"conversion", "training", "export", "hub", "generate", "chat", "serve", "testing"},
    {"hf_holo"},  # __init__: what is public
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# modeling/ goes along with checkpoints: it needs what transformers needs, and nothing else.
ALLOWED_IN_MODELING = {"torch", "numpy", "transformers", "safetensors", "PIL", *sys.stdlib_module_names}


def room_of(module: str) -> str:
    """`hf_holo.eval.cost` stands in the room `eval`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it, by their full names."""
    package = module_of(file).split(".") if file.name == "__init__.py" else module_of(file).split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "hf_holo":  # `from .. import generate` names a module
                yield from (f"hf_holo.{alias.name}" for alias in node.names)
            else:
                yield module


def arrows() -> set[tuple[str, str, str]]:
    """Room, other room, and the file that imports it."""
    return {
        (room_of(module_of(file)), room_of(module), file.relative_to(ROOT).as_posix())
        for file in ROOT.rglob("*.py")
        for module in imports(file)
        if module.split(".")[0] == "hf_holo" and room_of(module) != room_of(module_of(file))
    }


def test_every_room_has_its_floor():
    rooms = {room_of(module_of(file)) for file in ROOT.rglob("*.py")}
    assert rooms == set(FLOOR), "name its place among FLOORS"


def test_no_arrow_runs_upward():
    found = arrows()
    assert {("training", "eval"), ("eval", "modeling"), ("data", "errors")} <= {arrow[:2] for arrow in found}
    assert [arrow for arrow in sorted(found) if FLOOR[arrow[0]] < FLOOR[arrow[1]]] == []


def test_no_circle_between_packages():
    graph: dict[str, set[str]] = {}
    for room, other, _ in arrows():
        graph.setdefault(room, set()).add(other)
    order = list(TopologicalSorter(graph).static_order())  # a circle raises CycleError, which names it
    assert order.index("errors") < order.index("registry") < order.index("eval") < order.index("training")


@pytest.mark.parametrize("file", sorted(ROOT.glob("modeling/*.py")), ids=lambda file: file.name)
def test_modeling_needs_only_what_transformers_needs(file):
    foreign = {module for module in imports(file) if module.split(".")[0] not in ALLOWED_IN_MODELING}
    assert all(module.startswith("hf_holo.modeling") for module in foreign), foreign
