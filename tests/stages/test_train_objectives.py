"""Every objective through `diffalign train`, on both backbones, with a LoRA and with full weights."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign import cli
from diffalign.common import files, plugins
from tests.tiny_clip import write_open_clip
from tests.tiny_training import picture

PROMPTS = ("a red circle", "a blue square", "a square on a circle", "a red square")
EXEMPLARS = "EXEMPLARS"

GIVEN: dict[str, tuple[str, list[str]]] = {
    "dpo": ("pairs", ["objective=dpo"]),
    "sft": ("pairs", ["objective=sft"]),
    "mapo": ("pairs", ["objective=mapo", "objective.beta=0.1"]),
    "smpo": ("pairs", ["objective=smpo", "objective.inversion_steps=2"]),
    "kto": ("pairs", ["objective=kto"]),
    "rankdpo": ("lists", ["objective=rankdpo"]),
    "rankdpo-two": ("lists", ["objective=rankdpo", "objective.passes=two"]),
}
"""Objectives of given pictures: which of the two files they learn from, and their words."""

OWN: dict[str, list[str]] = {
    "dragon-instance": [],
    "dragon-exemplar": ["objective.reward=exemplar", "objective.measure=mean_cosine", EXEMPLARS],
    "dragon-set": ["objective.reward=set", "objective.measure=mmd", EXEMPLARS],
}
"""DRAGON's three kinds of reward."""

NAMES = [*GIVEN, *OWN]
ELSEWHERE = {("dpo", "sdxl", "lora"), ("sft", "sdxl", "lora"), ("sft", "sd", "full")}
"""What test_train.py has."""

KINDS = (("sd", "lora"), ("sdxl", "lora"), ("sd", "full"))
CASES = [each for name in NAMES for kind in KINDS if (each := (name, *kind)) not in ELSEWHERE]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scored pictures as four pairs and as four lists of three, two exemplars and a tiny CLIP."""
    folder = tmp_path_factory.mktemp("inputs")
    for number in range(12):
        picture(number).save(folder / f"{number}.png")
    (folder / "exemplars").mkdir()
    for number in (0, 1):
        picture(20 + number).save(folder / "exemplars" / f"{number}.png")
    for what, size in (("pairs", 2), ("lists", 3)):
        rows = []
        for group, prompt in enumerate(PROMPTS):
            candidates = [
                {
                    "image": f"../{size * group + place}.png",
                    "scores": {
                        "pickscore": {"value": 0.21 - 0.01 * place, "scale": "cosine", "version": "1"},
                        "other": {"value": (5.0, 3.0, 4.0)[place], "scale": "s", "version": "1"},
                    },
                    **({"label": 1.0 - place} if what == "pairs" else {}),
                }
                for place in range(size)
            ]
            rows.append({"id": f"{what}-{group}", "prompt": prompt, "candidates": candidates})
        (folder / what).mkdir()
        (folder / what / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_open_clip(folder / "clip")
    return folder


def words(name: str, model: str, base: str, kind: str, inputs: Path, out: Path) -> list[str]:
    """Two steps of two groups."""
    common = [
        "train",
        f"model={model}",
        f"model.path={base}",
        f"out={out}",
        f"adapter.kind={kind}",
        *(["adapter.rank=2"] if kind == "lora" else []),
        "optimizer.lr=1e-3",
        "loader.batch_size=2",
        "num_steps=2",
        "log_every=1",
        "checkpoint.every=1",
        "preprocess.resolution=32",
    ]
    if name in GIVEN:
        source, chosen = GIVEN[name]
        ranged = ["objective.reward_min=0.1", "objective.reward_max=0.3"] if name == "smpo" else []
        return [*common, "data=jsonl", f"data.path={inputs / source}", *chosen, *ranged]
    own = [f"objective.exemplars={inputs / 'exemplars'}" if w == EXEMPLARS else w for w in OWN[name]]
    return [
        *common,
        f"prompts=[{','.join(PROMPTS)}]",
        f"scorers={{clip: {{path: {inputs / 'clip'}}}}}",
        "objective=dragon",
        *own,
        "rollout.steps=2",
        "rollout.num_inference_steps=1",
        "rollout.guidance_scale=1",
    ]


def test_no_objective_is_left_out() -> None:
    """A new plug-in of objectives fails here until it has its row."""
    covered = {plugins.resolve("objectives", name.split("-")[0]) for name in NAMES}
    assert covered == set(plugins.names("objectives"))


@pytest.mark.parametrize(("name", "model", "kind"), CASES, ids=["-".join(each) for each in CASES])
def test_two_steps_train_and_end_with_weights_that_a_stopped_run_ends_with_too(
    name: str,
    model: str,
    kind: str,
    inputs: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Step 0 has the loss that is known where policy and reference agree; the last step's weights are kept.

    A run that has its first step only goes on to the same bits; one that has both is finished.
    """
    base = request.getfixturevalue(f"tiny_{model}")
    out = tmp_path / "out"
    arguments = words(name, model, base, kind, inputs, out)
    assert cli.main(arguments) == 0
    said = capsys.readouterr().err
    rows = [row for row in files.read_jsonl(out / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2] and all(math.isfinite(row["loss"]) for row in rows)
    _check_step_zero(name, said, rows[0])
    first, last = (out / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
    trained = load_file(last / "trained.safetensors")
    before = load_file(first / "trained.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in trained.values())
    assert any(not torch.equal(tensor, before[key]) for key, tensor in trained.items())
    _check_weights(out / "adapter", base, kind)

    for written in ("manifest.json", "adapter", "checkpoints/step-00000002"):
        path = out / written
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert cli.main(arguments) == 0
    assert "going on from step 1 of 2" in capsys.readouterr().err
    for key, tensor in load_file(last / "trained.safetensors").items():
        assert torch.equal(tensor, trained[key]), key
    assert cli.main(arguments) == 0
    assert "finished after 2 steps; nothing to do" in capsys.readouterr().err


def _check_step_zero(name: str, said: str, row: dict[str, float]) -> None:
    """The first line of metrics, and what the run says of it, against the value worked out here."""
    expected = {
        "dpo": math.log(2.0),
        "smpo": math.log(2.0),
        "kto": 0.5,
        "rankdpo": math.log(2.0) * row.get("weight", math.nan),
        "dragon": math.log(2.0),
    }.get(name.split("-")[0])
    found = re.search(r"step 0: loss (\S+) \((\S+) expected\), largest \|logit\| (\S+) \(0 expected\)", said)
    assert (found is None) == (expected is None)
    if expected is None or found is None:
        return
    assert row["loss"] == pytest.approx(expected, rel=1e-6)
    assert [float(number) for number in found.groups()] == pytest.approx([expected, expected, 0.0], abs=1e-6)


def _check_weights(adapter: Path, base: str, kind: str) -> None:
    """A LoRA whose second matrices have left 0, or a whole network that is not the base any more."""
    if kind == "lora":
        weights = load_file(adapter / "pytorch_lora_weights.safetensors")
        ups = [tensor for key, tensor in weights.items() if "lora_B" in key or "lora.up" in key]
        assert ups and all(bool(tensor.any()) for tensor in ups)
        return
    name = "unet/diffusion_pytorch_model.safetensors"
    weights, start = load_file(adapter / name), load_file(f"{base}/{name}")
    assert set(weights) == set(start)
    assert sum(not torch.equal(weights[key], start[key]) for key in start) > 0.9 * len(start)
