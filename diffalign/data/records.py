"""The preference record: one prompt, its candidate pictures and what is known about them.

A pair is two candidates, a ranked list k, an unpaired example one. On disk a record is one line of a jsonl
file:

    {"id": "a1", "prompt": "a red cube", "source": "mine", "candidates": [
        {"image": "a1-0.png", "label": 1.0, "model": "base", "seed": 0,
         "scores": {"clip": {"value": 0.31, "scale": "cosine", "version": "ViT-B-32/openai"}}},
        {"image": "a1-1.png", "label": 0.0}]}

Optional: `condition`, `user` and `meta` of the record; `prompt`, `condition`, `model`, `seed`, `scores`,
`label`, `rank` and `votes` of a candidate. Picture paths are relative to the folder of the file. Labels of a
pair sum to 1; 0.5 and 0.5 is a tie. Fields that are not listed here are kept as they are (`extra`).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.common import files
from diffalign.common.errors import UserError, brief
from diffalign.data.pictures import ImageRef

__all__ = [
    "BadLabel",
    "Candidate",
    "Record",
    "Score",
    "read_records",
    "write_records",
]

LABEL_TOLERANCE = 1e-6

BY_SCORERS = "pair:"
"""What the source of records begins with that scorers have labelled."""


class BadLabel(UserError):
    """A pair whose labels are no preference: NaN, outside [0, 1], only one of two, or not summing to 1."""


@dataclass(frozen=True)
class Score:
    """One scorer's number for one picture, on the scorer's own named scale."""

    value: float
    scale: str = ""
    version: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def oriented(self) -> float:
        """The value, negated where the file says that lower is better."""
        return self.value if self.extra.get("higher_is_better", True) else -self.value

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form; a value that is not finite becomes null, because JSON has no NaN."""
        value = self.value if math.isfinite(self.value) else None
        return {**self.extra, "value": value, "scale": self.scale, "version": self.version}

    @classmethod
    def from_dict(cls, row: Any, where: str = "score") -> Score:
        """Returns the score of a JSON object (null: NaN). UserError, starting with `where`, otherwise."""
        rest = _mapping(row, where)
        value = _number(rest.pop("value", None), f"{where}: value")
        return cls(
            value=math.nan if value is None else value,
            scale=str(rest.pop("scale", "") or ""),
            version=str(rest.pop("version", "") or ""),
            extra=rest,
        )


@dataclass
class Candidate:
    """One picture of a record; `prompt` and `condition` only where they differ from the record's."""

    image: ImageRef
    prompt: str | None = None
    condition: Any = None
    model: str | None = None
    seed: int | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    label: float | None = None
    rank: float | None = None
    votes: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self, folder: Path | None) -> dict[str, Any]:
        """Returns the JSON form, the path relative to `folder` (None: without the picture).

        Raises:
            UserError: a picture without a file, or a label that JSON cannot hold.
        """
        if folder is not None and self.image.path is None:
            raise UserError(
                f"picture {self.image.name} is in memory only: save it to a file before writing records"
            )
        if self.label is not None and not math.isfinite(self.label):  # null would read back as "unlabelled"
            raise UserError(
                f"picture {self.image.name} has the label {self.label}: drop it before writing records"
            )
        known = {
            "image": _relative(self.image.path, folder) if folder is not None and self.image.path else None,
            "prompt": self.prompt,
            "condition": self.condition,
            "model": self.model,
            "seed": self.seed,
            "scores": {name: score.to_dict() for name, score in self.scores.items()} or None,
            "label": self.label,
            "rank": self.rank,
            "votes": self.votes,
        }
        return {**self.extra, **{key: value for key, value in known.items() if value is not None}}

    @classmethod
    def from_dict(cls, row: Any, folder: Path, where: str = "candidate") -> Candidate:
        """Returns the candidate of a JSON object; UserError (starting with `where`) for wrong types."""
        rest = _mapping(row, where)
        image = rest.pop("image", None)
        if image is not None and not isinstance(image, str):
            raise UserError(f"{where}: image is {image!r}, expected a path")
        scores = _mapping(rest.pop("scores", None) or {}, f"{where}: scores")
        return cls(
            image=ImageRef(path=folder / image) if image else ImageRef(name=f"{where} (no path)"),
            prompt=_text(rest.pop("prompt", None), f"{where}: prompt"),
            condition=rest.pop("condition", None),
            model=_text(rest.pop("model", None), f"{where}: model"),
            seed=_whole(rest.pop("seed", None), f"{where}: seed"),
            scores={name: Score.from_dict(score, f"{where}: score {name}") for name, score in scores.items()},
            label=_number(rest.pop("label", None), f"{where}: label"),
            rank=_number(rest.pop("rank", None), f"{where}: rank"),
            votes=_whole(rest.pop("votes", None), f"{where}: votes"),
            extra=rest,
        )


