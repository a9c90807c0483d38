"""CLIP scores: layouts agree and are told apart, the activation is right, scales are what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil

from diffalign.common.errors import UserError
from diffalign.scorers import load_scorer, score_all
from diffalign.scorers._pixels import Preprocess
from diffalign.scorers._towers import hub_files, tag_uses_quick_gelu
from tests.tiny_arch import known_arch, write_state_dict
from tests.tiny_clip import full_tokenizer, write_open_clip, write_transformers

PROMPTS = [
    "a red circle",
    "two blue squares left of a photo",
    "Zebra crossing, at night!",
    "",
    "green",
    "a red circle",
]
SIZES = [(40, 64), (64, 64), (90, 50), (1, 1), (33, 32), (20, 200)]
EVEN = [(40, 60), (64, 64), (96, 48), (1, 1), (34, 32), (20, 200)]


def pictures() -> list[Image.Image]:
    """Six noisy pictures of different sizes."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in SIZES
    ]


def even_pictures() -> list[Image.Image]:
    """The same, but of sizes where the layouts' own preparations crop alike: see `Preprocess.crop`."""
    return [image.resize(size) for image, size in zip(pictures(), EVEN, strict=True)]


def contract_case(folder: Path):
    return {"path": str(write_open_clip(folder / "tiny"))}, pictures(), PROMPTS, None


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("clip")
    plain = write_open_clip(root / "open_clip")
    quick = write_open_clip(root / "open_clip_quick", quick_gelu=True)
    return {
        "plain": plain,
        "quick": quick,
        "plain_hf": write_transformers(plain, root / "transformers"),
        "quick_hf": write_transformers(quick, root / "transformers_quick"),
    }


@pytest.mark.parametrize("kind", ["plain", "quick"])
@pytest.mark.parametrize("scale", ["cosine", "logits", "clipscore"])
def test_both_layouts_give_one_score(folders, kind, scale):
    ours = load_scorer("clip", path=str(folders[kind]), scale=scale)
    theirs = load_scorer("clip", path=str(folders[f"{kind}_hf"]), scale=scale)
    images = even_pictures()
    torch.testing.assert_close(ours(images, PROMPTS), theirs(images, PROMPTS), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.embed_images(images), theirs.embed_images(images), rtol=0, atol=1e-4)


def test_both_layouts_agree_with_clips_own_vocabulary(tmp_path):
    folder = write_open_clip(tmp_path / "open_clip", own_tokenizer=False)
    ours = load_scorer("clip", path=str(folder))
    theirs = load_scorer("clip", path=str(write_transformers(folder, tmp_path / "transformers")))
    torch.testing.assert_close(
        ours(even_pictures(), PROMPTS), theirs(even_pictures(), PROMPTS), rtol=0, atol=1e-4
    )


def test_open_clip_and_transformers_cut_texts_alike():
    text = "a photo of " + "very " * 90 + "small town, don't 1234"
    ours = open_clip.get_tokenizer("ViT-B-32")([text])[0]
    theirs = full_tokenizer()(text, max_length=77, truncation=True).input_ids
    assert ours.tolist() == theirs


def test_quick_gelu_is_chosen_by_the_config(folders):
    plain, quick = (load_scorer("clip", path=str(folders[kind])) for kind in ("plain", "quick"))
    # The weights are the same (one seed): only the activation differs, and it must show.
    difference = plain(pictures(), PROMPTS) - quick(pictures(), PROMPTS)
    assert difference.abs().max() > 1e-4
    assert plain.version != quick.version


def test_an_openai_tag_gets_quick_gelu():
    """open_clip alone builds `ViT-L-14` + `openai` with the wrong activation and only warns."""
    assert tag_uses_quick_gelu("ViT-L-14", "openai")
    assert not tag_uses_quick_gelu("ViT-L-14", "laion2b_s32b_b82k")
    assert tag_uses_quick_gelu("ViT-B-32-quickgelu", "openai")


