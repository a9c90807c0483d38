"""A signature becomes a recipe: every way of writing a value, and every mistake in one line."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

import diffalign.objectives
import diffalign.scorers
from diffalign.common.config import (
    Many,
    One,
    Recipe,
    load_recipe,
    make_many,
    make_one,
    resolved_recipe,
)
from diffalign.common.errors import UserError
from diffalign.common.helptext import help_rows

LOSS = '''
from dataclasses import dataclass, field
from typing import Literal
aliases = ("short_name",)
@dataclass
class Plugin:
    """A loss.

    Attributes:
        beta: how strong
            it is.
    """
    beta: float = 2.0
    form: Literal["code", "paper"] = "code"
    made: int = field(default=0, init=False)
    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta}: must be positive")
'''
OTHER = """
from dataclasses import dataclass
@dataclass
class Plugin:
    gamma: float = 10.0
"""
SCORER = """
from dataclasses import dataclass
@dataclass
class Plugin:
    path: str
    version: str = "1"
"""
PLAIN = """
from dataclasses import dataclass
@dataclass
class Plugin:
    scale: str = "share"
"""


@pytest.fixture(autouse=True)
def _test_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Objectives `t_loss` and `t_other` and scorers `t_clip` and `t_plain`, forgotten after the test."""
    modules = {
        diffalign.objectives: {"t_loss": LOSS, "t_other": OTHER},
        diffalign.scorers: {"t_clip": SCORER, "t_plain": PLAIN},
    }
    for package, sources in modules.items():
        folder = tmp_path / package.__name__
        folder.mkdir()
        for name, source in sources.items():
            (folder / f"{name}.py").write_text(source)
        path = [*package.__path__, str(folder)]
        monkeypatch.setattr(package, "__path__", path)
        monkeypatch.setattr(package.__spec__, "submodule_search_locations", path)
    yield
    for name in [name for name in sys.modules if name.rsplit(".", 1)[-1].startswith("t_")]:
        del sys.modules[name]


@dataclasses.dataclass
class Adapter:
    """How the adapter looks.

    Attributes:
        rank: its rank.
    """

    rank: int = 4
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")


def stage(  # noqa: D417 (a key without a note is allowed)
    *,
    out: str,
    objective: Annotated[Any, One("objectives")] = "t_loss",
    judge: Annotated[Any, One("objectives")] | None = None,
    scorers: Annotated[dict[str, Any], Many("scorers")] = ("t_plain",),  # type: ignore[assignment]
    adapter: Adapter | None = None,
    start: Adapter = Adapter(rank=5),  # noqa: B008 (how a stage gives a section other defaults)
    text: str = "x",
    prompts: str | list[str] = "a cat",
    mode: Literal["images", "implicit"] = "images",
    seeds: list[int] = [0],  # noqa: B006 (read only)
    lr: float = 1e-4,
    limit: int | None = None,
    quick: bool = False,
    weights: dict[str, float] = {},  # noqa: B006 (read only)
    folder: Path | None = None,
    size: tuple[int, int] = (64, 64),
    number: int | str = 1,
) -> None:
    """Does nothing.

    Args:
        out: the folder.
        objective: the loss.
    """


def load(*words: str, yaml: str | None = None, tmp_path: Path | None = None) -> Recipe:
    file = None
    if yaml is not None:
        assert tmp_path is not None
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml, encoding="utf-8")
    return load_recipe(stage, file, ["out=o", *words] if yaml is None else words)


