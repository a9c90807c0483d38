"""Pictures of base and aligned model, matched: the same prompt and the same seed on both sides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.common.errors import UserError
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Score

MOST = 1e100
"""Size of a score that still is one."""


@dataclass(frozen=True)
class Shot:
    """One scored picture.

    Attributes:
        id: of its row.
        prompt_id: of its prompt; the prompt itself where the row has no id of it.
        prompt: what was asked for.
        seed: what its noise was drawn from; None where unknown.
        image: the picture.
        scores: scorer -> score; `extra["parts"]` holds sub-scores.
        errors: scorer -> why its score is NaN.
        meta: what the file of prompts says beside the prompt.
    """

    id: str
    prompt_id: str
    prompt: str
    seed: int | None
    image: ImageRef
    scores: dict[str, Score] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int | None]:
        """What the pictures of a pair share."""
        return self.prompt_id, self.seed

    def value(self, scorer: str) -> float:
        """Returns the score under `scorer`, NaN where there is none."""
        score = self.scores.get(scorer)
        return math.nan if score is None else score.value

    def part(self, scorer: str, name: str) -> float:
        """Returns a sub-score, NaN where there is none."""
        score = self.scores.get(scorer)
        value = (score.extra.get("parts") or {}).get(name) if score is not None else None
        return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Pair:
    """The same prompt and seed, drawn by both models."""

    base: Shot
    aligned: Shot


def read_shots(rows: Sequence[Mapping[str, Any]], folder: Path, name: str) -> list[Shot]:
    """Returns the rows of a scores.jsonl (or images.jsonl) as shots; picture paths start from `folder`.

    Raises:
        UserError: a row without prompt, with a score or sub-score that is no number or above MOST, or with a
            prompt and seed that an earlier row has; `name` is the file that the error names.
    """
    shots: dict[tuple[str, int | None], Shot] = {}
    for index, row in enumerate(rows):
        where = f"{name}, row {index}"
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("image"), str):
            raise UserError(f"{where} has no prompt or no image: give the output of generate or score")
        scores = {
            str(scorer): Score.from_dict(entry, f"{where}, score {scorer}")
            for scorer, entry in (row.get("scores") or {}).items()
        }
        _refuse_rubbish(scores, where)
        shot = Shot(
            id=str(row.get("id", index)),
            prompt_id=prompt_key(row),
            prompt=row["prompt"],
            seed=_seed(row.get("seed"), where),
            image=ImageRef(path=folder / row["image"], name=row["image"]),
            scores=scores,
            errors={str(key): str(text) for key, text in (row.get("errors") or {}).items()},
            meta=dict(row.get("meta") or {}),
        )
        if shot.key in shots:
            raise UserError(
                f"{where}: a second picture of prompt {shot.prompt_id} with seed {shot.seed}: keep one, the "
                "seeds of a prompt must differ"
            )
        shots[shot.key] = shot
    return list(shots.values())


def match(base: Sequence[Shot], aligned: Sequence[Shot], name: str = "aligned") -> list[Pair]:
    """Returns the pairs in the order of `base`; `name` is what messages call the other side.

    Raises:
        UserError: a prompt or seed is on one side only, or a prompt's text differs; names the first one.
    """
    others = {shot.key: shot for shot in aligned}
    texts = {shot.prompt_id: shot.prompt for shot in aligned}
    again = "generate both with the same prompts and seeds"
    pairs = []
    for shot in base:
        if shot.prompt_id not in texts:
            raise UserError(
                f"prompt {shot.prompt_id} ('{_cut(shot.prompt)}') is in base, not in {name}: {again}"
            )
        text = texts[shot.prompt_id]
        if text != shot.prompt:
            both = f"'{_cut(shot.prompt)}' in base, '{_cut(text)}' in {name}"
            raise UserError(f"prompt {shot.prompt_id} is {both}: {again}")
        other = others.pop(shot.key, None)
        if other is None:
            raise UserError(f"seed {shot.seed} of prompt {shot.prompt_id} is in base, not in {name}: {again}")
        pairs.append(Pair(shot, other))
    if others:
        shot = next(iter(others.values()))
        known = {pair.base.prompt_id for pair in pairs}
        what = f"seed {shot.seed} of prompt" if shot.prompt_id in known else "prompt"
        raise UserError(f"{what} {shot.prompt_id} ('{_cut(shot.prompt)}') is in {name}, not in base: {again}")
    if not pairs:
        raise UserError(f"base and {name} hold no picture: give the outputs of generate or score")
    return pairs


def prompt_key(row: Mapping[str, Any]) -> str:
    """Returns what the rows of a prompt share: its id, the prompt itself where they have none."""
    found = row.get("prompt_id")
    return str(row.get("prompt") if found is None else found)


def _refuse_rubbish(scores: Mapping[str, Score], where: str) -> None:
    """Raises UserError for scores that cannot be averaged; infinite ones are left out later, like NaN."""
    for name, score in scores.items():
        parts = score.extra.get("parts") or {}
        if not isinstance(parts, Mapping) or not all(
            isinstance(p, int | float | None) for p in parts.values()
        ):
            raise UserError(f"{where}, score {name}: its 'parts' are no numbers by name: score again")
        if any(MOST < abs(value or 0) < math.inf for value in (score.value, *parts.values())):
            raise UserError(
                f"{where}, score {name}: a size above {MOST:g}, no scorer gives that: score again"
            )


def _seed(value: Any, where: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise UserError(f"{where}: seed is {value!r}, expected a whole number")
    return value


def _cut(text: str) -> str:
    return text if len(text) <= 50 else text[:47] + "..."
