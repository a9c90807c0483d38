"""Training from a cache: every kind of example, with workers, going on, and without the encoders."""

from __future__ import annotations

import json
import pickle
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign import cli
from diffalign.common import files, manifest, plugins
from diffalign.data import cache_packs
from diffalign.data.batches import Batch
from diffalign.data.cache import open_cache
from diffalign.data.loader import batches
from diffalign.data.specs import LoaderSpec
from diffalign.models.pixart import PixArt as PixArtModel
from diffalign.models.pixart import Plugin as PixArt
from diffalign.models.sd3 import Plugin as SD3
from tests.tiny_training import picture

SCORER = {"scale": "cosine", "version": "1"}
COUNTS = {"pairs": 2, "scored": 2, "lists": 3, "singles": 1, "liked": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each kind four: labelled pairs, scored ones without labels, scored lists of three, single pictures.

    The pictures of the last group are wide, of all others square: batches of two are short twice an epoch.
    """
    folder = tmp_path_factory.mktemp("data")
    for number in range(12):
        picture(number).save(folder / f"{number}.png")
        picture(number, (48, 32)).save(folder / f"wide-{number}.png")
    for what, count in COUNTS.items():
        rows = [
            {
                "id": f"{what}-{group}",
                "prompt": f"a {'bcde'[group]}",
                "candidates": [_candidate(what, group, place, count) for place in range(count)],
            }
            for group in range(4)
        ]
        (folder / what).mkdir()
        files.write_jsonl(folder / what / "preferences.jsonl", rows)
    scores = {"pickscore": {**SCORER, "min": 0.1, "max": 0.3, "higher_is_better": True}}
    manifest.write_manifest(folder / "scored", stage="pair", recipe={}, extra={"scores": scores})
    return folder


def _candidate(what: str, group: int, place: int, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {"image": f"../{'wide-' if group == 3 else ''}{count * group + place}.png"}
    if what in ("scored", "lists"):
        found["scores"] = {"pickscore": {"value": 0.22 - 0.01 * place + 0.002 * group, **SCORER}}
    if what == "pairs":
        found["label"] = float(place == group % 2)
    if what in ("singles", "liked"):
        found["label"] = float(what == "liked" or group % 2)
    return found


@pytest.fixture(scope="module")
def tiny_pixart(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its network masks the padding of prompts."""
    return PixArt.tiny(tmp_path_factory.mktemp("tiny") / "pixart").path


def make(data: Path, what: str, family: str, base: str, out: Path, *more: str) -> Path:
    """The cache of a file, in fp32."""
    words = ["cache", f"model={family}", f"model.path={base}", "data=jsonl", f"data.path={data / what}"]
    assert cli.main([*words, f"out={out}", "dtype=fp32", *more]) == 0
    return out


def train(family: str, base: str, out: Path, *more: str) -> dict[str, torch.Tensor]:
    """The adapter after two steps of two groups."""
    words = ["train", f"model={family}", f"model.path={base}", f"out={out}", "adapter.rank=2", "num_steps=2"]
    settings = [
        "loader.batch_size=2",
        "optimizer.lr=1e-3",
        "trackers=[]",
        "log_every=1",
        "checkpoint.every=1",
    ]
    assert cli.main([*words, *settings, *more]) == 0
    (file,) = (out / "adapter").rglob("*.safetensors")
    return load_file(file)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("what", "objective", "family"),
    [
        ("lists", ("objective=rankdpo",), "sd"),  # sd: the network is told nothing of sizes
        ("lists", ("objective=rankdpo", "objective.passes=two"), "sdxl"),
        ("singles", ("objective=kto",), "sdxl"),
        ("liked", ("objective=sft",), "sd"),
        ("scored", ("objective=smpo", "objective.inversion_steps=2"), "sdxl"),
        ("pairs", ("objective=dpo",), "sd"),
        ("pairs", ("objective=dpo", "loader.caption_dropout=0.5"), "pixart"),
        ("liked", ("objective=sft", "adapter.kind=full"), "pixart"),
    ],
)
def test_training_from_it_is_training_from_the_data(
    what: str,
    objective: tuple[str, ...],
    family: str,
    data: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """The same weights and numbers, bit for bit, of lists, single pictures and pairs that scores decide."""
    base = request.getfixturevalue(f"tiny_{family}")
    cache = make(data, what, family, base, tmp_path / "cache")
    given = train(family, base, tmp_path / "a", "data=jsonl", f"data.path={data / what}", *objective)
    cached = train(family, base, tmp_path / "b", f"cache={cache}", *objective)
    assert equal(given, cached) and any(bool(tensor.any()) for tensor in cached.values())
    rows = [files.read_jsonl(tmp_path / name / "metrics.jsonl") for name in "ab"]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    assert open_cache(cache).facts["kinds"] == ["32x32", "24x40"]


def test_padding_that_is_masked_takes_no_room(
    data: Path, tiny_pixart: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Four prompts of 5 tokens each, and 295 that only pad; a cache that keeps them all is read alike."""
    monkeypatch.setattr(cache_packs, "PROMPT_BATCH", 3)  # the fourth is encoded alone
    cut = make(data, "pairs", "pixart", tiny_pixart, tmp_path / "cut")
    said = capsys.readouterr().err
    assert "4 different prompts of 50 kB with padding, which is not kept:" in said  # 300 x (40 x 4 + 8) bytes
    with monkeypatch.context() as patch:
        patch.setattr(PixArtModel, "text_masks", {})
        whole = make(data, "pairs", "pixart", tiny_pixart, tmp_path / "whole")
    packs = [load_file(folder / "00000-of-00001-000000.safetensors") for folder in (cut, whole)]
    assert packs[0]["shown.prompt_embeds"].shape == (20, 40) and "text.prompt_embeds" not in packs[0]
    assert packs[0]["spans.prompt_embeds"].tolist() == [[5 * row, 5, 300] for row in range(4)]
    assert packs[1]["text.prompt_embeds"].shape == (4, 300, 40)
    one, other = (open_cache(folder).choose()[0] for folder in (cut, whole))
    for example in one.examples:
        given, full = (encoded.conditioning(example, dropped=False) for encoded in (one, other))
        assert torch.equal(given["prompt_attention_mask"], full["prompt_attention_mask"])
        assert given["prompt_embeds"].shape == full["prompt_embeds"].shape == (2, 300, 40)
        stored = packs[1]["text.prompt_embeds"][example.prompt_row]  # of one pack, so in the same order
        assert all(torch.equal(embeds, stored) for embeds in full["prompt_embeds"])
        assert all(torch.equal(embeds[:5], stored[:5]) for embeds in given["prompt_embeds"])
        assert not given["prompt_embeds"][:, 5:].any() and full["prompt_embeds"][:, 5:].all()
    trained = [train("pixart", tiny_pixart, tmp_path / f.stem[0], f"cache={f}") for f in (cut, whole)]
    assert equal(*trained)


def taken(encoded: Any, **options: Any) -> list[Batch]:
    spec = LoaderSpec(batch_size=2, caption_dropout=0.3, **options)
    return list(islice(batches(encoded, spec, seed=0, start=1), 6))


def test_workers_and_other_processes_read_the_same(data: Path, tiny_sdxl: str, tmp_path: Path) -> None:
    """Two workers give the bits of none; so does a set that was sent to a process of its own."""
    cached, _ = open_cache(make(data, "pairs", "sdxl", tiny_sdxl, tmp_path / "cache")).choose()
    sent: Any = pickle.loads(pickle.dumps(cached))
    assert sent.cache.records != cached.cache.records  # a descriptor of its own
    alone = taken(cached)
    for other in (taken(cached, num_workers=2), taken(sent)):
        for one, two in zip(alone, other, strict=True):
            assert (one.ids, one.epoch) == (two.ids, two.epoch) and torch.equal(one.latents, two.latents)
            assert all(torch.equal(one.cond[name], two.cond[name]) for name in one.cond)
    assert {batch.epoch for batch in alone} == {0, 1, 2}


def test_a_stopped_run_goes_on_from_it_to_the_same_bits(
    data: Path, tiny_sdxl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with its first step only; and a cache made anew from the same is the same input."""
    cache, out = make(data, "pairs", "sdxl", tiny_sdxl, tmp_path / "cache"), tmp_path / "run"
    words = (f"cache={cache}", "validation.share=0.4", "loader.num_workers=1")
    whole = train("sdxl", tiny_sdxl, out, *words)
    (out / "manifest.json").unlink()
    for folder in ("adapter", "checkpoints/step-00000002"):
        shutil.rmtree(out / folder)
    shutil.rmtree(cache)
    make(data, "pairs", "sdxl", tiny_sdxl, cache)
    assert equal(train("sdxl", tiny_sdxl, out, *words), whole)
    assert "going on from step 1 of 2" in capsys.readouterr().err
    (out / "manifest.json").unlink()
    shutil.rmtree(cache)
    make(data, "pairs", "sdxl", tiny_sdxl, cache, "data.limit=3")
    arguments = ["train", "model=sdxl", f"model.path={tiny_sdxl}", f"out={out}", "adapter.rank=2", *words]
    arguments += ["num_steps=2", "loader.batch_size=2", "optimizer.lr=1e-3", "trackers=[]", "log_every=1"]
    assert cli.main([*arguments, "checkpoint.every=1"]) == 2
    assert "base, adapter.init or data of the run in" in capsys.readouterr().err


@pytest.mark.parametrize("family", plugins.names("models"))
def test_neither_vae_nor_text_encoders_are_loaded(
    family: str, data: Path, tmp_path: Path, part_loads: list[tuple[str, set[str]]]
) -> None:
    spec = plugins.get("models", family).tiny(tmp_path / "base")
    cache = make(data, "pairs", family, spec.path, tmp_path / "cache")
    part_loads.clear()
    train(family, spec.path, tmp_path / "run", f"cache={cache}", "validation.share=0.4", "validation.every=1")
    assert sorted({name for name, _ in part_loads}) == ["scheduler", spec.network_part]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pack_that_is_damaged_is_told_in_one_line(
    workers: int, data: Path, tiny_sdxl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the right size, so that only reading shows it: no traceback, from a worker neither."""
    cache = make(data, "pairs", "sdxl", tiny_sdxl, tmp_path / "cache")
    pack = cache / "00000-of-00001-000000.safetensors"
    for content in (b"\xff", b"\0", (10**15).to_bytes(8, "little"), b"\x02" + 7 * b"\0" + b"[]"):
        pack.write_bytes(content.ljust(pack.stat().st_size, content[-1:]))
        words = [
            "train",
            "model=sdxl",
            f"model.path={tiny_sdxl}",
            f"cache={cache}",
            f"out={tmp_path / 'run'}",
        ]
        assert cli.main([*words, f"loader.num_workers={workers}", "trackers=[]"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"error: {pack} is damaged (") and "Traceback" not in line
        assert line.endswith("remove the folder of the cache, and write it again")
        shutil.rmtree(tmp_path / "run")


def test_the_preprocessing_of_the_cache_may_be_said_again(
    data: Path, tiny_sdxl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One recipe for both verbs; a batch size of encoding decides nothing."""
    same = ("preprocess.buckets=square", "preprocess.max_crop=1", "preprocess.batch_size=3")
    cache = make(data, "pairs", "sdxl", tiny_sdxl, tmp_path / "cache", *same)
    train("sdxl", tiny_sdxl, tmp_path / "run", f"cache={cache}", *same[:2], "preprocess.batch_size=4")
    words = ["train", "model=sdxl", f"model.path={tiny_sdxl}", f"cache={cache}", f"out={tmp_path / 'no'}"]
    assert cli.main([*words, "preprocess.max_crop=0.5"]) == 2
    assert "preprocess is that of the cache: leave it out" in capsys.readouterr().err


def test_what_a_cache_was_made_with_is_named(
    data: Path, tiny_sdxl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model, length and T5, before files; one made before these were kept is refused and read as ever."""
    base = SD3.tiny(tmp_path / "base").path
    words = ["train", "model=sd3", f"model.path={base}", f"out={tmp_path / 'no'}"]
    length, no_t5 = "model.max_sequence_length=12", "model.use_t5=false"
    caches = {
        "sdxl": make(data, "pairs", "sdxl", tiny_sdxl, tmp_path / "sdxl"),
        "t5": make(data, "pairs", "sd3", base, tmp_path / "t5", length),
        "bare": make(data, "pairs", "sd3", base, tmp_path / "bare", length, no_t5),
    }
    for name, given, told in (
        ("sdxl", [length], "model=sdxl, this run has sd3: give that one, or make another cache"),
        ("t5", [], "model.max_sequence_length=12, this run has 256: give that one, or make another cache"),
        (
            "t5",
            [length, no_t5],
            "model.use_t5=true, this run has false: give that one, or make another cache",
        ),
        ("bare", [length], "model.use_t5=false, this run has true: give that one, or make another cache"),
    ):
        assert cli.main([*words, f"cache={caches[name]}", *given]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line == f"error: cache={caches[name]} was made with {told}"
    known = files.read_json(caches["bare"] / "manifest.json")
    del known["cache"]["encoder_recipe"]
    files.write_json(caches["bare"] / "manifest.json", known)
    assert cli.main([*words, f"cache={caches['bare']}", length]) == 2
    assert "made with other files of VAE or text encoders than the model's" in capsys.readouterr().err
    assert train("sd3", base, tmp_path / "run", f"cache={caches['bare']}", length, no_t5)


def test_a_base_of_another_size_with_the_same_encoders_is_refused(
    data: Path, tiny_sdxl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As SD 2.1 at 512 and 768 pixels: same VAE and text encoder, other buckets."""
    other = tmp_path / "other"
    shutil.copytree(tiny_sdxl, other)
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 24}))
    cache = make(data, "pairs", "sdxl", tiny_sdxl, tmp_path / "cache")
    words = ["model=sdxl", f"model.path={other}"]
    assert cli.main(["train", *words, f"cache={cache}", f"out={tmp_path / 'run'}"]) == 2
    assert "was made at another base's 32 pixels, the model's are 48" in capsys.readouterr().err
    again = ["cache", *words, "data=jsonl", f"data.path={data / 'pairs'}", f"out={cache}", "dtype=fp32"]
    assert cli.main(again) == 2
    assert "another recipe (resolution was 32, now 48)" in capsys.readouterr().err
    said = make(data, "pairs", "sdxl", tiny_sdxl, tmp_path / "said", "preprocess.resolution=32")
    train("sdxl", str(other), tmp_path / "run", f"cache={said}")
