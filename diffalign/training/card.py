"""The model card in an adapter's folder: what it was trained on and from, and how to load it."""

from __future__ import annotations

from typing import Any

import yaml

from diffalign.common import plugins
from diffalign.common.manifest import versions
from diffalign.models._spec import ModelSpec


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
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {model["path"]} aligned with {objective["name"]}

Trained with [diffalign](https://pypi.org/project/diffalign/) for {summary["steps"]} steps on \
{counts["used"]} examples ({counts["asked"]} rows read).

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
    model = {key: value for key, value in recipe["model"].items() if key != "name"}
    spec: ModelSpec = plugins.get("models", recipe["model"]["name"])(**model)
    pipeline, path = spec.pipeline_name, spec.path
    if recipe["adapter"]["kind"] == "lora":
        return f"""from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{path}")
pipeline.load_lora_weights("path/to/this/folder")
image = pipeline("a prompt").images[0]"""
    return f"""from diffusers import {pipeline}, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("path/to/this/folder", subfolder="unet")
pipeline = {pipeline}.from_pretrained("{path}", unet=unet)
image = pipeline("a prompt").images[0]"""
