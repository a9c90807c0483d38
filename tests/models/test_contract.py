"""What every backbone must keep to: each plug-in that is found writes its tiny pipeline and is asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.common import plugins
from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.diffusion.process import Process
from diffalign.models import load_model
from diffalign.models._spec import AdapterSpec
from diffalign.objectives.diffusion_dpo import Plugin as DPO
from tests.tiny_training import draws_of, make_batch, perturb

BACKBONES = plugins.names("models")


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(name, folder of its tiny pipeline)."""
    folder = tmp_path_factory.mktemp("backbone") / request.param
    return request.param, plugins.get("models", request.param).tiny(folder).path


@pytest.fixture(scope="module")
def untouched(backbone: tuple[str, str]) -> Any:
    """A loaded model that no test of this module changes."""
    return load_model(*backbone)


def answer(model: Any, policy: str = "train") -> Tensor:
    batch = make_batch(model, groups=2)
    draws = draws_of(batch)
    with torch.no_grad(), model.denoiser.policy(policy):
        prediction: Tensor = model.denoiser.predict(batch.latents, draws.t, batch.cond)
    return prediction


def test_encoding_and_decoding(untouched: Any) -> None:
    side = untouched.default_resolution
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    mean, std = untouched.encode_images(images)
    cells = side // untouched.latent_scale
    for latents in (mean, std):
        assert latents.shape == (2, untouched.latent_channels, cells, cells)
        assert latents.dtype == torch.float32 and bool(torch.isfinite(latents).all())
    assert bool((std > 0).all())
    decoded = untouched.decode(10 * mean)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    assert decoded.min() >= 0.0 and decoded.max() <= 1.0
    assert torch.allclose(untouched.encode_images(images[:1])[0], mean[:1], atol=1e-5)


