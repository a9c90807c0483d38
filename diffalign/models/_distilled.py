"""Bases that were distilled to a few steps: what they may be trained on, and how they draw."""

from __future__ import annotations

import re
from typing import Any

from diffalign.common.errors import UserError
from diffalign.common.progress import say
from diffalign.diffusion.process import Process
from diffalign.diffusion.specs import TimestepSpec
from diffalign.models._parts import quiet_libraries

_NAMES = re.compile(r"turbo|lightning|schnell|hyper[-_ ]?(sd|flux)|(?<![a-z])lcm(?![a-z])", re.IGNORECASE)


def check_timesteps(timesteps: TimestepSpec, steps: int, visited: list[int]) -> None:
    """Refuses training timesteps other than an explicit grid: such a base knows a few levels alone.

    Args:
        timesteps: of the recipe.
        steps: that the base was distilled to.
        visited: the timesteps of its own sampler at that many steps.
    """
    if timesteps.kind != "grid":
        grid = ",".join(map(str, visited))
        raise UserError(
            f"the base is distilled to {_count(steps)} and knows the levels of those alone: use "
            f"timesteps.kind=grid timesteps.grid=[{grid}], which are its own sampler's"
        )
    strange = sorted(set(timesteps.grid) - set(visited))
    say(
        f"experimental: training a base that is distilled to {_count(steps)}"
        + (f"; its sampler never visits timestep {', '.join(map(str, strange))}" if strange else "")
    )


def _count(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"


def hint(path: str) -> None:
    """Says so where the name of a base sounds distilled and nothing was said of it."""
    if _NAMES.search(path):
        say(f"{path} sounds like a distilled base: if it is one, give model.distilled_steps, e.g. 4")


def trailing(scheduler: Any) -> Any:
    """The scheduler as few-step bases are sampled: its steps end at the last timestep, which is noise alone.

    Convention: SDXL-Turbo and SDXL-Lightning are published with timestep_spacing="trailing"; other spacings
    (SDXL's own is "leading") begin at a level below pure noise, where a one-step base draws nothing. Flows
    have no spacing.
    """
    if scheduler.config.get("timestep_spacing", "trailing") == "trailing":
        return scheduler
    with quiet_libraries():  # of settings that it has from another scheduler, whose place it took
        return type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")


def visited(scheduler: Any, process: Process) -> list[int]:
    """The different timesteps that a scheduler visits, once its `set_timesteps` was called; noise first."""
    if process.prediction == "flow":
        levels = scheduler.sigmas[scheduler.sigmas > 0.0] * process.num_timesteps - 1.0
    else:
        levels = scheduler.timesteps
    rounded = [min(max(round(float(level)), 0), process.num_timesteps - 1) for level in levels]
    return list(dict.fromkeys(rounded))  # of two evaluations a step both may be at one
