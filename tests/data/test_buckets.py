"""Buckets, crops and flips: aspect kept, and everything shared by the pictures of a group."""

from __future__ import annotations

import resource
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from diffalign.common.errors import UserError
from diffalign.data.buckets import Placement, PreprocessSpec, TooMuchCropped, bucket_sizes, fit, place
from tests.tiny_training import picture


def test_sizes_by_hand() -> None:
    """Around 32 pixels in steps of 4: the short side goes from 32 / sqrt(2) = 22.6, rounded up to 24, to 32.

    24: 1024 / 24 = 42.7, down to 40. 28: 1024 / 28 = 36.6, down to 36. Both ways round, and the square.
    """
    assert bucket_sizes(32, 4, "aspect") == [(24, 40), (28, 36), (32, 32), (36, 28), (40, 24)]
    assert bucket_sizes(32, 4, "square") == [(32, 32)]


@pytest.mark.parametrize(("resolution", "multiple"), [(1024, 64), (1024, 32), (512, 64), (64, 8), (256, 8)])
def test_sizes_of_real_bases(resolution: int, multiple: int) -> None:
    sizes = bucket_sizes(resolution, multiple, "aspect")
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert 0.5 <= width / height <= 2.0
        assert resolution**2 * (1 - 2 * multiple / resolution) <= height * width <= resolution**2
        assert (width, height) in sizes
    if (resolution, multiple) == (1024, 64):
        assert (832, 1216) in sizes and (1344, 768) in sizes  # two of SDXL's own


def test_a_resolution_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"preprocess\.resolution is 1000: use a multiple of 64 for this base"
    ):
        bucket_sizes(1000, 64, "aspect")


SIZES = bucket_sizes(32, 4, "aspect")


@pytest.mark.parametrize(
    ("pictures", "bucket"),
    [
        ([(640, 480), (640, 480)], (28, 36)),  # 4:3 = 1.333; 36/28 = 1.286, 40/24 = 1.667
        ([(1000, 200)], (24, 40)),  # wider than any bucket
        # of 1/2 and 2 any bucket between keeps 1/4 in all: the mean of log 1/2 and log 2 is 0
        ([(32, 64), (64, 32)], (32, 32)),
        # twice 1/2: 24/40 = 0.6 keeps (0.5 / 0.6)^2 (0.6 / 2) = 0.21, 28/36 = 0.78 only 0.16
        ([(32, 64), (32, 64), (64, 32)], (40, 24)),
    ],
)
def test_a_group_goes_to_the_bucket_that_crops_it_least(
    pictures: list[tuple[int, int]], bucket: tuple[int, int]
) -> None:
    group = [Image.new("RGB", size) for size in pictures]
    assert place(group, SIZES, PreprocessSpec(max_crop=1.0), "key").size == bucket


def test_a_group_that_loses_too_much_is_refused() -> None:
    """4:3 and 3:4 share the square and lose 1/4 each; 1000 x 200 in 40 x 24 keeps (5/3) / 5 = 1/3."""
    mixed = [Image.new("RGB", (400, 300)), Image.new("RGB", (300, 400))]
    assert place(mixed, SIZES, PreprocessSpec(max_crop=0.2501), "key").size == (32, 32)
    with pytest.raises(TooMuchCropped):
        place(mixed, SIZES, PreprocessSpec(max_crop=0.2499), "key")
    with pytest.raises(TooMuchCropped):
        place([Image.new("RGB", (1000, 200))], SIZES, PreprocessSpec(), "key")


