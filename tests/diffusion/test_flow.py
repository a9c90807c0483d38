"""Rectified flows: the same algebra in float64, and the levels and velocities that diffusers itself uses."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffalign.common.errors import UserError
from diffalign.diffusion.process import Process, expand
from diffalign.diffusion.specs import TimestepSpec


def clean_and_noise(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn((2, count, 4, 3, 2), generator=generator, dtype=torch.float64)
    return x0, noise


def test_by_hand() -> None:
    """Four steps; at t = 0 sigma = 1/4, x0 = 2, eps = 1: x = 1.5 + 0.25 = 1.75 and v = 1 - 2 = -1.

    Back: eps = 1.75 + 0.75 * -1 = 1, x0 = 1.75 - 0.25 * -1 = 2. The network is told 1/4 of 4 steps: 1.
    """
    process = Process.flow(4)
    t, x0, noise = torch.tensor([0]), torch.tensor([[2.0]]).double(), torch.tensor([[1.0]]).double()
    x_t, velocity = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    assert (x_t.item(), velocity.item()) == (1.75, -1.0)
    assert process.to_epsilon(velocity, x_t, t).item() == 1.0
    assert process.to_x0(velocity, x_t, t).item() == 2.0
    assert process.to_v(velocity, x_t, t).item() == 0.75 * 1.0 - 0.25 * 2.0
    assert process.network_time(t).tolist() == [1.0]
    assert process.snr(torch.tensor([0, 3])).tolist() == [9.0, 0.0]


def test_every_conversion_there_and_back() -> None:
    process = Process.flow(1000)
    t = torch.cat([torch.arange(0, 999, 41), torch.tensor([999])])
    x0, noise = clean_and_noise(len(t))
    x_t, perfect = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    alpha, sigma = (expand(scale, x0) for scale in process.alpha_sigma(t))
    assert torch.allclose(process.to_epsilon(perfect, x_t, t), noise, rtol=0.0, atol=1e-14)
    assert torch.allclose(process.to_x0(perfect, x_t, t), x0, rtol=0.0, atol=1e-14)
    assert torch.allclose(process.to_v(perfect, x_t, t), alpha * noise - sigma * x0, rtol=0.0, atol=1e-14)
    assert torch.equal(alpha + sigma, torch.ones_like(alpha))


def test_levels_and_noise_are_those_of_the_scheduler() -> None:
    """Unshifted, its timesteps are what our network is told, noisiest first, and it noises as we do."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    process = Process.from_scheduler(scheduler)
    every = torch.arange(1000)
    assert torch.allclose(process.network_time(every).flip(0), scheduler.timesteps, rtol=0.0, atol=1e-3)
    x0, noise = (values.float() for values in clean_and_noise(3))
    t = torch.tensor([0, 499, 999])
    theirs = scheduler.scale_noise(x0, scheduler.timesteps[999 - t], noise)
    assert torch.allclose(process.add_noise(x0, noise, t), theirs, atol=1e-6)


def test_a_shifted_scheduler_has_the_same_process() -> None:
    """SD3's shift of 3 says which levels are visited, not what a level means."""
    shifted = Process.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert torch.equal(shifted.sigmas, Process.flow(1000).sigmas) and shifted.prediction == "flow"


def test_errors_in_other_spaces_are_the_velocity_error_times_a_square() -> None:
    """(1 - sigma)^2 in epsilon space, sigma^2 in x0 space."""
    process = Process.flow(1000)
    t = torch.tensor([0, 249, 998, 999])
    x0, noise = clean_and_noise(len(t))
    x_t, target = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    output = target + clean_and_noise(len(t))[0].flip(0)
    velocity_error = (output - target).square().flatten(1).mean(1)
    epsilon_error = (process.to_epsilon(output, x_t, t) - noise).square().flatten(1).mean(1)
    x0_error = (process.to_x0(output, x_t, t) - x0).square().flatten(1).mean(1)
    _, sigma = process.alpha_sigma(t)
    assert torch.allclose(epsilon_error, (1.0 - sigma) ** 2 * velocity_error, rtol=1e-10, atol=1e-14)
    assert torch.allclose(x0_error, sigma**2 * velocity_error, rtol=1e-10, atol=1e-14)
    assert torch.equal(process.residual_scale("epsilon", t), 1.0 - sigma)
    assert torch.equal(process.residual_scale("x0", t), -sigma)
    assert torch.equal(process.residual_scale("native", t), torch.ones(4, dtype=torch.float64))


def test_a_deterministic_step_is_a_step_of_the_flow_ode() -> None:
    """Noising the implied x0 with the implied eps, as DDIM does, is x + (sigma' - sigma) v exactly."""
    process = Process.flow(1000)
    here, there = torch.tensor([700, 100, 999]), torch.tensor([500, 400, 0])
    x_t, output = clean_and_noise(3)
    stepped = process.add_noise(
        process.to_x0(output, x_t, here), process.to_epsilon(output, x_t, here), there
    )
    (_, sigma), (_, new) = process.alpha_sigma(here), process.alpha_sigma(there)
    assert torch.allclose(stepped, x_t + expand(new - sigma, x_t) * output, rtol=0.0, atol=1e-13)


def test_other_networks_are_told_the_timestep_itself() -> None:
    t = torch.tensor([3, 999])
    assert Process.from_scheduler(DDPMScheduler()).network_time(t) is t


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_draws_are_the_schedulers_shifted_levels(shift: float) -> None:
    """Equal steps of u give the very levels that a sampler with this shift visits, to the grid's 1/1000."""
    spec = TimestepSpec(shift=shift)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = Process.flow(1000).sigmas[spec.draw(u, 1000)]
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.flip(0).double()
    assert (drawn - theirs[-1000:]).abs().max() < 4e-3
    assert drawn.median().item() == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), abs=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 0.0}, "timesteps.shift is 0.0: use a value above 0"),
        ({"kind": "grid", "grid": [1], "shift": 2.0}, "timesteps.shift means nothing in timesteps.kind=grid"),
    ],
)
def test_shifts_that_mean_nothing_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TimestepSpec(**options)  # type: ignore[arg-type]
