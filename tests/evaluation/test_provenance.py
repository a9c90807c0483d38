"""Where pictures come from, and the curves of the run behind them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.common import manifest
from diffalign.common.errors import UserError
from diffalign.evaluation.curves import read_panels
from diffalign.evaluation.provenance import Origin, given_run, shortened, trace, unlike

RECIPE = {
    "model": {"name": "sdxl", "path": "base"},
    "seeds": [0],
    "guidance_scale": 5.0,
    "adapter_weight": 0.5,
}


def row(step: int, kind: str = "train", **values: object) -> str:
    return json.dumps({"step": step, "kind": kind, **values}) + "\n"


def write_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rows = [row(k, loss=0.7, err_w_vs_ref=-k * 1e-3, err_l_vs_ref=k * 1e-3) for k in (10, 20)]
    rows.append(row(20, "validation", implicit_accuracy={"estimate": 0.625, "low": 0.5, "high": 0.7}))
    (folder / "metrics.jsonl").write_text("".join(rows))
    recipe = {"objective": {"name": "diffusion_dpo", "beta": 2000.0}, "seed": 7, "num_steps": 20}
    manifest.write_manifest(folder, stage="train", recipe=recipe, extra={"summary": {"steps": 20}})
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_bytes(b"weights")
    return folder


@pytest.fixture
def street(tmp_path: Path) -> dict[str, Path]:
    """A run, pictures drawn with its adapter, and their scores."""
    run, drawn, scored = write_run(tmp_path / "run"), tmp_path / "drawn", tmp_path / "scored"
    adapter = run / "adapter"
    (drawn / "images").mkdir(parents=True)
    (drawn / "images" / "0.png").touch()
    recipe = {**RECIPE, "adapter": str(adapter)}
    manifest.write_manifest(drawn, stage="generate", recipe=recipe, inputs={"adapter adapter": str(adapter)})
    scorers = {"scene": {"scale": "share", "version": "1"}}
    manifest.write_manifest(scored, stage="score", recipe={"images": "gone"}, extra={"scorers": scorers})
    return {"run": run, "drawn": drawn, "scored": scored}


def traced(street: dict[str, Path]) -> Origin:
    return trace("scored", street["scored"] / "scores.jsonl", street["scored"] / "../drawn/images/0.png")


def test_the_whole_street_is_found_from_the_scores(street: dict[str, Path]) -> None:
    origin = traced(street)
    assert list(origin.manifests) == ["score", "generate", "train"] and origin.run == street["run"]
    rows = dict(origin.rows())
    assert rows["pictures"] == "scored" and rows["model"] == "sdxl base"
    assert rows["adapters"].endswith("run/adapter * 0.5") and rows["settings"] == "guidance_scale=5.0"
    assert (
        rows["scorers"] == "scene (share, version 1)"
        and rows["trained with"] == "diffusion_dpo (beta=2000.0)"
    )
    assert (rows["training seed"], rows["training steps"]) == ("7", "20")
    assert rows["train: identity"] == origin.manifests["train"]["recipe_identity"][:16]
    assert "torch " in rows["generate: made"]


def test_an_adapter_that_has_changed_since_is_not_the_one(street: dict[str, Path]) -> None:
    (street["run"] / "adapter" / "weights").write_bytes(b"others")
    origin = traced(street)
    assert origin.run is None and list(origin.manifests) == ["score", "generate"]


def test_folders_without_manifests_are_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{broken")
    origin = trace("x", tmp_path, tmp_path / "0.png")
    assert origin.manifests == {} and origin.run is None and origin.rows() == [("pictures", "x")]
    (tmp_path / "manifest.json").write_text('["a list"]')
    assert trace("x", tmp_path, tmp_path / "0.png").manifests == {}


def test_a_run_may_be_named(street: dict[str, Path], tmp_path: Path) -> None:
    origin = Origin("x")
    given_run(origin, str(street["run"]))
    assert origin.run == street["run"] and "train" in origin.manifests
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl: give the output folder of train"):
        given_run(origin, str(tmp_path / "nowhere"))


def test_sides_that_were_drawn_unlike_are_told() -> None:
    def drawn(**changes: object) -> Origin:
        return Origin("x", {"generate": {"stage": "generate", "recipe": {**RECIPE, **changes}}})

    assert unlike(drawn(), drawn(adapter="lora", out="elsewhere", batch_size=2)) == []
    assert unlike(drawn(), drawn(guidance_scale=7.5)) == ["guidance_scale 5.0 in base, 7.5 in the other"]
    other = {"name": "sdxl", "path": "other"}
    assert unlike(drawn(), drawn(model=other)) == [
        "model name=sdxl, path=base in base, name=sdxl, path=other in the other"
    ]
    assert unlike(drawn(), Origin("y")) == []


def test_long_manifests_are_cut() -> None:
    cut = shortened(
        {"files": {str(k): {"size": 1} for k in range(1000)}, "ids": list(range(1000)), "t": "x" * 9999}
    )
    assert len(cut["files"]) == 25 and cut["files"]["..."] == "976 more"
    assert cut["ids"][-1] == "... 976 more" and len(cut["t"]) == 400


def test_panels_of_a_run(street: dict[str, Path]) -> None:
    panels = {panel.title: panel for panel in read_panels(street["run"])}
    assert list(panels) == ["Denoising error, trained minus reference", "Accuracy", "Loss"]
    won, lost = panels["Denoising error, trained minus reference"].lines
    assert (won.x, won.y) == ([10, 20], [-0.01, -0.02]) and lost.y == [0.01, 0.02]
    (held_out,) = panels["Accuracy"].lines
    assert (held_out.name, held_out.x, held_out.y) == ("held-out pairs", [20], [0.625])


def test_numbers_that_are_none_and_torn_lines_are_left_out(tmp_path: Path) -> None:
    rows = [
        row(1, loss=None),
        row(2, loss=0.5),
        row(3, loss="x"),
        row(4, loss=True),
        '{"step": 5, "kind": "tr',
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    (panel,) = read_panels(tmp_path)
    assert panel.lines[0].x == [2]
    (tmp_path / "metrics.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a valid JSON line"):
        read_panels(tmp_path)
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        read_panels(tmp_path / "nowhere")


@pytest.mark.parametrize("path", ["x" * 5000, "/dev/null", "a\0b", "."])
def test_an_adapter_that_cannot_be_looked_at_is_none(path: str, tmp_path: Path) -> None:
    """Manifests are files of others: what one names must not stop a report."""
    content = {"stage": "generate", "recipe": {}, "inputs": {"adapter a": {"path": path}}}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert trace("pictures", tmp_path, tmp_path / "0.png").run is None


def test_numbers_beyond_all_charts_are_left_out(tmp_path: Path) -> None:
    values = [0.7, 1e308, -1e308, float("nan"), 10**400]
    rows = [row(step, loss=value) for step, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows) + row(10**400, loss=0.6))
    (panel,) = read_panels(tmp_path)
    assert panel.lines[0].y == [0.7]
