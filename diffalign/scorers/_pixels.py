"""From pictures to the pixels that a vision tower sees, as a scorer's authors made them or by torch alone.

Two modes. `reference` takes every picture as 8 bits, since that is what files hold, and resizes it as the
authors do. `tensor` stays in floating point from end to end: a gradient reaches the picture, and pictures of
one size are resized together. They differ by about one grey level; each scorer states what that is worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

Mode = Literal["reference", "tensor"]


@dataclass(frozen=True)
class Preprocess:
    """How pictures become the pixels that a vision tower sees.

    Attributes:
        size: height and width of the result.
        resize: "shortest" (shorter side to `size`, then centre crop), "squash" (both sides), "longest"
            (longer side to `size`, then padding, rounded as by open_clip), "letterbox" (the same, rounded as
            by HPS v2: one row more or less for some sizes, such as 768 x 420).
        shortest: length of the shorter side before the crop; None: that of `size`.
        interpolation: "bicubic" or "bilinear".
        fill: grey level 0-255 of the padding.
        crop: "round" (torchvision: half a pixel too many goes to the even side) or "floor" (transformers).
        resizes: what the authors resize in mode "reference": "picture" (PIL, 8 bits) or "tensor" (floats
            with antialiasing, which may leave [0, 1]).
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    resize: str = "shortest"
    interpolation: str = "bicubic"
    shortest: int | None = None
    fill: int = 0
    resizes: str = "picture"
    crop: str = "round"

    def __call__(self, images: list[Image.Image] | torch.Tensor, mode: Mode = "reference") -> torch.Tensor:
        """Returns normalised pixels float32 [B, 3, *size] of PIL pictures or of a tensor in [0, 1].

        A gradient passes in mode "tensor" only.
        """
        from torchvision.transforms.v2 import functional as tv

        if mode == "tensor":
            pixels = self._fitted_tensors(as_tensors(images))
        elif self.resizes == "tensor":
            pixels = self._fitted_tensors([to_floats(image) for image in as_pictures(images)])
        else:
            fitted = [tv.pil_to_tensor(self._fit(image)) for image in as_pictures(images)]
            pixels = torch.stack(fitted).float() / 255
        return tv.normalize(pixels, list(self.mean), list(self.std))

    def _fitted_tensors(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Returns pictures [3, h, w] at the tower's size; those of one size are resized together."""
        by_size: dict[torch.Size, list[int]] = {}
        for place, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(place)
        fitted: list[torch.Tensor] = [torch.empty(0)] * len(images)
        for places in by_size.values():
            batch = self._fit(torch.stack([images[place] for place in places]))
            if self.resizes == "picture":  # PIL cannot leave the 8 bits, torch's bicubic can
                batch = batch.clamp(0, 1)
            for place, image in zip(places, batch, strict=True):
                fitted[place] = image
        return torch.stack(fitted)

    def _fit(self, image: Any) -> Any:
        """Returns the picture (PIL or tensor) at the tower's size."""
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as tv

        mode = InterpolationMode(self.interpolation)
        height, width = self.size
        if self.resize == "squash":
            return tv.resize(image, [height, width], mode, antialias=True)
        old_height, old_width = tv.get_size(image)
        if self.resize == "shortest" and (self.shortest is not None or height == width):
            # An int makes torchvision round the longer side as the published transforms do.
            return self._cropped(tv.resize(image, [self.shortest or height], mode, antialias=True))
        if self.resize == "letterbox":
            scale = min(height / old_height, width / old_width)
            new_size = [max(1, round(old_height * scale)), max(1, round(old_width * scale))]
        else:
            pick = min if self.resize == "shortest" else max
            ratio = pick(old_height / height, old_width / width)
            new_size = [max(1, round(old_height / ratio)), max(1, round(old_width / ratio))]
        fitted = tv.resize(image, new_size, mode, antialias=True)
        if self.resize == "shortest":
            return self._cropped(fitted)
        new_height, new_width = tv.get_size(fitted)
        left, top = (width - new_width) // 2, (height - new_height) // 2
        borders = [left, top, width - new_width - left, height - new_height - top]
        return tv.pad(fitted, borders, fill=self.fill if isinstance(fitted, Image.Image) else self.fill / 255)

    def _cropped(self, image: Any) -> Any:
        """Returns the middle of a picture, at the tower's size."""
        from torchvision.transforms.v2 import functional as tv

        height, width = self.size
        if self.crop == "round":
            return tv.center_crop(image, [height, width])
        old_height, old_width = tv.get_size(image)
        top, left = (old_height - height) // 2, (old_width - width) // 2
        return tv.crop(image, top, left, height, width)


def as_pictures(images: list[Image.Image] | torch.Tensor) -> list[Image.Image]:
    """Returns RGB pictures of 8 bits; of a tensor [B, 3, H, W] in [0, 1] what a saved file would hold."""
    if not isinstance(images, torch.Tensor):
        return [image if image.mode == "RGB" else image.convert("RGB") for image in images]
    scaled = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return [Image.fromarray(image.numpy()) for image in scaled.permute(0, 2, 3, 1).cpu()]


def as_tensors(images: list[Image.Image] | torch.Tensor) -> list[torch.Tensor]:
    """Returns float32 pictures [3, h, w] in [0, 1]; a gradient passes."""
    if isinstance(images, torch.Tensor):
        return list(images.float())
    return [to_floats(image) for image in as_pictures(images)]


def to_floats(image: Image.Image) -> torch.Tensor:
    """Returns an RGB picture as float32 [3, h, w] in [0, 1]."""
    from torchvision.transforms.v2 import functional as tv

    return tv.pil_to_tensor(image).float() / 255
