"""What decides between two pictures of a prompt: one scorer by its margin, or several by vote.

Ranks or votes that people gave decide like one scorer; their margin counts ranks or votes.

Of two pictures every scorer votes for the one that it scores higher. A difference below the scorer's margin,
and always an exact tie, is a vote for neither, and half a vote for each in the share of votes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.common.errors import UserError, unknown
from diffalign.stages._grouping import Picture


@dataclass(frozen=True)
class Judges:
    """The deciding scorers.

    Attributes:
        margins: scorer -> the smallest difference on its scale that is a preference.
    """

    margins: dict[str, float]

    def votes(self, first: Picture, second: Picture) -> tuple[int, int]:
        """Returns how many scorers prefer the first picture, and how many the second."""
        won = lost = 0
        for name, margin in self.margins.items():
            lead = first.values[name] - second.values[name]
            if lead != 0.0 and abs(lead) >= margin:
                won, lost = won + (lead > 0), lost + (lead < 0)
        return won, lost

    def share(self, first: Picture, second: Picture) -> float:
        """Returns the first picture's share of the votes, in [0, 1]; exactly 0.5 with as many for each."""
        won, lost = self.votes(first, second)
        return 0.5 if won == lost else (won + (len(self.margins) - won - lost) / 2) / len(self.margins)

    def judged(self, first: Picture, second: Picture, ties: str) -> list[dict[str, float]] | None:
        """Returns what the two candidates are given; None for a tie that is to be dropped.

        That is `label`: with ties=drop 1 and 0 by the majority, with ties=soft the shares of the votes; and
        `votes` where several scorers decide, those that count half left out.
        """
        won, lost = self.votes(first, second)
        if won == lost and ties == "drop":
            return None
        share = self.share(first, second)
        label = share if ties == "soft" else float(share > 0.5)
        given: list[dict[str, float]] = [{"label": label}, {"label": 1.0 - label}]
        if len(self.margins) > 1:
            given[0]["votes"], given[1]["votes"] = won, lost
        return given

    def standings(self, pictures: Sequence[Picture]) -> list[float]:
        """Returns for each picture how many of the others it beats, ties half, summed over the scorers.

        Margins do not count here. Of one scorer this is the order of its values; of several it is that of
        Copeland's method with every scorer as a voter (ties half).
        """
        return [
            sum(
                0.5 if mine.values[name] == other.values[name] else mine.values[name] > other.values[name]
                for name in self.margins
                for place, other in enumerate(pictures)
                if place != own
            )
            for own, mine in enumerate(pictures)
        ]

    def ranked(self, pictures: Sequence[Picture]) -> list[dict[str, float]]:
        """Returns what the candidates of a list are given: `rank`, and of several scorers `votes`.

        The best has rank 1; equal ones share the mean of their places (1, 2.5, 2.5, 4). A picture's votes are
        how often a scorer puts it above another picture of the list.
        """
        points = self.standings(pictures)
        given: list[dict[str, float]] = [
            {"rank": 1.0 + sum(other > own for other in points) + (points.count(own) - 1) / 2}
            for own in points
        ]
        if len(self.margins) > 1:
            for place, picture in enumerate(pictures):
                others = [*pictures[:place], *pictures[place + 1 :]]
                given[place]["votes"] = sum(self.votes(picture, other)[0] for other in others)
        return given


def judges_of(names: Sequence[str], margin: float | Mapping[str, float]) -> Judges:
    """Returns the judges with their margins.

    Raises:
        UserError: one number for scorers of several scales, or a margin for a scorer that does not decide.
    """
    if not isinstance(margin, Mapping):
        if margin > 0.0 and len(names) > 1:
            raise UserError(
                f"margin={margin} is one number for {len(names)} scorers: give each its own, "
                f"margin={{{names[0]}: {margin}}}"
            )
        return Judges(dict.fromkeys(names, float(margin)))
    for name in margin:
        if name not in names:
            raise unknown("scorer in margin", name, names)
    return Judges({name: float(margin.get(name, 0.0)) for name in names})


def deciding_names(known: Sequence[str], by: str | Sequence[str] | None, where: Any) -> list[str]:
    """Returns the scorers that decide.

    Raises:
        UserError: one is not among the `known` ones of `where`, stands there twice, or several are known and
            none is named.
    """
    if by is None:
        if not known:
            raise UserError(
                f"{where} holds no scores: score the pictures first, or give scorers=[...] with data="
            )
        if len(known) > 1:
            raise UserError(
                f"{where} holds several scorers: choose with by= one of {', '.join(known)}, or a list of "
                "them, which vote"
            )
        return list(known)
    names = [by] if isinstance(by, str) else list(by)
    if not names:
        raise UserError("by=[] names no scorer: give one, or a list of them")
    for name in names:
        if name not in known:
            raise unknown(f"scorer of {where}", name, known)
        if names.count(name) > 1:
            raise UserError(f"by names '{name}' twice: a scorer has one vote")
    return names
