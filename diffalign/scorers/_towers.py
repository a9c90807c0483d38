"""CLIP weights from any public layout behind one pair of functions: pictures -> features, texts -> features.

Layouts, told apart by their files:
    open_clip folder      open_clip_config.json + open_clip_*.safetensors (or .bin) (+ tokenizer files)
    transformers folder   config.json of a CLIPModel + model.safetensors (+ tokenizer and preprocessor files)
    hub id                a repository of either layout (with both: open_clip)
    one weight file       open_clip state dict, bare or under `state_dict`; needs the architecture's name
    OpenAI's archive      TorchScript .pt; says its own architecture
    open_clip tag         `openai`, `laion2b_s32b_b79k`, ...; needs the architecture's name

Convention: QuickGELU is x * sigmoid(1.702 x), and weights trained with it are wrong under GELU. OpenAI's
archives always use it, an open_clip folder says so in its config, a transformers folder in `hidden_act`, a
tag in open_clip's table; for a bare weight file the architecture's name decides (`ViT-L-14-quickgelu`).
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import re
import warnings
import weakref
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from diffalign.common import files
from diffalign.common.errors import UserError, brief, unknown
from diffalign.scorers._memo import PictureMemo, TextMemo
from diffalign.scorers._pixels import OPENAI_MEAN, OPENAI_STD, Mode, Preprocess
from diffalign.scorers._weights import (
    SETTINGS,
    content_of,
    hub_folder,
    hub_identity,
    is_hub_id,
    not_tensors,
    settings_in,
)

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_*"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Towers:
    """Both towers of a CLIP model, frozen, in evaluation mode.

    Attributes:
        module: the model itself.
        name: where the weights came from, for messages and versions.
        identity: what identifies the weights' content (a hash, or a hub revision).
        scale, bias: the model's own logits are `scale * cosine + bias`.
    """

    module: torch.nn.Module
    preprocess: Preprocess
    encode_images: Callable[[torch.Tensor], torch.Tensor]
    encode_texts: Callable[[list[str]], torch.Tensor]
    name: str
    identity: str
    scale: float
    bias: float
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    memo: PictureMemo = field(default_factory=PictureMemo)

    def __post_init__(self) -> None:
        self._texts = TextMemo(self._encoded_texts)

    def images(
        self,
        images: list[Image.Image] | torch.Tensor,
        preprocess: Preprocess | None = None,
        mode: Mode = "reference",
    ) -> torch.Tensor:
        """Returns L2-normalised features float32 [B, d] of pictures.

        They are prepared as the weights' own files say, or by another `preprocess`.
        """
        prepare = preprocess or self.preprocess

        def encode(pixels: torch.Tensor) -> torch.Tensor:
            with self._own_precision():
                return F.normalize(self.encode_images(pixels.to(self.device, self.dtype)).float(), dim=-1)

        if isinstance(images, torch.Tensor):
            return encode(prepare(images, mode))
        return self.memo(
            images, ("features", prepare, mode), lambda chosen: encode(self._pixels(chosen, prepare, mode))
        )

    def prepare_ahead(
        self, images: list[Image.Image], preprocess: Preprocess | None = None, mode: Mode = "reference"
    ) -> None:
        """Computes the pixels of pictures ahead, where a pass keeps them; other threads may."""
        self._pixels(images, preprocess or self.preprocess, mode)

    def _pixels(self, images: list[Image.Image], prepare: Preprocess, mode: Mode) -> torch.Tensor:
        return self.memo(images, ("pixels", prepare, mode), lambda chosen: prepare(chosen, mode))

    def texts(self, texts: list[str]) -> torch.Tensor:
        """Returns L2-normalised features float32 [B, d] of texts, without a gradient."""
        return self._texts(texts)

    def _encoded_texts(self, texts: list[str]) -> torch.Tensor:
        with self._own_precision():
            return F.normalize(self.encode_texts(texts).float(), dim=-1)

    def _own_precision(self) -> torch.autocast:
        """Returns the context in which a caller's autocast does not change (and texts keep) other numbers."""
        return torch.autocast(self.device.split(":")[0], enabled=False)


_opened: weakref.WeakValueDictionary[Any, Towers] = weakref.WeakValueDictionary()
"""Towers in use: scorers that name the same weights share them."""


def open_towers(
    path: str,
    *,
    arch: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
) -> Towers:
    """Returns the towers found at `path`, on `device`; those that are open already are given again.

    Args:
        path: folder, weight file, hub id, or (with `arch`) one of open_clip's tags.
        arch: open_clip's name of the architecture, for weights that do not say it themselves.
        revision: of a hub id.
        device: where the towers go.
        dtype: fp32 | bf16 | fp16, what the networks compute in.

    Raises:
        UserError: nothing usable is at `path`, or weights and architecture do not fit.
    """
    key = (path, arch, revision, device, dtype, _stamp(Path(path).expanduser()))
    towers = _opened.get(key)
    if towers is None:
        towers = _open(path, arch, revision)
        towers.module.requires_grad_(False).eval().to(device, DTYPES[dtype])
        towers.device, towers.dtype = device, DTYPES[dtype]
        _opened[key] = towers
    return towers


