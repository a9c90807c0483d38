"""The health report, number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffalign.training.health import Health


def column(*values: float) -> Tensor:
    return torch.tensor(values)


def pairs(
    loss: Tensor, margin: Tensor, t: list[int], target: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    zeros = torch.zeros_like(loss)
    logs = {"err_w": zeros + 0.5, "err_l": zeros + 0.25, "ref_err_w": zeros + 0.375, "ref_err_l": zeros + 0.5}
    target = torch.ones_like(margin) if target is None else target
    return loss, {**logs, "margin": margin, "target": target, "t": torch.tensor(t)}


def test_by_hand() -> None:
    """Four pairs in two micro-batches, margins ln 3, 0, -ln 3 and 5.

    sigma(-margin): 1/4, 1/2, 3/4 and 0.0066929, the last below 0.01 (saturated). Accuracy: right, half,
    wrong, right = 2.5 / 4. Winner 0.5 against reference 0.375: +0.125; loser 0.25 against 0.5: -0.25.
    """
    health = Health(1000)
    log3 = math.log(3.0)
    health.add(*pairs(column(0.2, 0.4), column(log3, 0.0), [10, 990]))
    health.add(*pairs(column(0.6, 0.8), column(-log3, 5.0), [260, 10]))
    health.add_grad_norm(3.0)
    health.add_grad_norm(1.0)
    report = health.report()
    by_timestep = report.pop("by_timestep")
    assert report == {
        "groups": 4.0,
        "loss": pytest.approx(0.5),
        "err_w": 0.5,
        "err_w_vs_ref": 0.125,
        "err_l": 0.25,
        "err_l_vs_ref": -0.25,
        "margin": pytest.approx(1.25),
        "margin_abs_max": 5.0,
        "accuracy": 2.5 / 4,
        "gradient_factor": pytest.approx((0.25 + 0.5 + 0.75 + 0.0066929) / 4, abs=1e-6),
        "saturated": 0.25,
        "grad_norm": 2.0,
        "grad_norm_max": 3.0,
    }
    assert isinstance(by_timestep, dict) and list(by_timestep) == ["0-249", "250-499", "750-999"]
    assert by_timestep["0-249"]["groups"] == 2 and by_timestep["0-249"]["loss"] == pytest.approx(0.5)
    assert by_timestep["0-249"]["accuracy"] == 1.0 and by_timestep["0-249"]["saturated"] == 0.5
    assert by_timestep["250-499"]["margin"] == pytest.approx(-log3)
    assert by_timestep["750-999"]["loss"] == pytest.approx(0.4)


def test_soft_targets_and_ties_by_hand() -> None:
    """Targets 3/4 and 1/2, margins ln 3 and 0: both are where the loss wants them, sigma(ln 3) = 3/4.

    Then margins 0 and ln 3: factors |3/4 - 1/2| and |1/2 - 3/4|. Accuracy and saturation speak of the decided
    pair alone; where only ties were seen there is nothing to say.
    """
    log3, soft, zeros = math.log(3.0), column(0.75, 0.5), column(0.0, 0.0)
    health = Health(1000)
    health.add(*pairs(zeros, column(log3, 0.0), [10, 10], soft))
    settled = health.report()
    assert settled["gradient_factor"] == pytest.approx(0.0, abs=1e-7)
    assert (settled["accuracy"], settled["saturated"]) == (1.0, 1.0)
    health.add(*pairs(zeros, column(0.0, log3), [10, 990], soft))
    moved = health.report()
    assert moved["gradient_factor"] == pytest.approx(0.25)
    assert (moved["accuracy"], moved["saturated"]) == (0.5, 0.0)
    by_timestep = moved["by_timestep"]
    assert isinstance(by_timestep, dict)
    assert {"accuracy", "saturated"} < set(by_timestep["0-249"])
    assert not {"accuracy", "saturated"} & set(by_timestep["750-999"])


def test_a_report_empties_the_store() -> None:
    health = Health(1000)
    assert health.report() == {}
    health.add(column(1.0), {"t": torch.tensor([3])})
    health.add_grad_norm(7.0)
    assert health.report() == {
        "groups": 1.0,
        "loss": 1.0,
        "grad_norm": 7.0,
        "grad_norm_max": 7.0,
        "by_timestep": {"0-249": {"groups": 1.0, "loss": 1.0}},
    }
    assert health.report() == {}
    health.add(column(3.0), {})
    assert health.report() == {"groups": 1.0, "loss": 3.0}


def test_ranges_cover_a_process_that_four_does_not_divide() -> None:
    """10 steps: ceil(10 / 4) = 3 a range, the last one short."""
    health = Health(10)
    health.add(torch.ones(10), {"t": torch.arange(10)})
    found = health.report()["by_timestep"]
    assert isinstance(found, dict)
    assert {name: values["groups"] for name, values in found.items()} == {
        "0-2": 3,
        "3-5": 3,
        "6-8": 3,
        "9-9": 1,
    }


def test_no_gradient_is_kept() -> None:
    health, loss = Health(1000), torch.ones(2, requires_grad=True)
    health.add(2 * loss, {})
    assert not health._rows["loss"][0].requires_grad
