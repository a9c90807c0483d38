"""The distribution of training timesteps: plain data, so that recipes are read without importing torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from diffalign.common.errors import UserError, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.diffusion.process import Process, SamplerShift

DRAWING = ("uniform", "logit_normal", "mode")
"""Kinds that draw a level from a range; "grid" has its timesteps written down."""
KINDS = (*DRAWING, "grid")
KINDS_WITH = {
    "low": DRAWING,
    "high": DRAWING,
    "mean": ("logit_normal",),
    "std": ("logit_normal",),
    "scale": ("mode",),
    "grid": ("grid",),
    "shift": DRAWING,
    "sampler_shift": DRAWING,
}
"""Key -> the kinds that it means something to."""
LARGEST_MODE_SCALE = 2.0 / (math.pi - 2.0)
"""Beyond it (and below -1) mode sampling's map from uniform numbers to positions is no longer monotonic."""


@dataclass
class TimestepSpec:
    """The distribution of training timesteps.

    Args:
        kind: "uniform" over `[low, high)`; "logit_normal": sigmoid of a normal with `mean` and `std`, and
            "mode" with `scale` (both Esser et al. 2024, arXiv 2403.03206, section 3.1), squeezed into
            `[low, high)`; "grid": each of `grid` with equal chance.
        low: smallest timestep drawn.
        high: one past the largest; null: the length of the process.
        mean: of logit_normal's normal; above 0 more noise.
        std: of the same, above 0; smaller gathers the levels around the sigmoid of `mean`.
        scale: of mode, from -1 to 1.75; above 0 the middle levels are drawn more often, below 0 less.
        grid: the timesteps of kind grid, e.g. [249,499,749,999].
        strata: consecutive samples of the run cycle through this many equal slices of [0, 1); 0 or 1: none.
        shift: moves drawn levels u in [0, 1) towards noise (above 1) or away from it, to
            shift u / (1 + (shift - 1) u) (Esser et al. 2024, section 5.3.2).
        sampler_shift: take for `shift` what the base's own sampler has at the pictures' size: 3 of SD3 at any
            size, of FLUX.1-dev 1.65 at 256 x 256 and 3.16 at 1024 x 1024 pixels; rectified flows only.

    Convention: levels rise with noise, as in the paper. The DreamBooth LoRA scripts of diffusers for SD3 (at
    0185674) and FLUX (at 0050dea) count them from the noisiest, so that their `logit_mean` has the other
    sign; the first shifts them as the scheduler does, the second leaves dynamic shifting out.
    """

    kind: Literal["uniform", "logit_normal", "mode", "grid"] = "uniform"
    low: int = 0
    high: int | None = None
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29
    grid: list[int] = field(default_factory=list)
    strata: int = 0
    shift: float = 1.0
    sampler_shift: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("timesteps.kind", self.kind, KINDS)
        if self.kind == "grid" and not self.grid:
            raise UserError(
                "timesteps.grid is empty: give the timesteps, e.g. timesteps.grid=[249,499,749,999]"
            )
        self._refuse_unused()
        if not self.std > 0:
            raise UserError(f"timesteps.std is {self.std}: use a value above 0")
        if not -1.0 <= self.scale <= LARGEST_MODE_SCALE:
            raise UserError(
                f"timesteps.scale is {self.scale}: use a value from -1 to {LARGEST_MODE_SCALE:.2f}"
            )
        if not 0.0 < self.shift < math.inf:
            raise UserError(f"timesteps.shift is {self.shift}: use a value above 0; 1 shifts nothing")
        if self.sampler_shift and self.shift != 1.0:
            raise UserError(
                f"timesteps.shift={self.shift} and timesteps.sampler_shift are both set: leave one out"
            )
        if self.strata < 0:
            raise UserError(f"timesteps.strata is {self.strata}: use 0 or more")
        if self.low < 0 or (self.high is not None and self.high <= self.low):
            raise UserError(f"timesteps low={self.low}, high={self.high}: use 0 <= low < high")

    def _refuse_unused(self) -> None:
        """Refuses keys that mean nothing to this kind; a default cannot be told from a key left out."""
        for key, kinds in KINDS_WITH.items():
            default = getattr(TimestepSpec, key, [])  # a list is made anew, the class has none
            if self.kind not in kinds and getattr(self, key) != default:
                raise UserError(
                    f"timesteps.{key} means nothing in timesteps.kind={self.kind}: leave it out, or use "
                    f"timesteps.kind={' or '.join(kinds)}"
                )

    def check(self, process: Process) -> None:
        """Refuses timesteps, or a shift of the sampler, that a process does not have."""
        self._check_range(process.num_timesteps)
        if self.sampler_shift:
            _shift_of_sampler(process)

    def _check_range(self, num_timesteps: int) -> None:
        last = num_timesteps - 1 if self.high is None else self.high - 1
        outside = [t for t in [*self.grid, self.low, last] if not 0 <= t < num_timesteps]
        if outside:
            raise UserError(
                f"timestep {outside[0]} is outside [0, {num_timesteps}): the base has {num_timesteps}"
            )

    def at(self, process: Process, latent_shape: Sequence[int]) -> TimestepSpec:
        """The same with the number that `sampler_shift` stands for with latents of `latent_shape`."""
        if not self.sampler_shift:
            return self
        return replace(self, sampler_shift=False, shift=_shift_of_sampler(process).at(latent_shape))

    def draw(self, u_B: Tensor, num_timesteps: int) -> Tensor:
        """Timesteps `[B]` int64 for uniforms `u_B` (float64 in [0, 1)), for a process of `num_timesteps`.

        Raises:
            ValueError: `sampler_shift` is no number yet: draw from `at(...)`.
        """
        import torch

        if self.sampler_shift:
            raise ValueError("sampler_shift depends on the size of the latents: draw from at(...)")
        self._check_range(num_timesteps)
        high = num_timesteps if self.high is None else self.high
        if self.kind == "grid":
            return torch.tensor(self.grid)[(u_B * len(self.grid)).long()]
        position = self._position(u_B)
        position = (self.shift * position / (1.0 + (self.shift - 1.0) * position)).clamp(0.0, 1.0 - 1e-12)
        return self.low + (position * (high - self.low)).long()

    def _position(self, u_B: Tensor) -> Tensor:
        import torch

        if self.kind == "logit_normal":
            return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u_B))
        if self.kind == "mode":
            return 1.0 - u_B - self.scale * (torch.cos(torch.pi / 2.0 * u_B) ** 2 - 1.0 + u_B)
        return u_B


def _shift_of_sampler(process: Process) -> SamplerShift:
    if process.sampler_shift is not None:
        return process.sampler_shift
    if process.prediction != "flow":
        raise UserError(
            "timesteps.sampler_shift is of rectified flows, and this base is none "
            f"(it predicts {process.prediction}): leave it out"
        )
    raise UserError(
        "timesteps.sampler_shift: this base's scheduler moves its levels by more than a shift: leave it out, "
        "or give a number as timesteps.shift"
    )
