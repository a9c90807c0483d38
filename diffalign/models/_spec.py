"""Which weights a backbone runs on and what of it is trained: plain data, quick to import."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from diffalign.common.errors import UserError, unknown

if TYPE_CHECKING:
    from diffalign.models._base import Model

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The layers of attention, by the names that diffusers gives them in every network."""
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Those of a network whose text has its own beside the picture's, also of SD3.5 Medium's second attention.
The DreamBooth script of diffusers trains the same of SD3, but says `attn.to_q`, which leaves that one out."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Our names of torch dtypes; text, so that reading a recipe does not import torch."""
Dtype = Literal["fp32", "bf16", "fp16"]

MOST_DISTILLED_STEPS = 50
"""What the samplers of undistilled bases take by default; published few-step bases take 1 to 16."""


@dataclass
class ModelSpec:
    """Which weights a backbone runs on.

    Args:
        path: a diffusers pipeline folder, the id of one on the hub, or one .safetensors file in the original
            layout.
        config: of a single file: the pipeline folder or hub id whose configurations, tokenizers and
            scheduler it is read with, and the weights of parts that published files of the family leave out
            (text encoders and VAE of SD3 and FLUX), where this one does; null: those of the family's first
            base on the hub.
        dtype: of the network's and the text encoders' weights in memory.
        revision: branch, tag or commit on the hub.
        variant: file variant, e.g. "fp16".
        vae: another VAE folder or hub id, e.g. the fp16-fix of SDXL.
        vae_dtype: of the VAE; the VAE of SDXL overflows in fp16 unless it is the fixed one.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about 1.3x the time.
        attention: "sdpa" of torch, or "xformers" where it is installed.
        distilled_steps: of a base that was distilled to a few steps (FLUX.1-schnell 4, SDXL-Turbo 1,
            SDXL-Lightning 2 to 8, SD3.5 Large Turbo 4) their number. It then draws in so many, without
            classifier-free guidance, is judged at the timesteps that they visit, and training it, which is
            experimental, needs timesteps.kind=grid.
    """

    path: str
    config: str | None = None
    dtype: Dtype = "fp32"
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    vae_dtype: Dtype = "fp32"
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "xformers"] = "sdpa"
    distilled_steps: int | None = None

    pipeline_name: ClassVar[str]
    """The class of diffusers that loads this family."""
    default_config: ClassVar[str | None]
    """The hub id whose configurations fit a single file of the family; None: diffusers reads no such file."""
    file_may_lack: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Parts that published single files of this family leave out -> how the names of their tensors begin."""
    left_out_by: ClassVar[dict[str, str]] = {}
    """Parts that the family can do without -> the key of the model that leaves them out when it is false."""
    network_part: ClassVar[str]
    """The name of the network in the pipeline, and of the key that puts another in its place."""
    network_class: ClassVar[str]
    """Its class of diffusers."""
    attention_layers: ClassVar[tuple[str, ...]] = ATTENTION
    """What `adapter.targets=null` stands for."""
    adapter_layout: ClassVar[Literal["diffusers", "peft"]] = "diffusers"
    """Who loads its adapters: the pipeline of diffusers, or peft, where that pipeline loads none."""
    kohya_in_diffusers: ClassVar[Literal["all", "blocks", "none"]] = "all"
    """Which layers of a LoRA in the layout of kohya's scripts diffusers (0.42) loads."""

    def __post_init__(self) -> None:
        for key, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("vae_dtype", self.vae_dtype, DTYPES),
            ("attention", self.attention, ("sdpa", "xformers")),
        ):
            if value not in known:
                raise unknown(f"model.{key}", value, known)
        if self.distilled_steps is not None and not 1 <= self.distilled_steps <= MOST_DISTILLED_STEPS:
            raise UserError(
                f"model.distilled_steps is {self.distilled_steps}: use 1 to {MOST_DISTILLED_STEPS}; leave it "
                "out of a base that draws in more"
            )

    @property
    def own_network(self) -> str | None:
        """The folder or hub id of the whole network in place of the base's."""
        own: str | None = getattr(self, self.network_part)
        return own

    @property
    def own_parts(self) -> dict[str, str]:
        """The parts in place of the base's, by name."""
        own = {"vae": self.vae, self.network_part: self.own_network}
        return {name: path for name, path in own.items() if path is not None}

    def with_network(self, path: str) -> Self:
        """The same weights but for the whole network, which is at `path`."""
        changes: dict[str, Any] = {self.network_part: path}
        return replace(self, **changes)

    def check_class(self, config: dict[str, Any], path: str) -> None:
        """Refuses the configuration of a network, from `path`, of another class than this family's."""
        found = config.get("_class_name", "part of no class")
        if found != self.network_class:
            raise UserError(
                f"the {self.network_part} of {path} is a {found}, {self.network_class} is wanted: use the "
                "model name that fits"
            )

    def part_class(self, name: str) -> Any:
        """The class that the part `name` is loaded as; None: the one that the pipeline names."""
        return None

    def with_targets(self, adapter: AdapterSpec) -> AdapterSpec:
        """The same adapter, its layers by name."""
        return replace(adapter, targets=list(adapter.targets or self.attention_layers))

    def load(self, device: str = "cpu") -> Model:
        """The model; its parts load when first used."""
        raise NotImplementedError


@dataclass
class UNetSpec(ModelSpec):
    """Which weights a UNet backbone runs on.

    Args:
        unet: a full UNet folder or hub id in place of the base's, e.g. a published DPO-SDXL.
    """

    unet: str | None = None

    network_part: ClassVar[str] = "unet"
    network_class: ClassVar[str] = "UNet2DConditionModel"


@dataclass
class TransformerSpec(ModelSpec):
    """Which weights a transformer backbone runs on.

    Args:
        transformer: a full transformer folder or hub id in place of the base's.
    """

    transformer: str | None = None

    network_part: ClassVar[str] = "transformer"


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
        targets: names of the layers that get an adapter; null: the attention layers of the family (to_q,
            to_k, to_v, to_out.0; of SD3 and FLUX also those of the text: add_q_proj, add_k_proj, add_v_proj,
            to_add_out). The recipe that a run keeps has the names.
        init: folder or file of an adapter to start from; its own rank and alpha then hold.
    """

    kind: Literal["lora", "full"] = "lora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    targets: list[str] | None = None
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
        if self.targets is not None and not self.targets:
            raise UserError(
                "adapter.targets is empty: name the layers, e.g. adapter.targets=[to_q,to_k,to_v,to_out.0], "
                "or leave it out for those of attention"
            )
        if self.kind == "full" and self.init is not None:
            raise UserError(
                "adapter.init is set with adapter.kind=full: use kind=lora, or model.unet or "
                "model.transformer for a whole network"
            )
