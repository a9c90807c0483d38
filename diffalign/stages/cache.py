"""Encode pictures and prompts once, onto disk, for any number of trainings.

Each different picture, as it is cropped, and each different prompt goes through its encoder once. `train
cache=OUT` then needs neither VAE nor text encoders, reads only what a batch needs, and begins at once. All
records are kept that some objective can use; ties only with data.ties=soft. The estimate of disk and time is
printed first. Killed: the same command goes on where it was. Under torchrun every process takes its share of
the prompts; a data set on the hub is streamed, never stored.

Examples:
    diffalign cache model=sdxl model.path=stabilityai/stable-diffusion-xl-base-1.0 model.dtype=bf16
        data=pickapic data.path=pickapic_v2/data data.split=train out=pickapic-sdxl
    diffalign cache model=sdxl model.path=sdxl data=jsonl data.path=pairs out=pairs-sdxl posterior=mean
    torchrun --nproc_per_node 8 -m diffalign cache --config configs/cache_sdxl.yaml out=pickapic-sdxl
    diffalign train model=sdxl model.path=sdxl cache=pickapic-sdxl objective=dpo out=runs/dpo
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from diffalign.common import files, manifest
from diffalign.common.config import One, make_one, resolved_recipe
from diffalign.common.errors import UserError, unknown
from diffalign.common.progress import say
from diffalign.data.specs import PreprocessSpec

if TYPE_CHECKING:
    from diffalign.data.records import Record
    from diffalign.models._base import Model
    from diffalign.stages._shares import Share

DONE = ".done"

DECIDES = ("posterior", "variants", "dtype", "pack_mb", "limit", "seed")
"""Keys of the stage that decide what is in a cache."""

NOT_OF_ROWS = ("path", "max_bad_share")
"""Keys of a source that do not: the data's own identity stands beside them."""


def cache(
    *,
    model: Annotated[Any, One("models")],
    data: Annotated[Any, One("data.sources")],
    out: str,
    preprocess: PreprocessSpec = PreprocessSpec(),  # noqa: B008
    posterior: Literal["sample", "mean"] = "sample",
    variants: int = 1,
    dtype: Literal["fp16", "fp32"] = "fp16",
    pack_mb: int = 256,
    ignore_disk: bool = False,
    device: str = "auto",
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the facts of the cache: packs, different pictures and prompts, examples; empty while other
    processes are at work.

    Args:
        model: the base whose VAE and text encoders are used.
        data: preferences.
        out: folder of the cache.
        preprocess: how pictures are fitted to the network.
        posterior: sample: keep mean and standard deviation of the latents, so that each epoch can draw anew;
            mean: keep the mean only, half the size; trained on with loader.posterior=mean.
        variants: crops and flips kept of each group, which take turns: with preprocess.crop=random each has a
            crop of its own, with preprocess.flip=true every second one is mirrored.
        dtype: fp16 halves the size of latents and embeddings that are fp32; fp32 keeps them as they are.
        pack_mb: megabytes of latents and embeddings in a file; a kill loses at most one.
        ignore_disk: begin although the disk looks too small: the estimate takes every picture for a new one.
        device: auto | cpu | cuda | cuda:1 ...
        limit: the first so many rows of the data only.
        seed: of crops and flips.

    Raises:
        UserError: a model, data or preprocessing other than those of the cache that is there; a disk that
            is too small; data that is mostly broken.
    """
    from diffalign.stages import _run
    from diffalign.stages._shares import my_share

    recipe = resolved_recipe(cache, locals())
    _check_recipe(recipe)
    source = make_one("data.sources", data)
    source.files()  # a mistyped path is told before a base is fetched
    base = make_one("models", model).load(_run.pick_device(device))
    share = my_share()
    same = _decides(recipe, base, source, share)
    with _run.claim_folder(out, stage="cache", recipe=recipe, same=same, share=share) as folder:
        known = manifest.read_manifest(folder)
        if known is not None:
            say(f"{folder} is complete: nothing to do")
            return dict(known["cache"])
        try:
            _fill(folder, source, share, base, recipe)
        except KeyboardInterrupt:
            say(f"the packs in {folder} are kept; the same command goes on from there")
            raise
        return _finish(folder, source, share, base, recipe, manifest.recipe_identity(same))


def _decides(recipe: dict[str, Any], base: Model, source: Any, share: Share) -> dict[str, Any]:
    """What must be equal for a cache to be continued."""
    preprocess = PreprocessSpec(**recipe["preprocess"])
    return {
        "model": base.encoder_fingerprint(),
        **_grid(preprocess, base),
        "source": manifest.identities(source.inputs()),
        "data": {key: value for key, value in recipe["data"].items() if key not in NOT_OF_ROWS},
        "preprocess": preprocess.decides(),
        **{key: recipe[key] for key in DECIDES},
        "precision": [recipe["model"].get("dtype"), recipe["model"].get("vae_dtype")],
        "processes": share.count,
    }


def _grid(preprocess: PreprocessSpec, base: Model) -> dict[str, int]:
    """What the buckets are made of beside the preprocessing; of the network, not of the encoders."""
    return {
        "resolution": preprocess.resolution or base.default_resolution,
        "size_multiple": base.size_multiple,
    }


def _fill(folder: Path, source: Any, share: Share, base: Model, recipe: dict[str, Any]) -> None:
    """Writes the packs of this process's share, from where an earlier run was."""
    from diffalign.common.progress import Progress
    from diffalign.data.cache_packs import PackSpec, PackWriter
    from diffalign.data.encoding import fitter
    from diffalign.data.select import Unusable, UsableGroups

    if (folder / f"{share.name}{DONE}").exists():
        return
    preprocess = PreprocessSpec(**recipe["preprocess"])
    spec = PackSpec(recipe["posterior"], recipe["dtype"], recipe["pack_mb"] * 1_000_000)
    writer = PackWriter(folder, share.name, base, spec, preprocess.batch_size)
    total = _size(source, recipe["limit"])
    _estimate(folder, source, base, recipe, total, share)
    positions: deque[int] = deque()

    def own_records() -> Iterator[Record]:
        for position, record in enumerate(islice(source.records(), recipe["limit"])):
            bar.update(1 if position > writer.last_position else 0)
            if position > writer.last_position and _is_own(record, share):
                positions.append(position)
                yield record

    make = fitter(base, preprocess, seed=recipe["seed"], variants=recipe["variants"])
    started = writer.last_position + 1
    with Progress("cache", total, "rows", initial=started) as bar:
        groups = UsableGroups(own_records(), unit="any", ties=source.ties)
        with closing(groups.outcomes(make)) as outcomes:
            for record, outcome in outcomes:
                writer.add(
                    positions.popleft(), record, outcome if isinstance(outcome, Unusable) else outcome[0]
                )
        writer.close_pack()
    files.write_text(folder / f"{share.name}{DONE}", "")


def _is_own(record: Record, share: Share) -> bool:
    """Whether a record is of this process's share: all of a prompt are, so that it is encoded once.

    So are its pictures, which hardly ever stand under two prompts.
    """
    from diffalign.common.draws import seed_of

    return share.alone or seed_of(record.prompt) % share.count == share.index


def _finish(
    folder: Path, source: Any, share: Share, base: Model, recipe: dict[str, Any], identity: str
) -> dict[str, Any]:
    """Joins the packs once all processes are done; returns the facts, nothing while others are at work."""
    from diffalign.data.cache_index import PROMPTS, join

    with files.waiting_lock(folder, "join"):
        done = len(list(folder.glob(f"*{DONE}")))
        if done < share.count or manifest.read_manifest(folder) is not None:
            say(f"{folder}: this process is done, {done} of {share.count} are")
            return {}
        files.remove_leftovers(folder)  # of processes that were killed: nobody writes any more
        no_prompt = base.encode_dropped_prompt().to("cpu")
        tally, joined = join(folder, no_prompt, max_bad_share=source.max_bad_share, what=str(source.path))
        base.say_too_long(files.read_json(folder / PROMPTS))
        facts = {
            **joined,
            "identity": identity,
            "examples": tally.used,
            "encoders": base.encoder_fingerprint(),
            "encoder_recipe": base.encoder_recipe(),
            "preprocess": recipe["preprocess"],
            **_grid(PreprocessSpec(**recipe["preprocess"]), base),
            "scores": source.score_facts(),
            **{key: recipe[key] for key in ("posterior", "variants", "dtype")},
        }
        manifest.write_manifest(
            folder,
            stage="cache",
            recipe=recipe,
            inputs=source.inputs(),
            seed=recipe["seed"],
            counts=tally.counts(),
            dropped=tally.dropped,
            extra={"cache": facts},
        )
    size = sum(path.stat().st_size for path in folder.iterdir())
    say(
        f"{folder}: {tally.used:,} of {tally.asked:,} rows, {joined['pictures']:,} different pictures and "
        f"{joined['prompts']:,} prompts, {size / 1e9:,.2f} GB; dropped: {tally.reasons()}"
    )
    return facts


def _size(source: Any, limit: int | None) -> int | None:
    """How many rows will come, or at most; None where nobody knows."""
    known = [number for number in (source.size(), limit, source.limit) if number is not None]
    return min(known, default=None)


@dataclass(frozen=True)
class _Costs:
    """What a picture and a prompt cost: bytes on disk, seconds in the VAE; and the most pictures of a row."""

    picture: int
    prompt: int
    seconds: float
    pictures_a_row: int


def _measure(source: Any, base: Model, recipe: dict[str, Any]) -> _Costs:
    """Sends the first rows through the encoders. UserError when none of the rows is usable."""
    import torch

    from diffalign.data.encoding import fitter
    from diffalign.data.select import UsableGroups

    preprocess = PreprocessSpec(**recipe["preprocess"])
    probe = UsableGroups(
        islice(source.records(), recipe["limit"]),
        unit="any",
        ties=source.ties,
        limit=max(1, preprocess.batch_size // 2),
        max_bad_share=1.0,
        what=str(source.path),
    )
    fitted = list(probe.made(fitter(base, preprocess, seed=recipe["seed"])))
    cuts = [cut for group in fitted for cut in group.variants[0] if group.size == fitted[0].size]
    pixels = torch.stack([cut.pixels for cut in cuts][: preprocess.batch_size]).float() / 255.0
    base.encode_images(pixels)[0].cpu()  # the first call loads the network
    started = time.perf_counter()
    mean = base.encode_images(pixels)[0].cpu()
    seconds = time.perf_counter() - started
    text = base.encode_prompts([fitted[0].group.record.prompt])
    bytes_a_number = 2 if recipe["dtype"] == "fp16" else 4
    return _Costs(
        picture=mean[0].numel() * bytes_a_number * (2 if recipe["posterior"] == "sample" else 1),
        prompt=sum(
            tensor.numel() * (bytes_a_number if tensor.dtype == torch.float32 else tensor.element_size())
            for tensor in text.values()
        ),
        seconds=seconds / len(pixels),
        pictures_a_row=recipe["variants"] * max(len(group.group.candidates) for group in fitted),
    )


def _estimate(
    folder: Path, source: Any, base: Model, recipe: dict[str, Any], total: int | None, share: Share
) -> None:
    """Says how much disk and time it will take. UserError, in every process, when the disk is too small.

    It is an upper bound: every picture is taken for a new one, every prompt too where the source cannot count
    them, and padding that is left out is counted in.
    """
    from diffalign.data.cache_packs import TENSORS, packs_of

    costs = _measure(source, base, recipe)
    written = sum(path.with_suffix(TENSORS).stat().st_size for path in packs_of(folder))
    free = shutil.disk_usage(folder).free + written
    rate = share.count / costs.seconds
    picture, prompt = (f"{num_bytes / 1e3:,.0f} kB" for num_bytes in (costs.picture, costs.prompt))
    if base.text_masks:
        prompt += " with padding, which is not kept"
    said = f"{picture} a picture, {prompt} a prompt, {rate:,.1f} pictures/s, {free / 1e9:,.1f} GB free"
    needed = 0
    if total is not None:
        pictures = total * costs.pictures_a_row
        prompts, what = _count_prompts(source, total)
        needed = pictures * costs.picture + prompts * costs.prompt
        said = (
            f"at most {pictures:,} pictures of {picture} and {prompts:,} {what} of {prompt}: "
            f"{needed / 1e9:,.1f} GB of {free / 1e9:,.1f} free, "
            f"{pictures / rate / 3600:,.1f} h at {rate:,.1f} pictures/s"
        )
    if share.index == 0:
        say(said)
    if needed > free and not recipe["ignore_disk"]:
        raise UserError(
            f"out={folder} needs up to {needed / 1e9:,.1f} GB and has {free / 1e9:,.1f}: choose another "
            "disk, use posterior=mean or limit=, or ignore_disk=true where it will be less, as where many "
            "pictures are the same"
        )


def _count_prompts(source: Any, total: int) -> tuple[int, str]:
    """At most how many prompts the first `total` rows have, and what messages call them."""
    captions = source.captions()
    if captions is None:
        return total, "prompts (one a row: they are not counted)"
    return len({hash(prompt) for prompt in islice(captions, total)}), "different prompts"


def _check_recipe(recipe: dict[str, Any]) -> None:
    """Raises UserError for settings that no cache can be made with."""
    for key, known in (("posterior", ("sample", "mean")), ("dtype", ("fp16", "fp32"))):
        if recipe[key] not in known:
            raise unknown(key, recipe[key], known)
    for key in ("variants", "pack_mb", "limit"):
        if recipe[key] is not None and recipe[key] < 1:
            raise UserError(f"{key}={recipe[key]}: give a number of at least 1")
    preprocess = recipe["preprocess"]
    if recipe["variants"] > 1 and preprocess["crop"] == "center" and not preprocess["flip"]:
        raise UserError(
            f"variants={recipe['variants']} would all be equal: set preprocess.crop=random or "
            "preprocess.flip=true"
        )
