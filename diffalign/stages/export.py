"""Write what a run has trained for other programs, or as a whole model.

format=diffusers checks a LoRA and writes it anew, with the metadata that makes it load equal: as plain
diffusers loads it, of a PixArt through peft; ComfyUI loads that too, but leaves alphas and DoRA aside.
format=kohya writes one file that ComfyUI, the WebUIs and kohya's scripts load; rsLoRA is folded into its
alphas, DoRA is refused; diffusers loads of a FLUX.1 file the blocks, of an SD3 file nothing. format=merged
writes the base with the LoRA merged into its weights, and format=full the base with the whole network of an
adapter.kind=full run: a pipeline folder (without safety checker), or with single_file=true one file in the
original layout. Beside it lie a model card and the manifest.

Examples:
    diffalign export model=sdxl model.path=stabilityai/stable-diffusion-xl-base-1.0
        adapter=runs/dpo/adapter format=kohya dtype=fp16 out=export/kohya
    diffalign export model=sdxl model.path=sdxl adapter=runs/dpo/adapter format=merged single_file=true
        dtype=fp16 out=export/merged
    diffalign export model=sdxl model.path=sdxl adapter=runs/dpo/adapter out=export/hub report=report
        license=openrail++ push=me/sdxl-dpo private=true
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from diffalign.common.config import One, make_one, resolved_recipe
from diffalign.common.errors import UserError, brief, unknown
from diffalign.models._runs import run_of
from diffalign.models._spec import DTYPES

if TYPE_CHECKING:
    from diffalign.models._base import Model
    from diffalign.models._spec import ModelSpec

FORMATS = ("diffusers", "kohya", "merged", "full")
CARD = "README.md"
NOT_PUSHED = [".*", "**/.*", "recipe.json", "manifest.json"]
"""Files of the folder that name paths of this machine and serve nobody else."""


def export(
    *,
    model: Annotated[Any, One("models")],
    adapter: str,
    out: str,
    format: Literal["diffusers", "kohya", "merged", "full"] = "diffusers",
    weight: float = 1.0,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    single_file: bool = False,
    other_base: bool = False,
    report: str | None = None,
    license: str | None = None,
    push: str | None = None,
    private: bool = False,
) -> Path:
    """Returns the folder, after everything in it is written (and pushed, where asked).

    Args:
        model: the base that the adapter was trained on.
        adapter: a LoRA (folder, file or hub id), for format=full the folder of a whole network.
        out: folder for the files, the model card (README.md) and the manifest.
        format: diffusers: the LoRA as diffusers loads it (ComfyUI leaves its alphas and DoRA aside); kohya:
            for ComfyUI, the WebUIs and kohya's scripts (diffusers loads it of SD and SDXL, of FLUX.1 but for
            outer layers, of SD3 not at all); merged: the base with the LoRA in its weights; full: the base
            with the adapter's whole network.
        weight: how strongly the LoRA acts; it is multiplied into its alphas, or merged so.
        dtype: of the written weights; null: a LoRA as it is stored, a pipeline in fp32.
        single_file: merged, full: one .safetensors file in the original layout (SD 1.x and SDXL).
        other_base: export also for a base that the adapter was not trained on.
        report: output folder of `evaluate` on pictures of this adapter; the card gets its scores.
        license: of the base, as the hub calls it, for the card; null: unknown.
        push: owner/name on the hub, where the folder is uploaded to; needs a token (`hf auth login`).
        private: the repository that `push` makes is private.

    Raises:
        UserError: no such adapter, one that the format cannot carry or that was trained on another base, a
            report about another one, or `out` holds something else.
    """
    from diffalign.common import manifest
    from diffalign.common.files import file_identity, write_text
    from diffalign.common.progress import say
    from diffalign.stages._run import claim_folder

    recipe = resolved_recipe(export, locals())
    spec = make_one("models", model)
    _check(recipe, spec)
    _refuse_foreign(Path(out))
    loaded = spec.load()
    base, run = loaded.fingerprint(), run_of(adapter)
    _check_base(adapter, run, base, other_base)
    text = _card(recipe, base, run)
    if report is not None:
        _check_report(report, recipe, spec)
    content = file_identity(adapter) if Path(adapter).exists() else adapter
    decides = {key: recipe[key] for key in ("format", "weight", "dtype", "single_file")}
    same = {**decides, "base": base, "adapter": content}
    with claim_folder(out, stage="export", recipe=recipe, same=same) as folder:
        done = manifest.read_manifest(folder)
        names: list[str] = [] if done is None else done["files"]
        manifest.withdraw_manifest(folder)
        if names and all((folder / name).exists() for name in names):
            say(f"{folder} holds this export already; only its card is written anew")
        else:
            names = _write(loaded, spec, recipe, folder)
        write_text(folder / CARD, text)
        manifest.write_manifest(
            folder,
            stage="export",
            recipe=recipe,
            inputs={"model": spec.path, "adapter": adapter, **({} if report is None else {"report": report})},
            extra={"base": base, "trained_on": None if run is None else run["base"], "files": names},
        )
    say(f"export: {format} of {adapter}: {folder}")
    if push is not None:
        _push(folder, push, private=private)
    return folder


def _check(recipe: dict[str, Any], spec: ModelSpec) -> None:
    """Raises UserError for settings that contradict one another or the adapter's kind."""
    form, weight, adapter = recipe["format"], recipe["weight"], recipe["adapter"]
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if recipe["dtype"] is not None and recipe["dtype"] not in DTYPES:
        raise unknown("dtype", recipe["dtype"], DTYPES)
    part = spec.network_part
    is_whole = (Path(adapter) / part).is_dir()
    if is_whole and form != "full":
        raise UserError(f"adapter {adapter} holds a whole {part}, no LoRA: use format=full")
    if form == "full" and not is_whole:
        raise UserError(
            f"adapter {adapter} holds no folder {part}: format=full exports adapter.kind=full runs"
        )
    if weight == 0.0 or not math.isfinite(weight):
        raise UserError(f"weight={weight:g}: use a finite number other than 0, such as 0.8")
    if form == "full" and weight != 1.0:
        raise UserError(f"weight={weight:g} means nothing for a whole {part}: leave it out")
    if recipe["single_file"] and form not in ("merged", "full"):
        raise UserError(f"single_file=true means nothing with format={form}: use format=merged or full")
    if form in ("merged", "full") and (spec.dtype, spec.vae_dtype) != ("fp32", "fp32"):
        raise UserError(
            "export works on the weights as they are: leave model.dtype and model.vae_dtype out, and give "
            "the precision of the written ones as dtype="
        )
    if recipe["push"] is None and recipe["private"]:
        raise UserError("private=true without push=owner/name: give the repository, or leave private out")
    if recipe["push"] is not None and recipe["push"].count("/") != 1:
        raise UserError(f"push={recipe['push']}: give a repository of the hub as owner/name")


