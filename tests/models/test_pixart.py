"""PixArt-Sigma behind our boundary is the plain pipeline's own; its adapters are those of peft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import PixArtSigmaPipeline
from diffusers import PixArtTransformer2DModel as PlainTransformer
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from diffalign import cli
from diffalign.common import draws
from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.data.cache import open_cache
from diffalign.diffusion.process import Process
from diffalign.models import load_model
from diffalign.models._pixart import PixArtTransformer2DModel
from diffalign.models._spec import ATTENTION, AdapterSpec
from diffalign.models.pixart import Plugin
from diffalign.objectives.diffusion_dpo import Plugin as DPO
from tests.pickapic_files import jpeg, row, write
from tests.tiny_training import draws_of, make_batch, perturb

KEYS = [("a red ring", 0), ("Two cats, of which one is small ", 1)]
PROMPTS, SEEDS = [prompt for prompt, _ in KEYS], [seed for _, seed in KEYS]
LENGTH = 24
"""Between the lengths of the two prompts."""
FILES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny pipeline; read it, never write to it."""
    return Plugin.tiny(tmp_path_factory.mktemp("tiny") / "pixart").path


@pytest.fixture
def copied(base: str, tmp_path: Path) -> Path:
    """A pipeline of one's own to break."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


def ours(base: str, **options: Any) -> Any:
    return load_model("pixart", base, max_sequence_length=LENGTH, **options)


def plain(base: str | Path) -> Any:
    """The pipeline as a user of diffusers loads it, who has never heard of this package."""
    pipeline: Any = PixArtSigmaPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by(pipeline: Any, **options: Any) -> Tensor:
    """Latents; the pictures of random networks are black and white."""
    settings = {"num_inference_steps": 3, "height": 32, "width": 32, **options}
    shape = (4, settings["height"] // 2, settings["width"] // 2)
    drawn: Tensor = pipeline(
        prompt=PROMPTS,
        latents=torch.stack([draws.normal(shape, "initial", *key) for key in KEYS]),
        **settings,
        max_sequence_length=LENGTH,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="latent",
    ).images
    return drawn


def drawn_by_us(model: Any, **options: Any) -> Tensor:
    drawn: Tensor = model.sample(PROMPTS, SEEDS, **{"num_inference_steps": 3, **options})
    return drawn


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"negative_prompt": "ugly"},
        {"guidance_scale": 1.0},
        {"height": 48, "width": 32, "guidance_scale": 2.0},
    ],
)
def test_sampling_is_that_of_the_plain_pipeline(options: dict[str, Any], base: str) -> None:
    """Bit for bit from the same noise."""
    assert torch.equal(drawn_by_us(ours(base), **options), drawn_by(plain(base), **options))


def test_a_call_is_a_step_of_the_pipeline(base: str) -> None:
    """The noise is the first half of the channels; the scheduler of the pipeline gets the same."""
    pipeline, model = plain(base), ours(base)
    seen: list[tuple[Any, Any, Tensor]] = []
    pipeline.transformer.register_forward_hook(
        lambda module, args, named, output: seen.append((args[0], named, output[0])), with_kwargs=True
    )
    drawn_by(pipeline, guidance_scale=1.0)
    cond = model.encode_prompts(PROMPTS)
    assert len(seen) == 3
    for x_t, named, output in seen:
        assert output.shape == (2, 8, 16, 16) and named["timestep"].dtype == torch.int64
        with torch.no_grad():
            noise = model.call(model.network, x_t, named["timestep"], cond)
            again = model.denoiser.predict(x_t, named["timestep"], cond)
        assert torch.equal(noise, output[:, :4]) and torch.equal(again, noise)
        assert not torch.allclose(noise, output[:, 4:], atol=0.1)


def test_nothing_trains_on_the_variance(base: str) -> None:
    """The last layer's rows are pixel, then channel: those of the channels 4 to 7 get no gradient."""
    model = ours(base, gradient_checkpointing=True)
    model.start_training(AdapterSpec(kind="full"), seed=0, with_reference=True)
    batch = make_batch(model)
    DPO(beta=2000.0).compute(model.denoiser, batch, draws_of(batch)).loss.sum().backward()
    gradient = model.network.proj_out.weight.grad.reshape(4, 8, -1)
    assert bool(gradient[:, :4].any(dim=-1).all()) and not gradient[:, 4:].any()


