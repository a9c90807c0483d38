"""The output folder of a stage: it belongs to one run from its first file on."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.common import files, manifest
from diffalign.common.errors import UserError
from diffalign.stages import _folder
from diffalign.stages._run import claim_folder, earlier_run, refuse_other_run, refuse_unfinished

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


def stripped(folder: Path, *path: str) -> None:
    """Takes a key out of what decides the run in a folder: it began before the key was there."""
    said = files.read_json(folder / "recipe.json")
    inner = said["decides"]
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    files.write_json(folder / "recipe.json", said)


@pytest.mark.parametrize(
    ("path", "now", "message"),
    [
        (("limit",), {"limit": None}, None),
        (("group",), {"group": False}, None),
        (("group",), {"group": True}, r"\(group was False, now True\)"),
        (("scorers", "jpeg", "quality"), {}, None),
        (
            ("scorers", "jpeg", "quality"),
            {"scorers": {"jpeg": {"quality": 90}}},
            r"\(scorers\.jpeg\.quality was 95, now 90\)",
        ),
        (
            ("scorers", "jpeg"),
            {"scorers": {"jpeg": {}}},
            r"\(scorers\.jpeg was not given, now {'",
        ),
        (("scorers",), {"scorers": {"jpeg": {}}}, r"\(scorers was not given, now {'jpeg'"),
        (("strange",), {"strange": 1}, r"\(strange was not given, now 1\)"),
    ],
)
def test_a_key_that_is_new_since_had_its_default(
    path: tuple[str, ...], now: dict[str, object], message: str | None, tmp_path: Path
) -> None:
    same = {
        "scorers": {"jpeg": {"quality": 95}},
        "limit": None,
        "group": False,
        "strange": 1,
        "batch_size": 4,
    }
    with claim_folder(tmp_path, stage="score", recipe={}, same=same):
        pass
    stripped(tmp_path, *path)
    asked = claim_folder(tmp_path, stage="score", recipe={}, same={**same, **now})
    if message is None:
        with asked:
            pass
        return
    with pytest.raises(UserError, match=f"another recipe {message}"), asked:
        raise AssertionError("the folder was given away")


def test_data_that_changed_is_named_without_its_numbers(tmp_path: Path) -> None:
    data = {"ties": "drop", "path": {"folder": {"name": "sha256=a"}, "file": {"size": 1, "sha256": "b"}}}
    with claim_folder(tmp_path, stage="pair", recipe={}, same={"data": data}):
        pass
    for now, message in (
        ({**data, "ties": "soft"}, r"data\.ties was drop, now soft"),
        ({**data, "path": {**data["path"], "folder": {"name": "sha256=c"}}}, r"data\.path\.folder changed"),
        ({**data, "path": {**data["path"], "file": {"size": 2, "sha256": "d"}}}, r"data\.path\.file changed"),
    ):
        asked = claim_folder(tmp_path, stage="pair", recipe={}, same={"data": now})
        with pytest.raises(UserError, match=rf"another recipe \({message}\)"), asked:
            raise AssertionError("the folder was given away")


def test_a_new_key_of_a_section_had_its_default(tmp_path: Path) -> None:
    with claim_folder(tmp_path, stage="check", recipe={}, same={"filter": {"min_side": 8}}):
        pass
    with claim_folder(
        tmp_path, stage="check", recipe={}, same={"filter": {"min_side": 8, "models": [], "same_size": False}}
    ):
        pass
    now = {"filter": {"min_side": 8, "models": ["sdxl"]}}
    asked = claim_folder(tmp_path, stage="check", recipe={}, same=now)
    with pytest.raises(UserError, match=r"filter\.models was \[\], now \['sdxl'\]"), asked:
        raise AssertionError("the folder was given away")


def test_a_key_that_is_gone_is_named(tmp_path: Path) -> None:
    with claim_folder(
        tmp_path, stage="score", recipe={}, same={"colour": "red", "scorers": {"gone": {"x": 1}}}
    ):
        pass
    message = r"another recipe \(colour was red, now not given\)"
    with (
        pytest.raises(UserError, match=message),
        claim_folder(tmp_path, stage="score", recipe={}, same={"scorers": {"gone": {"x": 1}}}),
    ):
        raise AssertionError("the folder was given away")


def test_a_run_that_decides_its_rows_takes_the_folder_of_a_report(tmp_path: Path) -> None:
    with claim_folder(tmp_path, stage="check", recipe={}):
        pass
    with claim_folder(tmp_path, stage="check", recipe={}, same={"dedup": "exact"}):
        pass
    assert files.read_json(tmp_path / "recipe.json")["decides"] == {"dedup": "exact"}


@pytest.mark.parametrize("name", ["recipe.json", "manifest.json"])
@pytest.mark.parametrize("text", ["[]", "null", '{"name": "my web app"}'])
def test_somebody_elses_file_of_that_name(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"holds a {name} that is none of ours: choose another folder"):
        earlier_run(tmp_path, "score")
    refuse_unfinished(tmp_path)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file: give a folder"):
        earlier_run(tmp_path / "file", "check")
    with pytest.raises(UserError, match=r"out=.*inside: .*file is a file: give a folder"):
        earlier_run(tmp_path / "file" / "inside", "check")


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"model": "ab" * 20}, {"model": "cd" * 20}),
        ({"model": {"files": {"a": {"size": 1}}}}, {"model": {"files": {"a": {"size": 2}}}}),
        ({"model": [{"files": {}}]}, {"model": [{"sha256": "ab"}]}),
    ],
)
def test_hashes_are_not_repeated(before: dict[str, object], now: dict[str, object], tmp_path: Path) -> None:
    with claim_folder(tmp_path / "out", stage="generate", recipe={}, same=before):
        pass
    with pytest.raises(UserError, match=r"holds a run of another recipe \(model changed\): choose"):
        refuse_other_run(tmp_path / "out", "generate", now)
