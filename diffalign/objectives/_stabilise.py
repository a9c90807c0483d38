"""Stabilisers of objectives on pairs: a safeguard of the winner's error, and a beta that follows the margin.

Both are for losses of a logit that is beta/2 times a difference of reference-relative mean errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.common.errors import UserError
from diffalign.common.progress import say
from diffalign.data.batches import first_and_second
from diffalign.diffusion.likelihood import Terms
from diffalign.diffusion.process import expand
from diffalign.objectives._base import Gather, Objective, require_positive


def safeguard_lambda(residual_w: Tensor, residual_l: Tensor, *, mu: float) -> Tensor:
    """`[N]` factors of the loser's gradient, in [0, 1], under which a step does not raise the winner's error.

    `clip((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1)` where the product is above 0, else 1, with g the residuals. A
    small step moves the outputs along `-(g_w - lambda g_l)` and so lowers the winner's error in proportion to
    `|g_w|^2 - lambda <g_w, g_l>`, which this keeps at `mu |g_w|^2` or more. That holds to first order, for
    the pair by itself, and as if both outputs moved alike: a network with weights between, or the other pairs
    of the step, may still raise the error. What lowers the winner's error may lower the loser's more: the
    loss is then paid with, and rises.

    Args:
        residual_w: `[N, ...]` prediction minus target of the image whose error the loss lowers.
        residual_l: `[N, ...]` the same of the other image, at the same timestep and noise.
        mu: share of the winner's own descent that is kept, in [0, 1].

    Convention: one lambda a pair, so that batching does not change it. AIDC-AI/Diffusion-SDPO@84fb241
    train.py:85-124 has one for all pairs of a micro-batch, and 1e-9 added to the product.
    """
    product = (residual_w * residual_l).flatten(1).sum(dim=1)
    square = residual_w.square().flatten(1).sum(dim=1)
    ratio = ((1.0 - mu) * square / product).clamp(0.0, 1.0)
    return ratio.where(product > 0, torch.ones_like(ratio))


def scale_gradient(values: Tensor, factor: Tensor) -> Tensor:
    """`values` to the last bit, with `factor` times their gradient."""
    constant = values.detach()
    return constant + factor * (values - constant)


@dataclass
class AutoBeta:
    """A beta at which the mean margin has a chosen gradient factor.

    `beta = -2 logit(target) / m` within `low` and `high`, m the moving average of |margin|: the difference of
    reference-relative mean errors, without beta, averaged over all pairs of an optimizer step. A pair with
    margin m then has the gradient factor `sigmoid(-beta/2 m) = target`.

    The beta of a step comes from the steps before it. The average starts at the margin that has the target at
    the objective's own beta, so that is the beta of step 0, where every margin is 0.

    Convention: mean errors. SimpleTuner's bounds of 1e-3 and 1 are for sums over D elements; times D = 65536
    they are the defaults here.

    Args:
        drift_limit: above this drift beta is not lowered any more, since a lower beta lets the policy drift
            further, which lowers beta again. Drift: mean |error - reference's error| over the mean error of
            the reference, of both images, as a moving average like the margin's; 0.1 is a tenth. Of a moving
            reference it is the drift from where that is. Needed with auto_beta.
        target: gradient factor of a pair with the average margin, in (0, 1/2); 1/2 is that of step 0.
        decay: of the moving averages, in [0, 1).
        low: smallest beta.
        high: largest beta; equal to the objective's own, beta only falls.
    """

    drift_limit: float
    target: float = 0.2
    decay: float = 0.99
    low: float = 65.0
    high: float = 65536.0

    def __post_init__(self) -> None:
        for key in ("drift_limit", "low", "high"):
            require_positive(f"auto_beta.{key}", getattr(self, key))
        if not 0.0 < self.target < 0.5:
            raise UserError(f"objective.auto_beta.target is {self.target}: use a value in (0, 0.5)")
        if not 0.0 <= self.decay < 1.0:
            raise UserError(f"objective.auto_beta.decay is {self.decay}: use a value in [0, 1)")
        if self.low > self.high:
            raise UserError(f"objective.auto_beta.low is {self.low}, above high={self.high}: exchange them")

    def beta_of(self, margin: float) -> float:
        """The beta for an average margin of `margin` >= 0."""
        if margin == 0.0:
            return self.high
        return min(max(-2.0 * _logit(self.target) / margin, self.low), self.high)


class MovingBeta:
    """The beta of the next step.

    Args:
        spec: how it moves.
        beta: of the first step.

    Raises:
        UserError: it does not lie between the bounds.
    """

    def __init__(self, spec: AutoBeta, beta: float) -> None:
        if not spec.low <= beta <= spec.high:
            raise UserError(
                f"objective.beta is {beta}: with auto_beta it is the first one, use a value from "
                f"auto_beta.low={spec.low:g} to high={spec.high:g}"
            )
        self.spec = spec
        self.beta = beta
        self.margin = -2.0 * _logit(spec.target) / beta
        self.drift = 0.0

    @property
    def held(self) -> bool:
        """Whether the policy is so far from the reference that beta must not fall."""
        return self.drift > self.spec.drift_limit

    def update(self, margin: float, drift: float) -> None:
        """Takes the mean |margin| and the drift of a step's pairs."""
        was_held = self.held
        self.margin += (1.0 - self.spec.decay) * (margin - self.margin)
        self.drift += (1.0 - self.spec.decay) * (drift - self.drift)
        wanted = self.spec.beta_of(self.margin)
        self.beta = max(wanted, self.beta) if self.held else wanted
        if self.held and not was_held:
            say(
                f"auto_beta: the errors are {self.drift:.1%} off those of the reference, above "
                f"drift_limit={self.spec.drift_limit:g}: beta is not lowered below {self.beta:.5g}"
            )


