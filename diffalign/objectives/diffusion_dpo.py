"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908): preference optimisation on denoising errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.data.batches import Batch, first_and_second
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.likelihood import Draws, denoising_terms
from diffalign.objectives._base import Objective, Output, require_error_space, require_positive

aliases = ("dpo",)


def diffusion_dpo_logit(
    err_w: Tensor, err_l: Tensor, ref_err_w: Tensor, ref_err_l: Tensor, *, beta: float
) -> Tensor:
    """`m = -beta/2 * ((err_w - err_l) - (ref_err_w - ref_err_l))`, `[B]`: the implicit reward margin."""
    return -beta / 2.0 * ((err_w - err_l) - (ref_err_w - ref_err_l))


def diffusion_dpo_loss(
    err_w: Tensor,
    err_l: Tensor,
    ref_err_w: Tensor,
    ref_err_l: Tensor,
    *,
    beta: float,
    target: Tensor | None = None,
) -> Tensor:
    """`[B]` losses `-p logsigmoid(m) - (1 - p) logsigmoid(-m)`; log 2 where policy and reference agree.

    Args:
        err_w: `[B]` mean squared denoising error of the policy on the first (winning) image.
        err_l: `[B]` the same on the second (losing) image, at the same timestep and noise.
        ref_err_w: `[B]` error of the reference on the first image.
        ref_err_l: `[B]` error of the reference on the second image.
        beta: strength of the pull towards the reference, > 0.
        target: `[B]` probability p that the first image is preferred; None means 1 everywhere.

    Convention: beta multiplies half of a difference of *mean* errors, as in
    SalesforceAIResearch/DiffusionDPO@5233e75 train.py:1130-1145. The paper's equation 14 has sums and no
    half; diffusers' example has means and no half (its beta 2500 is 5000 here).
    """
    logit = diffusion_dpo_logit(err_w, err_l, ref_err_w, ref_err_l, beta=beta)
    if target is None:
        return -logsigmoid(logit)
    return -target * logsigmoid(logit) - (1.0 - target) * logsigmoid(-logit)


@dataclass
class Plugin(Objective):
    """Diffusion-DPO on pairs, with soft targets for ties and votes.

    Args:
        beta: default 5000 as in the authors' launchers; the paper finds 2000 to 5000 good.
        error_space: space of the errors: "native" to the network, "epsilon" or "x0".
    """

    beta: float = 5000.0
    error_space: Literal["native", "epsilon", "x0"] = "native"

    unit: ClassVar[Literal["pair", "list", "single"]] = "pair"

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        require_error_space(self.error_space)

    def compute(self, denoiser: Denoiser, batch: Batch, draws: Draws, shared: Any = None) -> Output:
        """Losses `[N]` of `N` pairs."""
        terms = denoising_terms(
            denoiser, batch.latents, batch.cond, draws, reference=True, error_space=self.error_space
        )
        assert terms.ref_err is not None
        err_w, err_l = first_and_second(terms.err)
        ref_err_w, ref_err_l = first_and_second(terms.ref_err)
        loss = diffusion_dpo_loss(err_w, err_l, ref_err_w, ref_err_l, beta=self.beta, target=batch.target)
        margin = diffusion_dpo_logit(err_w, err_l, ref_err_w, ref_err_l, beta=self.beta)
        return Output(loss, pair_logs(terms.t, err_w, err_l, ref_err_w, ref_err_l, margin, batch.target))

    def loss_at_reference(self, output: Output) -> float:
        """log 2, whatever the targets."""
        return math.log(2.0)


def pair_logs(
    t: Tensor,
    err_first: Tensor,
    err_second: Tensor,
    ref_first: Tensor,
    ref_second: Tensor,
    margin: Tensor,
    target: Tensor | None,
) -> dict[str, Tensor]:
    """Detached `[N]` entries of the health report, turned so that `w` is the preferred image of each pair."""
    p_first = torch.ones_like(margin) if target is None else target
    flipped = p_first < 0.5
    sides = {
        "err_w": err_second.where(flipped, err_first),
        "err_l": err_first.where(flipped, err_second),
        "ref_err_w": ref_second.where(flipped, ref_first),
        "ref_err_l": ref_first.where(flipped, ref_second),
        "margin": (-margin).where(flipped, margin),
        "target": (1.0 - p_first).where(flipped, p_first),
    }
    return {"t": first_and_second(t)[0], **{name: value.detach() for name, value in sides.items()}}
