"""Names of shapes: soft masks against templates of the drawn shapes, brought to the same moments."""

from __future__ import annotations

import functools

import numpy as np
from scipy import ndimage

from diffalign.scenes.draw import RING_HOLE, outline, paint
from diffalign.scenes.scene import SHAPES

ALIKE = 0.76  # soft overlap (intersection over union) with the template
ALIKE_MARGIN = 0.015  # and this much more than with any other template,
ALIKE_RATIO = 1.22  # whose misfit is at least so many times as large
# Templates as drawn, after mild blur, after more, with the corners rounded as an image decoder rounds them,
# and with a narrow hole: (px of blur before the outline is taken anew, px of blur after, share of a ring that
# is hole).
WEAR = (
    (0.0, 0.7, RING_HOLE),
    (0.0, 1.1, RING_HOLE),
    (0.0, 1.6, RING_HOLE),
    (1.3, 1.0, RING_HOLE),
    (0.0, 1.1, 0.38),
)
# How far the ratio of width to height may be from the drawn one at no cost, as a logarithm.
STRETCH = {"triangle": 0.28}
STRETCH_OTHERS = 0.15
_GRID = 28  # side of the square on which shapes are compared
_SPAN = 2.3  # its half side, in standard deviations of the shape


def moments(alpha: np.ndarray) -> tuple[float, float, float, float]:
    """Centre x, y and standard deviations in x, y of a soft mask, in px."""
    total = float(alpha.sum()) + 1e-9
    column, row = alpha.sum(axis=0), alpha.sum(axis=1)
    places = np.arange(alpha.shape[0]) + 0.5
    x, y = float(column @ places) / total, float(row @ places) / total
    wide, tall = float(column @ (places - x) ** 2) / total, float(row @ (places - y) ** 2) / total
    return x, y, max(wide, 1e-6) ** 0.5, max(tall, 1e-6) ** 0.5


def edge_width(alpha: np.ndarray) -> float:
    """Width of the edge from 20 % to 80 %, px, of the upright or of the level edges, whichever is wider.

    Each is the area between the two levels over the length of the outline, and that length is the summed
    gradient (coarea formula). Two directions, because a smear along one would hide in their mean.
    """
    between = (alpha > 0.2) & (alpha < 0.8)
    down, right = np.gradient(alpha)
    slope = np.hypot(down, right)
    upright = np.abs(right) >= np.abs(down)
    return max(
        float((between & way).sum()) / max(float(slope[way].sum()), 1.0) for way in (upright, ~upright)
    )


def name_shape(alpha: np.ndarray, radius: float) -> tuple[str | None, float]:
    """The shape of a soft mask of about this radius (None: not clearly one), and its likeness, 0-1."""
    likeness = _likeness(alpha, radius)
    order = np.argsort(likeness)[::-1]
    best, second = float(likeness[order[0]]), float(likeness[order[1]])
    clear = best >= ALIKE and best - second >= ALIKE_MARGIN and 1.0 - second >= ALIKE_RATIO * (1.0 - best)
    return (SHAPES[int(order[0])] if clear else None), best


def _likeness(alpha: np.ndarray, radius: float) -> np.ndarray:
    """Soft overlap of the object with each shape's template, both at the same moments; float [shapes]."""
    x, y, deviation_x, deviation_y = moments(alpha)
    steps = (np.arange(_GRID) + 0.5) / _GRID * 2.0 - 1.0
    columns = x - 0.5 + _SPAN * deviation_x * steps
    rows = y - 0.5 + _SPAN * deviation_y * steps
    sampled = _bilinear(alpha, rows, columns)
    templates, ratios = _templates(7.5 if radius < 8.5 else 9.5 if radius < 10.5 else 12.0)
    overlap = np.minimum(sampled, templates).sum(axis=(2, 3)) / np.maximum(sampled, templates).sum(
        axis=(2, 3)
    )
    stretch = np.abs(np.log(deviation_x / deviation_y / ratios))
    # Moments hide a stretch: a bar would pass as a square. Some is free, more of it costs.
    free = np.array([STRETCH.get(shape, STRETCH_OTHERS) for shape in SHAPES])
    overlap = overlap * np.exp(-4.0 * np.maximum(stretch - free, 0.0))
    # One wear for all shapes, the one that suits the best of them: shapes are compared on equal terms.
    return overlap[overlap.max(axis=1).argmax()]


def _bilinear(field: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The field at the crossings of rows and columns (px, pixel centres at integers); 0 outside."""
    padded = np.pad(field, 1)
    row_weights, column_weights = _hats(rows + 1, len(padded)), _hats(columns + 1, len(padded))
    return row_weights @ padded @ column_weights.T


def _hats(places: np.ndarray, length: int) -> np.ndarray:
    """Linear interpolation weights [places, length]."""
    return np.maximum(0.0, 1.0 - np.abs(np.clip(places, 0, length - 1)[:, None] - np.arange(length)[None, :]))


@functools.cache
def _templates(radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Templates [wear, shapes, grid, grid] at normal moments, and their ratios of deviations x / y."""
    grids = np.zeros((len(WEAR), len(SHAPES), _GRID, _GRID))
    ratios = np.zeros((len(WEAR), len(SHAPES)))
    steps = (np.arange(_GRID) + 0.5) / _GRID * 2.0 - 1.0
    for index, shape in enumerate(SHAPES):
        for level, (rounding, sigma, hole) in enumerate(WEAR):
            mask = paint(outline(shape, radius), hole * radius if shape == "ring" else 0.0)
            worn = ndimage.gaussian_filter(mask, rounding) > 0.5 if rounding else mask
            soft = ndimage.gaussian_filter(worn.astype(np.float64), sigma)
            x, y, deviation_x, deviation_y = moments(soft)
            rows, columns = y - 0.5 + _SPAN * deviation_y * steps, x - 0.5 + _SPAN * deviation_x * steps
            grids[level, index] = _bilinear(soft, rows, columns)
            ratios[level, index] = deviation_x / deviation_y
    return grids, ratios
