"""What the bake-off concludes from its rows."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffalign.common import files
from diffalign.demo import walk
from diffalign.demo.methods import METHODS
from diffalign.models import load_model
from diffalign.models._spec import AdapterSpec
from diffalign.scorers import frechet_distance
from diffalign.training import loop
from tests.tiny_training import make_run, make_set

SCRIPTS = Path(__file__).parents[2] / "scripts"
GAIN = {"estimate": 0.1, "low": 0.02, "high": 0.2, "n": 4, "level": 0.95}


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script as a module; it imports its neighbours by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script("bakeoff_report", monkeypatch)


@pytest.fixture
def bakeoff(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script, with rows of its own."""
    module = script("bakeoff", monkeypatch)
    monkeypatch.setattr(module, "ROWS", tmp_path / "bakeoff.jsonl")
    return module


def row(phase: str, method: str, setting: int, seed: int, wins: str, **changes: Any) -> dict[str, Any]:
    part = {"base": 0.4, "aligned": 0.5, "difference": GAIN}
    return {
        "phase": phase,
        "method": method,
        "setting": setting,
        "seed": seed,
        "settings": {"lr": 1e-4 * (setting + 1), "groups": 16, "measure": None},
        "wins": wins,
        "win_rate": sum(map(int, wins)) / 2 / len(wins),
        "parts": {name: part for name in ("accurate", "object", "colour", "count", "position")},
        "implicit": {"estimate": 0.7},
        "drift": {
            "vendi": {"ratio": 0.98},
            "pixel_rms": {"estimate": 0.05},
            "embedding_distance": {"estimate": 0.1},
        },
        "own_reward": None,
        "evaluations": {"learning": 20_000, "drawing": 30_000},
        "seconds": 3600.0,
        "core_seconds": 300.0,
        "drawing_core_seconds": 0.0,
        "cell_core_seconds": 1800.0,
        "peak_gb": 1.5,
        **changes,
    }


def test_the_setting_that_did_best_on_the_tuning_prompts_is_chosen(report: Any) -> None:
    rows = [row("tune", "dpo", k, 0, wins) for k, wins in enumerate(["1122", "2222", "0122"])]
    assert report.chosen_setting([*rows, row("test", "dpo", 0, 0, "2222")], "dpo", own=False) == 1
    gains = [{"gain": {**GAIN, "estimate": value}} for value in (0.1, 0.0, 0.3)]
    rows = [{**each, "own_reward": gain} for each, gain in zip(rows, gains, strict=True)]
    assert report.chosen_setting(rows, "dpo", own=True) == 2
    with pytest.raises(SystemExit, match="sft has no tuning rows"):
        report.chosen_setting(rows, "sft", own=False)


def test_a_prompt_is_one_cluster_over_all_seeds(report: Any) -> None:
    # Two pictures a prompt. All pictures of the first prompt win, all of the second lose, in every seed:
    # resampling prompts gives 0, 1/2 or 1, however many seeds there are.
    pooled = report.pooled_win_rate([row("test", "dpo", 0, seed, "2200") for seed in range(3)])
    assert pooled["estimate"] == 0.5 and (pooled["low"], pooled["high"]) == (0.0, 1.0)


def test_methods_are_compared_picture_by_picture_over_the_mean_of_their_seeds(report: Any) -> None:
    # By hand: the seeds' means are 1, 3/4, 0, 1/4 against 1/2, 1/2, 0, 1/2 of the other method.
    ours = [row("test", "mapo", 0, seed, wins) for seed, wins in enumerate(("2201", "2100"))]
    found = report.difference(ours, [row("test", "dpo", 0, 0, "1101")])
    assert found["estimate"] == pytest.approx((1 / 2 + 1 / 4 + 0 - 1 / 4) / 4)
    # Two prompts of two pictures each: +3/8 and -1/8 are the ends of what resampling gives.
    assert (found["low"], found["high"]) == (pytest.approx(-1 / 8), pytest.approx(3 / 8))


