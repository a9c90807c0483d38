"""The census counts what hand counting counts."""

from __future__ import annotations

from typing import Any

import pytest

from diffalign.common.statistics import share_interval
from diffalign.data.census import Census, clip_pieces, findings
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record, Score
from diffalign.data.select import UsableGroups
from diffalign.data.sources.pickapic import to_record
from diffalign.data.votes import agreement
from tests.drawn_pictures import encoded
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


def test_ranked_lists_and_scored_pairs_are_no_bad_pairs() -> None:
    """Objectives of lists and singles train on them; without any rank, score or label nobody can."""

    def record(name: str, count: int, **known: Any) -> Record:
        images = [ImageRef(data=jpeg(shade), name=str(shade)) for shade in range(count)]
        return Record(name, "p", [Candidate(image, **known) for image in images])

    rated = [record("list", 3, rank=1), record("scored", 2, scores={"clip": Score(0.3)})]
    report = census_of([*rated, record("good", 1, label=1.0), record("bare", 2)]).report()
    assert (report["rated"], report["unlabelled"], report["usable"]) == (3, 1, 0)
    assert report["problems"] == {"unlabelled": ["bare"]} and report["bad_share"] == 0.0


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


def pair(
    name: str, first: int, second: int, label: float = 1.0, user: str | None = "u", **both: int
) -> Record:
    """A pair of drawn pictures, each named by its seed; `both` are fields of the candidates."""
    sides = ((first, label), (second, 1.0 - label))
    candidates = [
        Candidate(ImageRef(data=encoded(seed), name=f"{name}:{seed}"), label=value, **both)
        for seed, value in sides
    ]
    return Record(name, "p", candidates, user=user)


def test_position_is_reported_with_its_interval() -> None:
    report = census_of([pair(str(n), 2 * n, 2 * n + 1, float(n < 3)) for n in range(4)]).report()
    assert report["first_preferred_share"] == share_interval(3, 4).as_dict()
    assert census_of([pair("0", 1, 2, 0.5)]).report()["first_preferred_share"] is None


def test_pictures_that_look_alike_are_named_once_each() -> None:
    rows = [
        row("0", encoded(1, 64), encoded(2, 64)),
        row("1", encoded(1, 64), encoded(3, 64)),  # the same bytes: no look-alike
        row("2", encoded(2, 64, quality=60), encoded(4, 64)),
        row("3", encoded(5, 64), encoded(5, 64, quality=60)),
        row("4", RED, BLUE),  # flat
        row("5", encoded(2, 64, quality=70), b"not an image"),
    ]
    census = census_of([to_record(f"f:{index}", content) for index, content in enumerate(rows)])
    assert census.report()["near_duplicates"] == {
        "distance": 4,
        "pictures": 5,
        "groups": 2,
        "named": [["f:0[1]", "f:2[0]", "f:5[0]"], ["f:3[0]", "f:3[1]"]],
        "within_pair": ["f:3"],
    }


def test_agreement_of_people_on_one_pair() -> None:
    records = [
        pair("0", 1, 2, 1.0, "anna"),
        pair("1", 2, 1, 0.0, "ben"),  # the same, the other way round
        pair("2", 1, 2, 0.0, "cem"),
        pair("3", 1, 2, 0.0, "anna"),  # a second vote of one person does not count
        pair("4", 3, 4, 0.8, "anna"),
        pair("5", 3, 4, 0.5, "ben"),
        pair("6", 5, 6, 1.0, None),
        pair("7", 5, 6, 1.0, None),  # perhaps the same person
        pair("8", 7, 8, 1.0, "anna"),
        pair("9", 7, 8, 1.0, "anna"),
    ]
    found = census_of(records).agreement()
    # 2 to 1: one of three pairs of votes is equal; a preference and a tie: none.
    assert found == agreement([(2, 1, 0), (1, 0, 1)])
    assert found is not None and found.pairwise.estimate == pytest.approx((1 / 3 + 0) / 2)
    assert census_of(records[6:]).report()["agreement"] is None


def test_agreement_of_counted_votes() -> None:
    counted = pair("0", 1, 2)
    counted.candidates[0].votes, counted.candidates[1].votes = 4, 1
    again = pair("1", 1, 2, user="other")
    one_sided = pair("2", 3, 4, votes=3)
    one_sided.candidates[1].votes = None
    assert census_of([counted, again, one_sided]).agreement() == agreement([(4, 1, 0)])


def test_scorers_that_vote_are_no_people() -> None:
    judged = pair("0", 1, 2)
    judged.candidates[0].votes, judged.candidates[1].votes = 2, 1
    judged.source = "pair:a+b+c"
    assert census_of([judged]).agreement() is None


def test_one_third_turned_round_is_two_thirds() -> None:
    """The same votes in the other order do not contradict: 1 - 1/3 and 2/3 differ in the last bit."""
    third = [pair("0", 1, 2, 1 / 3), pair("1", 2, 1, 2 / 3), pair("2", 2, 1, 1 / 3)]
    report = census_of(third).report()
    assert [found["row"] for found in report["duplicates"]] == ["1", "2"]
    assert [found["row"] for found in report["conflicting_duplicates"]] == ["2"]


def test_votes_in_a_circle_by_user_and_prompt() -> None:
    rows = [(1, 2), (2, 3), (3, 1)]
    circle = [pair(f"a{n}", first, second) for n, (first, second) in enumerate(rows)]
    turned = [pair(f"b{n}", second, first, 0.0, "v") for n, (first, second) in enumerate(rows)]
    two_people = [pair("c0", 4, 5), pair("c1", 5, 6), pair("c2", 6, 4, user="v")]
    tied = [pair("d0", 7, 8), pair("d1", 8, 9), pair("d2", 9, 7, 0.5)]
    other = [pair("e0", 10, 11), pair("e1", 11, 12), pair("e2", 12, 10)]
    other[2].prompt = "another"
    report = census_of([*circle, *turned, *two_people, *tied, *other]).report()
    assert report["circular_votes"] == [["a0", "a1", "a2"], ["b0", "b1", "b2"]]


def test_pictures_with_the_same_bytes_twice_or_missing_make_no_circle() -> None:
    rows = [row("p", RED, RED), row("p", None, BLUE), row("p", BLUE, RED)]
    assert (
        census_of([to_record(str(n), content) for n, content in enumerate(rows)]).report()["circular_votes"]
        == []
    )


def test_longest_captions_words_and_overlap() -> None:
    captions = ["a b c", "a", "a b", "A  B", "nude a b c d", "a b c d", "x y z"]
    census = Census(evaluation=frozenset({"a b", "unseen"}))
    for finding in findings([to_record(str(n), row(caption)) for n, caption in enumerate(captions)]):
        census.add(finding, ties="drop")
    report = census.report()
    assert report["longest_captions"] == [
        {"row": "4", "tokens_at_least": 5},
        {"row": "5", "tokens_at_least": 4},
        {"row": "0", "tokens_at_least": 3},
        {"row": "6", "tokens_at_least": 3},
        {"row": "2", "tokens_at_least": 2},
    ]
    assert report["nsfw_words"] == ["4"]
    assert report["overlap"] == {"prompts": 1, "rows": ["2", "3"]}
    assert census_of([]).report()["overlap"] is None


def test_nothing_at_all() -> None:
    report = census_of([]).report()
    assert (report["rows"], report["images"], report["distinct_images"], report["circular_votes"]) == (
        0,
        0,
        0,
        [],
    )
