"""What scoring costs beyond the networks, and what it saves against a loop that scores picture by picture.

    python scripts/bench_score.py --out /tmp/bench                 # ViT-H/14 with random weights
    python scripts/bench_score.py --out /tmp/bench --device cuda --dtype bf16 --pictures 1024

All in one process, weights loaded before any clock starts: 64 pictures of 512 x 512 (PNG) of 16 prompts, by a
ViT-H/14. In turn: our pass (decode, prepare, score, write), and the loop of the public scripts, which opens,
prepares and encodes every picture and its prompt alone. Then our pass with networks that return a constant,
and four scorers in one pass. Writes scripts/results/score.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import reporting
import torch
from full_size_clip import write_state_dict, write_transformers
from PIL import Image

from diffalign.common import files
from diffalign.scorers import Scorer, load_scorer
from diffalign.stages._image_rows import Row
from diffalign.stages._score_report import summary_of
from diffalign.stages._scoring import score_batches

REPORT = Path(__file__).with_name("results") / "score.md"
SIDE, PROMPTS = 512, 16
MAX_OVERHEAD, MIN_OVER_LOOP, MIN_RATE, MAX_FOUR = 0.10, 1.05, 40.0, 1.15
ON_GPU_OVER_LOOP = 3.0


def main() -> int:
    """Prints and writes the figures; exit code 1 when a bar is missed."""
    arguments = parse()
    out = Path(arguments.out)
    rows = pictures(out / "pictures", arguments.pictures)
    options = {"device": arguments.device, "dtype": arguments.dtype}
    hps = load_scorer(
        "hpsv2",
        path=str(write_state_dict(out / "HPS_v2.1_compressed.pt", arguments.arch)),
        arch=arguments.arch,
        **options,
    )
    figures = against_the_loop(hps, rows, out, arguments.rounds, arguments.batch)
    figures["without networks, images/s"] = without_networks({"hpsv2": hps}, rows, out, arguments.batch)
    figures |= four_scorers(hps, rows, out, arguments, options)
    on_gpu = arguments.device != "cpu"
    least = ON_GPU_OVER_LOOP if on_gpu else MIN_OVER_LOOP
    bars = {
        f"overhead beyond the forwards <= {MAX_OVERHEAD:.0%}": figures["overhead"] <= MAX_OVERHEAD,
        f">= {least} x the loop": figures["over the loop"] >= least,
        f"without networks >= {MIN_RATE:.0f} images/s": figures["without networks, images/s"] >= MIN_RATE,
        f"four scorers <= {MAX_FOUR} x their distinct forwards": figures["four over forwards"] <= MAX_FOUR,
    }
    lines = reporting.head("Scoring", " ".join(["python scripts/bench_score.py", *sys.argv[1:]]))
    lines += [
        f"{arguments.arch} with random weights, {len(rows)} pictures of {SIDE} x {SIDE} (PNG), "
        f"{PROMPTS} prompts, {arguments.dtype}, {torch.get_num_threads()} threads, batches of "
        f"{arguments.batch}, {arguments.rounds} rounds in turn.",
        "",
        *("| figure | value |", "|---|---|"),
        *(f"| {name} | {value:.4g} |" for name, value in figures.items()),
        "",
        *reporting.bars(bars),
    ]
    files.write_text(arguments.report, "\n".join(lines))
    print("\n".join(lines))
    return 0 if all(bars.values()) else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder of pictures and random weights (8 GB)")
    parser.add_argument("--arch", default="ViT-H-14")
    parser.add_argument("--second-arch", default="ViT-L-14-quickgelu", help="of clip and aesthetic")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--report", default=str(REPORT))
    return parser.parse_args()


def pictures(folder: Path, count: int) -> list[Row]:
    """Rows of pictures with structure and noise, as PNG files; prompts in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        path = folder / f"{index:05d}.png"
        if not path.exists():
            rng = np.random.default_rng(index)
            coarse = rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)
            smooth = np.asarray(
                Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=float
            )
            noisy = smooth + rng.normal(0.0, 4.0, smooth.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)
        prompt = f"a photo of scene number {index % PROMPTS}, with a red car in front of a tall building"
        rows.append({"id": path.stem, "image": path.name, "prompt": prompt})
    return rows


def our_pass(scorers: Mapping[str, Scorer], rows: list[Row], out: Path, batch: int) -> list[Row]:
    """What the stage does between loading and printing."""
    target = out / "scores.jsonl"
    target.unlink(missing_ok=True)
    found = []
    for scored in score_batches(rows, out / "pictures", scorers, batch_size=batch):
        files.append_jsonl(target, scored)
        found += scored
    summary_of(found, list(scorers))
    return found


def forget_texts(scorers: Mapping[str, Scorer]) -> None:
    """Makes the towers encode every prompt anew: each round starts as a fresh process would."""
    for scorer in scorers.values():
        scorer.towers._texts._known.clear()  # type: ignore[attr-defined]


