"""A census of preference records, in one pass: what is in them, and the ids of the rows that are no use."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from diffalign.data.pictures import BadImage, digest
from diffalign.data.records import BadLabel, Record
from diffalign.data.select import MIN_SIDE

__all__ = ["LONG_CAPTION", "Census", "Finding", "clip_pieces", "findings", "inspect"]

LONG_CAPTION = 75
"""CLIP reads 77 tokens, of which two mark start and end."""

CHUNK = 64

# CLIP splits a caption into these pieces before it splits them further: the count is a lower bound of the
# tokens.
_CLIP_PIECE = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """What one row holds: cheap to keep, unlike its pictures.

    Attributes:
        verdict: decided, tie, unlabelled, bad_label, not_a_pair or bad_text (the row could not be read).
        target: P(first preferred) of a decided pair or tie.
        digests: identity of each picture's bytes (None: no bytes).
        sizes: (width, height) of each picture that decodes.
        problems: the distinct picture problems, in the order of the candidates.
    """

    id: str
    prompt: str
    verdict: str
    target: float | None
    digests: tuple[bytes | None, ...]
    sizes: tuple[tuple[int, int] | None, ...]
    problems: tuple[str, ...]


def inspect(record: Record) -> Finding:
    """Returns the finding for one record; every picture is decoded completely."""
    digests: list[bytes | None] = []
    sizes: list[tuple[int, int] | None] = []
    problems: dict[str, None] = {}
    for candidate in record.candidates:
        identity, size = None, None
        try:
            content = candidate.image.read()
            identity = digest(content)
            size = candidate.image.decode(content, min_side=MIN_SIDE).size
        except BadImage as error:
            problems[error.reason] = None
        digests.append(identity)
        sizes.append(size)
    verdict, target = _verdict(record)
    return Finding(record.id, record.prompt, verdict, target, tuple(digests), tuple(sizes), tuple(problems))


@dataclass
class Census:
    """The running totals over findings. It keeps about 200 bytes a row (digests), not the rows."""

    rows: int = 0
    labelled: int = 0
    usable: int = 0
    first_preferred: int = 0
    pairs_of_two_sizes: int = 0
    non_ascii_captions: int = 0
    pictures: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    problems: dict[str, list[str]] = field(default_factory=dict)
    empty_captions: list[str] = field(default_factory=list)
    long_captions: list[str] = field(default_factory=list)
    same_picture_twice: list[str] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    conflicting: list[tuple[str, str]] = field(default_factory=list)
    _prompts: set[bytes] = field(default_factory=set)
    _pictures: set[bytes] = field(default_factory=set)
    _first: dict[bytes, tuple[str, float | None]] = field(default_factory=dict)

    def add(self, finding: Finding, *, ties: str) -> None:
        """Counts one row; `ties` decides whether a tie is usable."""
        self.rows += 1
        self.verdicts[finding.verdict] += 1
        self.first_preferred += finding.verdict == "decided" and (finding.target or 0.0) > 0.5
        labelled = finding.verdict == "decided" or (finding.verdict == "tie" and ties == "soft")
        self.labelled += labelled
        self.usable += labelled and not finding.problems
        reasons = [] if finding.verdict in ("decided", "tie") else [finding.verdict]
        for reason in (*reasons, *finding.problems):
            self.problems.setdefault(reason, []).append(finding.id)
        self._add_caption(finding)
        self._add_pictures(finding)

    def _add_caption(self, finding: Finding) -> None:
        self._prompts.add(digest(finding.prompt.encode("utf-8", "surrogatepass")))
        if not finding.prompt.strip():
            self.empty_captions.append(finding.id)
        if clip_pieces(finding.prompt) > LONG_CAPTION:
            self.long_captions.append(finding.id)
        self.non_ascii_captions += not finding.prompt.isascii()

    def _add_pictures(self, finding: Finding) -> None:
        present = [identity for identity in finding.digests if identity is not None]
        self.pictures += len(present)
        self._pictures.update(present)
        sizes = [size for size in finding.sizes if size is not None]
        self.sizes.update(sizes)
        if len(finding.digests) != 2 or len(present) != 2:
            return
        self.pairs_of_two_sizes += len(set(sizes)) == 2
        if present[0] == present[1]:
            self.same_picture_twice.append(finding.id)
        # The same pair in the other order is the same pair: compare in one order, with the target turned
        # along.
        swapped = present[1] < present[0]
        target = 1.0 - finding.target if swapped and finding.target is not None else finding.target
        key = digest(b"".join(sorted(present)) + finding.prompt.encode("utf-8", "surrogatepass"))
        first, first_target = self._first.setdefault(key, (finding.id, target))
        if first == finding.id:
            return
        self.duplicates.append((finding.id, first))
        if target is not None and first_target is not None and target != first_target:
            self.conflicting.append((finding.id, first))

    @property
    def bad_share(self) -> float:
        """The share that training compares with `max_bad_share` (`Tally.bad_share`), in [0, 1]."""
        unread = sum(self.verdicts[reason] for reason in ("bad_text", "not_a_pair", "bad_label"))
        broken = unread + self.labelled - self.usable
        return broken / (broken + self.usable) if broken else 0.0

    def report(self, **head: Any) -> dict[str, Any]:
        """Returns the totals as plain data, after the entries of `head`."""
        histogram = {f"{width}x{height}": count for (width, height), count in self.sizes.most_common()}
        return {
            **head,
            "rows": self.rows,
            "prompts": len(self._prompts),
            "images": self.pictures,
            "distinct_images": len(self._pictures),
            "decided": self.verdicts["decided"],
            "first_preferred": self.first_preferred,
            "ties": self.verdicts["tie"],
            "unlabelled": self.verdicts["unlabelled"],
            "usable": self.usable,
            "bad_share": self.bad_share,
            "problems": self.problems,
            "duplicates": [{"row": row, "same_as": first} for row, first in self.duplicates],
            "conflicting_duplicates": [{"row": row, "same_as": first} for row, first in self.conflicting],
            "same_picture_twice": self.same_picture_twice,
            "sizes": histogram,
            "pairs_of_two_sizes": self.pairs_of_two_sizes,
            "empty_captions": self.empty_captions,
            "long_captions": self.long_captions,
            "non_ascii_captions": self.non_ascii_captions,
        }


def clip_pieces(caption: str) -> int:
    """Returns into how many pieces CLIP splits a caption before byte pairs: at least so many tokens."""
    return len(_CLIP_PIECE.findall(caption))


def findings(records: Iterable[Record]) -> Iterator[Finding]:
    """Yields the findings in order; decoding runs in threads (PIL works outside the interpreter's lock)."""
    iterator = iter(records)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(iterator, CHUNK)):
            yield from pool.map(inspect, chunk)


def _verdict(record: Record) -> tuple[str, float | None]:
    if record.problem is not None:
        return record.problem, None
    if len(record.candidates) != 2:
        return "not_a_pair", None
    try:
        target = record.pair_target()
    except BadLabel:
        return "bad_label", None
    if target is None:
        return "unlabelled", None
    return ("tie" if target == 0.5 else "decided"), target
