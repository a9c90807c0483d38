"""Whether a diffusers scheduler can sample a base: most of the fifty are made for models of another kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffalign.common.errors import UserError, brief
from diffalign.models import scheduler_class
from diffalign.models._parts import quiet_libraries

DEFAULT_STEPS = 50
"""Of the Stable Diffusion pipelines."""
MEAN, DEVIATION = 1.0, 0.5
"""Of the pixels whose flow, known in closed form, a sampler is tried on."""

Arguments = Callable[[Any, int], dict[str, Any]]


def timestep_arguments(scheduler: Any, steps: int) -> dict[str, Any]:
    """What most pipelines hand to `set_timesteps`; of a shift that goes with the size, that of some size."""
    sized = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    return {"num_inference_steps": steps, **sized}


def sampler(name: str, base_scheduler: Any, arguments: Arguments = timestep_arguments) -> Any:
    """The diffusers scheduler `name` under the config of the base's own.

    One that samples flows besides other models is told that this is a flow, and how its levels are shifted.

    Args:
        name: of the class.
        base_scheduler: the base's own.
        arguments: `(scheduler, steps)` -> what the base's pipeline hands to `set_timesteps`.

    Raises:
        UserError: no such scheduler, or the base is a flow and the scheduler samples something else.
    """
    kind, config = scheduler_class(name), dict(base_scheduler.config)
    if not _is_flow(base_scheduler):
        return kind.from_config(config)
    if "use_flow_sigmas" in inspect.signature(kind.__init__).parameters:
        as_flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        config = {**config, **as_flow, "flow_shift": config.get("shift", 1.0)}
    try:
        if kind is not type(base_scheduler):
            _try_on_closed_form(kind.from_config(config), arguments)
        return kind.from_config(config)
    except Exception as error:  # a scheduler for another kind of model fails in ways of its own
        raise _unfit(name, base_scheduler, error) from error


def check_scheduler(
    name: str,
    base_scheduler: Any,
    num_inference_steps: int | None,
    arguments: Arguments = timestep_arguments,
) -> None:
    """Takes one step on zeros with `sampler(name, base_scheduler, arguments)`.

    Raises:
        UserError: no such scheduler, or it cannot be built, set up or stepped, or samples something else.
    """
    scheduler_class(name)
    try:
        scheduler = sampler(name, base_scheduler, arguments)
        scheduler.set_timesteps(**arguments(scheduler, num_inference_steps or DEFAULT_STEPS))
        latents, first = torch.zeros(1, 4, 8, 8), scheduler.timesteps[0]
        if not _is_flow(base_scheduler):  # whose pipelines scale nothing
            latents = scheduler.scale_model_input(latents * scheduler.init_noise_sigma, first)
        scheduler.step(latents, first, latents)
    except UserError:
        raise
    except Exception as error:  # as above
        raise _unfit(name, base_scheduler, error) from error


def _is_flow(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch")


def _unfit(name: str, base_scheduler: Any, error: Exception) -> UserError:
    base, fitting = "this base", "one of the DDIM, Euler, DPM-Solver or UniPC kind"
    if _is_flow(base_scheduler):
        base = "this base, which is a flow"
        fitting = "FlowMatchEulerDiscreteScheduler or UniPCMultistepScheduler"
    return UserError(f"scheduler={name} cannot sample {base} ({brief(error)}): use {fitting}")


def _try_on_closed_form(scheduler: Any, arguments: Arguments) -> None:
    """Samples independent normal pixels along the velocity that a perfect network would give.

    Most schedulers take any numbers for noise and draw nonsense, so that nothing but the outcome tells.

    Raises:
        ValueError: their mean is off by more than 0.02, or their deviation by more than 25%. Measured in 40
            steps at shifts of 1 to 6 (diffusers 0.42.1): those that sample flows stay within 0.01 and 22%,
            DEIS and SA-Solver leave 0.03 or more of the noise in, LCM is 33% off.
    """
    scheduler.set_timesteps(**arguments(scheduler, 40))
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(0)
        x = torch.randn(1, 4, 32, 32)
        x = (x - x.mean()) / x.std()
        for time in scheduler.timesteps:
            sigma = float(time) / scheduler.config.num_train_timesteps
            x = scheduler.step(_velocity(x, sigma), time, x, return_dict=False)[0]
    mean, deviation = float(x.mean()), float(x.std())
    if not (abs(mean - MEAN) <= 0.02 and abs(deviation / DEVIATION - 1.0) <= 0.25):
        raise ValueError(
            f"pixels of mean {MEAN} and deviation {DEVIATION} come out with {mean:.2f} and {deviation:.2f}"
        )


def _velocity(x: Tensor, sigma: float) -> Tensor:
    """E[eps - x0 | x], where x = (1 - sigma) x0 + sigma eps and x0 is normal."""
    alpha = 1.0 - sigma
    centred = (x - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)
    return sigma * centred - (MEAN + alpha * DEVIATION**2 * centred)
