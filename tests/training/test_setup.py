"""The device, the precision, and whether processes find one another."""

from __future__ import annotations

import pytest
import torch

from diffalign.common.errors import UserError
from diffalign.training.setup import accelerator_for


def test_fp16_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        assert accelerator_for("fp16").mixed_precision == "fp16"
        return
    with pytest.raises(UserError, match=r"precision=fp16 needs a GPU"):
        accelerator_for("fp16")


def test_processes_that_do_not_find_one_another_are_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train alone into the same folder: so it is where a device has no way to join them (mps)."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"2 processes were started, but accelerate does not join them"):
        accelerator_for("fp32")
