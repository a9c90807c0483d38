"""Plug-ins are found by file name; listing and aliases import nothing."""

import sys
from pathlib import Path

import pytest

import diffalign.objectives
from diffalign.common import plugins
from diffalign.common.errors import UserError

KINDS = ("objectives", "models", "scorers", "data.sources")

MODULE = """
from dataclasses import dataclass
aliases = ("margin-loss", "ml")
@dataclass
class Plugin:
    beta: float = 0.5
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A second folder of objectives, forgotten after the test."""
    monkeypatch.setattr(diffalign.objectives, "__path__", [*diffalign.objectives.__path__, str(tmp_path)])
    spec = diffalign.objectives.__spec__
    assert spec is not None
    monkeypatch.setattr(spec, "submodule_search_locations", [*diffalign.objectives.__path__])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("diffalign.objectives.extra"):
            del sys.modules[name]


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_the_files_without_underscore(kind: str) -> None:
    package = Path(plugins.__file__).parent.parent / kind.replace(".", "/")
    files = sorted(path.stem for path in package.glob("*.py") if not path.name.startswith("_"))
    assert plugins.names(kind) == files


@pytest.mark.parametrize("kind", KINDS)
def test_every_plugin_is_a_dataclass_that_knows_its_name(kind: str) -> None:
    for name in plugins.names(kind):
        assert plugins.plugin_name(plugins.get(kind, name)) == name


@pytest.mark.parametrize("kind", KINDS)
def test_aliases_resolve_and_shadow_nothing(kind: str) -> None:
    names = plugins.names(kind)
    aliases = [(alias, name) for name in names for alias in plugins._aliases(kind, name)]
    assert len({alias for alias, _ in aliases}) == len(aliases)
    for alias, name in aliases:
        assert alias not in names and plugins.resolve(kind, alias) == name


def test_a_new_module_is_a_new_plugin(folder: Path) -> None:
    (folder / "extra_margin.py").write_text(MODULE)
    (folder / "_helper.py").write_text("raise RuntimeError('never imported')")
    (folder / "extra_broken.py").write_text("raise RuntimeError('imported only when asked for')")
    assert {"extra_margin", "extra_broken"} <= set(plugins.names("objectives"))
    assert "_helper" not in plugins.names("objectives")
    for name in ("extra_margin", "extra-margin", "margin_loss", "margin-loss", "ml"):
        assert plugins.get("objectives", name)().beta == 0.5
    assert plugins.plugin_name(plugins.get("objectives", "ml")()) == "extra_margin"


def test_unknown_names_the_nearest_alias_or_name(folder: Path) -> None:
    (folder / "extra_margin.py").write_text(MODULE)
    with pytest.raises(UserError, match="unknown objective 'margin_los': did you mean 'margin_loss'"):
        plugins.get("objectives", "margin_los")


def test_a_package_that_is_not_installed_is_named(folder: Path) -> None:
    (folder / "extra_needy.py").write_text("import no_such_package_here")
    with pytest.raises(UserError, match="'extra_needy' needs the package 'no_such_package_here'"):
        plugins.get("objectives", "extra_needy")


def test_a_module_without_plugin_is_the_authors_mistake(folder: Path) -> None:
    (folder / "extra_empty.py").write_text("")
    with pytest.raises(TypeError, match="must expose a dataclass named Plugin"):
        plugins.get("objectives", "extra_empty")
