"""Scorers: one file per scorer, each a `Plugin`; set rewards are plain functions.

scorer = load_scorer("clip", path="folder-or-hub-id")
values = scorer(images, prompts)          # float32 [B]
"""

from dataclasses import fields
from typing import Any

from diffalign.common.errors import unknown
from diffalign.common.plugins import get
from diffalign.scorers._base import Scorer, Scores
from diffalign.scorers._distribution import vendi_score

__all__ = ["Scorer", "Scores", "load_scorer", "vendi_score"]


def load_scorer(name: str, *, device: str = "cpu", **options: Any) -> Scorer:
    """Returns the scorer called `name` with these options, weights loaded on `device`.

    Raises:
        UserError: no scorer or no option has that name, an option's value is refused, or weights are missing.
    """
    plugin = get("scorers", name)
    known = [field.name for field in fields(plugin) if field.init]
    for option in options:
        if option not in known:
            raise unknown(f"option of scorer {name}", option, known)
    scorer: Scorer = plugin(**options).load(device)
    return scorer
