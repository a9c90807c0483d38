"""What the bake-off concludes from its rows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
GAIN = {"estimate": 0.1, "low": 0.02, "high": 0.2, "n": 4, "level": 0.95}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bakeoff_report.py as a module; it imports its neighbours by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("bakeoff_report", SCRIPTS / "bakeoff_report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bakeoff_report", module)
    spec.loader.exec_module(module)
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


def test_the_bars_can_be_met_and_missed(report: Any) -> None:
    tested = {
        "dpo": [row("test", "dpo", 0, 0, "22" * 20)],
        "mapo": [row("test", "mapo", 0, 0, "20" * 20)],
        "dragon_set": [
            row("test", "dragon_set", 0, seed, "11", own_reward={"gain": GAIN}) for seed in (0, 1)
        ],
    }
    assert list(report.bars(tested, ("dragon_set",)).values()) == [True, False, True]
    tested["dragon_set"][1]["own_reward"] = {"gain": {**GAIN, "low": -0.01}}
    assert list(report.bars(tested, ("dragon_set",)).values()) == [True, False, False]


def test_the_page_shows_every_setting_and_what_it_took(report: Any) -> None:
    rows = [row("tune", "dpo", 0, 0, "1122"), row("tune", "dpo", 1, 0, "2222")]
    rows.append(row("test", "dpo", 1, 0, "22222211"))
    rows.append(row("asked", "dpo", 0, 0, "2222"))
    rows.append(row("test", "dpo", 0, 0, "0000"))  # of a setting that was chosen once: not pooled
    rows.append({"phase": "prepare", "seed": 1, "drafts_core_seconds": 500.0, "cell_core_seconds": 1800.0})
    text = report.as_markdown(rows, ["dpo", "sft"], ("dragon_set",))
    assert text.count("**dpo**") == 1 and "Asked afterwards" in text
    assert "5 cells, 3.0 hours of one core" in text
    assert "| dpo | lr 0.0001, groups 16 | 0.750 | +10.0 | - |" in text
    assert "| **dpo** | lr 0.0002, groups 16 | 1.000 | +10.0 | - |" in text
    # 0.875 of the pictures won: 37.5 points above one half, for 20,000 or 50,000 evaluations.
    assert "| dpo | 20,000 | 1.88 | 50,000 | 0.75 | 300 | 800 | 1.50 | 0.050, 0.100 |" in text
    assert "| dpo beats the base: interval above one half | yes |" in text
    assert "sft" not in text