def test_the_bars_can_be_met_and_missed(report: Any) -> None:
    tested = {
        "dpo": [row("test", "dpo", 0, 0, "22" * 20)],
        "mapo": [row("test", "mapo", 0, 0, "20" * 20)],
        "dragon_set": [
            row("test", "dragon_set", 0, seed, "11", own_reward={"gain": GAIN}) for seed in (0, 1)
        ],
    }
    assert list(report.bars(tested, ("dragon_set",)).values()) == [True, False, True, True]
    tested["dragon_set"][1]["own_reward"] = {"gain": {**GAIN, "low": -0.9 * GAIN["low"]}}
    assert list(report.bars(tested, ("dragon_set",)).values()) == [True, False, True, False]
    tested["dragon_set"][1]["own_reward"] = {"gain": {**GAIN, "low": -1.1 * GAIN["low"]}}
    assert list(report.bars(tested, ("dragon_set",)).values()) == [True, False, False, False]


def test_gains_of_several_seeds_together(report: Any) -> None:
    """Two seeds that say the same know no more than one; the mean of deviations bounds that of the mean."""
    one = {"estimate": 0.2, "low": 0.1, "high": 0.3}
    assert report.together([one, one]) == pytest.approx(one)
    other = {"estimate": 0.0, "low": -0.3, "high": 0.3}
    assert report.together([one, other]) == pytest.approx({"estimate": 0.1, "low": -0.1, "high": 0.3})


def test_the_page_shows_every_setting_and_what_it_took(report: Any) -> None:
    rows = [row("tune", "dpo", 0, 0, "1122"), row("tune", "dpo", 1, 0, "2222")]
    rows.append(row("test", "dpo", 1, 0, "22222211"))
    rows.append(row("asked", "dpo", 0, 0, "2222"))
    rows.append(row("test", "dpo", 0, 0, "0000"))  # of a setting that was chosen once: not pooled
    rows += [row("confirm", "mapo", setting, 0, "22222222") for setting in (0, 1)]
    rows += [row("tune", "mapo", 0, 0, "1122"), row("test", "mapo", 0, 0, "22220000")]
    rows.append({"phase": "prepare", "seed": 1, "drafts_core_seconds": 500.0, "cell_core_seconds": 1800.0})
    text = report.as_markdown(rows, ["dpo", "mapo", "sft"], ("dragon_set",))
    assert text.count("**dpo**") == 1 and "Asked afterwards" in text
    assert "9 cells, 5.0 hours of one core" in text
    assert "| mapo | 0.500 [0.000, 1.000] | 0.500 | -" in text
    assert "| mapo | 1.000 [1.000, 1.000] | 1.000 | +" in text  # all as tested
    assert "| mapo (lr 0.0002) | 1.000 [1.000, 1.000] | 1.000 | +" in text
    assert "| mapo beats the base: interval above one half | NO |" in text
    assert "| dpo | lr 0.0001, groups 16 | 0.750 | +10.0 | - |" in text
    assert "| **dpo** | lr 0.0002, groups 16 | 1.000 | +10.0 | - |" in text
    # 0.875 of the pictures won: 37.5 points above one half, for 20,000 or 50,000 evaluations.
    assert "| dpo | 20,000 | 1.88 | 50,000 | 0.75 | 300 | 800 | 1.50 | 0.050, 0.100 |" in text
    assert "| dpo beats the base: interval above one half | yes |" in text
    assert "sft" not in text


def test_evaluations_are_counted_one_an_image(bakeoff: Any, tiny_sdxl: str, tmp_path: Path) -> None:
    """Two images in 3 steps with guidance: 12 drawing. A step of DPO on two pairs: 4 of the reference, 4
    with a backward pass, which count three times: 16 learning.
    """
    model: Any = load_model("sdxl", tiny_sdxl)
    with bakeoff.counted() as counts:
        model.generate(["a", "b"], seeds=[0, 1], num_inference_steps=3, guidance_scale=2.0)
        assert counts["drawing"] == 12 and counts["learning"] == 0 and counts["drawing_seconds"] > 0.0
        encoded = make_set(model, 2)
        model.drop_encoders()
        model.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
        loop.fit(make_run(model, encoded, tmp_path / "run", num_steps=1))
        assert counts["drawing"] == 12 and counts["learning"] == 16
    model.generate(["a"], seeds=[0], num_inference_steps=1)
    assert counts["drawing"] == 12


