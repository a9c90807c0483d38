"""Bases at their true size with random weights: nothing to download, every shape and cost as in the real
thing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from full_size_bases import BASES, Base, Part
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.common import files
from diffalign.models import _tiny, _tiny_dit
from diffalign.models._parts import quiet_libraries

SHARD = 2_000_000_000
"""Bytes of a weight file, and so of the memory that writing takes."""
FILES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""How either library calls its weight files."""


def write(name: str, folder: Path, *, seed: int = 0, whole_encoders: bool = True) -> None:
    """Writes a base in bf16, file by file, unless the folder already holds it.

    Args:
        name: one of `BASES`.
        folder: where to.
        seed: of the weights.
        whole_encoders: False gives the text encoders two layers each: T5 then takes 1.6 GB, not 9.5.
    """
    if (folder / "model_index.json").is_file():
        return
    base = BASES[name]
    generator = torch.Generator().manual_seed(seed)
    for part, (library, class_name, config) in parts_of(base, whole_encoders=whole_encoders).items():
        _write_weights(_empty(library, class_name, config), folder / part, FILES[library], generator)
    write_configs(name, folder, whole_encoders=whole_encoders)


def write_configs(name: str, folder: Path, *, whole_encoders: bool = True) -> None:
    """Writes all of a base but its weights: configurations, tokenizers, scheduler and the index."""
    base = BASES[name]
    index: dict[str, Any] = {"_class_name": base.pipeline, "_diffusers_version": diffusers.__version__}
    for part, (library, class_name, config) in parts_of(base, whole_encoders=whole_encoders).items():
        index[part] = [library, class_name]
        if library == "diffusers":
            files.write_json(folder / part / "config.json", {"_class_name": class_name, **config})
        else:
            _class(library, class_name).config_class(**config).save_pretrained(folder / part)
    for part, (class_name, _) in base.encoders.items():
        tokenizer = _tiny_dit.t5_tokenizer() if class_name.startswith("T5") else _tiny.tokenizer()
        part = part.replace("text_encoder", "tokenizer")
        tokenizer.save_pretrained(folder / part)
        index[part] = ["transformers", type(tokenizer).__name__]
    scheduler, settings = base.scheduler
    _class("diffusers", scheduler)(**settings).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", scheduler]
    files.write_json(folder / "model_index.json", index)  # last: with it the folder is whole


def parts_of(base: Base, *, whole_encoders: bool) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Library, class and configuration of each part that has weights."""
    encoders = {
        part: encoder if whole_encoders else _short(encoder) for part, encoder in base.encoders.items()
    }
    return {
        **{part: ("transformers", *encoder) for part, encoder in encoders.items()},
        "vae": ("diffusers", "AutoencoderKL", base.vae),
        base.network_part: ("diffusers", *base.network),
    }


def _short(encoder: Part) -> Part:
    class_name, config = encoder
    layers = "num_layers" if "num_layers" in config else "num_hidden_layers"
    return class_name, config | {layers: 2}


def _class(library: str, name: str) -> Any:
    return getattr(importlib.import_module(library), name)


def _empty(library: str, class_name: str, config: dict[str, Any]) -> nn.Module:
    """The part without memory for weights."""
    cls = _class(library, class_name)
    with init_empty_weights():
        module: nn.Module = cls(**config) if library == "diffusers" else cls(cls.config_class(**config))
    with quiet_libraries():  # diffusers names the layers to keep in float32: none
        return module.to(torch.bfloat16)


def _write_weights(module: nn.Module, folder: Path, stem: str, generator: torch.Generator) -> None:
    """Draws and writes the weights of a part, one file after another."""
    folder.mkdir(parents=True, exist_ok=True)
    tied = getattr(module, "_tied_weights_keys", None) or ()
    state = {key: tensor for key, tensor in module.state_dict().items() if key not in tied}
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=SHARD
    )
    for file, keys in plan.filename_to_tensors.items():
        tensors = {key: _drawn(key, state[key], generator) for key in keys}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        files.write_json(folder / f"{stem}.safetensors.index.json", index)


def _drawn(key: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in place of a tensor without memory, as large as torch's layers draw them.

    Norms begin as the identity; a buffer, such as positions, has its numbers already.
    """
    if not tensor.is_meta:
        return tensor.contiguous()
    numbers = torch.empty(tensor.shape, dtype=tensor.dtype)
    if tensor.ndim < 2:
        return numbers.fill_(0.0 if key.endswith("bias") else 1.0)
    bound = tensor[0].numel() ** -0.5
    return numbers.uniform_(-bound, bound, generator=generator)
