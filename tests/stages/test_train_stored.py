"""Reference errors that a sweep computes once: found again, equal, refused where they are of another run."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign import cli
from diffalign.models._lora_files import WEIGHTS_FILE
from diffalign.objectives.diffusion_dpo import Plugin
from diffalign.training import stored
from tests.pickapic_files import jpeg, row, write

LIGHT, DARK = jpeg(200, (32, 32)), jpeg(40, (32, 32))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    write(path, [row(f"a {name}", LIGHT, DARK, (1.0, 0.0)) for name in "abcdef"])
    return path


def words(base: str, pairs: Path, out: Path, *more: str) -> list[str]:
    return [
        *("train", "model=sdxl", f"model.path={base}", "data=pickapic", f"data.path={pairs}", f"out={out}"),
        *("objective=dpo", "adapter.rank=2", "optimizer.lr=1e-2", "num_steps=3", "accumulation=2", *more),
    ]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[stored.StoredReference]:
    """Every store's feed, with what was asked and found."""
    made: list[stored.StoredReference] = []
    init = stored.StoredReference.__init__

    def watched(self: stored.StoredReference, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(stored.StoredReference, "__init__", watched)
    return made


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / WEIGHTS_FILE)


def test_a_sweep_computes_them_once_and_learns_the_same(
    tiny_sdxl: str,
    pairs: Path,
    tmp_path: Path,
    counts: list[stored.StoredReference],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three steps of two micro-batches: 6 errors are computed, then found by a run with another beta."""
    store = f"reference.store={tmp_path / 'store'}"
    beta = "objective.beta=2000"
    assert cli.main(words(tiny_sdxl, pairs, tmp_path / "first", store)) == 0
    assert cli.main(words(tiny_sdxl, pairs, tmp_path / "second", store, beta)) == 0
    assert [(feed.asked, feed.found) for feed in counts] == [(6, 0), (6, 6)]
    said = capsys.readouterr().err
    assert "reference.store: 6 of 6 errors were known" in said
    assert f"written: {tmp_path / 'second' / 'adapter'}" in said
    assert cli.main(words(tiny_sdxl, pairs, tmp_path / "plain", beta)) == 0
    plain, found = adapter(tmp_path / "plain"), adapter(tmp_path / "second")
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    assert not all(torch.equal(plain[name], tensor) for name, tensor in adapter(tmp_path / "first").items())


def test_a_run_that_goes_on_may_name_another_store(tiny_sdxl: str, pairs: Path, tmp_path: Path) -> None:
    """The errors are the same numbers wherever they come from: the store is no part of what a run is."""
    out = tmp_path / "run"
    assert cli.main(words(tiny_sdxl, pairs, out, f"reference.store={tmp_path / 'store'}")) == 0
    assert cli.main(words(tiny_sdxl, pairs, out)) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("seed=1",), "holds the errors of another reference or of other draws (seed changed)"),
        (("timesteps.low=100",), "(timesteps changed)"),
        (("loader.posterior=mean",), "(posterior changed)"),
        (("objective=sft",), "objective=sft has no reference; leave it out"),
        (("reference.mode=ema",), "reference.store keeps errors of a frozen reference, not of mode=ema"),
    ],
)
def test_refusals(
    more: tuple[str, ...],
    message: str,
    tiny_sdxl: str,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = f"reference.store={tmp_path / 'store'}"
    assert cli.main(words(tiny_sdxl, pairs, tmp_path / "first", store, "num_steps=1")) == 0
    assert cli.main(words(tiny_sdxl, pairs, tmp_path / "second", store, *more)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_errors_that_are_no_longer_those_of_the_reference_are_refused(
    tiny_sdxl: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that both sides share would cancel; here the first is 1 and the second 1/2."""
    folder = tmp_path / "store"
    store = f"reference.store={folder}"
    assert cli.main(words(tiny_sdxl, pairs, tmp_path / "first", store, "num_steps=1")) == 0
    with sqlite3.connect(folder / stored.FILE) as database:
        database.execute("UPDATE errors SET errors = ?", (torch.tensor([1.0, 0.5]).numpy().tobytes(),))
    assert cli.main(words(tiny_sdxl, pairs, tmp_path / "second", store)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "policy and reference differ before the first step" in said and "another reference.store" in said


def test_an_objective_with_draws_of_its_own_is_told(
    tiny_sdxl: str,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute = Plugin.compute

    def own(self: Plugin, denoiser: object, batch: object, draws: object, shared: object = None) -> object:
        return compute(self, denoiser, batch, replace(draws, known=None), shared)  # type: ignore

    monkeypatch.setattr(Plugin, "compute", own)
    store = f"reference.store={tmp_path / 'store'}"
    assert cli.main(words(tiny_sdxl, pairs, tmp_path / "run", store)) == 2
    assert "makes draws of its own, whose errors are not stored" in capsys.readouterr().err
