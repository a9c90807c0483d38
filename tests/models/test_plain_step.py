"""A Diffusion-DPO step on each transformer backbone, written again in plain torch, diffusers and peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import FluxPipeline, PixArtSigmaPipeline, StableDiffusion3Pipeline
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.common import draws, plugins
from diffalign.models._parts import quiet_libraries
from diffalign.models._spec import AdapterSpec
from diffalign.objectives.diffusion_dpo import Plugin as DPO
from diffalign.training.implicit import judge
from tests.tiny_training import draws_of, make_batch, make_set, perturb

FAMILIES = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline, "pixart": PixArtSigmaPipeline}
BETA = 2000.0


class Plain(NamedTuple):
    """A family as its pipeline loads it, with the adapter of ours."""

    name: str
    pipeline: Any
    network: Any

    def told(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the pipeline's own encoders make of the prompts."""
        if self.name == "sd3":
            embeds, _, pooled, _ = self.pipeline.encode_prompt(prompts, None, None, max_sequence_length=12)
            return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        if self.name == "flux":
            embeds, pooled, ids = self.pipeline.encode_prompt(prompts, None, max_sequence_length=12)
            return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": ids}
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=24
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def errors(self, latents: Tensor, noise: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        """`[B]` mean squared errors of what the network says: eps - x0 of flows, eps of PixArt."""
        with torch.no_grad(), quiet_libraries():
            told = self.told(prompts)
        told = {key: value.double() if value.is_floating_point() else value for key, value in told.items()}
        if self.name == "pixart":
            scales = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t]
            alpha, sigma = (scale.sqrt().reshape(-1, 1, 1, 1) for scale in (scales, 1.0 - scales))
            answer = self.network(
                (alpha * latents + sigma * noise).to(latents.dtype),
                timestep=t,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                **told,
            ).sample
            return (answer[:, :4] - noise).square().mean(dim=(1, 2, 3))
        level = (t + 1) / 1000
        sigma = level.reshape(-1, 1, 1, 1).to(latents.dtype)
        x_t = (1.0 - sigma) * latents + sigma * noise
        if self.name == "sd3":
            answer = self.network(hidden_states=x_t, timestep=level * 1000, **told).sample
        else:
            count, channels, height, width = x_t.shape
            ids = FluxPipeline._prepare_latent_image_ids(
                count, height // 2, width // 2, latents.device, latents.dtype
            )
            tokens = self.network(
                hidden_states=FluxPipeline._pack_latents(x_t, count, channels, height, width),
                timestep=level,
                guidance=torch.full([count], 3.5),
                img_ids=ids,
                **told,
            ).sample
            answer = FluxPipeline._unpack_latents(tokens, height * 2, width * 2, 2)
        return (answer - (noise - latents)).square().mean(dim=(1, 2, 3))

    def margins(self, latents: Tensor, noise: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        """`[N]` reference error less policy error, of the first image of each pair less of the second."""
        with torch.no_grad(), without_adapters(self.network):
            reference = self.errors(latents, noise, t, prompts)
        gain = reference - self.errors(latents, noise, t, prompts)
        return gain[0::2] - gain[1::2]


@contextmanager
def without_adapters(network: Any) -> Iterator[None]:
    """The base alone, by the switch of diffusers or of peft."""
    if isinstance(network, PeftModel):
        with network.disable_adapter():
            yield
        return
    network.disable_adapters()
    yield
    network.enable_adapters()


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Plain]:
    """Our model in training with a moved adapter, in float64, and the plain one that loaded its file."""
    folder = tmp_path_factory.mktemp("plain") / request.param
    spec = plugins.get("models", request.param).tiny(folder)
    model: Any = spec.load()
    model.start_training(AdapterSpec(rank=3, alpha=5.0), seed=0, with_reference=True)
    perturb(model.denoiser.trainable_parameters(), 0.2)
    (folder / "adapter").mkdir()
    model.save_adapter(str(folder / "adapter"))
    model.network.double()
    pipeline: Any = FAMILIES[request.param].from_pretrained(spec.path)
    network = pipeline.transformer.requires_grad_(False).train()
    if request.param == "pixart":
        network = PeftModel.from_pretrained(network, folder / "adapter", is_trainable=True)
    else:
        pipeline.load_lora_weights(folder / "adapter")
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(".lora_" in name)
    return model, Plain(request.param, pipeline, network.double())


def test_loss_and_gradient_are_those_of_a_step_written_by_hand(both: tuple[Any, Plain]) -> None:
    """Velocity of flows, eps of PixArt; means over a latent; half of beta; the base as the reference."""
    model, plain = both
    batch = make_batch(model, target=torch.tensor([1.0, 0.0, 1.0, 0.5]))
    prompts = [f"a picture of {name}" for name in "abcd" for _ in range(2)]
    drawn = draws_of(batch)
    latents, noise = batch.latents.double(), drawn.noise.double()
    logit = BETA / 2 * plain.margins(latents, noise, drawn.t, prompts)
    target = batch.target.double()
    loss = -target * logsigmoid(logit) - (1 - target) * logsigmoid(-logit)
    loss.sum().backward()
    ours = (
        DPO(beta=BETA)
        .compute(model.denoiser, replace(batch, latents=latents), replace(drawn, noise=noise))
        .loss
    )
    ours.sum().backward()
    assert float(logit.detach().abs().min()) > 0.05
    assert torch.allclose(ours, loss, rtol=1e-5), (ours, loss)
    theirs = [parameter.grad for parameter in plain.network.parameters() if parameter.requires_grad]
    own = [parameter.grad for parameter in model.denoiser.trainable_parameters()]
    assert len(theirs) == len(own) > 0
    for one, other in zip(own, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_held_out_margins_are_those_written_by_hand(both: tuple[Any, Plain]) -> None:
    """Means over five levels, the middles of equal slices; the second image may be the preferred one."""
    model, plain = both
    pairs = make_set(model, 3, targets=(1.0, 0.0))
    found = {
        judgement.id: judgement.margin()
        for judgement in judge(model.denoiser, pairs, num_draws=5, batch_size=2, device="cpu")
    }
    plain.network.eval()
    for number, example in enumerate(pairs.examples):
        latents = torch.stack(pairs.means[2 * number : 2 * number + 2]).double()
        margins = []
        for k in range(5):
            noise = draws.normal((1, *latents.shape[1:]), 0, "held-out-noise", example.id, k).double()
            t = torch.tensor([100 + 200 * k] * 2)
            with torch.no_grad():
                margins.append(float(plain.margins(latents, noise, t, [example.prompt] * 2)))
        expected = sum(margins) / 5 * (1 if example.target == 1.0 else -1)
        assert found[example.id] == pytest.approx(expected, abs=1e-6), example.id
    assert set(found) == {example.id for example in pairs.examples}
