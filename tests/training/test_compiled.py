"""torch.compile: what is said of its graphs, and that a compiled run is nearly the run that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.models import _trainable, load_model
from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.objectives._base import Output
from diffalign.objectives.diffusion_dpo import Plugin as DPO
from diffalign.training import loop
from diffalign.training.checks import step_zero
from diffalign.training.compiled import Graphs
from diffalign.training.setup import accelerator_for
from diffalign.training.specs import Settings
from tests.tiny_training import make_run, make_set

# torch's own look at `.grad`, which it hides where warnings are not errors.
HIDDEN = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> None:
    torch.compiler.reset()


def test_graphs_and_the_limit_are_said_once() -> None:
    """Each number of dimensions is a graph of its own; with a limit of 2 the third runs without."""

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2.0

    compiled = torch.compile(double, backend="eager", recompile_limit=2)
    graphs = Graphs()
    said = []
    for shape in ((2,), (2, 2), (2,), (2, 2, 2)):
        compiled(torch.ones(shape))
        said.append(graphs.news())
    assert [len(lines) for lines in said] == [1, 1, 0, 1]
    assert said[0][0].startswith("compile: 1 graph made, ")
    assert said[3][0].startswith("compile: torch.compile has reached its limit of graphs")
    assert "fix the shapes (preprocess.buckets=square)" in said[3][0] and graphs.news() == []


def test_a_compiled_policy_that_is_far_from_its_reference_is_refused() -> None:
    def check(margin: float, **options: Any) -> dict[str, float] | None:
        logs = {"margin": torch.tensor([0.0, margin]), "target": torch.ones(2)}
        output = Output(torch.full((2,), 0.6931), logs)
        return step_zero(DPO(), output, Settings(**options))

    with pytest.raises(UserError, match=r"^compile=true: policy and reference .* \|logit\| of 0\.06 \(above"):
        check(-0.06, compile=True)
    found = check(-0.04, compile=True)
    assert found is not None and found["margin_abs_max"] == pytest.approx(0.04)
    assert check(-0.06) is not None  # not compiled: said, as ever
    # Dropout on an adapter that is not fresh: the two differ for another reason.
    assert check(-0.06, compile=True, adapter=AdapterSpec(init="a", dropout=0.1)) is not None


def test_a_network_without_repeated_blocks_is_refused(tiny_sd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_model("sd", tiny_sd)
    monkeypatch.setattr(type(model.network), "_repeated_blocks", ["NoSuchBlock"])
    with pytest.raises(UserError, match=r"compile=true: .*NoSuchBlock.*; use compile=false"):
        model.compile_blocks()


@pytest.mark.slow
@HIDDEN
def test_a_compiled_run_is_nearly_the_eager_one(
    tiny_sdxl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps, eager and compiled; checkpoint and adapter have the same names."""
    found = []
    for compiled in (False, True):
        model: Any = SDXL(path=tiny_sdxl).load()
        model.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
        if compiled:
            model.compile_blocks()
        out = tmp_path / str(compiled)
        loop.fit(make_run(model, make_set(model, 6), out, compile=compiled, num_steps=2, log_every=1))
        found.append((model.trained_state(), files.read_jsonl(out / "metrics.jsonl")))
    (eager, rows), (ours, our_rows) = found
    assert list(eager) == list(ours)
    for ours_, row in zip(our_rows, rows, strict=True):
        assert ours_["loss"] == pytest.approx(row["loss"], rel=1e-3)
    assert our_rows[0]["margin_abs_max"] < 0.05
    said = capsys.readouterr().err
    assert said.count("compile: ") == 1 and "reached its limit" not in said


@pytest.mark.slow
@HIDDEN
def test_in_bf16_policy_and_reference_round_alike(tiny_sdxl: str, tmp_path: Path) -> None:
    model: Any = SDXL(path=tiny_sdxl).load()
    model.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
    model.compile_blocks()
    run = make_run(model, make_set(model, 6), tmp_path, objective=DPO(beta=5000.0), compile=True, num_steps=1)
    run.accelerator = accelerator_for("bf16")
    loop.fit(run)
    (row,) = files.read_jsonl(tmp_path / "metrics.jsonl")
    assert row["margin_abs_max"] < 0.05


@pytest.mark.slow
@HIDDEN
def test_past_the_limit_the_run_goes_on_and_says_so(
    tiny_sdxl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_trainable, "MAX_GRAPHS", 1)
    model: Any = SDXL(path=tiny_sdxl).load()
    model.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
    model.compile_blocks()
    summary = loop.fit(make_run(model, make_set(model, 6), tmp_path, compile=True, num_steps=2))
    assert summary["steps"] == 2
    assert capsys.readouterr().err.count("torch.compile has reached its limit of graphs") == 1
