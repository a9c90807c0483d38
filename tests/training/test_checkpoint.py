"""Checkpoints: whole or not there, the newest that is whole is found, those of other runs are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.common.errors import UserError
from diffalign.training import checkpoint as checkpoints
from diffalign.training.checkpoint import Checkpoint, load_latest, save, tidy


def at(step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        position=2 * step,
        trained={"a.weight": torch.full((2, 3), float(step)), "b": torch.arange(4.0)[::2]},
        state={"optimizer": {"exp_avg": torch.ones(2), "lr": 1e-4}, "counters": {"skipped_steps": 1}},
    )


def keep(out: Path, step: int, *, keep: int = 2) -> Path:
    return save(out, at(step), identity="mine", keep=keep)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    keep(tmp_path, 7)
    found = load_latest(tmp_path, identity="mine")
    assert found is not None and (found.step, found.position) == (7, 14)
    assert torch.equal(found.trained["a.weight"], torch.full((2, 3), 7.0))
    assert found.trained["b"].tolist() == [0.0, 2.0]  # a strided view is stored as it reads
    assert found.state["counters"] == {"skipped_steps": 1} and found.state["optimizer"]["lr"] == 1e-4
    assert torch.equal(found.state["optimizer"]["exp_avg"], torch.ones(2))


def test_nothing_there(tmp_path: Path) -> None:
    assert load_latest(tmp_path, identity="mine") is None


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        keep(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000100", "step-00001000"]
    found = load_latest(tmp_path, identity="mine")
    assert found is not None and found.step == 1000
    keep(tmp_path, 1001, keep=1)
    assert names(tmp_path) == ["step-00001001"]


class Killed(BaseException):
    """Stands for the instant of a kill."""


@pytest.mark.parametrize("instant", ["save_file", "torch.save", "write_json", "rename"])
def test_a_write_that_is_cut_short_leaves_the_last_checkpoint(
    instant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was being written: the checkpoint before it is the newest, and no trace is taken for one."""
    keep(tmp_path, 3)

    def dies(*arguments: Any, **options: Any) -> None:
        if instant == "torch.save":
            Path(arguments[1]).write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        where: tuple[Any, str] = {
            "save_file": (checkpoints, "save_file"),
            "torch.save": (checkpoints.torch, "save"),
            "write_json": (checkpoints.files, "write_json"),
            "rename": (checkpoints.files.os, "replace"),
        }[instant]
        patch.setattr(*where, dies)
        with pytest.raises(Killed):
            keep(tmp_path, 6)
    tidy(tmp_path)
    found = load_latest(tmp_path, identity="mine")
    assert found is not None and found.step == 3
    assert names(tmp_path) == ["step-00000003"]


def test_what_a_kill_leaves_behind_is_removed(tmp_path: Path) -> None:
    """A temporary folder of a write, and an old checkpoint of which the removal had begun."""
    keep(tmp_path, 3)
    for rest in (".tmp-0123abcd-step-00000006", "step-00000001"):
        (tmp_path / "checkpoints" / rest).mkdir()
        (tmp_path / "checkpoints" / rest / "trained.safetensors").write_bytes(b"half")
    tidy(tmp_path)
    found = load_latest(tmp_path, identity="mine")
    assert found is not None and found.step == 3
    assert names(tmp_path) == ["step-00000003"]


def test_another_run_is_refused(tmp_path: Path) -> None:
    keep(tmp_path, 3)
    with pytest.raises(
        UserError, match=r"step-00000003 is of another base, data set or recipe: choose another out="
    ):
        load_latest(tmp_path, identity="yours")


def test_the_manifest_is_written_last(tmp_path: Path) -> None:
    """So that a folder with a manifest is whole."""
    folder = keep(tmp_path, 3)
    assert json.loads((folder / "manifest.json").read_text()) == {
        "step": 3,
        "position": 6,
        "identity": "mine",
    }
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert max(times, key=lambda name: times[name]) == "manifest.json"
