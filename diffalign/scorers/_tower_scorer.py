"""What the scorers that stand on a CLIP-like model share: its weights, and features of pictures and texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from diffalign.common.errors import UserError
from diffalign.common.plugins import plugin_name
from diffalign.scorers._base import Scorer, check_images

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diffalign.scorers._base import Images
    from diffalign.scorers._memo import PictureMemo
    from diffalign.scorers._pixels import Preprocess
    from diffalign.scorers._towers import Towers

MODES = ("reference", "tensor")
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(kw_only=True)
class TowerScorer(Scorer):
    """Base of scorers by features of both towers, or of the picture's alone.

    Args:
        path: a folder (open_clip or transformers layout), a weight file, a hub id, or with `arch` an
            open_clip tag.
        arch: open_clip's name of the architecture, for a weight file or tag (ViT-L-14, ViT-H-14, ...).
        revision: of a hub id.
        mode: reference: pictures are prepared as by the authors, from 8 bits; tensor: by torch, from floats,
            so that a gradient reaches them.
        dtype: fp32 | bf16 | fp16, what the networks compute in; half precision makes false ties.
        batch_size: pictures at a time.
    """

    scales: ClassVar[tuple[str, ...]] = ()
    """What `scale` may be, where there is a choice."""

    path: str
    arch: str | None = None
    revision: str | None = None
    mode: Literal["reference", "tensor"] = "reference"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: int = 32

    def __post_init__(self) -> None:
        self._check_options(mode=MODES, dtype=DTYPES, scale=self.scales or (self.scale,))
        if not self.path:
            raise UserError(
                f"scorer {plugin_name(self)}: path is empty: give a folder, a weight file or a hub id"
            )
        self._towers: Towers | None = None

    @property
    def differentiable(self) -> bool:
        """In mode tensor: the authors' own preparation goes through 8 bits."""
        return self.mode == "tensor"

    def load(self, device: str = "cpu") -> Self:
        """Returns this scorer with its weights on `device`."""
        self._towers = self._open(device)
        self.version = f"{self._towers.name}@{self._towers.identity}"
        return self

    def _open(self, device: str) -> Towers:
        from diffalign.scorers._towers import open_towers

        return open_towers(self.path, arch=self.arch, revision=self.revision, device=device, dtype=self.dtype)

    @property
    def preprocess(self) -> Preprocess | None:
        """How pictures are prepared; None: as the weights' own files say."""
        return None

    def modules(self) -> list[torch.nn.Module]:
        """Returns the network."""
        return [self.towers.module]

    def memos(self) -> list[PictureMemo]:
        """Returns where features of pictures can be kept during a pass."""
        return [self.towers.memo]

    def prepare_ahead(self, images: list[Image.Image]) -> None:
        """Computes the pixels of pictures ahead."""
        self.towers.prepare_ahead(images, self.preprocess, self.mode)

    @property
    def towers(self) -> Towers:
        """The loaded towers."""
        if self._towers is None:
            raise UserError(f"scorer {plugin_name(self)} has no weights yet: call .load() first")
        return self._towers

    def embed_images(self, images: Images) -> torch.Tensor:
        """Returns L2-normalised picture features float32 [B, d], for distances and diversity.

        Raises:
            UserError: as in `score`.
        """
        import torch

        check_images(images, plugin_name(self))
        batches = [
            images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size)
        ]
        with torch.no_grad():
            return torch.cat([self._features(batch).cpu() for batch in batches])

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Returns L2-normalised text features float32 [B, d]."""
        return self.towers.texts(texts).cpu()

    def _features(self, images: Images) -> torch.Tensor:
        """Returns L2-normalised features float32 [B, d] of one batch, on the device."""
        return self.towers.images(images, self.preprocess, self.mode)

    def _cosines(self, images: Images, texts: list[str]) -> torch.Tensor:
        """Returns the cosine of each picture and its own text, float32 [B], on the device."""
        cosines: Any = (self._features(images) * self.towers.texts(texts)).sum(dim=-1)
        return cosines
