"""Weights of scorers: files of the hub, tensors of a file, and what identifies their content.

Nothing but tensors is ever read: a pickled program could do anything, and is refused.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffalign.common import files
from diffalign.common.errors import UserError, brief

SETTINGS = (".json", ".txt", ".model")
"""Endings of the small files beside weights: settings of the network and of pictures, and vocabularies."""


def content_of(*paths: Path) -> str:
    """Returns a short name of the content of some files (12 hex digits)."""
    identities = [files.file_identity(path) for path in paths]
    return hashlib.sha256(json.dumps(identities, sort_keys=True).encode()).hexdigest()[:12]


def settings_in(folder: Path) -> list[Path]:
    """Returns the small files of a folder that decide values beside its weights, in the order of names."""
    return sorted(path for path in folder.iterdir() if path.suffix in SETTINGS and path.is_file())


def is_hub_id(path: str) -> bool:
    """Returns whether a path that does not exist here can name a repository of the hub (org/name)."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def local_or_hub(
    path: str, revision: str | None, wanted: Callable[[list[str]], list[str]], what: str = "weights"
) -> tuple[Path, str, str]:
    """Returns the folder of a model of transformers, its name, and what identifies its content.

    Args:
        path: a folder, whose weights (safetensors, else pytorch_model*.bin) and small files are its content,
            or a hub id, whose commit is.
        revision: of a hub id.
        wanted: which files of a repository's listing to download.
        what: the name of `path` in messages.

    Raises:
        UserError: it is neither, or the hub does not give it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        return folder, folder.name, content_of(*settings_in(folder), *weights)
    if not is_hub_id(path):
        raise UserError(f"{what} '{path}' do not exist: give a folder or a hub id (org/name)")
    folder = hub_folder(path, revision, wanted)
    return folder, path, hub_identity(folder)


def hub_identity(snapshot: Path) -> str:
    """Returns what identifies the content of a local snapshot: its folder has the name of the commit."""
    return f"hub:{snapshot.name[:12]}"


def hub_folder(repo: str, revision: str | None, wanted: Callable[[list[str]], list[str]]) -> Path:
    """Returns the local snapshot of a hub repository with the files that `wanted` picks from its listing.

    Raises:
        UserError: no such repository, or no network and it was never downloaded.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        listing = HfApi().list_repo_files(repo, revision=revision)
    except HFValidationError as error:
        raise UserError(f"weights '{repo}' are no local folder and no hub id (org/name)") from error
    except Exception as error:  # not there, or no network, which has no one class: perhaps downloaded before
        try:
            return Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise UserError(
                f"weights '{repo}' are no local folder and the hub does not give them: {brief(error)}; give "
                "a folder that was fetched elsewhere"
            ) from error
    return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted(listing)))


def weight_file(path: str, file: str, revision: str | None = None) -> Path:
    """Returns a weight file: `path` itself, `file` in the folder `path`, or `file` of the hub id `path`.

    Raises:
        UserError: it is not there.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return place
    if place.is_dir():
        if not (place / file).is_file():
            raise UserError(f"{place} has no {file}: give the weight file itself, or its folder")
        return place / file
    if not is_hub_id(path):
        raise UserError(f"weights '{path}' do not exist: give a file, a folder, or a hub id (org/name)")
    return hub_folder(path, revision, lambda listing: [name for name in listing if name == file]) / file


def read_tensors(path: Path) -> dict[str, Any]:
    """Returns the tensors of a weight file (safetensors, or torch's format without any code) by name.

    A state dict that lies under `state_dict` is taken out.

    Raises:
        UserError: a torn file, a pickled program, or something that is no mapping of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(not_tensors(str(path))) from error
    except Exception as error:  # a torn file, a foreign format: libraries agree on no type
        raise UserError(f"weights {path} do not load: {brief(error)}") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"weights {path} hold no mapping of tensors by name: give a state dict")
    return found


def not_tensors(name: str) -> str:
    """Returns what to say of a pickled program in the place of weights."""
    return (
        f"weights {name} are a pickled program or torn, not tensors, and are not opened: fetch them anew, or "
        "convert them where they come from, with safetensors.torch.save_file(model.state_dict(), FILE)"
    )
