"""Prompts from anywhere: a literal text, a list of them, a file as its authors publish it, or a known set."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.common.errors import UserError, unknown
from diffalign.common.files import read_text
from diffalign.common.progress import say
from diffalign.data.prompt_sets import SETS, similar_set
from diffalign.data.records import read_lines

__all__ = ["COLUMNS", "Prompt", "load_prompts", "prompt_file"]

COLUMNS = ("prompt", "caption", "text")
"""Column names that mean the prompt when no column is named (whatever their case)."""

_SAFE_ID = re.compile(r"^[\w.-]{1,100}$")

# (where, row): "prompts.tsv:12", {"Prompt": "a red cube", ...}
Rows = Iterator[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: unique in its list and usable in file names: the file's own `id` column where it has one that
            is, else `NAME-00012` with the file's name and the row, counted from 0.
        text: the prompt.
        meta: the row's other columns.
    """

    id: str
    text: str
    meta: dict[str, Any] = field(default_factory=dict)


def load_prompts(
    source: str | Sequence[str], *, column: str | None = None, limit: int | None = None
) -> list[Prompt]:
    """Returns the prompts of `source` in order; repeated prompts are kept, each with its own id.

    Args:
        source: a literal text; a list of literal texts; a file: `.txt` (one a line, blank lines skipped),
            `.tsv` (tabs, quotes are plain characters, as in PartiPrompts), `.csv`, `.jsonl`, or `.json` (a
            list of texts or of objects); or the name of a published set (`prompt_sets.SETS`), which is
            fetched once. The word `parti` as a prompt is written as a list: `[parti]`.
        column: which column or field holds the prompt; by default the only one called prompt, caption or
            text.
        limit: only the first so many.

    Raises:
        UserError: the file is missing, empty, in another format or not UTF-8; the column is unknown or
            ambiguous; a row has no prompt; a set that is not here cannot be fetched.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: give a number of prompts of at least 1, or leave it out")
    if not isinstance(source, str):
        prompts = [_literal(text, index) for index, text in enumerate(source)]
        if not prompts:
            raise UserError("the list of prompts is empty: give at least one prompt")
    elif _names_set(source):
        prompts = _from_set(source, column)
    else:
        path = prompt_file(source)
        if path is None and not re.search(r"\s", source.strip()):
            meant = similar_set(source)
            hint = "" if meant is None else f" nor prompt set (did you mean '{meant}'?)"
            say(f"prompts={source}: no such file{hint}, so this word is the prompt")
        prompts = [_literal(source, 0)] if path is None else _from_file(path, column)
    return prompts[:limit]


def _names_set(source: str) -> bool:
    """Whether `source` is the name of a prompt set, and no file of that name is here."""
    return source in SETS and not Path(source).is_file()


def _from_set(name: str, column: str | None) -> list[Prompt]:
    """Returns the prompts of a set, file after file, with the ids that the files give by themselves."""
    chosen = SETS[name]
    found = []
    for path in chosen.fetch(name):
        prompts = _from_file(path, column)
        for index, prompt in enumerate(prompts):
            meta = chosen.meta(path, index, len(prompts), prompt.meta)
            found.append(Prompt(prompt.id, prompt.text, meta))
    say(
        f"prompts={name}: {chosen.title}, {len(found)} prompts ({chosen.licence}), by its protocol with "
        f"{chosen.images_per_prompt} pictures each; the word itself would be prompts=[{name}]"
    )
    return found


def _literal(text: object, index: int) -> Prompt:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"prompt {index} is {text!r}: give a text")
    return Prompt(f"prompt-{index:05d}", text)


def prompt_file(source: str) -> Path | None:
    """Returns the file that `source` names, or None when it is a literal prompt.

    Of a prompt set it is the file in the cache, or their folder where it has several.

    Raises:
        UserError: it can only mean a file, and there is none; or a set cannot be fetched.
    """
    if _names_set(source):
        paths = SETS[source].fetch(source)
        return paths[0] if len(paths) == 1 else paths[0].parent
    path = Path(source)
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):  # too long or with characters no path may have
        return None
    # A single word with a known suffix is a file that is not there; "a poster saying notes.txt" is a prompt.
    if path.suffix.lower() in _READERS and not re.search(r"\s", source.strip()):
        raise UserError(f"prompts={source}: no such file")
    if path.is_dir() and ("/" in source or source in (".", "..")):
        raise UserError(f"prompts={source} is a folder: give one file of it")
    return None


def _from_file(path: Path, column: str | None) -> list[Prompt]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"prompts={path}: unknown kind of file '{path.suffix}', known: {', '.join(sorted(_READERS))}"
        )
    rows = list(reader(path))
    if not rows:
        raise UserError(f"prompts={path} holds no prompt")
    key = _column(list(rows[0][1]), column, path)
    ids = _ids([row for _, row in rows], path.stem)
    prompts = []
    for (where, row), name in zip(rows, ids, strict=True):
        text = row.get(key)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: '{key}' is {text!r}, expected a prompt: fill it in or remove the row")
        prompts.append(Prompt(name, text, {name: value for name, value in row.items() if name != key}))
    return prompts


def _column(columns: list[str], asked: str | None, path: Path) -> str:
    """Returns the column of the prompt: the asked one (in any case), or the only one with a usual name."""
    if asked is not None:
        if asked in columns:
            return asked
        same = [name for name in columns if name.lower() == asked.lower()]
        if len(same) == 1:
            return same[0]
        raise unknown(f"column of {path.name}", asked, columns)
    usual = [name for name in columns if name.lower() in COLUMNS]
    if len(usual) == 1:
        return usual[0]
    problem = (
        f"columns {' and '.join(usual)} could both be the prompt" if usual else "no column is called prompt"
    )
    raise UserError(f"prompts={path}: {problem}; choose with column= one of {', '.join(columns)}")


def _ids(rows: list[dict[str, Any]], stem: str) -> list[str]:
    """Returns the rows' own ids where all differ and can be part of a file name; else numbered ones."""
    own = [str(row.get("id", "")) for row in rows]
    if len(set(own)) == len(own) and all(_SAFE_ID.match(name) and name.strip(".") for name in own):
        return own
    return [f"{re.sub(r'[^0-9A-Za-z_.-]', '_', stem)}-{index:05d}" for index in range(len(rows))]


