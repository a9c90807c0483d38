"""Rollouts: deterministic, split by reward, dropped where undecided, resumed in the middle bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageStat

from diffalign.common import files
from diffalign.common.errors import UserError
from diffalign.data.prompts import load_prompts
from diffalign.data.specs import LoaderSpec, PreprocessSpec
from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.objectives.dragon import Plugin as Dragon
from diffalign.scorers import load_scorer, set_reward
from diffalign.scorers._base import Scorer, Scores
from diffalign.scorers.clip import Plugin as CLIP
from diffalign.training import loop
from diffalign.training.checkpoint import load_latest
from diffalign.training.labeller import Labeller, check_reward
from diffalign.training.ranks import Ranks
from diffalign.training.rollout import Rollout, check_rollout, embed_prompts
from diffalign.training.setup import accelerator_for
from diffalign.training.specs import CheckpointSpec, OptimizerSpec, RolloutSpec, Settings
from tests.tiny_clip import write_open_clip
from tests.tiny_training import make_run, make_set

PROMPTS = load_prompts(["a ring", "a cube", "a cat"])


@dataclass
class Brightness(Scorer):
    """Mean grey value; `levels`: rounded to so many, so that ties happen."""

    levels: int | None = None
    scale: str = "grey"

    def _score_batch(self, images: Any, prompts: Any, context: Any) -> Scores:
        values = torch.tensor([ImageStat.Stat(image.convert("L")).mean[0] / 255 for image in images])
        return Scores(values if self.levels is None else (values * self.levels).round())


@pytest.fixture(scope="module")
def loaded(tiny_sdxl: str) -> Any:
    model: Any = SDXL(path=tiny_sdxl).load()
    model.start_training(AdapterSpec(rank=2, dropout=0.1), seed=0, with_reference=True)
    return model


@pytest.fixture
def model(loaded: Any) -> Any:
    """The shared model, put back to its start after each test."""
    state = {name: tensor.clone() for name, tensor in loaded.trained_state().items()}
    yield loaded
    loaded.load_trained_state(state)


def make_rollout(
    model: Any,
    *,
    objective: Any = None,
    scorer: Scorer | None = None,
    levels: int | None = None,
    seed: int = 0,
    **changes: Any,
) -> Rollout:
    settings = Settings(
        **{
            "loader": LoaderSpec(batch_size=2),
            "rollout": RolloutSpec(steps=2, num_inference_steps=2, guidance_scale=1.0, batch_size=3),
            "preprocess": PreprocessSpec(resolution=32),
            "seed": seed,
            **changes,
        }
    )
    objective = objective or Dragon()
    labeller = Labeller(objective, scorer or Brightness(levels))
    texts = embed_prompts(model, PROMPTS, settings.preprocess)
    return Rollout(model, objective, labeller, PROMPTS, texts, settings, Ranks(accelerator_for("fp32")))


def take(rollout: Rollout, count: int, start: int = 0) -> list[Any]:
    return list(islice(rollout.micro_batches(start, 0, 1), count))


def test_a_rollout_is_a_function_of_policy_seed_and_number(model: Any) -> None:
    torch.manual_seed(1)
    first = take(make_rollout(model), 4)
    torch.manual_seed(2)
    again, other = take(make_rollout(model), 4), take(make_rollout(model, seed=1), 4)
    for (batch, draws), (same, same_draws) in zip(first, again, strict=True):
        assert batch.ids == same.ids and torch.equal(batch.latents, same.latents)
        assert torch.equal(batch.target, same.target) and torch.equal(draws.noise, same_draws.noise)
    assert not torch.equal(first[0][0].latents, other[0][0].latents)
    ids = [name for batch, _ in first for name in batch.ids]
    assert ids == [f"rollout-{number}" for number in range(8)]


def test_the_brighter_picture_is_preferred(model: Any) -> None:
    rollout = make_rollout(model)
    for batch, _ in take(rollout, 2):
        pictures = model.pictures(batch.latents, ["x"] * 4, [0] * 4)
        values = Brightness()(pictures).view(2, 2)
        assert torch.equal(batch.target, (values[:, 0] > values[:, 1]).float())
        assert torch.equal(batch.counts, torch.tensor([2, 2])) and batch.cond.batch_size == 4
    (row,) = rollout.news()
    assert row["pairs"] == 4 and row["decided"] == 1.0 and row["reward_chosen"] > row["reward"]
    assert rollout.news() == []


def test_the_global_random_stream_is_left_alone(model: Any) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    take(make_rollout(model), 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.network.training


def test_pairs_without_a_better_picture_teach_nothing(model: Any) -> None:
    assert take(make_rollout(model, levels=1), 3) == [None, None, None]
    rollout = make_rollout(model, levels=80)
    got = take(rollout, 2)
    decided = sum(item[0].num_groups for item in got if item is not None)
    (row,) = rollout.news()
    assert 0 < decided < 4 and row["decided"] == decided / 4
    assert all(0.5 not in item[0].target.tolist() for item in got if item is not None)


def test_kto_gets_single_pictures_of_both_kinds(model: Any) -> None:
    ((batch, draws), *_) = take(make_rollout(model, objective=Dragon(surrogate="kto")), 2)
    assert batch.ids == ["rollout-0:0", "rollout-0:1"] and sorted(batch.target.tolist()) == [0.0, 1.0]
    assert batch.counts.tolist() == [1, 1] and draws.t[0] != draws.t[1]


def test_sizes_that_a_rollout_cannot_have_are_refused() -> None:
    with pytest.raises(UserError, match=r"loader\.batch_size=3: a prompt gives two pictures"):
        check_rollout(Dragon(surrogate="kto"), Settings(loader=LoaderSpec(batch_size=3)), 1)
    recall = Dragon(reward="set", measure="recall", exemplars="folder")
    with pytest.raises(UserError, match="a rollout of 3 pairs is too small for this reward, which needs 4"):
        check_rollout(recall, Settings(loader=LoaderSpec(batch_size=3)), 1)
    check_rollout(recall, Settings(loader=LoaderSpec(batch_size=4)), 1)
    check_rollout(recall, Settings(loader=LoaderSpec(batch_size=2)), 2)  # a set is of all processes


def test_keys_of_given_pictures_are_refused() -> None:
    with pytest.raises(UserError, match=r"preprocess\.flip is of given pictures, and objective=dragon draws"):
        check_rollout(Dragon(), Settings(preprocess=PreprocessSpec(flip=True)), 1)
    with pytest.raises(UserError, match=r"loader\.posterior is of given pictures"):
        check_rollout(Dragon(), Settings(loader=LoaderSpec(posterior="mean")), 1)
    check_rollout(Dragon(), Settings(preprocess=PreprocessSpec(resolution=64)), 1)


def run_of(model: Any, out: Path, levels: int | None = None, **changes: Any) -> loop.Run:
    settings = {
        "num_steps": 5,
        "log_every": 1,
        "checkpoint": CheckpointSpec(every=3, keep=5),
        "optimizer": OptimizerSpec(lr=1e-3),
        "rollout": RolloutSpec(steps=2, num_inference_steps=2, guidance_scale=1.0, batch_size=4),
        **changes,
    }
    run = make_run(model, make_set(model, 2), out, objective=Dragon(), **settings)
    rollout = make_rollout(model, levels=levels)
    rollout.settings = run.settings
    run.feed = rollout
    return run


def test_a_run_resumed_within_a_rollout_is_equal_bit_for_bit(model: Any, tmp_path: Path) -> None:
    """Step 3 is the first of the two that the second rollout is made for."""
    start = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    loop.fit(run_of(model, tmp_path / "whole"))
    whole = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    model.load_trained_state(start)
    loop.fit(run_of(model, tmp_path / "parts", num_steps=3))
    found = load_latest(tmp_path / "parts", identity="this run")
    assert found is not None and len(found.state["feed"]["drawn"]["targets"]) == 4
    model.load_trained_state(start)
    loop.fit(run_of(model, tmp_path / "parts"))
    for name, tensor in model.trained_state().items():
        assert torch.equal(tensor, whole[name]), name
    rows = [files.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0] if row["kind"] == "rollout"] == [1, 3, 5]


def test_used_micro_batches_of_a_resumed_rollout_are_gone(model: Any) -> None:
    rollout = make_rollout(model)
    take(rollout, 1)
    state = rollout.state_dict()
    again = make_rollout(model)
    again.load_state_dict(state)
    (rest,) = take(again, 1, start=1)
    assert rest is not None and rest[0].ids == ["rollout-2", "rollout-3"]
    assert "drawn" not in again.state_dict()


def test_rollouts_of_another_size_are_refused(model: Any) -> None:
    state = make_rollout(model).state_dict()
    other = make_rollout(model, loader=LoaderSpec(batch_size=4))
    with pytest.raises(UserError, match="rollouts have 4 pairs, these processes make 8"):
        other.load_state_dict(state)


def test_a_reward_that_never_decides_is_no_training(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="26 steps in a row taught nothing: of no pair one picture is better"):
        loop.fit(run_of(model, tmp_path / "run", levels=1, num_steps=40))


def test_a_picture_and_its_quarters_are_compared_with_exemplars(tmp_path: Path) -> None:
    """The corner of one picture is another colour: a distance of one feature a picture sees only its mean."""
    white, spotted = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8), "white")
    spotted.paste((0, 0, 0), (0, 0, 4, 4))
    for number in range(2):
        spotted.save(tmp_path / f"{number}.png")

    class Mean:
        def embed_images(self, pictures: list[Any]) -> torch.Tensor:
            means = [ImageStat.Stat(picture).mean for picture in pictures]
            return torch.tensor(means) / 255.0

    grey = Image.new("RGB", (8, 8), (191, 191, 191))  # the mean of the spotted one
    labeller = Labeller(Dragon(reward="exemplar", measure="frechet", exemplars=str(tmp_path)), Mean())
    values = labeller.look([spotted, grey, white], ["", "", ""], [None] * 3)
    assert values.argmax() == 0 and values[0] > values[1] + 0.1 and values[1] > values[2]


def test_features_that_are_not_finite_name_their_prompt() -> None:
    class Broken:
        def embed_images(self, pictures: list[Any]) -> torch.Tensor:
            return torch.tensor([[1.0, 2.0], [torch.nan, 1.0]])

    labeller = Labeller(Dragon(reward="set", measure="vendi"), Broken())
    with pytest.raises(UserError, match="gives features that are not finite for a picture of 'the second'"):
        labeller.look([object(), object()], ["the first", "the second"], [None, None])


def test_a_picture_without_a_value_names_its_prompt(model: Any) -> None:
    class Blind(Brightness):
        def _score_batch(self, images: Any, prompts: Any, context: Any) -> Scores:
            return Scores(torch.full((len(images),), torch.nan), errors=["too dark"] * len(images))

    with pytest.raises(
        UserError, match=r"gives nan for a picture of 'a .*' \(too dark\): leave the prompt out"
    ):
        take(make_rollout(model, scorer=Blind()), 1)


@pytest.mark.parametrize("needed", [True, False])
def test_what_stands_beside_a_prompt_reaches_the_scorer(needed: bool) -> None:
    """Its `context`; all of it where a scorer cannot do without and there is none."""
    given: list[Any] = []

    class Reader(Brightness):
        needs = frozenset({"context"} if needed else ())
        may_use = frozenset({"context"})

        def _score_batch(self, images: Any, prompts: Any, context: Any) -> Scores:
            given.extend(context)
            return Scores(torch.zeros(len(images)))

    about = [{"context": {"a": 1}, "b": 2}, {"b": 2}, {}]
    pictures = [Image.new("RGB", (4, 4))] * 3
    Labeller(Dragon(), Reader()).look(pictures, ["x"] * 3, about)
    assert given == [{"a": 1}, {"b": 2} if needed else {}, {}]


def test_a_run_that_learned_nothing_is_refused_and_changes_nothing(model: Any, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    with pytest.raises(UserError, match="all 5 steps taught nothing: of no pair one picture is better"):
        loop.fit(run_of(model, tmp_path / "run", levels=1))
    for name, tensor in model.trained_state().items():
        assert torch.equal(tensor, before[name])


def test_what_a_reward_cannot_use_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward=set needs features, and scorer .* has none"):
        check_reward(Dragon(reward="set", measure="vendi"), Brightness())
    with pytest.raises(UserError, match=r"exemplars=.*nowhere does not exist"):
        check_reward(Dragon(reward="set", exemplars=str(tmp_path / "nowhere")), Embedding())
    (tmp_path / "one.txt").write_text("a cat\n")
    with pytest.raises(UserError, match=r"one\.txt holds texts, and scorer .* reads pictures only"):
        check_reward(Dragon(reward="set", exemplars=str(tmp_path / "one.txt")), Embedding())
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none holds 0 pictures: give 2 or more"):
        check_reward(Dragon(reward="set", exemplars=str(tmp_path / "none")), Embedding())
    voting = load_scorer("ensemble", scorers={"jpeg": {}}, how="rank")
    with pytest.raises(UserError, match="ensemble judges pictures of a prompt against one another"):
        check_reward(Dragon(), voting)
    with pytest.raises(UserError, match="resolution=33: use a multiple of"):
        embed_prompts(model, PROMPTS, PreprocessSpec(resolution=33))
    with pytest.raises(UserError, match=r"exceed preprocess\.memory_limit_gb"):
        embed_prompts(model, PROMPTS, PreprocessSpec(resolution=32, memory_limit_gb=1e-6))


class Embedding(Brightness):
    """Mean colour as features."""

    def embed_images(self, images: Any) -> torch.Tensor:
        return torch.tensor([ImageStat.Stat(image.convert("RGB")).mean for image in images])


def features_of(model: Any, rollout: Rollout, scorer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the scorer makes of the pictures of a rollout of four pairs, and which of each is preferred."""
    batches = [batch for batch, _ in take(rollout, 2)]
    targets = torch.cat([batch.target for batch in batches])
    assert len(targets) == 4
    pictures = model.pictures(torch.cat([batch.latents for batch in batches]), ["x"] * 8, [0] * 8)
    return scorer.embed_images(pictures).double().unflatten(0, (4, 2)), targets


