"""`diffalign cache`: what it keeps, that training from it is training from the data, and what it survives."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign import cli
from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.data import cache_packs
from diffalign.data.cache import open_cache
from diffalign.data.encoding import encode
from diffalign.data.loader import Plan, assemble
from diffalign.data.select import UsableGroups
from diffalign.data.sources.pickapic import Plugin as Pickapic
from diffalign.data.specs import LoaderSpec, PreprocessSpec
from diffalign.models.sdxl import Plugin as SDXL
from tests.pickapic_files import jpeg, row, write
from tests.tiny_training import picture
from tests.two_processes import two_processes


def noise(seed: int, size: tuple[int, int]) -> bytes:
    """A picture whose crops differ."""
    stream = io.BytesIO()
    picture(seed, size).save(stream, format="PNG")
    return stream.getvalue()


LIGHT, DARK, WIDE = jpeg(200, (32, 32)), jpeg(40, (32, 32)), noise(1, (48, 32))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight decided pairs of five captions, two of them wide; a tie, an unlabelled, a broken one, a strip."""
    path = tmp_path_factory.mktemp("pairs") / "train-00000-of-00001.parquet"
    rows = [row("a bee", LIGHT[:40], DARK)]
    rows += [row(f"a {name}", LIGHT, jpeg(10 * k, (32, 32)), (1.0, 0.0)) for k, name in enumerate("cdef")]
    rows += [row("a c", DARK, jpeg(90, (32, 32)), (0.0, 1.0)), row("a d", DARK, LIGHT, (0.0, 1.0))]
    rows += [row("a wide one", WIDE, noise(number, (48, 32))) for number in (2, 3)]
    rows += [row("a tie", labels=(0.5, 0.5)), row(has_label=False)]
    rows += [row("a strip", jpeg(7, (200, 16)), jpeg(8, (200, 16)))]
    write(path, rows)
    return path


def words(base: str, pairs: Path, out: Path, *more: str) -> list[str]:
    return [
        *("cache", "model=sdxl", f"model.path={base}", "data=pickapic", f"data.path={pairs}"),
        *("data.max_bad_share=0.2", f"out={out}", *more),
    ]


