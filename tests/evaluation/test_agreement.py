"""Scorers against people: each published definition by hand."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import kendalltau

from diffalign.data.pictures import ImageRef
from diffalign.data.records import BadLabel, Candidate, Record
from diffalign.evaluation import agreement
from diffalign.evaluation.agreement import Judged, judged_pairs

# People: first, second, tie, first by 7 of 10 votes, second.
TARGETS = [1.0, 0.0, 0.5, 0.7, 0.0]
# The scorer: first, first, second, a tie, second.
LEADS = [2.0, 1.0, -0.5, 0.0, -3.0]


def record(labels: list[float | None] | None = None, ranks: list[float | None] | None = None) -> Record:
    count = len(labels or ranks or [])
    made = [Candidate(ImageRef(name=str(k))) for k in range(count)]
    for place, candidate in enumerate(made):
        candidate.label = None if labels is None else labels[place]
        candidate.rank = None if ranks is None else ranks[place]
    return Record("r", "a cat", made)


def test_pairs_of_labels_and_of_ranks() -> None:
    assert judged_pairs(record([1.0, 0.0])) == [(0, 1, 1.0)]
    assert judged_pairs(record([0.3, 0.7])) == [(0, 1, 0.3)]
    assert judged_pairs(record([None, None])) == []
    assert judged_pairs(record(ranks=[2.0, 1.0])) == [(0, 1, 0.0)]
    assert judged_pairs(record(ranks=[1.0, 2.5, 2.5, None])) == [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 0.5)]
    with pytest.raises(BadLabel):
        judged_pairs(record([1.0, 1.0]))


def test_accuracy_leaves_ties_of_people_out_and_halves_those_of_the_scorer() -> None:
    values = agreement.accuracy(TARGETS, LEADS)
    assert np.array_equal(values, [1, 0, math.nan, 0.5, 1], equal_nan=True)


def test_imagereward_counts_ties_of_the_scorer_as_wrong() -> None:
    values = agreement.imagereward_accuracy(TARGETS, LEADS)
    assert np.array_equal(values, [1, 0, math.nan, 0, 1], equal_nan=True)


def test_pickscore_takes_peoples_label_of_the_preferred_picture() -> None:
    values = agreement.pickscore_label_accuracy(TARGETS, LEADS)
    assert values.tolist() == [1, 0, 0.5, 0, 1]
    assert agreement.pickscore_label_accuracy([0.7, 0.7], [1, -1]).tolist() == [0.7, pytest.approx(0.3)]


def test_pickscore_with_ties_as_an_answer() -> None:
    """At 0: right, wrong, half (only people tie), half (only the scorer), right. At 0.5 the third is, too."""
    assert agreement.pickscore_tie_accuracy(TARGETS, LEADS, 0.0).tolist() == [1, 0, 0.5, 0.5, 1]
    assert agreement.pickscore_tie_accuracy(TARGETS, LEADS, 0.5).tolist() == [1, 0, 1, 0.5, 1]
    assert agreement.pickscore_tie_accuracy(TARGETS, LEADS, 1.0).tolist() == [1, 0.5, 1, 0.5, 1]
    assert agreement.pickscore_tie_accuracy(TARGETS, LEADS, math.inf).tolist() == [0.5, 0.5, 1, 0.5, 0.5]
    assert agreement.best_threshold(TARGETS, LEADS, [0.0, 0.5, 1.0, 2.0, math.inf]) == 1.0
    assert agreement.best_threshold([1.0], [1.0], [0.0, 0.5]) == 0.0  # the first of equal ones


def test_thresholds_on_logits_are_those_on_probabilities() -> None:
    """p0 - p1 of two softmaxed scores is tanh of half their difference."""
    steps = agreement.tie_thresholds([0.0], "logits")
    assert steps[0] == 0 and steps[-1] == math.inf and len(steps) == 11
    for lead in (0.05, 0.4, 1.7, -2.3, 5.0):
        first = math.exp(lead) / (math.exp(lead) + 1)
        told = [abs(first - (1 - first)) <= step / 10 for step in range(11)]
        assert [abs(lead) <= threshold for threshold in steps] == told
    leads = list(range(-10, 1))
    assert agreement.tie_thresholds(leads, "cosine") == pytest.approx(list(range(11)))


def test_each_half_of_the_prompts_is_judged_by_the_threshold_of_the_other() -> None:
    """In half 0 people tie below 1, in half 1 never: so half 1 is judged with ties, half 0 without."""
    prompts = [f"prompt {k}" for k in range(200)]
    half = np.array([agreement._half(prompt) for prompt in prompts])
    assert 60 < half.sum() < 140
    leads = np.where(np.arange(200) % 2 == 0, 3.0, 0.5)
    targets = np.where((half == 0) & (leads < 1), 0.5, 1.0)
    values, used = agreement.crossed_tie_accuracy(targets, leads, prompts, "cosine") or (None, [])
    assert used == [0.0, 0.5]
    assert np.array_equal(values, np.where(leads < 1, 0.5, 1.0))
    assert agreement.crossed_tie_accuracy([1.0, 1.0], [1.0, 2.0], ["a", "a"], "cosine") is None


def test_inversion_score_of_lists_by_hand() -> None:
    """Ranks 1 2 3 against scores 5 1 2: one of three pairs is inverted. Ranks 1 1 2 against 2 1 1: none."""
    judged = Judged(leads={"s": []})
    add(judged, "one", "p", [1, 2, 3], [5, 1, 2])
    assert with_people(judged)["inversion_score"].estimate == pytest.approx(2 / 3)
    add(judged, "two", "q", [1, 1, 2], [2, 1, 1])
    add(judged, "pair", "q", [1, 2], [1, 2])  # turned round: 0
    found = with_people(judged)["inversion_score"]
    assert found.estimate == pytest.approx((2 / 3 + 1 + 0) / 3) and found.n == 3  # lists, not pairs


def add(judged: Judged, name: str, prompt: str, ranks: list[float], scores: list[float]) -> None:
    for first, second, target in judged_pairs(record(ranks=list(ranks))):
        judged.records.append(name)
        judged.prompts.append(prompt)
        judged.targets.append(target)
        judged.leads["s"].append(scores[first] - scores[second])
        judged.models.append(None)
        judged.meta.append({})


def with_people(judged: Judged) -> dict[str, object]:
    found: dict[str, object] = agreement.with_people(judged, "s")
    return found


def test_tau_b_is_kendalls() -> None:
    ranks, scores = [1, 2, 2, 4, 5, 3], [0.9, 0.5, 0.7, 0.5, 0.1, 0.6]
    pairs = list(combinations(range(6), 2))
    people = [ranks[second] - ranks[first] for first, second in pairs]
    scorer = [scores[first] - scores[second] for first, second in pairs]
    expected = kendalltau([-rank for rank in ranks], scores, variant="b").statistic
    assert agreement.tau_b(people, scorer) == pytest.approx(expected)
    assert agreement.tau_b([0, 0], [1, 2]) is None


def test_of_decided_pairs_without_ties_all_plain_definitions_agree() -> None:
    rng = np.random.default_rng(0)
    targets, leads = rng.integers(0, 2, 50).astype(float), rng.normal(size=50)
    share = agreement.accuracy(targets, leads).mean()
    for values in (
        agreement.imagereward_accuracy(targets, leads),
        agreement.pickscore_label_accuracy(targets, leads),
        agreement.pickscore_tie_accuracy(targets, leads, 0.0),
        agreement.inversion_score(targets, leads),
    ):
        assert values.mean() == pytest.approx(share)
    assert agreement.tau_b(targets - 0.5, leads) == pytest.approx(2 * share - 1)


def judged_five() -> Judged:
    """The five pairs above; s has no score for the last, t is its own opinion."""
    return Judged(
        records=list("abcde"),
        prompts=["p", "p", "q", "q", "r"],
        targets=list(TARGETS),
        leads={"s": [*LEADS[:4], math.nan], "t": [1.0, -1.0, 0.0, 2.0, 3.0]},
        models=[("x", "y"), ("y", "x"), ("x", "y"), ("x", "x"), None],
        meta=[{}] * 5,
    )


def test_the_report_counts_what_it_leaves_out() -> None:
    found = agreement.with_people(judged_five(), "s")
    assert {key: found[key] for key in ("pairs", "dropped", "ties_of_people", "ties_of_scorer")} == {
        "pairs": 4,
        "dropped": 1,
        "ties_of_people": 1,
        "ties_of_scorer": 1,
    }
    assert (found["accuracy"].estimate, found["accuracy"].n) == (0.5, 3)
    assert found["imagereward_accuracy"].estimate == pytest.approx(1 / 3)
    assert found["pickscore_label_accuracy"].estimate == pytest.approx(1.5 / 4)
    assert found["inversion_score"].estimate == 0.75
    # Alike 1, otherwise 1 of the pairs that both decide.
    assert found["tau_b"] == 0.0
    # Prompts are resampled: with p alone 1/2, with q alone 1/2.
    assert (found["accuracy"].low, found["accuracy"].high) == (0.5, 0.5)


def test_a_scorer_without_any_score_has_no_numbers() -> None:
    judged = judged_five()
    judged.leads["s"] = [math.nan] * 5
    found = agreement.with_people(judged, "s")
    assert found["dropped"] == 5 and found["accuracy"] is None and found["inversion_score"] is None
    assert found["tau_b"] is None and found["tie_thresholds"] is None


def test_two_scorers_together() -> None:
    """Both decide the first two pairs only: alike, otherwise."""
    found = agreement.between_scorers(judged_five(), "s", "t")
    assert (found["alike"].estimate, found["alike"].n) == (0.5, 2)
    # s decides three of the four, t three: (1 - 1) / 3.
    assert found["tau_b"] == 0.0
    same = agreement.between_scorers(judged_five(), "s", "s")
    assert same["alike"].estimate == 1.0 and same["tau_b"] == 1.0


def test_by_category_and_by_models() -> None:
    judged = judged_five()
    by = agreement.by_label(judged, "s", ["one", "two", "two", None, "one"])
    assert {label: (found.estimate, found.n) for label, found in by.items()} == {
        "one": (1.0, 1),
        "two": (0.0, 1),
    }
    # x against y: people say x, x (turned), tie; the scorer x, y (turned), y.
    (found,) = agreement.by_models(judged, "s").items()
    assert found[0] == "x | y" and found[1]["pairs"] == 3
    assert found[1]["people"] == pytest.approx(2.5 / 3) and found[1]["scorer"] == pytest.approx(1 / 3)
    assert found[1]["accuracy"].estimate == 0.5


def test_columns_must_pair_up() -> None:
    with pytest.raises(ValueError, match=r"must pair up, got shapes \(2,\) and \(1,\)"):
        agreement.accuracy([1, 0], [1])
