"""Reading a picture of a scene from its pixels: background, objects, and whether anything else is in it.

Every pixel must be explained as background, as an object's colour, or as a mixture of the two at an object's
edge; what is left unexplained counts against the picture. This keeps out clutter, textures and gradients
whatever they look like, while soft edges and slight shifts of colour, as a small generative model makes them,
stay readable.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from diffalign.common.errors import UserError
from diffalign.scenes.draw import CANVAS, RING_HOLE, outline, paint
from diffalign.scenes.scene import BACKGROUNDS, COLOURS, SHAPES

# Distances between colours are euclidean in sRGB (0-255), unless they are called Lab.
REACH = 6.0  # px from the core of an object to the faintest end of its edge
SMOOTHING = 0.7  # px, against pixel noise; templates carry the same
DIFFERENT = 42.0  # a pixel further from the background is not background
MIXTURE_TOLERANCE = 62.0  # inside an object: distance from the line background - object colour
EDGE_TOLERANCE = 80.0  # the same within 2 px of an edge, where chroma subsampling bleeds
HAZE = 36.0  # background further than this from its colour is unexplained
UNEXPLAINED_SPOT = 7  # px: a smaller unexplained spot is a speck
UNREADABLE_AREA = 90  # px: more unexplained area than this and the picture shows no scene
BACKGROUND_SHARE = 0.33  # four large squares leave 0.45
GRAIN = 15.0  # rms of what smoothing removes, over flat pixels; pixel noise of 8 / 255 gives 7
LOCAL_GRAIN = 26.0  # the same over any 8 x 8 block
BACKGROUND_UNREST = 11.0  # rms per channel of the smoothed background around its colour
OBJECT_UNREST = 24.0  # rms per channel of an object's inner pixels around its colour
BORDER_TOUCH = 4  # px of the border that an object may cover before it counts as cut off
COLOUR_RANGE = 33.0  # Lab distance to the named colour
COLOUR_MARGIN = 0.85  # and at most this share of the distance to the next one
ALIKE = 0.76  # soft overlap (intersection over union) with the template
ALIKE_MARGIN = 0.015  # and this much more than with any other template,
ALIKE_RATIO = 1.22  # whose misfit is at least so many times as large
EDGE_WIDTH = 3.6  # px from 20 % to 80 %; a gaussian blur of 2 px gives about 3.7
# Templates as drawn, after mild blur, after more, and with the corners rounded as an image decoder rounds
# them: (px of blur before the outline is taken anew, px of blur after).
WEAR = ((0.0, 0.7), (0.0, 1.1), (0.0, 1.6), (1.3, 1.0))
MIN_RADIUS, MAX_RADIUS = 5.0, 15.5
MAX_OBJECTS = 6
_GRID = 28  # side of the square on which shapes are compared
_SPAN = 2.3  # its half side, in standard deviations of the shape


@dataclass(frozen=True)
class SeenObject:
    """One object in a picture; shape or colour is None when it is not clearly one of the known."""

    shape: str | None
    colour: str | None
    x: float
    y: float
    radius: float  # half the side of the upright box, in px of a 64 x 64 picture
    likeness: float  # overlap with the template of the best shape, 0 to 1
    edge_width: float  # px from 20 % to 80 %


@dataclass(frozen=True)
class View:
    """What a picture shows. `problem` says why it shows no scene (then there are no objects), else None."""

    background: str | None
    objects: tuple[SeenObject, ...]
    specks: int  # unexplained spots
    problem: str | None = None


def look(image: Image.Image | np.ndarray) -> View:
    """What the picture shows.

    image: PIL, or an array [H, W, 3], uint8 or float in [0, 1]; it is brought to 64 x 64 first.
    Raises UserError on an array of another shape.
    """
    raw = _pixels(image)
    smooth = ndimage.gaussian_filter(raw, (SMOOTHING, SMOOTHING, 0), mode="nearest")
    frame = np.concatenate(
        [
            smooth[:2].reshape(-1, 3),
            smooth[-2:].reshape(-1, 3),
            smooth[:, :2].reshape(-1, 3),
            smooth[:, -2:].reshape(-1, 3),
        ]
    )
    ground = np.median(frame, axis=0)
    background = _name_background(ground)
    distance = np.sqrt(((smooth - ground) ** 2).sum(axis=2))
    if (distance < DIFFERENT).mean() < BACKGROUND_SHARE:
        return View(background, (), 0, "no plain background")
    regions, colours = _segment(smooth, ground, distance)
    if not colours:
        return View(background, (), 0, "no object")
    alphas = _mixtures(smooth, ground, regions, colours)
    edges = _near_edges(alphas)
    if _textured(raw, smooth, ground, alphas, colours):
        return View(background, (), 0, "texture or noise")
    spots, area = _unexplained(smooth, ground, distance, alphas, colours, edges)
    if area > UNREADABLE_AREA or spots + len(colours) > MAX_OBJECTS:
        return View(background, (), spots, "clutter")
    objects = tuple(_identify(alpha, colour) for alpha, colour in zip(alphas, colours, strict=True))
    return View(background, objects, spots)


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """Float [64, 64, 3] in 0-255."""
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UserError(f"a picture of shape {image.shape} cannot be graded: use [height, width, 3]")
        if image.dtype != np.uint8:
            image = np.clip(np.nan_to_num(image) * 255.0 + 0.5, 0, 255).astype(np.uint8)
        image = Image.fromarray(image)
    image = image.convert("RGB")
    if image.size != (CANVAS, CANVAS):
        image = image.resize((CANVAS, CANVAS), Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.float32)


def _name_background(ground: np.ndarray) -> str | None:
    """white, gray or black, or None for a tinted ground or a level between two names."""
    if ground.max() - ground.min() > 32:
        return None
    level = float(ground.mean())
    name = min(BACKGROUNDS, key=lambda known: abs(BACKGROUNDS[known][0] - level))
    return name if abs(BACKGROUNDS[name][0] - level) < 48 else None


def _segment(
    smooth: np.ndarray, ground: np.ndarray, distance: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Regions int [64, 64] (0 none, 1.. per object) and the colour of each, float [3]; objects may touch."""
    peak = ndimage.maximum_filter(distance, 5)
    body = (distance > DIFFERENT) & (distance > 0.5 * peak)
    core = body & (distance > 0.85 * peak)
    parts, count = ndimage.label(body)
    seeds = np.zeros(parts.shape, dtype=np.int32)
    colours: list[np.ndarray] = []
    # Below 12 px of core: even a worn specimen of the smallest shape has more; it stays unexplained.
    sizes = np.bincount(parts[core], minlength=count + 1)
    for part in np.flatnonzero(sizes[1:] >= 12) + 1:
        for mask in _of_one_colour(smooth, core & (parts == part)):
            colour = np.median(smooth[mask], axis=0)
            if mask.sum() >= 12 and float(np.linalg.norm(colour - ground)) > DIFFERENT:
                colours.append(colour)
                seeds[mask] = len(colours)
    if not colours:
        return seeds, colours
    gap, (rows, columns) = ndimage.distance_transform_edt(seeds == 0, return_indices=True)
    return np.where(gap <= REACH, seeds[rows, columns], 0), colours


