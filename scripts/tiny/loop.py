"""One resumable training loop for every part: VAE, UNet with its text encoders, open_clip model."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.common.draws import seed_of
from scripts.tiny.settings import Settings


class OutOfTime(Exception):
    """The minutes given to the builder are over; all is saved, and the same command goes on from here."""


class Clock:
    """Counts the minutes of this run of the builder; writes its lines to the screen and into `build.log`."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.started = time.monotonic()
        self.limit = 60.0 * minutes
        self.file = folder / "build.log"

    def over(self) -> bool:
        """True when the minutes are used up."""
        return time.monotonic() - self.started > self.limit

    def say(self, text: str) -> None:
        """Prints one line, stamped with the time of day and the minutes so far, and appends it to the log."""
        line = f"{time.strftime('%H:%M:%S')} {(time.monotonic() - self.started) / 60:6.1f} min  {text}"
        print(line, flush=True)
        with self.file.open("a", encoding="utf-8") as log:
            log.write(line + "\n")


@dataclass(frozen=True)
class Plan:
    """How one part trains: AdamW, linear warm-up, cosine to 2 % of `lr` at `horizon`, EMA of the weights.

    muon_in: matrices whose name begins so are trained by Muon (Jordan 2024,
        https://kellerjordan.github.io/posts/muon/) at `muon_lr` instead, on the same schedule.
    """

    name: str
    steps: int
    lr: float
    seed: int
    ema: float = 0.999
    warmup: int = 150
    weight_decay: float = 0.01
    clip: float = 1.0
    bf16: bool = True
    save_every_seconds: float = 60.0
    keep_every: int = 0
    horizon: int = 0
    muon_in: str = ""
    muon_lr: float = 0.0

    def rate(self, step: int) -> float:
        """The share of the learning rates at a step, 0-based; `horizon` 0 is the last step."""
        warm = min(1.0, (step + 1) / max(1, min(self.warmup, self.steps // 4)))
        horizon = self.horizon or self.steps
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / horizon)))

    def optimizers(self, modules: nn.ModuleDict) -> list[tuple[torch.optim.Optimizer, float]]:
        """The optimizers, each with its learning rate: AdamW, and Muon where it is asked for."""
        matrices, others = [], []
        for name, parameter in modules.named_parameters():
            by_muon = self.muon_in and name.startswith(self.muon_in) and parameter.ndim == 2
            (matrices if by_muon else others).append(parameter)
        adamw = torch.optim.AdamW(others, lr=self.lr, weight_decay=self.weight_decay)
        if not self.muon_in:
            return [(adamw, self.lr)]
        muon = torch.optim.Muon(matrices, lr=self.muon_lr, weight_decay=self.weight_decay)
        return [(adamw, self.lr), (muon, self.muon_lr)]


def plan_of(settings: Settings, name: str, *, steps: int, lr: float, **own: Any) -> Plan:
    """The plan of a part, with what the settings say for every part; `own`: other fields of `Plan`."""
    return Plan(
        name=name,
        steps=steps,
        lr=lr,
        seed=settings.seed,
        bf16=settings.bf16,
        save_every_seconds=settings.save_every_seconds,
        **own,
    )


def save_file(state: Any, path: Path) -> None:
    """Writes a torch file aside and renames it, so that a stop in the middle leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    torch.save(state, aside)
    os.replace(aside, path)


def train(
    plan: Plan,
    modules: nn.ModuleDict,
    loss_of_step: Callable[[int], tuple[Tensor, Mapping[str, float]]],
    *,
    folder: Path,
    clock: Clock,
    probe: Callable[[nn.ModuleDict, int], str] | None = None,
) -> nn.ModuleDict:
    """The averaged modules after `plan.steps` steps; `modules` itself ends with the raw weights.

    Step s draws all its random numbers after seeding torch with (seed, name, s), so a run that stops and goes
    on makes the same steps as one that does not. Every `plan.keep_every` steps the averaged weights are kept
    as `<name>-<step>.pt` and `probe(averaged modules, step)` is logged. Raises OutOfTime (after saving) when
    the clock is over, ValueError on a non-finite loss.
    """
    averaged = _copy(modules)
    optimizers = plan.optimizers(modules)
    path = folder / f"{plan.name}.pt"
    step, seconds = _resume(path, modules, averaged, optimizers)
    began = saved = time.monotonic()
    mean: dict[str, float] = {}

    def checkpoint() -> None:
        state = {
            "step": step,
            "seconds": seconds + time.monotonic() - began,
            "modules": modules.state_dict(),
            "averaged": averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
        }
        save_file(state, path)

    while step < plan.steps:
        logs = _step(plan, step, modules, averaged, optimizers, loss_of_step)
        for key, value in logs.items():
            mean[key] = value if key not in mean else 0.98 * mean[key] + 0.02 * value
        step += 1
        if step % 100 == 0 or step == plan.steps:
            pace = (seconds + time.monotonic() - began) / step
            words = " ".join(f"{key} {value:.4f}" for key, value in mean.items())
            clock.say(f"{plan.name} {step}/{plan.steps} {words} {pace:.3f} s a step")
        if plan.keep_every and step % plan.keep_every == 0:
            save_file(averaged.state_dict(), folder / f"{plan.name}-{step:06d}.pt")
            if probe is not None:
                clock.say(f"{plan.name} {step}: {probe(averaged, step)}")
        if time.monotonic() - saved > plan.save_every_seconds or step == plan.steps:
            checkpoint()
            saved = time.monotonic()
        if clock.over() and step < plan.steps:
            checkpoint()
            raise OutOfTime
    return averaged


def _step(
    plan: Plan,
    step: int,
    modules: nn.ModuleDict,
    averaged: nn.ModuleDict,
    optimizers: list[tuple[torch.optim.Optimizer, float]],
    loss_of_step: Callable[[int], tuple[Tensor, Mapping[str, float]]],
) -> dict[str, float]:
    """One optimizer step and one step of the average; returns its logged numbers."""
    torch.manual_seed(seed_of(plan.seed, plan.name, step))
    modules.train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=plan.bf16):
        loss, logs = loss_of_step(step)
    if not torch.isfinite(loss):
        raise ValueError(f"{plan.name}: the loss is {loss.item()} at step {step}; lower the learning rate")
    modules.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(modules.parameters(), plan.clip)
    for optimizer, lr in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * plan.rate(step)
        optimizer.step()
    decay = min(plan.ema, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(averaged.parameters()), list(modules.parameters()), 1 - decay)
        for kept, live in zip(averaged.buffers(), modules.buffers(), strict=True):
            kept.copy_(live)
    return {"loss": loss.item(), **logs}


def _copy(modules: nn.ModuleDict) -> nn.ModuleDict:
    import copy

    return copy.deepcopy(modules).eval().requires_grad_(False)


def _resume(
    path: Path,
    modules: nn.ModuleDict,
    averaged: nn.ModuleDict,
    optimizers: list[tuple[torch.optim.Optimizer, float]],
) -> tuple[int, float]:
    """(steps done, seconds spent) of the checkpoint, loaded into all of them; (0, 0) without one."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    modules.load_state_dict(state["modules"])
    averaged.load_state_dict(state["averaged"])
    for (optimizer, _), kept in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    return int(state["step"]), float(state["seconds"])
