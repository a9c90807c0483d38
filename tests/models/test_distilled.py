"""Few-step bases: trained on an explicit grid alone, drawn with their own sampler in their own few steps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from diffusers.utils import logging as diffusers_logging

from diffalign.common.errors import UserError
from diffalign.diffusion.specs import TimestepSpec
from diffalign.models import _distilled, load_model
from diffalign.models._samplers import sampler
from diffalign.models.flux import Plugin as Flux
from diffalign.models.sd3 import Plugin as SD3
from diffalign.models.sdxl import Plugin as SDXL

GRID4 = [999, 749, 499, 249]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny pipelines: an SDXL, an SD3 (shift 3), a FLUX as schnell is (no guidance embedding, shift 1)."""
    folder = tmp_path_factory.mktemp("distilled")
    return {
        "sdxl": SDXL.tiny(folder / "sdxl").path,
        "sd3": SD3.tiny(folder / "sd3").path,
        "flux": Flux.tiny(folder / "flux", guidance_embeds=False, use_dynamic_shifting=False, shift=1.0).path,
        "dev": Flux.tiny(folder / "dev").path,
    }


def model(folders: dict[str, str], name: str, **options: Any) -> Any:
    return load_model({"dev": "flux"}.get(name, name), folders[name], **options)


@pytest.mark.parametrize(
    ("name", "options", "grid"),
    [
        ("sdxl", {"distilled_steps": 4}, GRID4),
        ("sdxl", {"distilled_steps": 1}, [999]),
        # shift 3: sigma 0.75 becomes 0.9, 0.5 becomes 0.75; the pipeline's last level is the smallest, 0.003
        ("flux", {}, GRID4),
    ],
)
def test_other_timesteps_are_refused_with_those_of_the_sampler(
    folders: dict[str, str], name: str, options: dict[str, Any], grid: list[int]
) -> None:
    base = model(folders, name, **options)
    words = ",".join(map(str, grid))
    steps = "1 step" if grid == [999] else "4 steps"
    with pytest.raises(UserError, match=rf"distilled to {steps} and .* timesteps\.grid=\[{words}\]"):
        base.check_timesteps(TimestepSpec())
    with pytest.raises(UserError, match=r"timesteps\.kind=grid"):
        base.check_timesteps(TimestepSpec(kind="logit_normal"))
    base.check_timesteps(TimestepSpec(kind="grid", grid=grid))


def test_the_grid_of_a_shifted_flow_is_where_its_sampler_goes(folders: dict[str, str]) -> None:
    """Those that the pipeline itself visits."""
    base = model(folders, "sd3", distilled_steps=4)
    with pytest.raises(UserError) as refusal:
        base.check_timesteps(TimestepSpec())
    seen: list[float] = []
    base.network.register_forward_pre_hook(
        lambda module, arguments, options: seen.append(float(options["timestep"][0])), with_kwargs=True
    )
    base.sample(["a"], [0])
    assert len(seen) == 4 and seen[0] == 1000.0
    expected = ",".join(str(max(round(time - 1.0), 0)) for time in seen)
    assert f"timesteps.grid=[{expected}]" in str(refusal.value)


def test_the_timesteps_that_a_base_knows(folders: dict[str, str], tmp_path: Path) -> None:
    assert model(folders, "sdxl").known_timesteps is None
    assert model(folders, "sdxl", distilled_steps=4).known_timesteps == GRID4
    assert model(folders, "flux").known_timesteps == GRID4
    # Two evaluations a step, at one timestep: it is named once.
    path = tmp_path / "sdxl"
    shutil.copytree(folders["sdxl"], path)
    HeunDiscreteScheduler.from_pretrained(path / "scheduler").save_pretrained(path / "scheduler")
    index = path / "model_index.json"
    index.write_text(index.read_text().replace("EulerDiscreteScheduler", "HeunDiscreteScheduler"))
    assert load_model("sdxl", str(path), distilled_steps=4).known_timesteps == GRID4


def test_training_says_that_it_is_experimental_and_names_levels_that_are_never_visited(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = model(folders, "sdxl", distilled_steps=4)
    base.check_timesteps(TimestepSpec(kind="grid", grid=GRID4))
    assert "experimental: training a base that is distilled to 4 steps\n" in capsys.readouterr().err
    base.check_timesteps(TimestepSpec(kind="grid", grid=[999, 500]))
    assert "its sampler never visits timestep 500" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"timestep 1000 is outside \[0, 1000\)"):
        base.check_timesteps(TimestepSpec(kind="grid", grid=[1000]))


