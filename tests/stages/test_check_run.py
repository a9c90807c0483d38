"""`check run=FOLDER` reads the folder of a real run, finished or not, and says what its numbers say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffalign import cli
from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.stages._check_run import check_run
from tests.pickapic_files import jpeg, row, write


@pytest.fixture(scope="module")
def finished(tiny_sdxl: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of Diffusion-DPO, a row each."""
    folder = tmp_path_factory.mktemp("run")
    rows = [row(f"a {k}", jpeg(60 + 20 * k, (32, 32)), jpeg(40 + k, (32, 32)), (1.0, 0.0)) for k in range(4)]
    write(folder / "train-00000-of-00001.parquet", rows)
    words = ["model=sdxl", f"model.path={tiny_sdxl}", "data=pickapic", f"data.path={folder}", "num_steps=4"]
    more = ["objective.beta=2000", "adapter.rank=2", "loader.batch_size=2", "log_every=1"]
    assert cli.main(["train", *words, *more, "preprocess.resolution=32", f"out={folder / 'out'}"]) == 0
    return folder / "out"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def spoil(run: Path, **values: Any) -> None:
    rows = files.read_jsonl(run / "metrics.jsonl")
    files.write_jsonl(run / "metrics.jsonl", [{**row, **values} for row in rows])


def test_a_run_with_nothing_wrong_says_so_with_its_numbers(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(run, accuracy=0.7)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    report = check_run(str(run), json=False)
    assert (report["step"], report["num_steps"], report["finished"]) == (4, 4, True)
    assert report["findings"] == []
    assert report["fine"]["step 0"] == ("loss 0.693147 at step 0, 0.693147 expected; largest |logit| 0")
    assert report["not_measured"]["memorising"] == "needs pairs and `validation.share`"
    said = capsys.readouterr().out
    assert f"{run}: step 4 of 4, finished" in said and "nothing is wrong by these numbers:" in said
    assert "  skipped steps         skipped_steps 0 of 4" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_goes_wrong_is_told_what_to_do_while_it_is_at_work(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(run, saturated=0.5, err_w=0.2, err_w_vs_ref=0.1, err_l_vs_ref=0.2)
    (run / "manifest.json").unlink()
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "ki')  # a row that is being written
    report = check_run(str(run), json=False)
    assert [finding["pattern"] for finding in report["findings"]] == ["winner error rises", "saturation"]
    said = capsys.readouterr().out
    assert "step 4 of 4, not finished" in said and "in order:" in said
    assert "  seen  saturated 0.50 at step 4" in said
    assert "  do    lower objective.beta or the learning rate (here objective.beta=2000.0" in said


def test_json_is_the_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(run, saturated=0.5)
    report = check_run(str(run), json=True)
    assert json.loads(capsys.readouterr().out) == report
    assert set(report["findings"][0]) == {"pattern", "evidence", "meaning", "remedy"}


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is no folder: give the out= folder of a train run"):
        check_run(str(tmp_path / "nowhere"), json=False)
    with pytest.raises(UserError, match=r"has no recipe.json"):
        check_run(str(tmp_path), json=False)
    (run / "metrics.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match=r"row 1 has no step and kind"):
        check_run(str(run), json=False)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no row in metrics.jsonl yet"):
        check_run(str(run), json=False)
    files.write_json(run / "recipe.json", {"stage": "score", "recipe": {}})
    with pytest.raises(UserError, match=r"holds the output of 'score'"):
        check_run(str(run), json=False)
    files.write_json(run / "recipe.json", [])
    with pytest.raises(UserError, match=r"holds the output of 'None'"):
        check_run(str(run), json=False)
