"""Which schedulers sample a flow is told by what comes out of one that is known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor

from diffalign.common.errors import UserError
from diffalign.models import load_model
from diffalign.models._samplers import check_scheduler, sampler
from diffalign.models.sd3 import Plugin as SD3

SHIFTS: dict[str, dict[str, Any]] = {
    "none": {"shift": 1.0},
    "3": {"shift": 3.0},
    "6": {"shift": 6.0},
    "by size": {"use_dynamic_shifting": True},
}
FITTING = [
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
]
ELSEWHERE = ["FlowMatchHeunDiscreteScheduler"]
"""It knows no shift that goes with the size."""
OTHERS = [
    *("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("PNDMScheduler", "HeunDiscreteScheduler", "LCMScheduler", "UnCLIPScheduler", "AmusedScheduler"),
    *("FlowMatchLCMScheduler", "SASolverScheduler", "DEISMultistepScheduler", "ScoreSdeVeScheduler"),
]


@pytest.fixture(params=SHIFTS)
def flow(request: pytest.FixtureRequest) -> Any:
    return FlowMatchEulerDiscreteScheduler(**SHIFTS[request.param])


def refused(check: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_samplers_of_flows(flow: Any) -> None:
    by_size = bool(flow.config.use_dynamic_shifting)
    for name in [*FITTING, *([] if by_size else ELSEWHERE)]:
        check_scheduler(name, flow, 4)
        check_scheduler(name, flow, None)
    for name in [*OTHERS, *(ELSEWHERE if by_size else [])]:
        told = refused(lambda name=name: check_scheduler(name, flow, 4))
        assert told.startswith(f"scheduler={name} cannot sample this base, which is a flow (")
        assert told.endswith("): use FlowMatchEulerDiscreteScheduler or UniPCMultistepScheduler")


def test_nothing_is_sampled_with_a_scheduler_for_something_else(flow: Any) -> None:
    """DDIM would take a velocity for noise, and draw without a word."""
    for name in ("DDIMScheduler", "EulerDiscreteScheduler"):
        assert "cannot sample this base, which is a flow" in refused(lambda name=name: sampler(name, flow))
    assert "did you mean 'DDIMScheduler'" in refused(lambda: sampler("DDIMSchedular", flow))


def test_the_own_scheduler_is_never_doubted() -> None:
    """A base that was distilled for LCM is drawn with LCM, which samples no flow of another base."""
    own = diffusers.FlowMatchLCMScheduler(shift=3.0)
    check_scheduler("FlowMatchLCMScheduler", own, 4)
    assert sampler("FlowMatchLCMScheduler", own).config == own.config


def test_trying_out_leaves_the_random_stream_alone(flow: Any) -> None:
    before = torch.get_rng_state()
    sampler("UniPCMultistepScheduler", flow)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pipeline_says_what_it_hands_over(flow: Any) -> None:
    """One that hands over its own levels cannot use a scheduler that takes none."""
    refusal = refused(
        lambda: check_scheduler(
            "FlowMatchHeunDiscreteScheduler", flow, 4, lambda scheduler, steps: {"sigmas": [1.0, 0.5]}
        )
    )
    assert "set_timesteps() got an unexpected keyword argument 'sigmas'" in refusal


def test_schedulers_of_bases_that_are_no_flows() -> None:
    base = diffusers.DDIMScheduler()
    for name in ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"):
        check_scheduler(name, base, 4)
        assert not sampler(name, base).config.get("use_flow_sigmas")
    told = refused(lambda: check_scheduler("FlowMatchEulerDiscreteScheduler", base, 4))
    assert told.endswith("use one of the DDIM, Euler, DPM-Solver or UniPC kind")


@pytest.mark.parametrize("by_size", [False, True])
def test_a_sampler_draws_as_in_plain_diffusers(by_size: bool, tmp_path: Path) -> None:
    """Told there what it is told here: a flow, its shift and its levels."""
    path = SD3.tiny(tmp_path, use_dynamic_shifting=by_size).path
    model: Any = load_model("sd3", path)
    noise: list[Tensor] = []
    handle = model.network.register_forward_pre_hook(
        lambda module, args, named: noise.append(named["hidden_states"].clone()), with_kwargs=True
    )
    latents = model.sample(
        ["a ring"], [0], num_inference_steps=4, guidance_scale=1.0, scheduler="UniPCMultistepScheduler"
    )
    handle.remove()
    plain = StableDiffusion3Pipeline.from_pretrained(path)
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = diffusers.UniPCMultistepScheduler.from_config(
        plain.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    theirs = plain(
        "a ring", latents=noise[0], num_inference_steps=4, guidance_scale=1.0, output_type="latent"
    ).images
    assert torch.equal(theirs, latents)
    with pytest.raises(UserError, match="scheduler=DDIMScheduler cannot sample this base, which is a flow"):
        model.sample(["a ring"], [0], scheduler="DDIMScheduler")
