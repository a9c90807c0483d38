"""OCR: is the text that a prompt puts in quotes written in the picture, by what a recogniser reads there.

Scales (`scale`): target and reading are compared in lower case and without blanks; n is the target's length.
    flow_grpo    1 - min(d, n) / n, with d the Levenshtein distance, and d = 0 where the target stands
                 anywhere in what was read: further text costs nothing then (yifan123/flow_grpo,
                 flow_grpo/ocr.py)
    cer          1 - min(d, n) / n without that exception: 1 minus the character error rate, 0 at the least

Parts: `contained`, 1 where the target stands in what was read, else 0.

The target is what stands between the first two double quotes of the prompt. Typographic ones (“ ” „ ‟ and
full-width) count as double quotes; single ones do not, being apostrophes. By flow_grpo's rule a sign for
inches is a quote, too: of `12" pizza reading "HOT"` the target is `pizza reading`. A prompt without such text
is NaN and says so in `errors`, and so is a picture on which the recogniser fails (flow_grpo gives it 0, takes
the rest of the prompt after a quote that is never closed, and stops at a prompt without one).

A target of more than 1,000 characters is NaN and says so. A reading of 2 n characters or more in which the
target does not stand is not compared any further: d is n or more, and the value 0.

Convention: blanks are blanks, tabs and line ends of all kinds (flow_grpo: blanks alone, lines being joined
without one). Characters are Unicode code points, as they come: é is one or two.
Convention: flow_grpo reads with PaddleOCR 2.9; another recogniser gives other numbers.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from diffalign.common.errors import UserError, brief
from diffalign.scorers._base import Scorer, Scores

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diffalign.scorers._base import Images

SCALES = ("flow_grpo", "cer")

LANGUAGES = {"given": None, "tesseract": "eng", "easyocr": "en"}
"""Recogniser -> its own name of English."""

LONGEST = 1000
"""Characters of a target at most: comparing takes time that grows with the square."""

QUOTES = str.maketrans(dict.fromkeys("“”„‟＂", '"'))  # noqa: RUF001


@dataclass(kw_only=True)
class Plugin(Scorer):
    """Reward of pictures for the text that their prompts ask for.

    `context` may bring per picture `text`, what should be written (instead of the quotes of the prompt), and
    `recognised`, what was read in it elsewhere (instead of the recogniser); None counts as left out. Only
    recogniser=given needs a context.

    Args:
        scale: flow_grpo | cer.
        recogniser: tesseract (package pytesseract and the program tesseract) | easyocr (package easyocr,
            which downloads its weights when first used) | given (contexts bring `recognised`).
        language: the recogniser's own names of languages, several joined by `+`; None: English (eng for
            tesseract, en for easyocr).
        psm: page segmentation mode of tesseract, 3 to 13: 3 takes the picture as a page (tesseract's own
            default), 11 looks for text anywhere, 7 for a single line.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})
    may_use: ClassVar[frozenset[str]] = frozenset({"context"})

    scale: str = "flow_grpo"
    recogniser: Literal["given", "tesseract", "easyocr"] = "tesseract"
    language: str | None = None
    psm: int = 3

    def __post_init__(self) -> None:
        self._check_options(scale=SCALES, recogniser=LANGUAGES)
        if not 3 <= self.psm <= 13:
            raise UserError(f"scorer ocr: psm is {self.psm}: use 3 to 13 (0 to 2 read no text)")
        if self.language is not None and not all(self.language.split("+")):
            raise UserError(f"scorer ocr: language is '{self.language}': name one, or several joined by +")
        if self.recogniser == "given":
            self.needs = self.needs | {"context"}  # type: ignore[misc]  # of an instance: the option decides
        self._read: Callable[[Image.Image], str] | None = None
        self._modules: list[torch.nn.Module] = []

    def load(self, device: str = "cpu") -> Self:
        """Returns this scorer with its recogniser at hand; easyocr's networks go to `device`.

        Raises:
            UserError: the recogniser's package or program is not installed, or it lacks the language.
        """
        language = self.language or LANGUAGES[self.recogniser] or ""
        if self.recogniser == "tesseract":
            self._read, found = open_tesseract(language, self.psm)
        elif self.recogniser == "easyocr":
            self._read, self._modules, found = open_easyocr(language, device)
        else:
            found = "given"
        self.version = f"rule-1+{found}"
        return self

    def modules(self) -> list[torch.nn.Module]:
        """Returns easyocr's networks; the other recognisers have none."""
        return self._modules

    def _score_batch(
        self, images: Images, prompts: list[str] | None, context: list[Mapping[str, Any]] | None
    ) -> Scores:
        import torch

        assert prompts is not None
        if self._read is None and self.recogniser != "given":
            raise UserError(f"scorer ocr has not opened {self.recogniser} yet: call .load() first")
        values, contained, errors = [], [], []
        for index, prompt in enumerate(prompts):
            more = context[index] if context is not None else {}
            text, read = more.get("text"), more.get("recognised")
            error = None
            try:
                target = quoted(prompt) if text is None else plain(text)
                if not target:
                    raise UserError("the text that should be written is empty: name some")
                if len(target) > LONGEST:
                    raise UserError(
                        f"the text that should be written has {len(target)} characters: "
                        f"use {LONGEST} or fewer"
                    )
                read = plain(self._recognise(images[index]) if read is None else read)
                value, inside = closeness(target, read, self.scale), float(target in read)
            except UserError as failure:
                value, inside, error = math.nan, math.nan, str(failure)
            values.append(value)
            contained.append(inside)
            errors.append(error)
        return Scores(torch.tensor(values), parts={"contained": torch.tensor(contained)}, errors=errors)

    def _recognise(self, image: Any) -> str:
        """Returns what the recogniser reads in one picture (PIL, or a tensor [3, H, W]).

        Raises:
            UserError: there is no recogniser, or it fails on this picture.
        """
        import torch

        from diffalign.scorers._pixels import as_pictures

        if self._read is None:
            raise UserError("nothing says what was read: put recognised into the context")
        (picture,) = as_pictures(image[None] if isinstance(image, torch.Tensor) else [image])
        try:
            return self._read(picture)
        except Exception as error:  # one picture must not end a pass: recognisers agree on no type
            raise UserError(f"{self.recogniser} fails on this picture: {brief(error)}") from error


