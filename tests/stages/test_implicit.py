"""`evaluate mode=implicit` through the command line, on a tiny pipeline and a hand-made set of pairs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign import cli
from diffalign.data.cache import open_cache
from diffalign.models._spec import AdapterSpec
from diffalign.models.sd import Plugin as SD
from diffalign.models.sdxl import Plugin as SDXL
from tests.pickapic_files import jpeg, row, write

Loads = list[tuple[str, set[str]]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four decided pairs (two each way), a tie and a broken picture."""
    path = tmp_path_factory.mktemp("pairs") / "train-00000-of-00001.parquet"
    light, dark = jpeg(200, (32, 32)), jpeg(40, (32, 32))
    write(
        path,
        [
            row("a cat", light, dark, (1.0, 0.0)),
            row("a dog", dark, light, (0.0, 1.0)),
            row("a cow", light, dark, (0.0, 1.0)),
            row("a hen", dark, light, (1.0, 0.0)),
            row("a bee", light, dark, (0.5, 0.5)),
        ],
    )
    return path


@pytest.fixture(scope="module")
def fresh_adapter(tiny_sdxl: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes nothing: policy and reference agree on every picture."""
    model = SDXL(path=tiny_sdxl).load()
    model.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_adapter(str(folder))
    return folder


def words(tiny_sdxl: str, adapter: Path, pairs: Path, out: Path) -> list[str]:
    return [
        "evaluate",
        "mode=implicit",
        "model=sdxl",
        f"model.path={tiny_sdxl}",
        f"adapter={adapter}",
        "data=pickapic",
        f"data.path={pairs}",
        "draws=2",
        f"out={out}",
    ]


def test_an_adapter_that_changes_nothing_is_undecided(
    tiny_sdxl: str, fresh_adapter: Path, pairs: Path, tmp_path: Path
) -> None:
    """Margins are exactly 0, so every pair counts half; the base's own errors follow the brightness.

    In two pairs the light picture is preferred and in two the dark one, and the base's error depends on the
    picture and its draws alone: its accuracy is a multiple of 1/4 and says nothing of the adapter.
    """
    arguments = [*words(tiny_sdxl, fresh_adapter, pairs, tmp_path / "out"), "data.ties=soft"]
    assert cli.main(arguments) == 0
    summary = json.loads((tmp_path / "out" / "implicit.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "implicit.jsonl").read_text().splitlines()]
    assert summary["pairs"] == 4
    assert summary["accuracy"]["estimate"] == 0.5
    assert [row["margin"] for row in rows] == [0.0] * 4
    assert {row["right"] for row in rows} == {0.5}
    assert summary["base_error_accuracy"]["estimate"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"]["dropped"] == {"tie": 1}
    assert manifest["dropped"]["tie"] == ["train-00000-of-00001.parquet:4"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("adapter=nowhere/at/all", "adapter nowhere/at/all does not exist"),
        ("draws=0", "draws=0"),
        ("model.path=nowhere/at/all", "model.path nowhere/at/all does not exist"),
        ("data.path=nowhere.parquet", "nowhere.parquet"),
        ("mode=implict", "did you mean 'implicit'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    change: str,
    said: str,
    tiny_sdxl: str,
    fresh_adapter: Path,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key = change.partition("=")[0]
    kept = [
        w for w in words(tiny_sdxl, fresh_adapter, pairs, tmp_path / "out") if not w.startswith(f"{key}=")
    ]
    assert cli.main([*kept, change]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert lines[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_the_network_comes_when_the_encoders_are_gone(
    tiny_sdxl: str, fresh_adapter: Path, pairs: Path, tmp_path: Path, part_loads: Loads
) -> None:
    assert cli.main(words(tiny_sdxl, fresh_adapter, pairs, tmp_path / "out")) == 0
    (beside,) = [others for name, others in part_loads if name == "unet"]
    assert not beside & {"vae", "text_encoder", "text_encoder_2"}
    assert {"vae", "text_encoder", "text_encoder_2"} <= {name for name, _ in part_loads}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_policy_of_another_base_is_refused_before_anything_is_loaded(
    kind: Literal["lora", "full"],
    tiny_sd: str,
    tiny_sdxl: str,
    pairs: Path,
    tmp_path: Path,
    part_loads: Loads,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = SD(path=tiny_sd).load()
    other.start_training(AdapterSpec(kind=kind), seed=0, with_reference=False)
    other.save_adapter(str(tmp_path))
    for path in tmp_path.glob("*.safetensors"):  # the layers of both tiny networks are alike but for this
        wider = {n: torch.cat([t, t], 1) if "lora_A" in n else t for n, t in load_file(path).items()}
        save_file(wider, path, {"format": "pt"})
    part_loads.clear()
    assert cli.main(words(tiny_sdxl, tmp_path, pairs, tmp_path / "out")) == 2
    assert not part_loads and not (tmp_path / "out").exists()
    said = {"lora": "is for another architecture", "full": f"the UNet of {tmp_path}"}
    assert said[kind] in capsys.readouterr().err.strip().splitlines()[-1]


def test_missing_parts_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "mode=implicit", f"out={tmp_path / 'out'}"]) == 2
    assert "needs model" in capsys.readouterr().err


@pytest.fixture(scope="module")
def cached(tiny_sdxl: str, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the same rows, the tie included."""
    folder = tmp_path_factory.mktemp("cached") / "pairs"
    words = ["cache", "model=sdxl", f"model.path={tiny_sdxl}", "data=pickapic", f"data.path={pairs}"]
    assert cli.main([*words, "data.ties=soft", f"out={folder}"]) == 0
    return folder


def from_cache(arguments: list[str], cached: Path) -> list[str]:
    return [*(word for word in arguments if not word.startswith("data")), f"cache={cached}"]


def test_a_cache_gives_the_same_judgements_without_the_encoders(
    tiny_sdxl: str,
    fresh_adapter: Path,
    pairs: Path,
    cached: Path,
    tmp_path: Path,
    part_loads: Loads,
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(fresh_adapter, adapter)
    (file,) = adapter.glob("*.safetensors")
    generator = torch.Generator().manual_seed(0)
    moved = {n: t + 0.5 * torch.randn(t.shape, generator=generator) for n, t in load_file(file).items()}
    save_file(moved, file, {"format": "pt"})
    arguments = words(tiny_sdxl, adapter, pairs, tmp_path / "now")
    assert cli.main(arguments) == 0
    part_loads.clear()
    assert cli.main(from_cache([*arguments[:-1], f"out={tmp_path / 'kept'}"], cached)) == 0
    assert {name for name, _ in part_loads} <= {"unet", "scheduler"}
    assert sorted(open_cache(cached).choose()[0].targets) == [
        0.0,
        0.0,
        0.5,
        1.0,
        1.0,
    ]  # training sees the tie
    now, kept = (
        [json.loads(line) for line in (tmp_path / name / "implicit.jsonl").read_text().splitlines()]
        for name in ("now", "kept")
    )
    assert [row | {"margin": None} for row in kept] == [row | {"margin": None} for row in now]
    assert [row["margin"] for row in kept] == pytest.approx([row["margin"] for row in now], abs=1e-5)  # fp16
    assert all(abs(row["margin"]) > 1e-4 for row in now)
    manifest = json.loads((tmp_path / "kept" / "manifest.json").read_text())
    assert manifest["counts"] == {"asked": 5, "used": 4, "dropped": {"tie": 1}}
    made = json.loads((cached / "manifest.json").read_text())["cache"]["identity"]
    assert made in json.dumps(manifest["inputs"]["cache"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["data=pickapic", "data.path={pairs}"], "data= or cache=, both are set"),
        (["model=sd", "model.path={tiny_sd}"], "made with model=sdxl, this run has sd"),
        (["preprocess.resolution=32"], "preprocess is that of the cache"),
        (["cache=nowhere"], "cache=nowhere does not exist"),
        (["limit=0"], "limit=0: use 1 or more"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_in_one_line(
    change: list[str],
    said: str,
    tiny_sd: str,
    tiny_sdxl: str,
    fresh_adapter: Path,
    pairs: Path,
    cached: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = from_cache(words(tiny_sdxl, fresh_adapter, pairs, tmp_path / "out"), cached)
    new = [word.format(pairs=pairs, tiny_sd=tiny_sd) for word in change]
    keys = {word.partition("=")[0] for word in new}
    kept = [word for word in arguments if word.partition("=")[0] not in keys]
    assert cli.main([*kept, *new]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
