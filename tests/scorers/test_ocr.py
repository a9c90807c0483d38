"""OCR: the rules by hand on readings that are given; tesseract itself where it is installed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from diffalign.common.errors import UserError
from diffalign.scorers import load_scorer
from diffalign.scorers.ocr import Plugin, closeness, levenshtein, plain, quoted, trained_data

HAS_TESSERACT = importlib.util.find_spec("pytesseract") is not None and shutil.which("tesseract") is not None


def contract_case(folder: Path):
    pictures = [Image.new("RGB", (64, 48), (40 * i, 0, 0)) for i in range(6)]
    prompts = [f'a sign that says "{text}"' for text in ("Open", "Closed", "Open", "24/7", "x", "Stop")]
    read = ["Open", "C1osed", "0pen", "", "x", "Stop it"]
    return {"recogniser": "given"}, pictures, prompts, [{"recognised": text} for text in read]


def score(prompt: str, read: str | None, *, scale: str = "flow_grpo", **context):
    """The scores of one picture in which this was read."""
    more = context if read is None else {"recognised": read, **context}
    scorer = load_scorer("ocr", recogniser="given", scale=scale)
    return scorer.score([Image.new("RGB", (8, 8))], [prompt], context=[more])


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("abc", "abc", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("ab", "ba", 2),  # no transposition
        ("abcdef", "azced", 3),
        ("übér", "uber", 2),
        ("日本語", "日本", 1),
    ],
)
def test_levenshtein_by_hand(a, b, distance):
    assert levenshtein(a, b) == levenshtein(b, a) == distance


@pytest.mark.parametrize(
    ("target", "read", "flow_grpo", "cer"),
    [
        ("helloworld", "helloworld", 1.0, 1.0),
        ("helloworld", "hellowor1d", 0.9, 0.9),
        ("helloworld", "hello", 0.5, 0.5),
        ("helloworld", "", 0.0, 0.0),
        # Contained: further text is free by flow_grpo's rule, and costs its 4 characters by the other.
        ("helloworld", "sayhelloworld!", 1.0, 0.6),
        # Not contained, 2 characters more and one wrong.
        ("open", "xop3ny", 0.25, 0.25),
        # Capped at the target's length: not below 0.
        ("ab", "something else altogether", 0.0, 0.0),
        ("a", "bb", 0.0, 0.0),
    ],
)
def test_the_rules_by_hand(target, read, flow_grpo, cer):
    assert closeness(target, read, "flow_grpo") == pytest.approx(flow_grpo)
    assert closeness(target, read, "cer") == pytest.approx(cer)
    for scale, expected in (("flow_grpo", flow_grpo), ("cer", cer)):
        scores = score(f'a wall with "{target}" on it', read, scale=scale)
        assert scores.values.item() == pytest.approx(expected) and scores.errors == [None]
        assert scores.parts["contained"].item() == float(target in plain(read))


def test_case_and_blanks_do_not_count():
    assert score('"Hello World"', "HELLO\n\n wor\tld \f").values.item() == 1
    assert score('"STRASSE"', "straße").values.item() == pytest.approx(1 - 2 / 7)  # ß stays ß
    assert score('"ÉCOLE"', "école").values.item() == 1
    assert score('"日本"', "東京 日 本").values.item() == 1
    # Code points: a decomposed é is two.
    assert score('"e\u0301t"', "\u00e9t").values.item() == pytest.approx(1 - 2 / 3)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('New York with "Hello World" in fireworks', "helloworld"),
        ('"one" and "two"', "one"),
        ("a poster “Big Sale” in a window", "bigsale"),
        ("ein Schild „Offen“ an der Tür", "offen"),
        ('mixed “marks" here', "marks"),
        ("full-width ＂書＂", "書"),  # noqa: RUF001
        ("\"it's 5 o'clock\"", "it's5o'clock"),
    ],
)
def test_the_target_stands_between_the_first_two_double_quotes(prompt, target):
    assert quoted(prompt) == target
    assert score(prompt, target).values.item() == 1


@pytest.mark.parametrize(
    ("prompt", "read", "context", "message"),
    [
        ("a cat", "a cat", {}, "no text in double quotes"),
        ("the word 'open'", "open", {}, "no text in double quotes"),
        ('an unclosed "quote', "quote", {}, "no text in double quotes"),
        ('an empty "" pair', "x", {}, "is empty"),
        ('blanks "  " only', "x", {}, "is empty"),
        ("a cat", "x", {"text": " "}, "is empty"),
        ("a cat", "x", {"text": 5}, "must be texts, not int"),
        ('"a"', None, {"recognised": ["a"]}, "must be texts, not list"),
        ('"a"', None, {"recognised": None}, "put recognised into the context"),
        (f'"{"a" * 1001}"', "a", {}, "has 1001 characters: use 1000 or fewer"),
        ('"a"', None, {}, "put recognised into the context"),
    ],
)
def test_what_cannot_be_judged_is_nan_and_says_why(prompt, read, context, message):
    scores = score(prompt, read, **context)
    assert scores.values.isnan().all() and scores.parts["contained"].isnan().all()
    assert message in scores.errors[0]


def test_context_may_say_what_should_be_written():
    assert score("a street at night", "Bar Central", text="bar central").values.item() == 1
    assert score('"not this"', "that", text="that").values.item() == 1
    assert score('"this"', "this", text=None).values.item() == 1  # tables write so what a row does not have


def test_a_long_reading_is_worth_what_it_is_and_costs_no_time():
    assert closeness("abcd", "abxxxxcd", "flow_grpo") == closeness("abcd", "abxxxxcd", "cer") == 0
    assert closeness("abcd", "abxxxcd", "cer") == 0.25
    begin = time.perf_counter()
    assert closeness("a" * 1000, "b" * 1_000_000, "cer") == 0
    assert time.perf_counter() - begin < 1


def test_a_sign_for_inches_is_a_quote():
    assert quoted('12" pizza reading "HOT"') == "pizzareading"


def test_the_recogniser_comes_with_load():
    for recogniser in ("tesseract", "easyocr"):
        with pytest.raises(UserError, match=rf"has not opened {recogniser} yet: call .load\(\) first"):
            Plugin(recogniser=recogniser)([Image.new("RGB", (8, 8))], ['"a"'])
    assert Plugin(recogniser="given")([Image.new("RGB", (8, 8))], ['"a"'], context=[{"recognised": "a"}]) == 1


def test_tesseracts_files_are_found_where_it_says(tmp_path):
    (tmp_path / "eng.traineddata").write_bytes(b"fast")
    program = tmp_path / "tesseract"
    program.write_text(f"#!/bin/sh\necho 'List of available languages in \"{tmp_path}/\" (1):'\necho eng\n")
    program.chmod(0o755)
    assert trained_data(str(program), "eng") == [tmp_path / "eng.traineddata"]
    assert trained_data(str(program), "eng+deu") == []
    program.write_text("#!/bin/sh\necho 'List of available languages (1):'\n")
    assert trained_data(str(program), "eng") == []


def test_given_readings_alone_need_a_context():
    given = load_scorer("ocr", recogniser="given")
    assert given.needs == {"prompts", "context"} and type(given).needs == {"prompts"}
    with pytest.raises(UserError, match="needs context"):
        given([Image.new("RGB", (8, 8))], ['"a"'])


def test_a_picture_on_which_the_recogniser_fails_is_nan():
    scorer = load_scorer("ocr", recogniser="given")

    def read(picture: Image.Image) -> str:
        if picture.size == (8, 8):
            raise RuntimeError("no\nletters")
        return f"{picture.mode} {picture.size[0]}"

    scorer._read = read
    images = [Image.new("L", (9, 9)), Image.new("L", (8, 8)), Image.new("RGBA", (10, 9))]
    scores = scorer.score(images, ['"RGB 9"', '"a"', '"RGB 1"'], context=[{}] * 3)
    assert scores.values.tolist()[::2] == [1, 1] and scores.values[1].isnan()
    assert scores.errors == [None, "given fails on this picture: no letters", None]
    assert scorer(torch.zeros(1, 3, 4, 9), ['"RGB9"'], context=[{}]).item() == 1  # tensors as pictures


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    for recogniser, package in (("tesseract", "pytesseract"), ("easyocr", "easyocr")):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        with pytest.raises(UserError, match=f"not installed: python -m pip install {package}"):
            load_scorer("ocr", recogniser=recogniser)


def test_bad_options_are_refused():
    for options, message in (
        ({"scale": "flow-grpo"}, "did you mean 'flow_grpo'"),
        ({"recogniser": "tesserakt"}, "did you mean 'tesseract'"),
        ({"recogniser": "given", "psm": 0}, "use 3 to 13"),
        ({"recogniser": "given", "language": "eng+"}, "several joined by"),
    ):
        with pytest.raises(UserError, match=message):
            load_scorer("ocr", **options)


def written(text: str) -> Image.Image:
    """A picture with a text on it."""
    picture = Image.new("RGB", (512, 256), (20, 40, 160))
    ImageDraw.Draw(picture).text((50, 90), text, fill="white", font=ImageFont.load_default(48))
    return picture


@pytest.mark.skipif(not HAS_TESSERACT, reason="tesseract or pytesseract is not installed")
def test_tesseract_reads():
    scorer = load_scorer("ocr")
    images = [written("Hello World"), written("Closed"), written("")]
    scores = scorer.score(images, ['a sign "Hello World"', 'a sign "Closet"', 'a sign "Open"'])
    assert scores.parts["contained"].tolist() == [1, 0, 0]
    assert scores.values.tolist() == [1, pytest.approx(5 / 6), 0]
    assert re.fullmatch(r"rule-1\+tesseract-[\w.]+@eng:([0-9a-f]{12}|unknown)@psm3", scorer.version)
    with pytest.raises(UserError, match="no language 'klingon'"):
        load_scorer("ocr", language="eng+klingon")


@pytest.mark.skipif(not HAS_TESSERACT, reason="tesseract or pytesseract is not installed")
def test_a_missing_program_says_how_to_install_it(monkeypatch):
    import pytesseract

    monkeypatch.setattr(pytesseract.pytesseract, "tesseract_cmd", "/nowhere/tesseract")
    # pytesseract remembers the version that it found.
    monkeypatch.setattr(pytesseract, "get_tesseract_version", pytesseract.get_tesseract_version.__wrapped__)
    with pytest.raises(UserError, match="apt-get install tesseract-ocr"):
        load_scorer("ocr")
