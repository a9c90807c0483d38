"""How a cache is written: streamed, by several processes, gone on with, onto a disk that may be full."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import cli
from diffalign.common import files
from diffalign.common.draws import seed_of
from diffalign.common.errors import UserError
from diffalign.data import cache_packs
from diffalign.data.cache import open_cache
from diffalign.data.cache_packs import PackSpec, PackWriter, packs_of, without_hidden, write_tensors
from diffalign.data.encoding import fitter
from diffalign.data.pictures import ImageRef
from diffalign.data.records import Candidate, Record
from diffalign.data.select import UsableGroups
from diffalign.data.specs import PreprocessSpec
from diffalign.models.sdxl import Plugin as SDXL
from tests.pickapic_files import jpeg, row, write
from tests.tiny_training import picture

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def records(folder: Path, rows: Iterable[tuple[str, tuple[int, ...]]], **changes: Any) -> Path:
    """A file of labelled pairs, each a prompt and the numbers of its pictures."""
    found = []
    for number, (prompt, pictures) in enumerate(rows):
        for one in pictures:
            if not (folder / f"{one}.png").exists():
                folder.mkdir(parents=True, exist_ok=True)
                picture(one).save(folder / f"{one}.png")
        candidates = [{"image": f"{one}.png", "label": 1.0 - place} for place, one in enumerate(pictures)]
        found.append({"id": f"r{number}", "prompt": prompt, "candidates": candidates})
    files.write_jsonl(folder / "preferences.jsonl", found)
    return folder


def words(base: str, data: Path, out: Path, *more: str) -> list[str]:
    return [
        "cache",
        "model=sdxl",
        f"model.path={base}",
        "data=jsonl",
        f"data.path={data}",
        f"out={out}",
        *more,
    ]


def error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def stop_after(packs: int, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """Runs the stage with packs of one row until so many are written."""
    write_jsonl, left = files.write_jsonl, iter(range(packs))

    def one_more(path: Path, rows: Any) -> Path:
        if next(left, None) is None:
            raise UserError("no more")
        return write_jsonl(path, rows)

    with monkeypatch.context() as patch:
        patch.setattr(cache_packs, "MAX_ROWS", 1)
        patch.setattr(files, "write_jsonl", one_more)
        assert cli.main(arguments) == 2


def test_a_hub_data_set_is_streamed_and_nothing_of_it_stored(
    tiny_sdxl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streaming reader of `datasets` on a folder that the hub's name stands for."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rows = [row(f"a {name}", jpeg(10 * k, (32, 32)), jpeg(99, (32, 32))) for k, name in enumerate("bcd", 1)]
    hub = tmp_path / "hub"
    write(hub / "train-00000-of-00001.parquet", [*rows, row("broken", b"no picture")])
    load, asked = datasets.load_dataset, []

    def from_folder(path: str, *, revision: str, **options: Any) -> Any:
        asked.append((path, revision, options["streaming"]))
        return load(str(hub), **options)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    monkeypatch.chdir(tmp_path)
    common = ["cache", "model=sdxl", f"model.path={tiny_sdxl}", "data=pickapic", "data.max_bad_share=0.5"]
    named = ["data.path=owner/pick", "data.split=train", f"data.revision={COMMIT}"]
    assert cli.main([*common, *named, "out=streamed"]) == 0
    assert set(asked) == {("owner/pick", COMMIT, True)}
    assert cli.main([*common, f"data.path={hub}", "out=local"]) == 0
    said = files.read_json("streamed/manifest.json")
    assert said["inputs"] == {"pickapic": {"name": f"hub:owner/pick@{COMMIT} split=train"}}
    assert said["dropped"] == {"corrupt_image": ["train:3"]}
    one, other = (open_cache(name).choose()[0] for name in ("streamed", "local"))
    assert [example.id for example in one.examples] == ["train:0", "train:1", "train:2"]
    assert [example.prompt for example in one.examples] == ["a b", "a c", "a d"]
    assert all(torch.equal(one.latents(image), other.latents(image)) for image in range(4))
    assert list(tmp_path.rglob("*.parquet")) == [hub / "train-00000-of-00001.parquet"]


def test_a_picture_under_two_prompts_of_two_processes_is_kept_once(
    tiny_sdxl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each encodes all four, the index names the first in the order of the source; leftovers of kills go."""
    prompts = {rank: next(f"p{n}" for n in range(99) if seed_of(f"p{n}") % 2 == rank) for rank in (0, 1)}
    rows = [(prompts[1], (0, 1)), (prompts[0], (1, 2)), (prompts[1], (2, 3)), (prompts[0], (3, 0))]
    data, out, alone = records(tmp_path / "data", rows), tmp_path / "two", tmp_path / "alone"
    assert cli.main(words(tiny_sdxl, data, alone, "dtype=fp32")) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    capsys.readouterr()
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert cli.main(words(tiny_sdxl, data, out, "dtype=fp32")) == 0
        if rank == 0:
            said = capsys.readouterr().err
            assert "this process is done, 1 of 2 are" in said and not (out / "manifest.json").exists()
            (out / ".tmp-12345678-00001-of-00002-000000.safetensors").write_bytes(b"half")
    assert "at most" not in capsys.readouterr().err  # the first process has said it
    facts = open_cache(out).facts
    assert (facts["pictures"], facts["pictures_encoded"], facts["prompts"]) == (4, 8, 2)
    assert not list(out.glob(".tmp-*"))
    ours, theirs = open_cache(out).choose()[0], open_cache(alone).choose()[0]
    assert [e.images for e in ours.examples] == [e.images for e in theirs.examples]
    assert [e.images for e in ours.examples] == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert all(torch.allclose(ours.latents(k), theirs.latents(k), atol=1e-5) for k in range(4))
    places = open_cache(out).tables["picture_places"]
    assert [facts["packs"][pack][:5] for pack in places[:, 0]] == ["00001", "00001", "00000", "00001"]


