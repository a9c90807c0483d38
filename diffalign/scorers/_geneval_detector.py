"""The detector of GenEval: a Mask2Former of transformers, from a picture to the instances of some classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from diffalign.common.errors import UserError, brief, nearest
from diffalign.scorers._geneval import THRESHOLD, Detected, Objects
from diffalign.scorers._towers import hub_files
from diffalign.scorers._towers_transformers import load_model, model_type
from diffalign.scorers._weights import local_or_hub

LONGEST_PER_SHORTEST = 1333 / 800
"""How much longer than `shortest` the longer side may get, as in mmdet's settings of the detector."""

SYNONYMS = {
    "computer mouse": "mouse",
    "tv remote": "remote",
    "computer keyboard": "keyboard",
    "motorcycle": "motorbike",
    "airplane": "aeroplane",
    "couch": "sofa",
    "potted plant": "pottedplant",
    "dining table": "diningtable",
    "tv": "tvmonitor",
}
"""GenEval's name of a class -> what detectors may call it instead (COCO's names, and older ones)."""


@dataclass
class Detector:
    """A Mask2Former for instances, frozen, in evaluation mode.

    Attributes:
        module: the model.
        processor: its image processor of transformers.
        names: the classes, by label.
        version: which weights, and at what size.
        size: what the processor is told of the size; empty: its own settings.
    """

    module: Any
    processor: Any
    names: list[str]
    version: str
    size: dict[str, Any]

    def __call__(self, picture: Image.Image, wanted: list[str]) -> Objects:
        """Returns what is found of some classes in an RGB picture; one at a time, so that nothing is padded.

        Raises:
            UserError: the detector does not know a class, or fails on this picture.
        """
        labels = {name: self._label(name) for name in wanted}
        try:
            inputs = self.processor(images=[picture], return_tensors="pt", **self.size)
            with torch.no_grad():
                output = self.module(**{key: tensor.to(self.module.device) for key, tensor in inputs.items()})
        except Exception as error:  # sides too unequal, features too small: libraries agree on no type
            raise UserError(
                f"the detector fails on this picture of {picture.width} x {picture.height}: {brief(error)}"
            ) from error
        seen = (
            inputs["pixel_mask"][0]
            if "pixel_mask" in inputs
            else torch.ones(inputs["pixel_values"].shape[2:])
        )
        found = instances(
            output.class_queries_logits[0].float(),
            output.masks_queries_logits[0].float(),
            set(labels.values()),
            seen,
            (picture.height, picture.width),
        )
        return {name: found.get(label, []) for name, label in labels.items()}

    def _label(self, name: str) -> int:
        """Returns the label of a class."""
        for spelling in (name, SYNONYMS.get(name)):
            if spelling in self.names:
                return self.names.index(spelling)
        match = nearest(name, self.names)
        hint = f"did you mean '{match}'? " if match else ""
        raise UserError(
            f"the detector knows no '{name}': {hint}its {len(self.names)} classes are in its config"
        )


def open_detector(path: str, revision: str | None, shortest: int | None, device: str) -> Detector:
    """Returns the detector of a folder or hub id, on `device`.

    Raises:
        UserError: no such folder or repository, or something else than a whole Mask2Former in it.
    """
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    folder, name, identity = local_or_hub(path, revision, hub_files, "detector weights")
    kind = model_type(folder) if (folder / "config.json").is_file() else None
    if kind != "mask2former":
        raise UserError(
            f"detector {path} is no Mask2Former of transformers (model_type {kind!r}): give one, for example "
            "facebook/mask2former-swin-small-coco-instance"
        )
    model = load_model(Mask2FormerForUniversalSegmentation, folder, kind)
    model.requires_grad_(False).eval().to(device)
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except Exception as error:  # no file, or one of another kind: transformers agrees on no type
        raise UserError(f"detector {path} has no image processor that loads: {brief(error)}") from error
    longest = round((shortest or 0) * LONGEST_PER_SHORTEST)
    size = {"size": {"shortest_edge": shortest, "longest_edge": longest}} if shortest else {}
    version = f"{name}@{identity}" + (f"@{shortest}px" if shortest else "")
    labels = model.config.id2label
    return Detector(model, processor, [labels[label] for label in sorted(labels)], version, size)


def instances(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    labels: set[int],
    seen: torch.Tensor,
    size: tuple[int, int],
) -> dict[int, list[Detected]]:
    """Returns the instances of some labels that Mask2Former's queries found, by label.

    Of all pairs of query and class the best by class probability, as many as there are queries, are
    instances, so that one query may give several. The mask is where its logit at the picture's size is above
    0, the confidence is the class probability times the mean mask probability inside the mask, the box ends
    behind its last pixel. Source: mmdet 2, models/seg_heads/panoptic_fusion_heads/maskformer_fusion_head.py
    (instance_postprocess) and core/mask (mask2bbox); transformers computes the same at 384 x 384 pixels.

    Args:
        class_logits: [Q, classes + 1], the last for "nothing".
        mask_logits: [Q, h, w].
        labels: which classes; those of confidence below GenEval's threshold are left out.
        seen: [H, W] at the size that the network saw, 1 where the picture is, 0 where it was padded.
        size: height and width of the picture.
    """
    probabilities = class_logits.softmax(dim=-1)[:, :-1]
    best = probabilities.flatten().topk(len(class_logits)).indices.tolist()
    found: dict[int, list[Detected]] = {}
    for query, label in (divmod(place, probabilities.shape[1]) for place in best):
        probability = probabilities[query, label].item()
        if label not in labels or probability <= THRESHOLD:  # the confidence is at most this
            continue
        height, width = int(seen.any(dim=1).sum()), int(seen.any(dim=0).sum())
        logit = F.interpolate(mask_logits[query][None, None], tuple(seen.shape), mode="bilinear")
        logit = F.interpolate(logit[..., :height, :width], size, mode="bilinear")[0, 0]
        mask = logit > 0
        if not mask.any():
            continue
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        left, top, right, bottom = (float(edge) for edge in edges)
        confidence = probability * torch.sigmoid(logit[mask]).mean().item()
        found.setdefault(label, []).append(
            Detected((left, top, right, bottom, confidence), mask.cpu().numpy())
        )
    return found
