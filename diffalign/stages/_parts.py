"""Rows on their way to a stage's jsonl: a process appends to a part of its own, the last one joins them."""

from __future__ import annotations

import shutil
from pathlib import Path

from diffalign.common import files
from diffalign.stages._image_rows import Row
from diffalign.stages._shares import Share

PARTS = "parts"


def own_part(folder: Path, share: Share) -> Path:
    """Returns the file that this process appends to, without a torn last line."""
    path = folder / PARTS / f"{share.name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    files.trim_torn_tail(path)
    return path


def rows_so_far(folder: Path) -> dict[str, Row]:
    """Returns id -> row of all parts, those of other processes and of earlier runs too."""
    parts = sorted((folder / PARTS).glob("*.jsonl"))
    return {str(row["id"]): row for part in parts for row in files.read_jsonl(part, drop_torn_tail=True)}


def remove_parts(folder: Path) -> None:
    """Removes the parts of a folder whose rows are complete."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)
