"""The floor plan holds: a room imports rooms below it, never a sibling in its own row.

All imports count, also those inside functions and under TYPE_CHECKING: they are read from the source text.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffalign"

ROWS = {
    "diffalign.__main__": 6,  # the door to cli
    "diffalign.cli": 5,
    "diffalign.demo": 4,
    "diffalign.stages": 3,
    "diffalign.training": 2,
    "diffalign.evaluation": 2,
    "diffalign.objectives": 1,
    "diffalign.models": 1,
    "diffalign.scorers": 1,
    "diffalign.data.sources": 1,
    "diffalign.diffusion": 0,
    "diffalign.data": 0,
    "diffalign.scenes": 0,
    "diffalign.common": -1,
}
KINDS = ("diffalign.objectives", "diffalign.models", "diffalign.scorers", "diffalign.data.sources")


class Import(NamedTuple):
    """One imported module of the package (`name`: what is taken out of it, None for the module itself)."""

    importer: str
    module: str
    name: str | None
    line: int


def module_of(path: Path, root: Path = ROOT) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """Returns every module of the package by its dotted name."""
    return {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(importer: str, source: str, known: set[str], is_package: bool) -> list[Import]:
    """Returns the package's own modules that a source text imports."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "diffalign":
                    found.append(Import(importer, alias.name, None, node.lineno))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: count up from the importer's package
                parts = importer.split(".")
                kept = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*kept, *([base] if base else [])])
            if base.split(".")[0] != "diffalign":
                continue
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                module, name = (inner, None) if inner in known else (base, alias.name)
                found.append(Import(importer, module, name, node.lineno))
    return found


def all_imports() -> list[Import]:
    known = modules()
    return [
        found
        for name, path in known.items()
        for found in imports_of(
            name, path.read_text(encoding="utf-8"), set(known), path.name == "__init__.py"
        )
    ]


def room_of(module: str) -> str | None:
    """Returns the room that a module lies in, None for the package itself."""
    rooms = [room for room in ROWS if module == room or module.startswith(room + ".")]
    return max(rooms, key=len) if rooms else None


def wrong_rows(imports: list[Import]) -> list[str]:
    """Returns the imports that go up or sideways."""
    wrong = []
    for found in imports:
        importer, imported = room_of(found.importer), room_of(found.module)
        if importer is None or imported is None or importer == imported:
            continue
        if ROWS[imported] >= ROWS[importer]:
            wrong.append(f"{found.importer}:{found.line} imports {found.module}: not below {importer}")
    return wrong


def is_plugin(module: str) -> bool:
    """Whether a module is a concrete plug-in (not a helper, not the package)."""
    kind, _, name = module.rpartition(".")
    return kind in KINDS and not name.startswith("_")


def functions_of(source: str) -> set[str]:
    return {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def wrong_plugin_imports(imports: list[Import], sources: dict[str, str]) -> list[str]:
    """Returns the imports of concrete plug-ins that are not a function taken by another objective.

    Everybody else finds plug-ins by name, `ensemble` too; only the demo, a recipe in code, names its own.
    """
    wrong = []
    for found in imports:
        if not is_plugin(found.module) or room_of(found.importer) == "diffalign.demo":
            continue
        objectives = "diffalign.objectives."
        if found.importer.startswith(objectives) and found.module.startswith(objectives):
            if found.name in functions_of(sources[found.module]):
                continue
        elif found.importer == "diffalign.objectives" and found.name in functions_of(sources[found.module]):
            continue
        wrong.append(f"{found.importer}:{found.line} imports the plug-in {found.module} ({found.name})")
    return wrong


def test_every_module_lies_in_a_room() -> None:
    homeless = [name for name in modules() if room_of(name) is None and name != "diffalign"]
    assert homeless == []


def test_rooms_import_only_rooms_below() -> None:
    found = all_imports()
    assert len(found) > 30  # the walk sees the package
    assert wrong_rows(found) == []


def test_nobody_imports_a_plugin_by_its_module() -> None:
    sources = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
    assert wrong_plugin_imports(all_imports(), sources) == []


def test_common_stands_alone() -> None:
    upward = [i for i in all_imports() if room_of(i.importer) == "diffalign.common"]
    assert {room_of(found.module) for found in upward} <= {"diffalign.common"}


@pytest.mark.parametrize(
    ("importer", "line", "allowed"),
    [
        ("diffalign.training.loop", "from diffalign.objectives._base import Output", True),
        ("diffalign.training.loop", "from diffalign.evaluation.drift import drift", False),
        ("diffalign.training.loop", "from diffalign.stages.train import train", False),
        ("diffalign.objectives.sft", "import diffalign.models", False),
        ("diffalign.objectives.sft", "from ..scorers import load_scorer", False),
        ("diffalign.objectives.sft", "from .._no import x", True),
        ("diffalign.data.loader", "from diffalign.data.sources.jsonl import Plugin", False),
        ("diffalign.data.sources.jsonl", "from diffalign.data import records", True),
        ("diffalign.data.loader", "from diffalign.diffusion import process", False),
        ("diffalign.common.files", "from diffalign.data.records import Record", False),
        ("diffalign.demo", "from diffalign.stages.train import train", True),
        ("diffalign.scenes.draw", "def f():\n    from diffalign.data import records", False),
    ],
)
def test_the_row_rule_sees_what_it_should(importer: str, line: str, allowed: bool) -> None:
    found = imports_of(importer, line, set(modules()), is_package=False)
    assert (wrong_rows(found) == []) == allowed


@pytest.mark.parametrize(
    ("importer", "line", "allowed"),
    [
        ("diffalign.objectives.other", "from diffalign.objectives.one import one_loss", True),
        ("diffalign.objectives.other", "from diffalign.objectives.one import Plugin", False),
        ("diffalign.objectives.other", "from diffalign.objectives import one", False),
        ("diffalign.training.loop", "from diffalign.objectives.one import one_loss", False),
        ("diffalign.scorers.ensemble", "from diffalign.scorers import load_scorer", True),
        ("diffalign.scorers.ensemble", "from diffalign.scorers.clip import Plugin", False),
        ("diffalign.models.sdxl", "from diffalign.models._unet import UNetModel", True),
        ("diffalign.models.sdxl", "from diffalign.models.sd import Plugin", False),
    ],
)
def test_the_plugin_rule_sees_what_it_should(importer: str, line: str, allowed: bool) -> None:
    one = "diffalign.objectives.one"
    sources = {one: "class Plugin: pass\ndef one_loss(): pass"}
    known = {*modules(), one}
    found = imports_of(importer, line, known, is_package=False)
    assert (wrong_plugin_imports(found, sources) == []) == allowed
