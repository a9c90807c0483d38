"""Rapidata's votes as soft labels."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.common.errors import UserError
from diffalign.data.sources import _parquet
from diffalign.data.sources.rapidata import Plugin
from tests.pickapic_files import BLUE, RED

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("image1", IMAGE),
        ("image2", IMAGE),
        ("votes_image1", pa.int64()),
        ("votes_image2", pa.int64()),
        ("model1", pa.string()),
        ("model2", pa.string()),
        ("detailed_results", pa.string()),
        ("image1_path", pa.string()),
        ("image2_path", pa.string()),
    ]
)


def row(prompt: str = "a cat", first: int | None = 7, second: int | None = 3) -> dict[str, object]:
    return {
        "prompt": prompt,
        "image1": {"bytes": RED, "path": None},
        "image2": {"bytes": BLUE, "path": None},
        "votes_image1": first,
        "votes_image2": second,
        "model1": "flux",
        "model2": "sd3",
        "detailed_results": '{"votes": []}',
        "image1_path": "flux/1_0.jpg",
        "image2_path": "sd3/1_0.jpg",
    }


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return str(path)


def contract_case(folder: Path) -> dict[str, object]:
    return {"path": write(folder / "train.parquet", [row(), row("a dog", 0, 9), row("a cow", 5, 5)])}


def test_labels_are_the_share_of_the_votes(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [row(), row(first=0, second=5), row(first=4, second=4)])
    records = list(Plugin(path).records())
    assert [[c.label for c in record.candidates] for record in records] == [
        [0.7, 0.3],
        [0.0, 1.0],
        [0.5, 0.5],
    ]
    assert [[c.votes for c in record.candidates] for record in records] == [[7, 3], [0, 5], [4, 4]]
    assert [c.model for c in records[0].candidates] == ["flux", "sd3"]
    assert [c.extra for c in records[0].candidates] == [{"path": "flux/1_0.jpg"}, {"path": "sd3/1_0.jpg"}]
    assert [c.image.data for c in records[0].candidates] == [RED, BLUE]
    groups = Plugin(path).usable()
    assert [group.target for group in groups] == [0.7, 0.0]
    assert groups.tally.dropped == {"tie": ["t.parquet:2"]}


def test_shares_of_odd_counts_are_a_preference(tmp_path: Path) -> None:
    """Two quotients of floats sum to 1 well within the tolerance of a label."""
    path = write(tmp_path / "t.parquet", [row(first=a, second=26 - a) for a in range(27)])
    for votes, record in enumerate(Plugin(path).records()):
        assert record.pair_target() == pytest.approx(votes / 26, abs=1e-12)


def test_no_votes_are_unlabelled_and_counts_that_are_none_are_bad(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.parquet", [row(), row(first=0, second=0), row(first=None), row(first=-3, second=3)]
    )
    groups = Plugin(path, max_bad_share=1.0).usable()
    assert len(list(groups)) == 1
    assert groups.tally.dropped == {
        "unlabelled": ["t.parquet:1"], "bad_label": ["t.parquet:2", "t.parquet:3"],
    }  # fmt: skip


def test_the_numbered_splits_are_parts_of_one(tmp_path: Path) -> None:
    for part, prompt in (("train_0002", "b"), ("train_0001", "a"), ("test_0001", "c")):
        write(tmp_path / "data" / f"{part}-00000-of-00001.parquet", [row(prompt)])
    assert [r.prompt for r in Plugin(str(tmp_path), split="train").records()] == ["a", "b"]
    assert [r.prompt for r in Plugin(str(tmp_path), split="train_0002").records()] == ["b"]
    with pytest.raises(UserError, match="holds the splits test, train: choose"):
        list(Plugin(str(tmp_path)).records())
    with pytest.raises(UserError, match=r"unknown split of .* 'train_0009'"):
        list(Plugin(str(tmp_path), split="train_0009").records())


def test_the_numbered_splits_of_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of the hub on a folder: which of its splits are read, and their ids."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for part, prompt in (("train_0002", "b"), ("train_0001", "a"), ("test_0001", "c")):
        write(tmp_path / "d" / "data" / f"{part}-00000-of-00001.parquet", [row(prompt)])
    folder = str(tmp_path / "d")
    assert _parquet.hub_split_names(folder, None) == ["test_0001", "train_0001", "train_0002"]
    source = Plugin("owner/name", split="train", revision="0" * 40)
    source.path = folder  # it would be found here, and is asked for as if it were on the hub
    assert source.hub_splits() == ["train_0001", "train_0002"]
    streamed = [
        source.record(f"{split}:{index}", found)
        for split in source.hub_splits()
        for index, found in enumerate(_parquet.hub_rows(folder, split, None, source.layouts))
    ]
    assert [(r.id, r.prompt, r.pair_target()) for r in streamed] == [
        ("train_0001:0", "a", 0.7), ("train_0002:0", "b", 0.7),
    ]  # fmt: skip
    assert streamed[0].candidates[0].image.data == RED


def test_other_columns_are_named(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row()], schema=SCHEMA)
    pq.write_table(table.rename_columns({"votes_image1": "weighted_results_image1"}), tmp_path / "t.parquet")
    with pytest.raises(
        UserError, match=r"has no column votes_image1 \(it has prompt, image1, image2, weighted"
    ):
        list(Plugin(str(tmp_path / "t.parquet")).records())
    text = table.set_column(3, "votes_image1", pa.array(["7"]))
    pq.write_table(text, tmp_path / "t.parquet")
    with pytest.raises(UserError, match="column votes_image1 holds string, which is not the Rapidata layout"):
        list(Plugin(str(tmp_path / "t.parquet")).records())
