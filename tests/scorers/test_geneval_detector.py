"""What GenEval's rule is fed with: boxes out of masks by hand, colours by CLIP's own functions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Mask2FormerImageProcessor

from diffalign.common.errors import UserError
from diffalign.scorers import load_scorer, score_all
from diffalign.scorers._geneval import COLORS, Detected
from diffalign.scorers._geneval_detector import instances
from diffalign.scorers.geneval import TEMPLATES, Plugin, crop, tell_colors
from tests.tiny_clip import write_open_clip
from tests.tiny_detector import write_detector


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> str:
    return str(write_detector(tmp_path_factory.mktemp("detector")))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(write_open_clip(tmp_path_factory.mktemp("clip") / "tiny"))


def pictures() -> list[Image.Image]:
    """Six noisy pictures of different sizes."""
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (90, 50), (40, 64), (33, 32), (64, 100), (128, 64)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def asked(name: str, count: int = 1, **more) -> dict:
    return {"class": name, "count": count, **more}


def box(left: float, top: float, side: float = 10, confidence: float = 0.95) -> list[float]:
    return [left, top, left + side, top + side, confidence]


def test_instances_out_of_masks_by_hand():
    """Three queries, two classes: a mask at the picture's size is taken as it is."""
    probabilities = torch.tensor([[0.6, 0.35, 0.05], [0.1, 0.8, 0.1], [0.2, 0.1, 0.7]])
    masks = torch.full((3, 8, 12), -5.0)
    masks[0, 2:5, 3:9] = 1.0
    masks[1, 7, 0] = 2.0
    masks[2] = 9.0
    found = instances(probabilities.log(), masks, {0, 1}, torch.ones(8, 12), (8, 12))
    # The best three of six pairs: 0.8 (query 1, class 1), 0.6 (0, 0) and 0.35 (0, 1): one query may give two.
    (first,) = found[0]
    assert first.box[:4] == (3, 2, 9, 5)  # the end is behind the last pixel
    assert first.box[4] == pytest.approx(0.6 / (1 + math.exp(-1)), rel=1e-5)
    assert first.mask.sum() == 18 and first.mask[2:5, 3:9].all()
    assert [each.box[:4] for each in found[1]] == [(0, 7, 1, 8), (3, 2, 9, 5)]
    assert found[1][0].box[4] == pytest.approx(0.8 / (1 + math.exp(-2)), rel=1e-5)
    assert set(instances(probabilities.log(), masks, {1}, torch.ones(8, 12), (8, 12))) == {1}
    assert instances(probabilities.log(), masks - 20, {0, 1}, torch.ones(8, 12), (8, 12)) == {}


def test_padding_is_cut_before_a_mask_is_resized():
    masks = torch.full((1, 8, 8), -5.0)
    masks[0, :, :2] = 5.0
    seen = torch.zeros(8, 8)
    seen[:, :4] = 1  # the right half is padding
    found = instances(torch.tensor([[5.0, 0.0]]), masks, {0}, seen, (16, 8))
    assert found[0][0].box[:4] == (0, 0, 4, 16)


def test_instances_are_those_of_transformers():
    """At 384 x 384, the only size at which transformers looks."""
    generator = torch.Generator().manual_seed(0)
    class_logits = 3 * torch.randn(9, 5, generator=generator)
    coarse = torch.randn(1, 9, 6, 6, generator=generator)
    mask_logits = 4 * F.interpolate(coarse, (96, 96), mode="bicubic")[0]
    output = SimpleNamespace(class_queries_logits=class_logits[None], masks_queries_logits=mask_logits[None])
    (theirs,) = Mask2FormerImageProcessor().post_process_instance_segmentation(
        output, threshold=0.3, target_sizes=[(384, 384)], return_binary_maps=True
    )
    ours = instances(class_logits, mask_logits, set(range(4)), torch.ones(384, 384), (384, 384))
    pairs = [
        (label, each.box[4], each.mask)
        for label, found in ours.items()
        for each in found
        if each.box[4] >= 0.3
    ]
    assert len(theirs["segments_info"]) == len(pairs) >= 4
    for segment, mask in zip(theirs["segments_info"], theirs["segmentation"], strict=True):
        assert any(
            label == segment["label_id"]
            and score == pytest.approx(segment["score"], abs=2e-6)
            and np.array_equal(ours_mask, mask.bool().numpy())
            for label, score, ours_mask in pairs
        )


