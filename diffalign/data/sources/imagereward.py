"""ImageRewardDB: several pictures of a prompt, ranked and rated by experts, as ranked lists.

Layouts:

- JSON, GitHub's data/test.json: {id, prompt, generations: [n paths], ranking: [n places]};
- parquet with one row a picture: image, prompt_id, prompt, classification, image_amount_in_total, rank,
  overall_rating, image_text_alignment_rating, fidelity_rating. The rows of a prompt follow one another (as in
  the authors' own loading script) and become one list; `image_path` instead of `image` names a file, as the
  published metadata files do.

Convention: place 1 is the best, equal places are ties. The ratings go from 1 to 7, higher being better, and
are kept as scores on the scale "1-7".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from diffalign.common.errors import UserError
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record, Score
from diffalign.data.sources._base import picture_folder
from diffalign.data.sources._json import (
    dropped,
    is_number,
    json_file,
    json_rows,
    layout_of,
    ranked_list,
)
from diffalign.data.sources._parquet import Layout, ParquetSource, Row, picture

JSON_LAYOUT = {"json": ("prompt", "generations", "ranking")}
RATINGS = ("overall_rating", "image_text_alignment_rating", "fidelity_rating")
SCALE = "1-7"
META = ("prompt_id", "classification", "image_amount_in_total")
_NEEDED = {"prompt_id": "text", "prompt": "text", "rank": "number"}
_OPTIONAL = ("classification", "image_amount_in_total", *RATINGS)


@dataclass
class Plugin(ParquetSource):
    """Ranked lists of ImageRewardDB.

    Attributes:
        path: a JSON file; or a parquet file, a folder of parquet shards, or the name of a hub data set
            (`owner/name`).
        images: the folder that the paths start at, where the rows name files: by default that of the JSON
            file; needed for parquet with `image_path`.
    """

    images: str | None = None

    layouts: ClassVar[tuple[Layout, ...]] = (
        Layout("ImageRewardDB", {"image": "picture", **_NEEDED}, _OPTIONAL, caption="prompt"),
        Layout("ImageRewardDB", {"image_path": "text", **_NEEDED}, _OPTIONAL, caption="prompt"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._is_json and self.split is not None:
            raise UserError(f"data.split={self.split} is for parquet; data.path={self.path} is one JSON file")

    @property
    def _is_json(self) -> bool:
        return self.path.endswith(".json")

    def files(self) -> list[Path]:
        """Returns the JSON file, or the parquet files."""
        return [json_file(self.path)] if self._is_json else super().files()

    def size(self) -> int | None:
        """Returns None: how many lists there are shows when all rows are read."""
        return None

    def data_inputs(self) -> dict[str, Path | str]:
        """Returns the files, and where rows name pictures the digest of the rows read and their pictures."""
        found = super().data_inputs()
        if self._is_json or self.images is not None:
            found["imagereward pictures"] = self.content_digest(self._folder())
        return found

    def rows(self) -> Iterator[Record]:
        """Yields every list as a record; ids are `file:row`, of a list in parquet its first row.

        Raises:
            UserError: no such file, another layout, the rows of a prompt do not follow one another, or no
                folder for the files that they name.
        """
        return self._json_lists() if self._is_json else self._parquet_lists()

    def _folder(self) -> Path:
        if self.images is None and not self._is_json:
            raise UserError(f"data.path={self.path} names files: give the folder they are in, data.images=")
        return Path(self.path).parent if self.images is None else picture_folder(self.images)

    def _json_lists(self) -> Iterator[Record]:
        path, folder, known = json_file(self.path), self._folder(), False
        for where, row in json_rows(path):
            if row is None:
                yield dropped(where, "bad_text", source="imagereward")
                continue
            known = known or bool(layout_of(path, row, JSON_LAYOUT))
            meta = {"prompt_id": row["id"]} if row.get("id") is not None else {}
            fields = {"images": "generations", "ranks": "ranking"}
            yield ranked_list(where, row, folder, **fields, source="imagereward", meta=meta)

    def _parquet_lists(self) -> Iterator[Record]:
        seen = set()
        for key, rows in groupby(self.read(), key=_prompt_key):
            if key is None:  # text that is not UTF-8: of which prompt is not known
                for where, _ in rows:
                    yield dropped(where, "bad_text", source="imagereward")
                continue
            record = self._list(rows)
            if key in seen:
                raise UserError(
                    f"data.path={self.path}: the rows of prompt_id {key[0]} do not follow one another (again "
                    f"at {record.id}): sort them by prompt_id"
                )
            seen.add(key)
            yield record

    def _list(self, rows: Iterator[tuple[str, Row | None]]) -> Record:
        first, candidates, problem = None, [], None
        for where, row in rows:
            assert row is not None  # _prompt_key
            first = first or (where, row)
            if not is_number(row["rank"]) or not all(_is_rating(row.get(name)) for name in RATINGS):
                problem = "bad_label"
            candidates.append(self._candidate(where, row))
        assert first is not None  # groupby has no empty groups
        where, row = first
        return Record(
            where,
            row["prompt"] or "",
            candidates,
            source="imagereward",
            meta={key: row[key] for key in META if row.get(key) is not None},
            problem=problem,
        )

    def _candidate(self, where: str, row: Row) -> Candidate:
        if "image" in row:
            image = picture(row, "image", where)
        elif row["image_path"]:
            image = ImageRef(path=self._folder() / row["image_path"])
        else:
            image = ImageRef(name=f"{where}:image_path")
        scores = {
            name: Score(float(row[name]), SCALE, "ImageRewardDB")
            for name in RATINGS
            if is_number(row.get(name))
        }
        return Candidate(image=image, rank=row["rank"], scores=scores)


def _prompt_key(item: tuple[str, Row | None]) -> tuple[Any, Any] | None:
    _, row = item
    return None if row is None else (row["prompt_id"], row["prompt"])


def _is_rating(value: Any) -> bool:
    return value is None or is_number(value)
