"""FLUX.1 beside its own pipeline: packing, ids, time and guidance bit for bit; adapters; what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign import cli
from diffalign.common import draws
from diffalign.common.errors import UserError
from diffalign.models import _adapters
from diffalign.models._lora_files import WEIGHTS_FILE, notes_of
from diffalign.models._spec import AdapterSpec
from diffalign.models.flux import Plugin
from tests.pickapic_files import jpeg, row, write
from tests.tiny_training import draws_of, make_batch, perturb

KEYS = [("a red ring", 0), ("two cats", 1)]
PROMPTS, SEEDS = [prompt for prompt, _ in KEYS], [seed for _, seed in KEYS]
WIDE = {"height": 32, "width": 48}
DOUBLE = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
EVERYWHERE = [*DOUBLE, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "proj_mlp", "proj_out"]


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> str:
    return Plugin.tiny(tmp_path_factory.mktemp("flux") / "dev").path


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> str:
    return Plugin.tiny(tmp_path_factory.mktemp("flux") / "schnell", guidance_embeds=False).path


@pytest.fixture(scope="module")
def bases(dev: str, schnell: str) -> dict[str, str]:
    return {"dev": dev, "schnell": schnell}


def loaded(path: str, **options: Any) -> Any:
    return Plugin(path=path, **{"max_sequence_length": 12, **options}).load()


def plain(path: str, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline as a user of diffusers loads it, who has never heard of this package."""
    pipeline = FluxPipeline.from_pretrained(path, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by(pipeline: Any, *, height: int = 32, width: int = 32, **options: Any) -> Tensor:
    """Its latents `[B, 16, h, w]` from the noise that our keys draw, packed by hand."""
    noise = torch.stack([draws.normal((16, height // 2, width // 2), "initial", *key) for key in KEYS])
    tokens = noise.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
    settings = {"max_sequence_length": 12, "num_inference_steps": 3, "output_type": "latent", **options}
    answer = pipeline(
        prompt=PROMPTS, latents=tokens.to(pipeline.dtype), height=height, width=width, **settings
    ).images
    cells = answer.reshape(len(KEYS), height // 4, width // 4, 16, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(len(KEYS), 16, height // 2, width // 2)


@contextmanager
def watched(network: Any) -> Iterator[list[tuple[dict[str, Any], Tensor]]]:
    """What the network is shown by name, and what it answers, call by call."""
    seen: list[tuple[dict[str, Any], Tensor]] = []

    def note(module: Any, args: Any, told: dict[str, Any], answer: Any) -> None:
        assert not args
        seen.append((dict(told), answer[0].clone()))

    handle = network.register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["dev", "schnell"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_call_is_a_step_of_the_pipeline(kind: str, dtype: str, bases: dict[str, str]) -> None:
    """The network is shown the same tokens, ids, time, guidance and texts, and answers the same bits."""
    model = loaded(bases[kind], dtype=dtype, train_guidance=2.5 if kind == "dev" else None)
    pipeline = plain(bases[kind], {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    with watched(pipeline.transformer) as theirs:
        drawn_by(pipeline, guidance_scale=2.5, **WIDE)
    cond = model.encode_prompts(PROMPTS)
    with watched(model.network) as ours, torch.no_grad():
        for (told, _), time in zip(theirs, pipeline.scheduler.timesteps, strict=True):
            latents = model.from_pipeline(told["hidden_states"], 32, 48)
            assert latents.shape == (2, 16, 16, 24)
            assert torch.equal(model.to_pipeline(latents), told["hidden_states"])
            velocity = model.call(model.network, latents, time.expand(2), cond)
            assert velocity.shape == latents.shape
            assert torch.equal(model.to_pipeline(velocity), ours[-1][1])
    assert len(ours) == len(theirs) == 3
    for (told, answer), (expected, wanted) in zip(ours, theirs, strict=True):
        assert set(told) == set(expected) - {"joint_attention_kwargs"}
        for name, value in told.items():
            assert (
                torch.equal(value, expected[name]) if isinstance(value, Tensor) else value == expected[name]
            )
        assert (told["guidance"] is None) == (kind == "schnell")
        assert torch.equal(answer, wanted)


def test_the_time_is_sigma(dev: str) -> None:
    """t of the process counts 1000 equal steps of sigma; the network takes sigma itself."""
    model = loaded(dev)
    batch = make_batch(model, groups=1)
    with watched(model.network) as seen, torch.no_grad():
        model.denoiser.predict(batch.latents, torch.tensor([0, 999]), batch.cond)
    assert torch.allclose(seen[0][0]["timestep"], torch.tensor([0.001, 1.0]))


@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_sampling_is_the_plain_pipeline(kind: str, bases: dict[str, str]) -> None:
    model, pipeline = loaded(bases[kind]), plain(bases[kind])
    ours = model.sample(PROMPTS, SEEDS, num_inference_steps=3, **WIDE)
    assert ours.shape == (2, 16, 16, 24)
    assert torch.equal(ours, drawn_by(pipeline, **WIDE))
    if kind == "dev":
        strong = model.sample(PROMPTS, SEEDS, num_inference_steps=3, guidance_scale=7.0)
        assert torch.equal(strong, drawn_by(pipeline, guidance_scale=7.0))
        assert not torch.equal(strong, drawn_by(pipeline))


def test_the_scheduler_shifts_with_the_size(dev: str) -> None:
    """What `timesteps.sampler_shift` trains on is what the pipeline visits: e^mu for the number of tokens."""
    model, pipeline = loaded(dev), plain(dev)
    shift = model.process.sampler_shift.at((16, 16, 24))
    drawn_by(pipeline, **WIDE)
    even = torch.tensor([1.0, 2 / 3, 1 / 3])
    assert torch.allclose(pipeline.scheduler.sigmas[:3], shift * even / (1 + (shift - 1) * even))


@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_other_schedulers_are_tried_as_the_pipeline_sets_them_up(kind: str, bases: dict[str, str]) -> None:
    """It hands over levels of its own and a shift: what takes neither, or samples no flow, is refused.

    DPM-Solver takes a shift only from a base that shifts with the size, which schnell does not.
    """
    model = loaded(bases[kind])
    own = model.sample(PROMPTS, SEEDS, num_inference_steps=3)
    same = model.sample(PROMPTS, SEEDS, num_inference_steps=3, scheduler="FlowMatchEulerDiscreteScheduler")
    assert torch.equal(own, same)
    solver = "DPMSolverMultistepScheduler"
    for name in ("UniPCMultistepScheduler", *([solver] if kind == "dev" else [])):
        model.check_scheduler(name, 3)
        other = model.sample(PROMPTS, SEEDS, num_inference_steps=3, scheduler=name)
        assert bool(other.isfinite().all()) and not torch.equal(other, own)
    others = ["FlowMatchHeunDiscreteScheduler", "DDIMScheduler", "LCMScheduler"]
    for name in (*others, *([solver] if kind == "schnell" else [])):
        with pytest.raises(UserError, match=f"scheduler={name} cannot sample this base, which is a flow"):
            model.check_scheduler(name, 3)


def test_prompts_are_read_by_both_encoders(dev: str, schnell: str) -> None:
    """The pipeline's own embeddings; the dropped prompt is the empty one; lengths as published."""
    model, pipeline = loaded(dev), plain(dev)
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(PROMPTS, max_sequence_length=12)
        empty, empty_pooled, _ = pipeline.encode_prompt("", max_sequence_length=12)
    cond, negative = model.embed_for_generation(PROMPTS)
    assert torch.equal(cond["prompt_embeds"], embeds) and torch.equal(cond["pooled"], pooled)
    assert embeds.shape == (2, 12, 40) and pooled.shape == (2, 16)
    dropped = model.encode_dropped_prompt()
    assert torch.equal(dropped["prompt_embeds"], empty) and torch.equal(dropped["pooled"], empty_pooled)
    assert all(torch.equal(negative[key], dropped[key].repeat_interleave(2, 0)) for key in dropped)
    assert loaded(dev, max_sequence_length=None).encode_prompts(["a"])["prompt_embeds"].shape[1] == 512
    assert loaded(schnell, max_sequence_length=None).encode_prompts(["a"])["prompt_embeds"].shape[1] == 256
    assert loaded(dev).encoder_fingerprint() == loaded(dev).encoder_fingerprint()
    assert loaded(dev).encoder_fingerprint() != loaded(dev, max_sequence_length=13).encoder_fingerprint()


def test_a_prompt_that_t5_cuts_is_told(dev: str, capsys: pytest.CaptureFixture[str]) -> None:
    loaded(dev).say_too_long(["a cat", "a cat on a mat"])  # 5 letters and marks, and 13
    assert "1 of 2 prompts have more than the 12 tokens" in capsys.readouterr().err


# Training


def moved(path: str, adapter: AdapterSpec, folder: Path, **options: Any) -> Any:
    """A model whose adapter has moved far from its start; saved to `folder`."""
    model = loaded(path, **options)
    model.start_training(adapter, seed=0, with_reference=True)
    perturb(model.denoiser.trainable_parameters(), 0.3)
    model.save_adapter(str(folder))
    return model


@pytest.mark.parametrize("guidance", [None, 1.0])
def test_policy_and_reference_are_told_one_guidance(guidance: float | None, dev: str) -> None:
    """The one of `train_guidance`, 3.5 by default; and it is heard."""
    model = loaded(dev, train_guidance=guidance)
    model.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
    batch = make_batch(model, groups=2)
    t = draws_of(batch).t
    with watched(model.network) as seen:
        policy = model.denoiser.predict(batch.latents, t, batch.cond)
        with model.denoiser.policy("reference"):
            reference = model.denoiser.predict(batch.latents, t, batch.cond)
    assert torch.equal(policy, reference)
    for told, _ in seen:
        assert told["guidance"].tolist() == [guidance or 3.5] * 4 and told["guidance"].dtype == torch.float32
    other = loaded(dev, train_guidance=5.0)
    assert not torch.equal(policy, other.denoiser.predict(batch.latents, t, batch.cond))


ADAPTERS = {
    "alpha": AdapterSpec(rank=4, alpha=7.5, targets=EVERYWHERE),
    "rslora": AdapterSpec(rank=4, rslora=True, alpha=3, targets=EVERYWHERE),
    "dora": AdapterSpec(rank=3, dora=True, targets=EVERYWHERE),
    "dropout": AdapterSpec(rank=2, dropout=0.5),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_saved_adapter_draws_the_same_in_plain_diffusers(kind: str, dev: str, tmp_path: Path) -> None:
    model = moved(dev, ADAPTERS[kind], tmp_path)
    layers = {name for name, module in model.network.named_modules() if hasattr(module, "lora_A")}
    if kind != "dropout":
        assert "transformer_blocks.0.attn.add_q_proj" in layers and "transformer_blocks.0.ff.net.2" in layers
        assert {
            f"single_transformer_blocks.1.{name}" for name in ("attn.to_q", "proj_mlp", "proj_out")
        } <= layers
    pipeline = plain(dev)
    base = drawn_by(pipeline)
    pipeline.load_lora_weights(str(tmp_path))
    theirs = drawn_by(pipeline)
    assert not torch.allclose(theirs, base, atol=1e-3)
    model.network.eval()
    assert torch.equal(model.sample(PROMPTS, SEEDS, num_inference_steps=3), theirs)
    fresh = loaded(dev)
    fresh.load_adapter(str(tmp_path))
    assert torch.equal(fresh.sample(PROMPTS, SEEDS, num_inference_steps=3), theirs)


def test_alphas_beside_the_tensors_are_read(dev: str, tmp_path: Path) -> None:
    """A file without metadata, an alpha for each layer: it acts as the same factors scaled by hand.

    That of the outer `proj_out` is its own, though the blocks have layers of that name.
    """
    moved(dev, AdapterSpec(rank=2, targets=EVERYWHERE), tmp_path / "ours")
    state = load_file(tmp_path / "ours" / WEIGHTS_FILE)
    layers = sorted({key.partition(".lora_")[0] for key in state})
    values = {layer: 4.0 + number % 3 for number, layer in enumerate(layers)} | {"transformer.proj_out": 1.0}
    alphas = {f"{layer}.alpha": torch.tensor(value) for layer, value in values.items()}
    save_file({**state, **alphas}, tmp_path / "alphas.safetensors")
    scaled = {
        key: tensor * (alphas[f"{key.partition('.lora_')[0]}.alpha"] / 2 if ".lora_B." in key else 1.0)
        for key, tensor in state.items()
    }
    save_file(scaled, tmp_path / "scaled.safetensors")
    latents = []
    for name in ("alphas", "scaled"):
        model = loaded(dev)
        model.load_adapter(str(tmp_path / f"{name}.safetensors"))
        latents.append(model.sample(PROMPTS, SEEDS, num_inference_steps=3))
    loaded(dev).export_adapter(
        str(tmp_path / "alphas.safetensors"), str(tmp_path / "out"), layout="diffusers"
    )
    trained = loaded(dev)
    trained.start_training(
        AdapterSpec(init=str(tmp_path / "alphas.safetensors")), seed=0, with_reference=True
    )
    trained.save_adapter(str(tmp_path / "saved"))
    for name in ("out", "saved"):
        model = loaded(dev)
        model.load_adapter(str(tmp_path / name))
        latents.append(model.sample(PROMPTS, SEEDS, num_inference_steps=3))
    assert all(torch.allclose(latents[0], others, atol=1e-4) for others in latents[1:])
    assert not torch.allclose(
        latents[0], loaded(dev).sample(PROMPTS, SEEDS, num_inference_steps=3), atol=1e-2
    )


def test_a_whole_network_is_saved_and_taken(dev: str, tmp_path: Path) -> None:
    model = moved(dev, AdapterSpec(kind="full"), tmp_path)
    model.network.eval()
    wanted = model.sample(PROMPTS, SEEDS, num_inference_steps=3)
    own = loaded(dev, transformer=str(tmp_path / "transformer"))
    assert torch.equal(own.sample(PROMPTS, SEEDS, num_inference_steps=3), wanted)
    policy = loaded(dev)
    policy.load_policy(str(tmp_path))
    batch = make_batch(policy, groups=1)
    t = draws_of(batch).t
    with torch.no_grad():
        trained = policy.denoiser.predict(batch.latents, t, batch.cond)
        assert torch.equal(trained, own.denoiser.predict(batch.latents, t, batch.cond))
        with policy.denoiser.policy("reference"):
            base = policy.denoiser.predict(batch.latents, t, batch.cond)
    assert torch.equal(base, loaded(dev).denoiser.predict(batch.latents, t, batch.cond))
    assert not torch.equal(base, trained)


def test_an_export_takes_the_guidance_along(
    dev: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In both layouts, whatever the exporting recipe says; kohya's has the original names."""
    moved(dev, AdapterSpec(rank=2, targets=EVERYWHERE), tmp_path / "a", train_guidance=2.0)
    loaded(dev).export_adapter(str(tmp_path / "a"), str(tmp_path / "b"), layout="diffusers", weight=0.5)
    loaded(dev).export_adapter(str(tmp_path / "a"), str(tmp_path / "b"), layout="kohya")
    assert "leave out proj_out; ComfyUI loads them, diffusers does not" in capsys.readouterr().err
    names = set(load_file(tmp_path / "b" / "lora.safetensors"))
    for layer in ("double_blocks_0_txt_attn_qkv", "single_blocks_1_linear1", "single_blocks_0_linear2"):
        assert f"lora_unet_{layer}.lora_up.weight" in names
    for name in ("lora.safetensors", WEIGHTS_FILE):
        assert notes_of(tmp_path / "b" / name)["ss_guidance_scale"] == "2.0"
    moved(dev, AdapterSpec(rank=2, dora=True), tmp_path / "dora")
    with pytest.raises(UserError, match="format=kohya cannot carry a DoRA"):
        loaded(dev).export_adapter(str(tmp_path / "dora"), str(tmp_path / "b"), layout="kohya")


def test_kohyas_layout_is_read_whole(dev: str, tmp_path: Path) -> None:
    """Of any width, with layers outside the blocks: as the adapter that it was written from."""
    spec = AdapterSpec(rank=2, alpha=3, targets=["to_q", "to_out.0", "proj_mlp", "proj_out", "x_embedder"])
    model = moved(dev, spec, tmp_path)
    loaded(dev).export_adapter(str(tmp_path), str(tmp_path), layout="kohya")
    file = tmp_path / "lora.safetensors"
    assert notes_of(file)["ss_network_module"] == "networks.lora_flux"
    model.network.eval()
    fresh = loaded(dev)
    fresh.load_adapter(str(file))
    wanted = model.sample(PROMPTS, SEEDS, num_inference_steps=3)
    assert torch.allclose(fresh.sample(PROMPTS, SEEDS, num_inference_steps=3), wanted, atol=1e-4)


def test_a_file_with_the_transformer_alone_takes_the_rest_from_its_config(dev: str, tmp_path: Path) -> None:
    """As published files; by the names of diffusers, whose converter knows the published width only."""
    model, path = loaded(dev), tmp_path / "flux1-tiny.safetensors"
    save_file(dict(model.network.state_dict()), path)
    from_file = loaded(str(path), config=dev)
    sampled = [each.sample(PROMPTS, SEEDS, num_inference_steps=2) for each in (model, from_file)]
    assert torch.equal(sampled[0], sampled[1])
    assert from_file.encoder_fingerprint() == model.encoder_fingerprint()
    assert from_file.fingerprint() != model.fingerprint()


# Guidance of training and of drawing


def test_the_file_of_an_adapter_says_its_guidance(dev: str, schnell: str, tmp_path: Path) -> None:
    moved(dev, AdapterSpec(rank=2), tmp_path / "dev")
    with safe_open(tmp_path / "dev" / WEIGHTS_FILE, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_guidance_scale"] == "3.5" and metadata["format"] == "pt"
    assert json.loads(metadata["lora_adapter_metadata"])["transformer.r"] == 2
    moved(schnell, AdapterSpec(rank=2), tmp_path / "schnell")
    assert "ss_guidance_scale" not in notes_of(tmp_path / "schnell")


def test_drawing_under_another_guidance_is_told_once(
    dev: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved(dev, AdapterSpec(rank=2), tmp_path, train_guidance=1.0)

    def said(guidance_scale: float | None, model: Any) -> list[str]:
        capsys.readouterr()
        for _ in range(2):
            model.sample(PROMPTS, SEEDS, num_inference_steps=1, guidance_scale=guidance_scale)
        return [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]

    def drawing() -> Any:
        model = loaded(dev)
        model.load_adapter(str(tmp_path))
        return model

    line = "WARNING: pictures are drawn under guidance_scale={}, which {} was not trained under: give {}"
    assert said(None, drawing()) == [line.format("3.5", tmp_path, "guidance_scale=1")]
    assert said(4.0, drawing()) == [line.format("4", tmp_path, "guidance_scale=1")]
    assert said(1.0, drawing()) == []
    assert said(None, loaded(dev)) == []


def test_a_run_that_draws_under_another_guidance_than_its_own_says_so(
    dev: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its pictures on the way, and those that an on-policy objective learns from."""
    for guidance, lines in ((1.0, 1), (3.5, 0), (None, 0)):
        model = loaded(dev, train_guidance=guidance)
        model.start_training(AdapterSpec(rank=2), seed=0, with_reference=True)
        capsys.readouterr()
        for _ in range(2):
            model.sample(PROMPTS, SEEDS, num_inference_steps=1)
        said = capsys.readouterr().err
        told = "drawn under guidance_scale=3.5, which the policy was not trained under: give guidance_scale=1"
        assert said.count(told) == lines


def test_training_on_and_judging_under_another_guidance_are_told(
    dev: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved(dev, AdapterSpec(rank=2), tmp_path, train_guidance=1.0)
    for guidance, lines in ((1.0, 0), (None, 1)):
        capsys.readouterr()
        loaded(dev, train_guidance=guidance).load_policy(str(tmp_path))
        told = f"under model.train_guidance=3.5, which {tmp_path} was not trained under: give model.train_g"
        assert capsys.readouterr().err.count(f"pairs are judged {told}uidance=1\n") == lines
        loaded(dev, train_guidance=guidance).check_training(AdapterSpec(init=str(tmp_path)))
        assert capsys.readouterr().err.count(f"training goes on {told}uidance=1\n") == lines


@pytest.mark.parametrize("note", ["high", None])
def test_a_file_that_does_not_say_is_taken(note: str | None, dev: str, tmp_path: Path) -> None:
    moved(dev, AdapterSpec(rank=2), tmp_path / "a")
    notes = {key: value for key, value in notes_of(tmp_path / "a").items() if key != "ss_guidance_scale"}
    extra = {} if note is None else {"ss_guidance_scale": note}
    save_file(load_file(tmp_path / "a" / WEIGHTS_FILE), tmp_path / "b.safetensors", {**notes, **extra})
    loaded(dev).load_adapter(str(tmp_path / "b.safetensors"))


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_guidance": -1.0}, r"model\.train_guidance is -1\.0: use a number of at least 0"),
        ({"train_guidance": float("nan")}, r"model\.train_guidance is nan"),
        ({"max_sequence_length": 0}, r"model\.max_sequence_length is 0: use 1 to 512"),
        ({"max_sequence_length": 513}, r"model\.max_sequence_length is 513: use 1 to 512"),
        ({"attention": "xformers"}, r"model\.attention=xformers: diffusers has no such attention for FLUX"),
    ],
)
def test_keys_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Plugin(path="anywhere", **options)


def test_guidance_is_refused_where_there_is_none(dev: str, schnell: str) -> None:
    with pytest.raises(UserError, match=r"model\.train_guidance=3\.5: .* has no guidance embedding"):
        loaded(schnell, train_guidance=3.5)
    model = loaded(schnell)
    assert loaded(dev).takes_guidance and not model.takes_guidance
    with pytest.raises(UserError, match=r"guidance_scale=2: .* has no guidance embedding"):
        model.sample(["a"], [0], guidance_scale=2.0)
    for each in (model, loaded(dev)):
        with pytest.raises(UserError, match=r"negative_prompt: FLUX\.1 .* leave it out"):
            each.sample(["a"], [0], negative_prompt="blurry")


def test_a_transformer_of_the_other_kind_is_refused(dev: str, schnell: str) -> None:
    with pytest.raises(UserError, match=r"has no guidance embedding, the base a: use the base"):
        loaded(dev).load_policy(schnell)
    with pytest.raises(UserError, match=r"has a guidance embedding, the base no: use the base"):
        loaded(schnell).load_policy(dev)


def test_a_transformer_for_other_work_is_refused(dev: str, tmp_path: Path) -> None:
    """Fill, Depth and Canny take more channels than the VAE gives."""
    shutil.copytree(dev, tmp_path / "fill")
    config = tmp_path / "fill" / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"in_channels": 64', '"in_channels": 384'))
    with pytest.raises(UserError, match="takes 96 channels, its VAE gives 16: use a text-to-image base"):
        loaded(str(tmp_path / "fill"))


def test_sizes_are_whole_numbers_of_tokens(dev: str) -> None:
    model = loaded(dev)
    assert (model.size_multiple, model.default_resolution) == (4, 32)
    with pytest.raises(UserError, match="height=34, width=32: both must be multiples of 4"):
        model.sample(["a"], [0], height=34)


# The published size


@pytest.mark.parametrize(("guidance", "billions"), [(True, 11.901408320), (False, 11.891178560)])
def test_the_published_network_takes_the_adapter(guidance: bool, billions: float) -> None:
    """Blocks and layers by their published names, without memory for weights."""
    with init_empty_weights():
        network: Any = FluxTransformer2DModel(
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=guidance,
            axes_dims_rope=(16, 56, 56),
        )
        names = dict(network.named_parameters())
        assert sum(parameter.numel() for parameter in names.values()) == round(billions * 1e9)
        assert ("time_text_embed.guidance_embedder.linear_1.weight" in names) == guidance
        assert names["single_transformer_blocks.37.proj_out.weight"].shape == (3072, 15360)
        assert names["transformer_blocks.18.attn.add_q_proj.weight"].shape == (3072, 3072)
        _adapters.add_fresh(network, Plugin(path="").with_targets(AdapterSpec(rank=4)), seed=0)
    adapted = {name.partition(".lora_A")[0] for name, _ in network.named_parameters() if ".lora_A." in name}
    attention = [f"transformer_blocks.{n}.attn.{leaf}" for n in range(19) for leaf in DOUBLE]
    single = [f"single_transformer_blocks.{n}.attn.{leaf}" for n in range(38) for leaf in DOUBLE[:3]]
    assert adapted == {*attention, *single}


# The command line


def test_the_walk_by_command_line(
    dev: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cache, train, generate, evaluate and export; the guidance is part of the recipe."""
    monkeypatch.chdir(tmp_path)
    shades = [
        row(f"a {n}", jpeg(200, (32, 32)), jpeg(40, (32, 32)), (1.0, 0.0)) for n in ("cat", "dog", "cow")
    ]
    write(tmp_path / "train-00000-of-00001.parquet", shades)
    model = ["model=flux", f"model.path={dev}", "model.max_sequence_length=12", "model.train_guidance=2"]
    data = ["data=pickapic", "data.path=train-00000-of-00001.parquet"]

    def run(*words: str) -> None:
        assert cli.main([*words[:1], *model, *words[1:]]) == 0, capsys.readouterr().err

    run("cache", *data, "out=cache")
    settings = [
        "objective=dpo",
        "adapter.rank=2",
        "num_steps=2",
        "optimizer.lr=1e-2",
        "timesteps.sampler_shift=true",
        "loader.caption_dropout=0.5",
    ]
    run("train", "cache=cache", "out=run", *settings)
    said = capsys.readouterr().err
    assert "step 0: loss 0.693147 (0.693147 expected), largest |logit| 0" in said
    assert said.count("WARNING: loader.caption_dropout=0.5 trains the model without a prompt, which is ") == 1
    recipe = json.loads((tmp_path / "run" / "manifest.json").read_text())["recipe"]
    assert recipe["model"]["train_guidance"] == 2.0
    drawing = ["adapter=run/adapter", "prompts=[a cat]", "num_inference_steps=2", "device=cpu"]
    capsys.readouterr()
    run("generate", *drawing, "out=drawn")
    assert "which run/adapter was not trained under: give guidance_scale=2\n" in capsys.readouterr().err
    run("generate", *drawing, "guidance_scale=2", "out=alike")
    assert "WARNING" not in capsys.readouterr().err
    run("evaluate", "mode=implicit", *data, "adapter=run/adapter", "draws=2", "out=judged")
    assert json.loads((tmp_path / "judged" / "implicit.json").read_text())["pairs"] == 3
    run("export", "adapter=run/adapter", "out=lora")
    assert notes_of(tmp_path / "lora")["ss_guidance_scale"] == "2.0"
    run("export", "adapter=run/adapter", "format=merged", "out=merged")
    merged, adapted = loaded("merged"), loaded(dev)
    adapted.load_adapter("run/adapter")
    wanted = adapted.sample(PROMPTS, SEEDS, num_inference_steps=2)
    assert torch.allclose(merged.sample(PROMPTS, SEEDS, num_inference_steps=2), wanted, atol=1e-4)
