"""Charts: the numbers are where they should be, and the SVG is well formed whatever the words."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest

from diffalign.common.statistics import Interval
from diffalign.evaluation.charts import (
    BINS,
    HEIGHT,
    MOST_POINTS,
    WIDTH,
    Line,
    histogram,
    interval_bar,
    lines,
    ticks,
)


def points(svg: str, kind: str) -> list[list[tuple[float, float]]]:
    """The corners of every polyline or polygon."""
    found = [element for element in ElementTree.fromstring(svg).iter() if element.tag == kind]
    return [[tuple(map(float, p.split(","))) for p in element.get("points").split()] for element in found]


def test_a_histogram_holds_every_value_once() -> None:
    """Heights are shares, so that the areas of 300 and of 40 values are equal."""
    rng = np.random.default_rng(0)
    svg = histogram({"base": rng.normal(size=300), "aligned": rng.normal(1, 1, 40)}, title="t", axis="a")
    (base, aligned) = points(svg, "polygon")
    label = ElementTree.fromstring(svg).get("aria-label")
    assert "base: 300 values" in label and "aligned: 40 values" in label
    areas = []
    for corners in (base, aligned):
        assert len(corners) == 2 * BINS + 2
        heights = [corners[0][1] - corners[1 + 2 * k][1] for k in range(BINS)]
        assert all(height >= 0 for height in heights)
        areas.append(sum(heights))
    assert areas[0] == pytest.approx(areas[1], rel=0.002) and areas[0] > 100
    tallest = [max(corners[0][1] - y for _, y in corners) for corners in (base, aligned)]
    assert max(tallest) == pytest.approx((HEIGHT - 40) / 1.1, rel=0.01)  # the top is 10 % above the tallest


def test_values_that_are_missing_are_not_drawn() -> None:
    assert histogram({"base": [math.nan], "aligned": []}, title="t", axis="a") == ""
    svg = histogram({"base": [math.nan, 1.0, math.inf], "aligned": []}, title="t", axis="a")
    assert "base: 1 values" in svg and svg.count("<polygon") == 1


def test_zero_is_marked_where_it_lies_inside() -> None:
    assert 'class="mark"' in histogram({"d": [-1.0, 1.0]}, title="t", axis="a", zero=True)
    assert 'class="mark"' not in histogram({"d": [1.0, 2.0]}, title="t", axis="a", zero=True)


def test_a_line_rises_where_its_numbers_rise() -> None:
    svg = lines([Line("up", [1, 2, 3], [0.0, 1.0, 2.0]), Line("none", [], [])], title="t", level=0.0)
    ((first, second, third),) = points(svg, "polyline")
    assert first[0] < second[0] < third[0] and first[1] > second[1] > third[1]
    assert second[1] == pytest.approx((first[1] + third[1]) / 2, abs=0.02)
    mark = next(e for e in ElementTree.fromstring(svg).iter() if e.get("class") == "mark")
    assert float(mark.get("y1")) == first[1]
    assert lines([Line("none", [], [])], title="t") == ""


def test_long_lines_are_thinned_to_means() -> None:
    svg = lines([Line("long", list(range(10_001)), [1.0] * 10_000 + [3.0])], title="t")
    (drawn,) = points(svg, "polyline")
    assert MOST_POINTS / 2 < len(drawn) <= MOST_POINTS
    assert "from 1 to" in ElementTree.fromstring(svg).get("aria-label")


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-30, 2e-30], [1e30, -1e30], [1.0, 1.0 + 1e-15]])
def test_any_numbers_can_be_drawn(values: list[float]) -> None:
    for svg in (
        histogram({"base": values}, title="t", axis="a"),
        lines([Line("x", [float(k) for k in range(len(values))], values)], title="t"),
    ):
        for kind in ("polygon", "polyline"):
            for x, y in (corner for shape in points(svg, kind) for corner in shape):
                assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT


def test_words_of_others_stay_words() -> None:
    evil = '"><script>alert(1)</script>&'
    for svg in (
        histogram({evil: [1.0, 2.0]}, title=evil, axis=evil),
        lines([Line(evil, [1, 2], [1, 2])], title=evil, axis=evil),
    ):
        tree = ElementTree.fromstring(svg)
        assert "script" not in {element.tag for element in tree.iter()} and evil in tree.get("aria-label")


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-0.3, 0.3, 4) == [-0.2, 0, 0.2]
    for low, high in ((1e-9, 3e-9), (-5e8, 7e8), (0.999, 1.001)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 12 and all(low <= tick <= high for tick in found)


def test_an_interval_bar_by_hand() -> None:
    bar = ElementTree.fromstring(interval_bar(Interval(0.5, 0.25, 0.75, 9, 0.95), "open"))
    assert bar.get("class") == "bar open"
    point = next(e for e in bar.iter() if e.get("class") == "point")
    reach = next(e for e in bar.iter() if e.get("class") == "reach")
    assert (float(reach.get("x1")) + float(reach.get("x2"))) / 2 == float(point.get("cx")) == 80
