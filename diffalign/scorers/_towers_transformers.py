"""Weights in the layout of transformers: config.json of a CLIPModel or SiglipModel beside model.safetensors.

What sets the two families apart is a row of `FAMILIES`. Sources: transformers 5, models/clip, models/siglip
and models/siglip2 (tokenizers and processors); open_clip, model_configs/ViT-*-SigLIP*.json.

Convention: SigLIP's text tower was trained on texts padded to its full length (64) on the right, without an
attention mask, and reads its feature at the last place, padding or not: another length or side, or a mask,
gives other numbers. Texts are lower-cased. SigLIP 1's tokenizer drops punctuation as well; SigLIP 2's keeps
it in transformers and drops it in open_clip, so that prompts with punctuation differ there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign.common import files
from diffalign.common.errors import UserError, brief
from diffalign.scorers._pixels import Preprocess
from diffalign.scorers._towers import Towers, check_end_token

LEGACY_END = 2
"""The end token's id in old configs of CLIP: transformers then looks for the largest id instead."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


@dataclass(frozen=True)
class _Family:
    """What sets one model_type apart.

    Attributes:
        model: transformers' class.
        preprocess: how pictures are prepared where the folder does not say (at the config's image_size).
        tokens: which of the tokenizer's outputs the text tower sees.
        padding_side: "right", or None: the tokenizer's own.
        lower: texts are lower-cased, unless the tokenizer's config says `do_lower_case: false`.
    """

    model: str
    preprocess: Preprocess
    tokens: tuple[str, ...] = ("input_ids", "attention_mask")
    padding_side: str | None = None
    lower: bool = False


FAMILIES = {
    "clip": _Family("CLIPModel", Preprocess(size=(224, 224), crop="floor")),
    "siglip": _Family(
        "SiglipModel",
        Preprocess(size=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="squash"),
        tokens=("input_ids",),
        padding_side="right",
        lower=True,
    ),
}


def transformers_folder(folder: Path, identity: str) -> Towers:
    """Returns the towers of a folder with a CLIPModel or SiglipModel of transformers.

    The activation (`hidden_act`: quick_gelu, gelu or gelu_pytorch_tanh) is the config's.

    Raises:
        UserError: another kind of model, missing or misfitting weights, or no tokenizer files.
    """
    import transformers

    kind = _family_name(folder)
    family = FAMILIES[kind]
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{folder} has no tokenizer files: copy tokenizer.json (or vocab.json and merges.txt) there"
        )
    model = load_model(getattr(transformers, family.model), folder, kind)
    with _loading(folder, kind):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text_config, image_size = model.config.text_config, model.config.vision_config.image_size
    if kind == "clip" and text_config.eos_token_id == LEGACY_END:
        check_end_token(torch.tensor(tokenizer("a").input_ids), tokenizer.eos_token_id, str(folder))
    lower = family.lower and tokenizer.init_kwargs.get("do_lower_case", True)

    def encode_texts(texts: list[str]) -> torch.Tensor:
        tokens = tokenizer(
            [text.lower() for text in texts] if lower else texts,
            padding="max_length",
            max_length=text_config.max_position_embeddings,
            truncation=True,
            padding_side=family.padding_side,
            return_tensors="pt",
        )
        return _features(
            model.get_text_features(**{name: tokens[name].to(model.device) for name in family.tokens})
        )

    def encode_images(pixels: torch.Tensor) -> torch.Tensor:
        return _features(model.get_image_features(pixel_values=pixels))

    bias = getattr(model, "logit_bias", None)
    default = dataclasses.replace(family.preprocess, size=(image_size, image_size))
    return Towers(
        module=model,
        preprocess=preprocess_from(image_settings(folder) or {}, default),
        encode_images=encode_images,
        encode_texts=encode_texts,
        name=folder.name,
        identity=identity,
        scale=model.logit_scale.detach().exp().item(),
        bias=0.0 if bias is None else bias.detach().item(),
    )


def _family_name(folder: Path) -> str:
    """Returns which of `FAMILIES` a folder's model is of."""
    kind = model_type(folder)
    if kind == "siglip2":  # the fixed-resolution checkpoints of SigLIP 2 call themselves siglip
        raise UserError(
            f"{folder} holds a NaFlex model (Siglip2Model), which is not supported: give a SigLIP 2 of fixed "
            "resolution, for example google/siglip2-so400m-patch14-384"
        )
    if kind not in FAMILIES:
        raise UserError(
            f"{folder}/config.json describes model_type {kind!r}, not {' or '.join(map(repr, FAMILIES))}: "
            f"give a folder of {' or '.join(family.model for family in FAMILIES.values())}"
        )
    return kind


def model_type(folder: Path) -> str | None:
    """Returns the model_type of a folder's config.json, None where it says none."""
    config = files.read_json(folder / "config.json")
    return config.get("model_type") if isinstance(config, dict) else None


def load_model(model_class: Any, folder: Path, kind: str, **options: Any) -> Any:
    """Returns a model of a class of transformers in float32, with every weight from the folder.

    Raises:
        UserError: weights that do not load, misfit, or are missing.
    """
    with _loading(folder, kind):
        model, report = model_class.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32, **options
        )
    # transformers fills missing weights with random numbers and only warns: scores of those would be noise.
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if missing:
        raise UserError(
            f"{kind} weights {folder} lack {len(missing)} tensors of their config, first {missing[0]}"
        )
    return model


def _features(output: Any) -> torch.Tensor:
    """Returns the projected features [B, d]: transformers 5 wraps them, 4 returned them bare."""
    features = output if isinstance(output, torch.Tensor) else output.pooler_output
    assert isinstance(features, torch.Tensor)
    return features


def image_settings(folder: Path) -> dict[str, Any] | None:
    """Returns the image processor's settings in a folder, None where it has none."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            content = files.read_json(folder / name)
            settings = content if key is None else content.get(key)
            if isinstance(settings, dict):
                return settings
    return None


def preprocess_from(settings: dict[str, Any], default: Preprocess) -> Preprocess:
    """Returns preprocessing from an image processor's settings; what they leave out is the default's.

    Sizes are numbers in old files: of both sides where the default squashes, else of the shorter. The crop is
    that of the processors which the published scores were made with; transformers 5 has torchvision's, too.
    """
    size: Any = settings.get("size") or default.shortest or default.size[0]
    crop: Any = settings.get("crop_size") or default.size[0]
    if isinstance(size, int):
        both = default.resize == "squash"
        size = {"height": size, "width": size} if both else {"shortest_edge": size}
    target = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    shortest = size.get("shortest_edge")
    squash = shortest is None and "height" in size
    return dataclasses.replace(
        default,
        size=(size["height"], size["width"]) if squash else target,
        mean=tuple(settings.get("image_mean") or default.mean),
        std=tuple(settings.get("image_std") or default.std),
        resize="squash" if squash else "shortest",
        shortest=shortest,
        crop="floor",
        # PIL's numbers.
        interpolation={2: "bilinear", 3: "bicubic"}.get(settings.get("resample", 0), default.interpolation),
    )


@contextlib.contextmanager
def _loading(folder: Path, kind: str) -> Iterator[None]:
    """Makes one line of whatever goes wrong in a load, without transformers' bar and notes.

    What matters of the notes is checked here (missing weights). Others only puzzle: SigLIP's published text
    configs have CLIP's token ids, which its vocabulary lacks and nothing reads.
    """
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # a torn file, a foreign architecture: libraries agree on no type
        raise UserError(f"{kind} weights {folder} do not load: {brief(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
