"""What every backbone gives once it is loaded.

A model loads its parts when they are first asked for, so that encoding, training and sampling each hold only
what they need: text encoders and VAE can leave memory before the network enters it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.process import Process
from diffalign.diffusion.specs import TimestepSpec
from diffalign.models._spec import DTYPES, AdapterSpec

TRAINED, REFERENCE = "trained", "reference"
"""Names of the adapter sets (peft keeps them as attributes of a module, so `train` would be refused)."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that a recipe calls `name` ("fp32", "bf16", "fp16")."""
    dtype = getattr(torch, DTYPES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


class NonFinitePicture(UserError):
    """A drawn picture that is NaN or infinite; raised before it can be taken for a black one."""


class Model(Protocol):
    """A loaded backbone."""

    latent_scale: int
    size_multiple: int
    default_resolution: int

    text_masks: Mapping[str, str]
    """Tensor of `encode_prompts` -> the mask `[B, n]` there; rows `[:, k]` that it hides (0) never matter."""

    @property
    def denoiser(self) -> Denoiser:
        """The network behind the boundary."""
        ...

    @property
    def process(self) -> Process:
        """The forward process of the base's scheduler."""
        ...

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`(mean, std)` of the latents, `[B, c, h, w]` float32, scaled; images float NCHW in [0, 1]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` float32 in [0, 1] of scaled latents."""
        ...

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Conditioning with one row a prompt, on the model's device."""
        ...

    def say_too_long(self, prompts: list[str]) -> None:
        """Says how many prompts are longer than the text encoders read."""
        ...

    def encode_dropped_prompt(self) -> Conditioning:
        """One row: the very branch that classifier-free guidance uses for "no prompt"."""
        ...

    def size_conditioning(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Rows `[1, d]` that tell the network sizes (height, width) and crop (top, left); empty if blind."""
        ...

    def generate(self, prompts: list[str], seeds: list[int], **options: Any) -> list[Any]:
        """One PIL image per (prompt, seed), options as in `sample`; NonFinitePicture where there is none."""
        ...

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
        """Scaled latents of one image per (prompt, seed)."""
        ...

    def pictures(self, latents: Tensor, prompts: list[str], seeds: list[int]) -> list[Any]:
        """The PIL images of `sample`'s latents; NonFinitePicture where there is none."""
        ...

    def check_scheduler(self, name: str, num_inference_steps: int | None) -> None:
        """Refuses a diffusers scheduler that does not exist or cannot sample this base."""
        ...

    def embed_for_generation(
        self, prompts: list[str], negative_prompt: str | None = None
    ) -> tuple[Conditioning, Conditioning]:
        """Prompt and negative conditioning for `generate(embedded=...)`, `len(prompts)` rows each."""
        ...

    @property
    def has_unprompted_branch(self) -> bool:
        """Whether its guidance also asks the network without a prompt, which prompt dropout trains."""
        ...

    @property
    def known_timesteps(self) -> list[int] | None:
        """The few that a distilled base knows; None: all of the process."""
        ...

    def check_timesteps(self, timesteps: TimestepSpec) -> None:
        """Refuses training timesteps that the base does not have or know."""
        ...

    def check_training(self, adapter: AdapterSpec) -> None:
        """Refuses, before anything large is loaded, what `start_training` would refuse."""
        ...

    def start_training(
        self, adapter: AdapterSpec, *, seed: int, with_reference: bool, moving_reference: bool = False
    ) -> None:
        """Sets up the "train" and "reference" policies of the denoiser."""
        ...

    def compile_blocks(self) -> None:
        """Compiles the network's repeated blocks; after `start_training`."""
        ...

    def shard(self) -> None:
        """Splits the network and its frozen copy over the processes; after `start_training`."""
        ...

    def move_reference(self, decay: float) -> None:
        """Makes the reference `decay` times itself plus `1 - decay` times the policy."""
        ...

    def reference_state(self) -> dict[str, Tensor]:
        """The tensors of a reference that moves, by name, for checkpoints."""
        ...

    def load_reference_state(self, state: dict[str, Tensor]) -> None:
        """Puts back what `reference_state` gave, in place."""
        ...

    def save_adapter(self, folder: str, trained: dict[str, Tensor] | None = None) -> None:
        """Writes what was trained, so that plain diffusers loads it; `trained` where the network is split."""
        ...

    def check_policy(self, path: str) -> None:
        """Refuses, before anything large is loaded, what `load_policy` would refuse."""
        ...

    def load_policy(self, path: str) -> None:
        """Makes what a run saved at `path` the policy "train", and the base its reference."""
        ...

    def check_adapter(self, path: str) -> None:
        """Refuses, before anything large is loaded, an adapter that is none of the network alone."""
        ...

    def load_adapter(self, path: str, *, weight: float = 1.0) -> None:
        """Adds an adapter for generation; several add up."""
        ...

    def export_adapter(
        self, path: str, folder: str, *, layout: str, weight: float = 1.0, dtype: str | None = None
    ) -> None:
        """Writes a LoRA in the layout of another program."""
        ...

    def export_pipeline(
        self,
        folder: str,
        *,
        adapter: str | None = None,
        weight: float = 1.0,
        dtype: str | None = None,
        single_file: bool = False,
    ) -> None:
        """Writes the whole pipeline, with a LoRA merged into its network."""
        ...

    def trained_state(self) -> dict[str, Tensor]:
        """The tensors that training changes, by name, for checkpoints.

        Of a split network every process must ask, and only the first is answered.
        """
        ...

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Puts back what `trained_state` gave, in place."""
        ...

    def drop_encoders(self) -> None:
        """Frees the text encoders and the VAE; they load again when next used."""
        ...

    def fingerprint(self) -> str:
        """Identity of the weights, for checkpoints."""
        ...

    def encoder_fingerprint(self) -> str:
        """Identity of VAE and text encoders, for caches."""
        ...

    def encoder_recipe(self) -> dict[str, Any]:
        """The keys of a recipe that decide a prompt's embeddings, for caches; "model" is the first."""
        ...
