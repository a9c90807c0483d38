"""The builder of the embedded models at toy size: it resumes exactly, and its folders load as they must."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign.scenes import caption, is_held_out, parse, sample_scene
from scripts.build_tiny import build, main
from scripts.tiny.clip import wrong_scene
from scripts.tiny.loop import Clock, OutOfTime, Plan, train
from scripts.tiny.settings import Settings


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole build at toy size."""
    folder = tmp_path_factory.mktemp("tiny")
    assert main(["--out", str(folder), "--small", "--threads", "1"]) == 0
    return folder


def _toy(folder: Path, *, muon_in: str = "", stop_after: int | None = None) -> torch.Tensor:
    """The averaged weight of eight steps of a toy problem; the clock is over after `stop_after` steps."""
    torch.manual_seed(0)
    modules = torch.nn.ModuleDict({"line": torch.nn.Linear(3, 1)})
    steps_here = 0

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        nonlocal steps_here
        steps_here += 1
        return (modules["line"](torch.randn(5, 3)) - step).square().mean(), {}

    clock = Clock(folder, minutes=60)
    clock.over = lambda: stop_after is not None and steps_here >= stop_after  # type: ignore[method-assign]
    plan = Plan(
        name="toy",
        steps=8,
        lr=0.1,
        seed=3,
        ema=0.9,
        bf16=False,
        save_every_seconds=1000,
        muon_in=muon_in,
        muon_lr=0.1,
    )
    return train(plan, modules, loss_of_step, folder=folder, clock=clock)["line"].weight.clone()


@pytest.mark.parametrize("muon_in", ["", "line."])
def test_a_run_that_stops_and_goes_on_makes_the_same_weights(tmp_path: Path, muon_in: str) -> None:
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    once = _toy(tmp_path / "once", muon_in=muon_in)
    for _ in range(2):  # 3 steps, 3 steps, the rest
        with pytest.raises(OutOfTime):
            _toy(tmp_path / "twice", muon_in=muon_in, stop_after=3)
    assert torch.equal(_toy(tmp_path / "twice", muon_in=muon_in), once)


def test_muon_trains_the_matrices_that_are_named_and_adamw_the_rest() -> None:
    modules = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    (adamw, lr), (muon, muon_lr) = Plan(
        name="x", steps=1, lr=1e-3, seed=0, muon_in="a.", muon_lr=0.02
    ).optimizers(modules)
    assert (lr, muon_lr) == (1e-3, 0.02) and isinstance(muon, torch.optim.Muon)
    assert muon.param_groups[0]["params"] == [modules["a"].weight]
    assert [id(p) for p in adamw.param_groups[0]["params"]] == [
        id(p) for p in (modules["a"].bias, modules["b"].weight, modules["b"].bias)
    ]


def test_the_learning_rate_warms_up_and_falls_to_two_percent() -> None:
    plan = Plan(name="x", steps=1000, lr=1e-3, seed=0, warmup=10)
    assert plan.rate(0) == pytest.approx(0.1)
    assert plan.rate(500) == pytest.approx(0.51)  # halfway: 0.02 + 0.98 / 2
    assert plan.rate(999) == pytest.approx(0.02, abs=1e-4)
    assert Plan(name="x", steps=400, lr=1e-3, seed=0, warmup=10, horizon=800).rate(400) == pytest.approx(0.51)


def test_no_minutes_stop_the_builder_and_the_same_command_goes_on(tmp_path: Path) -> None:
    settings = Settings().small()
    assert build(settings, tmp_path, minutes=0.0, step=None, parts=["clip"]) is False
    state = torch.load(tmp_path / "work" / "clip.pt", weights_only=True)
    assert state["step"] == 1
    assert not (tmp_path / "tiny-clip").exists()
    assert build(settings, tmp_path, minutes=60.0, step=None, parts=["clip"]) is True
    assert (tmp_path / "tiny-clip" / "open_clip_model.safetensors").exists()


def test_the_folder_is_a_stable_diffusion_xl_pipeline(built: Path) -> None:
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    pipeline = StableDiffusionXLPipeline.from_pretrained(built / "tiny-sdxl")
    pipeline.set_progress_bar_config(disable=True)
    modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {module.dtype for module in modules} == {torch.float32}
    assert isinstance(pipeline.tokenizer, CLIPTokenizer) and isinstance(pipeline.tokenizer_2, CLIPTokenizer)
    generator = torch.Generator().manual_seed(0)
    image = pipeline(
        "two red circles", num_inference_steps=2, guidance_scale=4.0, generator=generator
    ).images[0]
    assert image.size == (64, 64)
    log = (built / "work" / "build.log").read_text()
    assert "unet 3: accuracy" in log and "unet 6: accuracy" in log  # a probe with every kept step
    assert (
        pipeline.unet.config.addition_embed_type == "text_time"
        and pipeline.config.force_zeros_for_empty_prompt
    )


