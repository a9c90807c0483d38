"""Files are whole or not there, whatever happens to the writer."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from diffalign.common import files
from diffalign.common.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_path_replaces_a_file_and_keeps_its_suffix(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "picture.png"
    with files.atomic_path(target) as temporary:
        assert temporary.suffix == ".png" and temporary.parent == target.parent
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new" and names(target.parent) == ["picture.png"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_path_leaves_the_old_content_after_an_error(tmp_path: Path, error: type) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), files.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_atomic_path_replaces_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    for content in ("first", "second"):
        with files.atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert names(target) == ["second"] and names(tmp_path) == ["checkpoint"]


def test_atomic_path_refuses_to_make_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing was written"), files.atomic_path(tmp_path / "a"):
        pass


def test_leftovers_of_a_killed_writer_can_be_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-0-a.txt").write_text("half")
    (tmp_path / ".tmp-1-folder").mkdir()
    (tmp_path / "kept").write_text("")
    assert files.remove_leftovers(tmp_path) == [".tmp-0-a.txt", ".tmp-1-folder"]
    assert names(tmp_path) == ["kept"]


def test_json_round_trip_of_what_artefacts_hold(tmp_path: Path) -> None:
    @dataclass
    class Point:
        x: float
        path: Path

    value = {
        "point": Point(1.5, Path("a/b")),
        "array": np.array([[1, 2], [3, 4]]),
        "scalar": np.float32(0.5),
        "set": {"b", "a"},
        "bad": [math.nan, math.inf, np.float64("nan")],
        7: "Katze \u2028 \u732b",
    }
    path = files.write_json(tmp_path / "a.json", value)
    assert files.read_json(path) == {
        "point": {"x": 1.5, "path": "a/b"},
        "array": [[1, 2], [3, 4]],
        "scalar": 0.5,
        "set": ["a", "b"],
        "bad": [None, None, None],
        "7": "Katze \u2028 \u732b",
    }
    with pytest.raises(TypeError, match="cannot write a object to JSON"):
        files.write_json(path, object())
    assert files.read_json(path)["scalar"] == 0.5


def test_jsonl_round_trip_and_append(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "line\nbreak \u2028"}, {"n": 2}]
    files.write_jsonl(path, iter(rows))
    files.append_jsonl(path, [{"n": 3}])
    assert files.read_jsonl(path) == [*rows, {"n": 3}]
    assert path.read_bytes().count(b"\n") == 3


def test_torn_tail_is_dropped_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n{"n"')
    with pytest.raises(UserError, match=r"rows\.jsonl:3: not a valid JSON line"):
        files.read_jsonl(path)
    assert files.read_jsonl(path, drop_torn_tail=True) == [{"n": 1}, {"n": 2}]
    assert files.trim_torn_tail(path) == 4
    files.append_jsonl(path, [{"n": 3}])
    assert [row["n"] for row in files.read_jsonl(path)] == [1, 2, 3]
    assert files.trim_torn_tail(path) == 0 and files.trim_torn_tail(tmp_path / "none") == 0


def test_trim_finds_a_line_end_far_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n' + b"x" * 200_000)
    assert files.trim_torn_tail(path) == 200_000
    assert files.read_jsonl(path) == [{"n": 1}]
    path.write_bytes(b"y" * 200_000)
    assert files.trim_torn_tail(path) == 200_000 and path.read_bytes() == b""


def test_bad_input_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n\n[1]\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:3: expected a JSON object, found list"):
        files.read_jsonl(path)
    path.write_text("{\n1}")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not valid JSON"):
        files.read_json(path)
    with pytest.raises(UserError, match="does not exist"):
        files.read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        files.read_json(tmp_path)


def test_identity_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"abc")
    (tmp_path / ".lock").write_bytes(b"")
    whole = {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert files.file_identity(tmp_path / "sub" / "a") == whole
    assert files.file_identity(tmp_path) == {"files": {"sub/a": whole}}
    content = os.urandom(100_001)
    (tmp_path / "big").write_bytes(content)
    tail = hashlib.sha256(content[-65536:]).hexdigest()
    expected = {"size": 100_001, "tail_sha256": tail}
    assert files.file_identity(tmp_path / "big", whole_up_to=100_000) == expected
    small = files.file_identity(tmp_path / "sub" / "a", whole_up_to=0)
    assert small == {"size": 3, "tail_sha256": whole["sha256"]}
    with pytest.raises(UserError, match="does not exist"):
        files.file_identity(tmp_path / "none")


HOLDER = """
import os, sys, time
from diffalign.common.files import folder_lock
with folder_lock(sys.argv[1]):
    if os.fork() == 0:  # like a loader worker that outlives a killed run
        print(os.getpid(), flush=True)  # said by the child: by then it has given its copy back
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


def test_lock_stops_a_second_run_and_dies_with_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(UserError, match="another run is writing to"), files.folder_lock(folder):
            pass
        with pytest.raises(UserError, match="another run is writing to"):
            files.refuse_locked(folder)
        holder.kill()
        holder.wait()
        files.refuse_locked(folder)
        files.refuse_locked(tmp_path / "missing")
        with files.folder_lock(folder), pytest.raises(UserError), files.folder_lock(folder):
            pass
        assert not (tmp_path / "missing").exists()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_json_of_a_row_is_one_line(tmp_path: Path) -> None:
    files.append_jsonl(tmp_path / "a", [{"t": "\n"}])
    assert json.loads((tmp_path / "a").read_text().splitlines()[0]) == {"t": "\n"}


def test_half_a_character_is_refused_before_anything_is_made_of_it(tmp_path: Path) -> None:
    """JSON spells one half of a surrogate pair, UTF-8 has none; both halves together are one character."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a \\ud83d\\ude00"}\n{"prompt": "\\\\ud800"}\n')
    assert [row["prompt"] for row in files.read_jsonl(path)] == ["a \U0001f600", "\\ud800"]
    path.write_text('{"prompt": "a cat"}\n{"meta": ["\\uD800"]}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: a text holds half a character \(\\ud800\)"):
        files.read_jsonl(path)
