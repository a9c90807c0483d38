"""The output folder of a stage: it belongs to one run from its first file on."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.common import files, manifest
from diffalign.common.errors import UserError
from diffalign.stages import _folder
from diffalign.stages._run import claim_folder, earlier_run, refuse_unfinished

STAGES = ("check", "generate", "score", "pair", "evaluate")


@pytest.mark.parametrize("stage", STAGES)
def test_an_unfinished_training_run_is_left_alone(stage: str, tmp_path: Path) -> None:
    """No stage writes into it, and afterwards the run still goes on."""
    recipe = {"num_steps": 4, "optimizer": {"lr": 0.1}}
    identity = _folder.claim(tmp_path, recipe, "base", None, {})
    for same in (None, {"seeds": [0]}):
        with (
            pytest.raises(UserError, match="holds the output of 'train': choose another folder"),
            claim_folder(tmp_path, stage=stage, recipe={}, same=same),
        ):
            raise AssertionError("the folder was given away")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.json"]
    assert _folder.finished(tmp_path, recipe) is None
    assert _folder.claim(tmp_path, recipe, "base", None, {}) == identity


@pytest.mark.parametrize("stage", STAGES)
def test_training_leaves_the_folder_of_a_killed_stage_alone(stage: str, tmp_path: Path) -> None:
    with claim_folder(tmp_path / "out", stage=stage, recipe={"seed": 1}):
        pass
    for ask in (
        lambda: _folder.finished(tmp_path / "out", {}),
        lambda: _folder.claim(tmp_path / "out", {}, "base", None, {}),
    ):
        with pytest.raises(UserError, match=f"holds the output of '{stage}'"):
            ask()


def test_a_stage_without_resume_takes_its_own_folder_again(tmp_path: Path) -> None:
    for seed in (1, 2):
        with claim_folder(tmp_path, stage="check", recipe={"seed": seed}):
            pass
        assert files.read_json(tmp_path / "recipe.json")["recipe"] == {"seed": seed}


@pytest.mark.parametrize("error", [UserError("x"), RuntimeError("CUDA out of memory")])
def test_an_error_before_the_first_row_leaves_no_new_folder(error: Exception, tmp_path: Path) -> None:
    for name, kept in (("rows.jsonl", True), ("picture.png", False)):
        with (
            pytest.raises(type(error)),
            claim_folder(tmp_path / name, stage="score", recipe={}, same={}) as out,
        ):
            (out / name).write_text("")
            raise error
        assert (tmp_path / name).exists() == kept


def test_a_folder_without_a_manifest_is_not_complete(tmp_path: Path) -> None:
    refuse_unfinished(tmp_path)  # somebody's own pictures
    with claim_folder(tmp_path, stage="generate", recipe={}, same={}):
        with pytest.raises(UserError, match=r"is not complete: repeat the 'generate' that writes it"):
            refuse_unfinished(tmp_path)
        manifest.write_manifest(tmp_path, stage="generate", recipe={})
    refuse_unfinished(tmp_path)


def test_a_report_that_is_replaced_has_no_manifest_meanwhile(tmp_path: Path) -> None:
    manifest.write_manifest(tmp_path, stage="evaluate", recipe={})
    with claim_folder(tmp_path, stage="evaluate", recipe={}):
        assert manifest.read_manifest(tmp_path) is None


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file: give a folder"):
        earlier_run(tmp_path / "file", "check")
    with pytest.raises(UserError, match=r"out=.*inside: .*file is a file: give a folder"):
        earlier_run(tmp_path / "file" / "inside", "check")
