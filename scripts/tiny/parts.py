"""What the builders of tiny-sdxl and tiny-sd3 do alike with the trained parts of a pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scripts.tiny.loop import Clock, Plan, train
from scripts.tiny.measure import describe_accuracy
from scripts.tiny.tokenizer import save_tokenizer


def token_ids(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Token ids of all texts: int16 [n, length]."""
    encoded = tokenizer(texts, padding="max_length", max_length=length, truncation=True)
    return torch.tensor(encoded.input_ids, dtype=torch.int16)


@dataclass(frozen=True)
class Trained:
    """A pipeline whose parts `names`, the network first and then the text encoders, are trained together.

    Args:
        pipeline: of diffusers.
        names: of the parts.
        options: of the pipeline's call, when pictures are measured.
        helpers: parts that only training needs: they learn along and are not exported.
    """

    pipeline: Any
    names: tuple[str, ...]
    options: dict[str, Any]
    helpers: dict[str, nn.Module] = field(default_factory=dict)

    def modules(self) -> nn.ModuleDict:
        """The parts and the helpers by name."""
        return nn.ModuleDict({name: getattr(self.pipeline, name) for name in self.names} | self.helpers)

    def install(self, modules: nn.ModuleDict) -> None:
        """Puts parts in the place of the pipeline's."""
        for name in self.names:
            setattr(self.pipeline, name, modules[name])

    def say_sizes(self, clock: Clock) -> None:
        """Logs the number of parameters of each part."""
        sizes = []
        for name in (*self.names, "vae"):
            count = sum(parameter.numel() for parameter in getattr(self.pipeline, name).parameters())
            sizes.append(f"{name} {count / 1e6:.2f} M")
        clock.say("parameters: " + ", ".join(sizes))

    def accuracy(self, prompts: int, sheet: Path) -> str:
        """How often the pictures are right, as `describe_accuracy` says it."""
        return describe_accuracy(self.pipeline, prompts, sheet=sheet, **self.options)

    def train(
        self,
        plan: Plan,
        loss: Callable[[int], tuple[Tensor, dict[str, float]]],
        *,
        folder: Path,
        clock: Clock,
        probe_prompts: int,
    ) -> None:
        """Trains the parts and installs their averages after the last step; every kept step is measured."""
        modules = self.modules()

        def probe(averaged: nn.ModuleDict, at: int) -> str:
            self.install(averaged)
            text = self.accuracy(probe_prompts, folder / f"sheet-{at:06d}.png")
            self.install(modules)
            return text

        self.install(train(plan, modules, loss, folder=folder, clock=clock, probe=probe))

    def load(self, path: Path) -> None:
        """Loads the averages of a kept step."""
        self.modules().load_state_dict(torch.load(path, weights_only=True))

    def export(self, tokenizer: Path, folder: Path) -> Path:
        """Writes fp16 safetensors without a variant in their names, so they load as fp32 just as well."""
        for name in (*self.names, "vae"):
            getattr(self.pipeline, name).half()
        self.pipeline.save_pretrained(folder, safe_serialization=True)
        for name in self.names[1:]:
            # transformers loads in the precision named here unless told otherwise, diffusers in fp32: let
            # them agree.
            path = folder / name / "config.json"
            config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in ("tokenizer", "tokenizer_2"):
            save_tokenizer(getattr(self.pipeline, name), tokenizer, folder / name)
        for path in folder.glob("tokenizer*/tokenizer.json"):  # indented, they are twice as large
            compact = json.dumps(
                json.loads(path.read_text(encoding="utf-8")), separators=(",", ":"), ensure_ascii=False
            )
            path.write_text(compact + "\n", encoding="utf-8")
        return folder
