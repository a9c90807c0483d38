"""RankDPO (Karthik et al. 2024, arXiv 2410.18013v2): ranked lists, each pair weighted by its discounted gain.

No code was published; what follows is Algorithm 2 and equation 6 of the paper. Its Figure 2 hints at weights
from the ranking that the model itself predicts; the algorithm uses the true ranking only, and so does this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.common.errors import UserError, unknown
from diffalign.data.batches import Batch
from diffalign.data.records import Record
from diffalign.data.select import OneScale, ScoreFacts
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.likelihood import Draws, denoising_terms
from diffalign.objectives._base import Objective, Output, require_error_space, require_positive
from diffalign.objectives._relevance import (
    BY_SCORERS,
    RELEVANCES,
    as_lists,
    batch_relevance,
    present,
    record_relevance,
)


def discounted_gain_weights(phi: Tensor, mask: Tensor | None = None) -> Tensor:
    """`[N, K, K]` weights `|G_i - G_j| |1/D_i - 1/D_j|`: symmetric, 0 for ties and on the diagonal.

    Gain `G = 2^phi - 1`, discount `D = ln(1 + rank)`, the largest phi having rank 1.

    Args:
        phi: `[N, K]` relevance in [0, 1], higher is better.
        mask: bool `[N, K]`, True where there is an image (None: everywhere). Ranks are counted among these;
            rows and columns of the others are 0, whatever their phi (NaN too).

    Convention: the natural logarithm (the paper writes "log"); base 2 would multiply all weights by ln 2.
    Departure: tied items share the mean of 1/D over the ranks that they occupy. The paper leaves the order of
    ties open, and by sort order the same list would get different weights.

    Raises:
        UserError: K is below 2: nothing can be compared.
    """
    if phi.shape[-1] < 2:
        raise UserError(
            f"RankDPO compares the images of a list: K is {phi.shape[-1]}, give lists of 2 or more"
        )
    there = torch.ones_like(phi, dtype=torch.bool) if mask is None else mask
    both = there[:, :, None] & there[:, None, :]
    above = ((phi[:, None, :] > phi[:, :, None]) & both).sum(dim=-1, keepdim=True)
    equal = ((phi[:, None, :] == phi[:, :, None]) & both).sum(dim=-1, keepdim=True)  # itself included
    rank = torch.arange(1, phi.shape[1] + 1, device=phi.device)
    occupied = (rank > above) & (rank <= above + equal)
    inverse = (occupied / torch.log1p(rank.to(phi))).sum(dim=-1) / equal.squeeze(-1).clamp(min=1)
    gain = torch.exp2(phi) - 1.0
    weights = _differences(gain).abs() * _differences(inverse).abs()
    return weights.where(both, torch.zeros_like(weights))


def rankdpo_loss(
    err: Tensor, ref_err: Tensor, phi: Tensor, *, beta: float, mask: Tensor | None = None
) -> Tensor:
    """`[N]` losses: over all pairs with phi_i > phi_j, the sum of weight times `-logsigmoid(logit)`.

    `logit = -beta/2 (s_i - s_j)`, `s = err - ref_err`. Where policy and reference agree, the sum of the
    weights times log 2; for K = 2 the one weight times the Diffusion-DPO loss.

    Args:
        err: `[N, K]` mean squared denoising errors of the policy, all of a list at one timestep.
        ref_err: `[N, K]` the same of the reference.
        phi: `[N, K]` relevance in [0, 1], higher is better.
        beta: strength of the pull towards the reference, > 0.
        mask: bool `[N, K]`, True where there is an image; the entries of others may be anything.

    Convention: beta multiplies half of a difference of *mean* errors, as in `diffusion_dpo_loss`; equation 6
    has no half, and whether its norms are sums or means the paper does not say.
    Convention: pairs are summed, as in equation 6, not averaged: four evenly spread images weigh 1.83.
    """
    weights = discounted_gain_weights(phi, mask)
    better = phi[:, :, None] > phi[:, None, :]
    pairs = -logsigmoid(_logits(err - ref_err, beta=beta, mask=mask))
    return (weights.where(better, torch.zeros_like(weights)) * pairs).sum(dim=(1, 2))


def _differences(values: Tensor) -> Tensor:
    """`[N, K, K]` of `values[n, i] - values[n, j]`."""
    return values[:, :, None] - values[:, None, :]


def _logits(shift: Tensor, *, beta: float, mask: Tensor | None) -> Tensor:
    """`[N, K, K]` implicit reward margins of image i over image j, from the shifts `s` `[N, K]`."""
    if mask is not None:
        shift = shift.where(mask, torch.zeros_like(shift))
    return -beta / 2.0 * _differences(shift)


@dataclass
class Plugin(Objective):
    """RankDPO on ranked lists of two or more images a prompt, of any number.

    Args:
        beta: the paper reports none; the default 5000 is Diffusion-DPO's, an assumption.
        phi: relevance of an image in its list. "wins", as published: of all comparisons with the other
            images by all scorers, the share that it wins (strictly). "mean": mean over the scorers of the
            score, scaled to [0, 1] by the smallest and largest of the list; 1/2 where a scorer finds all
            alike. "rank": human ranks, evenly spread from 1 (first) to 0 (last), ties in the middle of their
            places. "votes": divided by the most votes in the list. "label": as it is, in [0, 1].
        scorers: whose scores count in "wins" and "mean"; empty: all that a list has.
        noise: "shared" takes one noise for all images of a list, as this project does for pairs, so that
            K = 2 is weighted Diffusion-DPO; "independent" one for each image, as the paper writes it. It
            does not say which was run.
        passes: "one" holds the activations of a whole list; "two" those of one image, for one more forward
            pass of the policy an image: the first pass tells each image's pull on the loss, the second runs
            it again with gradient.
        error_space: space of the errors: "native" to the network, "epsilon" (the only one in the paper; of a
            flow, as is its SD3, velocity errors times (1 - sigma)^2) or "x0".
    """

    beta: float = 5000.0
    phi: Literal["wins", "mean", "rank", "votes", "label"] = "wins"
    scorers: list[str] = field(default_factory=list)
    noise: Literal["shared", "independent"] = "shared"
    passes: Literal["one", "two"] = "one"
    error_space: Literal["native", "epsilon", "x0"] = "native"

    unit: ClassVar[Literal["pair", "list", "single"]] = "list"

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        require_error_space(self.error_space)
        for key, value, known in (
            ("phi", self.phi, RELEVANCES),
            ("noise", self.noise, ("shared", "independent")),
            ("passes", self.passes, ("one", "two")),
        ):
            if value not in known:
                raise unknown(f"objective.{key}", value, known)
        listed = ", ".join(self.scorers)
        if self.scorers and self.phi not in BY_SCORERS:
            raise UserError(
                f"objective.scorers is [{listed}], objective.phi={self.phi} reads no scores: leave scorers "
                "out, or use phi=wins or phi=mean"
            )
        if len(set(self.scorers)) < len(self.scorers):
            raise UserError(f"objective.scorers is [{listed}]: name each scorer once")
        self._alike = OneScale({})

    @property
    def uneven_passes(self) -> str | None:  # type: ignore[override]
        """One for each image, however many there are."""
        return "objective.passes=two" if self.passes == "two" else None

    def check_data(self, facts: Mapping[str, ScoreFacts]) -> None:
        """Refuses data that is known to lack one of `scorers`; data that says nothing is looked at later."""
        for name in self.scorers if facts else ():
            if name not in facts:
                raise unknown("scorer in objective.scorers", name, facts)
        self._alike = OneScale({name: (known.scale, known.version) for name, known in facts.items()})

    def reject(self, record: Record) -> str | None:
        """Why a list teaches nothing: "single_picture", "no_score", "bad_label" or "equal_scores".

        Raises:
            UserError: a score on another scale, or by another version, than the rest.
        """
        if len(record.candidates) < 2:
            return "single_picture"
        if self.phi in BY_SCORERS:
            self._alike.check(record, self.scorers or None)
        phi = record_relevance(record, self.phi, self.scorers)
        if phi is None:
            return "no_score"
        if not bool(((phi >= 0.0) & (phi <= 1.0)).all()):
            return "bad_label"
        return "equal_scores" if bool((phi == phi[0]).all()) else None

    def compute(self, denoiser: Denoiser, batch: Batch, draws: Draws, shared: Any = None) -> Output:
        """Losses `[N]` of `N` lists; with `passes: two` they have no graph and `backward` is the second."""
        phi = batch_relevance(batch, self.phi, self.scorers)
        if self.passes == "one":
            terms = denoising_terms(
                denoiser, batch.latents, batch.cond, draws, reference=True, error_space=self.error_space
            )
            assert terms.ref_err is not None
            loss, logs = self._losses(terms.err, terms.ref_err, phi, batch, draws)
            return Output(loss, logs)
        images = _ImageByImage(denoiser, batch, draws, self.error_space)
        err, ref_err = images.errors()
        with torch.enable_grad():
            loss, logs = self._losses(err.requires_grad_(), ref_err, phi, batch, draws)
            (pulls,) = torch.autograd.grad(loss.sum(), err)
        return FirstPass(loss.detach(), logs, pulls=pulls, error_again=images.error_again)

    def backward(self, output: Output, scale: float, backward: Callable[[Tensor], None]) -> None:
        """Adds the gradient of `scale * sum(loss)`; after a first pass image by image."""
        if not isinstance(output, FirstPass):
            super().backward(output, scale, backward)
            return
        for row, pull in enumerate(output.pulls):
            backward(output.error_again(row) * (pull * scale))

    def loss_at_reference(self, output: Output) -> float:
        """log 2 times the mean over lists of the sum of their weights."""
        return math.log(2.0) * float(output.logs["weight"].mean())

    def _losses(
        self, err: Tensor, ref_err: Tensor, phi: Tensor, batch: Batch, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses `[N]` and logs of errors `[M]`."""
        mask = present(batch.counts)
        fold = partial(as_lists, mask=mask)
        loss = rankdpo_loss(fold(err), fold(ref_err), phi, beta=self.beta, mask=mask)
        err, ref_err = fold(err.detach()), fold(ref_err)
        return loss, list_logs(fold(draws.t)[:, 0], err, ref_err, phi, beta=self.beta, mask=mask)


