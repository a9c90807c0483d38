"""SmPO-Diffusion (Lu et al., ICML 2025, arXiv 2506.02698): smoothed preferences on inverted latents.

Two changes to Diffusion-DPO. How strongly a pair is trained follows from the scores of its images, and the
images are compared under the noises that the network itself implies for them, not under random ones. In the
authors' ablation most of the gain comes from the second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.common.errors import UserError, unknown
from diffalign.data.batches import Batch, first_and_second
from diffalign.data.records import Record
from diffalign.data.select import OneScale, ScoreFacts
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.inversion import GRIDS, implied_noise
from diffalign.diffusion.likelihood import Draws, denoising_terms
from diffalign.objectives._base import Output, require_error_space, require_positive
from diffalign.objectives._stabilise import AutoBeta, StabilisedPairs
from diffalign.objectives.diffusion_dpo import diffusion_dpo_logit, pair_logs

CORRECTIONS = {"ddim": 0, "renoise": 1}


def smoothed_preference(
    reward_w: Tensor, reward_l: Tensor, *, reward_min: float, reward_max: float
) -> Tensor:
    """`[B]` P that the first image is preferred: the softmax of the two rewards, min-max scaled.

    `P = exp(r'_w) / (exp(r'_w) + exp(r'_l))`, `r' = (r - min) / (max - min)`. Within the range it is between
    0.269 and 0.731; rewards outside are not clipped, as in JaydenLyh/SmPO@8922d54 train.py:739-747.

    Args:
        reward_w: `[B]` reward of the first image, higher is better.
        reward_l: `[B]` reward of the second image.
        reward_min: smallest reward of the data set, on the same scale.
        reward_max: largest reward of the data set.

    Raises:
        UserError: min and max are no range.
    """
    if not (math.isfinite(reward_max - reward_min) and reward_min < reward_max):
        raise UserError(
            f"rewards from {reward_min} to {reward_max} are no range: reward_min must be below reward_max"
        )
    return torch.sigmoid((reward_w - reward_l) / (reward_max - reward_min))


def smpo_loss(
    err_w: Tensor,
    err_l: Tensor,
    ref_err_w: Tensor,
    ref_err_l: Tensor,
    preference: Tensor,
    *,
    beta: float,
    gamma: float = 10.0,
) -> Tensor:
    """`[B]` losses `-logsigmoid(gamma (2P - 1) m)`, m the Diffusion-DPO logit; log 2 where m is 0.

    Swapping the images together with P changes nothing: below 1/2 the multiplier is negative, so that the
    image with the higher reward wins wherever it stands. At P = 1/2 there is no gradient.

    Args:
        err_w: `[B]` mean squared denoising error of the policy on the first image.
        err_l: `[B]` the same on the second image, at the same timestep, each under its own noise.
        ref_err_w: `[B]` error of the reference on the first image.
        ref_err_l: `[B]` error of the reference on the second image.
        preference: `[B]` P in [0, 1] that the first image is preferred, a constant.
        beta: strength of the pull towards the reference, > 0.
        gamma: what P = 1 multiplies beta by, > 0; with gamma 2 and P 3/4 this is Diffusion-DPO.

    Convention: as in JaydenLyh/SmPO@8922d54 train.py:1046-1064 beta multiplies half of a difference of *mean*
    errors and the multiplier is gamma (2P - 1); the paper writes 2 alpha - gamma, with P = alpha / gamma, and
    sums without the half.
    """
    multiplier = _multiplier(preference, gamma).to(err_w.dtype)
    return -logsigmoid(multiplier * diffusion_dpo_logit(err_w, err_l, ref_err_w, ref_err_l, beta=beta))


def _multiplier(preference: Tensor, gamma: float) -> Tensor:
    return gamma * (2.0 * preference - 1.0)


@dataclass
class Plugin(StabilisedPairs):
    """SmPO on pairs whose images carry scores.

    Args:
        beta: default 5000 as in the authors' SDXL launcher; SD 1.5: 2000. A pair one PickScore point apart is
            trained at 0.3 beta (gamma 10 and the published range).
        gamma: multiplies beta at P = 1.
        scorer: whose score decides; the name it has in the data.
        scale: name of the scale that the scores must be on; null: that of the data.
        reward_min: smallest score, higher being better (a distance d counts as -d); null: from the manifest
            of `diffalign pair`.
        reward_max: largest score; given or left out together with reward_min.
        order: "reward": the image with the higher score wins and the human label is ignored (as published);
            "label": the label says which image wins and the scores only how strongly, P = max(P, 1 - P).
        inversion: noises of the images: "renoise" and "ddim" (of a flow the Euler steps of its ODE) invert
            them, with and without a correction per step; "none": random noise, one a pair, as in
            Diffusion-DPO.
        inversion_steps: default 9 as in the paper; the authors' code has 5 (SD 1.5) and 10 (SDXL).
        inversion_grid: "common" cuts the process into that many steps, the last step of an image is cut short
            at its t; "own" cuts the way to t: more exact at small t, on average 1.8 times as much work.
        inverter: whose predictions invert: "train", the policy as it is now (as in the authors' code), or
            "reference". With "train" the targets move with the policy and no gradient knows of it: steps too
            long make the loss rise (on a tiny UNet at 1e-2 from the sixth on, where "reference" goes to 0).
        error_space: space of the errors: "native" to the network, "epsilon" or "x0".
        safeguard: mu of the safeguard, as of diffusion_dpo; it compares images under one noise, so it needs
            inversion=none. null: off.
        auto_beta: beta follows the margin, the multiplier being part of that; null: it stays.
    """

    beta: float = 5000.0
    gamma: float = 10.0
    scorer: str = "pickscore"
    scale: str | None = None
    reward_min: float | None = None
    reward_max: float | None = None
    order: Literal["reward", "label"] = "reward"
    inversion: Literal["none", "ddim", "renoise"] = "renoise"
    inversion_steps: int = 9
    inversion_grid: Literal["common", "own"] = "common"
    inverter: Literal["train", "reference"] = "train"
    error_space: Literal["native", "epsilon", "x0"] = "native"
    safeguard: float | None = None
    auto_beta: AutoBeta | None = None

    unit: ClassVar[Literal["pair", "list", "single"]] = "pair"

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Only where the label says which image wins."""
        return self.order == "label"

    def __post_init__(self) -> None:
        self.start_stabilisers()
        require_error_space(self.error_space)
        require_positive("gamma", self.gamma)
        for key, value, known in (
            ("order", self.order, ("reward", "label")),
            ("inversion", self.inversion, ("none", *CORRECTIONS)),
            ("inversion_grid", self.inversion_grid, GRIDS),
            ("inverter", self.inverter, ("train", "reference")),
        ):
            if value not in known:
                raise unknown(f"objective.{key}", value, known)
        if self.inversion_steps < 1:
            raise UserError(f"objective.inversion_steps is {self.inversion_steps}: use 1 or more")
        if self.safeguard is not None and self.inversion != "none":
            raise UserError(
                f"objective.safeguard is {self.safeguard}, but inversion={self.inversion} gives each image a "
                "noise of its own: leave safeguard out, or set objective.inversion=none"
            )
        if (self.reward_min is None) != (self.reward_max is None):
            raise UserError(
                f"objective.reward_min is {self.reward_min} and reward_max {self.reward_max}: give both or "
                "neither"
            )
        self._range: tuple[float, float] | None = None
        self._alike = OneScale({self.scorer: (self.scale, None)})
        if self.reward_min is not None and self.reward_max is not None:
            self._range = _checked_range(
                self.reward_min, self.reward_max, "objective.reward_min and reward_max"
            )

    @property
    def uneven_passes(self) -> str | None:  # type: ignore[override]
        """An inversion takes as many as the timesteps ask for."""
        return None if self.inversion == "none" else f"objective.inversion={self.inversion}"

    def check_data(self, facts: Mapping[str, ScoreFacts]) -> None:
        """Takes scale and range from the data, or holds those of the recipe against them.

        Raises:
            UserError: no such scorer, another scale, or no range of scores.
        """
        known = facts.get(self.scorer)
        if known is None:
            if facts:
                raise unknown("objective.scorer", self.scorer, facts)
            if self._range is None:
                raise UserError(
                    f"the data does not say the range of its '{self.scorer}' scores: make it with diffalign "
                    "pair, or give objective.reward_min and objective.reward_max"
                )
            return
        if self.scale is not None and self.scale != known.scale:
            raise UserError(
                f"objective.scale is {self.scale} and the data's '{self.scorer}' scores are on the scale "
                f"{known.scale or '(none)'}: score on {self.scale}, or change objective.scale and the range"
            )
        self._alike = OneScale({self.scorer: (known.scale, known.version)})
        if self._range is None:
            self._range = _checked_range(known.low, known.high, f"the data's '{self.scorer}' scores")
        elif known.high < self._range[0] or known.low > self._range[1]:
            raise UserError(
                f"objective.reward_min={self.reward_min:g} and reward_max={self.reward_max:g} lie beside all "
                f"'{self.scorer}' scores of the data ({known.low:g} to {known.high:g}): another scale?"
            )

    def reject(self, record: Record) -> str | None:
        """ "no_score", "equal_scores" (P = 1/2 has no gradient) or, ordered by labels, "tie".

        Raises:
            UserError: a score on another scale than the rest.
        """
        scores = [candidate.scores.get(self.scorer) for candidate in record.candidates]
        present = [score for score in scores if score is not None and math.isfinite(score.value)]
        if len(present) < len(scores):
            return "no_score"
        self._alike.check(record, (self.scorer,))
        first, second = (torch.tensor(score.value, dtype=torch.float32) for score in present)
        if self._smoothed(first, second).item() == 0.5:
            return "equal_scores"
        return "tie" if self.order == "label" and record.pair_target() == 0.5 else None

    def compute(self, denoiser: Denoiser, batch: Batch, draws: Draws, shared: Any = None) -> Output:
        """Losses `[N]` of `N` pairs.

        Policy and reference see the same noisy latents whoever inverted, so step 0 is log 2 to the last bit.
        """
        preference = self._preference(batch)
        draws, logs = self._inverted(denoiser, batch, draws)
        terms = denoising_terms(
            denoiser,
            batch.latents,
            batch.cond,
            draws,
            reference=True,
            error_space=self.error_space,
            keep_residual=self.safeguard is not None,
        )
        assert terms.ref_err is not None
        first, second, more = self.stabilised(terms, preference - 0.5)
        errors = (first, second, *first_and_second(terms.ref_err))
        loss = smpo_loss(*errors, preference, beta=self.beta_now, gamma=self.gamma)
        strength = _multiplier(preference, self.gamma).abs()
        margin = strength * diffusion_dpo_logit(*errors, beta=self.beta_now)
        winner = 0.5 + 0.5 * torch.sign(preference - 0.5)
        sides = pair_logs(terms.t, *errors, margin, winner)
        return Output(loss, {**sides, "beta_multiplier": strength, **logs, **more})

    def loss_at_reference(self, output: Output) -> float:
        """log 2, whatever the preference."""
        return math.log(2.0)

    def _preference(self, batch: Batch) -> Tensor:
        """`[N]` P that the first image of each pair is preferred."""
        if self.scorer not in batch.ratings:
            raise unknown("objective.scorer", self.scorer, batch.ratings)
        preference = self._smoothed(*first_and_second(batch.ratings[self.scorer]))
        if self.order == "reward":
            return preference
        if batch.target is None:
            raise UserError("objective.order=label needs labelled pairs: use objective.order=reward")
        # The sign of target - 1/2 is the label's winner; of a tie there is none, which P = 1/2 says.
        return 0.5 + torch.sign(batch.target - 0.5) * (preference - 0.5).abs()

    def _smoothed(self, first: Tensor, second: Tensor) -> Tensor:
        if self._range is None:
            raise RuntimeError("the range of the scores is not known: check_data comes first")
        return smoothed_preference(first, second, reward_min=self._range[0], reward_max=self._range[1])

    def _inverted(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> tuple[Draws, dict[str, Tensor]]:
        """The draws with the images' implied noises, and what there is to say about them."""
        if self.inversion == "none":
            return draws, {}
        with denoiser.policy(self.inverter):
            noise, forwards = implied_noise(
                denoiser,
                batch.latents,
                batch.cond,
                draws.t,
                steps=self.inversion_steps,
                corrections=CORRECTIONS[self.inversion],
                grid=self.inversion_grid,
            )
        logs = {"inversion_forwards": forwards.float(), **noise_statistics(noise, batch.latents)}
        return Draws(draws.t, noise), {
            name: torch.stack(first_and_second(v)).mean(0) for name, v in logs.items()
        }


def noise_statistics(noise: Tensor, x0: Tensor) -> dict[str, Tensor]:
    """`[B]` mean and std of each noise over its elements, and its correlation with x0 (0 for a flat x0).

    A correlation far from 0 says that the target holds signal; a std below 1 is as it must be.
    """
    noise, x0 = noise.flatten(1).float(), x0.flatten(1).float()
    mean = noise.mean(dim=1)
    noise, x0 = noise - mean[:, None], x0 - x0.mean(dim=1, keepdim=True)
    std, x0_std = noise.square().mean(dim=1).sqrt(), x0.square().mean(dim=1).sqrt()
    covariance = (noise * x0).mean(dim=1)
    correlation = covariance / (std * x0_std).clamp_min(torch.finfo(torch.float32).tiny)
    return {"noise_mean": mean, "noise_std": std, "noise_x0_corr": correlation}


def _checked_range(low: float, high: float, what: str) -> tuple[float, float]:
    if not (math.isfinite(high - low) and low < high):
        raise UserError(f"{what} run from {low} to {high}: scaling them needs a smallest below a largest")
    return low, high
