"""The aesthetic score: heads told apart, the linear ones fused, features normalised and shared with CLIP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.common.errors import UserError
from diffalign.scorers import load_scorer, score_all
from diffalign.scorers._aesthetic_heads import AFFINE, RELU, fused, layers_of, open_head
from diffalign.scorers.aesthetic import Plugin as Aesthetic
from tests.scorers.test_clip import PROMPTS, pictures
from tests.tiny_clip import EMBED, write_open_clip


def head_of(places: tuple[int, ...], width: int = EMBED, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors of a head with five layers at these places, or of a single one without places."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [width, 16, 12, 8, 4, 1] if places else [width, 1]
    prefixes = [f"layers.{place}." for place in places] or [""]
    return {
        f"{prefix}{kind}": torch.randn(shape, generator=generator)
        for prefix, fan_in, fan_out in zip(prefixes, sizes, sizes[1:], strict=False)
        for kind, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,)))
    }


def write_head(path: Path, places: tuple[int, ...] = AFFINE, width: int = EMBED) -> str:
    torch.save(head_of(places, width), path)
    return str(path)


def contract_case(folder: Path):
    options = {"path": str(write_open_clip(folder / "clip")), "head": write_head(folder / "head.pth")}
    return options, pictures(), PROMPTS, None


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(write_open_clip(tmp_path_factory.mktemp("aesthetic") / "clip"))


def by_hand(tensors: dict[str, torch.Tensor], features: torch.Tensor, *, relu: bool) -> torch.Tensor:
    """The head's layers one after another, in float64."""
    places = sorted({int(name.split(".")[1]) for name in tensors if "." in name})
    x = features.double()
    for prefix in [f"layers.{place}." for place in places] or [""]:
        x = x @ tensors[f"{prefix}weight"].double().T + tensors[f"{prefix}bias"].double()
        if relu and prefix != f"layers.{places[-1]}.":
            x = x.clamp(min=0)
    return x.squeeze(-1)


@pytest.mark.parametrize("places", [AFFINE, RELU, ()])
def test_each_layout_is_told_by_its_names(tmp_path, clip, places):
    scorer = load_scorer("aesthetic", path=clip, head=write_head(tmp_path / "head.pth", places))
    features = load_scorer("clip", path=clip).embed_images(pictures())
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(6))  # or scores of 20 to 30 come out
    expected = by_hand(head_of(places), features, relu=places == RELU)
    torch.testing.assert_close(scorer(pictures()).double(), expected, rtol=1e-5, atol=1e-5)
    assert "head@" in scorer.version and scorer.scale == "points"


def test_the_relu_layout_is_not_fused():
    layers = layers_of(head_of(RELU), "head")
    x = torch.randn(5, EMBED, generator=torch.Generator().manual_seed(1))
    assert (layers(x) - fused(layers)(x)).abs().max() > 1e-2


def test_linear_layers_fuse_to_one():
    layers = layers_of(head_of(AFFINE), "head")
    x = torch.nn.functional.normalize(torch.randn(50, EMBED, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(fused(layers)(x), layers(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(fused(layers_of(head_of(()), "head")).weight, layers_of(head_of(()), "head")[0].weight)


def test_a_bare_file_of_openais_weights_gets_quick_gelu(tmp_path):
    head = open_head(write_head(tmp_path / "head.pth", width=768))
    (tmp_path / "l14.pt").write_bytes(b"")
    for path, arch in ((str(tmp_path / "l14.pt"), "ViT-L-14-quickgelu"), ("openai", "ViT-L-14")):
        assert Aesthetic(path=path)._arch_of(head) == arch
    for path in (str(tmp_path), "org/weights"):  # say their own
        assert Aesthetic(path=path)._arch_of(head) is None
    with pytest.raises(UserError, match="reads 512 features, as several architectures have: give arch="):
        load_scorer("aesthetic", path="openai", head=write_head(tmp_path / "b.pth", width=512))


def test_autocast_around_a_score_changes_nothing(tmp_path, clip):
    scorer = load_scorer("clip", path=clip)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = scorer(pictures(), PROMPTS)
    assert torch.equal(scorer(pictures(), PROMPTS), inside)


def test_one_pass_runs_the_shared_network_once(tmp_path, clip):
    scorers = {
        "clip": load_scorer("clip", path=clip),
        "aesthetic": load_scorer("aesthetic", path=clip, head=write_head(tmp_path / "head.pth")),
        "other": load_scorer("clip", path=clip, scale="logits", batch_size=4),
    }
    (network,) = {id(s.modules()[0]): s.modules()[0] for s in scorers.values()}.values()
    seen: list[int] = []
    network.visual.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    expected = {label: scorer(pictures(), PROMPTS) for label, scorer in scorers.items()}
    assert sum(seen) == 18  # one after another: each its own
    seen.clear()
    found = score_all(scorers, pictures(), PROMPTS)
    assert seen == [6]
    for label, values in expected.items():
        torch.testing.assert_close(found[label].values, values, rtol=0, atol=1e-5)
    seen.clear()
    image = pictures()[:1]
    before = score_all(scorers, image, PROMPTS[:1])["clip"].values
    image[0].paste((0, 0, 0), (0, 0, *image[0].size))  # nothing is remembered beyond a pass
    assert (score_all(scorers, image, PROMPTS[:1])["clip"].values - before).abs() > 1e-4


def test_a_prompt_is_encoded_once(clip):
    scorer = load_scorer("clip", path=clip)
    texts: list[int] = []
    encode = scorer.towers.encode_texts
    scorer.towers.encode_texts = lambda batch: (texts.append(len(batch)), encode(batch))[1]
    try:
        scorer(pictures() * 3, ["red", "blue", "red"] * 6)
        assert texts == [2]
        scorer(pictures(), ["red"] * 6)
        assert texts == [2]
    finally:
        scorer.towers.encode_texts = encode


def test_what_cannot_be_is_refused(tmp_path, clip):
    with pytest.raises(UserError, match="did you mean 'v2'"):
        load_scorer("aesthetic", path=clip, head="v22")
    with pytest.raises(UserError, match=r"head=\./no\.pth does not exist"):
        load_scorer("aesthetic", path=clip, head="./no.pth")
    with pytest.raises(UserError, match=r"reads 10 features and .* has 24"):
        load_scorer("aesthetic", path=clip, head=write_head(tmp_path / "wide.pth", width=10))
    torch.save({**head_of(AFFINE), "layers.9.weight": torch.zeros(1, 1)}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="is no aesthetic head"):
        load_scorer("aesthetic", path=clip, head=str(tmp_path / "odd.pth"))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(UserError, match="pickled program"):
        load_scorer("aesthetic", path=clip, head=str(tmp_path / "whole.pth"))
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="do not load"):
        load_scorer("aesthetic", path=clip, head=str(tmp_path / "torn.pth"))
