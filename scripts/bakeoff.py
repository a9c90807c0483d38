"""All objectives on the embedded world: the same prompts, pictures and reward, at most four settings each.

    python scripts/bakeoff.py --out runs/bakeoff --phase tune     # every setting, on the tuning prompts
    python scripts/bakeoff.py --out runs/bakeoff --phase test     # the chosen ones, 3 seeds, test prompts
    python scripts/bakeoff.py --out runs/bakeoff --phase asked    # questions that came up, on tuning prompts
    python scripts/bakeoff.py --out runs/bakeoff --phase confirm  # their answers, 3 seeds, test prompts
    python scripts/bakeoff.py --out runs/bakeoff --report-only

Every cell (phase, method, setting, seed) is a process of its own, so that its peak of memory is its own too;
finished ones stand in ROWS and are not done again, others start anew. Setting number k of a method is
`SETTINGS[method][k]`; the one with the highest win rate on the tuning prompts is tested (exemplar and set
rewards: with the highest gain of their own reward). Rewards of training come from the exact grader; those two
use features of tiny-clip.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
from bakeoff_report import as_markdown, chosen_setting
from bakeoff_settings import ASKED, CONFIRMED, SETTINGS
from comparison import KINDS, PICTURES, Rows, graded, rows_of
from PIL import Image

from diffalign.common import files
from diffalign.common.config import resolved_recipe
from diffalign.common.statistics import bootstrap_interval, jackknife_interval
from diffalign.data.sources.jsonl import Plugin as Preferences
from diffalign.demo import embedded, walk
from diffalign.demo.bases import BASES
from diffalign.demo.methods import Method
from diffalign.objectives._base import Objective, OnPolicyObjective
from diffalign.objectives.dragon import Plugin as DRAGON
from diffalign.scorers import load_scorer
from diffalign.scorers._set_rewards import exemplar_reward, set_reward
from diffalign.stages.evaluate import evaluate
from diffalign.stages.pair import pair
from diffalign.stages.train import train

ROWS = Path(__file__).with_name("results") / "bakeoff.jsonl"
REPORT = Path(__file__).with_name("results") / "bakeoff.md"

TUNING_PROMPTS, TEST_PROMPTS = 100, 250
TEST_SEEDS = 3
SIZE = walk.WHOLE

OWN_REWARD = ("dragon_exemplar", "dragon_set")
"""Chosen and judged by a reward of their own."""


def main() -> int:
    """Runs what is missing of a phase and writes the report; a cell is run by a process of its own."""
    arguments = parse()
    out = Path(arguments.out)
    if arguments.cell:
        print(json.dumps(run_cell(out, json.loads(arguments.cell))))
        return 0
    if not arguments.report_only:
        cells = [cell for cell in wanted(arguments) if cell not in done()]
        run_cells(out, cells, arguments.jobs)
    files.write_text(REPORT, as_markdown(files.read_jsonl(ROWS), list(SETTINGS), OWN_REWARD))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder of pictures and runs")
    parser.add_argument("--phase", default="tune", choices=("tune", "test", "asked", "confirm"))
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), help="methods")
    parser.add_argument("--jobs", type=int, default=2, help="cells at once, one thread each")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--cell", default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def wanted(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells of the phase, in the order of the methods."""
    cells = []
    for method in arguments.only:
        if arguments.phase in ("tune", "asked"):
            cells += cells_of(arguments.phase, method)
        elif arguments.phase == "confirm":
            for setting in CONFIRMED.get(method, ()):
                cells += over_seeds("confirm", method, setting)
        else:
            untuned = [c for c in cells_of("tune", method) if c not in done()]
            if untuned:
                raise SystemExit(f"{method}: {len(untuned)} settings are not tuned: run --phase tune first")
            setting = chosen_setting(files.read_jsonl(ROWS), method, own=method in OWN_REWARD)
            cells += over_seeds("test", method, setting)
    return cells


