"""The demo at the size that settles it: several training seeds on held-out prompts.

    python scripts/accept_demo.py --out runs/accept-demo                  # 250 prompts x 2, 5 training seeds
    python scripts/accept_demo.py --out runs/tune --tune --seeds 1        # settings, on the tuning prompts

Every step is a stage that goes on where it stopped, so the same command may be repeated. `report.json` and
`report.md` give the pooled win rate by the exact grader (ties half, bootstrap over prompts with the seeds of
a prompt kept together), accuracy, each kind of clause, diversity, and the same for SFT on the winners, for
best-of-2 of the base, and for the base at the guidance scale that suits it best: a part of what alignment
brings can be had from guidance too.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import reporting
from comparison import KINDS, best_of, compared, graded, interval, judged, mean, pooled, rows_of, signed

from diffalign.common import files
from diffalign.common.manifest import versions
from diffalign.demo import walk
from diffalign.demo.methods import METHODS

MIN_GAIN = 0.08
"""Of accuracy, pooled over the training seeds."""

MAX_LOSS = 0.02
"""Of any kind of clause."""

MIN_VENDI = 0.9
"""Diversity of the aligned pictures over that of the base."""

BEST_GUIDANCE = {"tiny-sdxl": 3.0, "tiny-sd3": 3.0}
"""Of the base, by accuracy on 200 tuning prompts. tiny-sdxl: 0.08 at 1, 0.25 at 1.5, 0.32 at 2, 0.43 at 3,
0.37 at 5. tiny-sd3, on 150: 0.36 at 1.5, 0.41 at 2, 0.47 at 3.
"""


def main() -> int:
    """Tunes or accepts, and writes the report; exit code 1 when a bar is missed."""
    arguments = parse()
    out = Path(arguments.out)
    size = replace(
        walk.SIZES[arguments.model],
        **{
            name: value
            for name in ("num_steps", "rank", "train_prompts", "guidance")
            if (value := getattr(arguments, name)) is not None
        },
    )
    prompts = walk.held_out_prompts(arguments.prompts, tuning=arguments.tune)
    seeds = [900_000 + k for k in range(arguments.picture_seeds)]
    base = graded(out / "base", prompts, seeds, size)
    second = graded(out / "base-again", prompts, [seed + 500 for seed in seeds], size)
    best = BEST_GUIDANCE[size.base]
    guided = graded(out / "base-guided", prompts, seeds, replace(size, guidance=best))
    methods: dict[str, list[dict[str, Any]]] = {"dpo": [], **({} if arguments.no_sft else {"sft": []})}
    for seed in range(arguments.seeds):
        pairs = preferences(out / f"seed-{seed}", size, seed)
        for name in methods:
            folder = out / f"seed-{seed}" / f"{name}-{tag(size)}"
            method = METHODS[size.base][name]
            walk.align(folder / "run", method.make(folder), method, size, seed=seed, pairs=pairs)
            aligned = graded(folder / "test", prompts, seeds, size, adapter=folder / "run" / "adapter")
            methods[name].append(judged(folder / "report", base, aligned))
    report = {
        "settings": {**vars(arguments), **vars(size)},
        "base_accuracy": mean(rows_of(base), "accurate"),
        "methods": {name: pooled(results, base) for name, results in methods.items() if results},
        "without_training": {
            "best of 2": compared(best_of(rows_of(base), rows_of(second)), rows_of(base)),
            f"base, guidance {best:g}": compared(rows_of(guided), rows_of(base)),
        },
        "versions": versions(),
    }
    report["checks"] = checks(report)
    files.write_json(out / f"report-{tag(size)}.json", report)
    text = as_markdown(report)
    files.write_text(out / f"report-{tag(size)}.md", text)
    if arguments.report:
        files.write_text(arguments.report, text)
    print(text)
    return 0 if all(report["checks"].values()) else 1


def checks(report: dict[str, Any]) -> dict[str, bool]:
    """What the aligned model must reach, each with yes or no."""
    dpo = report["methods"]["dpo"]
    parts = {name: dpo["parts"][name]["difference"] for name in KINDS}
    kinds = [parts[name] for name in KINDS if name != "accurate"]
    worst = min(seed["accuracy"] for seed in dpo["per_seed"])
    return {
        "win rate: interval above one half": dpo["win_rate"]["low"] > 0.5,
        f"accuracy: +{100 * MIN_GAIN:g} points or more": parts["accurate"]["estimate"] >= MIN_GAIN,
        "accuracy: no training seed below the base": worst >= report["base_accuracy"],
        "two kinds of clauses or more better, intervals clear of 0": sum(k["low"] > 0 for k in kinds) >= 2,
        f"no kind worse by more than {100 * MAX_LOSS:g} points": min(k["estimate"] for k in kinds)
        >= -MAX_LOSS,
        f"Vendi diversity at least {MIN_VENDI:g} of the base": min(
            seed["vendi"]["ratio"] for seed in dpo["per_seed"]
        )
        >= MIN_VENDI,
    }


def parse() -> argparse.Namespace:
    """The command line; the defaults are those of the acceptance run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", default="tiny-sdxl", choices=list(walk.SIZES), help="embedded model")
    parser.add_argument("--report", default=None, help="also write the report to this file")
    parser.add_argument("--tune", action="store_true", help="use the tuning prompts")
    parser.add_argument("--prompts", type=int, default=250)
    parser.add_argument("--picture-seeds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5, help="training seeds")
    parser.add_argument("--num-steps", type=int, default=None)
    parser.add_argument("--rank", type=int, default=None)
    parser.add_argument("--train-prompts", type=int, default=None)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--no-sft", action="store_true")
    return parser.parse_args()


def tag(size: walk.Size) -> str:
    """Names a setting, so that several share the folder and its pictures."""
    return f"s{size.num_steps}-r{size.rank}-p{size.train_prompts}"


def preferences(out: Path, size: walk.Size, seed: int) -> Path:
    """Pictures of the training prompts, graded and paired; the folder of the pairs."""
    walk.draw_drafts(out / "train", walk.train_prompts(size.train_prompts), size, seed=seed)
    walk.grade(out / "train-graded", out / "train")
    walk.prefer(out / "pairs", out / "train-graded")
    return out / "pairs"


def as_markdown(report: dict[str, Any]) -> str:
    """The tables for people."""
    title = "The demo, on tuning prompts" if report["settings"]["tune"] else "The demo, on held-out prompts"
    model, options = report["settings"]["model"], " --no-sft" if report["settings"]["no_sft"] else ""
    lines = reporting.head(
        title, f"python scripts/accept_demo.py --model {model}{options} --out runs/{model}"
    )
    lines += ["Settings: " + ", ".join(f"{name} {value}" for name, value in shown(report).items()) + ".", ""]
    lines += ["Each cell: the base's share, and the difference with its 95 % interval over prompts.", ""]
    lines += ["| pictures | win rate | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 2) + "|"]
    for name, row in {**report["methods"], **report["without_training"]}.items():
        cells = [name, interval(row["win_rate"])]
        cells += [f"{part['base']:.3f} {signed(part['difference'])}" for part in row["parts"].values()]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Accuracy (win rate, Vendi diversity over that of the base) of each training seed:", ""]
    for name, row in report["methods"].items():
        seeds = ", ".join(
            f"{s['accuracy']:.3f} ({s['win_rate']:.3f}, {s['vendi']['ratio']:.3f})" for s in row["per_seed"]
        )
        lines.append(f"- {name}: {seeds}; base {report['base_accuracy']:.3f}")
    return "\n".join([*lines, "", *reporting.bars(report["checks"])])


def shown(report: dict[str, Any]) -> dict[str, Any]:
    """The settings for people: those of the script that are set, then those of the walk."""
    hidden = ("out", "report")
    return {
        name: value for name, value in report["settings"].items() if value is not None and name not in hidden
    }


if __name__ == "__main__":
    sys.exit(main())