@dataclass(frozen=True, kw_only=True)
class FirstPass(Output):
    """Losses without a graph, and what the second pass needs.

    Args:
        pulls: `[M]` derivative of the losses by each image's error.
        error_again: the error of image number m, a 0-d tensor with gradient.
    """

    pulls: Tensor
    error_again: Callable[[int], Tensor]


class _ImageByImage:
    """The errors of a batch, one image at a time: first without gradient, then any of them again with it.

    The second time finds the random numbers (dropout) and the autocast that the first found: the gradient
    must be that of the errors that were compared. Policy and reference run at one batch shape, one image.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        batch: Batch,
        draws: Draws,
        error_space: Literal["native", "epsilon", "x0"],
    ) -> None:
        self._denoiser, self._batch, self._draws, self._error_space = denoiser, batch, draws, error_space
        self._device = batch.latents.device
        self._random_states: list[tuple[Tensor, ...]] = []
        self._autocast = partial(
            torch.autocast,
            self._device.type,
            dtype=torch.get_autocast_dtype(self._device.type),
            enabled=torch.is_autocast_enabled(self._device.type),
        )

    def errors(self) -> tuple[Tensor, Tensor]:
        """`(err, ref_err)`, each `[M]` float32 without gradient."""
        err, ref_err = [], []
        with torch.no_grad():
            for row in range(self._batch.num_images):
                with self._denoiser.policy("reference"):
                    ref_err.append(self._error(row))
                self._random_states.append(_random_state(self._device))
                err.append(self._error(row))
        return torch.stack(err), torch.stack(ref_err)

    def error_again(self, row: int) -> Tensor:
        """The policy's error of image `row`, a 0-d tensor with gradient; the random stream stays as it is."""
        now = _random_state(self._device)
        _set_random_state(self._device, self._random_states[row])
        try:
            with self._autocast():
                return self._error(row)
        finally:
            _set_random_state(self._device, now)

    def _error(self, row: int) -> Tensor:
        one = slice(row, row + 1)
        terms = denoising_terms(
            self._denoiser,
            self._batch.latents[one],
            self._batch.cond.rows(one),
            Draws(self._draws.t[one], self._draws.noise[one]),
            reference=False,
            error_space=self._error_space,
        )
        return terms.err.squeeze(0)


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    """The state of the global random stream, of the CPU and of the current device of `device`'s kind."""
    host = torch.get_rng_state()
    return (host,) if device.type == "cpu" else (host, torch.get_device_module(device).get_rng_state())


