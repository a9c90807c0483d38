"""Scorers: one file per scorer, each a `Plugin`; measures of sets are plain functions, set rewards objects.

scorer = load_scorer("clip", path="folder-or-hub-id")
values = scorer(images, prompts)          # float32 [B]
reward = set_reward("frechet", exemplars) # of a set of features [n, d], higher is better
"""

from dataclasses import MISSING, fields
from typing import Any

from diffalign.common.errors import UserError, unknown
from diffalign.common.plugins import get
from diffalign.scorers._base import Scorer, Scores, score_all
from diffalign.scorers._distribution import frechet_distance, mmd, precision, recall, vendi_score
from diffalign.scorers._set_rewards import SetReward, exemplar_reward, set_reward

__all__ = [
    "Scorer",
    "Scores",
    "SetReward",
    "exemplar_reward",
    "frechet_distance",
    "load_scorer",
    "mmd",
    "precision",
    "recall",
    "score_all",
    "set_reward",
    "vendi_score",
]


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
    required = [f.name for f in fields(plugin) if f.init and f.default is MISSING is f.default_factory]
    missing = [option for option in required if option not in options]
    if missing:
        raise UserError(f"scorer {name} needs {', '.join(missing)}: give {missing[0]}=...")
    scorer: Scorer = plugin(**options)
    return scorer.load(device)