def test_the_detector_runs_from_pictures_to_boxes(detector):
    scorer = load_scorer("geneval", detector=detector)
    picture = pictures()[1]
    inputs = scorer._detector.processor(images=[picture], return_tensors="pt")
    with torch.no_grad():
        output = scorer._detector.module(**inputs)
    expected = instances(
        output.class_queries_logits[0],
        output.masks_queries_logits[0],
        {0, 1, 2},
        inputs["pixel_mask"][0],
        (picture.height, picture.width),
    )
    found = scorer._detector(picture, ["dog", "cat", "computer mouse"])
    boxes = {name: [each.box for each in each_class] for name, each_class in found.items()}
    assert sum(map(len, boxes.values())) > 0
    for label, name in enumerate(("dog", "cat", "computer mouse")):  # GenEval's name of COCO's "mouse"
        assert boxes[name] == [each.box for each in expected.get(label, [])]
    for box_ in (b for each in boxes.values() for b in each):
        assert 0 <= box_[0] < box_[2] <= picture.width and 0 <= box_[1] < box_[3] <= picture.height
    # What it found, given as detections, is judged alike.
    for name in boxes:
        for count in (1, 2):
            context = {"include": [asked(name, count)]}
            given = context | {"detections": {key: [list(b) for b in value] for key, value in boxes.items()}}
            alone = scorer.score([picture], context=[context])
            torch.testing.assert_close(
                alone.values, load_scorer("geneval")([picture], context=[given]), rtol=0, atol=0
            )
            assert alone.values.item() == float(sum(b[4] > 0.3 for b in boxes[name]) >= count)


def test_given_detections_go_before_the_detector_and_unknown_classes_are_nan(detector):
    scorer = load_scorer("geneval", detector=detector)
    contexts = [
        {"include": [asked("zebra")], "detections": {"zebra": [box(0, 0)]}},
        {"include": [asked("dogs")]},
    ]
    scores = scorer.score(pictures()[:2], context=contexts)
    assert scores.values[0] == 1 and scores.values[1].isnan()
    assert "knows no 'dogs': did you mean 'dog'?" in scores.errors[1]


def test_the_shorter_side_can_be_set(detector):
    scorer = load_scorer("geneval", detector=detector, shortest=96)
    assert scorer._detector.size == {"size": {"shortest_edge": 96, "longest_edge": 160}}
    shapes = []
    hook = scorer.modules()[0].register_forward_pre_hook(
        lambda module, arguments, inputs: shapes.append(tuple(inputs["pixel_values"].shape[2:])),
        with_kwargs=True,
    )
    scorer.score([Image.new("RGB", (128, 64))], context=[{"include": [asked("dog")]}])
    hook.remove()
    assert shapes == [(96, 160)]  # 96 x 192, and the longer side cut to 160
    assert (
        scorer.version.endswith("@96px")
        and scorer.version != load_scorer("geneval", detector=detector).version
    )


def test_versions_name_what_was_loaded(detector, clip):
    bare, both = load_scorer("geneval"), load_scorer("geneval", detector=detector, color_model=clip)
    assert bare.version == "rule-1" and bare.modules() == []
    assert both.version.count("@") == 2 and len(both.modules()) == 2
    assert all(not p.requires_grad for module in both.modules() for p in module.parameters())


def test_colours_are_the_nearest_mean_of_the_templates(clip):
    scorer = load_scorer("geneval", color_model=clip)
    model = open_clip.create_model(f"local-dir:{clip}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}")
    picture = pictures()[0]
    boxes = [Detected((0, 0, 40, 40, 0.9)), Detected((30, 5, 60, 64, 0.8)), Detected((10, 50, 64, 60, 0.7))]
    weights = []
    with torch.no_grad():
        for color in COLORS:
            texts = [
                f"a photo of a {color} dog",
                f"a photo of a {color}-colored dog",
                f"a photo of a {color} object",
            ]
            features = F.normalize(model.encode_text(tokenizer(texts, 16)), dim=-1)
            weights.append(F.normalize(features.mean(dim=0), dim=0))
        crops = [picture.crop(tuple(map(int, each.box[:4]))) for each in boxes]
        pixels = scorer._towers.preprocess(crops)
        logits = model.encode_image(pixels, normalize=True) @ torch.stack(weights).T
    expected = [COLORS[i] for i in logits.argmax(dim=1)]
    assert tell_colors(scorer._towers, picture, "dog", boxes) == expected
    assert tell_colors(scorer._towers, picture, "dog", []) == []
    # Through the scorer, from boxes without colours: asked for what CLIP says it is right, else it is not.
    found = {"dog": [list(boxes[0].box)]}
    for color in COLORS[:4]:
        context = {"include": [asked("dog", color=color)], "detections": found}
        assert scorer([picture], context=[context]).item() == float(color == expected[0])
    # Colours that the context brings go first.
    other = next(color for color in COLORS if color != expected[0])
    context = {"include": [asked("dog", color=other)], "detections": found, "colors": {"dog": [other]}}
    assert scorer([picture], context=[context]).item() == 1
    assert TEMPLATES[2].format("red", "dog") == "a photo of a red object"


def test_a_colour_that_nobody_can_tell_is_nan(clip):
    context = {"include": [asked("dog", color="gray")], "detections": {"dog": [box(0, 0)]}}
    scores = load_scorer("geneval", color_model=clip).score(pictures()[:1], context=[context])
    assert scores.values.isnan().all() and "unknown color of clause 0 of include 'gray'" in scores.errors[0]


