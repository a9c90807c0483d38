"""Rows of a conditioning stay together."""

import pytest
import torch

from diffalign.common.conditioning import Conditioning


def make(offset: int = 0, rows: int = 3) -> Conditioning:
    ids = torch.arange(offset, offset + rows)
    return Conditioning({"ids": ids, "states": ids[:, None, None].float().expand(rows, 2, 4)})


def test_rows_by_slice_tensor_list_and_mask() -> None:
    cond = make()
    assert cond.batch_size == 3 and set(cond) == {"ids", "states"} and len(cond) == 2
    for index in (slice(1, None), torch.tensor([1, 2]), [1, 2], torch.tensor([False, True, True])):
        part = cond.rows(index)
        assert part["ids"].tolist() == [1, 2] and part["states"][:, 0, 0].tolist() == [1.0, 2.0]
    assert cond.rows(torch.tensor([2, 0, 2]))["ids"].tolist() == [2, 0, 2]
    assert cond.rows([]).batch_size == 0
    with pytest.raises(ValueError, match="one-dimensional"):
        cond.rows(torch.tensor(1))


def test_cat_undoes_rows() -> None:
    cond = Conditioning.cat([make(0), make(3, rows=1)])
    assert cond.batch_size == 4 and cond["ids"].tolist() == [0, 1, 2, 3]
    again = Conditioning.cat([cond.rows([i]) for i in range(4)])
    assert all(torch.equal(again[name], cond[name]) for name in cond.keys())  # noqa: SIM118 (keys() is promised)
    with pytest.raises(ValueError, match="different tensors"):
        Conditioning.cat([make(), Conditioning({"ids": torch.zeros(1)})])
    with pytest.raises(ValueError, match="nothing to join"):
        Conditioning.cat([])


def test_to_changes_floating_tensors_only() -> None:
    cond = make().to(device="cpu", dtype=torch.bfloat16)
    assert cond["states"].dtype == torch.bfloat16 and cond["ids"].dtype == torch.int64
    assert make().to(dtype=None)["states"].dtype == torch.float32


def test_tensors_must_share_the_batch() -> None:
    with pytest.raises(ValueError, match="leading batch dimension"):
        Conditioning({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match="leading batch dimension"):
        Conditioning({"a": torch.zeros(())})
    with pytest.raises(ValueError, match="at least one"):
        Conditioning({})


def test_changing_the_given_mapping_changes_nothing() -> None:
    given = {"a": torch.zeros(2)}
    cond = Conditioning(given)
    given["b"] = torch.zeros(2)
    assert dict(cond.items()).keys() == {"a"}
