"""Drawing pictures with a random pipeline of the smallest size: rows, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffalign.common import plugins
from diffalign.common.config import load_recipe
from diffalign.common.errors import UserError
from diffalign.common.files import read_jsonl
from diffalign.common.manifest import read_manifest
from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import SDXL, Plugin
from diffalign.stages.generate import AdapterUse, generate

FAST = {"num_inference_steps": 2, "batch_size": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Plugin:
    return Plugin.tiny(tmp_path_factory.mktemp("model") / "tiny-sdxl")


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    """A LoRA whose second factor is not zero, so that it changes pictures."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    loaded = model.load()
    loaded.start_training(AdapterSpec(rank=2), seed=0, with_reference=False)
    loaded.load_trained_state(
        {name: torch.full_like(tensor, 0.3) for name, tensor in loaded.trained_state().items()}
    )
    loaded.save_adapter(str(folder))
    return folder


@pytest.fixture(scope="module")
def drawn(model, tmp_path_factory) -> Path:
    """Two prompts and two seeds; tests that change it copy it."""
    out = tmp_path_factory.mktemp("drawn") / "base"
    generate(model=model, prompts=["a cat", "a dog"], seeds=[0, 5], out=str(out), **FAST)
    return out


def pixels(folder: Path) -> dict[str, np.ndarray]:
    """Picture name -> its bytes [H, W, 3]."""
    found = {}
    for row in read_jsonl(folder / "images.jsonl"):
        with Image.open(folder / row["image"]) as picture:
            found[row["image"]] = np.asarray(picture)
    return found


def test_rows_say_everything(drawn, model):
    rows = read_jsonl(drawn / "images.jsonl")
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        ("a cat", 0), ("a cat", 5), ("a dog", 0), ("a dog", 5)
    ]  # fmt: skip
    row = rows[1]
    assert row["id"] == "prompt-00000-s5" and row["image"] == "images/prompt-00000-s5.png"
    assert row["prompt_id"] == "prompt-00000" and row["model"] == "tiny-sdxl"
    assert (row["width"], row["height"], row["num_inference_steps"]) == (32, 32, 2)
    assert row["scheduler"] is None and row["negative_prompt"] is None and row["meta"] == {}
    assert all(picture.shape == (32, 32, 3) for picture in pixels(drawn).values())
    found = read_manifest(drawn)
    assert found["stage"] == "generate" and found["counts"]["pictures"] == 4
    assert found["recipe"]["model"]["path"] == model.path


def test_pictures_differ_by_prompt_and_seed_and_repeat_exactly(drawn, model, tmp_path):
    first = pixels(drawn)
    assert len({picture.tobytes() for picture in first.values()}) == 4
    generate(model=model, prompts=["a cat", "a dog"], seeds=[0, 5], out=str(tmp_path / "again"), **FAST)
    again = pixels(tmp_path / "again")
    assert all((again[name] == picture).all() for name, picture in first.items())


