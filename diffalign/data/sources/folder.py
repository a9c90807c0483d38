"""Folders of pictures: pairs of equal names in two folders, or one folder of ranked pictures a prompt.

    winner/a.png  loser/a.png  winner/a.txt        w/a.png  l/a.png  w/a.caption     (as kohya's scripts)
    a red cube/rank_1.png  a red cube/rank_2.png   shelf/rank_1.png  shelf/rank_2.png  shelf/prompt.txt

Pairs: names are compared without their suffix, folders inside winner/ and loser/ are part of the name. The
caption is in a `.txt` or `.caption` beside the picture; one beside the losing picture may say something else
(`prompt` of that candidate). Lists: rank_1 is the best, ties are called rank_1_a and rank_1_b; the prompt is
the name of the folder, or its prompt.txt; a caption beside a picture is that picture's own.

A picture without its partner counts as `missing_image`, one without a caption as `missing_caption`, a caption
that is no UTF-8, or a .txt and a .caption that differ, as `bad_text`.

Convention: which picture of a pair comes first hangs on its name alone, not on who won.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffalign.common.errors import UserError
from diffalign.common.files import printable
from diffalign.data.pictures import PICTURE_SUFFIXES, ImageRef
from diffalign.data.records import Candidate, Record
from diffalign.data.sources._base import Source, hidden, in_keyed_order

SIDES = (("winner", "loser"), ("w", "l"))
CAPTION_SUFFIXES = (".txt", ".caption")
PROMPT_STEM = "prompt"
PROMPT_FILE = "prompt.txt"

_RANK = re.compile(r"^rank_(\d+)(?:_.+)?$")


class _NoCaption(Exception):
    """Says why there is no caption: `missing_caption` or `bad_text`."""


@dataclass
class Plugin(Source):
    """Pairs or ranked lists of picture files in folders.

    Attributes:
        path: the folder with winner/ and loser/ (or w/ and l/), or with one folder a prompt.
    """

    def files(self) -> list[Path]:
        """Returns the pictures and captions, sorted."""
        suffixes = (*PICTURE_SUFFIXES, *CAPTION_SUFFIXES)
        return [place for top in self._tops() for place in _inside(top) if place.suffix.lower() in suffixes]

    def would_read(self, place: Path) -> bool:
        """Whether `place` lies among the folders of ranked lists, each of which is a list."""
        return self._sides() is None and place.resolve().is_relative_to(Path(self.path).resolve())

    def data_inputs(self) -> dict[str, Path | str]:
        """Returns one digest over the names, captions and pictures that are read."""
        return {"folder": self.content_digest(Path(self.path))}

    def rows(self) -> Iterator[Record]:
        """Yields every pair (ids are the names without suffix) or list (ids are the folders' names), sorted.

        Raises:
            UserError: no such folder, another layout, pictures of one name, or with names of no meaning.
        """
        sides = self._sides()
        if sides is not None:
            yield from _pairs(*sides)
            return
        for top in self._tops():
            yield _ranked(top)

    def _tops(self) -> list[Path]:
        """Returns the folders that hold the pictures, sorted. UserError as `rows`."""
        sides = self._sides()
        if sides is not None:
            return list(sides)
        root = Path(self.path)
        found = [place for place in sorted(root.iterdir()) if place.is_dir() and not hidden(Path(place.name))]
        if not any(_RANK.match(place.stem) for top in found for place in _pictures(top)):
            there = ", ".join(sorted(place.name for place in root.iterdir())[:5]) or "nothing"
            raise UserError(
                f"data.path={self.path} holds {printable(there)}: expected winner/ and loser/, or folders "
                "with rank_1.png, rank_2.png, ..."
            )
        return found

    def _sides(self) -> tuple[Path, Path] | None:
        """Returns the folders of winners and losers, None where there are none."""
        root = Path(self.path)
        if not root.is_dir():
            raise UserError(f"data.path={self.path}: no such folder")
        loose = _pictures(root)
        if loose:
            raise UserError(f"{loose[0]} lies outside the folders of the data: move it, or give another path")
        there = [names for names in SIDES if any((root / name).is_dir() for name in names)]
        if not there:
            return None
        for name in there[0]:
            if not (root / name).is_dir():
                raise UserError(f"data.path={self.path} has no {name}/ beside its other folder")
        if len(there) > 1:
            raise UserError(f"data.path={self.path} has winner/ and loser/ and w/ and l/: keep two of them")
        winners, losers = (root / name for name in there[0])
        return winners, losers


def _pairs(winners: Path, losers: Path) -> Iterator[Record]:
    pictures = {side: _by_stem(side) for side in (winners, losers)}
    for stem in sorted({stem for side in pictures.values() for stem in side}):
        winner, loser = (
            Candidate(image=_picture(side, stem, pictures[side].get(stem))) for side in (winners, losers)
        )
        prompt, problem = "", None
        try:
            said = [_caption(side, stem) for side in (winners, losers)]
            prompt = said[0] or said[1] or ""
            if not prompt:
                raise _NoCaption("missing_caption")
            loser.prompt = said[1] if said[1] not in (None, prompt) else None
        except _NoCaption as reason:
            problem = str(reason)
        candidates = in_keyed_order(stem, winner, loser)
        yield Record(printable(stem), prompt, candidates, source="folder", problem=problem)


def _ranked(top: Path) -> Record:
    ranked = []
    pictures = _by_stem(top)
    pictures.pop(PROMPT_STEM, None)
    for stem, path in pictures.items():
        match = _RANK.match(stem)
        if match is None:
            raise UserError(
                f"{top / stem}.* is not named rank_1, rank_2, ...: rename it, or move it elsewhere"
            )
        ranked.append((int(match[1]), stem, path))
    prompt, problem, candidates = top.name, None, []
    try:
        if (top / PROMPT_FILE).exists():
            prompt = _text(top / PROMPT_FILE)
        elif printable(prompt) != prompt:
            raise _NoCaption("bad_text")
        for rank, stem, path in sorted(ranked):
            own = _caption(top, stem)
            candidates.append(
                Candidate(
                    image=_picture(top, stem, path), rank=float(rank), prompt=None if own == prompt else own
                )
            )
    except _NoCaption as reason:
        prompt, problem = "", str(reason)
    return Record(printable(top.name), prompt, candidates, source="folder", problem=problem)


def _inside(folder: Path) -> list[Path]:
    """Returns the files below a folder, sorted, hidden ones left out."""
    return [
        place
        for place in sorted(folder.rglob("*"))
        if place.is_file() and not hidden(place.relative_to(folder))
    ]


def _pictures(folder: Path) -> list[Path]:
    """Returns the pictures that lie directly in a folder, sorted."""
    return [
        place
        for place in sorted(folder.iterdir())
        if place.suffix.lower() in PICTURE_SUFFIXES and not hidden(Path(place.name)) and place.is_file()
    ]


def _by_stem(side: Path) -> dict[str, Path | None]:
    """Returns name without suffix -> picture; None where there is only a caption. UserError for two."""
    found: dict[str, Path | None] = {}
    for place in _inside(side):
        stem = place.relative_to(side).with_suffix("").as_posix()
        if place.suffix.lower() in CAPTION_SUFFIXES:
            found.setdefault(stem, None)
        elif place.suffix.lower() in PICTURE_SUFFIXES:
            other = found.get(stem)
            if other is not None:
                raise UserError(f"{other} and {place.name} have one name: rename one of them on both sides")
            found[stem] = place
    return found


def _picture(side: Path, stem: str, path: Path | None) -> ImageRef:
    return ImageRef(name=f"{side / stem}.*") if path is None else ImageRef(path=path)


def _caption(side: Path, stem: str) -> str | None:
    """Returns the caption beside a picture, None where there is no file. Raises _NoCaption as `_text`."""
    places = [side / f"{stem}{suffix}" for suffix in CAPTION_SUFFIXES]
    found = {_text(place) for place in places if place.exists()}
    if len(found) > 1:
        raise _NoCaption("bad_text")
    return found.pop() if found else None


def _text(path: Path) -> str:
    """Returns the text of a caption file, stripped. Raises _NoCaption: no UTF-8, or nothing in it."""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise _NoCaption("bad_text") from error
    if not text:
        raise _NoCaption("missing_caption")
    return text
