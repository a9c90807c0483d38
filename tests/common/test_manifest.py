"""A manifest says what made an artefact."""

from pathlib import Path

import pytest

from diffalign.common.files import file_identity
from diffalign.common.manifest import read_manifest, recipe_identity, versions, write_manifest


def test_manifest_round_trip(tmp_path: Path) -> None:
    data = tmp_path / "data.parquet"
    data.write_bytes(b"rows")
    out = tmp_path / "out"
    assert read_manifest(out) is None
    path = write_manifest(
        out,
        stage="train",
        recipe={"seed": 3, "path": Path("x")},
        inputs={"data": data, "also": str(data), "hub": "owner/name@rev"},
        seed=3,
        counts={"asked": 10, "used": 8},
        dropped={"tie": ["a:1", "a:2"]},
        extra={"model": "abc"},
    )
    assert path == out / "manifest.json"
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["stage"] == "train" and manifest["seed"] == 3 and manifest["model"] == "abc"
    assert manifest["recipe"] == {"seed": 3, "path": "x"}
    assert manifest["counts"] == {"asked": 10, "used": 8} and manifest["dropped"] == {"tie": ["a:1", "a:2"]}
    identity = {"path": str(data), **file_identity(data)}
    assert manifest["inputs"] == {"data": identity, "also": identity, "hub": {"name": "owner/name@rev"}}
    assert manifest["versions"]["torch"] == versions()["torch"]


def test_extra_may_not_replace_an_entry(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed"):
        write_manifest(tmp_path, stage="x", recipe={}, extra={"seed": 1})
    assert not list(tmp_path.iterdir())


def test_recipe_identity_depends_on_content_alone() -> None:
    assert recipe_identity({"a": 1, "b": {"c": (1, 2)}}) == recipe_identity({"b": {"c": [1, 2]}, "a": 1})
    assert recipe_identity({"a": 1}) != recipe_identity({"a": 2})
    assert recipe_identity({"a": 1}) != recipe_identity({"a": "1"})