def _refuse_foreign(folder: Path) -> None:
    """Refuses a folder with files of others, such as the adapter or the base: they would be written over."""
    from diffalign.stages._run import RECIPE

    if folder.is_dir() and not (folder / RECIPE).is_file():
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if others:
            raise UserError(f"out={folder} holds other files ({others[0]}): choose another folder")


def _check_base(adapter: str, run: dict[str, Any] | None, base: str, other_base: bool) -> None:
    """Refuses a base that the adapter was not trained on; says so where that cannot be known."""
    from diffalign.common.progress import say

    if run is None:
        say(f"{adapter}: no run beside it says which base it was trained on; make sure that it is this one")
    elif run["base"] != base:
        theirs = f"{run['recipe']['model']['path']}, fingerprint {run['base'][:12]}"
        told = f"{adapter} was trained on another base ({theirs}, this one is {base[:12]})"
        if not other_base:
            raise UserError(
                f"{told}: give that base, or other_base=true to export it for this one all the same"
            )
        say(f"{told}; exported for this one all the same")


def _check_report(report: str, recipe: dict[str, Any], spec: ModelSpec) -> None:
    """Refuses a report on pictures that were not drawn with the adapter; says so where nobody can know."""
    from diffalign.common.progress import say

    adapter = recipe["adapter"]
    drawn = _drawn_of(report)
    same = None if drawn is None else _drawn_with(drawn, adapter, spec)
    if same is None:
        say(
            f"report={report}: nothing says which adapter its pictures were drawn with; make sure that it is "
            f"{adapter}"
        )
    elif not same:
        raise UserError(
            f"report={report} is about another adapter than {adapter}: give the evaluate of pictures drawn "
            "with this one alone"
        )


def _drawn_of(report: str) -> dict[str, Any] | None:
    """The manifest of `generate` behind the aligned side of a report; None where it is not found."""
    from diffalign.common import manifest
    from diffalign.evaluation.provenance import trace
    from diffalign.stages._image_rows import read_image_rows

    try:
        entry = (manifest.read_manifest(report) or {})["inputs"]["aligned"]
        rows_file = entry["path"]
        if manifest.identities({"": rows_file})[""] != entry:
            return None  # other pictures lie there by now
        rows, folder = read_image_rows(rows_file)
        return trace(rows_file, Path(rows_file), folder / rows[0]["image"]).manifests.get("generate")
    except (UserError, KeyError, TypeError):  # files of others, or moved ones
        return None


