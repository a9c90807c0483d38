"""The LoRA files of a family of pipelines: written and read by the pipeline's own class of diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.common import plugins
from diffalign.common.errors import UserError, brief
from diffalign.models._parts import looks_local
from diffalign.models._runs import run_of

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
NOUNS = {"unet": "UNet", "transformer": "transformer"}
"""What a person calls the network, by the name of its part."""


@dataclass(frozen=True)
class LoraFile:
    """What a file holds, in the words of diffusers.

    Attributes:
        state: its tensors; those of the network begin with the name of its part.
        alphas: alpha by layer, where the file has them beside the tensors.
        metadata: peft's settings, where the file has them.
    """

    state: dict[str, Tensor]
    alphas: dict[str, float] | None
    metadata: dict[str, Any] | None


class LoraFiles:
    """Writes and reads the LoRAs of one family.

    Args:
        pipeline_class: the diffusers pipeline.
        part: the network's name in it, "unet" or "transformer".
    """

    writers: ClassVar[str] = "diffusers, kohya or diffalign"
    """Who writes what can be read here."""
    weights_file: ClassVar[str] = WEIGHTS_FILE
    """The file of the tensors that are written."""

    def __init__(self, pipeline_class: Any, part: str) -> None:
        self.pipeline_class, self.part = pipeline_class, part

    def write(
        self,
        state: dict[str, Tensor],
        config: dict[str, Any],
        folder: str | Path,
        notes: dict[str, str] | None = None,
    ) -> None:
        """Writes an adapter's tensors with peft's settings as the metadata that makes it reload equal.

        `notes` are added to the metadata: readers that do not know them leave them aside.

        Without metadata alpha != rank, rsLoRA and DoRA reload wrong; with a dropout in the metadata, dropout
        stays active after loading (both measured on diffusers 0.42, peft 0.21). So: metadata, with dropout 0.
        """
        config = {**config, "lora_dropout": 0.0, "inference_mode": True}
        # peft holds names as sets, whose order changes with the process: sorted, equal runs write equal
        # settings (the order of a file's metadata is safetensors' own).
        metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        self._write(tensors, metadata, str(folder))
        if notes:
            file = Path(folder) / self.weights_file
            save_file(load_file(file), file, {**notes_of(file), **notes})

    def _write(self, state: dict[str, Tensor], metadata: dict[str, Any], folder: str) -> None:
        layers = {f"{self.part}_lora_layers": state, f"{self.part}_lora_adapter_metadata": metadata}
        self.pipeline_class.save_lora_weights(folder, weight_name=WEIGHTS_FILE, **layers)

    def read(self, path: str, network: Any) -> LoraFile:
        """The adapter at `path`, in any layout that diffusers reads; it fits `network`.

        Raises:
            UserError: nothing there, not an adapter, one of another family or layout, or layers that the
                network lacks or has in another size.
        """
        local = Path(path)
        if not path or (not local.exists() and looks_local(path)):
            raise UserError(f"adapter {path} does not exist: give a folder, a .safetensors file or a hub id")
        try:
            return self._read_fitting(path, network)
        except UserError as error:
            other = self._other_family(path)
            if other is None:
                raise
            raise UserError(
                f"adapter {path} is of another family: it was trained with model={other}; give that model, "
                "or an adapter of this one"
            ) from error

    def _read_fitting(self, path: str, network: Any) -> LoraFile:
        part, local = self.part, Path(path)
        if (local / "adapter").is_dir():
            raise UserError(f"{path} is the folder of a run, not an adapter: give {path}/adapter")
        if (local / part).is_dir():
            raise UserError(
                f"{path} is a whole {NOUNS[part]}, not an adapter: use model.{part}={path}/{part}"
            )
        try:
            file = self._read(path, network)
        except Exception as error:  # converting a foreign layout, or asking the hub, fails in many ways
            raise UserError(
                f"cannot read the adapter {path}: {brief(error).rstrip('.')}; give one that {self.writers} "
                "wrote for this base"
            ) from error
        strange = [key for key in file.state if "lora" not in key]
        if len(strange) == len(file.state):
            raise UserError(f"{path} holds no LoRA weights: give an adapter that {self.writers} wrote")
        if strange:
            raise UserError(
                f"{path} holds {strange[0]} beside its LoRA weights, which cannot be read: give an adapter "
                f"that {self.writers} wrote"
            )
        self._check_places(file, path)
        _check_fits(self.network_state(file), network, path)
        return file

    def _other_family(self, path: str) -> str | None:
        """The name of the model that the run beside an adapter trained, where its pipeline is another."""
        try:
            name: str = (run_of(path) or {})["recipe"]["model"]["name"]
            theirs: Any = plugins.get("models", name)
        except (UserError, KeyError, TypeError):  # no run, files of others, a model that is not installed
            return None
        return None if theirs.pipeline_name == self.pipeline_class.__name__ else name

    def _read(self, path: str, network: Any) -> LoraFile:
        state, metadata = _fetched(path)
        if any("dora_scale" in key for key in state):  # diffusers (0.42) would leave the magnitudes out
            raise UserError("it is a DoRA in the layout of kohya, which nothing here can read")
        state, alphas = self._in_diffusers(state, network)
        return LoraFile(state, self._alphas_by_layer(alphas) if alphas else None, metadata)

    def _in_diffusers(
        self, state: dict[str, Tensor], network: Any
    ) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """The tensors of a file by diffusers' names, and the alphas that it has beside them."""
        # One call for every pipeline: those that know no such option leave it aside.
        found = self.pipeline_class.lora_state_dict(
            state, unet_config=network.config, return_lora_metadata=True, return_alphas=True
        )
        return found[0], found[1] if len(found) == 3 else None

    def _check_places(self, file: LoraFile, path: str) -> None:
        """Refuses tensors of parts that the pipeline adapts not; diffusers would leave them out."""
        parts = getattr(self.pipeline_class, "_lora_loadable_modules", (self.part,))
        for key in file.state:
            if key.partition(".")[0] not in parts:
                raise UserError(
                    f"adapter {path} is of another family, or of a layout that cannot be read: "
                    f"{self.pipeline_class.__name__} has no place for its {key}; give one that "
                    f"{self.writers} wrote for this base"
                )

    def place(self, network: Any, name: str, file: LoraFile, path: str) -> None:
        """Adds to `network`, as `name`, what `read` has read from `path`.

        Raises:
            UserError: the tensors and the settings beside them contradict one another.
        """
        try:
            network.load_lora_adapter(
                file.state,
                prefix=self.part,
                network_alphas=file.alphas,
                adapter_name=name,
                metadata=file.metadata,
            )
        except Exception as error:  # peft and torch find many things wrong, in types of many kinds
            raise UserError(f"cannot use the adapter {path}: {brief(error)}; get its whole file") from error

    def network_state(self, file: LoraFile) -> dict[str, Tensor]:
        """The network's tensors by peft's names, whichever layout (peft, diffusers, kohya) the file has."""
        return self._peft_names(file.state)

    def is_of_network(self, file: LoraFile) -> bool:
        """Whether the file changes the network alone, and no text encoder."""
        return all(key.startswith(f"{self.part}.") for key in file.state)

    def _peft_names(self, state: dict[str, Any]) -> dict[str, Any]:
        prefix = f"{self.part}."
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if not inside or "lora_A" in next(iter(inside)):
            return inside
        converted: dict[str, Any] = convert_unet_state_dict_to_peft(inside)
        return converted

    def _alphas_by_layer(self, alphas: dict[str, Any]) -> dict[str, float]:
        """The alphas of a file without settings, under the names of their layers.

        diffusers (0.42) names those of attention layers by their tensors; where alphas differ from layer to
        layer peft (0.21) then ignores them, with a warning. Without `^` it takes that of FLUX's `proj_out`
        for every layer whose name ends so. And settings that hold tensors, as FLUX's alphas do, cannot be
        written.
        """
        named = {}
        for key, alpha in alphas.items():
            for layer in self._peft_names({key.removesuffix(".alpha"): alpha}):  # none of a text encoder
                named[f"{self.part}.^{layer.partition('.lora_')[0]}.alpha"] = float(alpha)
        return named


