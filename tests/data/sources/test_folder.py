"""Folders of winners and losers, and of ranked pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.common.errors import UserError
from diffalign.common.manifest import identities
from diffalign.data.sources.folder import Plugin
from tests.pickapic_files import jpeg


def put(root: Path, **captions: str | bytes | None) -> None:
    """Writes files by their path, `__` for `/` and `_dot_` for `.`; None is a picture."""
    for shade, (name, content) in enumerate(captions.items()):
        place = root / name.replace("__", "/").replace("_dot_", ".")
        place.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            content = jpeg(10 * shade)
        place.write_bytes(content.encode() if isinstance(content, str) else content)


def contract_case(folder: Path) -> dict[str, object]:
    for name in ("a", "b", "c"):
        put(
            folder,
            **{
                f"winner__{name}_dot_jpg": None,
                f"loser__{name}_dot_jpg": None,
                f"winner__{name}_dot_txt": f"caption {name}",
            },
        )
    return {"path": str(folder)}


@pytest.mark.parametrize(("winner", "loser"), [("winner", "loser"), ("w", "l")])
def test_pairs_by_name(tmp_path: Path, winner: str, loser: str) -> None:
    put(
        tmp_path,
        **{
            f"{winner}__set__one_dot_x_dot_jpg": None,
            f"{loser}__set__one_dot_x_dot_png": None,
            f"{loser}__set__one_dot_x_dot_caption": "only here\n",
            f"{winner}__two_dot_JPG": None,
            f"{loser}__two_dot_jpg": None,
            f"{winner}__two_dot_txt": "\ufeffa cube",
            f"{loser}__two_dot_txt": "a ball",
            f"{winner}___dot_hidden_dot_jpg": None,
        },
    )
    one, two = Plugin(str(tmp_path)).records()
    assert (one.id, one.prompt, one.source) == ("set/one.x", "only here", "folder")
    assert [candidate.prompt for candidate in one.candidates] == [None, None]
    best, worst = sorted(two.candidates, key=lambda candidate: -candidate.label)
    assert (best.image.path, worst.image.path) == (
        tmp_path / winner / "two.JPG",
        tmp_path / loser / "two.jpg",
    )
    assert (two.prompt, best.prompt, worst.prompt) == ("a cube", None, "a ball")
    assert (best.label, worst.label) == (1.0, 0.0)


def test_the_winner_has_no_place_of_its_own(tmp_path: Path) -> None:
    for index in range(200):
        for side in ("winner", "loser"):
            (tmp_path / side).mkdir(exist_ok=True)
            (tmp_path / side / f"{index}.jpg").write_bytes(b"")
    targets = [record.pair_target() for record in Plugin(str(tmp_path)).records()]
    assert 72 <= sum(target == 1.0 for target in targets) <= 128  # 100, four standard deviations


def test_what_is_missing_is_named_and_counted(tmp_path: Path) -> None:
    put(
        tmp_path,
        winner__good_dot_jpg=None,
        loser__good_dot_jpg=None,
        winner__good_dot_txt="fine",
        winner__lonely_dot_jpg=None,
        winner__lonely_dot_txt="no partner",
        loser__only_dot_jpg=None,
        loser__only_dot_txt="no winner",
        winner__words_dot_txt="a caption without pictures",
        winner__mute_dot_jpg=None,
        loser__mute_dot_jpg=None,
        winner__blank_dot_jpg=None,
        loser__blank_dot_jpg=None,
        winner__blank_dot_txt=" \n",
        winner__latin_dot_jpg=None,
        loser__latin_dot_jpg=None,
        winner__latin_dot_txt="café".encode("latin-1"),
        winner__torn_dot_jpg=None,
        loser__torn_dot_jpg=None,
        winner__torn_dot_txt="one",
        winner__torn_dot_caption="another",
    )
    groups = Plugin(str(tmp_path), max_bad_share=1.0).usable()
    assert [group.id for group in groups] == ["good"]
    assert groups.tally.dropped == {
        "missing_caption": ["blank", "mute"],
        "bad_text": ["latin", "torn"],
        "missing_image": ["lonely", "only", "words"],
    }
    with pytest.raises(UserError, match=r"2 missing_caption \(blank, mute\)"):
        list(Plugin(str(tmp_path)).usable())


def test_ranked_folders(tmp_path: Path) -> None:
    put(
        tmp_path,
        **{
            "a red cube__rank_10_dot_jpg": None,
            "a red cube__rank_2_a_dot_jpg": None,
            "a red cube__rank_2_b_dot_png": None,
            "a red cube__rank_1_dot_jpg": None,
            "a red cube__rank_1_dot_txt": "a cube, red",
            "shelf__rank_1_dot_jpg": None,
            "shelf__rank_2_dot_jpg": None,
            "shelf__prompt_dot_txt": "books on a shelf\n",
            "_dot_cache__rank_1_dot_jpg": None,
        },
    )
    cube, shelf = Plugin(str(tmp_path)).records()
    assert (cube.id, cube.prompt, shelf.id, shelf.prompt) == (
        "a red cube", "a red cube", "shelf", "books on a shelf",
    )  # fmt: skip
    assert [(c.rank, c.image.path.name, c.prompt) for c in cube.candidates] == [
        (1.0, "rank_1.jpg", "a cube, red"), (2.0, "rank_2_a.jpg", None),
        (2.0, "rank_2_b.png", None), (10.0, "rank_10.jpg", None),
    ]  # fmt: skip
    assert [len(group.images) for group in Plugin(str(tmp_path)).usable(unit="list")] == [4, 2]


def test_ranked_folders_with_faults(tmp_path: Path) -> None:
    put(
        tmp_path,
        good__rank_1_dot_jpg=None,
        good__rank_2_dot_jpg=None,
        blank__rank_1_dot_jpg=None,
        blank__prompt_dot_txt="",
        empty__notes_dot_md="nothing here",
        words__rank_1_dot_jpg=None,
        words__rank_2_dot_txt="a caption without its picture",
    )
    groups = Plugin(str(tmp_path), max_bad_share=1.0).usable(unit="list")
    assert [group.id for group in groups] == ["good"]
    assert groups.tally.dropped == {
        "missing_caption": ["blank"], "not_a_list": ["empty"], "missing_image": ["words"],
    }  # fmt: skip
    put(tmp_path, good__deep__rank_3_dot_jpg=None)
    with pytest.raises(UserError, match=r"good/deep/rank_3\.\* is not named rank_1, rank_2"):
        list(Plugin(str(tmp_path)).records())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"winner__a_dot_jpg": None}, "has no loser/"),
        ({"l__a_dot_jpg": None}, "has no w/"),
        ({"winner__a_dot_jpg": None, "loser__a_dot_jpg": None, "w__a_dot_jpg": None}, "keep two of them"),
        ({"winner__a_dot_jpg": None, "winner__a_dot_png": None, "loser__a_dot_jpg": None}, "have one name"),
        ({"winner__a_dot_jpg": None, "loser__a_dot_jpg": None, "b_dot_jpg": None}, r"b\.jpg lies outside"),
        ({"x__a_dot_jpg": None}, "holds x: expected winner/ and loser/"),
        ({"winner__a_dot_md": "", "loser__a_dot_md": ""}, "has no rows"),
    ],
)
def test_other_layouts_are_refused(tmp_path: Path, files: dict, message: str) -> None:
    put(tmp_path, **files)
    with pytest.raises(UserError, match=message):
        list(Plugin(str(tmp_path)).records())


def test_names_that_are_no_utf8_can_be_written(tmp_path: Path) -> None:
    for side in (b"winner", b"loser"):
        (tmp_path / side.decode()).mkdir()
        (tmp_path / side.decode() / "caf\udce9.jpg").write_bytes(jpeg(1))
    put(tmp_path, **{"winner__caf\udce9_dot_txt": "a cup"})
    ((pair),) = Plugin(str(tmp_path)).usable()
    assert pair.id == "caf\\udce9" and pair.id.encode()
    (tmp_path / "lists" / "caf\udce9").mkdir(parents=True)
    (tmp_path / "lists" / "caf\udce9" / "rank_1.jpg").write_bytes(jpeg(1))
    (record,) = Plugin(str(tmp_path / "lists")).records()
    assert (record.id, record.problem) == ("caf\\udce9", "bad_text")


def test_inputs_change_with_a_caption_and_not_with_the_place(tmp_path: Path) -> None:
    options = contract_case(tmp_path / "here")
    before = identities(Plugin(**options).inputs())
    moved = Plugin(**contract_case(tmp_path / "there"))
    assert identities(moved.inputs()) == before
    (tmp_path / "there" / "loser" / "a.txt").write_text("of the loser")
    of_the_loser = identities(moved.inputs())
    (tmp_path / "there" / "winner" / "a.txt").write_text("other words")
    assert before != of_the_loser != identities(moved.inputs()) != before