def test_a_killed_run_goes_on_and_ends_equal(drawn, model, tmp_path):
    """Killed after a picture, in the middle of a row: the missing pictures come, bit-equal."""
    out = tmp_path / "killed"
    shutil.copytree(drawn, out)
    lines = (out / "images.jsonl").read_text().splitlines()
    (out / "images.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    (out / "manifest.json").unlink()
    (out / "images" / "prompt-00001-s0.png").unlink()
    (out / "images" / ".tmp-00000000-prompt-00001-s0.png").write_bytes(b"half")
    before = (out / "images" / "prompt-00000-s0.png").stat().st_mtime_ns
    generate(model=model, prompts=["a cat", "a dog"], seeds=[0, 5], out=str(out), **FAST)
    expected = pixels(drawn)
    assert pixels(out).keys() == expected.keys()
    assert all((picture == expected[name]).all() for name, picture in pixels(out).items())
    assert (out / "images" / "prompt-00000-s0.png").stat().st_mtime_ns == before
    assert not list((out / "images").glob(".tmp-*"))
    assert read_manifest(out)["counts"] == {"prompts": 2, "seeds": 2, "pictures": 4, "found": 1}


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_complete_run_says_so_and_a_removed_picture_comes_back(drawn, model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "complete"
    shutil.copytree(drawn, out)
    same = {"model": model, "prompts": ["a cat", "a dog"], "seeds": [0, 5], "out": str(out), **FAST}
    stamp = (out / "manifest.json").stat().st_mtime_ns
    generate(**same)
    assert "is complete: 4 pictures" in capsys.readouterr().err
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    (out / "images" / "prompt-00001-s5.png").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SDXL, "generate", interrupted)
        generate(**same)
    assert read_manifest(out) is None  # the folder is not whole, and says so
    generate(**same)
    expected = pixels(drawn)["images/prompt-00001-s5.png"]
    assert (pixels(out)["images/prompt-00001-s5.png"] == expected).all()
    assert len(read_jsonl(out / "images.jsonl")) == 4


def test_another_recipe_in_the_folder_is_refused(drawn, model):
    given = {"model": model, "prompts": ["a cat", "a dog"], "seeds": [0, 5], "out": str(drawn), **FAST}
    before = (drawn / "images.jsonl").read_text()
    with pytest.raises(UserError, match=r"num_inference_steps was 2, now 3"):
        generate(**{**given, "num_inference_steps": 3})
    with pytest.raises(UserError, match=r"seeds was \[0, 5\], now \[0\]"):
        generate(**{**given, "seeds": [0]})
    with pytest.raises(UserError, match=r"another recipe \(prompts was"):
        generate(**{**given, "prompts": ["a cat", "a cow"]})
    assert (drawn / "images.jsonl").read_text() == before
    generate(**{**given, "batch_size": 4})  # how many at a time is no part of what is drawn


def test_adapters_change_pictures_by_their_weight(model, adapter, tmp_path):
    def draw(name: str, **options) -> np.ndarray:
        generate(model=model, prompts="a cat", out=str(tmp_path / name), **options, **FAST)
        return pixels(tmp_path / name)["images/prompt-00000-s0.png"].astype(int)

    base, full = draw("base"), draw("full", adapter=str(adapter))
    assert np.abs(full - base).max() > 2
    assert (draw("none", adapter=str(adapter), adapter_weight=0.0) == base).all()
    half = draw("half", adapter=str(adapter), adapter_weight=0.5)
    assert (half != full).any() and (half != base).any()
    both = {"a": AdapterUse(str(adapter), 0.5), "b": AdapterUse(str(adapter), 0.5)}
    assert np.abs(draw("both", adapters=both) - full).max() <= 1  # two halves are one whole, up to rounding
    swapped = {"b": AdapterUse(str(adapter), 1.0), "a": AdapterUse(str(adapter), 0.0)}
    assert (draw("named", adapters=swapped) == full).all()
    rows = read_jsonl(tmp_path / "half" / "images.jsonl")
    assert rows[0]["model"] == f"tiny-sdxl + {adapter} * 0.5"


def test_settings_reach_the_pipeline(model, drawn, tmp_path):
    base = pixels(drawn)["images/prompt-00000-s0.png"]
    for name, options in {
        "scheduler": {"scheduler": "DDIMScheduler"},
        "guidance": {"guidance_scale": 1.0},
        "negative": {"negative_prompt": "a dog"},
    }.items():
        generate(model=model, prompts=["a cat"], out=str(tmp_path / name), **options, **FAST)
        assert (pixels(tmp_path / name)["images/prompt-00000-s0.png"] != base).any(), name
    generate(model=model, prompts=["a cat"], out=str(tmp_path / "wide"), width=48, height=32, **FAST)
    assert pixels(tmp_path / "wide")["images/prompt-00000-s0.png"].shape == (32, 48, 3)


def test_a_prompt_file_keeps_its_columns(model, tmp_path):
    table = 'Prompt\tCategory\na cat\tAnimals\na "big" dog\tAnimals\na cow\tFarm\n'
    (tmp_path / "parti.tsv").write_text(table)
    generate(model=model, prompts=str(tmp_path / "parti.tsv"), limit=2, out=str(tmp_path / "out"), **FAST)
    rows = read_jsonl(tmp_path / "out" / "images.jsonl")
    assert [row["prompt"] for row in rows] == ["a cat", 'a "big" dog']
    assert rows[1]["meta"] == {"Category": "Animals"} and rows[1]["prompt_id"] == "parti-00001"
    assert read_manifest(tmp_path / "out")["inputs"]["prompts"]["sha256"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "DDIMSchedular"}, "did you mean 'DDIMScheduler'"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "cannot sample this base"),
        ({"scheduler": "VQDiffusionScheduler"}, "cannot sample this base"),
        ({"scheduler": "EDMEulerScheduler"}, "cannot sample this base"),
        ({"height": 33}, "height=33: give a multiple of"),
        ({"width": 0}, "width=0"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [1, 2, 1]}, "seeds holds 1 twice"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"limit": 0}, "limit=0"),
        ({"prompts": "nowhere.tsv"}, "no such file"),
        ({"adapter": "no/such/lora"}, "no/such/lora"),
        ({"adapter_weight": 0.5}, "adapter_weight=0.5 without adapter"),
        ({"adapter": "a", "adapters": {"b": {"path": "c"}}}, "both set"),
        ({"device": "warp"}, "device=warp"),
    ],
)
def test_bad_input_leaves_no_folder(model, tmp_path, options, message):
    with pytest.raises(UserError, match=message) as error:
        generate(**{"model": model, "prompts": "a cat", "out": str(tmp_path / "out"), **FAST, **options})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_literal_prompt_may_be_long_or_called_like_a_folder(model, tmp_path, monkeypatch):
    """Its text is no path: it is not looked for on the disk."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for index, text in enumerate(("a very long prompt " * 30, "runs")):
        generate(model=model, prompts=text, out=str(tmp_path / f"out{index}"), **FAST)
        found = read_manifest(tmp_path / f"out{index}")
        assert set(found["inputs"]) == {"model"} and found["recipe"]["prompts"] == text


def test_a_foreign_folder_or_file_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        generate(model=model, prompts="a cat", out=str(tmp_path / "file"), **FAST)
    (tmp_path / "scored").mkdir()
    (tmp_path / "scored" / "manifest.json").write_text(json.dumps({"stage": "score"}))
    with pytest.raises(UserError, match="holds the output of 'score'"):
        generate(model=model, prompts="a cat", out=str(tmp_path / "scored"), **FAST)
    with pytest.raises(UserError, match="nowhere"):
        generate(
            model={"name": "sdxl", "path": "./nowhere"}, prompts="a cat", out=str(tmp_path / "out"), **FAST
        )


def test_the_signature_is_a_recipe(model):
    words = [f"model.path={model.path}", "model=sdxl", "prompts=[a cat, a dog]", "seeds=[0,1]", "out=x"]
    words += ["adapters={ink: {path: lora, weight: 0.5}}", "negative_prompt=null"]
    arguments = load_recipe(generate, None, words).arguments
    assert arguments["prompts"] == ["a cat", "a dog"] and arguments["seeds"] == [0, 1]
    assert arguments["adapters"] == {"ink": AdapterUse("lora", 0.5)}
    assert (
        load_recipe(generate, None, [*words, "prompts=a red, round cube"]).arguments["prompts"]
        == "a red, round cube"
    )
    with pytest.raises(UserError, match="generate needs"):
        load_recipe(generate, None, words[1:])


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_prompts_embedded_first_give_the_same_pictures(name, tmp_path, part_loads):
    """The network is loaded when the text encoders are gone, and not before."""
    base = plugins.get("models", name).tiny(tmp_path / "base")
    made = base.load()
    made.start_training(AdapterSpec(rank=2), seed=0, with_reference=False)
    made.load_trained_state({n: torch.full_like(t, 0.3) for n, t in made.trained_state().items()})
    made.save_adapter(str(tmp_path / "lora"))
    asked = {
        "model": base,
        "prompts": ["a cat", "a dog", "a hen"],
        "seeds": [0, 5],
        "adapter": str(tmp_path / "lora"),
        "guidance_scale": 3.0,
    }
    generate(**asked, out=str(tmp_path / "usual"), **FAST)
    part_loads.clear()
    generate(**asked, out=str(tmp_path / "first"), encode_first=True, **FAST)
    usual, first = pixels(tmp_path / "usual"), pixels(tmp_path / "first")
    assert len(first) == 6 and all((first[name] == picture).all() for name, picture in usual.items())
    (beside,) = [others for part, others in part_loads if part == base.network_part]
    assert not any(part.startswith("text_encoder") for part in beside)
    assert any(part.startswith("text_encoder") for part, _ in part_loads)
    (tmp_path / "first" / "images" / "prompt-00002-s0.png").unlink()  # goes on, the other way
    generate(**asked, out=str(tmp_path / "first"), **FAST)
    assert all((picture == usual[name]).all() for name, picture in pixels(tmp_path / "first").items())


def test_an_adapter_of_the_text_encoders_is_not_embedded_first(model, adapter, tmp_path):
    (file,) = adapter.glob("*.safetensors")
    state = load_file(file)
    for factor, shape in (("A", (2, 32)), ("B", (32, 2))):
        key = f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{factor}.weight"
        state[key] = torch.ones(shape)
    save_file(state, tmp_path / "both.safetensors", {"format": "pt"})
    asked = {"model": model, "prompts": "a cat", "adapter": str(tmp_path / "both.safetensors")}
    with pytest.raises(UserError, match="also changes the text encoders"):
        generate(**asked, out=str(tmp_path / "out"), encode_first=True, **FAST)
    assert not (tmp_path / "out").exists()
