"""DRAGON: the choice within a pair, the greedy swap, and the surrogate on what they gave."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.common.plugins import get
from diffalign.data.batches import Batch
from diffalign.diffusion.denoiser import Denoiser, FrozenCopy
from diffalign.diffusion.likelihood import Draws
from diffalign.diffusion.process import Process
from diffalign.objectives import dragon
from diffalign.objectives._base import OnPolicyObjective
from diffalign.objectives.dragon import Plugin, choose_within_pairs, swap_demonstrations
from diffalign.scorers import exemplar_reward, frechet_distance, set_reward
from diffalign.scorers._set_rewards import EXEMPLAR_MEASURES, SET_MEASURES


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_sets(n: int = 24, d: int = 5, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features of two pictures a prompt, and 60 exemplars."""
    rows = torch.randn(2 * n + 60, d, generator=generator(seed), dtype=torch.float64)
    return rows[:n] * 1.3 + 0.4, rows[n : 2 * n], rows[2 * n :]


def mixed(swapped: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """D+."""
    return torch.where(swapped[:, None], second, first)


class Recorded:
    """A plain reward that keeps every set it was asked about, with its value."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.seen: list[tuple[Any, float]] = []

    def __call__(self, x: Any) -> float:
        value = float(self.function(x))
        self.seen.append((x, value))
        return value


class Kept:
    """An incremental reward that keeps the value of D+ at the start and after every swap that was kept."""

    def __init__(self, reward: Any) -> None:
        self.reward = reward

    def start(self, x: Any) -> float:
        self.values = [self.reward.start(x)]
        return self.values[0]

    def try_swap(self, i: int, row: Any) -> float:
        self.tried: float = self.reward.try_swap(i, row)
        return self.tried

    def commit(self) -> None:
        self.values.append(self.tried)
        self.reward.commit()


def test_a_swap_by_hand() -> None:
    """The reward is -(sum - 10)^2; a = (1, 2, 3) gives -16, b = (4, 0, 9) gives -9: D+ starts as b.

    Place 1 (4 -> 1) gives a sum of 10 and 0, a rise in any order of visits; place 2 (0 -> 2) gives 15 or,
    after place 1, 12: no rise; place 3 (9 -> 3) gives 7, the same -9 and so none, or, after place 1, 4.
    """
    a, b = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0], [0.0], [9.0]])

    def reward(x: Tensor) -> Tensor:
        return -((x.sum() - 10.0) ** 2)

    for seed in range(6):
        swapped = swap_demonstrations(a, b, reward, generator=generator(seed))
        assert swapped.tolist() == [False, True, True]
        assert swapped.dtype == torch.bool


@pytest.mark.parametrize("seed", range(5))
def test_an_additive_reward_is_the_choice_within_each_pair(seed: int) -> None:
    first, second, _ = two_sets(seed=seed)
    value = torch.randn(5, generator=generator(seed), dtype=torch.float64)
    swapped = swap_demonstrations(first, second, lambda x: (x @ value).sum(), generator=generator(seed))
    assert 0 < swapped.sum() < len(first)
    assert torch.equal(swapped, second @ value > first @ value)
    assert torch.equal(choose_within_pairs(first @ value, second @ value), (~swapped).float())


@pytest.mark.parametrize("name", SET_MEASURES)
@pytest.mark.parametrize("passes", [1, 3])
def test_fast_and_plain_paths_choose_alike_and_the_reward_never_falls(name: str, passes: int) -> None:
    first, second, exemplars = two_sets()
    if name == "recall":
        first, second = 0.5 * first, 0.5 * second  # wider sets reach every exemplar at once
    reward = set_reward(name, exemplars)
    kept = Kept(reward)
    fast = swap_demonstrations(first, second, kept, generator=generator(), passes=passes)
    # Only callable: each swap is judged as a set of its own.
    slow = swap_demonstrations(first, second, lambda x: reward(x), generator=generator(), passes=passes)
    assert torch.equal(fast, slow)
    assert 0 < fast.sum() < len(first)
    assert (
        kept.values[0] == pytest.approx(max(reward(first), reward(second)), rel=1e-8) and len(kept.values) > 1
    )
    assert all(before < after for before, after in itertools.pairwise(kept.values))
    assert reward(mixed(fast, first, second)) == pytest.approx(kept.values[-1], rel=1e-8)


def test_more_passes_do_not_lower_the_reward_and_end_when_nothing_changes() -> None:
    first, second, exemplars = two_sets()
    reward = set_reward("frechet", exemplars)
    values = []
    for passes in (1, 2, 50):
        counted = Recorded(reward)
        swapped = swap_demonstrations(first, second, counted, generator=generator(), passes=passes)
        values.append(reward(mixed(swapped, first, second)))
    assert values[0] <= values[1] <= values[2]
    assert len(counted.seen) < 3 + 20 * len(first)
    final = mixed(swapped, first, second)
    for i in range(len(first)):  # at the end no single swap helps
        trial = final.clone()
        trial[i] = mixed(~swapped, first, second)[i]
        assert reward(trial) <= values[2] * (1 - 1e-12)


def test_a_kept_swap_must_raise_the_reward() -> None:
    """A constant reward keeps the first set whole; a reward of the other set's row keeps that set."""
    first, second, _ = two_sets()
    assert not swap_demonstrations(first, second, lambda x: 1.0).any()
    assert swap_demonstrations(first, second, lambda x: float(torch.equal(x, second))).all()


def test_the_order_comes_from_the_generator_and_visits_every_place_once() -> None:
    first, second, exemplars = two_sets()
    reward = set_reward("frechet", exemplars)

    def places(seed: int) -> list[int]:
        recorded = Recorded(lambda x: -1.0 if torch.equal(x, first) else -2.0)
        swap_demonstrations(first, second, recorded, generator=generator(seed))
        tried = [(x != first).any(1).nonzero().flatten().tolist() for x, _ in recorded.seen[3:]]
        assert all(len(rows) == 1 for rows in tried)
        return [rows[0] for rows in tried]

    assert places(0) == torch.randperm(24, generator=generator(0)).tolist() != places(1)
    results = [swap_demonstrations(first, second, reward, generator=generator(s)) for s in (0, 0, 1, 2, 3)]
    assert torch.equal(results[0], results[1])
    assert any(not torch.equal(results[0], other) for other in results[2:])
    torch.manual_seed(7)  # without a generator: torch's own
    first_time = swap_demonstrations(first, second, reward)
    torch.manual_seed(7)
    assert torch.equal(first_time, swap_demonstrations(first, second, reward))


@pytest.mark.parametrize("name", ["frechet", "kid", "vendi"])
def test_exchanging_the_sets_turns_the_answer_round(name: str) -> None:
    first, second, exemplars = two_sets()
    reward = set_reward(name, exemplars)
    one = swap_demonstrations(first, second, reward, generator=generator())
    other = swap_demonstrations(second, first, reward, generator=generator())
    assert torch.equal(one, ~other)


def test_arrays_and_an_object_whose_start_gives_nothing() -> None:
    """An object needs the three methods alone: its value at the start is that of a row swapped for itself."""

    class Sum:
        def start(self, x: np.ndarray) -> None:
            self.rows = x.copy()

        def try_swap(self, i: int, row: np.ndarray) -> float:
            self.trial = self.rows.copy()
            self.trial[i] = row
            return float(self.trial.sum())

        def commit(self) -> None:
            self.rows = self.trial

    first, second, _ = two_sets()
    a, b = first.numpy(), second.numpy()
    by_object = swap_demonstrations(a, b, Sum(), generator=generator())
    assert torch.equal(by_object, second.sum(1) > first.sum(1))
    by_function = swap_demonstrations(a, b, lambda x: np.sum(x, axis=(0, 1)), generator=generator())
    assert torch.equal(by_object, by_function)
    assert swap_demonstrations(a[:0], b[:0], Sum()).tolist() == []


def test_each_rule_improves_most_what_it_selects_for() -> None:
    """The pattern of the paper's table 5: the choice by picture raises the mean reward of pictures more, the
    choice by set lowers the distance of sets more; both do better than no choice."""
    first, second, exemplars = two_sets(100)
    by_picture = exemplar_reward("frechet", exemplars)
    target = choose_within_pairs(by_picture(first), by_picture(second))
    pictures = mixed(target == 0, first, second)
    chosen = swap_demonstrations(first, second, set_reward("frechet", exemplars), generator=generator())
    together = mixed(chosen, first, second)
    both = torch.cat([first, second])
    assert by_picture(pictures).mean() > by_picture(together).mean() > by_picture(both).mean()
    distances = [frechet_distance(x, exemplars) for x in (together, pictures, first, second)]
    assert distances[0] < distances[1] and distances[0] < min(distances[2:])


def test_the_choice_within_a_pair() -> None:
    """Higher is better, a tie is neither's; infinities are values like others."""
    rewards_a, rewards_b = [1.0, 2.0, 3.0, -math.inf], np.array([2.0, 1.0, 3.0, 0.0])
    target = choose_within_pairs(rewards_a, rewards_b)
    assert target.tolist() == [0.0, 1.0, 0.5, 0.0] and target.dtype == torch.float32
    assert choose_within_pairs([], []).shape == (0,)
    plugin = Plugin()
    assert torch.equal(plugin.choose(rewards_a, rewards_b), target)


def test_equal_rows_are_left_alone_and_no_preference() -> None:
    first, second, exemplars = two_sets()
    second[3], second[8] = first[3], first[8]
    recorded = Recorded(set_reward("frechet", exemplars))
    plugin = Plugin(reward="set", exemplars="folder", swap_passes=2)
    target = plugin.choose_sets(first, second, recorded, generator())
    assert (target == 0.5).nonzero().flatten().tolist() == [3, 8]
    swapped = swap_demonstrations(first, second, recorded, generator=generator(), passes=2)
    decided = target != 0.5
    assert torch.equal(target[decided] == 0.0, swapped[decided])
    assert torch.equal(plugin.choose_sets(first.numpy(), second.numpy(), recorded, generator()), target)


def test_pairs_that_a_counting_reward_does_not_tell_apart_are_ties() -> None:
    """The reward counts rows whose first number is positive: of 4 pairs only the last differs in that."""
    first = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    second = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-2.0, 0.0], [1.0, 0.0]])
    plugin = Plugin(reward="set", exemplars="folder")

    def positive(x: torch.Tensor) -> float:
        return float((x[:, 0] > 0).sum())

    assert plugin.choose_sets(first, second, positive, generator()).tolist() == [0.5, 0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: swap_demonstrations(a, b[:3], len), r"shapes \[24, 5\] and \[3, 5\]"),
        (lambda a, b: swap_demonstrations(a[0], b[0], len), r"shapes \[5\] and \[5\]"),
        (lambda a, b: swap_demonstrations(a, b, len, passes=0), "passes is 0"),
        (lambda a, b: swap_demonstrations(a, b, lambda x: math.nan), "reward of a set .* is NaN"),
        (
            lambda a, b: swap_demonstrations(
                a, b, lambda x: 1.0 if torch.equal(x, a) or torch.equal(x, b) else math.nan
            ),
            "is NaN",
        ),
        (lambda a, b: swap_demonstrations(a, b, set_reward("frechet", a[:1])), "frechet .* has 1: give 2"),
        (lambda a, b: swap_demonstrations(a * math.nan, b, set_reward("vendi")), "row 0 .* not finite"),
        (lambda a, b: choose_within_pairs([1.0, 2.0], [1.0]), r"shapes \[2\] and \[1\]"),
        (
            lambda a, b: choose_within_pairs([1.0, 2.0], [1.0, math.nan]),
            "1 of 2 demonstrations is NaN .*number 1",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_line(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(*two_sets()[:2])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "objective.beta is 0.0: use a value above 0"),
        ({"beta": -1.0, "surrogate": "kto"}, "objective.beta is -1.0: use a value above 0"),
        ({"beta": math.nan}, "objective.beta is nan"),
        ({"reward": "sets"}, r"unknown objective\.reward 'sets': did you mean 'set'"),
        ({"surrogate": "sft"}, r"unknown objective\.surrogate 'sft'"),
        (
            {"reward": "set", "measure": "fid", "exemplars": "x"},
            r"unknown objective\.measure of reward=set 'fid'",
        ),
        ({"reward": "exemplar", "measure": "vendi", "exemplars": "x"}, "unknown .* 'vendi'"),
        ({"measure": "frechet"}, "objective.measure is frechet, but reward=instance"),
        ({"reward": "set"}, "objective.exemplars is missing.*measure=frechet"),
        ({"reward": "exemplar"}, "objective.exemplars is missing.*measure=mean_cosine"),
        ({"exemplars": "x"}, "objective.exemplars is x, but reward=instance"),
        ({"reward": "set", "measure": "vendi", "exemplars": "x"}, "measure=vendi has no use for exemplars"),
        ({"swap_passes": 0}, "objective.swap_passes is 0"),
        ({"desirable_weight": 2.0}, "objective.desirable_weight is 2.0, but surrogate=dpo"),
        ({"undesirable_weight": 0.0, "surrogate": "kto"}, "objective.undesirable_weight is 0.0"),
        ({"error_space": "esp"}, r"unknown objective\.error_space 'esp'"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Plugin(**options)
    assert "\n" not in str(caught.value)


def test_the_measures_are_those_that_the_scorers_have() -> None:
    assert dragon.MEASURES["set"] == tuple(SET_MEASURES)
    assert dragon.MEASURES["exemplar"] == EXEMPLAR_MEASURES
    assert Plugin(reward="set", exemplars="folder").measure == "frechet"
    assert Plugin(reward="exemplar", exemplars="folder").measure == "mean_cosine"
    assert Plugin().measure is None and not Plugin().needs_exemplars


def test_what_it_is() -> None:
    paired, unpaired = Plugin(), Plugin(surrogate="kto")
    assert isinstance(paired, OnPolicyObjective) and paired.uses_reference and paired.noise == "shared"
    assert (paired.unit, paired.undesirable) == ("pair", False)
    assert (unpaired.unit, unpaired.undesirable) == ("single", True)


class Scaled(nn.Module):
    """Predicts `scale * x_t`."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x_t: Tensor) -> Tensor:
        return self.scale * x_t


def two_policies() -> Denoiser:
    """A policy that has moved away from its reference."""
    process = Process(torch.tensor([0.8]).double(), torch.tensor([0.6]).double(), "epsilon")
    policies: Any = {"reference": FrozenCopy(Scaled(0.1).requires_grad_(False))}
    return Denoiser(Scaled(0.3), process, lambda network, x_t, t, cond: network(x_t), policies)


def four_pictures(unit: str) -> tuple[Batch, Draws]:
    latents = torch.randn(4, 1, 2, 2, generator=generator(1))
    groups = 2 if unit == "pair" else 4
    batch = Batch(
        ids=[f"row-{number}" for number in range(groups)],
        epoch=0,
        positions=torch.arange(groups),
        latents=latents,
        cond=Conditioning({"nothing": torch.zeros(4, 1)}),
        counts=torch.full((groups,), 4 // groups),
        target=torch.tensor([1.0, 0.0]) if unit == "pair" else torch.tensor([1.0, 0.0, 0.0, 1.0]),
    )
    noise = torch.randn(4, 1, 2, 2, generator=generator(2))
    return batch, Draws(torch.zeros(4, dtype=torch.int64), noise)


@pytest.mark.parametrize(
    ("surrogate", "other", "options"),
    [
        ("dpo", "diffusion_dpo", {}),
        ("kto", "kto", {"desirable_weight": 2.0, "undesirable_weight": 0.5}),
    ],
)
def test_the_surrogate_is_the_objective_of_that_name(
    surrogate: Any, other: str, options: dict[str, float]
) -> None:
    """Losses, logs and what is prepared (kto: a baseline from two micro-batches) are the same bits."""
    ours = Plugin(surrogate=surrogate, beta=3.0, **options)
    theirs: Any = get("objectives", other)(beta=3.0, **options)
    denoiser = two_policies()
    micro = [four_pictures(ours.unit), four_pictures(ours.unit)]
    outputs = []
    for objective in (ours, theirs):
        shared = objective.prepare(denoiser, micro, lambda tensor: tensor)
        outputs.append(objective.compute(denoiser, *micro[0], shared))
    assert torch.equal(outputs[0].loss, outputs[1].loss) and outputs[0].loss.requires_grad
    assert outputs[0].logs.keys() == outputs[1].logs.keys()
    assert all(torch.equal(outputs[0].logs[name], outputs[1].logs[name]) for name in outputs[0].logs)
    assert outputs[0].loss.std() > 0.001
    assert ours.state_dict() == theirs.state_dict()
    if surrogate == "kto":
        assert outputs[0].logs["baseline"][0] > 0


def test_settings_reach_the_loss() -> None:
    denoiser, (batch, draws) = two_policies(), four_pictures("single")

    def losses(**options: Any) -> Tensor:
        objective = Plugin(surrogate="kto", **{"beta": 3.0, **options})
        shared = objective.prepare(denoiser, [(batch, draws)], lambda tensor: tensor)
        return objective.compute(denoiser, batch, draws, shared).loss.detach()

    plain = losses()
    weighted = losses(desirable_weight=2.0, undesirable_weight=0.5)
    assert torch.allclose(weighted / plain, torch.tensor([2.0, 0.5, 0.5, 2.0]))
    assert not torch.allclose(losses(beta=6.0), plain) and not torch.allclose(losses(error_space="x0"), plain)
