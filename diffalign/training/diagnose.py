"""What the numbers of a run say about it: patterns of runs that go wrong, with their bars and remedies.

The table "When a run goes wrong" of the README is `table()`; a test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, variance
from typing import Any

Row = Mapping[str, Any]
Points = Sequence[tuple[Any, ...]]
"""`(step, number, ...)` a row."""

WINNER_SHARE = 0.1
"""The winner's error above the reference's, over the error itself; from experience, not from a paper."""
SATURATED_SHARE = 0.3
HIGH_ACCURACY = 0.8
NEAR_HALF = 0.05
TINY_MARGIN = 0.1
"""A largest |logit| below this: every pair's gradient factor is within 0.025 of the one at step 0."""
SPIKE_FACTOR = 10.0
NEIGHBOURS = 5
"""Rows on each side that a gradient norm is held against: norms may drift over a run, spikes stand out."""
FP16_HALVINGS = 16
"""The loss scale of fp16 starts at 2^16 and may halve so often before the first step fits."""
SKIPPED_SHARE = 0.01
EMPTY_SHARE = 0.1
START_LOGIT = 0.05
DRIFT_FACTOR = 2.0
MIN_ROLLOUTS = 8
"""Two in each quarter: below that the spread of a reward is not known."""


@dataclass(frozen=True)
class Look:
    """What one pattern finds in a run.

    Args:
        pattern: its name.
        found: whether the run shows it; None: the run does not measure what it takes.
        evidence: the numbers with their steps, or what is missing.
        meaning: what the pattern says of a run.
        remedy: what to do, with the values that the run had.
    """

    pattern: str
    found: bool | None
    evidence: str
    meaning: str
    remedy: str


@dataclass(frozen=True)
class Pattern:
    """One line of the table.

    Args:
        name: of the pattern.
        sign: what is seen, as Markdown.
        meaning: what it means.
        remedy: what to do, as Markdown.
        keys: of the recipe, whose values stand behind the remedy.
        needs: what a run must have for the pattern to be judged.
        look: `(found, evidence)`, or None where the rows do not hold what it takes.
    """

    name: str
    sign: str
    meaning: str
    remedy: str
    keys: tuple[str, ...]
    needs: str
    look: Callable[[Record], tuple[bool, str] | None]


