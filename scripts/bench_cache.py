"""What a cache of a million pairs costs to open and to read, how fast one is written, what kills do to it.

    python scripts/bench_cache.py --out /tmp/cache         # 17 GB of disk, and of memory for the page cache
    python scripts/bench_cache.py --out /tmp/cache --only encode kills

size: a made-up cache of 1,000,000 pairs (true row counts, pictures of 4 x 32 x 32 in fp16: 16 KB a pair)
beside one of 1,000; opened in a process of its own, read at random in its keyed order, in turn with the small
one. encode: JPEGs of 1024 x 1024 from a parquet file through the stage, with a VAE and text encoders that
return a constant. kills: the stage on the embedded tiny SDXL, killed 20 times while it writes, against an
undisturbed run. Writes scripts/results/cache.md.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow
import pyarrow.parquet
import reporting
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffalign.common import files, manifest
from diffalign.common.conditioning import Conditioning
from diffalign.data.cache import open_cache
from diffalign.data.cache_index import join
from diffalign.data.loader import batches
from diffalign.data.specs import LoaderSpec
from diffalign.demo import embedded

REPORT = Path(__file__).with_name("results") / "cache.md"
MAX_OPEN_S, MAX_RESIDENT_GB, MAX_RATIO, MIN_RATE, KILLS = 5.0, 1.5, 1.25, 20.0, 20
PACK_ROWS, PROMPT_SHARE = 10_000, 16
LATENT = (4, 32, 32)
SPEC = LoaderSpec(batch_size=4, posterior="mean")


def main() -> int:
    """Prints and writes the figures; exit code 1 when a bar is missed."""
    arguments = parse()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.reader is not None:
        return read(out, *arguments.reader)
    figures: dict[str, float] = {}
    checks: dict[str, bool] = {}
    for name, part in (("size", size), ("encode", encode), ("kills", kills)):
        if name in arguments.only:
            found, met = part(out, arguments)
            figures |= found
            checks |= met
    lines = reporting.head("Cache", " ".join(["python scripts/bench_cache.py", *sys.argv[1:]]))
    lines += [
        f"{arguments.pairs:,} pairs in the large cache, {torch.get_num_threads()} threads of torch.",
        "",
        *("| figure | value |", "|---|---|"),
        *(f"| {name} | {value:.4g} |" for name, value in figures.items()),
        "",
        *reporting.bars(checks),
    ]
    files.write_text(arguments.report, "\n".join(lines))
    print("\n".join(lines))
    return 0 if all(checks.values()) else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for what is made")
    parser.add_argument("--only", nargs="+", default=["size", "encode", "kills"])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=2000, help="read from each cache")
    parser.add_argument("--jpegs", type=int, default=200)
    parser.add_argument("--reader", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--report", default=str(REPORT))
    return parser.parse_args()


# Size


def size(out: Path, arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, bool]]:
    """Opens and reads the large cache, in turn with the small one, in a process of its own."""
    started = time.perf_counter()
    for pairs in (1000, arguments.pairs):
        make(out / f"pairs-{pairs}", pairs)
    made = time.perf_counter() - started
    command = [sys.executable, __file__, "--out", str(out)]
    command += ["--reader", str(arguments.pairs), str(arguments.batches)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures: dict[str, float] = json.loads(said)
    ratio = figures["next batch of the large cache, ms"] / figures["next batch of the small cache, ms"]
    figures |= {"large over small": ratio, "making both, s": made}
    return figures, {
        f"opening < {MAX_OPEN_S:g} s": figures["opening, s"] < MAX_OPEN_S,
        f"resident memory < {MAX_RESIDENT_GB} GB": figures["resident at most, GB"] < MAX_RESIDENT_GB,
        f"next batch <= {MAX_RATIO} x that of 1,000 pairs": ratio <= MAX_RATIO,
    }


def make(folder: Path, pairs: int) -> None:
    """A complete cache: packs as the writer leaves them, joined by the stage's own join."""
    if (folder / manifest.FILE_NAME).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, pairs, PACK_ROWS)):
        count = min(PACK_ROWS, pairs - first)
        name = f"00000-of-00001-{number:06d}"
        prompts = -(-count // PROMPT_SHARE)
        tensors = {
            "mean.1024x1024": torch.full((2 * count, *LATENT), float(number), dtype=torch.float16),
            "text.prompt_embeds": torch.zeros(prompts, 8, 64, dtype=torch.float16),
            "text.pooled": torch.zeros(prompts, 64, dtype=torch.float16),
            "size.time_ids": torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]),
        }
        save_file(tensors, folder / f"{name}.safetensors")
        files.write_jsonl(folder / f"{name}.jsonl", (row(first, place) for place in range(count)))
    no_prompt = Conditioning({"prompt_embeds": torch.zeros(1, 8, 64), "pooled": torch.zeros(1, 64)})
    tally, facts = join(folder, no_prompt, max_bad_share=0.05, what="made up")
    facts |= {"posterior": "mean", "variants": 1, "scores": {}, "encoders": "none", "identity": "made up"}
    manifest.write_manifest(folder, stage="cache", recipe={}, counts=tally.counts(), extra={"cache": facts})


