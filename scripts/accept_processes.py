"""Two processes do what one does: every stage under torchrun, the same steps, resuming, and a killed process.

    python scripts/accept_processes.py --out runs/processes

`train` runs 20 steps of 1 x 8 pairs and of 2 x 4 as the demo does (Diffusion-DPO, beta 2000, lr 4e-4,
tiny-sdxl): a LoRA and the whole network, in fp32 and in float64. Compared is ||a - b|| / ||a||, a and b the
changes since step 0 over all trained tensors. A run of two is killed, goes on as one, is killed and goes on
as two. One process of two is killed while the other is at work. The other stages run as one and as two.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import reporting
import torch
from double_precision import in_float64, keep
from PIL import Image
from safetensors.torch import load_file

from diffalign.common import files
from diffalign.data.cache import open_cache
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record, write_records
from diffalign.demo import embedded

PAIRS, STEPS = 32, 20
BARS = {"fp32": 1e-3, "float64": 1e-9}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ENDS_WITHIN = 60.0
"""Seconds after a kill in which everything must be over; torchrun gives the others 30 to leave."""


def main() -> int:
    """Runs everything, writes the report; 0 if the bars are met."""
    arguments = parse()
    if arguments.worker:
        return worker(Path(arguments.out), arguments.words)
    out = Path(arguments.out).resolve()
    if out.exists() and any(out.iterdir()):
        print(f"{out} is not empty: give a new folder", file=sys.stderr)
        return 2
    prepare(out)
    checks: dict[str, bool] = {}
    cells = [(kind, precision) for kind in ("lora", "full") for precision in BARS]
    distances = [(*cell, compared(out, *cell)) for cell in cells]
    distances += [(f"{kind}, shard=true", "fp32", sharded(out, kind)) for kind in ("lora", "full")]
    for kind, precision, distance in distances:
        checks[f"{kind}, {precision}: 2 x 4 is 1 x 8 to {BARS[precision]:g}"] = distance <= BARS[precision]
    resumed = resume(out)
    checks[f"as two, as one, as two: the undisturbed run to {BARS['fp32']:g}"] = resumed <= BARS["fp32"]
    seconds, said = killed(out)
    checks[f"a killed process ends the run within {ENDS_WITHIN:g} s, with a line"] = (
        seconds <= ENDS_WITHIN and "another process of this run has gone" in said
    )
    checks |= stages(out)
    text = report(distances, resumed, seconds, checks)
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
    parser.add_argument("--out", required=True, help="a new folder for all runs")
    parser.add_argument("--report", default=None, help="also write the report to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


def worker(out: Path, words: list[str]) -> int:
    """`diffalign WORDS` in float64, as one of the processes; keeps what it started from and ended with."""
    from diffalign import cli
    from diffalign.training import loop

    fit, rank = loop.fit, os.environ.get("RANK", "0")

    def fit_in_float64(run: loop.Run) -> dict[str, Any]:
        in_float64(run)
        keep(run, out / f"start-{rank}.safetensors")
        summary = fit(run)
        keep(run, out / f"end-{rank}.safetensors")
        return summary

    loop.fit = fit_in_float64
    return cli.main(words)


def prepare(out: Path) -> None:
    """Writes pairs of random pictures."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(PAIRS):
        candidates = []
        for side in (0, 1):
            path = out / "data" / f"{number}-{side}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((64, 64), Image.Resampling.BICUBIC).save(path)
            candidates.append(Candidate(ImageRef(path), label=float(side == number % 2)))
        records.append(Record(f"pair-{number}", f"picture {number}", candidates))
    write_records(out / "data" / "preferences.jsonl", records)


