"""What a backbone writes for other programs: adapters in their layouts, and whole pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffalign.common.errors import UserError
from diffalign.common.progress import say
from diffalign.diffusion.process import Process
from diffalign.models import _adapters
from diffalign.models._base import TRAINED, torch_dtype
from diffalign.models._lora_files import NOUNS, LoraFiles
from diffalign.models._parts import Backbone, quiet_libraries
from diffalign.models._trained_under import kept_notes

KOHYA_FILE, PIPELINE_FILE = "lora.safetensors", "model.safetensors"
_FACTORS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class Lora:
    """A LoRA of the network, whichever layout its file has.

    Attributes:
        state: its tensors by peft's names.
        config: peft's settings.
        scales: layer -> what its `up @ down` is multiplied by.
    """

    state: dict[str, Tensor]
    config: dict[str, Any]
    scales: dict[str, float]


def read_lora(files: LoraFiles, path: str, blueprint: Any, *, weight: float = 1.0) -> Lora:
    """The LoRA at `path`, acting `weight` times as strongly; `blueprint` is its network without memory.

    Alphas, rsLoRA and per-layer patterns are understood by diffusers and peft themselves: they set the
    adapter up on the blueprint, and the scale of each layer is read off there.

    Raises:
        UserError: nothing usable there, one for another architecture, or one that also changes the text
            encoders.
    """
    file = files.read(path, blueprint)
    if not files.is_of_network(file):
        raise UserError(
            f"adapter {path} also changes the text encoders: only adapters of the {NOUNS[files.part]} can be "
            "exported"
        )
    shapes = {key: tensor.to("meta") for key, tensor in file.state.items()}
    files.place(blueprint, TRAINED, replace(file, state=shapes), path)
    config = _adapters.trained_config(blueprint)
    patterns = {name: alpha * weight for name, alpha in (config["alpha_pattern"] or {}).items()}
    return Lora(
        state=files.network_state(file),
        config={**config, "lora_alpha": config["lora_alpha"] * weight, "alpha_pattern": patterns},
        scales={
            name: layer.scaling[TRAINED] * weight
            for name, layer in blueprint.named_modules()
            if TRAINED in getattr(layer, "scaling", {})
        },
    )


def kohya_state(lora: Lora, name_of: Callable[[str], str]) -> dict[str, Tensor]:
    """The tensors as kohya's scripts name them, the scale of each layer folded into its `alpha`.

    Convention: kohya multiplies `up @ down` by `alpha / rank`, rsLoRA by `alpha / sqrt(rank)`; so a layer's
    `alpha` here is its scale times its rank (Kalajdzievski 2023, arXiv 2312.03732, eq. 4). Where the layers'
    alphas differ, all get the first one and `up` makes good for it: diffusers (0.42) reads one alpha only.

    Args:
        lora: what is written.
        name_of: a layer's name in the layout that kohya's scripts train this family in.

    Raises:
        UserError: DoRA or biases, which that layout cannot carry.
    """
    check_kohya(lora)
    named: dict[str, Tensor] = {}
    common: float | None = None
    for layer, scale in lora.scales.items():
        down, up = (lora.state[f"{layer}{factor}"] for factor in _FACTORS)
        alpha = scale * down.shape[0]
        common = alpha if common is None else common
        name = f"lora_unet_{name_of(layer).replace('.', '_')}"
        named[f"{name}.lora_down.weight"] = down
        named[f"{name}.lora_up.weight"] = up if alpha == common else up * (alpha / common)
        named[f"{name}.alpha"] = torch.tensor(common)
    return named


def check_kohya(lora: Lora) -> None:
    """Refuses a LoRA that kohya's layout cannot carry."""
    if lora.config["use_dora"]:
        raise UserError(
            "format=kohya cannot carry a DoRA: kohya's scripts and diffusers leave its magnitudes out, "
            "others divide by another norm, and the pictures would differ; use format=merged or diffusers"
        )
    other = [key for key in lora.state if not key.endswith(_FACTORS)]
    if other:
        raise UserError(f"format=kohya cannot carry {other[0]}: use format=merged or diffusers")


