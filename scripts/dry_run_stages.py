"""`cache` and one step of `train` on a base, as the command line runs them; time and memory are watched."""

from __future__ import annotations

import gc
import math
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
from diffusers import ModelMixin
from memory import watched
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from diffalign import cli
from diffalign.common import files
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record, write_records
from diffalign.models._parts import Parts
from diffalign.models._trainable import TrainableModel
from diffalign.training import loop

PAIRS = 2
Memory = dict[str, float]


@dataclass
class Seen:
    """What a command did, watched from inside its process.

    Attributes:
        seconds: of the whole command ("whole") and of what is timed inside, by name.
        cpu_seconds: likewise, of all threads; others at work on the machine do not lengthen them.
        peak_gb: likewise, each with the process's own memory and all that is resident, mapped files too.
        loaded: parts of the pipeline that were loaded, in order.
        held: classes of the models in memory when the step began.
        network_gb: bytes of the network.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak_gb: dict[str, Memory] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    network_gb: float = math.nan


def write_pairs(folder: Path, resolution: int) -> Path:
    """Writes pairs of random pictures; returns their folder."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(PAIRS):
        candidates = []
        for side in (0, 1):
            path = folder / f"{number}-{side}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((resolution, resolution), Image.Resampling.BICUBIC).save(path)
            candidates.append(Candidate(ImageRef(path), label=float(side)))
        records.append(Record(f"pair-{number}", f"picture {number}", candidates))
    write_records(folder / "preferences.jsonl", records)
    return folder


def cached(words: list[str]) -> Seen:
    """Runs `cache`."""
    with watched() as samples, _patched(Seen(), samples) as seen:
        _run(["cache", *words], seen, samples)
    return seen


def trained(words: list[str]) -> Seen:
    """Runs `train`, and looks at what is in memory when its step begins."""
    before = weakref.WeakSet(_models())
    with watched() as samples, _patched(Seen(), samples) as seen, ExitStack() as stack:
        step, save = loop._timed_step, TrainableModel.save_adapter

        def timed_step(run: loop.Run, *rest: Any) -> Any:
            network = run.model.denoiser.network
            seen.network_gb = sum(p.numel() * p.element_size() for p in network.parameters()) / 1e9
            seen.held = sorted(type(model).__name__ for model in _models() if model not in before)
            return _timed("step", seen, samples, lambda: step(run, *rest))

        def timed_save(*given: Any) -> None:
            _timed("save", seen, samples, lambda: save(*given))

        stack.enter_context(_replaced(loop, "_timed_step", timed_step))
        stack.enter_context(_replaced(TrainableModel, "save_adapter", timed_save))
        _run(["train", *words], seen, samples)
    return seen


def _run(words: list[str], seen: Seen, samples: list[Memory]) -> None:
    """`diffalign WORDS`; raises when it fails."""
    code = _timed("whole", seen, samples, lambda: cli.main(words))
    most = getrusage(RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # the kernel's own count misses nothing
    seen.peak_gb["whole"]["resident"] = max(most, seen.peak_gb["whole"]["resident"])
    if code != 0:
        raise SystemExit(f"diffalign {' '.join(words)} left with code {code}")


@contextmanager
def _patched(seen: Seen, samples: list[Memory]) -> Iterator[Seen]:
    """Inside, parts that load are written down in `seen`."""
    load = Parts._load

    def timed_load(parts: Parts, name: str, *rest: Any) -> Any:
        seen.loaded.append(name)
        return _timed(f"load {name}", seen, samples, lambda: load(parts, name, *rest))

    with _replaced(Parts, "_load", timed_load):
        yield seen


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _timed(name: str, seen: Seen, samples: list[Memory], function: Callable[[], Any]) -> Any:
    """Calls a function; notes its seconds and the peaks of memory."""
    first, started, cpu_started = len(samples), time.perf_counter(), time.process_time()
    result = function()
    seen.seconds[name] = seen.seconds.get(name, 0.0) + time.perf_counter() - started
    seen.cpu_seconds[name] = seen.cpu_seconds.get(name, 0.0) + time.process_time() - cpu_started
    during = samples[max(first - 1, 0) :]
    peak = {kind: max((sample[kind] for sample in during), default=0.0) for kind in ("own", "resident")}
    earlier = seen.peak_gb.get(name, peak)
    seen.peak_gb[name] = {kind: max(peak[kind], earlier[kind]) for kind in peak}
    return result


def _models() -> list[nn.Module]:
    """Every network, VAE and text encoder of this process that has memory for weights."""
    kinds = (ModelMixin, PreTrainedModel)
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]
    inner = {id(child) for model in found for child in model.modules() if child is not model}
    return [
        model
        for model in found
        if id(model) not in inner and any(not weight.is_meta for weight in model.parameters())
    ]


def loss_of(run: Path) -> float:
    """The loss of a run's only step."""
    rows = [row for row in files.read_jsonl(run / "metrics.jsonl") if "loss" in row]
    return float(rows[-1]["loss"])
