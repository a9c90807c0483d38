"""SigLIP score: how well a picture fits its prompt, by the features of SigLIP or SigLIP 2.

Zhai et al. 2023, arXiv 2303.15343; Tschannen et al. 2025, arXiv 2502.14786. Their logits were trained pair by
pair with a sigmoid: unlike CLIP's, each says by itself whether picture and text belong together.

Scales (`scale`):
    cosine        cos
    logits        exp(logit_scale) * cos + logit_bias
    probability   sigmoid(logits), the authors' own; close to 0 for most pairs, and flat there

Convention: texts are lower-cased, cut and padded to 64 tokens, without an attention mask; punctuation stays
with SigLIP 2 in transformers' layout and falls away elsewhere (see `_towers_transformers.py`). A picture is
squashed to a square as the folder's preprocessor says (bicubic for SigLIP, bilinear for SigLIP 2), mean and
std 0.5. Its feature is that of the attention-pooling head. GELU is the tanh formula in transformers, and
exact in open_clip (but for SigLIP 2's text tower): one model's weights score slightly apart in the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from diffalign.common.errors import UserError
from diffalign.scorers._base import Scores
from diffalign.scorers._tower_scorer import TowerScorer

if TYPE_CHECKING:
    from diffalign.scorers._base import Images
    from diffalign.scorers._towers import Towers


@dataclass(kw_only=True)
class Plugin(TowerScorer):
    """SigLIP score of pictures against their prompts, with SigLIP weights of fixed resolution.

    SigLIP 1 in transformers' layout needs the package sentencepiece for its tokenizer.

    Args:
        scale: cosine | logits | probability.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})
    scales: ClassVar[tuple[str, ...]] = ("cosine", "logits", "probability")

    path: str = "google/siglip-so400m-patch14-384"
    scale: str = "cosine"

    def _open(self, device: str) -> Towers:
        towers = super()._open(device)
        if getattr(towers.module, "logit_bias", None) is None:
            raise UserError(
                f"scorer siglip: {self.path} is no SigLIP model (it has no logit bias): use scorer clip"
            )
        return towers

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        assert prompts is not None
        values = self._cosines(images, prompts)
        if self.scale != "cosine":
            values = self.towers.scale * values + self.towers.bias
        if self.scale == "probability":
            values = values.sigmoid()
        return Scores(values.cpu())
