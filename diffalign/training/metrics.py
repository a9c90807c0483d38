"""The record of a run: `metrics.jsonl`, and the trackers that people watch it with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from diffalign.common import files
from diffalign.common.errors import UserError, brief
from diffalign.training.stop import StopRules

FILE_NAME = "metrics.jsonl"
PROJECT = "diffalign"


class MetricsLog:
    """Appends rows `{step, kind, ...}`; a resumed run first drops the rows that it will write again.

    Args:
        out: folder of the run.
        resume_step: rows of later steps are dropped.
        writes: False in processes that leave the files to another one.
        trackers: names of those that get the numbers too. TensorBoard writes to `tensorboard` below `out`;
            the others are set up by environment variables of their own, and get the project "diffalign" and
            `recipe`.
        recipe: of the run.
        rules: are shown every row.

    Raises:
        UserError: a tracker does not start.
    """

    def __init__(
        self,
        out: Path,
        *,
        resume_step: int,
        writes: bool = True,
        trackers: Sequence[str] = ("tensorboard",),
        recipe: Mapping[str, Any] | None = None,
        rules: StopRules | None = None,
    ) -> None:
        self._trackers: list[Any] = []
        self._writes, self._rules = writes, rules
        if not writes:
            return
        self.path = out / FILE_NAME
        if self.path.exists():
            rows = files.read_jsonl(self.path, drop_torn_tail=True)
            files.write_jsonl(self.path, [row for row in rows if row["step"] <= resume_step])
        for name in dict.fromkeys(trackers):
            self._trackers.append(_started(name, out, resume_step, recipe or {}))

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Adds one row; numbers one level down (`by_timestep`) get a path of names in the trackers."""
        if not self._writes:
            return
        files.append_jsonl(self.path, [{"step": step, "kind": kind, **values}])
        numbers = flat(values)
        if self._rules is not None:
            self._rules.read(step, numbers)
        for tracker in self._trackers:
            tracker.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=step)

    def close(self) -> None:
        """Flushes the trackers."""
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuses trackers that are not installed, before anything large is loaded.

    Raises:
        UserError: says what to install.
    """
    installed = {str(kind) for kind in get_available_trackers()}
    for name in trackers:
        if name not in installed:
            raise UserError(f"trackers: {name} is not installed: pip install {name.replace('_', '-')}")


def _started(name: str, out: Path, resume_step: int, recipe: Mapping[str, Any]) -> Any:
    cls = LOGGER_TYPE_TO_CLASS[name]
    try:
        if name == "tensorboard":
            tracker = cls("tensorboard", str(out), purge_step=resume_step + 1)
        else:
            tracker = cls(PROJECT, str(out)) if cls.requires_logging_directory else cls(PROJECT)
        tracker.start()
        if name != "tensorboard":  # would write the recipe as another run, one more each time it goes on
            tracker.store_init_configuration(_dotted(recipe))
    except Exception as error:  # each has its own ways to fail: no login, no network, no repository
        raise UserError(f"trackers: {name} does not start ({brief(error)}): see its own manual") from error
    return tracker


def _dotted(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """The recipe as trackers take it: one level, keys with dots, lists as text."""
    found: dict[str, bool | int | float | str] = {}
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            found |= _dotted(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, bool | int | float) else str(value)
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row by their path: `{"a": {"b": 1}}` is `{"a/b": 1.0}`."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found[f"{prefix}{name}"] = float(value)
    return found
