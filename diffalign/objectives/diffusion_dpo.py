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
from diffalign.objectives._base import Output, require_error_space
from diffalign.objectives._stabilise import AutoBeta, StabilisedPairs

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
    half; diffusers' example has means and no half (its beta 2500 is 5000 here). Of flows
    yifan123/flow_grpo@489b1f8 scripts/train_sd3_dpo.py:918-928 has means, the half and unweighted velocity
    errors, which are the native ones here.
    """
    logit = diffusion_dpo_logit(err_w, err_l, ref_err_w, ref_err_l, beta=beta)
    if target is None:
        return -logsigmoid(logit)
    return -target * logsigmoid(logit) - (1.0 - target) * logsigmoid(-logit)


def diffusion_dpo_pull(logit: Tensor, target: Tensor | None = None) -> Tensor:
    """`p sigmoid(-m) - (1 - p) sigmoid(m)`, `[B]`: minus the loss's slope in the logit m.

    Above 0 the loss lowers the first image's error and raises the second's, below 0 the other way round. Of a
    tie at m = 0 it is 0, as of any soft target at its own logit.
    """
    if target is None:
        return torch.sigmoid(-logit)
    return target * torch.sigmoid(-logit) - (1.0 - target) * torch.sigmoid(logit)


@dataclass
class Plugin(StabilisedPairs):
    """Diffusion-DPO on pairs, with soft targets for ties and votes.

    Args:
        beta: default 5000 as in the authors' launchers; the paper finds 2000 to 5000 good. On the velocity
            errors of SD3.5 public code has 100 (yifan123/flow_grpo@489b1f8 config/dpo.py).
        error_space: space of the errors: "native" to the network, "epsilon" or "x0".
        safeguard: mu in [0, 1]: the loser's gradient is scaled down, pair by pair, until a small step still
            lowers the winner's error by at least this share of what its own gradient would, to first order
            and as the outputs see it; null: never. In Diffusion-SDPO 0.9 (SD 1.5) and 0.6 (SDXL).
        auto_beta: beta follows the margin, `beta` being the first; null: it stays.
    """

    beta: float = 5000.0
    error_space: Literal["native", "epsilon", "x0"] = "native"
    safeguard: float | None = None
    auto_beta: AutoBeta | None = None

    unit: ClassVar[Literal["pair", "list", "single"]] = "pair"
    flow_beta: ClassVar[float | None] = 100.0

    def __post_init__(self) -> None:
        require_error_space(self.error_space)
        self.start_stabilisers()

    def compute(self, denoiser: Denoiser, batch: Batch, draws: Draws, shared: Any = None) -> Output:
        """Losses `[N]` of `N` pairs."""
        terms = denoising_terms(
            denoiser,
            batch.latents,
            batch.cond,
            draws,
            reference=True,
            error_space=self.error_space,
            keep_residual=self.safeguard is not None,
        )
        assert terms.ref_err is not None
        reference = first_and_second(terms.ref_err)
        beta = self.beta_now
        margin = diffusion_dpo_logit(*first_and_second(terms.err), *reference, beta=beta).detach()
        first, second, logs = self.stabilised(terms, diffusion_dpo_pull(margin, batch.target))
        loss = diffusion_dpo_loss(first, second, *reference, beta=beta, target=batch.target)
        sides = pair_logs(terms.t, first, second, *reference, margin, batch.target)
        return Output(loss, {**sides, **logs})

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
