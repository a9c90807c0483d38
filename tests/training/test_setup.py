"""The device, the precision, and whether processes find one another."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState

from diffalign.common.errors import UserError
from diffalign.training import setup
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


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_a_launcher_that_asks_for_split_weights_is_refused(
    variable: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=rf"^{name} was asked for \({variable}\), but .* use shard=true$"):
        accelerator_for("fp32")
    monkeypatch.setenv(variable, "false")
    assert accelerator_for("fp32").num_processes == 1


def test_a_network_is_not_split_over_one_process() -> None:
    with pytest.raises(
        UserError, match=r"^shard=true splits the network over several .* or use shard=false$"
    ):
        accelerator_for("fp32", shard=True)


def test_autocast_keeps_no_copies_of_a_split_network() -> None:
    for shard in (False, True):
        AcceleratorState._reset_state()
        with setup._accelerator("bf16", shard).autocast():
            assert torch.is_autocast_cache_enabled() is not shard


def test_a_launcher_does_not_change_what_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would divide every gradient by its own count, and take its own precision."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerator = accelerator_for("fp32")
    weight = torch.ones(1, requires_grad=True)
    accelerator.backward(3.0 * weight.sum())
    assert weight.grad is not None and float(weight.grad) == 3.0
    assert accelerator.mixed_precision == "no"
