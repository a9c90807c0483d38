"""A tiny architecture that open_clip knows by name, with CLIP's own vocabulary, and weight files of it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file

from tests.tiny_clip import model_config, write_open_clip

NAME = "tiny-test-arch"


def known_arch() -> str:
    """The name of the architecture; open_clip knows it from the first call on."""
    if NAME not in open_clip.list_models():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{NAME}.json"
            path.write_text(json.dumps(model_config(49408, own_tokenizer=False, quick_gelu=True)))
            open_clip.add_model_config(path)
    return NAME


def write_state_dict(path: Path, *, prefix: str = "", seed: int = 0) -> Path:
    """Writes a weight file like HPS v2's: tensors under `state_dict`; returns its path."""
    source = write_open_clip(
        path.parent / f"{path.stem}-source", own_tokenizer=False, quick_gelu=True, seed=seed
    )
    state = load_file(source / "open_clip_model.safetensors")
    torch.save({"state_dict": {f"{prefix}{key}": tensor for key, tensor in state.items()}}, path)
    return path
