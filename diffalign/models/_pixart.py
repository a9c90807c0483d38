"""The transformer of PixArt, able to hold adapters."""

from __future__ import annotations

from typing import ClassVar

import diffusers
from diffusers.loaders import PeftAdapterMixin


class PixArtTransformer2DModel(diffusers.PixArtTransformer2DModel, PeftAdapterMixin):
    """The network of diffusers (0.42), with what it lacks of the others: adapters, and blocks to compile.

    It keeps the name, which is written beside its weights: they are those of any other.
    """

    _repeated_blocks: ClassVar[list[str]] = ["BasicTransformerBlock"]
