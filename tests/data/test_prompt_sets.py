"""Published prompt sets by name: read, fetched, checked. The server is one of this machine."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from diffalign.common._values import from_text
from diffalign.common.errors import UserError
from diffalign.data import prompt_sets
from diffalign.data.prompt_sets import SETS, PromptSet
from diffalign.data.prompts import Prompt, load_prompts, prompt_file
from diffalign.stages._image_rows import context_of

ROOT = Path(__file__).parents[2]

GENEVAL = [
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}]},
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}]},
]
STYLED = {"gen_image_path": "", "raw_image_path": "", "metadata": {}}
CONTENT: dict[str, dict[str, str]] = {
    "parti": {"PartiPrompts.tsv": 'Prompt\tCategory\tChallenge\tNote\nthe word "a"\tArts\tBasic\t\n'},
    "hpsv2": {"hpsv2.json": json.dumps([{"prompt": f"p{i}", **STYLED} for i in range(8)])},
    "geneval": {
        "evaluation_metadata.jsonl": "".join(json.dumps({**row, "prompt": "x"}) + "\n" for row in GENEVAL)
    },
    "t2i_compbench": {"color_val.txt": "a red cup\na blue cup\n", "3d_spatial_val.txt": "a cup in front\n"},
    "imagereward": {"benchmark-prompts.json": json.dumps([{"id": "005-7", "prompt": "a cup"}])},
}
"""Files of the published layouts, smaller."""


class Handler(BaseHTTPRequestHandler):
    """Serves `answers`: path -> bytes, or (bytes, the length that is announced)."""

    def __init__(self, answers: dict[str, Any], asked: list[str], *rest: Any) -> None:
        self.answers, self.asked = answers, asked
        super().__init__(*rest)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        time.sleep(self.answers.get("wait", 0.0))
        answer = self.answers.get(self.path)
        if answer is None:
            self.send_error(404)
            return
        content, length = answer if isinstance(answer, tuple) else (answer, len(answer))
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The published sets, served small; yields what is served and what was asked for."""
    answers = {f"/{name}/{file}": text.encode() for name, of in CONTENT.items() for file, text in of.items()}
    asked: list[str] = []
    running = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, answers, asked))  # type: ignore[arg-type]
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv(prompt_sets.CACHE_VARIABLE, str(tmp_path / "cache"))
    for name, of in CONTENT.items():
        small = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in of.items()}
        base = f"http://127.0.0.1:{running.server_port}/{name}"
        monkeypatch.setitem(SETS, name, with_files(SETS[name], base, small))
    yield answers, asked
    running.shutdown()
    running.server_close()
    thread.join()


def with_files(known: PromptSet, base: str, small: dict[str, str]) -> PromptSet:
    fields = {**known.__dict__, "base": base, "files": small}
    return PromptSet(**fields)


def test_each_set_keeps_what_its_protocol_needs(server: Any) -> None:
    assert load_prompts("parti") == [
        Prompt("PartiPrompts-00000", 'the word "a"', {"Category": "Arts", "Challenge": "Basic", "Note": ""})
    ]
    styles = [prompt.meta for prompt in load_prompts("hpsv2")]
    order = ["anime", "concept-art", "paintings", "photo"]
    assert styles == [{"style": style} for style in order for _ in range(2)]
    assert load_prompts("t2i_compbench") == [
        Prompt("color_val-00000", "a red cup", {"category": "color"}),
        Prompt("color_val-00001", "a blue cup", {"category": "color"}),
        Prompt("3d_spatial_val-00000", "a cup in front", {"category": "3d_spatial"}),
    ]
    assert load_prompts("imagereward") == [Prompt("005-7", "a cup", {"id": "005-7"})]
    assert [prompt.text for prompt in load_prompts("hpsv2", limit=3)] == ["p0", "p1", "p2"]


def test_of_geneval_the_meta_is_the_scorers_context(server: Any, tmp_path: Path) -> None:
    found = [context_of({"meta": prompt.meta}, tmp_path, needed=True) for prompt in load_prompts("geneval")]
    assert found == GENEVAL


def test_a_path_in_each_layout_gives_the_same_prompts_and_ids(server: Any, tmp_path: Path) -> None:
    """So that pictures of one can be compared with pictures of the other."""
    for name, of in CONTENT.items():
        by_name = [(prompt.id, prompt.text) for prompt in load_prompts(name)]
        by_path = []
        for file, text in of.items():
            (tmp_path / file).write_text(text)
            by_path += [(prompt.id, prompt.text) for prompt in load_prompts(str(tmp_path / file))]
        assert by_name == by_path


