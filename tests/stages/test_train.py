"""`diffalign train` through the command line: what it leaves, what it refuses, how it stops and goes on."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign import cli
from diffalign.common import files, plugins
from diffalign.models.sd3 import Plugin as SD3
from diffalign.stages.train import train
from diffalign.training.specs import Settings
from tests.pickapic_files import jpeg, row, write

LIGHT, DARK = jpeg(200, (32, 32)), jpeg(40, (32, 32))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six decided pairs of four captions, a tie, a row without label and one with a broken picture."""
    path = tmp_path_factory.mktemp("pairs") / "train-00000-of-00001.parquet"
    rows = [row(f"a {name}", LIGHT, DARK, (1.0, 0.0)) for name in ("cat", "dog", "cow", "hen")]
    rows += [row("a cat", DARK, jpeg(90, (48, 32)), (0.0, 1.0)), row("a dog", DARK, LIGHT, (0.0, 1.0))]
    rows += [row("a tie", labels=(0.5, 0.5)), row(has_label=False), row("a bee", LIGHT[:40], DARK)]
    write(path, rows)
    return path


def words(base: str, pairs: Path, out: Path, *more: str) -> list[str]:
    return [
        "train",
        "model=sdxl",
        f"model.path={base}",
        "data=pickapic",
        f"data.path={pairs}",
        "data.max_bad_share=0.2",
        f"out={out}",
        "objective=dpo",
        "adapter.rank=2",
        "optimizer.lr=1e-3",
        "num_steps=4",
        "checkpoint.every=2",
        "log_every=2",
        *more,
    ]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that a refusal prints."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def finished(tiny_sdxl: str, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    arguments = words(tiny_sdxl, pairs, out, "validation.share=0.5", "validation.draws=2", "accumulation=2")
    assert cli.main(arguments) == 0
    return out


def test_what_a_run_leaves(finished: Path, pairs: Path) -> None:
    inside = sorted(path.name for path in finished.iterdir())
    assert inside == [
        ".lock", "adapter", "checkpoints", "manifest.json", "metrics.jsonl", "recipe.json", "tensorboard",
    ]  # fmt: skip
    manifest = json.loads((finished / "manifest.json").read_text())
    name = pairs.name
    assert manifest["counts"] == {
        "asked": 9, "used": 6, "dropped": {"tie": 1, "unlabelled": 1, "corrupt_image": 1},
    }  # fmt: skip
    assert manifest["dropped"] == {
        "tie": [f"{name}:6"], "unlabelled": [f"{name}:7"], "corrupt_image": [f"{name}:8"],
    }  # fmt: skip
    assert manifest["summary"]["steps"] == 4 and manifest["summary"]["skipped_steps"] == 0
    assert 0.0 <= manifest["summary"]["implicit_accuracy"]["estimate"] <= 1.0
    rows = files.read_jsonl(finished / "metrics.jsonl")
    assert [(row["step"], row["kind"]) for row in rows] == [(2, "train"), (4, "train"), (4, "validation")]
    assert {
        "loss",
        "accuracy",
        "err_w_vs_ref",
        "err_l_vs_ref",
        "gradient_factor",
        "saturated",
        "grad_norm",
    } < set(rows[0])
    assert rows[0]["by_timestep"] and rows[0]["groups"] == 4  # 2 steps of 2 micro-batches of 1 pair
    steps = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert steps == ["step-00000002", "step-00000004"]