@dataclass
class Record:
    """One prompt with its candidates; `id` names the row it came from, `source` the format.

    `problem` is the drop reason of a row that a source could not read; it is never written to a file.
    """

    id: str
    prompt: str
    candidates: list[Candidate]
    source: str = ""
    condition: Any = None
    user: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    def to_dict(self, folder: Path | None) -> dict[str, Any]:
        """Returns the JSON form for a file in `folder` (picture paths relative to it; None: no pictures)."""
        row: dict[str, Any] = {**self.extra, "id": self.id, "prompt": self.prompt}
        if self.condition is not None:
            row["condition"] = self.condition
        if self.user is not None:
            row["user"] = self.user
        row["candidates"] = [candidate.to_dict(folder) for candidate in self.candidates]
        row["source"] = self.source
        if self.meta:
            row["meta"] = self.meta
        return row

    @classmethod
    def from_dict(cls, row: Any, folder: Path, where: str = "record") -> Record:
        """Returns the record of a JSON object of a file in `folder`.

        A missing id becomes `where`. Raises UserError (starting with `where`) for a missing prompt or
        candidates, and for wrong types.
        """
        rest = _mapping(row, where)
        prompt = _text(rest.pop("prompt", None), f"{where}: prompt")
        candidates = rest.pop("candidates", None)
        if prompt is None or not isinstance(candidates, list):
            missing = "prompt" if prompt is None else "candidates (a list)"
            raise UserError(f"{where}: no {missing}; it has {', '.join(map(str, row)) or 'no fields'}")
        name = rest.pop("id", None)
        return cls(
            id=where if name is None else str(name),
            prompt=prompt,
            candidates=[
                Candidate.from_dict(item, folder, f"{where}: candidate {index}")
                for index, item in enumerate(candidates)
            ],
            source=_text(rest.pop("source", None), f"{where}: source") or "",
            condition=rest.pop("condition", None),
            user=_text(rest.pop("user", None), f"{where}: user"),
            meta=_mapping(rest.pop("meta", None) or {}, f"{where}: meta"),
            extra=rest,
        )

    @property
    def labelled_by_scorers(self) -> bool:
        """Whether `diffalign pair` gave the labels, ranks and votes, not people."""
        return self.source.startswith(BY_SCORERS)

    def pair_target(self) -> float | None:
        """Returns P(first candidate preferred) of a pair, from its labels: 1, 0, 0.5 for a tie, or between.

        None when neither candidate has a label. Raises BadLabel for labels that are no preference, UserError
        when the record is not a pair.
        """
        if len(self.candidates) != 2:
            raise UserError(f"record {self.id} has {len(self.candidates)} candidates, a pair has 2")
        first, second = (candidate.label for candidate in self.candidates)
        if first is None and second is None:
            return None
        both = f"record {self.id}: labels {first} and {second}"
        if first is None or second is None:
            raise BadLabel(f"{both}: one is missing")
        if not (0.0 <= first <= 1.0 and 0.0 <= second <= 1.0):  # False for NaN too
            raise BadLabel(f"{both} are not both in [0, 1]")
        if abs(first + second - 1.0) > LABEL_TOLERANCE:
            raise BadLabel(f"{both} do not sum to 1")
        return first


def write_records(path: str | Path, records: Iterable[Record]) -> int:
    """Writes a jsonl file, whole or not at all, picture paths relative to its folder; returns the number."""
    count = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal count
        for record in records:
            yield record.to_dict(Path(path).parent)
            count += 1

    files.write_jsonl(path, rows())
    return count


def read_records(path: str | Path) -> Iterator[Record]:
    """Yields the records of a jsonl file. UserError naming file and line for anything that is no record."""
    path = Path(path)
    for where, row in read_lines(path):
        yield Record.from_dict(row, path.parent, where)


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields ("file:line", parsed JSON) for each line that is not blank. UserError like `read_records`."""
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a jsonl file")
    number = 0
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{path.name}:{number}", json.loads(line)
    except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, or nested without end
        raise UserError(f"{path}:{number} is not JSON ({brief(error)})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({brief(error)})") from error


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return dict(value)


def _text(value: Any, where: str) -> str | None:
    if isinstance(value, (dict, list, bool)):
        raise UserError(f"{where} is {value!r}, expected text")
    return None if value is None else str(value)


def _number(value: Any, where: str) -> float | None:
    # An int stays one, so that a file survives a round trip as it was.
    if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
        raise UserError(f"{where} is {value!r}, expected a number")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise UserError(f"{where} is a number of {len(str(abs(value)))} digits: no float can hold it")
    return value


def _whole(value: Any, where: str) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas writes integer columns with gaps as floats
    if isinstance(value, bool) or not isinstance(value, (int, type(None))):
        raise UserError(f"{where} is {value!r}, expected a whole number")
    return value
