"""JPEG size: how many bytes a picture takes as a JPEG file; a reward without a network, to try trainers on.

Scales (`scale`):
    incompressibility    +kB: larger files are better
    compressibility      -kB: smaller files are better
    compressibility_500  -kB / 500

The first two are those of kvablack/ddpo-pytorch (rewards.py), the third is flow_grpo's `jpeg_compressibility`
(yifan123/flow_grpo, flow_grpo/rewards.py), where the other sign stays undivided.

Convention: a kB is 1,000 bytes. Quality is 95, and colour is stored at half resolution (4:2:0), as Pillow
does unless told otherwise. The size grows with that of the picture: only pictures of one size compare.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffalign.common.errors import UserError
from diffalign.scorers._base import Scorer, Scores

if TYPE_CHECKING:
    from PIL import Image

    from diffalign.scorers._base import Images

FACTORS = {"incompressibility": 1.0, "compressibility": -1.0, "compressibility_500": -1 / 500}
"""Scale -> what a kB counts."""

LONGEST = 65500
"""The longest side in pixels that libjpeg writes."""


@dataclass(kw_only=True)
class Plugin(Scorer):
    """Size of pictures as JPEG files, in memory.

    Values are those of the libjpeg that Pillow is built with; `version` names it. A picture of more than
    65,500 pixels on a side is NaN and says so in `errors`.

    Args:
        scale: incompressibility | compressibility | compressibility_500.
        quality: Pillow's, 1 to 100.
    """

    scale: str = "incompressibility"
    quality: int = 95

    def __post_init__(self) -> None:
        from PIL import features

        self._check_options(scale=FACTORS)
        if not 1 <= self.quality <= 100:
            raise UserError(f"scorer jpeg: quality is {self.quality}: use 1 to 100")
        library = features.version_feature("libjpeg_turbo") or features.version_codec("jpg")
        self.version = f"libjpeg-{library}@q{self.quality}"

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        import torch

        from diffalign.scorers._pixels import as_pictures

        values: list[float] = []
        errors: list[str | None] = []
        for picture in as_pictures(images):
            if min(picture.size) < 1 or max(picture.size) > LONGEST:
                values.append(torch.nan)
                errors.append(f"a picture of {picture.size[0]} x {picture.size[1]} pixels makes no JPEG file")
                continue
            values.append(FACTORS[self.scale] * jpeg_bytes(picture, self.quality) / 1000)
            errors.append(None)
        return Scores(torch.tensor(values), errors=errors)


def jpeg_bytes(picture: Image.Image, quality: int) -> int:
    """Returns the number of bytes of an RGB picture as a JPEG file."""
    buffer = io.BytesIO()
    # Pillow would write the comment of the file that a picture was read from; pixels alone shall count.
    picture.save(buffer, format="JPEG", quality=quality, comment=b"")
    return buffer.tell()
