"""JSON files of rows: an array or one row a line, of any size, read a row at a time."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from diffalign.common.errors import UserError, brief
from diffalign.common.files import printable
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record

CHUNK = 1 << 20
LONGEST_ROW = 1 << 24
"""Characters after which a row that does not end counts as broken."""

_SPACE = re.compile(r"[ \t\r\n]*")

Row = Mapping[str, Any]


def json_file(path: str) -> Path:
    """Returns the JSON file at `path`. UserError for a folder (names the JSON files in it) or nothing."""
    place = Path(path)
    if place.is_file():
        return place
    if not place.is_dir():
        raise UserError(f"data.path={path}: no such file; give a JSON file of rows")
    inside = sorted(found.name for pattern in ("*.json", "*.jsonl") for found in place.glob(pattern))
    what = f"one of {', '.join(inside)}" if inside else "a JSON file of rows, it has none"
    raise UserError(f"data.path={path} is a folder: give {what}")


def json_rows(path: Path) -> Iterator[tuple[str, Row | None]]:
    """Yields (`file:row`, row) of every row; None for one with text that cannot be UTF-8 (half a surrogate).

    Memory holds one row and a megabyte of text.

    Raises:
        UserError: the file cannot be read, is cut off, is no JSON, or holds something else than objects.
    """
    index = 0
    try:
        with open(path, encoding="utf-8-sig") as stream:
            for value in _values(_Text(stream)):
                if not isinstance(value, dict):
                    raise UserError(
                        f"{path}: row {index} is {type(value).__name__}; expected a list of JSON objects"
                    )
                yield f"{printable(path.name)}:{index}", value if encodes(value) else None
                index += 1
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8
        raise UserError(
            f"{path} is not JSON from row {index} on ({brief(error)}); is its download complete?"
        ) from error


def layout_of(path: Path, row: Row, layouts: Mapping[str, tuple[str, ...]], asked: str = "auto") -> str:
    """Returns the name of the layout whose keys `row`, the first of the file, has.

    Args:
        path: the file, for messages.
        row: its first row.
        layouts: name -> keys.
        asked: the layout that it has to be, or "auto".

    Raises:
        UserError: it has the keys of none, or of several; or not those of the one that is asked for.
    """
    names = list(layouts) if asked == "auto" else [asked]
    found = [name for name in names if all(key in row for key in layouts[name])]
    if len(found) == 1:
        return found[0]
    there = f"{path}: the first row has {', '.join(map(str, row)) or 'no keys'}"
    if found:
        raise UserError(f"{there}, which fits several layouts: choose data.layout={' or '.join(found)}")
    known = "; ".join(f"{', '.join(layouts[name])} ({name})" for name in names)
    raise UserError(f"{there}; expected {known}")


def encodes(value: Any) -> bool:
    """Whether all text in a JSON value can be written: JSON can spell half a surrogate pair, UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def prompt_of(row: Row) -> str | None:
    """Returns the prompt, "" where there is none; None for one that is no text."""
    prompt = row.get("prompt")
    if prompt is None:
        return ""
    return prompt if isinstance(prompt, str) else None


def texts(value: Any) -> list[str] | None:
    """Returns a list of texts as it is; None for anything else."""
    fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return value if fits else None


def numbers(value: Any) -> list[float] | None:
    """Returns a list of finite numbers as it is; None for anything else."""
    fits = isinstance(value, list) and all(is_number(item) for item in value)
    return value if fits else None


def is_number(value: Any) -> bool:
    """Whether this is a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # False for NaN too


def dropped(where: str, problem: str, *, source: str, prompt: str | None = None) -> Record:
    """Returns the record of a row that could not be read."""
    return Record(where, prompt or "", [], source=source, problem=problem)


def ranked_list(
    where: str, row: Row, folder: Path, *, images: str, ranks: str, source: str, meta: Mapping[str, Any]
) -> Record:
    """Returns the list of a row: the fields `images` (paths below `folder`) and `ranks` (1 is the best).

    A row that holds no such list becomes a record that says why (`Record.problem`).
    """
    prompt, paths, places = prompt_of(row), texts(row.get(images)), numbers(row.get(ranks))
    if prompt is None:
        return dropped(where, "bad_text", source=source)
    if paths is None:
        return dropped(where, "not_a_list", source=source, prompt=prompt)
    if places is None or len(places) != len(paths):
        return dropped(where, "bad_label", source=source, prompt=prompt)
    candidates = [
        Candidate(image=ImageRef(path=folder / path), rank=float(place))
        for path, place in zip(paths, places, strict=True)
    ]
    return Record(where, prompt, candidates, source=source, meta=dict(meta))


class _Text:
    """A window on a text file: what was decoded is let go."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0

    def peek(self) -> str:
        """Returns the next character that is no white space, "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None  # it matches nothing too
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        """Passes the character that `peek` returned."""
        self._at += 1

    def value(self) -> Any:
        """Returns the next value. ValueError where there is none, or it does not end."""
        self.peek()  # past white space, which the decoder does not take
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
            except ValueError:
                if len(self._text) - self._at > LONGEST_ROW or not self._more():
                    raise
            else:
                return value

    def _more(self) -> bool:
        chunk = self._stream.read(CHUNK)
        self._text = self._text[self._at :] + chunk
        self._at = 0
        return bool(chunk)


def _values(text: _Text) -> Iterator[Any]:
    """Yields the values of an array, or of values one after another. ValueError for broken JSON."""
    if text.peek() != "[":
        while text.peek():
            yield text.value()
        return
    text.skip()
    if text.peek() == "]":
        text.skip()
    else:
        while True:
            yield text.value()
            mark = text.peek()
            text.skip()
            if mark == "]":
                break
            if mark != ",":
                raise ValueError(f"expected ',' or ']', found {mark!r}" if mark else "the list does not end")
    if text.peek():
        raise ValueError("something follows the list")
