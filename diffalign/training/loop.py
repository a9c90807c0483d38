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
from diffalign.objectives._base import Objective, Output
from diffalign.training import checkpoint as checkpoints
from diffalign.training.feed import Feed
from diffalign.training.health import Health
from diffalign.training.metrics import MetricsLog
from diffalign.training.ranks import Ranks
from diffalign.training.specs import OptimizerSpec, Settings
from diffalign.training.watch import Watch

MAX_SKIPS_IN_A_ROW = 25
"""fp16's loss scale may halve 16 times before the first step fits; more means that the weights are lost."""


class NonFiniteLoss(UserError):
    """A loss that is NaN or infinite; raised before the weights are touched."""


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
    """

    model: Model
    objective: Objective
    feed: Feed
    out: Path
    identity: str
    accelerator: Accelerator
    settings: Settings
    watch: Watch

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return Ranks(self.accelerator)


@dataclass
class _State:
    """What changes while the loop runs."""

    adamw: Any
    parameters: list[torch.nn.Parameter]
    health: Health
    step: int = 0
    saved: int = 0
    position: int = 0
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
    with closing(MetricsLog(run.out, resume_step=state.step, writes=run.ranks.is_main)) as log:
        if state.step == 0 and run.ranks.is_main:
            run.watch.look(run.model, 0, log)
        _steps(run, state, log)
    if state.counters["empty_steps"] == state.step > 0:
        raise UserError(f"all {state.step} steps taught nothing: {run.feed.why_empty}")
    return {"steps": state.step, **state.totals(), **run.watch.summary()}


def _steps(run: Run, state: _State, log: MetricsLog) -> None:
    """All steps that are left."""
    settings, ranks, incoming = run.settings, run.ranks, _micro_batches(run, state.position)
    with StopRequest() as stop, Progress("train", settings.num_steps, "steps", initial=state.step) as bar:
        stopping = False
        while state.step < settings.num_steps and not stopping:
            torch.manual_seed(seed_of(settings.seed, "step", state.step, ranks.index))
            rate = learning_rate(settings.optimizer, state.step, settings.num_steps)
            _set_learning_rate(state.adamw, rate)
            loss, speed = _timed_step(run, state, incoming, log)
            bar.update(1, loss=loss, **{f"{run.objective.unit}s/s": speed})
            last = state.step == settings.num_steps
            keep = state.step % settings.checkpoint.every == 0 or last
            # What is not logged with a checkpoint, a resumed run cannot know.
            if state.step % settings.log_every == 0 or keep:
                _log(run, state, log)
            if ranks.is_main:
                run.watch.look(run.model, state.step, log, last=last)
            if keep:
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


def learning_rate(spec: OptimizerSpec, step: int, num_steps: int) -> float:
    """The learning rate of optimizer step `step` (0-based): pure, so that resuming needs no schedule state.

    Linear warm-up reaches `lr` at step `warmup_steps`; then constant, or down to 0 at `num_steps`.
    """
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / (spec.warmup_steps + 1)
    progress = (step - spec.warmup_steps) / max(1, num_steps - spec.warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return spec.lr * factor[spec.schedule]


def _start(run: Run) -> _State:
    """Optimizer and counters, as new or as the newest checkpoint left them."""
    parameters = run.model.denoiser.trainable_parameters()
    spec = run.settings.optimizer
    adamw = torch.optim.AdamW(
        parameters,
        lr=spec.lr,
        betas=(spec.betas[0], spec.betas[1]),
        eps=spec.eps,
        weight_decay=spec.weight_decay,
    )
    state = _State(
        run.accelerator.prepare_optimizer(adamw), parameters, Health(run.model.process.num_timesteps)
    )
    adamw.zero_grad()  # a run that failed in this very process may have left half a step
    if run.ranks.is_main:
        checkpoints.tidy(run.out)
    run.ranks.wait()
    found = checkpoints.load_latest(run.out, identity=run.identity)
    _refuse_disagreement(run, 0 if found is None else found.step)
    if found is None:
        return state
    run.model.load_trained_state(found.trained)
    state.adamw.load_state_dict(found.state["optimizer"])
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
    state.saved = state.step
    feed = run.feed.state_dict()  # asked of every process: what it holds may be spread over them
    if not run.ranks.is_main:
        return
    scaler = run.accelerator.scaler
    checkpoint = checkpoints.Checkpoint(
        step=state.step,
        position=state.position,
        trained=run.model.trained_state(),
        state={
            "optimizer": state.adamw.state_dict(),
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
    micro = [item for _ in range(run.settings.accumulation) for item in next(incoming)]
    state.position += run.settings.accumulation * run.ranks.count
    for row in run.feed.news():
        log.write("rollout", state.step + 1, row)
    num_groups = run.ranks.total(sum(batch.num_groups for batch, _ in micro))
    loss = _optimizer_step(run, state, micro, num_groups) if num_groups else math.nan
    if state.count("empty", happened=not num_groups):
        raise UserError(f"{MAX_SKIPS_IN_A_ROW + 1} steps in a row taught nothing: {run.feed.why_empty}")
    state.step += 1
    _update_reference(run, state.step)
    return loss, num_groups / (time.perf_counter() - started)


def _optimizer_step(run: Run, state: _State, micro: list[tuple[Batch, Draws]], num_groups: float) -> float:
    """One optimizer step on the mean loss over all processes' `num_groups` groups; returns that mean."""
    denoiser, objective, ranks = run.model.denoiser, run.objective, run.ranks
    with run.accelerator.autocast():
        shared = objective.prepare(denoiser, micro, ranks.gather)
    total, failure = 0.0, None
    for index, (batch, draws) in enumerate(micro):
        with run.accelerator.autocast():
            output = objective.compute(denoiser, batch, draws, shared)
        try:
            total += _finite_sum(output.loss, batch, draws, state.step)
        except NonFiniteLoss as error:
            failure = error
            break
        objective.backward(output, 1.0 / num_groups, run.accelerator.backward)
        state.health.add(output.loss, output.logs)
        if state.step == index == 0:
            _say_step_zero(objective, output)
    ranks.fail_together(failure)
    if run.accelerator.scaler is not None and not micro:  # it must have seen a loss before it can unscale
        run.accelerator.scaler.scale(torch.zeros((), device=run.accelerator.device))
    ranks.sum_gradients(state.parameters)
    norm = run.accelerator.clip_grad_norm_(state.parameters, run.settings.optimizer.max_grad_norm or math.inf)
    _step_unless_non_finite(run, state, float(norm))
    return ranks.total(total) / num_groups


