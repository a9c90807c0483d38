"""GenEval: are the objects of a prompt in the picture, in their number, colours and places.

Scales (`scale`):
    correct    1 where every clause is fulfilled, else 0: GenEval's verdict
    share      share of the clauses that are fulfilled, 0 to 1; diffalign's own, a reward with fewer ties

Clauses are counted so (`_geneval.judge`): for each object asked for, that it is there; that its number is
right, where more than one is asked for or too many are excluded; its colour; its place. What hangs on an
unfulfilled clause is unfulfilled. Parts: `correct`, and of each kind (object, count, color, position) the
share of its clauses that are fulfilled; NaN where the prompt has none. GenEval's own figure is the mean of
`correct` over each of its six tags, then over the tags.

Source: Ghosh et al., "GenEval", NeurIPS 2023; djghosh13/geneval, evaluation/evaluate_images.py.

Convention: counts are "at least" for `include`, as in the benchmark; rewards in public trainers ask for the
very number.
Convention: colours are told by CLIP from a crop on grey (153, 153, 153) as in the benchmark, whose release of
open_clip gave OpenAI's weights their QuickGELU; newer ones do so only when told, and here they are told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from diffalign.common.errors import UserError
from diffalign.scorers._base import Scorer, Scores

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diffalign.scorers._base import Images
    from diffalign.scorers._geneval import Detected, Objects, Verdict
    from diffalign.scorers._geneval_detector import Detector
    from diffalign.scorers._towers import Towers

SCALES = ("correct", "share")

TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
"""What CLIP is told of a colour and a class (the last one leaves the class out)."""

GREY = (153, 153, 153)


@dataclass(kw_only=True)
class Plugin(Scorer):
    """GenEval's verdict on pictures, on boxes found elsewhere or by a detector of transformers.

    `context` is per picture GenEval's description of the prompt (a row of evaluation_metadata.jsonl):
        include: [{class, count, color?, position?: [relation, index of an earlier clause]}]
        exclude: [{class, count}], as many are too many
        tag: one of GenEval's six; "counting" asks for confidence 0.9 instead of 0.3; may be left out
    and may bring what was found in the picture already, which then counts instead of the detector:
        detections: {class: [[left, top, right, bottom, confidence], ...]} in pixels; a class that is not
            there was not found
        colors: {class: [colour, ...]}, of each box in the order of confidence; else `color_model` tells them

    What is None counts as left out, since tables write it so. A key of a clause, a colour or a tag that is
    none of GenEval's is a mistake: the picture is NaN and says so.

    Without a detector or a colour model, pictures whose context does not bring theirs are NaN and say so.

    With Mask2Former (facebook/mask2former-swin-small-coco-instance is the architecture that GenEval runs in
    mmdet) boxes come from the masks, and the confidence is that of the class times that of the mask, as in
    mmdet. Weights and resizing are not mmdet's, so numbers differ from the benchmark's; by how much was not
    measured.

    Args:
        scale: correct | share.
        detector: folder or hub id of a Mask2FormerForUniversalSegmentation for instances, with its image
            processor; None: contexts bring `detections`.
        revision: of the detector, where it is a hub id.
        shortest: the shorter side in pixels that the detector sees, the longer at most 1.67 times that
            (mmdet: 800 and 1333); None: as its image processor says.
        color_model: CLIP weights that tell colours, as in the scorer clip: `openai`, a folder, a file, a hub
            id; None: contexts bring `colors`.
        color_arch: open_clip's name of their architecture, for a weight file or tag; None: ViT-L-14 for
            `openai`, GenEval's.
        batch_size: pictures at a time; the detector sees them one by one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"context"})

    scale: str = "correct"
    detector: str | None = None
    revision: str | None = None
    shortest: int | None = None
    color_model: str | None = None
    color_arch: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        self._check_options(scale=SCALES)
        if self.shortest is not None and self.shortest < 32:
            raise UserError(f"scorer geneval: shortest is {self.shortest}: use 32 or more (GenEval's is 800)")
        for option, other in (
            ("revision", "detector"),
            ("shortest", "detector"),
            ("color_arch", "color_model"),
        ):
            if getattr(self, option) is not None and not getattr(self, other):
                raise UserError(f"scorer geneval: {option} without {other}: give {other}, or leave it out")
        self._detector: Detector | None = None
        self._towers: Towers | None = None

    def load(self, device: str = "cpu") -> Self:
        """Returns this scorer with the networks that its options name on `device`."""
        names = ["rule-1"]
        if self.detector is not None:
            from diffalign.scorers._geneval_detector import open_detector

            self._detector = open_detector(self.detector, self.revision, self.shortest, device)
            names.append(self._detector.version)
        if self.color_model is not None:
            from diffalign.scorers._towers import open_towers

            arch = self.color_arch or ("ViT-L-14" if self.color_model == "openai" else None)
            self._towers = open_towers(self.color_model, arch=arch, device=device)
            names.append(f"{self._towers.name}@{self._towers.identity}")
        self.version = "+".join(names)
        return self

    def modules(self) -> list[torch.nn.Module]:
        """Returns the networks that are loaded: the detector and CLIP; none without them."""
        return [loaded.module for loaded in (self._detector, self._towers) if loaded is not None]

    def verdict(self, image: Image.Image | torch.Tensor, context: Mapping[str, Any]) -> Verdict:
        """Returns GenEval's verdict on one picture (PIL, or a tensor [3, H, W]), with its reasons.

        Raises:
            UserError: the picture cannot be judged: a clause that cannot be read, or no objects or colours;
                or this scorer is not loaded.
        """
        import torch

        from diffalign.scorers._geneval import checked, judge, most_confident
        from diffalign.scorers._pixels import as_pictures

        self._check_loaded()
        context = checked(context)
        (picture,) = as_pictures(image[None] if isinstance(image, torch.Tensor) else [image])
        asks = any("color" in clause for clause in context.get("include", ()))
        if asks and self._towers is None and not ("detections" in context and "colors" in context):
            raise UserError(
                "a clause asks for a color: give the scorer color_model=openai, or the context "
                "detections with their colors"
            )
        objects = self._objects(picture, context)
        kept = {name: most_confident(found, context.get("tag")) for name, found in objects.items()}
        return judge(context, kept, lambda name, found: self._colors(picture, name, found))

    def _check_loaded(self) -> None:
        """Checks that the networks that the options name are there."""
        for option, loaded in (("detector", self._detector), ("color_model", self._towers)):
            if getattr(self, option) and loaded is None:
                raise UserError(f"scorer geneval has no {option} yet: call .load() first")

    def _objects(self, picture: Image.Image, context: Mapping[str, Any]) -> Objects:
        """Returns class -> all that was found of it in a picture."""
        from diffalign.scorers._geneval import given_objects

        if "detections" in context:
            return given_objects(context)
        if self._detector is None:
            raise UserError(
                "nothing says what is in the picture: give the scorer a detector (for example "
                "detector=facebook/mask2former-swin-small-coco-instance), or the context detections"
            )
        clauses = [*context.get("include", ()), *context.get("exclude", ())]
        return self._detector(picture, list(dict.fromkeys(clause["class"] for clause in clauses)))

    def _colors(self, picture: Image.Image, name: str, found: Sequence[Detected]) -> list[str]:
        """Returns the colour of each object of a class: what the context says, else what CLIP tells."""
        given = [each.color for each in found if each.color is not None]
        if len(given) == len(found):
            return given
        if self._towers is None:
            raise UserError(
                f"colors of '{name}' name {len(given)}, but {len(found)} are looked at: give one for each "
                "box in the order of confidence, or the scorer color_model=openai"
            )
        return tell_colors(self._towers, picture, name, found)

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        import torch

        from diffalign.scorers._geneval import KINDS

        assert context is not None
        self._check_loaded()
        rows: list[dict[str, float]] = []
        errors: list[str | None] = []
        for image, wanted in zip(images, context, strict=True):
            try:
                verdict = self.verdict(image, wanted)
            except UserError as error:
                rows.append({})
                errors.append(str(error))
                continue
            correct = float(verdict.correct)
            value = correct if self.scale == "correct" else verdict.share()
            rows.append({"": value, "correct": correct, **{kind: verdict.share(kind) for kind in KINDS}})
            errors.append(None)
        names = ("", "correct", *KINDS)
        columns = {name: torch.tensor([row.get(name, math.nan) for row in rows]) for name in names}
        values = columns.pop("")
        return Scores(values, parts=columns, errors=errors)