class StabilisedPairs(Objective):
    """Base of the plug-ins on pairs that have the stabilisers.

    Attributes (fields of the plug-in, which calls `start_stabilisers` when it is made):
        beta: of the first step, and of all without `auto_beta`.
        safeguard: mu of `safeguard_lambda`; None: off.
        auto_beta: how beta moves; None: it does not.
    """

    beta: float
    safeguard: float | None
    auto_beta: AutoBeta | None

    def start_stabilisers(self) -> None:
        """Refuses settings that cannot be meant; beta is as at step 0."""
        require_positive("beta", self.beta)
        if self.safeguard is not None and not 0.0 <= self.safeguard <= 1.0:
            raise UserError(f"objective.safeguard is {self.safeguard}: use a value in [0, 1], or null")
        self._moving = None if self.auto_beta is None else MovingBeta(self.auto_beta, self.beta)

    @property
    def beta_now(self) -> float:
        """beta of the step that is computed now."""
        return self.beta if self._moving is None else self._moving.beta

    def stabilised(self, terms: Terms, pull: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The errors `[N]` of first and second images to make the loss of, and what there is to log.

        The errors are those of `terms`; with the safeguard the loser's has a scaled gradient. Logs: of the
        safeguard `safeguard_lambda`, `safeguarded` (1 where it is below 1), `winner_rise` (the winner's error
        above the reference's) and `winner_rises` (1 where it is above 0); of auto_beta `beta`, `error_drift`
        and `beta_held` (1 while it must not fall).

        Args:
            terms: with reference, and with residuals where there is a safeguard.
            pull: `[N]`, above 0 where the loss lowers the first image's error, which makes that the winner;
                below 0: the second's. Where it is 0 there is no gradient, lambda is 1 and the first image
                stands for the winner in the logs.
        """
        first, second = first_and_second(terms.err)
        logs = {}
        if self._moving is not None:
            now = self._moving
            values = {"beta": now.beta, "error_drift": now.drift, "beta_held": now.held}
            logs = {name: torch.full_like(first, float(value)) for name, value in values.items()}
        if self.safeguard is None:
            return first, second, logs
        assert terms.residual is not None and terms.ref_err is not None
        residuals = first_and_second(terms.residual)
        second_wins = pull < 0
        swap = expand(second_wins, residuals[0])
        factor = safeguard_lambda(
            residuals[1].where(swap, residuals[0]), residuals[0].where(swap, residuals[1]), mu=self.safeguard
        ).to(first.dtype)
        one = torch.ones_like(factor)
        factor = factor.where(pull != 0, one)
        rise_first, rise_second = first_and_second(terms.err.detach() - terms.ref_err)
        rise = rise_second.where(second_wins, rise_first)
        logs |= {
            "safeguard_lambda": factor,
            "safeguarded": (factor < 1).to(factor.dtype),
            "winner_rise": rise,
            "winner_rises": (rise > 0).to(rise.dtype),
        }
        first = scale_gradient(first, factor.where(second_wins, one))
        second = scale_gradient(second, one.where(second_wins, factor))
        return first, second, logs

    def observe(self, logs: Sequence[dict[str, Tensor]], gather: Gather) -> None:
        """Moves beta by what all pairs of the step have shown, on every process alike."""
        if self._moving is None:
            return
        rows = [
            torch.stack(
                [
                    entry["margin"].abs() * (2.0 / self._moving.beta),
                    (entry["err_w"] - entry["ref_err_w"]).abs() + (entry["err_l"] - entry["ref_err_l"]).abs(),
                    entry["ref_err_w"] + entry["ref_err_l"],
                ],
                dim=1,
            )
            for entry in logs
        ]
        gathered = gather(torch.cat(rows) if rows else torch.zeros(0, 3)).tolist()
        # An error may overflow while its loss stays finite; it would stay in the averages for good.
        seen = [row for row in gathered if all(map(math.isfinite, row))]
        if seen:
            # fsum: the same to the last bit in whatever order the processes hold the pairs.
            margin, moved, reference = map(math.fsum, zip(*seen, strict=True))
            self._moving.update(margin / len(seen), moved / reference if reference else 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Of auto_beta: its beta and its averages, the same on every process."""
        moving = self._moving
        if moving is None:
            return {}
        return {"beta": moving.beta, "margin": moving.margin, "drift": moving.drift}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        if self._moving is not None:
            for name in ("beta", "margin", "drift"):
                setattr(self._moving, name, float(state[name]))


def _logit(probability: float) -> float:
    return math.log(probability) - math.log1p(-probability)
