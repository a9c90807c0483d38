"""What stages share: the device, and the output folder, which belongs to one run from its first file on."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.common import files, manifest
from diffalign.common.config import filled_recipe
from diffalign.common.errors import UserError, brief
from diffalign.stages._shares import Share

if TYPE_CHECKING:
    from diffalign.data.sources._base import Source

RECIPE = "recipe.json"


def pick_device(device: str) -> str:
    """Returns the device to run on: "auto" is cuda where there is one, else cpu.

    Of several processes on one machine each takes an accelerator of its own (LOCAL_RANK, set by torchrun).

    Raises:
        UserError: torch does not know the device, or it is not there.
    """
    import torch

    if device == "auto":
        own = f":{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else ""
        return f"cuda{own}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device} cannot be used here ({brief(error)})") from error
    return device


def earlier_run(folder: Path, stage: str) -> dict[str, Any] | None:
    """Returns what a run of the same stage, finished or not, said of itself in `folder`; None without one.

    Raises:
        UserError: `folder` cannot be one of ours, or holds the output of another stage.
    """
    _refuse_unusable(folder)
    found: dict[str, Any] | None = None
    for name in (manifest.FILE_NAME, RECIPE):
        if (folder / name).is_file():
            found = files.read_json(folder / name)
            theirs = found.get("stage") if isinstance(found, dict) else None
            if theirs != stage:
                what = f"the output of '{theirs}'" if theirs else f"a {name} that is none of ours"
                raise UserError(f"out={folder} holds {what}: choose another folder")
    return found


def _refuse_unusable(folder: Path) -> None:
    """Says before hours of work that nothing can be written there."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(f"out={folder}: {nearest} is a file: give a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"out={folder}: {nearest} cannot be written to: choose another folder")


@contextlib.contextmanager
def claim_folder(
    out: str | Path,
    *,
    stage: str,
    recipe: Mapping[str, Any],
    same: Mapping[str, Any] | None = None,
    share: Share = Share(),  # noqa: B008  # it cannot be changed
) -> Iterator[Path]:
    """Locks the output folder and yields it; the same stage may come back to it, another may not.

    `recipe.json` is written first (the manifest, written last, says that the stage is complete). A folder
    that this run made is removed again when an error ends the run before any row was written.

    Args:
        out: the output folder.
        stage: the verb.
        recipe: the resolved recipe, for people.
        same: what must be equal for a run to continue: the settings that decide the rows, and their inputs.
            None: the stage starts anew each time and replaces its files.
        share: of several processes that fill the folder together.

    Raises:
        UserError: `out` is a file, holds something else, or another run is writing there.
    """
    folder = Path(out)
    refuse_other_run(folder, stage, same)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # such as in /proc
        raise UserError(f"out={out} cannot be made ({error.strerror}): choose another folder") from error
    with files.folder_lock(folder, member=None if share.alone else share.index):
        if share.alone:  # else they may be another process's, which is writing them now
            files.remove_leftovers(folder)
        refuse_other_run(folder, stage, same)  # again: it may have changed before the lock was ours
        if same is None:
            manifest.withdraw_manifest(folder)
        if same is None or _replaceable(earlier_run(folder, stage)):
            files.write_json(folder / RECIPE, {"stage": stage, "decides": same, "recipe": recipe})
        try:
            yield folder
        except Exception:
            if is_new and share.alone and not list(folder.rglob("*.jsonl")):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def refuse_other_run(folder: Path, stage: str, same: Mapping[str, Any] | None) -> None:
    """Checks that `folder` holds nothing, or a run of this stage with the settings `same` (None: any).

    Raises:
        UserError: it holds the output of another stage or recipe; says which setting differs.
    """
    found = earlier_run(folder, stage)
    if found is None or same is None or _replaceable(found):
        return
    changed = _difference(*(_filled(stage, each) for each in (found.get("decides") or {}, same)))
    if changed is not None:
        raise UserError(f"out={folder} holds a run of another recipe ({changed}): choose another folder")


def _replaceable(found: Mapping[str, Any] | None) -> bool:
    """Whether a folder holds nothing, or what a stage writes anew each time, such as a report."""
    return found is None or found.get("decides", {}) is None


def _filled(stage: str, decides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what decides a run, keys that were not there yet when it began having their defaults."""
    function = getattr(importlib.import_module(f"diffalign.stages.{stage}"), stage)
    return filled_recipe(function, files.to_plain(decides))


def refuse_in_data(out: str | Path, data: Source, file: str = "") -> None:
    """Checks that what a stage writes (`file` of it) is not read as data the next time.

    Raises:
        UserError: it would be.
    """
    if data.would_read(Path(out) / file):
        raise UserError(f"out={out} lies in the folder of the data ({data.path}): choose another folder")


def refuse_unfinished(folder: Path) -> None:
    """Checks that a folder that is read is no stage's output, or complete.

    Raises:
        UserError: the stage that writes it was stopped, or is still at work.
    """
    if (folder / RECIPE).is_file() and not (folder / manifest.FILE_NAME).is_file():
        said = files.read_json(folder / RECIPE)
        if isinstance(said, dict) and said.get("stage"):
            raise UserError(
                f"{folder} is not complete: repeat the '{said['stage']}' that writes it, to its end"
            )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Returns the first key whose values differ, with both values, in words; None where none does."""
    for key in [*now, *before]:
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if _is_hash(old) and _is_hash(new):
            return f"{key} changed"
        if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
            if any(
                isinstance(item, Mapping) for side in (old, new) if isinstance(side, list) for item in side
            ):
                return f"{key} changed"
            return f"{key} was {_brief(old)}, now {_brief(new)}"
        if _names_content(old) or _names_content(new):  # numbers that tell nobody anything
            return f"{key} changed"
        inner = _difference(old, new)
        if inner is not None:
            return f"{key}.{inner}"
    return None


def _names_content(value: Mapping[str, Any]) -> bool:
    """Whether this is the identity of a file, or of a source's rows and pictures."""
    named = str(value.get("name", "")).startswith("sha256=")
    return named or bool({"sha256", "tail_sha256", "files"} & value.keys())


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32,}", value) is not None


def _brief(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
