"""Parquet data: a file, a folder of shards, or a hub data set, streamed row by row.

Only the columns of the layout are read, and memory does not grow with the data.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffalign.common.errors import UserError, brief, unknown
from diffalign.common.plugins import plugin_name
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Record
from diffalign.data.sources._base import Source, shards

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

BATCH_ROWS = 16
# Read column chunks page by page and fetch nothing ahead (pyarrow's default). Writers usually make one page
# of all the pictures of a row group: then that page, stored and decompressed, is what memory holds, whatever
# the number of rows.
READ_BUFFER_BYTES = 1 << 20

_SHARD = re.compile(r"^(?P<split>.+?)-\d{5}-of-\d{5}")
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")

Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """The columns of a public layout.

    Attributes:
        name: what messages call it.
        needed: column -> what it holds: `text`, `picture` (encoded, or the Image feature of `datasets`),
            `number`, `list` or `struct`.
        optional: columns that are read where they are there.
        caption: the column with the prompts; None where they are inside another one.
    """

    name: str
    needed: Mapping[str, str]
    optional: tuple[str, ...] = ()
    caption: str | None = field(default=None, kw_only=True)

    def columns(self, names: Sequence[str]) -> list[str]:
        """Returns the columns to read of those that are there."""
        return [name for name in (*self.needed, *self.optional) if name in names]

    def missing(self, names: Sequence[str]) -> list[str]:
        """Returns the needed columns that are not there."""
        return [name for name in self.needed if name not in names]


@dataclass
class ParquetSource(Source):
    """Base of the sources in parquet files.

    Attributes:
        path: a parquet file, a folder of parquet shards, or the name of a hub data set (`owner/name`).
        split: which split, where there are several (`train`, `validation_unique`, ...): of a folder the
            shards `SPLIT-00000-of-00042.parquet` (or `SPLIT/0000.parquet`); needed for a hub data set.
        revision: branch, tag or commit of a hub data set.
    """

    split: str | None = None
    revision: str | None = None

    layouts: ClassVar[tuple[Layout, ...]]

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
            and not self.path.endswith((".parquet", ".json"))
        )

    def record(self, where: str, row: Row) -> Record:
        """Returns the record of one row, `where` being its id; a source has this, or its own `rows`."""
        raise NotImplementedError

    def split_name(self, split: str) -> str:
        """Returns what `split` calls the files of this split of the data; by default the same."""
        return split

    def hub_splits(self) -> list[str]:
        """Returns the splits of the hub data set that `split` stands for; by default it alone."""
        assert self.split is not None  # __post_init__
        return [self.split]

    def files(self) -> list[Path]:
        """Returns the parquet files that are read, sorted by name; none for a hub data set."""
        return [] if self.on_hub else list(self._shards().values())

    def would_read(self, place: Path) -> bool:
        """Whether `place` is a shard in the folder that is read."""
        return place.suffix == ".parquet" and place.resolve().is_relative_to(Path(self.path).resolve())

    def size(self) -> int | None:
        """Returns the rows of all files, at most `limit`; None on a hub or with `prompts`."""
        if self.on_hub or self.prompts is not None:
            return None
        total = sum(_footer(path).num_rows for path in self.files())
        return total if self.limit is None else min(total, self.limit)

    def captions(self) -> Iterator[str] | None:
        """Returns the column of captions; None where it is not one a record, and where `size` is None."""
        if self.size() is None:
            return None
        paths = self.files()
        columns = [_plan(path, self.layouts)[0].caption for path in paths]
        if None in columns:
            return None
        found = (_file_captions(path, str(column)) for path, column in zip(paths, columns, strict=True))
        return islice(chain.from_iterable(found), self.limit)

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
        return {plugin_name(self): f"hub:{self.path}@{self.commit} split={self.split}"}

    def rows(self) -> Iterator[Record]:
        """Yields every row as a record, lazily; ids are `file.parquet:row` (`split:row` on a hub).

        Raises:
            UserError: as `read`.
        """
        for where, row in self.read():
            if row is None:
                yield Record(where, "", [], source=plugin_name(self), problem="bad_text")
            else:
                yield self.record(where, row)

    def read(self) -> Iterator[tuple[str, Row | None]]:
        """Yields (id, row) of every row; None for a row whose text is not UTF-8.

        Raises:
            UserError: no such file, no parquet in the folder, a file that is no parquet, or one without the
                needed columns (all files are looked at before the first row is read).
        """
        if self.on_hub:
            for split in self.hub_splits():
                for index, row in enumerate(hub_rows(self.path, split, self.commit, self.layouts)):
                    yield f"{split}:{index}", row
            return
        found = self._shards()
        plans = {name: _plan(path, self.layouts) for name, path in found.items()}
        wanted = self.wanted_prompts()
        for name, path in found.items():
            layout, columns = plans[name]
            subset = None if wanted is None or layout.caption is None else (layout.caption, wanted)
            for index, content in _file_rows(path, columns, subset):
                yield f"{name}:{index}", content

    def _shards(self) -> dict[str, Path]:
        """Returns name -> path of the files to read: a file's name, or its path where names repeat."""
        found = shards(self.path, (".parquet",), "parquet", " (a hub data set reads owner/name)")
        splits = {name: _split_of(path) for name, path in found.items()}
        named = {name: self.split_name(split) for name, split in splits.items() if split is not None}
        known = sorted(set(named.values()))
        if self.split is not None:
            chosen = {name: path for name, path in found.items() if named.get(name) == self.split}
            if not chosen:
                raise unknown(f"split of {self.path}", self.split, known)
            return chosen
        if len(known) > 1:  # training on the validation rows by accident is worth a question
            raise UserError(
                f"data.path={self.path} holds the splits {', '.join(known)}: choose with data.split="
            )
        return found


