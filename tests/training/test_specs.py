"""Learning rates by hand, and settings that cannot be used."""

from __future__ import annotations

import math
from typing import Any

import pytest

from diffalign.common.errors import UserError
from diffalign.training.optimizers import learning_rate
from diffalign.training.specs import (
    CheckpointSpec,
    EmaSpec,
    OptimizerSpec,
    ReferenceSpec,
    SampleSpec,
    Settings,
    ValidationSpec,
)


def rates(num_steps: int, **options: Any) -> list[float]:
    spec = OptimizerSpec(lr=8e-4, **options)
    return [1e4 * learning_rate(spec, step, num_steps) for step in range(num_steps)]


def test_constant() -> None:
    assert rates(3) == pytest.approx([8, 8, 8])


def test_warm_up_by_hand() -> None:
    """Three steps of it: 1/4, 2/4, 3/4 of 8e-4, and all of it from step 3 on."""
    assert rates(6, warmup_steps=3) == pytest.approx([2, 4, 6, 8, 8, 8])


def test_linear_by_hand() -> None:
    """Four steps: 1, 3/4, 1/2, 1/4; with one of warm-up of five the same after it."""
    assert rates(4, schedule="linear") == pytest.approx([8, 6, 4, 2])
    assert rates(5, schedule="linear", warmup_steps=1) == pytest.approx([4, 8, 6, 4, 2])


def test_cosine_by_hand() -> None:
    """Four steps: (1 + cos(0, 45, 90, 135 degrees)) / 2 = 1, 0.8535534, 0.5, 0.1464466."""
    assert rates(4, schedule="cosine") == pytest.approx([8, 6.8284271, 4, 1.1715729])


def test_a_run_shorter_than_its_warm_up() -> None:
    assert rates(2, warmup_steps=7, schedule="cosine") == pytest.approx([1, 2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerSpec(lr=0.0), "optimizer.lr is 0.0: use a value above 0"),
        (lambda: OptimizerSpec(lr=math.nan), "optimizer.lr is nan"),
        (lambda: OptimizerSpec(lr=math.inf), "optimizer.lr is inf"),
        (lambda: OptimizerSpec(betas=[0.9]), "optimizer.betas is .0.9.: give two values"),
        (lambda: OptimizerSpec(betas=[0.9, 1.0]), "optimizer.betas"),
        (lambda: OptimizerSpec(weight_decay=-0.1), "optimizer.weight_decay is -0.1: use 0 or more"),
        (lambda: OptimizerSpec(eps=-1e-8), "optimizer.eps is -1e-08: use 0 or more"),
        (lambda: OptimizerSpec(max_grad_norm=-1.0), "optimizer.max_grad_norm is -1.0: use 0 or more"),
        (lambda: OptimizerSpec(schedule="cosin"), "unknown optimizer.schedule 'cosin': did"),
        (lambda: OptimizerSpec(warmup_steps=-1), "optimizer.warmup_steps is -1"),
        (lambda: ValidationSpec(share=1.0), "validation.share is 1.0"),
        (lambda: ValidationSpec(every=0), "validation.every=0"),
        (lambda: ValidationSpec(draws=0), "draws=0"),
        (lambda: ValidationSpec(limit=0), "validation.limit is 0: use 1 or more"),
        (lambda: SampleSpec(every=0), "samples.every is 0"),
        (lambda: CheckpointSpec(keep=0), "keep=0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 0.5}, r"reference\.decay means nothing in reference\.mode=frozen: leave it out"),
        ({"every": 5}, r"reference\.every means nothing in reference\.mode=frozen"),
        ({"mode": "refresh", "decay": 0.5}, r"reference\.decay means nothing in reference\.mode=refresh"),
    ],
)
def test_a_key_that_the_references_mode_does_not_read_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ReferenceSpec(**options)
    ReferenceSpec(mode="ema", every=5, decay=0.5)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"precision": "fp16"}, "precision=fp16: use precision=bf16"),
        ({"compile": True}, "compile=true: use compile=false"),
        (
            {"optimizer": OptimizerSpec(kind="adafactor")},
            "optimizer.kind=adafactor: use optimizer.kind=adamw",
        ),
        ({"ema": EmaSpec(decay=0.9)}, "ema.decay=0.9: use ema.decay=0"),
        ({"reference": ReferenceSpec(mode="refresh")}, "reference.mode=refresh: use reference.mode=frozen"),
        ({"reference": ReferenceSpec(store="errors")}, "reference.store=errors: use reference.store=null"),
    ],
)
def test_what_a_split_network_cannot_do_is_refused(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^shard=true does not go with {said}, or shard=false$"):
        Settings(shard=True, **setting)
    Settings(shard=False, **setting)
