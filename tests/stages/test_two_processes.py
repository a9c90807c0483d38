"""`torchrun -m diffalign train` with two processes does what one does with twice the batch."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import diffalign.scorers
from diffalign import cli
from diffalign.common import draws, files
from diffalign.training import loop
from scripts.double_precision import in_float64, keep
from tests.pickapic_files import jpeg, row, write
from tests.tiny_clip import write_open_clip
from tests.two_processes import PLUGINS, two_processes

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


def torchrun(arguments: list[str]) -> None:
    """Two processes as a person starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "diffalign", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def both_succeed(arguments: list[str], folder: Path, **environment: str) -> None:
    """Two forked processes that end well, with the same weights."""
    for rank, ended in enumerate(two_processes(arguments, folder, **environment)):
        assert ended.code == 0, f"process {rank}: {ended.said[-3000:]}"
    first, second = (load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


def trained(out: Path) -> dict[str, torch.Tensor]:
    """Of the last step."""
    return load_file(max((out / "checkpoints").iterdir()) / "trained.safetensors")


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


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_given_pictures(objective: str, tiny_sdxl: str, pairs: Path, tmp_path: Path) -> None:
    given = ["data=pickapic", f"data.path={pairs}", f"objective={objective}", "objective.beta=2000"]
    assert cli.main([*common(tiny_sdxl, tmp_path / "one", 4), *given]) == 0
    two = [*common(tiny_sdxl, tmp_path / "two", 2), *given]
    if objective == "dpo":
        torchrun(two)
    else:
        both_succeed(two, tmp_path / "kept")
    assert distance(tmp_path / "one", tmp_path / "two", beginning(tiny_sdxl, tmp_path)) < 1e-3
    rows = [files.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == STEPS
    for left, right in zip(*rows, strict=True):
        assert left["groups"] == right["groups"] == 4
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "one").iterdir())


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_in_float64_two_processes_are_one_to_rounding(
    kind: str, tiny_sdxl: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps of 2 x 4 pairs and of 1 x 8; errors and losses follow the network's precision."""

    def words(name: str, batch_size: int) -> list[str]:
        given = ["data=pickapic", f"data.path={pairs}", "objective.beta=2000", f"adapter.kind={kind}"]
        kept = [word for word in common(tiny_sdxl, tmp_path / name, batch_size) if "adapter" not in word]
        return [*kept, *given, "num_steps=20", "checkpoint.every=20", "optimizer.lr=1e-4"]

    fit, started = loop.fit, tmp_path / "start.safetensors"

    def fit_in_float64(run: loop.Run) -> dict[str, Any]:
        in_float64(run)
        keep(run, started)
        summary = fit(run)
        keep(run, tmp_path / "one.safetensors")
        return summary

    monkeypatch.setattr(loop, "fit", fit_in_float64)
    assert cli.main(words("one", 8)) == 0
    both_succeed(words("two", 4), tmp_path / "kept", FLOAT64="1")
    one, two = tmp_path / "one.safetensors", tmp_path / "kept" / "rank-0.safetensors"
    assert {tensor.dtype for tensor in load_file(two).values()} == {torch.float64}
    assert distance(one, two, started) <= 1e-9


def test_a_run_of_two_goes_on_as_one_and_back_in_steps_of_one_size(
    tiny_sdxl: str, pairs: Path, tmp_path: Path
) -> None:
    """Stopped by a kill after steps 2 and 4: whoever goes on takes the micro-batches of both."""

    def words(name: str) -> list[str]:
        given = ["data=pickapic", f"data.path={pairs}", "objective.beta=2000", "num_steps=6"]
        return [*common(tiny_sdxl, tmp_path / name, 2), *given, "checkpoint.every=1"]

    both_succeed(words("whole"), tmp_path / "kept-whole")
    two_processes(words("parts"), tmp_path / "kept-1", FAULT="0 3 kill")
    (alone,) = two_processes(words("parts"), tmp_path / "kept-2", count=1, FAULT="0 5 kill")
    assert "going on from step 2 of 6" in alone.said
    both_succeed(words("parts"), tmp_path / "kept-3")
    assert distance(tmp_path / "whole", tmp_path / "parts", beginning(tiny_sdxl, tmp_path)) < 1e-3
    rows = [files.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert [row["groups"] for row in rows[1]] == [row["groups"] for row in rows[0]] == [4.0] * 6


def test_an_infinite_gradient_in_one_process_skips_the_step_in_both(
    tiny_sdxl: str, pairs: Path, tmp_path: Path
) -> None:
    given = ["data=pickapic", f"data.path={pairs}", "objective.beta=2000", "checkpoint.every=1"]
    words = [*common(tiny_sdxl, tmp_path / "out", 2), *given, "num_steps=2", "checkpoint.keep=2"]
    both_succeed(words, tmp_path / "kept", FAULT="1 2 inf")
    rows = files.read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 1]
    first, second = (load_file(path / "trained.safetensors") for path in checkpoints(tmp_path / "out"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any((tensor != 0).any() for name, tensor in first.items() if "lora_B" in name)  # step 1 was taken


def test_a_killed_process_ends_the_other_with_a_line(tiny_sdxl: str, pairs: Path, tmp_path: Path) -> None:
    """No launcher is there to end it."""
    given = ["data=pickapic", f"data.path={pairs}", "objective.beta=2000", "num_steps=100"]
    words = [*common(tiny_sdxl, tmp_path / "out", 2), *given]
    survivor, killed = two_processes(words, tmp_path / "kept", FAULT="1 4 kill")
    assert killed.code == -signal.SIGKILL
    assert survivor.code == 2 and "Traceback" not in survivor.said
    assert survivor.errors == [
        "error: another process of this run has gone: see what it said last; the same command goes on from "
        "the last checkpoint"
    ]
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["step-00000002"]


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own scorer can be named in this process too."""
    path = [*diffalign.scorers.__path__, str(PLUGINS)]
    monkeypatch.setattr(diffalign.scorers, "__path__", path)
    monkeypatch.setattr(diffalign.scorers.__spec__, "submodule_search_locations", path)


DULL = (2, 3, 5, 6)
PROMPTS = [f"a dull thing {k}" if k in DULL else f"a thing {k}" for k in range(8)]
"""The moody scorer finds the pictures of half of them all alike."""


def own(*more: str) -> list[str]:
    """Words of a run that rewards its own pictures of `PROMPTS`."""
    return [
        f"prompts=[{','.join(PROMPTS)}]",
        "scorers=[moody]",
        "objective=dragon",
        "rollout.num_inference_steps=1",
        "rollout.guidance_scale=1",
        *more,
    ]


def decided_pairs(step: int) -> tuple[int, int]:
    """Of the two pairs a process in `step`: how many have a better picture, in process 0 and in process 1."""
    epoch, half = divmod(step, 2)
    order = draws.permutation(8, 0, "rollout-order", epoch).tolist()[4 * half : 4 * half + 4]
    better = [number not in DULL for number in order]
    return sum(better[:2]), sum(better[2:])


def test_undecided_pairs_may_leave_one_process_or_both_without_anything_to_learn(
    moody: None, tiny_sdxl: str, tmp_path: Path
) -> None:
    """A rollout a step: all that is decided in it is one step's mean, whoever drew it, as in one process.

    So is KTO's baseline; at the last step it is far from that of either process's own pictures.
    """
    shares = [decided_pairs(step) for step in range(6)]
    assert shares == [(2, 2), (0, 0), (1, 2), (0, 1), (1, 0), (2, 1)]  # both full, none, some on one side ...
    kto = ("objective.surrogate=kto", "objective.desirable_weight=10")
    more = own(*kto, "num_steps=6", "optimizer.lr=1e-2")
    assert cli.main([*common(tiny_sdxl, tmp_path / "one", 8), *more]) == 0
    both_succeed([*common(tiny_sdxl, tmp_path / "two", 4), *more], tmp_path / "kept")
    rows = [files.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for left, right in zip(*rows, strict=True):
        assert (left["step"], left["kind"]) == (right["step"], right["kind"])
    for found in rows:
        drawn = [row for row in found if row["kind"] == "rollout"]
        assert [row["decided"] for row in drawn] == [sum(share) / 4 for share in shares]
        steps = {row["step"]: row["groups"] for row in found if row["kind"] == "train"}
        assert steps == {step: 2 * sum(share) for step, share in enumerate(shares, 1) if sum(share)}
    for name in ("loss", "baseline"):
        one, two = ([row[name] for row in found if row["kind"] == "train"] for found in rows)
        assert one == pytest.approx(two, rel=1e-3, abs=1e-6) and len(one) == 5
    assert one[-1] > 1e-4
    assert distance(tmp_path / "one", tmp_path / "two", beginning(tiny_sdxl, tmp_path)) < 1e-3
    summary = json.loads((tmp_path / "two" / "manifest.json").read_text())["summary"]
    assert summary["steps"] == 6 and summary["empty_steps"] == 1 and summary["skipped_steps"] == 0


def test_two_processes_stopped_within_a_rollout_go_on_bit_for_bit(tiny_sdxl: str, tmp_path: Path) -> None:
    """Process 1 is asked to end while the second rollout, of steps 4 to 6, is drawn: both save step 4."""

    def words(name: str) -> list[str]:
        more = own("num_steps=5", "rollout.steps=3", "rollout.batch_size=12", "checkpoint.every=100")
        return [*common(tiny_sdxl, tmp_path / name, 2), *more]

    both_succeed(words("whole"), tmp_path / "kept-whole")
    stopped = two_processes(words("parts"), tmp_path / "stopped", MOODY="1 1 stop")
    for ended in stopped:
        assert ended.code == 128 + signal.SIGTERM and "Traceback" not in ended.said, ended.said[-3000:]
    (saved,) = (tmp_path / "parts" / "checkpoints").iterdir()
    assert saved.name == "step-00000004" and "saved step 4" in stopped[0].said
    held = torch.load(saved / "state.pt", weights_only=True)["feed"]["drawn"]
    assert len(held["targets"]) == 12 and len(held["latents"]) == 24
    both_succeed(words("parts"), tmp_path / "kept-parts")
    for name, tensor in load_file(tmp_path / "kept-whole" / "rank-0.safetensors").items():
        for rank in (0, 1):
            parts = load_file(tmp_path / "kept-parts" / f"rank-{rank}.safetensors")
            assert torch.equal(parts[name], tensor), name
    rows = [files.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0] if row["kind"] == "rollout"] == [1, 4]


def test_a_reward_without_a_value_in_one_process_ends_both_with_a_line(
    tiny_sdxl: str, tmp_path: Path
) -> None:
    """The one that knows says which prompt it was, the other that it was not its own mistake."""
    arguments = [*common(tiny_sdxl, tmp_path / "out", 2), *own()]
    other, itself = two_processes(arguments, tmp_path / "kept", MOODY="1 1 nan")
    for ended in (other, itself):
        assert ended.code == 2 and "Traceback" not in ended.said, ended.said[-3000:]
    (line,) = itself.errors
    assert re.match(r"error: scorer moody gives nan for a picture of 'a .*' \(too dark\): leave the", line)
    assert other.errors == ["error: another process has stopped with an error: see its message"]
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_reward_that_breaks_in_one_process_ends_both(tiny_sdxl: str, tmp_path: Path) -> None:
    arguments = [*common(tiny_sdxl, tmp_path / "out", 2), *own()]
    other, itself = two_processes(arguments, tmp_path / "kept", MOODY="1 1 raise")
    assert itself.code == 1 and "RuntimeError: the scorer broke" in itself.said
    assert other.code == 2 and "another process has stopped with an error" in other.said
    assert not (tmp_path / "out" / "adapter").exists()


def test_own_pictures_with_a_reward_of_the_whole_set(tiny_sdxl: str, tmp_path: Path) -> None:
    """Features of both processes make one set, and each trains on what it drew itself."""
    clip = write_open_clip(tmp_path / "clip")
    for k in range(3):
        (tmp_path / "exemplars").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (40 * k, 80, 200 - 40 * k)).save(tmp_path / "exemplars" / f"{k}.png")
    words = [
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
    assert cli.main([*common(tiny_sdxl, tmp_path / "one", 4), *words]) == 0
    both_succeed([*common(tiny_sdxl, tmp_path / "two", 2), *words], tmp_path / "kept")
    one, two = (files.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    first, second = ([r for r in rows if r["kind"] == "rollout"] for rows in (one, two))
    assert [row["pairs"] for row in first] == [row["pairs"] for row in second] == [8.0, 8.0]
    assert first[0]["reward"] == pytest.approx(second[0]["reward"], rel=1e-3)
    assert first[0]["reward_chosen"] == pytest.approx(second[0]["reward_chosen"], rel=1e-3)
    assert first[0]["reward_chosen"] > first[0]["reward"]
    assert distance(tmp_path / "one", tmp_path / "two", beginning(tiny_sdxl, tmp_path)) < 1e-2