def cells_of(phase: str, method: str) -> list[dict[str, Any]]:
    """A cell for each setting of a method in a phase."""
    return [cell(phase, method, setting, 0) for setting in range(len(candidates(phase).get(method, [])))]


def over_seeds(phase: str, method: str, setting: int) -> list[dict[str, Any]]:
    """A cell for each seed of training."""
    return [cell(phase, method, setting, seed) for seed in range(TEST_SEEDS)]


def candidates(phase: str) -> dict[str, list[Method]]:
    """Method -> its settings in a phase, by number."""
    return ASKED if phase in ("asked", "confirm") else SETTINGS


def base_of(out: Path, phase: str) -> Path:
    """The base's pictures on the prompts of a phase."""
    return out / ("base-test" if on_test_prompts(phase) else "base-tune")


def on_test_prompts(phase: str) -> bool:
    """Whether a phase compares on the test prompts, else on the tuning prompts."""
    return phase in ("test", "confirm")


def cell(phase: str, method: str, setting: int, seed: int) -> dict[str, Any]:
    """What names a cell."""
    return {"phase": phase, "method": method, "setting": setting, "seed": seed}


def done() -> list[dict[str, Any]]:
    """The cells that have a row; a row of other settings than today's under that number is refused."""
    found = []
    for row in files.read_jsonl(ROWS) if ROWS.exists() else []:
        if row["phase"] == "prepare":
            continue
        method = candidates(row["phase"])[row["method"]][row["setting"]]
        if row["settings"] != settings_of(method, method.make(Path("exemplars"))):
            raise SystemExit(f"{ROWS}: {name_of(row)} has other settings than bakeoff.py: remove the row")
        found.append(cell(row["phase"], row["method"], row["setting"], row["seed"]))
    return found


def run_cells(out: Path, cells: list[dict[str, Any]], jobs: int) -> None:
    """Runs the cells, `jobs` at a time, and appends a row for each that ends well."""
    for phase in sorted({c["phase"] for c in cells}):
        prepare(out, phase)
    for seed in sorted({c["seed"] for c in cells if learns_from_drafts(c)}):
        prepare_drafts(out, seed)
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(spawn, out, c): c for c in cells}
        for future in as_completed(waiting):
            finished = future.result()
            if finished is None:
                failed += 1
                continue
            files.append_jsonl(ROWS, [finished])
            print({name: finished[name] for name in ("phase", "method", "setting", "seed")}, flush=True)
    if failed:
        print(f"{failed} cells failed: see the logs in {out}", file=sys.stderr)


