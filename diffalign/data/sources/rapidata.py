"""Rapidata's preference votes (700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3 and those of its layout).

Columns that are read: prompt, image1, image2 (pictures), votes_image1, votes_image2 (counts); where present
model1, model2, image1_path, image2_path. `detailed_results` (every single vote) and others are never touched.

Convention: a label is the share of the votes, 7 of 10 being 0.7; all votes weigh the same (the publisher also
weighs them by the voter's past reliability). A pair without votes is unlabelled. The published splits
train_0001, train_0002, ... are parts of one: `split=train` reads them all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from diffalign.common.errors import unknown
from diffalign.data.records import Candidate, Record
from diffalign.data.sources._json import is_number
from diffalign.data.sources._parquet import Layout, ParquetSource, Row, hub_split_names, picture

_PART = re.compile(r"_\d{4}$")


@dataclass
class Plugin(ParquetSource):
    """Pairs with votes for each side.

    Attributes:
        split: which split: `train` is all of train_0001, train_0002, ..., which can be chosen one by one too;
            needed for a hub data set.
    """

    layouts: ClassVar[tuple[Layout, ...]] = (
        Layout(
            "Rapidata",
            {
                "prompt": "text",
                "image1": "picture",
                "image2": "picture",
                "votes_image1": "number",
                "votes_image2": "number",
            },
            ("model1", "model2", "image1_path", "image2_path"),
            caption="prompt",
        ),
    )

    def split_name(self, split: str) -> str:
        """Returns the split without the number of its part, except where that part is asked for."""
        return split if split == self.split else _PART.sub("", split)

    def hub_splits(self) -> list[str]:
        """Returns the parts that `split` stands for, sorted. UserError where there are none."""
        known = hub_split_names(self.path, self.commit)
        chosen = [name for name in known if self.split_name(name) == self.split]
        if not chosen:
            raise unknown(f"split of {self.path}", self.split, known)
        return chosen

    def record(self, where: str, row: Row) -> Record:
        """Returns the record of a row; counts that are none make it a `bad_label`."""
        votes = [row["votes_image1"], row["votes_image2"]]
        counted = all(_is_count(count) for count in votes)
        total = sum(votes) if counted else 0
        candidates = []
        for side, count in enumerate(votes, start=1):
            path = row.get(f"image{side}_path")
            candidates.append(
                Candidate(
                    image=picture(row, f"image{side}", where),
                    model=row.get(f"model{side}"),
                    label=count / total if total else None,
                    votes=int(count) if counted else None,
                    extra={} if path is None else {"path": path},
                )
            )
        problem = None if counted else "bad_label"
        return Record(where, row["prompt"] or "", candidates, source="rapidata", problem=problem)


def _is_count(value: Any) -> bool:
    return is_number(value) and value >= 0 and float(value).is_integer()
