"""Recipes of several verbs: a YAML file whose steps run one after another, each leaving its files.

    given:                          # what words of the command line may set; null: they have to
      prompts: null
      out: runs/lists
    steps:
      - generate: {model: {name: sdxl, path: ...}, prompts: "${given.prompts}", out: "${given.out}/pictures"}
      - score: {images: "${given.out}/pictures", scorers: [clip], out: "${given.out}/scores"}

`diffalign --config FILE prompts=prompts.txt` runs it. Every step is checked before the first one begins, and
each goes on where an earlier run of the recipe was stopped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffalign.common.config import Recipe, load_recipe
from diffalign.common.errors import UserError, brief, unknown


@dataclass(frozen=True)
class Step:
    """One verb with its checked recipe."""

    verb: str
    function: Callable[..., Any]
    recipe: Recipe


def load_steps(
    path: str, words: Sequence[str], stages: Mapping[str, Callable[[], Callable[..., Any]]]
) -> list[Step]:
    """The checked steps of the file.

    Args:
        path: of the YAML file.
        words: `key=value`, setting what the file lists under `given`.
        stages: verb -> what imports its function.

    Raises:
        UserError: no such file, no steps, an unknown verb, key or value; names the step.
    """
    content = _resolved(path, words)
    steps = []
    for number, entry in enumerate(content["steps"], start=1):
        where = f"{path}: step {number}"
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise UserError(f"{where} is not one verb with its keys: write '- generate: {{...}}'")
        ((verb, keys),) = entry.items()
        if verb not in stages:
            raise unknown(f"verb of step {number}", str(verb), stages)
        function = stages[verb]()
        with tempfile.TemporaryDirectory() as folder:
            # As a file of its own, so that a step may say all that a recipe of one verb may.
            file = Path(folder) / f"step-{number}.yaml"
            file.write_text(yaml.safe_dump(keys or {}, allow_unicode=True), encoding="utf-8")
            try:
                recipe = load_recipe(function, file, [])
            except UserError as error:
                raise UserError(f"{where} ({verb}): {str(error).replace(str(file), file.name)}") from error
        steps.append(Step(str(verb), function, recipe))
    return steps


def _resolved(path: str, words: Sequence[str]) -> dict[str, Any]:
    """The file with the words put in and references replaced."""
    try:
        tree = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UserError(f"--config {path}: no such file") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: {brief(error)}") from error
    if not isinstance(tree, DictConfig) or not OmegaConf.is_list(tree.get("steps")) or not tree.steps:
        raise UserError(f"{path} has no steps: name a verb before --config, or list verbs under 'steps'")
    try:
        given = OmegaConf.to_container(tree.get("given") or OmegaConf.create({}), resolve=False)
        if not isinstance(given, dict):
            raise UserError(f"{path}: given is not a mapping: write 'given: {{key: value}}'")
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                raise UserError(f"'{word}' is no key=value")
            if key not in given:
                raise unknown(f"key of {path}", key, list(map(str, given)))
            given[key] = yaml.safe_load(value) if value.startswith(("[", "{")) else value
        missing = [f"{key!s}=..." for key, value in given.items() if value is None]
        if missing:
            raise UserError(f"{path} needs {' '.join(missing)}")
        tree.given = given
        content = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{path}: {brief(error)}") from error
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}
