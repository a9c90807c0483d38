"""On-policy examples: the policy draws two pictures a prompt, a reward says which is good.

Everything drawn is keyed by (seed, number of the pair), so a rollout depends on the policy alone; one that is
under way is kept in the checkpoint, because the policy that drew it is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.common import draws
from diffalign.common.conditioning import Conditioning
from diffalign.common.errors import UserError
from diffalign.common.plugins import plugin_name
from diffalign.data.batches import Batch
from diffalign.data.encoded import EncodedSet, Example
from diffalign.data.encoding import encode_prompts
from diffalign.data.loader import Plan, assemble
from diffalign.data.prompts import Prompt
from diffalign.data.specs import PreprocessSpec
from diffalign.diffusion.likelihood import Draws
from diffalign.models._base import Model
from diffalign.objectives._base import OnPolicyObjective
from diffalign.training.labeller import Labeller
from diffalign.training.ranks import Ranks
from diffalign.training.sampling import training_draws
from diffalign.training.specs import Settings

UNREAD = {
    "preprocess": ("buckets", "crop", "flip", "size_conditioning"),
    "loader": ("num_workers", "posterior"),
}
"""Section -> its keys that say how given pictures are read."""


def check_rollout(objective: OnPolicyObjective, settings: Settings, num_ranks: int) -> None:
    """Refuses, before anything is loaded, sizes that a rollout cannot have and keys that it does not read."""
    for section, names in UNREAD.items():
        spec = getattr(settings, section)
        for name in names:
            if getattr(spec, name) != getattr(type(spec)(), name):
                raise UserError(
                    f"{section}.{name} is of given pictures, and objective={plugin_name(objective)} draws "
                    "its own: leave it out"
                )
    size = settings.loader.batch_size
    if objective.unit == "single" and size % 2:
        raise UserError(f"loader.batch_size={size}: a prompt gives two pictures here, use an even number")
    pairs = settings.rollout.steps * settings.accumulation * num_ranks
    pairs *= size // 2 if objective.unit == "single" else size
    if pairs < objective.min_pairs:
        raise UserError(
            f"a rollout of {pairs} pairs is too small for this reward, which needs {objective.min_pairs}: "
            "raise rollout.steps or loader.batch_size"
        )


@dataclass
class Drawn:
    """This process's part of a rollout.

    Args:
        first: global number of the rollout's first micro-batch.
        number: of its first pair, counted over the whole run.
        targets: `[n]` probability that the first picture of each pair is good; of all processes.
        latents: `[2 k, ...]` of this process's pairs, two a pair.
    """

    first: int
    number: int
    targets: Tensor
    latents: Tensor


@dataclass
class Rollout:
    """The feed of an on-policy objective.

    A rollout is made of as many pairs as its `rollout.steps` optimizer steps can take; pairs of which neither
    picture is better are left out, so that micro-batches may be smaller, or None.

    Args:
        model: drawn with; of its parts only the network and the VAE, which comes back when it is dropped.
        objective: its unit says whether the two pictures of a prompt are a pair or two examples.
        labeller: of the pictures.
        prompts: what is drawn.
        texts: the prompts as `embed_prompts` gave them.
        settings: of the run.
        ranks: the processes of the run.
        context: entered around the network's calls (autocast).
    """

    model: Model
    objective: OnPolicyObjective
    labeller: Labeller
    prompts: Sequence[Prompt]
    texts: EncodedSet
    settings: Settings
    ranks: Ranks
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    _next: int = field(default=0, init=False)
    _pairs_drawn: int = field(default=0, init=False)
    _drawn: Drawn | None = field(default=None, init=False)
    _batches: dict[int, Batch | None] = field(default_factory=dict, init=False)
    _news: list[dict[str, float]] = field(default_factory=list, init=False)
    _order: tuple[int, Sequence[int]] = field(default=(-1, ()), init=False)

    why_empty: ClassVar[str] = (
        "of no pair one picture is better: the reward does not tell them apart; use another scorer or a "
        "larger loader.batch_size"
    )

    @property
    def _micro_batches_a_rank(self) -> int:
        return self.settings.rollout.steps * self.settings.accumulation

    @property
    def _pairs_a_micro_batch(self) -> int:
        size = self.settings.loader.batch_size
        return size // 2 if self.objective.unit == "single" else size

    @property
    def num_pairs(self) -> int:
        """Pairs in one rollout, over all processes."""
        return self._micro_batches_a_rank * self.ranks.count * self._pairs_a_micro_batch

    def micro_batches(self, start: int, rank: int, num_ranks: int) -> Iterator[tuple[Batch, Draws] | None]:
        """Micro-batches of this rank, with their draws, on the CPU; None where nothing is to be learned."""
        settings, number = self.settings, start + rank
        if self._drawn is not None:
            self._make_batches(self._drawn)
            for used in [micro for micro in self._batches if micro < start]:
                del self._batches[used]
        while True:
            if number >= self._next:
                self._draw()
            batch = self._batches.pop(number)
            if batch is None:
                yield None
            else:
                yield (
                    batch,
                    training_draws(
                        batch,
                        settings.timesteps,
                        self.model.process,
                        seed=settings.seed,
                        noise=self.objective.noise,
                    ),
                )
            number += num_ranks

    def news(self) -> list[dict[str, float]]:
        """A row for each rollout since the last call: pairs, share decided, rewards."""
        news, self._news = self._news, []
        return news

    def state_dict(self) -> dict[str, Any]:
        """Where the run is, and the rollout under way; every process must ask."""
        state: dict[str, Any] = {
            "next": self._next,
            "pairs_drawn": self._pairs_drawn,
            "num_pairs": self.num_pairs,
        }
        under_way = self._drawn is not None and self.ranks.any(bool(self._batches))
        if not under_way:
            return state
        assert self._drawn is not None
        latents = self.ranks.gather(self._drawn.latents)
        owners = [self._own_pairs(rank) for rank in range(self.ranks.count)]
        order = torch.tensor([pair for pairs in owners for pair in pairs]).argsort()
        images = torch.stack([2 * order, 2 * order + 1], dim=1).flatten()
        held = {
            "first": self._drawn.first,
            "number": self._drawn.number,
            "targets": self._drawn.targets,
            "latents": latents[images],
        }
        return {**state, "drawn": held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave.

        Raises:
            UserError: rollouts would have another size: a reward of sets depends on it.
        """
        if state["num_pairs"] != self.num_pairs:
            raise UserError(
                f"the run's rollouts have {state['num_pairs']} pairs, these processes make "
                f"{self.num_pairs}: go on with as many processes as before"
            )
        self._next, self._pairs_drawn = state["next"], state["pairs_drawn"]
        held = state.get("drawn")
        if held is None:
            return
        own = torch.tensor(self._own_pairs(self.ranks.index))
        images = torch.stack([2 * own, 2 * own + 1], dim=1).flatten()
        self._drawn = Drawn(held["first"], held["number"], held["targets"], held["latents"][images])

    def _own_pairs(self, rank: int) -> list[int]:
        """Which pairs of a rollout are this rank's: those of every `count`-th micro-batch."""
        size = self._pairs_a_micro_batch
        return [i for i in range(self.num_pairs) if (i // size) % self.ranks.count == rank]

    def _draw(self) -> None:
        """Makes the next rollout and its micro-batches."""
        first, number, count = self._next, self._pairs_drawn, self.num_pairs
        self._next += self._micro_batches_a_rank * self.ranks.count
        self._pairs_drawn += count
        own = [number + i for i in self._own_pairs(self.ranks.index)]
        failure: Exception | None = None
        latents = seen = torch.zeros(0)
        with _own_random_stream(self._device):
            try:
                latents, seen = self._pictures(own)
            except Exception as error:  # whatever it is, the other processes must not wait for this one
                failure = error
        self.ranks.fail_together(failure)
        everywhere = self.ranks.gather(seen.unflatten(0, (-1, 2)))
        owners = [self._own_pairs(rank) for rank in range(self.ranks.count)]
        everywhere = everywhere[torch.tensor([pair for pairs in owners for pair in pairs]).argsort()]
        generator = draws.generator(self.settings.seed, "demonstrations", number)
        targets, rewards = self.labeller.targets(everywhere[:, 0], everywhere[:, 1], generator)
        decided = float((targets != 0.5).double().mean())
        self._news.append({"pairs": float(count), "decided": decided, **rewards})
        self._drawn = Drawn(first, number, targets, latents)
        self._make_batches(self._drawn)

    def _pictures(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents `[2 k, ...]` of two pictures a pair, and what the labeller saw of them; on the CPU."""
        spec, network = self.settings.rollout, self.model.denoiser.network
        jobs = [(number, side) for number in numbers for side in (0, 1)]
        latents, seen = [], []
        was_training = network.training
        network.eval()
        try:
            for start in range(0, len(jobs), spec.batch_size):
                batch = jobs[start : start + spec.batch_size]
                prompts = [self._prompt(number) for number, _ in batch]
                seeds = [draws.seed_of(self.settings.seed, "rollout", number, side) for number, side in batch]
                texts = [prompt.text for prompt in prompts]
                with torch.no_grad(), self.context():
                    drawn = self.model.sample(
                        texts,
                        seeds,
                        guidance_scale=spec.guidance_scale,
                        num_inference_steps=spec.num_inference_steps,
                        scheduler=spec.scheduler,
                        height=self.texts.examples[0].size[0],
                        width=self.texts.examples[0].size[1],
                        embedded=self._embedded(texts),
                    )
                    pictures = self.model.pictures(drawn, texts, seeds)
                latents.append(drawn.float().cpu())
                about = [prompt.meta for prompt in prompts]
                seen.append(self.labeller.look(pictures, texts, about).cpu())
        finally:
            network.train(was_training)
        return torch.cat(latents), torch.cat(seen)

    def _prompt(self, number: int) -> Prompt:
        """The prompt of the pair `number` of the run: all prompts in a new order, again and again."""
        epoch, place = divmod(number, len(self.prompts))
        if self._order[0] != epoch:
            order = draws.permutation(len(self.prompts), self.settings.seed, "rollout-order", epoch)
            self._order = (epoch, [int(number) for number in order])
        return self.prompts[self._order[1][place]]

    def _embedded(self, texts: list[str]) -> tuple[Conditioning, Conditioning]:
        rows = torch.tensor([self.texts.prompt_rows[text] for text in texts])
        cond = self.texts.prompts.rows(rows).to(self._device)
        return cond, Conditioning.cat([self.texts.dropped] * len(texts)).to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.denoiser.network.parameters()).device

    def _make_batches(self, drawn: Drawn) -> None:
        """Spreads what is decided of this process's pairs evenly over its micro-batches."""
        examples = [
            example
            for place, i in enumerate(self._own_pairs(self.ranks.index))
            for example in self._examples(place, drawn.number + i, float(drawn.targets[i]))
        ]
        images = list(drawn.latents)
        encoded = replace(self.texts, examples=examples, means=images, stds=images)
        spec = replace(self.settings.loader, posterior="mean")
        count = self._micro_batches_a_rank
        for k in range(count):
            chosen = range(k * len(examples) // count, (k + 1) * len(examples) // count)
            micro = drawn.first + k * self.ranks.count + self.ranks.index
            plan = Plan(0, tuple(chosen), micro * spec.batch_size)
            self._batches[micro] = (
                assemble(encoded, plan, seed=self.settings.seed, spec=spec) if chosen else None
            )

    def _examples(self, place: int, number: int, target: float) -> list[Example]:
        """What the pair `number` teaches: one pair, two single pictures, or nothing when it is undecided."""
        if target == 0.5:
            return []
        template = self.texts.examples[0]
        text = self._prompt(number).text
        if self.objective.unit == "single":
            return [
                replace(
                    template,
                    id=f"rollout-{number}:{side}",
                    prompt=text,
                    images=(2 * place + side,),
                    target=float((target > 0.5) == (side == 0)),
                )
                for side in (0, 1)
            ]
        images = (2 * place, 2 * place + 1)
        conditions = template.conditions * 2
        pair = replace(template, id=f"rollout-{number}", prompt=text, images=images, conditions=conditions)
        return [replace(pair, target=target)]


def embed_prompts(model: Model, prompts: Sequence[Prompt], spec: PreprocessSpec) -> EncodedSet:
    """The prompts' embeddings, in a set with one example that says what the network is told about sizes."""
    side = spec.resolution or model.default_resolution
    if side % model.size_multiple:
        raise UserError(f"preprocess.resolution={side}: use a multiple of {model.size_multiple} here")
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    size = (side, side)
    conditions = (model.size_conditioning(size, (0, 0), size),)
    template = Example("", texts[0], (), size, None, conditions)
    return EncodedSet(
        [template],
        [],
        [],
        {text: row for row, text in enumerate(texts)},
        encode_prompts(texts, model, spec),
        model.encode_dropped_prompt().to("cpu"),
    )


def _own_random_stream(device: torch.device) -> AbstractContextManager[None]:
    # A run that goes on in the middle of a rollout does not draw it again: training must not notice.
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
