"""The tables of the bake-off, from its rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import reporting
from comparison import KINDS, PICTURES, interval, signed

from diffalign.common.statistics import bootstrap_interval

SEEDS = (
    "Win rates over the base with a 95 % interval over prompts, all seeds together. The interval does not "
    "know how far the seeds of training lie apart: the next column shows it."
)

MUST_BEAT_BASE = ("dpo", "mapo", "smpo", "rankdpo", "dragon")


def chosen_setting(rows: list[dict[str, Any]], method: str, *, own: bool) -> int:
    """The setting of a method that did best on the tuning prompts."""
    tuned = of_phase(rows, "tune", method)
    if not tuned:
        raise SystemExit(f"{method} has no tuning rows: run --phase tune first")

    def merit(row: dict[str, Any]) -> float:
        return float(row["own_reward"]["gain"]["estimate"] if own else row["win_rate"])

    return int(max(tuned, key=merit)["setting"])


def hours_of(rows: list[dict[str, Any]]) -> float:
    """Hours of one core that some cells took."""
    return sum(float(row.get("cell_core_seconds") or row["seconds"]) for row in rows) / 3600


def as_markdown(rows: list[dict[str, Any]], methods: list[str], own: tuple[str, ...]) -> str:
    """Both tables, the settings tried, and the bars."""
    lines = reporting.head(
        "The objectives side by side, on the embedded world",
        "python scripts/bakeoff.py --out runs/bakeoff --phase tune; ... --phase test",
    )
    # The first tuning rows know only the seconds that training took on a clock.
    hours = hours_of(rows)
    beside = hours_of([row for row in rows if row["phase"] in ("asked", "confirm")])
    early = sum("cell_core_seconds" not in row for row in rows)
    cells = sum(row["phase"] != "prepare" for row in rows)
    lines += [
        f"{cells} cells, {hours:.1f} hours of one core, drawing and comparing included (of the first {early} "
        f"cells only the time on a clock that training took), {beside:.1f} of them for what was asked "
        "afterwards. Rewards of training: the exact grader; of "
        "dragon_exemplar and dragon_set: features of tiny-clip against exact drawings. An evaluation of the "
        "network is one image through it once; a backward pass counts as two.",
        "",
    ]
    tested = {name: tested_rows(rows, name, own=name in own) for name in methods}
    tested = {name: found for name, found in tested.items() if found}
    drafting = [row["drafts_core_seconds"] for row in rows if row["phase"] == "prepare"]
    if tested:
        lines += ["## On held-out prompts", "", SEEDS, ""]
        lines += [*results_table(tested, tested.get("dpo")), "", *cost_table(tested, drafting), ""]
        lines += reporting.bars(bars(tested, own))
    asked: dict[str, list[dict[str, Any]]] = {}
    for row in (row for name in methods for row in of_phase(rows, "confirm", name)):
        asked.setdefault(other_settings(row, tested.get(row["method"])), []).append(row)
    if asked:
        lines += ["## Asked afterwards, on held-out prompts: beside the comparison, no part of it", ""]
        lines += [*results_table(asked, tested.get("dpo")), "", *cost_table(asked, drafting), ""]
    lines += ["## Settings, on the tuning prompts", ""]
    lines += [*settings_table(rows, methods, own, phase="tune"), ""]
    if any(row["phase"] == "asked" for row in rows):
        lines += ["## Asked afterwards, on the tuning prompts: not chosen from", ""]
        lines += [*settings_table(rows, methods, own, phase="asked"), ""]
    return "\n".join(lines)


def tested_rows(rows: list[dict[str, Any]], method: str, *, own: bool) -> list[dict[str, Any]]:
    """The rows of the chosen setting on the test prompts."""
    found = of_phase(rows, "test", method)
    return [row for row in found if row["setting"] == chosen_setting(rows, method, own=own)]


def of_phase(rows: list[dict[str, Any]], phase: str, method: str) -> list[dict[str, Any]]:
    """The rows of a method in a phase."""
    return [row for row in rows if row["phase"] == phase and row["method"] == method]


def other_settings(row: dict[str, Any], tested: list[dict[str, Any]] | None) -> str:
    """The method of a row, and what it sets otherwise than the tested rows of that method do."""
    usual = tested[0]["settings"] if tested else {}
    shown = [f"{key} {value}" for key, value in row["settings"].items() if value != usual.get(key)]
    return " ".join([row["method"], f"({', '.join(shown)})" if shown else ""]).strip()


def pooled_win_rate(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all seeds; a prompt is one cluster across them. From the wins that the rows hold."""
    values = [int(sign) / 2 for row in found for sign in row["wins"]]
    clusters = [index // PICTURES for row in found for index in range(len(row["wins"]))]
    return bootstrap_interval(values, clusters=clusters).as_dict()


def difference(found: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Of two methods' win rates, picture by picture, each the mean of its seeds; a prompt is one cluster."""
    ours, theirs = (
        np.mean([[int(s) / 2 for s in row["wins"]] for row in rows], 0) for rows in (found, other)
    )
    return bootstrap_interval(ours - theirs, clusters=np.arange(len(ours)) // PICTURES).as_dict()


def results_table(
    tested: dict[str, list[dict[str, Any]]], yardstick: list[dict[str, Any]] | None
) -> list[str]:
    """What came out; `yardstick`: the rows that win rates are compared with."""
    lines = [
        "| method | win rate | of each seed | minus dpo | "
        + " | ".join(KINDS)
        + " | implicit accuracy | Vendi / base | own reward |",
        "|---" * (len(KINDS) + 7) + "|",
    ]
    for name, found in tested.items():
        parts = [
            f"{100 * np.mean([r['parts'][k]['difference']['estimate'] for r in found]):+.1f}" for k in KINDS
        ]
        implicit = np.mean([r["implicit"]["estimate"] for r in found])
        vendi = np.mean([r["drift"]["vendi"]["ratio"] for r in found])
        gains = [r["own_reward"]["gain"] for r in found if r["own_reward"]]
        own = "; ".join(map(signed, gains)) or "-"
        if len(gains) > 1:
            own = f"{signed(together(gains))} ({own})"
        cells = [
            name,
            interval(pooled_win_rate(found)),
            ", ".join(f"{row['win_rate']:.3f}" for row in sorted(found, key=lambda row: row["seed"])),
            "-" if yardstick is None or found == yardstick else signed(difference(found, yardstick)),
            *parts,
            f"{implicit:.3f}",
            f"{vendi:.3f}",
            own,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def cost_table(tested: dict[str, list[dict[str, Any]]], drafting: list[float]) -> list[str]:
    """What it took; `drafting` are the core seconds that training pictures of a seed took to draw."""
    lines = [
        "Won per 1,000 evaluations: by how many percentage points the win rate is above one half.",
        "",
        "| method | evaluations, learning | won per 1,000 | with drawing | won per 1,000 "
        "| core seconds, learning | with drawing | peak memory, GB | drift (pixels, features) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in tested.items():
        own_drawing = np.mean([r["drawing_core_seconds"] for r in found])
        learned = np.mean([r["core_seconds"] for r in found]) - own_drawing
        drew = own_drawing if own_drawing > 0 or not drafting else np.mean(drafting)
        learning = np.mean([r["evaluations"]["learning"] for r in found])
        drawn = learning + np.mean([r["evaluations"]["drawing"] for r in found])
        won = 100 * (pooled_win_rate(found)["estimate"] - 0.5)
        drift = [
            np.mean([r["drift"][k]["estimate"] for r in found]) for k in ("pixel_rms", "embedding_distance")
        ]
        lines.append(
            f"| {name} | {learning:,.0f} | {1000 * won / learning:.2f} | {drawn:,.0f} "
            f"| {1000 * won / drawn:.2f} | {learned:.0f} | {learned + drew:.0f} "
            f"| {max(r['peak_gb'] for r in found):.2f} "
            f"| {drift[0]:.3f}, {drift[1]:.3f} |"
        )
    return lines


def settings_table(
    rows: list[dict[str, Any]], methods: list[str], own: tuple[str, ...], *, phase: str
) -> list[str]:
    """Every setting tried in a phase on the tuning prompts; the chosen one in bold."""
    lines = ["| method | setting | win rate | accurate | own reward |", "|---|---|---|---|---|"]
    for name in methods:
        tried = sorted(of_phase(rows, phase, name), key=lambda r: r["setting"])
        best = chosen_setting(rows, name, own=name in own) if tried and phase == "tune" else None
        for row in tried:
            shown = ", ".join(f"{key} {value}" for key, value in row["settings"].items() if value is not None)
            mark = "**" if row["setting"] == best else ""
            gain = signed(row["own_reward"]["gain"]) if row["own_reward"] else "-"
            accurate = 100 * row["parts"]["accurate"]["difference"]["estimate"]
            lines.append(
                f"| {mark}{name}{mark} | {shown} | {row['win_rate']:.3f} | {accurate:+.1f} | {gain} |"
            )
    return lines


def together(gains: list[dict[str, float]]) -> dict[str, float]:
    """The mean gain of several seeds, with an interval that is too wide rather than too narrow.

    All are held against one base, so they are not independent: the deviation of a mean is at most the mean of
    the deviations, whatever they share.
    """
    return {key: float(np.mean([gain[key] for gain in gains])) for key in ("estimate", "low", "high")}


def bars(tested: dict[str, list[dict[str, Any]]], own: tuple[str, ...]) -> dict[str, bool]:
    """What has to hold."""
    checks = {}
    for name in MUST_BEAT_BASE:
        if name in tested:
            checks[f"{name} beats the base: interval above one half"] = (
                pooled_win_rate(tested[name])["low"] > 0.5
            )
    for name in own:
        if name in tested:
            gains = [r["own_reward"]["gain"] for r in tested[name]]
            checks[f"{name} improves its own reward: interval clear of 0, all seeds together"] = (
                together(gains)["low"] > 0
            )
            checks[f"{name} improves its own reward: interval clear of 0, every seed"] = all(
                gain["low"] > 0 for gain in gains
            )
    return checks
