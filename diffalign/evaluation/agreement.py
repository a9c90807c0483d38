"""How well scorers agree with people, by each published definition, and with one another.

Everything is counted on pairs of pictures of one record: a pair as it is, a ranked list as all its pairs.
Of a pair, `target` is P(first preferred by people) in [0, 1], 0.5 for a tie, and `lead` is the score of the
first picture less that of the second, higher being better.

    accuracy                  of the pairs that people decide, the share that the scorer orders alike; a tie
                              of the scorer counts half
    imagereward_accuracy      the same, a tie of the scorer counting as wrong (THUDM/ImageReward, test.py,
                              `acc`; HPSv2's `calc_ImageReward` is this within a list, averaged over lists)
    pickscore_label_accuracy  people's label of the picture that the scorer prefers, ties of people included:
                              they give 0.5 whichever wins; a tie of the scorer gives 0 (PickScore,
                              trainer/tasks/clip_task.py, `run_inference`)
    pickscore_tie_accuracy    with ties as a third answer: 1 for the same answer, 0.5 where one of the two
                              says tie, else 0; the scorer says tie up to a threshold that is chosen on other
                              data (PickScore, trainer/scripts/eval_preference_predictor.py, `calc_score`)
    inversion_score           1 - share of pairs of a list that are ordered the other way round, averaged over
                              lists; a tie on either side is no inversion (HPSv2, training/train.py)
    tau_b                     Kendall's tau-b over all pairs: (alike - otherwise) / sqrt(pairs without a tie
                              of people * pairs without a tie of the scorer)

Convention: HPSv2 ranks predictions first, which breaks their ties by position; here a tie stays one.
Convention: PickScore chooses the threshold on a validation split and applies it to the test split. Here the
prompts are cut in two halves by their hash, and each is judged by the threshold chosen on the other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign.common.statistics import Interval, bootstrap_interval
from diffalign.data.records import Record

Array = NDArray[np.float64]

RESAMPLES = 2000
"""Of the bootstrap: enough for an interval that is read to three digits."""

PICKSCORE_STEPS = tuple(step / 10 for step in range(11))
"""Thresholds on |p0 - p1| that PickScore tries."""

LOGITS = "logits"
"""Scale of scores whose softmax is a probability of preference."""


@dataclass
class Judged:
    """Pairs of pictures that people and scorers judged, as columns of one length n.

    Attributes:
        records: id of the record of each pair.
        prompts: its prompt; pairs of one prompt are resampled together.
        targets: P(first preferred by people).
        leads: scorer -> score of the first less that of the second, higher is better; NaN where one is
            missing.
        models: the models of the first and the second picture; None where one is not known.
        meta: what the record says beside the prompt.
    """

    records: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    targets: list[float] = field(default_factory=list)
    leads: dict[str, list[float]] = field(default_factory=dict)
    models: list[tuple[str, str] | None] = field(default_factory=list)
    meta: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.targets)


def judged_pairs(record: Record) -> list[tuple[int, int, float]]:
    """Returns (first, second, P(first preferred)) of all pairs that people judged in a record.

    A pair is read by its labels, a list by its ranks (1 is best), in which equal ones tie.

    Raises:
        BadLabel: labels of a pair that are no preference.
    """
    if len(record.candidates) == 2:
        target = record.pair_target()
        if target is not None:
            return [(0, 1, target)]
    ranks = [candidate.rank for candidate in record.candidates]
    found = []
    for first in range(len(ranks)):
        for second in range(first + 1, len(ranks)):
            one, other = ranks[first], ranks[second]
            if one is not None and other is not None and math.isfinite(one) and math.isfinite(other):
                found.append((first, second, 0.5 if one == other else float(one < other)))
    return found


def accuracy(targets: ArrayLike, leads: ArrayLike) -> Array:
    """Returns for each pair 1 (alike), 0 or 0.5 (a tie of the scorer); NaN where people tie."""
    target, lead = _columns(targets, leads)
    agreed = (np.sign(lead) * np.sign(target - 0.5) + 1) / 2
    return np.where(target == 0.5, np.nan, agreed)


def imagereward_accuracy(targets: ArrayLike, leads: ArrayLike) -> Array:
    """Returns for each pair 1 (alike) or 0; NaN where people tie."""
    target, lead = _columns(targets, leads)
    return np.where(target == 0.5, np.nan, (lead * (target - 0.5) > 0).astype(np.float64))


def pickscore_label_accuracy(targets: ArrayLike, leads: ArrayLike) -> Array:
    """Returns for each pair the label of the picture that the scorer prefers; 0 for a tie of the scorer."""
    target, lead = _columns(targets, leads)
    return np.where(lead > 0, target, np.where(lead < 0, 1 - target, 0.0))


def pickscore_tie_accuracy(targets: ArrayLike, leads: ArrayLike, threshold: float) -> Array:
    """Returns for each pair 1, 0.5 or 0; the scorer says tie where |lead| is at most `threshold`."""
    target, lead = _columns(targets, leads)
    people, scorer = np.sign(target - 0.5), np.where(np.abs(lead) <= threshold, 0.0, np.sign(lead))
    return np.where(people == scorer, 1.0, np.where((people == 0) | (scorer == 0), 0.5, 0.0))


def inversion_score(targets: ArrayLike, leads: ArrayLike) -> Array:
    """Returns for each pair 0 where the scorer orders it the other way round, else 1."""
    target, lead = _columns(targets, leads)
    return np.asarray(lead * (target - 0.5) >= 0, dtype=np.float64)


def tau_b(one: ArrayLike, other: ArrayLike) -> float | None:
    """Returns Kendall's tau-b of two orders, given as signed leads of all pairs; None where one ties all."""
    left, right = (np.sign(np.asarray(leads, dtype=np.float64)) for leads in (one, other))
    free = float(np.abs(left).sum() * np.abs(right).sum())
    return float((left * right).sum()) / math.sqrt(free) if free else None


