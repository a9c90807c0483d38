"""Few-step bases: trained on an explicit grid alone, drawn with their own sampler in their own few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.common.errors import UserError
from diffalign.diffusion.specs import TimestepSpec
from diffalign.models import load_model
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
    }


def model(folders: dict[str, str], name: str, **options: Any) -> Any:
    return load_model(name, folders[name], **options)


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
    with pytest.raises(UserError, match=rf"distilled to {len(grid)} steps .* timesteps\.grid=\[{words}\]"):
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


def test_a_schnell_draws_in_four_steps(folders: dict[str, str]) -> None:
    base = model(folders, "flux")
    seen: list[float] = []
    base.network.register_forward_pre_hook(
        lambda module, arguments, options: seen.append(round(float(options["timestep"][0]), 3)),
        with_kwargs=True,
    )
    base.sample(["a"], [0])
    assert seen == [1.0, 0.75, 0.5, 0.25]


def test_a_number_of_steps_below_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.distilled_steps is 0: use 1 or more"):
        SDXL(path="x", distilled_steps=0)
