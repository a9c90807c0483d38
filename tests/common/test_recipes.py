"""Recipes of several verbs: checked as a whole, run in order, gone on with where they stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign import cli
from diffalign.common import files

RECIPE = """
given:
  prompts: null
  out: {out}
  seeds: [0]
steps:
  - generate:
      model: {{name: sdxl, path: {sdxl}}}
      prompts: ${{given.prompts}}
      seeds: ${{given.seeds}}
      num_inference_steps: 1
      height: 32
      width: 32
      out: ${{given.out}}/sdxl
  - generate:
      model: {{name: sd, path: {sd}}}
      prompts: ${{given.prompts}}
      seeds: ${{given.seeds}}
      num_inference_steps: 1
      height: 32
      width: 32
      out: ${{given.out}}/sd
  - score:
      images: ["${{given.out}}/sdxl", "${{given.out}}/sd"]
      scorers: [scene]
      out: ${{given.out}}/scores
  - pair: {{images: "${{given.out}}/scores", how: lists, ties: soft, out: "${{given.out}}/lists"}}
"""


def write(folder: Path, sdxl: str, sd: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(out=folder / "runs", sdxl=sdxl, sd=sd))
    return path


def test_lists_from_two_generators(
    tiny_sdxl: str, tiny_sd: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both number their pictures alike; the lists hold a picture of each and say whose it is."""
    recipe = write(tmp_path, tiny_sdxl, tiny_sd)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle on a white background\na blue square on a black background\n")
    words = ["--config", str(recipe), f"prompts={prompts}", "seeds=[0,1]"]
    assert cli.main(words) == 0
    lists = files.read_jsonl(tmp_path / "runs" / "lists" / "preferences.jsonl")
    assert [row["prompt"] for row in lists] == prompts.read_text().splitlines()
    for row in lists:
        assert [c["id"].split("/")[0] for c in row["candidates"]] == ["sdxl", "sdxl", "sd", "sd"]
        assert all((tmp_path / "runs" / "lists" / c["image"]).is_file() for c in row["candidates"])
        assert all("scene" in c["scores"] for c in row["candidates"])
    before = (tmp_path / "runs" / "lists" / "preferences.jsonl").read_bytes()
    capsys.readouterr()
    assert cli.main(words) == 0
    told = capsys.readouterr().err
    assert "step 1 of 4: generate" in told and "is complete: 4 pictures, nothing to do" in told
    assert (tmp_path / "runs" / "lists" / "preferences.jsonl").read_bytes() == before


def test_a_dry_run_prints_every_step_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path, "somewhere", "elsewhere")
    assert cli.main(["--config", str(recipe), "--dry-run", "prompts=a cat"]) == 0
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if line.startswith("# step")] == [
        "# step 1: generate", "# step 2: generate", "# step 3: score", "# step 4: pair",
    ]  # fmt: skip
    assert "path: somewhere" in told and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "words", "told"),
    [
        (("", ""), [], "recipe.yaml needs prompts=..."),
        (("", ""), ["prompt=x"], "unknown key of .*recipe.yaml 'prompt': did you mean 'prompts'"),
        (("- pair:", "- par:"), ["prompts=x"], "unknown verb of step 4 'par': did you mean 'pair'"),
        (("how: lists", "how: lost"), ["prompts=x"], r"step 4 \(pair\): .*'lost'"),
        (("seeds: ${", "sedes: ${"), ["prompts=x"], r"step 1 \(generate\): .*'sedes': did you mean 'seeds'"),
        (("steps:", "stops:"), ["prompts=x"], "has no steps"),
        (("${given.prompts}", "${given.nothing}"), ["prompts=x"], "nothing"),
        (("given:", "given: [a]\nother:"), ["prompts=x"], "given is not a mapping"),
        (("", ""), ["prompts=[a"], "recipe.yaml: "),
        (("", ""), ["prompts=${given.nothing}"], "nothing"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    change: tuple[str, str], words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path, "somewhere", "elsewhere")
    recipe.write_text(recipe.read_text().replace(*change))
    assert cli.main(["--config", str(recipe), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    import re

    assert re.search(told, lines[0]), lines[0]
    assert not (tmp_path / "runs").exists()


def test_no_such_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: --config nowhere.yaml: no such file\n"
