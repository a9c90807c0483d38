"""The model card: its code gives the very pictures of the recipe, whatever base the recipe is made of."""

from __future__ import annotations

import re
from typing import Any

import pytest

from diffalign.common import plugins
from diffalign.training.card import model_card


def card(model: dict[str, Any], *, kind: str = "lora") -> str:
    recipe = {"model": model, "objective": {"name": "sft"}, "adapter": {"kind": kind}}
    return model_card(
        recipe, base_identity="0123", counts={"used": 1, "asked": 1, "dropped": {}}, summary={"steps": 1}
    )


def code(text: str) -> str:
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("name", plugins.names("models"))
def test_every_backbone_names_its_own_pipeline(name: str) -> None:
    pipeline = plugins.get("models", name).pipeline_name
    source = code(card({"name": name, "path": "org/base"}))
    assert f'pipeline = {pipeline}.from_pretrained("org/base")' in source