def _set_random_state(device: torch.device, state: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(state[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[1])


def list_logs(
    t: Tensor, err: Tensor, ref_err: Tensor, phi: Tensor, *, beta: float, mask: Tensor
) -> dict[str, Tensor]:
    """Detached `[N]` entries of the health report; `w` is the best image of a list, `l` the worst.

    `margin` is theirs, `target` 1 (1/2 where all are equal). `weight` is the sum of the list's weights: where
    policy and reference agree, the loss is log 2 times that. `ordered` is the share of this weight on pairs
    that the model orders as phi does, equal ones half.
    """
    best = phi.where(mask, torch.full_like(phi, -torch.inf)).argmax(dim=1, keepdim=True)
    worst = phi.where(mask, torch.full_like(phi, torch.inf)).argmin(dim=1, keepdim=True)
    logits = _logits(err - ref_err, beta=beta, mask=mask)
    weights = discounted_gain_weights(phi, mask)
    weights = weights.where(_differences(phi) > 0, torch.zeros_like(weights))
    right = (logits > 0).to(weights) + 0.5 * (logits == 0).to(weights)
    weight = weights.sum(dim=(1, 2))
    ordered = (weights * right).sum(dim=(1, 2)) / weight.clamp(min=torch.finfo(weight.dtype).tiny)

    def of(values: Tensor, place: Tensor) -> Tensor:
        return values.gather(1, place).squeeze(1)

    return {
        "t": t,
        "err_w": of(err, best),
        "err_l": of(err, worst),
        "ref_err_w": of(ref_err, best),
        "ref_err_l": of(ref_err, worst),
        "margin": -beta / 2.0 * (of(err - ref_err, best) - of(err - ref_err, worst)),
        "target": 0.5 + 0.5 * (of(phi, best) > of(phi, worst)).to(phi),
        "weight": weight,
        "ordered": ordered.where(weight > 0, torch.full_like(ordered, 0.5)),
    }
