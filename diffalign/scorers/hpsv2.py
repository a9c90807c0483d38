"""HPS v2 and v2.1: human preference score (Wu et al. 2023, arXiv 2306.09341).

CLIP ViT-H/14, fine-tuned on HPD v2. Unlike CLIP's own, the preparation keeps the whole picture: its *longer*
side goes to 224 and the rest is black (tgxs002/HPSv2, hpsv2/src/open_clip/transform.py, `ResizeMaxSize`). The
authors resize floats, not 8 bits, with the antialiasing that torchvision has used since 0.17, unclamped.

Scales (`scale`):
    cosine    cos, about 0.2 to 0.35 (`hpsv2.score`)
    percent   100 * cos (`hpsv2.evaluate`, the tables of the benchmark)

Convention: `version` says which weights; numbers of 2.0 and 2.1 are not comparable, and the package's two
functions differ in their default. Departures: the package does not pad a picture whose longer side is 224
already, and keeps a fourth channel, and fails on both; on CUDA it computes in half precision, which makes
equal scores out of different ones: dtype=fp32 is the default here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from diffalign.common.errors import UserError, unknown
from diffalign.scorers._base import Scores
from diffalign.scorers._tower_scorer import TowerScorer

if TYPE_CHECKING:
    from diffalign.scorers._base import Images
    from diffalign.scorers._pixels import Preprocess
    from diffalign.scorers._towers import Towers

FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
"""Version -> its file in the repository."""


@dataclass(kw_only=True)
class Plugin(TowerScorer):
    """HPS v2 or v2.1 of pictures against their prompts.

    Args:
        path: a hub id, a folder with the published files, or a weight file.
        arch: open_clip's name of the architecture.
        version: 2.0 | 2.1, which of the published weights.
        scale: cosine | percent.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})
    scales: ClassVar[tuple[str, ...]] = ("cosine", "percent")

    path: str = "xswu/HPSv2"
    arch: str | None = "ViT-H-14"
    version: Literal["2.0", "2.1"] = "2.1"
    scale: str = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in FILES:
            raise unknown("version of scorer hpsv2", self.version, FILES)
        self._release = self.version  # `version` names the weights too once they are loaded

    def load(self, device: str = "cpu") -> Self:
        """Returns this scorer with its weights on `device`."""
        super().load(device)
        self.version = f"{self._release}/{self.version}"  # type: ignore[assignment]
        return self

    def _open(self, device: str) -> Towers:
        from diffalign.scorers._towers import open_towers
        from diffalign.scorers._weights import weight_file

        file = weight_file(self.path, FILES[self._release], self.revision)
        says = next((release for release, name in FILES.items() if name == file.name), self._release)
        if says != self._release:
            raise UserError(f"scorer hpsv2: {file} is version {says}: give version={says}")
        return open_towers(str(file), arch=self.arch, device=device, dtype=self.dtype)

    @property
    def preprocess(self) -> Preprocess:
        """The whole picture, on black."""
        return replace(self.towers.preprocess, resize="letterbox", resizes="tensor", fill=0)

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        assert prompts is not None
        cosines = self._cosines(images, prompts)
        return Scores((100 * cosines if self.scale == "percent" else cosines).cpu())
