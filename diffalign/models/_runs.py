"""The run that trained an adapter, where its manifest lies beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.common import manifest

RUN_SAYS = {"base", "recipe", "counts", "summary", "versions"}
"""What the manifest of a run holds for those who read of the base, and for model cards."""


def run_of(adapter: str) -> dict[str, Any] | None:
    """The manifest of the run that trained an adapter: it lies in the folder above it; None without one."""
    path = Path(adapter)
    if not path.exists():
        return None
    folder = path if path.is_dir() else path.parent
    found: Any = manifest.read_manifest(folder.resolve().parent)
    ours = isinstance(found, dict) and found.get("stage") == "train" and found.keys() >= RUN_SAYS
    return found if ours else None
