"""The report as tables of text: for a terminal, a Markdown file, a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffalign.common.statistics import Interval
from diffalign.evaluation.categories import FEW_PROMPTS

if TYPE_CHECKING:
    from diffalign.evaluation.categories import Category
    from diffalign.evaluation.ratings import Standing
    from diffalign.evaluation.report import Report, Reward

_DRIFT_LABELS = {
    "pixel_mean_abs": "pixel distance, mean absolute",
    "pixel_rms": "pixel distance, root mean square",
    "embedding_distance": "embedding distance, 1 - cosine",
    "edge_density": "edge density",
    "colour_entropy": "colour entropy, bits",
    "vendi": "Vendi diversity, all pictures",
    "vendi_per_prompt": "Vendi diversity, within a prompt",
}


@dataclass(frozen=True)
class Table:
    """Texts in rows below a head; cells that begin with a number sort by it."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def as_lines(self) -> list[str]:
        """Returns the lines of the table for a terminal."""
        return _aligned([self.head, *self.rows])


def report_lines(report: Report, model: str) -> list[str]:
    """Returns the lines of the report of one model for a terminal."""
    lines = [f"{extent(report)} of {model} against base", ""]
    lines += verdict_lines(report.rewards)
    if report.drift:
        lines += ["", *drift_table(report.drift).as_lines()]
    return lines + remarks(report)


def extent(report: Report) -> str:
    """Returns how much was compared: "100 prompts, seeds 0, 1: 200 pairs"."""
    seeds = ", ".join("none" if seed is None else str(seed) for seed in report.seeds[:8])
    more = f", ... ({len(report.seeds)})" if len(report.seeds) > 8 else ""
    return f"{report.prompts} prompts, seeds {seeds}{more}: {report.pairs} pairs"


def remarks(report: Report) -> list[str]:
    """Returns what was left out, and the notes, a line each."""
    lines = [
        f"{name}: {reward.dropped} pairs without both scores left out"
        for name, reward in report.rewards.items()
        if reward.dropped
    ]
    if report.unreadable:
        shown = ", ".join(report.unreadable[:5])
        lines.append(f"drift: {len(report.unreadable)} pairs with unreadable pictures left out ({shown})")
    return lines + [f"note: {note}" for note in report.notes]


def verdict_lines(rewards: dict[str, Reward]) -> list[str]:
    """Returns the verdicts as a table for a terminal."""
    return verdict_table(rewards).as_lines()


def verdict_table(
    rewards: Mapping[str, Reward], model: str = "aligned", *, full_names: bool = False
) -> Table:
    """Returns the verdicts; the parts of a score stand below it, with its name where rows may be moved."""
    rows: list[tuple[str, ...]] = []
    for name, reward in rewards.items():
        rows.append(
            (
                reward_label(name, reward),
                percent(reward.win_rate),
                f"{reward.wins}/{reward.ties}/{reward.losses}",
                p_value(reward.sign_p),
                f"{reward.base:.4f}",
                f"{reward.aligned:.4f}",
                signed(reward.difference),
            )
        )
        for part, numbers in reward.parts.items():
            means = f"{numbers['base']:.4f}", f"{numbers['aligned']:.4f}"
            gap: Interval = numbers["difference"]
            label = f"  {name}: {part}" if full_names else f"  {part}"
            rows.append((label, "", f"{gap.n} pairs", "", *means, signed(gap)))
    head = ("reward", "win rate", "won/tied/lost", "p (prompts)", "base", model, "difference")
    return Table(f"{model} against base", head, rows)


def drift_table(drift: Mapping[str, Any], model: str = "aligned") -> Table:
    """Returns how far the pictures moved, and what they lost."""
    rows: list[tuple[str, ...]] = []
    for key, numbers in drift.items():
        label = _DRIFT_LABELS.get(key, key)
        if isinstance(numbers, Interval):
            rows.append((label, "", "", f"{numbers.estimate:.4f} [{numbers.low:.4f}, {numbers.high:.4f}]"))
            continue
        change = signed(numbers["difference"]) if "difference" in numbers else f"x {numbers['ratio']:.3f}"
        rows.append((label, f"{numbers['base']:.4f}", f"{numbers['aligned']:.4f}", change))
    return Table(f"Drift of {model}", ("drift", "base", model, "change"), rows)


def category_table(column: str, categories: Mapping[str, Category]) -> Table:
    """Returns the win rates by the values of one column of the prompts' file."""
    scorers = list(dict.fromkeys(name for found in categories.values() for name in found.win_rate))
    rows = []
    for value, found in categories.items():
        rates = [percent(found.win_rate[name]) if name in found.win_rate else "" for name in scorers]
        few = " (few)" if min(found.scored.values(), default=0) < FEW_PROMPTS else ""
        rows.append((value, f"{found.prompts}{few}", str(found.pairs), *rates))
    return Table(column, (column, "prompts", "pairs", *(f"win rate, {name}" for name in scorers)), rows)


def rating_table(name: str, standing: Standing) -> Table:
    """Returns the models by their ratings, the best first."""
    ordered = sorted(standing.ratings.items(), key=lambda item: -item[1].estimate)
    rows = [(model, points(rating), str(rating.n)) for model, rating in ordered]
    return Table(f"Ratings by {name}", ("model", "points above base", "scores"), rows)


def win_table(name: str, standing: Standing) -> Table:
    """Returns how often the model of a row beats that of a column."""
    rows = []
    for model in standing.models:
        rates = [standing.wins[model].get(other) for other in standing.models]
        rows.append((model, *("" if rate is None else percent(rate) for rate in rates)))
    return Table(f"Wins by {name}: row beats column", ("", *standing.models), rows)


def reward_label(name: str, reward: Reward) -> str:
    """Returns a scorer with its scale, and which way is better where it is the less usual one."""
    return f"{name} ({reward.scale}{'' if reward.higher_is_better else ', lower wins'})"


def percent(interval: Interval) -> str:
    """Returns a share as "61.2 % [58.0, 64.4]"."""
    return f"{100 * interval.estimate:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def points(interval: Interval) -> str:
    """Returns rating points as "+64 [+41, +88]"; those of base, which are 0 by definition, as "0"."""
    if interval.low == interval.estimate == interval.high == 0:
        return "0"
    return f"{interval.estimate:+.0f} [{interval.low:+.0f}, {interval.high:+.0f}]"


def signed(interval: Interval) -> str:
    """Returns a difference as "+0.069 [+0.050, +0.090]"."""
    return f"{interval.estimate:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def p_value(p: float) -> str:
    """Returns a p-value with as many digits as it is worth."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
