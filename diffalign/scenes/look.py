"""Reading a picture of a scene from its pixels: background, objects, and whether anything else is in it.

Every pixel must be explained as background, as an object's colour, or as a mixture of the two at an object's
edge; what is left unexplained counts against the picture. This keeps out clutter, textures and gradients
whatever they look like, while soft edges and slight shifts of colour, as a small generative model makes them,
stay readable.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from diffalign.common.errors import UserError
from diffalign.scenes.draw import CANVAS
from diffalign.scenes.hues import lab_distances, name_background, name_colour
from diffalign.scenes.shapes import edge_width, moments, name_shape

# Distances between colours are euclidean in sRGB (0-255), unless they are called Lab.
REACH = 6.0  # px from the core of an object to the faintest end of its edge
SMOOTHING = 0.7  # px, against pixel noise
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
EDGE_WIDTH = 3.6  # px from 20 % to 80 %; a gaussian blur of 2 px gives about 3.7
MIN_RADIUS, MAX_RADIUS = 5.0, 15.5
MAX_OBJECTS = 6


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
    background = name_background(ground)
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


def _segment(
    smooth: np.ndarray, ground: np.ndarray, distance: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Regions int [64, 64] (0 none, 1.. per object) and the colour of each, float [3]; objects may touch."""
    peak = ndimage.maximum_filter(distance, 5)
    body = (distance > DIFFERENT) & (distance > 0.5 * peak)
    core = body & (distance > 0.85 * peak)
    parts, count = ndimage.label(body)
    seeds = np.zeros(parts.shape, dtype=np.int32)
    owned = np.zeros(parts.shape, dtype=bool)
    colours: list[np.ndarray] = []
    # Below 12 px of core: even a worn specimen of the smallest shape has more; it stays unexplained.
    sizes = np.bincount(parts[core], minlength=count + 1)
    for part in np.flatnonzero(sizes[1:] >= 12) + 1:
        masks = _of_one_colour(smooth, core & (parts == part))
        for mask in itertools.chain.from_iterable(map(_pull_apart, masks)):
            colour = np.median(smooth[mask], axis=0)
            if mask.sum() >= 12 and float(np.linalg.norm(colour - ground)) > DIFFERENT:
                colours.append(colour)
                seeds[mask] = len(colours)
                owned |= parts == part
    if not colours:
        return seeds, colours
    gap, (rows, columns) = ndimage.distance_transform_edt(seeds == 0, return_indices=True)
    return np.where(owned | (gap <= REACH), seeds[rows, columns], 0), colours


def _pull_apart(mask: np.ndarray) -> list[np.ndarray]:
    """The mask, or, where it is too large for one object, its parts without the bridges between them."""
    if _extent(mask) <= 2 * MAX_RADIUS:
        return [mask]
    for times in range(4):
        worn = ndimage.binary_erosion(mask, iterations=times) if times else mask
        labels, count = ndimage.label(worn)
        parts = [labels == part for part in range(1, count + 1)]
        parts = [part for part in parts if part.sum() >= 12]
        if len(parts) > 1 and max(_extent(part) for part in parts) <= 2 * MAX_RADIUS:
            return parts
    return [mask]


def _extent(mask: np.ndarray) -> int:
    """The longer side of the upright box around a mask, px."""
    rows, columns = np.nonzero(mask)
    return int(max(np.ptp(rows), np.ptp(columns))) + 1 if len(rows) else 0


def _of_one_colour(smooth: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """The mask, or, where it holds clearly different colours, its parts by the name of their colour."""
    pixels = smooth[mask]
    if len(pixels) == 0:
        return []
    spread = np.sqrt(((pixels - np.median(pixels, axis=0)) ** 2).sum(axis=1))
    if (spread > 60.0).mean() < 0.12:
        return [mask]
    names = np.full(mask.shape, -1)
    names[mask] = lab_distances(pixels).argmin(axis=1)
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
    x, y, _, _ = moments(alpha)
    width = edge_width(alpha)
    name, best = name_shape(alpha, radius)
    rim = alpha > 0.5
    touch = max(int(line.sum()) for line in (rim[0], rim[-1], rim[:, 0], rim[:, -1]))
    fits = MIN_RADIUS <= radius <= MAX_RADIUS and width <= EDGE_WIDTH and touch <= BORDER_TOUCH
    return SeenObject(name if fits else None, name_colour(colour), x, y, float(radius), best, width)
