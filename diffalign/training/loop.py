"""One loop for every objective: draw, compute, check, step, report, keep.

The loop asks an objective for a loss a group and never which objective it is. Nothing random is left to
chance: data order, timesteps and noise are keyed, and the global stream (dropout) is seeded from (seed, step,
process) before each step, so a run that is killed and resumed computes the very same numbers as one that was
not.

With several processes each takes its share of the micro-batches, gradients are summed, every process makes
the same step, and the first one writes the files.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffalign.common import files
from diffalign.common.draws import seed_of
from diffalign.common.errors import Interrupted, UserError
from diffalign.common.interrupts import StopRequest
from diffalign.common.progress import Progress, say
from diffalign.data.batches import Batch
from diffalign.diffusion.likelihood import Draws
from diffalign.models._base import Model
from diffalign.models._sharding import whole
from diffalign.objectives._base import Objective
from diffalign.training import checkpoint as checkpoints
from diffalign.training.checks import finite_sum, step_zero
from diffalign.training.compiled import Graphs
from diffalign.training.ema import Average
from diffalign.training.feed import Feed
from diffalign.training.health import Health
from diffalign.training.metrics import MetricsLog
from diffalign.training.optimizers import learning_rate, load_optimizer, make_optimizer
from diffalign.training.ranks import Ranks
from diffalign.training.specs import Settings
from diffalign.training.stop import StopRules
from diffalign.training.watch import Watch

MAX_SKIPS_IN_A_ROW = 25
"""fp16's loss scale may halve 16 times before the first step fits; more means that the weights are lost."""


@dataclass
class Run:
    """Everything that one run of the loop needs.

    Args:
        model: set up by `start_training`.
        objective: what is minimised.
        feed: gives the micro-batches.
        out: folder of the run.
        identity: what must be equal for a checkpoint to be continued.
        accelerator: device, precision and gradient scaling.
        settings: how it is trained.
        watch: held-out accuracy and sample pictures.
        recipe: what a tracker writes down beside the numbers.

    Attributes:
        average: of the trained weights; `fit` makes it.
    """

    model: Model
    objective: Objective
    feed: Feed
    out: Path
    identity: str
    accelerator: Accelerator
    settings: Settings
    watch: Watch
    recipe: dict[str, Any] = field(default_factory=dict)
    average: Average = field(init=False)

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return Ranks(self.accelerator)


@dataclass
class _State:
    """What changes while the loop runs."""

    optimizer: Any
    parameters: list[torch.nn.Parameter]
    health: Health
    rules: StopRules
    graphs: Graphs = field(default_factory=Graphs)
    step: int = 0
    saved: int = 0
    position: int = 0
    accumulation: int = 1
    step_zero: dict[str, float] | None = None
    counters: dict[str, int] = field(
        default_factory=lambda: {
            "skipped_steps": 0,
            "skipped_in_a_row": 0,
            "empty_steps": 0,
            "empty_in_a_row": 0,
        }
    )

    def count(self, what: str, *, happened: bool) -> bool:
        """Counts a "skipped" or "empty" step, or ends their row; whether there are too many in a row."""
        if not happened:
            self.counters[f"{what}_in_a_row"] = 0
            return False
        self.counters[f"{what}_steps"] += 1
        self.counters[f"{what}_in_a_row"] += 1
        return self.counters[f"{what}_in_a_row"] > MAX_SKIPS_IN_A_ROW

    def totals(self) -> dict[str, int]:
        """Steps of the whole run that were skipped, or had nothing to learn from."""
        return {name: self.counters[name] for name in ("skipped_steps", "empty_steps")}


def fit(run: Run) -> dict[str, Any]:
    """Trains to `num_steps`, going on from the newest checkpoint in `run.out`; returns the closing summary.

    Ctrl-C and SIGTERM take effect between two steps: the state is saved, then the interrupt is raised again.

    Raises:
        NonFiniteLoss: naming the examples; the last checkpoint stays.
        UserError: the checkpoint is of another run, or gradients stay non-finite.
    """
    state = _start(run)
    with closing(_metrics_log(run, state)) as log:
        if state.step == 0:
            _look(run, state, log, last=False)
        _steps(run, state, log)
    if state.counters["empty_steps"] == state.step > 0:
        raise UserError(f"all {state.step} steps taught nothing: {run.feed.why_empty}")
    stopped = {} if state.rules.reason is None else {"stopped": state.rules.reason}
    return {"steps": state.step, **state.totals(), **run.watch.summary(), **stopped}


