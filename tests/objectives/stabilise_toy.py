"""Pairs in float64 and policies for them: for the tests of the stabilisers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffalign.data.batches import Batch
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.likelihood import Draws
from tests.toy_denoiser import toy_batch, toy_denoiser, weight_gradient

BETA = 40.0
TARGETS = [1.0, 0.0, 0.7, 0.2, 0.5, 1.0]
PLAIN_SMPO: dict[str, Any] = {"inversion": "none", "reward_min": 0.0, "reward_max": 1.0}


def pairs(targets: list[float] = TARGETS) -> tuple[Batch, Draws]:
    """Pairs in float64; the score of a first image is its target, that of a second the rest to 1."""
    batch, draws = toy_batch(targets, images_a_group=2)
    target = torch.tensor(targets, dtype=torch.float64)
    scores = torch.stack([target, 1.0 - target], dim=1).flatten()
    batch = replace(batch, latents=batch.latents.double(), target=target, ratings={"pickscore": scores})
    return batch, Draws(draws.t, draws.noise.double())


def far_off() -> Denoiser:
    """A policy so wrong that the residuals of some pairs point away from one another."""
    denoiser = toy_denoiser(seed=4, reference=2)
    with torch.no_grad():
        denoiser.network.weight *= 3.0
    return denoiser


def gradient(objective: Any, denoiser: Denoiser, batch: Batch, draws: Draws) -> tuple[Tensor, Any]:
    """Of the summed loss by the toy's matrix, and the output."""
    output = objective.compute(denoiser, batch, draws)
    objective.backward(output, 1.0, torch.Tensor.backward)
    return weight_gradient(denoiser), output
