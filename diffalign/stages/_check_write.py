"""`check out=FOLDER` with a filter, dedup, split or format: writes the rows that pass as a record set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.common import files, manifest
from diffalign.common.errors import UserError
from diffalign.common.progress import Progress, say
from diffalign.data.filters import Selection
from diffalign.data.records import Record
from diffalign.data.writers import ScoreTotals, SetWriter, open_set
from diffalign.stages._run import earlier_run

KEPT, HELD_OUT = "train", "validation"
"""The sets, each a folder of `out`; the second with `split` only."""


def refuse_taken(out: Path, data: Any, *, selects: bool) -> None:
    """Checks before the work that nothing in `out` would be lost, or left there without its manifest.

    Raises:
        UserError: sets are to be written (`selects`) where folders of their names are somebody else's, or
            where the data is read from; or only a report, beside the sets of an earlier check.
    """
    ours = earlier_run(out, "check") is not None
    taken = [name for name in (KEPT, HELD_OUT) if (out / name).exists()]
    if taken and ours and not selects:
        raise UserError(f"out={out} holds a record set of an earlier check: choose another folder")
    if taken and selects and not ours:
        raise UserError(f"out={out} holds a folder '{taken[0]}' that no check wrote: choose another out=")
    if selects:
        for path in data.files():
            _refuse_inside(path, out)


def refuse_empty(selection: Selection, split: float) -> None:
    """Checks that each set that is asked for has a row.

    Raises:
        UserError: one has none.
    """
    counts = selection.counts()
    if not counts["kept"] and not counts["held_out"]:
        why = ", ".join(f"{len(names)} {reason}" for reason, names in selection.dropped.items())
        raise UserError(f"none of {counts['rows']} rows passes ({why}): nothing is written")
    if split and not (counts["kept"] and counts["held_out"]):
        raise UserError(
            f"split={split:g} leaves {counts['kept']} rows in {KEPT} and {counts['held_out']} in {HELD_OUT}: "
            "change the share, or bring rows of more prompts"
        )


def write_sets(
    out: Path,
    data: Any,
    selection: Selection,
    ids: list[str],
    *,
    kind: str,
    recipe: Mapping[str, Any],
    inputs: Mapping[str, Path | str],
) -> dict[str, int]:
    """Writes the rows of each set to a folder of its own, with its manifest; each whole or not at all.

    The data is read once more. Returns set -> number of its rows; says them, and what was lost because the
    format has no place for it.

    Args:
        out: the folder, locked by the caller.
        data: the source.
        selection: what becomes of each row.
        ids: of the rows, as the census met them.
        kind: the format.
        recipe: the resolved recipe.
        inputs: for the manifests.

    Raises:
        UserError: the data is not what it was in the first pass, or a picture lies in `out`.
    """
    names = {1: KEPT, 2: HELD_OUT} if 2 in selection.sides else {1: KEPT}
    with ExitStack() as stack:
        sets = {
            side: stack.enter_context(_one_set(out / name, kind, name, selection, inputs, recipe))
            for side, name in names.items()
        }
        total = len(selection.sides)
        with Progress("check: writing", total, "rows") as progress:
            for row, record in _again(data, ids, recipe["limit"]):
                if selection.sides[row]:
                    for candidate in record.candidates:
                        if kind == "jsonl" and candidate.image.path is not None:
                            _refuse_inside(candidate.image.path, out)
                    sets[selection.sides[row]].add(record)
                progress.update()
    for side, one in sets.items():
        fields = ", ".join(f"{name} ({count:,} rows)" for name, count in sorted(one.lost.items()))
        lost = fields and f"; {kind} has no place for {fields}"
        say(f"check: {one.rows:,} rows in {out / names[side]}{lost}")
    return {names[side]: one.rows for side, one in sets.items()}


class _Set:
    """A writer that counts what it is given."""

    def __init__(self, writer: SetWriter) -> None:
        self._writer = writer
        self.lost = writer.lost
        self.scores = ScoreTotals()
        self.prompts: set[str] = set()
        self.rows = 0

    def add(self, record: Record) -> None:
        self._writer.add(record)
        self.scores.add(record)
        self.prompts.add(record.prompt)
        self.rows += 1


@contextmanager
def _one_set(
    folder: Path,
    kind: str,
    name: str,
    selection: Selection,
    inputs: Mapping[str, Path | str],
    recipe: Mapping[str, Any],
) -> Iterator[_Set]:
    """Yields a set to fill; afterwards it lies in `folder`, with a manifest."""
    with files.atomic_path(folder) as temporary:
        temporary.mkdir()
        with open_set(temporary, kind, name) as writer:
            one = _Set(writer)
            yield one
        manifest.write_manifest(
            temporary,
            stage="check",
            recipe=recipe,
            inputs=inputs,
            seed=recipe["seed"],
            counts={**selection.counts(), "written": one.rows, "prompts": len(one.prompts)},
            dropped=selection.dropped,
            extra={"set": name, "scores": one.scores.facts(), "not_held": dict(one.lost)},
        )


def _again(data: Any, ids: list[str], limit: int | None) -> Iterator[tuple[int, Record]]:
    """Yields the rows that the census met, with their numbers."""
    changed = UserError(f"data.path={data.path} has changed while it was read: start again")
    row = -1
    with closing(data.records()) as records:
        for row, record in enumerate(islice(records, limit)):
            if row >= len(ids) or record.id != ids[row]:
                raise changed
            yield row, record
    if row + 1 != len(ids):
        raise changed


def _refuse_inside(path: Path, out: Path) -> None:
    if path.resolve().is_relative_to(out.resolve()):
        raise UserError(f"out={out} holds data that is read ({path}): choose another folder")
