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
from typing import TYPE_CHECKING, Any, ClassVar

from diffalign.scorers._base import Scores
from diffalign.scorers._tower_scorer import TowerScorer

if TYPE_CHECKING:
    from diffalign.scorers._base import Images


@dataclass(kw_only=True)
class Plugin(TowerScorer):
    """CLIP score of pictures against their prompts, with any CLIP weights.

    Args:
        scale: cosine | logits | clipscore.
        prefix: written before each prompt.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})
    scales: ClassVar[tuple[str, ...]] = ("cosine", "logits", "clipscore")

    scale: str = "cosine"
    prefix: str = ""

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        assert prompts is not None
        cosine = self._cosines(images, [self.prefix + prompt for prompt in prompts])
        if self.scale == "logits":
            cosine = self.towers.scale * cosine + self.towers.bias
        elif self.scale == "clipscore":
            cosine = 2.5 * cosine.clamp(min=0)
        return Scores(cosine.cpu())
