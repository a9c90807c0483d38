"""Small pictures with some structure, unlike the flat ones of `pickapic_files`, each seed another one."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def blocks(seed: int, size: int | tuple[int, int] = 32) -> Image.Image:
    """Returns a picture of 8x8 blurred random colours; `size` is a side or (width, height)."""
    colours = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    both = (size, size) if isinstance(size, int) else size
    return Image.fromarray(colours).resize(both, Image.Resampling.BICUBIC)


def encoded(seed: int, size: int | tuple[int, int] = 32, *, kind: str = "JPEG", quality: int = 95) -> bytes:
    """Returns the bytes of `blocks`; at another quality they differ and look the same."""
    stream = io.BytesIO()
    blocks(seed, size).save(stream, kind, quality=quality)
    return stream.getvalue()