def test_a_crop_is_grey_outside_of_its_mask():
    picture = Image.new("RGB", (8, 6), (255, 0, 0))
    mask = np.zeros((6, 8), dtype=bool)
    mask[1:4, 2:5] = True
    mask[1, 2] = False
    cut = np.array(crop(picture, Detected((2, 1, 5, 4, 1.0), mask)))
    assert cut.shape == (3, 3, 3)
    assert cut[0, 0].tolist() == [153, 153, 153] and cut[2, 2].tolist() == [255, 0, 0]
    assert crop(picture, Detected((1.6, 0.4, 4.4, 3.0, 1.0))).size == (2, 3)
    assert crop(picture, Detected((3, 3, 3, 3, 1.0))).size == (1, 1)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ((0, 0, 20000, 20000), (8, 6)),
        ((-1e9, 2, 3, 1e300), (3, 4)),
        ((7.6, 5.7, 8, 6), (1, 1)),  # rounded, it would begin behind the last pixel
        ((0, 0, 0, 0), (1, 1)),
    ],
)
def test_a_crop_stays_in_its_picture(given, size):
    assert crop(Image.new("RGB", (8, 6)), Detected((*given, 1.0))).size == size


@pytest.mark.parametrize("given", [(1e10, 0, 1e10 + 5, 5), (0, 6, 3, 9), (-9, 0, -2, 5), (0, -9, 5, 0)])
def test_a_box_outside_of_its_picture_is_nan(clip, given):
    """The picture beside it is judged all the same."""
    contexts = [
        {"include": [asked("dog", color="red")], "detections": {"dog": [[*place, 0.9]]}}
        for place in (given, (0, 0, 20000, 20000))
    ]
    scores = load_scorer("geneval", color_model=clip).score([Image.new("RGB", (8, 6))] * 2, context=contexts)
    assert scores.values.isnan().tolist() == [True, False]
    assert "outside of its picture of 8 x 6" in scores.errors[0] and scores.errors[1] is None


def test_a_picture_on_which_the_detector_fails_is_nan(detector):
    images = [Image.new("RGB", (1, 300)), Image.new("RGB", (64, 64))]
    scores = load_scorer("geneval", detector=detector).score(
        images, context=[{"include": [asked("dog")]}] * 2
    )
    assert scores.values.isnan().tolist() == [True, False]
    assert scores.errors[0].startswith("the detector fails on this picture of 1 x 300: ")


def test_the_version_says_how_the_detector_prepares_pictures(tmp_path, detector):
    folder = write_detector(tmp_path / Path(detector).name)
    assert (
        load_scorer("geneval", detector=str(folder)).version
        == load_scorer("geneval", detector=detector).version
    )
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.9] * 3}))
    assert (
        load_scorer("geneval", detector=str(folder)).version
        != load_scorer("geneval", detector=detector).version
    )


def test_networks_come_with_load(detector, clip):
    for options in ({"detector": detector}, {"color_model": clip}):
        plugin = Plugin(**options)
        with pytest.raises(UserError, match=r"no (detector|color_model) yet: call .load\(\) first"):
            plugin.score(pictures()[:1], context=[{"include": [asked("dog")]}])


def test_crops_do_not_mix_with_pictures_of_a_shared_pass(clip):
    """A pass keeps features by the identity of pictures, and a crop's may come again."""
    contexts = [
        {"include": [asked("dog", color=color)], "detections": {"dog": [box(i, i, 20)]}}
        for i, color in enumerate(COLORS[:6])
    ]
    scorer, other = load_scorer("geneval", color_model=clip), load_scorer("clip", path=clip)
    alone = scorer(pictures(), context=contexts), other(pictures(), ["a"] * 6)
    both = score_all({"a": other, "b": scorer}, pictures(), ["a"] * 6, context=contexts)
    assert torch.equal(both["b"].values, alone[0])
    torch.testing.assert_close(both["a"].values, alone[1], rtol=0, atol=1e-6)
    (memo,) = other.memos()
    assert memo is scorer._towers.memo
    with memo.one_pass():
        scorer(pictures(), context=contexts)
        assert memo._known == {}


def test_bad_options_are_refused(tmp_path, detector, clip):
    for options, message in (
        ({"scale": "corect"}, "did you mean 'correct'"),
        ({"batch_size": 0}, "use 1 or more"),
        ({"detector": detector, "shortest": 8}, "use 32 or more"),
        ({"shortest": 800}, "shortest without detector"),
        ({"revision": "main"}, "revision without detector"),
        ({"color_arch": "ViT-L-14"}, "color_arch without color_model"),
        ({"detector": "nowhere"}, "do not exist: give a folder"),
        ({"detector": "no/such-model"}, "the hub does not give them"),  # the tests run without network
        ({"detector": clip}, "no Mask2Former"),
        ({"color_model": str(tmp_path / "none")}, "do not exist"),
    ):
        with pytest.raises(UserError, match=message):
            load_scorer("geneval", **options)
    folder = write_detector(tmp_path / "detector")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="no image processor"):
        load_scorer("geneval", detector=str(folder))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "maskformer"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="model_type 'maskformer'"):
        load_scorer("geneval", detector=str(folder))
