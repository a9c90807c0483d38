"""What a training step costs beyond the network itself.

    python scripts/bench_step.py                                        # embedded tiny-sdxl, LoRA
    python scripts/bench_step.py --full-size /tmp/sdxl --resolution 256 --rank 8 --batch 1 --steps 3

On the same tensors, in turn and in one process: our optimizer step (data, draws, policy and reference,
backward, clipping, AdamW, health) and the bare network (policy forward + backward, reference forward). Also
reported: what the step would cost if VAE and text encoders ran in it, peak memory, and for --full-size the
peak of loading.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reporting
import torch
from memory import in_child, memory_gb, watched
from torch import Tensor

from diffalign.common import files
from diffalign.common.conditioning import Conditioning
from diffalign.common.manifest import versions
from diffalign.data.batches import Batch
from diffalign.data.encoded import EncodedSet, Example
from diffalign.data.specs import LoaderSpec
from diffalign.demo import embedded
from diffalign.diffusion.likelihood import Draws
from diffalign.models._base import Model
from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.objectives.diffusion_dpo import Plugin as DiffusionDPO
from diffalign.training import loop
from diffalign.training.feed import Offline
from diffalign.training.metrics import MetricsLog
from diffalign.training.setup import accelerator_for
from diffalign.training.specs import OptimizerSpec, Settings
from diffalign.training.watch import Watch

MAX_STEP_OVER_BARE = 1.10
MAX_LOADING = 1.2
"""Peak of loading over the bytes of the network, at full size (a small network drowns in the rest)."""


def main() -> int:
    """Prints the figures as JSON; exit code 1 when a bar is missed."""
    arguments = parse()
    if arguments.full_size:
        in_child(write_full_size, arguments.full_size)
    path = arguments.full_size or str(embedded("tiny-sdxl"))
    loaded = in_child(loading, path, arguments.dtype)
    accelerator = accelerator_for(arguments.dtype)
    model = SDXL(path=path, dtype=arguments.dtype, gradient_checkpointing=arguments.checkpointing).load(
        str(accelerator.device)
    )
    size = arguments.resolution or model.default_resolution
    encoded = random_set(model, size, count=4 * arguments.batch)
    on_the_fly = encoding_seconds(model, size, 2 * arguments.batch)
    model.drop_encoders()
    model.start_training(AdapterSpec(rank=arguments.rank), seed=0, with_reference=True)
    figures = compare(make_run(model, encoded, arguments, accelerator), arguments.steps)
    bars = {f"step <= {MAX_STEP_OVER_BARE} x bare network": figures["step_over_bare"] <= MAX_STEP_OVER_BARE}
    if arguments.full_size:
        bars[f"own memory while loading <= {MAX_LOADING} x network"] = (
            loaded["own_over_network"] <= MAX_LOADING
        )
    figures |= {
        "encoding_on_the_fly_s": on_the_fly,
        "on_the_fly_over_step": (figures["step_s"] + on_the_fly) / figures["step_s"],
        "peak_gb": peak_gb(),
        "loading": loaded,
        "device": str(accelerator.device),
        "threads": torch.get_num_threads(),
        "settings": vars(arguments),
        "versions": versions(),
        "bars": bars,
    }
    print(json.dumps(figures, indent=2))
    if arguments.report:
        files.write_text(arguments.report, as_markdown(figures))
    return 0 if all(bars.values()) else 1


def as_markdown(figures: dict[str, Any]) -> str:
    """The figures for people."""
    settings, loading = figures["settings"], figures["loading"]
    given = {
        name: value for name, value in settings.items() if name != "report" and value not in (None, False)
    }
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
    rows = {
        "our step, s": f"{figures['step_s']:.3f}",
        "bare network (policy forward + backward, reference forward), s": f"{figures['bare_network_s']:.3f}",
        "our step over bare network, median of neighbours": f"{figures['step_over_bare']:.3f}",
        "pairs a second": f"{figures['pairs_per_s']:.3f}",
        "encoding in the step instead, s more": f"{figures['encoding_on_the_fly_s']:.3f}",
        "step with encoding over our step": f"{figures['on_the_fly_over_step']:.2f}",
        "peak memory, GB": f"{figures['peak_gb']:.2f}",
        "network, GB": f"{loading['network_gb']:.2f}",
        "own memory, peak of loading, over the network": f"{loading['own_over_network']:.2f}",
        "the same with the pages of the mapped file": f"{loading['resident_over_network']:.2f}",
        "threads": str(figures["threads"]),
    }
    lines = reporting.head("The training step", f"python scripts/bench_step.py {options}")
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    return "\n".join([*lines, *reporting.bars(figures["bars"])])


def write_full_size(folder: str) -> None:
    """SDXL at true size with random weights, but for shortened text encoders."""
    import full_size

    full_size.write("sdxl", Path(folder), whole_encoders=False)


def loading(path: str, dtype: str) -> dict[str, float]:
    """GB of the network and of the peaks while it loads, over what the process held before.

    Two peaks: of memory that is the process's own, and of all that is resident, which has the pages of the
    mapped weight file too; those the kernel drops when memory is short.
    """
    model = SDXL(path=path, dtype=dtype).load("cpu")
    model.encode_prompts(["a red ring"])  # imports all that loading needs
    model.drop_encoders()
    before = memory_gb()
    with watched() as seen:
        network = model.denoiser.network
    seen.append(memory_gb())
    network_gb = sum(p.numel() * p.element_size() for p in network.parameters()) / 1e9
    figures = {"network_gb": network_gb}
    for name in before:
        figures[f"{name}_over_network"] = (max(s[name] for s in seen) - before[name]) / network_gb
    return figures


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full-size", default=None, help="folder for SDXL at true size with random weights")
    parser.add_argument("--report", default=None, help="also write the figures to this file, as Markdown")
    parser.add_argument("--resolution", type=int, default=None, help="pixels (default: the base's own)")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=15, help="counted steps, after one that is not")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    return parser.parse_args()


def random_set(model: Model, size: int, count: int) -> EncodedSet:
    """Random latents under one encoded prompt, with the shapes of real ones."""
    side = size // model.latent_scale
    images = [torch.randn(4, side, side) for _ in range(2 * count)]
    sizes = model.size_conditioning((size, size), (0, 0), (size, size))
    examples = [
        Example(f"row-{k}", "a red ring", (2 * k, 2 * k + 1), (size, size), 1.0, (sizes, sizes))
        for k in range(count)
    ]
    prompts: Conditioning = model.encode_prompts(["a red ring"]).to("cpu")
    dropped = model.encode_dropped_prompt().to("cpu")
    return EncodedSet(
        examples, images, [0.1 * image.abs() for image in images], {"a red ring": 0}, prompts, dropped
    )


def encoding_seconds(model: Model, size: int, count: int) -> float:
    """Median seconds to encode a step's pictures and prompts."""
    pictures = torch.rand(count, 3, size, size)

    def encode() -> None:
        model.encode_images(pictures)
        model.encode_prompts(["a red ring"] * (count // 2))

    return statistics.median(timed(encode) for _ in range(3))


def make_run(model: Model, encoded: EncodedSet, arguments: argparse.Namespace, accelerator: Any) -> loop.Run:
    """A run of the loop as `diffalign train` makes it."""
    out = Path("unused")
    settings = Settings(
        loader=LoaderSpec(batch_size=arguments.batch, caption_dropout=0.1), optimizer=OptimizerSpec(lr=1e-6)
    )
    return loop.Run(
        model=model,
        objective=DiffusionDPO(beta=5000.0),
        feed=Offline(encoded, settings, model.process),
        out=out,
        identity="",
        accelerator=accelerator,
        settings=settings,
        watch=Watch(settings, None, None, out, accelerator),
    )


def compare(run: loop.Run, steps: int) -> dict[str, Any]:
    """Seconds of our step and of the bare network, in turn; the ratio is the median of neighbours'."""
    state = loop._start(run)
    incoming = loop._micro_batches(run, 0)
    log = MetricsLog(run.out, resume_step=0, writes=False)
    ours, bare = [], []
    for index in range(steps + 1):
        started = time.perf_counter()
        micro = next(incoming)
        loop._timed_step(run, state, iter([micro]), log)
        synchronize(run)
        middle = time.perf_counter()
        bare_seconds = bare_network(run, *micro[0])
        if index:
            ours.append(middle - started)
            bare.append(bare_seconds)
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    return {
        "step_s": statistics.median(ours),
        "bare_network_s": statistics.median(bare),
        "step_over_bare": statistics.median(ratios),
        "ratios": ratios,
        "pairs_per_s": run.settings.loader.batch_size / statistics.median(ours),
    }


def bare_network(run: loop.Run, batch: Batch, draws: Draws) -> float:
    """Seconds of policy forward + backward and reference forward; tensors and policies are made outside."""
    denoiser = run.model.denoiser
    x_t = denoiser.process.add_noise(batch.latents, draws.noise, draws.t)

    def forward() -> Tensor:
        with run.accelerator.autocast():
            return denoiser.predict(x_t, draws.t, batch.cond)

    with denoiser.policy("reference"), torch.no_grad():
        synchronize(run)
        seconds = timed(forward)
        synchronize(run)
    started = time.perf_counter()
    forward().float().square().mean().backward()
    synchronize(run)
    seconds += time.perf_counter() - started
    for parameter in denoiser.trainable_parameters():
        parameter.grad = None
    return seconds


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def synchronize(run: loop.Run) -> None:
    """Waits for the GPU, if there is one."""
    if run.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def peak_gb() -> float:
    """Peak memory of the process (GPU memory where there is one)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    sys.exit(main())
