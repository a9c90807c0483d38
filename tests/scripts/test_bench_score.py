"""The benchmark of scoring drives the pass as `score` does: it must not fall behind it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from diffalign.common.files import read_text
from tests.tiny_arch import known_arch

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; it imports its neighbours by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("bench_score")
    yield module
    for name in ("bench_score", "full_size_clip", "reporting"):
        sys.modules.pop(name, None)


def test_ours_and_the_loop_are_timed_and_agree(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", str(tmp_path), "--arch", known_arch(), "--second-arch", known_arch()]
    words += ["--pictures", "20", "--rounds", "1", "--batch", "8", "--report", str(tmp_path / "score.md")]
    monkeypatch.setattr(sys, "argv", ["bench_score.py", *words])
    assert bench.main() in (0, 1)  # a clock decides nothing here
    text = read_text(tmp_path / "score.md")
    figures = dict(line.strip("| ").split(" | ") for line in text.splitlines() if line.count(" | ") == 1)
    assert float(figures["largest difference of a score"]) < 1e-4
    assert float(figures["over the loop"]) > 0.0 and float(figures["four over forwards"]) > 0.0
    assert float(figures["without networks, images/s"]) > 0.0
    assert "four scorers <= 1.15 x their distinct forwards" in text
