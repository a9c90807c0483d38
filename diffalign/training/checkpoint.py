"""Checkpoints: written to the side and renamed when whole, so that a kill leaves the last one intact."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.common import files
from diffalign.common.errors import UserError

FOLDER = "checkpoints"
TRAINED_FILE, STATE_FILE, MANIFEST_FILE = "trained.safetensors", "state.pt", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on as if it had never stopped.

    Random numbers need no place here: they are keyed by (seed, example, epoch), and the global stream is
    seeded anew from (seed, step) before every step.

    Args:
        step: optimizer steps done.
        position: micro-batches consumed.
        trained: the tensors that training changes.
        state: optimizer, moving average, stop rules, gradient scaler, objective, feed, moving reference and
            counters.
    """

    step: int
    position: int
    trained: dict[str, Tensor]
    state: dict[str, Any]


def save(out: Path, checkpoint: Checkpoint, *, identity: str, keep: int) -> Path:
    """Writes the checkpoint below `out` and removes all but the newest `keep`."""
    folder = out / FOLDER / f"step-{checkpoint.step:08d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(folder) as temporary:
        temporary.mkdir()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.trained.items()}
        save_file(tensors, temporary / TRAINED_FILE)
        torch.save(checkpoint.state, temporary / STATE_FILE)
        files.write_json(
            temporary / MANIFEST_FILE,
            {"step": checkpoint.step, "position": checkpoint.position, "identity": identity},
        )
    for old in _folders(out)[:-keep]:
        shutil.rmtree(old)
    return folder


def tidy(out: Path) -> None:
    """Removes what a killed run has left half-written or half-removed below `out`."""
    files.remove_leftovers(out / FOLDER)
    for torn in {*(out / FOLDER).glob("step-*")} - set(_folders(out)):  # killed while it was being removed
        shutil.rmtree(torn)


def load_latest(out: Path, *, identity: str) -> Checkpoint | None:
    """The newest checkpoint below `out`, on the CPU, or None.

    Raises:
        UserError: it belongs to another base, reference, data set or recipe.
    """
    folders = _folders(out)
    if not folders:
        return None
    manifest = files.read_json(folders[-1] / MANIFEST_FILE)
    if manifest["identity"] != identity:
        raise UserError(f"{folders[-1]} is of another base, data set or recipe: choose another out=")
    return Checkpoint(
        step=manifest["step"],
        position=manifest["position"],
        trained=load_file(folders[-1] / TRAINED_FILE),
        state=torch.load(folders[-1] / STATE_FILE, map_location="cpu", weights_only=True),
    )


def latest_trained(out: Path) -> dict[str, Tensor]:
    """What training had changed by the newest checkpoint below `out`, on the CPU."""
    return load_file(_folders(out)[-1] / TRAINED_FILE)


def _folders(out: Path) -> list[Path]:
    found = sorted((out / FOLDER).glob("step-*")) if (out / FOLDER).is_dir() else []
    return [folder for folder in found if (folder / MANIFEST_FILE).is_file()]
