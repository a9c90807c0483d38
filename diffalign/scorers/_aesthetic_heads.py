"""The heads of the LAION aesthetic score: downloaded, told apart by their keys, fused where linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffalign.common.errors import UserError, brief, unknown
from diffalign.scorers._weights import content_of, read_tensors

_V2 = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
_V1 = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/"


@dataclass(frozen=True)
class Published:
    """A head as its authors published it."""

    url: str
    sha256: str
    arch: str


PUBLISHED = {
    "v2": Published(
        f"{_V2}sac%2Blogos%2Bava1-l14-linearMSE.pth",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        "ViT-L-14",
    ),
    "v2_relu": Published(
        f"{_V2}ava%2Blogos-l14-reluMSE.pth",
        "0af3254c651d55b7ea851429c20f26ec880bb0169805a4df85b814bd7966f3e4",
        "ViT-L-14",
    ),
    "v1": Published(
        f"{_V1}sa_0_4_vit_l_14_linear.pth",
        "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
        "ViT-L-14",
    ),
    "v1_b32": Published(
        f"{_V1}sa_0_4_vit_b_32_linear.pth",
        "c7b14cead230694acc7b9447974d3cad78003c72da032e402a303b6c2429e85f",
        "ViT-B-32",
    ),
}

AFFINE = (0, 2, 4, 6, 7)
RELU = (0, 3, 6, 9, 11)
"""Numbers of the linear layers among all layers: dropouts count, and ReLUs where there are some."""


@dataclass
class Head:
    """A head, frozen, in evaluation mode: features [B, width] -> [B, 1].

    Attributes:
        name: for messages and versions.
        identity: of the file's content.
        arch: the CLIP architecture that it was trained on.
    """

    module: nn.Module
    name: str
    identity: str
    width: int
    arch: str | None


def open_head(head: str) -> Head:
    """Returns a published head by its name, or one from a file.

    Raises:
        UserError: neither a name nor a file, no network, or a file of another layout.
    """
    known = PUBLISHED.get(head)
    path = Path(head).expanduser() if known is None else _download(head, known)
    if known is None and not path.is_file():
        if path.suffix or "/" in head:
            raise UserError(
                f"scorer aesthetic: head={head} does not exist: give a file or {', '.join(PUBLISHED)}"
            )
        raise unknown("head of scorer aesthetic", head, PUBLISHED)
    module = layers_of(read_tensors(path), str(path))
    first = next(layer for layer in module if isinstance(layer, nn.Linear))
    if not any(isinstance(layer, nn.ReLU) for layer in module):
        module = nn.Sequential(fused(module))
    width = first.in_features
    arch = known.arch if known is not None else {768: "ViT-L-14"}.get(width)
    module.requires_grad_(False).eval()
    return Head(module, head if known is not None else path.stem, content_of(path), width, arch)


def layers_of(tensors: Mapping[str, Any], name: str) -> nn.Sequential:
    """Returns the layers that a head's tensors describe, in order; dropouts are left out.

    Raises:
        UserError: the tensors are of none of the published layouts; `name` is the file that the error names.
    """
    if set(tensors) == {"weight", "bias"}:
        return nn.Sequential(_linear(tensors, ""))
    for places in (AFFINE, RELU):
        names = {f"layers.{place}.{kind}" for place in places for kind in ("weight", "bias")}
        if set(tensors) == names:
            layers: list[nn.Module] = []
            for place in places:
                layers.append(_linear(tensors, f"layers.{place}."))
                if places is RELU and place != places[-1]:
                    layers.append(nn.ReLU())
            return nn.Sequential(*layers)
    raise UserError(
        f"{name} is no aesthetic head (it holds {', '.join(sorted(tensors)[:4]) or 'nothing'}): give weight "
        f"and bias, or layers.N.weight and bias for N in {AFFINE} or {RELU}"
    )


def fused(layers: nn.Sequential) -> nn.Linear:
    """Returns the one linear layer that linear layers are together; the product is taken in float64."""
    first, *others = (layer for layer in layers if isinstance(layer, nn.Linear))
    weight, bias = first.weight.detach().double(), first.bias.detach().double()
    for layer in others:
        weight = layer.weight.detach().double() @ weight
        bias = layer.weight.detach().double() @ bias + layer.bias.detach().double()
    return _linear({"weight": weight, "bias": bias}, "")


def _linear(tensors: Mapping[str, Any], prefix: str) -> nn.Linear:
    weight, bias = tensors[f"{prefix}weight"].float(), tensors[f"{prefix}bias"].float()
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def _download(name: str, head: Published) -> Path:
    """Returns the local copy of a published head; a file whose hash differs is not taken."""
    target = Path(torch.hub.get_dir()) / "diffalign" / Path(head.url).name.replace("%2B", "+")
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(head.url, str(target), hash_prefix=head.sha256, progress=False)
        except Exception as error:  # no network, no such file, another hash: one remedy
            raise UserError(
                f"scorer aesthetic: head {name} cannot be downloaded ({brief(error)}): fetch {head.url} and "
                "give it as head=FILE"
            ) from error
    return target