def _update_reference(run: Run, step: int) -> None:
    """Moves the reference towards the policy, where the recipe says so."""
    spec = run.settings.reference
    if spec.mode != "frozen" and step % spec.every == 0:
        run.model.move_reference(spec.decay if spec.mode == "ema" else 0.0)


def _say_step_zero(objective: Objective, output: Output) -> None:
    expected = objective.loss_at_reference(output)
    if expected is None:
        return
    largest = float(output.logs["margin"].abs().max())
    loss = float(output.loss.detach().mean())
    say(f"step 0: loss {loss:.6f} ({expected:.6f} expected), largest |logit| {largest:.3g} (0 expected)")


def _finite_sum(loss: torch.Tensor, batch: Batch, draws: Draws, step: int) -> float:
    loss = loss.detach()
    total = float(loss.sum())
    if math.isfinite(total):
        return total
    t = draws.t[torch.cumsum(batch.counts, 0) - 1].tolist()
    bad = [
        f"{name} (t={t[row]})" for row, name in enumerate(batch.ids) if not math.isfinite(float(loss[row]))
    ]
    raise NonFiniteLoss(
        f"the loss at step {step} is not finite for {', '.join(bad)}: look at these rows, lower "
        "optimizer.lr, or use precision=bf16 or fp32; the weights were not touched"
    )


def _step_unless_non_finite(run: Run, state: _State, norm: float) -> None:
    finite = math.isfinite(norm)
    # fp16: a step with overflown gradients must still reach the scaler, which skips it and lowers its scale.
    if finite or run.accelerator.scaler is not None:
        state.adamw.step()
    state.adamw.zero_grad()
    if finite:
        state.health.add_grad_norm(norm)
    if state.count("skipped", happened=not finite):
        raise UserError(
            f"gradients were not finite {MAX_SKIPS_IN_A_ROW + 1} times in a row, last at step {state.step}: "
            "lower optimizer.lr or use precision=bf16; the last checkpoint is unharmed"
        )


def _set_learning_rate(adamw: Any, lr: float) -> None:
    for group in adamw.param_groups:
        group["lr"] = lr


def _log(run: Run, state: _State, log: MetricsLog) -> None:
    """Writes the health of the steps since the last row, if there were any."""
    report = state.health.report(run.ranks.gather_rows)
    if not report:
        return
    rate = learning_rate(run.settings.optimizer, state.step - 1, run.settings.num_steps)
    row = {**report, "lr": rate, **state.totals()}
    log.write("train", state.step, row)


def finish(run: Run, card: str) -> Path:
    """Writes what was trained to `<out>/adapter`, whole or not at all, with its card; returns the folder.

    For the first process alone.
    """
    folder = run.out / "adapter"
    with files.atomic_path(folder) as temporary:
        temporary.mkdir()
        run.model.save_adapter(str(temporary))
        files.write_text(temporary / "README.md", card)
    return folder