def tie_thresholds(leads: ArrayLike, scale: str) -> list[float]:
    """Returns the thresholds on |lead| that are tried, ascending.

    Of scores on the scale `logits` they are PickScore's steps of |p0 - p1| = |tanh(lead / 2)|, p being the
    softmax of the two scores; of other scales, where those mean nothing, 0 and the deciles of |lead|.
    """
    if scale == LOGITS:
        return [2 * math.atanh(step) if step < 1 else math.inf for step in PICKSCORE_STEPS]
    return [0.0, *np.quantile(np.abs(np.asarray(leads, dtype=np.float64)), PICKSCORE_STEPS[1:]).tolist()]


def best_threshold(targets: ArrayLike, leads: ArrayLike, thresholds: Sequence[float]) -> float:
    """Returns the threshold of the best mean `pickscore_tie_accuracy`; of equal ones the first."""
    means = [pickscore_tie_accuracy(targets, leads, threshold).mean() for threshold in thresholds]
    return thresholds[int(np.argmax(means))]


def crossed_tie_accuracy(
    targets: ArrayLike, leads: ArrayLike, prompts: Sequence[str], scale: str
) -> tuple[Array, list[float]] | None:
    """Returns `pickscore_tie_accuracy` of each pair, and the thresholds used; None where one half is empty.

    Each half of the prompts is judged by the threshold that is best on the other half.
    """
    target, lead = _columns(targets, leads)
    half = np.array([_half(prompt) for prompt in prompts])
    if len(set(half.tolist())) < 2:
        return None
    values, used = np.empty(len(target)), []
    for judged in (0, 1):
        here, there = half == judged, half != judged
        tried = tie_thresholds(lead[there], scale)
        used.append(best_threshold(target[there], lead[there], tried))
        values[here] = pickscore_tie_accuracy(target[here], lead[here], used[-1])
    return values, used


def mean_interval(values: ArrayLike, clusters: Sequence[str], seed: int = 0) -> Interval | None:
    """Returns mean and interval of the values that are not NaN, clusters resampled; None without any."""
    array = np.asarray(values, dtype=np.float64)
    there = np.isfinite(array)
    if not there.any():
        return None
    kept = [cluster for cluster, has in zip(clusters, there, strict=True) if has]
    return bootstrap_interval(array[there], clusters=kept, num_resamples=RESAMPLES, seed=seed)


def with_people(judged: Judged, scorer: str, *, scale: str = "", seed: int = 0) -> dict[str, Any]:
    """Returns how well a scorer agrees with people: each definition with its interval over prompts.

    Beside them `pairs`, `dropped` (no score), `ties_of_people`, `ties_of_scorer` and `tie_thresholds`. A
    definition for which no pair counts is None.

    Args:
        judged: the pairs.
        scorer: whose leads.
        scale: of its scores; see `tie_thresholds`.
        seed: of the bootstrap.
    """
    every = np.array(judged.leads[scorer])
    there = np.flatnonzero(np.isfinite(every))
    target, lead = np.array(judged.targets)[there], every[there]
    prompts = [judged.prompts[place] for place in there]
    found: dict[str, Any] = {
        "pairs": len(there),
        "dropped": len(judged) - len(there),
        "ties_of_people": int((target == 0.5).sum()),
        "ties_of_scorer": int((lead == 0).sum()),
    }
    for definition in DEFINITIONS:
        found[definition.__name__] = mean_interval(definition(target, lead), prompts, seed)
    crossed = crossed_tie_accuracy(target, lead, prompts, scale) if len(there) else None
    found["pickscore_tie_accuracy"] = None if crossed is None else mean_interval(crossed[0], prompts, seed)
    found["tie_thresholds"] = None if crossed is None else crossed[1]
    records = [judged.records[place] for place in there]
    found["inversion_score"] = _by_list(inversion_score(target, lead), records, prompts, seed)
    found["tau_b"] = tau_b(target - 0.5, lead)
    return found


