"""Drawings of scenes: flat antialiased shapes on plain backgrounds, right ones and faulty ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from diffalign.common.errors import UserError
from diffalign.scenes.scene import BACKGROUNDS, COLOURS, MAX_COUNT, SHAPES, Scene, SceneObject

CANVAS = 64  # lengths below are in pixels of a 64 x 64 picture
SUPERSAMPLING = 4
RADII: dict[str | None, tuple[float, float]] = {"small": (7.0, 8.2), None: (7.5, 12.0), "large": (11.7, 12.8)}
LARGE_FROM = 10.0  # the radius that divides small from large
FAULTS: tuple[str, ...] = ("binding", "count", "position", "blur", "clutter")
RING_HOLE = 0.5  # radius of a ring's hole, as a share of its outer radius
_GAP = 3.0  # least distance between two objects and between an object and the border
_QUADRANTS = ((16.5, 16.5), (47.5, 16.5), (16.5, 47.5), (47.5, 47.5))
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Placed:
    """One object in the picture: centre and radius (about half its width) in pixels, tilt in radians."""

    shape: str
    colour: tuple[int, int, int]
    x: float
    y: float
    radius: float
    tilt: float = 0.0


def draw(scene: Scene, rng: np.random.Generator, *, size: int = CANVAS) -> Image.Image:
    """A right picture of the scene: RGB, `size` x `size`; place, size, tilt and hue jitter with `rng`."""
    return _render(_layout(scene, rng), _background(scene, rng), size)


def draw_faulty(scene: Scene, rng: np.random.Generator, kind: str, *, size: int = CANVAS) -> Image.Image:
    """A picture that breaks the scene in one way, RGB, `size` x `size`.

    kind: "binding" (two objects swap their colours; a lone kind of object takes another colour or shape),
    "count" (one to three objects more or fewer), "position" (the opposite relation; without a relation one
    object is cut off by the border), "blur" (gaussian, sigma 3 to 5 px), "clutter" (small pieces and strokes
    strewn over the picture).
    Raises UserError on another kind.
    """
    if kind == "binding":
        return draw(_rebind(scene, rng), rng, size=size)
    if kind == "count":
        return _render(_miscounted(scene, rng), _background(scene, rng), size)
    if kind == "position" and scene.relation is not None:
        return draw(replace(scene, relation=_OPPOSITE[scene.relation]), rng, size=size)
    if kind == "position":
        return _render(_cut_off(_layout(scene, rng), rng), _background(scene, rng), size)
    if kind == "blur":
        sigma = rng.uniform(3.0, 5.0) * size / CANVAS
        return draw(scene, rng, size=size).filter(ImageFilter.GaussianBlur(sigma))
    if kind == "clutter":
        placed, background = _layout(scene, rng), _background(scene, rng)
        return _render(placed, background, size, clutter=rng)
    raise UserError(f"unknown fault {kind!r} of a drawing: use one of {', '.join(FAULTS)}")


def outline(shape: str, radius: float, tilt: float = 0.0) -> np.ndarray:
    """The polygon of a shape around (0, 0): float [n, 2] (x, y), y down. A ring gives its outer circle."""
    if shape in ("circle", "ring"):
        angles = np.linspace(0.0, 2.0 * math.pi, 48, endpoint=False)
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    elif shape == "square":
        points = 0.92 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float)
    elif shape == "diamond":
        points = 1.1 * np.array([(0, -1), (1, 0), (0, 1), (-1, 0)], dtype=float)
    elif shape == "triangle":
        points = np.array([(0, -1), (1.08, 0.95), (-1.08, 0.95)], dtype=float)
    elif shape == "cross":
        a = 0.36
        quarter = [(a, -1), (a, -a), (1, -a)]
        points = np.array(
            [
                (x * c - y * s, x * s + y * c)
                for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))
                for x, y in quarter
            ],
            dtype=float,
        )
    else:
        raise UserError(f"unknown shape {shape!r} in a scene: use one of {', '.join(SHAPES)}")
    turn = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
    return radius * points @ turn.T


def paint(points: np.ndarray, hole: float = 0.0) -> np.ndarray:
    """The share of each pixel that a polygon around the middle of the canvas covers: float [64, 64] in 0-1.

    hole: radius of a round hole in its middle, px.
    """
    side = CANVAS * SUPERSAMPLING
    image = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(image)
    for outer, level in ((points, 255), (outline("circle", hole), 0)):
        if outer is points or hole > 0:
            pen.polygon(
                [(float(x) - 0.5, float(y) - 0.5) for x, y in (outer + CANVAS / 2) * SUPERSAMPLING],
                fill=level,
            )
    return np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float64) / 255.0


def _layout(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """The objects of a right drawing, at least `_GAP` apart and inside the picture."""
    if scene.relation is not None:
        centres = _related_centres(scene.relation, rng)
        # Two objects share the picture: the larger end of the free range would leave no gap between them.
        radii = [float(rng.uniform(8.0, 11.2)) for _ in range(2)]
        kinds = list(scene.objects)
    else:
        item = scene.objects[0]
        low, high = RADII[item.size]
        base = float(rng.uniform(low, high))
        # Equal objects look equal: their sizes differ by a few percent only.
        radii = [float(np.clip(base * rng.uniform(0.97, 1.03), low, high)) for _ in range(item.count)]
        centres = _centres(item.count, base, rng)
        kinds = [item] * item.count
    return [
        _place(kind, x, y, radius, rng) for kind, (x, y), radius in zip(kinds, centres, radii, strict=True)
    ]


def _place(item: SceneObject, x: float, y: float, radius: float, rng: np.random.Generator) -> Placed:
    return Placed(
        item.shape, _jitter(COLOURS[item.colour], rng, 10), x, y, radius, float(rng.uniform(-0.06, 0.06))
    )


def _centres(count: int, radius: float, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres of equal objects: around the middle for one, else one per quadrant."""
    if count == 1:
        return [(32.0 + float(rng.uniform(-9, 9)), 32.0 + float(rng.uniform(-9, 9)))]
    slots = [_QUADRANTS[index] for index in sorted(rng.permutation(4)[:count])]
    slack = max(0.2, (31.0 - 2.2 * radius - _GAP) / 2)
    return [(x + float(rng.uniform(-slack, slack)), y + float(rng.uniform(-slack, slack))) for x, y in slots]


