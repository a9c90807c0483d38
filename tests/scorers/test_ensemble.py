"""Ensembles: sums on a common footing by hand, votes among the pictures of a prompt, members' failings."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from diffalign.common.errors import UserError
from diffalign.scorers import load_scorer
from diffalign.scorers.ensemble import first_places, shares_beaten
from tests.scorers.test_clip import PROMPTS, pictures
from tests.tiny_clip import write_open_clip

NAN = math.nan


def contract_case(folder: Path):
    path = str(write_open_clip(folder / "clip"))
    members = {"a": {"name": "clip", "path": path}, "b": {"name": "clip", "path": path, "scale": "logits"}}
    return {"scorers": members, "weights": {"b": 0.5}}, pictures(), PROMPTS, None


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return str(write_open_clip(tmp_path_factory.mktemp("ensemble") / "clip"))


def of(path: str, **options):
    members = {"a": {"name": "clip", "path": path}, "j": {"name": "jpeg", "scale": "compressibility"}}
    return load_scorer("ensemble", scorers=members, **options)


@pytest.fixture(scope="module")
def members(path) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        load_scorer("clip", path=path)(pictures(), PROMPTS),
        load_scorer("jpeg", scale="compressibility")(pictures()),
    )


def test_sums_by_hand(path, members):
    a, j = members
    footing = {"center": {"a": 0.2, "j": -2.0}, "spread": {"a": 0.1, "j": 0.5}}
    weights = {"j": 3.0}
    za, zj = (a - 0.2) / 0.1, (j + 2.0) / 0.5
    expected = {
        "weighted": a + 3 * j,
        "zscore": za + 3 * zj,
        "bounded": -torch.log1p(torch.exp(-za)) - 3 * torch.log1p(torch.exp(-zj)),
    }
    for how, values in expected.items():
        given = {} if how == "weighted" else footing
        scorer = of(path, how=how, weights=weights, **given)
        found = scorer.score(pictures(), PROMPTS)
        torch.testing.assert_close(found.values, values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.parts["j"], j)
        assert scorer.scale == how and not scorer.relative
    assert scorer.version.startswith("a:clip@") and "+j:" in scorer.version


def test_bounded_lets_no_member_outweigh_the_others(path):
    """However far above its center a member is, it adds at most -log sigmoid of where it was."""
    one = {"center": {"a": -1e6, "j": -2.0}, "spread": {"a": 1.0, "j": 0.5}}
    values = of(path, how="bounded", **one).score(pictures(), PROMPTS)
    zj = (values.parts["j"] + 2.0) / 0.5
    torch.testing.assert_close(values.values, torch.nn.functional.logsigmoid(zj), rtol=0, atol=1e-5)


def test_a_complaint_counts_negative(path, members, monkeypatch):
    from diffalign.scorers.jpeg import Plugin as Jpeg

    monkeypatch.setattr(Jpeg, "higher_is_better", False)
    a, j = members
    found = of(path).score(pictures(), PROMPTS)
    torch.testing.assert_close(found.values, a - j, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.parts["j"], j)
    footing = {"center": {"a": 0.0, "j": -2.0}, "spread": {"a": 1.0, "j": 0.5}}
    zscores = of(path, how="zscore", **footing).score(pictures(), PROMPTS)
    torch.testing.assert_close(zscores.values, a - (j + 2.0) / 0.5, rtol=1e-5, atol=1e-5)


def test_votes_by_hand():
    values = torch.tensor([0.3, 0.9, 0.3, NAN, 0.9])
    torch.testing.assert_close(first_places(values), torch.tensor([0, 0.5, 0, NAN, 0.5]), equal_nan=True)
    # Of three rivals: 0.3 ties with one and beats none, 0.9 beats two and ties with one.
    expected = torch.tensor([0.5 / 3, 2.5 / 3, 0.5 / 3, NAN, 2.5 / 3])
    torch.testing.assert_close(shares_beaten(values), expected, equal_nan=True)
    for of_group in (first_places, shares_beaten):
        assert of_group(torch.tensor([0.7])).isnan().all()
        assert of_group(torch.tensor([0.7, NAN])).isnan().all()
        assert of_group(torch.tensor([NAN, NAN])).isnan().all()


def test_a_vote_is_among_the_pictures_of_a_prompt(path, members):
    a, j = members
    prompts = ["red", "blue", "red", "blue", "red", "alone"]
    a = load_scorer("clip", path=path)(pictures(), prompts)
    scorer = of(path, how="rank", weights={"a": 2.0})
    assert scorer.relative and not scorer.differentiable
    found = scorer.score(pictures(), prompts)
    for places in ([0, 2, 4], [1, 3]):
        expected = (2 * shares_beaten(a[places]) + shares_beaten(j[places])) / 3
        torch.testing.assert_close(found.values[places], expected)
    assert found.values[5].isnan() and "only picture of its prompt" in found.errors[5]
    assert found.errors[:5] == [None] * 5
    (group,) = scorer.compare([[pictures()[place] for place in (0, 2, 4)]], ["red"])
    torch.testing.assert_close(group.values, found.values[[0, 2, 4]])
    votes = of(path, how="votes").score(pictures(), prompts).values
    assert votes[[0, 2, 4]].sum() == pytest.approx(1.0) and votes[[1, 3]].sum() == pytest.approx(1.0)


def test_members_that_read_no_prompt_vote_within_a_prompt_too():
    prompts = ["red", "blue", "red", "blue", "red", "alone"]
    scorer = load_scorer("ensemble", scorers={"jpeg": {}}, how="rank")
    sizes = load_scorer("jpeg")(pictures())
    values = scorer.score(pictures(), prompts).values
    for places in ([0, 2, 4], [1, 3]):
        torch.testing.assert_close(values[places], shares_beaten(sizes[places]))
    assert values[5].isnan()


def test_groups_may_be_named(path):
    context = [{"group": 0}, {"group": "y"}, {"group": 0}, {"group": "y"}]
    scorer = of(path, how="votes")
    values = scorer.score(pictures()[:4], ["red"] * 4, context=context).values
    assert values[[0, 2]].sum() == pytest.approx(1.0) and values[[1, 3]].sum() == pytest.approx(1.0)


def test_a_member_without_a_value_leaves_none(path):
    members = {"a": {"name": "clip", "path": path}, "s": "scene"}
    found = load_scorer("ensemble", scorers=members).score(pictures()[:2], ["a red circle", "no scene"])
    assert found.values.isnan().all() and found.errors[1].startswith("s: ")
    assert found.parts["a"].isfinite().all()


def test_center_and_spread_come_from_a_scored_folder(path, members, tmp_path):
    a, j = members
    summary = {
        "scorers": {
            "a": {"scale": "cosine", "mean": 0.1, "std": 0.2},
            "j": {"scale": "compressibility", "mean": -1.0, "std": 2.0},
        }
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    scorer = of(path, how="zscore", statistics=str(tmp_path), center={"j": 0.0})
    expected = (a - 0.1) / 0.2 + j / 2.0
    torch.testing.assert_close(scorer(pictures(), PROMPTS), expected, rtol=1e-5, atol=1e-5)
    summary["scorers"]["a"]["scale"] = "logits"
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match="on the scale logits, the member is on cosine"):
        of(path, how="zscore", statistics=str(tmp_path))


def test_what_cannot_be_is_refused(path):
    for options, message in (
        ({"how": "mean"}, "unknown how"),
        ({"weights": {"b": 1.0}}, "unknown member in weights"),
        ({"spread": {"a": 0.0}}, "spread of a is 0"),
        ({"how": "rank", "center": {"a": 1.0}}, "reads no center"),
        (
            {"how": "zscore", "center": {"a": 1.0}, "spread": {"a": 1.0}, "statistics": "x"},
            "center and spread of a are given, and statistics too",
        ),
        ({"how": "zscore"}, "needs center and spread of a"),
        ({"how": "votes", "weights": {"a": 0.0, "j": 0.0}}, "all weights are 0"),
    ):
        with pytest.raises(UserError, match=message):
            of(path, **options)
    with pytest.raises(UserError, match="has no members"):
        load_scorer("ensemble", scorers={})
    with pytest.raises(UserError, match="did you mean 'clip'"):
        load_scorer("ensemble", scorers={"clipp": {}})
