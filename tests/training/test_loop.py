"""The training loop: resuming, stopping, and what happens when numbers are not finite."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.common import files
from diffalign.common.errors import Interrupted, UserError
from diffalign.data.batches import Batch
from diffalign.data.encoded import EncodedSet
from diffalign.data.specs import LoaderSpec
from diffalign.diffusion.likelihood import Draws
from diffalign.models._spec import AdapterSpec
from diffalign.models.sdxl import Plugin as SDXL
from diffalign.objectives._base import Output
from diffalign.objectives.diffusion_dpo import Plugin as DPO
from diffalign.training import loop
from diffalign.training.checkpoint import Checkpoint, load_latest
from diffalign.training.checks import NonFiniteLoss
from diffalign.training.specs import OptimizerSpec, ReferenceSpec, SampleSpec, ValidationSpec
from tests.tiny_training import make_run, make_set


@pytest.fixture(scope="module")
def shared_model(tiny_sdxl: str) -> Any:
    loaded: Any = SDXL(path=tiny_sdxl).load()
    loaded.start_training(AdapterSpec(rank=2, dropout=0.1), seed=0, with_reference=True)
    return loaded


@pytest.fixture(scope="module")
def train_set(shared_model: Any) -> EncodedSet:
    return make_set(shared_model, 7)


@pytest.fixture
def model(shared_model: Any) -> Iterator[Any]:
    """The shared model, put back to its start after each test."""
    state = {name: tensor.clone() for name, tensor in shared_model.trained_state().items()}
    yield shared_model
    shared_model.load_trained_state(state)
    shared_model.network.zero_grad()


@dataclass
class Saboteur(DPO):
    """Diffusion-DPO that does something at the computation number `at` (from 0); subclasses say what."""

    at: int = -1
    _count: int = 0

    def compute(self, denoiser: Any, batch: Batch, draws: Draws, shared: Any = None) -> Output:
        output = super().compute(denoiser, batch, draws, shared)
        self._count += 1
        return self.sabotage(output) if self.at in (self._count - 1, -2) else output

    def sabotage(self, output: Output) -> Output:
        raise NotImplementedError


class Crashing(Saboteur):
    def sabotage(self, output: Output) -> Output:
        raise ZeroDivisionError


class Interrupting(Saboteur):
    def sabotage(self, output: Output) -> Output:
        signal.raise_signal(signal.SIGINT)
        return output


class Overflowing(Saboteur):
    """A finite loss whose gradient is not: the slope of the square root at 0."""

    def sabotage(self, output: Output) -> Output:
        return Output(output.loss + (output.loss - output.loss.detach()).sqrt(), output.logs)


@dataclass
class CountingPasses(DPO):
    """Counts its backward passes."""

    passes: int = 0

    def backward(self, *arguments: Any) -> None:
        self.passes += 1
        super().backward(*arguments)


def newest(out: Path) -> Checkpoint:
    found = load_latest(out, identity="this run")
    assert found is not None
    return found


def same(first: Any, second: Any) -> bool:
    """Bit for bit, through nested lists and mappings."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


HARD: dict[str, Any] = {
    "accumulation": 2,
    "loader": LoaderSpec(batch_size=2, num_workers=2, caption_dropout=0.2),
}


