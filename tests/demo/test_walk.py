"""The whole street, through the command's own function, at the smallest size that still has every stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from diffalign.common.errors import UserError
from diffalign.demo import demo, embedded, walk
from diffalign.demo.methods import METHODS
from diffalign.scenes import is_held_out, parse

SMALLEST = walk.Size(
    train_prompts=12,
    pictures=2,
    test_prompts=3,
    test_seeds=1,
    sampler_steps=6,
    batch_size=12,
    num_steps=2,
)
FEW = replace(METHODS["tiny-sdxl"]["dpo"], groups=4)


@pytest.fixture(scope="module", params=sorted(walk.SIZES))
def walked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A finished walk with each embedded model, and its report."""
    out = tmp_path_factory.mktemp(request.param)
    size = replace(SMALLEST, base=request.param)
    return out, walk.walk(out, size, method=FEW, seed=0, recipe={"seed": 0})


def test_every_stage_leaves_its_files(walked: tuple[Path, dict]) -> None:
    out, _ = walked
    for name in (
        "1-pictures/images.jsonl",
        "2-graded/scores.jsonl",
        "3-pairs/preferences.jsonl",
        "4-run/adapter/pytorch_lora_weights.safetensors",
        "4-run/adapter/README.md",
        "4-run/metrics.jsonl",
        "5-base-graded/scores.jsonl",
        "5-aligned-graded/scores.jsonl",
        "6-report/report.json",
        "report.json",
    ):
        assert (out / name).is_file(), name
    assert (out / "6-report" / "report.html").is_file()
    with Image.open(out / "6-report" / "grid.png") as grid:
        assert min(grid.size) > 64


def test_report_counts_what_was_drawn(walked: tuple[Path, dict]) -> None:
    """Three prompts, one seed: three comparisons; the win rate is a multiple of 1/6 (a tie is a half)."""
    out, report = walked
    assert report["n"] == 3
    assert report["win_rate"] * 6 == pytest.approx(round(report["win_rate"] * 6))
    assert report["interval"][0] <= report["win_rate"] <= report["interval"][1]
    assert json.loads((out / "report.json").read_text())["win_rate"] == report["win_rate"]
    first = json.loads((out / "4-run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 2
    pairs = len((out / "3-pairs" / "preferences.jsonl").read_text().splitlines())
    manifest = json.loads((out / "4-run" / "manifest.json").read_text())
    assert manifest["counts"] == {"asked": pairs, "used": pairs, "dropped": {}}
    assert 0 < first["groups"] <= 2 * FEW.groups


def test_walking_again_does_nothing_again(walked: tuple[Path, dict]) -> None:
    out, report = walked
    weights = out / "4-run" / "adapter" / "pytorch_lora_weights.safetensors"
    before = weights.stat().st_mtime_ns
    size = replace(SMALLEST, base=next(name for name in walk.SIZES if out.name.startswith(name)))
    again = walk.walk(out, size, method=FEW, seed=0, recipe={"seed": 0})
    assert again["win_rate"] == report["win_rate"]
    assert weights.stat().st_mtime_ns == before


def test_prompts_of_training_tuning_and_report_are_disjoint() -> None:
    train = set(walk.train_prompts(256))
    tuning = set(walk.held_out_prompts(250, tuning=True))
    report = set(walk.held_out_prompts(250))
    assert len(train) == 256
    assert len(tuning) == len(report) == 250
    assert not (train & tuning or train & report or tuning & report)
    assert not any(is_held_out(parse(prompt)) for prompt in train)
    assert all(is_held_out(parse(prompt)) for prompt in tuning | report)


def test_unknown_embedded_model_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'tiny-sdxl'"):
        embedded("tiny-sdx")


def test_quick_and_whole_demo_do_not_share_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody should have to clean up between the first look and the whole demo, nor between two models."""
    seen = []
    monkeypatch.setattr(walk, "walk", lambda out, size, **rest: seen.append((out.name, size)) or {})
    for options in ({"quick": True}, {}, {"model": "tiny-sd3"}, {"model": "tiny-sd3", "quick": True}):
        demo(**options)
    assert seen == [
        ("diffalign-demo-quick", walk.quick(walk.WHOLE)),
        ("diffalign-demo", walk.WHOLE),
        ("diffalign-demo-tiny-sd3", walk.WHOLE_SD3),
        ("diffalign-demo-tiny-sd3-quick", walk.quick(walk.WHOLE_SD3)),
    ]


def test_what_a_demo_has_no_settings_for_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown objective of the demo of tiny-sd3 'kto'"):
        demo(model="tiny-sd3", objective="kto")
    with pytest.raises(UserError, match=r"unknown model of the demo 'tiny-sd': did you mean 'tiny-sd3'"):
        demo(model="tiny-sd")
