"""HPS v2: its letterbox pixel by pixel, its files, versions and scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffalign.common.errors import UserError
from diffalign.scorers import load_scorer
from diffalign.scorers._pixels import OPENAI_MEAN, OPENAI_STD, Preprocess
from tests.scorers.test_clip import PROMPTS, pictures
from tests.tiny_arch import known_arch, write_state_dict

SIDE = 32


def write_folder(folder: Path) -> Path:
    """Both published files, of different weights."""
    folder.mkdir(exist_ok=True)
    write_state_dict(folder / "HPS_v2_compressed.pt", seed=0)
    write_state_dict(folder / "HPS_v2.1_compressed.pt", seed=1)
    return folder


def contract_case(folder: Path):
    return {"path": str(write_folder(folder / "hps")), "arch": known_arch()}, pictures(), PROMPTS, None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("hps") / "both"))


def letterboxed(image: Image.Image) -> torch.Tensor:
    """The authors' steps by hand: bytes / 255, bicubic to the longer side, black around, normalised."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    height, width = pixels.shape[2:]
    scale = SIDE / max(height, width)
    new = (round(height * scale), round(width * scale))
    small = F.interpolate(pixels, size=new, mode="bicubic", antialias=True)
    down, right = SIDE - new[0], SIDE - new[1]
    padded = F.pad(small, (right // 2, right - right // 2, down // 2, down - down // 2))
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_MEAN, OPENAI_STD))
    return ((padded - mean) / std)[0]


@pytest.mark.parametrize(
    ("size", "new"), [((768, 420), (224, 123)), ((420, 768), (123, 224)), ((384, 210), (224, 123))]
)
def test_sizes_are_rounded_as_by_the_authors(size, new):
    """round(420 * (224 / 768)) is 123, round(420 / (768 / 224)) is 122."""
    box = Preprocess(size=(224, 224), mean=(0, 0, 0), std=(1, 1, 1), resize="letterbox", resizes="tensor")
    white = box([Image.new("RGB", size, "white")])[0, 0] > 0.5
    assert (int(white.any(0).sum()), int(white.any(1).sum())) == new


@pytest.mark.parametrize("size", [(64, 64), (90, 50), (20, 200), (33, 32), (31, 7), (32, 12)])
def test_the_whole_picture_is_seen_on_black(folder, size):
    scorer = load_scorer("hpsv2", path=folder, arch=known_arch())
    image = pictures()[0].resize(size)
    for mode in ("reference", "tensor"):
        torch.testing.assert_close(scorer.preprocess([image], mode)[0], letterboxed(image), rtol=0, atol=1e-5)


def test_a_score_by_hand(folder):
    scorer = load_scorer("hpsv2", path=folder, arch=known_arch())
    model = scorer.modules()[0]
    with torch.no_grad():
        pixels = torch.stack([letterboxed(image) for image in pictures() if min(image.size) > 1])
        features = model.encode_image(pixels, normalize=True)
    chosen = [(image, text) for image, text in zip(pictures(), PROMPTS, strict=True) if min(image.size) > 1]
    expected = (features * scorer.embed_texts([text for _, text in chosen])).sum(-1)
    values = scorer([image for image, _ in chosen], [text for _, text in chosen])
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    percent = load_scorer("hpsv2", path=folder, arch=known_arch(), scale="percent")
    torch.testing.assert_close(percent(pictures(), PROMPTS), 100 * scorer(pictures(), PROMPTS))


def test_versions_are_different_weights_and_say_so(folder):
    old, new = (load_scorer("hpsv2", path=folder, arch=known_arch(), version=v) for v in ("2.0", "2.1"))
    assert (old(pictures(), PROMPTS) - new(pictures(), PROMPTS)).abs().max() > 1e-3
    assert old.version.startswith("2.0/") and new.version.startswith("2.1/") and old.version != new.version
    assert load_scorer("hpsv2", path=folder, arch=known_arch()).version == new.version
    file = str(Path(folder) / "HPS_v2_compressed.pt")
    again = load_scorer("hpsv2", path=file, arch=known_arch(), version="2.0")
    assert torch.equal(again(pictures(), PROMPTS), old(pictures(), PROMPTS))
    with pytest.raises(UserError, match=r"is version 2\.0: give version=2\.0"):
        load_scorer("hpsv2", path=file, arch=known_arch())


def test_what_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="version of scorer hpsv2"):
        load_scorer("hpsv2", path=folder, version="2.2")
    with pytest.raises(UserError, match="did you mean 'percent'"):
        load_scorer("hpsv2", path=folder, scale="per_cent")
    with pytest.raises(UserError, match=r"has no HPS_v2\.1_compressed\.pt"):
        load_scorer("hpsv2", path=str(tmp_path))
    with pytest.raises(UserError, match="do not exist"):
        load_scorer("hpsv2", path="./nowhere.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match="pickled program"):
        load_scorer("hpsv2", path=str(tmp_path), arch=known_arch())
