"""Whether a diffusers scheduler can sample a base: most of the fifty are made for models of another kind."""

from __future__ import annotations

from typing import Any

from diffalign.common.errors import UserError, brief
from diffalign.models import scheduler_class

DEFAULT_STEPS = 50
"""Of the Stable Diffusion pipelines."""


def check_scheduler(name: str, base_scheduler: Any, num_inference_steps: int | None) -> None:
    """Takes one step on zeros with the scheduler `name` under the config of the base's own.

    Raises:
        UserError: no such scheduler, or it cannot be built, set up or stepped.
    """
    import torch

    kind = scheduler_class(name)
    try:
        scheduler = kind.from_config(base_scheduler.config)
        scheduler.set_timesteps(num_inference_steps or DEFAULT_STEPS)
        latents = torch.zeros(1, 4, 8, 8) * scheduler.init_noise_sigma
        first = scheduler.timesteps[0]
        scheduler.step(scheduler.scale_model_input(latents, first), first, latents)
    except Exception as error:  # a scheduler for another kind of model fails in ways of its own
        raise UserError(
            f"scheduler={name} cannot sample this base ({brief(error)}): use one of the DDIM, Euler, "
            "DPM-Solver or UniPC kind"
        ) from error
