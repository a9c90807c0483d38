"""The report as one HTML file that needs nothing else: pictures, charts, style and script stand inside it.

Prompts, names and manifests come from files of others. They are escaped wherever they appear, and the page
tells the browser to load nothing and to run no script but its own.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.common import files
from diffalign.common.statistics import Interval
from diffalign.evaluation import _table, charts
from diffalign.evaluation.categories import FEW_PROMPTS, Category
from diffalign.evaluation.curves import Panel, read_panels
from diffalign.evaluation.grid import pick
from diffalign.evaluation.pairs import Shot
from diffalign.evaluation.provenance import shortened
from diffalign.evaluation.summary import RATING_NOTE, Comparison, unbeaten, verdict
from diffalign.evaluation.thumbnails import MOST_BYTES, Thumbnail, thumbnail

if TYPE_CHECKING:
    from jinja2 import Environment

PARTS = Path(__file__).parent / "page"
"""Template, style and script."""


@dataclass(frozen=True)
class Card:
    """One prompt and seed, drawn by base and every model.

    Attributes:
        prompt, seed: what was asked for.
        gain: of the scorer that pictures are chosen by, as text; its sign as better, worse or open.
        kind: "better", "worse" or "open".
        pictures: (model, thumbnail or None where the picture is broken, scores as text).
    """

    prompt: str
    seed: int | None
    gain: str
    kind: str
    pictures: list[tuple[str, Thumbnail | None, list[str]]]


def as_html(comparison: Comparison, *, pictures: int, seed: int = 0) -> str:
    """Returns the page.

    Args:
        comparison: what was found.
        pictures: prompts and seeds to show, at most; 0: none. Fewer where MOST_BYTES are used up.
        seed: of the random ones among them.

    Raises:
        UserError: a run's metrics cannot be read.
    """
    sections, left_out = _cards(comparison, pictures, seed)
    style, script = ((PARTS / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return (
        _environment()
        .get_template("report.html")
        .render(
            style=style,
            script=script,
            policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
            comparison=comparison,
            verdicts=[
                line for model, report in comparison.reports.items() for line in verdict(model, report)
            ],
            tiles=_tiles(comparison),
            standings=_standings(comparison),
            rating_note=RATING_NOTE,
            details=_details(comparison),
            histograms=_histograms(comparison),
            sections=sections,
            left_out=left_out,
            panels=_panels(comparison),
            unlike=comparison.unlike(),
            manifests=_manifests(comparison),
        )
    )


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(PARTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # for charts, which escape what they are given
    return environment


def _hash(text: str) -> str:
    """Returns what a content security policy calls the text of an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def _kind(interval: Interval, level: float, prompts: int, sign: float = 1.0) -> str:
    """Returns whether an interval lies on the better side of `level`; few prompts leave it open."""
    low, high = sorted((sign * (interval.low - level), sign * (interval.high - level)))
    return "open" if prompts < FEW_PROMPTS else "better" if low > 0 else "worse" if high < 0 else "open"


