"""Verbs in processes that need not talk: `generate` shares its batches, others leave all to the first."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from diffalign import cli
from diffalign.common import files
from diffalign.common.manifest import read_manifest
from diffalign.models.sdxl import SDXL
from diffalign.stages._shares import first_of_all
from tests.pickapic_files import jpeg, row, write
from tests.two_processes import two_processes

PROMPTS = "[a cat,a dog,a cube,a ring,a lamp]"


def words(model: str, out: Path) -> list[str]:
    """Five prompts in three batches, the last of one picture."""
    drawn = ["num_inference_steps=2", "batch_size=2", "device=cpu", f"prompts={PROMPTS}"]
    return ["generate", "model=sdxl", f"model.path={model}", f"out={out}", *drawn]


@pytest.fixture(scope="module")
def alone(tiny_sdxl: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process draws."""
    out = tmp_path_factory.mktemp("drawn") / "alone"
    assert cli.main(words(tiny_sdxl, out)) == 0
    return out


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "images").iterdir()}


def as_process(monkeypatch: pytest.MonkeyPatch, index: int, count: int) -> None:
    monkeypatch.setenv("RANK", str(index))
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setattr("diffalign.common.progress._silent", False)


def test_two_processes_at_once_draw_the_pictures_of_one(tiny_sdxl: str, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "shared"
    for ended in two_processes(words(tiny_sdxl, out), tmp_path / "kept"):
        assert ended.code == 0, ended.said[-3000:]
    assert pictures(out) == pictures(alone)
    assert (out / "images.jsonl").read_bytes() == (alone / "images.jsonl").read_bytes()
    assert read_manifest(out)["counts"] == {"prompts": 5, "seeds": 1, "pictures": 5}
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        *("images", "images.jsonl", "manifest.json", "recipe.json")
    }


def test_each_draws_whole_batches_and_the_last_one_joins_them(
    tiny_sdxl: str, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "shared"
    as_process(monkeypatch, 1, 2)
    assert cli.main(words(tiny_sdxl, out)) == 0
    assert set(pictures(out)) == {"prompt-00002-s0.png", "prompt-00003-s0.png"}
    assert read_manifest(out) is None and not (out / "images.jsonl").exists()
    stamps = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    as_process(monkeypatch, 0, 2)
    assert cli.main(words(tiny_sdxl, out)) == 0
    assert pictures(out) == pictures(alone)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps  # none is drawn twice
    assert files.read_jsonl(out / "images.jsonl") == files.read_jsonl(alone / "images.jsonl")


def test_a_share_that_was_killed_goes_on_as_one_process(
    tiny_sdxl: str, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within its second batch: a picture without its row, a row torn, a file half-written."""
    out = tmp_path / "shared"
    as_process(monkeypatch, 0, 2)
    assert cli.main(words(tiny_sdxl, out)) == 0
    part = out / "parts" / "00000-of-00002.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:2]) + lines[2][:30])
    (out / "images" / ".tmp-00000000-prompt-00003-s0.png").write_bytes(b"half")
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert cli.main(words(tiny_sdxl, out)) == 0
    assert pictures(out) == pictures(alone) and not (out / "parts").exists()
    assert files.read_jsonl(out / "images.jsonl") == files.read_jsonl(alone / "images.jsonl")
    assert read_manifest(out)["counts"]["found"] == 2


def test_a_removed_picture_comes_back_from_the_process_that_owns_it(
    tiny_sdxl: str,
    alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = Path(shutil.copytree(alone, tmp_path / "shared"))
    as_process(monkeypatch, 0, 2)
    assert cli.main(words(tiny_sdxl, out)) == 0
    assert "is complete: 5 pictures" in capsys.readouterr().err and not (out / "parts").exists()
    (out / "images" / "prompt-00002-s0.png").unlink()  # of the other process
    assert cli.main(words(tiny_sdxl, out)) == 0
    assert read_manifest(out) is None
    as_process(monkeypatch, 1, 2)
    assert cli.main(words(tiny_sdxl, out)) == 0
    assert pictures(out) == pictures(alone) and read_manifest(out) is not None
    assert (out / "images.jsonl").read_bytes() == (alone / "images.jsonl").read_bytes()


def test_an_interrupted_share_leaves_the_others_what_it_drew(
    tiny_sdxl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, draw = tmp_path / "shared", SDXL.generate

    def second_is_interrupted(*arguments: object, **named: object) -> object:
        if any((out / "images").iterdir()):
            raise KeyboardInterrupt
        return draw(*arguments, **named)

    as_process(monkeypatch, 0, 2)
    monkeypatch.setattr(SDXL, "generate", second_is_interrupted)
    assert cli.main(words(tiny_sdxl, out)) == 130
    assert set(pictures(out)) == {"prompt-00000-s0.png", "prompt-00001-s0.png"}
    assert len(files.read_jsonl(out / "parts" / "00000-of-00002.jsonl")) == 2


def test_a_verb_that_does_not_share_is_left_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    write(path, [row("a", jpeg(60, (32, 32)), jpeg(90, (32, 32)), (1.0, 0.0))])
    check = ["check", "data=pickapic", f"data.path={path}", f"out={tmp_path / 'checked'}"]
    as_process(monkeypatch, 1, 2)
    assert cli.main(check) == 0
    said = capsys.readouterr()
    assert said.out == "" and said.err == "check does not share its work: the first process does it\n"
    assert not (tmp_path / "checked").exists()
    as_process(monkeypatch, 0, 2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(check) == 0
    assert "usable pairs" in capsys.readouterr().out and (tmp_path / "checked" / "check.json").exists()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("0", "2", "0")


def test_the_first_process_knows_of_no_other_while_it_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what it calls would wait for processes that have left."""
    as_process(monkeypatch, 0, 2)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ZeroDivisionError), first_of_all() as works:
        assert works and "WORLD_SIZE" not in os.environ and "MASTER_PORT" not in os.environ
        raise ZeroDivisionError
    assert os.environ["WORLD_SIZE"] == "2" and os.environ["MASTER_PORT"] == "1"


def test_a_recipe_of_several_verbs_is_for_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "street.yaml").write_text("steps: []\n")
    as_process(monkeypatch, 0, 2)
    assert cli.main(["--config", str(tmp_path / "street.yaml")]) == 2
    assert "error: a recipe of several verbs runs in one process" in capsys.readouterr().err