def test_the_gain_of_a_set_is_between_sets_of_one_size(bakeoff: Any) -> None:
    rng = np.random.default_rng(0)
    exemplars, base = rng.normal(size=(80, 3)), rng.normal(0.5, 1.0, size=(40, 3))
    better = base - 0.4
    prompts = [f"prompt {k // 2}" for k in range(40)]

    def reward(x: np.ndarray) -> float:
        return -float(frechet_distance(x, exemplars))

    gain = bakeoff.set_gain(reward, base, better, prompts)
    assert gain["estimate"] == pytest.approx(reward(better) - reward(base)) and gain["n"] == 40
    assert 0.0 < gain["low"] < gain["estimate"] < gain["high"]
    assert bakeoff.set_gain(reward, base, base, prompts)["high"] == 0.0


def test_a_row_of_other_settings_is_refused_and_half_tuning_too(bakeoff: Any) -> None:
    only = argparse.Namespace(phase="test", only=["sft"])
    method = bakeoff.SETTINGS["sft"][0]
    settings = bakeoff.settings_of(method, method.make(Path("exemplars")))
    files.append_jsonl(bakeoff.ROWS, [row("tune", "sft", 0, 0, "1122", settings=settings)])
    assert bakeoff.done() == [bakeoff.cell("tune", "sft", 0, 0)]
    with pytest.raises(SystemExit, match="sft: 3 settings are not tuned"):
        bakeoff.wanted(only)
    files.append_jsonl(bakeoff.ROWS, [row("tune", "sft", 1, 0, "1122", settings={"lr": 1.0})])
    with pytest.raises(SystemExit, match="tune-sft-1-seed0 has other settings than"):
        bakeoff.done()


def test_what_was_asked_is_confirmed_on_the_test_prompts(bakeoff: Any) -> None:
    cells = bakeoff.wanted(argparse.Namespace(phase="confirm", only=list(bakeoff.SETTINGS)))
    assert [cell["seed"] for cell in cells] == [0, 1, 2] * 2 and {cell["method"] for cell in cells} == {
        "mapo"
    }
    assert all(bakeoff.candidates("confirm")[c["method"]][c["setting"]] for c in cells)
    assert bakeoff.prompts_of("confirm") == bakeoff.prompts_of("test")
    assert not set(bakeoff.prompts_of("test")) & set(bakeoff.prompts_of("tune"))
    assert bakeoff.base_of(Path("out"), "confirm") == bakeoff.base_of(Path("out"), "test")


def test_the_demo_takes_what_the_bakeoff_chose(bakeoff: Any) -> None:
    """All but dpo, whose settings are those that scripts/results/demo.md tests."""
    rows = files.read_jsonl(SCRIPTS / "results" / "bakeoff.jsonl")
    for name, method in METHODS["tiny-sdxl"].items():
        chosen = bakeoff.chosen_setting(rows, name, own=name in bakeoff.OWN_REWARD)
        candidate = bakeoff.SETTINGS[name][chosen]
        both = [bakeoff.settings_of(each, each.make(Path("exemplars"))) for each in (method, candidate)]
        assert name == "dpo" or both[0] == both[1], name


@pytest.mark.slow
@pytest.mark.parametrize(("method", "setting"), [("sft", 0), ("dragon_set", 0)])
def test_a_cell_is_trained_drawn_and_compared(
    bakeoff: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, setting: int
) -> None:
    size = replace(walk.WHOLE, train_prompts=12, pictures=2, draft_steps=4, sampler_steps=4, num_steps=2)
    monkeypatch.setattr(bakeoff, "SIZE", replace(size, exemplars=4))
    monkeypatch.setattr(bakeoff, "TUNING_PROMPTS", 4)
    which = bakeoff.cell("tune", method, setting, 0)
    bakeoff.prepare(tmp_path, "tune")
    assert bakeoff.learns_from_drafts(which) == (method == "sft")
    if method == "sft":
        bakeoff.prepare_drafts(tmp_path, 0)
    (tmp_path / bakeoff.name_of(which) / "run").mkdir(parents=True)  # of a cell that was stopped
    found = json.loads(json.dumps(bakeoff.run_cell(tmp_path, which)))
    assert len(found["wins"]) == 8 and 0.0 <= found["win_rate"] <= 1.0
    assert found["evaluations"]["learning"] > 0 and found["cell_core_seconds"] > found["core_seconds"] > 0.0
    assert (found["own_reward"] is not None) == (method == "dragon_set")
    assert (found["drawing_core_seconds"] > 0.0) == (method == "dragon_set")
    if method == "sft":
        (prepared,) = files.read_jsonl(bakeoff.ROWS)
        assert prepared["phase"] == "prepare" and prepared["drafts_core_seconds"] > 0.0