def test_a_name_that_sounds_distilled_is_asked_about(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sdxl-Turbo").symlink_to(folders["sdxl"])
    base: Any = load_model("sdxl", str(tmp_path / "sdxl-Turbo"))
    base.check_timesteps(TimestepSpec())
    assert "sounds like a distilled base: if it is one, give model.distilled_steps" in capsys.readouterr().err
    model(folders, "sdxl").check_timesteps(TimestepSpec())
    assert "distilled" not in capsys.readouterr().err
    (tmp_path / "sdxl_lightning_4step_unet").symlink_to(f"{folders['sdxl']}/unet")
    model(folders, "sdxl", unet=str(tmp_path / "sdxl_lightning_4step_unet")).check_timesteps(TimestepSpec())
    assert "sdxl_lightning_4step_unet sounds like a distilled base" in capsys.readouterr().err


NAMES = {
    "ByteDance/Hyper-SD": True,
    "ByteDance/SDXL-Lightning": True,
    "latent-consistency/lcm-sdxl": True,
    "dreamshaperXL_turboDpmppSDE.safetensors": True,
    "hyper-realistic-xl": False,
    "stabilityai/stable-diffusion-xl-base-1.0": False,
    "calcmodel": False,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_sound_distilled(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _distilled.hint(name)
    assert bool(capsys.readouterr().err) == NAMES[name]


def test_it_draws_in_its_own_steps_without_guidance(folders: dict[str, str]) -> None:
    base = model(folders, "sdxl", distilled_steps=2)
    seen: list[tuple[int, float]] = []
    base.network.register_forward_pre_hook(
        lambda module, arguments: seen.append((len(arguments[0]), float(arguments[1])))
    )
    mine = base.sample(["a ring"], [3])
    assert seen == [
        (1, 999.0),
        (1, 499.0),
    ]  # one row: no guidance; from pure noise, though SDXL's own is "leading"
    plain = model(folders, "sdxl")
    plain.sample(["a ring"], [3], num_inference_steps=2, guidance_scale=0.0)
    told = base.sample(["a ring"], [3], num_inference_steps=3, guidance_scale=2.0)
    assert [rows for rows, _ in seen[2:]] == [2, 2, 2]  # what is said counts
    assert not torch.equal(mine, told)


def test_settings_of_the_bases_own_scheduler_are_left_out_without_a_word(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of another one in its place, whose steps are made to end at noise alone."""
    monkeypatch.setattr(diffusers_logging.get_logger("diffusers"), "propagate", True)
    other = sampler("LCMScheduler", model(folders, "sdxl").parts["scheduler"])
    made = _distilled.trailing(other)
    assert made.config.timestep_spacing == "trailing" != other.config.timestep_spacing
    assert not caplog.text


def test_a_schnell_draws_in_four_steps(folders: dict[str, str]) -> None:
    base = model(folders, "flux")
    seen: list[float] = []
    base.network.register_forward_pre_hook(
        lambda module, arguments, options: seen.append(round(float(options["timestep"][0]), 3)),
        with_kwargs=True,
    )
    base.sample(["a"], [0])
    assert seen == [1.0, 0.75, 0.5, 0.25]


def test_a_dev_that_was_distilled_is_told_its_guidance(folders: dict[str, str]) -> None:
    """As Hyper-FLUX.1-dev is: its guidance is no classifier-free one, which few steps do without."""
    base = model(folders, "dev", distilled_steps=8)
    seen: list[float] = []
    base.network.register_forward_pre_hook(
        lambda module, arguments, options: seen.append(float(options["guidance"][0])), with_kwargs=True
    )
    base.sample(["a"], [0])
    assert seen == [3.5] * 8


@pytest.mark.parametrize("steps", [-1, 0, 51, 10**12])
def test_a_number_of_steps_that_is_not_few_is_refused(steps: int) -> None:
    with pytest.raises(UserError, match=rf"model\.distilled_steps is {steps}: use 1 to 50; leave it out of"):
        SDXL(path="x", distilled_steps=steps)
