"""Base against aligned on the same prompts and seeds: who wins, by how much, at which price."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.common.errors import UserError
from diffalign.common.statistics import Interval, paired_difference, sign_test, win_rate
from diffalign.evaluation.categories import MOST_COLUMNS, Breakdown, breakdown, category_columns
from diffalign.evaluation.drift import DriftMeter, Embedder
from diffalign.evaluation.pairs import Pair

ROUNDING = 1e-6
"""Differences of prompts below this share of the largest difference of a pair are rounding."""

NOT_EMBEDDED = "embedding distance and diversity are not measured: give embedder=clip embedder.path=..."


@dataclass
class Reward:
    """One scorer's verdict.

    Attributes:
        scale, version, higher_is_better: of the scorer.
        win_rate: how often aligned beats base on one prompt and seed, ties half; interval over prompts.
        wins, ties, losses: the counts behind it.
        sign_p: two-sided sign test that wins and losses are equally likely, on the mean difference of each
            prompt (the seeds of a prompt are no independent trials).
        base, aligned: mean scores; base_median, aligned_median: their medians.
        difference: mean of aligned - base, interval over prompts.
        prompts: different prompts behind it.
        dropped: pairs left out because a score is NaN.
        parts: sub-score -> {base, aligned, difference}, on the pairs that have it.
    """

    scale: str
    version: str
    higher_is_better: bool
    win_rate: Interval
    wins: int
    ties: int
    losses: int
    sign_p: float
    base: float
    aligned: float
    base_median: float
    aligned_median: float
    difference: Interval
    prompts: int
    dropped: int
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Report:
    """Everything that `evaluate` says about two sets of pictures.

    Attributes:
        prompts: number of different prompts.
        seeds: the seeds, sorted.
        pairs: number of pairs.
        rewards: scorer -> verdict; the first is the one that pictures are chosen by.
        drift: measure -> numbers, see `DriftMeter.report`.
        unreadable: ids of pairs of which a picture could not be decoded.
        notes: what else the reader must know.
        categories: column of the prompts' file -> value -> verdicts, see `breakdown`.
    """

    prompts: int
    seeds: list[int | None]
    pairs: int
    rewards: dict[str, Reward]
    drift: dict[str, Any]
    unreadable: list[str]
    notes: list[str]
    categories: Breakdown = field(default_factory=dict)

    def as_text(self, model: str = "aligned") -> str:
        """Returns the report on `model` as tables for a terminal."""
        from diffalign.evaluation._table import report_lines

        return "\n".join(report_lines(self, model))


def compare(
    pairs: Sequence[Pair],
    *,
    embedder: Embedder | None = None,
    lower_is_better: frozenset[str] = frozenset(),
    tie_epsilon: float = 0.0,
    level: float = 0.95,
    seed: int = 0,
    batch_size: int = 16,
) -> Report:
    """Returns the report on matched pairs; every picture is opened once, for the drift.

    Args:
        pairs: from `match`.
        embedder: gives the features for embedding distance and diversity.
        lower_is_better: scorers, beside those whose rows say so, of which a lower score wins.
        tie_epsilon: scores that differ by at most this are a tie.
        level: of the intervals.
        seed: of the bootstrap.
        batch_size: pictures embedded at a time.

    Raises:
        UserError: the sides have no scorer in common, were scored on different scales or by different
            versions, or no pair has both scores.
    """
    rewards = verdicts(
        pairs, lower_is_better=lower_is_better, tie_epsilon=tie_epsilon, level=level, seed=seed
    )
    drift, unreadable = _drift(pairs, embedder, batch_size, {"level": level, "seed": seed})
    notes = [] if embedder is not None else [NOT_EMBEDDED]
    alone = sorted({n for p in pairs for shot in (p.base, p.aligned) for n in shot.scores} - set(rewards))
    if alone:
        notes.append(f"on one side only, not compared: {', '.join(alone)}")
    left_out = list(category_columns(pairs))[MOST_COLUMNS:]
    if left_out:
        notes.append(f"not broken down by: {', '.join(left_out)}")
    return Report(
        prompts=len({pair.base.prompt for pair in pairs}),
        seeds=sorted({pair.base.seed for pair in pairs}, key=lambda s: (s is not None, s or 0)),
        pairs=len(pairs),
        rewards=rewards,
        drift=drift,
        unreadable=unreadable,
        notes=notes,
        categories=breakdown(pairs, rewards, tie_epsilon=tie_epsilon, seed=seed),
    )


def verdicts(
    pairs: Sequence[Pair],
    *,
    lower_is_better: frozenset[str] = frozenset(),
    tie_epsilon: float = 0.0,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Reward]:
    """Returns scorer -> verdict on matched pairs; arguments and errors as of `compare`."""
    settings = {"level": level, "seed": seed}
    return {
        name: _reward(pairs, name, name in lower_is_better, tie_epsilon, settings)
        for name in common_scorers(pairs)
    }


def common_scorers(pairs: Sequence[Pair]) -> list[str]:
    """Returns the scorers of both sides, in the order of the rows. UserError when there is none."""
    sides = [dict.fromkeys(n for p in pairs for n in getattr(p, s).scores) for s in ("base", "aligned")]
    common = [name for name in sides[0] if name in sides[1]]
    if not common:
        found = " and ".join(", ".join(side) or "none" for side in sides)
        raise UserError(f"base and aligned have no scorer in common (they have {found}): score both with one")
    return common


def _reward(
    pairs: Sequence[Pair], name: str, lower: bool, tie_epsilon: float, settings: dict[str, Any]
) -> Reward:
    """Returns the verdict of one scorer."""
    scale, version, higher = _kind(pairs, name)
    higher = higher and not lower
    base_all, aligned_all = (_values(pairs, side, name) for side in ("base", "aligned"))
    good = np.isfinite(base_all) & np.isfinite(aligned_all)
    if not good.any():
        errors = [e for p in pairs for e in (p.base.errors.get(name), p.aligned.errors.get(name)) if e]
        because = f" (first error: {errors[0]})" if errors else ""
        raise UserError(f"no pair has both {name} scores{because}: score base and aligned again")
    base, aligned = base_all[good], aligned_all[good]
    prompts = [pair.base.prompt for pair, has in zip(pairs, good, strict=True) if has]
    sign = 1.0 if higher else -1.0
    gains = sign * (aligned - base)
    decided = np.where(np.abs(gains) <= tie_epsilon, 0.0, gains)
    per_prompt = _group_means(gains, prompts)
    # The mean of +1/3 and -1/3 is not exactly 0 in floating point, but it is a tie.
    same = max(tie_epsilon, ROUNDING * float(np.abs(gains).max()))
    return Reward(
        scale=scale,
        version=version,
        higher_is_better=higher,
        win_rate=win_rate(sign * aligned, sign * base, tie_epsilon=tie_epsilon, clusters=prompts, **settings),
        wins=int((decided > 0).sum()),
        ties=int((decided == 0).sum()),
        losses=int((decided < 0).sum()),
        sign_p=sign_test(per_prompt, np.zeros(len(per_prompt)), tie_epsilon=same),
        base=float(base.mean()),
        aligned=float(aligned.mean()),
        base_median=float(np.median(base)),
        aligned_median=float(np.median(aligned)),
        difference=paired_difference(aligned, base, clusters=prompts, **settings),
        prompts=len(per_prompt),
        dropped=int((~good).sum()),
        parts=_parts(pairs, name, settings),
    )


def _kind(pairs: Sequence[Pair], name: str) -> tuple[str, str, bool]:
    """Returns (scale, version, higher is better) of a scorer. UserError when the scores disagree."""
    kinds: dict[tuple[str, str, bool], str] = {}
    for pair in pairs:
        for side, shot in (("base", pair.base), ("aligned", pair.aligned)):
            if (score := shot.scores.get(name)) is not None:
                better = bool(score.extra.get("higher_is_better", True))
                kinds.setdefault((score.scale, score.version, better), f"{side} {shot.id}")
    if len(kinds) > 1:
        said = "; ".join(f"{who}: {k[0]} {k[1]}" for k, who in kinds.items())
        raise UserError(f"scores of {name} are not comparable ({said}): score both sides with one scorer")
    return next(iter(kinds))


def _parts(pairs: Sequence[Pair], name: str, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns sub-score -> means and difference, each on the pairs that have it on both sides."""
    shots = [shot for pair in pairs for shot in (pair.base, pair.aligned) if name in shot.scores]
    names = dict.fromkeys(p for shot in shots for p in shot.scores[name].extra.get("parts") or {})
    found = {}
    for part in names:
        base = np.array([pair.base.part(name, part) for pair in pairs])
        aligned = np.array([pair.aligned.part(name, part) for pair in pairs])
        good = np.isfinite(base) & np.isfinite(aligned)
        if good.any():
            prompts = [pair.base.prompt for pair, has in zip(pairs, good, strict=True) if has]
            gap = paired_difference(aligned[good], base[good], clusters=prompts, **settings)
            means = {"base": float(base[good].mean()), "aligned": float(aligned[good].mean())}
            found[part] = {**means, "difference": gap}
    return found


def _drift(
    pairs: Sequence[Pair], embedder: Embedder | None, batch_size: int, settings: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the drift measures and the ids of pairs with a picture that cannot be read."""
    from diffalign.common.progress import Progress
    from diffalign.data.pictures import BadImage

    meter = DriftMeter(embedder, batch_size=batch_size)
    unreadable = []
    with Progress("drift", len(pairs), "pairs") as progress:
        for pair in pairs:
            try:
                meter.add(pair.base.image.open(), pair.aligned.image.open(), pair.base.prompt)
            except BadImage:
                unreadable.append(pair.base.id)
            progress.update()
    return meter.report(**settings), unreadable


def _values(pairs: Sequence[Pair], side: str, name: str) -> NDArray[np.float64]:
    return np.array([getattr(pair, side).value(name) for pair in pairs], dtype=np.float64)


def _group_means(values: NDArray[np.float64], groups: Sequence[str]) -> NDArray[np.float64]:
    """Returns the mean of the values of each group, in order of first appearance."""
    members: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(float(value))
    return np.array([math.fsum(found) / len(found) for found in members.values()])
