"""metrics.jsonl and the trackers beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.training.metrics import MetricsLog, check_trackers, flat
from diffalign.training.specs import TRACKERS, Settings, StopRule
from diffalign.training.stop import StopRules

ROW = {"loss": 0.5, "groups": 4, "by_timestep": {"0-249": {"loss": 0.25}}, "note": "text", "none": None}


class Notebook(GeneralTracker):
    """Keeps what it is told."""

    name = "wandb"
    requires_logging_directory = False
    told: ClassVar[list[Any]] = []

    def __init__(self, project: str) -> None:
        super().__init__()
        self.told.append(project)

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        self.told.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finish")


class Broken(Notebook):
    def start(self) -> None:
        raise OSError("no\nlogin")


def test_numbers_by_their_path() -> None:
    assert flat(ROW) == {"loss": 0.5, "groups": 4.0, "by_timestep/0-249/loss": 0.25}


def test_every_tracker_gets_the_rows_and_the_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Notebook)
    monkeypatch.setattr(Notebook, "told", [])
    recipe = {"model": {"path": "base", "vae": None}, "num_steps": 8, "adapter": {"targets": ["to_q"]}}
    rules = StopRules({"loss": StopRule(below=1.0)})
    log = MetricsLog(
        tmp_path, resume_step=0, trackers=["wandb", "tensorboard", "wandb"], recipe=recipe, rules=rules
    )
    log.write("train", 2, ROW)
    log.close()
    assert Notebook.told == [
        "diffalign",
        "start",
        {"model.path": "base", "model.vae": "None", "num_steps": 8, "adapter.targets": "['to_q']"},
        (2, {"train/loss": 0.5, "train/groups": 4.0, "train/by_timestep/0-249/loss": 0.25}),
        "finish",
    ]
    assert files.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 2, "kind": "train", **ROW}]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (event,) = board.Scalars("train/by_timestep/0-249/loss")
    assert (event.step, event.value) == (2, 0.25)
    assert rules.reason == "loss below 1 for 1 row at step 2"


def test_a_run_that_goes_on_writes_its_last_rows_again(tmp_path: Path) -> None:
    for resume_step, steps in ((0, (1, 2, 3)), (2, (3,))):
        log = MetricsLog(tmp_path, resume_step=resume_step)
        for step in steps:
            log.write("train", step, {"loss": float(10 * resume_step + step)})
        log.close()
    assert [row["loss"] for row in files.read_jsonl(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 23.0]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("train/loss")] == [1.0, 2.0, 23.0]


def test_without_trackers_the_file_is_all(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=0, trackers=[])
    log.write("train", 1, {"loss": 1.0})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    MetricsLog(tmp_path / "other", resume_step=0, writes=False).write("train", 1, {"loss": 1.0})
    assert not (tmp_path / "other").exists()


def test_a_tracker_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Broken)
    with pytest.raises(UserError, match=r"^trackers: wandb does not start \(no login\): see its own manual$"):
        MetricsLog(tmp_path, resume_step=0, trackers=["wandb"])


def test_trackers_that_are_not_known_or_not_installed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown tracker 'wandbb': did you mean 'wandb'"):
        Settings(trackers=["wandbb"])
    monkeypatch.setattr("diffalign.training.metrics.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match=r"^trackers: comet_ml is not installed: pip install comet-ml$"):
        check_trackers(["tensorboard", "comet_ml"])
    check_trackers(["tensorboard"])


def test_the_trackers_are_those_of_accelerate() -> None:
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)
