"""What every test shares: warnings are errors except those on the commented list."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# Set before any library is imported: the default ring uses no network, and one thread gives equal bits.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ALLOWED = Path(__file__).with_name("allowed_warnings.txt")


def allowed_warnings() -> list[tuple[str, str]]:
    """Returns (category, message regex) of every Python warning on the list."""
    lines = [line.strip() for line in ALLOWED.read_text(encoding="utf-8").splitlines()]
    entries = [line.split(":", 2) for line in lines if line.startswith("warning:")]
    return [(category, message) for _, category, message in entries]


def pytest_configure(config: pytest.Config) -> None:
    """Adds the list to pytest's filters; later filters are stronger than the `error` of pyproject.toml."""
    for category, message in allowed_warnings():
        config.addinivalue_line("filterwarnings", f"ignore:{message}:{category}")


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Stable Diffusion pipeline of the smallest size; read it, never write to it."""
    from diffalign.models.sd import Plugin

    return Plugin.tiny(tmp_path_factory.mktemp("tiny") / "sd").path


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random SDXL pipeline of the smallest size; read it, never write to it."""
    from diffalign.models.sdxl import Plugin

    return Plugin.tiny(tmp_path_factory.mktemp("tiny") / "sdxl").path


@pytest.fixture
def part_loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[str]]]:
    """Each part of a base that is loaded, with those that are in memory then; `clear()` for a fresh start."""
    from diffalign.models._parts import Parts

    seen: list[tuple[str, set[str]]] = []
    load = Parts._load

    def noting(parts: Parts, name: str, source: Any) -> Any:
        seen.append((name, set(parts._loaded)))
        return load(parts, name, source)

    monkeypatch.setattr(Parts, "_load", noting)
    return seen