def quoted(prompt: str) -> str:
    """Returns the text between the first two double quotes of a prompt, lower case, without blanks.

    Raises:
        UserError: there are not two double quotes.
    """
    pieces = prompt.translate(QUOTES).split('"', 2)
    if len(pieces) < 3:
        raise UserError("the prompt has no text in double quotes: quote what should be written, or give text")
    return plain(pieces[1])


def plain(text: Any) -> str:
    """Returns a text as it is compared: lower case, without blanks.

    Raises:
        UserError: it is no text.
    """
    if not isinstance(text, str):
        raise UserError(f"text and recognised must be texts, not {type(text).__name__}: give one of each")
    return "".join(text.lower().split())


def closeness(target: str, read: str, scale: str) -> float:
    """Returns how close a reading comes to a target (both plain, the target not empty), 0 to 1; see above."""
    if scale == "flow_grpo" and target in read:
        return 1.0
    if len(read) >= 2 * len(target):  # as many are too many: the distance is at least the target's length
        return 0.0
    return 1 - min(levenshtein(target, read), len(target)) / len(target)


def levenshtein(a: str, b: str) -> int:
    """Returns the least number of characters to insert, drop or exchange that makes `b` of `a`."""
    row = list(range(len(b) + 1))  # from the empty beginning of a to each beginning of b
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
            diagonal, row[j] = row[j], best
    return row[-1]


def open_tesseract(language: str, psm: int) -> tuple[Callable[[Image.Image], str], str]:
    """Returns a function that reads an RGB picture with tesseract, and what it is.

    Raises:
        UserError: the package, the program or a language is not installed.
    """
    from diffalign.scorers._weights import content_of

    try:
        import pytesseract
    except ModuleNotFoundError as error:
        raise _not_installed("tesseract", "pytesseract") from error
    try:
        version = pytesseract.get_tesseract_version()
        known = pytesseract.get_languages()
    except pytesseract.TesseractNotFoundError as error:
        raise UserError(
            "scorer ocr finds no program tesseract: install it (apt-get install tesseract-ocr) and have it "
            "on PATH"
        ) from error
    for name in language.split("+"):
        if name not in known:
            raise UserError(
                f"tesseract has no language '{name}' (it has {', '.join(known)}): "
                f"apt-get install tesseract-ocr-{name.replace('_', '-')}"
            )

    def read(picture: Image.Image) -> str:
        return str(pytesseract.image_to_string(picture, lang=language, config=f"--psm {psm}"))

    data = trained_data(pytesseract.pytesseract.tesseract_cmd, language)
    identity = content_of(*data) if data else "unknown"
    return read, f"tesseract-{version}@{language}:{identity}@psm{psm}"


def trained_data(program: str, language: str) -> list[Path]:
    """Returns the files of tesseract's languages, [] where it does not tell its folder (before version 5).

    A language may be installed in three qualities (fast, best, and both in one), which read differently.
    """
    said = subprocess.run([program, "--list-langs"], capture_output=True, text=True, check=False).stdout
    folder = re.search(r'in "(.+)"', said)
    if folder is None:
        return []
    data = [Path(folder[1]) / f"{name}.traineddata" for name in language.split("+")]
    return data if all(each.is_file() for each in data) else []


def open_easyocr(
    language: str, device: str
) -> tuple[Callable[[Image.Image], str], list[torch.nn.Module], str]:
    """Returns a function that reads an RGB picture with easyocr, its networks, and what it is.

    Raises:
        UserError: the package is not installed, or its weights do not load.
    """
    try:
        import easyocr
    except ModuleNotFoundError as error:
        raise _not_installed("easyocr", "easyocr") from error
    import numpy as np

    try:
        # Unquantised, so that the CPU reads with the weights that a GPU reads with.
        reader = easyocr.Reader(
            language.split("+"), gpu=False if device == "cpu" else device, verbose=False, quantize=False
        )
    except Exception as error:  # an unknown language, no network: easyocr agrees on no type
        raise UserError(f"easyocr does not open for '{language}': {brief(error)}") from error
    modules = [module.requires_grad_(False).eval() for module in (reader.detector, reader.recognizer)]

    def read(picture: Image.Image) -> str:
        # An array is taken as BGR, as OpenCV has it.
        array = np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])
        return "\n".join(reader.readtext(array, detail=0))

    return read, modules, f"easyocr-{metadata.version('easyocr')}@{language}"


def _not_installed(recogniser: str, package: str) -> UserError:
    """Returns the error for a package that a recogniser needs; the caller raises it."""
    return UserError(
        f"scorer ocr with recogniser={recogniser} needs the package '{package}', which is not installed: "
        f"python -m pip install {package}"
    )
