"""Pick-a-Pic v1 and v2 (and data in their parquet layout): a file, a folder of shards, or a hub data set.

Columns that are read: caption, jpg_0, jpg_1 (encoded pictures), label_0, label_1 (1/0, 0/1, or 0.5/0.5 for a
tie); where present has_label, model_0, model_1, image_0_uid, image_1_uid, user_id, ranking_id,
num_example_per_prompt. Other columns are never touched. Rows are streamed: memory does not grow with the
data.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.common.errors import UserError, brief, unknown
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record
from diffalign.data.sources._base import Source

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

NEEDED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
OPTIONAL = (
    "has_label",
    "model_0",
    "model_1",
    "image_0_uid",
    "image_1_uid",
    "user_id",
    "ranking_id",
    "num_example_per_prompt",
)
META = ("ranking_id", "num_example_per_prompt")

BATCH_ROWS = 16
# Read column chunks page by page and fetch nothing ahead (pyarrow's default). Writers usually make one page
# of all the pictures of a row group: then that page, stored and decompressed, is what memory holds, whatever
# the number of rows.
READ_BUFFER_BYTES = 1 << 20

_SHARD = re.compile(r"^(?P<split>.+?)-\d{5}-of-\d{5}")
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


@dataclass
class Plugin(Source):
    """Preference pairs in the Pick-a-Pic layout.

    Attributes:
        path: a parquet file, a folder of parquet shards, or the name of a hub data set (`owner/name`).
        split: which split, where there are several (`train`, `validation_unique`, ...): of a folder the
            shards `SPLIT-00000-of-00042.parquet` (or `SPLIT/0000.parquet`); needed for a hub data set.
        revision: branch, tag or commit of a hub data set.
    """

    split: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.revision is not None and not self.on_hub:
            raise UserError(
                f"data.revision={self.revision} is for hub data sets; data.path={self.path} is not one"
            )
        if self.on_hub and self.split is None:
            raise UserError(
                f"data.path={self.path} is a hub data set: say which split, as in data.split=train"
            )

    @property
    def on_hub(self) -> bool:
        """Whether `path` names a hub data set: nothing of that name is here, and it reads owner/name."""
        return (
            not Path(self.path).exists()
            and bool(_HUB_NAME.match(self.path))
            and not self.path.endswith(".parquet")
        )

    def files(self) -> list[Path]:
        """Returns the parquet files that are read, sorted by name; none for a hub data set."""
        return [] if self.on_hub else list(self._shards().values())

    def size(self) -> int | None:
        """Returns the rows of all files, at most `limit`; None on a hub or with `prompts`."""
        if self.on_hub or self.prompts is not None:
            return None
        total = sum(_footer(path).num_rows for path in self.files())
        return total if self.limit is None else min(total, self.limit)

    @functools.cached_property
    def commit(self) -> str:
        """The commit of the hub data set: asked once, so that the rows and the manifest are of the same."""
        if self.revision is not None and _COMMIT.match(self.revision):
            return self.revision
        return _hub_commit(self.path, self.revision)

    def data_inputs(self) -> dict[str, Path | str]:
        """Returns what Source says; a hub data set is named by its commit."""
        if not self.on_hub:
            return super().data_inputs()
        return {"pickapic": f"hub:{self.path}@{self.commit} split={self.split}"}

    def rows(self) -> Iterator[Record]:
        """Yields every row as a record, lazily; ids are `file.parquet:row` (`split:row` on a hub).

        Raises:
            UserError: no such file, no parquet in the folder, a file that is no parquet, or one without the
                needed columns (all files are looked at before the first row is read).
        """
        if self.on_hub:
            assert self.split is not None  # __post_init__
            for index, row in enumerate(_hub_rows(self.path, self.split, self.commit)):
                yield to_record(f"{self.split}:{index}", row)
            return
        shards = self._shards()
        columns = {
            name: _columns(_footer(path).schema.to_arrow_schema(), path) for name, path in shards.items()
        }
        for name, path in shards.items():
            for index, content in _file_rows(path, columns[name], self.wanted_prompts()):
                where = f"{name}:{index}"
                if content is None:
                    yield Record(where, "", [], source="pickapic", problem="bad_text")
                else:
                    yield to_record(where, content)

    def _shards(self) -> dict[str, Path]:
        """Returns name -> path of the files to read: a file's name, or its path where names repeat."""
        root = Path(self.path)
        if root.is_file():
            found = {root.name: root}
        elif root.is_dir():
            paths = sorted(path for path in root.rglob("*.parquet") if not _hidden(path.relative_to(root)))
            unique = len({path.name for path in paths}) == len(paths)
            found = {path.name if unique else path.relative_to(root).as_posix(): path for path in paths}
            if not found:
                raise UserError(f"data.path={self.path}: the folder holds no parquet file")
        else:
            raise UserError(
                f"data.path={self.path}: no such file or folder (a hub data set reads owner/name)"
            )
        splits = {name: _split_of(path) for name, path in found.items()}
        known = sorted({split for split in splits.values() if split is not None})
        if self.split is not None:
            chosen = {name: path for name, path in found.items() if splits[name] == self.split}
            if not chosen:
                raise unknown(f"split of {self.path}", self.split, known)
            return chosen
        if len(known) > 1:  # training on the validation rows by accident is worth a question
            raise UserError(
                f"data.path={self.path} holds the splits {', '.join(known)}: choose with data.split="
            )
        return found


