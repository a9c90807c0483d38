"""The published configurations of the bases, without a weight: what is big in them is described here alone.

Sources: the files config.json of stabilityai/stable-diffusion-xl-base-1.0,
stable-diffusion-3-medium-diffusers, stable-diffusion-3.5-medium and -large, black-forest-labs/FLUX.1-dev
and -schnell, and PixArt-alpha/PixArt-Sigma-XL-2-1024-MS. The tokenizers are those of tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffalign.models import _tiny

SDXL_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3_TRANSFORMER = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
"""Of SD3 Medium; 3.5 changes some of it."""
SD35_MEDIUM = {
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
FLUX_TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
PIXART_TRANSFORMER = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "attention_head_dim": 72,
    "num_attention_heads": 16,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}

_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
}
SDXL_VAE = {**_VAE, "latent_channels": 4, "scaling_factor": 0.13025}
_FLOW_VAE = {**_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
SD3_VAE = {**_FLOW_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX_VAE = {**_FLOW_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}


def _clip(width: int, layers: int, heads: int, act: str) -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
        "hidden_act": act,
        "bos_token_id": 398,
        "eos_token_id": 399,
        "pad_token_id": 399,
    }


CLIP_L = _clip(768, 12, 12, "quick_gelu")
CLIP_G = _clip(1280, 32, 20, "gelu")
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}

Part = tuple[str, dict[str, Any]]
"""The name of a class, and its configuration."""


@dataclass(frozen=True)
class Base:
    """A pipeline at its true size.

    Attributes:
        model: the backbone of diffalign.
        pipeline: class of diffusers.
        network: class of diffusers and its configuration.
        parameters: of the network, as published.
        vae: configuration.
        scheduler: class of diffusers and its configuration.
        encoders: by part, class of transformers and its configuration.
        network_part: the network's name in the pipeline.
    """

    model: str
    pipeline: str
    network: Part
    parameters: int
    vae: dict[str, Any]
    scheduler: Part
    encoders: dict[str, Part]
    network_part: str = "transformer"


def _sd3(parameters: int, changes: dict[str, Any]) -> Base:
    return Base(
        model="sd3",
        pipeline="StableDiffusion3Pipeline",
        network=("SD3Transformer2DModel", SD3_TRANSFORMER | changes),
        parameters=parameters,
        vae=SD3_VAE,
        scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        encoders={
            "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
            "text_encoder_3": ("T5EncoderModel", T5_XXL),
        },
    )


def _flux(parameters: int, guidance: bool) -> Base:
    shifting = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    return Base(
        model="flux",
        pipeline="FluxPipeline",
        network=("FluxTransformer2DModel", FLUX_TRANSFORMER | {"guidance_embeds": guidance}),
        parameters=parameters,
        vae=FLUX_VAE,
        scheduler=("FlowMatchEulerDiscreteScheduler", {"base_shift": 0.5, "max_shift": 1.15} | shifting),
        encoders={"text_encoder": ("CLIPTextModel", CLIP_L), "text_encoder_2": ("T5EncoderModel", T5_XXL)},
    )


BASES = {
    "sdxl": Base(
        model="sdxl",
        pipeline="StableDiffusionXLPipeline",
        network=("UNet2DConditionModel", SDXL_UNET),
        parameters=2_567_463_684,
        vae=SDXL_VAE,
        scheduler=("EulerDiscreteScheduler", _tiny.BETAS),
        encoders={
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        },
        network_part="unet",
    ),
    "sd3.5-medium": _sd3(2_243_171_520, SD35_MEDIUM),
    "sd3-medium": _sd3(2_028_328_000, {}),
    "sd3.5-large": _sd3(8_056_627_520, SD35_LARGE),
    "flux.1-dev": _flux(11_901_408_320, guidance=True),
    "flux.1-schnell": _flux(11_891_178_560, guidance=False),
    "pixart-sigma": Base(
        model="pixart",
        pipeline="PixArtSigmaPipeline",
        network=("PixArtTransformer2DModel", PIXART_TRANSFORMER),
        parameters=610_856_096,
        vae=SDXL_VAE,
        scheduler=(
            "DPMSolverMultistepScheduler",
            {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
        ),
        encoders={"text_encoder": ("T5EncoderModel", T5_XXL)},
    ),
}
"""By the name of the weights; the network's parameters are those of the published files."""