def _steps(run: Run, state: _State, log: MetricsLog) -> None:
    """All steps that are left."""
    settings, ranks, incoming = run.settings, run.ranks, _micro_batches(run, state.position)
    with StopRequest() as stop, Progress("train", settings.num_steps, "steps", initial=state.step) as bar:
        stopping, ended = False, state.rules.reason is not None
        while state.step < settings.num_steps and not (stopping or ended):
            torch.manual_seed(seed_of(settings.seed, "step", state.step, ranks.index))
            rate = learning_rate(settings.optimizer, state.step, settings.num_steps)
            _set_learning_rate(state.optimizer, rate)
            loss, speed = _timed_step(run, state, incoming, log)
            bar.update(1, loss=loss, **{f"{run.objective.unit}s/s": speed})
            last = state.step == settings.num_steps
            keep = state.step % settings.checkpoint.every == 0 or last
            # What is not logged with a checkpoint, a resumed run cannot know.
            if state.step % settings.log_every == 0 or keep:
                _log(run, state, log)
            _look(run, state, log, last=last)
            ended = bool(settings.stop_when) and ranks.any(state.rules.reason is not None)
            if ended and not last:
                _log(run, state, log)
                _look(run, state, log, last=True)
                say(f"stopped: {state.rules.reason}")
            if keep or ended:
                _save(run, state)
            stopping = ranks.any(stop.requested)  # all at the same step, whoever was asked first
        if stopping and state.step > state.saved:
            _log(run, state, log)
            _save(run, state)
    if stopping and state.saved:
        say(f"saved step {state.step} in {run.out}; the same command goes on from there")
    stop.raise_if_requested()
    if stopping:  # another process was asked
        raise Interrupted(signal.SIGTERM)


def _metrics_log(run: Run, state: _State) -> MetricsLog:
    return MetricsLog(
        run.out,
        resume_step=state.step,
        writes=run.ranks.is_main,
        trackers=run.settings.trackers,
        recipe=run.recipe,
        rules=state.rules,
    )


def _look(run: Run, state: _State, log: MetricsLog, *, last: bool) -> None:
    """Measures what is due, on the averaged weights where there are some."""
    if run.ranks.is_main or run.settings.shard:  # all processes of a split network run it equally often
        run.watch.look(run.model, state.step, log, run.average.in_place, last=last)


