"""The rows of scores.jsonl: whether they are complete, still true, and how they are joined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.common import files, manifest
from diffalign.common.errors import UserError
from diffalign.stages._image_rows import Row
from diffalign.stages._parts import rows_so_far

ROWS = "scores.jsonl"


def finished_rows(folder: Path) -> list[Row] | None:
    """Returns the rows of a complete folder, None for one that is not."""
    if manifest.read_manifest(folder) is None:
        return None
    return files.read_jsonl(folder / ROWS)


def refuse_changed(out: str, done: Sequence[Row], folder: Path) -> None:
    """Checks that the pictures of finished rows are still those that were scored.

    Raises:
        UserError: another picture lies under the name now.
    """
    from diffalign.data.pictures import BadImage, ImageRef

    for row in done:
        try:
            now = ImageRef(path=folder / row["image"], name=row["image"]).digest().hex()
        except BadImage:
            now = None
        if now != row["digest"]:
            raise UserError(
                f"out={out} holds scores of other pictures ('{row['id']}' has changed since): choose another "
                "folder"
            )


def join_parts(folder: Path, ids: Sequence[str]) -> list[Row] | None:
    """Writes scores.jsonl out of the parts, in the order of `ids`; None while rows are missing."""
    found = rows_so_far(folder)
    if any(name not in found for name in ids):
        return None
    rows: list[dict[str, Any]] = [found[name] for name in ids]
    files.write_jsonl(folder / ROWS, rows)
    return rows
