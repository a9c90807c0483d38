"""The optimizers by hand, what they keep, and that a run goes on with the same bits whichever it has."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.training import loop
from diffalign.training.checkpoint import load_latest
from diffalign.training.optimizers import check_optimizer, make_optimizer
from diffalign.training.specs import OptimizerSpec
from tests.tiny_training import make_run, make_set

GRADIENT = torch.outer(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5, -1.0]))
SIGNS = torch.tensor([[1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])


def stepped(start: float, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """A 2 x 3 matrix of `start` after one step along GRADIENT, and what the optimizer keeps of it."""
    parameter = torch.nn.Parameter(torch.full((2, 3), start))
    optimizer = make_optimizer(OptimizerSpec(**options), [parameter])
    parameter.grad = GRADIENT.clone()
    optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def test_adamw_by_hand() -> None:
    """The first step is lr times the sign, after a decay of lr times weight_decay."""
    weights, _ = stepped(1.0, lr=0.1, weight_decay=0.5)
    assert torch.allclose(weights, 0.95 - 0.1 * SIGNS, atol=1e-6)


def test_adafactor_by_hand() -> None:
    """A gradient that is a product of two vectors is what row and column factors describe exactly: its step
    is lr times the sign, of root mean square 1, so that nothing is cut; lr is absolute also at 0.
    """
    weights, kept = stepped(1.0, kind="adafactor", lr=0.1, weight_decay=0.5)
    assert torch.allclose(weights, 0.95 - 0.1 * SIGNS, atol=1e-6)
    weights, _ = stepped(0.0, kind="adafactor", lr=0.1)
    assert torch.allclose(weights, -0.1 * SIGNS, atol=1e-6)
    rows, columns = kept["exp_avg_sq_row"], kept["exp_avg_sq_col"]
    assert torch.allclose(rows, torch.tensor([10.25, 41.0]) / 3)  # (9 + 1/4 + 1) / 3, and 4 times that
    assert torch.allclose(columns, torch.tensor([22.5, 0.625, 2.5]))  # (1 + 4) / 2 times 9, 1/4, 1
    assert "exp_avg" not in kept


def test_adafactor_cuts_its_own_step() -> None:
    """Of a vector the second moment is kept whole: 1, then 100 - 99 * (1 - 2^-0.8) = 57.86; the second step
    of 10 / sqrt(57.86) = 1.31 is cut to 1.
    """
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer(OptimizerSpec(kind="adafactor", lr=0.1, weight_decay=0.0), [parameter])
    for gradient in (1.0, 10.0):
        before = parameter.item()
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
    assert before - parameter.item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "adam"}, "unknown optimizer.kind 'adam': did you mean 'adamw'"),
        ({"kind": "adafactor", "betas": [0.9, 0.99]}, "optimizer.betas means nothing in optimizer.kind=ada"),
        ({"kind": "adafactor", "eps": 1e-6}, "optimizer.eps means nothing in optimizer.kind=adafactor"),
    ],
)
def test_keys_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimizerSpec(**options)
    OptimizerSpec(kind="adamw8bit", betas=[0.9, 0.99], eps=1e-6)


def test_without_bitsandbytes_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = OptimizerSpec(kind="adamw8bit")
    for call in (lambda: check_optimizer(spec), lambda: make_optimizer(spec, [])):
        with pytest.raises(UserError, match=r"needs bitsandbytes \(.*\): pip install diffalign\[bnb\]$"):
            call()
    check_optimizer(OptimizerSpec())


@pytest.mark.parametrize("kind", ["adafactor", "adamw8bit"])
def test_a_run_in_two_parts_has_the_bits_of_one(kind: Any, tiny_sdxl: str, tmp_path: Path) -> None:
    """A rank of 256 gives matrices of 4096 entries and more, which bitsandbytes keeps in 8 bits."""
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    model: Any = SDXL(path=tiny_sdxl).load()
    model.start_training(AdapterSpec(rank=256), seed=0, with_reference=True)
    data, spec = make_set(model, 7), OptimizerSpec(kind=kind, lr=1e-3)
    start = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    found = []
    for parts in ((5,), (3, 5)):
        model.load_trained_state(start)
        out = tmp_path / str(len(parts))
        for steps in parts:
            loop.fit(make_run(model, data, out, optimizer=spec, num_steps=steps, log_every=1))
        kept = load_latest(out, identity="this run")
        assert kept is not None
        found.append((kept.trained, kept.state["optimizer"], files.read_jsonl(out / "metrics.jsonl")))
    (whole, state, rows), (parts_, state_, rows_) = found
    assert all(torch.equal(whole[name], parts_[name]) for name in whole)
    assert not all(torch.equal(whole[name], start[name]) for name in whole)
    assert rows == rows_
    leaves, leaves_ = tree_leaves(state), tree_leaves(state_)
    assert len(leaves) == len(leaves_) > len(whole)
    assert all(bool(torch.as_tensor(a == b).all()) for a, b in zip(leaves, leaves_, strict=True))
    if kind == "adamw8bit":
        kinds = {entry["__bnb_optimizer_quant_state__"]["state1"].dtype for entry in state["state"].values()}
        assert torch.uint8 in kinds
