"""Every objective on every backbone, at the smallest size: what each pair of plug-ins must keep to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.common import files, plugins
from diffalign.data.specs import LoaderSpec
from diffalign.models._spec import AdapterSpec
from diffalign.training import loop
from diffalign.training.specs import CheckpointSpec, OptimizerSpec
from tests.objectives.test_contract import OBJECTIVES, an_objective, backward, run
from tests.tiny_training import draws_of, make_batch, make_run, make_set, perturb

BACKBONES = plugins.names("models")
PAIRS = pytest.mark.parametrize("name", OBJECTIVES)


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model of each family with a fresh adapter."""
    folder = tmp_path_factory.mktemp("backbone") / request.param
    model: Any = plugins.get("models", request.param).tiny(folder).load()
    model.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
    return model


@pytest.fixture
def model(backbone: Any) -> Any:
    """The model of the family, put back after the test."""
    state = {name: tensor.clone() for name, tensor in backbone.trained_state().items()}
    yield backbone
    backbone.load_trained_state(state)
    backbone.network.zero_grad()


@PAIRS
def test_at_the_reference_the_loss_is_known(name: str, model: Any) -> None:
    objective = an_objective(name)
    batch = make_batch(model, unit=objective.unit, groups=2)
    output = run(objective, model, batch, draws_of(batch))
    assert bool(torch.isfinite(output.loss).all())
    if objective.uses_reference:
        expected = objective.loss_at_reference(output)
        assert output.loss.mean().item() == pytest.approx(expected, rel=1e-6)
        assert not output.logs["margin"].any()


@PAIRS
def test_gradients_reach_the_adapter_alone_and_one_step_improves_the_batch(name: str, model: Any) -> None:
    objective = an_objective(name)
    batch = make_batch(model, unit=objective.unit, groups=2)
    draws = draws_of(batch)
    perturb(model.denoiser.trainable_parameters(), 0.02)
    before = backward(objective, model, batch, draws)
    gradients = {}
    for parameter_name, parameter in model.network.named_parameters():
        assert (parameter.grad is not None) == (".trained." in parameter_name), parameter_name
        if parameter.grad is not None:
            gradients[parameter_name] = parameter.grad.clone()
    squared = sum(float(gradient.square().sum()) for gradient in gradients.values())
    assert squared > 0.0
    # A step along the gradient that should lower the loss by a thousandth of itself.
    size = 1e-3 * abs(before) / squared
    with torch.no_grad():
        for parameter_name, parameter in model.network.named_parameters():
            if parameter_name in gradients:
                parameter.sub_(size * gradients[parameter_name])
    assert backward(objective, model, batch, draws) < before


@PAIRS
def test_a_run_that_is_cut_short_goes_on_to_the_same_bits(name: str, model: Any, tmp_path: Path) -> None:
    """Three steps in one go, and three that a crash in the third has cut in two."""
    train_set = make_set(model, 4, unit=an_objective(name).unit, targets=(1.0, 0.0), prompts=2, rated=True)
    settings: dict[str, Any] = {
        "num_steps": 3,
        "checkpoint": CheckpointSpec(every=1),
        "loader": LoaderSpec(batch_size=2),
        "optimizer": OptimizerSpec(lr=1e-3),
    }
    start = {key: tensor.clone() for key, tensor in model.trained_state().items()}
    loop.fit(make_run(model, train_set, tmp_path / "whole", objective=an_objective(name), **settings))
    whole = {key: tensor.clone() for key, tensor in model.trained_state().items()}
    model.load_trained_state(start)
    crashing = an_objective(name)
    steps = iter(range(2))

    def compute(*arguments: Any) -> Any:
        if next(steps, None) is None:
            raise ZeroDivisionError
        return type(crashing).compute(crashing, *arguments)

    crashing.compute = compute
    with pytest.raises(ZeroDivisionError):
        loop.fit(make_run(model, train_set, tmp_path / "cut", objective=crashing, **settings))
    torch.manual_seed(1234)  # whatever the global stream is at
    loop.fit(make_run(model, train_set, tmp_path / "cut", objective=an_objective(name), **settings))
    ours = model.trained_state()
    assert all(torch.equal(ours[key], tensor) for key, tensor in whole.items())
    assert not all(torch.equal(start[key], tensor) for key, tensor in whole.items())
    metrics = [files.read_jsonl(tmp_path / folder / "metrics.jsonl") for folder in ("whole", "cut")]
    assert metrics[0] == metrics[1]
