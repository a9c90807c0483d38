"""The report as plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffalign.common.statistics import Interval

if TYPE_CHECKING:
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


def report_lines(report: Report) -> list[str]:
    """Returns the lines of the report."""
    seeds = ", ".join("none" if seed is None else str(seed) for seed in report.seeds[:8])
    more = f", ... ({len(report.seeds)})" if len(report.seeds) > 8 else ""
    lines = [
        f"{report.prompts} prompts, seeds {seeds}{more}: {report.pairs} pairs of aligned against base",
        "",
    ]
    lines += verdict_lines(report.rewards)
    if report.drift:
        lines += ["", *_aligned(_drift_rows(report.drift))]
    for name, reward in report.rewards.items():
        if reward.dropped:
            lines.append(f"{name}: {reward.dropped} pairs without both scores left out")
    if report.unreadable:
        shown = ", ".join(report.unreadable[:5])
        lines.append(f"drift: {len(report.unreadable)} pairs with unreadable pictures left out ({shown})")
    return lines + [f"note: {note}" for note in report.notes]


def verdict_lines(rewards: dict[str, Reward]) -> list[str]:
    """Returns the verdicts as a table."""
    return _aligned(_reward_rows(rewards))


def _reward_rows(rewards: dict[str, Reward]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("reward", "win rate", "won/tied/lost", "p (prompts)", "base", "aligned", "difference")
    ]
    for name, reward in rewards.items():
        better = "" if reward.higher_is_better else ", lower wins"
        rows.append(
            (
                f"{name} ({reward.scale}{better})",
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
            rows.append((f"  {part}", "", f"{gap.n} pairs", "", *means, signed(gap)))
    return rows


def _drift_rows(drift: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("drift", "base", "aligned", "change")]
    for key, numbers in drift.items():
        label = _DRIFT_LABELS.get(key, key)
        if isinstance(numbers, Interval):
            rows.append((label, "", "", f"{numbers.estimate:.4f} [{numbers.low:.4f}, {numbers.high:.4f}]"))
            continue
        change = signed(numbers["difference"]) if "difference" in numbers else f"x {numbers['ratio']:.3f}"
        rows.append((label, f"{numbers['base']:.4f}", f"{numbers['aligned']:.4f}", change))
    return rows


def percent(interval: Interval) -> str:
    """Returns a share as "61.2 % [58.0, 64.4]"."""
    return f"{100 * interval.estimate:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


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