class _Archive(torch.nn.Module):
    """A CLIP model with the extra entries of OpenAI's archives."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            setattr(self, name, child)
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            setattr(self, name, getattr(model, name))
        for name, value in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.visual(pixels)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_an_openai_archive_says_its_architecture_and_gets_quick_gelu(tmp_path):
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    features = {}
    for quick in (True, False):
        torch.manual_seed(0)
        model = open_clip.CLIP(embed_dim=24, quick_gelu=quick, vision_cfg=vision, text_cfg=text).eval()
        for parameter in model.parameters():  # published archives hold fp16 numbers
            parameter.data = (parameter.data + 0.1 * torch.randn_like(parameter)).half().float()
        features[quick] = model
    torch.jit.save(torch.jit.trace(_Archive(features[True]), torch.zeros(1, 3, 32, 32)), tmp_path / "tiny.pt")
    scorer = load_scorer("clip", path=str(tmp_path / "tiny.pt"))
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = {
            q: features[q].encode_image(scorer.towers.preprocess(pixels), normalize=True) for q in features
        }
    torch.testing.assert_close(scorer.embed_images(pixels), expected[True], rtol=0, atol=1e-4)
    assert (scorer.embed_images(pixels) - expected[False]).abs().max() > 1e-3


def test_scales_by_hand(folders):
    cosine, logits, clipscore = (
        load_scorer("clip", path=str(folders["plain"]), scale=scale)
        for scale in ("cosine", "logits", "clipscore")
    )
    image, text = cosine.embed_images(pictures()), cosine.embed_texts(PROMPTS)
    expected = torch.stack([image[i] @ text[i] for i in range(6)])  # the picture's own prompt, never B x B
    values = cosine(pictures(), PROMPTS)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    assert values.min() < 0  # so that the clamp below is seen
    torch.testing.assert_close(logits(pictures(), PROMPTS), math.exp(2.0) * expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(clipscore(pictures(), PROMPTS), 2.5 * expected.clamp(min=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        clipscore(pictures(), [""] * 6), 2.5 * (image @ text[3]).clamp(min=0), rtol=0, atol=1e-5
    )


def test_a_prefix_is_written_before_the_prompt(folders):
    plain = load_scorer("clip", path=str(folders["plain"]))
    prefixed = load_scorer("clip", path=str(folders["plain"]), prefix="a photo of ")
    torch.testing.assert_close(
        prefixed(pictures(), ["red"] * 6), plain(pictures(), ["a photo of red"] * 6), rtol=0, atol=1e-6
    )


def test_a_weight_file_needs_its_architecture(tmp_path, folders):
    state = load_file(folders["plain"] / "open_clip_model.safetensors")
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="give arch="):
        load_scorer("clip", path=str(tmp_path / "weights.safetensors"))
    with pytest.raises(UserError, match="did you mean 'ViT-B-32'"):
        load_scorer("clip", path=str(tmp_path / "weights.safetensors"), arch="ViTB32")


def test_a_file_of_an_hps_like_checkpoint_is_read(tmp_path):
    """Weights under `state_dict`, `module.` before each name, an architecture known by its name."""
    path = write_state_dict(tmp_path / "hps.pt", prefix="module.")
    scorer = load_scorer("clip", path=str(path), arch=known_arch())
    # The folder has its own normalisation, the bare file cannot: compare what does not depend on it.
    folder = load_scorer("clip", path=str(tmp_path / "hps-source"))
    torch.testing.assert_close(scorer.embed_texts(PROMPTS), folder.embed_texts(PROMPTS), rtol=0, atol=1e-6)


def test_a_pickled_program_is_never_opened(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(UserError, match="pickled program"):
        load_scorer("clip", path=str(tmp_path / "whole.pth"), arch=known_arch())


def test_what_is_no_clip_model_is_named(tmp_path, folders):
    def error(path: Path | str, **options: str) -> str:
        with pytest.raises(UserError) as caught:
            load_scorer("clip", path=str(path), **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "do not exist" in error(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "found: nothing" in error(tmp_path / "empty")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"")
    assert "'bert', not 'clip'" in error(tmp_path / "bert")
    assert "leave arch out" in error(folders["plain"], arch="ViT-B-32")
    broken = write_transformers(folders["plain"], tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    assert "lack 1 tensors of their config, first visual_projection.weight" in error(broken)
    (broken / "tokenizer.json").unlink()
    assert "no tokenizer files" in error(broken)
    wrong = write_open_clip(tmp_path / "wrong")
    config = json.loads((wrong / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 25
    (wrong / "open_clip_config.json").write_text(json.dumps(config))
    assert "do not load" in error(wrong)
    for torn in (write_open_clip(tmp_path / "torn"), write_transformers(folders["plain"], tmp_path / "cut")):
        (weights,) = torn.glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])
        assert "do not load" in error(torn)


def test_a_hub_repository_is_downloaded_in_one_layout():
    small = ["config.json", "open_clip_config.json", "tokenizer.json", "merges.txt"]
    others = ["README.md", "onnx/model.onnx", "onnx/config.json", "tf_model.h5"]
    ours, theirs = ["open_clip_model.safetensors"], ["model.safetensors"]
    bins = ["pytorch_model.bin", "open_clip_pytorch_model.bin"]
    assert hub_files(small + others + bins + ours + theirs) == small + ours
    assert hub_files(small[2:] + others + bins + theirs) == small[2:] + theirs
    assert hub_files(small + others + bins) == [*small, "open_clip_pytorch_model.bin"]
    assert hub_files(small + others + theirs) == small + theirs
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert hub_files(small[2:] + shards + bins) == small[2:] + shards


def test_a_hub_id_that_is_none_says_so():
    with pytest.raises(UserError, match="no hub id"):
        load_scorer("clip", path="bad id/..x")
    with pytest.raises(UserError, match="the hub does not give them"):  # the tests run without network
        load_scorer("clip", path="no/such-model")


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("of a client's own class")])
def test_without_network_a_downloaded_copy_is_used(monkeypatch, tmp_path, error):
    """Clients of HTTP have errors of their own, which no list of classes would name."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    with pytest.raises(UserError, match="the hub does not give them"):
        load_scorer("clip", path="no/such-model")
    copy = write_open_clip(tmp_path / "copy")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(copy))
    assert load_scorer("clip", path="org/model").version.startswith("org/model@hub:")


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_the_version_says_the_settings_and_the_vocabulary(tmp_path, layout):
    source = write_open_clip(tmp_path / "source")
    if layout == "transformers":
        write_transformers(source, tmp_path / "transformers")
    folder = source if layout == "open_clip" else tmp_path / "transformers"
    first = load_scorer("clip", path=str(folder))
    words = json.loads((folder / "tokenizer.json").read_text())
    known = words["model"]["vocab"]
    known["red</w>"], known["blue</w>"] = known["blue</w>"], known["red</w>"]
    (folder / "tokenizer.json").write_text(json.dumps(words))
    second = load_scorer("clip", path=str(folder))
    assert torch.equal(first.embed_texts(["red"]), second.embed_texts(["blue"]))
    settings = folder / ("open_clip_config.json" if layout == "open_clip" else "preprocessor_config.json")
    settings.write_text(settings.read_text().replace("[0.5, 0.4, 0.3]", "[0.1, 0.2, 0.9]"))
    third = load_scorer("clip", path=str(folder))
    image = [Image.new("RGB", (32, 32), "red")]
    assert not torch.equal(second.embed_images(image), third.embed_images(image))
    assert len({first.version, second.version, third.version}) == 3


