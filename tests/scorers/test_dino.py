"""DINO scores: cosines and features by hand for every family, references of every kind, refusals."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from diffalign.common.errors import UserError
from diffalign.scorers import _dino, load_scorer, score_all
from diffalign.scorers._pixels import Preprocess
from tests.tiny_clip import write_open_clip, write_transformers

PIXELS, PATCH, WIDTH, LAYERS = 32, 8, 32, 2
SIZES = [(40, 64), (64, 64), (90, 50), (1, 1), (33, 32), (20, 200)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = {
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
    "vit": "ViT",
    "dinov3_vit": "DINOv3ViT",
}
CROPPED = {"size": {"shortest_edge": 36}, "crop_size": {"height": PIXELS, "width": PIXELS}, "resample": 3}
SQUASHED = {"size": {"height": PIXELS, "width": PIXELS}, "resample": 2}
SETTINGS = {"dinov2": CROPPED, "dinov2_with_registers": CROPPED, "vit": SQUASHED, "dinov3_vit": SQUASHED}


def pictures() -> list[Image.Image]:
    """Six noisy pictures of different sizes."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (high, wide, 3), dtype=np.uint8)) for wide, high in SIZES]


def others() -> list[Image.Image]:
    """Six other pictures, smooth ones."""
    rng = np.random.default_rng(1)
    return [
        Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((48, 48)) for _ in range(6)
    ]