def test_gradient_checkpointing_changes_no_gradient(base: str) -> None:
    found = []
    for option in (False, True):
        model = ours(base, gradient_checkpointing=option)
        model.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
        perturb(model.denoiser.trainable_parameters(), 0.1)
        batch = make_batch(model)
        DPO(beta=200.0).compute(model.denoiser, batch, draws_of(batch)).loss.sum().backward()
        found.append([parameter.grad for parameter in model.denoiser.trainable_parameters()])
        assert model.network.gradient_checkpointing is option
    assert found[0] and all(map(torch.equal, *found))


def test_the_process_is_that_of_linear_betas(base: str) -> None:
    """Ho et al. 2020 (arXiv 2006.11239), 1000 steps from 0.0001 to 0.02: by hand at the ends."""
    process: Process = ours(base).process
    assert process.prediction == "epsilon" and process.num_timesteps == 1000
    betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    assert torch.allclose(process.alphas**2, torch.cumprod(1.0 - betas, dim=0), rtol=1e-9)
    assert float(process.alphas[0]) == pytest.approx(0.9999**0.5)
    assert float(process.alphas[-1] ** 2) == pytest.approx(4.04e-5, rel=1e-2)


def test_masked_tokens_do_not_matter(base: str) -> None:
    """In no precision; what the mask leaves in does."""
    cond = ours(base).encode_prompts(["a red ring", ""])
    mask = cond["prompt_attention_mask"]
    assert mask.dtype == torch.int64 and mask.sum(dim=1).tolist() == [12, 1]
    noise = torch.randn(cond["prompt_embeds"].shape, generator=torch.Generator().manual_seed(0))
    x_t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    other = Conditioning({**cond, "prompt_embeds": cond["prompt_embeds"].where(mask[..., None] == 1, noise)})
    shown = Conditioning({**other, "prompt_attention_mask": torch.ones_like(mask)})
    for dtype in ("fp32", "bf16"):
        model = ours(base, dtype=dtype)
        with torch.no_grad():
            first, second, third = (
                model.denoiser.predict(x_t, torch.tensor([10, 900]), given) for given in (cond, other, shown)
            )
        assert torch.equal(first, second) and not torch.allclose(first, third, atol=1e-3)


def test_a_long_prompt_is_cut_where_the_recipe_says(base: str, capfd: pytest.CaptureFixture[str]) -> None:
    """And a cache of another length is another cache."""
    model, longer = ours(base), load_model("pixart", base)
    model.say_too_long(PROMPTS)
    assert "1 of 2 prompts have more than the 24 tokens" in capfd.readouterr().err
    longer.say_too_long(PROMPTS)
    assert not capfd.readouterr().err
    assert longer.encode_prompts(PROMPTS)["prompt_embeds"].shape == (2, 300, 40)
    assert model.encode_prompts(PROMPTS)["prompt_embeds"].shape == (2, LENGTH, 40)
    assert model.encoder_fingerprint() != longer.encoder_fingerprint()


def test_a_cache_keeps_the_mask_and_halves_the_embeddings(base: str, tmp_path: Path) -> None:
    """Masks are whole numbers whatever the precision of a cache; so are those of the dropped prompt."""
    pairs, out = tmp_path / "train-00000-of-00001.parquet", tmp_path / "cache"
    pictures = [jpeg(10, (32, 32)), jpeg(90, (32, 32))]
    write(pairs, [row(prompt, *pictures, (1.0, 0.0)) for prompt in PROMPTS])
    model_words = ["model=pixart", f"model.path={base}", f"model.max_sequence_length={LENGTH}"]
    data_words = ["data=pickapic", f"data.path={pairs}", f"out={out}", "dtype=fp16"]
    assert cli.main(["cache", *model_words, *data_words]) == 0
    model = ours(base)
    cached, _ = open_cache(out).choose()
    for prompt, example in zip(PROMPTS, cached.examples, strict=True):
        for dropped, wanted in (
            (False, model.encode_prompts([prompt])),
            (True, model.encode_dropped_prompt()),
        ):
            found = cached.conditioning(example, dropped=dropped)
            mask = found["prompt_attention_mask"]
            assert mask.dtype == torch.int64
            assert all(torch.equal(kept, wanted["prompt_attention_mask"][0]) for kept in mask)
            shown = wanted["prompt_attention_mask"][0].bool()
            for embeds in found["prompt_embeds"]:
                assert embeds.shape == wanted["prompt_embeds"][0].shape
                assert torch.allclose(embeds[shown], wanted["prompt_embeds"][0, shown], rtol=1e-3, atol=1e-6)


