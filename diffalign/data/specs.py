"""How pictures are fitted to a network and examples drawn: plain data, quick to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from diffalign.common.errors import UserError, unknown


@dataclass
class PreprocessSpec:
    """How pictures are fitted to the network.

    Args:
        resolution: pixels; buckets have about its square as area; null: the base's own.
        buckets: "aspect" keeps the aspect ratio of a group as well as a bucket can, "square" crops.
        crop: "center", or "random" with one fraction a group.
        max_crop: groups with a picture that would lose more than this share of its area are dropped and
            counted.
        flip: mirror half of the groups, both images alike; wrong for prompts that say left or right.
        size_conditioning: "target" tells the network the bucket's size for every image; "per_image" the
            picture's own size and crop, for SFT only: in a preference pair it would let the size give the
            label away.
        batch_size: pictures encoded at once.
        memory_limit_gb: refuse to keep more than this in memory; each process keeps all of the data.
    """

    resolution: int | None = None
    buckets: Literal["aspect", "square"] = "aspect"
    crop: Literal["center", "random"] = "center"
    max_crop: float = 0.3
    flip: bool = False
    size_conditioning: Literal["target", "per_image"] = "target"
    batch_size: int = 8
    memory_limit_gb: float = 16.0

    def __post_init__(self) -> None:
        for key, value, known in (
            ("buckets", self.buckets, ("aspect", "square")),
            ("crop", self.crop, ("center", "random")),
            ("size_conditioning", self.size_conditioning, ("target", "per_image")),
        ):
            if value not in known:
                raise unknown(f"preprocess.{key}", value, known)
        if not 0.0 <= self.max_crop <= 1.0:
            raise UserError(f"preprocess.max_crop is {self.max_crop}: use a share in [0, 1]; 1 keeps all")
        if self.batch_size < 1:
            raise UserError(f"preprocess.batch_size is {self.batch_size}: use 1 or more")
        if self.resolution is not None and self.resolution < 1:
            raise UserError(f"preprocess.resolution is {self.resolution}: use a number of pixels")
        if not self.memory_limit_gb > 0:
            raise UserError(f"preprocess.memory_limit_gb is {self.memory_limit_gb}: use a value above 0")

    def decides(self) -> dict[str, Any]:
        """The keys that decide what the network sees, and not how much is encoded at once."""
        return {
            key: value for key, value in vars(self).items() if key not in ("batch_size", "memory_limit_gb")
        }


@dataclass
class LoaderSpec:
    """How examples are drawn and put together.

    Args:
        batch_size: groups in a micro-batch; fewer where an epoch has no more of one bucket.
        num_workers: processes that put batches together beside the training.
        caption_dropout: share of groups trained on the branch that classifier-free guidance uses as its
            negative.
        posterior: "sample" draws latents from the VAE's posterior anew each epoch, "mean" takes its mean.
    """

    batch_size: int = 1
    num_workers: int = 0
    caption_dropout: float = 0.0
    posterior: str = "sample"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"loader.batch_size is {self.batch_size}: use 1 or more")
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise UserError(f"loader.caption_dropout is {self.caption_dropout}: use a share in [0, 1]")
        if self.posterior not in ("sample", "mean"):
            raise UserError(f"loader.posterior is {self.posterior!r}: use sample or mean")
        if self.num_workers < 0:
            raise UserError(f"loader.num_workers is {self.num_workers}: use 0 or more")
