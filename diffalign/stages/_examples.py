"""What a run trains on: given pictures, encoded once, or pictures that the policy draws itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diffalign.common.config import make_many, make_one
from diffalign.common.errors import UserError
from diffalign.common.plugins import plugin_name
from diffalign.training.specs import Settings, ValidationSpec

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffalign.data.encoded import Encoded
    from diffalign.data.select import UsableGroups
    from diffalign.data.tally import Tally
    from diffalign.models._base import Model
    from diffalign.objectives._base import Objective, OnPolicyObjective
    from diffalign.training.feed import Feed


class Examples(Protocol):
    """Where a run's micro-batches come from, before any of them is made."""

    def inputs(self) -> dict[str, Path | str]:
        """What the manifest names as input, and what must be equal for a run to go on; after `prepare`."""
        ...

    def prepare(self, model: Model, accelerator: Accelerator) -> tuple[Feed, Encoded | None]:
        """What gives the micro-batches, and pairs held out for validation; encodes what is to be encoded."""
        ...

    def counts(self) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """What was asked for and used, and the dropped rows by reason; after training."""
        ...


class GivenPictures:
    """The usable groups of a data source.

    Raises:
        UserError: no data, or data that the objective cannot use.
    """

    def __init__(self, objective: Objective, settings: Settings, data: Any) -> None:
        if data is None:
            raise UserError(
                "train needs data: name a source and its path, e.g. data=pickapic data.path=..., or give "
                "cache=FOLDER"
            )
        self._objective, self._settings = objective, settings
        self._source = make_one("data.sources", data)
        self._source.files()  # a mistyped path is told before a base is fetched
        objective.check_data(self._source.score_facts())
        self._groups: UsableGroups = self._source.usable(
            unit=objective.unit,
            undesirable=objective.undesirable,
            reject=objective.reject,
            limit=settings.limit,
            unlabelled=not objective.needs_labels,
        )

    def inputs(self) -> dict[str, Path | str]:
        """The data's files."""
        found: dict[str, Path | str] = self._source.inputs()
        return found

    def prepare(self, model: Model, accelerator: Accelerator) -> tuple[Feed, Encoded | None]:
        """Encodes everything and splits off the held-out pairs."""
        from diffalign.training.feed import Offline

        encoded = self._encode(model)
        train_set, heldout = split(encoded, self._settings.validation, self._settings.seed)
        return Offline(train_set, self._settings, model.process, self._objective.noise), heldout

    def counts(self) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """The tally of the data."""
        return self._groups.tally.counts(), self._groups.tally.dropped

    def _encode(self, model: Model) -> Encoded:
        from diffalign.common.progress import Progress, say
        from diffalign.data.encoding import encode

        groups, settings = self._groups, self._settings
        with Progress("encode", None, f"{self._objective.unit}s") as bar:
            encoded = encode(groups, model, settings.preprocess, seed=settings.seed, advance=bar.update)
        say(f"{len(encoded)} examples of {groups.tally.asked} rows; dropped: {groups.tally.reasons()}")
        return encoded


class CachedPictures:
    """The usable groups of a cache, read as they are needed.

    Raises:
        UserError: no cache, one that is not complete, or one that the objective cannot use.
    """

    def __init__(self, objective: Objective, settings: Settings, folder: str) -> None:
        from diffalign.data.select import ScoreFacts
        from diffalign.stages._cached import open_for

        self._objective, self._settings = objective, settings
        self._cache = open_for(folder, settings.preprocess)
        kept = self._cache.facts["posterior"]
        if settings.loader.posterior == "sample" and kept == "mean":
            raise UserError(f"cache={folder} keeps means of latents only: set loader.posterior=mean")
        objective.check_data(
            {name: ScoreFacts(**facts) for name, facts in self._cache.facts["scores"].items()}
        )
        self._tally: Tally | None = None

    def inputs(self) -> dict[str, Path | str]:
        """The cache, by what it was made of."""
        return self._cache.inputs()

    def prepare(self, model: Model, accelerator: Accelerator) -> tuple[Feed, Encoded | None]:
        """Chooses the groups and splits off the held-out pairs; encodes nothing."""
        from diffalign.common.progress import say
        from diffalign.objectives._base import Objective
        from diffalign.stages._cached import refuse_another_base
        from diffalign.training.feed import Offline

        refuse_another_base(self._cache, model)
        objective, settings = self._objective, self._settings
        takes_all = type(objective).reject is Objective.reject
        chosen, self._tally = self._cache.choose(
            unit=objective.unit,
            undesirable=objective.undesirable,
            reject=None if takes_all else objective.reject,
            limit=settings.limit,
            unlabelled=not objective.needs_labels,
        )
        say(f"{len(chosen)} examples of {self._tally.asked} rows; dropped: {self._tally.reasons()}")
        train_set, heldout = split(chosen, settings.validation, settings.seed)
        return Offline(train_set, settings, model.process, objective.noise), heldout

    def counts(self) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """The tally of the rows of the cache."""
        assert self._tally is not None  # prepare
        return self._tally.counts(), self._tally.dropped


