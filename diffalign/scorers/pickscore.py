"""PickScore: which of several pictures people pick for a prompt (Kirstain et al. 2023, arXiv 2305.01569).

CLIP ViT-H/14, fine-tuned on Pick-a-Pic v1. The picture's shorter side goes to 224 by PIL's bicubic filter,
then a centre crop. Texts are cut at 77 tokens.

Scales (`scale`): the same number is published in all of these.
    logits    exp(logit_scale) * cos, about 18 to 24: the authors' own (yuvalkirstain/PickScore, README)
    cosine    cos, about 0.18 to 0.24 (SalesforceAIResearch/DiffusionDPO, its score utilities)
    unit      logits / 26 (yifan123/flow_grpo, flow_grpo/pickscore_scorer.py; chosen there to end near 1)

Convention: two pictures of a prompt win with probability sigmoid(logits_a - logits_b); scores of different
prompts hardly compare. mode=tensor moves a score by the resizing alone, see scripts/results/scorers.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from diffalign.scorers._base import Scores
from diffalign.scorers._tower_scorer import TowerScorer

if TYPE_CHECKING:
    from diffalign.scorers._base import Images

UNIT = 26.0


@dataclass(kw_only=True)
class Plugin(TowerScorer):
    """PickScore of pictures against their prompts.

    Args:
        scale: logits | cosine | unit.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})
    scales: ClassVar[tuple[str, ...]] = ("logits", "cosine", "unit")

    path: str = "yuvalkirstain/PickScore_v1"
    scale: str = "logits"

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        assert prompts is not None
        values = self._cosines(images, prompts)
        if self.scale != "cosine":
            values = values * self.towers.scale
        if self.scale == "unit":
            values = values / UNIT
        return Scores(values.cpu())
