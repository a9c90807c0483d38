"""The record: reading, writing, targets, and pictures that do not open."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from diffalign.common.errors import UserError
from diffalign.data.pictures import BadImage, ImageRef
from diffalign.data.records import BadLabel, Candidate, Record, Score, read_records, write_records
from tests.pickapic_files import jpeg


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pair(first: float | None, second: float | None) -> Record:
    return Record("r", "p", [Candidate(ImageRef(), label=first), Candidate(ImageRef(), label=second)])


FULL = {
    "id": "a1",
    "prompt": "a red cube",
    "candidates": [
        {
            "image": "pictures/0.png",
            "prompt": "a crimson cube",
            "condition": {"pose": "front"},
            "model": "base",
            "seed": 3,
            "scores": {"clip": {"value": 0.25, "scale": "cosine", "version": "B/32", "parts": {"x": [1, 2]}}},
            "label": 1.0,
            "rank": 1,
            "votes": 4,
            "my_note": ["kept", {"as": "is"}],
        },
        {"image": "../elsewhere/1.png", "label": 0.0, "rank": 1.5},
    ],
    "source": "mine",
    "condition": "sketch.png",
    "user": "u7",
    "meta": {"lang": "de"},
    "licence": "CC0",
    "nested": {"a": [1, None]},
}


def test_unknown_fields_and_every_known_field_survive_a_round_trip(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(FULL) + "\n\n", encoding="utf-8")
    (record,) = read_records(source)
    assert record.extra == {"licence": "CC0", "nested": {"a": [1, None]}}
    assert record.candidates[0].extra == {"my_note": ["kept", {"as": "is"}]}
    assert record.candidates[0].scores["clip"].extra == {"parts": {"x": [1, 2]}}
    assert write_records(tmp_path / "out.jsonl", [record]) == 1
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8")) == FULL


def test_picture_paths_stay_valid_in_a_file_of_another_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.jpg").write_bytes(jpeg(9, (12, 10)))
    record = Record("r", "p", [Candidate(ImageRef(path=tmp_path / "pictures" / "0.jpg"))])
    target = tmp_path / "a" / "b" / "records.jsonl"
    write_records(target, [record])
    assert json.loads(target.read_text())["candidates"][0]["image"] == "../../pictures/0.jpg"
    (back,) = read_records(target)
    assert back.candidates[0].image.open().size == (12, 10)


def test_nan_score_becomes_null_and_reads_back_as_nan(tmp_path: Path) -> None:
    candidate = Candidate(ImageRef(path=tmp_path / "x.png"), scores={"clip": Score(math.nan, "cosine", "1")})
    write_records(tmp_path / "r.jsonl", [Record("r", "p", [candidate])])
    assert '"value": null' in (tmp_path / "r.jsonl").read_text()
    (back,) = read_records(tmp_path / "r.jsonl")
    assert math.isnan(back.candidates[0].scores["clip"].value)


def test_nothing_is_written_when_a_record_cannot_be(tmp_path: Path) -> None:
    fine = Record("r", "p", [Candidate(ImageRef(path=tmp_path / "x.png"))])
    in_memory = Record("s", "p", [Candidate(ImageRef(data=jpeg(1), name="row 5"))])
    with pytest.raises(UserError, match="row 5 is in memory only"):
        write_records(tmp_path / "r.jsonl", [fine, in_memory])
    nan = Record("s", "p", [Candidate(ImageRef(path=tmp_path / "x.png"), label=math.nan)])
    with pytest.raises(UserError, match="has the label nan"):
        write_records(tmp_path / "r.jsonl", [fine, nan])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a", "prompt": "p"}', r"f\.jsonl:2: no candidates \(a list\); it has id, prompt"),
        ('{"id": "a", "candidates": []}', r"f\.jsonl:2: no prompt"),
        ("{broken", r"f\.jsonl:2 is not JSON"),
        ("[1]", r"f\.jsonl:2: expected a JSON object, found list"),
        ('{"prompt": "p", "candidates": [{"image": 3}]}', "candidate 0: image is 3, expected a path"),
        (
            '{"prompt": "p", "candidates": [{"label": "good"}]}',
            "candidate 0: label is 'good', expected a number",
        ),
        ('{"prompt": "p", "candidates": [{"seed": 1.5}]}', "seed is 1.5, expected a whole number"),
        ('{"prompt": "p", "candidates": [{"scores": {"clip": 3}}]}', "score clip: expected a JSON object"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "p", "candidates": []}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        list(read_records(path))


def test_a_record_without_id_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('\n{"prompt": "p", "candidates": []}\n')
    assert [record.id for record in read_records(path)] == ["f.jsonl:2"]


@pytest.mark.parametrize(
    ("labels", "target"),
    [((1.0, 0.0), 1.0), ((0, 1), 0.0), ((0.5, 0.5), 0.5), ((0.7, 0.3), 0.7), ((None, None), None)],
)
def test_pair_target(labels: tuple[float | None, float | None], target: float | None) -> None:
    assert pair(*labels).pair_target() == target


@pytest.mark.parametrize(
    "labels", [(math.nan, 1.0), (1.0, 1.0), (0.0, 0.0), (1.5, -0.5), (1.0, None), (math.inf, 0.0)]
)
def test_labels_that_are_no_preference(labels: tuple[float | None, float | None]) -> None:
    with pytest.raises(BadLabel, match=f"record r: labels {labels[0]} and {labels[1]}"):
        pair(*labels).pair_target()


def test_pair_target_of_a_list_is_refused() -> None:
    with pytest.raises(UserError, match="r has 1 candidates"):
        Record("r", "p", [Candidate(ImageRef())]).pair_target()


def test_pictures_open_upright_on_white_and_in_8_bits() -> None:
    turned = Image.new("RGB", (20, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    ref = ImageRef(data=encoded(turned, "JPEG", exif=exif))
    assert ref.open().size == (10, 20)

    glass = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert ImageRef(data=encoded(glass)).open().getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert ImageRef(data=encoded(half)).open().getpixel((0, 0)) == (255, 127, 127)

    deep = Image.new("I;16", (8, 8), 0x8080)  # 0x8080 / 257 = 128
    assert ImageRef(data=encoded(deep)).open().getpixel((0, 0)) == (128, 128, 128)
    grey = ImageRef(data=encoded(Image.new("L", (8, 8), 77))).open()
    assert (grey.mode, grey.getpixel((0, 0))) == ("RGB", (77, 77, 77))
    cmyk = ImageRef(data=encoded(Image.new("CMYK", (8, 8)), "JPEG")).open()
    assert cmyk.mode == "RGB"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "missing_image"),
        (b"", "missing_image"),
        (b"not an image", "corrupt_image"),
        (jpeg(5, (64, 64))[:-50], "corrupt_image"),
        (encoded(Image.effect_noise((64, 64), 50))[:-200], "corrupt_image"),
        (jpeg(5, (64, 7)), "tiny_image"),
        (jpeg(5, (1, 1)), "tiny_image"),
    ],
)
def test_bad_pictures_name_themselves_and_the_reason(content: bytes | None, reason: str) -> None:
    with pytest.raises(BadImage, match=r"picture row 3:jpg_1") as caught:
        ImageRef(data=content, name="row 3:jpg_1").open(min_side=8)
    assert caught.value.reason == reason
    assert caught.value.name == "row 3:jpg_1"
    assert "\n" not in str(caught.value)


def test_a_picture_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"gone\.png: cannot be read \(No such file") as caught:
        ImageRef(path=tmp_path / "gone.png").open()
    assert caught.value.reason == "missing_image"


@pytest.mark.parametrize("name", ["a\0b.png", "x\ud800.png"])
def test_a_name_that_no_file_can_have(name: str) -> None:
    with pytest.raises(BadImage, match=r"cannot be read \(") as caught:
        ImageRef(path=Path(name)).open()
    assert caught.value.reason == "missing_image"
    assert str(caught.value).encode("utf-8")  # a lone surrogate could not be printed


@pytest.mark.parametrize("orientation", range(10))
def test_orientations_are_those_of_pillow(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation  # 1 to 8 are defined
    content = encoded(Image.effect_noise((20, 10), 50), exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert ImageRef(data=content).open().tobytes() == expected.tobytes()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's own words on the damage
def test_a_broken_exif_block_costs_no_picture() -> None:
    """Two bytes of the block are changed a thousand times; Pillow raises on some of them."""
    exif = Image.Exif()
    exif.update({0x010F: "maker", 0x0112: 6, 0x011A: 72.0, 0x8769: {0x9000: b"0230", 0x829A: 0.5}})
    whole = encoded(Image.new("RGB", (16, 8)), "JPEG", exif=exif)
    start = whole.index(b"Exif") + 6
    numbers, pillow_raised = random.Random(0), 0
    for _ in range(1000):
        broken = bytearray(whole)
        for _ in range(2):
            broken[numbers.randrange(start, start + len(exif.tobytes()) - 6)] = numbers.randrange(256)
        assert sorted(ImageRef(data=bytes(broken)).open().size) == [8, 16]
        try:
            with Image.open(io.BytesIO(broken)) as image:
                ImageOps.exif_transpose(image)
        except Exception:
            pillow_raised += 1
    assert pillow_raised > 0


def test_digest_is_of_the_bytes() -> None:
    assert ImageRef(data=b"abc").digest() == ImageRef(data=b"abc", name="x").digest()
    assert ImageRef(data=b"abc").digest() != ImageRef(data=b"abd").digest()
    assert len(ImageRef(data=b"abc").digest()) == 16


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="a file that opens and cannot be read")
def test_a_file_that_cannot_be_read_is_said() -> None:
    with pytest.raises(UserError, match=r"/proc/self/mem cannot be read \("):
        list(read_records("/proc/self/mem"))
