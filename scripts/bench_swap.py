"""What one swap of DRAGON's set rewards costs, beside the reward of the whole set.

    OMP_NUM_THREADS=1 nice -n 10 python scripts/bench_swap.py --report scripts/results/swap.md

In turn and in one process, from the same float64 features: a swap tried incrementally, and `frechet_distance`
of the set with that swap. Twice: random sets, and sets half of whose rows are duplicates (singular values in
the place of roots of eigenvalues). Then one pass of `swap_demonstrations`, and other rewards (`--others`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import reporting
import torch

from diffalign.common import files
from diffalign.common.manifest import versions
from diffalign.objectives.dragon import swap_demonstrations
from diffalign.scorers import SetReward, frechet_distance, set_reward

MIN_SPEEDUP = 20.0
MAX_DIFFERENCE = 1e-8
OTHERS = ("kid", "mmd", "vendi", "precision", "recall")


def main() -> int:
    """Prints the figures as JSON; exit code 1 when a bar is missed."""
    arguments = parse()
    rng = np.random.default_rng(0)
    n, d, m = arguments.n, arguments.d, arguments.exemplars
    exemplars = rng.normal(size=(m, d))
    first, second = rng.normal(size=(n, d)), rng.normal(size=(n, d))
    duplicates = first.copy()
    duplicates[n // 2 :] = duplicates[: n - n // 2]
    building, frechet = timed(lambda: set_reward("frechet", exemplars))
    compared = {
        "random": compare(frechet, first, second, exemplars, arguments.swaps),
        "duplicates": compare(frechet, duplicates, second, exemplars, arguments.swaps),
    }
    figures: dict[str, Any] = {
        "building_s": building,
        "frechet": compared,
        "pass": whole_pass(frechet, first, second, exemplars),
        "others": {name: other(name, first, second, exemplars) for name in arguments.others},
        "threads": torch.get_num_threads(),
        "settings": vars(arguments),
        "versions": versions(),
    }
    differences = [*(found["difference"] for found in compared.values()), figures["pass"]["difference"]]
    fast_enough = compared["random"]["speedup"] >= MIN_SPEEDUP  # duplicates: reported, no bar
    figures["bars"] = {
        f"a swap >= {MIN_SPEEDUP:g} x faster than frechet_distance, random sets": fast_enough,
        f"equal to a relative {MAX_DIFFERENCE:g}, random sets and duplicates": max(differences)
        <= MAX_DIFFERENCE,
    }
    print(json.dumps(figures, indent=2))
    if arguments.report:
        files.write_text(arguments.report, as_markdown(figures))
    return 0 if all(figures["bars"].values()) else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=256, help="pictures in a set")
    parser.add_argument("--d", type=int, default=1024, help="features of a picture")
    parser.add_argument("--exemplars", type=int, default=10_000)
    parser.add_argument("--swaps", type=int, default=9, help="swaps compared, every other one kept")
    parser.add_argument("--others", nargs="*", default=[], choices=OTHERS, help="other rewards to time")
    parser.add_argument("--report", default=None, help="also write the figures to this file, as Markdown")
    return parser.parse_args()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it gave."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def compare(
    reward: SetReward, x: np.ndarray, rows: np.ndarray, exemplars: np.ndarray, swaps: int
) -> dict[str, float]:
    """Medians over swaps tried on a changing set: seconds, their ratio, and the largest difference.

    Every other swap is kept: the first one after that is dearer where a basis has to be made anew.
    """
    reward.start(x)
    reward.try_swap(0, rows[0])  # not counted
    current = x.copy()
    fast, plain, commits, differences = [], [], [], []
    for i in range(swaps):
        trial = current.copy()
        trial[i] = rows[i]
        seconds, value = timed(lambda i=i: reward.try_swap(i, rows[i]))
        fast.append(seconds)
        seconds, distance = timed(lambda trial=trial: frechet_distance(trial, exemplars))
        plain.append(seconds)
        differences.append(abs(value + distance) / distance)
        if i % 2:
            commits.append(timed(reward.commit)[0])
            current = trial
    return {
        "swap_s": statistics.median(fast),
        "commit_s": statistics.median(commits),
        "frechet_distance_s": statistics.median(plain),
        "speedup": statistics.median(b / a for a, b in zip(fast, plain, strict=True)),
        "difference": max(differences),
    }


def whole_pass(
    reward: SetReward, first: np.ndarray, second: np.ndarray, exemplars: np.ndarray
) -> dict[str, float]:
    """One pass over all places: seconds, how many places changed sides, and what the distance became."""
    generator = torch.Generator().manual_seed(0)
    seconds, swapped = timed(lambda: swap_demonstrations(first, second, reward, generator=generator))
    chosen = np.where(swapped.numpy()[:, None], second, first)
    distances = [frechet_distance(x, exemplars) for x in (first, second, chosen)]
    value = reward.start(chosen)
    return {
        "pass_s": seconds,
        "from_b": int(swapped.sum()),
        "distance_a": distances[0],
        "distance_b": distances[1],
        "distance_chosen": distances[2],
        "difference": abs(value + distances[2]) / distances[2],
    }


def other(name: str, first: np.ndarray, second: np.ndarray, exemplars: np.ndarray) -> dict[str, float]:
    """Seconds of building another reward, of starting it and (median) of a swap."""
    building, reward = timed(lambda: set_reward(name, exemplars))
    starting, _ = timed(lambda: reward.start(first))
    swaps = [timed(lambda i=i: reward.try_swap(i, second[i]))[0] for i in range(5)]
    return {"building_s": building, "start_s": starting, "swap_s": statistics.median(swaps)}


def as_markdown(figures: dict[str, Any]) -> str:
    """The figures for people."""
    settings, done = figures["settings"], figures["pass"]
    command = f"OMP_NUM_THREADS={figures['threads']} nice -n 10 python scripts/bench_swap.py"
    if settings["others"]:
        command += " --others " + " ".join(settings["others"])
    lines = reporting.head("One swap of a set reward", command)
    lines += [
        f"{settings['n']} pictures a set, {settings['d']} features, {settings['exemplars']} exemplars, "
        f"float64. Medians over {settings['swaps']} swaps, each beside `frechet_distance` of the same set; "
        "every other swap is kept.",
        "",
        "| Frechet | random sets | half duplicates |",
        "|---|---|---|",
    ]
    random, duplicates = figures["frechet"]["random"], figures["frechet"]["duplicates"]
    names = {
        "swap_s": ("one swap tried, ms", 1e3, ".1f"),
        "commit_s": ("one swap kept, ms more", 1e3, ".1f"),
        "frechet_distance_s": ("`frechet_distance`, ms", 1e3, ".0f"),
        "speedup": ("`frechet_distance` over swap, median of neighbours", 1, ".0f"),
        "difference": ("largest relative difference", 1, ".1e"),
    }
    for key, (name, factor, form) in names.items():
        lines.append(f"| {name} | {random[key] * factor:{form}} | {duplicates[key] * factor:{form}} |")
    lines += [
        "",
        f"The exemplars' factor, once a run: {figures['building_s']:.1f} s. One pass of "
        f"`swap_demonstrations` over {settings['n']} places: {done['pass_s']:.1f} s, {done['from_b']} of "
        f"D+ from b; the distance to the exemplars is {done['distance_a']:.1f} of a, "
        f"{done['distance_b']:.1f} of b, {done['distance_chosen']:.1f} of D+.",
        "",
    ]
    if figures["others"]:
        lines += ["| other rewards | once a run, s | start, ms | one swap, ms |", "|---|---|---|---|"]
        for name, found in figures["others"].items():
            start, swap = found["start_s"] * 1e3, found["swap_s"] * 1e3
            lines.append(f"| {name} | {found['building_s']:.1f} | {start:.0f} | {swap:.1f} |")
        lines.append("")
    return "\n".join([*lines, *reporting.bars(figures["bars"])])


if __name__ == "__main__":
    sys.exit(main())
