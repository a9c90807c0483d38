"""Builds the embedded models tiny-sdxl, tiny-sd3 and tiny-clip from nothing but code: 3 hours on 2 cores.

Parts, each resumable: a bank of drawn scenes (a third of them wrong, as web data is), a tokenizer, the
autoencoder, its latents, the UNet trained together with its two text encoders, an open_clip model, the
transformer of SD3 with its three text encoders. The work lives in `OUT/work`; the models come to lie in
`OUT/tiny-sdxl`, `OUT/tiny-clip` and `OUT/tiny-sd3`.

Examples:
  python scripts/build_tiny.py --out /tmp/tiny                  # everything; the same command again goes on
  python scripts/build_tiny.py --out /tmp/tiny --minutes 10     # stops after 10 minutes, saved
  python scripts/build_tiny.py --out /tmp/tiny --parts sdxl --step 3000     # from the kept step 3000
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the package is used in place

from scripts.tiny.settings import Settings

PARTS = ["sdxl", "clip", "sd3"]


def build(settings: Settings, out: Path, *, minutes: float, step: int | None, parts: list[str]) -> bool:
    """True when all the asked parts are built; False when the minutes ran out first (the work is saved)."""
    from scripts.tiny.bank import make_bank
    from scripts.tiny.clip import build_clip
    from scripts.tiny.loop import Clock, OutOfTime
    from scripts.tiny.sd3 import build_sd3
    from scripts.tiny.sdxl import build_sdxl
    from scripts.tiny.tokenizer import train_tokenizer

    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    clock = Clock(work, minutes)
    bank = make_bank(settings, work)
    clock.say(f"bank: {len(bank.captions)} pictures, {len(bank.right_rows())} of them right")
    train_tokenizer(bank.captions, settings.vocabulary, work / "tokenizer")
    try:
        if "sdxl" in parts:
            build_sdxl(settings, bank, out, clock, step=step)
        if "clip" in parts:
            build_clip(settings, bank, out, clock)
        if "sd3" in parts:  # last: it starts from the other two
            build_sd3(settings, bank, out, clock, step=step)
    except OutOfTime:
        clock.say("the minutes are over: run the same command again to go on")
        return False
    clock.say(f"built: {', '.join(parts)}")
    return True


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when everything is built, 3 when the minutes ran out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for the models and for work/")
    parser.add_argument("--minutes", type=float, default=90.0, help="stop (saved) after so many minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--step", type=int, default=None, help="kept step to export (default: the last)")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--unet-steps", type=int, default=None)
    parser.add_argument("--small", action="store_true", help="a few steps at toy size, to try the builder")
    arguments = parser.parse_args(argv)

    import torch

    torch.set_num_threads(arguments.threads)
    settings = Settings(seed=arguments.seed)
    if arguments.small:
        settings = settings.small()
    if arguments.unet_steps is not None:
        settings = replace(settings, unet_steps=arguments.unet_steps, unet_horizon=arguments.unet_steps)
    out = Path(arguments.out)
    done = build(settings, out, minutes=arguments.minutes, step=arguments.step, parts=arguments.parts)
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
