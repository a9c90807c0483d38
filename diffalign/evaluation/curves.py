"""The health of the training run behind a model, read from its `metrics.jsonl`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.evaluation.charts import Line

FILE_NAME = "metrics.jsonl"
_MOST = 1e100  # a chart needs the difference of two numbers to be one


@dataclass(frozen=True)
class Panel:
    """One chart: a title, what to see in it, its lines, and a height to mark."""

    title: str
    hint: str
    lines: list[Line]
    level: float | None = None


_PANELS: tuple[tuple[str, str, float | None, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Denoising error, trained minus reference",
        "Healthy: the preferred picture's falls, or rises less than the other's. Both far above 0: the model "
        "forgets how to denoise.",
        0.0,
        (("train", "err_w_vs_ref", "preferred"), ("train", "err_l_vs_ref", "other")),
    ),
    ("Margin", "Of the preference, in units of log-odds.", 0.0, (("train", "margin", "margin"),)),
    (
        "Accuracy",
        "Share of pairs whose preferred picture gains more; 0.5 is a coin.",
        0.5,
        (("train", "accuracy", "training pairs"), ("validation", "implicit_accuracy", "held-out pairs")),
    ),
    ("Gradient norm", "Before clipping.", None, (("train", "grad_norm", "gradient norm"),)),
    ("Loss", "Says little: see the errors.", None, (("train", "loss", "loss"),)),
    (
        "Reward of its own pictures",
        "Of what the model drew while it learned.",
        None,
        (("rollout", "reward", "reward"),),
    ),
)
"""(title, hint, marked height, (kind of row, its key, what the line is called) ...)."""


def read_panels(run: Path) -> list[Panel]:
    """Returns the charts of a run that has numbers for them; a last line torn by a kill is left out.

    Raises:
        UserError: there is no metrics.jsonl, or a line of it is not JSON.
    """
    path = run / FILE_NAME
    if not path.is_file():
        raise UserError(f"run={run} holds no {FILE_NAME}: give the output folder of train")
    rows = files.read_jsonl(path, drop_torn_tail=True)
    panels = []
    for title, hint, level, wanted in _PANELS:
        found = [_line(rows, kind, key, name) for kind, key, name in wanted]
        kept = [line for line in found if line.x]
        if kept:
            panels.append(Panel(title, hint, kept, level))
    return panels


def _line(rows: list[dict[str, Any]], kind: str, key: str, name: str) -> Line:
    """Returns a number of the rows of one kind over the steps; rows without it are left out."""
    points = []
    for row in rows:
        step, value = row.get("step"), row.get(key)
        if isinstance(value, dict):  # an interval
            value = value.get("estimate")
        if row.get("kind") == kind and _is_number(value) and _is_number(step):
            points.append((float(step), float(value)))
    return Line(name, [x for x, _ in points], [y for _, y in points])


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST
