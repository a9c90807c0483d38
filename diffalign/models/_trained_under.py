"""What adapters were trained under: notes in their files, said where they are used under something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from diffalign.common.progress import say
from diffalign.models._lora_files import notes_of

GUIDANCE_NOTE = "ss_guidance_scale"
"""The note of the guidance that a network is told; so sd-scripts (48d368f) call it."""
OWN = "diffalign_"
"""How the notes of other settings begin, which sd-scripts have no names for."""


class Setting(NamedTuple):
    """A number, or true or false, as a command gives it: `key=value`."""

    key: str
    value: float

    def __str__(self) -> str:
        is_fraction = isinstance(self.value, float)
        return f"{self.key}={self.value:g}" if is_fraction else f"{self.key}={json.dumps(self.value)}"


def encoder_notes(settings: Mapping[str, float]) -> dict[str, Setting]:
    """The note -> setting of fields of a model's spec that decide a prompt's embeddings."""
    return {f"{OWN}{name}": Setting(f"model.{name}", value) for name, value in settings.items()}


def as_metadata(settings: Mapping[str, Setting]) -> dict[str, str]:
    """The notes as the file of an adapter has them in its metadata."""
    return {note: json.dumps(setting.value) for note, setting in settings.items()}


def kept_notes(path: str) -> dict[str, str]:
    """What the LoRA at `path` says of its training, and goes on to say when it is exported."""
    return {
        note: text for note, text in notes_of(path).items() if note == GUIDANCE_NOTE or note.startswith(OWN)
    }


class TrainedUnder:
    """What the adapters in use were trained under, by what messages call them."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, float]] = {}

    def read(self, path: str) -> None:
        """Remembers what the file of an adapter says; older ones, and those of others, say nothing."""
        read = {note: _number(text) for note, text in kept_notes(path).items()}
        self._known[path] = {note: value for note, value in read.items() if value is not None}

    def remember(self, who: str, settings: Mapping[str, Setting]) -> None:
        """Remembers `settings` of what has no file yet."""
        self._known[who] = {note: setting.value for note, setting in settings.items()}

    def say_others(self, now: Mapping[str, Setting], doing: str) -> None:
        """Says once of each adapter that it was trained under other settings than those `now`."""
        for who, trained in list(self._known.items()):
            others = [note for note, (_, value) in now.items() if trained.get(note, value) != value]
            if others:
                here = " ".join(str(now[note]) for note in others)
                theirs = " ".join(str(Setting(now[note].key, trained[note])) for note in others)
                say(f"WARNING: {doing} under {here}, which {who} was not trained under: give {theirs}")
                del self._known[who]


def _number(text: str) -> float | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, int | float) else None  # bool is an int
