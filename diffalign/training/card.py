"""The model card in an adapter's folder: what it was trained on and from, and how to load it."""

from __future__ import annotations

import json
from typing import Any

import yaml

from diffalign.common import plugins
from diffalign.common.manifest import versions
from diffalign.models._parts import Source, own_source
from diffalign.models._spec import ModelSpec

_OWN_CLASSES = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}
_HERE = "path/to/this/folder"


def model_card(
    recipe: dict[str, Any], *, base_identity: str, counts: dict[str, Any], summary: dict[str, Any]
) -> str:
    """The card as Markdown with the hub's YAML header.

    Args:
        recipe: the resolved recipe of the run.
        base_identity: fingerprint of the base.
        counts: of the data: asked, used, dropped.
        summary: closing numbers of the run.
    """
    model, objective = recipe["model"], recipe["objective"]
    header = {
        "base_model": model["path"],
        "library_name": "diffusers",
        "tags": ["diffalign", objective["name"], "lora" if recipe["adapter"]["kind"] == "lora" else "unet"],
    }
    learned = f"{counts['used']} examples ({counts['asked']} rows read)"
    if recipe["data"] is None:
        learned = f"its own pictures of {counts['used']} prompts"
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {model["path"]} aligned with {objective["name"]}

Trained with [diffalign](https://pypi.org/project/diffalign/) for {summary["steps"]} steps on \
{learned}.

## Use

```python
{_snippet(recipe)}
```

## Base

`{model["path"]}`, fingerprint `{base_identity}`. An adapter changes the weights it was trained on; on another
base its effect is not known.

## Recipe

```yaml
{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()}
```

## Closing numbers

```yaml
{yaml.safe_dump({"data": counts, "run": summary, "versions": versions()}, sort_keys=False).strip()}
```
"""


def _snippet(recipe: dict[str, Any]) -> str:
    """Python code that loads the run's base, in the precision of its files, and what was trained."""
    model = {key: value for key, value in recipe["model"].items() if key != "name"}
    spec: ModelSpec = plugins.get("models", recipe["model"]["name"])(**model)
    is_lora = recipe["adapter"]["kind"] == "lora"
    own = {name: own_source(getattr(spec, name), name) for name in _OWN_CLASSES if getattr(spec, name)}
    if not is_lora:
        own["unet"] = Source(_HERE, "unet")
    classes = sorted([spec.pipeline_name, *(_OWN_CLASSES[name] for name in own)])
    lines = [f"from diffusers import {', '.join(classes)}", ""]
    for name, (path, subfolder, _) in own.items():
        lines.append(
            f"{name} = {_OWN_CLASSES[name]}.from_pretrained({_arguments(path, subfolder=subfolder)})"
        )
    options = _arguments(spec.path, revision=spec.revision, variant=spec.variant)
    given = "".join(f", {name}={name}" for name in own)
    lines.append(f"pipeline = {spec.pipeline_name}.from_pretrained({options}{given})")
    if is_lora:
        lines.append(f"pipeline.load_lora_weights({_arguments(_HERE)})")
    return "\n".join([*lines, 'image = pipeline("a prompt").images[0]'])


def _arguments(path: str, **options: str | None) -> str:
    """The words of a call, texts in double quotes; what is None is left out."""
    words = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
    return ", ".join([json.dumps(path), *words])
