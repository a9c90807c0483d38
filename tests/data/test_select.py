"""Which pairs are usable, and what the tally says of the others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diffalign.common.errors import UserError
from diffalign.data.records import Record
from diffalign.data.select import UsablePairs
from diffalign.data.sources.pickapic import to_record
from tests.pickapic_files import messy_rows, row


def records(count: int = 20) -> list[Record]:
    return [to_record(f"f:{index}", content) for index, content in enumerate(messy_rows()[:count])]


def ids(pairs: UsablePairs) -> list[str]:
    return [pair.record.id.removeprefix("f:") for pair in pairs]


def test_usable_rows_and_drop_reasons_by_row_id() -> None:
    pairs = UsablePairs(records(), max_bad_share=0.5)
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
    pairs = UsablePairs(records(), ties="soft", max_bad_share=0.5)
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
    pairs = list(UsablePairs(records(2)))
    assert [image.size for image in pairs[1].images] == [(16, 16), (24, 16)]
    assert {image.mode for pair in pairs for image in pair.images} == {"RGB"}
    first, second = pairs[0].images
    assert first.getpixel((4, 4)) == (200, 200, 200)
    assert second.getpixel((4, 4)) == (50, 50, 50)


def test_a_broken_row_never_stops_the_pass_but_too_many_refuse_it_at_the_end() -> None:
    pairs = UsablePairs(records(), max_bad_share=0.05)
    seen: list[str] = []
    with pytest.raises(UserError) as caught:
        seen.extend(pair.record.id for pair in pairs)
    assert "\n" not in str(caught.value)
    assert str(caught.value) == (
        "data: 43.8% of the rows that could be pairs are bad, more than max_bad_share=0.05: "
        "2 bad_label (f:13, f:14), 2 missing_image (f:6, f:19), 2 corrupt_image (f:4, f:5), "
        "1 tiny_image (f:15); repair the data or raise data.max_bad_share"
    )


@pytest.mark.parametrize(("good", "refused"), [(19, False), (18, True)])
def test_the_share_is_a_bound_that_may_be_reached(good: int, refused: bool) -> None:
    rows = [row(second=b"x"), *(row() for _ in range(good)), *(row(labels=(0.5, 0.5)) for _ in range(50))]
    pairs = UsablePairs(to_record(str(index), content) for index, content in enumerate(rows))
    if refused:
        with pytest.raises(UserError, match=r"5\.3%"):
            list(pairs)
    else:
        assert (
            len(list(pairs)) == 19
        )  # 1 bad of 20 that could be pairs is 5 %: the 50 ties count on neither side


def test_no_usable_pair_is_refused_with_the_reasons() -> None:
    ties = (to_record(str(index), row(labels=(0.5, 0.5))) for index in range(3))
    with pytest.raises(UserError, match=r"data: none of 3 rows is a usable pair \(3 tie\)"):
        list(UsablePairs(ties))
    with pytest.raises(UserError, match="none of 0 rows"):
        list(UsablePairs([]))


def test_a_record_that_is_no_pair_is_counted() -> None:
    single = records(1)[0]
    single.candidates.pop()
    pairs = UsablePairs([single, *(to_record(str(index), row()) for index in range(30))])
    assert len(list(pairs)) == 30
    assert pairs.tally.dropped == {"not_a_pair": ["f:0"]}


def test_limit_counts_usable_pairs_and_reads_no_further() -> None:
    read: list[str] = []

    def watched() -> Iterator[Record]:
        for record in records():
            read.append(record.id)
            yield record

    pairs = UsablePairs(watched(), limit=3, max_bad_share=1.0)
    assert ids(pairs) == ["0", "1", "7"]
    assert read[-1] == "f:7"


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="ties='maybe': choose drop"):
        UsablePairs([], ties="maybe")
    with pytest.raises(UserError, match="max_bad_share=5: give a share between 0 and 1"):
        UsablePairs([], max_bad_share=5)
