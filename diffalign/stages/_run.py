"""What stages that write row after row share: the device, the folder that a killed run continues in."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffalign.common import files, manifest
from diffalign.common.errors import UserError

RECIPE = "recipe.json"


def pick_device(device: str) -> str:
    """Returns the device to run on: "auto" is cuda where there is one, else cpu.

    Raises:
        UserError: torch does not know the device, or it is not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device} cannot be used here ({str(error).splitlines()[0]})") from error
    return device


@contextlib.contextmanager
def resumable_folder(
    out: str | Path, *, stage: str, recipe: Mapping[str, Any], same: Mapping[str, Any]
) -> Iterator[Path]:
    """Locks the output folder and yields it; the same stage may come back to it, another may not.

    `recipe.json` is written first (the manifest, written last, says that the stage is complete). A folder
    that this run made is removed again when a UserError ends the run before any row was written.

    Args:
        out: the output folder.
        stage: the verb.
        recipe: the resolved recipe, for people.
        same: what must be equal for a run to continue: the settings that decide the rows, and their inputs.

    Raises:
        UserError: `out` is a file, holds something else, or another run is writing there.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out={folder} is a file: give a folder")
    refuse_foreign_folder(folder, stage, same)
    is_new = not folder.exists()
    with files.folder_lock(folder):
        files.remove_leftovers(folder)
        refuse_foreign_folder(folder, stage, same)  # again: it may have changed before the lock was ours
        if not (folder / RECIPE).is_file():
            files.write_json(folder / RECIPE, {"stage": stage, "decides": same, "recipe": recipe})
        try:
            yield folder
        except UserError:
            if is_new and not list(folder.glob("*.jsonl")):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def refuse_foreign_folder(folder: Path, stage: str, same: Mapping[str, Any]) -> None:
    """Checks that the folder is empty of results, or holds those of the same stage and settings.

    Raises:
        UserError: it holds the output of another stage or recipe; says which setting differs.
    """
    if not (folder / RECIPE).is_file():
        found = manifest.read_manifest(folder)
        if found is not None:
            raise UserError(f"out={folder} holds the output of '{found.get('stage')}': choose another folder")
        return
    found = files.read_json(folder / RECIPE)
    if found.get("stage") != stage:
        raise UserError(f"out={folder} holds the output of '{found.get('stage')}': choose another folder")
    if manifest.recipe_identity(found.get("decides", {})) != manifest.recipe_identity(same):
        changed = _difference(found.get("decides", {}), files.to_plain(same))
        raise UserError(f"out={folder} holds a run of another recipe ({changed}): choose another folder")


def refuse_foreign_output(folder: Path, stage: str, ours: tuple[str, ...]) -> None:
    """Checks that a stage that writes its files in one go would replace nothing but its own earlier output.

    Args:
        folder: the output folder.
        stage: the verb.
        ours: files that only this stage writes, in case a run was killed before its manifest.

    Raises:
        UserError: `folder` is a file or holds the output of another stage.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out={folder} is a file: give a folder")
    for name in (RECIPE, manifest.FILE_NAME):
        if (folder / name).is_file() and not any((folder / mine).is_file() for mine in ours):
            found = files.read_json(folder / name).get("stage")
            raise UserError(
                f"out={folder} holds the output of '{found}': choose another folder than the {stage}'s"
            )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns the first key whose values differ, with both values, in words."""
    for key in [*now, *before]:
        if before.get(key) != now.get(key):
            return f"{key} was {_brief(before.get(key))}, now {_brief(now.get(key))}"
    return "nothing differs"


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
