"""Every recipe in configs/ resolves: its keys, names and values are those of the stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diffalign import cli
from diffalign.common.config import load_recipe
from diffalign.common.plugins import names, plugin_name
from diffalign.diffusion.process import Process
from diffalign.stages.check import check
from diffalign.stages.score import score
from diffalign.stages.train import train

FOLDER = Path(__file__).parent.parent / "configs"
EVERYTHING = sorted(FOLDER.glob("*.yaml"))
CHECKS = [
    path for path in EVERYTHING if f"diffalign check --config configs/{path.name}" in path.read_text("utf-8")
]
CACHES = [
    path
    for path in EVERYTHING
    if f"diffalign cache --config configs/{path.name}" in path.read_text("utf-8")
    and "\ncache:" not in path.read_text("utf-8")
]
SINGLE = [path for path in EVERYTHING if "steps" not in yaml.safe_load(path.read_text(encoding="utf-8"))]
CONFIGS = [path for path in SINGLE if path not in (*CHECKS, *CACHES)]
SCORERS = sorted((FOLDER / "scorers").glob("*.yaml"))
OF_SEVERAL = [path for path in EVERYTHING if path not in SINGLE]


def test_there_are_recipes() -> None:
    assert len(CONFIGS) >= 3 and len(CHECKS) >= 3 and len(CACHES) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_resolves_and_keeps_what_the_file_says(path: Path) -> None:
    recipe = load_recipe(train, str(path), ["out=runs/test"])
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in _flat(written).items():
        resolved = _flat(recipe.resolved)[key]
        assert type(value)(resolved) == value if isinstance(value, float) else resolved == value, key


def test_every_scorer_has_a_recipe() -> None:
    assert {path.stem for path in SCORERS} >= set(names("scorers"))


@pytest.mark.parametrize("path", SCORERS, ids=lambda path: path.stem)
def test_recipe_of_a_scorer_resolves_and_keeps_what_the_file_says(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert f"diffalign score --config configs/scorers/{path.name} images=DIR out=OUT" in text
    for said in ("Scale", "icence", "Verification level"):
        assert said in text.split("scorers:\n")[0], said
    recipe = load_recipe(score, str(path), ["images=DIR", "out=OUT"])
    for label, options in yaml.safe_load(text)["scorers"].items():
        resolved = recipe.resolved["scorers"][label]
        for key, value in (options or {}).items():
            assert resolved[key] == value, key


@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_recipe_of_a_check_resolves_and_keeps_what_the_file_says(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "Verification level" in text
    recipe = load_recipe(check, str(path), ["data=pickapic", "data.path=a/b", "data.split=train", "out=OUT"])
    resolved = _flat(recipe.resolved)
    for key, value in _flat(yaml.safe_load(text)).items():
        assert resolved[key] == ("a/b" if key == "data.path" else value), key
    assert recipe.resolved["dedup"] != "none" or recipe.resolved["split"]  # it does something


@pytest.mark.parametrize("path", CACHES, ids=lambda path: path.stem)
def test_recipe_of_a_cache_resolves_and_keeps_what_the_file_says(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = path.read_text(encoding="utf-8").split("model:\n")[0]
    for said in ("Disk:", "Memory:", "Time:", "Verification level"):
        assert said in header, said
    assert cli.main(["cache", "--config", str(path), "--dry-run", "out=OUT"]) == 0
    resolved = _flat(yaml.safe_load(capsys.readouterr().out))
    for key, value in _flat(yaml.safe_load(path.read_text(encoding="utf-8"))).items():
        assert resolved[key] == value, key


@pytest.mark.parametrize("path", OF_SEVERAL, ids=lambda path: path.stem)
def test_recipe_of_several_verbs_resolves(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--config", str(path), "--dry-run", "prompts=a cat"]) == 0
    assert capsys.readouterr().out.count("# step") >= 3
    header = path.read_text(encoding="utf-8")
    assert f"diffalign --config configs/{path.name}" in header and "Verification level" in header


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_of_a_flow_says_its_own_beta(path: Path) -> None:
    arguments = load_recipe(train, str(path), ["out=runs/test"]).arguments
    if plugin_name(arguments["model"]) in ("sd3", "flux"):
        assert arguments["objective"].doubtful_default(Process.flow(1000)) is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_passes_the_dry_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config", str(path), "--dry-run", "out=runs/test"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["out"] == "runs/test"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_says_how_to_run_it_and_how_far_it_is_verified(path: Path) -> None:
    header = "".join(
        line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#")
    )
    assert f"diffalign train --config configs/{path.name}" in header
    assert "Verification level" in header


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