def test_data_that_change_between_two_runs_are_refused(
    tiny_sdxl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture's bytes, the file of records, or the number of processes; put back, the run goes on."""
    data = records(tmp_path / "data", [(f"p{n}", (2 * n, 2 * n + 1)) for n in range(4)])
    arguments = words(tiny_sdxl, data, tmp_path / "out")
    stop_after(2, monkeypatch, arguments)
    before = (data / "3.png").read_bytes(), (data / "preferences.jsonl").read_bytes()
    capsys.readouterr()
    picture(77).save(data / "3.png")
    assert cli.main(arguments) == 2
    assert "another recipe (source.jsonl pictures" in error(capsys)
    (data / "3.png").write_bytes(before[0])
    (data / "preferences.jsonl").write_bytes(before[1].replace(b'"p3"', b'"p4"'))
    assert cli.main(arguments) == 2
    assert "another recipe (source.jsonl:preferences.jsonl changed)" in error(capsys)
    (data / "preferences.jsonl").write_bytes(before[1])
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert cli.main(arguments) == 2
    assert "processes was 1, now 2" in error(capsys)
    assert cli.main([*arguments, "preprocess.batch_size=3"]) == 0  # of encoding, after a memory that was full
    assert len(open_cache(tmp_path / "out")) == 4


@pytest.mark.parametrize("kind", ["jsonl", "safetensors"])
def test_a_pack_that_is_missing_is_told_and_not_written_over(
    kind: str, tiny_sdxl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    data = records(tmp_path / "data", [(f"p{n}", (2 * n, 2 * n + 1)) for n in range(3)])
    arguments = words(tiny_sdxl, data, tmp_path / "out")
    stop_after(2, monkeypatch, arguments)
    (tmp_path / "out" / f"00000-of-00001-000000.{kind}").unlink()
    capsys.readouterr()
    assert cli.main(arguments) == 2
    assert "is damaged (files of 00000-of-00001-000000 are missing): remove the folder" in error(capsys)


def change(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-3])


def test_what_is_damaged_afterwards_is_told_when_it_is_opened(tiny_sdxl: str, tmp_path: Path) -> None:
    """Before a run, not after hours of it."""
    data = records(tmp_path / "data", [("p", (0, 1))])
    assert cli.main(words(tiny_sdxl, data, tmp_path / "whole")) == 0
    names = ["records.jsonl", "prompts.json", "tables.safetensors", "00000-of-00001-000000.safetensors"]
    for name in names:
        for harm in (change, lambda folder, name: (folder / name).unlink()):
            shutil.copytree(tmp_path / "whole", tmp_path / "harmed")
            harm(tmp_path / "harmed", name)
            with pytest.raises(UserError, match=f"damaged .*{name}|{name} is damaged") as caught:
                open_cache(tmp_path / "harmed")
            assert "remove the folder of the cache, and write it again" in str(caught.value)
            shutil.rmtree(tmp_path / "harmed")


def test_a_list_with_a_label_that_is_no_number_is_one_dropped_row(tiny_sdxl: str, tmp_path: Path) -> None:
    """JSON spells NaN; the run is not ended by it."""
    data = records(tmp_path / "data", [("p", (0, 1)), ("q", (2, 3, 4))])
    text = (data / "preferences.jsonl").read_text()
    (data / "preferences.jsonl").write_text(text.replace('"label": -1.0', '"label": NaN'))
    assert cli.main(words(tiny_sdxl, data, tmp_path / "out", "data.max_bad_share=0.5")) == 0
    assert files.read_json(tmp_path / "out" / "manifest.json")["dropped"] == {"bad_label": ["r1"]}


def test_prompts_count_in_a_pack_too(tiny_sdxl: str, tmp_path: Path) -> None:
    """A pair of pictures under 40 prompts of 10 kB: 32 are encoded at once, which is more than 100 kB."""
    model: Any = SDXL(path=tiny_sdxl).load()
    candidates = [Candidate(ImageRef(data=jpeg(10 + k, (32, 32))), label=1.0 - k) for k in (0, 1)]
    found = [Record(f"r{number}", f"p {number}", candidates) for number in range(40)]
    writer = PackWriter(tmp_path, "00000-of-00001", model, PackSpec("mean", "fp32", 100_000), 4)
    make = fitter(model, PreprocessSpec(), seed=0)
    for position, (record, outcome) in enumerate(UsableGroups(found, unit="any").outcomes(make)):
        assert isinstance(outcome, list)
        writer.add(position, record, outcome[0])
    writer.close_pack()
    rows = [files.read_jsonl(path) for path in packs_of(tmp_path)]
    assert [len(part) for part in rows] == [32, 8]
    assert [line["prompt_row"] for line in rows[0] + rows[1]] == [*range(32), *range(8)]
    keys = [line["key_rows"] for line in rows[0] + rows[1]]
    assert keys == [[0, 1], *([[-1, -1]] * 39)]  # the two pictures are in the first row alone


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses files above 10 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_refuses_is_one_line_and_leaves_nothing(tmp_path: Path, small_files: None) -> None:
    write_tensors(tmp_path / "small.safetensors", {"x": torch.zeros(100)})
    with pytest.raises(
        UserError, match=r"large\.safetensors cannot be written \(.*\): make room, then repeat"
    ):
        write_tensors(tmp_path / "large.safetensors", {"x": torch.zeros(10_000)})
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


def test_the_estimate_knows_how_many_records_there_are(
    tiny_sdxl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file of records, of `limit`, in every process; packs that are there count as free."""
    data = records(tmp_path / "data", [(f"p{n}", (2 * n, 2 * n + 1)) for n in range(5)])
    assert cli.main(words(tiny_sdxl, data, tmp_path / "a")) == 0
    assert "at most 10 pictures of 4 kB and 5 different prompts of 5 kB:" in capsys.readouterr().err
    assert cli.main(words(tiny_sdxl, data, tmp_path / "b", "limit=2")) == 0
    assert "at most 4 pictures of 4 kB and 2 different prompts" in capsys.readouterr().err
    stop_after(3, monkeypatch, words(tiny_sdxl, data, tmp_path / "c"))
    packs = sum(path.with_suffix(".safetensors").stat().st_size for path in packs_of(tmp_path / "c"))
    free = 10 * 4096 + 5 * 5200 - packs
    usage = shutil._ntuple_diskusage(10**6, 10**6 - free, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert cli.main(words(tiny_sdxl, data, tmp_path / "c")) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    capsys.readouterr()
    assert cli.main(words(tiny_sdxl, data, tmp_path / "d")) == 2
    assert "choose another disk" in error(capsys)


def test_prompts_of_several_rows_take_their_room_once(
    tiny_sdxl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six rows, three of each prompt: to the byte; then the first three, and two of the second prompt."""
    rows = [(prompt, (2 * n, 2 * n + 1)) for n, prompt in enumerate("aaabbb")]
    data = records(tmp_path / "data", rows)
    needed = 12 * 4096 + 2 * 2 * (77 * 32 + 24)  # 77 tokens of 32 numbers and 24 pooled ones, in fp16
    for free, code in ((needed - 1, 2), (needed, 0)):
        usage = shutil._ntuple_diskusage(10**6, 10**6 - free, free)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda place, usage=usage: usage)
            assert cli.main(words(tiny_sdxl, data, tmp_path / "out")) == code
        assert "at most 12 pictures of 4 kB and 2 different prompts of 5 kB:" in capsys.readouterr().err
    assert cli.main(words(tiny_sdxl, data, tmp_path / "less", "limit=3")) == 0
    assert "6 pictures of 4 kB and 1 different prompts" in capsys.readouterr().err
    (tmp_path / "some.txt").write_text("b\n")
    subset = ("limit=2", f"data.prompts={tmp_path / 'some.txt'}")
    assert cli.main(words(tiny_sdxl, data, tmp_path / "some", *subset)) == 0
    assert "4 pictures of 4 kB and 1 different prompts" in capsys.readouterr().err


def test_where_prompts_cannot_be_counted_the_estimate_says_so(
    tiny_sdxl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows of a subset are not known before they are read, so the bound is a prompt a row."""
    write(tmp_path / "a.parquet", [row(f"a {name}") for name in "bbcc"])
    (tmp_path / "some.txt").write_text("a c\n")
    common = ["cache", "model=sdxl", f"model.path={tiny_sdxl}", "data=pickapic", "preprocess.resolution=16"]
    common += [f"data.path={tmp_path / 'a.parquet'}", f"data.prompts={tmp_path / 'some.txt'}"]
    assert cli.main([*common, "limit=2", f"out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().err
    assert "at most 4 pictures of 1 kB and 2 prompts (one a row: they are not counted) of 5 kB:" in said
    assert open_cache(tmp_path / "out").facts["prompts"] == 1


MASKS = {
    "tokens, then padding": ([1, 1, 0, 0], [0, 1]),
    "no padding": ([1, 1, 1, 1], [0, 1, 2, 3]),
    "a gap": ([1, 0, 1, 0], [0, 1, 2]),
    "padding, then tokens": ([0, 0, 1, 1], [0, 1, 2, 3]),
    "nothing shown": ([0, 0, 0, 0], [0, 1, 2, 3]),
}


def test_what_a_mask_hides_at_the_end_is_left_out() -> None:
    """Number 10 k + n in row n of prompt k; the first of them begins at row 7 of its pack."""
    mask = torch.tensor([mask for mask, _ in MASKS.values()])
    whole = torch.tensor([[[10.0 * k + n] * 2 for n in range(4)] for k in range(5)])
    wanted = [10.0 * k + n for k, (_, kept) in enumerate(MASKS.values()) for n in kept]
    for given in (mask, mask.bool(), mask.float()):
        shown, spans = without_hidden(whole, given, 7)
        assert shown.tolist() == [[number, number] for number in wanted]
        assert spans.tolist() == [[7, 2, 4], [9, 4, 4], [13, 3, 4], [16, 4, 4], [20, 4, 4]]
        assert spans.dtype == torch.int64 and shown.untyped_storage().nbytes() == 17 * 2 * 4


def test_a_resolution_of_a_slipped_finger_is_refused_before_it_fills_the_memory(
    tiny_sdxl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = records(tmp_path / "data", [("p", (0, 1))])
    assert cli.main(words(tiny_sdxl, data, tmp_path / "out", "preprocess.resolution=100000")) == 2
    assert "resolution is 100000, the base's own is 32: use at most 4 times that" in error(capsys)
    assert not (tmp_path / "out").exists()
    assert json.loads((data / "preferences.jsonl").read_text())["id"] == "r0"
