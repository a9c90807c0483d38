"""RankDPO: its weights and loss against numbers worked out by hand, its two passes against one."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.common.errors import UserError
from diffalign.common.plugins import get
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record, Score
from diffalign.data.select import ScoreFacts
from diffalign.objectives.diffusion_dpo import diffusion_dpo_loss
from diffalign.objectives.rankdpo import Plugin, discounted_gain_weights, rankdpo_loss

EVENLY = (1.0, 2.0 / 3.0, 1.0 / 3.0, 0.0)
LN2 = math.log(2.0)


def lists(*rows: tuple[float, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


def random_lists(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The weights.


def test_weights_of_four_evenly_spread_images() -> None:
    """Gains 2^phi - 1 = 1, 0.5874, 0.2599, 0; 1/ln(1 + rank) = 1.4427, 0.9102, 0.7213, 0.6213.

    1-2: 0.4126 * 0.5325 = 0.220; 1-3: 0.7401 * 0.7213 = 0.534; 1-4: 1 * 0.8214 = 0.821;
    2-3: 0.3275 * 0.1889 = 0.062; 2-4: 0.5874 * 0.2889 = 0.170; 3-4: 0.2599 * 0.1000 = 0.026.
    """
    (weights,) = discounted_gain_weights(lists(EVENLY))
    pairs = [weights[i, j].item() for i, j in combinations(range(4), 2)]
    assert pairs == pytest.approx([0.220, 0.534, 0.821, 0.062, 0.170, 0.026], abs=5e-4)
    assert sum(pairs) == pytest.approx(1.83, abs=5e-3)
    assert torch.equal(weights, weights.T) and not weights.diagonal().any()


def test_tied_images_share_their_places() -> None:
    """phi = (.8, .8, .2, 0): the first two share ranks 1 and 2, (1.442695 + 0.910239) / 2 = 1.176467.

    Against the third (rank 3, 0.721348): gains 2^.8 - 2^.2 = 0.592403, times 0.455119 = 0.269614, the mean of
    0.427326 and 0.111901 that the two orders of sorting would give.
    """
    (weights,) = discounted_gain_weights(lists((0.8, 0.8, 0.2, 0.0)))
    assert weights[0, 1].item() == 0.0
    assert weights[0, 2].item() == weights[1, 2].item() == pytest.approx(0.269614, abs=1e-6)
    gain = 2**0.8 - 2**0.2
    by_order = [gain * (1 / math.log(1 + rank) - 1 / math.log(4)) for rank in (1, 2)]
    assert by_order == pytest.approx([0.427, 0.112], abs=5e-4)
    assert weights[0, 2].item() == pytest.approx(sum(by_order) / 2, abs=1e-12)


@pytest.mark.parametrize("phi", [EVENLY, (0.8, 0.8, 0.2, 0.0), (0.5, 0.5, 0.5, 0.5), (0.1, 0.9, 0.1, 0.1)])
def test_weights_follow_a_permutation(phi: tuple[float, ...]) -> None:
    (weights,) = discounted_gain_weights(lists(phi))
    for order in ([1, 0, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        (moved,) = discounted_gain_weights(lists(tuple(phi[place] for place in order)))
        assert torch.equal(moved, weights[order][:, order])


def test_two_images() -> None:
    """One pair weighs (1/ln 2 - 1/ln 3) = 0.5325 times the difference of 2^phi."""
    (weights,) = discounted_gain_weights(lists((0.25, 0.75)))
    assert weights[0, 1].item() == pytest.approx((1 / LN2 - 1 / math.log(3)) * (2**0.75 - 2**0.25), abs=1e-12)
    assert 1 / LN2 - 1 / math.log(3) == pytest.approx(0.5325, abs=5e-5)


def test_absent_images_have_no_weight_and_no_rank() -> None:
    """With the third of four absent, the others weigh as much as in a list of three, whatever it holds."""
    alone = discounted_gain_weights(lists((0.2, 1.0, 0.6)))[0]
    mask = torch.tensor([[True, True, False, True]])
    for filler in (0.0, 0.99, math.nan):
        (weights,) = discounted_gain_weights(lists((0.2, 1.0, filler, 0.6)), mask)
        assert not weights[2].any() and not weights[:, 2].any()
        assert torch.equal(weights[[0, 1, 3]][:, [0, 1, 3]], alone)


def test_weights_in_float32_and_float64() -> None:
    phi = (torch.randint(0, 16, (50, 5), generator=torch.Generator().manual_seed(0)) / 15).double()
    exact, single = discounted_gain_weights(phi), discounted_gain_weights(phi.float())
    assert exact.dtype == torch.float64 and single.dtype == torch.float32
    assert torch.allclose(single.double(), exact, rtol=1e-5, atol=1e-7)


# The loss.


def test_a_list_by_hand() -> None:
    """phi = (1, 0, 1/2), err - ref_err = (-0.1, 0.2, 0.1), beta 10: rewards -5 s = 0.5, -1, -0.5.

    Weights: 1-3 (2 - 2^.5)(1.442695 - 0.910239) = 0.585786 * 0.532456 = 0.311905;
    1-2 1 * (1.442695 - 0.721348) = 0.721348; 3-2 (2^.5 - 1)(0.910239 - 0.721348) = 0.078242.
    -ln sigmoid: of 1 0.313262, of 1.5 0.201413, of 0.5 0.474077.
    0.311905 * 0.313262 + 0.721348 * 0.201413 + 0.078242 * 0.474077 = 0.280089.
    """
    ref_err = lists((0.3, 0.4, 0.5))
    loss = rankdpo_loss(ref_err + lists((-0.1, 0.2, 0.1)), ref_err, lists((1.0, 0.0, 0.5)), beta=10.0)
    assert loss.item() == pytest.approx(0.280089, abs=1e-6)


def test_two_images_are_weighted_diffusion_dpo() -> None:
    err, ref_err = random_lists(20, 2, seed=1), random_lists(20, 2, seed=2)
    phi = lists((0.9, 0.3)).expand(20, 2)
    weight = discounted_gain_weights(phi)[:, 0, 1]
    dpo = diffusion_dpo_loss(err[:, 0], err[:, 1], ref_err[:, 0], ref_err[:, 1], beta=7.0)
    assert torch.allclose(rankdpo_loss(err, ref_err, phi, beta=7.0), weight * dpo, rtol=1e-12, atol=0.0)
    flipped = rankdpo_loss(err.flip(1), ref_err.flip(1), phi.flip(1), beta=7.0)
    assert torch.allclose(flipped, weight * dpo, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("beta", [1.0, 5000.0])
def test_policy_at_the_reference_gives_the_weights_times_log_2(beta: float) -> None:
    phi, err = lists(EVENLY, (0.8, 0.8, 0.2, 0.0), (0.4,) * 4), random_lists(3, 4)
    expected = discounted_gain_weights(phi).sum(dim=(1, 2)) / 2 * LN2
    assert rankdpo_loss(err, err, phi, beta=beta).tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert expected.tolist() == pytest.approx([1.8325 * LN2, 1.3769 * LN2, 0.0], abs=1e-3)


def test_a_permuted_list_has_the_same_loss() -> None:
    err, ref_err, phi = random_lists(1, 4, seed=1), random_lists(1, 4, seed=2), lists((0.8, 0.8, 0.2, 0.0))
    loss = rankdpo_loss(err, ref_err, phi, beta=9.0)
    for order in ([1, 0, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        moved = rankdpo_loss(err[:, order], ref_err[:, order], phi[:, order], beta=9.0)
        assert torch.allclose(moved, loss, rtol=1e-14, atol=0.0)


def test_the_gradient_is_a_sum_over_pairs() -> None:
    """d loss / d s_i = beta/2 (sum over worse j of w sigma(-m_ij) - sum over better j of w sigma(-m_ji))."""
    phi, shift = lists((0.2, 1.0, 0.6)), lists((0.01, 0.02, -0.03)).requires_grad_()
    rankdpo_loss(shift, torch.zeros_like(shift), phi, beta=30.0).backward()
    weights, s, expected = discounted_gain_weights(phi)[0], shift.detach()[0], [0.0, 0.0, 0.0]
    for winner, loser in ((1, 2), (1, 0), (2, 0)):
        pull = 15.0 * weights[winner, loser] / (1.0 + math.exp(-15.0 * (s[winner] - s[loser])))
        expected[winner] += pull.item()
        expected[loser] -= pull.item()
    assert shift.grad is not None
    assert shift.grad[0].tolist() == pytest.approx(expected, rel=1e-12) and sum(expected) == pytest.approx(
        0.0
    )


def test_ragged_lists_and_what_stands_in_the_gaps() -> None:
    """Lists of 2 and 3 padded with NaN: each as alone, no gradient to the gap and none that is not finite."""
    err, ref_err, phi = (
        random_lists(2, 3, seed=1),
        random_lists(2, 3, seed=2),
        lists((1.0, 0.0, 0.0), (0, 0.5, 1)),
    )
    mask = torch.tensor([[True, True, False], [True, True, True]])
    for tensor in (err, ref_err, phi):
        tensor[0, 2] = math.nan
    err.requires_grad_()
    loss = rankdpo_loss(err, ref_err, phi, beta=5.0, mask=mask)
    alone = rankdpo_loss(err[:1, :2], ref_err[:1, :2], phi[:1, :2], beta=5.0)
    assert torch.equal(loss[:1], alone) and bool(torch.isfinite(loss).all())
    loss.sum().backward()
    assert err.grad is not None and err.grad[0, 2].item() == 0.0 and bool(err.grad[mask].all())


def test_loss_in_float32_against_float64_also_far_out() -> None:
    """Margins up to +-2500 at beta 5000: no overflow, and the relative error of float32 at most."""
    err, ref_err, phi = (random_lists(200, 4, seed=seed).float() for seed in (1, 2, 3))
    loss = rankdpo_loss(err, ref_err, phi, beta=5000.0)
    exact = rankdpo_loss(err.double(), ref_err.double(), phi.double(), beta=5000.0)
    assert loss.dtype == torch.float32 and bool(torch.isfinite(loss).all())
    assert torch.allclose(loss.double(), exact, rtol=1e-5, atol=2e-3)


def test_one_image_compares_nothing() -> None:
    one = torch.zeros(3, 1)
    for call in (lambda: discounted_gain_weights(one), lambda: rankdpo_loss(one, one, one, beta=1.0)):
        with pytest.raises(UserError, match="K is 1, give lists of 2 or more"):
            call()


# The plug-in.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "objective.beta is 0.0: use a value above 0"),
        ({"beta": -2.0}, "objective.beta is -2.0"),
        ({"beta": math.nan}, "objective.beta is nan"),
        ({"phi": "vote"}, r"unknown objective\.phi 'vote': did you mean 'votes'"),
        ({"noise": "share"}, r"unknown objective\.noise 'share'"),
        ({"passes": "three"}, r"unknown objective\.passes 'three'"),
        ({"error_space": "esp"}, r"unknown objective\.error_space 'esp'"),
        ({"phi": "rank", "scorers": ["clip"]}, r"scorers is \[clip\], objective.phi=rank reads no scores"),
        ({"scorers": ["clip", "clip"]}, r"scorers is \[clip, clip\]: name each scorer once"),
    ],
)
def test_mis_settings_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Plugin(**options)
    assert "\n" not in str(caught.value)


def test_a_scorer_that_the_manifest_does_not_know_is_refused_at_once() -> None:
    facts = {"clip": ScoreFacts("cosine", "1", 0.1, 0.4)}
    Plugin(scorers=["clip"]).check_data(facts)
    Plugin(scorers=["clop"]).check_data({})  # nothing is known: seen when the records are read
    with pytest.raises(UserError, match=r"unknown scorer in objective\.scorers 'clop': did you mean 'clip'"):
        Plugin(scorers=["clop"]).check_data(facts)


def scored(values: dict[str, list[float]], scale: str = "cosine", version: str = "1") -> Record:
    """A list whose pictures have these scores."""
    count = len(next(iter(values.values())))
    return Record(
        "r",
        "a thing",
        [
            Candidate(
                ImageRef(name=f"r:{k}"),
                scores={name: Score(row[k], scale, version) for name, row in values.items()},
            )
            for k in range(count)
        ],
    )


def test_scores_of_two_scales_or_versions_are_refused() -> None:
    objective = Plugin()
    assert objective.reject(scored({"clip": [0.2, 0.3]})) is None
    with pytest.raises(UserError, match=r"'clip' score is on the scale logits, expected cosine: score all"):
        objective.reject(scored({"clip": [20.0, 30.0]}, scale="logits"))
    with pytest.raises(UserError, match="'clip' score is of version 2, expected 1"):
        objective.reject(scored({"clip": [0.2, 0.3]}, version="2"))
    known = Plugin(scorers=["clip"])
    known.check_data({"clip": ScoreFacts("logits", "1", 10.0, 30.0)})
    with pytest.raises(UserError, match="on the scale cosine, expected logits"):
        known.reject(scored({"clip": [0.2, 0.3]}))
    mixed = scored({"clip": [20.0, 30.0], "other": [0.1, 0.2]}, scale="logits")
    assert known.reject(mixed) is None  # what other scorers say is not read


def test_the_name() -> None:
    assert get("objectives", "rankdpo") is Plugin and Plugin().unit == "list"
