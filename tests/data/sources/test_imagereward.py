"""ImageRewardDB: the JSON of its test set, and one row a picture in parquet."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.common.errors import UserError
from diffalign.common.manifest import identities
from diffalign.data.records import Score
from diffalign.data.sources.imagereward import Plugin
from tests.pickapic_files import RED, jpeg

SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("classification", pa.string()),
        ("image_amount_in_total", pa.int8()),
        ("rank", pa.int8()),
        ("overall_rating", pa.int8()),
        ("image_text_alignment_rating", pa.int8()),
        ("fidelity_rating", pa.int8()),
    ]
)


def row(group: str, rank: int | None, **columns: object) -> dict[str, object]:
    return {
        "image": {"bytes": jpeg(20 * (rank or 0)), "path": None},
        "prompt_id": group,
        "prompt": f"prompt of {group}",
        "classification": "People",
        "image_amount_in_total": 3,
        "rank": rank,
        "overall_rating": 8 - (rank or 0),
        "image_text_alignment_rating": 5,
        "fidelity_rating": 7,
        **columns,
    }


def write(path: Path, rows: list[dict[str, object]], **options: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, **options)
    return str(path)


def listed(**change: object) -> dict[str, object]:
    return {
        "id": "005658-0040",
        "prompt": "a cat",
        "generations": ["images/a.webp", "images/b.webp", "images/c.webp"],
        "ranking": [2, 1, 2],
        **change,
    }


def contract_case(folder: Path) -> dict[str, object]:
    (folder / "images").mkdir(parents=True)
    for shade, name in enumerate("abc"):
        (folder / "images" / f"{name}.webp").write_bytes(jpeg(shade))
    rows = [listed(), listed(prompt="a dog", ranking=[1, 2, 3]), listed(prompt="a cow")]
    (folder / "test.json").write_text(json.dumps(rows))
    return {"path": str(folder / "test.json")}


def test_lists_of_the_json(tmp_path: Path) -> None:
    options = contract_case(tmp_path / "d")
    record = next(Plugin(**options).records())
    assert (record.id, record.prompt, record.meta) == ("test.json:0", "a cat", {"prompt_id": "005658-0040"})
    assert [candidate.rank for candidate in record.candidates] == [2.0, 1.0, 2.0]
    assert record.candidates[1].image.path == tmp_path / "d" / "images" / "b.webp"
    (moved, *_) = Plugin(**options, images=str(tmp_path)).records()
    assert moved.candidates[1].image.path == tmp_path / "images" / "b.webp"
    with pytest.raises(UserError, match=r"data\.images=.*/gone: no such folder"):
        list(Plugin(**options, images=str(tmp_path / "gone")).records())
    with pytest.raises(UserError, match=r"data\.split=test is for parquet"):
        Plugin(**options, split="test")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": 1}, "bad_text"),
        ({"generations": None}, "not_a_list"),
        ({"ranking": [1, 2]}, "bad_label"),
        ({"ranking": [1, 2, None]}, "bad_label"),
        ({"generations": ["images/a.webp", "x.webp", "y.webp"]}, "missing_image"),
    ],
)
def test_rows_of_the_json_that_cannot_be_read(tmp_path: Path, change: dict, reason: str) -> None:
    options = contract_case(tmp_path / "d")
    Path(options["path"]).write_text(json.dumps([listed(), listed(**change)]))
    groups = Plugin(**options, max_bad_share=0.5).usable(unit="list")
    assert [group.id for group in groups] == ["test.json:0"]
    assert groups.tally.dropped == {reason: ["test.json:1"]}


def test_rows_of_a_prompt_become_one_list_with_its_ratings(tmp_path: Path) -> None:
    """Across row groups and files, which cut lists anywhere."""
    rows = [row("p", 2), row("p", 1), row("p", 3), row("q", 1), row("q", 1), row("r", 1), row("r", 2)]
    write(tmp_path / "train-00000-of-00002.parquet", rows[:4], row_group_size=2)
    write(tmp_path / "train-00001-of-00002.parquet", rows[4:], row_group_size=2)
    records = list(Plugin(str(tmp_path)).records())
    assert [(record.id, record.prompt) for record in records] == [
        ("train-00000-of-00002.parquet:0", "prompt of p"),
        ("train-00000-of-00002.parquet:3", "prompt of q"),
        ("train-00001-of-00002.parquet:1", "prompt of r"),
    ]
    assert [[c.rank for c in record.candidates] for record in records] == [[2, 1, 3], [1, 1], [1, 2]]
    assert records[0].meta == {"prompt_id": "p", "classification": "People", "image_amount_in_total": 3}
    first = records[0].candidates[0]
    assert first.image.data == jpeg(40) and first.label is None
    assert first.scores == {
        "overall_rating": Score(6.0, "1-7", "ImageRewardDB"),
        "image_text_alignment_rating": Score(5.0, "1-7", "ImageRewardDB"),
        "fidelity_rating": Score(7.0, "1-7", "ImageRewardDB"),
    }
    assert Plugin(str(tmp_path)).size() is None
    assert [record.id for record in Plugin(str(tmp_path), limit=1).records()] == [records[0].id]
    groups = Plugin(str(tmp_path)).usable(unit="list")
    assert [len(group.images) for group in groups] == [3, 2, 2]


def test_a_subset_by_prompt_gives_whole_lists(tmp_path: Path) -> None:
    rows = [row("p", 1), row("q", 1), row("q", 2), row("q", 3), row("r", 1)]
    path = write(tmp_path / "t.parquet", rows, row_group_size=2)
    (tmp_path / "p.txt").write_text("prompt of q\n")
    (record,) = Plugin(path, prompts=str(tmp_path / "p.txt")).records()
    assert (record.id, [c.rank for c in record.candidates]) == ("t.parquet:1", [1, 2, 3])


def test_one_prompt_under_two_ids_is_two_lists(tmp_path: Path) -> None:
    rows = [row("p", 1), row("p", 2), row("q", 1, prompt="prompt of p"), row("q", 2, prompt="prompt of p")]
    records = list(Plugin(write(tmp_path / "t.parquet", rows)).records())
    assert [(record.id, record.prompt) for record in records] == [
        ("t.parquet:0", "prompt of p"), ("t.parquet:2", "prompt of p"),
    ]  # fmt: skip


def test_rows_that_are_apart_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [row("p", 1), row("q", 1), row("p", 2)])
    with pytest.raises(
        UserError, match=r"prompt_id p do not follow one another \(again at t\.parquet:2\): sort"
    ):
        list(Plugin(path).records())


def test_ratings_may_be_absent_and_a_rank_may_not(tmp_path: Path) -> None:
    bare = row("p", 1, overall_rating=None)
    path = write(tmp_path / "t.parquet", [bare, row("p", 2), row("q", 1), row("q", None)])
    good, bad = Plugin(path).records()
    assert set(good.candidates[0].scores) == {"image_text_alignment_rating", "fidelity_rating"}
    assert (good.problem, bad.problem) == (None, "bad_label")
    table = pq.read_table(path).select(["image", "prompt_id", "prompt", "rank"])
    pq.write_table(table, path)
    (record, _) = Plugin(path).records()
    assert record.candidates[0].scores == {} and record.meta == {"prompt_id": "p"}


def test_a_row_whose_text_is_not_utf8_leaves_its_list(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.Table.from_pylist([row("p", 1), row("p", 2), row("q", 1)], schema=SCHEMA)
    spoilt = pa.array([b"prompt of p", b"caf\xe9", b"prompt of q"], pa.binary()).view(pa.string())
    pq.write_table(table.set_column(2, "prompt", spoilt), path)
    found = [(record.id, record.problem, len(record.candidates)) for record in Plugin(str(path)).records()]
    assert found == [("t.parquet:0", None, 1), ("t.parquet:1", "bad_text", 0), ("t.parquet:2", None, 1)]


def test_metadata_that_names_files(tmp_path: Path) -> None:
    rows = [row("p", 1), row("p", 2)]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    path = tmp_path / "metadata-test.parquet"
    pq.write_table(table.set_column(0, "image_path", pa.array(["images/test/a.webp", ""])), path)
    with pytest.raises(UserError, match=r"names files: give the folder they are in, data\.images="):
        list(Plugin(str(path)).records())
    source = Plugin(str(path), images=str(tmp_path))
    (record,) = source.records()
    assert record.candidates[0].image.path == tmp_path / "images" / "test" / "a.webp"
    assert record.candidates[1].image.path is None
    before = identities(source.inputs())
    (tmp_path / "images" / "test").mkdir(parents=True)
    (tmp_path / "images" / "test" / "a.webp").write_bytes(RED)
    assert identities(source.inputs()) != before


def test_other_layouts_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"prompt": "a", "images": []}]')
    with pytest.raises(
        UserError, match=r"the first row has prompt, images; expected prompt, generations, rank"
    ):
        list(Plugin(str(tmp_path / "x.json")).records())
    pq.write_table(
        pa.Table.from_pylist([row("p", 1)], schema=SCHEMA).drop_columns(["rank"]), tmp_path / "t.parquet"
    )
    with pytest.raises(UserError, match=r"has no column rank \(it has image, prompt_id, prompt, classif"):
        list(Plugin(str(tmp_path / "t.parquet")).records())
