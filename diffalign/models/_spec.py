"""Which weights a backbone runs on and what of it is trained: plain data, quick to import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from diffalign.common.errors import UserError, unknown

if TYPE_CHECKING:
    from diffalign.models._base import Model

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Our names of torch dtypes; text, so that reading a recipe does not import torch."""
Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass
class ModelSpec:
    """Which weights a backbone runs on.

    Args:
        path: a diffusers pipeline folder, the id of one on the hub, or one .safetensors file in the original
            layout.
        config: of a single file: the pipeline folder or hub id whose configurations, tokenizers and
            scheduler it is read with (no weights are); null: those of the family's first base on the hub.
        dtype: of the network's and the text encoders' weights in memory.
        revision: branch, tag or commit on the hub.
        variant: file variant, e.g. "fp16".
        vae: another VAE folder or hub id, e.g. the fp16-fix of SDXL.
        vae_dtype: of the VAE; the VAE of SDXL overflows in fp16 unless it is the fixed one.
        unet: a full UNet folder or hub id in place of the base's, e.g. a published DPO-SDXL.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about 1.3x the time.
        attention: "sdpa" of torch, or "xformers" where it is installed.
    """

    path: str
    config: str | None = None
    dtype: Dtype = "fp32"
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    vae_dtype: Dtype = "fp32"
    unet: str | None = None
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "xformers"] = "sdpa"

    pipeline_name: ClassVar[str]
    """The class of diffusers that loads this family."""
    default_config: ClassVar[str]
    """The hub id whose configurations fit a single file of this family."""

    def __post_init__(self) -> None:
        for key, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("vae_dtype", self.vae_dtype, DTYPES),
            ("attention", self.attention, ("sdpa", "xformers")),
        ):
            if value not in known:
                raise unknown(f"model.{key}", value, known)

    def load(self, device: str = "cpu") -> Model:
        """The model; its parts load when first used."""
        raise NotImplementedError


@dataclass
class AdapterSpec:
    """What is trained.

    Args:
        kind: "lora" trains low-rank adapters, "full" the whole network beside a frozen copy of it.
        rank: of the two factors.
        alpha: scaling numerator; null: equal to the rank.
        dropout: on the adapter's input, in training only.
        rslora: scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
        dora: weight-decomposed adapters (Liu et al. 2024, arXiv 2402.09353).
        targets: names of the layers that get an adapter.
        init: folder or file of an adapter to start from; its own rank and alpha then hold.
    """

    kind: Literal["lora", "full"] = "lora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    init: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "full"):
            raise unknown("adapter.kind", self.kind, ("lora", "full"))
        if self.rank < 1:
            raise UserError(f"adapter.rank is {self.rank}: use 1 or more")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"adapter.dropout is {self.dropout}: use a value in [0, 1)")
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"adapter.alpha is {self.alpha}: use a value above 0")
        if not self.targets:
            raise UserError(
                "adapter.targets is empty: name the layers, e.g. adapter.targets=[to_q,to_k,to_v,to_out.0]"
            )
        if self.kind == "full" and self.init is not None:
            raise UserError(
                "adapter.init is set with adapter.kind=full: use kind=lora, or model.unet for a full UNet"
            )
