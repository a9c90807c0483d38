"""The project's own record file as a source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.common.errors import UserError
from diffalign.common.manifest import identities
from diffalign.data.sources.jsonl import Plugin
from tests.pickapic_files import jpeg


def write(folder: Path, rows: list[dict[str, object]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(name: str, prompt: str = "a cat", labels: tuple[float, float] = (1.0, 0.0)) -> dict[str, object]:
    candidates = [{"image": f"{side}.jpg", "label": label} for side, label in enumerate(labels)]
    return {"id": name, "prompt": prompt, "candidates": candidates}


def test_file_or_folder_with_limit_and_prompts(tmp_path: Path) -> None:
    path = write(tmp_path, [pair("x"), pair("y", "a dog"), pair("z")])
    for place in (path, tmp_path):
        assert [record.id for record in Plugin(str(place)).records()] == ["x", "y", "z"]
    (tmp_path / "p.txt").write_text("a cat\n")
    assert [record.id for record in Plugin(str(path), prompts=str(tmp_path / "p.txt")).records()] == [
        "x",
        "z",
    ]
    assert [record.id for record in Plugin(str(path), limit=2).records()] == ["x", "y"]
    assert Plugin(str(tmp_path)).inputs()["jsonl:preferences.jsonl"] == path


def test_pictures_are_beside_the_file_and_a_missing_one_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path, [pair("x"), pair("tied", labels=(0.5, 0.5)), {**pair("gone"), "id": "gone"}])
    (tmp_path / "0.jpg").write_bytes(jpeg(1, (16, 16)))
    pairs = Plugin(str(path), max_bad_share=1.0).usable()
    with pytest.raises(UserError, match="none of 3 rows is usable"):
        list(pairs)
    assert pairs.tally.dropped == {"missing_image": ["x", "gone"], "tie": ["tied"]}
    (tmp_path / "1.jpg").write_bytes(jpeg(2, (16, 8)))
    (first, second) = Plugin(str(path)).usable()
    assert [image.size for image in first.images] == [(16, 16), (16, 8)]
    assert (first.target, second.record.id) == (1.0, "gone")


def test_inputs_change_with_a_picture_or_the_subset(tmp_path: Path) -> None:
    """A run that was stopped may not go on with other pictures or captions under the same names."""
    write(tmp_path, [pair("x"), pair("y", "a dog")])
    (tmp_path / "p.txt").write_text("a cat\n")
    for name in ("0.jpg", "1.jpg"):
        (tmp_path / name).write_bytes(jpeg(1))

    def now(**options: str) -> object:
        return identities(Plugin(str(tmp_path), **options).inputs())

    subset = {"prompts": str(tmp_path / "p.txt")}
    before, before_subset = now(), now(**subset)
    assert now() == before != before_subset == now(**subset)
    (tmp_path / "p.txt").write_text("a cat\na cow\n")
    assert now() == before and now(**subset) != before_subset
    (tmp_path / "1.jpg").write_bytes(jpeg(2))
    changed = now()
    (tmp_path / "1.jpg").unlink()
    assert before != changed != now() != before


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*preferences\.jsonl; give a jsonl file of records"):
        list(Plugin(str(tmp_path)).records())
    path = write(tmp_path, [])
    with pytest.raises(UserError, match="has no rows"):
        list(Plugin(str(path)).records())
    write(tmp_path, [pair("x"), pair("x")])
    with pytest.raises(UserError, match="two records have the id 'x'"):
        list(Plugin(str(path)).records())
    write(tmp_path, [pair("x"), {"prompt": "p"}])
    with pytest.raises(UserError, match=r"preferences\.jsonl:2: no candidates"):
        list(Plugin(str(path)).records())
