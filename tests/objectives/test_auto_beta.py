"""auto_beta in closed form, over processes, and what it sees."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.data.batches import first_and_second
from diffalign.diffusion.likelihood import denoising_terms
from diffalign.objectives._stabilise import AutoBeta, MovingBeta
from diffalign.objectives.diffusion_dpo import Plugin as DPO
from diffalign.objectives.dragon import Plugin as Dragon
from diffalign.objectives.smpo import Plugin as SmPO
from tests.objectives.stabilise_toy import BETA, PLAIN_SMPO, TARGETS, pairs
from tests.tiny_training import take
from tests.toy_denoiser import toy_denoiser

SPEC = AutoBeta(drift_limit=0.5, decay=0.9)
SPEC_LOW = AutoBeta(drift_limit=9.0, low=1.0)


def test_beta_gives_the_average_margin_the_target() -> None:
    """sigmoid(-beta/2 m) = 0.2 at beta = 2 ln 4 / m: m = 0.001 gives 2772.59."""
    beta = SPEC.beta_of(0.001)
    assert beta == pytest.approx(2772.589, abs=1e-3)
    assert 1.0 / (1.0 + math.exp(beta / 2.0 * 0.001)) == pytest.approx(0.2)
    assert AutoBeta(drift_limit=1.0, target=0.1).beta_of(0.001) == pytest.approx(2000.0 * math.log(9.0))


def test_the_bounds() -> None:
    """Those of SimpleTuner times 65536; at margin 0 beta is the largest."""
    assert (SPEC.beta_of(1.0), SPEC.beta_of(1e-6), SPEC.beta_of(0.0)) == (65.0, 65536.0, 65536.0)
    assert (SPEC.low, SPEC.high) == pytest.approx((1e-3 * 65536, 65536.0), rel=0.01)
    defaults = AutoBeta(drift_limit=1.0)
    assert (defaults.target, defaults.decay) == (0.2, 0.99)


def test_a_constant_margin_in_closed_form() -> None:
    """The average is m + (m_0 - m) 0.9^n, with m_0 = 2 ln 4 / 5000, so that step 0 has beta 5000."""
    moving = MovingBeta(SPEC, 5000.0)
    start, margin = 2.0 * math.log(4.0) / 5000.0, 0.002
    for step in range(1, 40):
        moving.update(margin, 0.0)
        average = margin + (start - margin) * 0.9**step
        assert moving.beta == pytest.approx(2.0 * math.log(4.0) / average, rel=1e-12)
    assert moving.beta == pytest.approx(2.0 * math.log(4.0) / margin, rel=0.02) and moving.beta < 5000.0


def test_above_the_drift_limit_beta_does_not_fall(capsys: pytest.CaptureFixture[str]) -> None:
    """It may rise; it is said once, and the fall goes on when the policy is back."""
    moving = MovingBeta(AutoBeta(drift_limit=0.1, decay=0.0), 5000.0)
    betas = []
    for margin, drift in (
        (0.001, 0.1),
        (0.002, 0.11),
        (0.004, 0.3),
        (0.0005, 0.3),
        (0.001, 0.3),
        (0.001, 0.0),
    ):
        moving.update(margin, drift)
        betas.append(moving.beta * 0.001 / (2.0 * math.log(4.0)))
    assert betas == pytest.approx([1.0, 1.0, 1.0, 2.0, 2.0, 1.0])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "11.0% off those of the reference, above drift_limit=0.1" in said
    assert "not lowered below 2772.6" in said


def told(objective: Any, logs: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> None:
    """`observe` of a process with `logs`, while another has `others`."""
    sent: list[Tensor] = []
    copy.deepcopy(objective).observe(others, lambda values: (sent.append(values), values)[1])
    objective.observe(logs, lambda values: torch.cat([values, sent[0]]))


@pytest.mark.parametrize("split", [0, 1, 3])
def test_two_processes_are_one(split: int) -> None:
    """Whoever holds the pairs, beta and the averages are the same bits, also where one has none."""
    denoiser, (batch, draws) = toy_denoiser(seed=1, reference=2), pairs()
    make = lambda: DPO(beta=BETA, auto_beta=AutoBeta(drift_limit=9.0, decay=0.5, low=1.0))  # noqa: E731
    one, two = make(), make()
    for _ in range(3):
        micro = [one.compute(denoiser, *take(batch, draws, [pair])).logs for pair in range(len(TARGETS))]
        one.observe(micro, lambda values: values)
        told(two, micro[:split][::-1], micro[split:])
        assert two.state_dict() == one.state_dict()
    assert one.state_dict()["beta"] != BETA


def test_what_it_sees_is_the_margin_without_beta_and_the_drift() -> None:
    """Against the errors themselves; the multiplier of SmPO counts as part of the margin."""
    denoiser, (batch, draws) = toy_denoiser(seed=1, reference=2), pairs()
    terms = denoising_terms(denoiser, batch.latents, batch.cond, draws, reference=True)
    assert terms.ref_err is not None and batch.target is not None
    shift = terms.err.detach() - terms.ref_err
    difference = (first_and_second(shift)[0] - first_and_second(shift)[1]).abs()
    drift = (shift.abs().mean() / terms.ref_err.mean()).item()
    preference = torch.sigmoid(2.0 * batch.target - 1.0)
    spec = AutoBeta(drift_limit=9.0, decay=0.0, low=1e-3)
    for objective, margins in (
        (DPO(beta=BETA, auto_beta=spec), difference),
        (Dragon(beta=BETA, auto_beta=spec), difference),
        (SmPO(beta=BETA, auto_beta=spec, **PLAIN_SMPO), difference * 10.0 * (2.0 * preference - 1.0).abs()),
    ):
        output = objective.compute(denoiser, batch, draws)
        assert output.logs["beta"].tolist() == [BETA] * len(TARGETS)
        objective.observe([output.logs], lambda values: values)
        state = objective.state_dict()
        assert state["margin"] == pytest.approx(margins.mean().item(), rel=1e-6)
        assert state["drift"] == pytest.approx(drift, rel=1e-6)
        assert state["beta"] == pytest.approx(2.0 * math.log(4.0) / state["margin"], rel=1e-9)
        again = objective.compute(denoiser, batch, draws)
        assert again.logs["beta"].tolist() == pytest.approx([state["beta"]] * len(TARGETS))
        assert again.logs["error_drift"].tolist() == pytest.approx([drift] * len(TARGETS))
        assert torch.allclose(again.logs["margin"], output.logs["margin"] * (state["beta"] / BETA))
        assert not again.logs["beta_held"].any()


def test_an_overflown_error_does_not_stay_in_the_averages() -> None:
    """A loser's infinite error makes a loss of 0, which no check of the loss finds."""
    denoiser, (batch, draws) = toy_denoiser(seed=1, reference=2), pairs()
    told_all, told_rest = (DPO(beta=BETA, auto_beta=SPEC_LOW) for _ in range(2))
    logs = told_all.compute(denoiser, batch, draws).logs
    broken = {name: values.clone() for name, values in logs.items()}
    for name in ("err_l", "margin"):
        broken[name][0] = math.inf
    told_all.observe([broken], lambda values: values)
    told_rest.observe([{name: values[1:] for name, values in logs.items()}], lambda values: values)
    assert told_all.state_dict() == told_rest.state_dict() != DPO(beta=BETA, auto_beta=SPEC_LOW).state_dict()
    before = told_all.state_dict()
    told_all.observe([{name: values[:1] for name, values in broken.items()}], lambda values: values)
    assert told_all.state_dict() == before


