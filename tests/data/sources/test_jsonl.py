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


def test_text_that_no_file_can_hold_is_a_bad_row(tmp_path: Path) -> None:
    half = {"id": "half \ud800", "prompt": "a cat", "candidates": [{"image": "x\ud800.jpg"}]}
    path = write(tmp_path, [pair("x"), half, {**pair("y"), "meta": {"\udfff": 1}}])
    found = [(record.id, record.problem) for record in Plugin(str(path)).records()]
    assert found == [("x", None), ("preferences.jsonl:2", "bad_text"), ("preferences.jsonl:3", "bad_text")]
    identities(Plugin(str(path)).inputs())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "meta": ' + '{"a": ' * 9000 + "1" + "}" * 9001, ":1 is not JSON"),
        (
            f'{{"prompt": "p", "candidates": [{{"image": "a", "rank": 1{"0" * 400}}}]}}',
            "a number of 401 digits",
        ),
    ],
)
def test_what_python_cannot_hold_is_said(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "preferences.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        list(Plugin(str(tmp_path)).records())


@pytest.mark.parametrize("text", ["[]", '"x"', '{"scores": 3}', '{"scores": {"clip": {}}}'])
def test_a_manifest_of_somebody_else_says_nothing(text: str, tmp_path: Path) -> None:
    write(tmp_path, [pair("x")])
    (tmp_path / "manifest.json").write_text(text)
    assert Plugin(str(tmp_path)).score_facts() == {}


def contract_case(folder: Path) -> dict[str, object]:
    path = write(folder, [pair("x"), pair("y", "a dog", (0.0, 1.0)), pair("z", "a cow", (0.7, 0.3))])
    for side in (0, 1):
        (folder / f"{side}.jpg").write_bytes(jpeg(side + 1))
    return {"path": str(path)}
