"""Loading the parts of a diffusers pipeline one by one, with one-line errors."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from diffalign.common.errors import UserError, brief
from diffalign.common.files import file_identity
from diffalign.models._base import torch_dtype
from diffalign.models._spec import ModelSpec

if TYPE_CHECKING:
    from diffalign.models._lora_files import LoraFiles


class Source(NamedTuple):
    """Where a part is loaded from; `revision` is the commit of a hub id as it stood when the run began."""

    path: str
    subfolder: str | None = None
    revision: str | None = None


def own_source(path: str, name: str) -> Source:
    """Where the user's own VAE or network lies: in a folder or hub id itself, or in its subfolder `name`."""
    if Path(path).exists():
        return Source(path, name if (Path(path) / name).is_dir() else None)
    nested = hub_commit(path, f"{name}/config.json")
    return Source(path, name, nested) if nested else Source(path, None, hub_commit(path, "config.json"))


def hub_commit(repo: str, file: str, revision: str | None = None) -> str | None:
    """The commit that a hub id stands for, read off its local copy of the small `file`; None without it."""
    from huggingface_hub import hf_hub_download

    try:
        local = hf_hub_download(repo, file, revision=revision)
    except Exception:  # not there, no network, no hub id: loading the part says it better
        return None
    return Path(local.removesuffix(file)).name


