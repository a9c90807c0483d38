"""Pick-a-Pic v1 and v2 (and data in their parquet layout): a file, a folder of shards, or a hub data set.

Columns that are read: caption, jpg_0, jpg_1 (encoded pictures), label_0, label_1 (1/0, 0/1, or 0.5/0.5 for a
tie); where present has_label, model_0, model_1, image_0_uid, image_1_uid, user_id, ranking_id,
num_example_per_prompt. Other columns are never touched. Rows are streamed: memory does not grow with the
data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from diffalign.data.records import Candidate, Record
from diffalign.data.sources._parquet import Layout, ParquetSource, Row, picture

META = ("ranking_id", "num_example_per_prompt")
LAYOUT = Layout(
    "Pick-a-Pic",
    {"caption": "text", "jpg_0": "picture", "jpg_1": "picture", "label_0": "number", "label_1": "number"},
    ("has_label", "model_0", "model_1", "image_0_uid", "image_1_uid", "user_id", *META),
    caption="caption",
)


@dataclass
class Plugin(ParquetSource):
    """Preference pairs in the Pick-a-Pic layout."""

    layouts: ClassVar[tuple[Layout, ...]] = (LAYOUT,)

    def record(self, where: str, row: Row) -> Record:
        """Returns `to_record` of a row."""
        return to_record(where, row)


def to_record(name: str, row: Mapping[str, Any]) -> Record:
    """Returns the record of one row; nothing is judged here, a missing picture becomes an empty ImageRef.

    Labels become None where `has_label` is false (the file then holds placeholders, usually 0.5).
    """
    labelled = row.get("has_label") is not False
    candidates = []
    for side in (0, 1):
        uid = row.get(f"image_{side}_uid")
        label = row[f"label_{side}"]
        candidates.append(
            Candidate(
                image=picture(row, f"jpg_{side}", name),
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