def forward_seconds(scorers: Mapping[str, Any], rows: list[Row], out: Path, batch: int) -> float:
    """Seconds of the distinct networks alone: every picture once through each, every prompt once.

    Pixels are ready and nothing else runs, so that what a pass takes beyond this is its overhead.
    """
    spent = 0.0
    pictures = [Image.open(out / "pictures" / row["image"]).convert("RGB") for row in rows]
    done: set[Any] = set()
    for scorer in scorers.values():
        tower, prepare = scorer.towers, scorer.preprocess or scorer.towers.preprocess
        if (id(tower), prepare) in done:
            continue
        done.add((id(tower), prepare))
        pixels = prepare(pictures).to(tower.device, tower.dtype)
        texts = list(dict.fromkeys(row["prompt"] for row in rows)) if scorer.takes("prompts") else []
        with torch.no_grad():
            synchronize()
            started = time.perf_counter()
            for start in range(0, len(pixels), batch):
                tower.encode_images(pixels[start : start + batch])
            for start in range(0, len(texts), batch):
                tower.encode_texts(texts[start : start + batch])
            synchronize()
            spent += time.perf_counter() - started
    return spent


@contextmanager
def counted(scorers: Mapping[str, Any]) -> Iterator[dict[int, int]]:
    """Pictures that each network (by `id`) sees while the block runs."""
    towers = {id(scorer.towers): scorer.towers for scorer in scorers.values()}
    before = {key: tower.encode_images for key, tower in towers.items()}
    seen = dict.fromkeys(towers, 0)

    def counting(key: int) -> Callable[[torch.Tensor], Any]:
        def call(pixels: torch.Tensor) -> Any:
            seen[key] += len(pixels)
            return before[key](pixels)

        return call

    for key, tower in towers.items():
        tower.encode_images = counting(key)
    try:
        yield seen
    finally:
        for key, tower in towers.items():
            tower.encode_images = before[key]


def synchronize() -> None:
    """Waits for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def against_the_loop(scorer: Any, rows: list[Row], out: Path, rounds: int, batch: int) -> dict[str, float]:
    """Our pass, the networks alone and the loop in turn."""
    import open_clip

    scorers = {"hpsv2": scorer}
    model, device = scorer.towers.module, scorer.towers.device
    tokenizer, length = open_clip.get_tokenizer("ViT-H-14"), model.context_length
    ours, loops, overheads = [], [], []
    found: list[Row] = []
    singles: list[float] = []
    for _ in range(rounds):
        forget_texts(scorers)
        started = time.perf_counter()
        found = our_pass(scorers, rows, out, batch)
        ours.append(time.perf_counter() - started)
        overheads.append(ours[-1] / forward_seconds(scorers, rows, out, batch) - 1.0)
        started = time.perf_counter()
        singles = []
        for row in rows:
            with torch.no_grad():
                image = Image.open(out / "pictures" / row["image"])
                pixels = scorer.preprocess([image.convert("RGB")]).to(device, scorer.towers.dtype)
                features = model.encode_image(pixels, normalize=True)
                texts = model.encode_text(tokenizer([row["prompt"]], length).to(device), normalize=True)
                singles.append((features @ texts.T).diagonal()[0].item())
        loops.append(time.perf_counter() - started)
    apart = max(abs(row["scores"]["hpsv2"]["value"] - one) for row, one in zip(found, singles, strict=True))
    return {
        "ours, images/s": len(rows) / statistics.median(ours),
        "the loop, images/s": len(rows) / statistics.median(loops),
        "over the loop": statistics.median(b / a for a, b in zip(ours, loops, strict=True)),
        "overhead": statistics.median(overheads),
        "largest difference of a score": apart,
    }


def without_networks(scorers: Mapping[str, Any], rows: list[Row], out: Path, batch: int) -> float:
    """Images/s of our pass when the networks return a constant; enough pictures for a steady clock."""
    many = [{**row, "id": f"{row['id']}-{k}"} for k in range(max(1, 256 // len(rows))) for row in rows]
    tower = scorers["hpsv2"].towers
    encode, width = tower.encode_images, tower.module.visual.output_dim
    tower.encode_images = lambda pixels: torch.ones(len(pixels), width)
    try:
        our_pass(scorers, many[: 2 * batch], out, batch)
        started = time.perf_counter()
        our_pass(scorers, many, out, batch)
        return len(many) / (time.perf_counter() - started)
    finally:
        tower.encode_images = encode


def four_scorers(
    hps: Any, rows: list[Row], out: Path, arguments: argparse.Namespace, options: dict[str, str]
) -> dict[str, float]:
    """pickscore, hpsv2, clip and aesthetic in one pass over a part of the pictures."""
    second, width = arguments.second_arch, 768 if arguments.second_arch.startswith("ViT-L") else None
    path = str(write_state_dict(out / "second.pt", second, seed=1))
    scorers: dict[str, Any] = {
        "pickscore": load_scorer(
            "pickscore", path=str(write_transformers(out / "pickscore", arguments.arch, seed=2)), **options
        ),
        "hpsv2": hps,
        "clip": load_scorer("clip", path=path, arch=second, **options),
    }
    width = width or scorers["clip"].towers.module.visual.output_dim
    torch.save({"weight": torch.randn(1, width), "bias": torch.zeros(1)}, out / "head.pth")
    scorers["aesthetic"] = load_scorer(
        "aesthetic", path=path, arch=second, head=str(out / "head.pth"), **options
    )
    part = rows[: max(PROMPTS, len(rows) // 2)]
    forget_texts(scorers)
    with counted(scorers) as seen:
        started = time.perf_counter()
        our_pass(scorers, part, out, arguments.batch)
        took = time.perf_counter() - started
    assert set(seen.values()) == {len(part)}, f"clip and aesthetic share a network, which saw {seen}"
    forwards = forward_seconds(scorers, part, out, arguments.batch)
    return {"four scorers, images/s": len(part) / took, "four over forwards": took / forwards}


if __name__ == "__main__":
    sys.exit(main())
