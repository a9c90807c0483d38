"""Open Image Preferences v1 (data-is-better-together): the binarized pairs, or the votes they came from.

Layouts, told apart by their columns:

- binarized: prompt, chosen, rejected (pictures); where present id, chosen_model, rejected_model, evolution,
  category, sub_category. `chosen` always comes first there; here the row's id decides.
- results: images {image_1, image_2, prompt} and `preference.responses`, the annotators' answers: image_1,
  image_2, both_good, both_bad or toxic_content; where present `preference.responses.status` (only "submitted"
  answers count), id, model_1, model_2, evolution, category, sub_category. The pictures are addresses on the
  hub: download that data set and give its folder as `images`.

Convention: an answer for a picture is one vote, both_good one for each. The picture with more votes wins;
equal votes are a tie, which `ties` drops or trains. As the authors do (huggingface/data-is-better-together,
04_binarize_preference_results.ipynb), a row with as many both_bad as votes for the leading picture is left
out (reason `both_bad`; `both_bad=ignore` keeps it).
Departure: the authors overlook toxic_content; here such rows are left out (reason `toxic_content`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

from diffalign.common.errors import UserError, unknown
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record
from diffalign.data.sources._base import in_keyed_order, picture_folder
from diffalign.data.sources._parquet import Layout, ParquetSource, Row, picture

ANSWERS = ("image_1", "image_2", "both_good", "both_bad", "toxic_content")
META = ("id", "evolution", "category", "sub_category")
BOTH_BAD = ("veto", "ignore")
_RESPONSES = "preference.responses"
_STATUS = "preference.responses.status"


@dataclass
class Plugin(ParquetSource):
    """Pairs of Open Image Preferences, binarized or counted from the votes.

    Attributes:
        images: for the votes: the folder of the downloaded pictures, in which image_quality_dev/3368.jpg is
            what the address .../resolve/main/image_quality_dev/3368.jpg names.
        both_bad: for the votes: "veto" leaves a row out that has at least as many both_bad as votes for its
            leading picture, "ignore" does not count them.
        toxic_votes: for the votes: leave a row out from so many toxic_content on.
    """

    images: str | None = None
    both_bad: Literal["veto", "ignore"] = "veto"
    toxic_votes: int = 1

    layouts: ClassVar[tuple[Layout, ...]] = (
        Layout(
            "binarized Open Image Preferences",
            {"prompt": "text", "chosen": "picture", "rejected": "picture"},
            ("chosen_model", "rejected_model", *META),
            caption="prompt",
        ),
        Layout(
            "Open Image Preferences",
            {"images": "struct", _RESPONSES: "list"},
            (_STATUS, "model_1", "model_2", *META),
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.both_bad not in BOTH_BAD:
            raise unknown("data.both_bad", self.both_bad, BOTH_BAD)
        if self.toxic_votes < 1:
            raise UserError(f"data.toxic_votes={self.toxic_votes}: give a number of votes of at least 1")

    def data_inputs(self) -> dict[str, Path | str]:
        """Returns the parquet files, and with `images` the digest of the rows read and their pictures."""
        found = super().data_inputs()
        if self.images is not None:
            found["openpreferences pictures"] = self.content_digest(Path(self.images))
        return found

    def record(self, where: str, row: Row) -> Record:
        """Returns the record of a row. UserError for votes without a folder of pictures."""
        meta = {key: row[key] for key in META if row.get(key) is not None}
        if "chosen" not in row:
            return self._counted(where, row, meta)
        winner, loser = (
            Candidate(image=picture(row, side, where), model=row.get(f"{side}_model"))
            for side in ("chosen", "rejected")
        )
        both = in_keyed_order(where, winner, loser)
        return Record(where, row["prompt"] or "", both, source="openpreferences", meta=meta)

    def _counted(self, where: str, row: Row, meta: dict[str, Any]) -> Record:
        if self.images is None:
            raise UserError(
                f"data.path={self.path} holds votes and the addresses of the pictures: download the data set "
                "that they name and give its folder, data.images="
            )
        folder = picture_folder(self.images)
        images = row["images"] or {}
        votes, problem = self._votes(row)
        labels = _labels(votes)
        candidates = [
            Candidate(
                image=_local(images.get(f"image_{side}"), folder, f"{where}:image_{side}"),
                model=row.get(f"model_{side}"),
                label=label,
                votes=count,
            )
            for side, label, count in zip((1, 2), labels, votes, strict=True)
        ]
        prompt = images.get("prompt") or ""
        return Record(where, prompt, candidates, source="openpreferences", meta=meta, problem=problem)

    def _votes(self, row: Row) -> tuple[tuple[int, int], str | None]:
        """Returns the votes of both pictures, and why the row is left out (None: it is not)."""
        answers = row[_RESPONSES] or []
        states = row.get(_STATUS)
        if states is not None and len(states) != len(answers):
            return (0, 0), "bad_label"
        submitted = [
            answer
            for answer, state in zip(answers, states or ["submitted"] * len(answers), strict=True)
            if state == "submitted"
        ]
        if not set(submitted) <= set(ANSWERS):
            return (0, 0), "bad_label"
        counts = Counter(submitted)
        votes = (counts["image_1"] + counts["both_good"], counts["image_2"] + counts["both_good"])
        if counts["toxic_content"] >= self.toxic_votes:
            return votes, "toxic_content"
        if self.both_bad == "veto" and counts["both_bad"] and counts["both_bad"] >= max(votes):
            return votes, "both_bad"
        return votes, None


def _labels(votes: Sequence[int]) -> tuple[float | None, float | None]:
    """Returns 1 for the picture with more votes and 0 for the other, halves for a tie, None without votes."""
    first, second = votes
    if first == second:
        return (0.5, 0.5) if first else (None, None)
    return float(first > second), float(first < second)


def _local(address: Any, folder: Path, name: str) -> ImageRef:
    """Returns the downloaded file of an address `.../resolve/REVISION/PATH`, or of a path, below `folder`."""
    _, found, tail = str(address or "").partition("/resolve/")
    place = PurePosixPath(tail.partition("/")[2] if found else str(address or ""))
    outside = place.is_absolute() or ".." in place.parts or ":" in str(place)
    if outside or not place.parts:
        return ImageRef(name=f"{name} ({address})")
    return ImageRef(path=folder / place)
