"""What is checked of a loss before its gradient is used."""

from __future__ import annotations

import math

import torch

from diffalign.common.errors import UserError
from diffalign.common.progress import say
from diffalign.data.batches import Batch
from diffalign.diffusion.likelihood import Draws
from diffalign.objectives._base import Objective, Output
from diffalign.training.specs import Settings

MAX_LOGIT = 0.05
"""Compiled policy and reference, or errors that another machine has stored, may round differently, so that
the logit at step 0 is not exactly 0.
"""


class NonFiniteLoss(UserError):
    """A loss that is NaN or infinite; raised before the weights are touched."""


def step_zero(objective: Objective, output: Output, settings: Settings) -> dict[str, float] | None:
    """Says how far policy and reference are apart before the first step, and gives it for the record.

    None where the objective has no reference.

    Raises:
        UserError: compiled or stored, they are further apart than rounding explains.
    """
    expected = objective.loss_at_reference(output)
    if expected is None:
        return None
    largest = float(output.logs["margin"].abs().max())
    loss = float(output.loss.detach().mean())
    say(f"step 0: loss {loss:.6f} ({expected:.6f} expected), largest |logit| {largest:.3g} (0 expected)")
    adapter = settings.adapter
    may_differ = adapter.init is not None and adapter.dropout > 0.0
    causes = [("compile=true", "compile=false")] if settings.compile else []
    if settings.reference.store is not None:
        causes.append((f"reference.store={settings.reference.store}", "another reference.store"))
    if causes and largest > MAX_LOGIT and not may_differ:
        what, instead = " and ".join(cause for cause, _ in causes), " or ".join(other for _, other in causes)
        raise UserError(
            f"{what}: policy and reference differ before the first step, by a |logit| of {largest:.3g} "
            f"(above {MAX_LOGIT}): use {instead}, or precision=fp32"
        )
    return {"loss": loss, "expected": expected, "margin_abs_max": largest}


def finite_sum(loss: torch.Tensor, batch: Batch, draws: Draws, step: int) -> float:
    """The sum of the losses `[N]` of a micro-batch.

    Raises:
        NonFiniteLoss: naming the rows of `batch` at fault, each with its timestep.
    """
    loss = loss.detach()
    total = float(loss.sum())
    if math.isfinite(total):
        return total
    t = draws.t[torch.cumsum(batch.counts, 0) - 1].tolist()
    bad = [
        f"{name} (t={t[row]})" for row, name in enumerate(batch.ids) if not math.isfinite(float(loss[row]))
    ]
    raise NonFiniteLoss(
        f"the loss at step {step} is not finite for {', '.join(bad)}: look at these rows, lower "
        "optimizer.lr, or use precision=bf16 or fp32; the weights were not touched"
    )
