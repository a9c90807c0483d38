"""Rules that end a run: by hand, and in the loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.training import loop
from diffalign.training.checkpoint import load_latest
from diffalign.training.specs import SampleSpec, StopRule, ValidationSpec
from diffalign.training.stop import StopRules
from tests.tiny_training import make_run, make_set


def read(rules: StopRules, name: str, values: list[float]) -> str | None:
    """What ended the run after one row a step with these values."""
    for step, value in enumerate(values, start=1):
        rules.read(step, {name: value})
    return rules.reason


def test_so_many_rows_one_after_another() -> None:
    def rules() -> StopRules:
        return StopRules({"saturated": StopRule(above=0.5, rows=3)})

    assert read(rules(), "saturated", [0.6, 0.6, 0.5, 0.6, 0.6]) is None  # 0.5 is not above 0.5
    assert read(rules(), "saturated", [0.6, 0.6, math.nan, 0.6, 0.6]) is None
    reason = "saturated above 0.5 for 3 rows at step 4"
    assert read(rules(), "saturated", [0.1, 0.6, 0.7, 0.8]) == reason
    assert read(rules(), "saturated", [0.1, 0.6, 0.7, 0.8, 0.9, 0.1]) == reason  # the first time counts


def test_below_0_and_rows_that_lack_the_number() -> None:
    """Held-out rows come between the others: they neither count nor break the row."""
    rules = StopRules({"margin": StopRule(below=0.0, rows=2)})
    rules.read(1, {"margin": -1.0})
    rules.read(1, {"error_margin": 5.0})
    rules.read(2, {"margin": -1e-9})
    assert rules.reason == "margin below 0 for 2 rows at step 2"
    assert read(StopRules({"margin": StopRule(below=0.0)}), "margin", [0.0]) is None


def test_what_is_kept_goes_on() -> None:
    first = StopRules({"loss": StopRule(above=1.0, rows=2)})
    first.read(1, {"loss": 2.0})
    second = StopRules({"loss": StopRule(above=1.0, rows=2)})
    second.load_state_dict(first.state_dict())
    second.read(2, {"loss": 2.0})
    assert second.reason == "loss above 1 for 2 rows at step 2"
    assert second.unseen() == []


def test_a_name_that_no_row_has_is_said() -> None:
    rules = StopRules(
        {"saturatd": StopRule(above=0.5), "loss": StopRule(above=9.0), "zzz": StopRule(below=0)}
    )
    rules.read(1, {"loss": 1.0, "saturated": 0.0})
    assert rules.unseen() == [
        "stop_when: no row of metrics has had 'saturatd' so far: did you mean 'saturated'?",
        "stop_when: no row of metrics has had 'zzz' so far: there are loss, saturated",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "stop_when: above=None and below=None: give one of them, e.g. stop_when={saturated"),
        ({"above": 1.0, "below": 0.0}, "above=1.0 and below=0.0: give one of them"),
        ({"above": 1.0, "rows": 0}, "stop_when: rows is 0: use 1 or more"),
    ],
)
def test_rules_that_say_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StopRule(**options)


@pytest.fixture(scope="module")
def shared_model(tiny_sdxl: str) -> Any:
    loaded: Any = SDXL(path=tiny_sdxl).load()
    loaded.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
    return loaded


@pytest.fixture
def model(shared_model: Any) -> Iterator[Any]:
    state = {name: tensor.clone() for name, tensor in shared_model.trained_state().items()}
    yield shared_model
    shared_model.load_trained_state(state)


def test_a_run_stops_saves_and_stays_stopped(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows at steps 2, 3 (a checkpoint), 4, 6 and 8; the loss is above 0 in all: three of them end at 4."""
    data = make_set(model, 7)
    rules = {"loss": StopRule(above=0.0, rows=3), "los": StopRule(above=9.0)}
    summary = loop.fit(make_run(model, data, tmp_path, stop_when=rules))
    reason = "loss above 0 for 3 rows at step 4"
    assert summary == {"steps": 4, "skipped_steps": 0, "empty_steps": 0, "stopped": reason}
    kept = load_latest(tmp_path, identity="this run")
    assert kept is not None and kept.step == 4
    said = capsys.readouterr().err
    assert f"stopped: {reason}" in said
    assert said.count("no row of metrics has had 'los' so far: did you mean 'loss'?") == 1
    assert loop.fit(make_run(model, data, tmp_path, stop_when=rules)) == summary
    assert [row["step"] for row in files.read_jsonl(tmp_path / "metrics.jsonl")] == [2, 3, 4]


def test_rows_in_a_row_are_counted_over_a_stop_in_between(model: Any, tmp_path: Path) -> None:
    data, rules = make_set(model, 7), {"loss": StopRule(above=0.0, rows=3)}
    first = loop.fit(make_run(model, data, tmp_path, stop_when=rules, num_steps=3))
    assert "stopped" not in first and first["steps"] == 3
    second = loop.fit(make_run(model, data, tmp_path, stop_when=rules))
    assert second["steps"] == 4


def test_a_held_out_number_ends_a_run_that_is_then_measured_once(model: Any, tmp_path: Path) -> None:
    """Measured after step 5, where nothing else is due: a row of training and the pictures are there too."""
    samples = SampleSpec(prompts=["a ring"], every=100, num_inference_steps=1)
    summary = loop.fit(
        make_run(
            model,
            make_set(model, 7),
            tmp_path,
            stop_when={"implicit_accuracy/estimate": StopRule(above=-1.0)},
            validation=ValidationSpec(share=0.5, every=5, draws=2),
            samples=samples,
            heldout=make_set(model, 2),
            embedded=model.embed_for_generation(samples.prompts),
        )
    )
    assert summary["stopped"] == "implicit_accuracy/estimate above -1 for 1 row at step 5"
    rows = [(row["step"], row["kind"]) for row in files.read_jsonl(tmp_path / "metrics.jsonl")]
    assert rows == [(2, "train"), (3, "train"), (4, "train"), (5, "validation"), (5, "train")]
    drawn = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert drawn == ["step-00000000.png", "step-00000005.png"]
