"""`shard=true`: two processes that hold half of the network each do what one does that holds it all."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign import cli
from diffalign.common import files
from diffalign.models.sdxl import Plugin
from tests.pickapic_files import jpeg, row, write
from tests.two_processes import two_processes

GONE = "error: another process of this run has gone: see what it said last; the same command goes on from "


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight decided pairs of pictures of one size, some prompts of which validation holds out."""
    path = tmp_path_factory.mktemp("pairs") / "train-00000-of-00001.parquet"
    rows = [row(f"a {k}", jpeg(60 + 20 * k, (32, 32)), jpeg(40 + k, (32, 32)), (1.0, 0.0)) for k in range(8)]
    write(path, rows)
    return path


def words(model: str, pairs: Path, out: Path, kind: str, *more: str) -> list[str]:
    """A run of three steps."""
    return [
        "train",
        "model=sdxl",
        f"model.path={model}",
        "data=pickapic",
        f"data.path={pairs}",
        f"out={out}",
        "objective.beta=2000",
        f"adapter.kind={kind}",
        f"optimizer.lr={1e-3 if kind == 'lora' else 1e-4}",
        "num_steps=3",
        "checkpoint.every=1",
        "checkpoint.keep=9",
        "log_every=1",
        "preprocess.resolution=32",
        *more,
    ]


def both(arguments: list[str], folder: Path, **environment: str) -> None:
    """Two processes that hold parts of the network, and end well."""
    for ended in two_processes([*arguments, "shard=true"], folder, **environment):
        assert ended.code == 0 and "Traceback" not in ended.said, ended.said[-3000:]


def trained(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / "trained.safetensors")


def distance(a: Path, b: Path, start: dict[str, torch.Tensor], step: int) -> float:
    """`||dtheta_a - dtheta_b|| / ||dtheta_a||` over all trained tensors."""
    first, second = trained(a, step), trained(b, step)
    assert first.keys() == second.keys() == start.keys()
    assert all(tensor.shape == second[name].shape for name, tensor in first.items())
    apart = sum(float((tensor - second[name]).square().sum()) for name, tensor in first.items())
    moved = sum(float((tensor - start[name]).square().sum()) for name, tensor in first.items())
    return (apart / moved) ** 0.5


def written_by(out: Path) -> list[Path]:
    """All files of a run but TensorBoard's, whose names tell the time."""
    return [path for path in out.rglob("*") if path.is_file() and "tfevents" not in path.name]


def beginning(model: str, kind: str, rank: int = 16) -> dict[str, torch.Tensor]:
    """What is trained, at step 0."""
    from diffalign.models._spec import AdapterSpec

    loaded = Plugin(path=model).load()
    loaded.start_training(AdapterSpec(kind=kind, rank=rank), seed=0, with_reference=False)
    return {name: tensor.detach().clone() for name, tensor in loaded.trained_state().items()}


