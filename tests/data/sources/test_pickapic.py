"""The Pick-a-Pic layout from files, folders and the streaming reader of `datasets`."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.common.errors import UserError
from diffalign.data.census import Census, findings
from diffalign.data.pictures import BadImage
from diffalign.data.sources._parquet import hub_rows
from diffalign.data.sources.pickapic import LAYOUT, Plugin, to_record
from tests.pickapic_files import BLUE, RED, SCHEMA, messy_rows, row, spoil, write


def ids(source: Plugin) -> list[str]:
    return [record.id for record in source.records()]


def test_every_row_becomes_a_record_whatever_its_state(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", messy_rows(), row_group_size=6)
    source = Plugin(str(path))
    records = list(source.records())
    assert [record.id for record in records] == [f"train.parquet:{index}" for index in range(20)]
    assert source.size() == 20
    first = records[0]
    assert (first.prompt, first.source, first.user) == ("a cat", "pickapic", "42")
    assert first.meta == {"ranking_id": 7, "num_example_per_prompt": 3}
    assert [candidate.model for candidate in first.candidates] == ["sdxl", "dreamlike"]
    assert [candidate.extra for candidate in first.candidates] == [{"uid": "u0"}, {"uid": "u1"}]
    assert [candidate.image.data for candidate in first.candidates] == [RED, BLUE]
    assert [record.pair_target() for record in records[:4]] == [1.0, 0.0, 0.5, None]
    assert records[3].candidates[0].label is None  # has_label is false: its 0.5 is a placeholder
    assert math.isnan(records[13].candidates[0].label or 0.0)
    assert records[17].pair_target() is None
    with pytest.raises(BadImage, match=r"picture train\.parquet:6:jpg_1: is absent"):
        records[6].candidates[1].image.open()


def test_a_null_caption_is_an_empty_prompt_and_optional_columns_may_be_absent(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row(None)], schema=SCHEMA).select(list(LAYOUT.needed))
    pq.write_table(table, tmp_path / "t.parquet")
    (record,) = Plugin(str(tmp_path / "t.parquet")).records()
    assert (record.prompt, record.user, record.meta, record.pair_target()) == ("", None, {}, 1.0)
    assert record.candidates[0].model is None


def latin1(path: Path, caption: bytes, at: int = 1, rows: int = 3) -> Path:
    """Writes rows of which one has a caption that is not UTF-8; parquet files exist that hold such."""
    table = pa.Table.from_pylist([row(f"a cat {index}") for index in range(rows)], schema=SCHEMA)
    captions = [f"a cat {index}".encode() for index in range(rows)]
    captions[at] = caption
    place = SCHEMA.get_field_index("caption")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table.set_column(place, "caption", pa.array(captions, pa.binary()).view(pa.string())), path
    )
    return path


def test_a_caption_that_is_not_utf8_is_dropped_and_named(tmp_path: Path) -> None:
    path = latin1(tmp_path / "t.parquet", "ein grünes Haus".encode("latin-1"))
    source = Plugin(str(path), max_bad_share=0.5)
    assert [(record.id, record.prompt) for record in source.records()] == [
        ("t.parquet:0", "a cat 0"), ("t.parquet:1", ""), ("t.parquet:2", "a cat 2"),
    ]  # fmt: skip
    pairs = source.usable()
    assert [pair.record.id for pair in pairs] == ["t.parquet:0", "t.parquet:2"]
    assert pairs.tally.dropped == {"bad_text": ["t.parquet:1"]} and pairs.tally.bad_share == 1 / 3
    census = Census()
    for finding in findings(source.records()):
        census.add(finding, ties="drop")
    assert census.problems == pairs.tally.dropped and census.bad_share == 1 / 3
    (tmp_path / "p.txt").write_text("a cat 2\n")
    assert ids(Plugin(str(path), prompts=str(tmp_path / "p.txt"))) == ["t.parquet:2"]


def test_a_hub_stream_that_breaks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    latin1(tmp_path / "d" / "train-00000-of-00001.parquet", b"caf\xe9", at=20, rows=24)
    with pytest.raises(
        UserError, match=r"the stream of .* broke at row 20 \(.*utf-8.*\): run again, or download"
    ) as caught:
        list(hub_rows(str(tmp_path / "d"), "train", None, [LAYOUT]))
    assert "\n" not in str(caught.value)


def test_image_feature_columns_and_float32_labels(tmp_path: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "caption": pa.array(["a cat"], pa.large_string()),
            "jpg_0": pa.array([{"bytes": RED, "path": None}], image),
            "jpg_1": pa.array([None], image),
            "label_0": pa.array([0.0], pa.float32()),
            "label_1": pa.array([1], pa.int8()),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    (record,) = Plugin(str(tmp_path / "t.parquet")).records()
    assert record.candidates[0].image.open().size == (16, 16)
    assert record.candidates[1].image.data is None
    assert record.pair_target() == 0.0


def test_only_the_needed_columns_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [row(image_0_url="http://x"), row("b")])
    spoil(path, "image_0_url")
    spoil(path, "created_at")
    assert [record.prompt for record in Plugin(str(path)).records()] == ["a cat", "b"]
    spoil(path, "jpg_1")
    with pytest.raises(UserError, match=r"t\.parquet cannot be read from row 0 on"):
        list(Plugin(str(path)).records())


def peak_of_reading(path: Path) -> int:
    before = pa.total_allocated_bytes()
    return max(pa.total_allocated_bytes() - before for _ in Plugin(str(path)).records())


def test_captions_are_read_without_the_pictures(tmp_path: Path) -> None:
    """Of all shards, in order, as often as they stand there; not on a hub, and nothing is asked there."""
    for number, captions in enumerate((["a", None, "a"], ["b"])):
        path = write(tmp_path / f"train-{number:05d}-of-00002.parquet", [row(text) for text in captions])
        for column in ("jpg_0", "jpg_1", "label_0"):
            spoil(path, column)
    assert list(Plugin(str(tmp_path)).captions() or ()) == ["a", "", "a", "b"]
    assert list(Plugin(str(tmp_path), limit=2).captions() or ()) == ["a", ""]
    (tmp_path / "some.txt").write_text("a\n")
    assert Plugin(str(tmp_path), prompts=str(tmp_path / "some.txt")).captions() is None
    assert Plugin("owner/pick", split="train").captions() is None


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    size = 64_000
    rows = [row(first=os.urandom(size), second=os.urandom(size)) for _ in range(256)]
    pages = write(tmp_path / "pages.parquet", rows, use_dictionary=False, write_batch_size=8)
    assert pq.ParquetFile(pages).num_row_groups == 1  # 32 MB, of which 16 rows hold 2
    assert peak_of_reading(pages) < 12_000_000
    # By default pyarrow writes all pictures of a row group as one page: 8 MB that have to be there at once,
    # and once more decompressed, but one group at a time.
    groups = write(tmp_path / "groups.parquet", rows, row_group_size=64)
    assert peak_of_reading(groups) < 24_000_000


def test_folder_of_shards_by_split(tmp_path: Path) -> None:
    for name, captions in {
        "train-00001-of-00002-cc.parquet": "cd",
        "train-00000-of-00002-aa.parquet": "ab",
        "validation-00000-of-00001-bb.parquet": "e",
        "validation_unique-00000-of-00001-dd.parquet": "f",
    }.items():
        write(tmp_path / "data" / name, [row(caption) for caption in captions])
    (tmp_path / "data" / "readme.txt").write_text("no shard")
    train = Plugin(str(tmp_path), split="train")
    assert ids(train) == [
        f"train-0000{i}-of-00002-{h}.parquet:{r}" for i, h in ((0, "aa"), (1, "cc")) for r in (0, 1)
    ]
    assert [record.prompt for record in train.records()] == ["a", "b", "c", "d"]
    assert train.size() == 4
    assert [record.prompt for record in Plugin(str(tmp_path / "data"), split="validation").records()] == ["e"]
    with pytest.raises(
        UserError, match=r"holds the splits train, validation, validation_unique: choose with data.split="
    ):
        list(Plugin(str(tmp_path)).records())
    with pytest.raises(UserError, match=r"unknown split of .* 'tran': did you mean 'train'\?"):
        list(Plugin(str(tmp_path), split="tran").records())
    single = str(tmp_path / "data" / "train-00000-of-00002-aa.parquet")
    assert Plugin(single).size() == Plugin(single, split="train").size() == 2
    with pytest.raises(UserError, match="unknown split"):
        list(Plugin(single, split="test").records())


def test_folder_with_one_folder_a_split(tmp_path: Path) -> None:
    write(tmp_path / "default" / "train" / "0000.parquet", [row("a")])
    write(tmp_path / "default" / "test" / "0000.parquet", [row("b")])
    write(tmp_path / ".cache" / "train" / "0001.parquet", [row("hidden")])
    assert ids(Plugin(str(tmp_path), split="test")) == ["default/test/0000.parquet:0"]


def test_limit_and_subset_by_prompt(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.parquet", [row(caption) for caption in ("a", "b", " a ", "c", "a")], row_group_size=2
    )
    (tmp_path / "captions.txt").write_text("a\n\n  c\n", encoding="utf-8")
    chosen = str(tmp_path / "captions.txt")
    assert ids(Plugin(str(path), prompts=chosen)) == [f"t.parquet:{index}" for index in (0, 2, 3, 4)]
    assert ids(Plugin(str(path), prompts=chosen, limit=2)) == ["t.parquet:0", "t.parquet:2"]
    limited = Plugin(str(path), limit=3)
    assert (len(ids(limited)), limited.size()) == (3, 3)
    assert Plugin(str(path), limit=9).size() == 5
    assert Plugin(str(path), prompts=chosen).size() is None


def test_pictures_of_row_groups_without_an_asked_caption_are_never_read(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [row(caption) for caption in "abcd"], row_group_size=2)
    spoil(path, "jpg_0", group=0)
    (tmp_path / "captions.txt").write_text("d\n")
    assert ids(Plugin(str(path), prompts=str(tmp_path / "captions.txt"))) == ["t.parquet:3"]


def test_missing_and_foreign_columns_are_named(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row()], schema=SCHEMA)
    write(tmp_path / "a" / "train-00000-of-00002.parquet", [row()])
    pq.write_table(
        table.drop_columns(["caption", "label_1"]), tmp_path / "a" / "train-00001-of-00002.parquet"
    )
    with pytest.raises(
        UserError, match=r"00001-of-00002\.parquet has no columns caption, label_1 \(it has are_diff"
    ):
        next(Plugin(str(tmp_path / "a")).records())  # found out before the first row of the first shard
    pq.write_table(table.drop_columns(["jpg_0", "jpg_1"]), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"has no columns jpg_0, jpg_1 .*this variant has no pictures"):
        next(Plugin(str(tmp_path / "b.parquet")).records())
    text = table.set_column(table.column_names.index("label_0"), "label_0", pa.array(["1.0"]))
    pq.write_table(text, tmp_path / "c.parquet")
    with pytest.raises(UserError, match="column label_0 holds string"):
        next(Plugin(str(tmp_path / "c.parquet")).records())


def test_places_without_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.parquet: no such file or folder"):
        list(Plugin(str(tmp_path / "gone.parquet")).records())
    with pytest.raises(UserError, match="the folder holds no parquet file"):
        list(Plugin(str(tmp_path)).records())
    (tmp_path / "cut.parquet").write_bytes(write(tmp_path / "t.parquet", [row()]).read_bytes()[:-20])
    with pytest.raises(
        UserError, match=r"cut\.parquet is no readable parquet file .*download complete\?"
    ) as caught:
        list(Plugin(str(tmp_path / "cut.parquet")).records())
    assert "\n" not in str(caught.value)
    empty = write(tmp_path / "empty.parquet", [])
    with pytest.raises(UserError, match=r"empty\.parquet has no rows$"):
        list(Plugin(str(empty)).records())
    (tmp_path / "captions.txt").write_text("z\n")
    with pytest.raises(UserError, match=r"has no rows with a caption of data\.prompts="):
        list(Plugin(str(tmp_path / "t.parquet"), prompts=str(tmp_path / "captions.txt")).records())
    with pytest.raises(UserError, match="is no readable text file"):
        list(Plugin(str(tmp_path / "t.parquet"), prompts=str(tmp_path / "none.txt")).records())


def test_arguments_are_checked_when_the_source_is_made(tmp_path: Path) -> None:
    path = str(write(tmp_path / "t.parquet", [row()]))
    with pytest.raises(UserError, match="limit=0"):
        Plugin(path, limit=0)
    with pytest.raises(UserError, match=r"max_bad_share=1.5"):
        Plugin(path, max_bad_share=1.5)
    with pytest.raises(UserError, match="ties='coin'"):
        Plugin(path, ties="coin")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"data.revision=v2 is for hub data sets"):
        Plugin(path, revision="v2")
    with pytest.raises(UserError, match="say which split"):
        Plugin("owner/name")


def test_usable_pairs_follow_the_options_of_the_source(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", messy_rows())
    with pytest.raises(UserError, match=r"t\.parquet: 43\.8% of the rows"):
        list(Plugin(str(path)).usable())
    assert len(list(Plugin(str(path), max_bad_share=0.5).usable())) == 9
    assert len(list(Plugin(str(path), max_bad_share=0.5, ties="soft").usable())) == 10
    assert len(list(Plugin(str(path), max_bad_share=0.5).usable(limit=4))) == 4


def test_inputs_are_the_files_read(tmp_path: Path) -> None:
    one = write(tmp_path / "train-00000-of-00002.parquet", [row()])
    two = write(tmp_path / "train-00001-of-00002.parquet", [row()])
    write(tmp_path / "test-00000-of-00001.parquet", [row()])
    inputs = Plugin(str(tmp_path), split="train").inputs()
    assert inputs == {f"pickapic:{one.name}": one, f"pickapic:{two.name}": two}


def test_more_than_a_gigabyte_is_named_by_sizes_and_tails(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [row()])
    footer = path.read_bytes()
    with path.open("wb") as stream:  # a hole of 1.1 GB in front costs no disk
        stream.seek(1_100_000_000)
        stream.write(footer)
    (identity,) = Plugin(str(path)).inputs().values()
    assert str(identity).startswith(f"size={1_100_000_000 + len(footer)} tail_sha256=")


def test_hub_input_names_the_pinned_commit() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    source = Plugin("owner/pick", split="train", revision=commit)
    assert source.inputs() == {"pickapic": f"hub:owner/pick@{commit} split=train"}
    assert (source.files(), source.size()) == ([], None)


def test_streaming_reader_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    write(tmp_path / "d" / "data" / "train-00000-of-00002.parquet", messy_rows()[:10])
    write(tmp_path / "d" / "data" / "train-00001-of-00002.parquet", messy_rows()[10:])
    write(tmp_path / "d" / "data" / "test-00000-of-00001.parquet", [row("other")])
    streamed = list(hub_rows(str(tmp_path / "d"), "train", None, [LAYOUT]))  # the same reader, on a folder
    assert len(streamed) == 20
    assert set(streamed[0]) == {*LAYOUT.needed, *LAYOUT.optional}
    records = [to_record(f"train:{index}", content) for index, content in enumerate(streamed)]
    local = list(Plugin(str(tmp_path / "d"), split="train").records())
    assert [record.prompt for record in records] == [record.prompt for record in local]
    assert [c.image.data for r in records for c in r.candidates] == [
        c.image.data for r in local for c in r.candidates
    ]
    assert records[3].pair_target() is None
    write(tmp_path / "e" / "data" / "train-00000-of-00001.parquet", [row()])
    table = pa.Table.from_pylist([row()], schema=SCHEMA).drop_columns(["caption"])
    pq.write_table(table, tmp_path / "e" / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"e has no column caption \(it has are_different"):
        next(hub_rows(str(tmp_path / "e"), "train", None, [LAYOUT]))


def test_a_hub_name_that_does_not_open_is_one_line() -> None:
    """Neither for its rows nor for its identity: a branch instead of a commit would be another one."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    for ask in (
        lambda: next(Plugin("owner/pick", split="train").records()),
        lambda: next(Plugin("owner/pick", split="train", revision=commit).records()),
        lambda: Plugin("owner/pick", split="train").inputs(),
    ):
        with pytest.raises(UserError) as caught:  # the default ring is offline
            ask()
        text = str(caught.value)
        assert text.startswith(
            "data.path=owner/pick is neither a file or folder here nor a hub data set that opens ("
        )
        assert "\n" not in text


def contract_case(folder: Path) -> dict[str, object]:
    rows = [row("a cat"), row("a dog", labels=(0.0, 1.0)), row("a fish", labels=(0.5, 0.5)), row("a cow")]
    return {"path": str(write(folder / "train.parquet", rows))}