def _drawn_with(drawn: dict[str, Any], adapter: str, spec: ModelSpec) -> bool | None:
    """Whether pictures were drawn with this adapter and no other; None where that is not known."""
    from diffalign.common import manifest

    given = drawn["inputs"]
    uses = [entry for name, entry in given.items() if name.startswith("adapter ")]
    own = drawn["recipe"]["model"].get(spec.network_part)  # the manifest has its path alone
    if own is not None:
        uses += [manifest.identities({"": own})[""]]
    here = {"model": spec.path, "adapter": adapter}
    asked = {name: _content(entry) for name, entry in manifest.identities(here).items()}
    if not uses:  # of the bare base, or of a pipeline that the adapter may have been merged into
        return False if _content(given["model"]) == asked["model"] else None
    found = [_content(entry) for entry in uses]
    if found == [asked["adapter"]]:
        return True
    # A hub id says nothing of the content, and what `export` wrote may be this adapter in other words.
    told = all(isinstance(one, list) for one in (*found, asked["adapter"]))
    return False if len(uses) > 1 or (told and not _is_export(uses[0]["path"])) else None


def _content(entry: dict[str, Any]) -> Any:
    """What identifies the weights of an input: its weight files, whatever lies beside them; or its hub id."""
    if "name" in entry:
        return entry["name"]
    if "files" not in entry:
        return [{key: value for key, value in entry.items() if key != "path"}]
    return [one for name, one in entry["files"].items() if name.endswith((".safetensors", ".bin"))]


def _is_export(path: str) -> bool:
    """Whether `export` wrote the folder or file."""
    from diffalign.common import manifest

    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return (manifest.read_manifest(folder) or {}).get("stage") == "export"


def _card(recipe: dict[str, Any], base: str, run: dict[str, Any] | None) -> str:
    """The text of the model card, made before anything is written: it may be refused."""
    from diffalign.common import files
    from diffalign.models._export import KOHYA_FILE, PIPELINE_FILE
    from diffalign.stages._run import refuse_unfinished
    from diffalign.training.card import Exported, export_card

    report = None
    if recipe["report"] is not None:
        folder = Path(recipe["report"])
        refuse_unfinished(folder)
        report = files.read_json(folder / "report.json")
    whole = ("file", PIPELINE_FILE) if recipe["single_file"] else ("pipeline", None)
    holds, file = {"diffusers": ("adapter", None), "kohya": ("kohya", KOHYA_FILE)}.get(
        recipe["format"], whole
    )
    return export_card(
        Exported(
            holds=holds,
            file=file,
            model=recipe["model"],
            base_identity=base,
            license=recipe["license"],
            weight=recipe["weight"],
            run=run,
            report=report,
        )
    )


def _write(loaded: Model, spec: ModelSpec, recipe: dict[str, Any], folder: Path) -> list[str]:
    """Writes the weights to the side and moves them into `folder` when all are whole; returns their names."""
    from diffalign.common import files

    form, adapter, dtype = recipe["format"], recipe["adapter"], recipe["dtype"]
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as aside:
        if form in ("diffusers", "kohya"):
            loaded.export_adapter(adapter, aside, layout=form, weight=recipe["weight"], dtype=dtype)
        elif form == "merged":
            loaded.export_pipeline(
                aside,
                adapter=adapter,
                weight=recipe["weight"],
                dtype=dtype,
                single_file=recipe["single_file"],
            )
        else:
            trained = spec.with_network(adapter).load()
            trained.export_pipeline(aside, dtype=dtype, single_file=recipe["single_file"])
        names = sorted(made.name for made in Path(aside).iterdir())
        for name in names:
            with files.atomic_path(folder / name) as temporary:
                (Path(aside) / name).rename(temporary)
    return names


def _push(folder: Path, repository: str, *, private: bool) -> None:
    """Uploads the folder to the hub.

    Raises:
        UserError: no network, no token, no right to write there; the folder itself is complete.
    """
    from huggingface_hub import HfApi

    from diffalign.common.progress import say

    try:
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=NOT_PUSHED)
    except Exception as error:  # a token that is none, no network, a name that is taken: many types
        raise UserError(
            f"push={repository} failed ({brief(error)}); {folder} is complete: log in with `hf auth login` "
            "and repeat the command"
        ) from error
    say(f"pushed {folder} to {repository}")
