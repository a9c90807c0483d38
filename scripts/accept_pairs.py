"""Diffusion-DPO on real picture pairs from the embedded model, judged on held-out pairs by implicit accuracy.

    python scripts/accept_pairs.py --train TRAIN.parquet --judge VALIDATION.parquet --out runs/pairs

Both files have the Pick-a-Pic layout; a side whose `model_0`/`model_1` says "degraded" tells the kind of
pair: "wrong-concept", or a degradation of the same picture. Every seed is a run of `diffalign train`,
resumable; the report (`report.json`, `report.md`) gives accuracy with 95 % intervals (bootstrap over pairs,
the seeds of a pair kept together) for each kind, beside the same networks judged under shuffled captions, by
the base's error alone, and by which picture is sharper.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import reporting
from PIL import Image

from diffalign.common import draws, files
from diffalign.common.manifest import versions
from diffalign.common.statistics import bootstrap_interval
from diffalign.data.encoded import EncodedSet
from diffalign.data.encoding import encode
from diffalign.data.select import Group
from diffalign.data.sources.pickapic import Plugin as PickAPic
from diffalign.data.specs import LoaderSpec, PreprocessSpec
from diffalign.demo import embedded
from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.objectives.diffusion_dpo import Plugin as DiffusionDPO
from diffalign.stages.train import train
from diffalign.training.implicit import judge
from diffalign.training.specs import CheckpointSpec, OptimizerSpec

DRAWS = 8

MIN_DEGRADED = 0.78
"""Lower end of the 95 % interval of the accuracy on degraded pairs."""

MAX_SECONDS = 900
"""Of one training seed on 2 CPU cores."""


def main() -> int:
    """Trains and judges every seed, then writes the report; exit code 1 when a bar is missed."""
    arguments = parse()
    out, rows, seconds = Path(arguments.out), [], {}
    source = PickAPic(path=arguments.judge)
    pairs = list(source.usable())
    for seed in range(arguments.seeds):
        seconds[seed] = train_seed(arguments, seed)
        rows += judge_seed(arguments, pairs, seed)
    captions_in_train = {record.prompt for record in PickAPic(path=arguments.train).records()}
    concepts_in_train = {concept(caption) for caption in captions_in_train}
    for row in rows:
        row["seen"] = concept(row["prompt"]) in concepts_in_train
    report: dict[str, Any] = {
        "settings": vars(arguments),
        "seconds_per_seed": seconds,
        "tables": tables(rows),
        "versions": versions(),
        "dropped_in_train": files.read_json(out / "seed-0" / "manifest.json")["dropped"],
    }
    report["checks"] = {
        f"degraded pairs: interval above {MIN_DEGRADED}": report["tables"]["degraded"]["right"]["low"]
        >= MIN_DEGRADED,
        f"every seed within {MAX_SECONDS} s": max(seconds.values()) <= MAX_SECONDS,
    }
    files.write_json(out / "report.json", report)
    files.write_jsonl(out / "rows.jsonl", rows)
    text = as_markdown(report)
    files.write_text(out / "report.md", text)
    if arguments.report:
        files.write_text(arguments.report, text)
    print(text)
    return 0 if all(report["checks"].values()) else 1


def parse() -> argparse.Namespace:
    """The command line; the defaults are the settings of the acceptance run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", required=True, help="parquet file to learn from")
    parser.add_argument("--judge", required=True, help="parquet file to judge on")
    parser.add_argument("--out", required=True, help="folder of the runs")
    parser.add_argument("--report", default=None, help="also write the report to this file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--model", default=None, help="SDXL pipeline folder (default: the embedded tiny-sdxl)"
    )
    parser.add_argument("--kind", default="full", choices=("lora", "full"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=16, help="pairs in one optimizer step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=150.0)
    parser.add_argument("--resolution", type=int, default=64)
    return parser.parse_args()


def base_spec(arguments: argparse.Namespace) -> SDXL:
    """The base that every seed starts from."""
    return SDXL(path=arguments.model or str(embedded("tiny-sdxl")))


def preprocess(arguments: argparse.Namespace) -> PreprocessSpec:
    """The same for training and judging."""
    return PreprocessSpec(resolution=arguments.resolution, batch_size=16)


def train_seed(arguments: argparse.Namespace, seed: int) -> float:
    """One run of `diffalign train`; returns its seconds, those of earlier, stopped starts included."""
    clock = Path(arguments.out) / f"seconds-{seed}.json"
    before = files.read_json(clock)["seconds"] if clock.exists() else 0.0
    started = time.perf_counter()
    train(
        model=base_spec(arguments),
        data=PickAPic(path=arguments.train, max_bad_share=0.1),
        out=f"{arguments.out}/seed-{seed}",
        objective=DiffusionDPO(beta=arguments.beta),
        adapter=AdapterSpec(kind=arguments.kind, rank=32),
        preprocess=preprocess(arguments),
        loader=LoaderSpec(batch_size=arguments.pairs, caption_dropout=0.1),
        optimizer=OptimizerSpec(lr=arguments.lr, warmup_steps=20, schedule="linear"),
        checkpoint=CheckpointSpec(every=100, keep=1),
        num_steps=arguments.steps,
        seed=seed,
    )
    seconds = before + time.perf_counter() - started
    files.write_json(clock, {"seconds": seconds})
    return seconds


def judge_seed(arguments: argparse.Namespace, pairs: list[Group], seed: int) -> list[dict[str, Any]]:
    """One row a decided pair: right under its own caption, under a shuffled one, by base error, by
    sharpness.
    """
    backbone = base_spec(arguments).load()
    encoded = encode(pairs, backbone, preprocess(arguments), seed=0)
    backbone.drop_encoders()
    backbone.load_policy(f"{arguments.out}/seed-{seed}/adapter")
    judged = {
        name: list(judge(backbone.denoiser, chosen, num_draws=DRAWS, batch_size=16, device="cpu"))
        for name, chosen in (("own", encoded), ("shuffled", shuffled_captions(encoded)))
    }
    shuffled = {judgement.id: judgement.right() for judgement in judged["shuffled"]}
    by_id = {pair.record.id: pair for pair in pairs}
    return [
        {
            "seed": seed,
            "id": judgement.id,
            "prompt": by_id[judgement.id].record.prompt,
            "kind": kind(by_id[judgement.id]),
            "right": judgement.right(),
            "shuffled_captions": shuffled[judgement.id],
            "lower_error_under_base": judgement.reference_right(),
            "sharper_picture": sharper(by_id[judgement.id]),
        }
        for judgement in judged["own"]
    ]


def shuffled_captions(encoded: EncodedSet) -> EncodedSet:
    """The same pairs, each under the caption of another (a cyclic shift of a fixed random order)."""
    order = draws.permutation(len(encoded), "shuffled-captions").tolist()
    swapped = list(encoded.examples)
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        swapped[here] = replace(encoded.examples[here], prompt=encoded.examples[there].prompt)
    return replace(encoded, examples=swapped)


def kind(pair: Group) -> str:
    """ "wrong-concept", or "degraded" for every degradation of the same picture."""
    worse = next(c.model or "" for c in pair.record.candidates if "degraded" in (c.model or ""))
    return "wrong-concept" if worse.endswith("wrong-concept") else "degraded"


def concept(caption: str) -> str:
    """The caption without the words that the data set wraps around a concept's name."""
    text = caption.lower()
    for wrapping in ("a ", "sticker of a ", "sticker of "):
        text = text.removeprefix(wrapping)
    for wrapping in (" emoji", " digital art, high quality", ", flat icon, centered"):
        text = text.removesuffix(wrapping)
    return text.strip()


def sharper(pair: Group) -> float:
    """1 when the preferred picture has the larger mean gradient at 64 px, 0 when the smaller."""
    first, second = (gradient(image) for image in pair.images)
    if first == second:
        return 0.5
    return float((first > second) == ((pair.target or 0.0) > 0.5))


def gradient(image: Image.Image) -> float:
    """Mean absolute difference of neighbouring grey values at 64 px."""
    grey = np.asarray(image.convert("L").resize((64, 64), Image.Resampling.BICUBIC), dtype=np.float64)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


def tables(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Accuracy of each judge on each slice of the pairs."""
    slices = {
        "degraded": lambda row: row["kind"] == "degraded",
        "wrong-concept": lambda row: row["kind"] == "wrong-concept",
        "wrong-concept, concept in train": lambda row: row["kind"] == "wrong-concept" and row["seen"],
        "wrong-concept, concept not in train": lambda row: row["kind"] == "wrong-concept" and not row["seen"],
        "all": lambda row: True,
    }
    judges = ("right", "shuffled_captions", "lower_error_under_base", "sharper_picture")
    result: dict[str, dict[str, Any]] = {}
    for name, chosen in slices.items():
        inside = [row for row in rows if chosen(row)]
        result[name] = {"pairs": len({row["id"] for row in inside})}
        for who in judges:
            values, clusters = [row[who] for row in inside], [row["id"] for row in inside]
            result[name][who] = bootstrap_interval(values, clusters=clusters).as_dict() if inside else None
    return result


def as_markdown(report: dict[str, Any]) -> str:
    """The tables for people."""
    lines = reporting.head(
        "Diffusion-DPO on real pairs, judged by implicit accuracy on held-out ones",
        "python scripts/accept_pairs.py --train TRAIN.parquet --judge VALIDATION.parquet --out runs/pairs",
    )
    settings = {k: v for k, v in report["settings"].items() if k not in ("train", "judge", "out", "report")}
    lines += ["Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".", ""]
    lines += [
        "| pairs | n | aligned | aligned, shuffled captions | lower error under base | sharper picture |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["tables"].items():
        cells = [name, str(row["pairs"])]
        for who in ("right", "shuffled_captions", "lower_error_under_base", "sharper_picture"):
            cell = row[who]
            cells.append(
                "-" if cell is None else f"{cell['estimate']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
            )
        lines.append(f"| {' | '.join(cells)} |")
    dropped = {reason: len(ids) for reason, ids in report["dropped_in_train"].items()}
    seconds = ", ".join(f"{value:.0f}" for value in report["seconds_per_seed"].values())
    lines += ["", f"Seconds a seed: {seconds}. Rows dropped from training: {dropped}.", ""]
    return "\n".join([*lines, *reporting.bars(report["checks"])])


if __name__ == "__main__":
    sys.exit(main())
