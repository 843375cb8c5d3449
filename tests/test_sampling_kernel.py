"""The Triton kernel of the most likely token against torch; without CUDA by Triton's interpreter, where that is
installed."""

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("num_ids", [1, 50, 130])
def test_the_most_likely_ids_equal_those_of_torch(num_ids: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from kraken.engine import sampling_kernel

    monkeypatch.setattr(sampling_kernel, "TILE", 32)
    torch.manual_seed(0)
    logits_BV = torch.randint(-9, 5, (40, num_ids + 3), device=DEVICE).float()[:, :num_ids]  # many are equal
    assert sampling_kernel.best_ids(logits_BV).tolist() == logits_BV.cpu().max(dim=-1).indices.tolist()
    assert torch.equal(sampling_kernel.best_ids(logits_BV), sampling_kernel.best_ids(logits_BV.t().contiguous().t()))


def test_rows_that_are_no_numbers_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from kraken.engine import sampling_kernel

    monkeypatch.setattr(sampling_kernel, "TILE", 32)
    nan, inf = torch.nan, torch.inf
    logits_BV = torch.zeros(6, 70, device=DEVICE)
    logits_BV[0, 69], logits_BV[1, 3], logits_BV[2] = nan, inf, -inf
    logits_BV[3, 5:], logits_BV[4, :60], logits_BV[5, 40] = -inf, -inf, 2
    assert sampling_kernel.best_ids(logits_BV).tolist() == [-1, -1, -1, 0, 60, 40]