def run(words: list[str], *, two: bool, program: tuple[str, ...] = ("-m", "diffalign")) -> None:
    """Runs the program in one process or in two; raises when it fails."""
    done = subprocess.run(
        [sys.executable, *(TORCHRUN if two else ()), *program, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"ended with {done.returncode}: {' '.join(words)}\n{done.stderr[-3000:]}")


def base() -> list[str]:
    """The words that name the model."""
    return ["model=sdxl", f"model.path={embedded('tiny-sdxl')}"]


def train(out: Path, name: str, batch_size: int, *more: str) -> list[str]:
    """The words of a training run."""
    return [
        "train",
        *base(),
        "data=jsonl",
        f"data.path={out / 'data'}",
        "objective=diffusion_dpo",
        "objective.beta=2000",
        "optimizer.lr=4e-4",
        "optimizer.warmup_steps=5",
        f"loader.batch_size={batch_size}",
        f"num_steps={STEPS}",
        "log_every=1",
        f"out={out / name}",
        *more,
    ]


def compared(out: Path, kind: str, precision: str) -> float:
    """The distance between a run of one process and a run of two."""
    ends = []
    for two in (False, True):
        name = f"{kind}-{precision}-{'two' if two else 'one'}"
        words = train(out, name, 4 if two else 8, f"adapter.kind={kind}")
        if precision == "fp32":
            run(words, two=two)
            ends.append(checkpoint(out / name, STEPS))
            continue
        folder = out / f"{name}-kept"
        folder.mkdir()
        run(["--worker", "--out", str(folder), "--", *words], two=two, program=(__file__,))
        ends.append(load_file(folder / "end-0.safetensors"))
    kept = out / f"{kind}-float64-one-kept" / "start-0.safetensors"
    start = load_file(kept) if precision == "float64" else start_of(kind)
    return distance(*ends, start)


def sharded(out: Path, kind: str) -> float:
    """The distance of a run whose network is split over two processes from that of one process."""
    name = f"{kind}-fp32-shard"
    run(train(out, name, 4, f"adapter.kind={kind}", "shard=true"), two=True)
    ends = [checkpoint(out / other, STEPS) for other in (f"{kind}-fp32-one", name)]
    return distance(*ends, start_of(kind))


def start_of(kind: str) -> dict[str, torch.Tensor]:
    """What a run trains, at its step 0."""
    from diffalign.models._spec import AdapterSpec
    from diffalign.models.sdxl import Plugin

    model: Any = Plugin(path=str(embedded("tiny-sdxl"))).load()
    model.start_training(AdapterSpec(kind="full" if kind == "full" else "lora"), seed=0, with_reference=False)
    return {name: tensor.clone() for name, tensor in model.trained_state().items()}


def checkpoint(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The trained tensors of a step."""
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "trained.safetensors")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """`||(a - start) - (b - start)|| / ||a - start||` over all tensors, in float64."""
    names = sorted(a)
    x, y, zero = (torch.cat([state[name].double().flatten() for name in names]) for state in (a, b, start))
    return float((x - y).norm() / (x - zero).norm())


def resume(out: Path) -> float:
    """The distance of a run that was two, one and two processes from one that was two all the time."""
    run(train(out, "resume-whole", 4), two=True)
    words = train(out, "resume-parts", 4, "checkpoint.every=1")
    strike(words, out / "resume-parts", 7, two=True)
    strike(words, out / "resume-parts", 14, two=False)
    run(words, two=True)
    rows = files.read_jsonl(out / "resume-parts" / "metrics.jsonl")
    if [row["groups"] for row in rows] != [8.0] * STEPS:
        raise SystemExit("the size of a step has changed with the processes")
    ends = [checkpoint(out / f"resume-{name}", STEPS) for name in ("whole", "parts")]
    return distance(*ends, start_of("lora"))


def strike(words: list[str], folder: Path, step: int, *, two: bool) -> tuple[float, str]:
    """Starts a run and kills one of its processes once a step is kept; the seconds to its end, and stderr."""
    log = folder.with_suffix(f".{step}.txt")
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *(TORCHRUN if two else ()), "-m", "diffalign", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stderr=file,
        )
        while process.poll() is None and newest(folder) < step:
            time.sleep(0.01)
        if process.poll() is not None:
            raise SystemExit(f"the run ended before it could be killed: {log}")
        started = time.monotonic()
        os.kill(children(process.pid)[-1] if two else process.pid, signal.SIGKILL)
        process.wait()
    return time.monotonic() - started, log.read_text(encoding="utf-8")


def children(parent: int) -> list[int]:
    """The processes that a process has started."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="utf-8")
    return [int(word) for word in found.split()]


def newest(folder: Path) -> int:
    """The step of the newest whole checkpoint, 0 for none."""
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


def killed(out: Path) -> tuple[float, str]:
    """The seconds until a run of two is over after one was killed, and what was said."""
    words = train(out, "killed", 4, "num_steps=100000", "checkpoint.every=5")
    return strike(words, out / "killed", 10, two=True)


def stages(out: Path) -> dict[str, bool]:
    """The other stages as one and as two processes: whether they write the same."""
    for name, two in (("one", False), ("two", True)):
        place = out / f"stages-{name}"
        lora = f"adapter={out / 'lora-fp32-one' / 'adapter'}"
        data = ["data=jsonl", f"data.path={out / 'data'}"]
        draw = [*base(), "prompts=[a red cube, a blue ring, two green cones]", "seeds=[0,1]"]
        draw += ["num_inference_steps=4", "batch_size=2", "device=cpu"]
        run(["check", *data, f"out={place / 'check'}"], two=two)
        run(["cache", *base(), *data, "device=cpu", f"out={place / 'cache'}"], two=two)
        run(["generate", *draw, f"out={place / 'base'}"], two=two)
        run(["generate", *draw, lora, f"out={place / 'aligned'}"], two=two)
        for side in ("base", "aligned"):
            words = [f"images={place / side}", "scorers=[jpeg]", "batch_size=2", "device=cpu"]
            run(["score", *words, f"out={place / side}-scores"], two=two)
        sides = [f"{side}={place / side}-scores" for side in ("base", "aligned")]
        run(["evaluate", *sides, f"out={place / 'report'}"], two=two)
        judge = ["mode=implicit", *base(), *data, lora, "draws=1"]
        run(["evaluate", *judge, f"out={place / 'implicit'}"], two=two)
    one, two = out / "stages-one", out / "stages-two"
    pictures = {place: sorted((place / "aligned" / "images").iterdir()) for place in (one, two)}
    same = [path.read_bytes() for path in pictures[one]] == [path.read_bytes() for path in pictures[two]]
    rows = [files.read_jsonl(place / "aligned-scores" / "scores.jsonl") for place in (one, two)]
    values = [[(row["id"], row["scores"]) for row in scored] for scored in rows]
    reports = [files.read_json(place / "report" / "report.json")["rewards"] for place in (one, two)]
    judged = [files.read_jsonl(place / "implicit" / "implicit.jsonl") for place in (one, two)]
    checked = [files.read_json(place / "check" / "check.json") for place in (one, two)]
    cached = [(place / "cache" / "records.jsonl").read_bytes() for place in (one, two)]
    kept = [open_cache(place / "cache").choose()[0] for place in (one, two)]
    near = [
        torch.allclose(*(encoded.latents(encoded.example(i, 0).images[0]) for encoded in kept), atol=1e-2)
        for i in range(PAIRS)
    ]
    return {
        "check: the same report": checked[0] == checked[1],
        "cache: the same records in the same order, latents within rounding": cached[0] == cached[1]
        and all(near),
        "generate: the same pictures, byte for byte": same and len(pictures[one]) == 6,
        "score: the same rows": values[0] == values[1],
        "evaluate: the same numbers": reports[0] == reports[1],
        "evaluate mode=implicit: the same judgements": judged[0] == judged[1],
    }


def report(
    distances: list[tuple[str, str, float]], resumed: float, seconds: float, checks: dict[str, bool]
) -> str:
    """The report as Markdown."""
    lines = [
        *reporting.head("Several processes", "python scripts/accept_processes.py --out runs/processes"),
        f"Two processes are those of torchrun, one thread each. Recipe: Diffusion-DPO, beta 2000, lr 4e-4, "
        f"tiny-sdxl, {PAIRS} pairs, {STEPS} steps.",
        "",
        *reporting.bars(checks),
        "| trained | precision | difference of 2 x 4 and 1 x 8, of the change since step 0 |",
        "|---|---|---|",
        *(f"| {kind} | {precision} | {distance:.2g} |" for kind, precision, distance in distances),
        f"| lora, killed as two, gone on as one, killed, gone on as two | fp32 | {resumed:.2g} |",
        "",
        f"After one of two processes was killed, the run was over in {seconds:.1f} s.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