SAVED = {
    "alpha": AdapterSpec(rank=4, alpha=7.5),
    "rslora": AdapterSpec(rank=4, rslora=True, alpha=3),
    "dora": AdapterSpec(rank=3, dora=True),
    "dropout": AdapterSpec(rank=2, dropout=0.5),
    "dora-dropout": AdapterSpec(rank=2, dora=True, dropout=0.5, alpha=2),
    "outer": AdapterSpec(rank=2, targets=["to_q", "pos_embed.proj", "proj_out", "adaln_single.linear"]),
}


def trained(base: str, spec: AdapterSpec, folder: Path, *, seed: int = 0) -> Any:
    """A model whose adapter has moved far from its start; saved to `folder`."""
    model = ours(base)
    model.start_training(spec, seed=seed, with_reference=True)
    perturb(model.denoiser.trainable_parameters(), 0.3, seed=seed)
    model.save_adapter(str(folder))
    model.network.eval()
    return model


@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_adapter_draws_the_same_through_plain_peft(kind: str, base: str, tmp_path: Path) -> None:
    """Bit for bit; likewise through `load_adapter`, and a file of peft's is read as one of ours."""
    model = trained(base, SAVED[kind], tmp_path / "a")
    wanted = drawn_by_us(model)
    pipeline = plain(base)
    assert not torch.allclose(drawn_by(pipeline), wanted)
    pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, tmp_path / "a")
    assert torch.equal(drawn_by(pipeline), wanted)
    pipeline.transformer.save_pretrained(tmp_path / "b")
    for folder in ("a", "b", f"a/{FILES[1]}"):
        again = ours(base)
        again.load_adapter(str(tmp_path / folder))
        assert torch.equal(drawn_by_us(again), wanted), folder
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == FILES
    mine, theirs = (load_file(tmp_path / name / FILES[1]) for name in "ab")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    settings = json.loads((tmp_path / "a" / FILES[0]).read_text())
    assert settings["target_modules"] == sorted(SAVED[kind].targets or ATTENTION)
    assert settings["lora_dropout"] == 0.0


