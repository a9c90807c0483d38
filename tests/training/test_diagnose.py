"""Every pattern of a run that goes wrong is found in rows that show it, and not in rows just short of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffalign.training.diagnose import PATTERNS, Look, diagnose, table

RECIPE = {"num_steps": 400, "precision": "fp32", "optimizer": {"lr": 1e-4}, "objective": {"beta": 2000.0}}
HEALTHY = {
    "err_w": 0.2,
    "err_w_vs_ref": -0.001,
    "err_l_vs_ref": 0.004,
    "margin_abs_max": 2.0,
    "accuracy": 0.65,
    "saturated": 0.02,
    "grad_norm": 1.0,
    "grad_norm_max": 2.5,
    "skipped_steps": 0,
    "empty_steps": 0,
}


def train_rows(*late: dict[str, Any], **always: Any) -> list[dict[str, Any]]:
    """40 healthy rows, of steps 10 to 400; the last of them changed by `late`."""
    rows = [{"step": 10 * k, "kind": "train", **HEALTHY, **always} for k in range(1, 41)]
    for row, change in zip(rows[len(rows) - len(late) :], late, strict=True):
        row.update(change)
    return rows


def heldout(estimate: float, low: float, high: float) -> list[dict[str, Any]]:
    interval = {"estimate": estimate, "low": low, "high": high, "n": 100}
    return [{"step": 400, "kind": "validation", "implicit_accuracy": interval, "error_margin": 0.0}]


def rollouts(rewards: list[float], decided: float = 1.0) -> list[dict[str, Any]]:
    return [
        {"step": 1 + 10 * k, "kind": "rollout", "pairs": 8.0, "decided": decided, "reward": reward}
        for k, reward in enumerate(rewards)
    ]


def start(loss: float, margin: float) -> list[dict[str, Any]]:
    rows = train_rows()
    rows[0]["step_0"] = {"loss": loss, "expected": 0.693147, "margin_abs_max": margin}
    return rows


def look(name: str, rows: list[dict[str, Any]], **recipe: Any) -> Look:
    (found,) = [look for look in diagnose(rows, {**RECIPE, **recipe}) if look.pattern == name]
    return found


def growing(last: float) -> list[dict[str, Any]]:
    """Margins of the first quarter 1, of the last `last`."""
    rows = train_rows(margin_abs_max=1.0)
    for row in rows[30:]:
        row["margin_abs_max"] = last
    return rows


FLAT = [0.5, 0.6, 0.5, 0.6, 0.55, 0.55, 0.55, 0.55, 0.5, 0.6, 0.5, 0.6]
RISEN = [0.5, 0.6, 0.5, 0.6, 0.55, 0.55, 0.55, 0.55, 0.7, 0.7, 0.8, 0.8]

CASES = [
    (
        "winner error rises",
        train_rows(*[{"err_w_vs_ref": 0.021, "err_l_vs_ref": 0.03}] * 10),
        train_rows(*[{"err_w_vs_ref": 0.019, "err_l_vs_ref": 0.03}] * 10),
    ),
    ("saturation", train_rows(*[{"saturated": 0.31}] * 10), train_rows(*[{"saturated": 0.29}] * 10)),
    (
        "stands still",
        train_rows(accuracy=0.54, margin_abs_max=0.09),
        train_rows(accuracy=0.56, margin_abs_max=0.09),
    ),
    (
        "memorising",
        train_rows(accuracy=0.81) + heldout(0.54, 0.45, 0.63),
        train_rows(accuracy=0.81) + heldout(0.56, 0.47, 0.65),
    ),
    ("gradient spikes", train_rows(grad_norm_max=10.1), train_rows(grad_norm_max=9.9)),
    ("skipped steps", train_rows({"skipped_steps": 1}), train_rows({"skipped_steps": 0})),
    (
        "empty steps",
        train_rows({"empty_steps": 41}) + rollouts(RISEN),
        train_rows({"empty_steps": 40}) + rollouts(RISEN),
    ),
    ("drift without reward", growing(2.0) + rollouts(FLAT), growing(1.9) + rollouts(FLAT)),
    ("step 0", start(0.70, 0.051), start(0.69, 0.049)),
]


@pytest.mark.parametrize(("name", "wrong", "near"), CASES, ids=[case[0] for case in CASES])
def test_a_pattern_is_found_and_its_near_miss_is_not(
    name: str, wrong: list[dict[str, Any]], near: list[dict[str, Any]]
) -> None:
    assert look(name, wrong).found is True
    assert look(name, near).found is False
    assert [found.pattern for found in diagnose(wrong, RECIPE) if found.found] == [name]  # no other with it
    assert not any(found.found for found in diagnose(near, RECIPE))


def test_every_pattern_has_its_case() -> None:
    assert [case[0] for case in CASES] == [pattern.name for pattern in PATTERNS]


def test_a_loser_that_gets_better_is_no_drift_to_noise() -> None:
    rows = train_rows(*[{"err_w_vs_ref": 0.05, "err_l_vs_ref": -0.01}] * 10)
    assert look("winner error rises", rows).found is False


def test_numbers_and_steps_are_named() -> None:
    rows = train_rows(*[{"err_w_vs_ref": 0.03, "err_l_vs_ref": 0.04}] * 12)
    found = look("winner error rises", rows)
    assert found.evidence == (
        "err_w_vs_ref 0.03, err_l_vs_ref 0.04 at steps 310 to 400; err_w is 0.2, a tenth of it 0.02; "
        "first beyond it at step 290"
    )
    assert found.remedy.endswith("(here optimizer.lr=0.0001, num_steps=400)")


def test_gradients_that_grow_slowly_are_no_spikes() -> None:
    rows = train_rows()
    for k, row in enumerate(rows):
        row["grad_norm"] = 1.0 + k
        row["grad_norm_max"] = 2.0 * row["grad_norm"]
    assert look("gradient spikes", rows).found is False
    rows[20]["grad_norm"], rows[20]["grad_norm_max"] = 100.0, 400.0  # its own mean does not hide it
    spike = look("gradient spikes", rows)
    assert spike.found and "grad_norm_max 400 at step 210, 18.2 times" in spike.evidence  # 400 / 22


def test_the_loss_scale_of_fp16_may_halve_sixteen_times_and_then_now_and_again() -> None:
    assert look("skipped steps", train_rows({"skipped_steps": 20}), precision="fp16").found is False
    assert look("skipped steps", train_rows({"skipped_steps": 21}), precision="fp16").found is True
    assert look("skipped steps", train_rows({"skipped_steps": 20}), precision="bf16").found is True


def test_a_reward_that_rises_pays_for_the_drift() -> None:
    assert look("drift without reward", growing(5.0) + rollouts(RISEN)).found is False
    falling = look("drift without reward", growing(5.0) + rollouts(RISEN[::-1]))
    assert falling.found is True and "change -0.23, standard error 0.047" in falling.evidence
    assert look("drift without reward", growing(5.0) + rollouts(FLAT[:7])).found is None


def test_rollouts_of_which_nothing_is_decided() -> None:
    undecided = rollouts(FLAT[:2], decided=0.0)
    assert look("empty steps", train_rows() + undecided + rollouts(FLAT)).found is True  # 2 of 14
    assert look("empty steps", train_rows() + undecided[:1] + rollouts(FLAT)).found is False  # 1 of 13
    alone = look("empty steps", undecided)  # no step has taught anything, so there is no row of training
    assert alone.found is True and "empty_steps 11 of 11" in alone.evidence


def test_a_run_that_has_just_begun_is_not_told_that_it_stands_still() -> None:
    rows = train_rows(accuracy=0.5, margin_abs_max=0.01)
    assert look("stands still", rows[:19]).found is None
    assert look("stands still", rows[:20]).found is True


def test_what_a_run_does_not_measure_is_said() -> None:
    rows = [{"step": 10, "kind": "train", "loss": 0.1, "err_w": 0.1, "grad_norm": None, "skipped_steps": 0}]
    looks = diagnose(rows, {})
    assert [found.pattern for found in looks if found.found is False] == ["skipped steps"]
    assert {found.pattern: found.evidence for found in looks}["memorising"] == (
        "needs pairs and `validation.share`"
    )
    assert all(found.found is None for found in diagnose([], {}))


def test_only_the_end_of_a_run_is_judged() -> None:
    rows = train_rows()
    for row in rows[:30]:
        row["saturated"] = 0.9
    assert look("saturation", rows).found is False


def test_the_readme_holds_the_same_table() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert table() in readme
