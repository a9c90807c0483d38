"""Inversion: the noise that a network says a picture was made from.

Walking the probability-flow ODE from a clean latent up to timestep t gives a noisy latent x_t and with it the
noise `(x_t - alpha_t x0) / sigma_t` from which DDIM, or of a rectified flow an Euler sampler, would draw that
very picture. SmPO-Diffusion compares images under these noises instead of random ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.process import Process, expand

Grid = Literal["common", "own"]

GRIDS: tuple[Grid, ...] = ("common", "own")

CLEAN = -1
"""The level before t = 0, where alpha is 1 and sigma 0; no network was trained on it."""


def inversion_levels(t: Tensor, num_timesteps: int, steps: int, grid: Grid = "common") -> Tensor:
    """The timesteps that each of B examples visits after `CLEAN`, `[steps, B]` int64; the last is its t.

    Where a column repeats itself the example has nothing to do in that step.

    Args:
        t: `[B]` int64 in `[0, num_timesteps)`.
        num_timesteps: of the process.
        steps: parts that the grid is cut into.
        grid: "common": the whole process is cut into `steps` equal parts, whatever t; an example makes those
            below its t and one step that is cut short, (steps + 1) / 2 on average. "own": the way to t is cut
            into `steps` equal parts: more exact at small t, and always `steps` steps.

    Raises:
        UserError: no step, or more steps than timesteps.
    """
    if not 1 <= steps <= num_timesteps:
        raise UserError(
            f"an inversion of {steps} steps is asked for and the base has {num_timesteps} timesteps: "
            f"use 1 to {num_timesteps}"
        )
    parts = torch.arange(1, steps + 1, device=t.device)[:, None]
    if grid == "own":
        return parts * (t + 1) // steps - 1
    return torch.minimum(parts * num_timesteps // steps - 1, t)


@torch.no_grad()
def implied_noise(
    denoiser: Denoiser,
    latents: Tensor,
    cond: Conditioning,
    t: Tensor,
    *,
    steps: int,
    corrections: int = 1,
    grid: Grid = "common",
) -> tuple[Tensor, Tensor]:
    """The noise of each latent at its own timestep, and the network evaluations that this took.

    Returns `noise`, shape and dtype of `latents`, and `forwards` `[B]` int64. The noisy latents are
    `process.add_noise(latents, noise, t)`.

    Every example starts clean, visits its `inversion_levels` and ends exactly at its t. The network sees the
    examples that still have a step to make and no others, so an example costs what its own t asks for.

    Args:
        denoiser: asked under the policy that the caller has selected, with `cond` alone (no classifier-free
            guidance) and in evaluation mode: dropout would be noise of another kind.
        latents: `[B, ...]` clean latents; all but the network is computed in their dtype.
        cond: conditioning with B rows.
        t: `[B]` int64.
        steps: see `inversion_levels`.
        corrections: 0: DDIM inversion, of a flow Euler steps. From 1 on ReNoise (Garibi et al. 2024, arXiv
            2403.14602): the network is asked again at each new estimate of the next latent, and the step is
            made with the mean of all its predictions.
        grid: see `inversion_levels`.

    Convention: every prediction of a step is asked for at the timestep that the step leads to.
    JaydenLyh/SmPO@8922d54 train.py:999-1028 asks at the one it comes from (with its diffusers 0.20 a negative
    one at first) and ends at a level of the grid beside t, so that its "noise" holds signal.

    The noise that a network implies is a mean of its predictions, so its variance is below 1: for N(0, 1)
    data its std at t = 100 of SDXL is 0.17 by the exact ODE, 0.19 in 9 steps of the "own" grid and 0.33 in
    those of the "common" one, which makes a single step there. Convention: it is never brought back to 1.

    Where alpha_t is 0 (the end of a zero-terminal-SNR base) the noise is what the network says there; a v
    network says the latent of the level before, which comes to the ODE's own end as steps grow. A flow is
    walked to sigma = 1 like to any other level.

    Raises:
        UserError: from `inversion_levels`.
    """
    noise, forwards = torch.zeros_like(latents), torch.zeros_like(t)
    source = torch.full_like(t, CLEAN)
    with _evaluation_mode(denoiser.network):
        for level in inversion_levels(t, denoiser.process.num_timesteps, steps, grid):
            rows = torch.nonzero(level > source).squeeze(1)
            if not len(rows):
                continue
            here = latents[rows], noise[rows], cond.rows(rows)
            noise[rows] = _step(denoiser, *here, source[rows], level[rows], corrections)
            forwards[rows] += corrections + 1
            source = level
    return noise, forwards


def _step(
    denoiser: Denoiser,
    x0: Tensor,
    noise: Tensor,
    cond: Conditioning,
    source_B: Tensor,
    t_B: Tensor,
    corrections: int,
) -> Tensor:
    """The noises of the latents `x0` at `t_B`, given those at `source_B`.

    DDIM moves x / alpha by (rho_b - rho_a) eps, rho = sigma / alpha (Song et al. 2021, arXiv 2010.02502, eq.
    14). For the noise n = (x - alpha x0) / sigma that is n_b = w n_a + (1 - w) eps with w = rho_a / rho_b: a
    mean of predictions, with no difference of large numbers for a small sigma_t to blow up. A network that
    always says eps gets eps.

    A flow makes the Euler step of dx/dsigma = v, x_b = x_a + (sigma_b - sigma_a) v, which an Euler sampler
    makes downwards. With x = x0 + sigma (n - x0) that is n_b = w n_a + (1 - w) (x0 + v) with w = sigma_a /
    sigma_b: again a mean, also at sigma_b = 1. A network that always says v gets x0 + v.

    Convention: where v and its latent are of one level the two are one step. But here the network is asked
    about x_a at t_b, and with the scales of t_b DDIM's step is alpha_b / alpha_a times Euler's: none at all
    where alpha_b is 0, at which the walk would no longer be of first order.
    """
    process, flow = denoiser.process, denoiser.process.prediction == "flow"
    (alpha_a, sigma_a), (alpha_b, sigma_b) = _alpha_sigma(process, source_B), _alpha_sigma(process, t_B)
    share = sigma_a / sigma_b if flow else sigma_a * alpha_b / (alpha_a * sigma_b)
    alpha_a, sigma_a, kept = (expand(value, x0).to(x0.dtype) for value in (alpha_a, sigma_a, share))
    x_t = alpha_a * x0 + sigma_a * noise
    total = torch.zeros_like(x0)
    for _ in range(corrections + 1):
        output = denoiser.predict(x_t, t_B, cond).to(x0.dtype)
        eps = x0 + output if flow else process.to_epsilon(output, x_t, t_B)
        total = total + eps
        x_t = process.add_noise(x0, kept * noise + (1.0 - kept) * eps, t_B)
    return kept * noise + (1.0 - kept) * (total / (corrections + 1))


def _alpha_sigma(process: Process, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """As the process says, and (1, 0) where t is `CLEAN`."""
    alpha, sigma = process.alpha_sigma(t_B.clamp_min(0))
    clean = t_B == CLEAN
    return alpha.masked_fill(clean, 1.0), sigma.masked_fill(clean, 0.0)


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    saved = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in saved:
            module.training = training
