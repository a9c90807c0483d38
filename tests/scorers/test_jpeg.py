"""JPEG size: the bytes are those of the file that Pillow writes, the sign is that of the scale."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.common.errors import UserError
from diffalign.scorers import load_scorer


def pictures() -> list[Image.Image]:
    """Six pictures 64 x 64, from one colour to noise on every pixel."""
    rng = np.random.default_rng(0)
    found = []
    for rows in (0, 12, 24, 36, 48, 64):
        pixels = np.full((64, 64, 3), 128, dtype=np.uint8)
        pixels[:rows] = rng.integers(0, 256, (rows, 64, 3))
        found.append(Image.fromarray(pixels))
    return found


def contract_case(folder: Path):
    return {}, pictures(), None, None


def written(picture: Image.Image, folder: Path, quality: int = 95) -> int:
    """The size of the file that Pillow writes."""
    picture.save(folder / "it.jpg", quality=quality)
    return (folder / "it.jpg").stat().st_size


def test_the_value_is_the_size_of_the_file_in_thousands_of_bytes(tmp_path):
    sizes = torch.tensor([written(picture, tmp_path) / 1000 for picture in pictures()])
    values = load_scorer("jpeg")(pictures())
    torch.testing.assert_close(values, sizes, rtol=1e-6, atol=0)
    assert sizes[0] < 1 < sizes[5] and values.diff().min() > 0  # more noise, more bytes


def test_each_scale_has_its_sign_and_factor(tmp_path):
    size = written(pictures()[3], tmp_path) / 1000
    for scale, expected in (
        ("incompressibility", size),
        ("compressibility", -size),
        ("compressibility_500", -size / 500),
    ):
        (value,) = load_scorer("jpeg", scale=scale)(pictures()[3:4]).tolist()
        assert value == pytest.approx(expected, rel=1e-6)


def test_quality_is_passed_on_and_named_in_the_version(tmp_path):
    scorer = load_scorer("jpeg", quality=40)
    (value,) = scorer(pictures()[5:]).tolist()
    assert value == pytest.approx(written(pictures()[5], tmp_path, quality=40) / 1000, rel=1e-6)
    assert value < load_scorer("jpeg")(pictures()[5:]).item()
    assert scorer.version.startswith("libjpeg-") and scorer.version.endswith("@q40")


def test_only_pixels_count(tmp_path):
    """Neither the comment nor the profile of the file that a picture came from, nor a channel beside RGB."""
    plain = pictures()[2]
    file = io.BytesIO()
    plain.save(file, format="PNG")
    marked = Image.open(file)
    marked.info |= {"comment": b"x" * 5000, "icc_profile": b"y" * 5000, "exif": b"Exif\0\0" + b"z" * 500}
    both = load_scorer("jpeg")([plain, marked, plain.convert("RGBA")])
    assert both[0] == both[1] == both[2]


def test_a_tensor_is_written_as_its_eight_bits(tmp_path):
    pixels = torch.from_numpy(np.array(pictures()[4])).permute(2, 0, 1)[None].float() / 255
    assert load_scorer("jpeg")(pixels).item() == pytest.approx(
        written(pictures()[4], tmp_path) / 1000, rel=1e-6
    )
    # A third of a grey level more or less is the same file.
    nudged = (pixels + 0.3 / 255).clamp(0, 1)
    assert torch.equal(load_scorer("jpeg")(nudged), load_scorer("jpeg")(pixels))


def test_a_picture_that_no_jpeg_holds_is_nan_and_says_so():
    scores = load_scorer("jpeg").score([Image.new("RGB", (65501, 1)), Image.new("RGB", (65500, 1))])
    assert scores.values.isnan().tolist() == [True, False]
    assert "65501 x 1" in scores.errors[0] and scores.errors[1] is None


def test_bad_options_are_refused():
    with pytest.raises(UserError, match="did you mean 'compressibility'"):
        load_scorer("jpeg", scale="compressability")
    for quality in (0, 101):
        with pytest.raises(UserError, match="use 1 to 100"):
            load_scorer("jpeg", quality=quality)
