"""The whole street on an embedded tiny model: draw, grade, pair, align, draw again, compare.

A tiny SDXL or SD3 that ships with the package draws scenes of coloured shapes and is often wrong. Its own
pictures are graded exactly, every two of a prompt whose grades differ become a preference pair, a LoRA is
trained on the pairs, and base and aligned model are compared on prompts with combinations that neither was
trained on.
No GPU and no network are needed.

Examples:
    diffalign demo
    diffalign demo quick=true
    diffalign demo model=tiny-sd3
    diffalign demo out=runs/demo seed=1
    diffalign demo objective=sft out=runs/demo-sft
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from diffalign.common.config import resolved_recipe
from diffalign.common.errors import UserError, unknown

EMBEDDED = ("tiny-sdxl", "tiny-sd3", "tiny-clip")


def embedded(name: str) -> Path:
    """The folder of an embedded model: "tiny-sdxl", "tiny-sd3" (diffusers) or "tiny-clip" (open_clip)."""
    if name not in EMBEDDED:
        raise unknown("embedded model", name, EMBEDDED)
    folder = Path(str(resources.files("diffalign.demo") / "weights" / name))
    if not folder.is_dir():
        raise UserError(
            f"the embedded model {name} is missing from this installation: install diffalign again"
        )
    return folder


def demo(
    *,
    model: str = "tiny-sdxl",
    out: str | None = None,
    quick: bool = False,
    objective: str = "dpo",
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the report: win rate with its interval, accuracy of base and aligned, differences by kind of
    clause.

    Args:
        model: the embedded model that is aligned, tiny-sdxl or tiny-sd3.
        out: folder of the demo; every stage leaves its files in it. null: diffalign-demo below the current
            one, diffalign-demo-quick for the quick one.
        quick: a smaller walk, for a first look and for tests.
        objective: what is trained, by name alone: dpo, sft, mapo, smpo, rankdpo, kto, dragon,
            dragon_exemplar or dragon_set, with the settings chosen for tiny-sdxl; of tiny-sd3 dpo or sft.
        seed: of pictures and training; the prompts are the same in every demo.
    """
    recipe = resolved_recipe(demo, locals())
    from diffalign.demo import walk
    from diffalign.demo.methods import ALIASES, METHODS

    if model not in walk.SIZES:
        raise unknown("model of the demo", model, walk.SIZES)
    methods, name = METHODS[model], ALIASES.get(objective, objective)
    if name not in methods:
        raise unknown(f"objective of the demo of {model}", objective, methods)
    size = walk.SIZES[model]
    folder = Path(out or _folder(model, name, quick))
    return walk.walk(
        folder, walk.quick(size) if quick else size, method=methods[name], seed=seed, recipe=recipe
    )


def _folder(model: str, objective: str, quick: bool) -> str:
    """Where a demo goes that is not told: each model and objective has a folder of its own."""
    parts = ((model, model != "tiny-sdxl"), (objective, objective != "dpo"), ("quick", quick))
    return "-".join(["diffalign-demo", *(word for word, told in parts if told)])
