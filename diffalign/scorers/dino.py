"""DINO score: how much a picture looks like given reference pictures, by the cosine of their DINO features.

DreamBooth's DINO metric (Ruiz et al. 2023, arXiv 2208.12242) is the mean over all pairs with DINO v1's
ViT-S/16 (path: facebook/dino-vits16); the default here is DINOv2. A picture equal to its reference gives 1.

Scale: `cosine`, -1 to 1, higher is more alike. Numbers of different weights are not comparable.

Convention: features are those of the class token after the last layer norm. Pictures are prepared as the
folder's preprocessor_config.json says. For DINOv2 that is the authors' way: shorter side to 256 by a bicubic
filter, centre crop of 224, ImageNet's mean and std. The files beside DINO v1 on the hub say otherwise (224 x
224 squashed, bilinear, mean and std 0.5), though its authors prepare as for DINOv2 (facebookresearch/dino,
eval_knn.py): preparation=authors follows these.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from diffalign.common.errors import UserError, brief
from diffalign.scorers._base import Scores
from diffalign.scorers._tower_scorer import TowerScorer

if TYPE_CHECKING:
    import torch

    from diffalign.scorers._base import Images
    from diffalign.scorers._dino import FileMemo
    from diffalign.scorers._pixels import Preprocess
    from diffalign.scorers._towers import Towers

OVER = ("mean", "max")
PREPARATIONS = ("folder", "authors")


@dataclass(kw_only=True)
class Plugin(TowerScorer):
    """DINO similarity of pictures to their references.

    `context` carries, per picture, `reference`: a path (a relative one counts from the current folder, `~` is
    the home folder), a PIL picture, or a list of these. A reference that does not open makes the value NaN,
    and `errors` names it.

    Args:
        path: a folder or hub id in transformers' layout, of type dinov2, dinov2_with_registers, vit (DINO v1)
            or dinov3_vit.
        arch: not used: config.json says it.
        over: mean | max, of the cosines with several references.
        preparation: folder | authors, see above.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"context"})

    scale = "cosine"

    path: str = "facebook/dinov2-base"
    over: Literal["mean", "max"] = "mean"
    preparation: Literal["folder", "authors"] = "folder"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_options(over=OVER, preparation=PREPARATIONS)
        if self.arch is not None:
            raise UserError(f"scorer dino: arch={self.arch}: config.json already says it, leave arch out")
        self._files: FileMemo | None = None

    def load(self, device: str = "cpu") -> Self:
        """Returns this scorer with its weights on `device`."""
        from diffalign.scorers._dino import FileMemo

        super().load(device)
        self._files = FileMemo(self.towers)
        return self

    def _open(self, device: str) -> Towers:
        from diffalign.scorers._dino import dino_tower

        return dino_tower(self.path, revision=self.revision, device=device, dtype=self.dtype)

    @property
    def preprocess(self) -> Preprocess | None:
        """How pictures are prepared; None: as the weights' own files say."""
        from diffalign.scorers._dino import AUTHORS

        return AUTHORS if self.preparation == "authors" else None

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        import torch

        assert context is not None
        rows: list[list[Any]] = []
        errors: list[str | None] = []
        for item in context:
            try:
                rows.append(_references(item))
                errors.append(None)
            except UserError as error:
                rows.append([])
                errors.append(str(error))
        known, broken = self._reference_features([each for row in rows for each in row])
        features = self._features(images)
        values = []
        for place, row in enumerate(rows):
            names = [_name(each) for each in row]
            errors[place] = errors[place] or next((broken[name] for name in names if name in broken), None)
            if errors[place] is not None:
                values.append(features.new_tensor(torch.nan))
                continue
            cosines = torch.stack([known[name] for name in names]) @ features[place]
            values.append(cosines.max() if self.over == "max" else cosines.mean())
        return Scores(torch.stack(values).cpu(), errors=errors)

    def _reference_features(
        self, references: list[Any]
    ) -> tuple[dict[str | int, torch.Tensor], dict[str | int, str]]:
        """Returns features [d] of references by `_name`, and what is wrong with the others."""
        import torch

        assert self._files is not None
        paths = [each for each in references if isinstance(each, str)]
        known, broken = self._files(paths, self.preprocess, self.mode, self.batch_size)
        pictures = list({id(each): each for each in references if not isinstance(each, str)}.values())
        features: dict[str | int, torch.Tensor] = dict(known.items())
        with torch.no_grad():
            for start in range(0, len(pictures), self.batch_size):
                batch = pictures[start : start + self.batch_size]
                features |= zip(map(id, batch), self._features(batch), strict=True)
        return features, dict(broken.items())


def _references(item: Mapping[str, Any]) -> list[Any]:
    """Returns the references of one context: absolute paths as text, and PIL pictures.

    Raises:
        UserError: none, something else, or a picture whose file turns out to be broken.
    """
    from PIL import Image

    given = item.get("reference")
    listed = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if not listed:
        raise UserError("the context has no `reference`: give a path, a PIL picture, or a list of these")
    for each in listed:
        if not isinstance(each, (str, os.PathLike, Image.Image)):
            raise UserError(f"a reference is a {type(each).__name__}: give a path or a PIL picture")
        if isinstance(each, Image.Image):
            try:
                each.load()  # PIL opens a file without reading it
            except Exception as error:  # PIL reports broken files through many classes
                name = getattr(each, "filename", "") or "picture"
                raise UserError(f"reference {name} cannot be decoded ({brief(error)})") from error
    return [each if isinstance(each, Image.Image) else _absolute(each) for each in listed]


def _absolute(path: str | os.PathLike[str]) -> str:
    """Returns a path from the root on; `~` is the home folder."""
    return os.path.abspath(os.path.expanduser(path))


def _name(reference: Any) -> str | int:
    """Returns what a reference is known by within a batch: its path, or the identity of the picture."""
    return reference if isinstance(reference, str) else id(reference)