def _read_txt(path: Path) -> Rows:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path.name}:{number}", {"prompt": line.strip()}


def _read_tsv(path: Path) -> Rows:
    # csv's quoting would swallow the quotes of prompts like: The words "Fly an airplane" are written on the
    # wall.
    lines = enumerate(read_text(path).split("\n"), start=1)
    return _table(path, ((number, line.split("\t")) for number, line in lines if line.strip()))


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(1 << 24)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)

    def numbered() -> Iterator[tuple[int, list[str]]]:
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except csv.Error as error:
            raise UserError(f"{path.name}:{reader.line_num}: {error}") from error

    return _table(path, numbered())


def _table(path: Path, lines: Iterator[tuple[int, list[str]]]) -> Rows:
    """Yields the rows of a table whose first line is its header."""
    header: list[str] | None = None
    for number, cells in lines:
        if header is None:
            header = [name.strip() for name in cells]
            if len(set(header)) < len(header):
                raise UserError(f"{path.name}:{number}: two columns have the same name ({', '.join(header)})")
            continue
        if len(cells) > len(header):
            raise UserError(
                f"{path.name}:{number} has {len(cells)} cells, the header names {len(header)} columns"
            )
        yield f"{path.name}:{number}", dict(zip(header, cells, strict=False))


def _read_jsonl(path: Path) -> Rows:
    for where, row in read_lines(path):
        yield where, _object(row, where)


def _read_json(path: Path) -> Rows:
    try:
        rows = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of prompts, found {type(rows).__name__}")
    for index, row in enumerate(rows):
        where = f"{path.name}[{index}]"
        yield where, _object(row, where)


def _object(row: object, where: str) -> dict[str, Any]:
    if isinstance(row, str):
        return {"prompt": row}
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a text or an object, found {type(row).__name__}")
    return row


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".txt": _read_txt,
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}
