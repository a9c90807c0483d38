"""A diffusers pipeline behind one `Model`: what the families of backbones share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError, brief
from diffalign.common.manifest import recipe_identity
from diffalign.common.plugins import plugin_name
from diffalign.common.progress import say
from diffalign.diffusion.denoiser import Adapters, Denoiser, FrozenCopy
from diffalign.diffusion.process import Process
from diffalign.models import _adapters
from diffalign.models._base import REFERENCE
from diffalign.models._drawing import DrawingModel
from diffalign.models._export import ExportableModel
from diffalign.models._lora_files import LoraFiles
from diffalign.models._parts import Parts, quiet_libraries
from diffalign.models._peft_files import PeftFiles
from diffalign.models._spec import AdapterSpec, ModelSpec
from diffalign.models._trainable import TrainableModel
from diffalign.models._trained_under import Setting, TrainedUnder, encoder_notes


class PipelineModel(TrainableModel, ExportableModel, DrawingModel):
    """A backbone; subclasses name the encoders, read the geometry and bring the conditioning to the network.

    Args:
        spec: which weights.
        device: where they go.

    Attributes:
        patch: latents a side of one of the network's tokens; None: it has none.
        text_masks: tensors of the conditioning -> the masks whose hidden rows never matter to the network.
    """

    encoder_parts: tuple[str, ...]
    patch: int | None = None
    text_masks: Mapping[str, str] = {}

    def __init__(self, spec: ModelSpec, device: str = "cpu") -> None:
        self.spec, self.device = spec, torch.device(device)
        self.parts = Parts(spec, device, (*self.encoder_parts, "vae", self.network_part, "scheduler"))
        vae, network = self.parts.config("vae"), self.parts.config(self.network_part)
        self.latent_channels = vae["latent_channels"]
        self.latent_scale = 2 ** (len(vae["block_out_channels"]) - 1)
        self._base_config = network
        self._encoders_config = self.parts.config_beside_encoders(self.network_part)
        self.check_network(network, self.parts.source(self.network_part).path)
        self.read_geometry(network)
        self._denoiser: Denoiser | None = None
        self._adapter_weights: dict[str, float] = {}
        self._adapts_encoders = False
        self._trained_under = TrainedUnder()

    def read_geometry(self, network_config: dict[str, Any]) -> None:
        """Sets `size_multiple` and `default_resolution`."""
        raise NotImplementedError

    def check_network(self, config: dict[str, Any], path: str) -> None:
        """Refuses a network from `path` that is of another family, or does not fit the base's other parts."""
        raise NotImplementedError

    def call(self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The network's native prediction for `x_t` `[B, c, h, w]` at its own time `t_B` `[B]`."""
        raise NotImplementedError

    @property
    def pipeline_class(self) -> Any:
        """The diffusers pipeline of this family."""
        import diffusers

        return getattr(diffusers, self.spec.pipeline_name)

    @property
    def network(self) -> Any:
        """The network, loaded on first use."""
        return self.parts[self.network_part]

    @property
    def lora_files(self) -> LoraFiles:
        """Those of the pipeline's class, or peft's folders where that loads no adapters."""
        layout = PeftFiles if self.spec.adapter_layout == "peft" else LoraFiles
        return layout(self.pipeline_class, self.network_part)

    @property
    def process(self) -> Process:
        """The forward process of the base's scheduler, whose shift may go with the number of patches."""
        return Process.from_scheduler(self.parts["scheduler"], patch=self.patch)

    @property
    def denoiser(self) -> Denoiser:
        """The network behind the boundary; the base is the reference until training is set up."""
        if self._denoiser is None:
            self._prepare_network(self.network)
            self._denoiser = Denoiser(self.network, self.process, self.call, {REFERENCE: Adapters()})
        return self._denoiser

    def _prepare_network(self, network: Any) -> None:
        if self.spec.attention == "xformers":
            try:
                network.enable_xformers_memory_efficient_attention()
            except (ImportError, ModuleNotFoundError, ValueError) as error:
                raise UserError(
                    f"model.attention=xformers: {brief(error)}; install diffalign[xformers] on "
                    "a GPU machine, or use model.attention=sdpa"
                ) from error
        if self.spec.gradient_checkpointing:
            network.enable_gradient_checkpointing()

    # Encoding

    def _own_precision(self) -> Any:
        # `vae_dtype` holds whatever the precision of training: under fp16 autocast SDXL's overflows.
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`(mean, std)` of scaled latents, `[B, c, h, w]` float32, of images `[B, 3, H, W]` in [0, 1]."""
        vae = self.parts["vae"]
        with self._own_precision():
            posterior = vae.encode((images * 2.0 - 1.0).to(self.device, vae.dtype)).latent_dist
        shift, scale = _shift_and_scale(vae)
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` float32 in [0, 1] of scaled latents `[B, c, h, w]`; NaN where it fails."""
        vae = self.parts["vae"]
        shift, scale = _shift_and_scale(vae)
        with self._own_precision():
            decoded = vae.decode((latents / scale + shift).to(self.device, vae.dtype), return_dict=False)[0]
        images = decoded.float() / 2.0 + 0.5
        return images.clamp(0.0, 1.0).where(images.isfinite(), torch.nan)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Conditioning with one row a prompt; made by the pipeline's own `encode_prompt`."""
        return self.embed_for_generation(prompts)[0]

    def say_too_long(self, prompts: list[str]) -> None:
        """Says how many prompts are longer than the text encoders read; their ends are ignored."""
        limits = self.prompt_limits() if prompts else {}
        cut: dict[tuple[int, tuple[str, ...]], list[str]] = {}
        for name, limit in limits.items():
            with quiet_libraries():
                lengths = [len(tokens) for tokens in self.parts[name](prompts).input_ids]
            over = tuple(prompt for prompt, length in zip(prompts, lengths, strict=True) if length > limit)
            cut.setdefault((limit, over), []).append(name.replace("tokenizer", "text_encoder"))
        for (limit, long), encoders in cut.items():
            if long:
                all_read = len(encoders) == len(limits)
                who = "the text encoders read" if all_read else f"{' and '.join(encoders)} read"
                say(
                    f"{len(long)} of {len(prompts)} prompts have more than the {limit} tokens that {who}; "
                    f"the rest of them is ignored{'' if all_read else ' there'}: {long[0][:40]!r}..."
                )

    def prompt_limits(self) -> dict[str, int]:
        """Tokens of a prompt that the encoder reads, by the name of its tokenizer."""
        tokenizers = [name for name in self.encoder_parts if name.startswith("tokenizer")]
        return {name: self.parts[name].model_max_length for name in tokenizers}

    def encode_dropped_prompt(self) -> Conditioning:
        """One row: what classifier-free guidance uses as its negative when no negative prompt is given."""
        return self.embed_for_generation([""])[1]

    def _embed(self, prompts: list[str], negative_prompt: str | None) -> tuple[Conditioning, Conditioning]:
        """Conditioning of the prompts and of their negatives, `len(prompts)` rows each."""
        raise NotImplementedError

    def size_conditioning(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Nothing: this family's network is not told about sizes."""
        return {}

    def drop_encoders(self) -> None:
        """Frees the text encoders and the VAE; they load again when next used."""
        self.parts.drop(*self.encoder_parts, "vae")

    # Prompts and pictures of the pipeline

    def pipeline(self, *names: str) -> Any:
        """A diffusers pipeline that holds the parts `names` and the scheduler; the other parts are None."""
        held = {
            name: self.parts[name] if name in names else None
            for name in (*self.encoder_parts, "vae", self.network_part)
        }
        pipeline = self.pipeline_class(**held, scheduler=self.parts["scheduler"], **self.pipeline_options())
        pipeline.vae_scale_factor = self.latent_scale
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def pipeline_options(self) -> dict[str, Any]:
        """Further arguments of the pipeline's class."""
        return {}

    def embed_for_generation(
        self, prompts: list[str], negative_prompt: str | None = None
    ) -> tuple[Conditioning, Conditioning]:
        """Prompt and negative conditioning for `generate(embedded=...)`, `len(prompts)` rows each."""
        with quiet_libraries():
            return self._embed(prompts, negative_prompt)

    def check_policy(self, path: str) -> None:
        """Refuses what `load_policy` would, without loading the network."""
        if (Path(path) / self.network_part).is_dir():
            self.check_network(self.parts.config(self.network_part, path), path)
        else:
            self.check_adapter(path)

    def check_adapter(self, path: str) -> None:
        """Refuses an adapter that is for another base or also changes the text encoders.

        The network is not loaded.
        """
        _adapters.check(self.parts.blueprint(self.network_part), self.lora_files, AdapterSpec(init=path))

    def load_policy(self, path: str) -> None:
        """Makes what a run saved at `path` (a LoRA, or a whole network) the policy "train".

        The base becomes its reference.

        Raises:
            UserError: nothing usable there, or it is for another base.
        """
        if (Path(path) / self.network_part).is_dir():
            self.check_network(self.parts.config(self.network_part, path), path)
            self.denoiser.policies[REFERENCE] = FrozenCopy(self.network)
            self.denoiser.network = self.parts.load_as(self.network_part, path)
            self._prepare_network(self.denoiser.network)
            return
        denoiser = self.denoiser
        _adapters.add_from_file(self.network, self.lora_files, path, dropout=0.0)
        denoiser.policies[REFERENCE] = Adapters()
        self.network.requires_grad_(False)
        self._trained_under.read(path)
        self._trained_under.say_others(self.training_settings(), "pairs are judged")

    def load_adapter(self, path: str, *, weight: float = 1.0) -> None:
        """Adds a LoRA for generation; several add up, each with its weight."""
        file = self.lora_files.read(path, self.network)
        # Names of our own: peft searches names in keys, an adapter called "a" would silently stay empty.
        name = f"drawn_{len(self._adapter_weights)}"
        everything = (*self.encoder_parts, self.network_part)
        with warnings.catch_warnings():
            # peft asks whether several adapters are meant. They are.
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            if self.lora_files.is_of_network(file):
                self.lora_files.place(self.network, name, file, path)
            else:
                self._adapts_encoders = True
                try:
                    with quiet_libraries():
                        self.pipeline(*everything).load_lora_weights(path, adapter_name=name)
                except Exception as error:  # peft and torch find many things wrong, in types of many kinds
                    raise UserError(
                        f"cannot use the adapter {path}, which also changes the text encoders: "
                        f"{brief(error)}; use the base it was trained on"
                    ) from error
        self._adapter_weights[name] = weight
        adapted = self.pipeline(*everything) if self._adapts_encoders else self.network
        adapted.set_adapters(list(self._adapter_weights), list(self._adapter_weights.values()))
        self._trained_under.read(path)

    # What adapters were trained under

    def training_settings(self) -> dict[str, Setting]:
        """What the network is trained under, by the note of it in the file of an adapter."""
        return encoder_notes(self.encoder_settings())

    def drawing_settings(self, guidance_scale: float | None) -> dict[str, Setting]:
        """Likewise what pictures are drawn under; `guidance_scale` as `sample` has it."""
        return self.training_settings()

    def sample(self, prompts: list[str], seeds: list[int], **options: Any) -> Tensor:
        """As `DrawingModel.sample`; says where an adapter was trained under something else."""
        settings = self.drawing_settings(options.get("guidance_scale"))
        self._trained_under.say_others(settings, "pictures are drawn")
        return super().sample(prompts, seeds, **options)

    def check_training(self, adapter: AdapterSpec) -> None:
        """As of `TrainableModel`; says where the adapter to start from was trained under something else."""
        super().check_training(adapter)
        if adapter.init is not None:
            start = TrainedUnder()
            start.read(adapter.init)
            start.say_others(self.training_settings(), "training goes on")

    def start_training(self, adapter: AdapterSpec, **options: Any) -> None:
        """As of `TrainableModel`; the run's own pictures may be drawn under something else."""
        super().start_training(adapter, **options)
        self._trained_under.remember("the policy", self.training_settings())

    def _weights(self) -> tuple[str, ...]:
        return (*self.encoder_parts, "vae", self.network_part)

    def encoder_fingerprint(self) -> str:
        """Identity of VAE and text encoders, and of what else decides their embeddings."""
        identity = recipe_identity({name: self.parts.identity(name) for name in (*self.encoder_parts, "vae")})
        choose_parts = self.spec.left_out_by.values()  # these are said by the parts
        settings = {key: value for key, value in self.encoder_settings().items() if key not in choose_parts}
        return recipe_identity({"parts": identity, **settings}) if settings else identity

    def encoder_settings(self) -> dict[str, Any]:
        """What decides a prompt's embeddings beside the weights of the encoders, by its field in the spec."""
        return {}

    def encoder_recipe(self) -> dict[str, Any]:
        """The model's name and `encoder_settings`, by their keys in a recipe."""
        settings = {f"model.{name}": value for name, value in self.encoder_settings().items()}
        return {"model": plugin_name(self.spec), **settings}

    def fingerprint(self) -> str:
        """Identity of network, VAE, text encoders and forward process; the sampler does not matter."""
        process = self.process
        return recipe_identity(
            {
                **{name: self.parts.identity(name) for name in self._weights()},
                "process": {"prediction": process.prediction, "alphas": process.alphas},
            }
        )


def _shift_and_scale(vae: Any) -> tuple[float, float]:
    return vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor


def pooled_pair(encoded: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Conditioning, Conditioning]:
    """Prompt and negative conditioning of what `encode_prompt` gives where embeddings are pooled too."""
    embeds, negative_embeds, pooled, negative_pooled = encoded
    cond = Conditioning({"prompt_embeds": embeds, "pooled": pooled})
    return cond, Conditioning({"prompt_embeds": negative_embeds, "pooled": negative_pooled})


def pooled_arguments(cond: Conditioning, negative: Conditioning) -> dict[str, Tensor]:
    """The two of `pooled_pair` as the pipeline's call takes them."""
    return {
        "prompt_embeds": cond["prompt_embeds"],
        "pooled_prompt_embeds": cond["pooled"],
        "negative_prompt_embeds": negative["prompt_embeds"],
        "negative_pooled_prompt_embeds": negative["pooled"],
    }
