"""Which pairs are usable, and what the tally says of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from diffalign.common.ahead import DEPTH, MOST_THREADS
from diffalign.common.errors import UserError
from diffalign.data.records import Record, Score
from diffalign.data.select import UsableGroups
from diffalign.data.sources.pickapic import to_record
from tests.pickapic_files import messy_rows, row


def records(count: int = 20) -> list[Record]:
    return [to_record(f"f:{index}", content) for index, content in enumerate(messy_rows()[:count])]


def ids(pairs: UsableGroups) -> list[str]:
    return [pair.record.id.removeprefix("f:") for pair in pairs]


def test_usable_rows_and_drop_reasons_by_row_id() -> None:
    pairs = UsableGroups(records(), max_bad_share=0.5)
    assert ids(pairs) == ["0", "1", "7", "8", "9", "10", "11", "12", "18"]
    assert pairs.tally.dropped == {
        "tie": ["f:2", "f:16"],  # a tie is not decoded: row 16's broken picture stays unseen
        "unlabelled": ["f:3", "f:17"],
        "corrupt_image": ["f:4", "f:5"],
        "missing_image": ["f:6", "f:19"],
        "bad_label": ["f:13", "f:14"],
        "tiny_image": ["f:15"],
    }
    assert pairs.tally.counts() == {
        "asked": 20,
        "used": 9,
        "dropped": {
            "tie": 2,
            "unlabelled": 2,
            "corrupt_image": 2,
            "missing_image": 2,
            "bad_label": 2,
            "tiny_image": 1,
        },
    }
    assert pairs.tally.bad_share == 7 / 16


def test_soft_ties_are_used_with_target_one_half() -> None:
    pairs = UsableGroups(records(), ties="soft", max_bad_share=0.5)
    targets = {pair.record.id: pair.target for pair in pairs}
    assert targets == {
        "f:0": 1.0,
        "f:1": 0.0,
        "f:2": 0.5,
        "f:7": 1.0,
        "f:8": 0.0,
        "f:9": 0.0,
        "f:10": 1.0,
        "f:11": 1.0,
        "f:12": 1.0,
        "f:18": 0.0,
    }
    assert pairs.tally.dropped["corrupt_image"] == ["f:4", "f:5", "f:16"]
    assert pairs.tally.bad_share == 8 / 18


def test_pairs_carry_the_decoded_pictures_in_the_order_of_the_row() -> None:
    pairs = list(UsableGroups(records(2)))
    assert [image.size for image in pairs[1].images] == [(16, 16), (24, 16)]
    assert {image.mode for pair in pairs for image in pair.images} == {"RGB"}
    first, second = pairs[0].images
    assert first.getpixel((4, 4)) == (200, 200, 200)
    assert second.getpixel((4, 4)) == (50, 50, 50)


def test_a_broken_row_never_stops_the_pass_but_too_many_refuse_it_at_the_end() -> None:
    pairs = UsableGroups(records(), max_bad_share=0.05)
    seen: list[str] = []
    with pytest.raises(UserError) as caught:
        seen.extend(pair.record.id for pair in pairs)
    assert "\n" not in str(caught.value)
    assert str(caught.value) == (
        "data: 43.8% of the rows that could be used are bad, more than max_bad_share=0.05: "
        "2 bad_label (f:13, f:14), 2 missing_image (f:6, f:19), 2 corrupt_image (f:4, f:5), "
        "1 tiny_image (f:15); repair the data or raise data.max_bad_share"
    )


@pytest.mark.parametrize(("good", "refused"), [(19, False), (18, True)])
def test_the_share_is_a_bound_that_may_be_reached(good: int, refused: bool) -> None:
    rows = [row(second=b"x"), *(row() for _ in range(good)), *(row(labels=(0.5, 0.5)) for _ in range(50))]
    pairs = UsableGroups(to_record(str(index), content) for index, content in enumerate(rows))
    if refused:
        with pytest.raises(UserError, match=r"5\.3%"):
            list(pairs)
    else:
        assert (
            len(list(pairs)) == 19
        )  # 1 bad of 20 that could be used is 5 %: the 50 ties count on neither side


def test_no_usable_pair_is_refused_with_the_reasons() -> None:
    ties = (to_record(str(index), row(labels=(0.5, 0.5))) for index in range(3))
    with pytest.raises(UserError, match=r"data: none of 3 rows is usable \(3 tie\)"):
        list(UsableGroups(ties))
    with pytest.raises(UserError, match="none of 0 rows"):
        list(UsableGroups([]))


def test_a_few_bad_rows_do_not_hide_why_all_the_others_are_no_use() -> None:
    rows = [row(second=None), *(row(labels=(0.5, 0.5)) for _ in range(3))]
    with pytest.raises(UserError) as caught:
        list(UsableGroups(to_record(str(index), content) for index, content in enumerate(rows)))
    assert "1 missing_image (0), and no other is usable, 3 tie;" in str(caught.value)


def test_a_record_that_is_no_pair_is_counted() -> None:
    single = records(1)[0]
    single.candidates.pop()
    pairs = UsableGroups([single, *(to_record(str(index), row()) for index in range(30))])
    assert len(list(pairs)) == 30
    assert pairs.tally.dropped == {"not_a_pair": ["f:0"]}
    with pytest.raises(UserError, match="make pairs with diffalign pair how=all_pairs or raise"):
        list(UsableGroups([single]))


def test_limit_counts_usable_pairs_and_reads_little_further() -> None:
    read: list[str] = []

    def watched() -> Iterator[Record]:
        for record in records():
            read.append(record.id)
            yield record

    pairs = UsableGroups(watched(), limit=3, max_bad_share=1.0)
    assert ids(pairs) == ["0", "1", "7"]
    assert pairs.tally.asked == 8
    assert len(read) <= 8 + 1 + DEPTH * MOST_THREADS  # pictures are decoded ahead


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="ties='maybe': choose drop"):
        UsableGroups([], ties="maybe")
    with pytest.raises(UserError, match="max_bad_share=5: give a share between 0 and 1"):
        UsableGroups([], max_bad_share=5)


def single(name: str, label: float | None) -> Record:
    """An unpaired example."""
    record = to_record(name, row())
    record.candidates = [record.candidates[0]]
    record.candidates[0].label = label
    return record


def test_single_images_of_pairs_are_the_preferred_ones_or_both() -> None:
    pairs = [to_record("a", row()), to_record("b", row(labels=(0.0, 1.0)))]
    preferred = list(UsableGroups(pairs, unit="single"))
    assert [(group.id, group.target) for group in preferred] == [("a", 1.0), ("b", 1.0)]
    assert [group.candidates for group in preferred] == [
        (pairs[0].candidates[0],),
        (pairs[1].candidates[1],),
    ]
    assert [len(group.images) for group in preferred] == [1, 1]
    both = UsableGroups(pairs, unit="single", undesirable=True)
    assert [(group.id, group.target) for group in both] == [
        ("a:0", 1.0),
        ("a:1", 0.0),
        ("b:0", 0.0),
        ("b:1", 1.0),
    ]
    assert both.tally.used == 2


def test_unpaired_images_are_desirable_or_not() -> None:
    records = [single("good", 1.0), single("bad", 0.0), single("none", None), single("half", 0.5)]
    options: dict[str, Any] = {"unit": "single", "max_bad_share": 1.0}
    wanted = UsableGroups(records, **options)
    assert [(group.id, group.target) for group in wanted] == [("good", 1.0)]
    assert wanted.tally.dropped == {
        "not_preferred": ["bad"],
        "unlabelled": ["none"],
        "bad_label": ["half"],
    }
    both = UsableGroups(records, undesirable=True, **options)
    assert [(group.id, group.target) for group in both] == [("good", 1.0), ("bad", 0.0)]


def test_soft_ties_are_for_pairs() -> None:
    with pytest.raises(UserError, match="ties=soft needs pairs, the objective trains on single images: use"):
        UsableGroups([], unit="single", ties="soft")


def test_a_cache_keeps_the_ties_of_pairs_among_groups_of_any_kind() -> None:
    kept = UsableGroups(records(), unit="any", ties="soft", max_bad_share=0.5)
    assert 0.5 in [group.target for group in kept]
    dropped = UsableGroups(records(), unit="any", max_bad_share=0.5)
    assert 0.5 not in [group.target for group in dropped]
    assert dropped.tally.dropped["tie"]


def test_lists_have_two_images_or_more_and_need_no_labels() -> None:
    pair, unlabelled, longer = (
        to_record(name, row(labels=labels))
        for name, labels in zip("abc", ((1.0, 0.0), (None, None), (1.0, 0.0)), strict=True)
    )
    longer.candidates.append(longer.candidates[0])
    alone = single("d", 1.0)
    lists = UsableGroups([pair, unlabelled, longer, alone], unit="list", max_bad_share=1.0)
    assert [(group.id, len(group.images), group.target) for group in lists] == [
        ("a", 2, None),
        ("b", 2, None),
        ("c", 3, None),
    ]
    assert lists.tally.dropped == {"not_a_list": ["d"]}


def test_what_an_objective_rejects_is_counted_and_not_bad() -> None:
    groups = UsableGroups(records(2), reject=lambda r: "equal_scores" if r.id == "f:1" else None)
    assert ids(groups) == ["0"]
    assert groups.tally.dropped == {"equal_scores": ["f:1"]} and groups.tally.bad_share == 0.0


def test_any_takes_whole_records_that_some_objective_can_use() -> None:
    """Labelled pairs, pairs and lists that only have scores, single pictures; never a group of a part."""
    pair, scored, bare, tie = (
        to_record(name, row(labels=labels))
        for name, labels in zip("abcd", ((0.0, 1.0), (None, None), (None, None), (0.5, 0.5)), strict=True)
    )
    scored.candidates[1].scores["s"] = Score(1.0)
    longer, broken = to_record("e", row()), to_record("f", row())
    longer.candidates.append(replace(longer.candidates[0], label=None, rank=3))
    broken.candidates.append(replace(broken.candidates[0], label=float("nan")))
    found = UsableGroups(
        [pair, scored, bare, tie, longer, broken, single("g", 0.7)], unit="any", max_bad_share=1.0
    )
    assert [(group.id, len(group.images), group.target) for group in found] == [
        ("a", 2, 0.0),
        ("b", 2, 0.5),
        ("e", 3, None),
        ("g", 1, None),
    ]
    assert found.tally.dropped == {"unlabelled": ["c"], "tie": ["d"], "bad_label": ["f"]}


def test_pairs_without_labels_where_scores_decide() -> None:
    found = UsableGroups([to_record("a", row(has_label=False)), to_record("b", row())], unlabelled=True)
    assert [(group.id, group.target) for group in found] == [("a", 0.5), ("b", 1.0)]
