"""The walk through all stages on the embedded models; each step is the stage that users run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.common import files
from diffalign.common.progress import say
from diffalign.data.sources.jsonl import Plugin as Preferences
from diffalign.data.specs import LoaderSpec
from diffalign.demo import embedded
from diffalign.demo.bases import BASES
from diffalign.demo.methods import Method
from diffalign.diffusion.specs import TimestepSpec
from diffalign.models._spec import AdapterSpec
from diffalign.objectives._base import Objective, OnPolicyObjective
from diffalign.scenes import draw as draw_scene
from diffalign.scenes import parse, sample_prompts
from diffalign.scorers.clip import Plugin as CLIP
from diffalign.scorers.scene import Plugin as SceneScorer
from diffalign.stages.evaluate import evaluate
from diffalign.stages.generate import generate
from diffalign.stages.pair import pair
from diffalign.stages.score import score
from diffalign.stages.train import train
from diffalign.training.specs import CheckpointSpec, OptimizerSpec, RolloutSpec

PREFERENCES = {
    "pair": "of the pictures of each prompt, every better against every worse one",
    "list": "the pictures of each prompt as a list",
    "single": "every picture by its pairs with the others of its prompt",
}
"""What is learned from, by the objective's unit."""

PROMPT_SEED = 20
"""Prompts are the same in every demo: `seed` changes pictures and training only."""

TUNING_PROMPTS = 250
"""Held-out prompts that settings were chosen on; the report never uses them."""


@dataclass(frozen=True)
class Size:
    """Which model a walk aligns, and how much of everything it makes.

    Args:
        base: name of the embedded model.
        train_prompts: prompts whose pictures become pairs.
        pictures: seeds a training prompt is drawn with; every two that differ become a pair.
        test_prompts: held-out prompts that base and aligned model are compared on.
        test_seeds: pictures a test prompt.
        draft_steps: denoising steps of a training picture.
        sampler_steps: denoising steps of a picture that models are compared by.
        guidance: scale of classifier-free guidance of every picture.
        batch_size: pictures drawn at once.
        exemplars: exact drawings that pictures are held against, where a reward needs them.
        num_steps: optimizer steps.
        low: smallest timestep that is trained on; what is where is decided in the noisy half.
        rank: of the LoRA.
    """

    base: str = "tiny-sdxl"
    train_prompts: int = 512
    pictures: int = 4
    test_prompts: int = 100
    test_seeds: int = 2
    draft_steps: int = 6
    sampler_steps: int = 8
    guidance: float = 2.0
    batch_size: int = 32
    exemplars: int = 512
    num_steps: int = 200
    low: int = 400
    rank: int = 16


WHOLE = Size()
"""Chosen on 200 tuning prompts (accuracy of the base 0.32, DDIM in 16 steps). From 256 prompts: win rate 0.58
and accuracy 0.38 after 200 steps over all timesteps, 0.595 and 0.41 over those from 400 on. From 512 prompts:
0.615 and 0.445 after 200 steps, 0.62 and 0.45 after 300. Beta 8000 learned half as much; at guidance 3, where
the base is at its best, less than half of the gain is left.
"""

WHOLE_SD3 = Size(base="tiny-sd3", train_prompts=1024)
"""Chosen on 250 tuning prompts x 2 (accuracy of the base 0.414), one training seed: win rate and accuracy
after 200 steps 0.572 and 0.504 over all timesteps, 0.588 and 0.510 over those from 400 on, 0.583 and 0.520
from 600 on, all without caption dropout (over all timesteps 0.573 and 0.498 with it). With each of them 300
steps were worse than 200, by 0.01 and 0.02.
"""

SIZES = {"tiny-sdxl": WHOLE, "tiny-sd3": WHOLE_SD3}
"""The whole walk of each embedded model."""


def quick(size: Size) -> Size:
    """A smaller walk, for a first look and for tests."""
    return replace(size, train_prompts=64, test_prompts=48, test_seeds=1, num_steps=60)


def train_prompts(count: int) -> list[str]:
    """Prompts of combinations that the base was trained on."""
    return sample_prompts(count, seed=PROMPT_SEED, split="train")


def held_out_prompts(count: int, *, tuning: bool = False) -> list[str]:
    """Prompts with combinations that nothing was trained on; those for tuning and for the report are
    disjoint.
    """
    everything = sample_prompts(TUNING_PROMPTS + 250, seed=PROMPT_SEED, split="heldout")
    return everything[:TUNING_PROMPTS][:count] if tuning else everything[TUNING_PROMPTS:][:count]


