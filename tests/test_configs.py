"""Every recipe in configs/ resolves: its keys, names and values are those of the stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diffalign.common.config import load_recipe
from diffalign.stages.train import train

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert len(CONFIGS) >= 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_resolves_and_keeps_what_the_file_says(path: Path) -> None:
    recipe = load_recipe(train, str(path), ["out=runs/test"])
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in _flat(written).items():
        resolved = _flat(recipe.resolved)[key]
        assert type(value)(resolved) == value if isinstance(value, float) else resolved == value, key


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
