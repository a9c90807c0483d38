"""Which of the policy's own pictures are good: a scorer's values or features, put to an objective."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.common.errors import UserError
from diffalign.common.plugins import plugin_name
from diffalign.data.pictures import PICTURE_SUFFIXES, ImageRef
from diffalign.data.prompts import load_prompts
from diffalign.objectives._base import OnPolicyObjective


def check_reward(objective: OnPolicyObjective, scorer: Any) -> None:
    """Refuses, before anything is loaded, a scorer or exemplars that the reward cannot use.

    Raises:
        UserError: no features where the reward is of exemplars or sets, exemplars that are too few, or values
            that hold among the pictures of a prompt only.
    """
    name = plugin_name(scorer)
    if scorer.relative:
        raise UserError(
            f"scorer {name} judges pictures of a prompt against one another, which are not drawn together: "
            "use one whose values hold by themselves"
        )
    if objective.reward == "instance":
        return
    if not hasattr(scorer, "embed_images"):
        raise UserError(
            f"objective.reward={objective.reward} needs features, and scorer {name} has none: use one that "
            "embeds pictures, e.g. clip"
        )
    if objective.exemplars is None:
        return
    pictures, texts = _exemplars(objective.exemplars)
    if texts and not hasattr(scorer, "embed_texts"):
        raise UserError(
            f"objective.exemplars={objective.exemplars} holds texts, and scorer {name} reads pictures only: "
            "give a folder of pictures"
        )
    least = objective.min_exemplars
    if len(pictures) + len(texts) < least:
        what = "texts" if texts else "pictures"
        raise UserError(
            f"objective.exemplars={objective.exemplars} holds {len(pictures) + len(texts)} {what}: give "
            f"{least} or more"
        )


class Labeller:
    """Rewards of the pictures of a rollout.

    `look` sees this process's pictures; what it gives is gathered and goes to `targets`.

    Args:
        objective: says which reward; `check_reward` has passed it.
        scorer: gives values, or features where the reward is of exemplars or sets; loaded.
        batch_size: exemplars embedded at once.
    """

    def __init__(self, objective: OnPolicyObjective, scorer: Any, *, batch_size: int = 32) -> None:
        from diffalign.scorers import exemplar_reward, set_reward

        self._objective, self._scorer = objective, scorer
        self._set_reward: Any = None
        self._exemplar_reward: Any = None
        if objective.reward == "instance":
            return
        exemplars = None
        if objective.exemplars is not None:
            exemplars = self._embed(*_exemplars(objective.exemplars), batch_size)
        if objective.reward == "set":
            self._set_reward = set_reward(str(objective.measure), exemplars)
        else:
            self._exemplar_reward = exemplar_reward(str(objective.measure), exemplars)

    def look(self, pictures: list[Any], prompts: list[str], about: Sequence[Mapping[str, Any]]) -> Tensor:
        """`[B]` rewards, higher being better, or `[B, d]` features where the reward is of a set; float64.

        `about` is what the prompts' file says beside each: its `context`, or where a scorer needs one and
        there is none, all of it.

        Raises:
            UserError: the scorer has no value for a picture; names its prompt.
        """
        if self._objective.reward != "instance":
            features = self._features(pictures)
            for row, prompt in zip(features, prompts, strict=True):
                self._refuse_unless(bool(row.isfinite().all()), "features that are not finite", prompt)
            if self._set_reward is not None:
                return features.double()
            return torch.as_tensor(self._exemplar_reward(features)).double()
        contexts = None
        if self._scorer.takes("context"):
            needed = "context" in self._scorer.needs
            contexts = [meta.get("context") or (meta if needed else {}) for meta in about]
        scores = self._scorer.score(pictures, prompts, context=contexts)
        values: Tensor = scores.values.double().cpu()
        for value, prompt, error in zip(values.tolist(), prompts, scores.errors, strict=True):
            self._refuse_unless(math.isfinite(value), str(value), prompt, error)
        return values if self._scorer.higher_is_better else -values

    def _refuse_unless(self, usable: bool, given: str, prompt: str, error: str | None = None) -> None:
        if not usable:
            raise UserError(
                f"scorer {plugin_name(self._scorer)} gives {given} for a picture of {prompt!r}"
                f"{f' ({error})' if error else ''}: leave the prompt out, or use another scorer"
            )

    def _features(self, pictures: list[Any]) -> Tensor:
        """`[B, d]` features, or `[B, p, d]` of p views of each picture."""
        if not self._objective.views:
            features: Tensor = self._scorer.embed_images(pictures)
            return features
        pieces = [piece for picture in pictures for piece in _views(picture)]
        return self._scorer.embed_images(pieces).unflatten(0, (len(pictures), -1))

    def _embed(self, pictures: list[Path], texts: list[str], batch_size: int) -> Tensor:
        """Features `[m, d]` float64 of exemplars; every view of a picture is one."""
        rows = []
        for start in range(0, len(pictures), batch_size):
            opened = [ImageRef(path=path).open() for path in pictures[start : start + batch_size]]
            rows.append(self._features(opened).flatten(0, -2))
        for start in range(0, len(texts), batch_size):
            rows.append(self._scorer.embed_texts(texts[start : start + batch_size]))
        return torch.cat(rows).double()

    def targets(
        self, seen_a: Tensor, seen_b: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """`[n]` probability that a picture of a is good (0.5: neither), and the rewards to log.

        The rewards: `reward`, of all pictures (for sets the mean of both sets'), and `reward_chosen`, of the
        good ones (where neither is, of a's).
        """
        if self._set_reward is None:
            targets = self._objective.choose(seen_a, seen_b)
            better = torch.maximum(seen_a, seen_b)
            rewards = (torch.cat([seen_a, seen_b]), better)
            return targets, {
                "reward": float(rewards[0].mean()),
                "reward_chosen": float(rewards[1].mean()),
            }
        targets = self._objective.choose_sets(seen_a, seen_b, self._set_reward, generator)
        chosen = torch.where((targets >= 0.5)[:, None], seen_a, seen_b)
        of = self._set_reward
        return targets, {"reward": (of(seen_a) + of(seen_b)) / 2.0, "reward_chosen": of(chosen)}


def _exemplars(source: str) -> tuple[list[Path], list[str]]:
    """The pictures of a folder, or the texts of a file."""
    path = Path(source)
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES), []
    if path.is_file():
        return [], [prompt.text for prompt in load_prompts(source)]
    raise UserError(f"objective.exemplars={source} does not exist: give a folder of pictures or a text file")


def _views(picture: Image.Image) -> list[Image.Image]:
    """The picture and its four quarters, in the place of a song's frames: a reconstruction."""
    x, y = (picture.width + 1) // 2, (picture.height + 1) // 2
    corners = [(left, top) for top in (0, picture.height - y) for left in (0, picture.width - x)]
    return [picture, *(picture.crop((left, top, left + x, top + y)) for left, top in corners)]
