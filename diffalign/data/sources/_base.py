"""What every data source shares: its keys, the subset by prompt, and how it names itself in manifests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.common.files import printable
from diffalign.common.plugins import plugin_name
from diffalign.data.pictures import digest
from diffalign.data.records import Candidate, Record
from diffalign.data.select import ScoreFacts, UsableGroups, check_share, check_ties


@dataclass
class Source:
    """Base of every data source plug-in.

    Attributes:
        path: where the data is.
        limit: read only the first so many rows (after the subset by prompt).
        prompts: a text file with one caption per line: only rows with one of these captions are read.
        ties: `drop` or `soft` (train ties with target 0.5).
        max_bad_share: refuse when more than this share of the rows is bad.
    """

    path: str
    limit: int | None = None
    prompts: str | None = None
    ties: Literal["drop", "soft"] = "drop"
    max_bad_share: float = 0.05

    def __post_init__(self) -> None:
        if not str(self.path).strip():
            raise UserError("data.path is empty: give the path of the data")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"data.limit={self.limit}: give a number of rows of at least 1, or leave it out")
        check_ties(self.ties)
        check_share(self.max_bad_share)

    def rows(self) -> Iterator[Record]:
        """Yields every row as a record, in order, before `prompts` and `limit`; a source has this."""
        raise NotImplementedError

    def size(self) -> int | None:
        """Returns how many records will come, where that is known without reading them; else None."""
        return None

    def captions(self) -> Iterator[str] | None:
        """Returns the prompts of `records`, where they can be read without the pictures; else None."""
        return None

    def files(self) -> list[Path]:
        """Returns the files that are read (none for data on a hub)."""
        return [Path(self.path)]

    def would_read(self, place: Path) -> bool:
        """Whether a new file or folder at `place` would be taken for data the next time."""
        return False

    def records(self) -> Iterator[Record]:
        """Yields every row as a record, in order: ties, unlabelled and broken rows too, labels as they are.

        Raises:
            UserError: the data is missing, of another layout, or has no rows (with one of the asked
                captions).
        """
        wanted = self.wanted_prompts()
        found = self.rows()
        if wanted is not None:
            found = (record for record in found if record.prompt.strip() in wanted)
        count = 0
        for record in islice(found, self.limit):
            count += 1
            yield record
        if not count:
            subset = f" with a caption of data.prompts={self.prompts}" if wanted is not None else ""
            raise UserError(f"data.path={self.path} has no rows{subset}")

    def usable(
        self,
        *,
        unit: str = "pair",
        undesirable: bool = False,
        reject: Callable[[Record], str | None] | None = None,
        unlabelled: bool = False,
        limit: int | None = None,
        ties: Literal["drop", "soft"] | None = None,
    ) -> UsableGroups:
        """Returns the usable groups under `ties` (None: the source's own) and `max_bad_share`.

        `limit` counts usable records, not rows; the other arguments are those of `UsableGroups`.
        """
        return UsableGroups(
            self.records(),
            unit=unit,
            undesirable=undesirable,
            reject=reject,
            unlabelled=unlabelled,
            ties=ties or self.ties,
            max_bad_share=self.max_bad_share,
            limit=limit,
            what=self.path,
        )

    def score_facts(self) -> dict[str, ScoreFacts]:
        """Returns what is known of the scores in the data, by scorer; nothing where no manifest tells."""
        return {}

    def wanted_prompts(self) -> frozenset[str] | None:
        """Returns the captions of the `prompts` file, stripped; None without such a file."""
        if self.prompts is None:
            return None
        try:
            lines = Path(self.prompts).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"data.prompts={self.prompts} is no readable text file: give one caption a line"
            ) from error
        wanted = frozenset(line.strip() for line in lines if line.strip())
        if not wanted:
            raise UserError(f"data.prompts={self.prompts} holds no caption: give one caption a line")
        return wanted

    def inputs(self) -> dict[str, Path | str]:
        """Returns what a manifest records as input, and what must be equal for a run to go on."""
        found = self.data_inputs()
        if self.prompts is not None:
            found[f"{plugin_name(self)} prompts"] = Path(self.prompts)
        return found

    def data_inputs(self) -> dict[str, Path | str]:
        """Returns the inputs without `prompts`: the files read, or sizes and tails where that is much.

        Hashing 300 GB of shards would take longer than many runs, so above 1 GB in all each file is named by
        its size and the hash of its last 64 KiB, which for parquet holds the footer with the statistics of
        every column.
        """
        paths = self.files()
        label = plugin_name(self)
        names = [f"{label}:{path.name}" for path in paths]
        if len(set(names)) < len(paths):
            names = [f"{label}:{path}" for path in paths]
        if sum(path.stat().st_size for path in paths) <= files.FULL_HASH_LIMIT:
            return dict(zip(names, paths, strict=True))
        tails = [files.file_identity(path, whole_up_to=0) for path in paths]
        words = [" ".join(f"{key}={value}" for key, value in tail.items()) for tail in tails]
        return dict(zip(names, words, strict=True))

    def content_digest(self, folder: Path) -> str:
        """Returns `sha256=...` over the records read: ids, captions, labels, and their pictures' files.

        A picture counts with its path from `folder` and its size; those of the first gigabyte with their
        bytes too. Reading half a terabyte (HPDv3) once more before a run would take hours.
        """
        total, left = hashlib.sha256(), files.FULL_HASH_LIMIT
        for record in self.records():
            total.update(f"{record.id} {record.prompt!r} {record.problem}\n".encode("utf-8", "surrogatepass"))
            for one in record.candidates:
                place, size, content = _file_facts(one.image.path, folder, read=left > 0)
                left -= size
                facts = f"{place} {size} {content} {one.prompt!r} {one.label} {one.rank}\n"
                total.update(facts.encode("utf-8", "surrogatepass"))
        return f"sha256={total.hexdigest()}"


def _file_facts(path: Path | None, folder: Path, *, read: bool) -> tuple[str, int, str]:
    """Returns where a picture's file is, its size, and (with `read`) the digest of its bytes."""
    if path is None:
        return "", 0, "absent"
    place = os.path.relpath(path, folder)
    try:
        size = path.stat().st_size
        return place, size, digest(path.read_bytes()).hex() if read else ""
    except (OSError, ValueError):  # ValueError: a path with a NUL
        return place, 0, "absent"


def in_keyed_order(key: str, winner: Candidate, loser: Candidate) -> list[Candidate]:
    """Returns the two candidates, labelled 1 and 0, in an order that hangs on `key` alone.

    Layouts that always name the winner first would let its place give the label away, to a judge that prefers
    the first picture as well as to a model that sees both.
    """
    winner.label, loser.label = 1.0, 0.0
    swapped = digest(f"place {key}".encode("utf-8", "surrogatepass"))[0] & 1
    return [loser, winner] if swapped else [winner, loser]


def shards(path: str, suffixes: tuple[str, ...], kind: str, hint: str = "") -> dict[str, Path]:
    """Returns name -> path of the file `path`, or of the files below that folder with one of `suffixes`.

    Sorted; the name is the file's, or its path in the folder where names repeat. Hidden files are left out.

    Raises:
        UserError: nothing is there (`hint` says what else to do), or no file of the `kind` is in the folder.
    """
    root = Path(path)
    if root.is_file():
        return {printable(root.name): root}
    if not root.is_dir():
        raise UserError(f"data.path={path}: no such file or folder{hint}")
    found = [place for place in sorted(root.rglob("*")) if place.name.endswith(suffixes) and place.is_file()]
    places = [place.relative_to(root) for place in found if not hidden(place.relative_to(root))]
    if not places:
        raise UserError(f"data.path={path}: the folder holds no {kind} file")
    unique = len({place.name for place in places}) == len(places)
    return {printable(place.name if unique else place.as_posix()): root / place for place in places}


def picture_folder(images: str) -> Path:
    """Returns the folder that `data.images` names. UserError when it is none."""
    if not Path(images).is_dir():
        raise UserError(f"data.images={images}: no such folder; give the one that the rows' paths start from")
    return Path(images)


def hidden(place: Path) -> bool:
    """Whether a path, or a folder on its way, starts with a dot."""
    return any(part.startswith(".") for part in place.parts)