def test_the_loss_is_that_of_the_beta_in_use() -> None:
    denoiser, (batch, draws) = toy_denoiser(seed=1, reference=2), pairs()
    moved = DPO(beta=BETA, auto_beta=SPEC_LOW)
    moved.load_state_dict({"beta": 7.0, "margin": 0.1, "drift": 0.2})
    assert torch.equal(
        moved.compute(denoiser, batch, draws).loss, DPO(beta=7.0).compute(denoiser, batch, draws).loss
    )


def test_the_state_survives_a_checkpoint_bit_for_bit() -> None:
    old, fresh = (MovingObjective() for _ in range(2))
    for _ in range(3):
        old.step()
    stream = io.BytesIO()
    torch.save(old.objective.state_dict(), stream)
    stream.seek(0)
    fresh.objective.load_state_dict(torch.load(stream, weights_only=True))
    for _ in range(2):
        assert torch.equal(fresh.step(), old.step())
        assert fresh.objective.state_dict() == old.objective.state_dict()
    assert DPO().state_dict() == {}


class MovingObjective:
    """Steps of Diffusion-DPO with auto_beta on one batch."""

    def __init__(self) -> None:
        self.objective = DPO(beta=BETA, auto_beta=AutoBeta(drift_limit=9.0, decay=0.7, low=1.0))
        self.denoiser, self.batch = toy_denoiser(seed=1, reference=2), pairs()

    def step(self) -> Tensor:
        output = self.objective.compute(self.denoiser, *self.batch)
        self.objective.observe([output.logs], lambda values: values)
        return output.loss
