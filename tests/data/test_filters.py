"""Which rows pass: every reason on its own, duplicates, and the split by prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffalign.common.errors import UserError
from diffalign.data.census import Census, findings
from diffalign.data.filters import FilterSpec, Selection, Sieve, check_split, choose
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record, Score
from tests.drawn_pictures import encoded
from tests.pickapic_files import BLUE, RED


def pair(
    name: str = "r",
    prompt: str = "a cat",
    pictures: tuple[bytes, bytes] | None = None,
    label: float | None = 1.0,
    **both: Any,
) -> Record:
    """A pair; `both` are fields of both candidates, a tuple giving each its own."""
    candidates = []
    for side, content in enumerate(pictures or (encoded(1), encoded(2))):
        own = {key: value[side] if isinstance(value, tuple) else value for key, value in both.items()}
        image = ImageRef(data=content, name=f"{name}:{side}")
        candidates.append(Candidate(image, label=label if not side or label is None else 1.0 - label, **own))
    return Record(name, prompt, candidates)


def census_of(records: list[Record], sieve: Sieve | None = None) -> Census:
    census = Census()
    for finding in findings(records, sieve or Sieve()):
        census.add(finding, ties="drop")
    return census


def selection(records: list[Record], sieve: Sieve | None = None, **choice: Any) -> Selection:
    keys = {"dedup": "none", "distance": 4, "split": 0.0, "seed": 0, **choice}
    return choose(census_of(records, sieve), **keys)


def reason(record: Record, needs: Any = "any", evaluation: frozenset[str] = frozenset(), **keys: Any) -> Any:
    census = census_of([record], Sieve(FilterSpec(**keys), needs, evaluation))
    return census.refused[0]


def scores(first: float, second: float) -> dict[str, Any]:
    return {"scores": ({"clip": Score(first)}, {"clip": Score(second)})}


def test_without_keys_everything_whole_passes() -> None:
    for record in (pair(), pair(label=0.5), pair(label=None), Record("one", "p", pair().candidates[:1])):
        assert reason(record) is None


@pytest.mark.parametrize(
    ("record", "keys", "expected"),
    [
        (pair(pictures=(encoded(1, 32), encoded(2, 31))), {"min_side": 32}, "small_side"),
        (pair(pictures=(encoded(1, 32), encoded(2, 32))), {"min_side": 32}, None),
        (pair(pictures=(encoded(1, 32), encoded(2, (32, 40)))), {"same_size": True}, "two_sizes"),
        (pair(pictures=(encoded(1, 20), encoded(2, 40))), {"max_aspect_difference": 0.0}, None),
        (
            pair(pictures=(encoded(1, 40), encoded(2, (44, 40)))),
            {"max_aspect_difference": 0.09},
            "aspect_difference",
        ),
        (pair(pictures=(encoded(1, 40), encoded(2, (44, 40)))), {"max_aspect_difference": 0.1}, None),
        (pair(**scores(0.3, 0.35)), {"min_score_gap": {"clip": 0.1}}, "score_gap"),
        (pair(**scores(0.3, 0.5)), {"min_score_gap": {"clip": 0.1}}, None),
        (pair(**scores(0.5, 0.25)), {"min_score_gap": {"clip": 0.25}}, None),
        (pair(**scores(0.3, float("nan"))), {"min_score_gap": {"clip": 0.0}}, "no_score"),
        (pair(), {"min_score_gap": {"clip": 0.0}}, "no_score"),
        (pair(votes=(1, 2)), {"min_votes": 4}, "few_votes"),
        (pair(votes=(1, 3)), {"min_votes": 4}, None),
        (pair(), {"min_votes": 1}, "few_votes"),
        (pair(model=("a", "b")), {"models": ["a", "b"]}, None),
        (pair(model=("a", "b")), {"models": ["a"]}, "model"),
        (pair(model=("a", None)), {"models": ["a"]}, "model"),
        (pair(model=("a", "b")), {"without_models": ["b", "c"]}, "model"),
        (pair(model=("a", None)), {"without_models": ["b"]}, None),
        (pair(label=0.5), {"drop_ties": True}, "tie"),
        (pair(label=0.6), {"drop_ties": True}, None),
        (pair(label=None), {"drop_ties": True}, None),
        (pair(label=None), {"drop_unlabelled": True}, "unlabelled"),
        (pair(prompt="a Nude"), {"drop_nsfw_words": True}, "nsfw_words"),
        (pair(prompt="a cat"), {"drop_nsfw_words": True}, None),
    ],
)
def test_each_key_alone(record: Record, keys: dict[str, Any], expected: str | None) -> None:
    assert reason(record, **keys) == expected


def test_prompts_of_an_evaluation() -> None:
    evaluation = frozenset({"a cat"})
    assert reason(pair(prompt=" A  Cat"), evaluation=evaluation, drop_overlap=True) == "overlap"
    assert reason(pair(prompt="a cat."), evaluation=evaluation, drop_overlap=True) is None
    assert reason(pair(), evaluation=evaluation) is None  # counted, not dropped


def test_broken_rows_never_pass(tmp_path: Path) -> None:
    assert reason(pair(pictures=(encoded(1), b""))) == "missing_image"
    assert reason(pair(pictures=(encoded(1)[:-40], encoded(2)))) == "corrupt_image"
    assert reason(pair(pictures=(encoded(1, 4), encoded(2)))) == "tiny_image"
    assert reason(pair(label=1.5)) == "bad_label"
    assert reason(pair(prompt="half \ud800")) == "bad_text"
    assert reason(Record("x", "", [], problem="bad_text")) == "bad_text"
    assert reason(Record("empty", "p", [])) == "not_a_pair"
    named = pair()
    named.candidates[1].image = ImageRef(path=tmp_path / "caf\udce9.jpg")
    named.candidates[1].image.path.write_bytes(encoded(2))
    assert reason(named) == "bad_text" and reason(named, "pair") is None  # parquet holds no path
    # A list's labels are no pair's, but none of them may be a NaN.
    three = Record("l", "p", [*pair(label=None).candidates, pair(label=float("nan")).candidates[0]])
    assert reason(three) == "bad_label"


def test_what_a_format_cannot_hold() -> None:
    listed = Record("l", "p", [*pair(label=None).candidates, pair().candidates[0]])
    assert [reason(listed, needs) for needs in ("any", "pair", "decided")] == [
        None,
        "not_a_pair",
        "not_a_pair",
    ]
    for label, name in ((0.5, "tie"), (None, "unlabelled")):
        record = pair(label=label)
        assert [reason(record, needs) for needs in ("any", "pair", "decided")] == [None, None, name]


def test_exact_duplicates_whatever_the_order() -> None:
    a, b, c = encoded(1), encoded(2), encoded(3)
    rows = [
        pair("0", pictures=(a, b), label=0.5),
        pair("1", pictures=(a, b)),
        pair("2", pictures=(b, a), label=0.0),
        pair("3", "A cat", (a, b)),
        pair("4", pictures=(a, c)),
        pair("5", pictures=(a, b), label=0.0),
    ]
    chosen = selection(rows, dedup="exact")
    assert chosen.dropped == {"duplicate": ["1", "2", "5"]}
    assert list(chosen.sides) == [1, 0, 0, 1, 1, 0]
    assert chosen.counts() == {"rows": 6, "kept": 3, "held_out": 0, "dropped": 3}
    # The first that passes is kept, not the first.
    chosen = selection(rows, Sieve(FilterSpec(drop_ties=True)), dedup="exact")
    assert chosen.dropped == {"tie": ["0"], "duplicate": ["2", "5"]}


def test_near_duplicates_need_both_pictures_and_the_prompt() -> None:
    a, b, c = encoded(1, 64), encoded(2, 64), encoded(3, 64)
    alike = encoded(1, 64, quality=60), encoded(2, 64, quality=60)
    rows = [
        pair("0", pictures=(a, b)),
        pair("1", "A  CAT", pictures=(alike[1], alike[0])),
        pair("2", pictures=(alike[0], c)),
        pair("3", "a dog", alike),
        pair("4", pictures=(b, a)),
    ]
    assert selection(rows, dedup="near").dropped == {"near_duplicate": ["1"], "duplicate": ["4"]}
    assert selection(rows, dedup="exact").dropped == {"duplicate": ["4"]}


def test_flat_pictures_are_not_alike() -> None:
    rows = [pair("0", pictures=(RED, encoded(1))), pair("1", pictures=(BLUE, encoded(1)))]
    assert selection(rows, dedup="near").dropped == {}


def test_split_is_by_prompt_and_the_same_for_any_other_rows() -> None:
    rows = [pair(f"{n}", f"prompt {n // 2}" if n % 2 else f" PROMPT  {n // 2}") for n in range(120)]
    sides = list(selection(rows, split=0.3).sides)
    assert sides[::2] == sides[1::2]  # two spellings of one prompt
    assert 8 <= sides[::2].count(2) <= 28  # of 60 prompts
    assert list(selection(rows[40:60], split=0.3).sides) == sides[40:60]
    assert list(selection(rows, split=0.3, seed=1).sides) != sides
    held = {n for n, side in enumerate(sides) if side == 2}
    more = {n for n, side in enumerate(selection(rows, split=0.5).sides) if side == 2}
    assert held < more  # a larger share holds out the same prompts and others


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"min_side": -1}, "filter.min_side is -1: use 0 or more"),
        ({"min_score_gap": {"clip": float("inf")}}, "filter.min_score_gap.clip is inf"),
        ({"max_aspect_difference": float("nan")}, "filter.max_aspect_difference is nan"),
        ({"models": ["a"], "without_models": ["a"]}, "both name a: decide for one"),
    ],
)
def test_filters_that_make_no_sense(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FilterSpec(**keys)


@pytest.mark.parametrize("split", [-0.1, 1.0, float("nan")])
def test_splits_that_make_no_sense(split: float) -> None:
    with pytest.raises(UserError, match="give the share of prompts to hold out"):
        check_split(split)


def test_missing_file_is_a_reason_too(tmp_path: Path) -> None:
    record = Record("r", "p", [Candidate(ImageRef(path=tmp_path / "none.png"), label=1.0)])
    assert reason(record) == "missing_image"
