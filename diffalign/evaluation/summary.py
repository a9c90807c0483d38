"""Base and the models that are compared with it, and what to say first about them."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffalign.common.errors import UserError
from diffalign.evaluation._table import percent
from diffalign.evaluation.categories import FEW_PROMPTS
from diffalign.evaluation.pairs import Pair
from diffalign.evaluation.provenance import Origin, unlike
from diffalign.evaluation.ratings import PRIOR, Standing
from diffalign.evaluation.report import Report

RATING_NOTE = (
    "Bradley-Terry ratings by maximum likelihood over all comparisons, ties half; base is 0, 400 points are "
    f"odds of 10 to 1; {PRIOR:g} wins are added for either side between every two models; intervals over "
    "prompts."
)


@dataclass
class Comparison:
    """Everything that a report is written from.

    Attributes:
        reports: model -> its report against base.
        pairs: model -> its pairs with base; the same prompts and seeds for all models, in one order.
        standings: scorer -> ratings and wins among all; empty where one model is compared.
        origins: base and each model -> where its pictures come from.

    Raises:
        UserError: no scorer has judged the pictures of all models.
    """

    reports: dict[str, Report]
    pairs: dict[str, list[Pair]]
    standings: dict[str, Standing] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.scorers:
            raise UserError(f"{', '.join(self.reports)} have no scorer in common: score all with one")

    @property
    def scorers(self) -> list[str]:
        """The scorers that every model has, in the order of the first; never empty."""
        first, *others = self.reports.values()
        return [name for name in first.rewards if all(name in report.rewards for report in others)]

    @property
    def scorer(self) -> str:
        """The scorer that pictures are chosen by: the first."""
        return self.scorers[0]

    def unlike(self) -> list[str]:
        """Returns in words which sides were drawn unlike base, other than by adapters."""
        base = self.origins.get("base")
        others = {name: origin for name, origin in self.origins.items() if name != "base"}
        if base is None:
            return []
        return [f"{name}: {text}" for name, other in others.items() for text in unlike(base, other)]

    def gains(self) -> list[float]:
        """Returns what each prompt and seed gained under `scorer`, mean over models; NaN where unknown."""
        reward = next(iter(self.reports.values())).rewards[self.scorer]
        sign = 1.0 if reward.higher_is_better else -1.0
        found = []
        for row in zip(*self.pairs.values(), strict=True):
            gaps = [pair.aligned.value(self.scorer) - pair.base.value(self.scorer) for pair in row]
            found.append(sign * sum(gaps) / len(gaps))
        return found


def verdict(model: str, report: Report) -> list[str]:
    """Returns one sentence a scorer: who wins, if the interval says so and there are prompts enough."""
    lines = []
    for name, reward in report.rewards.items():
        rate = reward.win_rate
        if reward.prompts < FEW_PROMPTS:
            said = f"{model} and base cannot be told apart by {name} on fewer than {FEW_PROMPTS} prompts"
        elif rate.low > 0.5:
            said = f"{model} beats base by {name}"
        elif rate.high < 0.5:
            said = f"{model} loses to base by {name}"
        else:
            said = f"{model} and base cannot be told apart by {name}"
        lines.append(f"{said}: win rate {percent(rate)}, {rate.n} pairs of {reward.prompts} prompts.")
    return lines


def unbeaten(standing: Standing) -> str:
    """Returns which models won every comparison with another, whose distance is not known; else ""."""
    found = ", ".join(f"{a} over {b}" for a, b in standing.unbeaten)
    return f"won every comparison, so that the distance is only a lower bound: {found}" if found else ""