class Parts:
    """The parts of one pipeline, each loaded on first use and kept until dropped.

    A single file holds the weights of network, VAE and text encoders, but for those that `spec.file_may_lack`
    names and this one lacks; all else comes from the pipeline that `spec.config` names.

    Args:
        spec: which weights.
        device: where parts go.
        expected: part names that the family's pipeline must have.

    Raises:
        UserError: the path is no diffusers pipeline, or one of another family.
    """

    def __init__(self, spec: ModelSpec, device: str, expected: tuple[str, ...]) -> None:
        _quiet()
        self.spec, self.device = spec, device
        self._sources: dict[str, Source] = {}
        self._is_file = Path(spec.path).is_file()
        self._home = self._find_home()
        self._revision = spec.revision
        if not Path(self._home).is_dir():
            self._revision = hub_commit(self._home, "model_index.json", spec.revision) or spec.revision
        self.index = self._read_index()
        self._refuse_missing([name for name in expected if not _is_part(self.index.get(name))])
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """The part `name`, frozen, in evaluation mode."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name, self.source(name))
        return self._loaded[name]

    def load_as(self, name: str, path: str) -> Any:
        """Another instance of the part `name`, from the folder `path/name`; the caller keeps it."""
        return self._load(name, Source(path, name))

    def drop(self, *names: str) -> None:
        """Frees parts; they load again on the next use."""
        for name in names:
            self._loaded.pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def source(self, name: str) -> Source:
        """Where a part, or of one in a single file its configuration, is loaded from.

        That is the pipeline, or the user's own VAE or network.
        """
        if name not in self._sources:
            own = self.spec.own_parts.get(name)
            if own is not None and not Path(own).exists() and looks_local(own):
                raise UserError(f"model.{name} {own} does not exist: give a diffusers folder or a hub id")
            ours = Source(self._home, name, self._revision)
            self._sources[name] = ours if own is None else own_source(own, name)
        return self._sources[name]

    def config(self, name: str, path: str | None = None) -> dict[str, Any]:
        """The part's configuration (`path`: of what `load_as` loads), read without loading its weights."""
        source = self.source(name) if path is None else Source(path, name)
        self._refuse_absent(name, source)
        cls = self._diffusers_class(name)
        try:
            config = dict(cls.load_config(source.path, subfolder=source.subfolder, revision=source.revision))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the {name} config of {source.path}: {brief(error)}") from error
        wanted, found = self.index[name][1], config.get("_class_name", "part of no class")
        if name == "vae" and found != wanted:
            raise UserError(f"the vae of {source.path} is a {found}, {wanted} is wanted: give another VAE")
        return config

    def config_beside_encoders(self, name: str) -> dict[str, Any]:
        """The configuration of the pipeline's own part, which its text encoders were made for.

        Of a pipeline that has the user's own in its place and none itself, that of the user's.
        """
        if name in self.spec.own_parts:
            cls = self._diffusers_class(name)
            with suppress(OSError, ValueError):
                return dict(cls.load_config(self._home, subfolder=name, revision=self._revision))
        return self.config(name)

    def blueprint(self, name: str) -> Any:
        """A diffusers part with every layer in place and no memory for weights."""
        # Tables of positions too: SD3.5's takes 4 GB to compute, in float64.
        with torch.device("meta"), _same_stream():
            return self._diffusers_class(name).from_config(self.config(name))

    def _diffusers_class(self, name: str) -> Any:
        """The class of a diffusers part."""
        import diffusers

        cls = self.spec.part_class(name) or getattr(diffusers, self.index[name][1], None)
        if cls is None:
            raise UserError(
                f"{self.spec.path}: its {name} is a {self.index[name][1]}, which diffusers does not have"
            )
        return cls

    def identity(self, name: str) -> dict[str, Any]:
        """What tells these weights from others: content of local files, or hub id and commit."""
        source = self.source(name)
        folder = Path(source.path) / (source.subfolder or "")
        if self._in_file(name):
            # The configuration decides too: a VAE's factor is nowhere in its weights.
            return {"file": self._file_identity, "config": self._config_of(name)}
        if folder.is_dir():
            return file_identity(folder)
        return {"hub": source.path, "part": name, "commit": source.revision, "variant": self._variant(source)}

    def _config_of(self, name: str) -> dict[str, Any]:
        """What tells the configuration of a part in the single file from others."""
        folder = Path(self._home) / name
        if folder.is_dir():
            return file_identity(folder / "config.json")
        return {"hub": self._home, "part": name, "commit": self._revision}

    @cached_property
    def _file_identity(self) -> dict[str, Any]:
        return file_identity(self.spec.path)

    def _in_file(self, name: str) -> bool:
        """Whether the weights of a part are those of the single file."""
        if not self._is_file or name.startswith(("tokenizer", "scheduler")) or name in self.spec.own_parts:
            return False
        starts = self.spec.file_may_lack.get(name)
        return starts is None or any(tensor.startswith(starts) for tensor in self._names_in_file)

    @cached_property
    def _names_in_file(self) -> list[str]:
        """The names of the single file's tensors; they stand at its beginning."""
        from safetensors import safe_open

        try:
            with safe_open(self.spec.path, "pt") as file:
                return list(file.keys())
        except Exception as error:  # a torn file, or another file under this name
            raise UserError(f"cannot read {self.spec.path}: {brief(error)}; get the whole file") from error

    def _variant(self, source: Source) -> str | None:
        return self.spec.variant if source.path == self._home else None

    def _find_home(self) -> str:
        """The pipeline folder or hub id that configurations are read from."""
        given, path = self.spec.path, Path(self.spec.path)
        if not self._is_file:
            if self.spec.config is not None:
                raise UserError(
                    f"model.config is set, but model.path {given} is no single file: leave it out"
                )
            self._refuse_no_pipeline("model.path", given)
            return given
        if path.suffix != ".safetensors":
            raise UserError(
                f"model.path {path} is a file, but no .safetensors: give a diffusers pipeline folder, a hub "
                "id or a .safetensors file"
            )
        if self.spec.default_config is None:
            raise UserError(
                f"model.path {path} is a single file, which diffusers does not read for "
                f"{self.spec.pipeline_name}: give a diffusers pipeline folder or a hub id"
            )
        home = self.spec.config or self.spec.default_config
        self._refuse_no_pipeline("model.config", home)
        return home

    def _refuse_no_pipeline(self, key: str, given: str) -> None:
        path = Path(given)
        if not path.is_dir() and (path.is_file() or looks_local(given)):
            what = "is a file" if path.is_file() else "does not exist"
            raise UserError(f"{key} {given} {what}: give a diffusers pipeline folder or a hub id")
        if path.is_dir() and not (path / "model_index.json").is_file():
            raise UserError(f"{path} has no model_index.json: give the folder of a whole diffusers pipeline")

    def _read_index(self) -> dict[str, Any]:
        from diffusers import DiffusionPipeline

        try:
            return dict(DiffusionPipeline.load_config(self._home, revision=self._revision))
        except (OSError, ValueError) as error:
            remedy = ""
            if self._is_file:
                remedy = (
                    f"; {self.spec.path} is read with its configurations, give others with model.config=..."
                )
            raise UserError(f"cannot read the pipeline {self._home}: {brief(error)}{remedy}") from error

    def _refuse_missing(self, missing: list[str]) -> None:
        """Refuses a pipeline whose index lacks parts; UserError says which, and why that may be."""
        if not missing:
            return
        found = self.index.get("_class_name", "other pipeline")
        if found != self.spec.pipeline_name:
            why = f"it is a {found}; choose the model name that fits, or a base of this family"
        else:
            why = f"the pipeline is not whole; get all of it{self._or_left_out(*missing)}"
        raise UserError(f"{self.spec.path} has no {', '.join(missing)}: {why}")

    def _refuse_absent(self, name: str, source: Source) -> None:
        """Refuses a pipeline on disk that lacks the folder of a part, which the libraries do not name.

        Of a tokenizer they would go on with an empty one.
        """
        folder = Path(source.path, source.subfolder or "")
        if Path(source.path).is_dir() and not folder.is_dir():
            raise UserError(f"{folder} does not exist: get the whole pipeline{self._or_left_out(name)}")

    def _or_left_out(self, *names: str) -> str:
        """How a remedy ends: what makes the model do without these parts; nothing where it cannot."""
        keys = dict.fromkeys(self.spec.left_out_by.get(name) for name in names)
        return "" if None in keys else f"; or give {' '.join(f'model.{key}=false' for key in keys)}"

    def _load(self, name: str, source: Source) -> Any:
        library, class_name = self.index[name]
        from_file = self._in_file(name) and source == self.source(name)
        path, inside = (self.spec.path, name) if from_file else (source.path, source.subfolder)
        where = path if inside is None else f"{path} ({name})"
        if not from_file:
            self._refuse_absent(name, source)
        try:
            cls = self.spec.part_class(name) or getattr(importlib.import_module(library), class_name)
            with _same_stream():
                part, missing = self._from_file(name) if from_file else self._from_folder(name, cls, source)
        except Exception as error:  # a torn file, an unknown class, no network: libraries agree on no type
            remedy = ""
            if from_file:
                remedy = "; give the whole file of a base of this family"
            elif self._is_file and source.path == self._home and name in self.spec.file_may_lack:
                remedy = f"; {self.spec.path} has none, give a whole pipeline with model.config=..."
            remedy += self._or_left_out(name)
            raise UserError(f"cannot load {where}: {brief(error)}{remedy}") from error
        if missing:  # the libraries would go on with random numbers in their place, or with nothing
            raise UserError(
                f"{where} lacks {len(missing)} weights of a {class_name}, e.g. {missing[0]}: "
                "get the whole file"
            )
        return part.to(self.device).eval().requires_grad_(False) if hasattr(cls, "parameters") else part

    def _from_folder(self, name: str, cls: Any, source: Source) -> tuple[Any, list[str]]:
        """A part, and the weights that its files lack."""
        part = cls.from_pretrained(source.path, **self._options(name, cls, source))
        if not hasattr(cls, "parameters"):
            return part, []
        part, report = part
        return part, sorted(report["missing_keys"])

    def _from_file(self, name: str) -> tuple[Any, list[str]]:
        """A part of the single file, and the weights that it lacks: those have no memory."""
        import diffusers

        family = getattr(diffusers, self.spec.pipeline_name)
        with quiet_libraries():
            pipeline = family.from_single_file(
                self.spec.path,
                config=self._home,
                revision=self._revision,
                torch_dtype=self._dtype(name),
                **{other: None for other, entry in self.index.items() if _is_part(entry) and other != name},
            )
        part = getattr(pipeline, name)
        return part, sorted(key for key, tensor in part.named_parameters() if tensor.is_meta)

    def _dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self.spec.vae_dtype if name == "vae" else self.spec.dtype)

    def _options(self, name: str, cls: Any, source: Source) -> dict[str, Any]:
        """What `from_pretrained` is told."""
        is_diffusers = self.index[name][0] == "diffusers"
        options: dict[str, Any] = {
            "subfolder": source.subfolder if is_diffusers else source.subfolder or "",
            "revision": source.revision,
        }
        if hasattr(cls, "parameters"):
            options["torch_dtype" if is_diffusers else "dtype"] = self._dtype(name)
            options["output_loading_info"] = True
            if self._variant(source) is not None:
                options["variant"] = self.spec.variant
        return options


