"""Sample pictures while training: whatever becomes of them, the run goes on as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.models import load_model
from diffalign.models._spec import AdapterSpec
from diffalign.training.specs import SampleSpec
from diffalign.training.watch import Watch
from tests.tiny_training import make_run


@pytest.fixture
def model(tiny_sd: str) -> Any:
    loaded: Any = load_model("sd", tiny_sd)
    loaded.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
    return loaded


def watch_of(model: Any, out: Path) -> Watch:
    samples = SampleSpec(prompts=["a ring"], every=1, num_inference_steps=1)
    embedded = model.embed_for_generation(samples.prompts)
    return make_run(model, None, out, samples=samples, embedded=embedded).watch  # type: ignore[arg-type]


def test_pictures_that_are_not_finite_are_said_and_left_out(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for parameter in model.denoiser.trainable_parameters():
        parameter.data.fill_(torch.nan)
    watch_of(model, tmp_path).look(model, 3, log=None)  # type: ignore[arg-type]
    assert "step 3: no sample pictures: the picture of 'a ring' with seed 0" in capsys.readouterr().err
    assert model.network.training and not (tmp_path / "samples").exists()


def test_dropout_is_back_after_a_failure(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watch_of(model, tmp_path)
    monkeypatch.setattr(model, "decode", lambda latents: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        watch.look(model, 3, log=None)  # type: ignore[arg-type]
    assert model.network.training
