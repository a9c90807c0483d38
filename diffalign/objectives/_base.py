"""The contract between an objective and the training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from diffalign.common.errors import UserError
from diffalign.data.batches import Batch
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.likelihood import Draws


@dataclass(frozen=True)
class Output:
    """What an objective says about a micro-batch.

    Args:
        loss: `[N]` float32, one number a group, not reduced.
        logs: detached `[N]` tensors for the health report, by name. Pairwise objectives give `t`, `err_w`,
            `err_l`, `ref_err_w`, `ref_err_l`, `margin` (the logit) and `target` (the probability, 1/2 or
            more, that w is preferred).
    """

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Objective:
    """Base of every objective's `Plugin`; the loop asks it these questions and no other.

    `unit` says what a group is: "pair" (two images, one preferred), "list" (k ranked images) or "single".
    """

    unit: ClassVar[Literal["pair", "list", "single"]]
    uses_reference: ClassVar[bool] = True

    def compute(self, denoiser: Denoiser, batch: Batch, draws: Draws, shared: Any = None) -> Output:
        """The loss of each group of `batch` under `draws`."""
        raise NotImplementedError

    def prepare(self, denoiser: Denoiser, micro_batches: Sequence[tuple[Batch, Draws]]) -> Any:
        """Numbers that need the whole optimizer step, computed without gradient; handed to each `compute`."""
        return None

    def backward(self, output: Output, scale: float, backward: Callable[[Tensor], None]) -> None:
        """Adds the gradient of `scale * sum(loss)` to the parameters' by calling `backward` on a scalar."""
        backward(output.loss.sum() * scale)

    def state_dict(self) -> dict[str, Any]:
        """What outlives a step, for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""


def require_positive(name: str, value: float) -> None:
    """Refuses a hyper-parameter that is zero, negative or NaN."""
    if not value > 0:
        raise UserError(f"objective.{name} is {value}: use a value above 0")
