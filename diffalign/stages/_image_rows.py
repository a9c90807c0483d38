"""Rows of pictures: read from files and folders, given their prompts, checked. For `score` and `evaluate`."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.common.progress import say
from diffalign.data.pictures import PICTURE_SUFFIXES
from diffalign.stages._run import refuse_unfinished

if TYPE_CHECKING:
    from diffalign.data.prompts import Prompt
    from diffalign.scorers import Scorer

NAME_COLUMNS = ("image", "file_name", "filename", "file", "path", "id")
"""Columns of a file of prompts that say which picture each belongs to."""

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
    if found.suffix.lower() in PICTURE_SUFFIXES:
        raise UserError(f"images={source} is a picture: give its folder, or an images.jsonl")
    rows = files.read_jsonl(found)[:limit]
    if not rows:
        raise UserError(f"{found} holds no picture")
    seen: set[str] = set()
    for index, row in enumerate(rows):
        where = f"{found.name}, row {index}"
        _check_row(row, where)
        row.setdefault("id", Path(row["image"]).stem)
        if str(row["id"]) in seen:
            raise UserError(f"{where}: a second picture with the id '{row['id']}'; ids must differ")
        seen.add(str(row["id"]))
    return rows, found.parent


def _check_row(row: Row, where: str) -> None:
    """Raises UserError for a row whose fields are of other kinds than all that read them expect."""
    if "image" not in row:
        raise UserError(f"{where} has no 'image' (it has {', '.join(row) or 'no fields'}): give its path")
    kinds: tuple[tuple[str, type | tuple[type, ...], str], ...] = (
        ("image", str, "a path"),
        ("prompt", str, "a text"),
        ("context", Mapping, "a mapping"),
        ("meta", Mapping, "a mapping"),
        ("scores", Mapping, "a mapping"),
        ("errors", Mapping, "a mapping"),
    )
    for key, kind, wanted in kinds:
        if row.get(key, None) is not None and not isinstance(row[key], kind):
            raise UserError(f"{where}: '{key}' is {row[key]!r}, expected {wanted}")
    group = (row.get("context") or {}).get("group")
    if not isinstance(group, str | int | float | None):
        raise UserError(f"{where}: the context's 'group' is {group!r}, expected a text or a number")


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
    """Returns one row for each picture file of a folder, sorted by name: 2.png comes before 10.png."""
    rows = []
    found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES]
    shown = [path for path in found if not path.name.startswith(".")]  # macOS leaves ._x.png beside x.png
    for path in sorted(shown, key=lambda path: _natural(path.name)):
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


def _has(row: Row, need: str) -> bool:
    if need == "prompt":
        return isinstance(row.get("prompt"), str)
    return any(isinstance(row.get(key), Mapping) and row[key] for key in ("context", "meta"))


def _natural(name: str) -> list[tuple[int, str]]:
    """Returns what names sort by when numbers in them count as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def with_prompts(rows: list[Row], source: str) -> list[Row]:
    """Returns the rows with the prompts of a file, or with one text for all.

    A prompt finds its picture by the file's column `id`, which holds the picture's id or its name without
    suffix, or by `image` or `file_name`, which hold its path or name; without such a column there must be as
    many prompts as pictures, and they go in order.

    Raises:
        UserError: a row has a prompt already, a picture has no prompt or several, a name fits several
            pictures, or the counts differ.
    """
    from diffalign.data.prompts import load_prompts, prompt_file

    taken = next((row["id"] for row in rows if "prompt" in row), None)
    if taken is not None:
        raise UserError(f"prompts={source}: picture '{taken}' has a prompt already: leave prompts out")
    prompts = load_prompts(source)
    if prompt_file(source) is None:
        if Path(source).exists() or source.startswith("["):
            raise UserError(f"prompts={source} is no file of prompts: give one, or one text for all pictures")
        return [{**row, "prompt": prompts[0].text} for row in rows]
    column = next((name for name in NAME_COLUMNS if any(name in prompt.meta for prompt in prompts)), None)
    if column is None:
        if len(prompts) != len(rows):
            raise UserError(
                f"prompts={source} has {len(prompts)} prompts for {len(rows)} pictures and no column "
                f"{' or '.join(NAME_COLUMNS)} that says whose each is: add one"
            )
        say(f"prompts={source}: the first is of '{rows[0]['image']}', the last of '{rows[-1]['image']}'")
        return [_given(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
    return _by_name(rows, prompts, column, source)


def _by_name(rows: list[Row], prompts: list[Prompt], column: str, source: str) -> list[Row]:
    """Returns the rows, each with the prompt whose `column` names it; see `with_prompts`."""
    by_name: dict[str, Prompt] = {}
    for prompt in prompts:
        value = prompt.meta.get(column)
        if value in (None, ""):
            continue
        if by_name.setdefault(_name(value), prompt) is not prompt:
            raise UserError(f"prompts={source}: '{value}' has two prompts: keep one")
    found, used = [], dict[str, str]()
    for row in rows:
        path = Path(row["image"])
        names = (row["id"], path.stem, path.name) if column == "id" else (row["image"], path.name, path.stem)
        name = next((name for name in map(_name, names) if name in by_name), None)
        if name is None:
            raise UserError(f"prompts={source} has none for picture '{row['image']}': add it")
        if used.setdefault(name, row["image"]) != row["image"]:
            raise UserError(
                f"prompts={source}: '{name}' could be '{used[name]}' or '{row['image']}': name them by path"
            )
        found.append(_given(row, by_name[name]))
    return found


def _name(value: object) -> str:
    """Returns a name as it is compared: file systems differ in how they write an accent."""
    return unicodedata.normalize("NFC", str(value))


def _given(row: Row, prompt: Prompt) -> Row:
    """Returns the row with a prompt, and with what its file says beside it."""
    meta = {key: value for key, value in prompt.meta.items() if key not in NAME_COLUMNS}
    return {**row, "prompt": prompt.text, **({"meta": meta} if meta else {})}


def check_needs(rows: Sequence[Row], scorers: Mapping[str, Scorer]) -> None:
    """Checks that every row brings what the scorers need.

    Raises:
        UserError: no scorer, or a row without a prompt or context that a scorer needs; names the row.
    """
    if not scorers:
        raise UserError("no scorer is named: give scorers=[clip] or scorers='{clip: {path: FOLDER}}'")
    for name, scorer in scorers.items():
        for need, key in (("prompts", "prompt"), ("context", "context")):
            missing = [row["id"] for row in rows if not _has(row, key)]
            if need in scorer.needs and missing:
                or_file = ", give prompts=FILE, or a .txt file of the picture's name"
                if key == "context":
                    or_file = ' of an images.jsonl: {"image": ..., "context": {...}}'
                raise UserError(
                    f"scorer {name} needs a {key} for every picture, '{missing[0]}' has none: write it into "
                    f"its row{or_file}"
                )


def relative_to(row: Row, folder: Path, target: Path) -> Row:
    """Returns the row with the paths in it starting from `target` instead of `folder`."""

    def moved(path: str) -> str:
        return Path(os.path.relpath(folder / path, target)).as_posix()

    context = row.get("context")
    changed = {"context": _map_paths(context, moved)} if isinstance(context, Mapping) else {}
    return {**row, "image": moved(row["image"]), **changed}


def context_of(row: Row, folder: Path, *, needed: bool) -> dict[str, Any]:
    """Returns the row's context with the paths in it from the folder that they start from; {} without one.

    Where a context is needed and the row has none, what its prompt's file said beside the prompt is it: such
    as the clauses of GenEval.
    """
    context = row.get("context") or (row.get("meta") if needed else None) or {}
    return _map_paths(context, lambda path: str(folder / path))


def _map_paths(context: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Returns a context with its paths changed: `reference`, of one picture or of several."""
    found = dict(context)
    reference = found.get("reference")
    if isinstance(reference, str):
        found["reference"] = change(reference)
    elif isinstance(reference, list):
        found["reference"] = [change(one) if isinstance(one, str) else one for one in reference]
    return found
