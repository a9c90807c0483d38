"""Scores of published weights against the record that scripts/record_golden.py made, where there is one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from diffalign.common.files import read_json

HERE = Path(__file__).parent
RECORD = HERE / "golden.json"
KNOWN: dict[str, Any] = read_json(RECORD) if RECORD.exists() else {}
REL = 1e-3
"""Processors and releases of torch differ by less."""


@pytest.fixture(scope="module")
def golden() -> Any:
    """The script as a module."""
    path = HERE.parents[1] / "scripts" / "record_golden.py"
    spec = importlib.util.spec_from_file_location("record_golden", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def agree(golden: Any, known: dict[str, Any]) -> None:
    found = golden.entry_of(known["options"])
    assert found["pictures"] == known["pictures"] and found["scale"] == known["scale"]
    assert found["values"] == pytest.approx(known["values"], rel=REL, nan_ok=True)


@pytest.mark.weights
@pytest.mark.parametrize("name", sorted(KNOWN))
def test_published_weights_score_as_recorded(golden, name):
    agree(golden, KNOWN[name])


def test_a_record_is_kept_and_a_change_is_seen(golden, tmp_path, monkeypatch, capsys):
    out = tmp_path / "golden.json"
    monkeypatch.setattr("sys.argv", ["record_golden.py", "--only", "jpeg", "geneval", "--out", str(out)])
    assert golden.main() == 0
    known = read_json(out)["jpeg"]
    assert "geneval: not recorded: it needs a context" in capsys.readouterr().err
    assert len(set(known["values"])) == 4 and known["versions"]["pillow"]
    agree(golden, known)
    with pytest.raises(AssertionError):
        agree(golden, {**known, "values": [value * 1.01 for value in known["values"]]})
    with pytest.raises(AssertionError):
        agree(golden, {**known, "pictures": "others"})
