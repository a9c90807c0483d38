"""Supervised fine-tuning on the preferred images: the denoising loss and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from diffalign.data.batches import Batch
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.likelihood import Draws, denoising_terms
from diffalign.objectives._base import Objective, Output, require_error_space


@dataclass
class Plugin(Objective):
    """The mean squared denoising error of each image; from pair data, of the preferred image.

    Args:
        error_space: space of the error: "native" to the network, "epsilon" or "x0".
    """

    error_space: Literal["native", "epsilon", "x0"] = "native"

    unit: ClassVar[Literal["pair", "list", "single"]] = "single"
    uses_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_error_space(self.error_space)

    def compute(self, denoiser: Denoiser, batch: Batch, draws: Draws, shared: Any = None) -> Output:
        """Losses `[N]` of `N` images."""
        terms = denoising_terms(
            denoiser, batch.latents, batch.cond, draws, reference=False, error_space=self.error_space
        )
        return Output(terms.err, {"t": terms.t, "err_w": terms.err.detach()})
