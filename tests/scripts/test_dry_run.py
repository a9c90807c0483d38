"""The dry run at full size: the same code on bases of the smallest size, and the names of FLUX.1-dev."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.models import load_model
from diffalign.models._lora_files import WEIGHTS_FILE

SCRIPTS = Path(__file__).parents[2] / "scripts"
NAMES = ("dry_run_full_size", "dry_run_names", "dry_run_stages", "full_size", "full_size_bases", "memory")
FAMILIES = ("sd", "sdxl", "sd3", "flux", "pixart")

CLIP = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL: dict[str, dict[str, Any]] = {
    "network": {
        "sample_size": 16,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 40,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 40,
        "pos_embed_max_size": 24,
        "dual_attention_layers": (0,),
    },
    "vae": {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 32,
    },
    "text_encoder": {**CLIP, "hidden_size": 16, "projection_dim": 16},
    "text_encoder_2": {**CLIP, "hidden_size": 24, "projection_dim": 24},
    "text_encoder_3": {"d_model": 40, "d_kv": 10, "d_ff": 64, "num_layers": 3, "num_heads": 4},
}
"""What makes SD3.5 Medium a base for 32-pixel images."""


@pytest.fixture
def dry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module; it imports its neighbours by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("dry_run_full_size")
    for name in (*NAMES, "reporting"):
        sys.modules.pop(name, None)


@pytest.fixture
def names(dry: Any) -> Any:
    return sys.modules["dry_run_names"]


def small_base(dry: Any) -> Any:
    whole = dry.BASES["sd3.5-medium"]
    encoders = {part: (name, config | SMALL[part]) for part, (name, config) in whole.encoders.items()}
    network = (whole.network[0], whole.network[1] | SMALL["network"])
    return replace(whole, network=network, vae=whole.vae | SMALL["vae"], encoders=encoders)


def test_a_base_is_written_whole_file_by_file(
    dry: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(dry.BASES, "small", small_base(dry))
    monkeypatch.setattr(dry.full_size, "SHARD", 20_000)
    for seed, name in enumerate(("a", "b")):
        dry.full_size.write("small", tmp_path / name, seed=seed)
    model: Any = load_model("sd3", str(tmp_path / "a"), max_sequence_length=12)
    assert len(list((tmp_path / "a" / "transformer").glob("*.safetensors"))) > 2
    network = model.parts["transformer"]
    norm = network.transformer_blocks[0].attn.norm_q.weight
    assert torch.equal(norm, torch.ones_like(norm))  # norms are the identity, biases 0
    linear = network.transformer_blocks[1].attn.to_q
    assert linear.bias.abs().max() == 0.0
    assert 0.9 / 4 < float(linear.weight.max()) <= 1 / 4  # uniform within 1 / sqrt(inputs), 16 of them
    positions = type(network).from_config(network.config).pos_embed.pos_embed
    assert torch.allclose(network.pos_embed.pos_embed, positions, atol=1e-2)  # positions, not noise
    t5 = model.parts["text_encoder_3"]
    assert t5.shared.weight is t5.encoder.embed_tokens.weight and len(t5.encoder.block) == 3
    assert all(value.isfinite().all() for value in model.encode_prompts(["a red ring"]).values())
    other: Any = load_model("sd3", str(tmp_path / "b"))
    assert not torch.equal(other.parts["transformer"].transformer_blocks[1].attn.to_q.weight, linear.weight)
    written = (tmp_path / "a" / "model_index.json").stat().st_mtime_ns
    dry.full_size.write("small", tmp_path / "a", whole_encoders=False)  # it is there
    assert (tmp_path / "a" / "model_index.json").stat().st_mtime_ns == written


def test_encoders_can_be_short(dry: Any) -> None:
    parts = dry.full_size.parts_of(dry.BASES["sd3.5-medium"], whole_encoders=False)
    layers = [parts[part][2] for part in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    assert [config.get("num_layers", config.get("num_hidden_layers")) for config in layers] == [2, 2, 2]
    assert parts["transformer"][2]["num_layers"] == 24


def run(dry: Any, monkeypatch: pytest.MonkeyPatch, base: Any, *words: str) -> Any:
    """The exit code of the script with one base, in this process."""
    for name in list(dry.BASES):
        monkeypatch.delitem(dry.BASES, name)
    monkeypatch.setitem(dry.BASES, "small", base)
    monkeypatch.setattr(dry, "TRAINED", {"sd3": "small"})
    monkeypatch.setattr(dry, "in_child", lambda function, *given, **options: function(*given, **options))
    monkeypatch.setattr(sys, "argv", ["dry_run_full_size.py", "--resolution", "32", *words])
    return dry.main()


def test_all_of_it_at_the_smallest_size(
    dry: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = small_base(dry)
    with torch.device("meta"):
        network = diffusers.SD3Transformer2DModel(**base.network[1])
    base = replace(base, parameters=sum(parameter.numel() for parameter in network.parameters()))
    other = tmp_path / "sd3" / "of somebody else"
    other.mkdir(parents=True)
    words = ["--out", str(tmp_path), "--report", str(tmp_path / "dry.md")]
    assert run(dry, monkeypatch, base, *words) == 0
    text = (tmp_path / "dry.md").read_text()
    assert text in capsys.readouterr().out
    assert "| NO |" not in text and text.count("| yes |") == 5
    assert "| parts that `train` loaded | scheduler, transformer |" in text
    assert "| models in memory when the step began | SD3Transformer2DModel |" in text
    assert "| loss of the step | 0.693147 |" in text
    assert f"| small | {base.parameters:,} | equal | equal | 19 | 2 of 2 | equal | equal |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dry.md", "sd3"] and other.is_dir()


def test_a_missed_bar_is_the_exit_code(
    dry: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = small_base(dry)  # it has not as many parameters as SD3.5 Medium
    assert run(dry, monkeypatch, base, "--out", str(tmp_path), "--parts", "meta") == 1
    assert "| small: every name equal | NO |" in capsys.readouterr().out


def test_what_is_in_memory_is_seen(dry: Any, tiny_sdxl: str) -> None:
    seen = sys.modules["dry_run_stages"]._models
    before = {id(model) for model in seen()}
    model = loaded("sdxl", Path(tiny_sdxl))
    kept = [model.parts[name] for name in ("text_encoder", "vae")]
    blueprint = model.parts.blueprint("unet")  # without memory
    found = [type(model).__name__ for model in seen() if id(model) not in before]
    assert sorted(found) == ["AutoencoderKL", "CLIPTextModel"]
    assert len(kept) == 2 and blueprint is not None


def test_training_that_encodes_is_seen(dry: Any, tiny_sdxl: str, tmp_path: Path) -> None:
    stages = sys.modules["dry_run_stages"]
    pairs = stages.write_pairs(tmp_path / "pairs", 32)
    words = ["model=sdxl", f"model.path={tiny_sdxl}", "data=jsonl", f"data.path={pairs}", "num_steps=1"]
    seen = stages.trained([*words, "loader.batch_size=1", "loader.num_workers=0", f"out={tmp_path / 'run'}"])
    found = dry.Walk("unet", ("text_encoder", "tokenizer", "vae"), seen, seen, 0.5, True, False)
    assert {"text_encoder", "text_encoder_2", "vae", "unet"} <= set(seen.loaded)
    assert seen.held == ["UNet2DConditionModel"]  # the rest is gone by then
    assert [met for met in found.bars("x").values()] == [True, False, False, False]
    assert 0.0 < seen.seconds["step"] < seen.seconds["whole"]
    assert 0.0 < seen.peak_gb["step"]["own"] <= seen.peak_gb["whole"]["own"] < 24.0


def test_a_stage_that_fails_is_told(dry: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="left with code 2"):
        sys.modules["dry_run_stages"].cached(["model=sdxl", f"model.path={tmp_path}", "data=jsonl"])


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_plain_diffusers(names: Any, family: str, tmp_path: Path) -> None:
    module = importlib.import_module(f"diffalign.models.{family}")
    module.Plugin.tiny(tmp_path)
    found = names.check(family, tmp_path)
    assert found.all_equal
    assert found.parameters == sum(tensor.numel() for tensor in loaded(family, tmp_path).network.parameters())


def test_a_wrong_name_or_shape_is_seen(names: Any, tiny_sdxl: str, tmp_path: Path) -> None:
    plain = names.Plain(Path(tiny_sdxl))
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    plain.write_adapter(targets, 4, tmp_path / "whole")
    assert names.check_saved(Path(tiny_sdxl), "sdxl", tmp_path / "whole", 4) == (True, True)
    plain.write_adapter(targets, 2, tmp_path / "thin")  # it loads, but is of another rank
    assert names.check_saved(Path(tiny_sdxl), "sdxl", tmp_path / "thin", 4) == (False, True)
    tensors = load_file(tmp_path / "whole" / WEIGHTS_FILE)
    wider = {key: value.repeat(1, 2) for key, value in tensors.items()}
    renamed = {key.replace("attentions.0", "attentions.7"): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    for name, wrong in (("wider", wider), ("renamed", renamed)):
        (tmp_path / name).mkdir()
        save_file(wrong, tmp_path / name / WEIGHTS_FILE)
        assert names.check_saved(Path(tiny_sdxl), "sdxl", tmp_path / name, 4) == (False, False)


def test_flux_dev_has_the_published_names(dry: Any, names: Any) -> None:
    found, peak = dry.names_of("flux.1-dev")
    assert found.parameters == dry.BASES["flux.1-dev"].parameters == 11_901_408_320
    assert found.all_equal and found.blocks == 19 + 38
    assert found.layers == 19 * 8 + 38 * 3  # four layers of pictures and four of text, and three of both
    assert peak < 4.0  # of 24 GB that the weights would take


def loaded(family: str, folder: Path) -> Any:
    return load_model(family, str(folder))