def _related_centres(relation: str, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Two centres, first and second object: about 32 px apart along the relation, at most 6 px across it."""
    along = [16.5 + float(rng.uniform(-1.5, 1.5)), 47.5 + float(rng.uniform(-1.5, 1.5))]
    middle = 32.0 + float(rng.uniform(-6, 6))
    across = [middle + float(rng.uniform(-3, 3)) for _ in range(2)]
    if relation in ("right of", "below"):
        along.reverse()
    if relation in ("left of", "right of"):
        return list(zip(along, across, strict=True))
    return list(zip(across, along, strict=True))


def _jitter(colour: tuple[int, int, int], rng: np.random.Generator, amount: int) -> tuple[int, int, int]:
    shifted = np.clip(np.array(colour) + rng.integers(-amount, amount + 1, size=3), 0, 255)
    return int(shifted[0]), int(shifted[1]), int(shifted[2])


def _background(scene: Scene, rng: np.random.Generator) -> tuple[int, int, int]:
    level = BACKGROUNDS[scene.background][0] + int(rng.integers(-8, 9))
    return level, level, level


def _render(
    placed: list[Placed],
    background: tuple[int, int, int],
    size: int,
    *,
    clutter: np.random.Generator | None = None,
) -> Image.Image:
    """The picture of placed objects: painted four times as large, then averaged down."""
    scale = size * SUPERSAMPLING / CANVAS
    image = Image.new("RGB", (size * SUPERSAMPLING, size * SUPERSAMPLING), background)
    pen = ImageDraw.Draw(image)
    for item in placed:
        centre = np.array([item.x, item.y])
        _polygon(pen, (centre + outline(item.shape, item.radius, item.tilt)) * scale, item.colour)
        if item.shape == "ring":
            _polygon(pen, (centre + outline("circle", RING_HOLE * item.radius)) * scale, background)
    if clutter is not None:
        _strew(pen, clutter, scale)
    return image.reduce(SUPERSAMPLING)


def _polygon(pen: ImageDraw.ImageDraw, points: np.ndarray, colour: tuple[int, int, int]) -> None:
    pen.polygon([(float(x) - 0.5, float(y) - 0.5) for x, y in points], fill=colour)


def _strew(pen: ImageDraw.ImageDraw, rng: np.random.Generator, scale: float) -> None:
    """Paints 7 to 14 small pieces and strokes in vocabulary colours anywhere."""
    colours = list(COLOURS.values())
    for _ in range(int(rng.integers(7, 15))):
        colour = _jitter(colours[int(rng.integers(len(colours)))], rng, 25)
        x, y = rng.uniform(3, 61, size=2)
        if rng.random() < 0.4:
            dx, dy = rng.uniform(-18, 18, size=2)
            pen.line([x * scale, y * scale, (x + dx) * scale, (y + dy) * scale], colour, round(1.6 * scale))
        else:
            shape = SHAPES[int(rng.integers(len(SHAPES)))]
            points = outline(shape, float(rng.uniform(2.0, 4.5)), float(rng.uniform(0, math.pi)))
            _polygon(pen, (np.array([x, y]) + points) * scale, colour)


def _rebind(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with colours bound to the wrong shapes."""
    if scene.relation is not None:
        first, second = scene.objects
        swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        return replace(scene, objects=swapped)
    item = scene.objects[0]
    if rng.random() < 0.5:
        others = [shape for shape in SHAPES if shape != item.shape]
        return replace(scene, objects=(replace(item, shape=others[int(rng.integers(len(others)))]),))
    others = [colour for colour in COLOURS if colour != item.colour]
    return replace(scene, objects=(replace(item, colour=others[int(rng.integers(len(others)))]),))


def _miscounted(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """The scene with one to three objects more or fewer."""
    if scene.relation is not None:
        placed = _layout(scene, rng)
        if rng.random() < 0.5:
            return [placed[int(rng.integers(2))]]
        item = scene.objects[int(rng.integers(2))]
        return [*placed, _place(item, *_free_place(placed, rng), 6.5, rng)]
    item = scene.objects[0]
    others = [count for count in range(1, MAX_COUNT + 1) if count != item.count]
    wrong = replace(item, count=others[int(rng.integers(len(others)))])
    return _layout(replace(scene, objects=(wrong,)), rng)


def _free_place(placed: list[Placed], rng: np.random.Generator) -> tuple[float, float]:
    """The roomiest of many random places for one more object."""
    places = rng.uniform(9, 55, size=(200, 2))
    room = np.min([np.hypot(*(places - (item.x, item.y)).T) - item.radius for item in placed], axis=0)
    x, y = places[int(np.argmax(room))]
    return float(x), float(y)


def _cut_off(placed: list[Placed], rng: np.random.Generator) -> list[Placed]:
    """The objects, one of them pushed half out of the picture at the border next to it."""
    index = int(rng.integers(len(placed)))
    item = placed[index]
    offset = float(rng.uniform(-0.2, 0.2)) * item.radius
    edge = CANVAS - offset if item.x >= CANVAS / 2 else offset
    moved = replace(item, x=edge)
    if rng.random() < 0.5:
        moved = replace(item, y=CANVAS - offset if item.y >= CANVAS / 2 else offset)
    return [*placed[:index], moved, *placed[index + 1 :]]
