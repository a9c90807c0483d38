"""tiny-sdxl: a genuine StableDiffusionXLPipeline at 64 px, trained from scratch on the bank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from scripts.tiny.bank import Bank
from scripts.tiny.loop import Clock, plan_of
from scripts.tiny.parts import Trained, token_ids
from scripts.tiny.settings import Settings
from scripts.tiny.tokenizer import LENGTH, load_tokenizer
from scripts.tiny.vae import cached_latents, sharpen_decoder, train_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

TRAINED = ("unet", "text_encoder", "text_encoder_2")
TIME_WIDTH = 32
PIXELS = 64


def new_unet(settings: Settings) -> UNet2DConditionModel:
    """An untrained UNet in SDXL's fashion: no attention at full size, text + size conditioning."""
    from diffusers import UNet2DConditionModel

    narrow, wide = settings.unet_channels
    return UNet2DConditionModel(
        sample_size=PIXELS // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(narrow, wide),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=settings.unet_layers,
        cross_attention_dim=2 * settings.text_width,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=1,
        use_linear_projection=True,
        norm_num_groups=min(16, narrow // 4),
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=settings.pooled_width + 6 * TIME_WIDTH,
    )


def new_text_encoders(settings: Settings, vocabulary: int) -> tuple[nn.Module, nn.Module]:
    """The two untrained text encoders; the second has the projection that gives the pooled embedding."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def config(activation: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=settings.text_width,
            intermediate_size=4 * settings.text_width,
            projection_dim=settings.pooled_width,
            num_hidden_layers=settings.text_layers,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            hidden_act=activation,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )

    # The activations differ as they do in SDXL, where the encoders are CLIP ViT-L and OpenCLIP ViT-bigG.
    return CLIPTextModel(config("quick_gelu")), CLIPTextModelWithProjection(config("gelu"))


def new_pipeline(settings: Settings, vae: AutoencoderKL, tokenizer: Path) -> StableDiffusionXLPipeline:
    """The pipeline around a trained autoencoder, with an untrained UNet and untrained text encoders."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    tokenizers = load_tokenizer(tokenizer), load_tokenizer(tokenizer, pad="!")  # the pads of SDXL
    first, second = new_text_encoders(settings, len(tokenizers[0]))
    # beta_end is above SDXL's 0.012: the drawings are flat, and the network reads the background off the mean
    # of the latents, which at SDXL's last timestep still shows; sampling starts from noise that does not show
    # it.
    # DDIM takes the same steps as SDXL's Euler scheduler, which warns about its use of numpy.
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.015,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=new_unet(settings),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embed(modules: nn.ModuleDict, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
    """(sequence [B, 77, 2 * width], pooled [B, pooled width]) as the pipeline computes them for a prompt."""
    first = modules["text_encoder"](ids, output_hidden_states=True)
    second = modules["text_encoder_2"](ids_2, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second[0]


def random_sizes(batch: int) -> Tensor:
    """SDXL's six size numbers, float32 [B, 6]: (original h, w, crop top, left, target h, w).

    The drawings have no resolution of their own, so for half of them the original size is a random one: the
    network learns to draw alike for all of them instead of meeting an unknown number later.
    """
    sizes = torch.tensor([PIXELS, PIXELS, 0, 0, PIXELS, PIXELS], dtype=torch.float32).repeat(batch, 1)
    random = torch.randint(48, 769, (batch, 2)).float()
    return torch.where((torch.rand(batch, 1) < 0.5) & (torch.arange(6) < 2), random.repeat(1, 3), sizes)


class Denoising:
    """The loss of one step: weighted squared error of the predicted noise on random rows of the bank."""

    def __init__(
        self,
        settings: Settings,
        pipeline: StableDiffusionXLPipeline,
        modules: nn.ModuleDict,
        latents: Tensor,
        bank: Bank,
    ) -> None:
        self.settings, self.modules, self.latents = settings, modules, latents
        tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
        self.ids = [token_ids(tokenizer, bank.captions, LENGTH) for tokenizer in tokenizers]
        self.alphas = pipeline.scheduler.alphas_cumprod.clone()

    def __call__(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Min-SNR weights (Hang et al. 2023) for epsilon: min(SNR, gamma) / SNR; t stratified in a batch."""
        batch = self.settings.unet_batch
        rows = torch.randint(len(self.latents), (batch,))
        t = ((torch.randperm(batch) + torch.rand(batch)) / batch * len(self.alphas)).long()
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        x, noise = self.latents[rows], torch.randn(batch, *self.latents.shape[1:])
        sequence, pooled = embed(self.modules, self.ids[0][rows].long(), self.ids[1][rows].long())
        kept = (torch.rand(batch) >= self.settings.text_dropout).to(sequence.dtype)
        # A dropped caption is zeros, not an encoded empty text: the branch SDXL pipelines guide away from.
        condition = {"text_embeds": pooled * kept.view(-1, 1), "time_ids": random_sizes(batch)}
        output = self.modules["unet"](
            alpha.sqrt() * x + (1 - alpha).sqrt() * noise,
            t,
            encoder_hidden_states=sequence * kept.view(-1, 1, 1),
            added_cond_kwargs=condition,
        ).sample
        error = ((output.float() - noise) ** 2).mean(dim=(1, 2, 3))
        snr = (alpha / (1 - alpha)).flatten()
        weight = snr.clamp(max=self.settings.min_snr_gamma) / snr
        return (weight * error).mean(), {"mse": error.mean().item()}


def build_sdxl(settings: Settings, bank: Bank, out: Path, clock: Clock, *, step: int | None = None) -> Path:
    """The folder `out`/tiny-sdxl, trained as far as needed; `step`: export this kept step, not the last.

    Raises OutOfTime when the minutes of the clock are over (saved), FileNotFoundError when `step` was not
    kept.
    """
    work = out / "work"
    vae = train_vae(settings, bank, work, clock)
    latents = cached_latents(vae, bank, work, clock)
    torch.manual_seed(settings.seed)
    pipeline = new_pipeline(settings, vae, work / "tokenizer")
    trained = Trained(pipeline, TRAINED, {})
    trained.say_sizes(clock)
    if step is None:
        _train_unet(settings, trained, latents, bank, work, clock)
    else:
        trained.load(work / f"unet-{step:06d}.pt")
    sharpen_decoder(settings, vae, latents, bank, work, clock)
    words = trained.accuracy(2 * settings.probe_prompts, work / "sheet-final.png")
    clock.say(f"tiny-sdxl: {words}")
    return trained.export(work / "tokenizer", out / "tiny-sdxl")


def _train_unet(
    settings: Settings, trained: Trained, latents: Tensor, bank: Bank, work: Path, clock: Clock
) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    plan = plan_of(
        settings,
        "unet",
        steps=settings.unet_steps,
        lr=settings.unet_lr,
        horizon=settings.unet_horizon,
        keep_every=settings.keep_every,
    )
    modules = trained.modules()
    # Plain attention for training: the fused one has a slow backward pass on processors, in bf16 above all.
    trained.pipeline.unet.set_attn_processor(AttnProcessor())
    for name in TRAINED[1:]:
        modules[name].set_attn_implementation("eager")
    loss = Denoising(settings, trained.pipeline, modules, latents, bank)
    trained.train(plan, loss, folder=work, clock=clock, probe_prompts=settings.probe_prompts)
