"""MaPO (Hong, Paul et al. 2024, arXiv 2406.06424): preference optimisation without a reference.

The authors' code and version 2 of their paper are two different losses; both are here. A beta belongs to one
of them: it multiplies the margin in the code and divides it in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.common.errors import UserError, unknown
from diffalign.data.batches import Batch, first_and_second
from diffalign.data.records import Record
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.likelihood import Draws, denoising_terms
from diffalign.objectives._base import Objective, Output, Unit, require_error_space, require_positive

FORMS = ("code", "paper")
SNR_VALUE = 0.5
FLOW_SHARE = 1.0 / 3.0
"""Of s, for errors of a flow's velocity; `Plugin` says why."""
NUM_TRAIN_TIMESTEPS = 1000
SERIES_LIMIT = 0.5
"""Below it log phi is its Taylor series: there the closed form loses digits, and at 0 it is 0 / 0."""
SERIES = (-1 / 24, 1 / 2880, -1 / 181440, 1 / 9676800, -1 / 479001600, 691 / 15692092416000)
"""Of log(x / (exp(x) - 1)) + x/2 in powers of x^2: -B_2k / (2k (2k)!) with the Bernoulli numbers B.

What is left out is below 1e-16 at SERIES_LIMIT; the series converges up to 2 pi.
"""


def log_phi(x: Tensor) -> Tensor:
    """`log(x / (exp(x) - 1))` for x >= 0, in the shape and dtype of `x`; 0 at 0, where the slope is -1/2.

    Value and gradient are finite and exact to rounding at every x: neither is `exp(x)` formed, which
    overflows float32 at 89, nor `exp(x) - 1`, of which float32 has no correct digit below 1e-7.
    """
    near = x < SERIES_LIMIT
    # Each branch sees only arguments that suit it: an infinity of the other, times 0, is NaN backwards.
    small = torch.where(near, x, 0.0)
    large = torch.where(near, 1.0, x)
    square = small * small
    series = torch.zeros_like(x)
    for coefficient in reversed(SERIES):
        series = (series + coefficient) * square
    return torch.where(near, series - small / 2.0, large.log() - large - torch.log1p(-torch.exp(-large)))


def _phi_minus_1(log_value: Tensor) -> Tensor:
    """`exp(log_value) - 1` with its digits near 0, and a gradient that keeps its own far below 0."""
    near = log_value > -1.0
    return torch.where(
        near, torch.expm1(torch.where(near, log_value, 0.0)), torch.exp(log_value.clamp_max(-1.0)) - 1.0
    )


def mapo_logit(
    err_w: Tensor,
    err_l: Tensor,
    *,
    beta: float,
    form: Literal["code", "paper"] = "code",
    snr_value: float = SNR_VALUE,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
) -> Tensor:
    """`[B]` what the logistic function is taken of, above 0 where the winner is denoised better.

    Args: those of `mapo_loss`.
    """
    if form == "code":
        power, scale, factor = 1.0, snr_value, float(num_train_timesteps)
    elif form == "paper":
        power, scale, factor = beta, 1.0, 1.0
    else:
        raise unknown("objective.form", form, FORMS)
    phi_w, phi_l = (_phi_minus_1(power * log_phi(scale * err)) for err in (err_w, err_l))
    return factor * (phi_w - phi_l)


def mapo_loss(
    err_w: Tensor,
    err_l: Tensor,
    *,
    beta: float,
    form: Literal["code", "paper"] = "code",
    snr_value: float = SNR_VALUE,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
) -> Tensor:
    """`[B]` losses: the winner's denoising error, plus a margin between winner and loser.

    With `phi(x) = x / (exp(x) - 1)`, which falls from 1 at x = 0 (slope -1/2) to 0:

        code:   err_w - beta * logsigmoid(T * (phi(s err_w) - phi(s err_l)))
        paper:  err_w - 1/beta * logsigmoid(phi(err_w)^beta - phi(err_l)^beta)

    "code" is mapo-t2i/mapo@374b3d3 utils.py:286-301, but for its `exp(x) - 1`, whose float32 rounding T makes
    a noise of 0.1 in the logit at an error of 5e-4. "paper" is equations 9 to 11 of version 2 of arXiv
    2406.06424. That the exponent beta stands on the whole fraction is inferred: from the layout, from the
    claim that phi lies in (0, 1) and from a gradient that is proportional to beta; the text at hand does not
    show it. (The gradient factor that it states for beta = 1, `(e^K - K - 1) / (e^K - 1)^2`, is not -phi',
    though it also falls from 1/2 to 0.)

    Args:
        err_w: `[B]` mean squared denoising error on the winning image, >= 0.
        err_l: `[B]` the same on the losing image, at the same timestep and noise.
        beta: > 0. Convention: no half and no reference, so it is not the beta of the other objectives. In
            "code" it is the weight of the margin (theirs: 0.1), in "paper" the exponent and one over the
            weight (theirs, in an ablation: 128 to 1024; phi^beta is about exp(-beta err / 2), so at 1024 the
            margin is felt only while errors are below 0.01). For small errors "code" is the winner's error
            plus beta times Diffusion-DPO without reference at its beta = s T = 500.
        form: "code" or "paper".
        snr_value: s of "code"; a constant, whatever its name says. Errors that are r times as large have the
            same logit with s / r and r times the loss with s / r and r beta.
        num_train_timesteps: T of "code".
    """
    logit = mapo_logit(
        err_w, err_l, beta=beta, form=form, snr_value=snr_value, num_train_timesteps=num_train_timesteps
    )
    return err_w - (beta if form == "code" else 1.0 / beta) * logsigmoid(logit)