def test_it_is_fetched_once_and_named_as_input(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache" / "prompts"
    for _ in range(2):
        load_prompts("t2i_compbench")
        assert prompt_file("t2i_compbench") == folder / "t2i_compbench"
        assert prompt_file("parti") == folder / "parti" / "PartiPrompts.tsv"
    assert sorted(server[1]) == [
        "/parti/PartiPrompts.tsv",
        "/t2i_compbench/3d_spatial_val.txt",
        "/t2i_compbench/color_val.txt",
    ]
    said = (
        "prompts=t2i_compbench: T2I-CompBench++, 3 prompts (MIT), by its protocol with 10 pictures each; the"
    )
    assert f"{said} word itself would be prompts=[t2i_compbench]" in capsys.readouterr().err


def test_the_word_itself_is_a_list(server: Any) -> None:
    given = from_text(str | list[str], "[parti]")
    assert load_prompts(given) == [Prompt("prompt-00000", "parti")] and server[1] == []


def test_a_file_of_that_name_comes_first(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parti").write_text("a cup\n")
    with pytest.raises(UserError, match="prompts=parti: unknown kind of file"):
        load_prompts("parti")
    (tmp_path / "parti").unlink()
    (tmp_path / "parti").mkdir()
    assert load_prompts("parti")[0].text == 'the word "a"'


@pytest.mark.parametrize(
    ("word", "meant"),
    [("genevl", "geneval"), ("PartiPrompts", "parti"), ("t2i-compbench", "t2i_compbench"), ("cat", None)],
)
def test_a_mistyped_name_suggests_the_nearest(
    word: str, meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_prompts(word)[0].text == word
    said = capsys.readouterr().err
    assert (f"(did you mean '{meant}'?)" in said) if meant else ("did you mean" not in said)


def refused(name: str, folder: Path) -> str:
    """The one line that says why; nothing is left behind."""
    with pytest.raises(UserError) as caught:
        load_prompts(name)
    assert not [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_bytes_are_refused(server: Any, tmp_path: Path) -> None:
    answers, _ = server
    right = answers["/hpsv2/hpsv2.json"]
    answers["/hpsv2/hpsv2.json"] = right.replace(b"p0", b"q0")
    message = refused("hpsv2", tmp_path / "cache")
    assert f"gave {len(right)} bytes that are not the published file" in message and "try again" in message
    answers["/hpsv2/hpsv2.json"] = right
    assert len(load_prompts("hpsv2")) == 8


def test_a_body_that_is_cut_is_refused(server: Any, tmp_path: Path) -> None:
    answers, _ = server
    right = answers["/parti/PartiPrompts.tsv"]
    answers["/parti/PartiPrompts.tsv"] = (right[:-3], len(right))
    message = refused("parti", tmp_path / "cache")
    assert "PartiPrompts.tsv cannot be fetched (IncompleteRead(" in message


def test_without_a_network_it_says_what_to_fetch_where(server: Any, tmp_path: Path) -> None:
    answers, _ = server
    del answers["/t2i_compbench/3d_spatial_val.txt"]
    folder = tmp_path / "cache" / "prompts" / "t2i_compbench"
    with pytest.raises(UserError, match=r"3d_spatial_val\.txt cannot be fetched \(HTTP Error 404") as caught:
        load_prompts("t2i_compbench")
    base = SETS["t2i_compbench"].base
    assert str(caught.value).endswith(f"fetch 3d_spatial_val.txt of {base} yourself and put it into {folder}")
    (folder / "3d_spatial_val.txt").write_text(CONTENT["t2i_compbench"]["3d_spatial_val.txt"])
    assert len(load_prompts("t2i_compbench")) == 3


def test_a_file_that_was_changed_in_the_cache_is_refused(server: Any, tmp_path: Path) -> None:
    load_prompts("parti")
    path = tmp_path / "cache" / "prompts" / "parti" / "PartiPrompts.tsv"
    path.write_text(path.read_text().replace("word", "sword"))
    with pytest.raises(UserError, match=r"PartiPrompts\.tsv is not the file of http.*: remove it"):
        load_prompts("parti")


def test_a_cache_that_cannot_be_written_to(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(prompt_sets.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written to .*: set DIFFALIGN_CACHE to a folder"):
        load_prompts("parti")


def test_two_processes_at_once_fetch_once(server: Any, tmp_path: Path) -> None:
    known = SETS["t2i_compbench"]
    server[0]["wait"] = 0.5  # without the lock both would ask in that time
    program = (
        "from diffalign.data import prompt_sets as sets\n"
        f"sets.SETS['s'] = sets.PromptSet('s', {known.base!r}, {dict(known.files)!r}, 'MIT')\n"
        "from diffalign.data.prompts import load_prompts\n"
        "print(len(load_prompts('s')))\n"
    )
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in both] == ["3\n", "3\n"]
    assert sorted(server[1]) == ["/t2i_compbench/3d_spatial_val.txt", "/t2i_compbench/color_val.txt"]


def test_the_published_sets_are_pinned() -> None:
    """Raw addresses of a commit, and whole digests."""
    for known in SETS.values():
        assert known.base.startswith("https://raw.githubusercontent.com/")
        assert any(len(part) == 40 and int(part, 16) for part in known.base.split("/") if len(part) == 40)
        assert all(len(digest) == 64 and int(digest, 16) for digest in known.files.values())
        assert known.images_per_prompt >= 1 and known.licence in ("MIT", "Apache-2.0")
