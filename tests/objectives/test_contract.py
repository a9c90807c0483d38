"""What every objective must keep to: each plug-in that is found is asked the same questions."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffalign.common import plugins
from diffalign.data.batches import Batch
from diffalign.data.select import ScoreFacts
from diffalign.diffusion.likelihood import Draws, denoising_terms
from diffalign.diffusion.process import Process
from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.objectives._base import Objective, Output
from tests.tiny_training import draws_of, make_batch, perturb, take

OBJECTIVES = plugins.names("objectives")
SETTINGS: dict[str, dict[str, Any]] = {
    "mapo": {"beta": 0.1},  # it has no default
    # By the policy, each step would chase targets that it moves itself.
    "smpo": {"inverter": "reference", "inversion_steps": 3},
}


def at_the_reference(folder: str, prediction: str) -> Any:
    """A tiny SDXL with a fresh adapter; as a "flow" its answers are taken for velocities."""
    model: Any = SDXL(path=folder).load()
    model.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
    if prediction == "flow":
        model.denoiser.process = Process.flow(1000)
    return model


def process_of(prediction: str) -> Process:
    return Process.from_scheduler(DDPMScheduler(prediction_type=prediction))


@pytest.fixture(scope="module")
def shared_model(tiny_sdxl: str, request: pytest.FixtureRequest) -> Any:
    """A tiny SDXL in float64, whose policy has moved away from a reference that is itself an adapter."""
    model = at_the_reference(tiny_sdxl, getattr(request, "param", "epsilon"))
    perturb(model.denoiser.trainable_parameters(), 0.02)
    model.network.double()  # so that batches of another shape agree far beyond float32
    return model


@pytest.fixture
def model(shared_model: Any) -> Any:
    """The shared model, put back after the test."""
    state = {name: tensor.clone() for name, tensor in shared_model.trained_state().items()}
    yield shared_model
    shared_model.load_trained_state(state)
    shared_model.network.zero_grad()


BOTH_PREDICTIONS = pytest.mark.parametrize("shared_model", ["epsilon", "flow"], indirect=True)


def an_objective(name: str, **options: Any) -> Any:
    objective: Any = plugins.get("objectives", name)(**SETTINGS.get(name, {}), **options)
    objective.check_data({"pickscore": ScoreFacts("cosine", "1", low=0.0, high=1.0)})
    return objective


def run(objective: Any, model: Any, batch: Batch, draws: Draws) -> Output:
    shared = objective.prepare(model.denoiser, [(batch, draws)], lambda values: values)
    output: Output = objective.compute(model.denoiser, batch, draws, shared)
    return output


def backward(objective: Any, model: Any, batch: Batch, draws: Draws) -> float:
    """The mean loss, whose gradient is left on the parameters."""
    model.network.zero_grad()
    output = run(objective, model, batch, draws)
    objective.backward(output, 1.0 / batch.num_groups, torch.Tensor.backward)
    return output.loss.mean().item()


def gradient(objective: Any, model: Any, batch: Batch, draws: Draws) -> Tensor:
    backward(objective, model, batch, draws)
    return torch.cat([p.grad.flatten() for p in model.denoiser.trainable_parameters()])


@BOTH_PREDICTIONS
@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_finite_loss_a_group(name: str, model: Any) -> None:
    objective = an_objective(name)
    assert isinstance(objective, Objective) and objective.unit in ("pair", "list", "single")
    batch = make_batch(model, unit=objective.unit)
    output = run(objective, model, batch, draws_of(batch))
    assert output.loss.shape == (4,) and output.loss.dtype == torch.float32
    assert bool(torch.isfinite(output.loss).all()) and output.loss.requires_grad
    for key, values in output.logs.items():
        assert values.shape == (4,) and not values.requires_grad, key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_groups_do_not_see_one_another(name: str, model: Any) -> None:
    """Alone, together and in another order each group has the same loss, and the same draws the same bits."""
    objective = an_objective(name)
    batch = make_batch(model, unit=objective.unit)
    draws = draws_of(batch)
    together = run(objective, model, batch, draws)
    assert torch.equal(run(objective, model, batch, draws).loss, together.loss)
    order = [2, 0, 3, 1]
    permuted = run(objective, model, *take(batch, draws, order))
    assert torch.allclose(permuted.loss, together.loss[order], rtol=1e-4, atol=1e-5)
    if type(objective).prepare is Objective.prepare:  # others may look at the whole step
        alone = torch.cat([run(objective, model, *take(batch, draws, [group])).loss for group in range(4)])
        assert torch.allclose(alone, together.loss, rtol=1e-4, atol=1e-5)


@BOTH_PREDICTIONS
@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_the_adapter_has_a_gradient_and_the_batch_stays_as_it_is(name: str, model: Any) -> None:
    objective = an_objective(name)
    batch = make_batch(model, unit=objective.unit)
    draws = draws_of(batch)
    before = copy.deepcopy((batch, draws))
    grad = gradient(objective, model, batch, draws)
    assert bool(torch.isfinite(grad).all()) and bool(grad.any())
    for parameter_name, parameter in model.network.named_parameters():
        assert (parameter.grad is not None) == (".trained." in parameter_name), parameter_name
    now, then = (batch.latents, draws.noise, draws.t), (before[0].latents, before[1].noise, before[1].t)
    for tensor, copied in zip(now, then, strict=True):
        assert torch.equal(tensor, copied) and tensor.grad is None
    for key, tensor in batch.cond.items():
        assert torch.equal(tensor, before[0].cond[key])
    assert batch.target is None or torch.equal(batch.target, before[0].target)


@BOTH_PREDICTIONS
@pytest.mark.parametrize("name", OBJECTIVES)
def test_twenty_steps_on_one_batch_lower_the_loss(name: str, model: Any) -> None:
    objective = an_objective(name)
    batch = make_batch(model, unit=objective.unit, groups=2)
    draws = draws_of(batch)
    adamw = torch.optim.AdamW(model.denoiser.trainable_parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(20):
        losses.append(backward(objective, model, batch, draws))
        adamw.step()
    assert losses[-1] < 0.99 * losses[0]


@BOTH_PREDICTIONS
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if an_objective(name).unit == "pair"])
def test_swapping_the_labels_turns_the_gradient_round(name: str, model: Any) -> None:
    objective = an_objective(name)
    batch = make_batch(model, groups=1)
    draws = draws_of(batch)
    wins = gradient(objective, model, batch, draws)
    loses = gradient(objective, model, make_batch(model, groups=1, target=torch.zeros(1)), draws)
    cosine = torch.nn.functional.cosine_similarity(wins, loses, dim=0).item()
    # Without a reference there is a pull to the winner beside the margin, which does not turn.
    assert cosine == pytest.approx(-1.0, abs=1e-6 if objective.uses_reference else 0.1)


@pytest.mark.parametrize("shared_model", ["flow"], indirect=True)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_errors_of_noise_say_nothing_where_a_flow_ends(name: str, model: Any) -> None:
    """At sigma = 1 x_t is the noise: errors are 0 whatever the network says, and no gradient is NaN."""
    objective = an_objective(name, error_space="epsilon")
    batch = make_batch(model, unit=objective.unit)
    draws = draws_of(batch)
    draws = Draws(torch.full_like(draws.t, 999), draws.noise)
    output = run(objective, model, batch, draws)
    assert bool(torch.isfinite(output.loss).all())
    assert not gradient(objective, model, batch, draws).any()
    if objective.uses_reference:
        expected = objective.loss_at_reference(output)
        assert output.loss.mean().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_default_beta_for_errors_of_noise_is_doubted_on_those_of_velocity(name: str) -> None:
    objective = an_objective(name)
    flow, others = Process.flow(1000), [process_of("epsilon"), process_of("v_prediction")]
    said = objective.doubtful_default(flow)
    if getattr(type(objective), "beta", None) is None:  # none, or always given
        assert said is None and name in ("mapo", "sft")
        return
    instead = (
        "public recipes of flows use objective.beta=100" if name == "diffusion_dpo" else "give one for these"
    )
    assert said == (
        f"objective.beta={objective.beta:g}, the default, is for errors of noise, and this base's are of "
        f"velocity, about three times as large: {instead}, or take objective.error_space=epsilon"
    )
    assert all(objective.doubtful_default(process) is None for process in others)
    for options in ({"error_space": "epsilon"}, {"error_space": "x0"}, {"beta": 100.0}):
        assert an_objective(name, **options).doubtful_default(flow) is None, options


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if an_objective(name).uses_reference])
def test_where_policy_and_reference_agree_the_loss_is_known(
    name: str, prediction: str, tiny_sdxl: str
) -> None:
    """Exactly, in the dtype of training, and the logits are exactly 0."""
    objective = an_objective(name)
    model = at_the_reference(tiny_sdxl, prediction)
    batch = make_batch(model, unit=objective.unit)
    output = run(objective, model, batch, draws_of(batch))
    expected = objective.loss_at_reference(output)
    assert output.loss.mean().item() == pytest.approx(expected, rel=1e-6)
    assert not output.logs["margin"].any()


WITH_MEMORY = {"kto": {"baseline": "ema", "ema_decay": 0.5}}
"""Settings of objectives under which a step depends on those before it."""


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in OBJECTIVES), *WITH_MEMORY.items()], ids=str
)
def test_a_fresh_instance_with_the_state_of_another_goes_on_like_it(
    name: str, options: dict[str, Any], model: Any
) -> None:
    """Bit for bit, after the way through a checkpoint; with a memory, one without the state does not."""
    batch = make_batch(model, unit=an_objective(name).unit, groups=2)
    draws = draws_of(batch)
    _learn(model, batch, draws)
    old, fresh, blank = (an_objective(name, **options) for _ in range(3))
    first = run(old, model, batch, draws).loss
    stream = io.BytesIO()
    torch.save(old.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    assert state == old.state_dict() and (state == blank.state_dict()) == (not options)
    fresh.load_state_dict(state)
    for _ in range(2):
        second, again = run(old, model, batch, draws), run(fresh, model, batch, draws)
        assert torch.equal(again.loss, second.loss)
        assert all(torch.equal(values, again.logs[key]) for key, values in second.logs.items())
        assert torch.equal(run(blank, model, batch, draws).loss, second.loss) == (not options)
        assert fresh.state_dict() == old.state_dict()
    assert torch.equal(first, second.loss) == (not options)


def _learn(model: Any, batch: Batch, draws: Draws) -> None:
    """Moves the policy to denoise this batch better than the reference does, so that KTO has a baseline."""
    parameters = model.denoiser.trainable_parameters()
    adamw = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(5):
        model.network.zero_grad()
        terms = denoising_terms(model.denoiser, batch.latents, batch.cond, draws, reference=True)
        terms.err.mean().backward()
        adamw.step()
    assert terms.ref_err is not None and terms.err.mean() < terms.ref_err.mean()
