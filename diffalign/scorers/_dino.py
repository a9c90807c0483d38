"""DINO weights (v1, v2, v3) in the layout of transformers, as a tower that knows pictures only.

The feature is the class token after the last layer norm, `last_hidden_state[:, 0]`, in all families. It is
also the `pooler_output` of DINOv2 and v3; that of a ViT goes through a pooler which DINO v1 was never trained
with, and which is left out here.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from diffalign.common.errors import UserError
from diffalign.data.pictures import BadImage, ImageRef
from diffalign.scorers._pixels import Mode, Preprocess
from diffalign.scorers._towers import DTYPES, Towers, hub_files
from diffalign.scorers._towers_transformers import image_settings, load_model, model_type, preprocess_from
from diffalign.scorers._weights import local_or_hub

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
AUTHORS = Preprocess(size=(224, 224), shortest=256, mean=IMAGENET_MEAN, std=IMAGENET_STD)
"""How the authors of DINO and DINOv2 prepare pictures for evaluation."""
KEPT = 1024
"""Features of so many reference files are kept, the latest used."""


@dataclass(frozen=True)
class _Family:
    """What sets one model_type apart.

    Attributes:
        model: transformers' class.
        resize, interpolation, resizes: of `Preprocess`, where the folder's settings leave them open.
        building: options of its constructor.
        calling: options of its forward pass.
    """

    model: str
    resize: str = "shortest"
    interpolation: str = "bicubic"
    resizes: str = "picture"
    building: tuple[tuple[str, Any], ...] = ()
    calling: tuple[tuple[str, Any], ...] = ()


FAMILIES = {
    "dinov2": _Family("Dinov2Model"),
    "dinov2_with_registers": _Family("Dinov2WithRegistersModel"),
    # A ViT takes another size than its own only when asked to; a bare number in its settings is both sides.
    "vit": _Family(
        "ViTModel",
        resize="squash",
        interpolation="bilinear",
        building=(("add_pooling_layer", False),),
        calling=(("interpolate_pos_encoding", True),),
    ),
    # Its image processor resizes floats, not bytes.
    "dinov3_vit": _Family("DINOv3ViTModel", resize="squash", interpolation="bilinear", resizes="tensor"),
}


def dino_tower(path: str, *, revision: str | None, device: str, dtype: str) -> Towers:
    """Returns the tower of a folder or hub id, on `device`; texts are refused.

    Raises:
        UserError: nothing there, another kind of model, missing weights, or no preprocessor_config.json.
    """
    folder, name, identity = local_or_hub(path, revision, hub_files, "dino weights")
    towers = _from_folder(folder, name, identity)
    towers.module.requires_grad_(False).eval().to(device, DTYPES[dtype])
    towers.device, towers.dtype = device, DTYPES[dtype]
    return towers


def _from_folder(folder: Path, name: str, identity: str) -> Towers:
    """Returns the tower of a folder, on the CPU in float32."""
    import transformers

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: give a folder with a DINO model of transformers")
    kind = model_type(folder)
    if kind not in FAMILIES:
        raise UserError(
            f"{folder}/config.json describes model_type {kind!r}, not one of {', '.join(FAMILIES)}: "
            "give a DINO model, for example facebook/dinov2-base"
        )
    family, settings = FAMILIES[kind], image_settings(folder)
    if settings is None:
        raise UserError(
            f"{folder} does not say how pictures are prepared: copy preprocessor_config.json there"
        )
    if not any(any(folder.glob(kind)) for kind in ("model*.safetensors", "pytorch_model*.bin")):
        raise UserError(f"{folder} has config.json but no weights: put model.safetensors there")
    model = load_model(getattr(transformers, family.model), folder, kind, **dict(family.building))
    default = Preprocess(
        size=(224, 224),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resize=family.resize,
        interpolation=family.interpolation,
        resizes=family.resizes,
    )

    def encode_images(pixels: torch.Tensor) -> torch.Tensor:
        found: Any = model(pixel_values=pixels, **dict(family.calling)).last_hidden_state[:, 0]
        return found

    def encode_texts(texts: list[str]) -> torch.Tensor:
        raise UserError(f"dino weights {folder} have no text tower: use scorer clip or siglip for texts")

    return Towers(
        module=model,
        preprocess=preprocess_from(settings, default),
        encode_images=encode_images,
        encode_texts=encode_texts,
        name=name,
        identity=identity,
        scale=1.0,
        bias=0.0,
    )


class FileMemo:
    """Features of picture files by path, as long as the files stay as they are."""

    def __init__(self, towers: Towers) -> None:
        self._towers = towers
        self._known: OrderedDict[tuple[Hashable, ...], torch.Tensor] = OrderedDict()

    def __call__(
        self, paths: list[str], preprocess: Preprocess | None, mode: Mode, batch_size: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Returns L2-normalised features float32 [d] by path, and what is wrong with the other files."""
        known: dict[str, torch.Tensor] = {}
        broken: dict[str, str] = {}
        missing: dict[str, tuple[Hashable, ...]] = {}
        for path in dict.fromkeys(paths):
            key = (path, *_stamp(path), preprocess, mode)
            if key in self._known:
                self._known.move_to_end(key)
                known[path] = self._known[key]
            else:
                missing[path] = key
        for start in range(0, len(missing), batch_size):
            pictures: dict[str, Image.Image] = {}
            for path in list(missing)[start : start + batch_size]:
                try:
                    pictures[path] = ImageRef(path=Path(path)).open()
                except BadImage as error:
                    broken[path] = f"reference {error}"
            if pictures:
                fresh = self._encode(list(pictures.values()), preprocess, mode)
                known |= zip(pictures, fresh, strict=True)
        for path in missing:
            if path in known:
                self._known[missing[path]] = known[path]
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return known, broken

    def _encode(self, pictures: list[Image.Image], preprocess: Preprocess | None, mode: Mode) -> torch.Tensor:
        """Returns the features [B, d], past the towers' memo.

        That one knows a picture by its identity, which passes to another one when the picture is thrown away.
        """
        towers = self._towers
        with torch.no_grad():
            pixels = (preprocess or towers.preprocess)(pictures, mode).to(towers.device, towers.dtype)
            return F.normalize(towers.encode_images(pixels).float(), dim=-1)


def _stamp(path: str) -> tuple[int, int]:
    """Returns what changes when a file is written anew; nothing of a file that is not there."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # opening it will say what is wrong
        return (0, 0)
    return (stat.st_mtime_ns, stat.st_size)
