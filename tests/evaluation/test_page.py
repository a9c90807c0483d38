"""The page and the Markdown file: whole, self-contained, and deaf to what prompts try to say."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.common.errors import UserError
from diffalign.evaluation import html, thumbnails
from diffalign.evaluation.html import as_html
from diffalign.evaluation.markdown import as_markdown
from diffalign.evaluation.pairs import match, read_shots
from diffalign.evaluation.provenance import Origin
from diffalign.evaluation.ratings import standings
from diffalign.evaluation.report import compare
from diffalign.evaluation.summary import Comparison, verdict

EVIL = '"><script>alert(1)</script><img src=http://127.0.0.1:9/x>{{ 7*7 }} | `x` [a](http://127.0.0.1:9/)'
VOID = {"meta", "link", "img", "br"}


class Reader(HTMLParser):
    """Collects the elements of a page and checks that they close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def comparison_of(folder: Path, models: dict[str, list[float | None]], **row: object) -> Comparison:
    """One prompt a value; base scores 0.5 everywhere. `row` replaces fields of every row."""
    rng = np.random.default_rng(0)

    def shots(name: str, values: list[float | None]):
        rows = []
        for k, value in enumerate(values):
            picture = re.sub("[^a-z]", "", name) + f"-{k}.png"
            Image.fromarray(rng.integers(0, 255, (16, 24, 3), dtype=np.uint8)).save(folder / picture)
            entry = {"value": value, "scale": "share", "version": "1"}
            rows.append({"id": f"p{k}", "image": picture, "prompt": f"prompt {k}", "prompt_id": f"p{k}"})
            rows[-1] |= {"seed": 0, "scores": {"scene": entry}, "meta": {"style": ("photo", "anime")[k % 2]}}
            rows[-1] |= {key: value(k) if callable(value) else value for key, value in row.items()}
        return read_shots(rows, folder, name)

    base = shots("base", [0.5] * len(next(iter(models.values()))))
    pairs = {name: match(base, shots(name, values)) for name, values in models.items()}
    reports = {name: compare(found) for name, found in pairs.items()}
    several = standings(pairs, reports) if len(models) > 1 else {}
    return Comparison(
        reports, pairs, several, {"base": Origin("runs/base"), **{m: Origin(m) for m in models}}
    )


GAINS: list[float | None] = [0.9, 0.8, 0.7, 0.5, 0.4, 0.1]


def pictures_of(page: str) -> list[Image.Image]:
    addresses = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in addresses]


def test_a_page_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    page = as_html(comparison_of(tmp_path, {"aligned": GAINS}), pictures=6)
    assert page.startswith("<!doctype html>")
    reader = Reader(page)
    outside = [a for _, a in reader.found if (a.get("src") or a.get("href") or "data:")[:5] != "data:"]
    assert outside == [] and "url(" not in page and "@import" not in page
    assert len(reader.all("script")) == len(reader.all("style")) == 1
    text = " ".join(reader.words)
    for said in (
        "aligned against base",
        "58.3 % [",
        "3/1/2",
        "photo",
        "anime",
        "pixel distance",
        "runs/base",
    ):
        assert said in text, said
    ids = [a["id"] for _, a in reader.found if a.get("id")]
    labels = [a["aria-labelledby"] for a in reader.all("section")]
    assert sorted(ids) == sorted(labels) and len(set(ids)) == len(ids)
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in reader.all("svg"))


def test_pictures_stand_side_by_side_sorted_by_the_difference(tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path, {"aligned": GAINS})
    page = as_html(comparison, pictures=6)
    reader = Reader(page)
    images = reader.all("img")
    assert len(images) == 12 and all(a["loading"] == "lazy" and a["decoding"] == "async" for a in images)
    assert [a["alt"] for a in images[:2]] == ["base: prompt 0", "aligned: prompt 0"]
    assert [a["alt"] for a in images[-2:]] == ["base: prompt 5", "aligned: prompt 5"]
    shown = np.asarray(pictures_of(page)[1].convert("RGB"))
    assert (shown == np.asarray(Image.open(tmp_path / "aligned-0.png"))).all()  # small ones lose nothing
    assert (images[0]["width"], images[0]["height"]) == ("24", "16")
    changes = [float(x) for x in re.findall(r"scene ([+-][\d.]+)</span>", page)]
    wins, rest = changes[:2], changes[2:4]
    assert wins == [0.4, 0.3] and rest == sorted(rest, reverse=True) and changes[-2:] == [-0.1, -0.4]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 40])