def test_adapters_add_up_by_weight(base: str, tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        trained(base, SAVED["alpha"], tmp_path / name, seed=number)
    model, pipeline = ours(base), plain(base)
    model.load_adapter(str(tmp_path / "a"), weight=0.5)
    model.load_adapter(str(tmp_path / "b"), weight=-1.0)
    network: Any = PeftModel.from_pretrained(pipeline.transformer, tmp_path / "a", adapter_name="a")
    network.load_adapter(tmp_path / "b", adapter_name="b")
    network.base_model.set_adapter(["a", "b"])
    for layer in network.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("a", 0.5)
            layer.set_scale("b", -1.0)
    assert torch.equal(drawn_by_us(model), drawn_by(pipeline))


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_a_merged_pipeline_is_that_of_plain_diffusers(kind: str, base: str, tmp_path: Path) -> None:
    wanted = drawn_by_us(trained(base, SAVED[kind], tmp_path / "adapter"))
    ours(base).export_pipeline(str(tmp_path / "whole"), adapter=str(tmp_path / "adapter"))
    pipeline = plain(tmp_path / "whole")
    assert type(pipeline.transformer) is PlainTransformer
    assert torch.allclose(drawn_by(pipeline), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_an_exported_adapter_acts_by_its_weight(base: str, tmp_path: Path) -> None:
    trained(base, SAVED["alpha"], tmp_path / "adapter")
    weighed, model = ours(base), ours(base)
    weighed.load_adapter(str(tmp_path / "adapter"), weight=0.5)
    ours(base).export_adapter(
        str(tmp_path / "adapter"), str(tmp_path / "half"), layout="diffusers", weight=0.5
    )
    model.load_adapter(str(tmp_path / "half"))
    assert torch.equal(drawn_by_us(model), drawn_by_us(weighed))
    assert sorted(path.name for path in (tmp_path / "half").iterdir()) == FILES


def test_a_full_network_draws_the_same_in_plain_diffusers(base: str, tmp_path: Path) -> None:
    wanted = drawn_by_us(trained(base, AdapterSpec(kind="full"), tmp_path))
    pipeline = plain(base)
    pipeline.transformer = PlainTransformer.from_pretrained(tmp_path, subfolder="transformer")
    assert torch.equal(drawn_by(pipeline), wanted)
    assert torch.equal(drawn_by_us(ours(base, transformer=str(tmp_path))), wanted)


def edit(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


def test_a_base_as_it_was_published_is_the_same(base: str, copied: Path) -> None:
    """Its network goes by the name of an older class there, with settings that the newer one lacks."""
    edit(copied / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    older = {"_class_name": "Transformer2DModel", "double_self_attention": False, "num_vector_embeds": None}
    edit(copied / "transformer" / "config.json", **older)
    model = ours(str(copied))
    assert torch.equal(drawn_by_us(model), drawn_by_us(ours(base)))
    model.check_training(AdapterSpec(rank=2))
    model.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
    assert torch.equal(drawn_by(plain(copied)), drawn_by_us(ours(base)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_additional_conditions": True}, "is told sizes and aspect ratios, so it is PixArt-Alpha"),
        ({"use_additional_conditions": "gone", "sample_size": 128}, "so it is PixArt-Alpha: use a PixArt-S"),
        ({"_class_name": "SD3Transformer2DModel"}, "is a SD3Transformer2DModel, PixArtTransformer2DModel is"),
        ({"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}, "is a Transformer2DModel, Pix"),
        ({"in_channels": 9}, "takes 9 channels, its VAE gives 4: use a text-to-image base"),
    ],
)
def test_bases_of_other_kinds_are_refused(changes: dict[str, Any], message: str, copied: Path) -> None:
    edit(copied / "transformer" / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        ours(str(copied))


def test_a_network_for_another_text_encoder_is_refused(base: str, copied: Path) -> None:
    edit(copied / "transformer" / "config.json", caption_channels=48)
    with pytest.raises(UserError, match="takes text embeddings of width 48, the base's are of width 40"):
        ours(base).load_policy(str(copied))


def test_what_the_family_lacks_is_refused(base: str, tmp_path: Path) -> None:
    file = tmp_path / "pixart.safetensors"
    file.touch()
    with pytest.raises(UserError, match="is a single file, which diffusers does not read for PixArtSigmaPip"):
        ours(str(file))
    with pytest.raises(UserError, match=r"model\.attention=xformers: it cannot take the text mask of PixArt"):
        ours(base, attention="xformers")
    with pytest.raises(UserError, match=r"model\.max_sequence_length is 0: use 1 or more"):
        load_model("pixart", base, max_sequence_length=0)
    with pytest.raises(UserError, match="single_file=true: "):
        ours(base).export_pipeline(str(tmp_path / "one"), single_file=True)
    trained(base, AdapterSpec(rank=2), tmp_path)
    with pytest.raises(UserError, match="format=kohya: that layout is not written for PixArtSigmaPipeline"):
        ours(base).export_adapter(str(tmp_path), str(tmp_path / "k"), layout="kohya")


def test_every_block_is_compiled(base: str) -> None:
    model = ours(base)
    model.start_training(AdapterSpec(kind="full"), seed=0, with_reference=True)
    model.compile_blocks()
    for network in (model.network, model.denoiser.policies["reference"].network):
        assert all(block._compiled_call_impl is not None for block in network.transformer_blocks)


def test_the_published_network() -> None:
    """PixArt-Sigma-XL-2-1024-MS: 0.6 billion parameters (arXiv 2403.04692); by hand for its 1152 channels."""
    with init_empty_weights():
        network = PixArtTransformer2DModel(caption_channels=4096, use_additional_conditions=False)
    width = 1152
    linear = width * width + width
    block = 8 * linear + (width * 4 * width + 4 * width) + (4 * width * width + width) + 6 * width
    outer = {
        "pos_embed": 4 * 4 * width + width,
        "adaln_single": (256 * width + width) + linear + (width * 6 * width + 6 * width),
        "caption_projection": (4096 * width + width) + linear,
        "scale_shift_table": 2 * width,
        "proj_out": 32 * width + 32,
    }
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == 28 * block + sum(outer.values()) == 610_856_096
    assert {name.partition(".")[0] for name, _ in network.named_parameters()} == {
        "transformer_blocks",
        *outer,
    }
    names = {name for name, _ in network.named_modules()}
    for target in ATTENTION:
        for layer in range(28):
            for attention in ("attn1", "attn2"):
                assert f"transformer_blocks.{layer}.{attention}.{target}" in names
