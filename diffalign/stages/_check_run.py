"""`check run=FOLDER`: what a training run's own numbers say about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.common import files, manifest
from diffalign.common.errors import UserError
from diffalign.stages._run import RECIPE
from diffalign.training.diagnose import Look, diagnose
from diffalign.training.metrics import FILE_NAME


def check_run(run: str, *, json: bool) -> dict[str, Any]:
    """Returns the report on a run, finished or not, after printing it (as text, or as JSON) to stdout.

    The report: `run`, `step`, `num_steps`, `finished`, and each pattern of `training.diagnose` with its
    numbers in one of `findings`, `fine` and `not_measured`. Nothing is written.

    Args:
        run: output folder of `train`.
        json: print JSON instead of text.

    Raises:
        UserError: `run` is not the folder of a training run, or has no row of metrics yet.
    """
    folder = Path(run)
    recipe = _recipe(folder)
    looks = diagnose(rows := _rows(folder), recipe)
    report: dict[str, Any] = {
        "run": run,
        "step": max(row["step"] for row in rows),
        "num_steps": recipe.get("num_steps"),
        "finished": manifest.read_manifest(folder) is not None,
        "findings": [_entry(look) for look in looks if look.found],
        "fine": {look.pattern: look.evidence for look in looks if look.found is False},
        "not_measured": {look.pattern: look.evidence for look in looks if look.found is None},
    }
    if json:
        import json as jsonlib

        print(jsonlib.dumps(files.to_plain(report), indent=2, ensure_ascii=False))
    else:
        print(as_text(report))
    return report


def as_text(report: dict[str, Any]) -> str:
    """Returns the report for a person: what is wrong with its remedy, then the numbers that are in order."""
    state = "finished" if report["finished"] else "not finished"
    lines = [f"{report['run']}: step {report['step']} of {report['num_steps']}, {state}", ""]
    for finding in report["findings"]:
        lines += [
            f"{finding['pattern']}: {finding['meaning']}",
            f"  seen  {finding['evidence']}",
            f"  do    {finding['remedy']}",
            "",
        ]
    lines.append("in order:" if report["findings"] else "nothing is wrong by these numbers:")
    lines += [f"  {name:<22}{evidence}" for name, evidence in report["fine"].items()]
    if report["not_measured"]:
        lines += ["", "not measured:"]
        lines += [f"  {name:<22}{evidence}" for name, evidence in report["not_measured"].items()]
    return "\n".join(lines).replace("`", "")


def _entry(look: Look) -> dict[str, str]:
    return {
        "pattern": look.pattern,
        "evidence": look.evidence,
        "meaning": look.meaning,
        "remedy": look.remedy,
    }


def _recipe(folder: Path) -> dict[str, Any]:
    """Returns the recipe of the run in `folder`; raises UserError where there is none."""
    if not (folder / RECIPE).is_file():
        what = "has no recipe.json" if folder.is_dir() else "is no folder"
        raise UserError(f"run={folder} {what}: give the out= folder of a train run")
    said = files.read_json(folder / RECIPE)
    if not isinstance(said, dict) or said.get("stage") != "train" or not isinstance(said.get("recipe"), dict):
        stage = said.get("stage") if isinstance(said, dict) else None
        raise UserError(f"run={folder} holds the output of '{stage}': give the out= folder of a train run")
    recipe: dict[str, Any] = said["recipe"]
    return recipe


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl, of which the last may be half-written; raises UserError for none."""
    path = folder / FILE_NAME
    rows = files.read_jsonl(path, drop_torn_tail=True) if path.is_file() else []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("step"), int) or not isinstance(row.get("kind"), str):
            raise UserError(f"{path}: row {number} has no step and kind: it is not the record of a run")
    if not any(row["kind"] in ("train", "rollout") for row in rows):
        raise UserError(
            f"run={folder} has no row in {FILE_NAME} yet: it gets one every log_every steps; a run that "
            "ended before said why when it did"
        )
    return rows
