"""Denoising errors as a likelihood surrogate: terms, the implicit reward and the ELBO.

Two quantities are kept apart: the implicit reward is the training-weighted difference of mean errors that the
preference objectives optimise; the ELBO is a bound on log-likelihood in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from diffalign.common.conditioning import Conditioning
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.process import ErrorSpace, Process, expand


class Known(Protocol):
    """Errors of the reference for certain draws, once they were computed."""

    def get(self, error_space: str, like: Tensor) -> Tensor | None:
        """The errors `[B]` in a space, on the device of `like` `[B]`; None where they are not known yet."""
        ...

    def put(self, error_space: str, errors: Tensor) -> None:
        """Keeps the errors `[B]`."""
        ...


@dataclass(frozen=True)
class Draws:
    """The random part of an error: a timestep and a noise for every image.

    Args:
        t: `[B]` int64.
        noise: `[B, ...]` float32, shape of the latents.
        known: the reference's errors for all of these draws together, if they are kept.
    """

    t: Tensor
    noise: Tensor
    known: Known | None = None

    def to(self, device: torch.device | str) -> Draws:
        """The same draws on `device`."""
        return replace(self, t=self.t.to(device), noise=self.noise.to(device))


@dataclass(frozen=True)
class Terms:
    """Denoising errors of a batch under the trained policy and the reference.

    Args:
        err: `[B]` float32 (float64 of a float64 network), mean squared residual over every dimension but the
            first, with gradient.
        ref_err: likewise without gradient, or None when no reference was asked for.
        t: `[B]` int64.
        residual: `[B, ...]` of the policy, without gradient, or None when it was not asked for.
    """

    err: Tensor
    ref_err: Tensor | None
    t: Tensor
    residual: Tensor | None = None


def denoising_terms(
    denoiser: Denoiser,
    latents: Tensor,
    cond: Conditioning,
    draws: Draws,
    *,
    reference: bool,
    error_space: ErrorSpace = "native",
    keep_residual: bool = False,
) -> Terms:
    """Errors of `latents` `[B, ...]` noised by `draws`, one forward pass a policy at the same batch shape.

    Both policies see the same noisy latents; the reference runs first and without gradient, so that its
    activations are gone before those of the policy are kept. Predictions and targets are at least float32
    before they are squared: in half precision the rounding of the reference error alone reaches a logit of
    0.26 at beta 5000.
    """
    process = denoiser.process
    x_t = process.add_noise(latents, draws.noise, draws.t)
    precision = torch.promote_types(latents.dtype, torch.float32)
    target = process.target(latents, draws.noise, draws.t).to(precision)
    scale = expand(process.residual_scale(error_space, draws.t), latents).to(precision)

    def residual_now() -> Tensor:
        return (denoiser.predict(x_t, draws.t, cond).to(precision) - target) * scale

    ref_err = None
    if reference:
        ref_err = None if draws.known is None else draws.known.get(error_space, draws.t)
        if ref_err is None:
            with torch.no_grad(), denoiser.policy("reference"):
                ref_err = mean_square(residual_now())
            if draws.known is not None:
                draws.known.put(error_space, ref_err)
    residual = residual_now()
    kept = residual.detach() if keep_residual else None
    return Terms(err=mean_square(residual), ref_err=ref_err, t=draws.t, residual=kept)


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
    of the batch is measured on x0: (SNR(t-1) - SNR(t)) / 2. Both hold for any x_t = alpha x0 + sigma eps
    whose SNR falls, rectified flows as well. Source: Kingma et al. 2021, arXiv 2107.00630, eq. 14.
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
    (Where the last SNR is 0, as of flows, so is the prior term.)

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
