"""How relevant an image of a list is: win counting and the other ways, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.data.batches import Batch
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record, Score
from diffalign.objectives._relevance import batch_relevance, present
from diffalign.objectives.rankdpo import Plugin


def candidate(scores: dict[str, float] | None = None, **judged: Any) -> Candidate:
    named = {name: Score(value, "s") for name, value in (scores or {}).items()}
    return Candidate(ImageRef(name="x"), scores=named, **judged)


def relevance(how: str, counts: list[int], *scorers: str, **known: list[float]) -> Any:
    """Rounded rows of phi without the padding, which must be 0."""
    rows = sum(counts)
    batch = Batch(
        ids=[f"row-{n}" for n in range(len(counts))],
        epoch=0,
        positions=torch.arange(len(counts)),
        latents=torch.zeros(rows, 1),
        cond=Conditioning({"prompt": torch.zeros(rows, 1)}),
        counts=torch.tensor(counts),
        ratings={name: torch.tensor(values) for name, values in known.items()},
    )
    phi = batch_relevance(batch, how, scorers)
    assert not phi[~present(batch.counts)].any()
    return [
        [round(value, 6) for value in row[:count]] for row, count in zip(phi.tolist(), counts, strict=True)
    ]


def test_win_counting() -> None:
    """Scorer a puts 1 over 2 over 3, scorer b 2 over 1 = 3 (a tie is nobody's win).

    Of n (k - 1) = 4 comparisons each: image 1 wins 2 + 0, image 2 1 + 2, image 3 none.
    """
    scores = {"a": [3.0, 2.0, 1.0], "b": [0.1, 0.7, 0.1]}
    assert relevance("wins", [3], **scores) == [[0.5, 0.75, 0.0]]
    assert relevance("wins", [3], "a", **scores) == [[1.0, 0.5, 0.0]]


def test_five_scorers_and_four_images_count_in_fifteenths() -> None:
    values = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    known = {f"scorer{n}": row.tolist() for n, row in enumerate(values)}
    wins = [sum(row[i] > row[j] for row in values for j in range(4)) for i in range(4)]
    (phi,) = relevance("wins", [4], **known)
    assert phi == pytest.approx([int(count) / 15 for count in wins], abs=1e-6)
    assert sum(phi) == pytest.approx(5 * 6 / 15)  # each of 6 pairs is won once for each scorer


def test_mean_score_is_scaled_in_each_list() -> None:
    """a: (10, 30, 20) -> 0, 1, 1/2; b: all alike -> 1/2. The second list, of two, has its own range."""
    scores = {"a": [10.0, 30.0, 20.0, -1.0, -2.0], "b": [7.0, 7.0, 7.0, 1.0, 5.0]}
    assert relevance("mean", [3, 2], **scores) == [[0.25, 0.75, 0.5], [0.5, 0.5]]
    assert relevance("mean", [3, 2], "a", **scores) == [[0.0, 1.0, 0.5], [1.0, 0.0]]


def test_ranks_are_spread_evenly() -> None:
    """Ranks 1, 2, 2, 4 (kept negated: higher is better): 3 behind; 1 behind and 1 beside; none behind."""
    phi = relevance("rank", [4, 2], rank=[-2.0, -1.0, -4.0, -2.0, -9.0, -3.0])
    assert phi == [[0.5, 1.0, 0.0, 0.5], [0.0, 1.0]]


def test_votes_and_labels() -> None:
    assert relevance("votes", [3, 2], votes=[2.0, 8.0, 0.0, 0.0, 0.0]) == [[0.25, 1.0, 0.0], [0.0, 0.0]]
    assert relevance("label", [2], label=[0.25, 0.75]) == [[0.25, 0.75]]


def test_without_names_each_list_is_judged_by_the_scorers_that_know_it() -> None:
    """b knows the second list only: the first is judged by a alone, in halves, the second by both."""
    known = {"a": [1.0, 2.0, 3.0, 1.0, 2.0], "b": [math.nan] * 3 + [2.0, 1.0], "label": [math.nan] * 5}
    assert relevance("wins", [3, 2], **known) == [[0.0, 0.5, 1.0], [0.5, 0.5]]
    assert relevance("mean", [3, 2], **known) == [[0.0, 0.5, 1.0], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("how", "scorers", "counts", "known", "message"),
    [
        ("wins", ("b",), [3], {"a": [1.0, 2.0, 3.0]}, "unknown scorer in objective.scorers 'b'.* known: a"),
        ("wins", (), [3], {"rank": [1.0, 2.0, 3.0]}, "objective.phi=wins: the data has no scores"),
        ("votes", (), [3], {"a": [1.0, 2.0, 3.0]}, "objective.phi=votes: the data has no 'votes'"),
        ("wins", (), [1, 2], {"a": [1.0, 2.0, 3.0]}, "row-0 is a list of one picture: K = 1"),
        ("wins", (), [2, 2], {"a": [1.0, 2.0, 3.0, math.nan]}, "row-1 has a picture without a rating by a"),
        ("mean", ("a",), [2, 2], {"a": [math.nan, math.nan, 1.0, 2.0]}, "row-0 has a picture without"),
        ("rank", (), [2], {"rank": [math.nan, -1.0]}, "row-0 has a picture without a rating by rank"),
    ],
)
def test_what_is_not_known_is_one_line(
    how: str, scorers: tuple[str, ...], counts: list[int], known: dict[str, list[float]], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        relevance(how, counts, *scorers, **known)
    assert "\n" not in str(caught.value)


def test_records_that_teach_nothing_are_named() -> None:
    def reason(candidates: list[Candidate], **options: Any) -> str | None:
        return Plugin(**options).reject(Record("r", "a cat", candidates))

    disagree = [candidate({"a": 1.0, "b": 2.0}), candidate({"a": 2.0, "b": 1.0})]
    assert reason(disagree) == "equal_scores"
    assert reason(disagree, scorers=["a"]) is None and reason(disagree, scorers=["c"]) == "no_score"
    assert reason(disagree, phi="rank") == "no_score"
    assert reason([candidate(rank=1), candidate(rank=2)]) == "no_score"
    assert reason([candidate({"a": 1.0})]) == "single_picture" and reason([]) == "single_picture"
    assert reason([candidate({"a": 1.0}), candidate({"b": 2.0})]) == "no_score"
    assert reason([candidate({"a": 1.0}), candidate({"a": math.nan})]) == "no_score"
    float32_twins = [candidate({"a": 0.1}), candidate({"a": 0.1 + 1e-12})]  # a batch cannot tell them apart
    assert reason(float32_twins) == "equal_scores"
    assert reason([candidate(label=0.5), candidate(label=0.5)], phi="label") == "equal_scores"
    assert reason([candidate(label=7.0), candidate(label=1.0)], phi="label") == "bad_label"
    assert reason([candidate(votes=3), candidate(votes=-1)], phi="votes") == "bad_label"
    assert reason([candidate(votes=3), candidate(votes=1)], phi="votes") is None


def test_scores_where_lower_is_better_count_the_other_way_round() -> None:
    """a and "far" agree only when far is turned round; taken as it stands, all wins would be equal."""

    def distance(value: float) -> Candidate:
        item = candidate({"a": value})
        item.scores["far"] = Score(-value, "px", extra={"higher_is_better": False})
        return item

    assert Plugin().reject(Record("r", "a cat", [distance(1.0), distance(2.0)])) is None