def _tiles(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """Returns (kind, label, big text, small text): the reward and what it cost, for every model."""
    tiles = []
    several = len(comparison.reports) > 1
    for model, report in comparison.reports.items():
        reward = report.rewards[comparison.scorer]
        rate, gap = reward.win_rate, reward.difference
        whose = f"{model}: " if several else ""
        ends = f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %, {rate.n} pairs"
        tiles.append(
            (
                _kind(rate, 0.5, reward.prompts),
                f"{whose}win rate, {comparison.scorer}",
                f"{100 * rate.estimate:.1f} %",
                ends,
            )
        )
        if several:
            continue
        kind = _kind(gap, 0.0, reward.prompts, 1.0 if reward.higher_is_better else -1.0)
        ends = f"{gap.low:+.4f} to {gap.high:+.4f} {reward.scale}"
        tiles.append((kind, "mean difference", f"{gap.estimate:+.4f}", ends))
        if "vendi" in report.drift:
            ratio = report.drift["vendi"]["ratio"]
            tiles.append(("open", "diversity kept (Vendi)", f"{100 * ratio:.0f} %", "of base's"))
        if "pixel_mean_abs" in report.drift:
            moved = report.drift["pixel_mean_abs"]
            tiles.append(("open", "pixels moved", f"{moved.estimate:.3f}", "mean absolute, of 1"))
    return tiles


def _standings(comparison: Comparison) -> list[tuple[list[_table.Table], str]]:
    """Returns (tables, what to be wary of) of every scorer."""
    return [
        ([_table.rating_table(name, standing), _table.win_table(name, standing)], unbeaten(standing))
        for name, standing in comparison.standings.items()
    ]


def _details(comparison: Comparison) -> list[dict[str, Any]]:
    """Returns the tables of every model."""
    return [
        {
            "model": model,
            "extent": _table.extent(report),
            "verdicts": _table.verdict_table(report.rewards, model, full_names=True),
            "drift": _table.drift_table(report.drift, model) if report.drift else None,
            "categories": [
                (_table.category_table(column, found), _bars(comparison.scorer, found))
                for column, found in report.categories.items()
            ],
            "remarks": _table.remarks(report),
        }
        for model, report in comparison.reports.items()
    ]


def _bars(scorer: str, categories: dict[str, Category]) -> list[str]:
    """Returns the win rate of each category as a bar, "" where a category has none."""
    bars = []
    for found in categories.values():
        rate = found.win_rate.get(scorer)
        scored = found.scored.get(scorer, 0)
        bars.append("" if rate is None else charts.interval_bar(rate, _kind(rate, 0.5, scored)))
    return bars


def _histograms(comparison: Comparison) -> list[tuple[str, list[str], str, str]]:
    """Returns (scorer, names of the series, histogram of scores, histogram of differences)."""
    found = []
    models = list(comparison.reports)
    first = next(iter(comparison.pairs.values()))
    for name in comparison.scorers:
        reward = comparison.reports[models[0]].rewards[name]
        series = {"base": [pair.base.value(name) for pair in first]}
        differences: dict[str, list[float]] = {"base": []}  # so that a model has one colour in both
        for model, pairs in comparison.pairs.items():
            series[model] = [pair.aligned.value(name) for pair in pairs]
            differences[model] = [pair.aligned.value(name) - pair.base.value(name) for pair in pairs]
        axis = _table.reward_label(name, reward)
        scores = charts.histogram(series, title=f"Scores by {name}", axis=axis)
        gained = charts.histogram(
            differences, title=f"Differences to base by {name}", axis=f"difference, {axis}", zero=True
        )
        found.append((name, ["base", *models], scores, gained))
    return found


def _panels(comparison: Comparison) -> dict[str, list[tuple[Panel, str]]]:
    """Returns side -> (panel, its chart) of the training runs that are known."""
    return {
        name: [
            (panel, charts.lines(panel.lines, title=panel.title, level=panel.level))
            for panel in read_panels(origin.run)
        ]
        for name, origin in comparison.origins.items()
        if origin.run is not None
    }


def _cards(comparison: Comparison, pictures: int, seed: int) -> tuple[list[tuple[str, list[Card]]], int]:
    """Returns (title, cards) of the sections, and how many cards the page had no room for."""
    gains = comparison.gains()
    models = list(comparison.pairs)
    first = comparison.pairs[models[0]]
    picked = pick(gains, [pair.base.prompt for pair in first], rows=-(-pictures // 3), seed=seed)
    sizes = _shared_out(pictures, [len(places) for places in picked.values()])
    room, left_out = MOST_BYTES, 0
    sections = []
    for (title, places), size in zip(picked.items(), sizes, strict=True):
        cards = []
        for place in sorted(places[:size], key=lambda place: -gains[place]):
            shots = {"base": first[place].base, **{m: comparison.pairs[m][place].aligned for m in models}}
            small = {name: thumbnail(shot) for name, shot in shots.items()}
            needed = sum(len(one.address) for one in small.values() if one is not None)
            if needed > room:
                left_out += 1
                continue
            room -= needed
            cards.append(_card(shots, small, gains[place], comparison))
        if cards:
            sections.append((title, cards))
    return sections, left_out


def _shared_out(pictures: int, available: list[int]) -> list[int]:
    """Returns how many of each section are shown: `pictures` together, taken in turn."""
    sizes = [0] * len(available)
    for _ in range(max(available, default=0)):
        for k, most in enumerate(available):
            if sizes[k] < most and sum(sizes) < pictures:
                sizes[k] += 1
    return sizes


def _card(
    shots: dict[str, Shot], small: dict[str, Thumbnail | None], gain: float, comparison: Comparison
) -> Card:
    reward = next(iter(comparison.reports.values())).rewards[comparison.scorer]
    change = gain if reward.higher_is_better else -gain
    base = shots["base"]
    return Card(
        prompt=shortened(base.prompt),
        seed=base.seed,
        gain=f"{comparison.scorer} {change:+.4g}",
        kind="better" if gain > 0 else "worse" if gain < 0 else "open",
        pictures=[
            (name, small[name], [f"{scorer} {shot.value(scorer):.4g}" for scorer in comparison.scorers])
            for name, shot in shots.items()
        ],
    )


def _manifests(comparison: Comparison) -> list[tuple[str, str]]:
    """Returns (side and stage, its manifest as text, long lists cut)."""
    return [
        (f"{side}: {stage}", json.dumps(files.to_plain(shortened(content)), indent=2, ensure_ascii=False))
        for side, origin in comparison.origins.items()
        for stage, content in origin.manifests.items()
    ]
