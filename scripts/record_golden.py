"""Records what scorers say of a few fixed pictures with their published weights; needs the network once.

    python scripts/record_golden.py                          # every recipe in configs/scorers/ that loads
    python scripts/record_golden.py --only pickscore hpsv2

Writes tests/scorers/golden.json, which `pytest -m weights tests/scorers/test_golden.py` compares with: on
other machines, and after a library is upgraded. Entries of other scorers stay as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from diffalign.common import files
from diffalign.common.config import make_one, plain_plugin
from diffalign.common.errors import UserError
from diffalign.common.manifest import versions

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "tests" / "scorers" / "golden.json"
PROMPTS = ["a photo of a cat", 'a red sign that says "stop"', "two green apples on a table", ""]
SIZES = [(224, 224), (512, 300), (150, 400), (640, 640)]


def main() -> int:
    """Records what loads; exit code 1 when nothing does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=None, help="names of recipes in configs/scorers/")
    parser.add_argument("--out", default=str(RECORD))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    record: dict[str, Any] = files.read_json(arguments.out) if Path(arguments.out).exists() else {}
    found = 0
    for path in sorted((ROOT / "configs" / "scorers").glob("*.yaml")):
        if arguments.only is not None and path.stem not in arguments.only:
            continue
        ((name, options),) = yaml.safe_load(path.read_text(encoding="utf-8"))["scorers"].items()
        try:
            record[path.stem] = entry_of({"name": name, **(options or {})}, arguments.device)
        except UserError as error:
            print(f"{path.stem}: not recorded: {error}", file=sys.stderr)
            continue
        found += 1
        files.write_json(arguments.out, record)
        print(f"{path.stem}: {record[path.stem]['values']}")
    return 0 if found else 1


def entry_of(options: Mapping[str, Any], device: str = "cpu") -> dict[str, Any]:
    """What a scorer with these options (`name` among them) says of the fixed pictures, and how it was made.

    Raises:
        UserError: its weights cannot be had, or it needs more than pictures and prompts.
    """
    scorer = make_one("scorers", dict(options))
    if "context" in scorer.needs:
        raise UserError("it needs a context")
    plain = plain_plugin(scorer)
    scores = scorer.load(device).score(pictures(), PROMPTS)
    return {
        "options": plain,
        "scale": scorer.scale,
        "version": scorer.version,
        "pictures": digest_of(pictures()),
        "values": scores.values.double().tolist(),
        "versions": versions(),
    }


def pictures() -> list[Image.Image]:
    """Four pictures made of numbers alone, so that every machine has the same."""
    found = []
    for seed, (width, height) in enumerate(SIZES):
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[0:height, 0:width]
        waves = rng.uniform(0.005, 0.08, (3, 2))
        shades = [127.5 + 127.5 * np.sin(waves[c, 0] * x + waves[c, 1] * y + c) for c in range(3)]
        noise = rng.integers(-20, 20, (height, width, 3))
        found.append(Image.fromarray((np.stack(shades, axis=-1) + noise).clip(0, 255).astype(np.uint8)))
    return found


def digest_of(images: list[Image.Image]) -> str:
    """A hash of all pixels: a record of other pictures cannot be compared with."""
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