@pytest.fixture(scope="module")
def undisturbed(shared_model: Any, train_set: EncodedSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps in one go, adapter dropout 0.1, accumulation 2, two workers, three epochs of the data."""
    out = tmp_path_factory.mktemp("undisturbed")
    start = {name: tensor.clone() for name, tensor in shared_model.trained_state().items()}
    assert loop.fit(make_run(shared_model, train_set, out, **HARD))["steps"] == 8
    assert not same(shared_model.trained_state(), start)
    shared_model.load_trained_state(start)
    return out


def assert_equal_runs(out: Path, undisturbed: Path) -> None:
    ours, theirs = newest(out), newest(undisturbed)
    assert (ours.step, ours.position) == (theirs.step, theirs.position) == (8, 16)
    assert same(ours.trained, theirs.trained)
    assert same(ours.state, theirs.state)
    assert files.read_jsonl(out / "metrics.jsonl") == files.read_jsonl(undisturbed / "metrics.jsonl")


@pytest.mark.parametrize("at", [0, 9, 15])
def test_a_crash_and_the_same_command_give_the_bits_of_an_undisturbed_run(
    at: int, model: Any, train_set: EncodedSet, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed in the first step, after the checkpoint of step 3, and in the second half of the last step."""
    with pytest.raises(ZeroDivisionError):
        loop.fit(make_run(model, train_set, tmp_path, objective=Crashing(beta=2000.0, at=at), **HARD))
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == {0: 0, 9: 1, 15: 2}[at]
    torch.manual_seed(1234)  # whatever the global stream is at
    assert loop.fit(make_run(model, train_set, tmp_path, **HARD))["steps"] == 8
    assert_equal_runs(tmp_path, undisturbed)


def test_ctrl_c_saves_the_step_it_fell_into(
    model: Any, train_set: EncodedSet, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the first half of step 5: that step is finished, logged and kept, although none was due."""
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as interrupt:
        loop.fit(make_run(model, train_set, tmp_path, objective=Interrupting(beta=2000.0, at=8), **HARD))
    assert interrupt.value.signal_number == signal.SIGINT
    assert newest(tmp_path).step == 5 and newest(tmp_path).position == 10
    assert f"saved step 5 in {tmp_path}; the same command goes on from there" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    loop.fit(make_run(model, train_set, tmp_path, **HARD))
    assert "going on from step 5 of 8" in capsys.readouterr().err
    ours, theirs = newest(tmp_path), newest(undisturbed)
    assert same(ours.trained, theirs.trained) and same(ours.state, theirs.state)


def test_a_finished_run_takes_no_more_steps(
    model: Any, train_set: EncodedSet, undisturbed: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "checkpoints").rglob("*")}
    crashing = Crashing(beta=2000.0, at=0)
    summary = loop.fit(make_run(model, train_set, undisturbed, objective=crashing, **HARD))
    assert summary == {"steps": 8, "skipped_steps": 0, "empty_steps": 0}
    assert {path: path.stat().st_mtime_ns for path in (undisturbed / "checkpoints").rglob("*")} == before
    with pytest.raises(UserError, match="is of another base, data set or recipe"):
        loop.fit(make_run(model, train_set, undisturbed, identity="another run", **HARD))


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_rows(
    model: Any, train_set: EncodedSet, tmp_path: Path
) -> None:
    """Two of seven examples hold a NaN; everything up to the step that meets one of them is kept."""
    means = list(train_set.means)
    for example in (2, 5):
        means[2 * example + 1] = means[2 * example + 1].clone()
        means[2 * example + 1][0, 0, 0] = torch.nan
    broken = EncodedSet(train_set.examples, means, *_rest(train_set))
    objective = CountingPasses(beta=2000.0)
    given = {"loader": LoaderSpec(batch_size=7), "accumulation": 2, "objective": objective}
    run = make_run(model, broken, tmp_path, **given)
    before = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    with pytest.raises(NonFiniteLoss) as error:
        loop.fit(run)
    assert objective.passes == 2  # other processes of a split network wait for this one in each
    found = str(error.value)
    assert (
        found.startswith("the loss at step 0 is not finite for row-") and "weights were not touched" in found
    )
    assert {f"row-{k}" for k in range(7) if f"row-{k} (t=" in found} == {"row-2", "row-5"}
    assert same(model.trained_state(), before)
    assert load_latest(tmp_path, identity="this run") is None


def _rest(encoded: EncodedSet) -> tuple[Any, ...]:
    return encoded.stds, encoded.prompt_rows, encoded.prompts, encoded.dropped


def test_a_gradient_that_is_not_finite_skips_its_step_and_is_counted(
    model: Any, train_set: EncodedSet, tmp_path: Path
) -> None:
    """The step between leaves weights and optimizer alone: of 3 steps AdamW takes 2."""
    run = make_run(model, train_set, tmp_path, objective=Overflowing(beta=2000.0, at=1), num_steps=3)
    summary = loop.fit(run)
    assert summary == {"steps": 3, "skipped_steps": 1, "empty_steps": 0}
    kept = newest(tmp_path)
    assert {entry["step"].item() for entry in kept.state["optimizer"]["state"].values()} == {2.0}
    assert all(torch.isfinite(tensor).all() for tensor in kept.trained.values())
    rows = files.read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows if row["kind"] == "train"] == [1, 1]
    assert all(row["grad_norm"] > 0 for row in rows)


def test_gradients_that_stay_non_finite_end_the_run(
    model: Any, train_set: EncodedSet, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    run = make_run(model, train_set, tmp_path, objective=Overflowing(beta=2000.0, at=-2), num_steps=100)
    with pytest.raises(
        UserError, match="gradients were not finite 26 times in a row, last at step 25: lower"
    ):
        loop.fit(run)
    assert same(model.trained_state(), before)


def first_moment(model: Any, train_set: EncodedSet, out: Path, **changes: Any) -> Tensor:
    """AdamW's first moment after one step from 0: a tenth of the (clipped) gradient."""
    changes = {"num_steps": 1, "optimizer": OptimizerSpec(lr=1e-9, max_grad_norm=0.0), **changes}
    loop.fit(make_run(model, train_set, out, **changes))
    moments = newest(out).state["optimizer"]["state"].values()
    return torch.cat([entry["exp_avg"].flatten() for entry in moments])


@pytest.fixture
def without_dropout(model: Any) -> Iterator[Any]:
    layers = [
        layer.lora_dropout["trained"] for layer in model.network.modules() if hasattr(layer, "lora_dropout")
    ]
    for layer in layers:
        layer.p = 0.0
    yield model
    for layer in layers:
        layer.p = 0.1


def test_accumulation_gives_the_gradient_of_one_large_batch(
    without_dropout: Any, train_set: EncodedSet, tmp_path: Path
) -> None:
    """4 x 1, 2 x 2 and 1 x 4 groups: the mean over the same four groups, up to float32."""
    train_set = train_set.subset(range(4))
    grads = [
        first_moment(
            without_dropout,
            train_set,
            tmp_path / str(size),
            loader=LoaderSpec(batch_size=size),
            accumulation=4 // size,
        )
        for size in (4, 2, 1)
    ]
    assert grads[0].norm() > 0
    for grad in grads[1:]:
        assert (grad - grads[0]).norm() < 1e-4 * grads[0].norm()


def test_gradients_are_clipped_to_their_norm(
    without_dropout: Any, train_set: EncodedSet, tmp_path: Path
) -> None:
    free = first_moment(without_dropout, train_set, tmp_path / "free")
    assert free.norm() > 0.1 * 1e-3
    limit = OptimizerSpec(lr=1e-9, max_grad_norm=1e-3)
    clipped = first_moment(without_dropout, train_set, tmp_path / "clipped", optimizer=limit)
    assert clipped.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert torch.allclose(clipped / clipped.norm(), free / free.norm(), atol=1e-5)
    (row,) = files.read_jsonl(tmp_path / "clipped" / "metrics.jsonl")
    assert row["grad_norm"] == pytest.approx(10 * free.norm().item(), rel=1e-3)  # before clipping


def test_watching_changes_nothing(
    model: Any, train_set: EncodedSet, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held-out accuracy and pictures while training: the same bits, and their results where they belong."""
    samples = SampleSpec(prompts=["a ring", "a cube"], every=4, num_inference_steps=1)
    watched = {
        **HARD,
        "validation": ValidationSpec(share=0.5, every=3, draws=2),
        "samples": samples,
        "heldout": train_set.subset([0, 1]),
        "embedded": model.embed_for_generation(samples.prompts),
    }
    summary = loop.fit(make_run(model, train_set, tmp_path, **watched))
    ours, theirs = newest(tmp_path), newest(undisturbed)
    assert same(ours.trained, theirs.trained) and same(ours.state["optimizer"], theirs.state["optimizer"])
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"step-0000000{step}.png" for step in (0, 4, 8)
    ]
    rows = [row for row in files.read_jsonl(tmp_path / "metrics.jsonl") if row["kind"] == "validation"]
    assert [row["step"] for row in rows] == [3, 6, 8]
    assert summary["implicit_accuracy"] == rows[-1]["implicit_accuracy"]
    assert (
        "step 0: loss 0.693147 (0.693147 expected), largest |logit| 0 (0 expected)" in capsys.readouterr().err
    )
    # A run that was killed between its last checkpoint and its manifest still knows what it measured.
    assert loop.fit(make_run(model, train_set, tmp_path, **watched)) == summary


def test_a_refreshed_reference_is_kept_in_the_checkpoint(tiny_sdxl: str, tmp_path: Path) -> None:
    """Refreshed after steps 2, 4 and 6; stopped after 5, between two refreshes."""
    model: Any = SDXL(path=tiny_sdxl).load()
    model.start_training(AdapterSpec(rank=2), seed=0, with_reference=True, moving_reference=True)
    data = make_set(model, 7)
    start = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    reference = {name: tensor.clone() for name, tensor in model.reference_state().items()}
    settings = {"reference": ReferenceSpec(mode="refresh", every=2), "log_every": 1, "num_steps": 7}
    loop.fit(make_run(model, data, tmp_path / "whole", **settings))
    whole = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    for steps in (5, 7):
        model.load_trained_state(start)
        model.load_reference_state(reference)
        loop.fit(make_run(model, data, tmp_path / "parts", **{**settings, "num_steps": steps}))
    assert same(model.trained_state(), whole)
    rows = files.read_jsonl(tmp_path / "parts" / "metrics.jsonl")
    assert rows == files.read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    exact = [row["step"] for row in rows if row["margin_abs_max"] == 0.0]
    assert exact == [1, 3, 5, 7]  # the first step after each refresh starts where the policy is