class OwnPictures:
    """Pictures of prompts by the policy, rewarded by a scorer.

    Raises:
        UserError: no prompts, or not one scorer.
    """

    def __init__(
        self, objective: OnPolicyObjective, settings: Settings, prompts: str | list[str] | None, scorers: Any
    ) -> None:
        from diffalign.data.prompts import load_prompts, prompt_file
        from diffalign.training.labeller import check_reward
        from diffalign.training.ranks import launched
        from diffalign.training.rollout import check_rollout

        name = plugin_name(objective)
        if prompts is None:
            raise UserError(f"objective={name} draws its own pictures: give prompts=FILE (or a text)")
        named = make_many("scorers", scorers or {})
        if len(named) != 1:
            raise UserError(
                f"objective={name} is rewarded by one scorer, {len(named)} are given: e.g. scorers=[clip]"
            )
        self._objective, self._settings = objective, settings
        (self._scorer,) = named.values()
        check_reward(objective, self._scorer)
        check_rollout(objective, settings, launched())
        self._prompts = load_prompts(prompts, limit=settings.limit)
        self._file = prompt_file(prompts) if isinstance(prompts, str) else None

    def inputs(self) -> dict[str, Path | str]:
        """The scorer's version; prompts and exemplars, where they are files."""
        exemplars = self._objective.exemplars
        return {
            "scorer": f"{plugin_name(self._scorer)} {self._scorer.scale} {self._scorer.version}",
            **({} if self._file is None else {"prompts": self._file}),
            **({} if exemplars is None else {"exemplars": Path(exemplars)}),
        }

    def prepare(self, model: Model, accelerator: Accelerator) -> tuple[Feed, Encoded | None]:
        """Encodes the prompts and loads the scorer."""
        from diffalign.training.labeller import Labeller
        from diffalign.training.ranks import Ranks
        from diffalign.training.rollout import Rollout, embed_prompts

        spec = self._settings.rollout
        if spec.scheduler is not None:
            model.check_scheduler(spec.scheduler, spec.num_inference_steps)
        labeller = Labeller(
            self._objective, self._scorer.load(str(accelerator.device)), batch_size=spec.batch_size
        )
        texts = embed_prompts(model, self._prompts, self._settings.preprocess)
        feed = Rollout(
            model,
            self._objective,
            labeller,
            self._prompts,
            texts,
            self._settings,
            Ranks(accelerator),
            accelerator.autocast,
        )
        return feed, None

    def counts(self) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """How many prompts there were; what was drawn stands in metrics.jsonl."""
        return {"asked": len(self._prompts), "used": len(self._prompts), "dropped": {}}, {}


def split(encoded: Encoded, validation: ValidationSpec, seed: int) -> tuple[Encoded, Encoded | None]:
    """`(training set, held-out pairs)`.

    Raises:
        UserError: nothing is left on a side, or only ties are held out.
    """
    if validation.share == 0.0:
        return encoded, None
    from diffalign.data.loader import split_by_prompt

    train_set, heldout = split_by_prompt(encoded, validation.share, seed=seed)
    heldout = heldout.subset(range(min(len(heldout), validation.limit or len(heldout))))
    if all(example.target == 0.5 for example in heldout.examples):
        raise UserError(
            f"all {len(heldout)} held-out pairs are ties: raise validation.share or validation.limit, or use "
            "data.ties=drop"
        )
    return train_set, heldout