def between_scorers(judged: Judged, one: str, other: str, *, seed: int = 0) -> dict[str, Any]:
    """Returns how well two scorers agree: `alike` and `tau_b`.

    `alike` is the share of the pairs that both decide which they order alike, with its interval over prompts;
    None without such pairs.
    """
    left, right = np.array(judged.leads[one]), np.array(judged.leads[other])
    there = np.isfinite(left) & np.isfinite(right)
    signs = np.sign(left[there]) * np.sign(right[there])
    prompts = [prompt for prompt, has in zip(judged.prompts, there, strict=True) if has]
    return {
        "alike": mean_interval(np.where(signs == 0, np.nan, (signs + 1) / 2), prompts, seed),
        "tau_b": tau_b(left[there], right[there]),
    }


def by_label(
    judged: Judged, scorer: str, labels: Sequence[str | None], *, seed: int = 0
) -> dict[str, Interval]:
    """Returns label -> `accuracy` of its pairs, labels sorted; None is no label."""
    lead = np.array(judged.leads[scorer])
    values = np.where(np.isfinite(lead), accuracy(judged.targets, np.nan_to_num(lead)), np.nan)
    found = {}
    for label in sorted({label for label in labels if label is not None}):
        places = [place for place, own in enumerate(labels) if own == label]
        of_label = mean_interval(values[places], [judged.prompts[place] for place in places], seed)
        if of_label is not None:
            found[label] = of_label
    return found


def by_models(judged: Judged, scorer: str, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Returns "A | B" -> how people and the scorer see model A against model B, names sorted.

    That is `pairs`, `people` and `scorer` (how often each prefers A, ties half) and `accuracy` with its
    interval (None where people only tie). Pairs of one model are not compared.
    """
    members: dict[tuple[str, str], list[int]] = {}
    lead = np.array(judged.leads[scorer])
    for place, models in enumerate(judged.models):
        if models is not None and models[0] != models[1] and np.isfinite(lead[place]):
            first, second = sorted(models)
            members.setdefault((first, second), []).append(place)
    found = {}
    for (first, second), places in sorted(members.items()):
        turned = np.array([judged.models[place] != (first, second) for place in places])
        target = np.array(judged.targets)[places]
        of_scorer = (np.sign(lead[places]) + 1) / 2
        found[f"{first} | {second}"] = {
            "pairs": len(places),
            "people": float(np.where(turned, 1 - target, target).mean()),
            "scorer": float(np.where(turned, 1 - of_scorer, of_scorer).mean()),
            "accuracy": mean_interval(
                accuracy(target, lead[places]), [judged.prompts[place] for place in places], seed
            ),
        }
    return found


DEFINITIONS: tuple[Callable[[ArrayLike, ArrayLike], Array], ...] = (
    accuracy,
    imagereward_accuracy,
    pickscore_label_accuracy,
)
"""Those that are a plain mean over pairs."""


def _columns(targets: ArrayLike, leads: ArrayLike) -> tuple[Array, Array]:
    target, lead = np.asarray(targets, dtype=np.float64), np.asarray(leads, dtype=np.float64)
    if target.shape != lead.shape or target.ndim != 1:
        raise ValueError(f"targets and leads must pair up, got shapes {target.shape} and {lead.shape}")
    return target, lead


def _by_list(values: Array, records: Sequence[str], prompts: Sequence[str], seed: int) -> Interval | None:
    """Returns the mean over records of each record's mean, with its interval."""
    members: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        members.setdefault(record, []).append(place)
    means = np.array([values[places].mean() for places in members.values()])
    return mean_interval(means, [prompts[places[0]] for places in members.values()], seed)


def _half(prompt: str) -> int:
    """Returns 0 or 1, by the prompt's bytes alone."""
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=1).digest()[0] & 1
