"""Reading pictures: objects where they were drawn, colours by name, odd input."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffalign.common.errors import UserError
from diffalign.scenes import COLOURS, SHAPES, draw, look, parse
from diffalign.scenes.hues import to_lab


def test_a_disc_is_read_at_its_place_and_size() -> None:
    image = Image.new("RGB", (64, 64), (245, 245, 245))
    ImageDraw.Draw(image).ellipse([10, 30, 29, 49], fill=COLOURS["green"])  # 20 px wide, middle (20, 40)
    view = look(image)
    assert (view.background, view.specks, view.problem) == ("white", 0, None)
    (seen,) = view.objects
    assert (seen.shape, seen.colour) == ("circle", "green")
    assert (seen.x, seen.y) == (pytest.approx(20, abs=0.3), pytest.approx(40, abs=0.3))
    assert seen.radius == pytest.approx(10, abs=0.6)
    assert seen.edge_width < 2.0


def test_every_shape_in_every_colour_on_every_background_is_named() -> None:
    rng = np.random.default_rng(0)
    for background in ("white", "gray", "black"):
        for colour in COLOURS:
            for shape in SHAPES:
                article = "an" if colour == "orange" else "a"
                view = look(draw(parse(f"{article} {colour} {shape} on a {background} background"), rng))
                assert [(one.shape, one.colour) for one in view.objects] == [(shape, colour)]
                assert view.background == background


def test_touching_objects_of_two_colours_are_two() -> None:
    image = Image.new("RGB", (64, 64), (140, 140, 140))
    pen = ImageDraw.Draw(image)
    pen.rectangle([12, 22, 31, 41], fill=COLOURS["red"])
    pen.rectangle([32, 22, 51, 41], fill=COLOURS["blue"])
    assert [(one.shape, one.colour) for one in look(image).objects] == [("square", "red"), ("square", "blue")]


def test_large_objects_that_touch_by_a_bridge_are_counted_one_by_one() -> None:
    image = Image.new("RGB", (64, 64), (245, 245, 245))
    pen = ImageDraw.Draw(image)
    for x, y in ((17, 17), (46, 17), (17, 46)):
        pen.ellipse([x - 13, y - 13, x + 12, y + 12], fill=COLOURS["purple"])
    pen.line([17, 17, 46, 17], fill=COLOURS["purple"], width=5)
    pen.line([17, 17, 17, 46], fill=COLOURS["purple"], width=5)
    seen = look(image).objects
    assert [(one.shape, one.colour) for one in seen] == [("circle", "purple")] * 3
    for one, (x, y) in zip(
        sorted(seen, key=lambda one: (one.y > 30, one.x)), ((17, 17), (46, 17), (17, 46)), strict=True
    ):
        assert (one.x, one.y) == (pytest.approx(x, abs=1.5), pytest.approx(y, abs=1.5))


def test_arrays_and_other_sizes_read_like_the_picture() -> None:
    image = draw(parse("two small cyan rings on a black background"), np.random.default_rng(1))
    values = np.asarray(image)
    expected = look(image)
    assert len(expected.objects) == 2
    assert look(values) == expected
    assert look(values.astype(np.float32) / 255.0) == expected
    large = look(
        draw(parse("two small cyan rings on a black background"), np.random.default_rng(1), size=256)
    )
    assert [(one.shape, one.colour) for one in large.objects] == [("ring", "cyan")] * 2
    with pytest.raises(UserError, match=r"\(3, 64, 64\)"):
        look(np.moveaxis(values, 2, 0))


def test_lab_of_known_colours() -> None:
    lab = to_lab(np.array([(255, 255, 255), (0, 0, 0), (255, 0, 0)]))
    np.testing.assert_allclose(lab, [(100, 0, 0), (0, 0, 0), (53.24, 80.09, 67.20)], atol=0.1)