def spawn(out: Path, which: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a cell that a process of its own ran on one thread; None when it failed."""
    log = out / f"{name_of(which)}.log"
    command = [sys.executable, __file__, "--out", str(out), "--cell", json.dumps(which)]
    with open(log, "w", encoding="utf-8") as stream:
        ended = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            check=False,
        )
    if ended.returncode != 0:
        print(f"{name_of(which)} failed, see {log}", file=sys.stderr)
        return None
    row: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return row


def name_of(which: dict[str, Any]) -> str:
    """The folder of a cell."""
    return f"{which['phase']}-{which['method']}-{which['setting']}-seed{which['seed']}"


def prompts_of(phase: str) -> list[str]:
    """What models are compared on."""
    if on_test_prompts(phase):
        return walk.held_out_prompts(TEST_PROMPTS)
    return walk.held_out_prompts(TUNING_PROMPTS, tuning=True)


def prepare(out: Path, phase: str) -> None:
    """What all cells of a phase share: exemplars, and the base's pictures with their pairs."""
    out.mkdir(parents=True, exist_ok=True)
    walk.draw_exemplars(out / "exemplars", walk.train_prompts(SIZE.exemplars))
    drawn = base_of(out, phase)
    base = graded(drawn, prompts_of(phase), picture_seeds(), SIZE)
    pair(images=str(base), out=f"{drawn}-pairs", by="scene", how="all_pairs")


def learns_from_drafts(which: dict[str, Any]) -> bool:
    """Whether a cell learns from pictures drawn beforehand: all but on-policy ones."""
    method = candidates(which["phase"])[which["method"]][which["setting"]]
    return not isinstance(method.make(Path("exemplars")), OnPolicyObjective)


def prepare_drafts(out: Path, seed: int) -> None:
    """The training pictures of a seed; adds a row of what they took, where none has said it yet."""
    drafts = out / f"drafts-{seed}"
    fresh, started = not drafts.exists(), time.process_time()
    walk.draw_drafts(drafts / "pictures", walk.train_prompts(SIZE.train_prompts), SIZE, seed=seed)
    walk.grade(drafts / "graded", drafts / "pictures")
    for unit in ("pair", "list"):
        walk.prefer(drafts / unit, drafts / "graded", unit=unit)
    known = files.read_jsonl(ROWS) if ROWS.exists() else []
    if fresh and not any(row["phase"] == "prepare" and row["seed"] == seed for row in known):
        took = time.process_time() - started
        row = {"phase": "prepare", "seed": seed, "drafts_core_seconds": took, "cell_core_seconds": took}
        files.append_jsonl(ROWS, [row])


def picture_seeds() -> list[int]:
    """Seeds of the pictures that models are compared on."""
    return [900_000 + k for k in range(PICTURES)]


def run_cell(out: Path, which: dict[str, Any]) -> dict[str, Any]:
    """Trains, draws, and compares with the base."""
    method = candidates(which["phase"])[which["method"]][which["setting"]]
    objective = method.make(out / "exemplars")
    folder = out / name_of(which)
    shutil.rmtree(folder, ignore_errors=True)  # what a stopped cell had cost is not known any more
    unit = "list" if objective.unit == "list" else "pair"
    started, started_core = time.perf_counter(), time.process_time()
    with counted() as evaluations:
        pairs = out / f"drafts-{which['seed']}" / unit
        walk.align(folder / "run", objective, method, SIZE, seed=which["seed"], pairs=pairs)
    seconds, core_seconds = time.perf_counter() - started, time.process_time() - started_core
    peak = getrusage(RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    drawn = base_of(out, which["phase"])
    base = Path(f"{drawn}-graded")
    adapter = folder / "run" / "adapter"
    aligned = graded(folder / "pictures", prompts_of(which["phase"]), picture_seeds(), SIZE, adapter=adapter)
    report = walk.compare(folder / "report", base, aligned)
    implicit = evaluate(
        mode="implicit",
        model=BASES[SIZE.base].load(),
        adapter=str(adapter),
        data=Preferences(path=f"{drawn}-pairs/preferences.jsonl"),
        out=str(folder / "implicit"),
    )
    drawing_seconds = evaluations.pop("drawing_seconds")
    drafts = 0 if isinstance(objective, OnPolicyObjective) else SIZE.train_prompts * SIZE.pictures
    return {
        **which,
        "commit": commit(),
        "settings": settings_of(method, objective),
        "win_rate": report["win_rate"],
        "interval": report["interval"],
        "parts": {name: report["rewards"]["scene"]["parts"][name] for name in KINDS},
        "implicit": files.read_json(implicit)["accuracy"],
        "drift": report["drift"],
        "own_reward": own_reward(objective, out / "exemplars", drawn, folder / "pictures"),
        "evaluations": {
            **evaluations,
            "drawing": int(evaluations["drawing"]) + drafts * SIZE.draft_steps * 2,  # 2: with guidance
        },
        "seconds": seconds,
        "core_seconds": core_seconds,
        "drawing_core_seconds": drawing_seconds,
        "cell_core_seconds": time.process_time(),
        "peak_gb": peak,
        "wins": wins(rows_of(base), rows_of(aligned), prompts_of(which["phase"])),
    }


def commit() -> str:
    """The code that made a row; empty outside a git checkout."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def wins(base: Rows, aligned: Rows, prompts: list[str]) -> str:
    """2, 1 or 0 for a win, tie or loss of each picture: prompt after prompt, PICTURES each."""
    keys = [(prompt, seed) for prompt in prompts for seed in picture_seeds()]
    signs = [np.sign(aligned[key]["share"] - base[key]["share"]) for key in keys]
    return "".join(str(int(sign) + 1) for sign in signs)


def settings_of(method: Method, objective: Objective) -> dict[str, Any]:
    """What the setting sets, for people."""
    known = resolved_recipe(train, {"objective": objective})["objective"]
    shown = {name: value for name, value in known.items() if name not in ("name", "exemplars", "error_space")}
    return {"lr": method.lr, "groups": method.groups, **shown}


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Evaluations of the network, one an image: learning (a backward pass counts as two) and drawing; and the
    core seconds that drawing took.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from diffalign.models._pipeline import PipelineModel

    counts: dict[str, float] = {"learning": 0, "drawing": 0, "drawing_seconds": 0.0}
    forward, sample = UNet2DConditionModel.forward, PipelineModel.sample
    drawing = False

    def counting_forward(self: Any, x_t: Any, *rest: Any, **options: Any) -> Any:
        counts["drawing" if drawing else "learning"] += len(x_t) * (3 if torch.is_grad_enabled() else 1)
        return forward(self, x_t, *rest, **options)

    def counting_sample(self: Any, *rest: Any, **options: Any) -> Any:
        nonlocal drawing
        drawing, started = True, time.process_time()
        try:
            return sample(self, *rest, **options)
        finally:
            drawing = False
            counts["drawing_seconds"] += time.process_time() - started

    UNet2DConditionModel.forward, PipelineModel.sample = counting_forward, counting_sample
    try:
        yield counts
    finally:
        UNet2DConditionModel.forward, PipelineModel.sample = forward, sample


def own_reward(objective: Objective, drawings: Path, base: Path, aligned: Path) -> dict[str, Any] | None:
    """What an exemplar or set reward says of base and aligned pictures, at equal n."""
    if not isinstance(objective, DRAGON) or objective.reward == "instance":
        return None
    clip: Any = load_scorer("clip", path=str(embedded("tiny-clip")))
    exemplars = clip.embed_images([Image.open(path) for path in sorted(drawings.glob("*.png"))])
    (ours, prompts), (theirs, same) = (features_of(folder, clip) for folder in (base, aligned))
    assert prompts == same
    if objective.reward == "exemplar":
        reward = exemplar_reward(str(objective.measure), exemplars)
        gain = reward(theirs) - reward(ours)
        value = bootstrap_interval(gain, clusters=prompts).as_dict()
        return {"base": float(reward(ours).mean()), "aligned": float(reward(theirs).mean()), "gain": value}
    of = set_reward(str(objective.measure), exemplars)
    return {
        "base": float(of(ours)),
        "aligned": float(of(theirs)),
        "gain": set_gain(of, ours, theirs, prompts),
    }


def features_of(folder: Path, clip: Any) -> tuple[np.ndarray, list[str]]:
    """Features `[n, d]` of the pictures of a folder, and their prompts."""
    rows = files.read_jsonl(folder / "images.jsonl")
    rows.sort(key=lambda row: (row["prompt"], row["seed"]))
    features = clip.embed_images([Image.open(folder / row["image"]) for row in rows])
    return features.double().numpy(), [row["prompt"] for row in rows]


def set_gain(of: Any, base: np.ndarray, theirs: np.ndarray, prompts: list[str]) -> dict[str, Any]:
    """Difference of a set's reward, both sides of equal size, with its 95 % interval over prompts.

    By leaving out one prompt at a time: resampling would put copies into the sets, which narrows them.
    """
    names = np.array(prompts)

    def gain(keep: np.ndarray) -> float:
        return float(of(theirs[keep]) - of(base[keep]))

    return jackknife_interval(gain, clusters=names).as_dict()


if __name__ == "__main__":
    sys.exit(main())
