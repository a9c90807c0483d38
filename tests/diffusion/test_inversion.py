"""Inversion against networks whose answers are known in closed form, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.inversion import CLEAN, Grid, implied_noise, inversion_levels
from diffalign.diffusion.process import Prediction, Process, expand, rescale_zero_terminal_snr

MEAN, DEVIATION = 0.3, 0.8
"""Of the Gaussian data."""
TIMESTEPS = torch.tensor([0, 10, 100, 300, 517, 700, 999])


def sdxl_process(prediction: Prediction = "epsilon", *, zero_terminal: bool = False) -> Process:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1.0 - betas, dim=0).sqrt()
    if zero_terminal:
        alphas = rescale_zero_terminal_snr(alphas)
    return Process(alphas, (1.0 - alphas**2).sqrt(), prediction)


def process_of(prediction: Prediction) -> Process:
    return Process.flow(1000) if prediction == "flow" else sdxl_process(prediction)


Mean = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of x0 given (x_t, alpha, sigma)."""


def denoiser_of(process: Process, mean: Mean) -> Denoiser:
    """The network that makes the least error, in the process's own form."""

    def call(network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        flow = process.prediction == "flow"
        t = time.round().long() - 1 if flow else time
        alpha, sigma = (expand(value, x_t).to(x_t.dtype) for value in process.alpha_sigma(t))
        x0 = mean(x_t, alpha, sigma)
        eps = (x_t - alpha * x0) / sigma
        if flow:
            return eps - x0
        return eps if process.prediction == "epsilon" else alpha * eps - sigma * x0

    return Denoiser(nn.Identity(), process, call)


def gaussian(x_t: Tensor, alpha: Tensor, sigma: Tensor, mean: float = MEAN, std: float = DEVIATION) -> Tensor:
    """For x0 ~ N(mean, std^2)."""
    return mean + alpha * std**2 * (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)


def mixture(x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """For x0 ~ N(1, 0.3^2) or N(-1, 0.3^2) with equal chance."""
    variance = alpha**2 * 0.09 + sigma**2
    return alpha * 0.09 * x_t / variance + sigma**2 / variance * torch.tanh(alpha * x_t / variance)


def analytic_noise(process: Process, x0: Tensor, t: Tensor) -> Tensor:
    """Of the probability-flow ODE for Gaussian data: it keeps (x - mean) / std of each marginal."""
    alpha, sigma = (expand(value, x0) for value in process.alpha_sigma(t))
    spread = (alpha**2 * DEVIATION**2 + sigma**2).sqrt()
    return (alpha * MEAN + spread * (x0 - MEAN) / DEVIATION - alpha * x0) / sigma


def cond(rows: int) -> Conditioning:
    return Conditioning({"nothing": torch.zeros(rows, 1)})


def data(rows: int, *, size: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, 2, size, generator=generator, dtype=torch.float64).to(dtype)


def root_mean_square(values: Tensor) -> Tensor:
    return values.square().flatten(1).mean(dim=1).sqrt()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("grid", ["common", "own"])
@pytest.mark.parametrize(("steps", "corrections"), [(1, 0), (1, 1), (9, 0), (9, 1), (9, 3), (200, 1)])
def test_a_network_that_always_says_eps_gets_eps(
    prediction: Prediction, grid: Grid, steps: int, corrections: int
) -> None:
    """At every t: 0, the last, on the grid of 9 (110) and beside it. Whatever the image is."""
    t = torch.cat([TIMESTEPS, torch.tensor([1, 110, 111])])
    x0, eps = 7.0 * data(len(t)), data(len(t)).flip(0)
    process = sdxl_process(prediction)

    def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        # The network knows which example it looks at by its conditioning.
        mine = eps[cond["row"][:, 0]]
        if prediction == "epsilon":
            return mine
        alpha, sigma = (expand(value, x_t) for value in process.alpha_sigma(t))
        return (mine - sigma * x_t) / alpha

    rows = Conditioning({"row": torch.arange(len(t))[:, None]})
    denoiser = Denoiser(nn.Identity(), process, call)
    noise, _ = implied_noise(denoiser, x0, rows, t, steps=steps, corrections=corrections, grid=grid)
    assert noise.dtype == torch.float64
    assert (noise - eps).abs().max().item() < 1e-9


def test_by_hand() -> None:
    """alpha = (0.8, 0.6), sigma = (0.6, 0.8), rho = (3/4, 4/3); the network answers eps = x; x0 = 1, t = 1.

    DDIM: eps = 1, so n = 1 and x = 0.8 + 0.6 = 1.4 at t = 0. Then eps = 1.4 and x_1 = 0.6 (1.4 - 0.6 * 1.4) /
    0.8 + 0.8 * 1.4 = 0.42 + 1.12 = 1.54, n = (1.54 - 0.6) / 0.8 = 1.175.
    ReNoise: 1 and, asked again at 1.4, 1.4: mean 1.2, x = 0.8 + 0.6 * 1.2 = 1.52. Then 1.52, which leads to
    0.6 (1.52 - 0.6 * 1.52) / 0.8 + 0.8 * 1.52 = 0.456 + 1.216 = 1.672; asked again 1.672, mean 1.596, which
    leads to 0.6 (1.52 - 0.6 * 1.596) / 0.8 + 0.8 * 1.596 = 0.4218 + 1.2768 = 1.6986, n = 1.0986 / 0.8:
    1.37325.
    """
    process = Process(torch.tensor([0.8, 0.6]).double(), torch.tensor([0.6, 0.8]).double(), "epsilon")
    denoiser = Denoiser(nn.Identity(), process, lambda network, x_t, t, cond: network(x_t))
    x0, t = torch.ones(1, 1, dtype=torch.float64), torch.tensor([1])
    for corrections, expected, count in ((0, 1.175, 2), (1, 1.37325, 4)):
        noise, forwards = implied_noise(denoiser, x0, cond(1), t, steps=2, corrections=corrections)
        assert noise.item() == pytest.approx(expected, abs=1e-7)
        assert forwards.tolist() == [count]
        x_t = process.add_noise(x0, noise, t)
        assert x_t.item() == pytest.approx(0.6 + 0.8 * expected, abs=1e-7)


@pytest.mark.parametrize("grid", ["common", "own"])
@pytest.mark.parametrize(("steps", "corrections"), [(1, 0), (1, 1), (9, 0), (9, 3), (200, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flow_that_always_says_v_gets_x0_plus_v(
    grid: Grid, steps: int, corrections: int, dtype: torch.dtype
) -> None:
    """Straight to sigma = 1 and to anywhere before it, to rounding: x = x0 + sigma v is an Euler step."""
    t = torch.cat([TIMESTEPS, torch.tensor([1, 998])])
    x0, v = 7.0 * data(len(t), dtype=dtype), data(len(t), dtype=dtype).flip(0)
    process = Process.flow(1000)
    rows = Conditioning({"row": torch.arange(len(t))[:, None]})
    denoiser = Denoiser(nn.Identity(), process, lambda network, x_t, time, cond: v[cond["row"][:, 0]])
    noise, _ = implied_noise(denoiser, x0, rows, t, steps=steps, corrections=corrections, grid=grid)
    assert noise.dtype == dtype
    assert (noise - (x0 + v)).abs().max().item() < (1e-13 if dtype == torch.float64 else 2e-5)
    _, sigma = process.alpha_sigma(t)
    there = x0 + expand(sigma, x0).to(dtype) * v
    assert torch.allclose(process.add_noise(x0, noise, t), there, rtol=0.0, atol=1e-5)


def test_a_flow_by_hand() -> None:
    """sigma = (1/2, 1), the network answers v = x, x0 = 1: Euler's x is 1.5 x at each step, 2.25 at the end,
    where alpha is 0 and the noise is x itself. The network is told sigma times 2, of where a step leads.

    ReNoise: 1 and, asked again at 1.5, 1.5: mean 1.25, x = 1 + 1.25 / 2 = 1.625. Then 1.625, which leads to
    2.4375; asked again 2.4375, mean 2.03125, x = 1.625 + 1.015625 = 2.640625.
    """
    told: list[float] = []

    def call(network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        told.append(time.item())
        return x_t

    denoiser = Denoiser(nn.Identity(), Process.flow(2), call)
    x0, t = torch.ones(1, 1, dtype=torch.float64), torch.tensor([1])
    for corrections, expected in ((0, 2.25), (1, 2.640625)):
        noise, forwards = implied_noise(denoiser, x0, cond(1), t, steps=2, corrections=corrections)
        assert noise.item() == expected and forwards.tolist() == [2 * (corrections + 1)]
    assert told == [1.0, 2.0, 1.0, 1.0, 2.0, 2.0]


def test_where_a_walk_goes() -> None:
    """1000 timesteps in 4 parts end at 249, 499, 749 and 999; t = 600 is a part step beyond 499.

    In 4 parts of its own way it goes through 601 k / 4 - 1, rounded down: 149, 299, 449, 600. t = 1 has two
    levels below 4 parts: CLEAN, 0, 0, 1.
    """
    t = torch.tensor([600, 999, 0, 249, 1])
    common = inversion_levels(t, 1000, 4)
    assert common.T.tolist() == [
        [249, 499, 600, 600],
        [249, 499, 749, 999],
        [0, 0, 0, 0],
        [249, 249, 249, 249],
        [1, 1, 1, 1],
    ]
    own = inversion_levels(t, 1000, 4, "own")
    assert own.T[[0, 1, 2, 4]].tolist() == [
        [149, 299, 449, 600],
        [249, 499, 749, 999],
        [CLEAN, CLEAN, CLEAN, 0],
        [CLEAN, 0, 0, 1],
    ]


def test_what_the_network_is_asked() -> None:
    """Both predictions of a step at its destination, the first at the clean image; arrived rows not at all.

    t = (600, 0, 300) in 4 parts: 249 0 249, then 499 - 300, then 600.
    """
    asked: list[tuple[list[int], Tensor]] = []

    def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        asked.append((t.tolist(), x_t.clone()))
        assert len(cond["nothing"]) == len(x_t)
        return x_t

    x0, t = data(3), torch.tensor([600, 0, 300])
    denoiser = Denoiser(nn.Identity(), sdxl_process(), call)
    _, forwards = implied_noise(denoiser, x0, cond(3), t, steps=4, corrections=1)
    timesteps = [times for times, _ in asked]
    assert timesteps == [[249, 0, 249]] * 2 + [[499, 300]] * 2 + [[600]] * 2
    assert torch.equal(asked[0][1], x0) and not torch.equal(asked[1][1], x0)
    assert forwards.tolist() == [6, 2, 4]


@pytest.mark.parametrize("grid", ["common", "own"])
@pytest.mark.parametrize("corrections", [0, 1])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_gaussian_data_converges_to_the_ode(prediction: Prediction, corrections: int, grid: Grid) -> None:
    """First order: three times as many steps, about a third of the error, at 300, 517, 700 and 999.

    So of a flow at 999 as well, where alpha is 0.
    """
    process, t = process_of(prediction), TIMESTEPS[3:]
    x0 = MEAN + DEVIATION * data(len(t))
    truth = analytic_noise(process, x0, t)
    errors = []
    for steps in (10, 30, 90, 270):
        noise, _ = implied_noise(
            denoiser_of(process, gaussian), x0, cond(4), t, steps=steps, corrections=corrections, grid=grid
        )
        errors.append(root_mean_square(noise - truth))
    for coarse, fine in pairwise(errors):
        assert bool((coarse > 2.2 * fine).all())
    assert bool((errors[-1] < 1e-2).all()) and bool((errors[0] > 1e-2).all())


def test_the_noise_of_nine_steps() -> None:
    """Exact predictor for N(0, 1) data, SDXL, 9 steps of its own way and a correction: std 0.06, 0.19, 0.41,
    0.85 at t = 10, 100, 300, 700. With this predictor the noise is a multiple of x0, so x0 = 1 shows it.

    The ODE keeps such an x, so its own noise is (1 - alpha) / sigma.
    """
    process, t = sdxl_process(), torch.tensor([10, 100, 300, 700])
    denoiser = denoiser_of(process, partial(gaussian, mean=0.0, std=1.0))
    ones = torch.ones(4, 1, dtype=torch.float64)
    noise, forwards = implied_noise(denoiser, ones, cond(4), t, steps=9, grid="own")
    assert noise[:, 0].tolist() == pytest.approx([0.06, 0.19, 0.41, 0.85], abs=0.005)
    assert forwards.tolist() == [18] * 4
    finest, _ = implied_noise(denoiser, ones, cond(4), t, steps=1000, corrections=0)
    alpha, sigma = process.alpha_sigma(t)
    assert torch.allclose(finest[:, 0], (1.0 - alpha) / sigma, atol=0.01)


def sampled_back(denoiser: Denoiser, x_t: Tensor, levels: Tensor) -> Tensor:
    """DDIM without noise down the levels `[steps, B]` to the clean end; a step asks where it starts."""
    process = denoiser.process
    below = torch.cat([torch.full_like(levels[:1], CLEAN), levels[:-1]])
    for t, target in zip(levels.flip(0), below.flip(0), strict=True):
        here = t.clamp_min(0)
        output = denoiser.predict(x_t, here, cond(len(t)))
        eps, clean = process.to_epsilon(output, x_t, here), process.to_x0(output, x_t, here)
        stepped = process.add_noise(clean, eps, target.clamp_min(0))
        stepped = torch.where(expand(target == CLEAN, x_t), clean, stepped)
        x_t = torch.where(expand(t > target, x_t), stepped, x_t)
    return x_t


@pytest.mark.parametrize("grid", ["common", "own"])
@pytest.mark.parametrize("mean", [gaussian, mixture])
@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_more_steps_reconstruct_better_and_the_correction_helps(
    prediction: Prediction, mean: Mean, grid: Grid
) -> None:
    process, t = process_of(prediction), TIMESTEPS[3:]
    denoiser, z = denoiser_of(process, mean), data(4, size=50)
    x0 = MEAN + DEVIATION * z if mean is gaussian else 0.3 * z + z.flip(0).sign()
    errors: dict[int, list[Tensor]] = {0: [], 1: []}
    for corrections, found in errors.items():
        for steps in (5, 20, 80):
            noise, _ = implied_noise(
                denoiser, x0, cond(4), t, steps=steps, corrections=corrections, grid=grid
            )
            levels = inversion_levels(t, 1000, steps, grid)
            found.append(
                root_mean_square(sampled_back(denoiser, process.add_noise(x0, noise, t), levels) - x0)
            )
        for coarse, fine in pairwise(found):
            assert bool((fine < 0.75 * coarse).all())
    for plain, corrected in zip(errors[0], errors[1], strict=True):
        assert bool((corrected < 0.95 * plain).all())


def test_a_picture_comes_back_from_the_sampler_of_diffusers() -> None:
    """From sigma = 1 in as many equal steps: with straight paths at once, otherwise the better the more."""
    x0 = (MEAN + DEVIATION * data(1, size=50)).float()
    straight = Denoiser(nn.Identity(), Process.flow(1000), lambda network, x_t, time, cond: 1.0 - 3.0 * x0)
    curved = denoiser_of(Process.flow(1000), gaussian)
    errors = {}
    for denoiser, steps in ((straight, 4), (curved, 5), (curved, 50), (curved, 500)):
        x_t, _ = implied_noise(denoiser, x0, cond(1), torch.tensor([999]), steps=steps, corrections=3)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=[1.0 - step / steps for step in range(steps)])
        for time in scheduler.timesteps:
            output = denoiser.predict(x_t, (time.round().long() - 1)[None], cond(1))
            x_t = scheduler.step(output, time, x_t, return_dict=False)[0]
        errors[denoiser is straight, steps] = (x_t - x0).abs().max().item()
    assert errors[True, 4] < 1e-5
    assert errors[False, 5] > 5 * errors[False, 50] > 25 * errors[False, 500] > 0.0


@pytest.mark.parametrize("grid", ["common", "own"])
@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_a_batch_with_different_t_equals_singles(prediction: Prediction, grid: Grid) -> None:
    denoiser, x0 = denoiser_of(process_of(prediction), mixture), data(len(TIMESTEPS))
    options = {"steps": 9, "corrections": 1, "grid": grid}
    together, forwards = implied_noise(denoiser, x0, cond(len(x0)), TIMESTEPS, **options)  # type: ignore[arg-type]
    for row, t in enumerate(TIMESTEPS):
        alone, count = implied_noise(denoiser, x0[row : row + 1], cond(1), t[None], **options)  # type: ignore[arg-type]
        assert torch.allclose(together[row], alone[0], rtol=1e-13, atol=1e-13)
        assert forwards[row] == count[0]


@pytest.mark.parametrize("corrections", [0, 1])
def test_the_end_of_a_zero_terminal_snr_base(corrections: int) -> None:
    """alpha = 0 at t = 999: a v network says eps = x there, and the ODE ends at (x0 - mean) / std.

    For Gaussian data v = alpha eps - sigma x0 with both means given x_t; at alpha = 0 it is -mean.
    """
    process, t = sdxl_process("v_prediction", zero_terminal=True), torch.tensor([999])
    denoiser = denoiser_of(process, gaussian)
    x0 = MEAN + DEVIATION * data(1)
    errors = []
    for steps in (10, 100, 1000):
        noise, _ = implied_noise(denoiser, x0, cond(1), t, steps=steps, corrections=corrections)
        errors.append(root_mean_square(noise - (x0 - MEAN) / DEVIATION).item())
    assert errors[0] > 4 * errors[1] > 16 * errors[2] and errors[2] < 5e-3


def test_float32_keeps_its_digits_at_t_0() -> None:
    """sigma_0 = 0.03 would blow up the rounding of x_t - alpha x0 (6e-8 * 7 / 0.03 = 1e-5); here nothing is
    divided by it.
    """
    eps = data(2, dtype=torch.float32)
    denoiser = Denoiser(nn.Identity(), sdxl_process(), lambda network, x_t, t, cond: eps)
    x0, t = 7.0 * data(2, dtype=torch.float32).flip(0), torch.tensor([0, 0])
    noise, _ = implied_noise(denoiser, x0, cond(2), t, steps=9)
    assert noise.dtype == torch.float32 and (noise - eps).abs().max().item() < 1e-6


class Noisy(nn.Module):
    """A network with dropout, one part of which stays in evaluation mode while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5).eval()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x_t: Tensor) -> Tensor:
        if not bool(torch.isfinite(x_t).all()):
            raise ZeroDivisionError
        return self.frozen(self.dropout(self.scale * x_t))


def test_no_dropout_no_gradient_and_no_trace() -> None:
    network = Noisy().double()
    denoiser = Denoiser(network, sdxl_process(), lambda module, x_t, t, cond: module(x_t))
    x0, t = data(2), torch.tensor([30, 800])
    stream = torch.get_rng_state()
    first, _ = implied_noise(denoiser, x0, cond(2), t, steps=5)
    assert torch.equal(torch.get_rng_state(), stream) and not first.requires_grad
    assert torch.equal(implied_noise(denoiser, x0, cond(2), t, steps=5)[0], first)
    with pytest.raises(ZeroDivisionError):
        implied_noise(denoiser, x0 / 0.0, cond(2), t, steps=5)
    assert [module.training for module in (network, network.dropout, network.frozen)] == [True, True, False]
    assert network.scale.requires_grad and network(x0).requires_grad
    assert not torch.equal(network(x0), network(x0))  # dropout is on again


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    denoiser = denoiser_of(sdxl_process(), gaussian)
    with pytest.raises(UserError, match=rf"inversion of {steps} steps .* use 1 to 1000"):
        implied_noise(denoiser, data(1), cond(1), torch.tensor([5]), steps=steps)
