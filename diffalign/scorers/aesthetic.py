"""LAION aesthetic score: how much people liked pictures like this one, from 1 to 10, whatever the prompt.

A small head on L2-normalised CLIP features of the picture. Published heads, told apart by their tensors:
(christophschuhmann/improved-aesthetic-predictor, Apache-2.0; LAION-AI/aesthetic-predictor, MIT):
    v2        five linear layers without activation, on OpenAI's ViT-L/14 (sac+logos+ava1): papers' choice
    v2_relu   the same with ReLU between them (ava+logos)
    v1        one linear layer on ViT-L/14; v1_b32 on ViT-B/32
Layers without activation are one linear map; they are fused, which agrees with the layers to 1e-6.

Scale: `points`, nominally 1 to 10, not clamped.

Convention: features must be L2-normalised, or scores of 20 to 30 come out, and OpenAI's weights need
QuickGELU, which open_clip forgets for `ViT-L-14` (see `_towers.py`). On a GPU the authors take the features
in half precision; dtype=fp32 is the default here. Pictures are prepared as by CLIP (shorter side to 224 by
PIL, centre crop).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from diffalign.common.errors import UserError
from diffalign.scorers._base import Scores
from diffalign.scorers._tower_scorer import TowerScorer

if TYPE_CHECKING:
    import torch

    from diffalign.scorers._aesthetic_heads import Head
    from diffalign.scorers._base import Images
    from diffalign.scorers._towers import Towers


@dataclass(kw_only=True)
class Plugin(TowerScorer):
    """Aesthetic score of pictures.

    Args:
        path: the CLIP weights that the head was trained on: OpenAI's, as an open_clip tag, file or folder.
        arch: open_clip's name of their architecture; null: the one that the head was trained on.
        head: v2 | v2_relu | v1 | v1_b32 (downloaded once, checked by their hash), or a file in one of these
            layouts.
    """

    scale = "points"

    path: str = "openai"
    head: str = "v2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._head: torch.nn.Module | None = None

    def load(self, device: str = "cpu") -> Self:
        """Returns this scorer with its weights on `device`; the head computes in float32."""
        from PIL import Image

        from diffalign.scorers._aesthetic_heads import open_head

        head = open_head(self.head)
        self._arch = self.arch or self._arch_of(head)
        super().load(device)
        width = self.embed_images([Image.new("RGB", (8, 8))]).shape[-1]
        if width != head.width:
            raise UserError(
                f"scorer aesthetic: the head reads {head.width} features and {self.towers.name} has {width}: "
                "give the CLIP weights that the head was trained on"
            )
        self._head = head.module.to(device)
        self.version = f"{head.name}@{head.identity}/{self.version}"
        return self

    def _open(self, device: str) -> Towers:
        from diffalign.scorers._towers import open_towers

        return open_towers(
            self.path, arch=self._arch, revision=self.revision, device=device, dtype=self.dtype
        )

    def _arch_of(self, head: Head) -> str | None:
        """Returns the architecture of OpenAI's weights for a head; None where they say their own.

        Raises:
            UserError: the head could stand on several.
        """
        place = Path(self.path).expanduser()
        if place.is_dir() or (not place.is_file() and "/" in self.path):  # a folder, or a hub id
            return None
        if head.arch is None:
            raise UserError(
                f"scorer aesthetic: {self.head} reads {head.width} features, as several architectures have: "
                "give arch=, for example arch=ViT-B-32"
            )
        # A tag knows its activation, a bare file of OpenAI's weights does not.
        return f"{head.arch}-quickgelu" if place.is_file() else head.arch

    def modules(self) -> list[torch.nn.Module]:
        """Returns CLIP and the head."""
        towers = super().modules()
        assert self._head is not None
        return [*towers, self._head]

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        assert self._head is not None
        return Scores(self._head(self._features(images)).squeeze(-1).cpu())
