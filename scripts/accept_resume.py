"""A run that is killed twenty times and gone on with ends in the bits of a run that was left alone.

    python scripts/accept_resume.py --out runs/resume

Both are `diffalign train` in processes of their own: Diffusion-DPO on a random pipeline of the smallest size,
accumulation 2, adapter dropout 0.1, caption dropout 0.2, two loader workers, held-out accuracy while
training. One is stopped by SIGKILL: while it starts, before its first checkpoint, in the middle of steps, and
while a checkpoint is being written (the temporary folder is there when the process is gone). Then the same
command runs to its end. Weights, optimizer, sampler position and the rows of metrics.jsonl must be equal.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import reporting
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from diffalign.common import files
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record, write_records
from diffalign.models.sdxl import Plugin as SDXL

PAIRS, PROMPTS, STEPS, EVERY = 30, 12, 600, 10
KILLS = ("starting",) * 2 + ("first steps",) * 3 + ("step", "write", "step") * 5
"""What each kill waits for; 15 of the 20 come after the first checkpoint."""


@dataclass
class Kill:
    """One SIGKILL and what it hit."""

    aim: str
    whole_group: bool
    step: int = 0
    checkpoint: int = 0
    half_written: list[str] = field(default_factory=list)


def main() -> int:
    """Runs both, compares, writes the report; 0 if the bar is met."""
    arguments = parse()
    out = Path(arguments.out).resolve()
    if out.exists() and any(out.iterdir()):
        print(f"{out} is not empty: give a new folder", file=sys.stderr)
        return 2
    command = prepare(out)
    started = time.monotonic()
    run_to_end([*command, f"out={out / 'alone'}"])
    alone_seconds = time.monotonic() - started
    kills = [
        strike(
            [*command, f"out={out / 'killed'}"],
            out / "killed",
            aim,
            random.Random(f"{arguments.seed}:{number}"),
        )
        for number, aim in enumerate(KILLS)
    ]
    run_to_end([*command, f"out={out / 'killed'}"])
    checks = compare(out / "killed", out / "alone")
    checks["12 or more kills after the first checkpoint"] = sum(kill.checkpoint > 0 for kill in kills) >= 12
    checks["3 or more kills inside a checkpoint write"] = sum(bool(kill.half_written) for kill in kills) >= 3
    text = report(command, kills, checks, alone_seconds, time.monotonic() - started)
    files.write_text(out / "report.md", text)
    if arguments.report:
        files.write_text(arguments.report, text)
    print(text)
    return 0 if all(checks.values()) else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="a new folder for both runs")
    parser.add_argument("--report", default=None, help="also write the report to this file")
    parser.add_argument("--seed", type=int, default=0, help="of the instants of the kills")
    return parser.parse_args()


def prepare(out: Path) -> list[str]:
    """Writes the model and the data below `out`; returns the command without its `out=`."""
    SDXL.tiny(out / "model")
    rng = np.random.default_rng(0)
    records = []
    for number in range(PAIRS):
        candidates = []
        for side in (0, 1):
            path = out / "data" / f"{number}-{side}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            size = (32, 48) if number % 3 else (32, 32)
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
            candidates.append(Candidate(ImageRef(path), label=float(side == number % 2)))
        records.append(Record(f"pair-{number}", f"picture {number % PROMPTS}", candidates))
    write_records(out / "data" / "preferences.jsonl", records)
    settings = {
        "model": "sdxl",
        "model.path": out / "model",
        "data": "jsonl",
        "data.path": out / "data",
        "objective": "diffusion_dpo",
        "objective.beta": 2000,
        "adapter.rank": 4,
        "adapter.dropout": 0.1,
        "loader.batch_size": 2,
        "loader.num_workers": 2,
        "loader.caption_dropout": 0.2,
        "accumulation": 2,
        "optimizer.lr": 1e-3,
        "optimizer.schedule": "cosine",
        "validation.share": 0.2,
        "validation.every": 100,
        "validation.draws": 2,
        "checkpoint.every": EVERY,
        "log_every": 1,
        "num_steps": STEPS,
    }
    return [
        sys.executable,
        "-m",
        "diffalign",
        "train",
        *(f"{key}={value}" for key, value in settings.items()),
    ]


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """The command on one thread, in a process group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)


def run_to_end(command: list[str]) -> None:
    """Runs the command; raises when it fails."""
    process = start(command)
    if process.wait() != 0:
        raise SystemExit(f"the command ended with {process.returncode}: {' '.join(command)}")


