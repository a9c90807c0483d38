"""Model cards: what was trained on what and from what, how good it is, and how to load it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffalign.common import plugins
from diffalign.common.errors import UserError, brief
from diffalign.common.manifest import versions
from diffalign.models._parts import Source, looks_local, own_source
from diffalign.models._spec import ModelSpec

_HERE = "path/to/this/folder"

TAGS = {
    "adapter": "lora",
    "kohya": "lora",
    "pipeline": "text-to-image",
    "file": "text-to-image",
}
"""What a folder with a card holds -> its tag on the hub; a whole "network" has the name of its part."""


def model_card(
    recipe: dict[str, Any], *, base_identity: str, counts: dict[str, Any], summary: dict[str, Any]
) -> str:
    """The card of what a run has trained, as Markdown with the hub's YAML header.

    Args:
        recipe: the resolved recipe of the run.
        base_identity: fingerprint of the base.
        counts: of the data: asked, used, dropped.
        summary: closing numbers of the run.
    """
    holds = "adapter" if recipe["adapter"]["kind"] == "lora" else "network"
    run = {"recipe": recipe, "counts": counts, "summary": summary, "versions": versions()}
    return (
        "\n\n".join(
            [
                _header(recipe["model"], holds, recipe["objective"]["name"]),
                *_title(recipe["model"], run),
                *_use(recipe["model"], holds),
                *_base(recipe["model"], base_identity),
                *_recipe(run),
            ]
        )
        + "\n"
    )


@dataclass(frozen=True)
class Exported:
    """What `export` has written.

    Attributes:
        holds: one of TAGS, or "network".
        file: of "kohya" and "file": the file's name.
        model: the `model` section of the recipe.
        base_identity: fingerprint of the base.
        license: of the base, as the hub calls it; None: not known.
        weight: how strongly the adapter acts.
        run: manifest of the run that trained it; None: not known.
        report: report.json of `evaluate`; None: not given.
    """

    holds: str
    file: str | None
    model: dict[str, Any]
    base_identity: str
    license: str | None = None
    weight: float = 1.0
    run: dict[str, Any] | None = None
    report: dict[str, Any] | None = None


def export_card(exported: Exported) -> str:
    """The card of an exported folder, as Markdown with the hub's YAML header.

    Raises:
        UserError: the report is none of `evaluate mode=images`.
    """
    run = exported.run
    objective = None if run is None else run["recipe"]["objective"]["name"]
    strength = (
        [] if exported.weight == 1.0 else [f"The adapter acts with weight {exported.weight:g} of its own."]
    )
    return (
        "\n\n".join(
            [
                _header(exported.model, exported.holds, objective, exported.license or "unknown"),
                *_title(exported.model, run),
                *strength,
                *_use(exported.model, exported.holds, exported.file),
                *_scores(exported.report),
                *_base(exported.model, exported.base_identity),
                f"License of the base: {exported.license or 'unknown'}; what derives from it is bound by it.",
                *([] if run is None else _recipe(run)),
            ]
        )
        + "\n"
    )


def _header(model: dict[str, Any], holds: str, objective: str | None, license: str | None = None) -> str:
    spec: type[ModelSpec] = plugins.get("models", model["name"])
    tag = TAGS.get(holds) or spec.network_part
    tags = ["diffalign", *([] if objective is None else [objective]), tag]
    entries: dict[str, Any] = {} if license is None else {"license": license}
    if not Path(model["path"]).exists() and not looks_local(model["path"]):
        entries["base_model"] = model["path"]  # the hub takes ids alone, it refuses cards with paths
    if holds != "kohya" or spec.kohya_in_diffusers != "none":  # the hub shows how that library loads it
        entries["library_name"] = "diffusers"
    entries["tags"] = tags
    return f"---\n{yaml.safe_dump(entries, sort_keys=False).strip()}\n---"


def _title(model: dict[str, Any], run: dict[str, Any] | None) -> list[str]:
    if run is None:
        return [f"# {model['path']}, adapted", "How it was trained is not known here."]
    counts = run["counts"]
    learned = f"{counts['used']} examples ({counts['asked']} rows read)"
    if run["recipe"]["data"] is None and run["recipe"].get("cache") is None:
        learned = f"its own pictures of {counts['used']} prompts"
    return [
        f"# {model['path']} aligned with {run['recipe']['objective']['name']}",
        "Trained with [diffalign](https://pypi.org/project/diffalign/) for "
        f"{run['summary']['steps']} steps on {learned}.",
    ]


def _use(model: dict[str, Any], holds: str, file: str | None = None) -> list[str]:
    spec: type[ModelSpec] = plugins.get("models", model["name"])
    others = f"ComfyUI, WebUI and kohya's scripts load `{file}` as any LoRA."
    if holds == "kohya" and spec.kohya_in_diffusers == "none":
        return ["## Use", f"{others} diffusers loads nothing of it."]
    code = f"```python\n{_snippet(model, holds, file)}\n```"
    if holds != "kohya":
        return ["## Use", code]
    but = ", which leaves out layers outside the blocks" if spec.kohya_in_diffusers == "blocks" else ""
    return ["## Use", f"{others} With diffusers{but}:", code]


def _base(model: dict[str, Any], identity: str) -> list[str]:
    return [
        "## Base",
        f"`{model['path']}`, fingerprint `{identity}`. An adapter changes the weights it was trained on; on "
        "another\nbase its effect is not known.",
    ]


def _recipe(run: dict[str, Any]) -> list[str]:
    numbers = {"data": run["counts"], "run": run["summary"], "versions": run["versions"]}
    return [
        "## Recipe",
        f"```yaml\n{yaml.safe_dump(run['recipe'], sort_keys=False, allow_unicode=True).strip()}\n```",
        "## Closing numbers",
        f"```yaml\n{yaml.safe_dump(numbers, sort_keys=False).strip()}\n```",
    ]


def _scores(report: dict[str, Any] | None) -> list[str]:
    """The table of every scorer: how often aligned beats base, and by how much, with the intervals."""
    if report is None:
        return []
    if isinstance(report, dict) and "models" in report:
        raise UserError("report= compares several models: give an evaluate of aligned=FOLDER alone")
    try:
        level = f"{100 * report['level']:g} %"
        lines = [
            f"{report['pairs']} pairs of pictures, base against aligned, of {report['prompts']} prompts; in "
            f"brackets the {level} intervals over prompts.",
            "| scorer | aligned wins (ties half) | base | aligned | difference |\n|---|---|---|---|---|",
        ]
        for name, reward in report["rewards"].items():
            win, difference = _interval(reward["win_rate"]), _interval(reward["difference"])
            means = f"{reward['base']:.4g} | {reward['aligned']:.4g}"
            lines[-1] += f"\n| {name} ({reward['scale']}) | {win} | {means} | {difference} |"
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"report= holds no comparison of pictures ({brief(error)}): give the output of evaluate "
            "mode=images"
        ) from error
    return ["## Scores", *lines]


def _interval(interval: dict[str, Any]) -> str:
    return f"{interval['estimate']:.3g} [{interval['low']:.3g}, {interval['high']:.3g}]"


def _snippet(model: dict[str, Any], holds: str, file: str | None = None) -> str:
    """Python code that loads the base, in the precision of its files, and what the folder holds."""
    spec: ModelSpec = plugins.get("models", model["name"])(
        **{key: value for key, value in model.items() if key != "name"}
    )
    own = {name: own_source(path, name) for name, path in spec.own_parts.items()}
    load = _load_call(spec)
    if holds == "pipeline":
        own, load = {}, f"from_pretrained({_arguments(_HERE)}"
    elif holds == "file":
        own, load = {}, f"from_single_file({_arguments(f'{_HERE}/{file}')}"
    elif holds == "network":
        own[spec.network_part] = Source(_HERE, spec.network_part)
    classes = {"vae": "AutoencoderKL", spec.network_part: spec.network_class}
    imports = sorted([spec.pipeline_name, *(classes[name] for name in own)])
    lines = [f"from diffusers import {', '.join(imports)}", ""]
    if holds == "adapter" and spec.adapter_layout == "peft":
        lines.insert(1, "from peft import PeftModel")
    for name, (path, subfolder, _) in own.items():
        lines.append(f"{name} = {classes[name]}.from_pretrained({_arguments(path, subfolder=subfolder)})")
    given = "".join(f", {name}={name}" for name in own)
    lines.append(f"pipeline = {spec.pipeline_name}.{load}{given})")
    if holds in ("adapter", "kohya"):
        lines.append(_adapter_call(spec, file))
    return "\n".join([*lines, 'image = pipeline("a prompt").images[0]'])


def _adapter_call(spec: ModelSpec, file: str | None) -> str:
    """The line that loads what is in the folder into the pipeline."""
    if spec.adapter_layout == "peft":
        network = f"pipeline.{spec.network_part}"
        return f"{network} = PeftModel.from_pretrained({network}, {_arguments(_HERE)})"
    return f"pipeline.load_lora_weights({_arguments(_HERE, weight_name=file)})"


def _load_call(spec: ModelSpec) -> str:
    """The call that loads the base, up to its last argument."""
    if spec.path.endswith(".safetensors"):
        return f"from_single_file({_arguments(spec.path, config=spec.config)}"
    return f"from_pretrained({_arguments(spec.path, revision=spec.revision, variant=spec.variant)}"


def _arguments(path: str, **options: str | None) -> str:
    """The words of a call, texts in double quotes; what is None is left out."""
    words = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
    return ", ".join([json.dumps(path), *words])
