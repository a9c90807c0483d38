"""What is no adapter of peft's for this base is refused; those that are one, `test_pixart.py` draws with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig
from safetensors.torch import load_file, save_file

from diffalign.common.errors import UserError
from diffalign.models import load_model
from diffalign.models._spec import AdapterSpec
from diffalign.models.pixart import Plugin
from tests.tiny_training import perturb

FILES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny PixArt; read it, never write to it."""
    return Plugin.tiny(tmp_path_factory.mktemp("tiny") / "pixart").path


def broken(folder: Path, kind: str) -> str:
    """Turns the adapter in `folder` into something that is none, or none for this base."""
    settings, path = folder / FILES[0], folder / FILES[1]
    state = load_file(path)
    layer = next(key for key in state if key.endswith("attn2.to_k.lora_A.weight"))
    if kind == "wrong inputs":
        state[layer] = torch.zeros(2, 48)
    elif kind == "wrong layers":
        state = {key.replace("transformer_blocks", "blocks"): value for key, value in state.items()}
    elif kind == "half a layer":
        del state[layer.replace("lora_A", "lora_B")]
    elif kind == "no adapter":
        state = {"proj_out.weight": torch.zeros(2, 2)}
    save_file(state, path)
    if kind == "another rank":
        settings.write_text(settings.read_text().replace('"r": 2', '"r": 3'))
    elif kind == "another kind":
        LoKrConfig(target_modules=["to_q"]).save_pretrained(folder)
    elif kind == "no JSON":
        settings.write_text("{")
    elif kind == "no settings":
        settings.unlink()
    elif kind == "torn":
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "of diffusers":
        settings.unlink()
        path.rename(folder / "pytorch_lora_weights.safetensors")
        return str(folder / "pytorch_lora_weights.safetensors")
    return str(folder / "nowhere" if kind == "missing" else folder)


REFUSED = {
    "wrong inputs": r"another architecture: .*attn2\.to_k has 48 inputs, the base has 16 inputs there",
    "wrong layers": r"another architecture: blocks.*, the base has no such layer",
    "half a layer": r"is not whole: the factors of .*attn2\.to_k do not fit one another",
    "no adapter": "holds no LoRA weights: give an adapter that peft or diffalign wrote",
    "another rank": "cannot use the adapter .*size mismatch.*; get its whole file",
    "another kind": "cannot read the adapter .*: its adapter_config.json is of LoKrConfig, no LoRA",
    "no JSON": "cannot read the adapter",
    "no settings": "cannot read the adapter .*: Can't find 'adapter_config.json' at",
    "torn": "cannot read the adapter",
    "of diffusers": "cannot read the adapter .*: it is no adapter_model.safetensors; give one that peft or",
    "missing": "nowhere does not exist: give a folder",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_adapter_for_this_base_is_refused_in_one_line(
    kind: str, base: str, tmp_path: Path
) -> None:
    saved: Any = load_model("pixart", base)
    saved.start_training(AdapterSpec(rank=2), seed=0, with_reference=False)
    perturb(saved.denoiser.trainable_parameters(), 0.3)
    saved.save_adapter(str(tmp_path))
    path = broken(tmp_path, kind)
    model: Any = load_model("pixart", base)
    init = AdapterSpec(init=path)
    with pytest.raises(UserError, match=REFUSED[kind]) as refusal:
        model.start_training(init, seed=0, with_reference=True)
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match=REFUSED[kind]):
        model.load_adapter(path)
