"""LoRA files of families whose pipelines in diffusers load none: peft's own folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor

from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.models._lora_files import LoraFile, LoraFiles

_WRAPPED = "base_model.model."
"""Where peft's own wrapper holds the network, in the names of its tensors."""


class PeftFiles(LoraFiles):
    """Writes and reads what `PeftModel.from_pretrained(network, folder)` loads: settings beside tensors."""

    writers = "peft or diffalign"
    weights_file = SAFETENSORS_WEIGHTS_NAME

    def _write(self, state: dict[str, Tensor], metadata: dict[str, Any], folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        wrapped = {f"{_WRAPPED}{name}": tensor for name, tensor in state.items()}
        save_file(wrapped, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        files.write_json(Path(folder) / CONFIG_NAME, metadata)

    def _read(self, path: str, network: Any) -> LoraFile:
        folder = path
        if Path(path).is_file():
            if Path(path).name != SAFETENSORS_WEIGHTS_NAME:
                raise UserError(f"it is no {SAFETENSORS_WEIGHTS_NAME}")
            folder = str(Path(path).parent)
        config = PeftConfig.from_pretrained(folder)
        if not isinstance(config, LoraConfig):
            raise UserError(f"its {CONFIG_NAME} is of {type(config).__name__}, no LoRA")
        part = f"{self.part}."
        tensors = load_peft_weights(folder, device="cpu")
        return LoraFile(
            state={f"{part}{name.removeprefix(_WRAPPED)}": tensor for name, tensor in tensors.items()},
            alphas=None,
            metadata={f"{part}{key}": value for key, value in config.to_dict().items()},
        )