def test_bad_options_are_refused():
    with pytest.raises(UserError, match="did you mean 'clipscore'"):
        load_scorer("clip", path="x", scale="clip_score")
    with pytest.raises(UserError, match="path is empty"):
        load_scorer("clip", path="")
    with pytest.raises(UserError, match="scorer clip needs path: give path="):
        load_scorer("clip")
    with pytest.raises(
        UserError, match="'openai' are a tag of open_clip's: give its arch, for example arch=ViT-L-14"
    ):
        load_scorer("clip", path="openai")
    with pytest.raises(UserError, match="did you mean 'ViT-L-14'"):
        load_scorer("clip", path="openai", arch="ViT-L14")
    with pytest.raises(UserError, match="takes a mapping of label to scorer, not a list"):
        score_all([], [])


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(40, 64), (64, 64), (91, 50), (1, 1), (33, 32), (20, 200)])
def test_preprocessing_is_open_clips_own(resize, size):
    settings = open_clip.transform.PreprocessCfg(size=32, resize_mode=resize, fill_color=128)
    theirs = open_clip.transform.image_transform_v2(settings, is_train=False)
    ours = Preprocess(size=(32, 32), resize=resize, fill=128)
    image = pictures()[0].resize(size)
    torch.testing.assert_close(ours([image])[0], theirs(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 64), (64, 64), (91, 50), (227, 224), (33, 32), (20, 200), (35, 32)])
def test_preprocessing_is_transformers_own(folders, size):
    """Its processor on PIL, which the published scores of that layout were made with."""
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    theirs = CLIPImageProcessorPil(**settings, image_mean=[0.5, 0.4, 0.3], image_std=[0.3, 0.2, 0.1])
    ours = load_scorer("clip", path=str(folders["plain_hf"])).towers.preprocess
    image = pictures()[0].resize(size)
    expected = theirs(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(ours([image])[0], expected, rtol=0, atol=1e-5)


def test_a_tensor_is_preprocessed_like_its_picture():
    image = pictures()[1].resize((48, 60))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    process = Preprocess(size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1))
    assert (process(pixels) - process([image])).abs().max() < 1.5 / 255
