"""Scene grade: does a picture of the drawn world show what its caption says, clause by clause.

Scales (`scale`):
    share       share of the caption's clauses that are right, 0 to 1
    accurate    1 where every clause is right, else 0

Parts: `accurate` (as above), and for each kind of clause (object, colour, count, position, other) the share
of its clauses that are right; NaN where the caption has no clause of that kind. A prompt that is no scene
caption gives NaN and says so in `errors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from diffalign.common.errors import UserError
from diffalign.scorers._base import Scorer, Scores

if TYPE_CHECKING:
    from diffalign.scorers._base import Images

SCALES = ("share", "accurate")


@dataclass
class Plugin(Scorer):
    """Scene grade of pictures against their captions.

    `context` may carry, per picture, `scene` (a `diffalign.scenes.Scene` or a caption) to grade against
    instead of the prompt.

    Args:
        scale: share | accurate.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})
    may_use: ClassVar[frozenset[str]] = frozenset({"context"})

    scale: str = "share"

    def __post_init__(self) -> None:
        self._check_options(scale=SCALES)

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        import torch

        from diffalign.scenes import KINDS, grade

        assert prompts is not None
        rows: list[dict[str, float]] = []
        errors: list[str | None] = []
        for index, prompt in enumerate(prompts):
            wanted = context[index].get("scene", prompt) if context is not None else prompt
            try:
                result = grade(_as_array(images[index]), wanted)
            except UserError as error:
                rows.append({})
                errors.append(str(error))
                continue
            value = result.score if self.scale == "share" else float(result.accurate)
            rows.append({"": value, "accurate": float(result.accurate), **result.by_kind()})
            errors.append(None)
        names = ("", "accurate", *KINDS)
        columns = {name: torch.tensor([row.get(name, math.nan) for row in rows]) for name in names}
        values = columns.pop("")
        return Scores(values, parts=columns, errors=errors)


def _as_array(image: Any) -> Any:
    """Returns a picture as the grader takes it: PIL, or bytes [H, W, 3] of a tensor [3, H, W]."""
    import torch
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    scaled = image.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return scaled.permute(1, 2, 0).cpu().numpy()
