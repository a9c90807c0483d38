"""ImageReward: how people would rate a picture for its prompt (Xu et al., NeurIPS 2023, arXiv 2304.05977).

BLIP (ViT-L/16 at 224 pixels; BERT-base that looks at the picture in every layer) reads picture and prompt as
one, and a stack of affine layers turns the text's first token into the reward. Source of all figures:
THUDM/ImageReward, ImageReward/ImageReward.py (class ImageReward, `_transform`) and models/BLIP.

Scales (`scale`):
    standard    (mlp - 0.16717...) / 1.03333..., about -2.3 to 2: the authors' own, mean 0 and deviation 1 on
                their data
    mlp         what the last layer gives

Convention: texts are padded and cut to 35 tokens, [CLS] and [SEP] among them: of a longer prompt the end is
not read, and its score says nothing of it. The padding is masked.
Convention: the authors resize a picture in its own mode and make it RGB afterwards; here it becomes RGB
first, as in every scorer. Nothing changes for RGB and grey pictures. Measured at full size with random
weights, whose scores span 1.3: 1e-4 for CMYK, 0.04 for a palette (PIL resizes it without interpolation), up
to 0.2 with transparency, 0.5 for pictures of one bit.
Convention: in half precision the head stays in float32, as in the authors' code. By the same measure bf16 is
worth 0.03, and mode "tensor" 0.01.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from diffalign.common.errors import UserError
from diffalign.scorers._base import Scorer, Scores
from diffalign.scorers._tower_scorer import DTYPES, MODES

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diffalign.scorers._base import Images
    from diffalign.scorers._blip import BlipReward
    from diffalign.scorers._memo import PictureMemo

SCALES = ("standard", "mlp")
MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35


@dataclass(kw_only=True)
class Plugin(Scorer):
    """ImageReward of pictures for their prompts.

    Args:
        path: a folder, a weight file, or a hub id.
        file: name of the weight file in the folder or repository; med_config.json beside it is read, too.
        revision: of a hub id.
        tokenizer: folder (vocab.txt or tokenizer.json) or hub id of BERT's vocabulary; BLIP's two tokens are
            added.
        scale: standard | mlp.
        mode: reference: pictures are prepared as by the authors, from 8 bits; tensor: by torch, from floats,
            so that a gradient reaches them.
        dtype: fp32 | bf16 | fp16, what the encoders compute in; half precision makes false ties.
        batch_size: pictures at a time.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})

    path: str = "THUDM/ImageReward"
    file: str = "ImageReward.pt"
    revision: str | None = None
    tokenizer: str = "bert-base-uncased"
    scale: str = "standard"
    mode: Literal["reference", "tensor"] = "reference"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: int = 32

    def __post_init__(self) -> None:
        self._check_options(scale=SCALES, mode=MODES, dtype=DTYPES)
        for what, given in (("path", self.path), ("file", self.file), ("tokenizer", self.tokenizer)):
            if not given:
                raise UserError(f"scorer imagereward: {what} is empty: leave it out for the published one")
        self._model: BlipReward | None = None

    @property
    def differentiable(self) -> bool:
        """In mode tensor: the authors' own preparation goes through 8 bits."""
        return self.mode == "tensor"

    def load(self, device: str = "cpu") -> Self:
        """Returns this scorer with its weights on `device`.

        Raises:
            UserError: no such weights or vocabulary, or they are not those of an ImageReward.
        """
        from diffalign.scorers import _blip
        from diffalign.scorers._memo import PictureMemo
        from diffalign.scorers._pixels import Preprocess
        from diffalign.scorers._towers import DTYPES as TORCH_DTYPES
        from diffalign.scorers._weights import content_of, hub_identity, read_tensors, weight_file

        weights = weight_file(self.path, self.file, self.revision)
        config = weights.parent / _blip.CONFIG
        if Path(self.path).expanduser().exists():
            name = weights.stem
            identity = content_of(*(place for place in (weights, config) if place.is_file()))
        else:  # a file of the hub; the config is not there yet
            config = weight_file(self.path, _blip.CONFIG, self.revision)
            name, identity = self.path, hub_identity(weights.parent)
        model = _blip.build(read_tensors(weights), _blip.read_config(config), str(weights))
        self._tokenizer, words = _blip.open_tokenizer(self.tokenizer, model.vocabulary)
        model.place(device, TORCH_DTYPES[self.dtype])
        self._model, self._device = model, device
        self._preprocess = Preprocess(size=(model.image_size, model.image_size))
        self._memo = PictureMemo()
        self._length = min(TOKENS, model.positions)
        self.version = f"{name}@{identity}+tokenizer@{words}"
        return self

    def modules(self) -> list[torch.nn.Module]:
        """Returns the network."""
        return [self.model]

    def memos(self) -> list[PictureMemo]:
        """Returns where pixels of pictures can be kept during a pass; features are too large to be kept."""
        return [self._memo] if self._model is not None else []

    def prepare_ahead(self, images: list[Image.Image]) -> None:
        """Computes the pixels of pictures ahead."""
        _ = self.model  # refuses where nothing is loaded
        self._pixels(images)

    @property
    def model(self) -> BlipReward:
        """The loaded network."""
        if self._model is None:
            raise UserError("scorer imagereward has no weights yet: call .load() first")
        return self._model

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        assert prompts is not None
        model = self.model
        pixels = self._pixels(images).to(self._device, model.vision.dtype)
        texts = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        ).to(self._device)
        values = model(pixels, texts.input_ids, texts.attention_mask)
        if self.scale == "standard":
            values = (values - MEAN) / STD
        return Scores(values.cpu())

    def _pixels(self, images: Images) -> torch.Tensor:
        """Returns prepared pixels, float32 [B, 3, H, W]; in a pass those of a picture are kept."""
        if not isinstance(images, list):
            return self._preprocess(images, self.mode)
        kind = (self._preprocess, self.mode)
        return self._memo(images, kind, lambda chosen: self._preprocess(chosen, self.mode))
