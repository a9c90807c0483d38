"""The verdict by what the prompts' file says of each prompt: category, challenge, style, tag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign.common.statistics import Interval, paired_difference, win_rate
from diffalign.evaluation.pairs import Pair

if TYPE_CHECKING:
    from diffalign.evaluation.report import Reward

MOST_VALUES = 30
"""Different values of a column that still are categories; more are free text or numbers of their own."""

MOST_COLUMNS = 8

FEW_PROMPTS = 10
"""Below this an interval by resampling prompts is too narrow to be believed."""

NOT_GIVEN = "(none)"

_RESAMPLES = 2000


@dataclass
class Category:
    """The pairs of one value of a column.

    Attributes:
        prompts, pairs: how many there are.
        scored: scorer -> prompts with a score on both sides.
        win_rate: scorer -> how often aligned beats base, ties half; interval over prompts.
        difference: scorer -> mean of aligned - base, interval over prompts.
    """

    prompts: int
    pairs: int
    scored: dict[str, int]
    win_rate: dict[str, Interval]
    difference: dict[str, Interval]


Breakdown = dict[str, dict[str, Category]]
"""Column -> value -> its verdicts."""


def breakdown(
    pairs: Sequence[Pair], rewards: Mapping[str, Reward], *, tie_epsilon: float = 0.0, seed: int = 0
) -> Breakdown:
    """Returns the verdicts on the pairs of each category, values sorted by name, `NOT_GIVEN` last.

    Columns are those of the base pictures' `meta` whose values are words, numbers or truth values, at least
    two and at most MOST_VALUES different ones, and fewer than there are prompts; the first MOST_COLUMNS.

    Args:
        pairs: from `match`.
        rewards: the verdicts on all pairs: which scorers, and which way is better.
        tie_epsilon: scores that differ by at most this are a tie.
        seed: of the bootstrap (2,000 resamples).
    """
    if not rewards:
        return {}
    level = next(iter(rewards.values())).win_rate.level
    settings = {"num_resamples": _RESAMPLES, "level": level, "seed": seed}
    found: Breakdown = {}
    for column, labels in list(category_columns(pairs).items())[:MOST_COLUMNS]:
        members: dict[str, list[Pair]] = {}
        for label, pair in zip(labels, pairs, strict=True):
            members.setdefault(label, []).append(pair)
        found[column] = {
            label: _category(members[label], rewards, tie_epsilon, settings)
            for label in sorted(members, key=lambda label: (label == NOT_GIVEN, label))
        }
    return found


def category_columns(pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """Returns column -> the value of each pair as text, for the columns that sort prompts into categories."""
    prompts = len({pair.base.prompt for pair in pairs})
    columns = dict.fromkeys(name for pair in pairs for name in pair.base.meta)
    found = {}
    for column in columns:
        values = [pair.base.meta.get(column) for pair in pairs]
        if not all(value is None or isinstance(value, str | int | float) for value in values):
            continue
        labels = [NOT_GIVEN if value is None or value == "" else str(value) for value in values]
        if 2 <= len(set(labels)) <= MOST_VALUES and len(set(labels)) < prompts:
            found[str(column)] = labels
    return found


def _category(
    pairs: Sequence[Pair], rewards: Mapping[str, Reward], tie_epsilon: float, settings: dict[str, Any]
) -> Category:
    """Returns the verdicts on some of the pairs; a scorer without a score in them is left out."""
    scored, rates, differences = {}, {}, {}
    for name, reward in rewards.items():
        base = np.array([pair.base.value(name) for pair in pairs])
        aligned = np.array([pair.aligned.value(name) for pair in pairs])
        good = np.isfinite(base) & np.isfinite(aligned)
        if not good.any():
            continue
        clusters = [pair.base.prompt for pair, has in zip(pairs, good, strict=True) if has]
        sign = 1.0 if reward.higher_is_better else -1.0
        left, right = aligned[good], base[good]
        scored[name] = len(set(clusters))
        rates[name] = win_rate(
            sign * left, sign * right, tie_epsilon=tie_epsilon, clusters=clusters, **settings
        )
        differences[name] = paired_difference(left, right, clusters=clusters, **settings)
    return Category(len({pair.base.prompt for pair in pairs}), len(pairs), scored, rates, differences)
