"""Drift measures: hand-worked pictures of a few pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.common.errors import UserError
from diffalign.evaluation.drift import (
    DriftMeter,
    as_array,
    colour_entropy,
    edge_density,
    embedding_distances,
    mean_group_vendi,
    pixel_distances,
)


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, colour)


def halves(left: tuple[int, int, int], right: tuple[int, int, int]) -> Image.Image:
    picture = flat(left)
    picture.paste(right, (4, 0, 8, 8))
    return picture


def test_pixel_distances_by_hand():
    black, white = as_array(flat((0, 0, 0))), as_array(flat((255, 255, 255)))
    assert pixel_distances(black, white) == (1, 1)
    assert pixel_distances(black, black) == (0, 0)
    # Half of the pixels move by 1: the mean is 1/2, the root mean square sqrt(1/2).
    mean, rms = pixel_distances(black, as_array(halves((0, 0, 0), (255, 255, 255))))
    assert mean == 0.5 and rms == pytest.approx(math.sqrt(0.5))
    assert all(math.isnan(number) for number in pixel_distances(black, as_array(flat((0, 0, 0), (8, 9)))))


def test_edge_density_by_hand():
    assert edge_density(as_array(flat((90, 10, 200)))) == 0
    # A step of 1 between columns 3 and 4: central differences see 1/2 in both, 2 of 8 columns.
    assert edge_density(as_array(halves((0, 0, 0), (255, 255, 255)))) == 2 / 8
    # Blue against black is a step of 0.114 in grey: no edge.
    assert edge_density(as_array(halves((0, 0, 0), (0, 0, 255)))) == 0
    assert edge_density(as_array(flat((1, 2, 3), (1, 1)))) == 0


def test_colour_entropy_by_hand():
    assert colour_entropy(as_array(flat((255, 255, 255)))) == 0
    assert colour_entropy(as_array(halves((255, 0, 0), (0, 0, 255)))) == 1
    four = halves((255, 0, 0), (0, 0, 255))
    four.paste((0, 255, 0), (0, 4, 4, 8))
    four.paste((255, 255, 0), (4, 4, 8, 8))
    assert colour_entropy(as_array(four)) == 2
    # 250 and 255 share a bin (224 to 255).
    assert colour_entropy(as_array(halves((250, 250, 250), (255, 255, 255)))) == 0


def test_embedding_distance_by_hand():
    base = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    aligned = [[5.0, 0.0], [0.0, 2.0], [0.6, 0.8]]
    np.testing.assert_allclose(embedding_distances(base, aligned), [0, 1, 0.4], atol=1e-12)


def test_diversity_within_groups_by_hand():
    features = np.array([[1.0, 0], [0, 1.0], [1.0, 0], [1.0, 0], [0.3, 0.4]])
    # "a": two orthogonal pictures (2), "b": two equal ones (1), "c" alone does not count.
    assert mean_group_vendi(features, ["a", "a", "b", "b", "c"]) == pytest.approx(1.5)
    assert math.isnan(mean_group_vendi(features, range(5)))


class MeanColour:
    """The simplest real embedder: a picture's mean colour."""

    def embed_images(self, images):
        return torch.tensor(np.array([as_array(image).mean(axis=(0, 1)) for image in images]))


def test_the_meter_adds_up():
    red, green, blue = flat((255, 0, 0)), flat((0, 255, 0)), flat((0, 0, 255))
    meter = DriftMeter(MeanColour(), batch_size=2)
    for base, aligned, group in ((red, red, "a"), (green, red, "a"), (blue, red, "b")):
        meter.add(base, aligned, group)
    report = meter.report()
    # Pixels: 0, then two of three channels move by 1, twice.
    assert report["pixel_mean_abs"].estimate == pytest.approx((0 + 2 / 3 + 2 / 3) / 3)
    assert report["embedding_distance"].estimate == pytest.approx(2 / 3)
    assert report["vendi"]["base"] == pytest.approx(3) and report["vendi"]["aligned"] == pytest.approx(1)
    assert report["vendi"]["ratio"] == pytest.approx(1 / 3)
    assert report["vendi_per_prompt"]["base"] == pytest.approx(2)
    assert report["colour_entropy"]["difference"].estimate == 0
    assert report["edge_density"]["base"] == 0


def test_what_cannot_be_measured_is_left_out():
    meter = DriftMeter()
    meter.add(flat((0, 0, 0)), flat((0, 0, 0), (4, 4)), "a")
    report = meter.report()
    assert set(report) == {"edge_density", "colour_entropy"}
    assert DriftMeter().report() == {}


def test_features_that_are_not_finite_are_refused() -> None:
    class Overflowing:
        def embed_images(self, images):
            return torch.full((len(images), 4), math.nan)

    meter = DriftMeter(Overflowing())
    meter.add(Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8)), "p")
    with pytest.raises(UserError, match="features hold NaN"):
        meter.report()
