"""Open Image Preferences: the binarized pairs, and the votes by hand."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.common.config import load_recipe
from diffalign.common.errors import UserError
from diffalign.common.manifest import identities
from diffalign.data.sources._parquet import hub_rows
from diffalign.data.sources.openpreferences import Plugin
from diffalign.stages.check import check
from tests.pickapic_files import BLUE, RED, jpeg

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
BINARIZED = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("chosen", IMAGE),
        ("rejected", IMAGE),
        ("chosen_model", pa.string()),
        ("rejected_model", pa.string()),
        ("evolution", pa.string()),
        ("category", pa.string()),
        ("sub_category", pa.string()),
    ]
)
RESULTS = pa.schema(
    [
        ("id", pa.string()),
        ("status", pa.string()),
        ("_server_id", pa.string()),
        ("images", pa.struct([(name, pa.string()) for name in ("image_1", "image_2", "prompt")])),
        ("model_1", pa.string()),
        ("model_2", pa.string()),
        ("evolution", pa.string()),
        ("category", pa.string()),
        ("sub_category", pa.string()),
        ("preference.responses", pa.list_(pa.string())),
        ("preference.responses.users", pa.list_(pa.string())),
        ("preference.responses.status", pa.list_(pa.string())),
        ("prompt", pa.list_(pa.float64())),  # of the later versions: a vector of the prompt, no text
    ]
)
HUB = "https://huggingface.co/datasets/data-is-better-together/image-preferences-filtered/resolve/main"


def pair(prompt: str = "a cat") -> dict[str, object]:
    return {
        "id": "3368-quality",
        "prompt": prompt,
        "chosen": {"bytes": RED, "path": "3368.jpg"},
        "rejected": {"bytes": BLUE, "path": "3368.jpg"},
        "chosen_model": "flux",
        "rejected_model": "sd",
        "evolution": "quality",
        "category": "Manga",
        "sub_category": "detailed",
    }


def votes(*answers: str, states: list[str] | None = None, **columns: object) -> dict[str, object]:
    return {
        "id": "3368-quality",
        "status": "completed",
        "images": {
            "image_1": f"{HUB}/image_quality_dev/3368.jpg",
            "image_2": f"{HUB}/image_quality_sd/3368.jpg",
            "prompt": "a street",
        },
        "model_1": "dev",
        "model_2": "sd",
        "category": "Manga",
        "preference.responses": list(answers),
        "preference.responses.users": ["u"] * len(answers),
        "preference.responses.status": ["submitted"] * len(answers) if states is None else states,
        "prompt": [0.5],
        **columns,
    }


def write(path: Path, rows: list[dict[str, object]], schema: pa.Schema = RESULTS) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return str(path)


def pictures(folder: Path) -> str:
    for shade, model in ((10, "dev"), (200, "sd")):
        (folder / f"image_quality_{model}").mkdir(parents=True, exist_ok=True)
        (folder / f"image_quality_{model}" / "3368.jpg").write_bytes(jpeg(shade))
    return str(folder)


def contract_case(folder: Path) -> dict[str, object]:
    rows = [pair(), pair("a dog"), pair("a cow"), pair("a fish")]
    return {"path": write(folder / "train.parquet", rows, BINARIZED)}


def read(tmp_path: Path, *rows: dict[str, object], **options: object) -> Plugin:
    return Plugin(write(tmp_path / "r.parquet", list(rows)), images=pictures(tmp_path / "p"), **options)


def test_chosen_has_no_place_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [pair(str(index)) for index in range(400)], BINARIZED)
    records = list(Plugin(path).records())
    for record in records:
        winner, loser = sorted(record.candidates, key=lambda candidate: -candidate.label)
        assert (winner.image.data, winner.model, winner.label) == (RED, "flux", 1.0)
        assert (loser.image.data, loser.model, loser.label) == (BLUE, "sd", 0.0)
    assert 160 <= sum(record.pair_target() == 1.0 for record in records) <= 240
    assert records[0].meta == {
        "id": "3368-quality", "evolution": "quality", "category": "Manga", "sub_category": "detailed",
    }  # fmt: skip


def test_a_row_of_the_published_notebook(tmp_path: Path) -> None:
    """both_good, image_1, image_1: three votes to one, and the pictures where the addresses say."""
    (record,) = read(tmp_path, votes("both_good", "image_1", "image_1")).records()
    assert (record.id, record.prompt, record.pair_target()) == ("r.parquet:0", "a street", 1.0)
    assert [c.votes for c in record.candidates] == [3, 1]
    assert [c.model for c in record.candidates] == ["dev", "sd"]
    assert record.candidates[0].image.path == tmp_path / "p" / "image_quality_dev" / "3368.jpg"
    assert record.meta == {"id": "3368-quality", "category": "Manga"}


@pytest.mark.parametrize(
    ("answers", "target", "problem"),
    [
        (["image_1"], 1.0, None),
        (["image_2", "image_2", "image_1"], 0.0, None),
        (["image_1", "image_2"], 0.5, None),
        (["both_good"], 0.5, None),
        (["both_good", "image_2"], 0.0, None),
        ([], None, None),
        (["image_1", "image_1", "both_bad"], 1.0, None),
        (["image_1", "both_bad"], 1.0, "both_bad"),  # as many as for the leading picture
        (["image_1", "image_2", "both_bad"], 0.5, "both_bad"),
        (["both_bad"], None, "both_bad"),
        (["image_1", "image_1", "toxic_content"], 1.0, "toxic_content"),
        (["toxic_content", "both_bad"], None, "toxic_content"),
        (["image_3"], None, "bad_label"),
    ],
)
def test_the_vote_by_hand(
    tmp_path: Path, answers: list[str], target: float | None, problem: str | None
) -> None:
    (record,) = read(tmp_path, votes(*answers)).records()
    assert (record.pair_target(), record.problem) == (target, problem)


def test_the_rules_can_be_changed(tmp_path: Path) -> None:
    rows = [votes("image_1", "both_bad"), votes("image_1", "toxic_content"), votes("both_good")]
    groups = read(tmp_path, *rows).usable()
    with pytest.raises(UserError, match="none of 3 rows is usable"):
        list(groups)
    assert groups.tally.dropped == {
        "both_bad": ["r.parquet:0"], "toxic_content": ["r.parquet:1"], "tie": ["r.parquet:2"],
    }  # fmt: skip
    assert groups.tally.bad_share == 0.0  # what people say of pictures does not speak against the data
    kept = read(tmp_path, *rows, both_bad="ignore", toxic_votes=2, ties="soft").usable()
    assert [group.target for group in kept] == [1.0, 1.0, 0.5]
    with pytest.raises(UserError, match=r"unknown data\.both_bad 'drop'"):
        Plugin("x", both_bad="drop")
    with pytest.raises(UserError, match=r"data\.toxic_votes=0"):
        Plugin("x", toxic_votes=0)


def test_check_names_the_rows_that_people_objected_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "r.parquet", [votes("image_1"), votes("toxic_content"), votes("both_bad")])
    words = ["data=openpreferences", f"data.path={path}", f"data.images={pictures(tmp_path / 'p')}"]
    check(**load_recipe(check, None, words).arguments)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {"toxic content 1 r.parquet:1", "both bad 1 r.parquet:2"} <= set(lines)


def test_only_submitted_answers_count(tmp_path: Path) -> None:
    states = ["discarded", "draft", "submitted"]
    rows = [
        votes("image_1", "toxic_content", "image_2", states=states),
        votes("image_1", **{"preference.responses.status": None}),
        votes("image_1", states=["submitted", "submitted"]),
        votes(**{"preference.responses": None, "preference.responses.status": None}),
    ]
    records = list(read(tmp_path, *rows).records())
    assert [(record.pair_target(), record.problem) for record in records] == [
        (0.0, None), (1.0, None), (None, "bad_label"), (None, None),
    ]  # fmt: skip


def test_addresses_stay_inside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(RED)
    places = [f"{HUB}/../../secret.jpg", str(tmp_path / "secret.jpg"), "../secret.jpg", "http://x/y.jpg", ""]
    for place in [*places, None]:
        images = {"image_1": place, "image_2": "image_quality_sd/3368.jpg", "prompt": "a"}
        (record,) = read(tmp_path, votes("image_1", images=images)).records()
        assert record.candidates[0].image.path is None
        assert record.candidates[1].image.open().size == (16, 16)


def test_votes_need_the_folder_and_their_inputs_hold_the_pictures(tmp_path: Path) -> None:
    path = write(tmp_path / "r.parquet", [votes("image_1")])
    with pytest.raises(UserError, match=r"holds votes and the addresses .*data\.images="):
        list(Plugin(path).records())
    with pytest.raises(UserError, match=r"data\.images=.*/gone: no such folder"):
        list(Plugin(path, images=str(tmp_path / "gone")).records())
    source = read(tmp_path, votes("image_1"))
    before = identities(source.inputs())
    (tmp_path / "p" / "image_quality_sd" / "3368.jpg").write_bytes(jpeg(99))
    assert identities(source.inputs()) != before


def test_the_streaming_reader_reads_both_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name, row, schema in (("v", votes("image_2"), RESULTS), ("b", pair(), BINARIZED)):
        local = write(tmp_path / name / "data" / "train-00000-of-00001.parquet", [row], schema)
        source = Plugin(local, images=pictures(tmp_path / "p"))
        (streamed,) = hub_rows(str(tmp_path / name), "train", None, source.layouts)
        (record,) = source.records()
        assert source.record("train-00000-of-00001.parquet:0", streamed).pair_target() == record.pair_target()


def test_other_columns_are_named(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([pair()], schema=BINARIZED)
    pq.write_table(table.drop_columns(["rejected"]), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"has no column rejected \(it has id, prompt, chosen, .*no pictures"):
        list(Plugin(str(tmp_path / "t.parquet")).records())