def _of_one_colour(smooth: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """The mask, or, where it holds clearly different colours, its parts by the name of their colour."""
    pixels = smooth[mask]
    if len(pixels) == 0:
        return []
    spread = np.sqrt(((pixels - np.median(pixels, axis=0)) ** 2).sum(axis=1))
    if (spread > 60.0).mean() < 0.12:
        return [mask]
    names = np.full(mask.shape, -1)
    names[mask] = _lab_distances(pixels).argmin(axis=1)
    masks = []
    for name in np.unique(names[mask]):
        parts, count = ndimage.label(names == name)
        masks += [parts == part for part in range(1, count + 1)]
    return masks


def _mixtures(
    smooth: np.ndarray, ground: np.ndarray, regions: np.ndarray, colours: list[np.ndarray]
) -> list[np.ndarray]:
    """Per object the share of its colour in each pixel of its region, float [64, 64] in 0-1."""
    alphas = []
    for index, colour in enumerate(colours, start=1):
        line = colour - ground
        share = (smooth - ground) @ line / float(line @ line)
        alphas.append(np.where(regions == index, np.clip(share, 0.0, 1.0), 0.0))
    return alphas


def _near_edges(alphas: list[np.ndarray]) -> np.ndarray:
    """True within 2 px of an object's edge, bool [64, 64]."""
    near = np.zeros(alphas[0].shape, dtype=bool)
    for alpha in alphas:
        high = ndimage.maximum_filter(alpha, 5)
        low = ndimage.minimum_filter(alpha, 5)
        near |= (high > 0.5) & (low < 0.5)
    return near


def _textured(
    raw: np.ndarray, smooth: np.ndarray, ground: np.ndarray, seen: list[np.ndarray], colours: list[np.ndarray]
) -> bool:
    """True when the background or an object is not plain: more than pixel noise, a pattern, a gradient."""
    edges = _near_edges(seen)
    plain = ~edges & (np.sum(seen, axis=0) < 0.5)
    if not plain.any() or ((smooth - ground)[plain] ** 2).mean() > BACKGROUND_UNREST**2:
        return True
    for alpha, colour in zip(seen, colours, strict=True):
        inside = ndimage.binary_erosion(alpha > 0.5)
        if inside.any() and ((raw - colour)[inside] ** 2).mean() > OBJECT_UNREST**2:
            return True
    energy = np.where(edges, 0.0, ((raw - smooth) ** 2).mean(axis=2))
    flat = (~edges).astype(np.float32)
    blocks = [field.reshape(8, 8, 8, 8).sum(axis=(1, 3)) for field in (energy, flat)]
    if blocks[0].sum() > GRAIN**2 * max(blocks[1].sum(), 1.0):
        return True
    return bool((blocks[0] > LOCAL_GRAIN**2 * np.maximum(blocks[1], 16.0)).any())


def _unexplained(
    smooth: np.ndarray,
    ground: np.ndarray,
    distance: np.ndarray,
    alphas: list[np.ndarray],
    colours: list[np.ndarray],
    edges: np.ndarray,
) -> tuple[int, int]:
    """Number and summed area (px) of the spots that are neither background, object nor a mixture of both."""
    rebuilt = np.broadcast_to(ground, smooth.shape).copy()
    for alpha, colour in zip(alphas, colours, strict=True):
        rebuilt += alpha[..., None] * (colour - ground)
    rest = np.sqrt(((smooth - rebuilt) ** 2).sum(axis=2))
    covered = np.sum(alphas, axis=0) > 0.5
    odd = rest > np.where(edges, EDGE_TOLERANCE, np.where(covered, MIXTURE_TOLERANCE, HAZE))
    # Faint mixtures far from an edge are haze or ghosts: also unexplained.
    odd |= ~edges & ~covered & (distance > HAZE)
    parts, count = ndimage.label(odd, structure=np.ones((3, 3)))
    areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    areas = areas[areas >= UNEXPLAINED_SPOT]
    return len(areas), int(areas.sum())


def _identify(alpha: np.ndarray, colour: np.ndarray) -> SeenObject:
    """The object whose soft mask and colour these are."""
    rows, columns = np.nonzero(alpha > 0.5)
    radius = 0.25 * (np.ptp(rows) + np.ptp(columns) + 2.0) if len(rows) else 0.0
    x, y, deviation_x, deviation_y = _moments(alpha)
    width = _edge_width(alpha)
    likeness = _likeness(alpha, x, y, deviation_x, deviation_y, radius)
    order = np.argsort(likeness)[::-1]
    best = float(likeness[order[0]])
    second = float(likeness[order[1]])
    clear = best >= ALIKE and best - second >= ALIKE_MARGIN and 1.0 - second >= ALIKE_RATIO * (1.0 - best)
    rim = alpha > 0.5
    touch = max(int(line.sum()) for line in (rim[0], rim[-1], rim[:, 0], rim[:, -1]))
    fits = MIN_RADIUS <= radius <= MAX_RADIUS and width <= EDGE_WIDTH and touch <= BORDER_TOUCH
    shape = SHAPES[int(order[0])] if clear and fits else None
    return SeenObject(shape, _name_colour(colour), x, y, float(radius), best, width)


def _moments(alpha: np.ndarray) -> tuple[float, float, float, float]:
    """Centre x, y and standard deviations in x, y of a soft mask, in px."""
    total = float(alpha.sum()) + 1e-9
    column, row = alpha.sum(axis=0), alpha.sum(axis=1)
    places = np.arange(alpha.shape[0]) + 0.5
    x, y = float(column @ places) / total, float(row @ places) / total
    wide, tall = float(column @ (places - x) ** 2) / total, float(row @ (places - y) ** 2) / total
    return x, y, max(wide, 1e-6) ** 0.5, max(tall, 1e-6) ** 0.5


def _edge_width(alpha: np.ndarray) -> float:
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


def _likeness(
    alpha: np.ndarray, x: float, y: float, deviation_x: float, deviation_y: float, radius: float
) -> np.ndarray:
    """Soft overlap of the object with each shape's template, both at the same moments; float [shapes]."""
    steps = (np.arange(_GRID) + 0.5) / _GRID * 2.0 - 1.0
    columns = x - 0.5 + _SPAN * deviation_x * steps
    rows = y - 0.5 + _SPAN * deviation_y * steps
    sampled = _bilinear(alpha, rows, columns)
    templates, ratios = _templates(7.5 if radius < 8.5 else 9.5 if radius < 10.5 else 12.0)
    overlap = np.minimum(sampled, templates).sum(axis=(2, 3)) / np.maximum(sampled, templates).sum(
        axis=(2, 3)
    )
    stretch = np.abs(np.log(deviation_x / deviation_y / ratios))
    # Moments hide a stretch: a bar would pass as a square. Up to 15 % is free, then it costs.
    overlap = overlap * np.exp(-4.0 * np.maximum(stretch - 0.14, 0.0))
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
    grids, ratios = (
        np.zeros((len(WEAR), len(SHAPES), _GRID, _GRID)),
        np.zeros((len(WEAR), len(SHAPES))),
    )
    steps = (np.arange(_GRID) + 0.5) / _GRID * 2.0 - 1.0
    for index, shape in enumerate(SHAPES):
        mask = paint(outline(shape, radius), RING_HOLE * radius if shape == "ring" else 0.0)
        for level, (rounding, sigma) in enumerate(WEAR):
            worn = ndimage.gaussian_filter(mask, rounding) > 0.5 if rounding else mask
            soft = ndimage.gaussian_filter(worn.astype(np.float64), sigma)
            x, y, deviation_x, deviation_y = _moments(soft)
            rows, columns = y - 0.5 + _SPAN * deviation_y * steps, x - 0.5 + _SPAN * deviation_x * steps
            grids[level, index] = _bilinear(soft, rows, columns)
            ratios[level, index] = deviation_x / deviation_y
    return grids, ratios


def _name_colour(colour: np.ndarray) -> str | None:
    """The name of the nearest colour in Lab, or None when it is far from all or between two."""
    distances = _lab_distances(colour[None])[0]
    first, second = np.sort(distances)[:2]
    if first > COLOUR_RANGE or first > COLOUR_MARGIN * second:
        return None
    return list(COLOURS)[int(distances.argmin())]


def _lab_distances(colours: np.ndarray) -> np.ndarray:
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