def test_latents_are_scaled_as_the_network_sees_them(untouched: Any) -> None:
    """Both ways by the VAE's own shift and factor, pixels from [0, 1] to [-1, 1] and back."""
    vae = untouched.parts["vae"]
    shift, factor = vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = vae.encode(images * 2 - 1).latent_dist
        mean, std = untouched.encode_images(images)
        assert torch.allclose(mean, (theirs.mean - shift) * factor, atol=1e-6)
        assert torch.allclose(std, theirs.std * factor)
        picture = (vae.decode(theirs.mean).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(untouched.decode(mean), picture, atol=1e-5)


def test_prompts_become_one_row_each(untouched: Any) -> None:
    cond = untouched.encode_prompts(["a red ring", "two blue squares", "a red ring"])
    assert cond.batch_size == 3
    assert all(torch.equal(tensor[0], tensor[2]) for tensor in cond.values())
    assert not torch.equal(cond["prompt_embeds"][0], cond["prompt_embeds"][1])
    if "pooled" in cond:
        assert not torch.equal(cond["pooled"][0], cond["pooled"][1])
    alone = untouched.encode_prompts(["two blue squares"])
    assert all(torch.allclose(alone[key][0], cond[key][1], atol=1e-5) for key in cond)
    dropped = untouched.encode_dropped_prompt()
    assert dropped.batch_size == 1 and set(dropped) == set(cond)


def shown(model: Any, draw: Callable[[], Any]) -> list[Tensor]:
    """The tensors that the network is first shown while `draw` runs; the noisy latents come first."""
    seen: list[list[Any]] = []
    handle = model.network.register_forward_pre_hook(
        lambda module, args, named: seen.append([*args, *named.values()]), with_kwargs=True
    )
    try:
        draw()
    finally:
        handle.remove()
    flat = [list(value.values()) if isinstance(value, dict) else [value] for value in seen[0]]
    return [value.clone() for values in flat for value in values if isinstance(value, Tensor)]


def test_what_a_text_mask_hides_never_matters(untouched: Any) -> None:
    """To the bit: a cache leaves it out."""
    if not untouched.text_masks:
        pytest.skip("names no mask: all rows are kept")
    batch = make_batch(untouched, groups=2)
    draws, hidden = draws_of(batch), 0
    kept = dict(batch.cond)
    for name, mask in untouched.text_masks.items():
        assert batch.cond[mask].shape == batch.cond[name].shape[:2]
        kept[name] = batch.cond[name] * batch.cond[mask][..., None]
        hidden += int((batch.cond[mask] == 0).sum())
    with torch.no_grad():
        one, other = (
            untouched.denoiser.predict(batch.latents, draws.t, given)
            for given in (batch.cond, Conditioning(kept))
        )
    assert hidden and torch.equal(one, other)


def test_the_dropped_prompt_is_the_branch_that_guidance_uses(backbone: tuple[str, str]) -> None:
    """Bit for bit what the pipeline itself shows its network when it is given a prompt and no negative one.

    A network that is told of the guidance, and has no second branch, has the empty prompt.
    """
    model: Any = load_model(*backbone)
    dropped = model.encode_dropped_prompt()
    pipeline = model.pipeline(*model.encoder_parts, "vae", model.network_part)
    settings = {"num_inference_steps": 1, "height": 32, "width": 32, **model.sampling_options()}
    theirs = shown(model, lambda: pipeline("a red ring", guidance_scale=5.0, **settings))
    assert model.has_unprompted_branch == (len(theirs[0]) == 2)
    if len(theirs[0]) == 1:
        empty = model.encode_prompts([""])
        assert all(torch.equal(dropped[key], empty[key]) for key in dropped)
        return
    negatives = [value[:1] for value in theirs if value.ndim]
    for key, row in dropped.items():
        assert any(row.shape == value.shape and torch.equal(row, value) for value in negatives), key
    embedded = (model.encode_prompts(["a red ring"]), dropped)
    ours = shown(
        model,
        lambda: model.sample(
            ["a red ring"], [0], guidance_scale=5.0, num_inference_steps=1, embedded=embedded
        ),
    )
    assert len(ours) == len(theirs)
    assert all(map(torch.equal, ours[1:], theirs[1:]))


FRESH = {
    "lora": AdapterSpec(rank=2),
    "rslora": AdapterSpec(rank=2, rslora=True, alpha=3),
    "dora": AdapterSpec(rank=2, dora=True),
    "dropout": AdapterSpec(rank=2, dropout=0.3),
    "dora-dropout": AdapterSpec(rank=2, dora=True, dropout=0.3),
    "everywhere": AdapterSpec(rank=2, targets=["every layer"]),
    "full": AdapterSpec(kind="full"),
}
# In layers whose input lies across memory torch's path depends on who requires gradients.
EVERYWHERE = AdapterSpec(rank=4, targets=["every layer"])


def fitted(spec: AdapterSpec, model: Any) -> AdapterSpec:
    """The spec with the names of all layers of the network that can have an adapter for "every layer"."""
    if spec.targets != ["every layer"]:
        return spec
    layers = model.parts.blueprint(model.network_part).named_modules()
    names = [name for name, layer in layers if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    return replace(spec, targets=names)


@pytest.mark.parametrize("kind", FRESH)
def test_fresh_training_changes_nothing_and_the_reference_stays_the_base(
    kind: str, backbone: tuple[str, str], untouched: Any
) -> None:
    base = answer(untouched)
    model: Any = load_model(*backbone)
    model.start_training(fitted(FRESH[kind], model), seed=0, with_reference=True)
    assert model.network.training
    assert torch.equal(answer(model), base) and torch.equal(answer(model, "reference"), base)
    perturb(model.denoiser.trainable_parameters(), 0.05)
    assert torch.equal(answer(model, "reference"), base)
    assert not torch.allclose(answer(model), base, atol=1e-4)


def test_a_fresh_adapter_depends_on_its_seed_alone(backbone: tuple[str, str]) -> None:
    states = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        model: Any = load_model(*backbone)
        stream = torch.get_rng_state()
        model.start_training(AdapterSpec(rank=2), seed=seed, with_reference=True)
        assert torch.equal(torch.get_rng_state(), stream)
        states.append(model.trained_state())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        assert torch.equal(tensor, states[2][name]) == ("lora_B" in name)  # B starts at 0 for every seed


STEP_ZERO = {
    "fp32": ("fp32", "fp32", FRESH["lora"]),
    "bf16": ("bf16", "bf16", FRESH["lora"]),
    "fp32 autocast": ("fp32", "bf16", FRESH["lora"]),
    "rslora": ("fp32", "fp32", FRESH["rslora"]),
    "dora": ("fp32", "fp32", FRESH["dora"]),
    "dora bf16": ("bf16", "bf16", FRESH["dora"]),
    "dora autocast": ("fp32", "bf16", FRESH["dora"]),
    "dropout": ("fp32", "fp32", FRESH["dropout"]),
    "dropout bf16": ("bf16", "bf16", FRESH["dropout"]),
    "dora dropout": ("fp32", "fp32", FRESH["dora-dropout"]),
    "full": ("fp32", "fp32", FRESH["full"]),
    "full autocast": ("fp32", "bf16", FRESH["full"]),
    "from lora": ("fp32", "fp32", "rslora"),
    "from lora bf16": ("bf16", "bf16", "rslora"),
    "from dora": ("fp32", "fp32", "dora"),
    "from dora bf16": ("bf16", "bf16", "dora"),
    "from everywhere": ("fp32", "fp32", "everywhere"),
    "from everywhere bf16": ("bf16", "bf16", "everywhere"),
}


@pytest.fixture(scope="module")
def adapters(backbone: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of adapters that were trained to somewhere else, in float32 numbers that bf16 cannot hold."""
    folders = {}
    for kind, spec in {"rslora": FRESH["rslora"], "dora": FRESH["dora"], "everywhere": EVERYWHERE}.items():
        model: Any = load_model(*backbone)
        model.start_training(fitted(spec, model), seed=3, with_reference=False)
        perturb(model.denoiser.trainable_parameters(), 0.3)
        folders[kind] = tmp_path_factory.mktemp(kind)
        model.save_adapter(str(folders[kind]))
    return folders


@pytest.mark.parametrize("case", STEP_ZERO)
def test_the_loss_of_step_zero_is_exactly_log_2(
    case: str, backbone: tuple[str, str], adapters: dict[str, Path]
) -> None:
    from diffalign.training.setup import accelerator_for

    dtype, precision, adapter = STEP_ZERO[case]
    if isinstance(adapter, str):
        adapter = AdapterSpec(init=str(adapters[adapter]))
    model: Any = load_model(*backbone, dtype=dtype)
    batch = make_batch(model, groups=3)
    model.start_training(adapter, seed=0, with_reference=True)
    torch.manual_seed(0)
    with accelerator_for(precision).autocast():
        output = DPO(beta=5000.0).compute(model.denoiser, batch, draws_of(batch))
    assert torch.equal(output.loss, torch.full((3,), math.log(2.0)))
    assert not output.logs["margin"].any()
    assert output.logs["err_w"].dtype == output.loss.dtype == torch.float32
    assert {parameter.dtype for parameter in model.denoiser.trainable_parameters()} == {torch.float32}
    output.loss.sum().backward()
    assert any(bool(parameter.grad.any()) for parameter in model.denoiser.trainable_parameters())


@pytest.mark.parametrize("kind", ["rslora", "dora"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_adapter_to_start_from_keeps_its_bits(
    kind: str, dtype: str, backbone: tuple[str, str], adapters: dict[str, Path]
) -> None:
    """Also over a half-precision base, where diffusers rounds what it loads; and so does its frozen copy."""
    from safetensors.torch import load_file

    stored = load_file(next(adapters[kind].glob("*.safetensors")))
    model: Any = load_model(*backbone, dtype=dtype)
    prefix = "base_model.model" if model.spec.adapter_layout == "peft" else model.network_part
    model.start_training(AdapterSpec(init=str(adapters[kind])), seed=0, with_reference=True)
    state = model.trained_state()
    assert len(state) == len(stored)
    for name, tensor in state.items():
        assert torch.equal(tensor, stored[f"{prefix}.{name}"]), name
    parameters = dict(model.network.named_parameters())
    for name, tensor in parameters.items():
        if ".trained" in name:
            assert torch.equal(parameters[name.replace(".trained", ".reference")], tensor), name


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_trained_state_goes_back_in_place(kind: str, backbone: tuple[str, str]) -> None:
    model: Any = load_model(*backbone)
    model.start_training(FRESH[kind], seed=0, with_reference=True)
    perturb(model.denoiser.trainable_parameters(), 0.05)
    wanted, parameters = answer(model), model.denoiser.trainable_parameters()
    state = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    perturb(parameters, 0.05, seed=1)
    assert not torch.equal(answer(model), wanted)
    model.load_trained_state(state)
    assert torch.equal(answer(model), wanted)
    assert all(a is b for a, b in zip(model.denoiser.trainable_parameters(), parameters, strict=True))


def test_lora_holds_one_copy_of_the_network(backbone: tuple[str, str], adapters: dict[str, Path]) -> None:
    """Base + adapter (and the frozen adapter it started from); full training: twice the network."""
    base = sum(p.numel() for p in load_model(*backbone).network.parameters())  # type: ignore[attr-defined]
    for spec, copies in ((FRESH["lora"], 1), (AdapterSpec(init=str(adapters["rslora"])), 2)):
        model: Any = load_model(*backbone)
        model.start_training(spec, seed=0, with_reference=True)
        adapter = sum(tensor.numel() for tensor in model.trained_state().values())
        assert sum(p.numel() for p in model.network.parameters()) == base + copies * adapter
        assert sum(p.numel() for p in model.denoiser.trainable_parameters()) == adapter
        held = [policy for policy in model.denoiser.policies.values() if hasattr(policy, "network")]
        assert not held
    full: Any = load_model(*backbone)
    full.start_training(FRESH["full"], seed=0, with_reference=True)
    assert sum(p.numel() for p in full.denoiser.policies["reference"].network.parameters()) == base


def test_full_training_in_half_precision_is_refused(backbone: tuple[str, str]) -> None:
    model = load_model(*backbone, dtype="bf16")
    with pytest.raises(UserError, match=r"adapter\.kind=full with model\.dtype=bf16"):
        model.start_training(FRESH["full"], seed=0, with_reference=True)


def test_the_repeated_blocks_are_compiled(backbone: tuple[str, str]) -> None:
    """Of the network and of its frozen copy: all that are of one kind with a first one."""
    model: Any = load_model(*backbone)
    model.start_training(AdapterSpec(kind="full"), seed=0, with_reference=True)
    model.compile_blocks()
    for network in (model.network, model.denoiser.policies["reference"].network):
        compiled = {id(module) for module in network.modules() if module._compiled_call_impl is not None}
        kinds = {type(module) for module in network.modules() if id(module) in compiled}
        assert kinds and type(network) not in kinds
        assert compiled == {id(module) for module in network.modules() if type(module) in kinds}


def test_parts_leave_memory_and_come_back(backbone: tuple[str, str]) -> None:
    model: Any = load_model(*backbone)
    before = model.encode_prompts(["a"])
    assert model.network_part not in model.parts._loaded  # encoding needs no network
    model.drop_encoders()
    assert not any(name in model.parts._loaded for name in (*model.encoder_parts, "vae"))
    after = model.encode_prompts(["a"])
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_fingerprint_names_weights_and_process(
    backbone: tuple[str, str], untouched: Any, tmp_path: Path
) -> None:
    name, path = backbone
    tiny = plugins.get("models", name).tiny
    same, other_weights, other_process = (tmp_path / part for part in "abc")
    tiny(same)
    tiny(other_weights, seed=1)
    flows = untouched.process.prediction == "flow"
    tiny(other_process, **({"num_train_timesteps": 500} if flows else {"prediction_type": "v_prediction"}))
    assert load_model(name, str(same)).fingerprint() == untouched.fingerprint()
    assert load_model(name, str(other_weights)).fingerprint() != untouched.fingerprint()
    assert load_model(name, str(other_process)).fingerprint() != untouched.fingerprint()
    own_vae = load_model(name, path, vae=str(other_weights / "vae"))
    assert own_vae.fingerprint() not in (
        untouched.fingerprint(),
        load_model(name, str(other_weights)).fingerprint(),
    )


def test_the_pipeline_is_the_one_that_the_base_names(untouched: Any) -> None:
    assert untouched.parts.index["_class_name"] == untouched.pipeline_class.__name__


def test_the_process_is_that_of_the_scheduler(untouched: Any) -> None:
    scheduler = untouched.parts["scheduler"]
    theirs = Process.from_scheduler(scheduler)
    flows = type(scheduler).__name__.startswith("FlowMatch")
    assert untouched.process.prediction == ("flow" if flows else "epsilon")
    assert torch.equal(untouched.process.alphas, theirs.alphas)


def first_noise(model: Any, prompts: list[str], seeds: list[int]) -> Tensor:
    """What the network is first shown, while pictures are drawn in one step without guidance."""
    pictures: list[Any] = []
    noise, *_ = shown(
        model,
        lambda: pictures.extend(model.generate(prompts, seeds, num_inference_steps=1, guidance_scale=1.0)),
    )
    assert len(noise) == len(prompts)
    assert all(isinstance(picture, Image.Image) and picture.size == (32, 32) for picture in pictures)
    return noise


def test_the_initial_noise_depends_on_prompt_and_seed_alone(backbone: tuple[str, str]) -> None:
    model: Any = load_model(*backbone)
    pairs = [("a ring", 0), ("a ring", 1), ("a square", 0)]
    together = first_noise(model, [prompt for prompt, _ in pairs], [seed for _, seed in pairs])
    for row, (prompt, seed) in enumerate(pairs):
        assert torch.equal(first_noise(model, [prompt], [seed])[0], together[row])
    assert not torch.equal(together[0], together[1]) and not torch.equal(together[0], together[2])


def test_sizes_that_do_not_fit_are_refused(untouched: Any) -> None:
    assert untouched.size_multiple == 4
    with pytest.raises(UserError, match="height=30, width=32: both must be multiples of 4"):
        untouched.generate(["a"], [0], height=30)
    with pytest.raises(UserError, match="unknown scheduler 'DDIMSchedular': did you mean 'DDIMScheduler'"):
        untouched.generate(["a"], [0], scheduler="DDIMSchedular")
