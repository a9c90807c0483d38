"""The autoencoder of tiny-sdxl: 64 px pictures to 16 x 16 x 4 latents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from scripts.tiny.bank import Bank
from scripts.tiny.loop import Clock, plan_of, train
from scripts.tiny.settings import Settings

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def new_vae(settings: Settings) -> AutoencoderKL:
    """An untrained autoencoder with a factor of 4 between pixels and latents."""
    from diffusers import AutoencoderKL

    blocks = len(settings.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=settings.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        force_upcast=False,
    )


def train_vae(settings: Settings, bank: Bank, folder: Path, clock: Clock) -> AutoencoderKL:
    """The trained autoencoder (averaged weights), `scaling_factor` = 1 / standard deviation of its latents.

    Loss: L1 + squared error of the picture + kl_weight * KL per latent element; blurred and cluttered
        pictures are
    in the bank, so the latents can hold them too.
    """
    torch.manual_seed(settings.seed)
    vae = new_vae(settings)
    with torch.no_grad():
        vae.quant_conv.bias[4:] -= (
            6.0  # nearly noiseless latents at first, else the first steps only fight the noise
        )
    modules = nn.ModuleDict({"vae": vae})

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        x = bank.pixels(torch.randint(len(bank.captions), (settings.vae_batch,)))
        if step < settings.vae_crop_steps:
            # Quarter pictures first: four times as many steps a minute, and edges are learned as well.
            top, left = torch.randint(33, (2,)).tolist()
            x = x[:, :, top : top + 32, left : left + 32]
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample.float() - x
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        l1, l2 = error.abs().mean(), (error**2).mean()
        return l1 + 2 * l2 + settings.kl_weight * kl, {"l1": l1.item(), "mse": l2.item(), "kl": kl.item()}

    plan = plan_of(settings, "vae", steps=settings.vae_steps, lr=settings.vae_lr, ema=0.99, warmup=60)
    trained: AutoencoderKL = train(plan, modules, loss_of_step, folder=folder, clock=clock)["vae"]  # type: ignore
    with torch.no_grad():
        sample = torch.cat(
            [trained.encode(bank.pixels(rows)).latent_dist.mean for rows in _slices(512, bank)]
        )
    trained.register_to_config(scaling_factor=round(1.0 / sample.std().item(), 5))
    clock.say(f"vae: latents mean {sample.mean():.3f} std {sample.std():.3f}")
    return trained


def _slices(n: int, bank: Bank, size: int = 32) -> list[list[int]]:
    n = min(n, len(bank.captions))
    return [list(range(start, min(start + size, n))) for start in range(0, n, size)]


@torch.no_grad()
def cached_latents(vae: AutoencoderKL, bank: Bank, folder: Path, clock: Clock) -> Tensor:
    """The latent means of the whole bank, shifted and scaled: float32 [n, 4, 16, 16]; kept in `folder`."""
    path = folder / "latents.npy"
    if path.exists():
        return torch.from_numpy(np.load(path))
    parts, shift = [], vae.config.shift_factor or 0.0
    for rows in _slices(len(bank.captions), bank):
        mean = vae.encode(bank.pixels(rows)).latent_dist.mean
        parts.append((mean - shift) * vae.config.scaling_factor)
        if rows[0] % 9600 == 0:
            clock.say(f"latents {rows[0]}/{len(bank.captions)}")
    latents = torch.cat(parts)
    np.save(folder / "latents.part.npy", latents.numpy())
    (folder / "latents.part.npy").replace(path)
    return latents


def sharpen_decoder(
    settings: Settings, vae: AutoencoderKL, latents: Tensor, bank: Bank, folder: Path, clock: Clock
) -> None:
    """Trains the decoder of `vae` alone a little longer, in place: sharper edges from the same latents.

    The encoder is left as it is, so the UNet that was trained on `latents` stays right. A little noise on the
    latents stands for the errors of a UNet. Loss: that of the autoencoder plus L1 between neighbour errors.
    """
    modules = nn.ModuleDict({name: getattr(vae, name) for name in ("decoder", "post_quant_conv")})
    modules.requires_grad_(True)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(latents), (settings.vae_batch,))
        z = latents[rows] + 0.1 * torch.rand(len(rows), 1, 1, 1) * torch.randn(len(rows), *latents.shape[1:])
        error = vae.decode(z / vae.config.scaling_factor).sample.float() - bank.pixels(rows)
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        l1, l2 = error.abs().mean(), (error**2).mean()
        return l1 + 2 * l2 + 0.5 * edges, {"l1": l1.item(), "edges": edges.item()}

    lr = settings.vae_lr / 2
    plan = plan_of(settings, "decoder", steps=settings.decoder_steps, lr=lr, ema=0.99, warmup=40)
    trained = train(plan, modules, loss_of_step, folder=folder, clock=clock)
    modules.load_state_dict(trained.state_dict())
    modules.eval().requires_grad_(False)