def row(first: int, place: int) -> dict[str, Any]:
    """A pair as Pick-a-Pic has them."""
    number = first + place
    keys = [hashlib.blake2b(f"{number}:{side}".encode(), digest_size=16).hexdigest() for side in (0, 1)]
    candidates = [
        {"label": float(number % 2 == side), "model": f"model-{side}", "uid": f"{keys[side]}-{side}"}
        for side in (0, 1)
    ]
    prompt = (
        f"number {number // PROMPT_SHARE}: a castle on a hill above the sea, oil on canvas, evening light"
    )
    record = {
        "id": f"train-00042-of-00645.parquet:{number}",
        "prompt": prompt,
        "user": str(number % 5000),
        "candidates": candidates,
        "source": "pickapic",
        "meta": {"ranking_id": number, "num_example_per_prompt": 16},
    }
    return {
        "position": number,
        "size": [1024, 1024],
        "keys": keys,
        "key_rows": [2 * place, 2 * place + 1],
        "told": [0, 0],
        "prompt_row": place // PROMPT_SHARE if number % PROMPT_SHARE == 0 else -1,
        "record": record,
    }


def read(out: Path, pairs: int, count: int) -> int:
    """In a process of its own: opens, reads at the start, middle and end of an epoch; prints JSON."""
    started = time.perf_counter()
    large = open_cache(out / f"pairs-{pairs}").choose()[0]
    next(batches(large, SPEC, seed=0, start=0))
    opening = time.perf_counter() - started
    after_opening = resident_gb()
    small = open_cache(out / "pairs-1000").choose()[0]
    per_epoch = pairs // SPEC.batch_size
    times: dict[str, list[float]] = {"small": [], "large": []}
    most = after_opening
    for start in (0, per_epoch // 2, per_epoch - count, 0):  # the last round is timed: its pages are cached
        times = {"small": [], "large": []}
        streams = {
            "small": batches(small, SPEC, seed=0, start=0),
            "large": batches(large, SPEC, seed=0, start=start),
        }
        for _ in range(-(-count // 100)):
            for name, stream in streams.items():
                for _ in range(100):
                    began = time.perf_counter()
                    next(stream)
                    times[name].append(time.perf_counter() - began)
            most = max(most, resident_gb())
    print(
        json.dumps(
            {
                "opening, s": opening,
                "resident after opening, GB": after_opening,
                "resident at most, GB": most,
                "peak, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
                "next batch of the small cache, ms": 1e3 * statistics.median(times["small"]),
                "next batch of the large cache, ms": 1e3 * statistics.median(times["large"]),
            }
        )
    )
    return 0


def resident_gb() -> float:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


# Encoding


class Constant:
    """A base whose networks return a constant at once."""

    size_multiple = 64
    default_resolution = 1024
    text_masks: ClassVar[dict[str, str]] = {}

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros of the shape of SDXL's latents."""
        latents = torch.zeros(len(images), 4, images.shape[2] // 8, images.shape[3] // 8)
        return latents, latents

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Zeros of the shapes of SDXL's embeddings."""
        return Conditioning(
            {"prompt_embeds": torch.zeros(len(prompts), 77, 2048), "pooled": torch.zeros(len(prompts), 1280)}
        )

    def encode_dropped_prompt(self) -> Conditioning:
        """The same, one row."""
        return self.encode_prompts([""])

    def say_too_long(self, prompts: list[str]) -> None:
        """Nothing is."""

    def size_conditioning(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> dict[str, Tensor]:
        """As SDXL."""
        return {"time_ids": torch.tensor([[*original, *crop, *target]], dtype=torch.float32)}

    def encoder_fingerprint(self) -> str:
        """A name."""
        return "constant"

    def encoder_recipe(self) -> dict[str, Any]:
        """The family whose sizes it has."""
        return {"model": "sdxl"}


def encode(out: Path, arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, bool]]:
    """Runs the stage with constant networks over different JPEGs."""
    from diffalign.models import sdxl
    from diffalign.stages.cache import cache

    data = jpegs(out / "jpegs.parquet", arguments.jpegs)
    rates = []
    for attempt in range(3):
        folder = out / f"encoded-{attempt}"
        if folder.exists():
            raise SystemExit(f"{folder} is there from an earlier run: remove it")
        load = sdxl.Plugin.load
        sdxl.Plugin.load = lambda self, device="cpu": Constant()  # type: ignore[method-assign, return-value]
        started = time.perf_counter()
        try:
            cache(
                model={"name": "sdxl", "path": "constant"},
                data={"name": "pickapic", "path": str(data)},
                out=str(folder),
            )
        finally:
            sdxl.Plugin.load = load  # type: ignore[method-assign]
        rates.append(arguments.jpegs / (time.perf_counter() - started))
    rate = statistics.median(rates)
    return {"encoding without networks, images/s": rate}, {
        f"encoding without networks >= {MIN_RATE:g} images/s": rate >= MIN_RATE
    }


def jpegs(path: Path, count: int) -> Path:
    """A parquet file in the layout of Pick-a-Pic, of different pictures with structure and grain."""
    if not path.exists():
        rows = []
        for number in range(0, count, 2):
            sides = {f"jpg_{side}": jpeg(number + side) for side in (0, 1)}
            rows.append({"caption": f"picture {number}", **sides, "label_0": 1.0, "label_1": 0.0})
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=16)
    return path


def jpeg(seed: int) -> bytes:
    """A JPEG of 1024 x 1024, about 400 kB."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (33, 33, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((1024, 1024), Image.Resampling.BICUBIC), dtype=float)
    noisy = smooth + rng.normal(0.0, 6.0, smooth.shape)
    stream = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


# Kills


def kills(out: Path, arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, bool]]:
    """Kills the stage while it writes, repeats it, and compares with an undisturbed run."""
    data = out / "small.parquet"
    rows = []
    for number in range(600):
        pictures = {f"jpg_{side}": small_jpeg(2 * number + side) for side in (0, 1)}
        rows.append({"caption": f"picture {number // 3}", **pictures, "label_0": 1.0, "label_1": 0.0})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    whole = out / "whole"
    subprocess.run(stage(data, whole), check=True, capture_output=True)
    expected, killed, rng = digests(whole), 0, random.Random(0)
    folder = out / "killed"
    while True:
        process = subprocess.Popen(stage(data, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(list(folder.glob("*-??????.jsonl"))) if folder.exists() else 0
        while process.poll() is None and len(list(folder.glob("*-??????.jsonl"))) <= before:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.1)  # anywhere in the packs after the first of this run
        if killed == KILLS or process.poll() is not None:
            process.wait()
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    if process.returncode:
        subprocess.run(stage(data, folder), check=True, capture_output=True)
    equal = digests(folder) == expected
    packs = len(list(folder.glob("*-??????.jsonl")))
    return {"kills while writing": killed, "packs": packs}, {
        f"after {KILLS} SIGKILLs equal to an undisturbed cache": equal and killed == KILLS
    }


def stage(data: Path, folder: Path) -> list[str]:
    """The command: packs of eight rows."""
    code = "from diffalign import cli; from diffalign.data import cache_packs; cache_packs.MAX_ROWS = 8; "
    return [
        *(sys.executable, "-c", code + "import sys; sys.exit(cli.main(sys.argv[1:]))"),
        *("cache", "model=sdxl", f"model.path={embedded('tiny-sdxl')}", "data=pickapic"),
        *(f"data.path={data}", f"out={folder}"),
    ]


def small_jpeg(seed: int) -> bytes:
    """A JPEG of 64 x 64."""
    noise = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def digests(folder: Path) -> dict[str, str]:
    """Content of all files of a cache but its manifest, which names the time."""
    kept = [path for path in folder.iterdir() if path.suffix in (".jsonl", ".safetensors", ".json")]
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(kept)
        if path.name not in (manifest.FILE_NAME, "recipe.json")
    }


if __name__ == "__main__":
    sys.exit(main())