def test_crop_and_flip_are_drawn_from_the_key() -> None:
    group = [picture(0)]
    spec = PreprocessSpec(crop="random", flip=True)
    placements = [place(group, SIZES, spec, 0, f"row-{number}") for number in range(400)]
    assert placements[3] == place([picture(9)], SIZES, spec, 0, "row-3")  # whatever is in the pictures
    flips = sum(placement.flip for placement in placements)
    assert 160 <= flips <= 240  # 200 +- 4 standard deviations of sqrt(400) / 2 = 10
    for side in (0, 1):
        fractions = np.array([placement.crop[side] for placement in placements])
        assert fractions.min() >= 0.0 and fractions.max() < 1.0
        assert abs(fractions.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / 20
    assert np.corrcoef(np.array([placement.crop for placement in placements]).T)[0, 1] < 0.2
    plain = place(group, SIZES, PreprocessSpec(), 0, "row-3")
    assert plain.crop == (0.5, 0.5) and not plain.flip


def stripes(width: int, height: int, slope: int = 4) -> Image.Image:
    """Red grows from left to right by `slope` a pixel, green from top to bottom."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([slope * x, slope * y, 0 * x], axis=-1).astype(np.uint8))


def test_a_picture_of_the_right_size_keeps_its_pixels() -> None:
    source = stripes(40, 24)
    pixels, corner = fit(source, Placement((24, 40), (0.5, 0.5), flip=False))
    assert corner == (0, 0) and pixels.dtype == torch.uint8 and pixels.shape == (3, 24, 40)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(source))
    mirrored, _ = fit(source, Placement((24, 40), (0.5, 0.5), flip=True))
    assert torch.equal(mirrored, pixels.flip(2))


@pytest.mark.parametrize(
    ("fraction", "corner"),
    [((0.0, 0.0), (0, 0)), ((0.5, 0.5), (0, 4)), ((1.0, 1.0), (0, 8)), ((1.0, 0.3), (0, 2))],
)
def test_what_hangs_over_is_cut_off(fraction: tuple[float, float], corner: tuple[int, int]) -> None:
    """48 x 24 into 40 x 24: 8 columns hang over; the fraction of them goes at the left (0.3 * 8 = 2.4: 2)."""
    pixels, found = fit(stripes(48, 24), Placement((24, 40), fraction, flip=False))
    assert found == corner
    assert (pixels[0, 0] / 4).round().tolist() == list(range(corner[1], corner[1] + 40))


def test_the_aspect_ratio_is_kept() -> None:
    """96 x 48 into 40 x 24: scaled by max(24 / 48, 40 / 96) = 1/2 to 48 x 24, 4 columns off each side."""
    pixels, corner = fit(stripes(96, 48, 2), Placement((24, 40), (0.5, 0.5), flip=False))
    assert corner == (0, 4)
    across, down = pixels[0, 12, 10:30].float().diff().mean(), pixels[1, 6:18, 20].float().diff().mean()
    assert across.item() == pytest.approx(down.item(), rel=0.05)


def test_small_and_odd_pictures_fill_the_bucket() -> None:
    for size in ((1, 1), (3, 50), (7, 13), (33, 32)):
        pixels, _ = fit(picture(1, size), Placement((24, 40), (0.9, 0.9), flip=True))
        assert pixels.shape == (3, 24, 40)


def test_pixels_are_those_of_covering_and_cropping() -> None:
    """In two steps, as by hand; rounding between the passes may differ by a grey level or two."""
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    source = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))
    for size, crop in (((24, 40), (0.3, 0.6)), ((64, 64), (1.0, 1.0)), ((40, 24), (0.0, 0.5))):
        height, width = size
        scale = max(height / 70, width / 90)
        covering = source.resize((round(90 * scale), round(70 * scale)), Image.Resampling.BICUBIC)
        pixels, (top, left) = fit(source, Placement(size, crop, flip=False))
        assert (top, left) == (
            round(crop[0] * (covering.height - height)),
            round(crop[1] * (covering.width - width)),
        )
        expected = np.asarray(covering.crop((left, top, left + width, top + height)), dtype=np.float32)
        assert np.abs(pixels.permute(1, 2, 0).numpy() - expected).max() < 2.5


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
def test_a_thin_strip_does_not_fill_the_memory() -> None:
    """8 x 2000 covers 1024 x 1024 as 1024 x 256,000: 1 GB, of which 4 MB are used."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels, corner = fit(Image.new("RGB", (8, 2000)), Placement((1024, 1024), (0.5, 0.5), flip=False))
    assert pixels.shape == (3, 1024, 1024) and corner == (127488, 0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": "aspects"}, "unknown preprocess.buckets 'aspects': did you mean 'aspect'"),
        ({"crop": "centre"}, "unknown preprocess.crop 'centre': did you mean 'center'"),
        ({"size_conditioning": "image"}, "unknown preprocess.size_conditioning 'image'"),
        ({"max_crop": 1.5}, "preprocess.max_crop is 1.5: use a share in"),
        ({"batch_size": 0}, "preprocess.batch_size is 0: use 1 or more"),
        ({"resolution": 0}, "preprocess.resolution is 0"),
        ({"memory_limit_gb": 0.0}, "preprocess.memory_limit_gb is 0.0: use a value above 0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PreprocessSpec(**options)
