"""Pictures small enough to stand inside a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from diffalign.data.pictures import BadImage
from diffalign.evaluation.pairs import Shot

SIDE = 288
"""Longest side of a thumbnail; smaller pictures keep their pixels."""

MOST_BYTES = 6_000_000
"""Of all thumbnails of a page together, encoded."""

_QUALITY, _SMALL = 80, 128


@dataclass(frozen=True)
class Thumbnail:
    """A `data:` address, its size in pixels, and whether they are so few that they should stay visible."""

    address: str
    width: int
    height: int
    small: bool


def thumbnail(shot: Shot) -> Thumbnail | None:
    """Returns the picture as WebP (without loss where it is small), None where it is broken."""
    try:
        picture = shot.image.open()
    except BadImage:
        return None
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    small = max(picture.size) <= _SMALL
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=_QUALITY, lossless=small)
    content = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Thumbnail(f"data:image/webp;base64,{content}", *picture.size, small)
