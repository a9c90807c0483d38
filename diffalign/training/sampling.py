"""The keyed draws of a batch: timesteps and noise, shared by the images of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from diffalign.common import draws
from diffalign.data.batches import Batch
from diffalign.diffusion.likelihood import Draws
from diffalign.diffusion.process import Process
from diffalign.diffusion.timesteps import TimestepSpec, keyed_uniform, stratified_grid


def training_draws(
    batch: Batch,
    timesteps: TimestepSpec,
    process: Process,
    *,
    seed: int,
    noise: Literal["shared", "independent"] = "shared",
) -> Draws:
    """One timestep a group; one noise a group, or one an image where `noise` is "independent". On the CPU.

    Keyed by (seed, example id, epoch): world size, workers and resuming do not change them.
    """
    uniforms = [
        keyed_uniform(seed, "timestep", name, batch.epoch, position=position, strata=timesteps.strata)
        for name, position in zip(batch.ids, batch.positions.tolist(), strict=True)
    ]
    distribution = timesteps.at(process, batch.latents.shape)
    t = distribution.draw(torch.tensor(uniforms, dtype=torch.float64), process.num_timesteps)
    keys: list[tuple[int | str, ...]] = [(seed, "noise", name, batch.epoch) for name in batch.ids]
    if noise == "shared":
        return _per_image(batch, t, keys)
    shape, counts = tuple(batch.latents.shape[1:]), batch.counts.cpu()
    each = [
        draws.normal(shape, *key, side)
        for key, count in zip(keys, counts.tolist(), strict=True)
        for side in range(count)
    ]
    return Draws(t.repeat_interleave(counts), torch.stack(each))


def fixed_draws(batch: Batch, timesteps: Sequence[int], num_draws: int, *, seed: int) -> list[Draws]:
    """`num_draws` draws a group that never change, spread evenly over `timesteps`: for held-out measures."""
    grid = torch.tensor(timesteps)[stratified_grid(num_draws, len(timesteps))]
    return [
        _per_image(
            batch, grid[k].expand(batch.num_groups), [(seed, "held-out-noise", name, k) for name in batch.ids]
        )
        for k in range(num_draws)
    ]


def _per_image(batch: Batch, t_N: torch.Tensor, noise_keys: list[tuple[int | str, ...]]) -> Draws:
    shape = tuple(batch.latents.shape[1:])
    noise = torch.stack([draws.normal(shape, *key) for key in noise_keys])
    counts = batch.counts.cpu()
    return Draws(t_N.repeat_interleave(counts), noise.repeat_interleave(counts, dim=0))
