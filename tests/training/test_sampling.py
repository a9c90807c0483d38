"""The draws of a batch: keyed, shared by a group, and shifted as the sampler of the base is."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from diffalign.common.conditioning import Conditioning
from diffalign.data.batches import Batch
from diffalign.data.encoded import EncodedSet, Example
from diffalign.data.specs import LoaderSpec
from diffalign.diffusion.process import Process, SamplerShift
from diffalign.diffusion.specs import TimestepSpec
from diffalign.diffusion.timesteps import keyed_uniform
from diffalign.training.feed import Offline
from diffalign.training.sampling import training_draws
from diffalign.training.specs import Settings

GROWING = Process.flow(1000, SamplerShift(1.0, slope=0.5, patch=2))
"""Its sampler shifts by 1 and a half for each token of 2 x 2 cells: 2 x 2 cells 1.5, 4 x 4 cells 3."""


def batch_of(ids: str, cells: tuple[int, int], *, first_position: int = 0) -> Batch:
    """A pair for each letter."""
    return Batch(
        ids=list(ids),
        epoch=1,
        positions=torch.arange(first_position, first_position + len(ids)),
        latents=torch.zeros(2 * len(ids), 3, *cells),
        cond=Conditioning({"text": torch.zeros(2 * len(ids), 1)}),
        counts=torch.full((len(ids),), 2),
    )


def timesteps_of(ids: str, shift: float, **options: Any) -> torch.Tensor:
    """Those of the pairs, one by one, shifted by hand: floor(1000 shift u / (1 + (shift - 1) u))."""
    uniforms = [keyed_uniform(7, "timestep", name, 1) for name in ids]
    t = [int(1000 * shift * u / (1 + (shift - 1) * u)) for u in uniforms]
    return torch.tensor(t).repeat_interleave(2)


@pytest.mark.parametrize(("cells", "shift"), [((2, 2), 1.5), ((4, 4), 3.0), ((4, 2), 2.0)])
def test_timesteps_take_the_shift_of_the_sampler_at_the_batch_s_size(
    cells: tuple[int, int], shift: float
) -> None:
    draws = training_draws(batch_of("abcdef", cells), TimestepSpec(sampler_shift=True), GROWING, seed=7)
    assert torch.equal(draws.t, timesteps_of("abcdef", shift))
    unasked = training_draws(batch_of("abcdef", cells), TimestepSpec(), GROWING, seed=7)
    assert torch.equal(unasked.t, timesteps_of("abcdef", 1.0)) and torch.equal(unasked.noise, draws.noise)


@pytest.mark.parametrize("strata", [0, 3])
def test_a_batch_of_four_draws_what_four_batches_draw(strata: int) -> None:
    spec = TimestepSpec(kind="logit_normal", strata=strata, sampler_shift=True)
    whole = training_draws(batch_of("abcd", (4, 4)), spec, GROWING, seed=7)
    parts = [
        training_draws(batch_of(name, (4, 4), first_position=place), spec, GROWING, seed=7)
        for place, name in enumerate("abcd")
    ]
    assert torch.equal(whole.t, torch.cat([part.t for part in parts]))
    assert torch.equal(whole.noise, torch.cat([part.noise for part in parts]))
    assert torch.equal(whole.t[0::2], whole.t[1::2]) and len(whole.t.unique()) == 4


def test_each_bucket_has_its_own_shift_whatever_the_number_of_processes() -> None:
    """Three pairs of 2 x 2 and three of 4 x 4 cells: entered anywhere, by two processes, the same draws."""
    sizes = [(2, 2), (4, 4)] * 3
    examples = [
        Example(str(row), "a", (row, row), (8 * cells[0], 8 * cells[1]), 1.0, ({}, {}))
        for row, cells in enumerate(sizes)
    ]
    means = [torch.zeros(3, *cells) for cells in sizes]
    text = Conditioning({"text": torch.zeros(1, 2)})
    encoded = EncodedSet(examples, means, means, {"a": 0}, text, text)
    settings = Settings(loader=LoaderSpec(batch_size=3), timesteps=TimestepSpec(sampler_shift=True), seed=7)
    feed = Offline(encoded, settings, GROWING)
    one = list(islice(feed.micro_batches(0), 6))
    for batch, draws in one:
        shift = {2: 1.5, 4: 3.0}[batch.latents.shape[-1]]
        uniforms = [keyed_uniform(7, "timestep", name, batch.epoch) for name in batch.ids]
        assert draws.t[0::2].tolist() == [int(1000 * shift * u / (1 + (shift - 1) * u)) for u in uniforms]
    assert {batch.latents.shape[-1] for batch, _ in one} == {2, 4}
    two = [list(islice(feed.micro_batches(2, rank, 2), 2)) for rank in (0, 1)]
    for number in range(4):
        assert torch.equal(two[number % 2][number // 2][1].t, one[2 + number][1].t)
