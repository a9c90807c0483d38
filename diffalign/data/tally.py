"""How many records were asked for, used and dropped, and when that is too many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffalign.common.errors import UserError

BAD_REASONS = (
    "bad_text",
    "missing_caption",
    "not_a_pair",
    "not_a_list",
    "bad_label",
    "missing_image",
    "corrupt_image",
    "tiny_image",
)
"""Drop reasons that speak against the data; `tie` and `unlabelled` are normal."""

HINTS = {
    "tie": "data.ties=soft trains ties too, where the objective can",
    "unlabelled": "give labelled rows, or make pairs with diffalign pair",
    "no_score": "score the pictures with the scorer that the objective reads, then pair them again; "
    "rankdpo reads people's ranks with objective.phi=rank",
    "equal_scores": "use a finer scorer, or pictures that differ more",
    "single_picture": "draw several pictures a prompt, then pair how=lists",
    "too_much_cropped": "preprocess.buckets=aspect crops less, preprocess.max_crop=1 keeps all",
    "not_a_pair": "make pairs with diffalign pair how=all_pairs",
    "not_a_list": "make lists with diffalign pair how=lists",
    "missing_image": "the paths of the rows start from the data's own folder, or from data.images",
    "missing_caption": "write the caption beside the picture",
}
"""What helps when most of the dropped records are dropped for one reason."""

NAMED_IN_MESSAGES = 3


@dataclass
class Tally:
    """How many records were asked for, used, and dropped for which reason (with their ids)."""

    what: str = "data"
    asked: int = 0
    used: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, name: str) -> None:
        """Counts the record `name` as dropped."""
        self.dropped.setdefault(reason, []).append(name)

    @property
    def bad(self) -> dict[str, list[str]]:
        """The dropped records that speak against the data, by reason."""
        return {reason: self.dropped[reason] for reason in BAD_REASONS if reason in self.dropped}

    @property
    def bad_share(self) -> float:
        """Bad records / (bad + used), in [0, 1]: ties and unlabelled rows count on neither side."""
        bad = sum(map(len, self.bad.values()))
        return bad / (bad + self.used) if bad else 0.0

    def counts(self) -> dict[str, Any]:
        """Returns `{"asked": n, "used": n, "dropped": {reason: n}}`, for manifests."""
        return {
            "asked": self.asked,
            "used": self.used,
            "dropped": {reason: len(names) for reason, names in self.dropped.items()},
        }

    def reasons(self) -> str:
        """Returns the drop counts in words ("152 tie, 13 corrupt_image"), or "none dropped"."""
        return ", ".join(f"{len(names)} {reason}" for reason, names in self.dropped.items()) or "none dropped"

    def refuse_if_empty(self) -> None:
        """Raises UserError when no record was usable."""
        if self.used:
            return
        hint = _hint(self.dropped)
        hint = hint and f": {hint}"
        raise UserError(f"{self.what}: none of {self.asked} rows is usable ({self.reasons()}){hint}")

    def refuse_if_too_many(self, max_share: float) -> None:
        """Raises UserError when the share of bad records is above `max_share` (in [0, 1])."""
        share = self.bad_share
        if share <= max_share:
            return
        groups = [f"{len(names)} {reason} ({_some(names)})" for reason, names in self.bad.items()]
        fine = {reason: names for reason, names in self.dropped.items() if reason not in BAD_REASONS}
        others = [f"{len(names)} {reason}" for reason, names in fine.items()]
        if others and not self.used:  # repairing the bad rows would not be enough
            groups.append(f"and no other is usable, {' and '.join(others)}")
        raise UserError(
            f"{self.what}: {share:.1%} of the rows that could be used are bad, "
            f"more than max_bad_share={max_share:g}: "
            f"{', '.join(groups)}; {_hint(self.bad) or 'repair the data'} or raise data.max_bad_share"
        )


def _hint(dropped: Mapping[str, list[str]]) -> str:
    """What helps against the reason that most of the dropped records have; "" where nothing is known."""
    most = max(dropped, key=lambda reason: len(dropped[reason]), default="")
    return HINTS.get(most, "")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMED_IN_MESSAGES])
    return f"{shown}, ..." if len(names) > NAMED_IN_MESSAGES else shown
