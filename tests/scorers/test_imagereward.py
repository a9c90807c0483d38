"""ImageReward: the network against plain tensor code, what is read of a text, and every refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from diffalign.common.errors import UserError
from diffalign.scorers import load_scorer, score_all
from diffalign.scorers._base import Scorer
from diffalign.scorers._blip import IGNORED, build
from diffalign.scorers.imagereward import Plugin
from tests.tiny_imagereward import (
    HEADS,
    POSITIONS,
    READ,
    VOCABULARY,
    config,
    fused,
    plain,
    rewards,
    tensors,
    write,
)

PROMPTS = ["a red circle", "two blue squares left of a photo", "Square, at night!", "", "red " * 50, "blue"]
SIZES = [(40, 64), (64, 64), (90, 50), (1, 1), (33, 32), (20, 200)]


def pictures() -> list[Image.Image]:
    """Six noisy pictures of different sizes."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in SIZES
    ]


def contract_case(folder: Path):
    return write(folder / "tiny"), pictures(), PROMPTS, None


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, str]:
    return write(tmp_path_factory.mktemp("imagereward"))


@pytest.fixture(scope="module")
def scorer(options) -> Scorer:
    return load_scorer("imagereward", **options)


@pytest.mark.parametrize("kind", ["med_config", "no config", "few positions"])
def test_it_is_the_papers_network(tmp_path, kind):
    positions = 20 if kind == "few positions" else POSITIONS
    state = tensors(positions)
    given = write(tmp_path, state, config(positions))
    if kind == "no config":  # BERT's own: heads of width 64
        (tmp_path / "med_config.json").unlink()
    values = load_scorer("imagereward", **given)(pictures(), PROMPTS)
    knobs = {"heads": 2 if kind == "no config" else HEADS, "length": min(35, positions)}
    torch.testing.assert_close(values, rewards(state, pictures(), PROMPTS, **knobs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "knob",
    [{"eps": 1e-5}, {"text_eps": 1e-8}, {"tanh": True}, {"heads": 2}, {"last_norm": False}, {"length": 36}],
    ids=str,
)
def test_each_fact_of_the_network_shows_in_the_value(scorer, knob):
    """So that the comparison above could not pass with another eps, activation, ..., or cut."""
    other = rewards(tensors(), pictures(), PROMPTS, **knob)
    assert (scorer(pictures(), PROMPTS) - other).abs().max() > 1e-4


def test_picture_and_prompt_both_matter(scorer):
    one = pictures()[0]
    assert scorer([one] * 6, PROMPTS).std() > 0.02
    assert scorer(pictures(), ["a red circle"] * 6).std() > 0.02


def test_the_head_has_no_activation_and_the_scale_is_the_authors(options, scorer):
    """The fused head is affine; an activation between its layers would show."""
    state = tensors()
    weight, bias = fused(state)
    features = torch.stack([plain(state, *pair) for pair in zip(pictures(), PROMPTS, strict=True)]).double()
    layered = features
    for place in (0, 2, 4, 6, 7):
        layered = layered @ state[f"mlp.layers.{place}.weight"].double().T + state[f"mlp.layers.{place}.bias"]
    torch.testing.assert_close(features @ weight + bias, layered[:, 0], rtol=0, atol=1e-6)
    with torch.no_grad():
        ours = scorer.model.mlp(features.float())[:, 0]
    torch.testing.assert_close(ours, (features @ weight + bias).float(), rtol=0, atol=1e-6)
    raw = load_scorer("imagereward", **options, scale="mlp")(pictures(), PROMPTS)
    torch.testing.assert_close(raw, ours, rtol=0, atol=1e-5)
    expected = (raw - 0.16717362830052426) / 1.0333394966054072
    torch.testing.assert_close(scorer(pictures(), PROMPTS), expected, rtol=0, atol=1e-6)


def test_a_text_is_cut_to_35_tokens(scorer):
    one, words = pictures()[:1], ["red"] * 32
    base = scorer(one, [" ".join([*words, "blue"])])  # with [CLS] and [SEP] 35 tokens: the last that fits
    longer = scorer(one, [" ".join([*words, "blue", "circle", "at night"])])
    assert torch.equal(base, longer)
    assert (scorer(one, [" ".join([*words, "circle"])]) - base).abs() > 1e-5


def test_case_and_unknown_words_are_berts(scorer):
    one = pictures()[:1]
    assert torch.equal(scorer(one, ["A RED  circle,night"]), scorer(one, ["a red circle , night"]))
    assert torch.equal(scorer(one, ["zebra"]), scorer(one, ["giraffe"]))


def test_other_prompts_in_the_batch_change_nothing(scorer):
    alone = torch.cat([scorer([i], [p]) for i, p in zip(pictures(), PROMPTS, strict=True)])
    torch.testing.assert_close(scorer(pictures(), PROMPTS), alone, rtol=0, atol=1e-5)


def test_pictures_of_other_modes_become_rgb_first(scorer):
    image = pictures()[0]
    for mode in ("P", "L", "RGBA", "1", "CMYK"):
        odd = image.convert(mode)
        assert torch.equal(scorer([odd], ["red"]), scorer([odd.convert("RGB")], ["red"])), mode


def test_modes_agree_to_a_grey_level(options, scorer):
    tensor = load_scorer("imagereward", **options, mode="tensor")
    images = [image.resize((48, 60), Image.Resampling.BILINEAR) for image in pictures()]
    difference = (tensor(images, PROMPTS) - scorer(images, PROMPTS)).abs().max()
    assert 0 < difference < 0.02
    pixels = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tensor(pixels, ["a red circle", "blue"]).sum().backward()
    # A picture wider than high: what the centre crop drops has no gradient, all else has.
    assert (pixels.grad[..., 8:-8] != 0).float().mean() > 0.99
    assert not scorer.differentiable and tensor.differentiable
    assert not scorer(pixels, ["a red circle", "blue"]).requires_grad


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_the_head_in_float32(options, scorer, dtype):
    half = load_scorer("imagereward", **options, dtype=dtype)
    assert half.model.mlp[0].weight.dtype == torch.float32
    assert half.model.vision.dtype == half.model.text.dtype != torch.float32
    values = half(pictures(), PROMPTS)
    assert values.dtype == torch.float32
    difference = (values - scorer(pictures(), PROMPTS)).abs().max()
    assert 0 < difference < (0.05 if dtype == "bf16" else 0.01)


def test_pixels_are_prepared_once_in_a_pass(options, scorer):
    images = pictures()
    alone = scorer(images, PROMPTS)
    (memo,) = scorer.memos()
    with memo.one_pass():
        scorer.prepare_ahead(images)
        images[0].paste((0, 0, 0), (0, 0, *images[0].size))  # too late: its pixels are kept
        torch.testing.assert_close(scorer(images, PROMPTS), alone, rtol=0, atol=1e-6)
    assert (scorer(images, PROMPTS)[0] - alone[0]).abs() > 1e-4
    both = {"one": scorer, "two": load_scorer("imagereward", **options, scale="mlp")}
    found = score_all(both, pictures(), PROMPTS)
    assert torch.equal(found["one"].values, alone)


def test_what_the_reward_does_not_use_may_be_absent_or_anything(tmp_path, scorer):
    expected = scorer(pictures(), PROMPTS)
    state = tensors()
    assert set(state) >= IGNORED
    without = write(tmp_path / "without", {key: value for key, value in state.items() if key not in IGNORED})
    assert torch.equal(load_scorer("imagereward", **without)(pictures(), PROMPTS), expected)
    noisy = {key: torch.rand(3) if key in IGNORED else value for key, value in state.items()}
    assert torch.equal(
        load_scorer("imagereward", **write(tmp_path / "noisy", noisy))(pictures(), PROMPTS), expected
    )


def test_any_file_of_the_layout_is_read(tmp_path, options, scorer):
    save_file(tensors(), tmp_path / "mine.safetensors")
    (tmp_path / "med_config.json").write_text(json.dumps(config()))
    expected = scorer(pictures(), PROMPTS)
    for place in (
        {"path": str(tmp_path), "file": "mine.safetensors"},
        {"path": str(tmp_path / "mine.safetensors")},
    ):
        other = load_scorer("imagereward", **place, tokenizer=options["tokenizer"])
        assert torch.equal(other(pictures(), PROMPTS), expected)
    half = {key: value.half() for key, value in tensors().items()}
    halves = load_scorer("imagereward", **write(tmp_path / "half", half))(pictures(), PROMPTS)
    widened = {key: value.float() for key, value in half.items()}
    torch.testing.assert_close(halves, rewards(widened, pictures(), PROMPTS), rtol=0, atol=1e-5)


def test_a_vocabulary_in_either_format_is_read(tmp_path, options, scorer):
    words = tmp_path / "words"
    words.mkdir()
    whole = Tokenizer(WordPiece(VOCABULARY, unk_token="[UNK]"))
    whole.enable_truncation(8)  # a file's own cut and padding do not count
    whole.enable_padding(length=8)
    whole.save(str(words / "tokenizer.json"))
    other = load_scorer("imagereward", path=options["path"], tokenizer=str(words))
    assert torch.equal(other(pictures(), PROMPTS), scorer(pictures(), PROMPTS))


def test_the_version_says_which_weights(tmp_path, options, scorer):
    again = load_scorer("imagereward", **write(tmp_path / "again"))
    assert again.version == scorer.version and scorer.version.startswith("ImageReward@")
    others = [
        write(tmp_path / "seed", tensors(seed=1)),
        write(tmp_path / "heads", None, {**config(), "num_attention_heads": 2}),
    ]
    swapped = write(tmp_path / "words")
    words = Path(swapped["tokenizer"]) / "vocab.txt"
    words.write_text(words.read_text().replace("red\nblue", "blue\nred"))
    versions = {load_scorer("imagereward", **other).version for other in (*others, swapped)}
    assert len(versions | {scorer.version}) == 4


def test_a_hub_repository_is_read_with_its_config(tmp_path, options, scorer, monkeypatch):
    """From the hub's local store, as after a download: the repository itself does not exist."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    store = tmp_path / "models--diffalign-tests--no-such-reward"
    given = write(store / "snapshots" / commit)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = load_scorer("imagereward", path="diffalign-tests/no-such-reward", tokenizer=given["tokenizer"])
    weights, words = found.version.split("+tokenizer@")
    assert weights == "diffalign-tests/no-such-reward@hub:0123456789ab"
    assert scorer.version.endswith(f"+tokenizer@{words}")
    assert torch.equal(found(pictures(), PROMPTS), scorer(pictures(), PROMPTS))


def test_a_vocabulary_of_the_hub_is_read_and_named(tmp_path, options, scorer, monkeypatch):
    commit = "fedcba9876543210fedcba9876543210fedcba98"
    store = tmp_path / "models--no-such-vocabulary"  # as bert-base-uncased: without an organisation
    shutil.copytree(options["tokenizer"], store / "snapshots" / commit)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = load_scorer("imagereward", path=options["path"], tokenizer="no-such-vocabulary")
    assert found.version.endswith("+tokenizer@hub:fedcba987654")
    assert torch.equal(found(pictures(), PROMPTS), scorer(pictures(), PROMPTS))


def refusal(given: dict, **more: object) -> str:
    with pytest.raises(UserError) as caught:
        load_scorer("imagereward", **{**given, **more})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_tensor_is_needed_and_in_its_shape():
    state = tensors()
    for name in sorted(key for key in state.keys() - IGNORED if ".1." not in key):  # layers are alike
        whole = state[name]
        rest = {key: value for key, value in state.items() if key != name}
        with pytest.raises(UserError, match=f"lack .*{name}"):
            build(rest, config(), "here")
        shorter = whole[:, :-3] if name.endswith("pos_embed") else whole[..., :-1]
        for wrong in (shorter, whole[None], torch.cat([whole, whole])):
            with pytest.raises(UserError, match=r"^weights here:? (blip|mlp|have|width|\d+ places)"):
                build({**rest, name: wrong}, config(), "here")


def test_other_checkpoints_are_refused(tmp_path):
    state = tensors()
    extra = refusal(write(tmp_path, {**state, "blip.itm_head.weight": torch.zeros(2, READ)}))
    assert "hold 1 tensors that ImageReward has not, first blip.itm_head.weight" in extra
    layer = {key.replace("blocks.1", "blocks.3"): value for key, value in state.items()}
    assert "lack 24 tensors of ImageReward, first blip.visual_encoder.blocks.1" in refusal(
        write(tmp_path, layer)
    )
    wrapped = {f"module.{key}": value for key, value in state.items()}
    assert "lack blip.visual_encoder.pos_embed" in refusal(write(tmp_path, wrapped))
    given = write(tmp_path)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "ImageReward.pt")
    assert "pickled program" in refusal(given)
    write(tmp_path)
    (tmp_path / "ImageReward.pt").write_bytes((tmp_path / "ImageReward.pt").read_bytes()[:5000])
    assert "do not load" in refusal(given)
    assert "has no other.pt" in refusal(given, file="other.pt")
    assert "do not exist" in refusal(given, path=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 768}, "have hidden_size 128, but med_config.json beside them says 768"),
        ({"vocab_size": 30524}, "have vocab_size 19, but med_config.json"),
        ({"num_attention_heads": 5}, "width 128 cannot be shared by 5 attention heads"),
        ({"num_attention_heads": "4"}, "width 128 cannot be shared by 4 attention heads"),
        ({"num_attention_heads": 0}, "width 128 cannot be shared by 0 attention heads"),
        ({"hidden_act": "gelo"}, "describes no text encoder"),
        ({"layer_norm_eps": "small"}, "describes no text encoder"),
    ],
)
def test_a_config_of_other_weights_is_refused(tmp_path, change, message):
    assert message in refusal(write(tmp_path, None, {**config(), **change}))


def test_a_config_that_is_none_is_refused(tmp_path):
    given = write(tmp_path)
    (tmp_path / "med_config.json").write_text("[1]")
    assert "is no mapping" in refusal(given)
    (tmp_path / "med_config.json").write_text("{")
    assert "not valid JSON" in refusal(given)


def test_the_configs_activation_and_eps_are_used(tmp_path, scorer):
    for change in ({"hidden_act": "relu"}, {"layer_norm_eps": 1e-6}):
        other = load_scorer("imagereward", **write(tmp_path, None, {**config(), **change}))
        assert (other(pictures(), PROMPTS) - scorer(pictures(), PROMPTS)).abs().max() > 1e-4


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, options):
    for name, lines in (("short", list(VOCABULARY)[:-1]), ("long", [*VOCABULARY, "green"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text("\n".join(lines) + "\n")
        message = refusal(options, tokenizer=str(tmp_path / name))
        assert f"has {len(lines) + 2} tokens with [DEC] and [ENC], but the weights know 19" in message
    (tmp_path / "empty").mkdir()
    assert "no vocab.txt and no tokenizer.json" in refusal(options, tokenizer=str(tmp_path / "empty"))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "tokenizer.json").write_text("{")
    assert "does not load" in refusal(options, tokenizer=str(tmp_path / "torn"))
    assert "give tokenizer=" in refusal(options, tokenizer="diffalign-tests/no-such-vocabulary")


def test_blips_own_tokens_come_last(scorer):
    ids = scorer._tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
    assert ids == [len(VOCABULARY), len(VOCABULARY) + 1]


def test_bad_options_are_refused():
    for wrong, message in (
        ({"scale": "standart"}, "did you mean 'standard'"),
        ({"mode": "tensors"}, "did you mean 'tensor'"),
        ({"dtype": "fp61"}, "did you mean 'fp16'"),
        ({"batch_size": 0}, "use 1 or more"),
        ({"path": ""}, "path is empty"),
        ({"tokenizer": ""}, "tokenizer is empty"),
    ):
        assert message in refusal(wrong)


def test_weights_come_with_load():
    plugin = Plugin()
    assert plugin.memos() == []
    with pytest.raises(UserError, match=r"call .load\(\) first"):
        plugin(pictures(), PROMPTS)
    with pytest.raises(UserError, match=r"call .load\(\) first"):
        plugin.prepare_ahead(pictures())
