"""DRAGON (Bai et al. 2025, arXiv 2504.15217): the policy's own pictures, split by a reward into good and bad.

Reconstruction: the authors published no code, and of their text only secondary sources were at hand. Known
from these: pictures come from the current policy, a reward of one item, of an item against exemplars or of a
whole set splits them into D+ and D-, and the Diffusion-DPO or Diffusion-KTO loss is taken on the two. This
project's own: the form of the swap below, what a tie is, every default, and all that is not listed as known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from diffalign.common.errors import UserError, unknown
from diffalign.common.plugins import get
from diffalign.data.batches import Batch
from diffalign.diffusion.denoiser import Denoiser
from diffalign.diffusion.likelihood import Draws
from diffalign.objectives._base import Gather, Objective, OnPolicyObjective, Output, Unit
from diffalign.objectives._stabilise import AutoBeta

MEASURES: dict[str, tuple[str, ...]] = {
    "instance": (),
    "exemplar": ("mean_cosine", "nearest", "frechet"),
    "set": ("frechet", "kid", "mmd", "vendi", "precision", "recall"),
}
"""Measures of each kind of reward, the default first; the scorers know how to compute them."""

SURROGATES = {"dpo": "diffusion_dpo", "kto": "kto"}


class IncrementalReward(Protocol):
    """A reward of sets that need not look at the whole set again after one row has changed."""

    def start(self, x: Any) -> float | None:
        """Takes a set `[n, d]`; may return its reward."""

    def try_swap(self, i: int, row: Any) -> float:
        """The reward of the set with another row `[d]` in place i; the set stays as it is."""

    def commit(self) -> None:
        """Makes the swap that was tried last part of the set."""


SetReward = Callable[[Any], float] | IncrementalReward


def swap_demonstrations(
    features_a: Any,
    features_b: Any,
    set_reward: SetReward,
    *,
    generator: torch.Generator | None = None,
    passes: int = 1,
) -> Tensor:
    """`[n]` bool: True where the picture of b goes to D+ and that of a to D-, False the other way round.

    Greedy: D+ starts as the set of the higher reward (a when equal), D- as the other. The places are visited
    in random order, and the two pictures of a place change sides when that raises the reward of D+. So the
    reward never falls, and where it is a sum over pictures each pair gets its own better picture. Places
    whose two rows are equal are left alone.

    Reconstruction: that D+ and D- are built by swaps which raise the reward of D+ is what secondary sources
    say; random order and further passes are this project's.

    Args:
        features_a: `[n, d]` one picture a prompt, tensor or array.
        features_b: `[n, d]` another picture of the same prompts.
        set_reward: any callable `[n, d] -> float`, higher is better, or an object with `start(x)`,
            `try_swap(i, row) -> float` and `commit()`; of an object that is both, these are used. It is
            asked n times a pass.
        generator: of the order; None takes torch's own.
        passes: over the places, each in an order of its own; ends early when a pass changes nothing.

    Raises:
        UserError: shapes that differ, passes < 1, or a reward that is NaN.
    """
    return _greedy_swap(features_a, features_b, set_reward, generator, passes)[0]


def _greedy_swap(
    features_a: Any,
    features_b: Any,
    set_reward: SetReward,
    generator: torch.Generator | None,
    passes: int,
) -> tuple[Tensor, Tensor]:
    """`[n]` bool twice: what `swap_demonstrations` gives, and where the reward was the same either way."""
    if len(features_a.shape) != 2 or features_a.shape != features_b.shape:
        shapes = f"{list(features_a.shape)} and {list(features_b.shape)}"
        raise UserError(f"demonstrations of shapes {shapes}: give two sets of one shape [n, d]")
    if passes < 1:
        raise UserError(f"passes is {passes}: use 1 or more")
    count = len(features_a)
    if count == 0:
        return torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool)
    reward = _incremental(set_reward)
    value_a, value_b = _start(reward, features_a), _start(reward, features_b)
    swapped = [value_b > value_a] * count
    value = value_b if value_b > value_a else _start(reward, features_a)
    equal = (features_a == features_b).all(1).tolist()
    undecided = list(equal)
    for _ in range(passes):
        before = value
        for i in _order(count, generator):
            if equal[i]:
                continue
            trial = _number(reward.try_swap(i, (features_a if swapped[i] else features_b)[i]))
            undecided[i] = trial == value
            if trial > value:
                reward.commit()
                value = trial
                swapped[i] = not swapped[i]
        if value == before:
            break
    return torch.tensor(swapped), torch.tensor(undecided)


def choose_within_pairs(rewards_a: Any, rewards_b: Any) -> Tensor:
    """`[n]` float32 probability that the picture of a is preferred: 1, 0, or 0.5 where rewards are equal.

    Args:
        rewards_a: `[n]` rewards of one picture a prompt, higher is better; tensor, array or list.
        rewards_b: `[n]` rewards of another picture of the same prompts.

    Raises:
        UserError: lengths that differ, or a reward that is NaN.
    """
    first, second = (torch.as_tensor(r).detach().cpu() for r in (rewards_a, rewards_b))
    if first.ndim != 1 or first.shape != second.shape:
        raise UserError(f"rewards of shapes {list(first.shape)} and {list(second.shape)}: give one a picture")
    for rewards in (first, second):
        bad = rewards.isnan().nonzero().flatten().tolist()
        if bad:
            raise UserError(
                f"the reward of {len(bad)} of {len(rewards)} demonstrations is NaN (the first is number "
                f"{bad[0]}): use a reward that has a value for every picture and prompt"
            )
    return ((first > second).float() + (first >= second).float()) / 2.0


@dataclass
class Plugin(OnPolicyObjective):
    """DRAGON: a reward that splits the policy's own pictures, and a surrogate loss on the two halves.

    The surrogate is the objective of that name with this one's settings: `diffusion_dpo` on pairs (D+ first
    or second, as `target` says), or `kto` on single pictures (D+ desirable), whose baseline is that of the
    whole optimizer step. Pictures, their features and the reward come from the rollout.

    Args:
        reward: "instance": of one picture (the scorer's value); "exemplar": of a picture against exemplars;
            "set": of all pictures of the policy together.
        measure: exemplar: mean_cosine (default), nearest or frechet (of a picture and its quarters); set:
            frechet (default), kid, mmd, vendi, precision or recall; nothing for instance.
        exemplars: folder of pictures, or a text file with one text a line for encoders of both; needed by
            every measure but vendi.
        surrogate: "dpo" (paired) or "kto" (unpaired).
        beta: default 2000, the lower end of what Diffusion-DPO finds good and Diffusion-KTO's 1000 in this
            project's convention (half of a difference of mean errors). DRAGON's own is not known.
        swap_passes: passes of `swap_demonstrations`, for set rewards.
        desirable_weight: lambda of D+, for kto.
        undesirable_weight: lambda of D-, for kto.
        error_space: space of the errors: "native" to the network, "epsilon" or "x0".
        safeguard: mu of the safeguard, as of diffusion_dpo, for dpo; null: off.
        auto_beta: beta follows the margin, for dpo; null: it stays.
    """

    reward: Literal["instance", "exemplar", "set"] = "instance"
    measure: str | None = None
    exemplars: str | None = None
    surrogate: Literal["dpo", "kto"] = "dpo"
    beta: float = 2000.0
    swap_passes: int = 1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    error_space: Literal["native", "epsilon", "x0"] = "native"
    safeguard: float | None = None
    auto_beta: AutoBeta | None = None

    _inner: Objective = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_reward()
        if self.surrogate not in SURROGATES:
            raise unknown("objective.surrogate", self.surrogate, SURROGATES)
        if self.swap_passes < 1:
            raise UserError(f"objective.swap_passes is {self.swap_passes}: use 1 or more")
        options: dict[str, Any] = {"beta": self.beta, "error_space": self.error_space}
        for name, owner, otherwise in (
            ("desirable_weight", "kto", 1.0),
            ("undesirable_weight", "kto", 1.0),
            ("safeguard", "dpo", None),
            ("auto_beta", "dpo", None),
        ):
            value = getattr(self, name)
            if self.surrogate == owner:
                options[name] = value
            elif value != otherwise:
                said = "set" if isinstance(value, AutoBeta) else value
                lacks = "weights" if owner == "kto" else "pairs"
                raise UserError(
                    f"objective.{name} is {said}, but surrogate={self.surrogate} has no {lacks}: leave it "
                    f"out or set objective.surrogate={owner}"
                )
        self._inner = get("objectives", SURROGATES[self.surrogate])(**options)

    def _check_reward(self) -> None:
        """Refuses a measure or exemplars that do not belong to the reward; settles the default measure."""
        if self.reward not in MEASURES:
            raise unknown("objective.reward", self.reward, MEASURES)
        known = MEASURES[self.reward]
        if self.measure is None and known:
            self.measure = known[0]
        if self.measure is not None and not known:
            raise UserError(
                f"objective.measure is {self.measure}, but reward={self.reward} is the scorer's own value: "
                "leave it out or set objective.reward to exemplar or set"
            )
        if self.measure is not None and self.measure not in known:
            raise unknown(f"objective.measure of reward={self.reward}", self.measure, known)
        if self.needs_exemplars and not self.exemplars:
            raise UserError(
                f"objective.exemplars is missing: name a folder of pictures or a text file for "
                f"measure={self.measure}"
            )
        if self.exemplars and not self.needs_exemplars:
            raise UserError(
                f"objective.exemplars is {self.exemplars}, but reward={self.reward} measure={self.measure} "
                "has no use for exemplars: leave it out"
            )

    @property
    def needs_exemplars(self) -> bool:
        """Whether the reward is held against exemplars."""
        return self.measure not in (None, "vendi")

    @property
    def views(self) -> bool:  # type: ignore[override]
        """Frechet distances are of several features; one picture has them by its pieces."""
        return self.reward == "exemplar" and self.measure == "frechet"

    @property
    def min_exemplars(self) -> int:  # type: ignore[override]
        """Precision looks at three neighbours of each exemplar."""
        return 4 if self.measure == "precision" else 2

    @property
    def min_pairs(self) -> int:  # type: ignore[override]
        """Of a set; recall looks at three neighbours of each picture."""
        if self.reward != "set":
            return 1
        return 4 if self.measure == "recall" else 2

    @property
    def unit(self) -> Unit:  # type: ignore[override]
        """Of the surrogate: "pair" for dpo, "single" for kto."""
        return self._inner.unit

    @property
    def undesirable(self) -> bool:  # type: ignore[override]
        """Of the surrogate: kto learns from D- too, picture by picture."""
        return self._inner.undesirable

    def choose(self, rewards_a: Any, rewards_b: Any) -> Tensor:
        """`choose_within_pairs`: `[n]` float32 `target` of pairs (a, b); ties, 0.5, teach nothing."""
        return choose_within_pairs(rewards_a, rewards_b)

    def choose_sets(
        self,
        features_a: Any,
        features_b: Any,
        set_reward: SetReward,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`swap_demonstrations` as `target` of pairs (a, b): `[n]` float32.

        0.5, a tie, where the set's reward was the same with either picture when the place was last visited:
        equal rows, and of precision and recall, which count, many more.
        """
        swapped, undecided = _greedy_swap(features_a, features_b, set_reward, generator, self.swap_passes)
        return (~swapped).float().where(~undecided, 0.5)

    def compute(self, denoiser: Denoiser, batch: Batch, draws: Draws, shared: Any = None) -> Output:
        """Losses `[N]` of N pairs (dpo) or N pictures (kto), as the surrogate's."""
        return self._inner.compute(denoiser, batch, draws, shared)

    def prepare(
        self, denoiser: Denoiser, micro_batches: Sequence[tuple[Batch, Draws]], gather: Gather
    ) -> Any:
        """What the surrogate prepares: kto's baseline; nothing for dpo."""
        return self._inner.prepare(denoiser, micro_batches, gather)

    def observe(self, logs: Sequence[dict[str, Tensor]], gather: Gather) -> None:
        """Told to the surrogate."""
        self._inner.observe(logs, gather)

    def loss_at_reference(self, output: Output) -> float | None:
        """The surrogate's."""
        return self._inner.loss_at_reference(output)

    def state_dict(self) -> dict[str, Any]:
        """The surrogate's."""
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self._inner.load_state_dict(state)


class _WholeSets:
    """A plain callable as an incremental reward: every swap is a set of its own."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def start(self, x: Any) -> float:
        self._rows = self._tried = x
        return float(self._function(x))

    def try_swap(self, i: int, row: Any) -> float:
        self._tried = self._rows.clone() if isinstance(self._rows, Tensor) else np.array(self._rows)
        self._tried[i] = row
        return float(self._function(self._tried))

    def commit(self) -> None:
        self._rows = self._tried


def _incremental(set_reward: Any) -> IncrementalReward:
    methods = (getattr(set_reward, name, None) for name in ("start", "try_swap", "commit"))
    return set_reward if all(map(callable, methods)) else _WholeSets(set_reward)


def _start(reward: IncrementalReward, features: Any) -> float:
    """Starts the reward with a set; returns its value, by swapping a row for itself if `start` gives none."""
    value = reward.start(features)
    return _number(reward.try_swap(0, features[0]) if value is None else value)


def _order(count: int, generator: torch.Generator | None) -> list[int]:
    device = "cpu" if generator is None else generator.device
    order: list[int] = torch.randperm(count, generator=generator, device=device).tolist()
    return order


def _number(value: Any) -> float:
    if math.isnan(value):
        raise UserError("the reward of a set of demonstrations is NaN: use a reward that has a value for it")
    return float(value)
