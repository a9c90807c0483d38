"""A reference that moves: the policy itself after a refresh, an average of policies in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.objectives.diffusion_dpo import Plugin as DPO
from tests.tiny_training import draws_of, make_batch, perturb

KINDS = ["lora", "dora", "full", "from a LoRA"]


def started(base: str, kind: str, folder: Path, *, moving: bool = True) -> Any:
    """A model whose policy has moved away from its reference."""
    adapter = AdapterSpec(kind="full" if kind == "full" else "lora", rank=2, dora=kind == "dora")
    if kind == "from a LoRA":
        other: Any = SDXL(path=base).load()
        other.start_training(AdapterSpec(rank=2), seed=3, with_reference=False)
        perturb(other.denoiser.trainable_parameters(), 0.02)
        other.save_adapter(str(folder))
        adapter = AdapterSpec(rank=2, init=str(folder))
    model: Any = SDXL(path=base).load()
    model.start_training(adapter, seed=0, with_reference=True, moving_reference=moving)
    return model


def margins(model: Any) -> torch.Tensor:
    batch = make_batch(model)
    output = DPO(beta=2000.0).compute(model.denoiser, batch, draws_of(batch))
    return output.logs["margin"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_refreshed_reference_is_the_policy_to_the_last_bit(
    kind: str, tiny_sdxl: str, tmp_path: Path
) -> None:
    model = started(tiny_sdxl, kind, tmp_path)
    assert not margins(model).any()  # as at step 0 of a frozen one
    perturb(model.denoiser.trainable_parameters(), 0.02)
    assert bool(margins(model).all())
    model.move_reference(0.0)
    assert not margins(model).any()
    before = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    perturb(model.denoiser.trainable_parameters(), 0.02, seed=1)
    assert bool(margins(model).all())  # the reference stays where it was
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.trained_state().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_moving_average_by_hand_and_its_checkpoint(kind: str, tiny_sdxl: str, tmp_path: Path) -> None:
    model = started(tiny_sdxl, kind, tmp_path)
    start = {name: tensor.clone() for name, tensor in model.reference_state().items()}
    perturb(model.denoiser.trainable_parameters(), 0.02)
    model.move_reference(0.9)
    policy, kept = model.trained_state(), model.reference_state()
    assert kept.keys() == start.keys()
    for name, tensor in kept.items():
        assert torch.allclose(tensor, 0.9 * start[name] + 0.1 * policy[name], atol=1e-6), name
    saved = {name: tensor.clone() for name, tensor in kept.items()}
    told = margins(model)
    model.move_reference(0.0)
    assert not torch.equal(margins(model), told)
    model.load_reference_state(saved)
    assert torch.equal(margins(model), told)


def test_a_frozen_reference_has_no_state_and_refuses_to_move(tiny_sdxl: str, tmp_path: Path) -> None:
    model = started(tiny_sdxl, "lora", tmp_path, moving=False)
    assert model.reference_state() == {}
    with pytest.raises(RuntimeError, match=r"moving_reference=True\) comes first"):
        model.move_reference(0.0)


def test_what_is_saved_is_the_policy_alone(tiny_sdxl: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = started(tiny_sdxl, "lora", tmp_path)
    perturb(model.denoiser.trainable_parameters(), 0.02)
    model.save_adapter(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    assert len(saved) == len(model.trained_state()) and not any("reference" in name for name in saved)
