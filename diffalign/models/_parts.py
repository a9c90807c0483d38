"""Loading the parts of a diffusers pipeline one by one, with one-line errors."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffalign.common.errors import UserError, brief
from diffalign.common.files import file_identity
from diffalign.models._base import torch_dtype
from diffalign.models._spec import ModelSpec

OWN_PARTS = ("vae", "unet")


class Source(NamedTuple):
    """Where a part is loaded from; `revision` is the commit of a hub id as it stood when the run began."""

    path: str
    subfolder: str | None = None
    revision: str | None = None


def own_source(path: str, name: str) -> Source:
    """Where the user's own VAE or UNet lies: in a folder or hub id itself, or in its subfolder `name`."""
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
        self._refuse_no_pipeline()
        self._revision = spec.revision
        if not Path(spec.path).is_dir():
            self._revision = hub_commit(spec.path, "model_index.json", spec.revision) or spec.revision
        self.index = self._read_index()
        missing = [name for name in expected if not _is_part(self.index.get(name))]
        if missing:
            raise UserError(
                f"{spec.path} has no {', '.join(missing)}: it is a "
                f"{self.index.get('_class_name', 'other pipeline')}; "
                "choose the model name that fits, or a base of this family"
            )
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
        """Where a part is loaded from: the pipeline, or the user's own VAE or UNet."""
        if name not in self._sources:
            own = getattr(self.spec, name) if name in OWN_PARTS else None
            if own is not None and not Path(own).exists() and _looks_local(own):
                raise UserError(f"model.{name} {own} does not exist: give a diffusers folder or a hub id")
            ours = Source(self.spec.path, name, self._revision)
            self._sources[name] = ours if own is None else own_source(own, name)
        return self._sources[name]

    def config(self, name: str, path: str | None = None) -> dict[str, Any]:
        """The part's configuration (`path`: of what `load_as` loads), read without loading its weights."""
        import diffusers

        source = self.source(name) if path is None else Source(path, name)
        cls = getattr(diffusers, self.index[name][1], None)
        if cls is None:
            raise UserError(
                f"{self.spec.path}: its {name} is a {self.index[name][1]}, which diffusers does not have"
            )
        try:
            return dict(cls.load_config(source.path, subfolder=source.subfolder, revision=source.revision))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the {name} config of {source.path}: {brief(error)}") from error

    def blueprint(self, name: str) -> Any:
        """A diffusers part with every layer in place and no memory for weights."""
        import diffusers
        from accelerate import init_empty_weights

        with init_empty_weights():
            return getattr(diffusers, self.index[name][1]).from_config(self.config(name))

    def identity(self, name: str) -> dict[str, Any]:
        """What tells these weights from others: content of local files, or hub id and commit."""
        source = self.source(name)
        folder = Path(source.path) / (source.subfolder or "")
        if folder.is_dir():
            return file_identity(folder)
        return {"hub": source.path, "part": name, "commit": source.revision, "variant": self._variant(source)}

    def _variant(self, source: Source) -> str | None:
        return self.spec.variant if source.path == self.spec.path else None

    def _refuse_no_pipeline(self) -> None:
        path = Path(self.spec.path)
        if path.is_file():
            raise UserError(f"model.path {path} is a file: give a diffusers pipeline folder or a hub id")
        if not path.is_dir() and _looks_local(self.spec.path):
            raise UserError(
                f"model.path {self.spec.path} does not exist: give a diffusers pipeline folder or a hub id"
            )
        if path.is_dir() and not (path / "model_index.json").is_file():
            raise UserError(f"{path} has no model_index.json: give the folder of a whole diffusers pipeline")

    def _read_index(self) -> dict[str, Any]:
        from diffusers import DiffusionPipeline

        try:
            return dict(DiffusionPipeline.load_config(self.spec.path, revision=self._revision))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the pipeline {self.spec.path}: {brief(error)}") from error

    def _load(self, name: str, source: Source) -> Any:
        library, class_name = self.index[name]
        where = source.path if source.subfolder is None else f"{source.path} ({name})"
        missing: list[str] = []
        try:
            cls = getattr(importlib.import_module(library), class_name)
            part = cls.from_pretrained(source.path, **self._options(name, cls, source))
            if hasattr(cls, "parameters"):
                part, report = part
                missing = sorted(report["missing_keys"])
        except Exception as error:  # a torn file, an unknown class, no network: libraries agree on no type
            raise UserError(f"cannot load {where}: {brief(error)}") from error
        if missing:  # both libraries would go on with random numbers in their place
            raise UserError(
                f"{where} lacks {len(missing)} weights of a {class_name}, e.g. {missing[0]}: "
                "get the whole file"
            )
        return part.to(self.device).eval().requires_grad_(False) if hasattr(cls, "parameters") else part

    def _options(self, name: str, cls: Any, source: Source) -> dict[str, Any]:
        """What `from_pretrained` is told."""
        is_diffusers = self.index[name][0] == "diffusers"
        options: dict[str, Any] = {
            "subfolder": source.subfolder if is_diffusers else source.subfolder or "",
            "revision": source.revision,
        }
        if hasattr(cls, "parameters"):
            dtype = torch_dtype(self.spec.vae_dtype if name == "vae" else self.spec.dtype)
            options["torch_dtype" if is_diffusers else "dtype"] = dtype
            options["output_loading_info"] = True
            if self._variant(source) is not None:
                options["variant"] = self.spec.variant
        return options


def _looks_local(path: str) -> bool:
    """Whether a path that does not exist cannot be the id of something on the hub."""
    return Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") != 1


def _quiet() -> None:
    """No bar for each part that loads: they come many at a time and say nothing about the work."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextmanager
def quiet_about_truncation() -> Iterator[None]:
    """Inside, diffusers and transformers do not print what they cut off a long prompt: `say_too_long` does.

    They print it for each batch, with the padding of every prompt in it.
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
