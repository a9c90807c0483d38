"""The contract between an objective and the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Generator, Tensor

from diffalign.common.errors import UserError, unknown
from diffalign.data.batches import Batch
from diffalign.data.records import Record
from diffalign.data.select import ScoreFacts
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.likelihood import Draws
from diffalign.diffusion.process import ErrorSpace, Process


@dataclass(frozen=True)
class Output:
    """What an objective says about a micro-batch.

    Args:
        loss: `[N]` float32, one number a group, not reduced.
        logs: detached `[N]` tensors for the health report, by name. Pairwise objectives give `t`, `err_w`,
            `err_l`, `ref_err_w`, `ref_err_l`, `margin` (the logit) and `target` (the probability, 1/2 or
            more, that w is preferred). Of other names the mean is reported, overall and by timestep.
    """

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


Unit = Literal["pair", "list", "single"]
ERROR_SPACES = ("native", "epsilon", "x0")
Gather = Callable[[Tensor], Tensor]
"""Concatenates the `[n, ...]` tensors of all processes, the same on each of them."""


class Objective:
    """Base of every objective's `Plugin`; training asks it these questions and no other.

    Attributes (of the class, or properties where a field decides):
        unit: what a group is: "pair" (two images, one preferred), "list" (k rated images) or "single".
        uses_reference: whether the reference policy is asked.
        noise: "shared": one noise for all images of a group; "independent": one for each.
        undesirable: whether single images that are not preferred are examples too.
        uneven_passes: the setting, if any, by which micro-batches may take different numbers of passes of the
            network.
        needs_labels: whether a pair without a label is of no use.
        error_space: space of the errors.
        flow_beta: the beta of public recipes for a flow's velocity errors, where there are some.
    """

    unit: ClassVar[Unit]
    uses_reference: ClassVar[bool] = True
    noise: Literal["shared", "independent"] = "shared"
    undesirable: ClassVar[bool] = False
    uneven_passes: str | None = None
    needs_labels: bool = True
    error_space: ErrorSpace = "native"
    flow_beta: ClassVar[float | None] = None

    def of_velocity(self, process: Process) -> bool:
        """Whether the errors are those of a flow's velocity."""
        return process.prediction == "flow" and self.error_space == "native"

    def doubtful_default(self, process: Process) -> str | None:
        """What to say of a `beta` that is the default and not for such errors; None: nothing.

        The defaults are published for errors of noise. Over equally likely levels, velocity errors that are
        the same at each are three times as large in the mean (`mapo.Plugin`).
        """
        beta = getattr(type(self), "beta", None)  # a default of a dataclass is one of its class too
        if beta is None or getattr(self, "beta", None) != beta or not self.of_velocity(process):
            return None
        instead = "give one for these"
        if self.flow_beta is not None:
            instead = f"public recipes of flows use objective.beta={self.flow_beta:g}"
        return (
            f"objective.beta={beta:g}, the default, is for errors of noise, and this base's are of velocity, "
            f"about three times as large: {instead}, or take objective.error_space=epsilon"
        )

    def check_data(self, facts: Mapping[str, ScoreFacts]) -> None:
        """Refuses data whose scores (by scorer's name) this objective cannot use; before anything is read."""

    def reject(self, record: Record) -> str | None:
        """Why `record` would teach nothing ("equal_scores"), for the tally; None when it is welcome."""
        return None

    def compute(self, denoiser: Denoiser, batch: Batch, draws: Draws, shared: Any = None) -> Output:
        """The loss of each group of `batch` under `draws`."""
        raise NotImplementedError

    def prepare(
        self, denoiser: Denoiser, micro_batches: Sequence[tuple[Batch, Draws]], gather: Gather
    ) -> Any:
        """Numbers that need the whole optimizer step, computed without gradient; handed to each `compute`.

        The micro-batches are those of this process; `gather` brings in what the others know.
        """
        return None

    def backward(self, output: Output, scale: float, backward: Callable[[Tensor], None]) -> None:
        """Adds the gradient of `scale * sum(loss)` to the parameters' by calling `backward` on scalars."""
        backward(output.loss.sum() * scale)

    def observe(self, logs: Sequence[dict[str, Tensor]], gather: Gather) -> None:
        """Learns, once per optimizer step and on every process, what the step's losses have shown.

        The logs are those of this process's micro-batches; `gather` brings in what the others know.
        """

    def loss_at_reference(self, output: Output) -> float | None:
        """The mean loss of `output`'s groups where policy and reference agree; None: it says nothing."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What outlives a step, for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""


class OnPolicyObjective(Objective):
    """Base of an objective whose policy draws its own images, two a prompt, and whose reward splits them.

    Attributes (fields or properties of the plug-in):
        reward: what it is of: "instance", an image (a scorer's value); "exemplar", an image against
            exemplars; "set", all images together.
        measure: the scorers' measure of that name, for exemplar and set.
        views: whether an image is looked at in several pieces, for exemplar.
        exemplars: folder of pictures, or a text file; None: the reward has no use for them.
        min_exemplars: so many it needs at least.
        min_pairs: so many pairs a rollout must have at least.
    """

    reward: Literal["instance", "exemplar", "set"] = "instance"
    measure: str | None = None
    views: bool = False
    exemplars: str | None = None
    min_exemplars: int = 2
    min_pairs: int = 1

    def choose(self, rewards_a: Any, rewards_b: Any) -> Tensor:
        """`[n]` probability that the images a are preferred to b, from `[n]` rewards of each."""
        raise NotImplementedError

    def choose_sets(
        self, features_a: Any, features_b: Any, set_reward: Any, generator: Generator | None = None
    ) -> Tensor:
        """The same from features `[n, d]` of each and a reward of whole sets."""
        raise NotImplementedError


def require_positive(name: str, value: float) -> None:
    """Refuses a hyper-parameter that is zero, negative, infinite or NaN."""
    if not 0 < value < math.inf:
        raise UserError(f"objective.{name} is {value}: use a value above 0")


def require_error_space(space: str) -> None:
    """Refuses a space of errors that there is none of."""
    if space not in ERROR_SPACES:
        raise unknown("objective.error_space", space, ERROR_SPACES)