@pytest.mark.parametrize("seed", [0, 2])
def test_a_set_reward_prefers_pictures_that_make_the_set_better(
    seed: int, model: Any, tmp_path: Path
) -> None:
    """The chosen set beats both that it could start from (a's own and b's own): some places were swapped."""
    for name, colour in (("a", "white"), ("b", "lightgrey")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
    objective, scorer = Dragon(reward="set", measure="mmd", exemplars=str(tmp_path)), Embedding()
    rollout = make_rollout(model, objective=objective, scorer=scorer, seed=seed)
    features, targets = features_of(model, rollout, scorer)
    exemplars = scorer.embed_images([Image.open(path) for path in sorted(tmp_path.iterdir())])
    reward = set_reward("mmd", exemplars.double())
    chosen = torch.where((targets == 1.0)[:, None], features[:, 0], features[:, 1])
    starts = [reward(features[:, side]) for side in (0, 1)]
    (row,) = rollout.news()
    assert row["decided"] == 1.0 and 0.0 < targets.mean() < 1.0
    assert row["reward_chosen"] == pytest.approx(reward(chosen), abs=1e-6)
    assert row["reward"] == pytest.approx(sum(starts) / 2, abs=1e-6)
    assert row["reward_chosen"] > max(starts) + 1e-4


@pytest.mark.parametrize("measure", ["mean_cosine", "nearest", "frechet"])
@pytest.mark.parametrize("side", [0, 1])
def test_the_picture_that_the_exemplars_show_is_preferred_to_the_other(
    side: int, measure: str, model: Any, tmp_path: Path
) -> None:
    """The rollout is drawn a second time, with one picture of its second pair as both exemplars."""
    (batch, _), _ = take(make_rollout(model), 2)
    drawn = model.pictures(batch.latents, ["x"] * 4, [0] * 4)
    for name in ("a", "b"):
        drawn[2 + side].save(tmp_path / f"{name}.png")
    objective = Dragon(reward="exemplar", measure=measure, exemplars=str(tmp_path))
    rollout = make_rollout(model, objective=objective, scorer=Embedding())
    (again, _), _ = take(rollout, 2)
    assert torch.equal(again.latents, batch.latents)
    assert again.target[1].item() == 1.0 - side
    (row,) = rollout.news()
    assert row["decided"] == 1.0 and row["reward_chosen"] > row["reward"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return CLIP(path=str(write_open_clip(tmp_path_factory.mktemp("clip")))).load()


TEXTS = ["a red circle", "a blue square"]


@pytest.mark.parametrize("measure", ["mean_cosine", "nearest"])
def test_the_picture_nearer_to_the_exemplars_texts_is_preferred(
    measure: str, clip: Any, model: Any, tmp_path: Path
) -> None:
    """By an encoder of both; the two measures do not agree on every pair of this rollout."""
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    objective = Dragon(reward="exemplar", measure=measure, exemplars=str(tmp_path / "texts.txt"))
    check_reward(objective, clip)
    rollout = make_rollout(model, objective=objective, scorer=clip)
    features, targets = features_of(model, rollout, clip)
    cosines = features @ clip.embed_texts(TEXTS).double().T
    rewards = cosines.mean(-1) if measure == "mean_cosine" else cosines.amax(-1)
    assert torch.equal(targets, (rewards[:, 0] > rewards[:, 1]).float())
    other = cosines.amax(-1) if measure == "mean_cosine" else cosines.mean(-1)
    assert not torch.equal(targets, (other[:, 0] > other[:, 1]).float())
    (row,) = rollout.news()
    assert row["reward"] == pytest.approx(rewards.mean().item(), abs=1e-5)
    assert row["reward_chosen"] == pytest.approx(rewards.amax(1).mean().item(), abs=1e-5)


def test_a_set_of_pictures_can_be_drawn_towards_texts(clip: Any, model: Any, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    objective = Dragon(reward="set", measure="mmd", exemplars=str(tmp_path / "texts.txt"))
    rollout = make_rollout(model, objective=objective, scorer=clip)
    features, targets = features_of(model, rollout, clip)
    reward = set_reward("mmd", clip.embed_texts(TEXTS).double())
    chosen = torch.where((targets == 1.0)[:, None], features[:, 0], features[:, 1])
    (row,) = rollout.news()
    assert row["reward_chosen"] == pytest.approx(reward(chosen), abs=1e-5)
    assert row["reward_chosen"] > max(reward(features[:, side]) for side in (0, 1)) + 1e-4
