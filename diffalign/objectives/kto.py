"""Diffusion-KTO (Li et al. 2024, arXiv 2404.04465): single images that are good or bad, without partners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.common.errors import UserError, unknown
from diffalign.data.batches import Batch
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.likelihood import Draws, Terms, denoising_terms
from diffalign.diffusion.process import exact_dtype
from diffalign.objectives._base import Gather, Objective, Output, Unit, require_error_space, require_positive

BASELINES = ("batch", "ema")


def kto_logit(
    err: Tensor, ref_err: Tensor, desirable: Tensor, *, beta: float, baseline: float | Tensor | None = None
) -> Tensor:
    """`y beta/2 (g - z)`, `[B]`, above 0 where an image is on its own side of the baseline.

    Args: those of `kto_loss`.
    """
    gain = ref_err - err
    if baseline is None:
        baseline = gain.mean().clamp_min(0.0)
    if isinstance(baseline, Tensor):
        baseline = baseline.detach()
    sign = torch.where(desirable, 1.0, -1.0).to(gain.dtype)
    return sign * (beta / 2.0) * (gain - baseline)


def kto_loss(
    err: Tensor,
    ref_err: Tensor,
    desirable: Tensor,
    *,
    beta: float,
    baseline: float | Tensor | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """`[B]` losses `lambda_y (1 - sigmoid(y beta/2 (g - z)))`, `g = ref_err - err`, y = 1 or -1.

    lambda_y / 2 where policy and reference agree and z is 0. Source: jacklishufan/diffusion-kto@226bbd0
    train_kto_sd_v1.5.py:1451-1492 (halo "sigmoid").

    Args:
        err: `[B]` mean squared denoising error of the policy.
        ref_err: `[B]` the same of the reference.
        desirable: `[B]` bool: y = 1 where True, -1 where not.
        beta: strength of the pull towards the reference, > 0. Convention: multiplies half of a difference of
            *mean* errors, as everywhere here; Diffusion-KTO's code has no half, so its beta 1000 is 2000.
        baseline: z, a constant: a number or a 0-d tensor. None: `max(0, mean g)` of this batch.
        desirable_weight: lambda of the desirable images.
        undesirable_weight: lambda of the others.
    """
    logit = kto_logit(err, ref_err, desirable, beta=beta, baseline=baseline)
    weight = logit.new_full((), undesirable_weight).where(~desirable, desirable_weight)
    return weight * torch.sigmoid(-logit)


@dataclass(frozen=True)
class Step:
    """What `prepare` finds out for one optimizer step.

    Args:
        baseline: z, a 0-d tensor.
        ref_errs: (batch, draws, `[n]` reference errors) of each micro-batch by the identity of its draws.
    """

    baseline: Tensor
    ref_errs: dict[int, tuple[Batch, Draws, Tensor]] = field(repr=False)

    def ref_err(self, batch: Batch, draws: Draws) -> Tensor | None:
        """The reference errors of this very micro-batch, or None if it was not prepared."""
        known = self.ref_errs.get(id(draws))
        return known[2] if known is not None and known[0] is batch else None


@dataclass
class Plugin(Objective):
    """KTO on single images that are labelled desirable or not; a pair gives one of each.

    The baseline is that of the whole optimizer step: with that of a micro-batch of one image, `g - z` would
    be 0 for every g above 0. `prepare` therefore runs policy and reference over the step without gradient
    first; the reference's errors are kept for `compute`, so that KTO costs one more forward pass of the
    policy than Diffusion-DPO does for as many images.

    Departure: Diffusion-KTO's code takes the baseline over the processes, but of one micro-batch only when
    gradients are accumulated.

    Args:
        beta: default 2000, the 1000 of the authors' code in our convention.
        desirable_weight: lambda of the desirable images.
        undesirable_weight: lambda of the others; raise the one of the rarer class where the data is lopsided.
        baseline: "batch": max(0, mean g) over the whole optimizer step, all processes; "ema": of the mean's
            exponential moving average over the steps, this one included, for effective batches of a few
            images.
        ema_decay: of that average, in [0, 1); it starts at 0, as every g does.
        error_space: space of the errors: "native" to the network, "epsilon" or "x0".
    """

    beta: float = 2000.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    baseline: Literal["batch", "ema"] = "batch"
    ema_decay: float = 0.99
    error_space: Literal["native", "epsilon", "x0"] = "native"

    unit: ClassVar[Unit] = "single"
    undesirable: ClassVar[bool] = True

    _mean_gain: float = field(default=0.0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            require_positive(name, value)
        if self.baseline not in BASELINES:
            raise unknown("objective.baseline", self.baseline, BASELINES)
        if not 0.0 <= self.ema_decay < 1.0:
            raise UserError(f"objective.ema_decay is {self.ema_decay}: use a value in [0, 1)")
        require_error_space(self.error_space)

    def compute(self, denoiser: Denoiser, batch: Batch, draws: Draws, shared: Any = None) -> Output:
        """Losses `[N]` of `N` images.

        Args:
            denoiser: policy and reference.
            batch: single images whose `target` is 1 (desirable) or 0.
            draws: of these images.
            shared: the `Step` that `prepare` returned; without it the baseline is that of this batch alone.

        Logs: `margin` (the logit) with `target` 1, so that accuracy is the share of images on their own side
        of the baseline; `gain` (g; where its mean falls, the policy denoises everything worse than the
        reference), `signed_gain` (y g; its mean is half the distance of two equally large classes),
        `desirable` (1 or 0) and `baseline` (z).

        Raises:
            UserError: images without labels.
        """
        if batch.target is None:
            raise UserError(
                "KTO needs images that are labelled desirable or not: give candidates a label of 1 or 0, or "
                "use objective=sft"
            )
        desirable = batch.target > 0.5
        kept = None if shared is None else shared.ref_err(batch, draws)
        terms = self._terms(denoiser, batch, draws, reference=kept is None)
        ref_err = terms.ref_err if kept is None else kept
        assert ref_err is not None
        gain = (ref_err - terms.err).detach()
        baseline = gain.mean().clamp_min(0.0) if shared is None else shared.baseline
        loss = kto_loss(
            terms.err,
            ref_err,
            desirable,
            beta=self.beta,
            baseline=baseline,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        margin = kto_logit(terms.err, ref_err, desirable, beta=self.beta, baseline=baseline)
        logs = {
            "t": terms.t,
            "margin": margin.detach(),
            "target": torch.ones_like(gain),
            "gain": gain,
            "signed_gain": gain.where(desirable, -gain),
            "desirable": desirable.to(gain.dtype),
            "baseline": torch.zeros_like(gain) + baseline,
        }
        return Output(loss, logs)

    @torch.no_grad()
    def prepare(
        self, denoiser: Denoiser, micro_batches: Sequence[tuple[Batch, Draws]], gather: Gather
    ) -> Step:
        """The baseline of the optimizer step over all its micro-batches on all processes.

        Micro-batches keep their shapes, so that each g is, bit for bit, the one that `compute` will see. Only
        an adapter with dropout draws other masks here than in the training pass: z is then the mean g under
        these, and no less the mean of the step.
        """
        gains: list[Tensor] = []
        ref_errs: dict[int, tuple[Batch, Draws, Tensor]] = {}
        for batch, draws in micro_batches:
            terms = self._terms(denoiser, batch, draws, reference=True)
            assert terms.ref_err is not None
            ref_errs[id(draws)] = (batch, draws, terms.ref_err)
            gains.append(terms.ref_err - terms.err)
        gain = gather(torch.cat(gains) if gains else torch.zeros(0))
        # A NaN stays with its image, whose own loss names it to the loop, and does not reach the others.
        finite = gain[gain.isfinite()].to(exact_dtype(gain.device))
        mean_gain = finite.mean() if len(finite) else finite.new_zeros(())
        if self.baseline == "ema":
            self._mean_gain += (1.0 - self.ema_decay) * (float(mean_gain) - self._mean_gain)
            mean_gain = torch.full_like(mean_gain, self._mean_gain)
        return Step(mean_gain.clamp_min(0.0), ref_errs)

    def loss_at_reference(self, output: Output) -> float:
        """Half of the mean weight of the images."""
        desirable = output.logs["desirable"] > 0.5
        weight = torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        return float(weight.mean()) / 2.0

    def state_dict(self) -> dict[str, Any]:
        """The moving average, the same on every process."""
        return {"mean_gain": self._mean_gain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self._mean_gain = float(state["mean_gain"])

    def _terms(self, denoiser: Denoiser, batch: Batch, draws: Draws, *, reference: bool) -> Terms:
        return denoising_terms(
            denoiser, batch.latents, batch.cond, draws, reference=reference, error_space=self.error_space
        )
