"""How each objective is trained on the embedded model: settings chosen on the tuning prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.demo import embedded
from diffalign.objectives._base import Objective
from diffalign.objectives.diffusion_dpo import Plugin as DiffusionDPO
from diffalign.objectives.dragon import Plugin as DRAGON
from diffalign.objectives.kto import Plugin as KTO
from diffalign.objectives.mapo import Plugin as MaPO
from diffalign.objectives.rankdpo import Plugin as RankDPO
from diffalign.objectives.sft import Plugin as SFT
from diffalign.objectives.smpo import Plugin as SmPO
from diffalign.scorers.clip import Plugin as CLIP
from diffalign.scorers.scene import Plugin as SceneScorer


@dataclass(frozen=True)
class Method:
    """An objective with its settings.

    Args:
        make: the objective, from the folder of exemplars (which most have no use for).
        lr: learning rate, after a short warm-up.
        groups: pairs, lists or single pictures in one optimizer step; each step sees about 32 pictures.
        scorer: what rewards an on-policy objective's pictures: the grader, or features of tiny-clip.
        rollout_steps: optimizer steps an on-policy objective makes of one rollout.
    """

    make: Callable[[Path], Objective]
    lr: float = 4e-4
    groups: int = 16
    scorer: str = "scene"
    rollout_steps: int = 1

    def scorers(self) -> dict[str, Any]:
        """The scorer by name."""
        if self.scorer == "clip":
            return {"clip": CLIP(path=str(embedded("tiny-clip")))}
        return {"scene": SceneScorer()}


TINY_SDXL = {
    "sft": Method(lambda _: SFT(), groups=32),
    "dpo": Method(lambda _: DiffusionDPO(beta=2000.0)),
    "mapo": Method(lambda _: MaPO(beta=0.1)),
    "smpo": Method(lambda _: SmPO(beta=2000.0, scorer="scene", inversion="none")),
    "rankdpo": Method(lambda _: RankDPO(beta=2000.0), groups=8),
    "kto": Method(lambda _: KTO(beta=4000.0), groups=32),
    "dragon": Method(lambda _: DRAGON(beta=2000.0)),
    "dragon_exemplar": Method(
        lambda folder: DRAGON(reward="exemplar", exemplars=str(folder), beta=2000.0), scorer="clip"
    ),
    "dragon_set": Method(
        lambda folder: DRAGON(reward="set", exemplars=str(folder), beta=2000.0),
        scorer="clip",
        rollout_steps=4,
    ),
}
"""dpo as scripts/results/demo.md tests it, the others as scripts/results/bakeoff.md chose them."""

TINY_SD3 = {
    "sft": Method(lambda _: SFT(), lr=1e-3, groups=32),
    "dpo": Method(lambda _: DiffusionDPO(beta=50.0, safeguard=0.6), lr=1e-3),
}
"""dpo as scripts/results/demo_sd3.md tests it. On 250 tuning prompts x 2, where the base is right 0.414
times, two training seeds: win rate and accuracy at beta 50 0.586 and 0.515, at 100 0.578 and 0.513, at 25
0.585 and 0.517; one seed at 300, from timestep 600 on, 0.554 and 0.480. Without the safeguard (beta 100, one
seed) 0.588 and 0.510, but the winners' error rose from 0.15 by 0.09, which `check run=` finds; with it by
0.01, at beta 50 by 0.01 to 0.02, about the tenth from which it does. No better: 32 pairs a step, a falling
rate, pairs two clauses or more apart, adapters on more layers. sft has dpo's rate.
"""

METHODS = {"tiny-sdxl": TINY_SDXL, "tiny-sd3": TINY_SD3}
"""Embedded model -> the name that `diffalign demo objective=NAME` takes -> the settings."""

ALIASES = {"diffusion_dpo": "dpo"}
"""Other names."""
