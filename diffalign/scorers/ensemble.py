"""Several scorers as one: a sum on a common footing, or a vote among the pictures of a prompt.

What is summed (`how`), x being a member's value (its negative, where less is better):
    weighted   x as it is; the scales must suit one another
    zscore     (x - center) / spread
    bounded    log sigmoid((x - center) / spread): below 0, and nearly flat above the center, so that a member
               that is content adds nothing more and none can outweigh the others (Wang et al. 2024, arXiv
               2402.00742, section 3, with the center in the place of their reference)
What is voted on, among the pictures of one prompt (see `Scorer.relative`):
    rank       share of the other pictures that a member puts below this one, ties half
    votes      1 for the picture that a member puts first, shared by those that tie
Values are sums by `weights`, of rank and votes divided by their total: 0 to 1. A picture that a member has no
value for has none. Parts: each member's own value.

Convention: center and spread are numbers that are given, never those of the batch, so that a score does not
depend on its neighbours; `statistics` takes mean and standard deviation from the summary of a scored folder.

Scale: the name of `how`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from diffalign.common.config import make_many
from diffalign.common.errors import UserError, unknown
from diffalign.scorers._base import Scorer, Scores, score_all

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diffalign.scorers._base import Images
    from diffalign.scorers._memo import PictureMemo

SUMS = ("weighted", "zscore", "bounded")
VOTES = ("rank", "votes")
SUMMARY = "summary.json"


@dataclass(kw_only=True)
class Plugin(Scorer):
    """Several scorers as one.

    Args:
        scorers: the members: label -> options, as the key `scorers` of `score`.
        how: weighted | zscore | bounded | rank | votes.
        weights: label -> weight, 1 for those that are left out.
        center: label -> what counts as ordinary, for zscore and bounded.
        spread: label -> one step up, for zscore and bounded.
        statistics: a folder written by `score` with the same labels: its means and standard deviations are
            center and spread of members that give none.
    """

    scorers: dict[str, Any]
    how: Literal["weighted", "zscore", "bounded", "rank", "votes"] = "weighted"
    weights: dict[str, float] = field(default_factory=dict)
    center: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    statistics: str | None = None

    def __post_init__(self) -> None:
        self._check_options(how=(*SUMS, *VOTES))
        self._members: dict[str, Scorer] = make_many("scorers", self.scorers)
        if not self._members:
            raise UserError("scorer ensemble has no members: give scorers: {clip: {...}, aesthetic: {}}")
        for name in ("weights", "center", "spread"):
            for label, value in getattr(self, name).items():
                if label not in self._members:
                    raise unknown(f"member in {name} of scorer ensemble", label, self._members)
                if name == "spread" and not value > 0:
                    raise UserError(f"scorer ensemble: spread of {label} is {value}: give a number above 0")
        if any(member.relative for member in self._members.values()) and self.how in ("zscore", "bounded"):
            raise UserError(f"scorer ensemble: how={self.how} needs members whose values hold by themselves")
        if self.how not in ("zscore", "bounded") and (self.center or self.spread or self.statistics):
            raise UserError(
                f"scorer ensemble: how={self.how} reads no center, spread or statistics: leave out"
            )
        known = sorted(self.center.keys() & self.spread.keys()) if self.statistics is not None else []
        if known:
            raise UserError(
                f"scorer ensemble: center and spread of {known[0]} are given, and statistics too: keep one"
            )
        if sum(self._weight(label) for label in self._members) == 0 and self.how in VOTES:
            raise UserError("scorer ensemble: all weights are 0: give one above 0")
        self.scale = self.how
        members = self._members.values()  # needs of an instance: its members decide
        self.needs = frozenset().union(*(member.needs for member in members))  # type: ignore[misc]
        self.may_use = frozenset().union(*(member.may_use for member in members))  # type: ignore[misc]

    @property
    def differentiable(self) -> bool:
        """Where all members are, and values are summed."""
        return self.how in SUMS and all(member.differentiable for member in self._members.values())

    @property
    def relative(self) -> bool:
        """Where members vote, or judge groups themselves."""
        return self.how in VOTES or any(member.relative for member in self._members.values())

    def load(self, device: str = "cpu") -> Self:
        """Returns this scorer with all members loaded.

        Raises:
            UserError: a member without center or spread where they are needed.
        """
        self._footing = {label: self._footing_of(label) for label in self._members}
        for member in self._members.values():
            member.load(device)
        self.version = "+".join(self._version_of(label) for label in self._members)
        return self

    def _version_of(self, label: str) -> str:
        center, spread = self._footing[label]
        footing = f"({center!r}, {spread!r})" if self.how in ("zscore", "bounded") else ""
        return f"{label}:{self._members[label].version}{footing}"

    def modules(self) -> list[torch.nn.Module]:
        """Returns the networks of all members."""
        return [module for member in self._members.values() for module in member.modules()]

    def memos(self) -> list[PictureMemo]:
        """Returns the members' memos."""
        return [memo for member in self._members.values() for memo in member.memos()]

    def prepare_ahead(self, images: list[Image.Image]) -> None:
        """Prepares for all members."""
        for member in self._members.values():
            member.prepare_ahead(images)

    def _weight(self, label: str) -> float:
        return self.weights.get(label, 1.0)

    def _footing_of(self, label: str) -> tuple[float, float]:
        """Returns center and spread of a member; 0 and 1 where none are used."""
        if self.how not in ("zscore", "bounded"):
            return 0.0, 1.0
        known = self._statistics_of(label)
        found = self.center.get(label, known.get("mean")), self.spread.get(label, known.get("std"))
        if found[0] is None or found[1] is None or not found[1] > 0:
            raise UserError(
                f"scorer ensemble: how={self.how} needs center and spread of {label}: give both, or "
                "statistics=FOLDER of a score run with it"
            )
        return float(found[0]), float(found[1])

    def _statistics_of(self, label: str) -> dict[str, Any]:
        """Returns mean and std of a label, as the summary of a scored folder says; {} without one."""
        from diffalign.common import files

        if self.statistics is None:
            return {}
        summary = files.read_json(Path(self.statistics) / SUMMARY)
        entry: dict[str, Any] = (summary.get("scorers") or {}).get(label) or {}
        if entry and entry.get("scale") != self._members[label].scale:
            raise UserError(
                f"scorer ensemble: {self.statistics} has {label} on the scale {entry.get('scale')}, the "
                f"member is on {self._members[label].scale}: score the folder anew"
            )
        return entry

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        return self._combined(images, prompts, context, self._summed)

    def _score_group(
        self, images: Images, prompt: str | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        prompts = None if prompt is None else [prompt] * len(images)
        return self._combined(images, prompts, context, self._summed if self.how in SUMS else self._voted)

    def _combined(
        self,
        images: Images,
        prompts: list[str] | None,
        context: list[Mapping[str, Any]] | None,
        combine: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    ) -> Scores:
        """Returns the members' scores as one, NaN where a member has none."""
        found = score_all(self._members, images, prompts, context=context)
        signed = {
            label: scores.values if self._members[label].higher_is_better else -scores.values
            for label, scores in found.items()
        }
        errors: list[str | None] = []
        for place in range(len(images)):
            said = [f"{label}: {s.errors[place]}" for label, s in found.items() if s.errors[place]]
            if self.how in VOTES and len(images) == 1:
                said.append("the only picture of its prompt: there is nothing to vote on")
            errors.append("; ".join(said) or None)
        parts = {label: scores.values.detach() for label, scores in found.items()}
        return Scores(combine(signed), parts=parts, errors=errors)

    def _summed(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        import torch
        import torch.nn.functional as F

        terms = []
        for label, value in values.items():
            center, spread = self._footing[label]
            sign = 1.0 if self._members[label].higher_is_better else -1.0
            standing = (value - sign * center) / spread
            terms.append(
                self._weight(label) * (F.logsigmoid(standing) if self.how == "bounded" else standing)
            )
        return torch.stack(terms).sum(0)

    def _voted(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the share [k] that each picture of a group has of the members' votes or wins."""
        import torch

        share_of = first_places if self.how == "votes" else shares_beaten
        terms = [self._weight(label) * share_of(value) for label, value in values.items()]
        return torch.stack(terms).sum(0) / sum(self._weight(label) for label in values)


def first_places(values: torch.Tensor) -> torch.Tensor:
    """Returns [k]: 1 for the highest, shared by those that tie; NaN for what has no value or no rival."""
    first = (values == values.nan_to_num(-math.inf).max()).float()
    return _with_rivals(first / first.sum(), values)


def shares_beaten(values: torch.Tensor) -> torch.Tensor:
    """Returns [k]: the share of the others that are lower, ties half; NaN without a value or a rival."""
    beats = (values[:, None] > values).float() + 0.5 * (values[:, None] == values).float()
    return _with_rivals((beats.sum(1) - 0.5) / (values.isfinite().sum() - 1), values)


def _with_rivals(share: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    known = values.isfinite()
    return share.masked_fill(~known | (known.sum() < 2), math.nan)
