"""SmPO and its data: where the range of the scores comes from, and which records and settings are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from diffalign.common.errors import UserError
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record, Score
from diffalign.data.select import ScoreFacts
from diffalign.objectives.smpo import Plugin
from tests.objectives.smpo_toy import PICKSCORE, plugin, toy, toy_batch


def facts(scale: str = "cosine", low: float = 0.1, high: float = 0.3) -> dict[str, ScoreFacts]:
    return {"pickscore": ScoreFacts(scale, "1", low, high)}


def record(*scores: float | None, scale: str = "cosine", label: float = 1.0) -> Record:
    candidates = [
        Candidate(
            ImageRef(name=f"r:{side}"),
            scores={} if value is None else {"pickscore": Score(value, scale, "1")},
            label=[label, 1.0 - label][side],
        )
        for side, value in enumerate(scores)
    ]
    return Record("r", "a thing", candidates)


def test_the_range_comes_from_the_data_or_from_the_recipe() -> None:
    """0.3 and 0.1 are the whole range of the data, P = e / (e + 1); of the recipe's range a fifth."""
    batch, draws = toy_batch([0.3, 0.1], None, [8])
    for options, expected in (({}, math.tanh(0.5)), ({"reward_min": 0.0, "reward_max": 1.0}, math.tanh(0.1))):
        objective = Plugin(inversion="none", **options)  # type: ignore[arg-type]
        objective.check_data(facts())
        logs = objective.compute(toy(), batch, draws).logs
        assert logs["beta_multiplier"].item() == pytest.approx(10.0 * expected, abs=1e-5)
    plugin().check_data({})
    with pytest.raises(RuntimeError, match="check_data comes first"):
        Plugin().compute(toy(), batch, draws)


@pytest.mark.parametrize(
    ("options", "known", "message"),
    [
        ({}, {}, r"does not say the range of its 'pickscore' scores: make it with diffalign pair"),
        ({"scorer": "pickscor"}, facts(), r"unknown objective\.scorer 'pickscor': did you mean 'pickscore'"),
        (
            {"scorer": "clip", "reward_min": 0.0, "reward_max": 1.0},
            facts(),
            r"unknown objective\.scorer 'clip'",
        ),
        ({"scale": "cosine"}, facts("logits"), r"objective\.scale is cosine .* on the scale logits"),
        ({"scale": "cosine"}, facts(""), r"on the scale \(none\)"),
        ({}, facts(low=0.2, high=0.2), r"'pickscore' scores run from 0\.2 to 0\.2"),
        (
            PICKSCORE,
            facts(low=17.0, high=24.0),
            r"lie beside all 'pickscore' scores of the data \(17 to 24\)",
        ),
    ],
)
def test_data_that_cannot_be_used_is_refused(
    options: dict[str, Any], known: dict[str, ScoreFacts], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Plugin(**options).check_data(known)
    assert "\n" not in str(caught.value)


def test_records_that_teach_nothing() -> None:
    objective = Plugin()
    objective.check_data(facts())
    assert objective.reject(record(0.2, 0.25)) is None
    assert objective.reject(record(0.2, None)) == objective.reject(record(math.nan, 0.2)) == "no_score"
    assert objective.reject(record(0.2, math.inf)) == "no_score"
    assert objective.reject(record(0.2, 0.2)) == "equal_scores"
    assert objective.reject(record(0.2, 0.2 + 1e-9)) == "equal_scores"  # float32, like the batch
    assert objective.reject(record(0.2, 0.25, label=0.5)) is None
    assert replace(objective, **PICKSCORE, order="label").reject(record(0.2, 0.25, label=0.5)) == "tie"
    with pytest.raises(
        UserError, match=r"record r: its 'pickscore' score is on the scale logits, expected cos"
    ):
        objective.reject(record(20.0, 22.0, scale="logits"))


def test_scales_may_not_mix_where_no_manifest_says_which() -> None:
    objective = plugin()
    objective.check_data({})
    assert objective.reject(record(0.2, 0.3, scale="cosine")) is None
    with pytest.raises(UserError, match="on the scale logits, expected cosine"):
        objective.reject(record(20.0, 30.0, scale="logits"))


def test_what_the_batch_must_bring() -> None:
    batch, draws = toy_batch([0.3, 0.1], None, [8])
    with pytest.raises(UserError, match=r"unknown objective\.scorer 'clip': known: pickscore"):
        plugin(scorer="clip").compute(toy(), batch, draws)
    with pytest.raises(UserError, match="order=label needs labelled pairs"):
        plugin(order="label").compute(toy(), batch, draws)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"objective\.beta is 0\.0: use a value above 0"),
        ({"gamma": -1.0}, r"objective\.gamma is -1\.0: use a value above 0"),
        ({"gamma": math.nan}, r"objective\.gamma is nan"),
        ({"order": "labels"}, r"unknown objective\.order 'labels': did you mean 'label'"),
        ({"inversion": "renois"}, r"unknown objective\.inversion 'renois': did you mean 'renoise'"),
        ({"inverter": "base"}, r"unknown objective\.inverter 'base'"),
        ({"inversion_grid": "mine"}, r"unknown objective\.inversion_grid 'mine'"),
        ({"inversion_steps": 0}, r"objective\.inversion_steps is 0: use 1 or more"),
        ({"error_space": "esp"}, r"unknown objective\.error_space 'esp'"),
        ({"reward_min": 0.1}, r"reward_min is 0\.1 and reward_max None: give both or neither"),
        ({"reward_min": 0.3, "reward_max": 0.1}, r"reward_min and reward_max run from 0\.3 to 0\.1"),
        ({"reward_min": 0.3, "reward_max": 0.3}, r"reward_min and reward_max run from 0\.3 to 0\.3"),
    ],
)
def test_a_setting_that_is_wrong_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Plugin(**options)
    assert "\n" not in str(caught.value)


def test_more_inversion_steps_than_timesteps_are_refused() -> None:
    batch, draws = toy_batch([0.3, 0.1], None, [8])
    with pytest.raises(
        UserError, match="an inversion of 21 steps is asked for and the base has 20 timesteps"
    ):
        plugin(inversion_steps=21).compute(toy(), batch, draws)
