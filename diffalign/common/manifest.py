"""The manifest beside every artefact: what made it, from what, with which versions and counts."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from diffalign.common import files

FILE_NAME = "manifest.json"
_PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "open_clip_torch",
    "datasets",
    "pyarrow",
    "safetensors",
    "omegaconf",
    "numpy",
    "scipy",
    "pillow",
)


def write_manifest(
    folder: str | Path,
    *,
    stage: str,
    recipe: Mapping[str, Any],
    inputs: Mapping[str, Path | str] | None = None,
    seed: int | None = None,
    counts: Mapping[str, Any] | None = None,
    dropped: Mapping[str, list[str]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `<folder>/manifest.json`, the last file of a stage: where it is, the others are complete.

    Args:
        folder: the stage's output folder.
        stage: the verb.
        recipe: the resolved recipe.
        inputs: name -> path, stored with its content's identity, or a text that is no path on this machine
            (a hub id), stored as it is.
        seed: the seed of the run.
        counts: how much was asked for, used, made.
        dropped: reason -> ids of the rows left out.
        extra: further entries at the top level.

    Returns:
        The path of the manifest.
    """
    content: dict[str, Any] = {
        "stage": stage,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": recipe,
        "recipe_identity": recipe_identity(recipe),
        "seed": seed,
        "counts": dict(counts or {}),
        "dropped": {reason: list(ids) for reason, ids in (dropped or {}).items()},
        "inputs": identities(inputs or {}),
        "versions": versions(),
    }
    overlap = sorted(set(content) & set(extra or {}))
    if overlap:
        raise ValueError(f"extra may not replace the manifest's own entries: {overlap}")
    content.update(extra or {})
    return files.write_json(Path(folder) / FILE_NAME, content)


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """Returns the manifest of a folder, or None where the stage has not finished (or never ran)."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    content: dict[str, Any] = files.read_json(path)
    return content


def withdraw_manifest(folder: str | Path) -> None:
    """Removes the manifest of a folder whose files are about to change: until they are whole it has none."""
    (Path(folder) / FILE_NAME).unlink(missing_ok=True)


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for package in ("diffalign", *_PACKAGES):
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)


def versions() -> dict[str, str]:
    """Returns package -> installed version for Python and every library that can change a result."""
    return dict(_versions())


def recipe_identity(recipe: Mapping[str, Any]) -> str:
    """Returns the sha256 of the recipe's canonical JSON: equal recipes agree whatever their key order."""
    canonical = json.dumps(files.to_plain(recipe), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def identities(inputs: Mapping[str, Path | str]) -> dict[str, dict[str, Any]]:
    """Returns each input's path with the identity of its content; a text that is no path stays as it is."""
    return {name: _input_identity(source) for name, source in inputs.items()}


def _input_identity(source: Path | str) -> dict[str, Any]:
    """Returns the input's path with its identity; a name that is no path here is kept as it is."""
    if isinstance(source, Path) or Path(source).exists():
        return {"path": str(source), **files.file_identity(source)}
    return {"name": source}
