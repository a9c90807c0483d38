"""The project's own record file, as `diffalign pair` writes it; its layout is in `data/records.py`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffalign.common.errors import UserError
from diffalign.common.manifest import read_manifest
from diffalign.data.pictures import BadImage
from diffalign.data.records import Record, read_lines
from diffalign.data.select import ScoreFacts
from diffalign.data.sources._base import Source
from diffalign.data.sources._json import dropped, encodes

FILE_NAME = "preferences.jsonl"
WRITERS = ("pair", "check")
"""Stages whose manifest lies beside such a file."""


@dataclass
class Plugin(Source):
    """A jsonl file of records (or a folder with a `preferences.jsonl`); pictures are files beside it."""

    def file(self) -> Path:
        """Returns the file that is read. UserError when there is none."""
        path = Path(self.path)
        if path.is_dir():
            path = path / FILE_NAME
        if not path.is_file():
            raise UserError(f"data.path={self.path}: no file {path}; give a jsonl file of records")
        return path

    def files(self) -> list[Path]:
        """Returns the one file that is read."""
        return [self.file()]

    def size(self) -> int:
        """Returns how many records will come; it reads the file, not the pictures."""
        return sum(1 for _ in self.records())

    def captions(self) -> Iterator[str]:
        """Returns the prompts of `records`."""
        return (record.prompt for record in self.records())

    def score_facts(self) -> dict[str, ScoreFacts]:
        """Returns scale and range of each scorer's numbers, as the manifest of `pair` or `check` has them."""
        found = read_manifest(self.file().parent)
        if not isinstance(found, dict) or found.get("stage") not in WRITERS:
            return {}  # somebody else's file of that name
        facts = {}
        for name, row in found.get("scores", {}).items():
            low, high = row["min"], row["max"]
            if not row["higher_is_better"]:
                low, high = -high, -low
            facts[name] = ScoreFacts(row["scale"], row["version"], low, high)
        return facts

    def data_inputs(self) -> dict[str, Path | str]:
        """Returns the file, and one digest over the names and bytes of the pictures of the records read.

        Every picture is read once more for that: at 1 GB/s, 5 minutes for 850,000 pictures of 350 kB, whose
        encoding takes hours.
        """
        total = hashlib.sha256()
        folder = self.file().parent
        for record in self.records():
            for candidate in record.candidates:
                image = candidate.image
                try:
                    content = image.digest().hex()
                except BadImage as error:
                    content = error.reason
                place = "" if image.path is None else os.path.relpath(image.path, folder)
                total.update(f"{place} {content}\n".encode("utf-8", "surrogatepass"))
        return {**super().data_inputs(), "jsonl pictures": f"sha256={total.hexdigest()}"}

    def rows(self) -> Iterator[Record]:
        """Yields the records of the file; text that cannot be UTF-8 (half a surrogate) is a `bad_text`.

        Raises:
            UserError: a line that is no record, or a second record with the same id.
        """
        path = self.file()
        seen: set[str] = set()
        for where, row in read_lines(path):
            if encodes(row):
                record = Record.from_dict(row, path.parent, where)
            else:
                record = dropped(where, "bad_text", source="jsonl")
            if record.id in seen:  # ids key the random numbers of a run and name dropped rows
                raise UserError(f"{path}: two records have the id {record.id!r}; ids must differ")
            seen.add(record.id)
            yield record