def _start(run: Run) -> _State:
    """Optimizer and counters, as new or as the newest checkpoint left them."""
    parameters = run.model.denoiser.trainable_parameters()
    settings = run.settings
    run.average = Average(settings.ema, parameters)
    optimizer = make_optimizer(settings.optimizer, parameters)
    state = _State(
        run.accelerator.prepare_optimizer(optimizer),
        parameters,
        Health(run.model.process.num_timesteps),
        StopRules(settings.stop_when or {}),
    )
    optimizer.zero_grad()  # a run that failed in this very process may have left half a step
    if run.ranks.is_main:
        checkpoints.tidy(run.out)
    run.ranks.wait()
    found = checkpoints.load_latest(run.out, identity=run.identity)
    _refuse_disagreement(run, 0 if found is None else found.step)
    if found is None:
        state.accumulation = settings.accumulation
        return state
    # A step is as large as before, however many processes share it now.
    state.accumulation = run.ranks.part_of(found.position // found.step)
    run.model.load_trained_state(found.trained)
    load_optimizer(state.optimizer, found.state["optimizer"], state.parameters)
    run.average.load_state_dict(found.state["average"])
    state.rules.load_state_dict(found.state["rules"])
    run.objective.load_state_dict(found.state["objective"])
    run.feed.load_state_dict(found.state["feed"])
    run.model.load_reference_state(found.state["reference"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(found.state["scaler"])
    run.watch.restore(found.state["watch"])
    state.step = state.saved = found.step
    state.position, state.counters = found.position, dict(found.state["counters"])
    say(f"going on from step {found.step} of {run.settings.num_steps}")
    return state


def _refuse_disagreement(run: Run, step: int) -> None:
    """Refuses processes that would go on from different checkpoints."""
    steps = run.ranks.gather(torch.tensor([step])).tolist()
    if len(set(steps)) > 1:
        raise UserError(
            f"the processes find different checkpoints in {run.out} (steps {steps}): out= must be one folder "
            "that all of them see"
        )


def _save(run: Run, state: _State) -> None:
    if state.saved == 0:
        for line in state.rules.unseen():
            say(line)
    state.saved = state.step
    # Asked of every process: what they hold may be spread over them.
    feed, trained = run.feed.state_dict(), run.model.trained_state()
    optimizer = whole(state.optimizer.state_dict())
    if not run.ranks.is_main:
        return
    scaler = run.accelerator.scaler
    checkpoint = checkpoints.Checkpoint(
        step=state.step,
        position=state.position,
        trained=trained,
        state={
            "optimizer": optimizer,
            "average": run.average.state_dict(),
            "rules": state.rules.state_dict(),
            "objective": run.objective.state_dict(),
            "feed": feed,
            "reference": run.model.reference_state(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "counters": state.counters,
            "watch": run.watch.summary(),
        },
    )
    checkpoints.save(run.out, checkpoint, identity=run.identity, keep=run.settings.checkpoint.keep)


def _micro_batches(run: Run, start: int) -> Iterator[list[tuple[Batch, Draws]]]:
    """This process's micro-batch from number `start` on, with its draws, on the device, or an empty list."""
    device, ranks = run.accelerator.device, run.ranks
    for item in run.feed.micro_batches(start, ranks.index, ranks.count):
        yield [] if item is None else [(item[0].to(device), item[1].to(device))]


def _timed_step(
    run: Run, state: _State, incoming: Iterator[list[tuple[Batch, Draws]]], log: MetricsLog
) -> tuple[float, float]:
    """One optimizer step; returns its mean loss and the groups a second, waiting for data included."""
    started = time.perf_counter()
    micro = [item for _ in range(state.accumulation) for item in next(incoming)]
    state.position += state.accumulation * run.ranks.count
    for row in run.feed.news():
        log.write("rollout", state.step + 1, row)
    num_groups = run.ranks.total(sum(batch.num_groups for batch, _ in micro))
    loss = _optimizer_step(run, state, micro, num_groups) if num_groups else math.nan
    if state.count("empty", happened=not num_groups):
        raise UserError(f"{MAX_SKIPS_IN_A_ROW + 1} steps in a row taught nothing: {run.feed.why_empty}")
    state.step += 1
    _update_reference(run, state.step)
    run.average.move(state.step)
    for line in state.graphs.news() if run.settings.compile else ():
        say(line)
    return loss, num_groups / (time.perf_counter() - started)


def _optimizer_step(run: Run, state: _State, micro: list[tuple[Batch, Draws]], num_groups: float) -> float:
    """One optimizer step on the mean loss over all processes' `num_groups` groups; returns that mean."""
    denoiser, objective, ranks = run.model.denoiser, run.objective, run.ranks
    with run.accelerator.autocast():
        shared = objective.prepare(denoiser, micro, ranks.gather)
    total, failure = 0.0, None
    logs: list[dict[str, torch.Tensor]] = []
    for index, (batch, draws) in enumerate(micro):
        with run.accelerator.autocast():
            output = objective.compute(denoiser, batch, draws, shared)
        try:
            total += finite_sum(output.loss, batch, draws, state.step)
            if state.step == index == 0:
                state.step_zero = step_zero(objective, output, run.settings)
        except UserError as error:
            failure = failure or error  # and go on: others may wait for this process in each pass
        objective.backward(output, 1.0 / num_groups, run.accelerator.backward)
        state.health.add(output.loss, output.logs)
        logs.append(output.logs)
    ranks.fail_together(failure)
    objective.observe(logs, ranks.gather)
    if run.accelerator.scaler is not None and not micro:  # it must have seen a loss before it can unscale
        run.accelerator.scaler.scale(torch.zeros((), device=run.accelerator.device))
    ranks.sum_gradients(state.parameters)
    norm = ranks.clip_gradients(state.parameters, run.settings.optimizer.max_grad_norm)
    _step_unless_non_finite(run, state, norm)
    return ranks.total(total) / num_groups


def _update_reference(run: Run, step: int) -> None:
    """Moves the reference towards the policy, where the recipe says so."""
    spec = run.settings.reference
    if spec.mode != "frozen" and step % spec.every == 0:
        run.model.move_reference(spec.decay if spec.mode == "ema" else 0.0)


def _step_unless_non_finite(run: Run, state: _State, norm: float) -> None:
    finite = math.isfinite(norm)
    # fp16: a step with overflown gradients must still reach the scaler, which skips it and lowers its scale.
    if finite or run.accelerator.scaler is not None:
        state.optimizer.step()
    state.optimizer.zero_grad()
    if finite:
        state.health.add_grad_norm(norm)
    if state.count("skipped", happened=not finite):
        raise UserError(
            f"gradients were not finite {MAX_SKIPS_IN_A_ROW + 1} times in a row, last at step {state.step}: "
            "lower optimizer.lr or use precision=bf16; the last checkpoint is unharmed"
        )


def _set_learning_rate(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _log(run: Run, state: _State, log: MetricsLog) -> None:
    """Writes the health of the steps since the last row, if there were any."""
    report = state.health.report(run.ranks.gather_rows)
    if not report:
        return
    rate = learning_rate(run.settings.optimizer, state.step - 1, run.settings.num_steps)
    first = {} if state.step_zero is None else {"step_0": state.step_zero}
    state.step_zero = None
    log.write("train", state.step, {**report, "lr": rate, **state.totals(), **first})


def finish(run: Run, card: str) -> Path:
    """Writes what was trained to `<out>/adapter`, whole or not at all, with its card; returns the folder.

    With a moving average that is the average; the weights of the last step are in `<out>/adapter_last`,
    without the card, whose numbers are the average's. For the first process alone, after `fit`.
    """
    if run.settings.ema.decay > 0.0:
        with files.atomic_path(run.out / "adapter_last") as temporary:
            temporary.mkdir()
            run.model.save_adapter(str(temporary))
    folder = run.out / "adapter"
    # No process has all of a split network, but the last checkpoint is whole, and of the last step.
    trained = checkpoints.latest_trained(run.out) if run.settings.shard else None
    with run.average.in_place(), files.atomic_path(folder) as temporary:
        temporary.mkdir()
        run.model.save_adapter(str(temporary), trained)
        files.write_text(temporary / "README.md", card)
    return folder
