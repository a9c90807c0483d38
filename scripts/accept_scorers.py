"""Whether scorers give the numbers of independent code, at the networks' true size with random weights.

    python scripts/accept_scorers.py --out /tmp/scorers [--heads FOLDER]

The same file is read by a scorer and by another library: HPS v2's layout (open_clip for us) by transformers,
PickScore's (transformers for us) by open_clip, with the preparation written out again; on odd pictures
(sizes, transparency, grey, CMYK, 16 bits, turned by EXIF). Also: what mode=tensor and half precision are
worth. FOLDER holds the four published aesthetic heads. Writes scripts/results/scorers.md.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import reporting
import torch
import torch.nn.functional as F
from full_size_clip import clip_config, full_tokenizer, renamed, write_state_dict, write_transformers
from PIL import Image, ImageOps
from transformers import CLIPImageProcessorPil, CLIPModel

from diffalign.common import files
from diffalign.data.pictures import ImageRef
from diffalign.scorers import load_scorer
from diffalign.scorers._aesthetic_heads import PUBLISHED, layers_of, open_head
from diffalign.scorers._pixels import OPENAI_MEAN, OPENAI_STD
from diffalign.scorers._weights import read_tensors
from tests import tiny_imagereward

REPORT = Path(__file__).with_name("results") / "scorers.md"
MAX_APART, MAX_FUSED = 1e-4, 1e-6
PROMPTS = [
    "a photo of a cat wearing a red hat, on the moon",
    "two blue squares left of a tree",
    "Zebra crossing, at night!",
    "a very long prompt " + "with many more words " * 40,
    "",
    "café au lait, 4k, 東京",
    "a red circle",
]

PLAIN_PROMPTS = ["a red circle", "two blue squares", "square, at night!", "red " * 50, "", "a photo", "blue"]
"""Of words that the vocabulary of tiny_imagereward knows, or not; one is cut."""


@dataclass
class Row:
    """One comparison: largest difference of scores, and what it is measured against."""

    what: str
    against: str
    apart: float
    spread: float
    scale: float

    @property
    def relative(self) -> float:
        """Difference over the scale of the score."""
        return self.apart / self.scale


def main() -> int:
    """Prints and writes the figures; exit code 1 when a bar is missed."""
    arguments = parse()
    out = Path(arguments.out)
    paths = odd_pictures(out / "pictures")
    ours = [ImageRef(path=path).open() for path in paths]
    theirs = [by_hand(path) for path in paths]
    rows, variants = [], []
    for compare in (hpsv2, pickscore, clip_l14, imagereward):
        found, others = compare(out, arguments.arch, ours, theirs)
        rows.append(found)
        variants += others
        gc.collect()
    bars = {f"{row.what}: <= {MAX_APART} of its scale": row.relative <= MAX_APART for row in rows}
    heads = fused_heads(Path(arguments.heads)) if arguments.heads else {}
    bars |= {
        f"head {name}: fused = layers to {MAX_FUSED}": apart <= MAX_FUSED for name, apart in heads.items()
    }
    lines = reporting.head(
        "Scorers against independent code", "python scripts/accept_scorers.py --out FOLDER --heads HEADS"
    )
    lines += [
        f"{len(ours)} odd pictures, {len(PROMPTS)} prompts, random weights. A scale is 1 for a cosine and "
        "100 for logits; the spread is what the scores of these pictures and prompts span.",
        "",
        *table(rows),
        "## What the options are worth",
        "",
        *table(variants),
        *(["## Aesthetic heads as published", ""] if heads else []),
        *(
            f"- {name}: largest relative difference of fused and layered {apart:.1e}"
            for name, apart in heads.items()
        ),
        "",
        *reporting.bars(bars),
    ]
    files.write_text(arguments.report, "\n".join(lines))
    print("\n".join(lines))
    return 0 if all(bars.values()) else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder of pictures and random weights (10 GB)")
    parser.add_argument("--arch", default="ViT-H-14")
    parser.add_argument("--heads", default=None)
    parser.add_argument("--report", default=str(REPORT))
    return parser.parse_args()


def table(rows: list[Row]) -> list[str]:
    """Comparisons as lines of Markdown."""
    return [
        "| score | against | largest difference | of its scale | spread of the scores |",
        "|---|---|---|---|---|",
        *(f"| {r.what} | {r.against} | {r.apart:.1e} | {r.relative:.1e} | {r.spread:.3g} |" for r in rows),
        "",
    ]


def odd_pictures(folder: Path) -> list[Path]:
    """Files of pictures of odd sizes and kinds."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    def scene(width: int, height: int, channels: int = 3) -> Image.Image:
        coarse = rng.integers(0, 255, (7, 5, channels), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    turned = Image.Exif()
    turned[0x0112] = 6
    scene(640, 359).save(folder / "wide.png")
    scene(225, 900).save(folder / "tall.png")
    scene(97, 101, 4).save(folder / "transparent.png")
    scene(513, 300).convert("L").save(folder / "grey.png")
    scene(300, 300).convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    scene(400, 250).save(folder / "turned.jpg", exif=turned, quality=95)
    deep = rng.integers(0, 65535, (9, 12)).astype(np.uint16)
    Image.fromarray(np.kron(deep, np.ones((30, 30), dtype=np.uint16))).save(folder / "deep.png")
    return sorted(folder.iterdir())


def by_hand(path: Path) -> Image.Image:
    """A picture upright, on white, in 8 bits RGB, by other means than the package's."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        image.load()
    if image.mode == "RGBA":
        pixels = np.asarray(image, dtype=np.float64)
        alpha = pixels[..., 3:] / 255
        return Image.fromarray((pixels[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8))
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """[3, h, w] in [0, 1] by OpenAI's mean and deviation."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_MEAN, OPENAI_STD))
    return (pixels - mean) / std


def letterboxed(image: Image.Image, side: int = 224) -> torch.Tensor:
    """HPS v2's preparation, written out: floats, bicubic to the longer side, black around."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    height, width = pixels.shape[2:]
    new = tuple(round(length * (side / max(height, width))) for length in (height, width))
    small = F.interpolate(pixels, size=new, mode="bicubic", antialias=True)
    down, right = side - new[0], side - new[1]
    padded = F.pad(small, (right // 2, right - right // 2, down // 2, down - down // 2))
    return normalised(padded[0])


def of_transformers(state: dict[str, torch.Tensor], arch: str, pixels: torch.Tensor) -> torch.Tensor:
    """Cosines by transformers' CLIPModel, one picture at a time."""
    model = CLIPModel(clip_config(open_clip.get_model_config(arch))).eval()
    model.load_state_dict(renamed(state), strict=True)
    tokens = full_tokenizer()(
        PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        texts = model.get_text_features(**tokens).pooler_output
        images = torch.cat([model.get_image_features(one[None]).pooler_output for one in pixels])
    return F.cosine_similarity(images, texts)


def of_open_clip(state: dict[str, torch.Tensor], arch: str, pictures: list[Image.Image]) -> torch.Tensor:
    """Cosines by open_clip, with the preparation of transformers, one picture at a time."""
    model = open_clip.create_model(arch, require_pretrained=False).eval()
    model.load_state_dict(state, strict=True)
    prepare = CLIPImageProcessorPil()  # of this layout's authors; open_clip crops some sizes a pixel off
    with torch.no_grad():
        texts = model.encode_text(open_clip.get_tokenizer("ViT-H-14")(PROMPTS))
        pixels = [prepare(picture, return_tensors="pt").pixel_values for picture in pictures]
        images = torch.cat([model.encode_image(one) for one in pixels])
    return F.cosine_similarity(images, texts)


def compared(
    name: str,
    against: str,
    scale: float,
    expected: torch.Tensor,
    make: Callable[..., Any],
    pictures: list[Image.Image],
    prompts: list[str] = PROMPTS,
) -> tuple[Row, list[Row]]:
    """The scorer against the expected scores, and its options against itself."""
    values = make()(pictures, prompts)
    spread = float(values.max() - values.min())

    def apart(others: torch.Tensor) -> float:
        return float((others - values).abs().max())

    row = Row(name, against, apart(expected), spread, scale)
    variants = [
        Row(
            name,
            f"{option} against {default}",
            apart(make(**{key: option})(pictures, prompts)),
            spread,
            scale,
        )
        for key, option, default in (("mode", "tensor", "reference"), ("dtype", "bf16", "fp32"))
    ]
    return row, variants


def hpsv2(out: Path, arch: str, ours: list[Image.Image], theirs: list[Image.Image]) -> tuple[Row, list[Row]]:
    """open_clip's layout read by transformers, the letterbox written out."""
    path = write_state_dict(out / "HPS_v2.1_compressed.pt", arch)
    pixels = torch.stack([letterboxed(picture) for picture in theirs])
    expected = of_transformers(read_tensors(path), arch, pixels)
    gc.collect()

    def make(**options: Any) -> Any:
        return load_scorer("hpsv2", path=str(path), arch=arch, **options)

    return compared("hpsv2", "transformers, own letterbox", 1.0, expected, make, ours)


def pickscore(
    out: Path, arch: str, ours: list[Image.Image], theirs: list[Image.Image]
) -> tuple[Row, list[Row]]:
    """transformers' layout read by open_clip."""
    folder = write_transformers(out / "pickscore", arch, seed=2)
    state = read_tensors(write_state_dict(out / "pickscore-open_clip.pt", arch, seed=2))
    expected = 100 * of_open_clip(state, arch, theirs)
    del state
    gc.collect()

    def make(**options: Any) -> Any:
        return load_scorer("pickscore", path=str(folder), **options)

    return compared("pickscore", "open_clip, transformers' own preparation", 100.0, expected, make, ours)


def clip_l14(
    out: Path, arch: str, ours: list[Image.Image], theirs: list[Image.Image]
) -> tuple[Row, list[Row]]:
    """OpenAI's architecture with QuickGELU, a weight file read by transformers."""
    arch = "ViT-L-14-quickgelu" if arch == "ViT-H-14" else arch
    path = write_state_dict(out / "clip-l14.pt", arch, seed=1)
    prepare = open_clip.image_transform(224, is_train=False)
    expected = of_transformers(read_tensors(path), arch, torch.stack([prepare(p) for p in theirs]))

    def make(**options: Any) -> Any:
        return load_scorer("clip", path=str(path), arch=arch, **options)

    return compared("clip", "transformers", 1.0, expected, make, ours)


def imagereward(
    out: Path, arch: str, ours: list[Image.Image], theirs: list[Image.Image]
) -> tuple[Row, list[Row]]:
    """The published layout, against its formulas in plain tensor code; words without accents."""
    sizes = tiny_imagereward.TRUE if arch == "ViT-H-14" else tiny_imagereward.TINY
    state = tiny_imagereward.tensors(512, sizes=sizes)
    med_config = tiny_imagereward.config(512, sizes)
    options = tiny_imagereward.write(out / "imagereward", state, med_config, sizes)
    with torch.no_grad():
        expected = tiny_imagereward.rewards(state, theirs, PLAIN_PROMPTS, sizes=sizes)
    del state

    def make(**others: Any) -> Any:
        return load_scorer("imagereward", **options, **others)

    return compared("imagereward", "plain tensor code", 1.0, expected, make, ours, PLAIN_PROMPTS)


def fused_heads(folder: Path) -> dict[str, float]:
    """Published head -> largest relative difference between its layers and what the scorer runs."""
    found = {}
    for name, published in PUBLISHED.items():
        path = folder / Path(published.url).name.replace("%2B", "+")
        head, layers = open_head(str(path)), layers_of(read_tensors(path), str(path))
        x = F.normalize(torch.randn(1000, head.width, generator=torch.Generator().manual_seed(0)))
        with torch.no_grad():
            expected, values = layers.double()(x.double()), head.module(x).double()
        found[name] = float(((values - expected).abs() / expected.abs().clamp(min=1.0)).max())
    return found


if __name__ == "__main__":
    sys.exit(main())
