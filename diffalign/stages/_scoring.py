"""Rows of pictures, and scores for them: shared by `score` and `evaluate`."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.data.pictures import PICTURE_SUFFIXES
from diffalign.stages._run import refuse_unfinished

if TYPE_CHECKING:
    from diffalign.data.pictures import ImageRef
    from diffalign.scorers import Scorer, Scores

ROW_FILES = ("images.jsonl", "scores.jsonl")

Row = dict[str, Any]


def read_image_rows(source: str | Path, *, limit: int | None = None) -> tuple[list[Row], Path]:
    """Returns the rows of pictures with the folder that their paths start from.

    Args:
        source: an images.jsonl (or scores.jsonl), a folder that holds one, or a folder of picture files;
            there a text file of the same name beside a picture is its prompt.
        limit: the first so many rows only.

    Raises:
        UserError: nothing there, the output of a stage that was stopped, a row without picture, or an id that
            stands there twice; names the row.
    """
    path = Path(source)
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: give a number of pictures of at least 1, or leave it out")
    found = next((path / name for name in ROW_FILES if (path / name).is_file()), path)
    refuse_unfinished(found if found.is_dir() else found.parent)
    if found.is_dir():
        return _picture_files(found)[:limit], found
    if not found.is_file():
        raise UserError(f"images={source} does not exist: give a folder of pictures or an images.jsonl")
    rows = files.read_jsonl(found)[:limit]
    if not rows:
        raise UserError(f"{found} holds no picture")
    seen: set[str] = set()
    for index, row in enumerate(rows):
        where = f"{found.name}, row {index}"
        if not isinstance(row.get("image"), str):
            raise UserError(f"{where} has no 'image' (it has {', '.join(row) or 'no fields'}): give its path")
        row.setdefault("id", Path(row["image"]).stem)
        if str(row["id"]) in seen:
            raise UserError(f"{where}: a second picture with the id '{row['id']}'; ids must differ")
        seen.add(str(row["id"]))
    return rows, found.parent


def read_all_image_rows(sources: str | Sequence[str], *, limit: int | None = None) -> tuple[list[Row], Path]:
    """Returns what `read_image_rows` does for one source or for several together.

    Of several, ids begin with the source's folder name, since generators number pictures alike; `limit` holds
    for each.

    Raises:
        UserError: as in `read_image_rows`, or two sources with folders of one name.
    """
    if isinstance(sources, str):
        return read_image_rows(sources, limit=limit)
    read = [read_image_rows(source, limit=limit) for source in sources]
    if not read:
        raise UserError("images=[] names no pictures: give a folder or an images.jsonl")
    names = [folder.resolve().name for _, folder in read]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"two of images= are in folders named '{twice[0]}': their pictures' ids would collide"
        )
    top = Path(os.path.commonpath([folder.resolve() for _, folder in read]))
    rows = [
        {**relative_to(row, folder, top), "id": f"{name}/{row['id']}"}
        for name, (found, folder) in zip(names, read, strict=True)
        for row in found
    ]
    return rows, top


def _picture_files(folder: Path) -> list[Row]:
    """Returns one row for each picture file of a folder, sorted by name."""
    rows = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES):
        row: Row = {"id": path.name, "image": path.name}
        text = path.with_suffix(".txt")
        if text.is_file():
            row["prompt"] = files.read_text(text).strip()
        rows.append(row)
    if not rows:
        raise UserError(
            f"{folder} holds neither an {ROW_FILES[0]} nor pictures ({', '.join(PICTURE_SUFFIXES)})"
        )
    return rows


def digests(rows: Sequence[Row], folder: Path) -> list[str | None]:
    """Returns what identifies each picture's bytes, None for a missing one; it reads every picture once."""
    from diffalign.data.pictures import BadImage

    found: list[str | None] = []
    for row in rows:
        try:
            found.append(_picture(row, folder).digest().hex())
        except BadImage:
            found.append(None)
    return found


def check_needs(rows: Sequence[Row], scorers: Mapping[str, Scorer]) -> None:
    """Checks that every row brings what the scorers need.

    Raises:
        UserError: no scorer, or a row without a prompt or context that a scorer needs; names the row.
    """
    if not scorers:
        raise UserError("no scorer is named: give scorers=[clip] or scorers='{clip: {path: FOLDER}}'")
    for name, scorer in scorers.items():
        for need, key, kind in (("prompts", "prompt", str), ("context", "context", Mapping)):
            missing = [row["id"] for row in rows if not isinstance(row.get(key), kind)]
            if need in scorer.needs and missing:
                or_file = ", or into a .txt file of the picture's name" if key == "prompt" else ""
                raise UserError(
                    f"scorer {name} needs a {key} for every picture, '{missing[0]}' has none: write it into "
                    f"its row{or_file}"
                )


def score_batches(
    rows: Sequence[Row], folder: Path, scorers: Mapping[str, Scorer], *, batch_size: int
) -> Iterator[list[Row]]:
    """Yields the rows, batch by batch, with `scores` and `errors` added; picture paths stay as they are.

    A picture that cannot be decoded scores NaN (null on disk) under every scorer and says why in `errors`.
    """
    from diffalign.data.pictures import BadImage

    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        pictures: list[Any] = []
        problems: list[str | None] = []
        for row in batch:
            try:
                pictures.append(_picture(row, folder).open())
                problems.append(None)
            except BadImage as error:
                problems.append(str(error))
        good = [row for row, problem in zip(batch, problems, strict=True) if problem is None]
        results = {name: _score(scorer, pictures, good) for name, scorer in scorers.items()}
        places = iter(range(len(good)))
        yield [
            _scored(row, scorers, results, next(places) if problem is None else None, problem)
            for row, problem in zip(batch, problems, strict=True)
        ]


def _picture(row: Row, folder: Path) -> ImageRef:
    from diffalign.data.pictures import ImageRef

    return ImageRef(path=folder / row["image"], name=row["image"])


def _score(scorer: Scorer, pictures: list[Any], rows: list[Row]) -> Scores:
    prompts = [row.get("prompt") for row in rows]
    context = [row.get("context") for row in rows]
    return scorer.score(
        pictures,
        [str(prompt) for prompt in prompts] if "prompts" in scorer.needs else None,
        context=[dict(item or {}) for item in context] if "context" in scorer.needs else None,
    )


def _scored(
    row: Row,
    scorers: Mapping[str, Scorer],
    results: Mapping[str, Scores],
    at: int | None,
    problem: str | None,
) -> Row:
    """Returns one row with its scores: number `at` of the results, None where the picture has a problem."""
    scores: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for name, scorer in scorers.items():
        entry: dict[str, Any] = {
            "value": None,
            "scale": scorer.scale,
            "version": scorer.version,
            "higher_is_better": scorer.higher_is_better,
            "parts": {},
        }
        error = problem
        if at is not None:
            result = results[name]
            entry["value"] = _or_none(result.values[at].item())
            entry["parts"] = {part: _or_none(values[at].item()) for part, values in result.parts.items()}
            error = result.errors[at] or ("the scorer gave NaN" if entry["value"] is None else None)
        if error is not None:
            errors[name] = error
        scores[name] = entry
    return {**row, "scores": {**(row.get("scores") or {}), **scores}, "errors": errors}


def _or_none(value: float) -> float | None:
    """Returns a finite number as it is, NaN and infinities as None: JSON has no word for them."""
    return value if math.isfinite(value) else None


def relative_to(row: Row, folder: Path, target: Path) -> Row:
    """Returns the row with its picture's path starting from `target` instead of `folder`."""
    return {**row, "image": Path(os.path.relpath(folder / row["image"], target)).as_posix()}
