"""The benchmark of a step drives the loop as training does: it must not fall behind it."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.training.setup import accelerator_for

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; it imports its neighbours by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("bench_step", SCRIPTS / "bench_step.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_step", module)
    spec.loader.exec_module(module)
    return module


def test_a_step_and_the_bare_network_are_timed(bench: Any, tiny_sdxl: str, tmp_path: Path) -> None:
    model: Any = SDXL(path=tiny_sdxl).load()
    encoded = bench.random_set(model, 32, count=4)
    model.drop_encoders()
    model.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
    run = bench.make_run(model, encoded, argparse.Namespace(batch=1), accelerator_for("fp32"))
    figures = bench.compare(run, 2)
    assert len(figures["ratios"]) == 2 and min(figures["ratios"]) > 0.0
    assert figures["pairs_per_s"] == pytest.approx(1.0 / figures["step_s"])
