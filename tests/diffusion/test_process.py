"""The forward process: conversions there and back in float64, and the alphas that diffusers itself uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from diffalign.common.errors import UserError
from diffalign.diffusion.process import PREDICTIONS, Process, exact_dtype, expand, rescale_zero_terminal_snr

DDPM = [prediction for prediction in PREDICTIONS if prediction != "flow"]
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def of_scheduler(prediction: str, **options: Any) -> Process:
    return Process.from_scheduler(DDIMScheduler(**SD_BETAS, prediction_type=prediction, **options))


def three_steps(prediction: str, *alpha_squares: float) -> Process:
    """A process whose alpha^2 are given; sigma^2 is the rest."""
    squares = torch.tensor(alpha_squares, dtype=torch.float64)
    return Process(squares.sqrt(), (1.0 - squares).sqrt(), prediction)  # type: ignore[arg-type]


def clean_and_noise(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 4, 3, 2)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64),
        torch.randn(shape, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("prediction", DDPM)
@pytest.mark.parametrize("zero_terminal", [False, True])
def test_every_conversion_there_and_back(prediction: str, zero_terminal: bool) -> None:
    process = of_scheduler(prediction, rescale_betas_zero_snr=zero_terminal)
    t = torch.arange(0, 999, 41)
    if not (prediction == "epsilon" and zero_terminal):
        t = torch.cat([t, torch.tensor([999])])
    x0, noise = clean_and_noise(len(t))
    x_t = process.add_noise(x0, noise, t)
    perfect = process.target(x0, noise, t)
    alpha, sigma = (expand(scale, x0) for scale in process.alpha_sigma(t))
    # Dividing by alpha (0.068 at t = 999 of SD) costs up to two digits; everything else is exact to rounding.
    assert torch.allclose(process.to_epsilon(perfect, x_t, t), noise, rtol=0.0, atol=1e-13)
    assert torch.allclose(process.to_x0(perfect, x_t, t), x0, rtol=0.0, atol=1e-11)
    assert torch.allclose(process.to_v(perfect, x_t, t), alpha * noise - sigma * x0, rtol=0.0, atol=1e-11)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0.0, atol=1e-15)


def test_hand_worked_numbers() -> None:
    """alpha = 0.8, sigma = 0.6, x0 = 2, eps = 1: x_t = 1.6 + 0.6 = 2.2 and v = 0.8 - 1.2 = -0.4.

    Back from v: eps = 0.6 * 2.2 + 0.8 * -0.4 = 1.32 - 0.32 = 1, x0 = 0.8 * 2.2 - 0.6 * -0.4 = 1.76 + 0.24 =
    2. SNR = 0.64 / 0.36 = 16/9.
    """
    process = three_steps("v_prediction", 0.64)
    t, x0, noise = torch.tensor([0]), torch.tensor([[2.0]]).double(), torch.tensor([[1.0]]).double()
    x_t = process.add_noise(x0, noise, t)
    velocity = process.target(x0, noise, t)
    assert x_t.item() == pytest.approx(2.2, abs=1e-15)
    assert velocity.item() == pytest.approx(-0.4, abs=1e-15)
    assert process.to_epsilon(velocity, x_t, t).item() == pytest.approx(1.0, abs=1e-15)
    assert process.to_x0(velocity, x_t, t).item() == pytest.approx(2.0, abs=1e-15)
    assert process.snr(t).item() == pytest.approx(16 / 9, abs=1e-14)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),
        DDPMScheduler(**SD_BETAS),
        DDIMScheduler(**SD_BETAS, rescale_betas_zero_snr=True),
        PNDMScheduler(**SD_BETAS, skip_prk_steps=True),
        EulerDiscreteScheduler(**SD_BETAS),
        DDPMScheduler(trained_betas=[0.1, 0.2, 0.4]),
    ],
    ids=["linear", "scaled-linear", "zero-snr", "pndm", "euler", "trained-betas"],
)
def test_alphas_are_those_of_the_scheduler(scheduler: Any) -> None:
    process = Process.from_scheduler(scheduler)
    theirs = scheduler.alphas_cumprod.double()
    assert process.num_timesteps == len(theirs)
    # They multiply a thousand factors in float32.
    assert torch.allclose(process.alphas**2, theirs, rtol=2e-5, atol=1e-7)


def test_euler_keeps_the_last_alpha_just_above_zero_and_we_do_not() -> None:
    """diffusers' Euler scheduler sets alpha^2 to 2^-24 at SNR 0 to keep its sigma finite; training sees 0."""
    scheduler = EulerDiscreteScheduler(**SD_BETAS, rescale_betas_zero_snr=True)
    process = Process.from_scheduler(scheduler)
    assert scheduler.alphas_cumprod[-1].item() == 2.0**-24
    assert process.alphas[-1].item() == 0.0
    assert process.sigmas[-1].item() == 1.0
    assert torch.allclose(
        process.alphas[:-1] ** 2, scheduler.alphas_cumprod[:-1].double(), rtol=2e-5, atol=1e-7
    )