def _cast(state: dict[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """The tensors in `dtype` (None: as they are), each with memory of its own; refuses as `_in_dtype`."""
    return {name: _in_dtype(name, tensor, dtype).cpu().contiguous() for name, tensor in state.items()}


def _in_dtype(name: str, tensor: Tensor, dtype: str | None) -> Tensor:
    """The tensor in `dtype`; alphas stay float32.

    Raises:
        UserError: it is not finite, or too large for the precision.
    """
    cast = tensor.detach()
    if dtype is not None and not name.endswith(".alpha"):
        cast = cast.to(torch_dtype(dtype))
    if bool(cast.isfinite().all()):
        return cast
    if bool(tensor.isfinite().all()):
        raise UserError(f"{name} is too large for dtype={dtype}: use dtype=bf16 or fp32")
    raise UserError(f"{name} holds NaN or infinity: export what an earlier step has trained")


class ExportableModel(Backbone):
    """The exporting half of a backbone; the other halves load, draw and train."""

    encoder_parts: tuple[str, ...]
    kohya_module: ClassVar[str] = "networks.lora"
    """What kohya's scripts train this family's LoRAs with."""

    @property
    def process(self) -> Process:
        """The forward process of the base's scheduler."""
        raise NotImplementedError

    def pipeline(self, *names: str) -> Any:
        """A diffusers pipeline that holds the parts `names`."""
        raise NotImplementedError

    def load_adapter(self, path: str, *, weight: float = 1.0) -> None:
        """Adds a LoRA for generation."""
        raise NotImplementedError

    def kohya_state(self, lora: Lora) -> dict[str, Tensor]:
        """The LoRA's tensors in the layout of kohya's scripts; refuses a LoRA that it cannot carry."""
        raise UserError(
            f"format=kohya: that layout is not written for {self.spec.pipeline_name}; use format=diffusers"
        )

    def check_single_file(self) -> None:
        """Refuses a pipeline that other programs would read wrongly from one file of the original layout."""
        raise UserError(
            f"single_file=true: that layout is not written for {self.spec.pipeline_name}; use "
            "single_file=false"
        )

    def original_state(self) -> dict[str, Tensor]:
        """All tensors by the names of the family's published single file."""
        raise NotImplementedError

    def export_adapter(
        self, path: str, folder: str, *, layout: str, weight: float = 1.0, dtype: str | None = None
    ) -> None:
        """Writes the LoRA at `path` to `folder`; the network is not loaded.

        Args:
            path: folder, file or hub id of a LoRA.
            folder: gets one file.
            layout: "diffusers" or "kohya".
            weight: how strongly it acts in the written file when it is loaded at strength 1.
            dtype: of the written tensors; None: as they are. Alphas are float32.

        Raises:
            UserError: no such adapter, one for another base, or one that the layout cannot carry.
        """
        lora = read_lora(self.lora_files, path, self.parts.blueprint(self.network_part), weight=weight)
        if layout == "diffusers":
            self._say_settings(lora)
            self.lora_files.write(_cast(lora.state, dtype), lora.config, folder, kept_notes(path))
            return
        state = self.kohya_state(lora)
        self._say_kohya(lora)
        metadata = {"format": "pt", "ss_network_module": self.kohya_module, **kept_notes(path)}
        save_file(_cast(state, dtype), Path(folder) / KOHYA_FILE, metadata=metadata)

    def _say_settings(self, lora: Lora) -> None:
        """Says where the layout of diffusers acts in diffusers alone as it was trained."""
        scaled = any(scale != 1.0 for scale in lora.scales.values())
        if self.spec.adapter_layout == "diffusers" and (scaled or lora.config["use_dora"]):
            what, form = ("DoRA", "merged") if lora.config["use_dora"] else ("alphas", "kohya")
            say(
                f"{self.lora_files.weights_file} acts as trained in diffusers alone: other programs, such as "
                f"ComfyUI, leave its {what} aside; for them use format={form}"
            )

    def _say_kohya(self, lora: Lora) -> None:
        """Says which of the layers other programs leave out without a word."""
        loaded = self.spec.kohya_in_diffusers
        if loaded == "none":
            say(f"diffusers loads nothing of {KOHYA_FILE} of this family: for it use format=diffusers")
        outer = [layer for layer in lora.scales if "_block" not in layer]
        if outer:
            who = "ComfyUI and diffusers load them" if loaded == "all" else "ComfyUI loads them"
            who += ", diffusers does not" if loaded == "blocks" else ""
            say(f"kohya's own scripts leave out {', '.join(outer)}; {who}")

    def export_pipeline(
        self,
        folder: str,
        *,
        adapter: str | None = None,
        weight: float = 1.0,
        dtype: str | None = None,
        single_file: bool = False,
    ) -> None:
        """Writes the whole pipeline to `folder`, with the LoRA at `adapter` merged into its network.

        The model cannot be used for anything else afterwards.

        Args:
            folder: gets the folders of a diffusers pipeline, or one file.
            adapter: folder, file or hub id of a LoRA; None: the network as it is.
            weight: how strongly the adapter acts.
            dtype: of the written weights; None: as they are in memory.
            single_file: write one file in the original layout.

        Raises:
            UserError: no such adapter, one for another base, or a pipeline that the layout cannot carry.
        """
        if single_file:
            self.check_single_file()
        if adapter is not None:
            read_lora(self.lora_files, adapter, self.parts.blueprint(self.network_part))
            self.load_adapter(adapter, weight=weight)
            self.network.fuse_lora()
            self.network.unload_lora()
        if single_file:
            if self.process.prediction != "epsilon":
                say(
                    f"{PIPELINE_FILE} cannot say that its network predicts {self.process.prediction}: tell "
                    "the program that loads it, which else takes it for noise"
                )
            save_file(_cast(self.original_state(), dtype), Path(folder) / PIPELINE_FILE, {"format": "pt"})
            return
        pipeline = self.pipeline(*self.encoder_parts, "vae", self.network_part)
        for part in pipeline.components.values():
            for name, tensor in part.state_dict().items() if hasattr(part, "parameters") else ():
                _in_dtype(name, tensor, dtype)
        with quiet_libraries():
            if dtype is not None:
                pipeline.to(dtype=torch_dtype(dtype))
            pipeline.save_pretrained(folder)
