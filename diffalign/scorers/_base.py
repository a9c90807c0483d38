"""The contract of every scorer: pictures (and what they should show) in, one number per picture out.

A plug-in is a dataclass `Plugin(Scorer)`: its fields are its options, `load` brings in weights,
`_score_batch` does the work on one checked batch (`_score_group`, on one group, where values only hold among
the pictures of a group). Checking, batching and shapes live here, so that no scorer can differ in them.

Nothing heavy is imported with this module: constructing a plug-in to check its options must stay cheap.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from diffalign.common.errors import UserError, unknown
from diffalign.common.plugins import plugin_name

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diffalign.scorers._memo import PictureMemo

    Images = list[Image.Image] | torch.Tensor
    """Pictures of one call: a list of PIL pictures of any size, or a float tensor [B, 3, H, W] in [0, 1]."""

RANGE_SLACK = 1e-3
"""How far a tensor may leave [0, 1] and still be taken as a picture: rounding of bfloat16 and resizing."""


@dataclass
class Scores:
    """What a scorer says about B pictures.

    Attributes:
        values: float32 [B], on the scorer's own scale; NaN where the picture could not be judged.
        parts: named sub-scores, each float32 [B]; NaN where a part does not apply.
        maps: named pictures of where (heat maps), each [B, H, W].
        errors: per picture None, or one line saying why its value is NaN.
    """

    values: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    maps: dict[str, torch.Tensor] = field(default_factory=dict)
    errors: list[str | None] = field(default_factory=list)

    @classmethod
    def cat(cls, batches: Sequence[Scores]) -> Scores:
        """Returns the batches as one, in order; a part that a batch lacks is NaN there."""
        import torch

        def joined(name: str) -> torch.Tensor:
            columns = [
                b.parts[name] if name in b.parts else torch.full_like(b.values, torch.nan) for b in batches
            ]
            return torch.cat(columns)

        names = dict.fromkeys(name for b in batches for name in b.parts)
        maps = dict.fromkeys(name for b in batches for name in b.maps)
        return cls(
            values=torch.cat([b.values for b in batches]) if batches else torch.zeros(0),
            parts={name: joined(name) for name in names},
            maps={name: torch.cat([b.maps[name] for b in batches]) for name in maps},
            errors=[error for b in batches for error in b.errors],
        )

    def take(self, places: Sequence[int]) -> Scores:
        """Returns the scores at these places, in that order."""
        index = list(places)
        return Scores(
            values=self.values[index],
            parts={name: part[index] for name, part in self.parts.items()},
            maps={name: maps[index] for name, maps in self.maps.items()},
            errors=[self.errors[place] for place in index],
        )


class Scorer:
    """Base of every scorer plug-in.

    Class attributes say what a scorer is before any weight is loaded:
        needs: what a call must bring beside pictures: a subset of {"prompts", "context"}.
        may_use: what it reads beyond that where a call brings it.
        higher_is_better: False for distances and complaints.
        media: "image".
    Attributes of an instance:
        differentiable: a gradient reaches pictures (a tensor that asks for one), never the weights.
        relative: values hold among the pictures of one prompt only (judges of pairs, votes): all of them must
            come in one call, which sorts them into groups by `context["group"]`, else by prompt.
        scale: name of the scale of its values, one of those in the plug-in's docstring.
        version: which code and weights give the values; numbers of two versions are not comparable.
        batch_size: pictures judged at a time; it changes speed and memory, never a value.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    may_use: ClassVar[frozenset[str]] = frozenset()
    higher_is_better: ClassVar[bool] = True
    media: ClassVar[str] = "image"

    scale: str
    version: str = "1"
    batch_size: int = 32

    @property
    def differentiable(self) -> bool:
        """See above; a property, since an option may decide it."""
        return False

    @property
    def relative(self) -> bool:
        """See above; a property, since an option may decide it."""
        return False

    def takes(self, what: str) -> bool:
        """Returns whether "prompts" or "context" can change a value, needed or not."""
        return what in self.needs or what in self.may_use or self.relative  # which groups by either

    def _check_options(self, **choices: Collection[str]) -> None:
        """Checks that each named option is one of its choices, and that `batch_size` is above 0.

        Raises:
            UserError: one is not; says which.
        """
        name = plugin_name(self)
        for option, known in choices.items():
            if getattr(self, option) not in known:
                raise unknown(f"{option} of scorer {name}", getattr(self, option), known)
        if self.batch_size < 1:
            raise UserError(f"scorer {name}: batch_size is {self.batch_size}: use 1 or more")

    def load(self, device: str = "cpu") -> Self:
        """Returns this scorer, ready to score on `device`; a scorer with weights reads them here."""
        return self

    def modules(self) -> list[torch.nn.Module]:
        """Returns the networks of a loaded scorer: frozen, in evaluation mode."""
        return []

    def memos(self) -> list[PictureMemo]:
        """Returns where features of pictures can be kept during a pass, so that scorers share them."""
        return []

    def prepare_ahead(self, images: list[Image.Image]) -> None:
        """Does what scoring these pictures will ask for and needs no device, where a pass keeps it.

        It is called from other threads while the scorer works on pictures before these.
        """

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        """Returns the scores of one checked batch; what the scorer needs is there."""
        raise NotImplementedError

    def _score_group(
        self, images: Images, prompt: str | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        """Returns the scores of all pictures of one prompt; for relative scorers, instead of the above."""
        raise NotImplementedError

    def score(
        self,
        images: Images,
        prompts: Sequence[str] | None = None,
        *,
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        """Returns values float32 [B] with parts, maps and errors.

        Args:
            images: list of PIL pictures (any mode and size, read as RGB), or a float tensor
                [B, 3, H, W] in [0, 1].
            prompts: one text per picture.
            context: one mapping per picture (object clauses, reference picture, user, group).

        Raises:
            UserError: pictures of another kind or range, lengths that differ, or a need that was not brought.
        """
        import torch

        name = plugin_name(self)
        check_images(images, name)
        texts = self._checked("prompts", prompts, len(images), name)
        contexts = self._checked("context", context, len(images), name)
        wants_gradient = self.differentiable and isinstance(images, torch.Tensor) and images.requires_grad
        with torch.set_grad_enabled(wants_gradient and torch.is_grad_enabled()):
            if self.relative:
                return self._score_groups(images, texts, contexts)
            batches = []
            for start in range(0, len(images), self.batch_size):
                rows = slice(start, start + self.batch_size)
                batch = self._score_batch(images[rows], texts and texts[rows], contexts and contexts[rows])
                batches.append(_complete(batch))
        return Scores.cat(batches)

    def compare(
        self,
        groups: Sequence[Images],
        prompts: Sequence[str] | None = None,
        *,
        context: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    ) -> list[Scores]:
        """Returns the scores of each group of pictures, [k] for a group of k: higher is preferred in it.

        Args:
            groups: pictures of one prompt each, as in `score`.
            prompts: one text per group.
            context: per group, one mapping per picture.

        Raises:
            UserError: as in `score`.
        """
        name = plugin_name(self)
        texts = self._checked("prompts", prompts, len(groups), name)
        found = []
        for index, images in enumerate(groups):
            check_images(images, name)
            of_group = self._checked("context", context[index] if context else None, len(images), name)
            if self.relative:
                with no_gradient():
                    scores = self._score_group(images, texts[index] if texts else None, of_group)
                found.append(_complete(scores))
            else:
                repeated = [texts[index]] * len(images) if texts else None
                found.append(self.score(images, repeated, context=of_group))
        return found

    def _score_groups(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        """Returns the scores of a relative scorer: group after group, put back in the given order."""
        groups: dict[Any, list[int]] = {}
        for place in range(len(images)):
            named = context[place].get("group") if context else None
            key = named if named is not None else prompts[place] if prompts else None
            groups.setdefault(key, []).append(place)
        found = []
        for places in groups.values():
            chosen: Any = [images[place] for place in places]
            if not isinstance(images, list):
                chosen = images[places]
            scores = self._score_group(
                chosen,
                prompts[places[0]] if prompts else None,
                [context[place] for place in places] if context else None,
            )
            found.append(_complete(scores))
        order = [place for places in groups.values() for place in places]
        return Scores.cat(found).take(sorted(range(len(order)), key=order.__getitem__))

    def __call__(
        self,
        images: Images,
        prompts: Sequence[str] | None = None,
        *,
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> torch.Tensor:
        """Returns the values alone, float32 [B]; arguments and errors as in `score`."""
        return self.score(images, prompts, context=context).values

    def _checked(self, what: str, given: Sequence[Any] | None, count: int, name: str) -> list[Any] | None:
        """Returns the given prompts or contexts as a list of `count` items, None where none were given."""
        if given is None:
            if what in self.needs:
                raise UserError(f"scorer {name} needs {what}: pass {what}=, one per picture")
            return None
        kind: type = str if what == "prompts" else Mapping
        if isinstance(given, (str, Mapping)) or not all(isinstance(item, kind) for item in given):
            raise UserError(f"scorer {name}: {what} must be a list of {kind.__name__}, one per picture")
        if len(given) != count:
            raise UserError(f"scorer {name}: {count} pictures but {len(given)} {what}: pass one per picture")
        return list(given)


def score_all(
    scorers: Mapping[str, Scorer],
    images: Images,
    prompts: Sequence[str] | None = None,
    *,
    context: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Scores]:
    """Returns the scores of several loaded scorers, by label; networks that they share run once a picture.

    Args:
        scorers: label -> scorer.
        images: as in `Scorer.score`.
        prompts: one text per picture; each scorer is given what it needs of these.
        context: one mapping per picture.

    Raises:
        UserError: as in `Scorer.score`.
    """
    if not isinstance(scorers, Mapping):
        raise UserError(f"score_all takes a mapping of label to scorer, not a {type(scorers).__name__}")
    with ExitStack() as stack:
        for memo in (memo for scorer in scorers.values() for memo in scorer.memos()):
            stack.enter_context(memo.one_pass())
        return {
            label: scorer.score(
                images,
                prompts if scorer.takes("prompts") else None,
                context=context if scorer.takes("context") else None,
            )
            for label, scorer in scorers.items()
        }


def _complete(scores: Scores) -> Scores:
    """Returns the scores of a batch with values float32 [B] and an entry of `errors` for each."""
    scores.values = scores.values.float().reshape(-1)
    scores.errors = scores.errors or [None] * len(scores.values)
    return scores


def no_gradient() -> torch.no_grad:
    """Returns torch's context without gradients; torch is imported only now."""
    import torch

    return torch.no_grad()


def check_images(images: Any, name: str) -> None:
    """Checks that `images` are what every scorer takes; `name` is the scorer that the error line names.

    Raises:
        UserError: not a list of PIL pictures, nor a float tensor [B, 3, H, W] with values in [0, 1].
    """
    import torch
    from PIL import Image

    wanted = "a list of PIL pictures or a float tensor [B, 3, H, W] in [0, 1]"
    if isinstance(images, torch.Tensor):
        if not images.is_floating_point():
            raise UserError(
                f"scorer {name}: images is a tensor of {images.dtype}: divide by 255 to get {wanted}"
            )
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"scorer {name}: images has shape {list(images.shape)}: pass {wanted}")
        if images.numel() == 0:
            return
        low, high = images.detach().amin().item(), images.detach().amax().item()
        # Written so that NaN, which compares false with everything, is refused too.
        if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):
            raise UserError(
                f"scorer {name}: images span [{low:.3g}, {high:.3g}], not [0, 1]: rescale and clamp them"
            )
        return
    if not isinstance(images, list):
        raise UserError(f"scorer {name}: images is a {type(images).__name__}: pass {wanted}")
    for index, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise UserError(f"scorer {name}: images[{index}] is a {type(image).__name__}: pass {wanted}")