def walk(out: Path, size: Size, *, method: Method, seed: int, recipe: dict[str, Any]) -> dict[str, Any]:
    """Runs every stage below `out` and returns the report; steps that are already complete are not done
    again.
    """
    objective = method.make(out / "exemplars")
    if isinstance(objective, OnPolicyObjective):
        say("1-3/6 no pictures are drawn beforehand: the policy draws while it learns")
        if objective.exemplars is not None:
            draw_exemplars(out / "exemplars", train_prompts(size.exemplars))
    else:
        say("1/6 the base model draws its own training pictures")
        draw_drafts(out / "1-pictures", train_prompts(size.train_prompts), size, seed=seed)
        say("2/6 the pictures are graded, exactly")
        grade(out / "2-graded", out / "1-pictures")
        say("3/6 what is better than what: " + PREFERENCES[objective.unit])
        prefer(out / "3-pairs", out / "2-graded", unit=objective.unit)
    say("4/6 a LoRA learns from them")
    align(out / "4-run", objective, method, size, seed=seed, pairs=out / "3-pairs")
    say("5/6 base and aligned model draw held-out combinations")
    test = held_out_prompts(size.test_prompts)
    seeds = [900_000 + k for k in range(size.test_seeds)]
    for name, adapter in (("base", None), ("aligned", out / "4-run" / "adapter")):
        draw(out / f"5-{name}", test, seeds=seeds, size=size, adapter=adapter)
        grade(out / f"5-{name}-graded", out / f"5-{name}")
    say("6/6 the comparison")
    result = compare(out / "6-report", out / "5-base-graded", out / "5-aligned-graded")
    report = {**headline(result), "recipe": recipe, "result": result}
    files.write_json(out / "report.json", report)
    found = out / "6-report"
    say(f"report: {out / 'report.json'}\npage: {found / 'report.html'}\npictures: {found / 'grid.png'}")
    return report


def draw_drafts(out: Path, prompts: list[str], size: Size, *, seed: int) -> None:
    """Training pictures: as many as possible in the time, so with few steps."""
    seeds = [seed * 1000 + k for k in range(size.pictures)]
    draw(out, prompts, seeds=seeds, size=replace(size, sampler_steps=size.draft_steps))


def draw(
    out: Path,
    prompts: list[str],
    *,
    seeds: list[int],
    size: Size,
    adapter: Path | None = None,
    weight: float = 1.0,
) -> None:
    """Pictures of the prompts by the base, or with an adapter."""
    generate(
        model=BASES[size.base].load(),
        prompts=prompts,
        seeds=seeds,
        out=str(out),
        adapter=None if adapter is None else str(adapter),
        adapter_weight=weight,
        guidance_scale=size.guidance,
        num_inference_steps=size.sampler_steps,
        scheduler=BASES[size.base].scheduler,
        batch_size=size.batch_size,
    )


def grade(out: Path, pictures: Path) -> None:
    """Scores of the exact grader."""
    score(images=str(pictures), scorers={"scene": SceneScorer()}, out=str(out), batch_size=64)


def prefer(out: Path, graded: Path, *, unit: str = "pair") -> None:
    """Lists of the pictures of a prompt, or pairs of all whose grades differ, which are more than best
    against worst.
    """
    pair(images=str(graded), out=str(out), by="scene", how="lists" if unit == "list" else "all_pairs")


def draw_exemplars(folder: Path, prompts: list[str]) -> None:
    """Exact drawings of the prompts: what pictures of this world should look like."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(prompts):
        path = folder / f"{number:05d}.png"
        if not path.exists():
            scene = draw_scene(parse(prompt), np.random.default_rng([PROMPT_SEED, number]))
            with files.atomic_path(path) as temporary:
                scene.save(temporary, format="PNG")


def align(
    out: Path, objective: Objective, method: Method, size: Size, *, seed: int, pairs: Path | None = None
) -> None:
    """Trains the LoRA on `pairs`, or on the policy's own pictures."""
    base = BASES[size.base]
    if isinstance(objective, OnPolicyObjective):
        source: dict[str, Any] = {
            "prompts": train_prompts(size.train_prompts),
            "scorers": method.scorers(),
            "rollout": RolloutSpec(
                steps=method.rollout_steps,
                num_inference_steps=size.draft_steps,
                guidance_scale=size.guidance,
                scheduler=base.scheduler,
                batch_size=size.batch_size,
            ),
        }
    else:
        source = {"data": Preferences(path=str(Path(str(pairs)) / "preferences.jsonl"))}
    train(
        model=base.load(),
        out=str(out),
        objective=objective,
        adapter=AdapterSpec(rank=size.rank, targets=list(base.targets)),
        loader=LoaderSpec(batch_size=method.groups, caption_dropout=0.1),
        timesteps=TimestepSpec(low=size.low),
        optimizer=OptimizerSpec(lr=method.lr, warmup_steps=min(10, size.num_steps // 4)),
        checkpoint=CheckpointSpec(every=50, keep=1),
        num_steps=size.num_steps,
        seed=seed,
        **source,
    )


def compare(out: Path, base: Path, aligned: Path) -> dict[str, Any]:
    """The report of `evaluate` on two graded folders, with drift and diversity measured by tiny-clip."""
    report = evaluate(
        base=str(base), aligned=str(aligned), out=str(out), embedder=CLIP(path=str(embedded("tiny-clip")))
    )
    return dict(files.read_json(report))


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """What the demo is judged by, from the report of `evaluate`."""
    accurate = result["rewards"]["scene"]["parts"]["accurate"]
    return {
        "win_rate": result["win_rate"],
        "interval": result["interval"],
        "n": result["n"],
        "accuracy_base": accurate["base"],
        "accuracy_aligned": accurate["aligned"],
        "accuracy_difference": accurate["difference"],
    }