def picture(row: Mapping[str, Any], column: str, where: str) -> ImageRef:
    """Returns the picture in a column: plain bytes, or the Image feature of `datasets`; maybe absent."""
    content = row[column]
    if isinstance(content, Mapping):
        content = content.get("bytes")
    return ImageRef(data=content, name=f"{where}:{column}")


def layout_of(names: Sequence[str], layouts: Sequence[Layout], where: Path | str) -> Layout:
    """Returns the layout whose needed columns are there.

    Raises:
        UserError: no layout; names what the nearest one lacks, and the columns that are there.
    """
    nearest = min(layouts, key=lambda layout: len(layout.missing(names)))
    missing = nearest.missing(names)
    if not missing:
        return nearest
    what = f"column{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
    pictures = all(nearest.needed[name] == "picture" for name in missing)
    hint = "; this variant has no pictures" if pictures else ""
    raise UserError(f"{where} has no {what} (it has {', '.join(names) or 'none'}){hint}")


def _plan(path: Path, layouts: Sequence[Layout]) -> tuple[Layout, list[str]]:
    """Returns the layout of a file and the columns to read. UserError for a type that does not fit."""
    import pyarrow.types as types

    schema = _footer(path).schema.to_arrow_schema()
    layout = layout_of(schema.names, layouts, path)
    tests = {
        "text": (types.is_string, types.is_large_string, types.is_string_view),
        "picture": (types.is_binary, types.is_large_binary, types.is_struct),
        "number": (types.is_floating, types.is_integer),
        "list": (types.is_list, types.is_large_list),
        "struct": (types.is_struct,),
    }
    for name, holds in layout.needed.items():
        kind = schema.field(name).type
        if not any(fits(kind) for fits in (*tests[holds], types.is_null)):
            raise UserError(f"{path}: column {name} holds {kind}, which is not the {layout.name} layout")
    return layout, layout.columns(schema.names)


def _file_rows(
    path: Path, columns: list[str], subset: tuple[str, frozenset[str]] | None
) -> Iterator[tuple[int, Row | None]]:
    """Yields (row number in the file, row) of one parquet file; None for a row whose text is not UTF-8."""
    from pyarrow import ArrowException

    index = 0
    try:
        with _open(path) as file:
            for group in range(file.num_row_groups):
                # With a subset the captions are read first: most row groups then need no picture at all.
                if subset is not None and not _holds(file, group, *subset):
                    index += file.metadata.row_group(group).num_rows
                    continue
                for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns):
                    for row in _rows_of(batch):
                        yield index, row
                        index += 1
    except (ArrowException, OSError) as error:
        reason = brief(error)
        raise UserError(f"{path} cannot be read from row {index} on ({reason}): download it again") from error


def _file_captions(path: Path, column: str) -> Iterator[str]:
    """Yields the captions of one parquet file as `record` has them: "" where there is none."""
    for _, row in _file_rows(path, [column], None):
        yield "" if row is None else row[column] or ""


def _rows_of(batch: pyarrow.RecordBatch) -> list[Row | None]:
    """Returns the rows; one that holds text that is not UTF-8 (parquet does not check it) is None."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [row for index in range(batch.num_rows) for row in _rows_of(batch.slice(index, 1))]


def _holds(file: pyarrow.parquet.ParquetFile, group: int, column: str, wanted: frozenset[str]) -> bool:
    rows = [
        row for batch in file.iter_batches(row_groups=[group], columns=[column]) for row in _rows_of(batch)
    ]
    return any((row[column] or "").strip() in wanted for row in rows if row is not None)


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


def hub_rows(path: str, split: str, revision: str | None, layouts: Sequence[Layout]) -> Iterator[Row]:
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
    columns = layout_of(names, layouts, path).columns(names)
    stream = stream.select_columns(columns)
    for name in columns:
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


def hub_split_names(path: str, revision: str | None) -> list[str]:
    """Returns the names of the splits of a hub data set, sorted."""
    from datasets import get_dataset_split_names

    try:
        return sorted(map(str, get_dataset_split_names(path, revision=revision)))
    except Exception as error:  # as in hub_rows
        raise _does_not_open(path, error) from error


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
