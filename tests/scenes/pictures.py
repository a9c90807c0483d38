"""Scenes, wrong captions and altered pictures that the tests of this folder share."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from diffalign.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Scene, draw, sample_scene

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def drawn(n: int, seed: int) -> list[tuple[Scene, Image.Image]]:
    """`n` random scenes with a right picture each."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, split="any") for _ in range(n)]
    return [(scene, draw(scene, rng)) for scene in scenes]


def changed(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one word changed, so that no right picture of it fits any more."""

    def other(known: list[str], value: str) -> str:
        return str(rng.choice([word for word in known if word != value]))

    item = scene.objects[0]
    ways = (
        ["background", "count", "shape", "colour"]
        if scene.relation is None
        else ["background", "relation", "swap"]
    )
    if item.size is not None:
        ways.append("size")
    way = str(rng.choice(ways))
    if way == "background":
        return replace(scene, background=other(list(BACKGROUNDS), scene.background))
    if way == "relation":
        return replace(scene, relation=other(list(RELATIONS), str(scene.relation)))
    if way == "swap":
        first, second = scene.objects
        return replace(
            scene, objects=(replace(first, colour=second.colour), replace(second, colour=first.colour))
        )
    if way == "count":
        item = replace(item, count=int(rng.choice([n for n in (1, 2, 3, 4) if n != item.count])))
    elif way == "shape":
        item = replace(item, shape=other(list(SHAPES), item.shape))
    elif way == "colour":
        item = replace(item, colour=other(list(COLOURS), item.colour))
    else:
        item = replace(item, size=other(list(SIZES), str(item.size)))
    return replace(scene, objects=(item,))


def blurred(image: Image.Image, sigma: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma))


def noisy(image: Image.Image, rng: np.random.Generator, deviation: float = 8.0) -> Image.Image:
    values = np.asarray(image, dtype=float)
    return Image.fromarray(np.clip(values + rng.normal(0, deviation, values.shape), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int = 75) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def shifted(image: Image.Image, right: int, down: int) -> Image.Image:
    """The picture moved by at most 4 px; what comes in is the background."""
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="edge")
    return Image.fromarray(padded[4 - down : 68 - down, 4 - right : 68 - right])


def tiled(image: Image.Image, times: int) -> Image.Image:
    """The picture repeated `times` x `times`, at its own size."""
    side = image.width // times
    return Image.fromarray(
        np.tile(np.asarray(image.resize((side, side), Image.Resampling.BOX)), (times, times, 1))
    )
