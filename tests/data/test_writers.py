"""What is written is what was read: parquet column by column, jsonl record by record."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.common.errors import UserError
from diffalign.data import writers
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record, Score, read_records, write_records
from diffalign.data.sources.jsonl import Plugin as Jsonl
from diffalign.data.sources.pickapic import Plugin as PickaPic
from diffalign.data.writers import ScoreTotals, open_set
from tests.drawn_pictures import encoded
from tests.pickapic_files import BLUE, RED, SCHEMA, row, write

SAME = ["caption", "has_label", "image_0_uid", "image_1_uid", "jpg_0", "jpg_1", "label_0", "label_1"]
SAME += ["model_0", "model_1", "ranking_id", "user_id", "num_example_per_prompt"]


def written(records: Iterable[Record], folder: Path, kind: str) -> dict[str, int]:
    """Writes a set into a new folder; returns what it could not hold."""
    folder.mkdir()
    with open_set(folder, kind, "train") as writer:
        for record in records:
            writer.add(record)
    return dict(writer.lost)


def columns(folder: Path) -> dict[str, list[Any]]:
    (path,) = folder.glob("*.parquet")
    return pq.read_table(path).to_pydict()


def rows_of_every_kind() -> list[dict[str, Any]]:
    return [
        row("a cat", encoded(1), encoded(2), user_id=-5, ranking_id=2**62),
        row(
            "ein Haus, 日本", encoded(3, kind="PNG"), encoded(4), (0.0, 1.0), image_0_uid="x", image_1_uid="y"
        ),
        row("tie", labels=(0.5, 0.5)),
        row("unlabelled", labels=(0.5, 0.5), has_label=False),
        row("soft", labels=(0.7, 0.3)),
        row("gaps", user_id=None, model_0=None, ranking_id=None, num_example_per_prompt=None),
        row("no names", image_0_uid=None, image_1_uid=None),
    ]


def test_pickapic_stays_what_it_was(tmp_path: Path) -> None:
    rows = rows_of_every_kind()
    source = write(tmp_path / "in" / "train-00000-of-00001.parquet", rows)
    lost = written(PickaPic(str(source)).records(), tmp_path / "out", "pickapic")
    assert lost == {}
    found = columns(tmp_path / "out")
    assert list(found) == SCHEMA.names and pq.read_schema(next((tmp_path / "out").glob("*"))).equals(SCHEMA)
    expected = pq.read_table(source).to_pydict()
    for name in SAME:
        assert found[name] == expected[name], name
    assert found["best_image_uid"] == ["u0", "y", "tie", None, "u0", "u0", None]
    assert found["are_different"] == [True] * 7
    assert found["created_at"] == found["image_0_url"] == [None] * 7  # never read
    assert found["__index_level_0__"] == list(range(7))
    again = list(PickaPic(str(tmp_path / "out"), split="train").records())
    assert [record.pair_target() for record in again] == [1.0, 0.0, 0.5, None, 0.7, 1.0, 1.0]


def test_pairs_survive_the_way_over_pickapic(tmp_path: Path) -> None:
    for seed in range(4):
        (tmp_path / f"{seed}.png").write_bytes(encoded(seed, kind="PNG"))
    pictures = [ImageRef(path=tmp_path / f"{seed}.png") for seed in range(4)]
    meta = {"ranking_id": 3, "num_example_per_prompt": 1}
    records = [
        Record("a", "one", [Candidate(pictures[0], label=0.7, model="m", extra={"uid": "u"}),
                            Candidate(pictures[1], label=0.3, model="n", extra={"uid": "v"})], "s", user="7"),
        Record("b", "two", [Candidate(pictures[2]), Candidate(pictures[3])], "s", meta=meta),
    ]  # fmt: skip
    write_records(tmp_path / "preferences.jsonl", records)
    assert written(Jsonl(str(tmp_path)).records(), tmp_path / "parquet", "pickapic") == {}
    assert written(PickaPic(str(tmp_path / "parquet")).records(), tmp_path / "back", "jsonl") == {}
    for before, after in zip(records, Jsonl(str(tmp_path / "back")).records(), strict=True):
        assert replace(after, candidates=[], id="", source="") == replace(
            before, candidates=[], id="", source=""
        )
        for one, other in zip(before.candidates, after.candidates, strict=True):
            assert other.image.read() == one.image.read()
            assert replace(other, image=one.image) == one


def test_jsonl_keeps_every_field_and_refers_to_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1, kind="PNG"))
    score = Score(0.3, "cosine", "v1", {"higher_is_better": True})
    record = Record(
        "x", "p", [
            Candidate(ImageRef(path=tmp_path / "a.png"), prompt="q", model="m", seed=3,
                      scores={"clip": score}, label=0.5, rank=1.5, votes=4, extra={"mine": [1]}),
            Candidate(ImageRef(data=RED), label=0.5),
            Candidate(ImageRef(data=encoded(1, kind="WEBP"))),
        ], "src", condition={"k": 1}, user="u", meta={"m": None}, extra={"e": "ü"},
    )  # fmt: skip
    assert written([record, replace(record, id="y")], tmp_path / "out", "jsonl") == {}
    first, second = read_records(tmp_path / "out" / "preferences.jsonl")
    assert replace(second, id="x") == first
    assert first.candidates[0] == replace(
        record.candidates[0], image=ImageRef(path=tmp_path / "out" / ".." / "a.png")
    )
    assert replace(first, candidates=[]) == replace(record, candidates=[])
    # Pictures in memory become files of their own format, each once.
    assert sorted(path.suffix for path in (tmp_path / "out" / "images").iterdir()) == [".jpg", ".webp"]
    assert first.candidates[1].image.read() == RED
    with Image.open(first.candidates[2].image.path) as image:
        assert image.format == "WEBP"


def test_what_pickapic_cannot_hold_is_counted(tmp_path: Path) -> None:
    candidate = Candidate(
        ImageRef(data=RED), seed=1, rank=2, label=1.0, scores={"clip": Score(1)}, extra={"uid": 5}
    )
    other = Candidate(ImageRef(data=BLUE), label=0.0, votes=2)
    record = Record("a", "p", [candidate, other], user="alice", condition=1, meta={"ranking_id": "x"})
    plain = Record(
        "b", "p", [replace(candidate, seed=None, rank=None, scores={}, extra={}), other], user="007"
    )
    lost = written([record, plain], tmp_path / "out", "pickapic")
    assert lost == {
        "seed": 1, "rank": 1, "scores": 1, "uid": 1, "votes": 2, "user": 2, "condition": 1, "ranking_id": 1
    }  # fmt: skip
    found = columns(tmp_path / "out")
    assert found["user_id"] == found["ranking_id"] == found["image_0_uid"] == [None, None]


@pytest.mark.parametrize("user", [str(2**63), "1.0", "²", "--1", "", " 1"])
def test_users_that_are_no_64_bit_numbers_are_not_bent_into_one(tmp_path: Path, user: str) -> None:
    pair = [Candidate(ImageRef(data=RED), label=1.0), Candidate(ImageRef(data=BLUE), label=0.0)]
    assert written([Record("a", "p", pair, user=user)], tmp_path / "out", "pickapic") == {"user": 1}


def test_a_name_that_is_no_utf8_is_written_out(tmp_path: Path) -> None:
    odd = tmp_path / "caf\udce9.jpg"
    odd.write_bytes(RED)
    pair = [Candidate(ImageRef(path=odd), label=1.0), Candidate(ImageRef(data=BLUE), label=0.0)]
    written([Record("a", "p", pair)], tmp_path / "out", "chosen_rejected")
    (row,) = pq.read_table(tmp_path / "out" / "train-00000-of-00001.parquet").to_pylist()
    assert row["chosen"] == {"bytes": RED, "path": "caf\\udce9.jpg"}


def test_chosen_and_rejected_as_datasets_shows_them(tmp_path: Path) -> None:
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    (tmp_path / "a.png").write_bytes(encoded(1, kind="PNG"))
    pair = [Candidate(ImageRef(data=RED), label=0.2), Candidate(ImageRef(path=tmp_path / "a.png"), label=0.8)]
    other = [replace(pair[0], label=1.0), replace(pair[1], label=0.0)]
    lost = written([Record("a", "p", pair), Record("b", "q", other)], tmp_path / "out", "chosen_rejected")
    assert lost == {"label": 1}  # 0.8 is not 1
    table = pq.read_table(tmp_path / "out" / "train-00000-of-00001.parquet")
    assert table.to_pylist() == [
        {
            "prompt": "p",
            "chosen": {"bytes": encoded(1, kind="PNG"), "path": "a.png"},
            "rejected": {"bytes": RED, "path": None},
        },
        {
            "prompt": "q",
            "chosen": {"bytes": RED, "path": None},
            "rejected": {"bytes": encoded(1, kind="PNG"), "path": "a.png"},
        },
    ]
    features = Features.from_arrow_schema(table.schema)
    assert features["chosen"] == features["rejected"] == ImageFeature()
    shown = Dataset(table)[0]["chosen"]
    assert (
        shown.size == (32, 32) and shown.tobytes() == Image.open(io.BytesIO(encoded(1, kind="PNG"))).tobytes()
    )


@pytest.mark.parametrize("label", [0.5, None])
def test_chosen_needs_a_decision(tmp_path: Path, label: float | None) -> None:
    pair = [Candidate(ImageRef(data=RED), label=label), Candidate(ImageRef(data=BLUE), label=label)]
    with pytest.raises(UserError, match="record a is not decided: chosen_rejected cannot hold it"):
        written([Record("a", "p", pair)], tmp_path / "out", "chosen_rejected")


def test_shards_and_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = [Candidate(ImageRef(data=RED), label=1.0), Candidate(ImageRef(data=BLUE), label=0.0)]
    one = len(RED) + len(BLUE)
    monkeypatch.setattr(writers, "GROUP_BYTES", 3 * one)
    monkeypatch.setattr(writers, "SHARD_BYTES", 7 * one)
    written((Record(str(n), f"p{n}", pair) for n in range(14)), tmp_path / "out", "pickapic")
    names = [f"train-{n:05d}-of-00003.parquet" for n in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    files = [pq.ParquetFile(tmp_path / "out" / name) for name in names]
    groups = [[file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] for file in files]
    assert groups == [[3, 3], [3, 3], [2]]
    assert [record.prompt for record in PickaPic(str(tmp_path / "out")).records()] == [
        f"p{n}" for n in range(14)
    ]
    monkeypatch.setattr(writers, "GROUP_ROWS", 2)
    written((Record(str(n), f"p{n}", pair) for n in range(3)), tmp_path / "few", "pickapic")
    few = pq.ParquetFile(tmp_path / "few" / "train-00000-of-00001.parquet").metadata
    assert [few.row_group(g).num_rows for g in range(few.num_row_groups)] == [2, 1]


@pytest.mark.parametrize("kind", ["jsonl", "pickapic"])
def test_text_that_is_no_utf8_is_one_line(tmp_path: Path, kind: str) -> None:
    pair = [Candidate(ImageRef(data=RED), model="\ud800"), Candidate(ImageRef(data=BLUE))]
    with pytest.raises(UserError, match=r"record r.ud800 holds text that is not UTF-8"):
        written([Record("r\ud800", "p", pair)], tmp_path / "out", kind)


def test_a_disk_that_is_full_is_what_is_said(tmp_path: Path) -> None:
    """Closing a file that could not be written fails too, and would hide why."""
    pair = [Candidate(ImageRef(data=RED), label=1.0), Candidate(ImageRef(data=BLUE), label=0.0)]
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="full"), open_set(tmp_path / "out", "pickapic", "train") as writer:
        writer.add(Record("a", "p", pair))
        writer._flush()  # type: ignore[attr-defined]
        writer.add(Record("b", "p", pair))
        writer._writer.file_handle.close()  # type: ignore[attr-defined]
        raise OSError(28, "full")


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown format 'pickpic': did you mean 'pickapic'"):
        written([], tmp_path / "out", "pickpic")


def test_totals_of_scores() -> None:
    totals = ScoreTotals()
    for value, other in ((1.0, 2.0), (float("nan"), 4.0)):
        scores = [{"a": Score(value, "s", "v"), "b": Score(1.0, scale)} for scale in ("x", "y")]
        low = {"c": Score(other, extra={"higher_is_better": False})}
        candidates = [Candidate(ImageRef(), scores={**one, **low}) for one in scores]
        totals.add(Record("r", "p", candidates))
    assert totals.facts() == {  # b stands on two scales
        "a": {"scale": "s", "version": "v", "higher_is_better": True,
              "n": 2, "min": 1.0, "max": 1.0, "mean": 1.0},
        "c": {"scale": "", "version": "", "higher_is_better": False,
              "n": 4, "min": 2.0, "max": 4.0, "mean": 3.0},
    }  # fmt: skip
    assert json.dumps(totals.facts())
