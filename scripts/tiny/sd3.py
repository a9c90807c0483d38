"""tiny-sd3: a genuine StableDiffusion3Pipeline at 64 px, trained as a rectified flow on the bank.

It begins with parts of tiny-sdxl: the autoencoder, which gets a shift as SD3's has one, the tokenizer, and
the two CLIP encoders, which learn on. Transformer, T5 and the first encoder's projection start at random.
Its matrices are trained by Muon, and features of tiny-clip show it what is in a picture (REPA): the error on
held-out rows after three minutes of one core was 0.388 with AdamW alone, 0.378 with Muon, 0.346 with both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.tiny.bank import Bank
from scripts.tiny.loop import Clock, plan_of
from scripts.tiny.parts import Trained, token_ids
from scripts.tiny.settings import Settings
from scripts.tiny.tokenizer import END, load_tokenizer, t5_tokenizer
from scripts.tiny.vae import cached_latents

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

TRAINED = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
SHIFT = 3.0
"""Of the sampler's levels towards noise: that of SD3's own scheduler."""


def new_transformer(settings: Settings) -> SD3Transformer2DModel:
    """An untrained transformer in the fashion of SD3.5: patches of 2, normalised queries and keys."""
    from diffusers import SD3Transformer2DModel

    head = min(32, settings.sd3_width // 2)
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=settings.sd3_layers,
        attention_head_dim=head,
        num_attention_heads=settings.sd3_width // head,
        joint_attention_dim=settings.t5_width,
        caption_projection_dim=settings.sd3_width,
        pooled_projection_dim=2 * settings.pooled_width,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def new_t5(settings: Settings, vocabulary: int) -> nn.Module:
    """An untrained encoder of the kind of T5 v1.1."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocabulary,
        d_model=settings.t5_width,
        d_kv=settings.t5_width // 4,
        num_heads=4,
        d_ff=2 * settings.t5_width,
        num_layers=settings.t5_layers,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def clip_encoder(settings: Settings, folder: Path) -> nn.Module:
    """tiny-sdxl's text encoder in `folder` with as many positions as are read, and with a projection."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig.from_pretrained(folder)
    config.max_position_embeddings = settings.sd3_tokens
    encoder = CLIPTextModelWithProjection(config)
    # Where the folder has no projection, it starts at random.
    state = CLIPTextModelWithProjection.from_pretrained(folder).state_dict()
    place = next(name for name in state if name.endswith("position_embedding.weight"))
    state[place] = state[place][: settings.sd3_tokens]
    encoder.load_state_dict(state)
    return encoder


def shifted_vae(folder: Path, bank: Bank) -> AutoencoderKL:
    """The autoencoder of tiny-sdxl with the shift and the scale that make its latents mean 0 and std 1."""
    from diffusers import AutoencoderKL

    vae: AutoencoderKL = AutoencoderKL.from_pretrained(folder)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        sample = torch.cat(
            [
                vae.encode(bank.pixels(list(range(row, row + 32)))).latent_dist.mean
                for row in range(0, min(512, len(bank.captions)), 32)
            ]
        )
    shift, scale = round(sample.mean().item(), 4), round(1.0 / sample.std().item(), 4)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return vae


def new_pipeline(settings: Settings, base: Path, bank: Bank) -> StableDiffusion3Pipeline:
    """The pipeline before training; `base`: the folder of tiny-sdxl."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    clip = [load_tokenizer(base / "tokenizer", pad=pad, length=settings.sd3_tokens) for pad in (END, "!")]
    words = t5_tokenizer(bank.captions, settings.t5_vocabulary, length=settings.sd3_tokens)
    pipeline = StableDiffusion3Pipeline(
        vae=shifted_vae(base / "vae", bank),
        text_encoder=clip_encoder(settings, base / "text_encoder"),
        text_encoder_2=clip_encoder(settings, base / "text_encoder_2"),
        text_encoder_3=new_t5(settings, len(words)),
        tokenizer=clip[0],
        tokenizer_2=clip[1],
        tokenizer_3=words,
        transformer=new_transformer(settings),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embed(modules: nn.ModuleDict, ids: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(sequence [B, 2 * tokens, t5 width], pooled [B, 2 * pooled width]) as the pipeline computes them."""
    first = modules["text_encoder"](ids[0], output_hidden_states=True)
    second = modules["text_encoder_2"](ids[1], output_hidden_states=True)
    third = modules["text_encoder_3"](ids[2])[0]
    clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    clip = functional.pad(clip, (0, third.shape[-1] - clip.shape[-1]))
    return torch.cat([clip, third], dim=-2), torch.cat([first[0], second[0]], dim=-1)


class Representation:
    """REPA: a block's picture tokens, projected, are to point where a picture encoder's tokens point.

    Yu et al. 2024, arXiv 2410.06940, with cosine similarity and a projector of two layers (theirs has three).
    """

    def __init__(self, settings: Settings, transformer: nn.Module, folder: Path) -> None:
        import open_clip

        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        self.encoder = model.visual.eval().requires_grad_(False)
        self.block = settings.sd3_repa_block - 1
        width = settings.sd3_width
        self.projector = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, settings.clip_width)
        )
        self.transformer = transformer

    @contextmanager
    def heard(self) -> Iterator[list[Tensor]]:
        """While open, the block's picture tokens [B, 64, width] of each forward pass are appended."""
        tokens: list[Tensor] = []
        block = self.transformer.transformer_blocks[self.block]
        hook = block.register_forward_hook(lambda module, inputs, outputs: tokens.append(outputs[1]))
        try:
            yield tokens
        finally:
            hook.remove()

    def loss(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """1 minus the mean cosine; `tokens` [B, 64, width], `pixels` [B, 3, 64, 64] in [-1, 1]."""
        with torch.no_grad():
            seen = self.encoder.forward_intermediates(
                pixels, indices=1, intermediates_only=True, output_fmt="NLC"
            )["image_intermediates"][-1]
        projected = self.projector(tokens).float()
        return 1 - functional.cosine_similarity(projected, seen.float(), dim=-1).mean()


class FlowMatching:
    """The loss of one step on random rows of the bank: squared error of the velocity, and that of REPA."""

    def __init__(
        self,
        settings: Settings,
        pipeline: StableDiffusion3Pipeline,
        modules: nn.ModuleDict,
        representation: Representation,
        latents: Tensor,
        bank: Bank,
    ) -> None:
        self.settings, self.modules, self.latents, self.bank = settings, modules, latents, bank
        self.representation = representation
        # The last row is the empty prompt: what a dropped caption becomes, and what guidance goes away from.
        texts = [*bank.captions, ""]
        tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3)
        self.ids = [token_ids(tokenizer, texts, settings.sd3_tokens) for tokenizer in tokenizers]

    def __call__(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Levels are logit-normal (Esser et al. 2024, arXiv 2403.03206, eq. 19) and stratified in a batch."""
        batch = self.settings.sd3_batch
        rows = torch.randint(len(self.latents), (batch,))
        u = (torch.randperm(batch) + torch.rand(batch)) / batch
        sigma = torch.sigmoid(torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
        x, noise = self.latents[rows], torch.randn(batch, *self.latents.shape[1:])
        level = sigma.view(-1, 1, 1, 1)
        captions = torch.where(torch.rand(batch) < self.settings.text_dropout, len(self.ids[0]) - 1, rows)
        # The fused attention has a slow backward pass on processors.
        with sdpa_kernel(SDPBackend.MATH), self.representation.heard() as tokens:
            sequence, pooled = embed(self.modules, [ids[captions].long() for ids in self.ids])
            output = self.modules["transformer"](
                hidden_states=(1 - level) * x + level * noise,
                timestep=1000 * sigma,
                encoder_hidden_states=sequence,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            away = self.representation.loss(tokens[0], self.bank.pixels(rows))
        error = (output.float() - (noise - x)).square().mean()
        return error + self.settings.sd3_repa * away, {"mse": error.item(), "repa": away.item()}


def build_sd3(settings: Settings, bank: Bank, out: Path, clock: Clock, *, step: int | None = None) -> Path:
    """The folder `out`/tiny-sd3, trained as far as needed; `step`: export this kept step, not the last.

    Raises OutOfTime when the minutes of the clock are over (saved), FileNotFoundError when `step` was not
    kept or `out`/tiny-sdxl or `out`/tiny-clip is not built.
    """
    work, base, clip = out / "work", out / "tiny-sdxl", out / "tiny-clip"
    for needed in (base, clip):
        if not needed.is_dir():
            raise FileNotFoundError(f"{needed} is not built, which tiny-sd3 starts from")
    (work / "sd3").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    pipeline = new_pipeline(settings, base, bank)
    latents = cached_latents(pipeline.vae, bank, work / "sd3", clock)
    representation = Representation(settings, pipeline.transformer, clip)
    trained = Trained(
        pipeline,
        TRAINED,
        {"max_sequence_length": settings.sd3_tokens},
        helpers={"projector": representation.projector},
    )
    trained.say_sizes(clock)
    if step is None:
        plan = plan_of(
            settings,
            "sd3",
            steps=settings.sd3_steps,
            lr=settings.sd3_lr,
            horizon=settings.sd3_horizon,
            keep_every=settings.keep_every,
            muon_in="transformer.transformer_blocks.",
            muon_lr=settings.sd3_muon_lr,
        )
        loss = FlowMatching(settings, pipeline, trained.modules(), representation, latents, bank)
        trained.train(plan, loss, folder=work / "sd3", clock=clock, probe_prompts=settings.probe_prompts)
    else:
        trained.load(work / "sd3" / f"sd3-{step:06d}.pt")
    words = trained.accuracy(2 * settings.probe_prompts, work / "sd3" / "sheet-final.png")
    clock.say(f"tiny-sd3: {words}")
    return trained.export(base / "tokenizer", out / "tiny-sd3")
