"""Bases at their true size without their weights: a step of training for some, every name for all.

    python scripts/dry_run_full_size.py --out /tmp/dry                          # all; 16 GB of disk
    python scripts/dry_run_full_size.py --out /tmp/dry --parts meta             # names alone, 2 minutes
    python scripts/dry_run_full_size.py --out /tmp/dry --parts sd3 --short-encoders --keep

sdxl, sd3 (3.5 Medium) and pixart (Sigma) are written with random weights in bf16. Then `diffalign cache`
encodes two pairs and `diffalign train cache=...` takes one Diffusion-DPO step on a LoRA, each in a process of
its own, and plain diffusers takes the adapter. meta compares names and shapes of these and of SD3 Medium,
SD3.5 Large, FLUX.1 dev and schnell, which get no memory: parameters, the layers with a LoRA, adapter files.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import full_size
import reporting
from dry_run_names import Names, check, check_saved
from dry_run_stages import Seen, cached, loss_of, trained, write_pairs
from full_size_bases import BASES
from memory import in_child, watched

from diffalign.common import files
from diffalign.models import load_model

TRAINED = {"sdxl": "sdxl", "sd3": "sd3.5-medium", "pixart": "pixart-sigma"}
"""Part of this run -> the base."""
MEMORY_GB = 24.0
RANK = 4
TRAIN = (
    "objective=dpo",
    "precision=bf16",
    "model.gradient_checkpointing=true",
    f"adapter.rank={RANK}",
    "loader.batch_size=1",
    "loader.num_workers=0",
    "num_steps=1",
)
"""Words of `train` that are the same for every base."""


@dataclass(frozen=True)
class Walk:
    """One base through `cache` and `train`.

    Attributes:
        network: part of the pipeline that is trained.
        encoders: parts that training from a cache has no use for: text encoders, tokenizers, VAE.
        cache: what was seen of `cache`.
        train: what was seen of `train`.
        loss: of the step.
        same_keys: the adapter has the names and shapes that plain diffusers writes.
        loads: plain diffusers takes it.
    """

    network: str
    encoders: tuple[str, ...]
    cache: Seen
    train: Seen
    loss: float
    same_keys: bool
    loads: bool

    @property
    def load(self) -> str:
        """What loading the network is timed under."""
        return f"load {self.network}"

    def bars(self, name: str) -> dict[str, bool]:
        """What is asked of it."""
        most = max(seen.peak_gb["whole"]["resident"] for seen in (self.cache, self.train))
        return {
            f"{name}: peak <= {MEMORY_GB:g} GB": most <= MEMORY_GB,
            f"{name}: training from the cache loads no text encoder and no VAE": (
                not set(self.encoders) & set(self.train.loaded) and len(self.train.held) == 1
            ),
            f"{name}: the step's loss is log 2": abs(self.loss - 0.693147) < 1e-5,
            f"{name}: the saved adapter has the names of plain diffusers, which loads it": (
                self.same_keys and self.loads
            ),
        }


def main() -> int:
    """Runs the parts, writes the report; exit code 1 when a bar is missed."""
    arguments = parse()
    out = Path(arguments.out)
    walks, names = {}, {}
    for part in (part for part in TRAINED if part in arguments.parts):
        folder = out / f"dry-run-{part}"  # whose name says whose it is: it is removed
        base = folder / ("base-short" if arguments.short_encoders else "base")
        in_child(full_size.write, TRAINED[part], base, whole_encoders=not arguments.short_encoders)
        walks[TRAINED[part]] = walk(part, base, folder, arguments.resolution)
        print("\n".join(walked_table({TRAINED[part]: walks[TRAINED[part]]})), flush=True)
        if not arguments.keep:
            shutil.rmtree(folder)
    if "meta" in arguments.parts:
        names = {name: in_child(names_of, name) for name in BASES}
    bars: dict[str, bool] = {}
    for name, found in walks.items():
        bars |= found.bars(name)
    for name, (compared, _) in names.items():
        bars[f"{name}: every name equal"] = (
            compared.all_equal and compared.parameters == BASES[name].parameters
        )
    text = report(walks, names, bars, sys.argv[1:])
    print(text)
    if arguments.report:
        files.write_text(arguments.report, text)
    return 0 if all(bars.values()) else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder of the bases and runs")
    parser.add_argument(
        "--parts", nargs="+", default=[*TRAINED, "meta"], choices=[*TRAINED, "meta"], help="what to run"
    )
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side")
    parser.add_argument("--report", default=None, help="also write the report to this file, as Markdown")
    parser.add_argument(
        "--short-encoders", action="store_true", help="text encoders of two layers: less disk and time"
    )
    parser.add_argument("--keep", action="store_true", help="keep bases and runs; a base is used again")
    return parser.parse_args()


def walk(model: str, base: Path, out: Path, resolution: int) -> Walk:
    """Takes a base through `cache` and `train`, each in a process of its own, and checks the adapter.

    Args:
        model: the backbone.
        base: folder of the pipeline.
        out: of pairs, cache and run; those of an earlier walk go.
        resolution: pixels a side.
    """
    for name in ("pairs", "cache", "run"):
        shutil.rmtree(out / name, ignore_errors=True)
    pairs = write_pairs(out / "pairs", resolution)
    base_words = [f"model={model}", f"model.path={base}", "model.dtype=bf16"]
    data_words = ["data=jsonl", f"data.path={pairs}", f"preprocess.resolution={resolution}"]
    first = in_child(cached, [*base_words, *data_words, "device=cpu", f"out={out}/cache"])
    second = in_child(trained, [*base_words, *TRAIN, f"cache={out}/cache", f"out={out}/run"])
    loaded: Any = load_model(model, str(base))
    same, loads = check_saved(base, model, out / "run" / "adapter", RANK)
    return Walk(
        network=loaded.network_part,
        encoders=(*loaded.encoder_parts, "vae"),
        cache=first,
        train=second,
        loss=loss_of(out / "run"),
        same_keys=same,
        loads=loads,
    )


def names_of(name: str) -> tuple[Names, float]:
    """What was found of a base without memory for weights, and the peak of memory that it took."""
    with tempfile.TemporaryDirectory() as folder, watched() as samples:
        full_size.write_configs(name, Path(folder))
        found = check(BASES[name].model, Path(folder))
    return found, max(sample["own"] for sample in samples)


def report(
    walks: dict[str, Walk], names: dict[str, tuple[Names, float]], bars: dict[str, bool], words: list[str]
) -> str:
    """The figures for people."""
    command = " ".join(["python scripts/dry_run_full_size.py", *words])
    lines = reporting.head("Full-size bases with random weights", command)
    if walks:
        lines += walked_table(walks)
    if names:
        lines += names_table(names)
    return "\n".join([*lines, *reporting.bars(bars)])


def walked_table(walks: dict[str, Walk]) -> list[str]:
    """Seconds and memory of each base."""
    lines = [
        f"`cache` of two pairs and one step of `train` on a LoRA of rank {RANK}: bf16, gradient",
        "checkpointing, batch 1. Seconds are of the clock and, in brackets, of the CPU. GB are memory of",
        "the process's own and, in brackets, all that is resident, with the pages of mapped weight files.",
        "",
        "| | " + " | ".join(walks) + " |",
        "|---|" + "---|" * len(walks),
    ]
    rows: dict[str, Callable[[Walk], str]] = {
        "network, GB": lambda found: f"{found.train.network_gb:.2f}",
        "`cache`, s": lambda found: seconds(found.cache, "whole"),
        "`cache`, peak, GB": lambda found: gigabytes(found.cache, "whole"),
        "`train`, s": lambda found: seconds(found.train, "whole"),
        "`train`, peak, GB": lambda found: gigabytes(found.train, "whole"),
        "loading the network, s": lambda found: seconds(found.train, found.load),
        "loading the network, peak, GB": lambda found: gigabytes(found.train, found.load),
        "the step, s": lambda found: seconds(found.train, "step"),
        "the step, peak, GB": lambda found: gigabytes(found.train, "step"),
        "saving the adapter, s": lambda found: seconds(found.train, "save"),
        "saving the adapter, peak, GB": lambda found: gigabytes(found.train, "save"),
        "parts that `train` loaded": lambda found: ", ".join(found.train.loaded),
        "models in memory when the step began": lambda found: ", ".join(found.train.held),
        "loss of the step": lambda found: f"{found.loss:.6f}",
    }
    for name, cell in rows.items():
        lines.append(f"| {name} | " + " | ".join(cell(found) for found in walks.values()) + " |")
    return [*lines, ""]


def seconds(seen: Seen, name: str) -> str:
    """Seconds of the clock and of the CPU of what was timed under a name."""
    return f"{seen.seconds[name]:.1f} ({seen.cpu_seconds[name]:.1f})"


def gigabytes(seen: Seen, name: str) -> str:
    """Own and resident peak of what was timed under a name."""
    return "{own:.1f} ({resident:.1f})".format(**seen.peak_gb[name])


def names_table(names: dict[str, tuple[Names, float]]) -> list[str]:
    """What was compared without memory for weights."""
    lines = [
        "Without memory for weights, rank 4 on the family's default layers:",
        "",
        "| base | parameters | as published | parameter names | layers with a LoRA | blocks with a LoRA "
        "| adapter file | plain diffusers loads it | peak, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (found, peak) in names.items():
        cells = [
            name,
            f"{found.parameters:,}",
            said(found.parameters == BASES[name].parameters),
            said(found.same_parameters),
            str(found.layers),
            f"{found.blocks_with_lora} of {found.blocks}",
            said(found.same_keys),
            said(found.loads),
            f"{peak:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def said(equal: bool) -> str:
    """A bool in a table."""
    return "equal" if equal else "DIFFERENT"


if __name__ == "__main__":
    sys.exit(main())
