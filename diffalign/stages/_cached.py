"""A cache in place of pictures that are encoded now: it must have been made for this base."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from diffalign.common.errors import UserError
from diffalign.data.cache import Cache, open_cache
from diffalign.data.specs import PreprocessSpec

if TYPE_CHECKING:
    from diffalign.models._base import Model


def open_for(folder: str, preprocess: PreprocessSpec) -> Cache:
    """The cache in `folder`.

    Raises:
        UserError: no cache, one that is not complete, or one whose pictures were not fitted as asked.
    """
    cache = open_cache(folder)
    theirs = PreprocessSpec(**cache.facts["preprocess"])
    if preprocess.decides() not in (PreprocessSpec().decides(), theirs.decides()):
        raise UserError("preprocess is that of the cache: leave it out, or make another cache with it")
    return cache


def refuse_another_base(cache: Cache, model: Model) -> None:
    """Refuses a cache that other encoders made, or whose pictures do not fit the model's network."""
    facts = cache.facts
    if facts["encoders"] != model.encoder_fingerprint():
        here = model.encoder_recipe()
        for key, theirs in facts.get("encoder_recipe", {}).items():  # older caches do not say it
            if here.get(key) != theirs:
                raise UserError(
                    f"cache={cache.folder} was made with {key}={_typed(theirs)}, this run has "
                    f"{_typed(here.get(key))}: give that one, or make another cache"
                )
        raise UserError(
            f"cache={cache.folder} was made with other files of VAE or text encoders than the model's: "
            "make one with this base"
        )
    if facts["size_multiple"] % model.size_multiple:
        raise UserError(
            f"cache={cache.folder} has sides that are multiples of {facts['size_multiple']}, the model's "
            f"network needs multiples of {model.size_multiple}: make one with this base"
        )
    made, own = facts["resolution"], model.default_resolution
    if facts["preprocess"]["resolution"] is None and made != own:
        raise UserError(
            f"cache={cache.folder} was made at another base's {made} pixels, the model's are {own}: make "
            f"one with this base, or say preprocess.resolution={made} when making it"
        )


def _typed(value: Any) -> str:
    """A value of a recipe as a command gives it."""
    return value if isinstance(value, str) else json.dumps(value)
