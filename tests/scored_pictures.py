"""Scored pictures as `score` writes them, and `pair` over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffalign.common.config import load_recipe
from diffalign.stages.pair import pair


def picture(name: str, prompt: str, value: float | None, **fields: Any) -> dict[str, Any]:
    """One row as `score` writes it."""
    return {
        "id": name,
        "image": f"pictures/{name}.jpg",
        "prompt": prompt,
        "prompt_id": f"id-of-{prompt}",
        "seed": int(name[1:]),
        "model": "base",
        "width": 16,
        "meta": {"Category": "Animals"},
        "scores": {"clip": {"value": value, "scale": "cosine", "version": "1", "parts": {"x": 2}}},
        "errors": {},
        **fields,
    }


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes a scores.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "scores.jsonl"


def run(tmp_path: Path, *words: str) -> list[tuple[str, float]]:
    """(id, label of the first candidate) of each written preference."""
    recipe = load_recipe(pair, None, [f"images={tmp_path / 'scored'}", f"out={tmp_path / 'pairs'}", *words])
    path = pair(**recipe.arguments)
    assert path == tmp_path / "pairs" / "preferences.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(row["candidates"][0]["label"] + row["candidates"][1]["label"] == 1.0 for row in rows)
    return [(row["id"], row["candidates"][0]["label"]) for row in rows]


def manifest(tmp_path: Path) -> dict[str, Any]:
    """What `run` left beside them."""
    found: dict[str, Any] = json.loads((tmp_path / "pairs" / "manifest.json").read_text())
    return found
