"""What every data source promises, asked of every plug-in found.

A source's own test file gives the case: `contract_case(folder) -> options`, keys of `Plugin` for data with at
least three usable records that it writes into `folder`, all in files.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from diffalign.common.errors import UserError
from diffalign.common.manifest import identities
from diffalign.common.plugins import get, names, plugin_name
from diffalign.data.records import Record
from diffalign.data.sources._base import Source

HEAVY = ("torch", "numpy", "pyarrow", "datasets", "transformers", "pandas")


def _tests_of(name: str) -> ModuleType:
    path = Path(__file__).with_name(f"test_{name}.py")
    assert path.is_file(), f"data source {name} needs {path.name} with contract_case(folder)"
    spec = importlib.util.spec_from_file_location(f"contract_case_of_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=names("data.sources"))
def case(request, tmp_path):
    """Name, plug-in, options, and the records that it has to read."""
    plugin = get("data.sources", request.param)
    options = _tests_of(request.param).contract_case(tmp_path / "data")
    return request.param, plugin, options, list(plugin(**options).records())


def one_line(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_some_sources_are_found():
    assert {"pickapic", "jsonl", "hpd", "folder"} <= set(names("data.sources"))


def test_finding_and_making_them_is_cheap():
    """No library that takes long to import, and nothing is looked for: there is no such path."""
    program = (
        "import sys; from diffalign.common.plugins import get, names\n"
        "for name in names('data.sources'): get('data.sources', name)(path='nowhere')\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_it_is_a_source_with_the_common_keys_and_its_own_explained(case):
    name, plugin, _, _ = case
    assert issubclass(plugin, Source) and dataclasses.is_dataclass(plugin) and plugin_name(plugin) == name
    common = [field.name for field in dataclasses.fields(Source)]
    keys = [field.name for field in dataclasses.fields(plugin)]
    assert keys[: len(common)] == common
    said = "".join(base.__doc__ or "" for base in plugin.__mro__)
    assert [key for key in keys if f"  {key}: " not in said] == []


def test_every_record_has_its_own_id_and_a_prompt_and_pictures(case):
    name, _, _, records = case
    assert len(records) >= 3 and all(isinstance(record, Record) for record in records)
    assert len({record.id for record in records}) == len(records)
    for record in records:
        assert record.id and record.id.isprintable() and record.problem is None
        assert record.prompt.strip() and len(record.candidates) >= 2
        assert name == "jsonl" or record.source == name
        for candidate in record.candidates:
            assert min(candidate.image.open().size) >= 8 and candidate.image.name


def test_pairs_have_labels_and_lists_have_ranks(case):
    _, plugin, options, records = case
    for record in records:
        if len(record.candidates) == 2:
            assert record.pair_target() is not None
        else:
            assert all(isinstance(candidate.rank, float | int) for candidate in record.candidates)
    unit = "pair" if all(len(record.candidates) == 2 for record in records) else "list"
    groups = plugin(**options, ties="soft" if unit == "pair" else "drop").usable(unit=unit)
    assert len(list(groups)) == groups.tally.used == len(records) and groups.tally.dropped == {}


def test_reading_twice_gives_equal_records(case):
    _, plugin, options, records = case
    source = plugin(**options)
    assert list(source.records()) == list(source.records()) == records


def test_size_is_right_or_unknown(case):
    _, plugin, options, records = case
    assert plugin(**options).size() in (None, len(records))
    assert plugin(**options, limit=2).size() in (None, 2)


def test_captions_are_those_of_the_records_or_unknown(case, tmp_path):
    """With a limit, and with a subset too: what is counted over them bounds what is kept of the records."""
    _, plugin, options, records = case
    chosen = records[-1].prompt
    (tmp_path / "captions.txt").write_text(f"{chosen}\n")
    for more, wanted in (
        ({}, records),
        ({"limit": 2}, records[:2]),
        ({"prompts": str(tmp_path / "captions.txt")}, [one for one in records if one.prompt == chosen]),
    ):
        found = plugin(**options, **more).captions()
        assert found is None or list(found) == [record.prompt for record in wanted]


def test_limit_and_the_subset_by_prompt(case, tmp_path):
    _, plugin, options, records = case
    assert list(plugin(**options, limit=2).records()) == records[:2]
    chosen = records[-1].prompt
    (tmp_path / "captions.txt").write_text(f"{chosen}\n")
    subset = {**options, "prompts": str(tmp_path / "captions.txt")}
    assert list(plugin(**subset).records()) == [record for record in records if record.prompt == chosen]
    (tmp_path / "captions.txt").write_text("nobody wrote this\n")
    assert "has no rows with a caption of data.prompts=" in one_line(lambda: list(plugin(**subset).records()))


def test_inputs_name_the_files_and_change_with_them(case, tmp_path):
    _, plugin, options, _ = case
    source = plugin(**options)
    files = source.files()
    assert files and all(isinstance(path, Path) and path.is_file() for path in files)
    before = identities(source.inputs())
    assert before and identities(plugin(**options).inputs()) == before
    (tmp_path / "captions.txt").write_text(f"{next(source.records()).prompt}\n")
    assert identities(plugin(**options, prompts=str(tmp_path / "captions.txt")).inputs()) != before
    with files[-1].open("ab") as stream:
        stream.write(b"\n")
    assert identities(plugin(**options).inputs()) != before


def test_inputs_change_with_a_picture(case):
    """A run that was stopped may not go on with another picture under the same name."""
    _, plugin, options, records = case
    path = records[0].candidates[0].image.path
    if path is None:
        pytest.skip("the pictures are inside the files")
    before = identities(plugin(**options).inputs())
    path.write_bytes(path.read_bytes() + b"\0")
    changed = identities(plugin(**options).inputs())
    path.unlink()
    assert before != changed != identities(plugin(**options).inputs())


def test_a_missing_path_is_one_line_that_names_it(case, tmp_path):
    _, plugin, options, _ = case
    gone = str(tmp_path / "gone")
    assert gone in one_line(lambda: list(plugin(**{**options, "path": gone}).records()))
    assert "data.path is empty" in one_line(lambda: plugin(**{**options, "path": " "}))


def test_other_files_are_refused_in_one_line(case, tmp_path):
    """An empty folder, a folder of other things, and an empty or a foreign file in the place of the data."""
    _, plugin, options, _ = case
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.md").write_text("words")
    for place in ("empty", "other"):
        one_line(lambda: list(plugin(**{**options, "path": str(tmp_path / place)}).records()))  # noqa: B023
    for content in (b"", b"words", b"{}", b"[1, 2]", b"\x80\xff" * 999):
        foreign = tmp_path / f"foreign{Path(options['path']).suffix}"
        foreign.write_bytes(content)
        text = one_line(lambda: list(plugin(**{**options, "path": str(foreign)}).records()))  # noqa: B023
        assert "foreign" in text


def test_wrong_values_of_the_common_keys_are_refused(case):
    _, plugin, options, _ = case
    for key, value in (("limit", 0), ("ties", "coin"), ("max_bad_share", 1.5)):
        assert key in one_line(lambda: plugin(**{**options, key: value}))  # noqa: B023
