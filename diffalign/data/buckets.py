"""How pictures of any size become tensors of a few sizes: aspect buckets; one crop and one flip a group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.common import draws
from diffalign.common.errors import UserError
from diffalign.data.specs import PreprocessSpec

Size = tuple[int, int]
"""Height and width in pixels."""


class TooMuchCropped(Exception):
    """A group whose pictures no bucket holds without cutting too much of one."""


@dataclass(frozen=True)
class Placement:
    """Where every image of one group is cut.

    Args:
        size: the bucket, (height, width) in pixels.
        crop: fractions in [0, 1] of the overhang that is cut off at the top and at the left.
        flip: mirror left to right.
    """

    size: Size
    crop: tuple[float, float]
    flip: bool


def bucket_sizes(resolution: int, multiple: int, kind: str) -> list[Size]:
    """Sizes with sides that are multiples of `multiple` and an area of at most about `resolution` squared.

    Aspect ratios go from 1:2 to 2:1, as in SDXL's training (Podell et al. 2023, arXiv 2307.01952, app. I).
    """
    if resolution % multiple:
        raise UserError(f"preprocess.resolution is {resolution}: use a multiple of {multiple} for this base")
    if kind == "square":
        return [(resolution, resolution)]
    shortest = math.ceil(resolution / math.sqrt(2) / multiple) * multiple
    sizes = {(resolution, resolution)}
    for short in range(shortest, resolution, multiple):
        long = int(resolution * resolution / short / multiple) * multiple
        sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def place(
    images: Sequence[Image.Image], sizes: Sequence[Size], spec: PreprocessSpec, *key: int | str
) -> Placement:
    """The placement of a group: the bucket that crops it least, crop and flip drawn from `key`.

    A picture of aspect a keeps exp(-|log a - log b|) of its area in a bucket of aspect b. Least cropped is
    where the product of these shares is largest; of a pair any bucket between the two is: then the one
    nearest to the mean log aspect, which cuts the same share of both.

    Raises:
        TooMuchCropped: a picture would lose more than `max_crop` of its area.
    """
    aspects = [math.log(image.width / image.height) for image in images]
    mean = sum(aspects) / len(aspects)

    def cost(size: Size) -> tuple[float, float, Size]:
        bucket = math.log(size[1] / size[0])
        cropped = sum(abs(aspect - bucket) for aspect in aspects)
        return round(cropped, 9), abs(bucket - mean), size  # rounded: equal ones differ by their last bit

    size = min(sizes, key=cost)
    furthest = max(abs(aspect - math.log(size[1] / size[0])) for aspect in aspects)
    if 1.0 - math.exp(-furthest) > spec.max_crop:
        raise TooMuchCropped
    crop = (0.5, 0.5)
    if spec.crop == "random":
        crop = (draws.uniform("crop-top", *key), draws.uniform("crop-left", *key))
    return Placement(size, crop, spec.flip and draws.uniform("flip", *key) < 0.5)


def fit(image: Image.Image, placement: Placement) -> tuple[Tensor, tuple[int, int]]:
    """`([3, H, W] uint8, (top, left))`: resized to cover the bucket and cropped; aspect kept."""
    height, width = placement.size
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    top = round(placement.crop[0] * (covering[1] - height))
    left = round(placement.crop[1] * (covering[0] - width))
    # Resized and cropped in one call: the covering picture of a thin strip would fill the memory.
    across, down = image.width / covering[0], image.height / covering[1]
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    inside = (*box[:2], min(box[2], image.width), min(box[3], image.height))  # rounding may leave the picture
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=inside)
    if placement.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.uint8)).permute(2, 0, 1)
    return pixels.contiguous(), (top, left)
