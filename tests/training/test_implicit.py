"""Held-out implicit accuracy: the reference itself knows nothing, a doctored policy what it was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from diffalign.common.conditioning import Conditioning
from diffalign.data.batches import Batch
from diffalign.data.encoded import EncodedSet, Example
from diffalign.diffusion.denoiser import Denoiser, FrozenCopy
from diffalign.diffusion.likelihood import denoising_terms
from diffalign.diffusion.process import Process, expand
from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.training.implicit import PairJudgement, accuracy, judge
from diffalign.training.sampling import fixed_draws
from tests.tiny_training import make_set, perturb

TARGETS = (1.0, 0.0, 0.5, 0.9, 0.2)


@pytest.fixture(scope="module")
def model(tiny_sdxl: str) -> Any:
    loaded: Any = SDXL(path=tiny_sdxl).load()
    loaded.start_training(AdapterSpec(rank=2, dropout=0.5), seed=0, with_reference=True)
    return loaded


@pytest.fixture(scope="module")
def heldout(model: Any) -> EncodedSet:
    return make_set(model, 10, targets=TARGETS)


def judged(denoiser: Denoiser, encoded: EncodedSet, **options: Any) -> list[PairJudgement]:
    return list(judge(denoiser, encoded, **{"num_draws": 3, "batch_size": 4, "device": "cpu", **options}))


def test_a_policy_that_is_the_reference_knows_nothing(model: Any, heldout: EncodedSet) -> None:
    """Margins are exactly 0 with dropout in the adapter, so every pair counts half; ties are left out."""
    model.network.train()
    judgements = judged(model.denoiser, heldout)
    assert [judgement.id for judgement in judgements] == [f"row-{k}" for k in range(10) if k % 5 != 2]
    assert [judgement.margin() for judgement in judgements] == [0.0] * 8
    assert [judgement.right() for judgement in judgements] == [0.5] * 8
    interval = accuracy(judgements)
    assert (interval.estimate, interval.low, interval.high, interval.n) == (0.5, 0.5, 0.5, 8)
    assert model.network.training  # dropout was off inside and is back


def doctored(skills: list[tuple[float, float, float]]) -> tuple[Denoiser, EncodedSet]:
    """Pairs (target, skill for the first image, for the second) of empty pictures, and who has that skill.

    x0 = 0, so x_t = sigma eps: an answer of skill * x_t / sigma errs by (1 - skill)^2 mean(eps^2). The
    reference answers with skill 1/2 everywhere.
    """
    process = Process.from_scheduler(DDPMScheduler())

    def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        sigma = expand(process.alpha_sigma(t)[1], x_t).float()
        return (cond["skill"][:, :, None, None] if network is policy else 0.5) * x_t / sigma

    policy, reference = nn.Identity(), nn.Identity()
    denoiser = Denoiser(policy, process, call, {"reference": FrozenCopy(reference)})
    examples = [
        Example(
            f"row-{number}",
            "a prompt",
            (0, 0),
            (32, 32),
            target,
            ({"skill": torch.tensor([[first]])}, {"skill": torch.tensor([[second]])}),
        )
        for number, (target, first, second) in enumerate(skills)
    ]
    text = Conditioning({"text": torch.zeros(1, 1)})
    return denoiser, EncodedSet(
        examples, [torch.zeros(4, 16, 16)], [torch.ones(4, 16, 16)], {"a prompt": 0}, text, text
    )


def test_a_doctored_policy_is_right_where_it_knows_the_preferred_image_better() -> None:
    """Skills 0.9 and 0.4: implicit rewards (1/4 - 1/100), (1/4 - 36/100) times mean(eps^2), margin 0.35."""
    pairs = [(1.0, 0.9, 0.4), (0.0, 0.9, 0.4), (0.0, 0.3, 0.6), (0.8, 0.5, 0.5), (0.5, 0.9, 0.1)]
    denoiser, encoded = doctored(pairs)
    judgements = judged(denoiser, encoded, num_draws=5)
    assert [judgement.right() for judgement in judgements] == [1.0, 0.0, 1.0, 0.5]
    assert accuracy(judgements).estimate == 2.5 / 4
    # 5 draws of 1024 numbers each: the mean of eps^2 is 1 up to 4 * sqrt(2 / 5120) = 0.08
    assert judgements[0].margin() == pytest.approx(0.35, rel=0.08)
    assert judgements[1].margin() == pytest.approx(-0.35, rel=0.08)
    assert judgements[2].margin() == pytest.approx(0.49 - 0.16, rel=0.08)
    assert [judgement.reference_right() for judgement in judgements] == [0.5] * 4


def test_a_base_that_knows_a_few_timesteps_is_judged_at_those() -> None:
    """Spread evenly over them, however many draws; the noises of two draws at one timestep differ."""
    denoiser, encoded = doctored([(1.0, 0.9, 0.4)])
    seen: list[int] = []
    call = denoiser.call

    def noting(network: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.append(int(t[0]))
        return call(network, x_t, t, cond)

    denoiser.call = noting
    known = [999, 749, 499, 249]
    for count, expected in ((8, [999, 999, 749, 749, 499, 499, 249, 249]), (2, [749, 249]), (1, [499])):
        seen.clear()
        (found,) = judged(denoiser, encoded, num_draws=count, known=known)
        assert seen[::2] == seen[1::2] == expected  # the reference, then the policy
        assert len(set(found.first[1].tolist())) == count


def judgement(target: float, first: tuple[float, ...], second: tuple[float, ...]) -> PairJudgement:
    """Errors (policy, policy, reference, reference) of two draws."""
    return PairJudgement(
        "row",
        target,
        (torch.tensor(first[:2]), torch.tensor(first[2:])),
        (torch.tensor(second[:2]), torch.tensor(second[2:])),
    )


def test_margins_by_hand() -> None:
    """First image: reference - policy = (0.2, 0.0), mean 0.1; second (0.1, -0.1), mean 0; beta 2: 0.1."""
    first, second = (0.3, 0.5, 0.5, 0.5), (0.4, 0.6, 0.5, 0.5)
    assert judgement(1.0, first, second).margin() == pytest.approx(0.1)
    assert judgement(0.0, first, second).margin() == pytest.approx(-0.1)
    assert judgement(0.7, first, second).margin(beta=2000.0) == pytest.approx(100.0)
    assert judgement(1.0, first, second).right() == 1.0 and judgement(0.3, first, second).right() == 0.0
    assert judgement(1.0, first, second).reference_right() == 0.5  # the reference errs alike
    blurred = (0.4, 0.6, 0.7, 0.7)
    assert judgement(1.0, first, blurred).reference_right() == 1.0
    assert judgement(0.0, first, blurred).reference_right() == 0.0


def test_judgements_are_the_errors_of_fixed_draws(model: Any, heldout: EncodedSet) -> None:
    """Recomputed one pair at a time from the definition: posterior means, same draws for both images."""
    model.network.train()
    state = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    perturb(model.denoiser.trainable_parameters(), 0.2)
    judgements = judged(model.denoiser, heldout)
    again = judged(model.denoiser, heldout, batch_size=3)
    model.network.eval()
    for found, repeated in zip(judgements, again, strict=True):
        example = next(example for example in heldout.examples if example.id == found.id)
        latents = torch.stack([heldout.means[image] for image in example.images])
        cond = heldout.conditioning(example, dropped=False)
        batch = Batch([example.id], 0, torch.zeros(1), latents, cond, torch.tensor([2]))
        draws = fixed_draws(batch, range(1000), 3, seed=0)
        assert [draw.t.tolist() for draw in draws] == [[166, 166], [500, 500], [833, 833]]
        for number, draw in enumerate(draws):
            assert torch.equal(draw.noise[0], draw.noise[1])
            with torch.no_grad():
                terms = denoising_terms(model.denoiser, latents, cond, draw, reference=True)
            assert terms.ref_err is not None
            for side, errors in enumerate((found.first, found.second)):
                assert errors[0][number].item() == pytest.approx(terms.err[side].item(), abs=1e-5)
                assert errors[1][number].item() == pytest.approx(terms.ref_err[side].item(), abs=1e-5)
        assert repeated.margin() == pytest.approx(found.margin(), abs=1e-5)
        assert found.margin() != 0.0
    model.load_trained_state(state)