@dataclass(frozen=True)
class Record:
    """The rows of a run's metrics.jsonl, with its recipe."""

    rows: Sequence[Row]
    recipe: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The last step that a row tells of; 0 without rows."""
        return max((int(row["step"]) for row in self.rows), default=0)

    def columns(self, kind: str, *names: str) -> Points:
        """`(step, value, ...)` of the rows of a kind that have a number for every name."""
        rows = [row for row in self.rows if row["kind"] == kind]
        return [(row["step"], *(row[name] for name in names)) for row in rows if all_numbers(row, names)]

    def setting(self, key: str) -> Any:
        """The value of a dotted key of the recipe; None where there is none."""
        value: Any = self.recipe
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value


def all_numbers(row: Any, names: Sequence[str]) -> bool:
    """Whether `row` is a mapping with a number for every name (JSON's null stands for NaN)."""
    return isinstance(row, Mapping) and all(isinstance(row.get(name), int | float) for name in names)


def diagnose(rows: Sequence[Row], recipe: Mapping[str, Any]) -> list[Look]:
    """What each pattern says of a run, those that are found first; pure.

    Judged is where the run stands: "late" numbers are means over the last quarter of the rows.

    Args:
        rows: of metrics.jsonl; the run may still be at work.
        recipe: the resolved recipe of `train`.
    """
    record = Record(rows, recipe)
    looks = []
    for pattern in PATTERNS:
        seen = pattern.look(record)
        found, evidence = (None, f"needs {pattern.needs}") if seen is None else seen
        values = [f"{key}={record.setting(key)}" for key in pattern.keys if record.setting(key) is not None]
        here = f" (here {', '.join(values)})" if values else ""
        looks.append(Look(pattern.name, found, evidence, pattern.meaning, pattern.remedy + here))
    order = {True: 0, False: 1, None: 2}
    return sorted(looks, key=lambda look: order[look.found])


def table() -> str:
    """The patterns as the Markdown table of the README."""
    rows = [f"| {pattern.sign} | {pattern.meaning} | {pattern.remedy} |" for pattern in PATTERNS]
    return "\n".join(["| what you see | what it means | what to do |", "|---|---|---|", *rows])


def _quarters(points: Points) -> tuple[Points, Points]:
    """The first and the last quarter, each of one row at least."""
    size = max(1, len(points) // 4)
    return points[:size], points[-size:]


def _mean(points: Points, place: int) -> float:
    return fmean(point[place] for point in points)


def _steps(points: Points) -> str:
    first, last = int(points[0][0]), int(points[-1][0])
    return f"step {last}" if first == last else f"steps {first} to {last}"


def _winner_error(record: Record) -> tuple[bool, str] | None:
    points = record.columns("train", "err_w", "err_w_vs_ref", "err_l_vs_ref")
    if not points:
        return None
    _, late = _quarters(points)
    error, winner, loser = (_mean(late, place) for place in (1, 2, 3))
    found = winner > WINNER_SHARE * error and loser > 0
    said = (
        f"err_w_vs_ref {winner:.3g}, err_l_vs_ref {loser:.3g} at {_steps(late)}; err_w is {error:.3g}, "
        f"a tenth of it {WINNER_SHARE * error:.3g}"
    )
    if found:
        first = next(step for step, error, winner, _ in points if winner > WINNER_SHARE * error)
        said += f"; first beyond it at step {first}"
    return found, said


def _saturation(record: Record) -> tuple[bool, str] | None:
    points = record.columns("train", "saturated")
    if not points:
        return None
    _, late = _quarters(points)
    share = _mean(late, 1)
    return share > SATURATED_SHARE, f"saturated {share:.2f} at {_steps(late)}"


def _stands_still(record: Record) -> tuple[bool, str] | None:
    points = record.columns("train", "accuracy", "margin_abs_max")
    planned = record.setting("num_steps")
    if not points or (planned is not None and record.step < planned / 2):
        return None
    _, late = _quarters(points)
    accuracy, largest = _mean(late, 1), max(point[2] for point in late)
    found = abs(accuracy - 0.5) <= NEAR_HALF and largest < TINY_MARGIN
    return found, f"accuracy {accuracy:.2f}, margin_abs_max {largest:.2g} at {_steps(late)}"


def _memorising(record: Record) -> tuple[bool, str] | None:
    trained = record.columns("train", "accuracy")
    measured = [
        (row["step"], row["implicit_accuracy"])
        for row in record.rows
        if row["kind"] == "validation"
        and all_numbers(row.get("implicit_accuracy"), ("estimate", "low", "high"))
    ]
    if not trained or not measured:
        return None
    step, heldout = measured[-1]
    _, late = _quarters([point for point in trained if point[0] <= step] or trained)
    accuracy = _mean(late, 1)
    estimate, low, high = (heldout[name] for name in ("estimate", "low", "high"))
    found = accuracy >= HIGH_ACCURACY and estimate <= 0.5 + NEAR_HALF and low <= 0.5
    return found, (
        f"accuracy {accuracy:.2f} at {_steps(late)}, held-out {estimate:.2f} [{low:.2f}, {high:.2f}] "
        f"at step {step}"
    )


def _spikes(record: Record) -> tuple[bool, str] | None:
    points = record.columns("train", "grad_norm", "grad_norm_max")
    if not points:
        return None
    ratios = []
    for place, (_, _, largest) in enumerate(points):
        usual = median(p[1] for p in points[max(0, place - NEIGHBOURS) : place + NEIGHBOURS + 1])
        ratios.append(largest / usual if usual > 0 else 1.0)
    worst = max(range(len(points)), key=ratios.__getitem__)
    count = sum(ratio > SPIKE_FACTOR for ratio in ratios)
    return count > 0, (
        f"grad_norm_max {points[worst][2]:.3g} at step {points[worst][0]}, {ratios[worst]:.1f} times the "
        f"usual grad_norm around it; more than {SPIKE_FACTOR:g} times in {count} of {len(points)} rows"
    )


def _skipped(record: Record) -> tuple[bool, str] | None:
    points = record.columns("train", "skipped_steps")
    if not points:
        return None
    step, skipped = points[-1]
    fp16 = record.setting("precision") == "fp16"
    allowed = FP16_HALVINGS + SKIPPED_SHARE * step if fp16 else 0
    return skipped > allowed, f"skipped_steps {skipped:g} of {step}" + (" in fp16" if fp16 else "")


def _empty(record: Record) -> tuple[bool, str] | None:
    rollouts = record.columns("rollout", "decided")
    if not rollouts:
        return None
    undecided = sum(decided == 0 for _, decided in rollouts)
    trained = record.columns("train", "empty_steps")
    step, empty = trained[-1] if trained else (record.step, record.step)
    found = undecided > EMPTY_SHARE * len(rollouts) or empty > EMPTY_SHARE * step
    return (
        found,
        f"empty_steps {empty:g} of {step}; nothing decided in {undecided} of {len(rollouts)} rollouts",
    )


def _start(record: Record) -> tuple[bool, str] | None:
    names = ("loss", "expected", "margin_abs_max")
    starts = [row["step_0"] for row in record.rows if all_numbers(row.get("step_0"), names)]
    if not starts:
        return None
    loss, expected, largest = (starts[0][name] for name in names)
    found = largest > START_LOGIT
    return found, f"loss {loss:.6f} at step 0, {expected:.6f} expected; largest |logit| {largest:.3g}"


def _drift(record: Record) -> tuple[bool, str] | None:
    rewards, margins = record.columns("rollout", "reward"), record.columns("train", "margin_abs_max")
    if len(rewards) < MIN_ROLLOUTS or not margins:
        return None
    (early, late), (near, far) = _quarters(rewards), _quarters(margins)
    gain = _mean(late, 1) - _mean(early, 1)
    error = math.sqrt(sum(variance([p[1] for p in part]) / len(part) for part in (early, late)))
    before, after = _mean(near, 1), _mean(far, 1)
    found = gain <= 2.0 * error and after >= DRIFT_FACTOR * before
    return found, (
        f"reward {_mean(early, 1):.4g} at {_steps(early)}, {_mean(late, 1):.4g} at {_steps(late)} (change "
        f"{gain:+.2g}, standard error {error:.2g}); margin_abs_max {before:.3g}, then {after:.3g}"
    )


PATTERNS = (
    Pattern(
        "winner error rises",
        "`err_w_vs_ref` rises with `err_l_vs_ref`, beyond about a tenth of `err_w`",
        "both likelihoods fall; only the gap improves (pictures drift to noise)",
        "`objective.safeguard=0.6`, then 0.9; lower `optimizer.lr`, fewer steps; look at `samples/` (with "
        "`samples.prompts` set)",
        ("objective.safeguard", "optimizer.lr", "num_steps"),
        "an objective with pairs and a reference",
        _winner_error,
    ),
    Pattern(
        "saturation",
        "`saturated` above 0.3",
        "most pairs no longer teach; the rest pull hard",
        "lower `objective.beta` or the learning rate",
        ("objective.beta", "optimizer.lr"),
        "an objective with a margin",
        _saturation,
    ),
    Pattern(
        "stands still",
        "`accuracy` within 0.05 of 0.5, `margin_abs_max` below 0.1, half of the steps done",
        "the policy barely moves",
        "raise the learning rate or beta",
        ("optimizer.lr", "objective.beta"),
        "an objective with a margin, and half of its steps",
        _stands_still,
    ),
    Pattern(
        "memorising",
        "`accuracy` 0.8 or more, held-out accuracy at 0.5",
        "it memorises pairs",
        "more pairs, fewer epochs",
        ("num_steps", "loader.batch_size"),
        "pairs and `validation.share`",
        _memorising,
    ),
    Pattern(
        "gradient spikes",
        "`grad_norm_max` more than 10 times the `grad_norm` of the rows around it",
        "single pairs dominate",
        "look for broken rows with `check`, lower beta",
        ("objective.beta", "optimizer.max_grad_norm"),
        "a step whose gradient was finite",
        _spikes,
    ),
    Pattern(
        "skipped steps",
        "`skipped_steps` grows; with fp16 beyond the first 16 and 1 % of the steps",
        "gradients overflow",
        "`precision=bf16`; outside fp16 lower the learning rate",
        ("precision", "optimizer.lr"),
        "a logged step",
        _skipped,
    ),
    Pattern(
        "empty steps",
        "own pictures: `empty_steps` above a tenth, or nothing `decided` in a tenth of the rollouts",
        "the reward does not tell the two pictures of a prompt apart",
        "another scorer, a larger `loader.batch_size`",
        ("loader.batch_size",),
        "own pictures",
        _empty,
    ),
    Pattern(
        "drift without reward",
        "own pictures: `reward` in the last quarter within two standard errors of the first or below, "
        "`margin_abs_max` twice that of the first or more",
        "the policy leaves the reference and gets nothing for it",
        "raise `objective.beta` or lower the learning rate; a larger `rollout.steps`, another reward",
        ("objective.beta", "optimizer.lr", "rollout.steps"),
        f"own pictures, {MIN_ROLLOUTS} rollouts or more",
        _drift,
    ),
    Pattern(
        "step 0",
        "the loss of step 0 is not the one expected (log 2): a logit beyond 0.05 on either side",
        "policy and reference differ before training: dropout on an adapter the run started from",
        "`adapter.dropout=0`",
        ("adapter.dropout", "adapter.init"),
        "an objective that knows its loss at the reference",
        _start,
    ),
)
