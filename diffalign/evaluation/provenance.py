"""Where pictures come from: the manifests of the stages that scored and drew them and trained their model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.common import manifest
from diffalign.common.errors import UserError
from diffalign.evaluation import curves

DRAWN_ALIKE = (
    "model",
    "seeds",
    "negative_prompt",
    "guidance_scale",
    "num_inference_steps",
    "height",
    "width",
    "scheduler",
)
"""Keys of `generate` that must be equal for a difference between pictures to be the adapter's."""

_MOST_ENTRIES = 24
_MOST_TEXT = 400


@dataclass
class Origin:
    """What is known of one side's pictures.

    Attributes:
        source: as it was given.
        manifests: stage (score, generate, train) -> its manifest, as far as they are found.
        folders: stage -> its folder.
        run: folder with the training run's metrics, None where it is not found.
    """

    source: str
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    run: Path | None = None

    def rows(self) -> list[tuple[str, str]]:
        """Returns (what, value) for people: model, adapters, settings, seeds, scorers, training, versions."""
        found = [("pictures", self.source)]
        drawn, scored, trained = (self.manifests.get(stage) for stage in ("generate", "score", "train"))
        if drawn is not None:
            found += _drawn_rows(drawn)
        if scored is not None:
            entries = _mapping(scored.get("scorers"))
            said = [_scorer(name, _mapping(entry)) for name, entry in entries.items()]
            found += [("scorers", ", ".join(said)), ("score: identity", _identity(scored))]
        if trained is not None:
            found += _trained_rows(trained)
        elif self.run is not None:
            found.append(("training run", str(self.run)))
        for stage, content in self.manifests.items():
            found.append((f"{stage}: made", f"{content.get('created', '?')} with {_versions(content)}"))
        return [(what, _cut(value)) for what, value in found]


def trace(source: str, rows_file: Path, picture: Path) -> Origin:
    """Returns where the pictures of one side come from, as far as manifests beside them say.

    Paths in manifests may start from another folder than this process does; so the folder of the pictures is
    taken from where they lie, and an adapter counts only if its content is what the manifest recorded.

    Args:
        source: as it was given.
        rows_file: the images.jsonl or scores.jsonl, or a folder of pictures.
        picture: one of the pictures.
    """
    origin = Origin(source)
    own = rows_file if rows_file.is_dir() else rows_file.parent
    for folder in (own, *picture.resolve().parents[:2]):
        content = _read(folder)
        if content is not None and content["stage"] in ("score", "generate"):
            origin.manifests.setdefault(content["stage"], content)
            origin.folders.setdefault(content["stage"], folder)
    adapter = _adapter_of(origin.manifests.get("generate") or {})
    for folder in (adapter, *adapter.parents[:2]) if adapter is not None else ():
        if (folder / curves.FILE_NAME).is_file():
            origin.run = folder
            content = _read(folder)
            if content is not None and content["stage"] == "train":
                origin.manifests["train"], origin.folders["train"] = content, folder
            break
    return origin


def given_run(origin: Origin, run: str) -> None:
    """Makes `run` the side's training run.

    Raises:
        UserError: it holds no metrics.
    """
    folder = Path(run)
    if not (folder / curves.FILE_NAME).is_file():
        raise UserError(f"run={run} holds no {curves.FILE_NAME}: give the output folder of train")
    origin.run = folder
    content = _read(folder)
    if content is not None and content["stage"] == "train":
        origin.manifests["train"], origin.folders["train"] = content, folder


def unlike(base: Origin, other: Origin) -> list[str]:
    """Returns in words what two sides were drawn with unlike each other, adapters aside."""
    left, right = (_mapping((o.manifests.get("generate") or {}).get("recipe")) for o in (base, other))
    if not left or not right:
        return []
    return [
        f"{key} {_words(left.get(key))} in base, {_words(right.get(key))} in the other"
        for key in DRAWN_ALIKE
        if left.get(key) != right.get(key)
    ]


def shortened(value: Any) -> Any:
    """Returns a manifest with long lists, mappings and texts cut, for people to read."""
    if isinstance(value, Mapping):
        kept = {str(k): shortened(v) for k, v in list(value.items())[:_MOST_ENTRIES]}
        return kept | ({"...": f"{len(value) - len(kept)} more"} if len(value) > len(kept) else {})
    if isinstance(value, list):
        more = len(value) - _MOST_ENTRIES
        return [shortened(v) for v in value[:_MOST_ENTRIES]] + ([f"... {more} more"] if more > 0 else [])
    return _cut(value) if isinstance(value, str) else value


def _read(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest of a folder, None where there is none or it is none of ours."""
    try:
        content = manifest.read_manifest(folder)
    except UserError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("stage"), str) else None


def _adapter_of(drawn: Mapping[str, Any]) -> Path | None:
    """Returns the first adapter that is still what the pictures were drawn with."""
    for name, entry in _mapping(drawn.get("inputs")).items():
        path = _mapping(entry).get("path")
        if not (name.startswith("adapter ") and isinstance(path, str)):
            continue
        with contextlib.suppress(OSError, UserError):  # a path that cannot be looked at is not that adapter
            if Path(path).exists() and manifest.identities({name: path})[name] == entry:
                return Path(path).resolve()
    return None


def _drawn_rows(drawn: Mapping[str, Any]) -> list[tuple[str, str]]:
    recipe = _mapping(drawn.get("recipe"))
    model = _mapping(recipe.get("model"))
    weights = _mapping(recipe.get("adapters"))
    adapters = [f"{_mapping(use).get('path')} * {_mapping(use).get('weight')}" for use in weights.values()]
    if recipe.get("adapter") is not None:
        adapters.append(f"{recipe['adapter']} * {recipe.get('adapter_weight')}")
    set_keys = [key for key in DRAWN_ALIKE[2:] if recipe.get(key) is not None]
    return [
        ("model", f"{model.get('name')} {model.get('path')}"),
        ("adapters", ", ".join(adapters) or "none"),
        ("seeds", _words(recipe.get("seeds") or [0])),
        ("settings", ", ".join(f"{key}={recipe[key]}" for key in set_keys) or "those of the model"),
        ("generate: identity", _identity(drawn)),
    ]


def _trained_rows(trained: Mapping[str, Any]) -> list[tuple[str, str]]:
    recipe = _mapping(trained.get("recipe"))
    objective = _mapping(recipe.get("objective"))
    options = ", ".join(f"{key}={value}" for key, value in objective.items() if key != "name")
    summary = _mapping(trained.get("summary"))
    return [
        ("trained with", f"{objective.get('name')} ({options})"),
        ("training seed", str(recipe.get("seed"))),
        ("training steps", str(summary.get("steps", recipe.get("num_steps")))),
        ("train: identity", _identity(trained)),
    ]


def _scorer(name: str, entry: Mapping[str, Any]) -> str:
    return f"{name} ({entry.get('scale')}, version {entry.get('version')})"


def _versions(content: Mapping[str, Any]) -> str:
    versions = _mapping(content.get("versions"))
    wanted = ("diffalign", "torch", "diffusers", "transformers", "peft", "open_clip_torch")
    return ", ".join(f"{name} {versions[name]}" for name in wanted if name in versions) or "unknown versions"


def _identity(content: Mapping[str, Any]) -> str:
    return str(content.get("recipe_identity", "?"))[:16]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={item}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        shown = ", ".join(str(item) for item in value[:8])
        return shown + (f", ... ({len(value)})" if len(value) > 8 else "")
    return "default" if value is None else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 3] + "..."