def _refuse_tag(path: str, arch: str | None) -> None:
    """Raises UserError where one of open_clip's tags lacks its architecture, or has one that nobody knows."""
    import open_clip

    archs = [name for name, tag in open_clip.list_pretrained() if tag == path]
    if archs and arch is None:
        known = "ViT-L-14" if "ViT-L-14" in archs else archs[0]
        raise UserError(f"weights '{path}' are a tag of open_clip's: give its arch, for example arch={known}")
    if archs and arch not in open_clip.list_models():
        raise unknown("open_clip architecture", str(arch), open_clip.list_models())


def _stamp(place: Path) -> tuple[tuple[str, int, int], ...]:
    """Returns what changes when the files of a local place are written anew."""
    found = sorted(place.iterdir()) if place.is_dir() else [place] if place.is_file() else []
    return tuple((p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in found)


def _open(path: str, arch: str | None, revision: str | None) -> Towers:
    """Returns the towers found at `path`, on the CPU in float32."""
    place = Path(path).expanduser()
    if place.is_dir():
        return _from_folder(place, arch, identity="")
    if place.is_file():
        return _from_file(place, arch)
    if arch is not None and path in _tags(arch):
        return _from_tag(path, arch)
    if is_hub_id(path) and place.suffix != ".safetensors":
        folder = hub_folder(path, revision, hub_files)
        towers = _from_folder(folder, arch, identity=hub_identity(folder))
        towers.name = path
        return towers
    _refuse_tag(path, arch)
    tags = ""
    if arch is not None and _tags(arch):
        tags = f", or one of the {arch} tags {', '.join(_tags(arch))}"
    raise UserError(f"weights '{path}' do not exist: give a folder, a weight file, a hub id (org/name){tags}")


def _from_folder(folder: Path, arch: str | None, identity: str) -> Towers:
    """Returns the towers of a folder of either layout."""
    open_clip_weights = sorted(folder.glob(f"{OPEN_CLIP_WEIGHTS}.safetensors")) + sorted(
        path for suffix in ("bin", "pt", "pth") for path in folder.glob(f"{OPEN_CLIP_WEIGHTS}.{suffix}")
    )
    has_config = (folder / "config.json").is_file()
    if (folder / OPEN_CLIP_CONFIG).is_file() and (open_clip_weights or not has_config):
        if not open_clip_weights:
            raise UserError(
                f"{folder} has {OPEN_CLIP_CONFIG} but no weights: put open_clip_model.safetensors there"
            )
        if arch is not None:
            raise UserError(
                f"arch={arch} with {folder}: its {OPEN_CLIP_CONFIG} already says it, leave arch out"
            )
        return _open_clip_folder(folder, identity or content_of(*settings_in(folder), open_clip_weights[0]))
    if has_config:
        from diffalign.scorers._towers_transformers import transformers_folder

        if arch is not None:
            raise UserError(f"arch={arch} with {folder}: its config.json already says it, leave arch out")
        weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if not weights:
            raise UserError(f"{folder} has config.json but no weights: put model.safetensors there")
        return transformers_folder(folder, identity or content_of(*settings_in(folder), *weights))
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{folder} holds no CLIP or SigLIP model (found: {found}): it needs {OPEN_CLIP_CONFIG} with "
        "open_clip_model.safetensors, or config.json with model.safetensors"
    )


def _open_clip_folder(folder: Path, identity: str) -> Towers:
    """Returns the towers of a folder in open_clip's checkpoint layout."""
    config = files.read_json(folder / OPEN_CLIP_CONFIG)
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise UserError(f"{folder / OPEN_CLIP_CONFIG} has no model_cfg: it is no open_clip checkpoint")
    return _build_open_clip(f"local-dir:{folder}", name=folder.name, identity=identity)


def _from_tag(tag: str, arch: str) -> Towers:
    """Returns the towers of one of open_clip's tags, with the activation that it was trained with."""
    return _build_open_clip(
        arch, pretrained=tag, quick_gelu=tag_uses_quick_gelu(arch, tag), name=f"{arch}/{tag}", identity=tag
    )


