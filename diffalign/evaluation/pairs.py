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
    """

    id: str
    prompt_id: str
    prompt: str
    seed: int | None
    image: ImageRef
    scores: dict[str, Score] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

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
        UserError: a row without prompt, with a score that is no number, or with a prompt and seed that an
            earlier row has; `name` is the file that the error names.
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
        shot = Shot(
            id=str(row.get("id", index)),
            prompt_id=str(row.get("prompt_id", row["prompt"])),
            prompt=row["prompt"],
            seed=_seed(row.get("seed"), where),
            image=ImageRef(path=folder / row["image"], name=row["image"]),
            scores=scores,
            errors={str(key): str(text) for key, text in (row.get("errors") or {}).items()},
        )
        if shot.key in shots:
            raise UserError(
                f"{where}: a second picture of prompt {shot.prompt_id} with seed {shot.seed}: keep one, the "
                "seeds of a prompt must differ"
            )
        shots[shot.key] = shot
    return list(shots.values())


def match(base: Sequence[Shot], aligned: Sequence[Shot]) -> list[Pair]:
    """Returns the pairs in the order of `base`.

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
                f"prompt {shot.prompt_id} ('{_cut(shot.prompt)}') is in base, not in aligned: {again}"
            )
        text = texts[shot.prompt_id]
        if text != shot.prompt:
            both = f"'{_cut(shot.prompt)}' in base, '{_cut(text)}' in aligned"
            raise UserError(f"prompt {shot.prompt_id} is {both}: {again}")
        other = others.pop(shot.key, None)
        if other is None:
            raise UserError(
                f"seed {shot.seed} of prompt {shot.prompt_id} is in base, not in aligned: {again}"
            )
        pairs.append(Pair(shot, other))
    if others:
        shot = next(iter(others.values()))
        known = {pair.base.prompt_id for pair in pairs}
        what = f"seed {shot.seed} of prompt" if shot.prompt_id in known else "prompt"
        raise UserError(
            f"{what} {shot.prompt_id} ('{_cut(shot.prompt)}') is in aligned, not in base: {again}"
        )
    if not pairs:
        raise UserError("base and aligned hold no picture: give the outputs of generate or score")
    return pairs


def first_prompts(pairs: Sequence[Pair], limit: int | None) -> list[Pair]:
    """Returns the pairs of the first `limit` prompts (all without a limit)."""
    kept = list(dict.fromkeys(pair.base.prompt_id for pair in pairs))[:limit]
    return [pair for pair in pairs if pair.base.prompt_id in set(kept)]


def _seed(value: Any, where: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise UserError(f"{where}: seed is {value!r}, expected a whole number")
    return value


def _cut(text: str) -> str:
    return text if len(text) <= 50 else text[:47] + "..."
