"""Length and T5 of the training stand in the file of an adapter; its use under others is said, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from diffalign.common import plugins
from diffalign.models._lora_files import notes_of
from diffalign.models._spec import AdapterSpec

FAMILIES = ("sd3", "flux", "pixart")
LENGTH, OTHER = "model.max_sequence_length=9", "model.max_sequence_length=11"


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(family, folder of its tiny pipeline)."""
    folder = tmp_path_factory.mktemp("base") / request.param
    return request.param, plugins.get("models", request.param).tiny(folder).path  # type: ignore[attr-defined]


def loaded(base: tuple[str, str], length: int = 9, **options: Any) -> Any:
    plugin: Any = plugins.get("models", base[0])
    return plugin(path=base[1], max_sequence_length=length, **options).load()


def trained(base: tuple[str, str], folder: Path, **options: Any) -> str:
    model = loaded(base, **options)
    model.start_training(AdapterSpec(rank=2), seed=0, with_reference=False)
    model.save_adapter(str(folder))
    return str(folder)


def drawn(model: Any, adapter: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The warnings of drawing twice with the adapter."""
    capsys.readouterr()
    model.load_adapter(adapter)
    for _ in range(2):
        model.sample(["a ring"], [0], num_inference_steps=1)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]


def test_another_length_is_said_once_wherever_the_adapter_is_used(
    base: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained(base, tmp_path / "a")
    assert notes_of(adapter)["diffalign_max_sequence_length"] == "9"
    tail = f"under {OTHER}, which {adapter} was not trained under: give {LENGTH}"
    assert drawn(loaded(base), adapter, capsys) == []
    assert drawn(loaded(base, 11), adapter, capsys) == [f"WARNING: pictures are drawn {tail}"]
    for length, lines in ((9, 0), (11, 1)):
        capsys.readouterr()
        loaded(base, length).load_policy(adapter)
        assert capsys.readouterr().err.count(f"WARNING: pairs are judged {tail}\n") == lines
        loaded(base, length).check_training(AdapterSpec(init=adapter))
        assert capsys.readouterr().err.count(f"WARNING: training goes on {tail}\n") == lines
    model = loaded(base, 11)
    model.start_training(AdapterSpec(init=adapter), seed=0, with_reference=False)
    model.sample(["a ring"], [0], num_inference_steps=1)
    assert "WARNING" not in capsys.readouterr().err  # it is this run's adapter now


def test_an_export_says_it_too(
    base: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the training, whatever the exporting recipe says."""
    adapter = trained(base, tmp_path / "a")
    for layout in ("diffusers", "kohya")[: 1 if base[0] == "pixart" else 2]:
        out = tmp_path / layout
        out.mkdir()
        loaded(base, 11).export_adapter(adapter, str(out), layout=layout)
        assert len(drawn(loaded(base, 11), str(out), capsys)) == 1
        assert drawn(loaded(base), str(out), capsys) == []


@pytest.mark.parametrize("note", [None, "nine", "null", "[9]"])
def test_a_file_that_does_not_say_is_taken(
    note: str | None, base: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained(base, tmp_path / "a")
    (file,) = Path(adapter).glob("*.safetensors")
    notes = {key: text for key, text in notes_of(file).items() if not key.startswith("diffalign_")}
    extra = {} if note is None else {"diffalign_max_sequence_length": note}
    save_file(load_file(file), file, {**notes, **extra})
    assert drawn(loaded(base, 11), adapter, capsys) == []


def test_all_that_differs_stands_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ("sd3", plugins.get("models", "sd3").tiny(tmp_path / "base").path)  # type: ignore[attr-defined]
    adapter = trained(base, tmp_path / "a", use_t5=False)
    (line,) = drawn(loaded(base, 11), adapter, capsys)
    assert f"drawn under {OTHER} model.use_t5=true, which {adapter} was not" in line
    assert line.endswith(f": give {LENGTH} model.use_t5=false")
    (line,) = drawn(loaded(base), adapter, capsys)
    assert line.endswith(": give model.use_t5=false")


def test_families_that_always_read_the_same_note_nothing(tiny_sdxl: str, tmp_path: Path) -> None:
    model: Any = plugins.get("models", "sdxl")(path=tiny_sdxl).load()
    model.start_training(AdapterSpec(rank=2), seed=0, with_reference=False)
    model.save_adapter(str(tmp_path))
    assert set(notes_of(tmp_path)) == {"format", "lora_adapter_metadata"}
