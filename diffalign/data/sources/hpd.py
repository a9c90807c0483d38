"""Human Preference Dataset v2 and v3: a JSON file of rows, and a folder with the pictures that they name.

Layouts, told apart by the keys of the first row:

- `v2_pairs`, HPD v2's train.json: {prompt, file_path: [2 paths], human_preference: [1, 0] or [0, 1]};
- `v2_lists`, HPD v2's test.json: {prompt, image_path: [n paths], rank: [n numbers], raw_annotations}: ranked
  lists;
- `v3`, HPD v3: {prompt, path1, path2, confidence, choice_dist, model1, model2}, path1 being the winner.

Convention: rank is the average place over the annotators, the smallest being the best, as in HPSv2's own
evaluation (https://github.com/tgxs002/HPSv2, `inversion_score`).
Convention: HPD v3 always names the winner first. Here the row's id decides which of the two comes first.
`confidence` and `choice_dist` stay in `meta` as they are in the file, winner first. Which share of the votes
they are is not published, so they make no soft label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffalign.common.errors import unknown
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record
from diffalign.data.sources._base import Source, in_keyed_order, picture_folder
from diffalign.data.sources._json import (
    Row,
    dropped,
    json_file,
    json_rows,
    layout_of,
    numbers,
    prompt_of,
    ranked_list,
    texts,
)

LAYOUTS = {
    "v2_pairs": ("prompt", "file_path", "human_preference"),
    "v2_lists": ("prompt", "image_path", "rank"),
    "v3": ("prompt", "path1", "path2"),
}
V3_META = ("confidence", "choice_dist")


@dataclass
class Plugin(Source):
    """Pairs or ranked lists of HPD v2 or v3.

    Attributes:
        path: the JSON file (an array of rows, or one row a line).
        images: the folder that the paths of the rows start at (of HPD v2, where train.tar.gz or test.tar.gz
            was unpacked); by default the folder of the file.
        layout: "v2_pairs", "v2_lists", "v3", or "auto": by the keys of the first row.
    """

    images: str | None = None
    layout: Literal["auto", "v2_pairs", "v2_lists", "v3"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout not in ("auto", *LAYOUTS):
            raise unknown("data.layout", self.layout, ("auto", *LAYOUTS))

    def files(self) -> list[Path]:
        """Returns the JSON file."""
        return [json_file(self.path)]

    def data_inputs(self) -> dict[str, Path | str]:
        """Returns the JSON file, and the digest of the rows read and their pictures."""
        return {**super().data_inputs(), "hpd pictures": self.content_digest(self._folder())}

    def rows(self) -> Iterator[Record]:
        """Yields every row as a record; ids are `file.json:row`.

        Raises:
            UserError: no such file, broken JSON, another layout, or no such folder of pictures.
        """
        path, folder = json_file(self.path), self._folder()
        read: Callable[[str, Row, Path], Record] | None = None
        for where, row in json_rows(path):
            if row is None:
                yield dropped(where, "bad_text", source="hpd")
                continue
            if read is None:
                read = _READERS[layout_of(path, row, LAYOUTS, self.layout)]
            yield read(where, row, folder)

    def _folder(self) -> Path:
        return Path(self.path).parent if self.images is None else picture_folder(self.images)


def _v2_pair(where: str, row: Row, folder: Path) -> Record:
    prompt, paths, labels = prompt_of(row), texts(row.get("file_path")), numbers(row.get("human_preference"))
    if prompt is None:
        return dropped(where, "bad_text", source="hpd")
    if paths is None or len(paths) != 2:
        return dropped(where, "not_a_pair", source="hpd", prompt=prompt)
    if labels is None or len(labels) != 2:
        return dropped(where, "bad_label", source="hpd", prompt=prompt)
    candidates = [
        Candidate(image=ImageRef(path=folder / path), label=float(label))
        for path, label in zip(paths, labels, strict=True)
    ]
    return Record(where, prompt, candidates, source="hpd")


def _v2_list(where: str, row: Row, folder: Path) -> Record:
    raw = row.get("raw_annotations")
    meta = {} if raw is None else {"raw_annotations": raw}
    return ranked_list(where, row, folder, images="image_path", ranks="rank", source="hpd", meta=meta)


def _v3_pair(where: str, row: Row, folder: Path) -> Record:
    prompt, paths = prompt_of(row), texts([row.get("path1"), row.get("path2")])
    if prompt is None:
        return dropped(where, "bad_text", source="hpd")
    if paths is None:
        return dropped(where, "not_a_pair", source="hpd", prompt=prompt)
    models = [None if row.get(key) is None else str(row[key]) for key in ("model1", "model2")]
    winner, loser = (
        Candidate(image=ImageRef(path=folder / path), model=model)
        for path, model in zip(paths, models, strict=True)
    )
    return Record(
        where,
        prompt,
        in_keyed_order(where, winner, loser),
        source="hpd",
        meta={key: row[key] for key in V3_META if row.get(key) is not None},
    )


_READERS: dict[str, Callable[[str, Row, Path], Record]] = {
    "v2_pairs": _v2_pair,
    "v2_lists": _v2_list,
    "v3": _v3_pair,
}
