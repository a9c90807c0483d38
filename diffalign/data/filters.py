"""Which rows of preference data pass: a filter of single rows, duplicates, and a split by prompt."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from diffalign.common.errors import UserError
from diffalign.data.records import Record
from diffalign.data.words import normalised, nsfw_words

if TYPE_CHECKING:
    from diffalign.data.census import Census

__all__ = ["FilterSpec", "Selection", "Sieve", "check_split", "choose"]

Size = tuple[int, int]


@dataclass
class FilterSpec:
    """Which rows are left out; a row that misses several of these is counted under the first.

    Args:
        min_side: smallest side in pixels that every picture has at least.
        same_size: leave out rows whose pictures differ in size.
        max_aspect_difference: largest difference of the logarithm of width / height between two pictures of
            a row; 0.1 is about 10 %.
        min_score_gap: scorer -> smallest difference between the scores of a pair, on the scorer's own scale.
        min_votes: smallest number of votes, all candidates together.
        models: only rows whose pictures are all by one of these; empty: by any.
        without_models: no rows with a picture by one of these.
        drop_ties: leave out pairs with target 0.5.
        drop_unlabelled: leave out pairs without a label.
        drop_nsfw_words: leave out prompts with a word of the list in `data/words.py`.
        drop_overlap: leave out prompts that are in `against`.
    """

    min_side: int = 0
    same_size: bool = False
    max_aspect_difference: float | None = None
    min_score_gap: dict[str, float] = field(default_factory=dict)
    min_votes: int = 0
    models: list[str] = field(default_factory=list)
    without_models: list[str] = field(default_factory=list)
    drop_ties: bool = False
    drop_unlabelled: bool = False
    drop_nsfw_words: bool = False
    drop_overlap: bool = False

    def __post_init__(self) -> None:
        limits: list[tuple[str, float]] = [("min_side", self.min_side), ("min_votes", self.min_votes)]
        limits += [(f"min_score_gap.{name}", gap) for name, gap in self.min_score_gap.items()]
        if self.max_aspect_difference is not None:
            limits.append(("max_aspect_difference", self.max_aspect_difference))
        for name, value in limits:
            if not 0 <= value < math.inf:
                raise UserError(f"filter.{name} is {value}: use 0 or more")
        both = sorted(set(self.models) & set(self.without_models))
        if both:
            raise UserError(f"filter.models and filter.without_models both name {both[0]}: decide for one")

    def reason(self, record: Record, verdict: str, sizes: list[Size]) -> str | None:
        """Returns why a row is left out, None when it passes.

        Args:
            record: the row, its pictures whole.
            verdict: tie, unlabelled or any other (`census.Finding`).
            sizes: (width, height) of its pictures.
        """
        if (self.drop_ties and verdict == "tie") or (self.drop_unlabelled and verdict == "unlabelled"):
            return verdict
        if self.drop_nsfw_words and nsfw_words(record.prompt):
            return "nsfw_words"
        models = {candidate.model for candidate in record.candidates}
        if (self.models and not models <= set(self.models)) or models & set(self.without_models):
            return "model"
        if sum(candidate.votes or 0 for candidate in record.candidates) < self.min_votes:
            return "few_votes"
        return self._size_reason(sizes) or self._score_reason(record)

    def _size_reason(self, sizes: list[Size]) -> str | None:
        if any(min(size) < self.min_side for size in sizes):
            return "small_side"
        if self.same_size and len(set(sizes)) > 1:
            return "two_sizes"
        aspects = [math.log(width / height) for width, height in sizes]
        largest = self.max_aspect_difference
        if largest is not None and aspects and max(aspects) - min(aspects) > largest:
            return "aspect_difference"
        return None

    def _score_reason(self, record: Record) -> str | None:
        for name, gap in self.min_score_gap.items():
            values = [c.scores[name].value for c in record.candidates if name in c.scores]
            if len(record.candidates) != 2:
                return "not_a_pair"
            if len(values) != 2 or not all(map(math.isfinite, values)):
                return "no_score"
            if abs(values[0] - values[1]) < gap:
                return "score_gap"
        return None


@dataclass(frozen=True)
class Sieve:
    """What a row must be to be written: whole, of a kind that the target can hold, and past the filter.

    Args:
        filter: the person's own.
        needs: "pair" where lists cannot be held, "decided" where neither can ties and unlabelled pairs.
        evaluation: normalised prompts that overlap.
    """

    filter: FilterSpec = field(default_factory=FilterSpec)
    needs: Literal["any", "pair", "decided"] = "any"
    evaluation: frozenset[str] = frozenset()

    def reason(
        self, record: Record, verdict: str, sizes: list[Size], problems: tuple[str, ...]
    ) -> str | None:
        """Returns why a row is left out, None when it passes; broken rows never do."""
        broken = (
            record.problem
            or _unwritable(record, paths=self.needs == "any")
            or (problems[0] if problems else None)
        )
        if broken is not None or verdict == "bad_label":
            return broken or verdict
        if not record.candidates or (self.needs != "any" and len(record.candidates) != 2):
            return "not_a_pair"
        if self.needs == "decided" and verdict in ("tie", "unlabelled", "rated"):
            return "tie" if verdict == "tie" else "unlabelled"
        if self.filter.drop_overlap and normalised(record.prompt) in self.evaluation:
            return "overlap"
        return self.filter.reason(record, verdict, sizes)


@dataclass(frozen=True)
class Selection:
    """What becomes of each row.

    Attributes:
        sides: for each row in order 0 (left out), 1 (kept) or 2 (held out).
        dropped: reason -> ids of the rows that are left out.
    """

    sides: bytes
    dropped: dict[str, list[str]]

    def counts(self) -> dict[str, int]:
        """Returns how many rows there are, are kept, held out and left out."""
        count = Counter(self.sides)
        return {
            "rows": len(self.sides),
            "kept": count[1],
            "held_out": count[2],
            "dropped": count[0],
        }


def check_split(split: float) -> None:
    """Raises UserError when `split` is no share of prompts that can be held out."""
    if not 0.0 <= split < 1.0:
        raise UserError(f"split={split}: give the share of prompts to hold out, from 0 to below 1")


def choose(census: Census, *, dedup: str, distance: int, split: float, seed: int) -> Selection:
    """Returns what becomes of the rows of a census that was taken with a Sieve.

    Args:
        census: of all rows.
        dedup: "none"; "exact": of rows with the same prompt and the same pictures, in whatever order, the
            first that passes is kept; "near": also of those with the same normalised prompt whose pictures
            look alike, each with one of the other row. Labels are not compared.
        distance: bits within which pictures look alike.
        split: share of the prompts (normalised) that is held out, each wholly on one side.
        seed: of the split; with it a prompt's side is always the same, whatever the other rows are.
    """
    dropped: dict[str, list[str]] = {}
    sides = bytearray(len(census.ids))
    seen: set[object] = set()
    groups = census.groups(distance) if dedup == "near" else None
    for row, name in enumerate(census.ids):
        reason = census.refused[row]
        if reason is None and dedup != "none":
            keys: list[object] = [bytes(census.row_keys[16 * row : 16 * row + 16])]
            if groups is not None:
                alike = sorted(groups[census.starts[row] : census.starts[row + 1]].tolist())
                keys.append((census.prompt_keys[row], *alike))
            if any(key in seen for key in keys):
                reason = "duplicate" if keys[0] in seen else "near_duplicate"
            else:
                seen.update(keys)
        if reason is not None:
            dropped.setdefault(reason, []).append(name)
            continue
        sides[row] = 1 + _held_out(census.prompt_keys[row], split, seed)
    return Selection(bytes(sides), dropped)


def _held_out(prompt_key: int, split: float, seed: int) -> bool:
    if not split:
        return False
    from diffalign.common import draws  # imports torch

    return draws.uniform(seed, "split", f"{prompt_key:016x}") < split


def _unwritable(record: Record, *, paths: bool) -> str | None:
    """What no file of ours can hold: text that is not UTF-8, and labels that are no numbers.

    `paths`: the file names the pictures, instead of holding their bytes.
    """
    named = [candidate.image.path for candidate in record.candidates if paths]
    try:
        for text in (record.prompt, *(str(path) for path in named if path is not None)):
            text.encode()
    except UnicodeEncodeError:
        return "bad_text"
    labels = [candidate.label for candidate in record.candidates if candidate.label is not None]
    return None if all(map(math.isfinite, labels)) else "bad_label"
