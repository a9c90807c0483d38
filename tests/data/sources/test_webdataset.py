"""Pairs in tar files, read as a stream."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from diffalign.common.errors import UserError
from diffalign.data.sources.webdataset import Plugin
from tests.pickapic_files import BLUE, RED, jpeg

Files = list[tuple[str, object]]


def write(path: Path, files: Files, mode: str = "w") -> str:
    """Writes (name, bytes, or what becomes json) in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def sample(key: str, facts: object, first: str = "0.jpg", second: str = "1.jpg") -> Files:
    return [(f"{key}.json", facts), (f"{key}.{first}", RED), (f"{key}.{second}", BLUE)]


def contract_case(folder: Path) -> dict[str, object]:
    files = [
        *sample("a", {"prompt": "a cat", "label": 1}),
        *sample("b", {"prompt": "a dog"}, "winner.jpg", "loser.jpg"),
        *sample("c", {"prompt": "a cow", "label_0": 0, "label_1": 1}, "jpg_0", "jpg_1"),
    ]
    return {"path": write(folder / "pairs.tar", files)}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_the_three_namings(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("pairs.tar.gz" if mode == "w:gz" else "pairs.tar")
    facts = {"prompt": "a cat", "label": 0.75, "model_0": "sd", "user": 7, "seed": 3}
    files = [
        ("readme", b"no sample"),
        *sample("data/000", facts),
        *sample("data/001", {"caption": "a dog", "label_0": 0, "label_1": 1}, "webp_0", "PNG_1"),
        *sample("data/002", {"prompt": "a cow"}, "winner.png", "loser.jpeg"),
        ("data/002.cls", b"5"),
    ]
    one, two, three = Plugin(write(path, files, mode)).records()
    assert (one.id, one.prompt, one.user) == (f"{path.name}:0", "a cat", "7")
    assert one.meta == {"seed": 3, "__key__": "data/000"}
    assert [(c.label, c.model, c.image.data) for c in one.candidates] == [
        (0.75, "sd", RED), (0.25, None, BLUE),
    ]  # fmt: skip
    assert (two.prompt, two.pair_target()) == ("a dog", 0.0)
    best, worst = sorted(three.candidates, key=lambda candidate: -candidate.label)
    assert (best.label, best.image.data, worst.label, worst.image.data) == (1.0, RED, 0.0, BLUE)


def test_the_winner_has_no_place_of_its_own(tmp_path: Path) -> None:
    files = [
        item
        for index in range(200)
        for item in sample(str(index), {"prompt": "x"}, "winner.jpg", "loser.jpg")
    ]
    targets = [record.pair_target() for record in Plugin(write(tmp_path / "t.tar", files)).records()]
    assert 72 <= sum(target == 1.0 for target in targets) <= 128


def test_a_text_file_may_hold_the_caption(tmp_path: Path) -> None:
    files = [("a.txt", b"a cat\n"), ("a.0.jpg", RED), ("a.1.jpg", BLUE), ("a.json", {"label": 1})]
    (record,) = Plugin(write(tmp_path / "t.tar", files)).records()
    assert (record.prompt, record.pair_target()) == ("a cat", 1.0)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (sample("x", {"prompt": "p"}), "unlabelled"),
        (sample("x", {"prompt": "p", "label": None}), "unlabelled"),
        (sample("x", {"prompt": "p", "label": 0.5}), "tie"),
        (sample("x", {"prompt": "p", "label": 2}), "bad_label"),
        (sample("x", {"prompt": "p", "label": "1"}), "bad_label"),
        (sample("x", {"prompt": "p", "label": float("nan")}), "bad_label"),
        (sample("x", {"prompt": "p", "label_0": 1}), "bad_label"),
        (sample("x", {"prompt": "p", "label_0": 1, "label_1": True}), "bad_label"),
        (sample("x", {"label": 1}), "missing_caption"),
        (sample("x", {"prompt": " ", "label": 1}), "missing_caption"),
        (sample("x", {"prompt": ["p"], "label": 1}), "bad_text"),
        (sample("x", {"prompt": "half \ud800", "label": 1}), "bad_text"),
        (sample("x", b"{"), "bad_text"),
        (sample("x", b"[" * 100_000), "bad_text"),
        (sample("x", b"[1]"), "bad_text"),
        (sample("x", b'"caf\xe9"'), "bad_text"),
        (sample("x", {"prompt": "p", "label": 1})[:2], "missing_image"),
        (sample("x", {"prompt": "p"}, "winner.jpg")[:2], "missing_image"),
        (sample("x", {"prompt": "p", "label": 1}, second="1.gif"), "missing_image"),
        ([*sample("x", {"prompt": "p", "label": 1}), ("x.1.png", RED)], "not_a_pair"),
        ([*sample("x", {"prompt": "p", "label": 1}), ("x.json", {"prompt": "p", "label": 0})], "not_a_pair"),
        ([*sample("x", {"prompt": "p", "label": 1}), ("x.winner.png", RED)], "not_a_pair"),
        (sample("x", {"prompt": "p", "label": 1})[1:], "missing_caption"),
        (
            [*sample("x", {"prompt": "p", "label": 1})[:1], ("x.0.jpg", b""), ("x.1.jpg", BLUE)],
            "missing_image",
        ),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(tmp_path: Path, files: Files, reason: str) -> None:
    good = sample("good", {"prompt": "p", "label": 1})
    path = write(tmp_path / "t.tar", [*files, *good])
    groups = Plugin(path, max_bad_share=1.0).usable()
    assert [group.id for group in groups] == ["t.tar:1"]
    assert groups.tally.dropped == {reason: ["t.tar:0"]}


def test_links_and_names_lead_nowhere(tmp_path: Path) -> None:
    """A link to a file outside is an absent picture, a name that climbs is a name; nothing is written."""
    (tmp_path / "secret.jpg").write_bytes(RED)
    path = tmp_path / "d" / "t.tar"
    write(path, sample("../../../tmp/evil", {"prompt": "p", "label": 1}))
    with tarfile.open(path, "a") as tar:
        for kind, target in (
            (tarfile.SYMTYPE, "../secret.jpg"),
            (tarfile.LNKTYPE, "../../../tmp/evil.0.jpg"),
        ):
            member = tarfile.TarInfo("x.0.jpg")
            member.type, member.linkname = kind, target
            tar.addfile(member)
        member = tarfile.TarInfo("x.1.jpg")
        member.size = len(BLUE)
        tar.addfile(member, io.BytesIO(BLUE))
    before = sorted(tmp_path.rglob("*"))
    first, second = Plugin(str(path)).records()
    assert (first.meta, first.pair_target()) == ({"__key__": "../../../tmp/evil"}, 1.0)
    assert [candidate.image.data for candidate in second.candidates] == [None, BLUE]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_is_cut_anywhere_is_refused(tmp_path: Path, mode: str) -> None:
    """Between two files too, where the rest would pass for a shorter tar."""
    files = [item for index in range(3) for item in sample(str(index), {"prompt": "p", "label": 1})]
    whole = Path(write(tmp_path / "whole.tar", files, mode)).read_bytes()
    cut = tmp_path / "cut.tar"
    for size in {*range(600, len(whole) - 4, 512 if mode == "w" else 97), 512, len(whole) // 2}:
        if whole[:size][-1024:] == bytes(1024):
            continue  # only padding is missing
        cut.write_bytes(whole[:size])
        with pytest.raises(
            UserError, match=r"cut\.tar cannot be read as a tar from .*download complete\?"
        ) as caught:
            list(Plugin(str(cut)).records())
        assert "\n" not in str(caught.value)


def test_a_spoilt_gzip_is_refused(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "t.tgz", sample("a", {"prompt": "p", "label": 1}), "w:gz"))
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF  # in the checksum
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a tar from"):
        list(Plugin(str(path)).records())


def test_a_folder_of_tars(tmp_path: Path) -> None:
    for name, prompt in (("b/1.tar", "b"), ("a/0.tar.gz", "a"), (".cache/2.tar", "hidden")):
        mode = "w:gz" if name.endswith("gz") else "w"
        write(tmp_path / name, sample("x", {"prompt": prompt, "label": 1}), mode)
    assert [(record.id, record.prompt) for record in Plugin(str(tmp_path)).records()] == [
        ("0.tar.gz:0", "a"), ("1.tar:0", "b"),
    ]  # fmt: skip
    write(tmp_path / "c" / "1.tar", sample("x", {"prompt": "c", "label": 1}))
    assert [record.id for record in Plugin(str(tmp_path)).records()] == [
        "a/0.tar.gz:0", "b/1.tar:0", "c/1.tar:0",
    ]  # fmt: skip


def test_memory_does_not_grow_with_the_tar(tmp_path: Path) -> None:
    picture = jpeg(1) + os.urandom(10_000)
    files = [
        item
        for index in range(1000)
        for item in (
            (f"{index}.json", {"prompt": "p", "label": 1}),
            (f"{index}.0.jpg", picture),
            (f"{index}.1.jpg", picture),
        )
    ]  # fmt: skip
    path = write(tmp_path / "t.tar", files)
    tracemalloc.start()
    assert sum(1 for _ in Plugin(path).records()) == 1000  # 20 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000
