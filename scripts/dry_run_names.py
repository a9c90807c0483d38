"""The names of a base at its true size, without memory for weights: ours against those of plain diffusers.

"Ours" goes through the code of training (`Parts.blueprint`, the family's default layers, `LoraFiles`);
"plain" is the pipeline's own class, peft's `LoraConfig` and `save_lora_weights`, nothing of diffalign.
"""

from __future__ import annotations

import inspect
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from diffalign.common import files
from diffalign.models import _adapters, load_model
from diffalign.models._parts import quiet_libraries
from diffalign.models._spec import AdapterSpec

RANK = 4
Shapes = dict[str, tuple[int, ...]]
"""The shape of each tensor by its name."""


@dataclass(frozen=True)
class Names:
    """What was found of one base.

    Attributes:
        parameters: of the network, counted in the plain class.
        same_parameters: names and shapes of ours are those of the plain class.
        blocks: transformer blocks of the network.
        blocks_with_lora: those of them that the family's default layers put a LoRA into.
        layers: that get a LoRA.
        every_target: each default layer names at least one.
        same_keys: names and shapes in the file that we write are those that plain diffusers writes.
        loads: plain diffusers makes room for every tensor of our file, and for no other.
    """

    parameters: int
    same_parameters: bool
    blocks: int
    blocks_with_lora: int
    layers: int
    every_target: bool
    same_keys: bool
    loads: bool

    @property
    def all_equal(self) -> bool:
        """Whether nothing differs."""
        whole = self.blocks_with_lora == self.blocks > 0 and self.every_target
        return self.same_parameters and whole and self.same_keys and self.loads


class Plain:
    """A pipeline folder as diffusers and peft alone see it; configurations are enough.

    Args:
        folder: of the pipeline.
    """

    def __init__(self, folder: Path) -> None:
        index = files.read_json(folder / "model_index.json")
        self.part = "unet" if "unet" in index else "transformer"
        self.pipeline_class = getattr(diffusers, index["_class_name"])
        self._class = getattr(diffusers, index[self.part][1])
        self._config = self._class.load_config(folder, subfolder=self.part)
        self._by_pipeline = hasattr(self.pipeline_class, "save_lora_weights")

    def network(self) -> Any:
        """The network without memory for weights."""
        with torch.device("meta"):
            return self._class.from_config(self._config)

    def write_adapter(self, targets: list[str], rank: int, folder: Path) -> None:
        """Writes a fresh LoRA as the scripts of diffusers, or where its pipeline loads none of peft, do."""
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        if not self._by_pipeline:
            wrapped = get_peft_model(self.network(), config)
            wrapped.save_pretrained(folder, state_dict=zeros(wrapped.state_dict()))
            return
        network = self.network()
        network.add_adapter(config)
        layers = {f"{self.part}_lora_layers": zeros(get_peft_model_state_dict(network))}
        self.pipeline_class.save_lora_weights(folder, **layers)

    def loaded(self, adapter: Path) -> Shapes:
        """What the network has made room for once the adapter in a folder is loaded, by the file's names."""
        network = self.network()
        with warnings.catch_warnings():
            # Numbers go nowhere without memory; a tensor of another shape is refused all the same.
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter", UserWarning)
            if not self._by_pipeline:
                wrapped = PeftModel.from_pretrained(network, str(adapter))
                return _lora_shapes(wrapped, "")
            needed = inspect.signature(self.pipeline_class).parameters
            pipeline = self.pipeline_class(**{**dict.fromkeys(needed), self.part: network})
            with quiet_libraries():
                pipeline.load_lora_weights(str(adapter), adapter_name="default")
        return _lora_shapes(network, f"{self.part}.")


def check(model: str, folder: Path) -> Names:
    """Compares everything of one pipeline folder, of which configurations are enough.

    Args:
        model: the backbone of diffalign.
        folder: of the pipeline.
    """
    plain = Plain(folder)
    loaded: Any = load_model(model, str(folder))
    spec = loaded.spec.with_targets(AdapterSpec(rank=RANK))
    network, theirs = loaded.parts.blueprint(loaded.network_part), plain.network()
    same_parameters = shapes(network) == shapes(theirs)
    with tempfile.TemporaryDirectory() as scratch:
        mine, other = Path(scratch, "ours"), Path(scratch, "plain")
        _adapters.add_fresh(network, spec, seed=0)
        state = zeros(_adapters.adapter_state(network))
        loaded.lora_files.write(state, _adapters.trained_config(network), mine)
        plain.write_adapter(spec.targets, RANK, other)
        same_keys, loads = of_file(mine) == of_file(other), takes(plain, mine)
    layers = {name.partition(".lora_")[0] for name in state}
    blocks = [name for name, module in network.named_modules() if is_block(module)]
    return Names(
        parameters=sum(parameter.numel() for parameter in theirs.parameters()),
        same_parameters=same_parameters,
        blocks=len(blocks),
        blocks_with_lora=sum(any(layer.startswith(f"{block}.") for layer in layers) for block in blocks),
        layers=len(layers),
        every_target=all(any(layer.endswith(f".{target}") for layer in layers) for target in spec.targets),
        same_keys=same_keys,
        loads=loads,
    )


def check_saved(folder: Path, model: str, adapter: Path, rank: int) -> tuple[bool, bool]:
    """Whether a trained adapter has the names that plain diffusers writes, and whether that takes it."""
    plain = Plain(folder)
    loaded: Any = load_model(model, str(folder))
    targets = loaded.spec.with_targets(AdapterSpec()).targets
    with tempfile.TemporaryDirectory() as scratch:
        plain.write_adapter(targets, rank, Path(scratch))
        same = of_file(adapter) == of_file(Path(scratch))
    return same, takes(plain, adapter)


def takes(plain: Plain, adapter: Path) -> bool:
    """Whether plain diffusers has a place, as large as the network asks, for each tensor of a file."""
    try:
        return plain.loaded(adapter) == of_file(adapter)
    except (RuntimeError, ValueError):  # of another size, or of no layer at all
        return False


def _lora_shapes(network: nn.Module, prefix: str) -> Shapes:
    """Of the one adapter of a network, under the names of a file."""
    found = {name: shape for name, shape in shapes(network).items() if ".lora_" in name}
    return {f"{prefix}{name.replace('.default.', '.')}": shape for name, shape in found.items()}


def is_block(module: nn.Module) -> bool:
    """Whether a module is one of the repeated blocks: all of our networks name theirs so."""
    return type(module).__name__.endswith("TransformerBlock")


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As many numbers as a LoRA without memory would have, and nothing of the network's own."""
    return {name: torch.zeros(tensor.shape) for name, tensor in state.items() if ".lora_" in name}


def shapes(module: nn.Module | dict[str, Any]) -> Shapes:
    """Of the tensors of a network or a state."""
    state = module.state_dict() if isinstance(module, nn.Module) else module
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def of_file(folder: Path) -> Shapes:
    """Of the tensors of the one weight file in a folder."""
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