def test_the_number_of_pictures_is_a_limit(tmp_path: Path, count: int) -> None:
    reader = Reader(as_html(comparison_of(tmp_path, {"aligned": GAINS}), pictures=count))
    assert len(reader.all("article")) == min(count, 6) and len(reader.all("img")) == 2 * min(count, 6)


def test_pictures_beyond_the_bytes_are_left_out_and_counted(tmp_path: Path, monkeypatch) -> None:
    comparison = comparison_of(tmp_path, {"aligned": GAINS})
    whole = as_html(comparison, pictures=6)
    sizes = [len(a["src"]) for a in Reader(whole).all("img")]
    monkeypatch.setattr(html, "MOST_BYTES", sum(sizes[:4]))
    page = as_html(comparison, pictures=6)
    shown = [len(a["src"]) for a in Reader(page).all("img")]
    assert 0 < sum(shown) <= sum(sizes[:4]) and len(shown) < 12
    assert f"{6 - len(shown) // 2} more were chosen and left out" in page


def test_large_pictures_become_thumbnails(tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path, {"aligned": GAINS})
    rng = np.random.default_rng(1)
    for name in ("base", "aligned"):
        for k in range(6):  # noise: what compresses worst
            pixels = rng.integers(0, 255, (300, 600, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{name}-{k}.png")
    page = as_html(comparison, pictures=6)
    assert {picture.size for picture in pictures_of(page)} == {(thumbnails.SIDE, thumbnails.SIDE // 2)}
    assert len(page) < 700_000


def test_a_broken_picture_has_its_place(tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path, {"aligned": GAINS})
    (tmp_path / "aligned-0.png").write_bytes(b"no picture")
    page = as_html(comparison, pictures=6)
    assert len(Reader(page).all("img")) == 11 and page.count("cannot be read") == 1


def test_words_of_others_stay_words(tmp_path: Path) -> None:
    entry = {"value": 0.5, "scale": EVIL, "version": EVIL}
    scores = {EVIL: entry}
    words = {"prompt": lambda k: f"{EVIL} {k}", "scores": scores, "meta": lambda k: {EVIL: f"{EVIL}{k % 2}"}}
    comparison = comparison_of(tmp_path, {EVIL: GAINS}, **words)
    comparison.origins["base"].manifests["score"] = {"stage": "score", "scorers": {EVIL: entry}, EVIL: EVIL}
    page = as_html(comparison, pictures=6)
    reader = Reader(page)
    assert len(reader.all("script")) == 1 and all(a["src"].startswith("data:") for a in reader.all("img"))
    assert EVIL in "".join(reader.words)
    assert reader.all("img")[0]["alt"].startswith(f"base: {EVIL}")
    text = as_markdown(comparison)
    assert "<script" not in text.replace("\\<script", "") and "](http" not in text.replace("\\](http", "")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "style" not in line]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (3, 5, 6, 8) for row in rows)


def test_the_browser_runs_no_script_but_the_page_s_own(tmp_path: Path) -> None:
    page = as_html(comparison_of(tmp_path, {"aligned": GAINS}), pictures=1)
    policy = next(a["content"] for a in Reader(page).all("meta") if a.get("http-equiv"))
    for tag, key in (("script", "script-src"), ("style", "style-src")):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{key} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert not re.search(r'\s(style|on\w+)="', page)  # the policy would switch them off


def test_several_models_stand_in_one_page(tmp_path: Path) -> None:
    other = [0.6, 0.7, 0.6, 0.6, 0.6, 0.6]
    comparison = comparison_of(tmp_path, {"dpo": GAINS, "mapo": other})
    reader = Reader(as_html(comparison, pictures=3))
    text = " ".join(reader.words)
    assert "All against all" in text and "Ratings by scene" in text and "dpo, mapo against base" in text
    assert "mapo over base" in text  # it won every time: how much better it is, is not known
    assert len(reader.all("img")) == 3 * 3
    assert [a["alt"].split(":")[0] for a in reader.all("img")[:3]] == ["base", "dpo", "mapo"]
    assert comparison.gains() == pytest.approx([0.25, 0.25, 0.15, 0.05, 0, -0.15])
    written = as_markdown(comparison)
    assert "| mapo | 100.0 % [100.0, 100.0] |" in written and "mapo over base" in written


def test_the_verdict_says_whether_the_interval_does(tmp_path: Path) -> None:
    def said(values: list[float | None]) -> str:
        return verdict("a", comparison_of(tmp_path, {"a": values}).reports["a"])[0]

    assert said([0.9] * 10).startswith("a beats base by scene: win rate 100.0 %")
    assert said([0.1] * 10).startswith("a loses to base by scene: win rate 0.0 %")
    assert said([0.9, 0.1] * 5).startswith("a and base cannot be told apart by scene: win rate 50.0 %")
    assert said([0.9] * 9).startswith("a and base cannot be told apart by scene on fewer than 10 prompts: ")


def test_colours_say_what_the_intervals_say(tmp_path: Path) -> None:
    def kinds(values: list[float | None], **row: object) -> list[str | None]:
        found = Reader(as_html(comparison_of(tmp_path, {"a": values}, **row), pictures=0)).all("div")
        return [
            (a.get("class") or "").split()[1] for a in found if (a.get("class") or "").startswith("tile ")
        ][:2]

    assert kinds([0.9] * 10) == ["better"] * 2 and kinds([0.1] * 10) == ["worse"] * 2
    assert kinds([0.9, 0.1] * 5) == ["open"] * 2 and kinds([0.9] * 9) == ["open"] * 2


def test_scorers_that_only_some_models_have_are_not_what_pictures_are_chosen_by(tmp_path: Path) -> None:
    one, two = (comparison_of(tmp_path, {name: GAINS}) for name in ("dpo", "mapo"))
    extra = one.reports["dpo"].rewards
    both = Comparison(
        {"dpo": replace(one.reports["dpo"], rewards={"only": extra["scene"], **extra}), **two.reports},
        {**one.pairs, **two.pairs},
    )
    assert both.scorers == ["scene"] and Reader(as_html(both, pictures=2)).all("img")
    with pytest.raises(UserError, match="dpo, mapo have no scorer in common: score all with one"):
        replace(
            both,
            reports={"dpo": replace(one.reports["dpo"], rewards={"only": extra["scene"]}), **two.reports},
        )


def test_markdown_by_hand(tmp_path: Path) -> None:
    text = as_markdown(comparison_of(tmp_path, {"aligned": GAINS}))
    assert text.startswith("# Comparison with base\n\n- aligned and base cannot be told apart by scene on ")
    assert re.search(r"^\| scene \(share\) \| 58\.3 % \[.*\] \| 3/1/2 \|", text, re.MULTILINE)
    assert "## aligned by style" in text and "| anime | 3 (few) | 3 | 50.0 % [" in text
    assert "- note: embedding distance and diversity are not measured" in text


def test_the_parts_of_the_page_are_in_the_package() -> None:
    assert {path.name for path in html.PARTS.iterdir()} == {"report.html", "report.css", "report.js"}


def test_words_run_their_own_way_and_many_of_them_wrap(tmp_path: Path) -> None:
    arabic = "\u0642\u0637\u0629 (3)!"
    style = {"style": arabic}
    comparison = comparison_of(
        tmp_path,
        {"aligned": GAINS},
        prompt=lambda k: f"{arabic} {k}",
        meta=lambda k: style if k % 2 else {"style": "x" * 200},
    )
    page = as_html(comparison, pictures=6)
    assert page.count('<p class="prompt" dir="auto">') == 6
    assert f'<th scope="row"><bdi>{arabic}</bdi></th>' in page
