"""The census counts what hand counting counts."""

from __future__ import annotations

import pytest

from diffalign.data.census import Census, clip_pieces, findings
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record
from diffalign.data.select import UsableGroups
from diffalign.data.sources.pickapic import to_record
from tests.pickapic_files import BLUE, RED, jpeg, messy_rows, row


def messy() -> list[Record]:
    return [to_record(f"f:{index}", content) for index, content in enumerate(messy_rows())]


def census_of(records: list[Record], ties: str = "drop") -> Census:
    census = Census()
    for finding in findings(records):
        census.add(finding, ties=ties)
    return census


def test_counts_of_the_messy_rows() -> None:
    report = census_of(messy()).report(path="here")
    assert report["path"] == "here"
    assert report["rows"] == 20
    assert report["prompts"] == 17  # "a cat" four times
    assert (report["decided"], report["ties"], report["unlabelled"]) == (14, 2, 2)
    # First preferred: rows 0, 4, 5, 6, 7, 10, 11, 12, 15; second: 1, 8, 9, 18, 19.
    assert report["first_preferred"] == 9
    assert report["problems"] == {
        "unlabelled": ["f:3", "f:17"],
        "corrupt_image": ["f:4", "f:5", "f:16"],
        "missing_image": ["f:6", "f:19"],
        "bad_label": ["f:13", "f:14"],
        "tiny_image": ["f:15"],
    }
    # 40 places, one without picture (6) and one without bytes (19).
    assert report["images"] == 38
    # RED, BLUE, the wide one, the truncated one, "not an image", the dot.
    assert report["distinct_images"] == 6
    # Not decoded: 4, 5, 15 and 16, one picture each; 1 is 24 wide.
    assert report["sizes"] == {"16x16": 38 - 4 - 1, "24x16": 1}
    assert report["pairs_of_two_sizes"] == 1
    assert (report["empty_captions"], report["long_captions"]) == (["f:10"], ["f:11"])
    assert report["non_ascii_captions"] == 1
    assert report["same_picture_twice"] == ["f:18"]


def test_duplicates_whatever_the_order_and_those_that_disagree() -> None:
    report = census_of(messy()).report()
    assert report["duplicates"] == [
        {"row": "f:7", "same_as": "f:0"},
        {"row": "f:8", "same_as": "f:0"},
        {"row": "f:9", "same_as": "f:0"},
    ]
    assert report["conflicting_duplicates"] == [{"row": "f:9", "same_as": "f:0"}]


def test_rows_that_share_only_the_caption_or_only_the_pictures_are_no_duplicates() -> None:
    rows = [
        row(),
        row("another"),
        row("a cat", jpeg(7), BLUE),
        row("a cat", RED, None),
        row("a cat", RED, None),
    ]
    census = census_of([to_record(str(index), content) for index, content in enumerate(rows)])
    assert census.duplicates == []


@pytest.mark.parametrize("ties", ["drop", "soft"])
def test_usable_and_bad_share_are_what_training_finds(ties: str) -> None:
    pairs = UsableGroups(messy(), ties=ties, max_bad_share=1.0)
    used = len(list(pairs))
    census = census_of(messy(), ties)
    assert census.usable == used == {"drop": 9, "soft": 10}[ties]
    assert census.bad_share == pairs.tally.bad_share == {"drop": 7 / 16, "soft": 8 / 18}[ties]


def test_lists_are_counted_as_no_pairs_and_their_pictures_all_the_same() -> None:
    listed = Record("l", "p", [Candidate(ImageRef(data=jpeg(shade), name=str(shade))) for shade in (1, 2, 3)])
    report = census_of([listed]).report()
    assert report["problems"] == {"not_a_pair": ["l"]}
    assert (report["decided"], report["images"], report["sizes"]) == (0, 3, {"16x16": 3})


def test_findings_keep_the_order_over_many_chunks() -> None:
    records = [to_record(str(index), row()) for index in range(200)]
    assert [finding.id for finding in findings(records)] == [str(index) for index in range(200)]


@pytest.mark.parametrize(
    ("caption", "pieces"),
    [("", 0), ("a red cube", 3), ("it's 42, really!!", 7), ("grün", 1), ("a_b", 3), ("  x  ", 1)],
)
def test_clip_pieces(caption: str, pieces: int) -> None:
    assert clip_pieces(caption) == pieces


def test_a_caption_is_long_only_beyond_what_clip_reads() -> None:
    census = census_of([to_record("75", row("x " * 75)), to_record("76", row("x " * 76))])
    assert census.long_captions == ["76"]
