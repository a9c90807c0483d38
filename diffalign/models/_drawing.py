"""Pictures of a loaded backbone: its pipeline's call from keyed noise, other samplers, few-step bases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffalign.common import draws
from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.diffusion.denoiser import without_requires_grad
from diffalign.diffusion.process import Process
from diffalign.diffusion.specs import TimestepSpec
from diffalign.models import _distilled
from diffalign.models._base import NonFinitePicture, torch_dtype
from diffalign.models._parts import Backbone
from diffalign.models._samplers import check_scheduler, sampler, timestep_arguments


class DrawingModel(Backbone):
    """The drawing half of a backbone; the other halves load, encode, train and export.

    Attributes:
        device: where the parts are.
        latent_channels: of the VAE.
        latent_scale: pixels a side of a latent.
        size_multiple: pixels that both sides of a picture are a multiple of.
        default_resolution: pixels a side that the base was made for.
        no_guidance: a `guidance_scale` that says none; None: that of the family says something else.
    """

    device: torch.device
    latent_channels: int
    latent_scale: int
    size_multiple: int
    default_resolution: int
    no_guidance: float | None = 0.0

    @property
    def process(self) -> Process:
        """The forward process of the base's scheduler."""
        raise NotImplementedError

    def pipeline(self, *names: str) -> Any:
        """A diffusers pipeline that holds the parts `names` and the scheduler."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Images of scaled latents; NaN where it fails."""
        raise NotImplementedError

    def embed_for_generation(
        self, prompts: list[str], negative_prompt: str | None = None
    ) -> tuple[Conditioning, Conditioning]:
        """Prompt and negative conditioning, `len(prompts)` rows each."""
        raise NotImplementedError

    def _embedding_arguments(self, cond: Conditioning, negative: Conditioning) -> dict[str, Tensor]:
        """The arguments of the pipeline's call that carry the conditioning."""
        raise NotImplementedError

    def generate(self, prompts: list[str], seeds: list[int], **options: Any) -> list[Any]:
        """One PIL image per (prompt, seed), drawn as one batch; arguments as in `sample`.

        Raises:
            NonFinitePicture: the network or the VAE gives NaN or infinity for one of them.
        """
        return self.pictures(self.sample(prompts, seeds, **options), prompts, seeds)

    def pictures(self, latents: Tensor, prompts: list[str], seeds: list[int]) -> list[Any]:
        """The PIL images of latents that `sample` gave for (prompt, seed)."""
        images = self.decode(latents)
        _refuse_non_finite(latents, images, prompts, seeds)
        processor = self.pipeline("vae").image_processor
        return list(processor.numpy_to_pil(images.cpu().permute(0, 2, 3, 1).numpy()))

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        scheduler: str | None = None,
        embedded: tuple[Conditioning, Conditioning] | None = None,
    ) -> Tensor:
        """Scaled latents `[B, c, h, w]`, sampled by the diffusers pipeline as one batch.

        The initial noise depends on (prompt, seed) alone and is bit-equal everywhere.

        Args:
            prompts: `B` prompts.
            seeds: `B` seeds.
            negative_prompt: one for all; None: the branch that prompt dropout trains.
            guidance_scale: None: the pipeline's default, of a distilled base none; 1 or less: no guidance.
            num_inference_steps: None: the pipeline's default, or what the base was distilled to.
            height: pixels, a multiple of `size_multiple`; None: the base's resolution.
            width: likewise.
            scheduler: class name of a diffusers scheduler; None: the base's own.
            embedded: `embed_for_generation(prompts, negative_prompt)`, wherever it is kept, where the text
                encoders are already gone.
        """
        height, width = height or self.default_resolution, width or self.default_resolution
        if height % self.size_multiple or width % self.size_multiple:
            raise UserError(f"height={height}, width={width}: both must be multiples of {self.size_multiple}")
        embedded = embedded or self.embed_for_generation(prompts, negative_prompt)
        cond, negative = (each.to(self.device) for each in embedded)
        shape = (self.latent_channels, height // self.latent_scale, width // self.latent_scale)
        noise = torch.stack(
            [draws.normal(shape, "initial", *key) for key in zip(prompts, seeds, strict=True)]
        )
        pipeline = self.pipeline(self.network_part)
        if scheduler is not None:
            pipeline.scheduler = sampler(scheduler, pipeline.scheduler, self.timestep_arguments)
        settings = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
        if self.distilled_steps is not None:
            pipeline.scheduler = _distilled.trailing(pipeline.scheduler)
            usual = {"guidance_scale": self.no_guidance, "num_inference_steps": self.distilled_steps}
            settings = {key: usual[key] if value is None else value for key, value in settings.items()}
        with without_requires_grad(self.network):
            latents = pipeline(
                latents=self.to_pipeline(noise.to(self.device, torch_dtype(self.spec.dtype))),
                height=height,
                width=width,
                generator=[draws.generator("sampler", *key) for key in zip(prompts, seeds, strict=True)],
                output_type="latent",
                **self.sampling_options(),
                **self._embedding_arguments(cond, negative),
                **{key: value for key, value in settings.items() if value is not None},
            ).images
        return self.from_pipeline(latents, height, width)

    def sampling_options(self) -> dict[str, Any]:
        """Further arguments of the pipeline's call."""
        return {}

    def to_pipeline(self, latents: Tensor) -> Tensor:
        """Latents `[B, c, h, w]` as the pipeline takes them."""
        return latents

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents `[B, c, h, w]` of what the pipeline gives for a picture of that many pixels."""
        return latents

    @property
    def has_unprompted_branch(self) -> bool:
        """Whether its guidance also asks the network without a prompt, which prompt dropout trains."""
        return self.no_guidance is not None

    @property
    def distilled_steps(self) -> int | None:
        """The number of steps that the base was distilled to; None: it was not, or nothing says so."""
        return self.spec.distilled_steps

    @property
    def known_timesteps(self) -> list[int] | None:
        """Those that a distilled base's own sampler visits, noise first; None: the base knows all.

        A shift that goes with the size is that of `default_resolution`.
        """
        if self.distilled_steps is None:
            return None
        scheduler = _distilled.trailing(self.parts["scheduler"])
        arguments = self.timestep_arguments(scheduler, self.distilled_steps)
        shift = self.process.sampler_shift
        if "mu" in arguments and shift is not None:
            side = self.default_resolution // self.latent_scale
            arguments["mu"] = shift.mu((side, side))
        scheduler.set_timesteps(**arguments)
        return _distilled.visited(scheduler, self.process)

    def check_timesteps(self, timesteps: TimestepSpec) -> None:
        """Refuses training timesteps that the base does not have, or, distilled, does not know.

        Raises:
            UserError: from `TimestepSpec.check`, or no explicit grid where the base was distilled.
        """
        timesteps.check(self.process)
        steps, known = self.distilled_steps, self.known_timesteps
        if steps is None or known is None:
            _distilled.hint(self.spec.own_network or self.spec.path)
        else:
            _distilled.check_timesteps(timesteps, steps, known)

    def check_scheduler(self, name: str, num_inference_steps: int | None) -> None:
        """Refuses a diffusers scheduler that does not exist or cannot sample this base."""
        check_scheduler(name, self.parts["scheduler"], num_inference_steps, self.timestep_arguments)

    def timestep_arguments(self, scheduler: Any, steps: int) -> dict[str, Any]:
        """What the pipeline hands to `set_timesteps` of a scheduler; for trying it out."""
        return timestep_arguments(scheduler, steps)


def _refuse_non_finite(latents: Tensor, images: Tensor, prompts: list[str], seeds: list[int]) -> None:
    """Refuses what would be written as a plain black picture and scored as a real one."""
    for prompt, seed, latent, image in zip(prompts, seeds, latents, images, strict=True):
        if not bool(latent.isfinite().all()):
            cause = "the network diverges: use an adapter of an earlier step, or model.dtype=bf16 or fp32"
        elif not bool(image.isfinite().all()):
            cause = (
                "the VAE overflows: use model.vae_dtype=fp32, or one fixed for half precision (model.vae=...)"
            )
        else:
            continue
        raise NonFinitePicture(f"the picture of {prompt!r} with seed {seed} is not finite; {cause}")
