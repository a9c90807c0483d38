"""`diffalign` in two processes that talk to one another, without paying for two starts of Python each time.

A server imports the libraries once and is forked twice a call. What is set is what `torchrun` sets; that the
real one does the same is shown where a test uses it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.training.loop import Run

PRELOADED = (
    "tests.two_processes",
    "torch.utils.tensorboard",
    "accelerate",
    "diffusers",
    "transformers",
    "peft",
    "open_clip",
    "diffalign.stages.train",
    "diffalign.training.loop",
    "diffalign.training.rollout",
    "diffalign.models.sdxl",
    "diffalign.data.sources.pickapic",
)
PLUGINS = Path(__file__).parent / "plugins" / "scorers"
PATIENCE = 120.0
"""Seconds after which a process counts as hanging."""


@dataclass(frozen=True)
class Ended:
    """How one process ended.

    Args:
        code: what it returned to the system; None: it hung and was killed.
        said: its standard error.
    """

    code: int | None
    said: str

    @property
    def errors(self) -> list[str]:
        """The lines that tell a person of a mistake."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]


def two_processes(
    arguments: Sequence[str], folder: Path, *, count: int = 2, **environment: str
) -> list[Ended]:
    """Runs `diffalign ARGUMENTS` as process 0 and 1 of 2, with the tests' own scorers at hand.

    `environment` is set in both: FLOAT64=1 trains in float64; FAULT="1 3 inf" makes the third backward pass
    of process 1 leave an infinite gradient, FAULT="1 3 kill" kills it then. Each leaves what it has trained
    in `folder` as `rank-N.safetensors` (of a split network process 0 alone), and in `rank-N.held` how many
    numbers of its networks it holds. `count` of 1: one process in place of the two.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"rank-{rank}.txt" for rank in range(count)]
    processes = [
        context.Process(target=_run, args=(rank, count, port, list(arguments), folder, environment))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return [
        Ended(code, log.read_text() if log.exists() else "") for code, log in zip(codes, logs, strict=True)
    ]


def _run(
    rank: int, count: int, port: int, arguments: list[str], folder: Path, environment: Mapping[str, str]
) -> None:
    """What each of them does."""
    with open(folder / f"rank-{rank}.txt", "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 2)
    if count > 1:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in {**told, "MASTER_PORT": port}.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": "", **environment})

    import torch

    import diffalign.scorers
    from diffalign import cli
    from diffalign.training import loop
    from scripts.double_precision import in_float64, keep

    torch.set_num_threads(1)
    diffalign.scorers.__path__.append(str(PLUGINS))
    fit = loop.fit

    def fit_and_keep(run: Run) -> dict[str, Any]:
        if "FLOAT64" in environment:
            in_float64(run)
        process, number, what = environment.get("FAULT", "-1 0 none").split()
        if int(process) == rank:
            fail_at(run, int(number), what)
        summary = fit(run)
        keep(run, folder / f"rank-{rank}.safetensors")
        (folder / f"rank-{rank}.held").write_text(str(numbers_held(run)))
        return summary

    loop.fit = fit_and_keep
    sys.exit(cli.main(arguments))


def numbers_held(run: Run) -> int:
    """How many numbers this process holds of the network and of a frozen copy."""
    from torch.distributed.tensor import DTensor

    from diffalign.diffusion.denoiser import FrozenCopy

    denoiser = run.model.denoiser
    copies = [policy.network for policy in denoiser.policies.values() if isinstance(policy, FrozenCopy)]
    weights = [weight for network in (denoiser.network, *copies) for weight in network.parameters()]
    return sum((weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in weights)


def fail_at(run: Run, number: int, what: str) -> None:
    """Makes the `number`-th backward pass of a run leave an infinite gradient ("inf"), or end it ("kill")."""
    backward, passes = run.objective.backward, iter(range(1, number + 1))

    def once(*arguments: Any) -> None:
        backward(*arguments)
        if next(passes, None) == number:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            run.model.denoiser.trainable_parameters()[0].grad.fill_(float("inf"))

    run.objective.backward = once
