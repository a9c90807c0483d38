"""The folder of a training run: which run it holds, whether that is complete, and what may change in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.common import files, manifest
from diffalign.common.errors import UserError
from diffalign.common.progress import say

RUN_FILE = "run.json"

NOT_IDENTITY = (
    "out",
    "log_every",
    "checkpoint",
    "samples",
    "loader.num_workers",
    "validation.every",
    "validation.draws",
    "validation.limit",
)
"""Keys that may change when a run is continued: they do not touch the weights."""


def finished(folder: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The closing numbers of a run that is already complete in `folder`, or None.

    Raises:
        UserError: `folder` is a file, holds something else, or another run is writing to it.
    """
    files.refuse_locked(folder)  # said now, not after an hour of encoding; likewise below
    done = manifest.read_manifest(folder)
    if done is None:
        if folder.is_file():
            raise UserError(f"out={folder} is a file: give a folder")
        if (folder / RUN_FILE).is_file():
            _refuse_other(folder, files.read_json(folder / RUN_FILE)["recipe"], recipe)
        return None
    if done["stage"] != "train":
        raise UserError(f"{folder} holds the output of {done['stage']!r}: choose another folder")
    _refuse_other(folder, done["recipe"], recipe)
    say(f"{folder} holds this run, finished after {done['summary']['steps']} steps; nothing to do")
    summary: dict[str, Any] = done["summary"]
    return summary


def claim(folder: Path, recipe: dict[str, Any], base: str, init: str | None, inputs: dict[str, Any]) -> str:
    """Writes what the run in `folder` is, or checks that it is this one; returns its identity."""
    reference = manifest.identities({} if init is None else {"adapter.init": init})
    identity = manifest.recipe_identity(
        {
            "recipe": _binding(recipe),
            "base": base,
            "reference": reference,
            "data": manifest.identities(inputs),
        }
    )
    path = folder / RUN_FILE
    if path.is_file():
        known = files.read_json(path)
        _refuse_other(folder, known["recipe"], recipe)
        if known["identity"] != identity:
            raise UserError(
                f"base, adapter.init or data of the run in {folder} have changed: choose another out="
            )
    else:
        files.write_json(path, {"identity": identity, "recipe": recipe, "base": base})
    return identity


def _refuse_other(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    before, now = _binding(theirs), _binding(ours)
    different = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if different:
        changes = ", ".join(f"{key}={now.get(key)} (there: {before.get(key)})" for key in different[:3])
        raise UserError(f"{folder} holds another run: {changes}; choose another out= or the same recipe")


def _binding(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The recipe as dotted keys, without those that may change when a run is continued."""
    flat: dict[str, Any] = {}
    for name, value in recipe.items():
        key = f"{prefix}{name}"
        if key in NOT_IDENTITY:
            continue
        if isinstance(value, dict):
            flat |= _binding(value, f"{key}.")
        else:
            flat[key] = value
    return flat
