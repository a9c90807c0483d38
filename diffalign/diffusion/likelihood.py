"""Denoising errors as a likelihood surrogate: terms, the implicit reward and the ELBO.

Two quantities are kept apart: the implicit reward is the training-weighted difference of mean errors that the
preference objectives optimise; the ELBO is a bound on log-likelihood in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.common.conditioning import Conditioning
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.process import ErrorSpace, Process, expand


@dataclass(frozen=True)
class Draws:
    """The random part of an error: a timestep and a noise for every image.

    Args:
        t: `[B]` int64.
        noise: `[B, ...]` float32, shape of the latents.
    """

    t: Tensor
    noise: Tensor

    def to(self, device: torch.device | str) -> Draws:
        """The same draws on `device`."""
        return Draws(self.t.to(device), self.noise.to(device))


@dataclass(frozen=True)
class Terms:
    """Denoising errors of a batch under the trained policy and the reference.

    Args:
        err: `[B]` float32, mean squared residual over every dimension but the first, with gradient.
        ref_err: `[B]` float32 without gradient, or None when no reference was asked for.
        t: `[B]` int64.
        residual: `[B, ...]` float32 output minus target in the chosen space, kept only on demand.
        ref_residual: likewise for the reference.
    """

    err: Tensor
    ref_err: Tensor | None
    t: Tensor
    residual: Tensor | None = None
    ref_residual: Tensor | None = None


def denoising_terms(
    denoiser: Denoiser,
    latents: Tensor,
    cond: Conditioning,
    draws: Draws,
    *,
    reference: bool,
    error_space: ErrorSpace = "native",
    keep_residuals: bool = False,
) -> Terms:
    """Errors of `latents` `[B, ...]` noised by `draws`, one forward pass a policy at the same batch shape.

    Both policies see the same noisy latents; the reference runs first and without gradient, so that its
    activations are gone before those of the policy are kept. Predictions and targets are float32 before they
    are squared: in half precision the rounding of the reference error alone reaches a logit of 0.26 at beta
    5000.
    """
    process = denoiser.process
    x_t = process.add_noise(latents, draws.noise, draws.t)
    target = process.target(latents, draws.noise, draws.t).float()
    scale = expand(process.residual_scale(error_space, draws.t), latents).float()

    def residual_now() -> Tensor:
        return (denoiser.predict(x_t, draws.t, cond).float() - target) * scale

    ref_residual = None
    if reference:
        with torch.no_grad(), denoiser.policy("reference"):
            ref_residual = residual_now()
    residual = residual_now()
    return Terms(
        err=mean_square(residual),
        ref_err=None if ref_residual is None else mean_square(ref_residual),
        t=draws.t,
        residual=residual if keep_residuals else None,
        ref_residual=ref_residual if keep_residuals else None,
    )


def mean_square(residual: Tensor) -> Tensor:
    """`[B]` mean of squares over every dimension but the first."""
    return residual.square().flatten(1).mean(dim=1)


def implicit_reward(err: Tensor, ref_err: Tensor, *, beta: float) -> Tensor:
    """`beta/2 * (ref_err - err)`, averaged over the last dimension (draws) when there is one.

    Args:
        err: `[B]` or `[B, draws]` mean errors of the policy.
        ref_err: the same of the reference.
        beta: as in the objectives. Convention: half of a difference of *mean* errors (Diffusion-DPO's code);
            the paper writes beta times a difference of *sums*.
    """
    reward = beta / 2.0 * (ref_err - err)
    return reward.mean(dim=-1) if reward.ndim > 1 else reward


def elbo_weight(process: Process, t_B: Tensor) -> tuple[Tensor, ErrorSpace]:
    """`[B]` float64 weight of a *summed* squared error in nats at t >= 1, and the space of that error.

    Epsilon errors: (SNR(t-1) / SNR(t) - 1) / 2. Where some SNR(t) is 0 the epsilon error says nothing, so all
    of the batch is measured on x0: (SNR(t-1) - SNR(t)) / 2. Source: Kingma et al. 2021, arXiv 2107.00630,
    eq. 14.
    """
    if bool((t_B < 1).any()):
        raise ValueError("the ELBO has terms for t >= 1 only; the t = 0 reconstruction is left out")
    snr, snr_before = process.snr(t_B), process.snr(t_B - 1)
    if bool((snr == 0).any()):
        return (snr_before - snr) / 2.0, "x0"
    return (snr_before / snr - 1.0) / 2.0, "epsilon"


@torch.no_grad()
def elbo(denoiser: Denoiser, latents: Tensor, cond: Conditioning, draws: list[Draws]) -> Tensor:
    """`[B]` float64 estimate, on the CPU, of the evidence lower bound in nats under the selected policy.

    Minus (T - 1) times the mean over draws of the weighted, summed squared error; unbiased for the diffusion
    terms when each draw's t is uniform on 1..T-1. The t = 0 reconstruction term and the prior term KL(q(x_T)
    | N(0, I)) are left out: both are the same for a policy and its reference up to the last denoising step.

    Args:
        denoiser: queried under whichever policy is selected by the caller.
        latents: `[B, ...]` clean latents.
        cond: conditioning with B rows.
        draws: one entry a draw, each with t in 1..T-1.
    """
    num_elements = latents[0].numel()
    total = torch.zeros(len(latents), dtype=torch.float64)
    for draw in draws:
        weight, space = elbo_weight(denoiser.process, draw.t.cpu())  # not every device has float64
        terms = denoising_terms(denoiser, latents, cond, draw, reference=False, error_space=space)
        total += weight * num_elements * terms.err.cpu().double()
    return -(denoiser.process.num_timesteps - 1) * total / len(draws)