def tell_colors(towers: Towers, picture: Image.Image, name: str, found: Sequence[Detected]) -> list[str]:
    """Returns which of GenEval's ten colours each object of a class has, by CLIP.

    A colour is the normalised mean of its templates' normalised features (OpenAI's zero-shot recipe, as in
    clip_benchmark), an object the crop of its box, grey outside of its mask where it has one.
    """
    import torch
    import torch.nn.functional as F

    from diffalign.scorers._geneval import COLORS

    if not found:
        return []
    texts = [template.format(color, name) for color in COLORS for template in TEMPLATES]
    features = towers.texts(texts).reshape(len(COLORS), len(TEMPLATES), -1)
    colors = F.normalize(features.mean(dim=1), dim=-1)
    crops = [crop(picture, each) for each in found]
    with torch.no_grad():
        # Not through towers.images: it keeps features by the identity of pictures, and crops do not last.
        pixels = towers.preprocess(crops).to(towers.device, towers.dtype)
        pictures = F.normalize(towers.encode_images(pixels).float(), dim=-1)
    return [COLORS[index] for index in (pictures @ colors.T).argmax(dim=1).tolist()]


def crop(picture: Image.Image, found: Detected) -> Image.Image:
    """Returns the part of an RGB picture in an object's box, at least a pixel, grey outside of its mask.

    Raises:
        UserError: the box lies outside of the picture.
    """
    from PIL import Image

    if found.mask is not None:
        picture = Image.composite(picture, Image.new("RGB", picture.size, GREY), Image.fromarray(found.mask))
    edges = []
    for axis, side in enumerate(picture.size):
        low, high = found.box[axis], found.box[axis + 2]
        if low >= side or (low < 0 and high <= 0):
            raise UserError(
                f"a box {list(found.box[:4])} lies outside of its picture of {picture.width} x "
                f"{picture.height}: give pixels of that picture"
            )
        first = min(max(round(low), 0), side - 1)
        edges.append((first, min(max(round(high), first + 1), side)))
    (left, right), (top, bottom) = edges
    return picture.crop((left, top, right, bottom))
