"""The moving average by hand, and what a run does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.training import loop
from diffalign.training.checkpoint import load_latest
from diffalign.training.ema import Average
from diffalign.training.implicit import judge
from diffalign.training.specs import EmaSpec, ValidationSpec
from tests.tiny_training import make_run, make_set


def averages(values: list[float], **options: Any) -> list[float]:
    """The average after each of the steps whose weights are `values`; it begins at 7."""
    parameter = torch.nn.Parameter(torch.tensor([7.0]))
    average, found = Average(EmaSpec(**options), [parameter]), []
    for step, value in enumerate(values, start=1):
        parameter.data.fill_(value)
        average.move(step)
        with average.in_place():
            found.append(parameter.item())
        assert parameter.item() == value
    return found


def test_the_first_moves_by_hand() -> None:
    """A copy of 1; then 2/11 of it and 9/11 of 2: 20/11; then a quarter of that and 3/4 of 3: 119/44."""
    assert averages([1.0, 2.0, 3.0], decay=0.9) == pytest.approx([1.0, 20 / 11, 119 / 44])


def test_the_decay_grows_no_further_than_it_is_set() -> None:
    """2/11 is below 0.2 and stays; 3/12 and all that follow are 0.2."""
    third = 0.2 * 20 / 11 + 0.8 * 3
    assert averages([1.0, 2.0, 3.0, 4.0], decay=0.2) == pytest.approx(
        [1.0, 20 / 11, third, 0.2 * third + 0.8 * 4]
    )


def test_every_and_start_by_hand() -> None:
    """Every 2: nothing after odd steps. From 4 on: 2, 4 and the next move are copies, 8 is not."""
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    second = 2 / 11 * 2 + 9 / 11 * 4
    assert averages(values[:5], decay=0.9, every=2) == pytest.approx([7.0, 2.0, 2.0, second, second])
    last = 2 / 11 * 6 + 9 / 11 * 8
    assert averages(values, decay=0.9, every=2, start=4) == pytest.approx([7, 2, 2, 4, 4, 6, 6, last])


def test_weights_are_back_bit_for_bit_also_after_a_failure() -> None:
    parameter = torch.nn.Parameter(torch.tensor([0.1, 1e-20, -3.3]))
    average = Average(EmaSpec(decay=0.5), [parameter])
    before = parameter.detach().clone()
    parameter.data.mul_(3.0)
    changed = parameter.detach().clone()
    with pytest.raises(ZeroDivisionError), average.in_place():
        assert torch.equal(parameter, before)
        raise ZeroDivisionError
    assert torch.equal(parameter, changed) and parameter.requires_grad


def test_without_a_decay_there_is_no_average() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    average = Average(EmaSpec(), [parameter])
    parameter.data.fill_(2.0)
    average.move(1)
    with average.in_place():
        assert parameter.item() == 2.0
    assert average.state_dict() == {}


def test_half_precision_weights_are_averaged_in_float32() -> None:
    """Steps of 1/1024 at 1: the average's share of them is nothing in bfloat16."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    average = Average(EmaSpec(decay=0.9), [parameter])
    for step in range(1, 4):
        parameter.data.fill_(1.0 + (step - 1) / 128)
        average.move(step)
    (kept,) = average.state_dict()["weights"]
    second = 9 / 11 / 128
    assert kept.dtype == torch.float32 and kept.item() == pytest.approx(1 + second / 4 + 0.75 * 2 / 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"ema\.decay is 1\.0: use a value in \[0, 1\)"),
        ({"decay": -0.1}, r"ema\.decay is -0\.1"),
        ({"every": 2}, r"ema\.every means nothing without ema\.decay"),
        ({"start": 2}, r"ema\.start means nothing without ema\.decay"),
        ({"decay": 0.9, "every": 0}, r"ema\.every is 0: use 1 or more"),
        ({"decay": 0.9, "start": -1}, r"ema\.start is -1: use 0 or more"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EmaSpec(**options)


def test_a_run_measures_and_saves_the_average(tiny_sdxl: str, tmp_path: Path) -> None:
    """In one go and in two parts: the same bits; the adapter is the average, and so is what was measured."""
    model: Any = SDXL(path=tiny_sdxl).load()
    model.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
    data, start = make_set(model, 7), copied(model.trained_state())
    watched = {
        "ema": EmaSpec(decay=0.9, every=2),
        "validation": ValidationSpec(share=0.5, every=3, draws=2),
        "heldout": data.subset([0, 1]),
    }
    plain = loop.fit(make_run(model, data, tmp_path / "plain", num_steps=6))
    raw = copied(model.trained_state())
    found = []
    for parts in ((6,), (3, 6)):
        model.load_trained_state(start)
        out = tmp_path / str(len(parts))
        for steps in parts:
            run = make_run(model, data, out, num_steps=steps, **watched)
            summary = loop.fit(run)
        loop.finish(run, "a card")
        kept = load_latest(out, identity="this run")
        assert kept is not None and plain["steps"] == summary["steps"]
        assert all(torch.equal(kept.trained[name], raw[name]) for name in raw)  # the run is what it was
        assert all(torch.equal(value, raw[name]) for name, value in model.trained_state().items())
        found.append((kept.state["average"], files.read_jsonl(out / "metrics.jsonl"), summary))
    (whole, rows, summary), (parts_, rows_, summary_) = found
    assert whole["moves"] == parts_["moves"] == 3
    assert all(torch.equal(a, b) for a, b in zip(whole["weights"], parts_["weights"], strict=True))
    assert rows == rows_ and summary == summary_

    last = adapter(tmp_path / "1" / "adapter_last")
    averaged = adapter(tmp_path / "1" / "adapter")
    assert sorted(last) == sorted(averaged) and (tmp_path / "1" / "adapter" / "README.md").is_file()
    assert {name: value.sum() for name, value in last.items()} != {n: v.sum() for n, v in averaged.items()}
    with run.average.in_place():
        names = {name: value for name, value in model.trained_state().items()}
        assert all(torch.equal(averaged[f"unet.{name}"], value) for name, value in names.items())
        on_average = margin(model, data)
    assert all(torch.equal(last[f"unet.{name}"], value) for name, value in model.trained_state().items())
    measured = [row["error_margin"] for row in rows if row["kind"] == "validation"][-1]
    assert measured == on_average != margin(model, data)


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def margin(model: Any, data: Any) -> float:
    judged = list(judge(model.denoiser, data.subset([0, 1]), num_draws=2, batch_size=4, device="cpu"))
    return sum(judgement.margin() for judgement in judged) / len(judged)