@dataclass
class Plugin(Objective):
    """MaPO on pairs: no reference is run or held.

    The loss knows a winner and a loser and nothing between: a pair with a soft label trains as a win of its
    likelier side, and a tie is left out of the data, also under `data.ties=soft`.

    Convention: the published numbers are for errors of noise (of v networks the authors' code takes them as
    they are). A rectified flow's error of noise is (1 - sigma)^2 times that of velocity, so
    `error_space=epsilon` is the published loss. Native errors weigh all levels alike, as in public flow DPO.
    With velocity errors that are the same at every level, they are r = 3 times those of noise in the mean
    over equally likely levels (pi times with the best network for white data of variance 1), so s / 3,
    which native errors of a flow get, makes about the published margin on average. beta is taken as it is,
    but should scale along: 0.3 is what 0.1 was, and in form "paper" a third of a beta what the whole was.

    Args:
        beta: weight of the margin in form "code" (0.1 in the authors' command), exponent and one over the
            weight in form "paper" (1024 in their best ablation): without a default, since they differ so.
        form: "code", what the authors ran, or "paper", equations 9 to 11 of version 2.
        snr_value: s of form "code", for errors of noise; a third of it is taken of a flow's native errors.
        num_train_timesteps: T of form "code", a factor of the margin whatever the base's own number is.
        error_space: space of the errors: "native" to the network, "epsilon" or "x0".
    """

    beta: float
    form: Literal["code", "paper"] = "code"
    snr_value: float = SNR_VALUE
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS
    error_space: Literal["native", "epsilon", "x0"] = "native"

    unit: ClassVar[Unit] = "pair"
    uses_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("beta", "snr_value", "num_train_timesteps"):
            value = getattr(self, name)
            require_positive(name, value)
        if self.form not in FORMS:
            raise unknown("objective.form", self.form, FORMS)
        if self.form == "paper" and (self.snr_value, self.num_train_timesteps) != (
            SNR_VALUE,
            NUM_TRAIN_TIMESTEPS,
        ):
            raise UserError(
                "objective.snr_value and objective.num_train_timesteps mean nothing in objective.form=paper: "
                "leave them out, or use objective.form=code"
            )
        require_error_space(self.error_space)

    def reject(self, record: Record) -> str | None:
        """Returns "tie" for a pair without a winner."""
        return "tie" if record.pair_target() == 0.5 else None

    def compute(self, denoiser: Denoiser, batch: Batch, draws: Draws, shared: Any = None) -> Output:
        """Losses `[N]` of `N` pairs.

        Logs have the logit as `margin` and 1 as `target`: every pair is trained as a win.

        Raises:
            UserError: a tie.
        """
        terms = denoising_terms(
            denoiser, batch.latents, batch.cond, draws, reference=False, error_space=self.error_space
        )
        first, second = first_and_second(terms.err)
        flipped = _second_wins(batch, first)
        err_w, err_l = second.where(flipped, first), first.where(flipped, second)
        options: dict[str, Any] = {
            "beta": self.beta,
            "form": self.form,
            "snr_value": self.snr_value * (FLOW_SHARE if self.of_velocity(denoiser.process) else 1.0),
            "num_train_timesteps": self.num_train_timesteps,
        }
        logs = {
            "t": first_and_second(terms.t)[0],
            "err_w": err_w.detach(),
            "err_l": err_l.detach(),
            "margin": mapo_logit(err_w, err_l, **options).detach(),
            "target": torch.ones_like(err_w),
        }
        return Output(mapo_loss(err_w, err_l, **options), logs)


def _second_wins(batch: Batch, like: Tensor) -> Tensor:
    """`[N]` bool: the pairs whose second image is preferred."""
    if batch.target is None:
        return torch.zeros_like(like, dtype=torch.bool)
    ties = [name for name, target in zip(batch.ids, batch.target.tolist(), strict=True) if target == 0.5]
    if ties:
        raise UserError(f"MaPO cannot learn from a tie ({', '.join(ties)}): use data.ties=drop")
    return batch.target < 0.5