@pytest.fixture(scope="module")
def exact(tiny_sdxl: str, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("caches") / "exact"
    assert cli.main(words(tiny_sdxl, pairs, out, "dtype=fp32")) == 0
    return out


def digest(folder: Path) -> dict[str, str]:
    """Content of every file of a cache but those that name the time."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".jsonl", ".safetensors") or path.name == "prompts.json":
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def test_what_is_kept_and_what_is_counted(exact: Path) -> None:
    """Of 16 pictures LIGHT stands five times, DARK and WIDE twice: 16 - 4 - 1 - 1 = 10 different ones."""
    said = files.read_json(exact / "manifest.json")
    assert said["counts"] == {
        "asked": 12,
        "used": 8,
        "dropped": {"tie": 1, "unlabelled": 1, "corrupt_image": 1, "too_much_cropped": 1},
    }
    assert said["dropped"]["corrupt_image"] == ["train-00000-of-00001.parquet:0"]
    facts = said["cache"]
    assert (facts["examples"], facts["pictures"], facts["prompts"]) == (8, 10, 5)
    assert facts["pictures_encoded"] == 10 and facts["kinds"] == ["32x32", "24x40"]


def test_batches_are_those_of_the_data_in_memory(exact: Path, tiny_sdxl: str, pairs: Path) -> None:
    """Latents, embeddings, sizes, targets and ratings of both ways, bit for bit, sampled or not."""
    model: Any = SDXL(path=tiny_sdxl).load()
    groups = UsableGroups(Pickapic(str(pairs)).records(), max_bad_share=1.0)
    memory = encode(groups, model, PreprocessSpec(), seed=0)
    disk, tally = open_cache(exact).choose()
    assert len(disk) == len(memory) == tally.used == 8 and tally.asked == 8
    assert (disk.kinds()[:, None] == disk.kinds()[None]).tolist() == (
        memory.kinds()[:, None] == memory.kinds()[None]
    ).tolist()
    prompts, rows = disk.texts()
    assert [prompts[number] for number in rows] == [example.prompt for example in memory.examples]
    for spec in (LoaderSpec(), LoaderSpec(posterior="mean"), LoaderSpec(caption_dropout=1.0)):
        for indices in ((0, 3, 5), (6, 7)):
            plan = Plan(2, indices, 10)
            one, other = (assemble(encoded, plan, seed=0, spec=spec) for encoded in (disk, memory))
            assert one.ids == other.ids and torch.equal(one.latents, other.latents)
            assert torch.equal(one.target, other.target)  # type: ignore[arg-type]
            assert set(one.cond) == set(other.cond)
            assert all(torch.equal(one.cond[name], other.cond[name]) for name in one.cond)
            assert {n: v.tolist() for n, v in one.ratings.items()} == {
                n: v.tolist() for n, v in other.ratings.items()
            }
    assert disk.examples[6].meta == memory.examples[6].meta
    assert [example.id for example in disk.subset([7, 1]).examples] == [memory.examples[i].id for i in (7, 1)]


def test_training_from_it_is_training_from_the_data(
    exact: Path, tiny_sdxl: str, pairs: Path, tmp_path: Path
) -> None:
    common = [
        *("train", "model=sdxl", f"model.path={tiny_sdxl}", "objective=dpo", "adapter.rank=2"),
        *("num_steps=3", "loader.batch_size=2", "validation.share=0.3", "optimizer.lr=1e-3"),
    ]
    data = ["data=pickapic", f"data.path={pairs}", "data.max_bad_share=0.2"]
    assert cli.main([*common, *data, f"out={tmp_path / 'data'}"]) == 0
    assert cli.main([*common, f"cache={exact}", f"out={tmp_path / 'cache'}"]) == 0
    one, other = (
        load_file(tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors")
        for name in ("data", "cache")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("data", "cache")]
    assert metrics[0] == metrics[1]


def test_half_precision_halves_the_files(exact: Path, tiny_sdxl: str, pairs: Path, tmp_path: Path) -> None:
    assert cli.main(words(tiny_sdxl, pairs, tmp_path / "half")) == 0
    sizes = [
        (folder / "00000-of-00001-000000.safetensors").stat().st_size for folder in (exact, tmp_path / "half")
    ]
    assert sizes[1] < 0.7 * sizes[0]
    full, half = open_cache(exact).choose()[0], open_cache(tmp_path / "half").choose()[0]
    for image in range(10):
        mean, rounded = full.latents(image), half.latents(image)
        assert rounded.dtype == torch.float32 and not torch.equal(mean, rounded)
        assert torch.allclose(mean, rounded, rtol=1e-3, atol=1e-6)


def test_single_images_and_lists_are_chosen_as_from_the_data(exact: Path) -> None:
    """Both images of a pair, good and bad, then the good ones alone; a list takes pairs as lists of two."""
    cache = open_cache(exact)
    both, tally = cache.choose(unit="single", undesirable=True)
    assert len(both) == 16 and tally.used == 8
    first = [both.example(index, 0) for index in (0, 1)]
    whole = cache.choose()[0].example(0, 0)
    assert [example.target for example in first] == [1.0, 0.0]
    assert [example.id for example in first] == [f"{whole.id}:0", f"{whole.id}:1"]
    assert first[0].images + first[1].images == whole.images
    assert len(cache.choose(unit="single")[0]) == 8
    lists, _ = cache.choose(unit="list", limit=3)
    assert len(lists) == 3 and lists.example(2, 0).target is None
    assert len(cache.choose(limit=5)[0]) == 5
    chosen, tally = cache.choose(reject=lambda record: "boring" if record.prompt == "a c" else None)
    assert len(chosen) == 6 and {name: len(ids) for name, ids in tally.dropped.items()} == {"boring": 2}


def test_variants_take_turns(tiny_sdxl: str, pairs: Path, tmp_path: Path) -> None:
    """Two crops of a 64 x 32 picture: each group shows one in even and the other in odd epochs."""
    more = ("variants=2", "preprocess.crop=random", "preprocess.max_crop=1")
    assert cli.main(words(tiny_sdxl, pairs, tmp_path / "cache", *more)) == 0
    cached, _ = open_cache(tmp_path / "cache").choose()
    for index in (6, 7):  # the wide ones: only these are cut
        shown = [cached.example(index, epoch).images for epoch in range(4)]
        assert shown[0] == shown[2] != shown[1] == shown[3]
    uncut = [cached.example(0, epoch).images for epoch in range(2)]
    assert uncut[0] == uncut[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("seed=3",), "another recipe (seed was 0, now 3)"),
        (("preprocess.flip=true",), "another recipe (preprocess.flip was False, now True)"),
        (("data.ties=soft",), "another recipe (data.ties was drop, now soft)"),
        (("posterior=mean",), "another recipe (posterior was sample, now mean)"),
        (("posterior=median",), "posterior=median: expected one of sample, mean"),
        (("dtype=bf16",), "dtype=bf16: expected one of fp16, fp32"),
        (("variants=0",), "variants=0: give a number of at least 1"),
        (
            ("variants=2",),
            "variants=2 would all be equal: set preprocess.crop=random or preprocess.flip=true",
        ),
    ],
)
def test_refusals(
    more: tuple[str, ...],
    message: str,
    exact: Path,
    tiny_sdxl: str,
    pairs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(words(tiny_sdxl, pairs, exact, "dtype=fp32", *more)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_disk_that_is_too_small_is_told_first(
    tiny_sdxl: str,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """24 pictures of 4 x 16 x 16 numbers, twice, in fp16: 4 kB each; 12 rows of 9 captions."""
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 5, 5))
    assert cli.main(words(tiny_sdxl, pairs, tmp_path / "cache")) == 2
    said = capsys.readouterr().err
    assert "at most 24 pictures of 4 kB and 9 different prompts of" in said
    assert "choose another disk" in said and not list(tmp_path.glob("cache/*.safetensors"))
    assert cli.main(words(tiny_sdxl, pairs, tmp_path / "cache", "ignore_disk=true")) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("data=pickapic", "data.path=x.parquet"),
            "are both set, and a cache holds its own data: leave data out, or set cache=null and keep data",
        ),
        (("preprocess.flip=true",), "preprocess is that of the cache: leave it out"),
        (("objective=smpo",), "score"),
    ],
)
def test_what_training_refuses(
    more: tuple[str, ...],
    message: str,
    exact: Path,
    tiny_sdxl: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    words = ["train", "model=sdxl", f"model.path={tiny_sdxl}", f"cache={exact}", f"out={out}", *more]
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not out.exists()


def test_another_base_and_missing_caches_are_refused(
    exact: Path, tiny_sdxl: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_sdxl, other)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    train = ["train", "model=sdxl", f"model.path={other}", f"out={tmp_path / 'run'}"]
    for place, message in (
        (exact, "was made with other files of VAE or text encoders"),
        (tmp_path / "nothing", "does not exist; make one with diffalign cache"),
        (other, "is not complete"),
    ):
        assert cli.main([*train, f"cache={place}"]) == 2
        assert message in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(exact, broken)
    (broken / "00000-of-00001-000000.safetensors").unlink()
    with pytest.raises(UserError, match=r"000000\.safetensors'.*remove the folder of the cache"):
        open_cache(broken)
    assert cli.main(words(str(other), pairs, exact, "dtype=fp32")) == 2
    assert "(model changed): choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize("writes", [1, 4])
def test_a_run_that_ends_in_the_middle_leaves_the_cache_of_an_undisturbed_one(
    writes: int, tiny_sdxl: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs of one row; it ends after the tensors of a pack are written, and before its rows are.

    `scripts/bench_cache.py` kills it anywhere.
    """
    monkeypatch.setattr(cache_packs, "MAX_ROWS", 1)
    small = ("dtype=fp32", "preprocess.batch_size=1")
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    assert cli.main(words(tiny_sdxl, pairs, whole, *small)) == 0
    write_jsonl, left = files.write_jsonl, iter(range(writes))

    def write(path: Path, rows: Any) -> Path:
        if next(left, None) is None:
            raise UserError("no more")
        return write_jsonl(path, rows)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_jsonl", write)
        assert cli.main(words(tiny_sdxl, pairs, ended, *small)) == 2
    found = [len(list(ended.glob(f"*-*.{kind}"))) for kind in ("jsonl", "safetensors")]
    assert found == [writes, writes + 1] and not (ended / "manifest.json").exists()
    assert cli.main(words(tiny_sdxl, pairs, ended, *small)) == 0
    assert digest(ended) == digest(whole) and len(digest(whole)) == 2 * 12 + 3


def test_two_processes_share_the_prompts(exact: Path, tiny_sdxl: str, pairs: Path, tmp_path: Path) -> None:
    """Each prompt is of one process; the index is in the order of the source, and so are the batches."""
    out = tmp_path / "shared"
    ended = two_processes(words(tiny_sdxl, pairs, out, "dtype=fp32"), tmp_path / "ranks")
    assert [process.code for process in ended] == [0, 0], ended
    ours, alone = open_cache(out), open_cache(exact)
    assert len(ours.facts["packs"]) == 2 and ours.facts["prompts"] == 5
    assert (out / "records.jsonl").read_text() == (exact / "records.jsonl").read_text()
    said = [files.read_json(folder / "manifest.json") for folder in (out, exact)]
    assert said[0]["counts"] == said[1]["counts"] and said[0]["dropped"] == said[1]["dropped"]
    one, other = ours.choose()[0], alone.choose()[0]
    for index in range(8):
        batches = [assemble(s, Plan(0, (index,), 0), seed=0, spec=LoaderSpec()) for s in (one, other)]
        assert torch.allclose(batches[0].latents, batches[1].latents, atol=1e-5)
        assert torch.equal(batches[0].cond["time_ids"], batches[1].cond["time_ids"])
        assert torch.allclose(batches[0].cond["prompt_embeds"], batches[1].cond["prompt_embeds"], atol=1e-5)


def test_records_keep_what_they_knew(exact: Path) -> None:
    lines = (exact / "records.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    assert record["prompt"] == "a c" and [c["label"] for c in record["candidates"]] == [1.0, 0.0]
    assert all("image" not in candidate for candidate in record["candidates"])


def test_someone_who_stops_it_is_told_that_it_goes_on(
    tiny_sdxl: str,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_packs.PackWriter, "add", stop)
    assert cli.main(words(tiny_sdxl, pairs, tmp_path / "cache")) == 130
    assert "are kept; the same command goes on from there" in capsys.readouterr().err
