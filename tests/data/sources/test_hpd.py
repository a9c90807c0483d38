"""HPD v2 and v3: JSON rows and a folder of pictures."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from diffalign.common.errors import UserError
from diffalign.data.sources import _json
from diffalign.data.sources.hpd import Plugin
from tests.pickapic_files import jpeg

V2_PAIR = {"prompt": "a cat", "human_preference": [0, 1], "file_path": ["a.jpg", "b.jpg"]}
V2_LIST = {
    "prompt": "a dog",
    "image_path": ["a.jpg", "b.jpg", "c.jpg"],
    "rank": [3, 1, 2],
    "raw_annotations": [{"rank": [3, 1, 2], "user_hash": "u"}],
}
V3 = {
    "prompt": "a cow",
    "path1": "images/w.jpg",
    "path2": "images/l.jpg",
    "confidence": 0.97,
    "choice_dist": [12, 3],
    "model1": "kolors",
    "model2": "sd2",
}


def write(path: Path, rows: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def pictures(folder: Path, *names: str) -> None:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(10 * shade))


def contract_case(folder: Path) -> dict[str, object]:
    pictures(folder / "train", "a.jpg", "b.jpg")
    rows = [V2_PAIR, {**V2_PAIR, "prompt": "a fish", "human_preference": [1, 0]}, {**V2_PAIR, "prompt": "x"}]
    return {"path": write(folder / "train.json", rows), "images": str(folder / "train")}


def test_v2_pairs_keep_the_order_and_the_labels_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "train.json", [V2_PAIR, {**V2_PAIR, "human_preference": [1, 0]}])
    first, second = Plugin(path).records()
    assert (first.id, first.prompt, first.source, first.meta) == ("train.json:0", "a cat", "hpd", {})
    assert [candidate.image.path for candidate in first.candidates] == [
        tmp_path / "a.jpg",
        tmp_path / "b.jpg",
    ]
    assert (first.pair_target(), second.pair_target()) == (0.0, 1.0)
    (tmp_path / "train").mkdir()
    (moved,) = Plugin(path, images=str(tmp_path / "train"), limit=1).records()
    assert moved.candidates[0].image.path == tmp_path / "train" / "a.jpg"
    with pytest.raises(UserError, match=r"data\.images=.*/gone: no such folder; give the one"):
        list(Plugin(path, images=str(tmp_path / "gone")).records())


def test_v2_lists_keep_rank_and_annotations(tmp_path: Path) -> None:
    (record,) = Plugin(write(tmp_path / "test.json", [V2_LIST])).records()
    assert [candidate.rank for candidate in record.candidates] == [3.0, 1.0, 2.0]
    assert [candidate.image.path.name for candidate in record.candidates] == ["a.jpg", "b.jpg", "c.jpg"]
    assert record.meta == {"raw_annotations": V2_LIST["raw_annotations"]}
    pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (group,) = Plugin(write(tmp_path / "test.json", [V2_LIST])).usable(unit="list")
    assert len(group.images) == 3


def test_v3_gives_the_winner_no_place_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "all.json", [{**V3, "prompt": str(index)} for index in range(400)])
    records = list(Plugin(path).records())
    for record in records:
        winner, loser = sorted(record.candidates, key=lambda candidate: -candidate.label)
        assert (winner.label, loser.label) == (1.0, 0.0)
        assert winner.image.path == tmp_path / "images" / "w.jpg" and winner.model == "kolors"
        assert loser.image.path == tmp_path / "images" / "l.jpg" and loser.model == "sd2"
        assert record.meta == {"confidence": 0.97, "choice_dist": [12, 3]}
    first = sum(record.pair_target() == 1.0 for record in records)
    assert 160 <= first <= 240  # 200 expected, four standard deviations
    places = [record.pair_target() for record in records]
    assert places == [record.pair_target() for record in Plugin(path).records()]
    (tmp_path / "one.txt").write_text("300\n")
    (alone,) = Plugin(path, prompts=str(tmp_path / "one.txt")).records()  # a subset moves nothing
    assert (alone.id, alone.pair_target()) == ("all.json:300", places[300])


def test_v3_needs_no_more_than_prompt_and_paths_and_may_be_lines(tmp_path: Path) -> None:
    row = {key: V3[key] for key in ("prompt", "path1", "path2")}
    (tmp_path / "v3.jsonl").write_text(f"{json.dumps(row)}\n\n{json.dumps(V3)}\n")
    bare, full = Plugin(str(tmp_path / "v3.jsonl")).records()
    assert (bare.id, bare.meta, {candidate.model for candidate in bare.candidates}) == (
        "v3.jsonl:0", {}, {None},
    )  # fmt: skip
    assert full.id == "v3.jsonl:1" and full.meta["confidence"] == 0.97


BROKEN = [
    ({"human_preference": [1, 10**400]}, "bad_label"),
    ({"prompt": 7}, "bad_text"),
    ({"prompt": "half \ud800"}, "bad_text"),
    ({"file_path": ["a.jpg"]}, "not_a_pair"),
    ({"file_path": "a.jpg"}, "not_a_pair"),
    ({"file_path": ["a.jpg", None]}, "not_a_pair"),
    ({"human_preference": None}, "bad_label"),
    ({"human_preference": [1]}, "bad_label"),
    ({"human_preference": [1, 1]}, "bad_label"),
    ({"human_preference": [0, 0]}, "bad_label"),
    ({"human_preference": ["1", "0"]}, "bad_label"),
    ({"human_preference": [float("nan"), 0]}, "bad_label"),
    ({"file_path": ["gone.jpg", "a.jpg"]}, "missing_image"),
    ({"file_path": ["a\0.jpg", "a.jpg"]}, "missing_image"),
]


@pytest.mark.parametrize(("change", "reason"), BROKEN, ids=lambda value: str(value)[:30])
def test_a_row_that_cannot_be_read_is_dropped_and_named(tmp_path: Path, change: dict, reason: str) -> None:
    pictures(tmp_path, "a.jpg", "b.jpg")
    path = write(tmp_path / "train.json", [V2_PAIR, {**V2_PAIR, **change}, V2_PAIR])
    groups = Plugin(path, max_bad_share=0.5).usable()
    assert [group.id for group in groups] == ["train.json:0", "train.json:2"]
    assert groups.tally.dropped == {reason: ["train.json:1"]} and groups.tally.bad_share == pytest.approx(
        1 / 3
    )


@pytest.mark.parametrize(
    ("row", "change", "reason"),
    [
        (V2_LIST, {"prompt": []}, "bad_text"),
        (V2_LIST, {"image_path": None}, "not_a_list"),
        (V2_LIST, {"image_path": ["a.jpg"], "rank": [1]}, "not_a_list"),
        (V2_LIST, {"rank": [1, 2]}, "bad_label"),
        (V2_LIST, {"rank": [1, 2, True]}, "bad_label"),
        (V3, {"prompt": {}}, "bad_text"),
        (V3, {"path2": None}, "not_a_pair"),
    ],
)
def test_rows_of_the_other_layouts_too(tmp_path: Path, row: dict, change: dict, reason: str) -> None:
    pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg", "images/w.jpg", "images/l.jpg")
    path = write(tmp_path / "rows.json", [row, {**row, **change}])
    groups = Plugin(path, max_bad_share=0.5).usable(unit="list" if row is V2_LIST else "pair")
    assert [group.id for group in groups] == ["rows.json:0"]
    assert groups.tally.dropped == {reason: ["rows.json:1"]}


def test_other_layouts_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [{"prompt": "a", "chosen": "b"}])
    with pytest.raises(
        UserError, match=r"x\.json: the first row has prompt, chosen; expected prompt, file_path"
    ):
        list(Plugin(path).records())
    with pytest.raises(UserError, match=r"expected prompt, path1, path2 \(v3\)$"):
        list(Plugin(write(tmp_path / "x.json", [V2_PAIR]), layout="v3").records())
    both = write(tmp_path / "x.json", [{**V2_LIST, **V2_PAIR}])
    with pytest.raises(UserError, match=r"fits several layouts: choose data\.layout=v2_pairs or v2_lists"):
        list(Plugin(both).records())
    assert [len(record.candidates) for record in Plugin(both, layout="v2_lists").records()] == [3]
    with pytest.raises(UserError, match=r"unknown data\.layout 'v2': known: auto, v2_lists"):
        Plugin(both, layout="v2")
    with pytest.raises(UserError, match=r"is a folder: give one of x\.json$"):
        list(Plugin(str(tmp_path)).records())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}', "the list does not end"),
        ('[{"a": 1}, {"a"', "not JSON from row 1 on .*download complete"),
        ('[{"a": 1} {"a": 2}]', "expected ',' or ']'"),
        ('[{"a": 1}]]', "something follows the list"),
        ('[{"a": 1}, 2]', "row 1 is int; expected a list of JSON objects"),
        ('{"a": 1}\n[2]', "row 1 is list"),
        ('{"a": 1} nonsense', "not JSON from row 1 on"),
        ("[" * 100_000, "not JSON from row 0 on"),
    ],
)
def test_broken_json_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        list(_json.json_rows(tmp_path / "x.json"))
    assert "\n" not in str(caught.value)


def test_rows_across_chunks_and_every_form_of_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": 'ünï 🐱 \\" [{', "n": [index, -1.5e3]} for index in range(50)]
    path = tmp_path / "x.json"
    for chunk in (1, 7, 64):
        monkeypatch.setattr(_json, "CHUNK", chunk)
        for text in (json.dumps(rows), json.dumps(rows, indent=1, ensure_ascii=False), "[ ]", "\ufeff[]", ""):
            path.write_text(text, encoding="utf-8")
            found = list(_json.json_rows(path))
            assert [row for _, row in found] == (rows if "prompt" in text else [])
            assert [where for where, _ in found] == [f"x.json:{index}" for index in range(len(found))]


def test_a_row_that_does_not_end_is_not_read_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_json, "CHUNK", 1000)
    monkeypatch.setattr(_json, "LONGEST_ROW", 5000)
    (tmp_path / "x.json").write_text('[{"a": "' + "x" * 1_000_000 + '"}]')
    with pytest.raises(UserError, match="not JSON from row 0 on"):
        list(_json.json_rows(tmp_path / "x.json"))


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_json, "CHUNK", 1 << 16)
    row = json.dumps({**V2_PAIR, "prompt": "x" * 1000})
    (tmp_path / "train.json").write_text("[" + ",\n".join([row] * 5000) + "]")  # 5 MB
    source = Plugin(str(tmp_path / "train.json"))
    tracemalloc.start()
    assert sum(1 for _ in source.records()) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
