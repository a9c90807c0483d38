"""What is looked at while training: held-out implicit accuracy and pictures on fixed prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image

from diffalign.common import files
from diffalign.common.conditioning import Conditioning
from diffalign.common.progress import say
from diffalign.data.encoded import Encoded
from diffalign.models._base import Model, NonFinitePicture
from diffalign.training.implicit import accuracy, judge
from diffalign.training.metrics import MetricsLog
from diffalign.training.specs import Settings


@dataclass
class Watch:
    """Measures that change nothing: dropout off, no gradient, no number taken from the global random stream.

    Args:
        settings: of the run; `validation` and `samples` say what is looked at, and when; as many
            pairs at once as `preprocess` encodes pictures.
        heldout: pairs for the held-out accuracy; None: not measured.
        embedded: conditioning of the sample prompts, made before the text encoders left memory.
        out: folder of the run; pictures go to `samples/`.
        accelerator: device and precision.
    """

    settings: Settings
    heldout: Encoded | None
    embedded: tuple[Conditioning, Conditioning] | None
    out: Path
    accelerator: Accelerator
    _last: dict[str, Any] = field(default_factory=dict)
    _measured: int = 0
    _drawn: int = -1

    def look(
        self,
        model: Model,
        step: int,
        log: MetricsLog,
        weights: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        last: bool = False,
    ) -> None:
        """Measures what is due at `step` and not done yet, on the weights that `weights` puts in place."""
        spec = self.settings
        measures = self.heldout is not None and (step % spec.validation.every == 0 or last)
        draws = self.embedded is not None and (step % spec.samples.every == 0 or last)
        measures, draws = measures and step > self._measured, draws and step > self._drawn
        if not (measures or draws):
            return
        with weights():
            if measures:
                self._measured = step
                self._validate(model, step, log)
            if draws:
                self._drawn = step
                self._draw(model, step)

    def summary(self) -> dict[str, Any]:
        """The last held-out accuracy, if any."""
        return dict(self._last)

    def restore(self, summary: dict[str, Any]) -> None:
        """Puts back what `summary` gave, for a run that goes on."""
        self._last = dict(summary)

    def _validate(self, model: Model, step: int, log: MetricsLog) -> None:
        assert self.heldout is not None
        judgements = list(
            judge(
                model.denoiser,
                self.heldout,
                num_draws=self.settings.validation.draws,
                batch_size=self.settings.preprocess.batch_size,
                device=self.accelerator.device,
                context=self.accelerator.autocast,
                known=model.known_timesteps,
            )
        )
        interval = accuracy(judgements)
        margin = sum(judgement.margin() for judgement in judgements) / len(judgements)
        self._last = {"implicit_accuracy": interval.as_dict()}
        log.write("validation", step, {**self._last, "error_margin": margin})
        say(f"step {step}: held-out implicit accuracy {interval}")

    def _draw(self, model: Model, step: int) -> None:
        assert self.embedded is not None
        network, spec = model.denoiser.network, self.settings.samples
        was_training = network.training
        network.eval()
        try:
            with self.accelerator.autocast():
                pictures = model.generate(
                    spec.prompts,
                    [spec.seed] * len(spec.prompts),
                    guidance_scale=spec.guidance_scale,
                    num_inference_steps=spec.num_inference_steps,
                    embedded=self.embedded,
                )
        except NonFinitePicture as error:  # no reason to stop: whether the run is healthy, its losses say
            say(f"step {step}: no sample pictures: {error}")
            return
        finally:
            model.drop_encoders()
            network.train(was_training)
        if not self.accelerator.is_main_process:  # it has only helped to draw
            return
        with files.atomic_path(self.out / "samples" / f"step-{step:08d}.png") as temporary:
            side_by_side(pictures).save(temporary, format="PNG")


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """One picture with all of them in a row, tops aligned."""
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    return sheet
