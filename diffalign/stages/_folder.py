"""The folder of a training run: which run it holds, whether that is complete, and what may change in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.common import files, manifest
from diffalign.common.errors import UserError
from diffalign.common.progress import say
from diffalign.stages._run import RECIPE, earlier_run
from diffalign.stages._shares import my_share

NOT_IDENTITY = (
    "out",
    "log_every",
    "checkpoint",
    "samples",
    "trackers",
    "shard",
    "loader.num_workers",
    "reference.store",
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
    earlier = earlier_run(folder, "train")
    if earlier is not None:
        _refuse_other(folder, earlier["recipe"], recipe)
    done = manifest.read_manifest(folder)
    if done is None:
        return None
    steps, stopped = done["summary"]["steps"], done["summary"].get("stopped")
    why = "" if stopped is None else f" (stopped: {stopped})"
    if my_share().index == 0:  # one process speaks for all
        say(f"{folder} holds this run, finished after {steps} steps{why}; nothing to do")
    summary: dict[str, Any] = done["summary"]
    return summary


def claim(
    folder: Path,
    recipe: dict[str, Any],
    base: str,
    init: str | None,
    inputs: dict[str, Any],
    *,
    write: bool = True,
) -> str:
    """Writes what the run in `folder` is, or checks that it is this one; returns its identity.

    `write` is False in processes that leave the files to another one.
    """
    reference = manifest.identities({} if init is None else {"adapter.init": init})
    identity = manifest.recipe_identity(
        {
            "recipe": _binding(recipe),
            "base": base,
            "reference": reference,
            "data": manifest.identities(inputs),
        }
    )
    if not write:
        return identity
    earlier = earlier_run(folder, "train")
    if earlier is None:
        said = {"stage": "train", "identity": identity, "recipe": recipe, "base": base}
        files.write_json(folder / RECIPE, said)
        return identity
    _refuse_other(folder, earlier["recipe"], recipe)
    if earlier["identity"] != identity:
        raise UserError(
            f"base, adapter.init or data of the run in {folder} have changed: choose another out="
        )
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
