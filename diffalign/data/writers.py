"""Writes records as a set that trainers read: our own jsonl, Pick-a-Pic parquet, or chosen/rejected parquet.

Pictures are written as the very bytes that were read, never encoded again.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diffalign.common import files
from diffalign.common.errors import UserError, unknown
from diffalign.data.pictures import ImageRef, digest, usual_suffix
from diffalign.data.records import Candidate, Record, Score

if TYPE_CHECKING:
    import pyarrow

__all__ = ["FORMATS", "JSONL_NAME", "ScoreTotals", "SetWriter", "open_set", "score_facts"]

FORMATS = ("jsonl", "pickapic", "chosen_rejected")

JSONL_NAME = "preferences.jsonl"
PICTURES = "images"

GROUP_ROWS, GROUP_BYTES = 256, 32_000_000
"""A row group ends with the row that reaches one of these: it is what readers hold in memory."""
SHARD_BYTES = 500_000_000
PAGE_ROWS = 16

PICKAPIC_COLUMNS = {
    "are_different": "bool",
    "best_image_uid": "string",
    "caption": "string",
    "created_at": "timestamp[ns]",
    "has_label": "bool",
    "image_0_uid": "string",
    "image_0_url": "string",
    "image_1_uid": "string",
    "image_1_url": "string",
    "jpg_0": "binary",
    "jpg_1": "binary",
    "label_0": "float64",
    "label_1": "float64",
    "model_0": "string",
    "model_1": "string",
    "ranking_id": "int64",
    "user_id": "int64",
    "num_example_per_prompt": "int64",
    "__index_level_0__": "int64",
}
"""Columns of yuvalkirstain/pickapic_v2 in their order, with their Arrow types."""

WHOLE_NUMBERS = ("ranking_id", "num_example_per_prompt")

_WHOLE = re.compile("0|-?[1-9][0-9]{0,18}")


class SetWriter(Protocol):
    """Takes records one by one.

    Attributes:
        lost: field -> how many records had something there that the format cannot hold.
    """

    lost: Counter[str]

    def add(self, record: Record) -> None:
        """Writes one record; it must be of a kind that the format holds, its pictures whole."""

    def close(self) -> None:
        """Writes what is still held back; nothing can be added after."""


@contextmanager
def open_set(folder: Path, kind: str, name: str) -> Iterator[SetWriter]:
    """Yields the writer of a set in the empty `folder`; it is whole when the block ends without error.

    Args:
        folder: for `preferences.jsonl` and the pictures that are in memory only, or for parquet shards
            `NAME-00000-of-000NN.parquet`.
        kind: one of FORMATS.
        name: of the set, such as train.
    """
    made: SetWriter
    if kind == "jsonl":
        made = _Jsonl(folder)
    elif kind == "pickapic":
        made = _Shards(folder, name, _pickapic_schema(), _pickapic_row, ("jpg_0", "jpg_1"))
    elif kind == "chosen_rejected":
        made = _Shards(folder, name, _chosen_schema(), _chosen_row, ("chosen", "rejected"))
    else:
        raise unknown("format", kind, FORMATS)
    try:
        yield made
    except BaseException:
        with suppress(Exception):  # a file that broke cannot be closed either, which is not what went wrong
            made.close()
        raise
    made.close()


class _Jsonl:
    """`preferences.jsonl`; a picture in memory becomes `images/DIGEST.jpg`, one in a file is referred to."""

    def __init__(self, folder: Path) -> None:
        self.lost: Counter[str] = Counter()
        self._folder = folder
        self._file = open(folder / JSONL_NAME, "wb")  # noqa: SIM115

    def add(self, record: Record) -> None:
        kept = replace(record, candidates=[self._on_disk(candidate) for candidate in record.candidates])
        row = files.to_plain(kept.to_dict(self._folder))
        with _told(record):
            line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        self._file.write(line + b"\n")

    def close(self) -> None:
        self._file.close()

    def _on_disk(self, candidate: Candidate) -> Candidate:
        if candidate.image.data is None:
            return candidate
        content = candidate.image.read()
        suffix = usual_suffix(content, candidate.image.name)
        path = self._folder / PICTURES / f"{digest(content).hex()}{suffix}"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        return replace(candidate, image=ImageRef(path=path))


class _Shards:
    """Parquet files of bounded size; their number is part of their names, which they get at the end."""

    def __init__(
        self,
        folder: Path,
        name: str,
        schema: pyarrow.Schema,
        make: Callable[[Record, Counter[str]], dict[str, Any]],
        pictures: tuple[str, str],
    ) -> None:
        self.lost: Counter[str] = Counter()
        self._folder, self._name, self._schema, self._make = folder, name, schema, make
        self._plain = [column for column in schema.names if column not in pictures]
        self._rows: list[dict[str, Any]] = []
        self._bytes = self._written = self._count = 0
        self._parts: list[Path] = []
        self._writer: Any = None

    def add(self, record: Record) -> None:
        row = self._make(record, self.lost)
        if "__index_level_0__" in self._schema.names:
            row["__index_level_0__"] = self._count
        with _told(record):
            _encodable(row)
        self._count += 1
        self._rows.append(row)
        self._bytes += sum(map(_picture_bytes, row.values()))
        if len(self._rows) >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        if self._rows:
            self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for number, part in enumerate(self._parts):
            part.rename(self._folder / f"{self._name}-{number:05d}-of-{len(self._parts):05d}.parquet")
        self._parts = []

    def _flush(self) -> None:
        """Writes the waiting rows as one row group, into a new file where the last one is full."""
        import pyarrow
        from pyarrow.parquet import ParquetWriter

        if self._writer is not None and self._written + self._bytes > SHARD_BYTES:
            self._writer.close()
            self._writer = None
        if self._writer is None:
            path = self._folder / f"part-{len(self._parts):05d}"
            # Small pages: by default all the pictures of a row group are one.
            self._writer = ParquetWriter(
                path, self._schema, use_dictionary=self._plain, write_batch_size=PAGE_ROWS
            )
            self._parts.append(path)
            self._written = 0
        self._writer.write_table(pyarrow.Table.from_pylist(self._rows, schema=self._schema))
        self._written += self._bytes
        self._rows, self._bytes = [], 0


class ScoreTotals:
    """Scale and range of each scorer's numbers over records, as manifests of preferences have them."""

    def __init__(self) -> None:
        self._values: dict[str, array[float]] = {}
        self._said: dict[str, set[tuple[str, str, bool]]] = {}

    def add(self, record: Record) -> None:
        """Counts the scores of a record; a picture of several records counts in each."""
        for candidate in record.candidates:
            for name, score in candidate.scores.items():
                self._said.setdefault(name, set()).add(_scale(score))
                self._values.setdefault(name, array("d")).append(score.value)

    def facts(self) -> dict[str, dict[str, Any]]:
        """Returns name -> scale, version, higher_is_better and n, min, max, mean of the finite values.

        A scorer whose numbers stand on several scales or come from several versions is left out.
        """
        found: dict[str, dict[str, Any]] = {}
        for name, said in self._said.items():
            if len(said) == 1:
                facts = score_facts(*next(iter(said)), self._values[name])
                found |= {} if facts is None else {name: facts}
        return found