def write_dino(folder: Path, kind: str = "dinov2", **options: object) -> Path:
    """Writes a random model in the layout of transformers; returns the folder."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    sizes |= {"image_size": PIXELS, "patch_size": PATCH, "intermediate_size": 4 * WIDTH}
    config = getattr(transformers, f"{KINDS[kind]}Config")(**sizes | options)
    without_pooler = {"add_pooling_layer": False} if kind == "vit" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{KINDS[kind]}Model")(config, **without_pooler).eval()
        for parameter in model.parameters():  # biases and norms would start at 0 and 1
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    settings = SETTINGS[kind] | {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def contract_case(folder: Path):
    context = [{"reference": other} for other in others()]
    others()[4].save(folder / "reference.png")
    context[4] = {"reference": str(folder / "reference.png")}
    context[5] = {"reference": [others()[0], folder / "reference.png"]}
    return {"path": str(write_dino(folder / "tiny"))}, pictures(), None, context


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dino")
    return {kind: write_dino(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def scorer(folders):
    return load_scorer("dino", path=str(folders["dinov2"]))


def by_hand(image: Image.Image, settings: dict) -> torch.Tensor:
    """A picture prepared with PIL and numpy as the settings say, [1, 3, H, W]."""
    kernel = Image.Resampling(settings["resample"])
    if "shortest_edge" in settings["size"]:
        edge, (wide, high) = settings["size"]["shortest_edge"], image.size
        longer = int(edge * max(wide, high) / min(wide, high))
        image = image.resize((edge, longer) if wide <= high else (longer, edge), kernel)
        left, top = (round((side - PIXELS) / 2) for side in image.size)
        image = image.crop((left, top, left + PIXELS, top + PIXELS))
    else:
        image = image.resize((PIXELS, PIXELS), kernel)
    pixels = (np.asarray(image, dtype=np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_class_token_after_the_last_norm(folders, kind):
    model = getattr(transformers, f"{KINDS[kind]}Model").from_pretrained(folders[kind]).eval()
    pixels = torch.cat([by_hand(image, SETTINGS[kind]) for image in pictures()])
    with torch.no_grad():
        output = model(pixels)
    expected = F.normalize(output.last_hidden_state[:, 0], dim=-1)
    ours = load_scorer("dino", path=str(folders[kind]))
    # DINOv3's processor resizes floats, PIL bytes: they differ by less than a grey level.
    close = 0.02 if kind == "dinov3_vit" else 1e-5
    torch.testing.assert_close(ours.embed_images(pictures()), expected, rtol=0, atol=close)
    if kind != "vit":
        torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_equal_to_its_reference_gives_one(folders, kind, tmp_path):
    images = pictures()
    for place, image in enumerate(images):
        image.save(tmp_path / f"{place}.png")
    paths = [{"reference": str(tmp_path / f"{place}.png")} for place in range(6)]
    copies = [{"reference": [image.copy()]} for image in images]
    for mode in ("reference", "tensor"):
        scorer = load_scorer("dino", path=str(folders[kind]), mode=mode)
        for context in (paths, copies):
            torch.testing.assert_close(scorer(images, context=context), torch.ones(6), rtol=0, atol=1e-6)


def test_cosines_by_hand_mean_and_max(folders, scorer, tmp_path):
    features, references = scorer.embed_images(pictures()), scorer.embed_images(others())
    cosines = features @ references.T
    single = scorer(pictures(), context=[{"reference": other} for other in others()])
    torch.testing.assert_close(single, cosines.diagonal(), rtol=0, atol=1e-6)
    for place, other in enumerate(others()):
        other.save(tmp_path / f"{place}.png")
    several = [others()[0], str(tmp_path / "1.png"), tmp_path / "2.png"]
    context = [{"reference": several}] * 6
    best = load_scorer("dino", path=str(folders["dinov2"]), over="max")
    mean = scorer(pictures(), context=context)
    torch.testing.assert_close(mean, cosines[:, :3].mean(dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        best(pictures(), context=context), cosines[:, :3].amax(dim=1), rtol=0, atol=1e-6
    )
    (group,) = score_all({"it": scorer}, pictures(), context=context).values()
    torch.testing.assert_close(group.values, mean, rtol=0, atol=1e-6)


def test_dinov2_by_hand(folders):
    """From the file's tensors in plain tensor code: blocks with layer scale, exact GELU, the class token."""
    state = load_file(folders["dinov2"] / "model.safetensors")
    x = torch.cat([by_hand(image, CROPPED) for image in pictures()])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    patches = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3)
    name = "embeddings.patch_embeddings.projection"
    x = patches.flatten(1, 2) @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]
    x = torch.cat([state["embeddings.cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + state["embeddings.position_embeddings"]
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}"
        y, parts = norm(x, f"{name}.norm1"), []
        for part in ("query", "key", "value"):
            z = linear(y, f"{name}.attention.attention.{part}")
            parts.append(z.unflatten(-1, (2, -1)).transpose(1, 2))
        weights = (parts[0] @ parts[1].transpose(-1, -2) / (WIDTH / 2) ** 0.5).softmax(dim=-1)
        y = linear((weights @ parts[2]).transpose(1, 2).flatten(2), f"{name}.attention.output.dense")
        x = x + y * state[f"{name}.layer_scale1.lambda1"]
        y = linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        x = x + y * state[f"{name}.layer_scale2.lambda1"]
    expected = F.normalize(norm(x, "layernorm")[:, 0], dim=-1)
    ours = load_scorer("dino", path=str(folders["dinov2"])).embed_images(pictures())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_a_reference_that_does_not_open_is_named_and_costs_one_value(scorer, tmp_path):
    others()[0].save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    good = {"reference": str(tmp_path / "good.png")}
    context = [
        good,
        {"reference": str(tmp_path / "nowhere.png")},
        {"reference": [tmp_path / "good.png", tmp_path / "torn.png"]},
        {"user": "ann"},
        {"reference": 3},
        {"reference": []},
    ]
    scores = scorer.score(pictures(), context=context)
    assert scores.values.isnan().tolist() == [False, True, True, True, True, True]
    assert scores.errors[0] is None
    for error, part in zip(
        scores.errors[1:],
        ("nowhere.png", "torn.png", "no `reference`", "a int", "no `reference`"),
        strict=True,
    ):
        assert part in error and "\n" not in error
    torch.testing.assert_close(scores.values[:1], scorer(pictures()[:1], context=[good]), rtol=0, atol=1e-6)
    with Image.open(tmp_path / "torn.png") as lazy:
        late = scorer.score(pictures()[:2], context=[{"reference": lazy}, good])
    assert late.values.isnan().tolist() == [True, False] and "torn.png" in late.errors[0]
    nothing = scorer.score(pictures()[:1], context=[{"reference": str(tmp_path / "nowhere.png")}])
    assert math.isnan(nothing.values.item())


def test_a_file_is_embedded_once_and_anew_when_it_changes(folders, tmp_path, monkeypatch):
    scorer = load_scorer("dino", path=str(folders["dinov2"]), batch_size=2)
    seen = []
    inner = scorer.towers.encode_images
    scorer.towers.encode_images = lambda pixels: (seen.append(len(pixels)), inner(pixels))[1]
    path = tmp_path / "reference.png"
    others()[0].save(path)
    context = [{"reference": str(path)}] * 6
    before = scorer(pictures(), context=context)
    assert sum(seen) == 6 + 1
    scorer(pictures(), context=context)
    assert sum(seen) == 2 * 6 + 1
    others()[1].save(path)
    os.utime(path, ns=(1, 1))
    after = scorer(pictures(), context=context)
    assert sum(seen) == 3 * 6 + 2
    assert (before - after).abs().min() > 0
    expected = scorer(pictures(), context=[{"reference": others()[1]}] * 6)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)
    # With room for one file, three in turn still give the right values.
    monkeypatch.setattr(_dino, "KEPT", 1)
    for place in range(3):
        others()[place].save(tmp_path / f"{place}.png")
    by_path = scorer(pictures(), context=[{"reference": tmp_path / f"{place % 3}.png"} for place in range(6)])
    by_picture = scorer(pictures(), context=[{"reference": others()[place % 3]} for place in range(6)])
    torch.testing.assert_close(by_path, by_picture, rtol=0, atol=1e-6)


def test_a_relative_path_counts_from_the_current_folder(scorer, tmp_path, monkeypatch):
    pictures()[0].save(tmp_path / "it.png")
    monkeypatch.chdir(tmp_path)
    assert scorer(pictures()[:1], context=[{"reference": "it.png"}]).item() == pytest.approx(1, abs=1e-6)


def test_the_home_folder_can_be_named(scorer, tmp_path, monkeypatch):
    others()[0].save(tmp_path / "reference.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    scores = scorer.score(pictures()[:1], context=[{"reference": "~/reference.png"}])
    assert scores.errors == [None]
    assert torch.equal(scores.values, scorer(pictures()[:1], context=[{"reference": others()[0]}]))


@pytest.mark.parametrize("name", ["a\0b", "x\ud800.png"])
def test_a_name_that_no_file_can_have_is_nan(scorer, name):
    context = [{"reference": name}, {"reference": others()[0]}]
    scores = scorer.score(pictures()[:2], context=context)
    assert scores.values.isnan().tolist() == [True, False]
    assert "cannot be read" in scores.errors[0] and scores.errors[0].encode("utf-8")


def test_the_version_says_how_pictures_are_prepared(scorer, folders, tmp_path):
    folder = tmp_path / folders["dinov2"].name
    shutil.copytree(folders["dinov2"], folder)
    assert load_scorer("dino", path=str(folder)).version == scorer.version
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.9]}))
    assert load_scorer("dino", path=str(folder)).version != scorer.version


