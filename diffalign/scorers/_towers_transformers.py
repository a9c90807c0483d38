"""CLIP weights in the layout of transformers: config.json of a CLIPModel beside model.safetensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from diffalign.common import files
from diffalign.common.errors import UserError, brief
from diffalign.scorers._pixels import Preprocess
from diffalign.scorers._towers import Towers, check_end_token

LEGACY_END = 2
"""The end token's id in old configs: transformers then looks for the largest id instead."""


def transformers_folder(folder: Path, identity: str) -> Towers:
    """Returns the towers of a folder with a transformers CLIPModel.

    The activation (`hidden_act`: quick_gelu or gelu) is the config's.

    Raises:
        UserError: another kind of model, missing or misfitting weights, or no tokenizer files.
    """
    from transformers import AutoTokenizer, CLIPModel

    config = files.read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "clip":
        raise UserError(
            f"{folder}/config.json describes model_type {kind!r}, not 'clip': give a CLIPModel folder"
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(
            f"{folder} has no tokenizer files: copy tokenizer.json (or vocab.json and merges.txt) there"
        )
    try:
        with _no_progress_bar():
            model: Any
            report: dict[str, Any]
            model, report = CLIPModel.from_pretrained(  # type: ignore[misc]  # its annotation forgets the report
                folder, output_loading_info=True, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a torn file, a foreign architecture: libraries agree on no type
        raise UserError(f"clip weights {folder} do not load: {brief(error)}") from error
    # transformers fills missing weights with random numbers and only warns: scores of those would be noise.
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if missing:
        raise UserError(
            f"clip weights {folder} lack {len(missing)} tensors of their config, first {missing[0]}"
        )
    length = model.config.text_config.max_position_embeddings
    if model.config.text_config.eos_token_id == LEGACY_END:
        check_end_token(torch.tensor(tokenizer("a").input_ids), tokenizer.eos_token_id, str(folder))

    def encode_texts(texts: list[str]) -> torch.Tensor:
        tokens = tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        tokens = {name: tokens[name].to(model.device) for name in ("input_ids", "attention_mask")}
        return _features(model.get_text_features(**tokens))

    def encode_images(pixels: torch.Tensor) -> torch.Tensor:
        return _features(model.get_image_features(pixel_values=pixels))

    return Towers(
        module=model,
        preprocess=_preprocess(folder, model.config.vision_config.image_size),
        encode_images=encode_images,
        encode_texts=encode_texts,
        name=folder.name,
        identity=identity,
        scale=model.logit_scale.detach().exp().item(),
        bias=0.0,
    )


def _features(output: Any) -> torch.Tensor:
    """Returns the projected features [B, d]: transformers 5 wraps them, 4 returned them bare."""
    features = output if isinstance(output, torch.Tensor) else output.pooler_output
    assert isinstance(features, torch.Tensor)
    return features


def _preprocess(folder: Path, image_size: int) -> Preprocess:
    """Returns the folder's own preprocessing, CLIP's where it has none."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            content = files.read_json(folder / name)
            settings = content if key is None else content.get(key)
            if isinstance(settings, dict):
                return _from_settings(settings, image_size)
    return Preprocess(size=(image_size, image_size))


def _from_settings(settings: dict[str, Any], image_size: int) -> Preprocess:
    """Returns preprocessing from an image processor's settings; sizes are numbers in old files."""
    size: Any = settings.get("size") or image_size
    crop: Any = settings.get("crop_size") or image_size
    target = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    shortest = size if isinstance(size, int) else size.get("shortest_edge")
    squash = shortest is None and "height" in size
    return Preprocess(
        size=(size["height"], size["width"]) if squash else target,
        mean=tuple(settings.get("image_mean") or Preprocess.mean),
        std=tuple(settings.get("image_std") or Preprocess.std),
        resize="squash" if squash else "shortest",
        shortest=shortest,
        # PIL's numbers: 2 is bilinear, 3 bicubic.
        interpolation="bilinear" if settings.get("resample") == 2 else "bicubic",
    )


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keeps transformers from drawing a bar over a load of seconds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
