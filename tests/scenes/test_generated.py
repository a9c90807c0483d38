"""The grader against eyes: 200 pictures that models drew, labelled by hand before they were graded."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from diffalign.common import files
from diffalign.scenes import grade

FOLDER = Path(__file__).parent / "generated"
SIDE, COLUMNS = 64, 20


def test_grader_agrees_with_eyes_on_generated_pictures() -> None:
    """Pictures of the embedded base at two guidance scales and of two aligned models, faults included."""
    labels = files.read_jsonl(FOLDER / "labels.jsonl")
    sheet = Image.open(FOLDER / "sheet.png").convert("RGB")
    pairs = []
    for number, row in enumerate(labels):
        top, left = SIDE * (number // COLUMNS), SIDE * (number % COLUMNS)
        picture = sheet.crop((left, top, left + SIDE, top + SIDE))
        pairs.append((bool(row["accurate"]), grade(picture, row["prompt"]).accurate))
    assert len(pairs) == 200 and 60 < sum(eye for eye, _ in pairs) < 140
    assert sum(eye == grader for eye, grader in pairs) >= 190
    # What an optimiser would look for: pictures that the grader likes and eyes do not.
    assert sum(grader and not eye for eye, grader in pairs) <= 4