def to_record(name: str, row: Mapping[str, Any]) -> Record:
    """Returns the record of one row; nothing is judged here, a missing picture becomes an empty ImageRef.

    Labels become None where `has_label` is false (the file then holds placeholders, usually 0.5).
    """
    labelled = row.get("has_label") is not False
    candidates = []
    for side in (0, 1):
        content = row[f"jpg_{side}"]
        if isinstance(content, Mapping):  # the Image feature of `datasets` instead of plain bytes
            content = content.get("bytes")
        uid = row.get(f"image_{side}_uid")
        label = row[f"label_{side}"]
        candidates.append(
            Candidate(
                image=ImageRef(data=content, name=f"{name}:jpg_{side}"),
                model=row.get(f"model_{side}"),
                label=float(label) if labelled and label is not None else None,
                extra={} if uid is None else {"uid": uid},
            )
        )
    user = row.get("user_id")
    return Record(
        id=name,
        prompt=row["caption"] or "",
        candidates=candidates,
        source="pickapic",
        user=None if user is None else str(user),
        meta={key: row[key] for key in META if row.get(key) is not None},
    )


def _file_rows(
    path: Path, columns: list[str], wanted: frozenset[str] | None
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields (row number in the file, row) of one parquet file; None for a row whose text is not UTF-8."""
    from pyarrow import ArrowException

    index = 0
    try:
        with _open(path) as file:
            for group in range(file.num_row_groups):
                # With a subset the captions are read first: most row groups then need no picture at all.
                if wanted is not None and not _holds(file, group, wanted):
                    index += file.metadata.row_group(group).num_rows
                    continue
                for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns):
                    for row in _rows_of(batch):
                        yield index, row
                        index += 1
    except (ArrowException, OSError) as error:
        reason = brief(error)
        raise UserError(f"{path} cannot be read from row {index} on ({reason}): download it again") from error


def _rows_of(batch: pyarrow.RecordBatch) -> list[dict[str, Any] | None]:
    """Returns the rows; one that holds text that is not UTF-8 (parquet does not check it) is None."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [row for index in range(batch.num_rows) for row in _rows_of(batch.slice(index, 1))]


def _holds(file: pyarrow.parquet.ParquetFile, group: int, wanted: frozenset[str]) -> bool:
    rows = [
        row for batch in file.iter_batches(row_groups=[group], columns=["caption"]) for row in _rows_of(batch)
    ]
    return any((row["caption"] or "").strip() in wanted for row in rows if row is not None)


def _open(path: Path) -> pyarrow.parquet.ParquetFile:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path, buffer_size=READ_BUFFER_BYTES, pre_buffer=False)
    except (ArrowException, OSError) as error:
        reason = brief(error)
        raise UserError(
            f"{path} is no readable parquet file ({reason}); is its download complete?"
        ) from error


def _footer(path: Path) -> pyarrow.parquet.FileMetaData:
    with _open(path) as file:
        return file.metadata


def _columns(schema: pyarrow.Schema, where: Path | str) -> list[str]:
    """Returns the columns to read. UserError for a missing one or a type that does not fit its name."""
    import pyarrow.types as types

    check_columns(schema.names, where)
    for name in NEEDED:
        kind = schema.field(name).type
        if name == "caption":
            fits = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        elif name.startswith("jpg"):
            fits = types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind)
        else:
            fits = types.is_floating(kind) or types.is_integer(kind)
        if not (fits or types.is_null(kind)):
            raise UserError(f"{where}: column {name} holds {kind}, which is not the Pick-a-Pic layout")
    return [name for name in (*NEEDED, *OPTIONAL) if name in schema.names]


def check_columns(names: list[str], where: Path | str) -> None:
    """Raises UserError, naming the columns that are missing and those that are there."""
    missing = [name for name in NEEDED if name not in names]
    if not missing:
        return
    what = f"column{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
    hint = "; the no_images variant has no pictures" if missing == ["jpg_0", "jpg_1"] else ""
    raise UserError(f"{where} has no {what} (it has {', '.join(names) or 'none'}){hint}")


def _hub_rows(path: str, split: str, revision: str | None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a hub data set, streamed by `datasets`; pictures stay encoded."""
    from datasets import Image, load_dataset

    try:
        # Small batches: the default is a whole row group with all its pictures.
        stream = load_dataset(path, split=split, revision=revision, streaming=True, batch_size=BATCH_ROWS)
        features = stream.features or {}
        names = list(features) or list(next(iter(stream)))
    except Exception as error:
        # Offline, unknown name, gated, unknown split: a dozen classes from four libraries.
        raise _does_not_open(path, error) from error
    check_columns(names, path)
    columns = [name for name in (*NEEDED, *OPTIONAL) if name in names]
    stream = stream.select_columns(columns)
    for name in ("jpg_0", "jpg_1"):
        if isinstance(features.get(name), Image):
            stream = stream.cast_column(name, Image(decode=False))
    index = 0
    try:
        for row in stream:
            yield row
            index += 1
    except Exception as error:  # a broken connection or row: classes of httpx, pyarrow, datasets, fsspec
        raise UserError(
            f"the stream of {path} broke at row {index} ({brief(error)}): run again, or download its parquet "
            "files and give their folder"
        ) from error


def _hub_commit(path: str, revision: str | None) -> str:
    """Returns the commit that a revision stands for now."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(path, revision=revision, timeout=10).sha)
    except Exception as error:
        raise _does_not_open(path, error) from error


def _does_not_open(path: str, error: Exception) -> UserError:
    return UserError(
        f"data.path={path} is neither a file or folder here nor a hub data set that opens ({brief(error)})"
    )


def _split_of(path: Path) -> str | None:
    """Returns train for train-00000-of-00042-<hash>.parquet and for train/0000.parquet, else None."""
    match = _SHARD.match(path.name)
    if match:
        return match["split"]
    return path.parent.name if path.stem.isdigit() else None


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