def test_the_gradient_reaches_the_picture_and_not_the_reference(folders):
    scorer = load_scorer("dino", path=str(folders["dinov2"]), mode="tensor")
    pixels = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    broken = [{"reference": others()[0]}, {"reference": "nowhere.png"}]
    values = scorer(pixels, context=broken)
    values[0].backward()
    assert pixels.grad[0].abs().sum() > 0 and pixels.grad[1].abs().sum() == 0


def test_settings_are_honoured(folders, tmp_path):
    image = pictures()[:1]
    assert load_scorer("dino", path=str(folders["dinov2"])).towers.preprocess == Preprocess(
        size=(PIXELS, PIXELS), shortest=36, mean=MEAN, std=STD, crop="floor"
    )
    # The files beside DINO v1 give a bare number, which a ViT's image processor reads as both sides.
    vit = shutil.copytree(folders["vit"], tmp_path / "vit")
    old = {"size": PIXELS, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (vit / "preprocessor_config.json").write_text(json.dumps(old))
    prepared = load_scorer("dino", path=str(vit)).towers.preprocess(image)
    squashed = np.asarray(image[0].resize((PIXELS, PIXELS), Image.Resampling.BILINEAR), dtype=np.float32)
    expected = torch.from_numpy(squashed).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1e-6)
    authors = load_scorer(
        "dino", path=str(vit), preparation="authors"
    )  # 224 pixels: another size than its own
    assert authors.preprocess == Preprocess(size=(224, 224), shortest=256, mean=MEAN, std=STD)
    assert (
        authors.embed_images(image) - load_scorer("dino", path=str(vit)).embed_images(image)
    ).abs().max() > 0.01
    floats = load_scorer("dino", path=str(folders["dinov3_vit"])).towers.preprocess
    assert (floats.resize, floats.interpolation, floats.resizes) == ("squash", "bilinear", "tensor")


def test_other_models_and_missing_weights_are_refused(folders, tmp_path):
    def error(path: Path | str, **options: str) -> str:
        with pytest.raises(UserError) as caught:
            load_scorer("dino", path=str(path), **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    clip = write_transformers(write_open_clip(tmp_path / "clip"), tmp_path / "clip_hf")
    assert "'clip', not one of dinov2" in error(clip)
    assert "no config.json" in error(tmp_path / "clip")
    assert "do not exist" in error(tmp_path / "nowhere")
    assert "the hub does not give them" in error("no/such-model")  # the tests run without network
    assert "leave arch out" in error(folders["dinov2"], arch="ViT-B-16")
    broken = shutil.copytree(folders["dinov2"], tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    assert "dinov2 weights" in error(broken)
    assert "lack 1 tensors of their config, first layernorm.weight" in error(broken)
    (broken / "model.safetensors").write_bytes(b"torn")
    assert "do not load" in error(broken)
    (broken / "model.safetensors").unlink()
    assert "no weights" in error(broken)
    (broken / "preprocessor_config.json").unlink()
    assert "copy preprocessor_config.json there" in error(broken)


def test_a_pooler_is_not_needed(folders):
    """DINO v1 was trained without one: the written ViT has none, and none is made up."""
    assert not any("pooler" in name for name in load_file(folders["vit"] / "model.safetensors"))
    (module,) = load_scorer("dino", path=str(folders["vit"])).modules()
    assert module.pooler is None


def test_texts_are_refused(scorer):
    with pytest.raises(UserError, match="no text tower"):
        scorer.embed_texts(["a cat"])


def test_bad_options_are_refused():
    with pytest.raises(UserError, match="over of scorer dino"):
        load_scorer("dino", path="x", over="median")
    with pytest.raises(UserError, match="did you mean 'authors'"):
        load_scorer("dino", path="x", preparation="author")
