"""Charts as SVG text that stands inside a page: no script, no file of its own, colours from its style sheet.

Series are coloured by the classes `s0` (of base), `s1`, `s2`, ... in their order. Every chart has a name and
a sentence that says what it shows, for readers who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from diffalign.common.statistics import Interval

WIDTH, HEIGHT = 420, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 20, 10, 30
BINS = 24
COLOURS = 8
MOST_POINTS = 300
"""Points of a line; of more, neighbours are averaged."""


@dataclass(frozen=True)
class Line:
    """One line: finite numbers `x` and `y` of one length, and what it is called."""

    name: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class _Frame:
    """Where numbers lie in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, value: float) -> float:
        low, high = self.x
        return round(_LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT), 2)

    def up(self, value: float) -> float:
        low, high = self.y
        return round(HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM), 2)


def histogram(series: Mapping[str, Sequence[float]], *, title: str, axis: str, zero: bool = False) -> str:
    """Returns the histograms of several series in one frame, in the same bins, as shares of each series.

    Args:
        series: name -> values; those that are not finite are left out.
        title: what the chart is called.
        axis: what is counted.
        zero: mark the place of 0.
    """
    kept = {name: np.array([v for v in values if math.isfinite(v)]) for name, values in series.items()}
    kept = {name: values for name, values in kept.items() if len(values)}
    if not kept:
        return ""
    everything = np.concatenate(list(kept.values()))
    edges = np.linspace(*_spread(float(everything.min()), float(everything.max())), BINS + 1)
    shares = {name: np.histogram(values, edges)[0] / len(values) for name, values in kept.items()}
    top = max(float(share.max()) for share in shares.values())
    frame = _Frame((float(edges[0]), float(edges[-1])), (0.0, 1.1 * top))
    order = list(series)
    few = len(shares) <= 2  # more fills on top of one another are mud
    drawn = [_steps(frame, edges, share, order.index(name), few) for name, share in shares.items()]
    said = "; ".join(
        f"{name}: {len(v)} values from {v.min():.4g} to {v.max():.4g}, median {np.median(v):.4g}"
        for name, v in kept.items()
    )
    if zero and edges[0] < 0 < edges[-1]:
        drawn.append(_upright(frame, 0.0))
    return _svg(frame, drawn, title=title, said=said, axis=axis, percent=True)


def lines(found: Sequence[Line], *, title: str, axis: str = "step", level: float | None = None) -> str:
    """Returns lines in one frame; "" where there is nothing to draw.

    Args:
        found: the lines, coloured from `s1` on; long ones are thinned to MOST_POINTS means.
        title: what the chart is called.
        axis: what runs from left to right.
        level: a height to mark, such as that of no change.
    """
    thin = [(k, line.name, *_thinned(line)) for k, line in enumerate(found, start=1) if line.x]
    if not thin:
        return ""
    heights = [y for _, _, _, ys in thin for y in ys] + ([] if level is None else [level])
    places = [x for _, _, xs, _ in thin for x in xs]
    frame = _Frame(_spread(min(places), max(places), 0.0), _spread(min(heights), max(heights)))
    drawn = [] if level is None else [_level(frame, level)]
    for k, _, xs, ys in thin:
        points = " ".join(f"{frame.across(x)},{frame.up(y)}" for x, y in zip(xs, ys, strict=True))
        drawn.append(f'<polyline class="line s{k % COLOURS}" points="{points}"/>')
        if len(xs) <= 12:
            drawn += [
                f'<circle class="dot s{k % COLOURS}" cx="{frame.across(x)}" cy="{frame.up(y)}" r="3"/>'
                for x, y in zip(xs, ys, strict=True)
            ]
    said = "; ".join(f"{name}: from {ys[0]:.4g} to {ys[-1]:.4g}" for _, name, _, ys in thin)
    return _svg(frame, drawn, title=title, said=said, axis=axis)


def interval_bar(interval: Interval, kind: str) -> str:
    """Returns an interval as a short bar on the line from 0 to 1, with a mark at 1/2.

    `kind` is its class: better, worse or open.
    """
    width, height = 160, 18

    def place(value: float) -> float:
        return round(4 + value * (width - 8), 2)

    middle, left, right = place(interval.estimate), place(interval.low), place(interval.high)
    return (
        f'<svg class="bar {kind}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'aria-hidden="true"><line class="axis" x1="4" y1="9" x2="{width - 4}" y2="9"/>'
        f'<line class="mark" x1="{place(0.5)}" y1="1" x2="{place(0.5)}" y2="17"/>'
        f'<line class="reach" x1="{left}" y1="9" x2="{right}" y2="9"/>'
        f'<circle class="point" cx="{middle}" cy="9" r="4"/></svg>'
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers from `low` to `high`, both finite and `low` the smaller."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= 0.7 * rough)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _spread(low: float, high: float, margin: float = 0.04) -> tuple[float, float]:
    """Returns the ends with some room beyond them; two equal numbers get room to stand in."""
    gap = high - low
    if gap <= 1e-12 * max(abs(low), abs(high), 1e-12):
        room = 0.5 * abs(low) or 0.5
        return low - room, high + room
    return low - margin * gap, high + margin * gap


def _thinned(line: Line) -> tuple[list[float], list[float]]:
    """Returns the line's places and heights, neighbours averaged where there are too many."""
    width = -(-len(line.x) // MOST_POINTS)
    if width == 1:
        return line.x, line.y
    starts = np.arange(0, len(line.x), width)
    sizes = np.diff([*starts, len(line.x)])
    x, y = (np.add.reduceat(np.array(values), starts) / sizes for values in (line.x, line.y))
    return x.tolist(), y.tolist()


def _steps(
    frame: _Frame, edges: NDArray[np.float64], shares: NDArray[np.float64], number: int, filled: bool
) -> str:
    corners = [(edges[0], 0.0)]
    for left, right, share in zip(edges[:-1], edges[1:], shares, strict=True):
        corners += [(left, share), (right, share)]
    corners.append((edges[-1], 0.0))
    points = " ".join(f"{frame.across(x)},{frame.up(y)}" for x, y in corners)
    look = "area" if filled else "area hollow"
    return f'<polygon class="{look} s{number % COLOURS}" points="{points}"/>'


def _upright(frame: _Frame, value: float) -> str:
    x = frame.across(value)
    return f'<line class="mark" x1="{x}" y1="{_TOP}" x2="{x}" y2="{HEIGHT - _BOTTOM}"/>'


def _level(frame: _Frame, value: float) -> str:
    y = frame.up(value)
    return f'<line class="mark" x1="{_LEFT}" y1="{y}" x2="{WIDTH - _RIGHT}" y2="{y}"/>'


def _svg(
    frame: _Frame, drawn: Sequence[str], *, title: str, said: str, axis: str, percent: bool = False
) -> str:
    """Returns the chart: grid and numbers, what is drawn, and its words."""
    parts = []
    for y in ticks(*frame.y, 4):
        text = f"{100 * y:.4g} %" if percent else f"{y:.4g}"
        parts.append(
            f'<line class="grid" x1="{_LEFT}" y1="{frame.up(y)}" x2="{WIDTH - _RIGHT}" y2="{frame.up(y)}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{frame.up(y) + 4}" text-anchor="end">{text}</text>'
        )
    for x in ticks(*frame.x, 5):
        parts.append(
            f'<text class="tick" x="{frame.across(x)}" y="{HEIGHT - _BOTTOM + 15}" '
            f'text-anchor="middle">{x:.6g}</text>'
        )
    parts += drawn
    parts.append(
        f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(axis)}</text>'
    )
    label = escape(f"{title}. {said}.", quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )
