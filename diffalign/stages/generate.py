"""Draw pictures: prompts x seeds, from a base model with any number of adapters.

Writes OUT/images/*.png and one row a picture to OUT/images.jsonl. The same command again goes on where a
killed run stopped, and draws pictures that were removed. The noise a picture starts from depends on its
prompt and seed alone, so runs with different adapters are comparable picture by picture. Several processes
(torchrun, or RANK and WORLD_SIZE) and machines that see OUT share the batches.

Examples:
    diffalign generate model=sdxl model.path=stabilityai/stable-diffusion-xl-base-1.0 \\
        prompts="a red cube" out=base
    diffalign generate model=sd model.path=sd15 prompts=PartiPrompts.tsv column=Prompt seeds=[0,1] out=base
    diffalign generate model=sdxl model.path=sdxl adapter=runs/dpo/adapter prompts=prompts.txt out=aligned
    diffalign generate model=sdxl model.path=sdxl prompts="[a cat, a dog]" out=inked \\
        adapters="{dpo: {path: runs/dpo/adapter}, ink: {path: ink, weight: 0.6}}" \\
        scheduler=DPMSolverMultistepScheduler num_inference_steps=20
    torchrun --nproc_per_node 8 -m diffalign generate model=sdxl model.path=sdxl prompts=prompts.txt out=base
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from diffalign.common.config import One, make_one, resolved_recipe
from diffalign.common.errors import UserError

if TYPE_CHECKING:
    from diffalign.data.prompts import Prompt
    from diffalign.stages._painting import Painter
    from diffalign.stages._shares import Share

ROWS = "images.jsonl"
PICTURES = "images"
SETTINGS = (
    "negative_prompt",
    "guidance_scale",
    "num_inference_steps",
    "height",
    "width",
    "scheduler",
)
"""The arguments that a model's `generate` takes as they are."""


@dataclass
class AdapterUse:
    """One adapter to draw with.

    Args:
        path: folder, file or hub id of a LoRA.
        weight: how strongly it acts; 1 as it was trained, 0 not at all.
    """

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Job:
    """One picture to draw; `image` is its path below the output folder."""

    prompt: Prompt
    seed: int
    image: str


def generate(
    *,
    model: Annotated[Any, One("models")],
    prompts: str | list[str],
    out: str,
    column: str | None = None,
    limit: int | None = None,
    seeds: list[int] | None = None,
    adapter: str | None = None,
    adapter_weight: float = 1.0,
    adapters: dict[str, AdapterUse] | None = None,
    negative_prompt: str | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    scheduler: str | None = None,
    batch_size: int = 4,
    encode_first: bool = False,
    device: str = "auto",
) -> Path:
    """Returns the path of the written images.jsonl.

    Args:
        model: the base model.
        prompts: a text, a list of texts, a file (.txt, one a line; .tsv, .csv, .jsonl, .json), or a published
            set: parti, hpsv2, geneval, t2i_compbench, imagereward ([parti] is the word itself).
        out: folder for the pictures, images.jsonl and the manifest.
        column: of the prompts' file; by default the one called prompt, caption or text.
        limit: use the first so many prompts only.
        seeds: each prompt is drawn once per seed; null: [0].
        adapter: one LoRA: its folder, file or hub id.
        adapter_weight: how strongly `adapter` acts.
        adapters: several LoRAs at once, name -> {path, weight}.
        negative_prompt: what guidance leads away from, for all prompts; FLUX.1 has none.
        guidance_scale: strength of classifier-free guidance, 1 or less: none; of FLUX.1-dev the guidance that
            the network is told; null: the pipeline's default, of a distilled base (model.distilled_steps)
            no classifier-free guidance.
        num_inference_steps: denoising steps; null: the pipeline's default, or what the base was distilled to.
        height: of the pictures in pixels; null: the base's own.
        width: of the pictures in pixels; null: the base's own.
        scheduler: class name of a diffusers scheduler; null: the base's own.
        batch_size: pictures drawn at a time; a process takes whole batches.
        encode_first: embed all prompts, free the text encoders, and only then load the network: less memory
            on the GPU (10 GB with the T5 of SD3.5 and FLUX.1), for a few MB of main memory a prompt.
        device: auto | cpu | cuda | cuda:1 ...

    Raises:
        UserError: bad prompts, model, adapter or settings, or `out` holds something else.
    """
    from diffalign.common import manifest
    from diffalign.common.progress import say, silence
    from diffalign.data.prompts import load_prompts
    from diffalign.stages import _painting, _parts, _run, _shares

    recipe = resolved_recipe(generate, locals())
    uses = _adapter_uses(adapter, adapter_weight, adapters)
    seeds = [0] if seeds is None else list(seeds)
    _check_settings(seeds, scheduler, guidance_scale, num_inference_steps, batch_size)
    share = _shares.my_share()
    if share.index > 0:
        silence()
    asked = load_prompts(prompts, column=column, limit=limit)
    spec = make_one("models", model)
    loaded = _load(spec, recipe)
    settings = {name: recipe[name] for name in SETTINGS}
    paint = _painting.Painter(loaded, list(uses.values()), settings, encode_first=encode_first)
    same = _deciding(recipe, asked, seeds, loaded, uses)
    jobs = [Job(prompt, seed, f"{PICTURES}/{prompt.id}-s{seed}.png") for prompt in asked for seed in seeds]
    with _run.claim_folder(out, stage="generate", recipe=recipe, same=same, share=share) as folder:
        labels = {"model": _model_label(spec.path, uses)}
        found = _draw(paint, jobs, folder, labels, batch_size, share)
        if found == len(jobs) and manifest.read_manifest(folder) is not None:
            _parts.remove_parts(folder)  # a kill may have come just before
            say(f"{folder} is complete: {found} pictures, nothing to do")
            return folder / ROWS
        counts = {"prompts": len(asked), "seeds": len(seeds), "pictures": len(jobs)}
        if share.alone:  # else others have drawn since
            counts["found"] = found
        _finish(folder, jobs, recipe, _inputs(spec, uses, prompts), counts, share)
        return folder / ROWS


def _load(spec: Any, recipe: dict[str, Any]) -> Any:
    """The model, which size and scheduler are known to fit."""
    from diffalign.stages import _run

    loaded = spec.load(_run.pick_device(recipe["device"]))
    _check_size(loaded, recipe["height"], recipe["width"])
    if recipe["scheduler"] is not None:
        loaded.check_scheduler(recipe["scheduler"], recipe["num_inference_steps"])
    return loaded


def _deciding(
    recipe: dict[str, Any], asked: list[Prompt], seeds: list[int], loaded: Any, uses: dict[str, AdapterUse]
) -> dict[str, Any]:
    """What must be equal for a run to be continued."""
    return {
        "prompts": [[prompt.id, prompt.text] for prompt in asked],
        "seeds": seeds,
        "model": {**recipe["model"], "path": loaded.fingerprint()},
        "adapters": {name: [_content(use.path), use.weight] for name, use in uses.items()},
        **{name: recipe[name] for name in SETTINGS},
    }


def _inputs(spec: Any, uses: dict[str, AdapterUse], prompts: str | list[str]) -> dict[str, Path | str]:
    """What the manifest names: base, adapters, and the prompts' file (a literal prompt is in the recipe)."""
    from diffalign.data.prompts import prompt_file

    file = prompt_file(prompts) if isinstance(prompts, str) else None
    return {
        "model": spec.path,
        **{f"adapter {name}": use.path for name, use in uses.items()},
        **({} if file is None else {"prompts": file}),
    }


def _draw(
    paint: Painter,
    jobs: list[Job],
    folder: Path,
    labels: dict[str, Any],
    batch_size: int,
    share: Share,
) -> int:
    """Draws what is not there yet of this process's share; returns how many pictures of all were there.

    A batch with one missing picture is drawn whole: a picture's last bits depend on its batch. So batches are
    cut at the same places always, whatever is there and however many processes there are.
    """
    from diffalign.common import files, manifest
    from diffalign.common.progress import Progress
    from diffalign.stages import _parts

    done = _finished_rows(folder, jobs)
    if len(done) == len(jobs):
        return len(done)
    manifest.withdraw_manifest(folder)
    (folder / PICTURES).mkdir(exist_ok=True)
    part = _parts.own_part(folder, share)
    batches = share.of([jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)])
    own = [job for batch in batches for job in batch]
    paint.model.say_too_long(list(dict.fromkeys(job.prompt.text for job in own if job.image not in done)))
    batches = [batch for batch in batches if not all(job.image in done for job in batch)]
    paint.prepare([job.prompt.text for job in batch] for batch in batches)
    there = sum(job.image in done for job in own)
    with Progress("generate", len(own), "pictures", initial=there) as progress:
        for batch in batches:
            texts, seeds = [job.prompt.text for job in batch], [job.seed for job in batch]
            pictures = paint(texts, seeds)
            fresh = [pair for pair in zip(batch, pictures, strict=True) if pair[0].image not in done]
            for job, picture in fresh:
                with files.atomic_path(folder / job.image) as temporary:
                    picture.save(temporary, format="PNG")
            rows = [_row(job, picture, {**paint.settings, **labels}) for job, picture in fresh]
            files.append_jsonl(part, rows)
            progress.update(len(fresh))
    return len(done)


def _adapter_uses(
    adapter: str | None, weight: float, adapters: dict[str, AdapterUse] | None
) -> dict[str, AdapterUse]:
    """Returns name -> adapter, whichever way they were given."""
    if adapter is not None and adapters:
        raise UserError("adapter= and adapters= are both set: put all into adapters={name: {path, weight}}")
    if adapter is not None:
        return {"adapter": AdapterUse(adapter, weight)}
    if weight != 1.0:
        raise UserError(
            f"adapter_weight={weight} without adapter=: give the adapter, or leave the weight out"
        )
    given = adapters or {}
    return {name: use if isinstance(use, AdapterUse) else AdapterUse(**use) for name, use in given.items()}


def _check_settings(
    seeds: list[int],
    scheduler: str | None,
    guidance_scale: float | None,
    num_inference_steps: int | None,
    batch_size: int,
) -> None:
    """Raises UserError for values that no model can draw with."""
    if not seeds:
        raise UserError("seeds is empty: give at least one, for example seeds=[0]")
    twice = [seed for seed in seeds if seeds.count(seed) > 1]
    if twice:
        raise UserError(f"seeds holds {twice[0]} twice: the two pictures would be equal")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: give a number of pictures of at least 1")
    if num_inference_steps is not None and num_inference_steps < 1:
        raise UserError(f"num_inference_steps={num_inference_steps}: give at least 1")
    if guidance_scale is not None and not 0 <= guidance_scale < float("inf"):
        raise UserError(f"guidance_scale={guidance_scale}: give a number of at least 0")
    if scheduler is not None:
        from diffalign.models import scheduler_class

        scheduler_class(scheduler)


def _check_size(model: Any, height: int | None, width: int | None) -> None:
    """Raises UserError for a picture size that the model's network cannot take."""
    for name, size in (("height", height), ("width", width)):
        if size is not None and (size < 1 or size % model.size_multiple):
            raise UserError(f"{name}={size}: give a multiple of {model.size_multiple}")


def _content(path: str) -> Any:
    """Returns what identifies an adapter: its files' content, or the hub id."""
    from diffalign.common import files

    return files.file_identity(path) if Path(path).exists() else path


def _model_label(path: str, uses: dict[str, AdapterUse]) -> str:
    """Returns what rows call the model: "sdxl-base", "sdxl-base + runs/dpo", "sd15 + ink * 0.6"."""
    parts = [Path(path).name]
    for use in uses.values():
        parts.append(use.path if use.weight == 1.0 else f"{use.path} * {use.weight:g}")
    return " + ".join(parts)


def _finished_rows(folder: Path, jobs: Iterable[Job]) -> dict[str, dict[str, Any]]:
    """Returns image -> row of the pictures that are there with their rows, in the order of the jobs."""
    from diffalign.common import files
    from diffalign.stages import _parts

    path = folder / ROWS
    joined = files.read_jsonl(path, drop_torn_tail=True) if path.exists() else []
    rows = {row.get("image"): row for row in [*joined, *_parts.rows_so_far(folder).values()]}
    there = [job.image for job in jobs if job.image in rows and (folder / job.image).is_file()]
    return {image: rows[image] for image in there}


def _finish(
    folder: Path,
    jobs: list[Job],
    recipe: dict[str, Any],
    inputs: dict[str, Path | str],
    counts: dict[str, Any],
    share: Share,
) -> None:
    """Joins the parts and completes the folder, in the process that is the last to come here."""
    from diffalign.common import files, manifest
    from diffalign.common.progress import say
    from diffalign.stages import _parts

    with files.waiting_lock(folder, "join"):
        rows = _finished_rows(folder, jobs)
        if len(rows) < len(jobs):
            say(f"generate: share {share.index + 1} of {share.count} is done; the last to finish joins them")
            return
        if manifest.read_manifest(folder) is None:  # else another process was later, and has done it
            files.write_jsonl(folder / ROWS, rows.values())
            manifest.write_manifest(folder, stage="generate", recipe=recipe, inputs=inputs, counts=counts)
        _parts.remove_parts(folder)
        files.remove_leftovers(folder / PICTURES)


def _row(job: Job, picture: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of images.jsonl."""
    return {
        "id": f"{job.prompt.id}-s{job.seed}",
        "image": job.image,
        "prompt": job.prompt.text,
        "prompt_id": job.prompt.id,
        "seed": job.seed,
        **settings,
        "width": picture.width,
        "height": picture.height,
        "meta": job.prompt.meta,
    }