def _fetched(path: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file, or of one in a folder or on the hub, and peft's settings where it has them.

    Raises:
        UserError: several files in the folder, of which diffusers (0.42) would take any.
    """
    names = sorted(file.name for file in Path(path).glob("*.safetensors"))
    if len(names) > 1 and WEIGHTS_FILE not in names:
        raise UserError(f"it holds several files ({', '.join(names)})")
    found: tuple[dict[str, Tensor], dict[str, Any] | None] = _fetch_state_dict(
        path,
        weight_name=None,
        use_safetensors=True,
        local_files_only=None,
        cache_dir=None,
        force_download=None,
        proxies=None,
        token=None,
        revision=None,
        subfolder=None,
        user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        allow_pickle=not path.endswith(".safetensors"),
    )
    return found


def notes_of(path: str | Path) -> dict[str, str]:
    """The metadata of the LoRA file at `path`, or alone in that folder; nothing of one on the hub."""
    local = Path(path)
    found = [local] if local.is_file() else list(local.glob("*.safetensors"))
    if len(found) != 1 or found[0].suffix != ".safetensors":
        return {}
    with safe_open(found[0], "pt") as file:
        return dict(file.metadata() or {})


def _check_fits(named: dict[str, Tensor], network: Any, path: str) -> None:
    for layer, ranks in _ranks(named).items():
        if len(ranks) < 2 or ranks[0] != ranks[1]:
            raise UserError(
                f"adapter {path} is not whole: the factors of {layer} do not fit one another; get it anew"
            )
    for key, value in named.items():
        for marker, axis, side in ((".lora_A.", 1, "inputs"), (".lora_B.", 0, "outputs")):
            layer_name, found, _ = key.partition(marker)
            if not found:
                continue
            weight = _weight_of(network, layer_name)
            if weight is None or weight.shape[axis] != value.shape[axis]:
                base = "has no such layer" if weight is None else f"has {weight.shape[axis]} {side} there"
                raise UserError(
                    f"adapter {path} is for another architecture: {layer_name} has {value.shape[axis]} "
                    f"{side}, the base {base}; use the base it was trained on"
                )


def _ranks(named: dict[str, Tensor]) -> dict[str, list[int]]:
    """Layer -> the rank that each of its two factors has; one number where a factor is missing."""
    found: dict[str, list[int]] = {}
    for key, value in named.items():
        for marker, axis in ((".lora_A.weight", 0), (".lora_B.weight", 1)):
            if key.endswith(marker) and value.ndim > 1:
                found.setdefault(key.removesuffix(marker), []).append(value.shape[axis])
    return found


def _weight_of(network: Any, layer_name: str) -> Tensor | None:
    try:
        layer = network.get_submodule(layer_name)
    except AttributeError:
        return None
    return getattr(getattr(layer, "base_layer", layer), "weight", None)
