"""Random transformer pipelines of the smallest size, in the exact layout of the real ones, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from diffalign.models._tiny import small_vae, text_config, tokenizer

POOLED = 40
"""Both CLIP encoders' pooled texts side by side."""
T5_WIDTH = 40
"""Above the width of two CLIP encoders, as in the real ones, whose embeddings are padded up to it."""


def write_sd3(
    folder: Path, *, seed: int = 0, text_widths: tuple[int, int] = (16, 16), **scheduler_options: Any
) -> None:
    """Writes a random SD3.5 pipeline for 32-pixel images (latents 16 x 16 x 16)."""
    torch.manual_seed(seed)
    words = tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    pipeline: Any = StableDiffusion3Pipeline(
        vae=flow_vae(),
        text_encoder=CLIPTextModelWithProjection(text_config(text_widths[0])),
        text_encoder_2=CLIPTextModelWithProjection(
            text_config(text_widths[1], projection=POOLED - text_widths[0])
        ),
        text_encoder_3=t5_encoder(),
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler_options}),
    )
    pipeline.save_pretrained(folder)


def write_flux(
    folder: Path, *, seed: int = 0, guidance_embeds: bool = True, **scheduler_options: Any
) -> None:
    """Writes a random FLUX.1 pipeline for 32-pixel images (latents 16 x 16 x 16): dev, or schnell untold."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    shifting = {"base_shift": 0.5, "max_shift": 1.15, "shift": 3.0, "use_dynamic_shifting": True}
    if not guidance_embeds:
        shifting = {"shift": 1.0, "use_dynamic_shifting": False}
    pipeline: Any = FluxPipeline(
        vae=flow_vae(),
        text_encoder=CLIPTextModel(text_config(16)),
        text_encoder_2=t5_encoder(),
        tokenizer=tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{**shifting, **scheduler_options}),
    )
    pipeline.save_pretrained(folder)


def write_pixart(folder: Path, *, seed: int = 0, **scheduler_options: Any) -> None:
    """Writes a random PixArt-Sigma pipeline for 32-pixel images (latents 4 x 16 x 16)."""
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=T5_WIDTH,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    pipeline: Any = PixArtSigmaPipeline(
        vae=small_vae(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            **{"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", **scheduler_options}
        ),
    )
    pipeline.save_pretrained(folder)


def flow_vae() -> AutoencoderKL:
    """A VAE with 16 channels, a shift and no quantising convolutions, as those of SD3 and FLUX."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def t5_encoder() -> T5EncoderModel:
    """An encoder of the kind of T5 v1.1."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=T5_WIDTH,
        d_kv=10,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that spells: printable ASCII."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=specials + letters, extra_ids=0, model_max_length=77)