def test_a_full_network_in_halves(tiny_sdxl: str, pairs: Path, tmp_path: Path) -> None:
    """Also held-out accuracy and pictures, for which both run the network, and recomputed activations."""
    more = ["validation.share=0.3", "samples.prompts=[a cat]", "samples.num_inference_steps=2"]
    more += ["model.gradient_checkpointing=true"]
    one, two = (
        words(tiny_sdxl, pairs, tmp_path / name, "full", *more, f"loader.batch_size={size}")
        for name, size in (("one", 6), ("two", 3))
    )
    assert cli.main(one) == 0
    both(two, tmp_path / "kept")
    start = beginning(tiny_sdxl, "full")
    assert distance(tmp_path / "one", tmp_path / "two", start, step=3) < 1e-3
    rows = [files.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for left, right in zip(*rows, strict=True):
        assert (left["step"], left["kind"]) == (right["step"], right["kind"])
        for name in left.keys() & {"loss", "grad_norm", "error_margin"}:
            assert left[name] == pytest.approx(right[name], rel=1e-2)
    assert [row["step_0"]["margin_abs_max"] for row in rows[1] if "step_0" in row] == [0.0]
    # The same files, with the weights of the last step, for whoever loads them.
    kept = [
        sorted(str(p.relative_to(tmp_path / n)) for p in written_by(tmp_path / n)) for n in ("one", "two")
    ]
    assert kept[0] == kept[1] and "samples/step-00000003.png" in kept[1]
    unets = [tmp_path / name / "adapter" / "unet" for name in ("one", "two")]
    configs = [files.read_json(unet / "config.json") for unet in unets]
    del configs[0]["_name_or_path"]  # where the base was
    assert configs[0] == configs[1]
    written = load_file(unets[1] / "diffusion_pytorch_model.safetensors")
    last = trained(tmp_path / "two", 3)
    assert written.keys() == last.keys() and all(torch.equal(t, last[n]) for n, t in written.items())
    # Half of policy and reference each; what cannot be halved evenly is with the first.
    whole = 2 * sum(tensor.numel() for tensor in start.values())
    held = [int((tmp_path / "kept" / f"rank-{rank}.held").read_text()) for rank in (0, 1)]
    assert sum(held) == whole
    assert held[0] == pytest.approx(whole / 2, rel=0.01)


def test_an_adapter_in_halves_with_passes_that_come_before_the_step(
    tiny_sdxl: str, pairs: Path, tmp_path: Path
) -> None:
    """KTO's baseline is of the whole step; rank 3 cannot be halved evenly."""
    one, two = (
        words(tiny_sdxl, pairs, tmp_path / name, "lora", "objective=kto", "adapter.rank=3", *size)
        for name, size in (("one", ["loader.batch_size=8"]), ("two", ["loader.batch_size=4"]))
    )
    assert cli.main(one) == 0
    both(two, tmp_path / "kept")
    assert distance(tmp_path / "one", tmp_path / "two", beginning(tiny_sdxl, "lora", 3), step=3) < 1e-3
    rows = [files.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for name in ("loss", "baseline", "grad_norm"):
        first, second = ([row[name] for row in found] for found in rows)
        assert first == pytest.approx(second, rel=1e-3)
    adapters = [
        load_file(tmp_path / n / "adapter" / "pytorch_lora_weights.safetensors") for n in ("one", "two")
    ]
    assert {n: t.shape for n, t in adapters[0].items()} == {n: t.shape for n, t in adapters[1].items()}


def test_a_run_in_halves_goes_on_whole_and_back(tiny_sdxl: str, pairs: Path, tmp_path: Path) -> None:
    """Ended by kills after steps 2 and 4; batches of 3, 3 and 2 pairs, so that the two differ in shape."""

    def run(name: str, *more: str) -> list[str]:
        return words(tiny_sdxl, pairs, tmp_path / name, "full", "num_steps=6", "loader.batch_size=3", *more)

    assert cli.main(run("whole", "accumulation=2")) == 0
    survivor, killed = two_processes([*run("parts"), "shard=true"], tmp_path / "kept", FAULT="1 3 kill")
    assert killed.code == -signal.SIGKILL
    assert survivor.code == 2 and "Traceback" not in survivor.said, survivor.said[-3000:]
    assert survivor.errors == [f"{GONE}the last checkpoint"]
    (alone,) = two_processes(run("parts"), tmp_path / "kept", count=1, FAULT="0 5 kill")
    assert "going on from step 2 of 6" in alone.said
    both(run("parts"), tmp_path / "kept")
    start = beginning(tiny_sdxl, "full")
    for step in (2, 4, 6):
        assert distance(tmp_path / "whole", tmp_path / "parts", start, step) < 1e-3
    groups = [
        [row["groups"] for row in files.read_jsonl(tmp_path / n / "metrics.jsonl")]
        for n in ("whole", "parts")
    ]
    assert groups[0] == groups[1] and sorted(set(groups[1])) == [5.0, 6.0]


def test_an_infinite_gradient_in_one_half_skips_the_step_in_both(
    tiny_sdxl: str, pairs: Path, tmp_path: Path
) -> None:
    more = ["adapter.rank=2", "model.dtype=bf16", "precision=bf16", "loader.batch_size=2"]
    both(words(tiny_sdxl, pairs, tmp_path / "out", "lora", *more), tmp_path / "kept", FAULT="1 2 inf")
    rows = files.read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1]
    assert rows[0]["step_0"]["margin_abs_max"] == 0.0
    first, second, third = (trained(tmp_path / "out", step) for step in (1, 2, 3))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, third[name]) for name, tensor in second.items())
