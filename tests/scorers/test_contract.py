"""What every scorer promises, asked of every plug-in found.

A scorer's own test file gives the case: `contract_case(folder) -> (options, pictures, prompts, context)`,
six pictures on which the scorer gives at least two different values; prompts and context may be None.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from diffalign.common.errors import UserError
from diffalign.common.plugins import names, plugin_name
from diffalign.scorers import Scorer, load_scorer, score_all

WITHOUT_NETWORK = ("jpeg", "judge", "ocr", "scene")
"""Scorers that measure, or whose network runs elsewhere."""


def _tests_of(name: str) -> ModuleType:
    path = Path(__file__).with_name(f"test_{name}.py")
    assert path.is_file(), f"scorer {name} needs {path.name} with contract_case(folder)"
    spec = importlib.util.spec_from_file_location(f"contract_case_of_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=names("scorers"))
def case(request, tmp_path_factory):
    options, images, prompts, context = _tests_of(request.param).contract_case(
        tmp_path_factory.mktemp(request.param)
    )
    return request.param, options, images, prompts, context


@pytest.fixture(scope="module")
def scorer(case) -> Scorer:
    return load_scorer(case[0], **case[1])


def test_some_scorers_are_found():
    assert {"clip", "scene"} <= set(names("scorers"))


def test_it_says_what_it_is(case, scorer):
    assert plugin_name(scorer) == case[0]
    assert dataclasses.is_dataclass(scorer)
    assert scorer.needs <= {"prompts", "context"}
    assert isinstance(scorer.higher_is_better, bool) and isinstance(scorer.differentiable, bool)
    assert scorer.media == "image" and scorer.scale and scorer.version


def test_values_are_float32_and_one_per_picture(case, scorer):
    _, _, images, prompts, context = case
    scores = scorer.score(images, prompts, context=context)
    assert scores.values.shape == (6,) and scores.values.dtype == torch.float32
    assert len(scores.errors) == 6
    assert all(part.shape == (6,) and part.dtype == torch.float32 for part in scores.parts.values())
    assert len(set(scores.values.tolist())) > 1
    assert torch.equal(scorer(images, prompts, context=context), scores.values)


def test_one_picture_gives_one_value_and_none_gives_none(case, scorer):
    _, _, images, prompts, context = case
    assert scorer(images[:1], prompts and prompts[:1], context=context and context[:1]).shape == (1,)
    assert scorer([], prompts and [], context=context and []).shape == (0,)


def test_order_is_kept(case, scorer):
    _, _, images, prompts, context = case
    order = [3, 0, 5, 1, 4, 2]
    straight = scorer(images, prompts, context=context)
    shuffled = scorer(
        [images[i] for i in order],
        prompts and [prompts[i] for i in order],
        context=context and [context[i] for i in order],
    )
    torch.testing.assert_close(shuffled, straight[order], rtol=1e-5, atol=1e-5)


def test_batch_size_does_not_matter(case, scorer):
    _, _, images, prompts, context = case
    whole = scorer(images, prompts, context=context)
    before = scorer.batch_size
    try:
        for size in (1, 4):
            scorer.batch_size = size
            torch.testing.assert_close(scorer(images, prompts, context=context), whole, rtol=1e-5, atol=1e-5)
    finally:
        scorer.batch_size = before


def test_it_is_deterministic(case, scorer):
    _, _, images, prompts, context = case
    again = load_scorer(case[0], **case[1])
    assert torch.equal(scorer(images, prompts, context=context), again(images, prompts, context=context))


def test_a_tensor_is_scored_like_its_picture(case, scorer):
    _, _, images, prompts, context = case
    square = images[0].convert("RGB").resize((64, 64))
    tensor = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 255
    first = prompts and prompts[:1], context and context[:1]
    torch.testing.assert_close(
        scorer(tensor, first[0], context=first[1]),
        scorer([square], first[0], context=first[1]),
        rtol=0.05,
        atol=0.02,
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8), "span"),
        (torch.full((1, 3, 8, 8), torch.nan), "span"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.zeros(3, 8, 8), "shape"),
        (torch.zeros(1, 8, 8, 3), "shape"),
        (["picture.png"], r"images\[0\] is a str"),
        ("picture.png", "is a str"),
        (np.zeros((1, 3, 8, 8), dtype=np.float32), "is a ndarray"),
    ],
)
def test_other_pictures_are_refused(case, scorer, images, message):
    _, _, _, prompts, context = case
    with pytest.raises(UserError, match=message) as error:
        scorer(images, prompts and prompts[:1], context=context and context[:1])
    assert case[0] in str(error.value)


def test_needs_are_asked_for(case, scorer):
    _, _, images, prompts, context = case
    given = {"prompts": prompts, "context": context}
    for need in scorer.needs:
        with pytest.raises(UserError, match=f"needs {need}"):
            scorer(images, **{**given, need: None})


def test_lengths_must_agree(case, scorer):
    _, _, images, _, _ = case
    with pytest.raises(UserError, match="6 pictures but 2 prompts"):
        scorer(images, ["a", "b"])
    with pytest.raises(UserError, match="list of str"):
        scorer(images, "abcdef")


@pytest.fixture(scope="module")
def variants(case, scorer) -> list[Scorer]:
    """The scorer, and in mode=tensor where it has modes: what is differentiable there must be."""
    if "mode" not in {field.name for field in dataclasses.fields(scorer)}:
        return [scorer]
    return [scorer, load_scorer(case[0], **{**case[1], "mode": "tensor"})]


def test_no_gradient_reaches_weights(case, variants):
    _, _, _, prompts, context = case
    for scorer in variants:
        pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        values = scorer(pixels, prompts and prompts[:2], context=context and context[:2])
        assert values.requires_grad == scorer.differentiable
        if scorer.differentiable:
            values.sum().backward()
            assert pixels.grad.abs().sum() > 0
        assert bool(scorer.modules()) == (case[0] not in WITHOUT_NETWORK)
        for module in scorer.modules():
            assert not module.training
            assert all(not p.requires_grad and p.grad is None for p in module.parameters())


def test_the_gradient_is_that_of_finite_differences(case, variants):
    """Along one random direction, each picture on its own."""
    _, _, _, prompts, context = case
    for scorer in (each for each in variants if each.differentiable):
        generator = torch.Generator().manual_seed(1)
        pixels = torch.rand(1, 3, 48, 64, generator=generator) * 0.8 + 0.1
        direction = torch.randn(pixels.shape, generator=generator)

        def along(step: float, *, scorer=scorer, pixels=pixels, direction=direction) -> torch.Tensor:
            moved = pixels + step * direction
            return scorer(moved, prompts and prompts[:1], context=context and context[:1])

        step = torch.zeros((), requires_grad=True)
        along(step).sum().backward()
        h = 0.01
        numeric = (along(h) - along(-h)).item() / (2 * h)
        assert step.grad.item() == pytest.approx(numeric, rel=0.05, abs=1e-4)


def test_a_pass_shared_with_others_changes_no_value(case, scorer):
    _, _, images, prompts, context = case
    alone = scorer(images, prompts, context=context)
    (pair,) = score_all({"it": scorer}, images, prompts, context=context).values()
    torch.testing.assert_close(pair.values, alone, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_groups_are_scored_together(case, scorer):
    _, _, images, prompts, context = case
    first, second = scorer.compare(
        [images[:2], images[2:5]],
        prompts and [prompts[0], prompts[2]],
        context=context and [context[:2], context[2:5]],
    )
    assert first.values.shape == (2,) and second.values.shape == (3,)
    assert len(second.errors) == 3
    if not scorer.relative:
        given = prompts and [prompts[2]] * 3
        expected = scorer(images[2:5], given, context=context and context[2:5])
        torch.testing.assert_close(second.values, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_values(case, scorer):
    _, _, images, prompts, context = case
    there = load_scorer(case[0], device="cuda", **case[1])
    torch.testing.assert_close(
        there(images, prompts, context=context),
        scorer(images, prompts, context=context),
        rtol=1e-3,
        atol=1e-3,
        equal_nan=True,
    )


def test_an_unknown_option_names_the_nearest(case):
    option = dataclasses.fields(type(load_scorer(case[0], **case[1])))[0].name
    with pytest.raises(UserError, match=f"did you mean '{option}'"):
        load_scorer(case[0], **{option + "s": 1})
