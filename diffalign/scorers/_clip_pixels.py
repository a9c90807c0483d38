"""From pictures to the pixels that a CLIP vision tower sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """How pictures become the pixels that a vision tower sees.

    Attributes:
        size: height and width of the result.
        resize: "shortest" (shorter side to `size`, then centre crop), "squash" (both sides), "longest" (pad).
        shortest: length of the shorter side before the crop; None: that of `size`.
        interpolation: "bicubic" or "bilinear".
        fill: grey level 0-255 of the padding of "longest".
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    resize: str = "shortest"
    interpolation: str = "bicubic"
    shortest: int | None = None
    fill: int = 0

    def __call__(self, images: list[Image.Image] | torch.Tensor) -> torch.Tensor:
        """Returns normalised pixels float32 [B, 3, *size].

        PIL pictures are resized by PIL on 8 bits, as the published scores were; tensors by torch with
        antialiasing, clamped to [0, 1] as PIL's are. The two differ by about one grey level.
        """
        from torchvision.transforms.v2 import functional as tv

        if isinstance(images, torch.Tensor):
            pixels = self._fit(images.float()).clamp(0, 1)
        else:
            fitted = [tv.pil_to_tensor(self._fit(image.convert("RGB"))) for image in images]
            pixels = torch.stack(fitted).float() / 255
        return tv.normalize(pixels, list(self.mean), list(self.std))

    def _fit(self, image: Any) -> Any:
        """Returns the picture (PIL or tensor) at the tower's size."""
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as tv

        mode = InterpolationMode(self.interpolation)
        height, width = self.size
        if self.resize == "squash":
            return tv.resize(image, [height, width], mode, antialias=True)
        old_height, old_width = tv.get_size(image)
        if self.resize == "longest":
            ratio = max(old_height / height, old_width / width)
        elif self.shortest is not None or height == width:
            # An int makes torchvision round the longer side as the published transforms do.
            return tv.center_crop(
                tv.resize(image, [self.shortest or height], mode, antialias=True), [height, width]
            )
        else:
            ratio = min(old_height / height, old_width / width)
        fitted = tv.resize(image, [round(old_height / ratio), round(old_width / ratio)], mode, antialias=True)
        if self.resize == "shortest":
            return tv.center_crop(fitted, [height, width])
        new_height, new_width = tv.get_size(fitted)
        left, top = (width - new_width) // 2, (height - new_height) // 2
        borders = [left, top, width - new_width - left, height - new_height - top]
        return tv.pad(fitted, borders, fill=self.fill if isinstance(fitted, Image.Image) else self.fill / 255)