def _same_stream() -> Any:
    """Inside, layers may draw numbers, which those of a file replace; torch's stream goes on as it was."""
    return torch.random.fork_rng(devices=[])


def looks_local(path: str) -> bool:
    """Whether a path that does not exist cannot be the id of something on the hub."""
    is_path = Path(path).is_absolute() or path.startswith((".", "~")) or path.endswith(".safetensors")
    return is_path or path.count("/") != 1


def _quiet() -> None:
    """No bar for each part that loads: they come many at a time and say nothing about the work."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, diffusers and transformers print no warnings of theirs that say nothing new.

    Of a long prompt they print what they cut off, for each batch and with the padding of every prompt in it:
    `say_too_long` says it better.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    try:
        for library, _ in before:
            library.set_verbosity_error()
        yield
    finally:
        for library, level in before:
            library.set_verbosity(level)


def _is_part(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and entry[0] is not None


class Backbone:
    """What the halves of a backbone, which load, train and export, expect of one another."""

    spec: ModelSpec
    parts: Parts

    @property
    def network_part(self) -> str:
        """The name of the network in the pipeline: "unet" or "transformer"."""
        return self.spec.network_part

    @property
    def network(self) -> Any:
        """The network."""
        raise NotImplementedError

    @property
    def lora_files(self) -> LoraFiles:
        """How LoRAs of this family are written and read."""
        raise NotImplementedError
