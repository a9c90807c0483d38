"""The forward process: how a clean latent is noised, and what a network's output says about it.

Everything here follows from `x_t = alpha_t x0 + sigma_t eps`. It is the only place that knows both timesteps
and noise levels, and the only place with eps / x0 / v algebra. Shapes: `B` examples, `...` any latent
dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from diffalign.common.errors import UserError

Prediction = Literal["epsilon", "v_prediction", "flow"]
ErrorSpace = Literal["native", "epsilon", "x0"]

MORE_THAN_A_SHIFT = (
    "shift_terminal",
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)
"""Settings of a flow's scheduler that move its levels in other ways."""

PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "flow")


def expand(values_B: Tensor, like: Tensor) -> Tensor:
    """`values_B` reshaped to broadcast over every dimension of `like` but the first."""
    return values_B.reshape(-1, *([1] * (like.ndim - 1)))


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which refuse to hold anything longer."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class SamplerShift:
    """By how much a flow's sampler shifts its noise levels, which may depend on the size of the picture.

    The shift is mu, or e^mu, where mu = intercept + slope n and n is the number of the network's tokens. Both
    move a level u to shift u / (1 + (shift - 1) u), as `TimestepSpec.shift` does.

    Args:
        intercept: mu of no tokens.
        slope: of mu, a token; 0: all sizes have one shift.
        patch: side of a token in latent cells.
        exponential: the shift is e^mu.

    Source: `calculate_shift` of diffusers 0.42.1's FLUX and SD3 pipelines, `time_shift` of its
    FlowMatchEulerDiscreteScheduler.
    """

    intercept: float
    slope: float = 0.0
    patch: int = 1
    exponential: bool = False

    def mu(self, latent_shape: Sequence[int]) -> float:
        """mu for latents of `latent_shape`, whose last two entries are height and width."""
        height, width = latent_shape[-2:]
        return (height // self.patch) * (width // self.patch) * self.slope + self.intercept

    def at(self, latent_shape: Sequence[int]) -> float:
        """The shift for latents of `latent_shape`, whose last two entries are height and width."""
        mu = self.mu(latent_shape)
        return math.exp(mu) if self.exponential else mu


@dataclass(frozen=True)
class Process:
    """A discrete diffusion process of `T` steps; t = 0 is the least noisy.

    Args:
        alphas: `[T]` float64, signal scale at each timestep.
        sigmas: `[T]` float64, noise scale at each timestep.
        prediction: what the network was trained to output ("epsilon", "v_prediction" or "flow").
        sampler_shift: of the base's own sampler; None where it does something else, as all but flows do. It
            says which levels are visited, not what a level means.

    Convention: DDPM processes are variance preserving (alpha^2 + sigma^2 = 1) and v = alpha eps - sigma x0
    (Salimans and Ho 2022, arXiv 2202.00512). Rectified flows go straight, alpha = 1 - sigma, and their
    velocity is dx/dsigma = eps - x0 (Liu et al. 2022, arXiv 2209.03003).
    """

    alphas: Tensor
    sigmas: Tensor
    prediction: Prediction
    sampler_shift: SamplerShift | None = None
    _moved: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_scheduler(cls, scheduler: Any, *, patch: int | None = None) -> Process:
        """The process a diffusers scheduler samples from, read from its config alone.

        Recomputed in float64 from the betas: the schedulers keep float32 products.

        Args:
            scheduler: of any kind.
            patch: side of the network's tokens in latent cells, where the pipeline tells a scheduler with
                dynamic shifting their number: 2 of FLUX, which packs 2 x 2 cells, `patch_size` of SD3. None:
                there are none, or the pipeline goes by something else.

        Raises:
            UserError: for a beta schedule or prediction type that no base of the known families uses.
        """
        config = scheduler.config
        if type(scheduler).__name__.startswith("FlowMatch"):
            return cls.flow(config["num_train_timesteps"], _sampler_shift(config, patch))
        prediction = config.get("prediction_type", "epsilon")
        known = [name for name in PREDICTIONS if name != "flow"]
        if prediction not in known:
            raise UserError(
                f"the scheduler's prediction_type is {prediction!r}: use a base with one of "
                f"{', '.join(known)}"
            )
        alphas_cumprod = torch.cumprod(1.0 - _betas(config), dim=0)
        alphas = alphas_cumprod.sqrt()
        if config.get("rescale_betas_zero_snr", False):
            alphas = rescale_zero_terminal_snr(alphas)
        return cls(alphas, (1.0 - alphas**2).clamp_min(0.0).sqrt(), cast(Prediction, prediction))

    @classmethod
    def flow(cls, num_timesteps: int, sampler_shift: SamplerShift | None = None) -> Process:
        """A rectified flow with equal steps of sigma, from 1/T at t = 0 to 1, which is noise alone.

        Convention: the grid is not shifted. A scheduler's `shift` moves the levels that a sampler visits, and
        the distribution of training levels, not what a level means; see `TimestepSpec`.
        """
        sigmas = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
        return cls(1.0 - sigmas, sigmas, "flow", sampler_shift)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas)

    def network_time(self, t_B: Tensor) -> Tensor:
        """What the network is told of a timestep `[B]`: itself, or of a flow sigma times T, float32."""
        if self.prediction != "flow":
            return t_B
        _, sigma = self.alpha_sigma(t_B)
        return (sigma * self.num_timesteps).float()

    def alpha_sigma(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """`(alpha, sigma)`, each `[B]` on the device of `t_B` (integer timesteps in `[0, T)`).

        float64, or what `exact_dtype` says of the device; likewise for all that is made of them here.
        """
        device = t_B.device
        if device not in self._moved:
            exact = exact_dtype(device)
            self._moved[device] = (self.alphas.to(device, exact), self.sigmas.to(device, exact))
        alphas, sigmas = self._moved[device]
        return alphas[t_B], sigmas[t_B]

    def snr(self, t_B: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2, `[B]` float64; 0 at the end of zero-terminal-SNR bases."""
        alpha, sigma = self.alpha_sigma(t_B)
        return alpha**2 / sigma**2

    def add_noise(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """`x_t = alpha_t x0 + sigma_t eps`, in the dtype of `x0`."""
        alpha, sigma = self._scales(x0, t_B)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """What a perfect network outputs for `(x0, noise, t)`: eps, alpha eps - sigma x0, or eps - x0."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - x0
        alpha, sigma = self._scales(x0, t_B)
        return alpha * noise - sigma * x0

    def to_epsilon(self, output: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        """The noise that a network output implies; v: sigma x_t + alpha v, flow: x_t + alpha v."""
        if self.prediction == "epsilon":
            return output
        alpha, sigma = self._scales(x_t, t_B)
        return alpha * output + (x_t if self.prediction == "flow" else sigma * x_t)

    def to_x0(self, output: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        """The clean latent that a network output implies; v: alpha x_t - sigma v, flow: x_t - sigma v.

        Raises:
            ValueError: for an epsilon network where SNR is 0, where x_t carries no signal to solve for.
        """
        alpha, sigma = self._scales(x_t, t_B)
        if self.prediction == "epsilon":
            self._refuse_zero_alpha(t_B)
            return (x_t - sigma * output) / alpha
        return (x_t if self.prediction == "flow" else alpha * x_t) - sigma * output

    def to_v(self, output: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        """The velocity alpha eps - sigma x0 that a network output implies (same limits as `to_x0`)."""
        if self.prediction == "v_prediction":
            return output
        alpha, sigma = self._scales(x_t, t_B)
        return alpha * self.to_epsilon(output, x_t, t_B) - sigma * self.to_x0(output, x_t, t_B)

    def residual_scale(self, space: ErrorSpace, t_B: Tensor) -> Tensor:
        """`[B]` float64 factor from a native residual (output - target) to the residual in `space`.

        With x_t fixed, every parameterisation is linear in the others, so errors convert by one factor:
        v -> eps: alpha;  v -> x0: -sigma;  eps -> x0: -sigma / alpha; a flow's velocity as v. Squared errors
        scale by its square, so that of a flow in epsilon space by (1 - sigma)^2.

        Raises:
            ValueError: eps -> x0 where SNR is 0.
        """
        alpha, sigma = self.alpha_sigma(t_B)
        native = "epsilon" if self.prediction == "epsilon" else "velocity"
        if space == "native" or space == native:
            return torch.ones_like(alpha)
        if space == "epsilon":
            return alpha
        if native == "velocity":
            return -sigma
        self._refuse_zero_alpha(t_B)
        return -sigma / alpha

    def _scales(self, like: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t_B)
        return expand(alpha, like).to(like.dtype), expand(sigma, like).to(like.dtype)

    def _refuse_zero_alpha(self, t_B: Tensor) -> None:
        alpha, _ = self.alpha_sigma(t_B)
        if bool((alpha == 0).any()):
            raise ValueError(
                "x0 is undefined for an epsilon network at SNR 0 (last step of a zero-terminal-SNR base)"
            )


def rescale_zero_terminal_snr(alphas: Tensor) -> Tensor:
    """`[T]` signal scales shifted and scaled so that the last is exactly 0 and the first is kept.

    Source: Lin et al. 2024, arXiv 2305.08891, algorithm 1.
    """
    first, last = alphas[0], alphas[-1]
    return (alphas - last) * first / (first - last)


def _sampler_shift(config: Any, patch: int | None) -> SamplerShift | None:
    """How a flow's scheduler shifts its levels; None where one shift does not say it."""
    if any(config.get(key) for key in MORE_THAN_A_SHIFT):
        return None
    if not config.get("use_dynamic_shifting"):
        return SamplerShift(config["shift"])
    low, high = config.get("base_shift"), config.get("max_shift")
    fewest, most = config.get("base_image_seq_len"), config.get("max_image_seq_len")
    if patch is None or None in (low, high, fewest, most) or fewest == most:
        return None
    slope = (high - low) / (most - fewest)
    exponential = config.get("time_shift_type", "exponential") == "exponential"
    return SamplerShift(low - slope * fewest, slope, patch, exponential)


def _betas(config: Any) -> Tensor:
    """`[T]` float64 noise variances of a diffusers scheduler config."""
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    missing = [
        key for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule") if key not in config
    ]
    if missing:
        raise UserError(
            f"the base's scheduler has no {', '.join(missing)}: not a DDPM process; use a base whose "
            "scheduler is of the DDPM, DDIM, Euler or DPM-Solver kind"
        )
    count, start, end = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["beta_schedule"] == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    if config["beta_schedule"] == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    raise UserError(
        f"beta_schedule {config['beta_schedule']!r} is not supported: use linear or scaled_linear"
    )