def test_noising_and_velocity_agree_with_diffusers() -> None:
    scheduler = DDPMScheduler(**SD_BETAS, prediction_type="v_prediction")
    process = Process.from_scheduler(scheduler)
    t = torch.tensor([0, 250, 999])
    x0, noise = (values.float() for values in clean_and_noise(3))
    assert torch.allclose(process.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t), atol=1e-6)
    assert torch.allclose(process.target(x0, noise, t), scheduler.get_velocity(x0, noise, t), atol=1e-6)


@pytest.mark.parametrize("prediction", DDPM)
@pytest.mark.parametrize("space", ["native", "epsilon", "x0"])
def test_residual_scale_is_the_factor_between_directly_converted_residuals(
    prediction: str, space: Any
) -> None:
    process = of_scheduler(prediction)
    t = torch.tensor([0, 1, 400, 998, 999])
    x0, noise = clean_and_noise(len(t))
    x_t = process.add_noise(x0, noise, t)
    target = process.target(x0, noise, t)
    output = target + clean_and_noise(len(t))[1].flip(0)
    convert = {
        "native": lambda value: value,
        "epsilon": lambda value: process.to_epsilon(value, x_t, t),
        "x0": lambda value: process.to_x0(value, x_t, t),
    }[space]
    direct = convert(output) - convert(target)
    scaled = expand(process.residual_scale(space, t), x0) * (output - target)
    assert torch.allclose(scaled, direct, rtol=1e-10, atol=1e-11)


def test_residual_scale_by_hand() -> None:
    """alpha = 0.8, sigma = 0.6: v -> eps 0.8, v -> x0 -0.6, eps -> x0 -0.75; to the own space 1."""
    t = torch.tensor([0])
    v, eps = three_steps("v_prediction", 0.64), three_steps("epsilon", 0.64)
    assert v.residual_scale("epsilon", t).item() == pytest.approx(0.8)
    assert v.residual_scale("x0", t).item() == pytest.approx(-0.6)
    assert eps.residual_scale("x0", t).item() == pytest.approx(-0.75)
    assert eps.residual_scale("epsilon", t).item() == eps.residual_scale("native", t).item() == 1.0


def test_snr_zero() -> None:
    """At alpha = 0 a v network still gives x0 = -v; for an epsilon network x0 is undefined, which is said."""
    x0, noise, t = torch.tensor([[3.0]]).double(), torch.tensor([[5.0]]).double(), torch.tensor([1])
    v = three_steps("v_prediction", 0.5, 0.0)
    assert v.snr(t).item() == 0.0
    assert v.target(x0, noise, t).item() == -3.0
    assert v.to_x0(torch.tensor([[-3.0]]).double(), noise, t).item() == 3.0
    assert v.residual_scale("epsilon", t).item() == 0.0
    eps = three_steps("epsilon", 0.5, 0.0)
    for undefined in (
        lambda: eps.to_x0(noise, noise, t),
        lambda: eps.to_v(noise, noise, t),
        lambda: eps.residual_scale("x0", t),
    ):
        with pytest.raises(ValueError, match="SNR 0"):
            undefined()
    assert torch.isfinite(eps.to_x0(noise, noise, torch.tensor([0]))).all()


def test_rescaling_to_zero_terminal_snr_by_hand() -> None:
    """alphas (0.9, 0.6, 0.3): minus 0.3, times 0.9 / 0.6: (0.9, 0.45, 0)."""
    rescaled = rescale_zero_terminal_snr(torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64))
    assert torch.allclose(rescaled, torch.tensor([0.9, 0.45, 0.0], dtype=torch.float64), rtol=0.0, atol=1e-15)
    assert rescaled[-1].item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_results_have_the_dtype_of_the_latents(dtype: torch.dtype) -> None:
    process, t = of_scheduler("v_prediction"), torch.tensor([10, 20])
    x0, noise = (values[:2].to(dtype) for values in clean_and_noise(2))
    for value in (process.add_noise(x0, noise, t), process.target(x0, noise, t), process.to_x0(x0, noise, t)):
        assert value.dtype == dtype


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDPMScheduler(prediction_type="sample"), "prediction_type is 'sample': use a base"),
        (
            DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            "beta_schedule 'squaredcos_cap_v2' is not supported",
        ),
        (
            EDMEulerScheduler(),
            "has no beta_start, beta_end, beta_schedule: not a DDPM process",
        ),
    ],
)
def test_processes_of_other_kinds_are_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Process.from_scheduler(scheduler)


def test_scales_are_as_exact_as_the_device_allows() -> None:
    """torch refuses to move float64 to Apple's GPUs, which accelerate chooses where there is one."""
    kinds = {device: exact_dtype(torch.device(device)) for device in ("cpu", "cuda:1", "mps")}
    assert kinds == {"cpu": torch.float64, "cuda:1": torch.float64, "mps": torch.float32}
    alpha, sigma = of_scheduler("epsilon").alpha_sigma(torch.tensor([10, 20]))
    assert alpha.dtype == sigma.dtype == torch.float64
