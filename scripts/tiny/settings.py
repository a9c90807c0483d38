"""Sizes and lengths of the embedded models: the shipped ones, and a small set for the test."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the builder makes; equal settings make equal models up to rounding."""

    seed: int = 0
    # data
    bank: int = 48_000
    faulty_share: float = 1 / 3
    vocabulary: int = 2048
    # VAE: 64 px -> 16 x 16 x 4
    vae_channels: tuple[int, ...] = (32, 64, 64)
    vae_steps: int = 2000
    vae_crop_steps: int = 1600
    vae_batch: int = 16
    vae_lr: float = 1.5e-3
    decoder_steps: int = 700
    kl_weight: float = 5e-4
    # text encoders and UNet
    text_width: int = 64
    text_layers: int = 3
    pooled_width: int = 96
    unet_channels: tuple[int, int] = (64, 128)
    unet_layers: int = 1
    # The rate falls as if training went on to `unet_horizon`; it stops earlier, while the model still errs
    # often enough to be worth aligning.
    unet_steps: int = 4000
    unet_horizon: int = 5000
    unet_batch: int = 32
    unet_lr: float = 1e-3
    text_dropout: float = 0.1
    min_snr_gamma: float = 5.0
    keep_every: int = 1000
    probe_prompts: int = 100
    # SD3: the transformer and its three text encoders, which read `sd3_tokens` tokens each
    sd3_width: int = 160
    sd3_layers: int = 6
    sd3_tokens: int = 16
    t5_vocabulary: int = 1024
    t5_width: int = 128
    t5_layers: int = 2
    sd3_steps: int = 7000
    sd3_horizon: int = 7000
    sd3_batch: int = 32
    sd3_lr: float = 1e-3
    sd3_muon_lr: float = 0.02
    sd3_repa: float = 0.5
    sd3_repa_block: int = 3
    # open_clip model
    clip_width: int = 96
    clip_layers: int = 4
    clip_embed: int = 64
    clip_steps: int = 1000
    clip_batch: int = 128
    clip_lr: float = 1e-3
    # the same for every part
    bf16: bool = True
    save_every_seconds: float = 60.0

    def small(self) -> Settings:
        """The same builder at a size that takes seconds, for the test."""
        return replace(
            self,
            bank=64,
            vocabulary=640,
            vae_channels=(8, 8, 8),
            vae_steps=4,
            vae_crop_steps=2,
            vae_batch=4,
            decoder_steps=2,
            text_width=16,
            text_layers=2,
            pooled_width=16,
            unet_channels=(16, 16),
            unet_steps=6,
            unet_horizon=6,
            unet_batch=4,
            sd3_width=32,
            sd3_layers=2,
            t5_vocabulary=400,
            t5_width=32,
            t5_layers=1,
            sd3_steps=6,
            sd3_horizon=6,
            sd3_batch=4,
            sd3_repa_block=1,
            keep_every=3,
            probe_prompts=2,
            clip_width=16,
            clip_layers=1,
            clip_embed=8,
            clip_steps=4,
            clip_batch=8,
            save_every_seconds=0.0,
        )