def strike(command: list[str], folder: Path, aim: str, rng: random.Random) -> Kill:
    """Starts the command and kills it at the instant that `aim` asks for; says what was hit."""
    kill = Kill(aim, whole_group=rng.random() < 0.5)
    before = newest_checkpoint(folder)
    process = start(command)
    if aim == "starting":
        time.sleep(rng.uniform(0.5, 6.0))
    elif aim == "first steps":
        target = rng.randrange(1, EVERY - 1)
        wait_for(lambda: last_step(folder) >= target, process)
        time.sleep(rng.uniform(0.0, 0.05))
    elif aim == "step":
        target = max(before, EVERY) + rng.randrange(1, 3 * EVERY)
        wait_for(lambda: last_step(folder) >= target and newest_checkpoint(folder) > 0, process)
        time.sleep(rng.uniform(0.0, 0.05))
    else:
        target = before + rng.randrange(1, 3) * EVERY
        wait_for(lambda: newest_checkpoint(folder) >= target, process)
        wait_for(lambda: bool(temporary(folder)), process, pause=0.0)
        time.sleep(rng.uniform(0.0, 0.004))
    if process.poll() is not None:
        raise SystemExit(f"the run ended with {process.returncode} before it could be killed ({aim})")
    if kill.whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()  # its workers notice by themselves
    process.wait()
    kill.step, kill.checkpoint = last_step(folder), newest_checkpoint(folder)
    kill.half_written = [
        f"{path.name.split('-', 2)[2]}: {', '.join(sorted(p.name for p in path.iterdir())) or 'empty'}"
        for path in temporary(folder)
    ]
    print(f"kill {aim}: {kill}", file=sys.stderr)
    return kill


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes], pause: float = 0.002) -> None:
    """Waits until `happened()`, or until the process is over."""
    while not happened() and process.poll() is None:
        time.sleep(pause)


def temporary(folder: Path) -> list[Path]:
    """Checkpoints that are being written."""
    return [path for path in (folder / "checkpoints").glob(".tmp-*-step-*") if path.is_dir()]


def newest_checkpoint(folder: Path) -> int:
    """The step of the newest whole checkpoint, 0 for none."""
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


def last_step(folder: Path) -> int:
    """The last step in metrics.jsonl, 0 for none."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return 0
    rows = files.read_jsonl(path, drop_torn_tail=True)
    return int(rows[-1]["step"]) if rows else 0


def compare(killed: Path, alone: Path) -> dict[str, bool]:
    """What must be equal -> whether it is."""
    name = f"checkpoints/step-{STEPS:08d}"
    weights = [load_file(run / name / "trained.safetensors") for run in (killed, alone)]
    states = [torch.load(run / name / "state.pt", weights_only=True) for run in (killed, alone)]
    positions = [files.read_json(run / name / "manifest.json")["position"] for run in (killed, alone)]
    metrics = [files.read_jsonl(run / "metrics.jsonl") for run in (killed, alone)]
    summaries = [files.read_json(run / "manifest.json")["summary"] for run in (killed, alone)]
    adapters = [saved_adapter(run) for run in (killed, alone)]
    return {
        "weights bit-equal": same(*weights),
        "saved adapter bit-equal, its metadata too": same(*adapters),
        "optimizer bit-equal": same(states[0]["optimizer"], states[1]["optimizer"]),
        "counters equal": same(states[0]["counters"], states[1]["counters"]),
        "sampler position equal": positions[0] == positions[1] == 2 * STEPS,
        "rows of metrics.jsonl equal": metrics[0] == metrics[1] and len(metrics[0]) > STEPS,
        "closing numbers equal": summaries[0] == summaries[1],
        "nothing left behind": not list(killed.rglob(".tmp-*")),
    }


def saved_adapter(run: Path) -> dict[str, Any]:
    """Tensors and metadata; safetensors writes the entries of its header in an order of the process."""
    with safe_open(run / "adapter" / "pytorch_lora_weights.safetensors", "pt") as file:
        return {"metadata": file.metadata(), **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118


def same(first: Any, second: Any) -> bool:
    """Equality bit for bit through nested lists and mappings."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def report(
    command: list[str], kills: list[Kill], checks: dict[str, bool], alone_seconds: float, seconds: float
) -> str:
    """The report as Markdown."""
    recipe = " ".join(word for word in command[4:] if not word.split("=")[0].endswith("path"))
    lines = [
        *reporting.head("Resuming after SIGKILL", "python scripts/accept_resume.py --out runs/resume"),
        f"One thread a run. Recipe: `diffalign train {recipe}` on {PAIRS} pairs in two sizes.",
        "",
        f"{len(kills)} kills, {sum(kill.checkpoint > 0 for kill in kills)} after the first checkpoint, "
        f"{sum(bool(kill.half_written) for kill in kills)} inside a checkpoint write. "
        f"{alone_seconds:.0f} s undisturbed, {seconds - alone_seconds:.0f} s with all restarts.",
        "",
        *reporting.bars(checks),
        "| kill | aimed at | killed | step | newest checkpoint | half-written |",
        "|---|---|---|---|---|---|",
        *(row(number, kill) for number, kill in enumerate(kills, 1)),
        "",
    ]
    return "\n".join(lines)


def row(number: int, kill: Kill) -> str:
    """One line of the table of kills."""
    killed = "with its workers" if kill.whole_group else "main process"
    written = "; ".join(kill.half_written) or "-"
    return f"| {number} | {kill.aim} | {killed} | {kill.step} | {kill.checkpoint or '-'} | {written} |"


if __name__ == "__main__":
    sys.exit(main())
