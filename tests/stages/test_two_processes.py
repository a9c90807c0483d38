"""`torchrun -m diffalign train` with two processes does what one does with twice the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffalign import cli
from diffalign.common import files
from tests.pickapic_files import jpeg, row, write
from tests.tiny_clip import write_open_clip

STEPS = 3


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight decided pairs of pictures of one size."""
    path = tmp_path_factory.mktemp("pairs") / "train-00000-of-00001.parquet"
    rows = [row(f"a {k}", jpeg(60 + 20 * k, (32, 32)), jpeg(40 + k, (32, 32)), (1.0, 0.0)) for k in range(8)]
    write(path, rows)
    return path


def common(model: str, out: Path, batch_size: int) -> list[str]:
    return [
        "train",
        "model=sdxl",
        f"model.path={model}",
        f"out={out}",
        f"loader.batch_size={batch_size}",
        "adapter.rank=2",
        "optimizer.lr=1e-3",
        f"num_steps={STEPS}",
        "checkpoint.every=2",
        "log_every=1",
        "preprocess.resolution=32",
    ]


def two_processes(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "diffalign", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def trained(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{STEPS:08d}" / "trained.safetensors")


def distance(out: Path, other: Path, start: Path) -> float:
    """`||dtheta_a - dtheta_b|| / ||dtheta_a||` over all trained tensors."""
    a, b, zero = (torch.cat([t.flatten() for t in trained_at(p).values()]) for p in (out, other, start))
    return float((a - b).norm() / (a - zero).norm())


def trained_at(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix else trained(path)


def beginning(model: str, tmp_path: Path) -> Path:
    """The adapter of step 0."""
    from safetensors.torch import save_file

    from diffalign.models._spec import AdapterSpec
    from diffalign.models.sdxl import Plugin

    loaded: Any = Plugin(path=model).load()
    loaded.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
    path = tmp_path / "start.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in loaded.trained_state().items()}, path)
    return path


@pytest.mark.parametrize("objective", ["objective=dpo", "objective=kto"])
def test_given_pictures(objective: str, tiny_sdxl: str, pairs: Path, tmp_path: Path) -> None:
    given = ["data=pickapic", f"data.path={pairs}", objective, "objective.beta=2000"]
    assert cli.main([*common(tiny_sdxl, tmp_path / "one", 4), *given]) == 0
    two_processes([*common(tiny_sdxl, tmp_path / "two", 2), *given])
    assert distance(tmp_path / "one", tmp_path / "two", beginning(tiny_sdxl, tmp_path)) < 1e-3
    one, two = (files.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == STEPS
    for left, right in zip(one, two, strict=True):
        assert left["groups"] == right["groups"] == 4
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "one").iterdir())


def test_own_pictures_of_which_a_process_may_have_none_that_is_better(tiny_sdxl: str, tmp_path: Path) -> None:
    """The grader finds nothing in random pictures, so most steps are empty in one process or in both."""
    own = [
        "prompts=[a red circle on a white background,a blue square on a black background]",
        "scorers=[scene]",
        "objective=dragon",
        "objective.surrogate=kto",
        "rollout.num_inference_steps=1",
        "rollout.guidance_scale=1",
    ]
    two_processes([*common(tiny_sdxl, tmp_path / "two", 2), *own])
    rows = files.read_jsonl(tmp_path / "two" / "metrics.jsonl")
    drawn = [row for row in rows if row["kind"] == "rollout"]
    assert len(drawn) == STEPS and any(row["decided"] < 1.0 for row in drawn)


def test_own_pictures_with_a_reward_of_the_whole_set(tiny_sdxl: str, tmp_path: Path) -> None:
    """Features of both processes make one set, and each trains on what it drew itself."""
    clip = write_open_clip(tmp_path / "clip")
    for k in range(3):
        (tmp_path / "exemplars").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (40 * k, 80, 200 - 40 * k)).save(tmp_path / "exemplars" / f"{k}.png")
    own = [
        "prompts=[a ring,a cube,a cat]",
        f"scorers={{clip: {{path: {clip}}}}}",
        "objective=dragon",
        "objective.reward=set",
        "objective.measure=mmd",
        f"objective.exemplars={tmp_path / 'exemplars'}",
        "rollout.steps=2",
        "rollout.num_inference_steps=2",
        "rollout.guidance_scale=1",
        "rollout.batch_size=4",
    ]
    assert cli.main([*common(tiny_sdxl, tmp_path / "one", 4), *own]) == 0
    two_processes([*common(tiny_sdxl, tmp_path / "two", 2), *own])
    one, two = (files.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    first, second = ([r for r in rows if r["kind"] == "rollout"] for rows in (one, two))
    assert [row["pairs"] for row in first] == [row["pairs"] for row in second] == [8.0, 8.0]
    assert first[0]["reward"] == pytest.approx(second[0]["reward"], rel=1e-3)
    assert first[0]["reward_chosen"] == pytest.approx(second[0]["reward_chosen"], rel=1e-3)
    assert first[0]["reward_chosen"] > first[0]["reward"]
    assert distance(tmp_path / "one", tmp_path / "two", beginning(tiny_sdxl, tmp_path)) < 1e-2
