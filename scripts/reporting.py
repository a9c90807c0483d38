"""What the reports of the acceptance runs share: their head, and the table of bars."""

from __future__ import annotations

import os

import torch

from diffalign.common.manifest import versions

LIBRARIES = ("python", "torch", "diffusers", "transformers", "peft", "accelerate")


def head(title: str, command: str) -> list[str]:
    """Title, command, machine and versions, as lines of Markdown."""
    found = versions()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    libraries = ", ".join(f"{name} {found[name]}" for name in LIBRARIES if name in found)
    machine = f"Machine: {os.cpu_count()} CPU cores, {gpu}. {libraries}."
    return [f"# {title}", "", f"`{command}`", "", machine, ""]


def bars(checks: dict[str, bool]) -> list[str]:
    """The table of bars, each met or not, as lines of Markdown."""
    rows = [f"| {name} | {'yes' if met else 'NO'} |" for name, met in checks.items()]
    return ["| bar | met |", "|---|---|", *rows, ""]