def test_the_card_shows_how_to_load_the_adapter(finished: Path, tiny_sdxl: str, tmp_path: Path) -> None:
    """Its code draws a picture once the two paths are filled in; its YAML names base and recipe."""
    card = (finished / "adapter" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    source = code[1].replace("path/to/this/folder", str(finished / "adapter"))
    assert f'from_pretrained("{tiny_sdxl}")' in source
    scope: dict[str, Any] = {}
    exec(source.replace('"a prompt"', '"a prompt", num_inference_steps=1'), scope)
    assert scope["image"].size == (32, 32)
    assert card.startswith("---\nlibrary_name: diffusers\n")  # the hub refuses a base_model that is a path
    assert "beta: 5000.0" in card and "steps: 4" in card


def test_the_same_command_on_a_finished_run_says_so(
    finished: Path, tiny_sdxl: str, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    again = ("validation.share=0.5", "validation.draws=2", "accumulation=2")
    assert cli.main(words(tiny_sdxl, pairs, finished, *again, "log_every=7", "loader.num_workers=2")) == 0
    assert "holds this run, finished after 4 steps; nothing to do" in capsys.readouterr().err
    assert "optimizer.lr=0.002 (there: 0.001)" in refused(
        capsys, words(tiny_sdxl, pairs, finished, *again, "optimizer.lr=2e-3")
    )
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_the_layers_that_are_trained_stand_in_the_recipe(
    finished: Path, tiny_sdxl: str, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name, as in runs of a time when they had to be named: those are gone on with."""
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    assert files.read_json(finished / "manifest.json")["recipe"]["adapter"]["targets"] == layers
    kept = ("validation.share=0.5", "validation.draws=2", "accumulation=2")
    assert cli.main(words(tiny_sdxl, pairs, finished, *kept, f"adapter.targets=[{','.join(layers)}]")) == 0
    assert "holds this run, finished after 4 steps; nothing to do" in capsys.readouterr().err
    told = refused(capsys, words(tiny_sdxl, pairs, finished, *kept, "adapter.targets=[to_q]"))
    assert "adapter.targets=['to_q'] (there: ['to_q', 'to_k', 'to_v', 'to_out.0'])" in told


@pytest.mark.parametrize("family", ["sd3", "pixart"])
def test_an_adapter_of_another_family_is_told_by_the_run_beside_it(
    family: str, finished: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In drawing, judging and training on; without its run, or beside another's, by what it holds."""
    base: Any = plugins.get("models", family)
    model = [f"model={family}", f"model.path={base.tiny(tmp_path / 'base').path}"]
    data = ["data=pickapic", f"data.path={pairs}", "data.max_bad_share=0.2"]

    def told(adapter: Path) -> set[str]:
        drawing = ["generate", *model, f"adapter={adapter}", "prompts=[a cat]", f"out={tmp_path / 'no'}"]
        judging = ["evaluate", "mode=implicit", *model, *data, f"adapter={adapter}", f"out={tmp_path / 'no'}"]
        training = ["train", *model, *data, f"adapter.init={adapter}", f"out={tmp_path / 'no'}"]
        return {refused(capsys, arguments) for arguments in (drawing, judging, training)}

    (line,) = told(finished / "adapter")
    assert line == (
        f"error: adapter {finished / 'adapter'} is of another family: it was trained with model=sdxl; give "
        "that model, or an adapter of this one"
    )
    shutil.copytree(finished / "adapter", tmp_path / "run" / "adapter")
    known = files.read_json(finished / "manifest.json")
    known["recipe"]["model"]["name"] = "of_no_name"
    for content in (None, ["x"], {**known, "recipe": "x"}, known):
        if content is not None:
            files.write_json(tmp_path / "run" / "manifest.json", content)
        (line,) = told(tmp_path / "run" / "adapter")
        assert "trained with" not in line and ("has no place for its" in line or "cannot read the" in line)


def test_an_unfinished_run_of_another_recipe_is_refused_before_anything_is_loaded(
    finished: Path, tiny_sdxl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "manifest.json").unlink()
    line = refused(capsys, words("/nowhere", tmp_path / "no.parquet", out, "objective.beta=1"))
    assert "holds another run" in line and "choose another out= or the same recipe" in line


def test_a_base_or_an_adapter_that_changed_is_not_gone_on_with(
    tiny_sdxl: str, pairs: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same paths with other weights: the reference of the run would silently be another one."""
    base = Path(shutil.copytree(tiny_sdxl, tmp_path / "base"))
    init = Path(shutil.copytree(finished / "adapter", tmp_path / "init"))
    arguments = words(str(base), pairs, tmp_path / "out", f"adapter.init={init}")
    assert cli.main(arguments) == 0
    (tmp_path / "out" / "manifest.json").unlink()
    from safetensors.torch import save_file

    for path in (
        init / "pytorch_lora_weights.safetensors",
        base / "unet" / "diffusion_pytorch_model.safetensors",
    ):
        original = path.read_bytes()
        changed = {name: tensor + 1e-3 for name, tensor in load_file(path).items()}
        with open(path, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        save_file(changed, path, metadata=header["__metadata__"])
        assert "base, adapter.init or data of the run in" in refused(capsys, arguments)
        path.write_bytes(original)
    (tmp_path / "out" / ".tmp-00000000-adapter").mkdir()
    assert cli.main(arguments) == 0
    assert not (tmp_path / "out" / ".tmp-00000000-adapter").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("objective.beta=0", "objective.beta is 0.0: use a value above 0"),
        ("objective=dpoo", "unknown objective 'dpoo': did you mean 'dpo'"),
        ("adapter.rankk=3", "unknown key of adapter 'rankk': did you mean 'rank'"),
        ("adapter.targets=[to_z]", "has no layer 'to_z'"),
        ("adapter.init=/nowhere", "adapter /nowhere does not exist"),
        ("timesteps.high=1001", "timestep 1000 is outside"),
        (
            "timesteps.sampler_shift=true",
            "is of rectified flows, and this base is none (it predicts epsilon)",
        ),
        ("preprocess.resolution=30", "preprocess.resolution is 30: use a multiple of 4"),
        ("num_steps=0", "num_steps=0: use 1 or more"),
        ("precision=fp16", "precision=fp16 needs a GPU"),
        ("precision=fp61", "expected one of fp32, bf16, fp16, found 'fp61'"),
        (
            "objective=sft validation.share=0.5",
            "validation.share=0.5 needs given pairs, objective=sft trains on single",
        ),
        (
            "reference.mode=ema validation.share=0.5",
            "reference.mode=ema: held-out accuracy needs the reference of step 0",
        ),
        (
            "shard=true objective=rankdpo objective.passes=two",
            "equally often, which they may not with objective=rankdpo and objective.passes=two: use another",
        ),
        ("shard=true objective=smpo", "with objective=smpo and objective.inversion=renoise: use another"),
        ("shard=true objective=dragon", "with objective=dragon and pictures of its own: use another"),
        ("shard=true", "over several processes, and this is one: start it with torchrun"),
        (
            "validation.share=0.0001",
            "leaves 6 training and 0 held-out examples: change the share, bring more data, or set "
            "validation.share=0 to train without",
        ),
        ("timesteps.mean=1.0", "timesteps.mean means nothing in timesteps.kind=uniform: leave it out"),
        ("data.max_bad_share=0.05", "max_bad_share=0.05"),
        ("model.vae=/nowhere", "model.vae /nowhere does not exist"),
        ("model=sd", "use model=sdxl"),
        ("optimizer.max_grad_norm=-1", "optimizer.max_grad_norm is -1.0"),
        ("optimizer.kind=adafactr", "expected one of adamw, adamw8bit, adafactor, found 'adafactr'"),
        ("optimizer.kind=adafactor optimizer.eps=1e-6", "optimizer.eps means nothing in optimizer.kind=ada"),
        ("ema.decay=1", "ema.decay is 1.0: use a value in [0, 1)"),
        ("trackers=[wandbb]", "unknown tracker 'wandbb': did you mean 'wandb'"),
        ("trackers=[dvclive]", "trackers: dvclive is not installed: pip install dvclive"),
        ('stop_when={"saturated":{"abov":0.5}}', "unknown key 'abov'"),
        ('stop_when={"saturated":{"rows":3}}', "above=None and below=None: give one of them"),
        ("stop_when=saturated", "stop_when"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    word: str, message: str, tiny_sdxl: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, words(tiny_sdxl, pairs, tmp_path / "out", *word.split()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more",
    [
        "adapter.targets=[to_z]",
        "adapter.init=/nowhere",
        "adapter.kind=full model.dtype=bf16",
        "objective=sft validation.share=0.5",
        "objective=sft data.ties=soft",
    ],
)
def test_what_the_recipe_alone_shows_is_said_before_a_picture_is_encoded(
    more: str, tiny_sdxl: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(tiny_sdxl, pairs, tmp_path / "out", *more.split())) == 2
    assert "encode" not in capsys.readouterr().err


@pytest.mark.parametrize(("more", "times"), [([], 1), (["objective.beta=100"], 0)])
def test_a_default_beta_on_velocity_errors_is_told_before_a_picture_is_encoded(
    more: list[str], times: int, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = SD3.tiny(tmp_path / "sd3").path
    too_few = ["model=sd3", "validation.share=0.0001"]  # ends the run after encoding
    assert cli.main(words(base, pairs, tmp_path / "out", *too_few, *more)) == 2
    told, _, _ = capsys.readouterr().err.partition("encode")
    assert told.count("WARNING: objective.beta=5000, the default, is for errors of noise") == times
    assert told.count("objective.beta") == 2 * times  # and what public recipes use


def test_held_out_pairs_that_are_all_ties_are_refused(
    tiny_sdxl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ties.parquet"
    write(path, [row(f"a {name}", LIGHT, DARK, (0.5, 0.5)) for name in "abcdefgh"])
    line = refused(capsys, words(tiny_sdxl, path, tmp_path / "out", "data.ties=soft", "validation.share=0.5"))
    assert "held-out pairs are ties" in line and not (tmp_path / "out").exists()


def test_sft_trains_the_whole_network_too(tiny_sdxl: str, pairs: Path, tmp_path: Path) -> None:
    """Full weights: the adapter folder holds a UNet, which a plain pipeline and `model.unet` take."""
    full = ("objective=sft", "adapter.kind=full", "num_steps=2", "optimizer.lr=1e-2")
    assert cli.main(words(tiny_sdxl, pairs, tmp_path / "out", *full)) == 0
    trained = load_file(tmp_path / "out" / "adapter" / "unet" / "diffusion_pytorch_model.safetensors")
    base = load_file(f"{tiny_sdxl}/unet/diffusion_pytorch_model.safetensors")
    assert set(trained) == set(base)
    assert sum(not torch.equal(trained[name], base[name]) for name in base) > 0.9 * len(base)
    assert "UNet2DConditionModel" in (tmp_path / "out" / "adapter" / "README.md").read_text()


def test_a_run_that_a_rule_ends_is_finished_and_says_why(
    tiny_sdxl: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a moving average: the adapter is the average, the weights of the last step lie beside it."""
    out = tmp_path / "out"
    ended = words(tiny_sdxl, pairs, out, "stop_when={loss: {above: 0}}", "ema.decay=0.9", "trackers=[]")
    assert cli.main(ended) == 0
    reason = "loss above 0 for 1 row at step 2"
    assert f"stopped: {reason}" in capsys.readouterr().err
    summary = json.loads((out / "manifest.json").read_text())["summary"]
    assert summary["steps"] == 2 and summary["stopped"] == reason
    assert reason in (out / "adapter" / "README.md").read_text()
    assert not (out / "tensorboard").exists() and not (out / "adapter_last" / "README.md").exists()
    average, last = (
        load_file(out / name / "pytorch_lora_weights.safetensors") for name in ("adapter", "adapter_last")
    )
    assert average.keys() == last.keys()
    assert any(not torch.equal(average[name], last[name]) for name in last)
    assert cli.main([*ended, "trackers=[tensorboard]"]) == 0
    said = capsys.readouterr().err
    assert f"finished after 2 steps (stopped: {reason}); nothing to do" in said
    assert "stop_when" in refused(capsys, words(tiny_sdxl, pairs, out, "ema.decay=0.9"))


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """The command in a process group of its own, as a terminal would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "diffalign", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_signal_saves_and_leaves(
    tiny_sdxl: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM to the process, as a scheduler sends it; SIGINT to its workers too, as Ctrl-C does."""
    more = ("loader.num_workers=2", "checkpoint.every=100000", "log_every=1", "num_steps=100000")
    runs = {
        number: (start(words(tiny_sdxl, pairs, tmp_path / number.name, *more)), tmp_path / number.name)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    for number, (process, out) in runs.items():
        deadline = time.monotonic() + 240
        while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    for number, (process, out) in runs.items():
        _, said = process.communicate(timeout=120)
        assert process.returncode == 128 + number, said
        assert "saved step" in said and f"stopped by {number.name}" in said and "Traceback" not in said
        (kept,) = (out / "checkpoints").iterdir()
        step = json.loads((kept / "manifest.json").read_text())["step"]
        assert step == files.read_jsonl(out / "metrics.jsonl")[-1]["step"] > 0
        other = refused(capsys, words(tiny_sdxl, pairs, out, *more[:3], f"num_steps={step + 1}"))
        assert f"num_steps={step + 1} (there: 100000)" in other


def test_settings_are_the_keys_of_train() -> None:
    """Same names and defaults: the command line and a run set up in Python mean the same."""
    signature = inspect.signature(train).parameters
    components = {"model", "data", "cache", "objective", "prompts", "scorers", "out"}
    assert {field.name for field in fields(Settings)} == set(signature) - components
    plain = Settings()
    assert all(getattr(plain, name) == signature[name].default for name in set(signature) - components)
