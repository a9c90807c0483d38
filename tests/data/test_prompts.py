"""Prompts from texts and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.common.errors import UserError
from diffalign.data.prompts import Prompt, load_prompts


def file(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_literal_text_and_a_list() -> None:
    assert load_prompts("a cat, sitting. v1.txt style") == [
        Prompt("prompt-00000", "a cat, sitting. v1.txt style")
    ]
    assert load_prompts(["a", "b", "a"]) == [
        Prompt("prompt-00000", "a"),
        Prompt("prompt-00001", "b"),
        Prompt("prompt-00002", "a"),
    ]


def test_a_literal_may_be_called_like_a_folder_or_be_very_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat").mkdir()
    assert load_prompts("cat")[0].text == "cat"
    assert load_prompts("x" * 5000)[0].text == "x" * 5000


def test_text_file_keeps_duplicates_under_different_ids_and_skips_blank_lines(tmp_path: Path) -> None:
    path = file(tmp_path / "my list.txt", "\ufeffa cat\r\n\n  a dog \na cat\n")
    assert load_prompts(path) == [
        Prompt("my_list-00000", "a cat"),
        Prompt("my_list-00001", "a dog"),
        Prompt("my_list-00002", "a cat"),
    ]
    assert [prompt.text for prompt in load_prompts(path, limit=2)] == ["a cat", "a dog"]


def test_tsv_as_partiprompts_publishes_it(tmp_path: Path) -> None:
    path = file(
        tmp_path / "Parti.tsv",
        'Prompt\tCategory\tNote\nthe words "Fly" on a wall\tOutdoor\t"Odd\n"Quoted" start\tWorld\t\n',
    )
    assert load_prompts(path) == [
        Prompt("Parti-00000", 'the words "Fly" on a wall', {"Category": "Outdoor", "Note": '"Odd'}),
        Prompt("Parti-00001", '"Quoted" start', {"Category": "World", "Note": ""}),
    ]


def test_csv_with_quotes_commas_and_line_ends_in_a_cell(tmp_path: Path) -> None:
    path = file(tmp_path / "p.csv", 'id,caption,kind\n7,"a cat, ""Tom""\nby night",x\n8,a dog,y\n')
    assert load_prompts(path) == [
        Prompt("7", 'a cat, "Tom"\nby night', {"id": "7", "kind": "x"}),
        Prompt("8", "a dog", {"id": "8", "kind": "y"}),
    ]


def test_jsonl_keeps_the_other_fields_as_meta(tmp_path: Path) -> None:
    rows = [
        {"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "two benches"},
        {"tag": "single", "prompt": "a cow"},
    ]
    path = file(tmp_path / "g.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    assert load_prompts(path) == [
        Prompt("g-00000", "two benches", {"tag": "counting", "include": [{"class": "bench", "count": 2}]}),
        Prompt("g-00001", "a cow", {"tag": "single"}),
    ]


def test_json_lists_of_objects_and_of_texts(tmp_path: Path) -> None:
    objects = file(tmp_path / "o.json", '[{"id": "005-7", "prompt": "a"}, {"id": "005-8", "prompt": "a"}]')
    assert [prompt.id for prompt in load_prompts(objects)] == ["005-7", "005-8"]
    texts = file(tmp_path / "t.json", '["a", "b"]')
    assert [prompt.text for prompt in load_prompts(texts)] == ["a", "b"]


@pytest.mark.parametrize("own", ['["x", "x"]', '["../up", "b"]', '["", "b"]', '["a b", "c"]', '["..", "b"]'])
def test_ids_that_repeat_or_cannot_be_file_names_are_replaced(tmp_path: Path, own: str) -> None:
    rows = [{"id": name, "prompt": "p"} for name in json.loads(own)]
    path = file(tmp_path / "o.json", json.dumps(rows))
    assert [prompt.id for prompt in load_prompts(path)] == ["o-00000", "o-00001"]


def test_column_is_found_whatever_its_case_and_can_be_chosen(tmp_path: Path) -> None:
    path = file(tmp_path / "p.tsv", "Prompt\tcaption\nlong\tshort\n")
    with pytest.raises(
        UserError, match=r"columns Prompt and caption could both be the prompt; choose with column="
    ):
        load_prompts(path)
    assert load_prompts(path, column="caption") == [Prompt("p-00000", "short", {"Prompt": "long"})]
    assert load_prompts(path, column="PROMPT")[0].text == "long"
    with pytest.raises(UserError, match=r"unknown column of p\.tsv 'captoin': did you mean 'caption'"):
        load_prompts(path, column="captoin")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.tsv", "a\tb\n1\t2\n", r"no column is called prompt; choose with column= one of a, b"),
        ("p.tsv", "prompt\tb\nx\t1\t2\n", r"p\.tsv:2 has 3 cells, the header names 2 columns"),
        ("p.tsv", "prompt\tb\n\t1\n", r"p\.tsv:2: 'prompt' is '', expected a prompt"),
        ("p.tsv", "prompt\tprompt\n", "two columns have the same name"),
        ("p.csv", 'prompt\n"open\n', r"p\.csv:2: "),
        ("p.csv", "prompt\n", "holds no prompt"),
        ("p.txt", "\n\n", "holds no prompt"),
        ("p.json", '{"prompt": "x"}', "expected a list of prompts, found dict"),
        ("p.json", "[", "is not JSON"),
        ("p.json", '[{"prompt": "x"}, 3]', r"p\.json\[1\]: expected a text or an object, found int"),
        ("p.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', r"p\.jsonl:2: 'prompt' is None"),
        ("p.jsonl", '{"prompt": "x"}\n{broken\n', r"p\.jsonl:2 is not JSON"),
        ("p.yaml", "- x\n", r"unknown kind of file '\.yaml', known: \.csv"),
    ],
)
def test_files_that_are_no_prompts(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(file(tmp_path / name, text))
    assert "\n" not in str(caught.value)


def test_a_single_word_is_a_prompt_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert [prompt.text for prompt in load_prompts("promts")] == ["promts"]
    assert "prompts=promts: no such file, so this word is the prompt" in capsys.readouterr().err
    load_prompts("two words")
    assert capsys.readouterr().err == ""


def test_a_file_that_is_not_there_is_no_literal_prompt(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"catz\.tsv: no such file"):
        load_prompts(str(tmp_path / "catz.tsv"))
    with pytest.raises(UserError, match="is a folder"):
        load_prompts(str(tmp_path))


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 3\)"):
        load_prompts(str(tmp_path / "p.txt"))


def test_nothing_asked() -> None:
    with pytest.raises(UserError, match="limit=0"):
        load_prompts("a cat", limit=0)
    with pytest.raises(UserError, match="list of prompts is empty"):
        load_prompts([])
    with pytest.raises(UserError, match="prompt 1 is ' '"):
        load_prompts(["a", " "])


PUBLISHED = Path(__file__).parents[2] / ".." / "shared" / "data" / "prompts"


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published prompt sets are not here")
@pytest.mark.parametrize(
    ("name", "count", "text"),
    [
        ("PartiPrompts.tsv", 1632, "bond"),
        ("geneval_metadata.jsonl", 553, "a photo of a bench"),
        ("hpsv2.json", 3200, "Spongebob depicted in the style of Dragon Ball Z."),
        ("imagereward_benchmark.json", 100, "a concept art of a vehicle, cyberpunk"),
        ("t2i_compbench/color_val.txt", 300, "a green bench and a blue bowl"),
    ],
)
def test_published_sets_as_they_are(name: str, count: int, text: str) -> None:
    prompts = load_prompts(str(PUBLISHED / name))
    assert len(prompts) == len({prompt.id for prompt in prompts}) == count
    assert prompts[0].text == text
