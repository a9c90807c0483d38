"""Names of colours: of objects by distance in CIE Lab, of backgrounds by their level of gray."""

from __future__ import annotations

import functools

import numpy as np

from diffalign.scenes.scene import BACKGROUNDS, COLOURS

COLOUR_RANGE = 33.0  # Lab distance to the named colour
COLOUR_MARGIN = 0.85  # and at most this share of the distance to the next one
TINT = 40.0  # spread of the channels (0-255) up to which a background is white, gray or black
LEVEL_RANGE = 48.0  # distance (0-255) of its level to the named one


def name_background(ground: np.ndarray) -> str | None:
    """white, gray or black, or None for a tinted ground or a level between two names."""
    if ground.max() - ground.min() > TINT:
        return None
    level = float(ground.mean())
    name = min(BACKGROUNDS, key=lambda known: abs(BACKGROUNDS[known][0] - level))
    return name if abs(BACKGROUNDS[name][0] - level) < LEVEL_RANGE else None


def name_colour(colour: np.ndarray) -> str | None:
    """The name of the nearest colour in Lab, or None when it is far from all or between two."""
    distances = lab_distances(colour[None])[0]
    first, second = np.sort(distances)[:2]
    if first > COLOUR_RANGE or first > COLOUR_MARGIN * second:
        return None
    return list(COLOURS)[int(distances.argmin())]


def lab_distances(colours: np.ndarray) -> np.ndarray:
    """Lab distances [n, names] of sRGB colours [n, 3] to the named colours."""
    return np.sqrt(((to_lab(colours)[:, None] - _palette()[None]) ** 2).sum(axis=2))


@functools.cache
def _palette() -> np.ndarray:
    return to_lab(np.array(list(COLOURS.values()), dtype=np.float64))


def to_lab(colours: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of sRGB colours [..., 3] in 0-255."""
    unit = np.asarray(colours, dtype=np.float64) / 255.0
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / np.array([0.95047, 1.0, 1.08883])
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack(
        [116 * root[..., 1] - 16, 500 * (root[..., 0] - root[..., 1]), 200 * (root[..., 1] - root[..., 2])],
        axis=-1,
    )