def test_the_folder_is_a_stable_diffusion_3_pipeline(built: Path) -> None:
    from diffusers import StableDiffusion3Pipeline
    from transformers import CLIPTokenizer, T5Tokenizer

    pipeline = StableDiffusion3Pipeline.from_pretrained(built / "tiny-sd3")
    pipeline.set_progress_bar_config(disable=True)
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    assert {module.dtype for module in (pipeline.transformer, pipeline.vae, *encoders)} == {torch.float32}
    assert isinstance(pipeline.tokenizer, CLIPTokenizer) and isinstance(pipeline.tokenizer_3, T5Tokenizer)
    length = Settings().small().sd3_tokens
    assert (
        pipeline.tokenizer.model_max_length == length == pipeline.text_encoder.config.max_position_embeddings
    )
    image = pipeline(
        "two red circles",
        num_inference_steps=2,
        max_sequence_length=length,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert image.size == (64, 64)
    log = (built / "work" / "build.log").read_text()
    assert "sd3 3: accuracy" in log and "sd3 6: accuracy" in log


def test_features_of_a_picture_teach_the_blocks_up_to_theirs(built: Path) -> None:
    from scripts.tiny.sd3 import Representation, new_transformer

    torch.manual_seed(0)
    settings = Settings().small()
    transformer = new_transformer(settings)
    representation = Representation(settings, transformer, built / "tiny-clip")
    with representation.heard() as tokens:
        transformer(
            hidden_states=torch.randn(2, 4, 16, 16),
            timestep=torch.tensor([100.0, 900.0]),
            encoder_hidden_states=torch.randn(2, 5, settings.t5_width),
            pooled_projections=torch.randn(2, 2 * settings.pooled_width),
        )
    (heard,) = tokens
    assert heard.shape == (2, 64, settings.sd3_width)  # a token for each patch of 8 px, as tiny-clip has
    away = representation.loss(heard, torch.rand(2, 3, 64, 64) * 2 - 1)
    assert 0.0 < away.item() < 2.0
    away.backward()
    first, second = transformer.transformer_blocks[:2]
    assert first.attn.to_q.weight.grad is not None and second.attn.to_q.weight.grad is None
    assert all(weight.grad is None for weight in representation.encoder.parameters())
    assert all(weight.grad is not None for weight in representation.projector.parameters())


def test_the_latents_of_sd3_are_shifted_and_scaled_to_a_unit_normal(built: Path) -> None:
    latents = torch.from_numpy(np.load(built / "work" / "sd3" / "latents.npy"))
    assert abs(float(latents.mean())) < 0.01 and float(latents.std()) == pytest.approx(1.0, abs=0.02)


def test_t5_reads_whole_words_and_spells_the_others(built: Path) -> None:
    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(built / "tiny-sd3" / "tokenizer_3")
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 1
    assert tokenizer.tokenize("a red circle") == ["\u2581a", "\u2581red", "\u2581circle"]
    assert tokenizer.tokenize("xyzzy") == ["\u2581", "x", "y", "z", "z", "y"]
    assert tokenizer("a red circle").input_ids[-1] == 1
    assert tokenizer.unk_token_id in tokenizer("na\u00efve").input_ids


def test_the_files_hold_half_precision(built: Path) -> None:
    from safetensors.torch import load_file

    files = sorted(built.glob("tiny-*/**/*.safetensors"))
    assert [file.parent.name for file in files] == [
        "tiny-clip",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "unet",
        "vae",
    ]
    for file in files:
        floats = {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()}
        assert floats == {torch.float16}, file


def test_a_kept_step_can_be_exported(built: Path) -> None:
    from safetensors.torch import load_file

    weights = built / "tiny-sdxl" / "unet" / "diffusion_pytorch_model.safetensors"
    last = load_file(weights)["conv_in.weight"]
    for step, equal in ((3, False), (6, True)):
        assert (
            main(["--out", str(built), "--small", "--threads", "1", "--parts", "sdxl", "--step", str(step)])
            == 0
        )
        assert torch.equal(load_file(weights)["conv_in.weight"], last) is equal
        kept = torch.load(built / "work" / f"unet-{step:06d}.pt", weights_only=True)["unet.conv_in.weight"]
        assert torch.equal(load_file(weights)["conv_in.weight"], kept.half())


def test_any_text_can_be_spelled(built: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(built / "tiny-sdxl" / "tokenizer")
    assert len(tokenizer) <= 4096 and tokenizer.model_max_length == 77
    for text in (
        "grinning face with big eyes",
        "na\u00efve caf\u00e9 \U0001f600 12",
        "two red circles, black background",
    ):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id == len(tokenizer) - 1
        assert tokenizer.eos_token_id not in ids[1:-1]  # also the token of unknown bytes
    assert tokenizer("a red circle").input_ids != tokenizer("a circle red").input_ids


def test_open_clip_loads_its_folder_without_a_network(built: Path) -> None:
    import open_clip

    name = f"local-dir:{built / 'tiny-clip'}"
    model, _, _ = open_clip.create_model_and_transforms(name)
    tokens = open_clip.get_tokenizer(name)(["a red circle", "two blue rings"])
    assert tokens.shape == (2, 48)
    embedded = model.encode_text(tokens, normalize=True)
    assert torch.allclose(embedded.norm(dim=-1), torch.ones(2), atol=1e-5)
    assert not torch.allclose(embedded[0], embedded[1])


def test_almost_right_captions_differ_in_one_thing_and_avoid_held_out_combinations_when_asked() -> None:
    rng = np.random.default_rng(0)
    kinds, held = set(), 0
    for index in range(300):
        scene = sample_scene(rng, split="train")
        changed, kind = wrong_scene(scene, rng, seen_only=index < 150)
        assert changed != scene and parse(caption(changed)) == changed
        assert (changed.background != scene.background) is (kind == "background")
        assert (changed.relation != scene.relation) is (kind == "position")
        held += is_held_out(changed)
        assert index >= 150 or held == 0
        kinds.add(kind)
    assert held > 0
    assert kinds == {"colour", "shape", "background", "binding", "count", "position"}