def score_facts(
    scale: str, version: str, higher_is_better: bool, values: Iterable[float]
) -> dict[str, Any] | None:
    """Returns what a manifest says of one scorer's numbers (those that are finite); None without any."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    return {
        "scale": scale,
        "version": version,
        "higher_is_better": higher_is_better,
        "n": len(finite),
        "min": min(finite),
        "max": max(finite),
        "mean": math.fsum(finite) / len(finite),
    }


def _scale(score: Score) -> tuple[str, str, bool]:
    return score.scale, score.version, bool(score.extra.get("higher_is_better", True))


def _pickapic_schema() -> pyarrow.Schema:
    import pyarrow

    types = {name: getattr(pyarrow, name) for name in ("string", "binary", "float64", "int64")}
    types |= {"bool": pyarrow.bool_, "timestamp[ns]": lambda: pyarrow.timestamp("ns")}
    return pyarrow.schema([(name, types[kind]()) for name, kind in PICKAPIC_COLUMNS.items()])


def _pickapic_row(record: Record, lost: Counter[str]) -> dict[str, Any]:
    """The row of a pair; columns that a record knows nothing of (created_at, the dead URLs) stay empty.

    Convention: an unlabelled pair has has_label false and labels of 0.5, as in the original.
    """
    first, second = record.candidates
    labelled = record.pair_target() is not None
    labels = [float(c.label) if labelled and c.label is not None else 0.5 for c in (first, second)]
    row: dict[str, Any] = dict.fromkeys(PICKAPIC_COLUMNS)
    contents = [candidate.image.read() for candidate in (first, second)]
    known = [candidate.extra.get("uid") for candidate in (first, second)]
    uids = [uid if isinstance(uid, str) else None for uid in known]
    best = "tie" if labels[0] == labels[1] else uids[labels[1] > labels[0]]
    user = record.user if record.user is not None and _is_int64(record.user) else None
    numbers = {key: record.meta[key] for key in WHOLE_NUMBERS if _is_int64(record.meta.get(key))}
    row |= {
        "caption": record.prompt,
        "are_different": contents[0] != contents[1],
        "best_image_uid": best if labelled else None,
        "has_label": labelled,
        "user_id": None if user is None else int(user),
        **numbers,
    }
    for side, candidate in enumerate((first, second)):
        row |= {
            f"jpg_{side}": contents[side],
            f"label_{side}": labels[side],
            f"model_{side}": candidate.model,
            f"image_{side}_uid": uids[side],
        }
    held = {"model", "label", *(("uid",) if uids == known else ())}
    lost.update(_fields(record, held | {*numbers, *(("user",) if user is not None else ())}))
    return row


def _chosen_schema() -> pyarrow.Schema:
    """prompt, chosen, rejected; the metadata tells `datasets` that the latter two are pictures."""
    import pyarrow

    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {
        "prompt": {"dtype": "string", "_type": "Value"},
        "chosen": {"_type": "Image"},
        "rejected": {"_type": "Image"},
    }
    return pyarrow.schema(
        [("prompt", pyarrow.string()), ("chosen", picture), ("rejected", picture)],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )


def _chosen_row(record: Record, lost: Counter[str]) -> dict[str, Any]:
    target = record.pair_target()
    if target is None or target == 0.5:
        raise UserError(f"record {record.id} is not decided: chosen_rejected cannot hold it")
    chosen, rejected = record.candidates if target > 0.5 else reversed(record.candidates)
    lost.update(_fields(record, {"label"} if target in (0.0, 1.0) else set()))
    return {"prompt": record.prompt, "chosen": _picture(chosen), "rejected": _picture(rejected)}


def _picture(candidate: Candidate) -> dict[str, Any]:
    path = candidate.image.path
    return {"bytes": candidate.image.read(), "path": None if path is None else files.printable(path.name)}


def _fields(record: Record, held: set[str]) -> set[str]:
    """Names what is known of a record beside prompt and pictures, without the fields that are held."""
    known = {"condition": record.condition, "user": record.user, **record.meta, **record.extra}
    for candidate in record.candidates:
        own = {name: getattr(candidate, name) for name in ("prompt", "condition", "model", "seed")}
        own |= {name: getattr(candidate, name) for name in ("label", "rank", "votes")}
        own |= {"scores": candidate.scores or None, **candidate.extra}
        known |= {name: value for name, value in own.items() if value is not None}
    return {name for name, value in known.items() if value is not None and name not in held}


def _is_int64(value: Any) -> bool:
    """Whether a value is a whole number, or text that is one, of 64 bits and with no other spelling."""
    if isinstance(value, str):
        return bool(_WHOLE.fullmatch(value)) and _is_int64(int(value))
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _picture_bytes(value: Any) -> int:
    """How many bytes of picture a cell holds."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return len(content) if isinstance(content, bytes) else 0


def _encodable(row: dict[str, Any]) -> None:
    for value in row.values():
        if isinstance(value, str):
            value.encode()


@contextmanager
def _told(record: Record) -> Iterator[None]:
    """Turns half a surrogate anywhere in a record into one line that names it."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise UserError(
            f"record {files.printable(record.id)} holds text that is not UTF-8: correct it or remove the row"
        ) from error
