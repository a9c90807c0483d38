"""Both stabilisers through the loop, their keys, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.common import files
from diffalign.common.config import load_recipe, make_one, plain_plugin
from diffalign.common.errors import UserError
from diffalign.common.helptext import help_rows
from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.objectives._stabilise import AutoBeta
from diffalign.objectives.diffusion_dpo import Plugin as DPO
from diffalign.objectives.dragon import Plugin as Dragon
from diffalign.objectives.kto import Plugin as KTO
from diffalign.objectives.smpo import Plugin as SmPO
from diffalign.stages.train import train
from diffalign.training import loop
from tests.tiny_training import make_run, make_set


def test_a_resumed_run_goes_on_with_its_beta(tiny_sdxl: str, tmp_path: Path) -> None:
    """6 steps at once and 3 + 3 with another instance: the same bits; beta is observed once a step."""
    model: Any = SDXL(path=tiny_sdxl).load()
    model.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
    start = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    train_set = make_set(model, 7)

    def fit(out: Path, steps: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        objective = DPO(beta=2000.0, safeguard=0.6, auto_beta=AutoBeta(drift_limit=1e-9, decay=0.5, high=1e5))
        options: dict[str, Any] = {"num_steps": steps, "accumulation": 2, "log_every": 1}
        loop.fit(make_run(model, train_set, out, objective=objective, **options))
        return objective.state_dict(), {k: v.clone() for k, v in model.trained_state().items()}

    state, weights = fit(tmp_path / "whole", 6)
    model.load_trained_state(start)
    fit(tmp_path / "parts", 3)
    again, same_weights = fit(tmp_path / "parts", 6)
    assert again == state and all(torch.equal(weights[name], same_weights[name]) for name in weights)
    rows = [
        [row for row in files.read_jsonl(tmp_path / name / "metrics.jsonl") if row["kind"] == "train"]
        for name in ("whole", "parts")
    ]
    betas = [[row["beta"] for row in of_run] for of_run in rows]
    assert betas[0] == betas[1] and len(betas[0]) == 6
    # Step 0's margins are 0: the average halves, beta doubles; from there it may not fall.
    assert betas[0][:2] == pytest.approx([2000.0, 4000.0]) and betas[0] == sorted(betas[0])
    assert [row["beta_held"] for row in rows[0]] == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    for name in ("safeguard_lambda", "safeguarded", "winner_rise", "winner_rises", "error_drift"):
        assert all(math.isfinite(row[name]) for row in rows[0]), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(safeguard=1.5), "objective.safeguard is 1.5: use a value in [0, 1], or null"),
        (lambda: DPO(safeguard=math.nan), "objective.safeguard is nan: use"),
        (
            lambda: SmPO(safeguard=0.6),
            "objective.safeguard is 0.6, but inversion=renoise gives each image a noise of its own: leave "
            "safeguard out, or set objective.inversion=none",
        ),
        (
            lambda: Dragon(surrogate="kto", safeguard=0.0),
            "objective.safeguard is 0.0, but surrogate=kto has no pairs: leave it out or set "
            "objective.surrogate=dpo",
        ),
        (
            lambda: Dragon(surrogate="kto", auto_beta=AutoBeta(drift_limit=0.5)),
            "objective.auto_beta is set, but surrogate=kto",
        ),
        (lambda: AutoBeta(drift_limit=0.0), "objective.auto_beta.drift_limit is 0.0: use a value above 0"),
        (lambda: AutoBeta(1.0, target=0.5), "objective.auto_beta.target is 0.5: use a value in (0, 0.5)"),
        (lambda: AutoBeta(1.0, decay=1.0), "objective.auto_beta.decay is 1.0: use a value in [0, 1)"),
        (lambda: AutoBeta(1.0, low=9.0, high=8.0), "objective.auto_beta.low is 9.0, above high=8.0"),
        (lambda: AutoBeta(1.0, high=math.inf), "objective.auto_beta.high is inf"),
        (
            lambda: DPO(beta=10.0, auto_beta=AutoBeta(drift_limit=0.5)),
            "objective.beta is 10.0: with auto_beta it is the first one, use a value from "
            "auto_beta.low=65 to high=65536",
        ),
        (
            lambda: make_one("objectives", {"name": "kto", "safeguard": 0.6}),
            "unknown key of objective kto 'safeguard': a key of diffusion_dpo, dragon, smpo only; known: "
            "baseline, beta",
        ),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)


WORDS = ["model=sdxl", "model.path=base", "out=runs/x", "data=jsonl", "data.path=pairs"]


def test_the_keys_on_the_command_line() -> None:
    words = [*WORDS, "objective=dpo", "objective.safeguard=0.9", "objective.auto_beta.drift_limit=0.2"]
    recipe = load_recipe(train, None, words)
    made = recipe.arguments["objective"]
    assert made == DPO(safeguard=0.9, auto_beta=AutoBeta(drift_limit=0.2))
    assert (
        make_one("objectives", plain_plugin(made))
        == made
        == make_one("objectives", recipe.resolved["objective"])
    )


def test_help_says_what_auto_beta_is_and_that_it_is_off() -> None:
    rows = {key: row for key, *row in help_rows(train, None, ["objective=smpo"])}
    assert rows["objective.auto_beta"][:2] == ["section", "null"]
    assert "beta follows the margin" in rows["objective.auto_beta"][2]
    assert rows["objective.auto_beta.drift_limit"][:2] == ["float", "required"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("objective.auto_beta.target=0.1", "train needs objective.auto_beta.drift_limit=..."),
        ("objective.auto_beta={}", "train needs objective.auto_beta.drift_limit=..."),
        ("objective.auto_beta.limit=1", "unknown key of auto_beta 'limit': did you mean 'drift_limit'?"),
    ],
)
def test_auto_beta_needs_its_drift_limit(word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(train, None, [*WORDS, word])
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["kto", "mapo", "rankdpo", "sft"])
@pytest.mark.parametrize("key", ["safeguard=0.6", "auto_beta.drift_limit=0.1"])
def test_other_objectives_name_those_that_have_them(name: str, key: str, tmp_path: Path) -> None:
    """As a word and in a file."""
    said = (
        f"unknown key of objective {name} '{key.partition('=')[0].partition('.')[0]}': a key of diffusion_dpo"
    )
    with pytest.raises(UserError, match=said):
        load_recipe(train, None, [*WORDS, f"objective={name}", f"objective.{key}"])
    file = tmp_path / "recipe.yaml"
    file.write_text(f"objective:\n  name: {name}\n  {key.partition('=')[0].partition('.')[0]}: null\n")
    with pytest.raises(UserError, match=rf"recipe.yaml:3: {said}"):
        load_recipe(train, file, WORDS)
    assert not hasattr(KTO(), "safeguard")
