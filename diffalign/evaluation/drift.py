"""How far the aligned pictures have moved from the base's, and what alignment may have cost.

A reward that rises while pictures lose their variety, grow edges or turn grey is no gain: these measures
stand beside every reward. All are computed on RGB values in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diffalign.common.errors import UserError
from diffalign.common.statistics import Interval, bootstrap_interval, paired_difference
from diffalign.scorers import vendi_score

if TYPE_CHECKING:
    import torch
    from PIL import Image

EDGE_THRESHOLD = 0.2
"""Gradient of the grey level, per pixel, from which on a pixel counts as an edge."""

COLOUR_BINS = 8
"""Bins per channel of the colour histogram: 512 colours, an entropy of at most 9 bits."""

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as PIL's convert("L")


class Embedder(Protocol):
    """What can turn pictures into features: a loaded CLIP scorer, for one."""

    def embed_images(self, images: Any) -> torch.Tensor:
        """Returns features float [B, d]."""
        ...


def as_array(image: Image.Image) -> NDArray[np.float64]:
    """Returns a picture as float64 [H, W, 3] in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255.0


def pixel_distances(base: NDArray[np.float64], aligned: NDArray[np.float64]) -> tuple[float, float]:
    """Returns (mean absolute, root mean square) difference of two pictures [H, W, 3], each in [0, 1].

    NaN where the pictures differ in size: their pixels do not correspond.
    """
    if base.shape != aligned.shape:
        return float("nan"), float("nan")
    gap = aligned - base
    return float(np.abs(gap).mean()), float(np.sqrt((gap**2).mean()))


def edge_density(picture: NDArray[np.float64]) -> float:
    """Returns the share of pixels that lie on an edge, in [0, 1].

    The gradient of the grey level is taken by central differences (one-sided at the border); a pixel is on an
    edge where its length exceeds `EDGE_THRESHOLD`. Over-sharpened and cluttered pictures have more edges.
    """
    grey = picture @ _LUMA
    if min(grey.shape) < 2:
        return 0.0
    down, right = np.gradient(grey)
    return float((np.hypot(down, right) > EDGE_THRESHOLD).mean())


def colour_entropy(picture: NDArray[np.float64]) -> float:
    """Returns the entropy of the picture's colours in bits: 0 for one colour, at most 9.

    Colours are counted in 8 x 8 x 8 equal bins of RGB. Washed-out and posterised pictures have less.
    """
    bins = np.minimum((picture * COLOUR_BINS).astype(np.int64), COLOUR_BINS - 1).reshape(-1, 3)
    codes = (bins[:, 0] * COLOUR_BINS + bins[:, 1]) * COLOUR_BINS + bins[:, 2]
    counts = np.bincount(codes)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # + 0.0: no negative zero


def embedding_distances(base: Any, aligned: Any) -> NDArray[np.float64]:
    """Returns 1 - cosine of paired features [n, d], float64 [n], in [0, 2]."""
    left, right = (np.asarray(x, dtype=np.float64) for x in (base, aligned))
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return 1.0 - (left * right).sum(axis=1) / norms


def mean_group_vendi(features: Any, groups: Sequence[object]) -> float:
    """Returns the mean Vendi score within groups (the seeds of a prompt), over groups of at least two.

    1 when the pictures of a prompt are all alike; NaN without a group of two.
    """
    rows = np.asarray(features, dtype=np.float64)
    members: dict[object, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    scores = [vendi_score(rows[found]) for found in members.values() if len(found) > 1]
    return float(np.mean(scores)) if scores else float("nan")


class DriftMeter:
    """Takes pairs of pictures one by one and keeps only numbers and features of them.

    Args:
        embedder: for embedding distance and diversity; None: these are left out.
        batch_size: pictures embedded at a time.
    """

    def __init__(self, embedder: Embedder | None = None, *, batch_size: int = 16) -> None:
        self.embedder = embedder
        self.batch_size = batch_size
        self._groups: list[object] = []
        self._pixels: list[tuple[float, float]] = []
        self._looks: list[tuple[float, float, float, float]] = []
        self._waiting: list[tuple[Image.Image, Image.Image]] = []
        self._features: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []

    def add(self, base: Image.Image, aligned: Image.Image, group: object) -> None:
        """Measures one pair; `group` is what its pictures share (the prompt)."""
        left, right = as_array(base), as_array(aligned)
        self._groups.append(group)
        self._pixels.append(pixel_distances(left, right))
        looks = (edge_density(left), edge_density(right), colour_entropy(left), colour_entropy(right))
        self._looks.append(looks)
        if self.embedder is not None:
            self._waiting.append((base, aligned))
            if len(self._waiting) >= self.batch_size:
                self._embed()

    def _embed(self) -> None:
        if self.embedder is None or not self._waiting:
            return
        base, aligned = zip(*self._waiting, strict=True)
        both = self.embedder.embed_images([*base, *aligned]).double().cpu().numpy()
        if not np.isfinite(both).all():
            raise UserError(
                "the embedder's features hold NaN: give one of another precision, or leave it out"
            )
        self._features.append((both[: len(base)], both[len(base) :]))
        self._waiting = []

    def report(self, *, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
        """Returns measure -> numbers.

        `pixel_mean_abs`, `pixel_rms`, `embedding_distance`: an Interval. `edge_density`, `colour_entropy`:
        base, aligned and the Interval of aligned - base. `vendi`, `vendi_per_prompt`: base, aligned and
        their ratio.
        Intervals are bootstrapped over groups. Measures without data are left out.
        """
        self._embed()
        if not self._groups:
            return {}
        found: dict[str, Any] = {}
        settings: dict[str, Any] = {"level": level, "seed": seed}
        pixels = np.array(self._pixels)
        same_size = np.isfinite(pixels[:, 0])
        if same_size.any():
            clusters = [g for g, same in zip(self._groups, same_size, strict=True) if same]
            for column, name in enumerate(("pixel_mean_abs", "pixel_rms")):
                found[name] = bootstrap_interval(pixels[same_size, column], clusters=clusters, **settings)
        looks = np.array(self._looks)
        for column, name in ((0, "edge_density"), (2, "colour_entropy")):
            base, aligned = looks[:, column], looks[:, column + 1]
            gap = paired_difference(aligned, base, clusters=self._groups, **settings)
            found[name] = {"base": base.mean(), "aligned": aligned.mean(), "difference": gap}
        if self._features:
            found.update(self._feature_measures(settings))
        return found

    def _feature_measures(self, settings: dict[str, Any]) -> dict[str, Any]:
        base, aligned = (np.concatenate(side) for side in zip(*self._features, strict=True))
        distance: Interval = bootstrap_interval(
            embedding_distances(base, aligned), clusters=self._groups, **settings
        )
        found: dict[str, Any] = {"embedding_distance": distance}
        found["vendi"] = _ratio(vendi_score(base), vendi_score(aligned))
        within = [mean_group_vendi(side, self._groups) for side in (base, aligned)]
        if np.isfinite(within).all():
            found["vendi_per_prompt"] = _ratio(*within)
        return found


def _ratio(base: float, aligned: float) -> dict[str, float]:
    return {"base": base, "aligned": aligned, "ratio": aligned / base}
