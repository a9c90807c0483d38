"""Drawings: size, determinism, hand-computed areas, gaps, faults."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from diffalign.common.errors import UserError
from diffalign.scenes import FAULTS, Scene, SceneObject, draw, draw_faulty, parse, sample_scene
from diffalign.scenes.draw import outline, paint
from tests.scenes.pictures import drawn


def test_drawings_are_rgb_of_the_asked_size_and_equal_for_equal_seeds() -> None:
    scene = parse("two red circles on a white background")
    image = draw(scene, np.random.default_rng(0))
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert draw(scene, np.random.default_rng(0), size=96).size == (96, 96)
    assert image.tobytes() == draw(scene, np.random.default_rng(0)).tobytes()
    assert image.tobytes() != draw(scene, np.random.default_rng(1)).tobytes()


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi * 100),
        ("square", (2 * 9.2) ** 2),
        ("diamond", 2 * 11.0**2),
        ("triangle", 0.5 * 21.6 * 19.5),
        ("cross", 2 * 20 * 7.2 - 7.2**2),
        ("ring", math.pi * (100 - 25)),
    ],
)
def test_a_shape_of_radius_10_covers_its_area(shape: str, area: float) -> None:
    mask = paint(outline(shape, 10.0), hole=5.0 if shape == "ring" else 0.0)
    # The painter adds about an eighth of a pixel all around.
    assert mask.sum() == pytest.approx(area, rel=0.05)


def test_objects_are_apart_and_inside_and_as_many_as_said() -> None:
    for scene, image in drawn(300, seed=2):
        values = np.asarray(image, dtype=int)
        mask = np.abs(values - values[0, 0]).sum(axis=2) > 60
        assert ndimage.label(mask, structure=np.ones((3, 3)))[1] == scene.total
        assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
        # Every object is 13 px or more across: a decoder with 4 px cells must be able to draw it.
        boxes = ndimage.find_objects(ndimage.label(mask, structure=np.ones((3, 3)))[0])
        assert min(min(box[0].stop - box[0].start, box[1].stop - box[1].start) for box in boxes) >= 13


def test_faulty_drawings_differ_from_the_right_one_and_are_deterministic() -> None:
    rng = np.random.default_rng(3)
    for kind in FAULTS:
        for _ in range(20):
            scene = sample_scene(rng, split="train")
            first = draw_faulty(scene, np.random.default_rng(4), kind)
            assert first.tobytes() == draw_faulty(scene, np.random.default_rng(4), kind).tobytes()
            assert first.tobytes() != draw(scene, np.random.default_rng(4)).tobytes()


def test_an_unknown_fault_is_refused() -> None:
    scene = Scene((SceneObject("circle", "red"),), "white")
    with pytest.raises(UserError, match="melted"):
        draw_faulty(scene, np.random.default_rng(0), "melted")