def tag_uses_quick_gelu(arch: str, tag: str) -> bool:
    """Returns whether the weights of an open_clip tag were trained with QuickGELU.

    open_clip itself builds `ViT-L-14` + `openai` with GELU and only warns, unless it is told.
    """
    import open_clip

    return bool(open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu", False))


def _from_file(path: Path, arch: str | None) -> Towers:
    """Returns the towers of one weight file."""
    if _is_torchscript(path):
        return _openai_archive(path)
    if arch is None:
        raise UserError(
            f"weights {path} do not say their architecture: give arch=, for example arch=ViT-H-14"
        )
    import open_clip

    if arch not in open_clip.list_models():
        raise unknown("open_clip architecture", arch, open_clip.list_models())
    return _build_open_clip(arch, pretrained=str(path), name=f"{arch}/{path.stem}", identity=content_of(path))


def _build_open_clip(
    model_name: str, *, name: str, identity: str, pretrained: str | None = None, quick_gelu: bool = False
) -> Towers:
    """Returns towers built by open_clip from its own name of a model."""
    import open_clip

    with _quiet():
        try:
            model = open_clip.create_model(
                model_name,
                pretrained,
                force_quick_gelu=quick_gelu,
                require_pretrained=True,
                weights_only=True,
            )
            tokenizer = open_clip.get_tokenizer(model_name)
        except pickle.UnpicklingError as error:
            raise UserError(not_tensors(name)) from error
        except Exception as error:  # a torn file, a foreign architecture: libraries agree on no type
            raise UserError(f"weights {name} do not load: {brief(error)}") from error
    return _open_towers(model, tokenizer, name, identity)


def _openai_archive(path: Path) -> Towers:
    """Returns the towers of an OpenAI archive; its tensors say the architecture (with QuickGELU)."""
    import open_clip

    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # torch.jit.load: the published files have no other reader
        try:
            model = open_clip.load_openai_model(str(path), precision="fp32", device="cpu")
        except Exception as error:
            raise UserError(f"{path} is no CLIP archive of OpenAI's: {brief(error)}") from error
    return _open_towers(model, open_clip.get_tokenizer("ViT-B-32"), path.stem, content_of(path))


def _open_towers(model: Any, tokenizer: Any, name: str, identity: str) -> Towers:
    """Returns an open_clip model and tokenizer as towers."""
    settings = dict(getattr(model.visual, "preprocess_cfg", {}))
    size = settings.get("size", model.visual.image_size)
    preprocess = Preprocess(
        size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[-1])),
        mean=tuple(settings.get("mean", OPENAI_MEAN)),
        std=tuple(settings.get("std", OPENAI_STD)),
        resize=settings.get("resize_mode", "shortest"),
        # open_clip reads "random" as bicubic outside training.
        interpolation="bilinear" if settings.get("interpolation") == "bilinear" else "bicubic",
        fill=settings.get("fill_color", 0),
    )
    context_length = int(getattr(model, "context_length", None) or tokenizer.context_length)
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None and getattr(model, "text_pool_type", None) == "argmax":
        check_end_token(tokenizer(["a"], context_length)[0], inner.eos_token_id, name)

    def encode_texts(texts: list[str]) -> torch.Tensor:
        return model.encode_text(tokenizer(texts, context_length).to(model.logit_scale.device))

    bias = getattr(model, "logit_bias", None)
    return Towers(
        module=model,
        preprocess=preprocess,
        encode_images=model.encode_image,
        encode_texts=encode_texts,
        name=name,
        identity=identity,
        scale=model.logit_scale.detach().exp().item(),
        bias=0.0 if bias is None else bias.detach().item(),
    )


def check_end_token(ids: torch.Tensor, end: int | None, name: str) -> None:
    """Checks that the largest token id of a text is its end token, where a text tower looks for its feature.

    Raises:
        UserError: another token has the largest id, so that the feature would be read at the wrong place.
    """
    largest = int(ids.max())
    if end is not None and largest != end:
        raise UserError(
            f"weights {name} read the text's feature at the largest token id ({largest}), but the end "
            f"token is {end}: set its id in the model's config, or give it the largest id"
        )


def hub_files(listing: list[str]) -> list[str]:
    """Returns which files of a repository to download: the weights of one layout, and all small files."""
    kinds = [r"open_clip_\w+", r"(pytorch_)?model(-\d+-of-\d+)?"]
    if OPEN_CLIP_CONFIG not in listing:
        kinds = kinds[1:]
    for kind in kinds:
        for suffix in ("safetensors", "bin"):
            weights = [name for name in listing if re.fullmatch(rf"{kind}\.{suffix}", name)]
            if weights:
                small = [name for name in listing if "/" not in name and name.endswith(SETTINGS)]
                return [*small, *weights]
    return ["*.json", "*.txt"]


def _tags(arch: str) -> list[str]:
    """Returns open_clip's tags of an architecture (none for an unknown one)."""
    import open_clip

    return list(open_clip.list_pretrained_tags_by_model(arch))


def _is_torchscript(path: Path) -> bool:
    """Returns whether a file is a TorchScript archive (they carry code beside the tensors)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name or name.endswith("constants.pkl") for name in archive.namelist())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences open_clip's notes on the root logger; what matters of them is checked here."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
