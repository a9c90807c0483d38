"""Backbones: one file per family, all behind the same `Model`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffalign.common import plugins
from diffalign.common.errors import unknown

if TYPE_CHECKING:
    from diffalign.models._base import Model


def load_model(name: str, path: str, *, device: str = "cpu", **options: Any) -> Model:
    """The backbone `name` ("sd", "sdxl") with the weights at `path`, a pipeline folder or hub id.

    Args:
        name: a module of `diffalign.models`.
        path: a diffusers pipeline folder or the id of one on the hub.
        device: where the parts are put, e.g. "cuda".
        options: further fields of the backbone's `Plugin` (dtype, revision, variant, vae, ...).

    Raises:
        UserError: an unknown name or option, or a folder that is no such pipeline.
    """
    model: Model = plugins.get("models", name)(path=path, **options).load(device)
    return model


def scheduler_class(name: str) -> Any:
    """The diffusers scheduler class called `name`.

    Raises:
        UserError: no such scheduler.
    """
    import diffusers

    known = sorted(
        entry for entry in dir(diffusers) if entry.endswith("Scheduler") and not entry.startswith("Flax")
    )
    if name not in known:
        raise unknown("scheduler", name, known)
    return getattr(diffusers, name)
