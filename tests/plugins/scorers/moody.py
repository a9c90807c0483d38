"""A scorer for tests of runs with several processes, which can be told to misbehave in one of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from diffalign.scorers._base import Scorer, Scores

if TYPE_CHECKING:
    from diffalign.scorers._base import Images

VARIABLE = "MOODY"
"""Environment variable: "RANK LOOK DEED", what that process does when it looks for the LOOKth time, from 0:
nan (no picture has a value), raise (the scorer breaks) or stop (it is asked to end, as a scheduler does it).
"""

DULL = "a dull thing"
"""A prompt whose pictures are all worth the same, so that neither of two is better."""


@dataclass
class Plugin(Scorer):
    """Mean grey value; 0 for prompts that begin with `DULL`."""

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})

    scale: str = "grey"

    def __post_init__(self) -> None:
        self._looks = 0

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        import torch
        from PIL import ImageStat

        assert prompts is not None
        values = [
            0.0 if prompt.startswith(DULL) else ImageStat.Stat(image.convert("L")).mean[0] / 255
            for image, prompt in zip(images, prompts, strict=True)
        ]
        rank, look, deed = os.environ.get(VARIABLE, "-1 -1 none").split()
        due = (rank, look) == (os.environ.get("RANK", "0"), str(self._looks))
        self._looks += 1
        if due and deed == "raise":
            raise RuntimeError("the scorer broke")
        if due and deed == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        if due and deed == "nan":
            return Scores(torch.full((len(values),), torch.nan), errors=["too dark"] * len(values))
        return Scores(torch.tensor(values))
