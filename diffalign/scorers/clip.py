"""CLIP score: how well a picture fits its prompt, by the cosine of their CLIP features.

Scales (`scale`): no two public packages agree on one, so it is named with every score.
    cosine      cos, about 0.15 to 0.4
    logits      exp(logit_scale) * cos (+ bias), 100 * cos for OpenAI's and LAION's weights
    clipscore   2.5 * max(cos, 0) (Hessel et al., "CLIPScore", EMNLP 2021, equation 1)

Convention: no prompt prefix by default. The authors of CLIPScore write "A photo depicts " before each
caption (prefix="A photo depicts ") and use ViT-B/32; papers on diffusion models mostly use ViT-L/14 or
ViT-H/14 without one.
Texts longer than the model's context (77 tokens) are cut, as in all public code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from diffalign.common.errors import UserError, unknown
from diffalign.scorers._base import Scorer, Scores, check_images

if TYPE_CHECKING:
    import torch

    from diffalign.scorers._base import Images
    from diffalign.scorers._clip_towers import Towers

SCALES = ("cosine", "logits", "clipscore")


@dataclass
class Plugin(Scorer):
    """CLIP score of pictures against their prompts.

    Args:
        path: a folder (open_clip or transformers layout), a weight file, a hub id, or with `arch` an
            open_clip tag.
        arch: open_clip's name of the architecture, for a weight file or tag (ViT-L-14, ViT-H-14, ...).
        revision: of a hub id.
        scale: cosine | logits | clipscore.
        prefix: written before each prompt.
        batch_size: pictures at a time.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})
    differentiable: ClassVar[bool] = True

    path: str
    arch: str | None = None
    revision: str | None = None
    scale: str = "cosine"
    prefix: str = ""
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise unknown("scale of scorer clip", self.scale, SCALES)
        if not self.path:
            raise UserError("scorer clip: path is empty: give a folder, a weight file or a hub id")
        if self.batch_size < 1:
            raise UserError(f"scorer clip: batch_size is {self.batch_size}: use 1 or more")
        self._towers: Towers | None = None

    def load(self, device: str = "cpu") -> Self:
        """Returns this scorer with its weights on `device`, in float32 (half precision makes false ties)."""
        from diffalign.scorers._clip_towers import open_towers

        self._towers = open_towers(self.path, arch=self.arch, revision=self.revision, device=device)
        self.version = f"{self._towers.name}@{self._towers.identity}"
        return self

    def modules(self) -> list[torch.nn.Module]:
        """Returns the CLIP model."""
        return [self.towers.module]

    @property
    def towers(self) -> Towers:
        """The loaded towers."""
        if self._towers is None:
            raise UserError("scorer clip has no weights yet: call .load() first")
        return self._towers

    def embed_images(self, images: Images) -> torch.Tensor:
        """Returns L2-normalised picture features float32 [B, d], for distances and diversity.

        Raises:
            UserError: as in `score`.
        """
        import torch

        check_images(images, "clip")
        batches = [
            images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size)
        ]
        with torch.no_grad():
            return torch.cat([self.towers.images(batch).cpu() for batch in batches])

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Returns L2-normalised text features float32 [B, d]."""
        import torch

        with torch.no_grad():
            return self.towers.texts(texts).cpu()

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        import torch

        assert prompts is not None
        with torch.no_grad():
            texts = self.towers.texts([self.prefix + prompt for prompt in prompts])
        cosine = (self.towers.images(images) * texts).sum(dim=-1)
        if self.scale == "logits":
            cosine = self.towers.scale * cosine + self.towers.bias
        elif self.scale == "clipscore":
            cosine = 2.5 * cosine.clamp(min=0)
        return Scores(cosine.cpu())