def test_defaults_become_arguments() -> None:
    arguments = load().arguments
    assert arguments["out"] == "o" and arguments["seeds"] == [0] and arguments["size"] == (64, 64)
    assert type(arguments["objective"]).__module__ == "diffalign.objectives.t_loss"
    assert arguments["objective"].beta == 2.0 and arguments["judge"] is None
    assert list(arguments["scorers"]) == ["t_plain"] and arguments["scorers"]["t_plain"].scale == "share"
    assert arguments["adapter"] is None and arguments["start"] == Adapter(rank=5)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "off",
            "0123",
            "a: b",
            "null",
            "~",
            "1e-5",
            "[x",
            "{a: 1}",
            "# no comment",
            " spaced ",
            "a=b",
            "'q'",
        ),
        *("${oc.env:HOME}", r"\${x}", "a\\", r"${a} \\ ${b}\\", "\\\\${", "tab\there", "x,y", "\u732b"),
    ],
)
def test_a_text_stays_as_typed(text: str) -> None:
    assert load(f"text={text}").arguments["text"] == text
    assert load(f"prompts={text}").arguments["prompts"] == text


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("limit=5", 5),
        ("limit=null", None),
        ("lr=1e-5", 1e-5),
        ("lr=3", 3.0),
        ("lr=inf", float("inf")),
        ("quick=true", True),
        ("quick=off", False),
        ("quick=1", True),
        ("mode=implicit", "implicit"),
        ("seeds=7", [7]),
        ("seeds=[1, 2]", [1, 2]),
        ("seeds=", []),
        ("prompts=[a, off, 0123, 'b, c']", ["a", "off", "0123", "b, c"]),
        ("prompts=[masterpiece] a cat", "[masterpiece] a cat"),
        ("weights={a: 1, b: 2e-1}", {"a": 1.0, "b": 0.2}),
        ("weights.a=3", {"a": 3.0}),
        ("folder=some/where", Path("some/where")),
        ("size=[1, 2]", (1, 2)),
        ("number=5", 5),
        ("number=five", "five"),
        ("adapter.rank=8", Adapter(rank=8)),
        ("adapter={rank: 8, targets: [off, 01]}", Adapter(8, ["off", "01"])),
        ("adapter={}", Adapter()),
        ("start.targets=[q, k]", Adapter(5, ["q", "k"])),
    ],
)
def test_words_are_read_by_their_type(word: str, value: Any) -> None:
    found = load(word).arguments[word.partition("=")[0].partition(".")[0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("limit=5.5", "limit=5.5: expected a whole number, found '5.5'"),
        ("lr=abc", "lr=abc: expected a number, found 'abc'"),
        ("lr=nan", "lr=nan: expected a number, found 'nan'"),
        ("quick=maybe", "quick=maybe: expected true or false, found 'maybe'"),
        ("mode=imags", "mode=imags: expected one of images, implicit, found 'imags': did you mean 'images'?"),
        ("seeds=[1, x]", "seeds=[1, x]: expected a whole number, found 'x'"),
        ("seeds=[1", "seeds=[1: expected a list [int, ...] (in YAML's notation), found '[1'"),
        ("seeds.0=1", "seeds.0=1: seeds has no keys below it: set seeds=..."),
        ("size=[1, 2, 3]", "size: expected 2 values, found '[1, 2, 3]'"),
        ("weights.a=x", "weights.a=x: expected a number, found 'x'"),
        ("adapter=5", "adapter=5: expected a mapping {key: value}, found '5'"),
        ("adapter.rank=0", "adapter: rank=0: must be at least 1"),
        ("start.rnk=1", "unknown key of start 'rnk': did you mean 'rank'? known: rank, targets"),
        ("objective.beta=-1", "objective: beta=-1.0: must be positive"),
        ("objective.bta=1", "unknown key of objective t_loss 'bta': did you mean 'beta'? known: beta, form"),
        ("objective.made=1", "unknown key of objective t_loss 'made': known: beta, form"),
        ("objective.gamma=1", "unknown key of objective t_loss 'gamma': a key of smpo, t_other only; known:"),
        (
            "objective.form=papr",
            "objective.form=papr: expected one of code, paper, found 'papr': did you mean",
        ),
        ("objective=t_los", "unknown objective 't_los': did you mean 't_loss'?"),
        ("objective=null", "objective=null: objective is needed, name one of"),
        ("objective=[t_loss]", "objective=[t_loss]: objective: expected one name, from"),
        ("judge.beta=1", "judge.beta=1: judge is null: name it first, judge=NAME"),
        ("scorers=[t_clipp]", "unknown scorer 't_clipp': did you mean 't_clip'?"),
        (
            "scorers=[t_clip]",
            "stage needs scorers.t_clip.path=PATH (see diffalign stage scorers=t_clip --help)",
        ),
        (
            "scorers={a: {name: t_clip}, b: {name: t_clip}, t_plain: {}}",
            "stage needs scorers.a.path=PATH scorers.b.path=PATH (see diffalign stage "
            "scorers=[t_clip,t_plain] --help)",
        ),
        ("scorers.t_clip.pth=x", "unknown key of scorer t_clip 'pth': did you mean 'path'?"),
        ("scorers={t_clip: 5}", "scorers={t_clip: 5}: scorers.t_clip: expected a mapping of its keys"),
        ("scorers=[t_clip", "scorers=[t_clip: not valid YAML: write [name, name] or {name: {key: value}}"),
        ("sede=1", "unknown key of stage 'sede': did you mean 'seeds'?"),
        (
            "quick",
            "'quick' is not of the form key=value: put quotes around a value",
        ),
        ("out=", "stage needs out=FOLDER (see diffalign stage --help)"),
    ],
)
def test_mistakes_are_one_line(word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(word)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_naming_a_plugin_replaces_its_section_in_any_order(tmp_path: Path) -> None:
    recipe = "out: o\nobjective: {name: t_loss, beta: 7}\n"
    assert load(yaml=recipe, tmp_path=tmp_path).resolved["objective"] == {
        "name": "t_loss",
        "beta": 7.0,
        "form": "code",
    }
    for words in (["objective=t_other", "objective.gamma=3"], ["objective.gamma=3", "objective=t_other"]):
        found = load(*words, yaml=recipe, tmp_path=tmp_path).resolved["objective"]
        assert found == {"name": "t_other", "gamma": 3.0}
    assert load("objective=t_loss", yaml=recipe, tmp_path=tmp_path).arguments["objective"].beta == 2.0
    assert load("objective.name=t_other", yaml=recipe, tmp_path=tmp_path).resolved["objective"]["gamma"] == 10
    assert load("objective={name: t_loss, beta: 3}").arguments["objective"].beta == 3.0
    assert load("objective=short-name").resolved["objective"]["name"] == "t_loss"
    assert load("judge=t_other").arguments["judge"].gamma == 10.0
    assert load("objective.beta=500").arguments["objective"].beta == 500.0


def test_several_plugins(tmp_path: Path) -> None:
    def scorers(*words: str) -> Any:
        return load(*words).resolved["scorers"]

    clip = {"path": "/p", "version": "1"}
    assert scorers("scorers.t_clip.path=/p") == {"t_plain": {"scale": "share"}, "t_clip": clip}
    assert scorers("scorers=[t_clip, t_plain]", "scorers.t_clip.path=/p") == {
        "t_clip": clip,
        "t_plain": {"scale": "share"},
    }
    assert scorers("scorers=t-clip", "scorers.t-clip.path=/p") == {"t_clip": clip}
    assert scorers("scorers={a: {name: t_clip, path: /p}, t_plain: null}") == {
        "a": {"name": "t_clip", **clip},
        "t_plain": {"scale": "share"},
    }
    assert scorers("scorers=[]") == {}
    yaml = "out: o\nscorers:\n  t_clip: {path: /p, version: '2.1'}\n"
    assert load(yaml=yaml, tmp_path=tmp_path).resolved["scorers"] == {
        "t_clip": {"path": "/p", "version": "2.1"}
    }
    assert load(yaml="out: o\nscorers: [t_plain]\n", tmp_path=tmp_path).arguments["scorers"]["t_plain"]


def test_a_file_is_read_by_the_declared_types(tmp_path: Path) -> None:
    yaml = """
out: 0123
text: off
prompts: [yes, 1e3, "null"]
lr: 1e-5
limit: null
seeds: 3..
adapter:
  rank: 8
folder: ${out}/sub
"""
    with pytest.raises(UserError, match=r"recipe\.yaml:7: seeds: expected a whole number, found '3\.\.'"):
        load(yaml=yaml, tmp_path=tmp_path)
    arguments = load("seeds=4", yaml=yaml.replace("3..", "[3]"), tmp_path=tmp_path).arguments
    assert arguments["out"] == "0123" and arguments["text"] == "off" and arguments["lr"] == 1e-5
    assert arguments["prompts"] == ["yes", "1e3", "null"] and arguments["seeds"] == [4]
    assert arguments["adapter"] == Adapter(8) and arguments["folder"] == Path("0123/sub")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("out: o\nsede: 1\n", "recipe.yaml:2: unknown key of stage 'sede': did you mean 'seeds'?"),
        ("out: o\n\nobjective:\n  bta: 1\n", "recipe.yaml:4: unknown key of objective t_loss 'bta': did you"),
        ("out: o\nadapter:\n  rnk: 1\n", "recipe.yaml:3: unknown key of adapter 'rnk': did you mean 'rank'?"),
        ("out: o\ntext:\n", "recipe.yaml:2: text: expected a text, found 'null'"),
        ("out: o\ntext: [a]\n", "recipe.yaml:2: text: expected a text, found 'a list'"),
        ("out: o\nout: p\n", "recipe.yaml:2: the key 'out' stands there twice"),
        ("out: o\ntext: 'a\n", "recipe.yaml:3: not valid YAML: found unexpected end of stream"),
        ("out: o\n\ttext: a\n", "recipe.yaml:2: not valid YAML:"),
        ("- out\n", "recipe.yaml:1: a recipe is a mapping"),
        ("out: o\nobjective: {name: t_los}\n", "unknown objective 't_los'"),
        ("out: o\nlimit: ${nothing}\n", "Interpolation key 'nothing' not found"),
        ("out: o\nlimit: ${text}\n", "Value 'x' of type 'str' could not be converted to Integer"),
        ("", "stage needs out=FOLDER"),
    ],
)
def test_mistakes_in_a_file_name_the_line(tmp_path: Path, yaml: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(yaml=yaml, tmp_path=tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_recipe(stage, tmp_path / "none.yaml", [])
    (tmp_path / "latin.yaml").write_bytes(b"out: \xff")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(stage, tmp_path / "latin.yaml", [])


def test_printed_yaml_is_the_same_recipe(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(8):
        text = "".join(rng.choice("ab \\${}:#'\"[],0\n\u2028") for _ in range(60))
        first = load(f"text={text}", "scorers.t_clip.path=${x}", "adapter.rank=3", "judge=t_other", "lr=1e-7")
        again = load(yaml=first.as_yaml(), tmp_path=tmp_path)
        assert first.arguments["text"] == text and again == first


def test_resolved_recipe_of_a_call_from_python() -> None:
    arguments = load("adapter.rank=3").arguments
    assert resolved_recipe(stage, {**arguments, "local": 1}) == load("adapter.rank=3").resolved
    named = {**arguments, "objective": "t_loss", "scorers": ["t_plain"]}
    assert resolved_recipe(stage, named) == load("adapter.rank=3").resolved


def test_make_one_and_many() -> None:
    made = make_one("objectives", {"name": "short_name", "beta": 3})
    assert made.beta == 3.0 and make_one("objectives", made) is made
    assert list(make_many("scorers", ["t_plain"])) == ["t_plain"]
    assert make_many("scorers", {"a": {"name": "t_clip", "path": "/p"}})["a"].path == "/p"
    with pytest.raises(UserError, match="unknown key of objective t_loss 'bta'"):
        make_one("objectives", {"name": "t_loss", "bta": 3})
    with pytest.raises(UserError, match="scorer t_clip needs path"):
        make_many("scorers", "t_clip")
    with pytest.raises(UserError, match=r"objective t_loss\.beta: expected a number"):
        make_one("objectives", {"name": "t_loss", "beta": "x"})


def test_help_lists_every_key() -> None:
    rows = {key: (kind, default, note) for key, kind, default, note in help_rows(stage, None, [])}
    assert rows["out"] == ("text", "required", "the folder.")
    assert rows["objective"][1:] == ("t_loss", "the loss.") and "t_other" in rows["objective"][0].split("|")
    assert rows["mode"] == ("images|implicit", "images", "") and rows["lr"][:2] == ("float", "0.0001")
    assert rows["adapter.rank"] == ("int", "4", "its rank.") and rows["start.rank"][1] == "5"
    assert rows["size"][:2] == ("[int, int]", "[64, 64]") and rows["number"][0] == "int or text"
    assert "objective.beta" not in rows
    named = {row[0]: row[1:] for row in help_rows(stage, None, ["objective=t_loss"])}
    assert named["objective.beta"] == ("float", "2.0", "how strong it is.")


def test_a_careless_signature_is_the_authors_mistake() -> None:
    def positional(out: str) -> None: ...

    with pytest.raises(TypeError, match="keyword-only"):
        load_recipe(positional, None, [])


def test_a_key_without_its_section_is_pointed_to_it() -> None:
    from diffalign.stages.train import train

    with pytest.raises(UserError, match=r"unknown key of train 'lr': did you mean 'optimizer\.lr'\?"):
        load_recipe(train, None, ["lr=1e-4"])
