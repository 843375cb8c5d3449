"""The kernel of the loss against plain operations; without CUDA by Triton's interpreter, where that is installed."""

import importlib.util

import pytest
import torch

from kraken.model.loss import chunk_gradient

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter computes in NumPy's types


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("num_ids", [5, 16, 50])
def test_equals_plain_operations(num_ids: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from kraken.model import loss_kernel

    monkeypatch.setattr(loss_kernel, "COLUMNS", 16)  # several pieces of a row, the last one not full
    torch.manual_seed(0)
    logits_TV = (torch.randn(7, num_ids + 3, device=DEVICE) * 5).to(dtype)[:, :num_ids]  # rows apart
    logits_TV[2, 0] = -torch.inf  # an id that cannot be
    targets_T = torch.randint(1, num_ids, (7,), device=DEVICE)
    targets_T[0] = num_ids - 1
    loss, gradient_TV = chunk_gradient(logits_TV, targets_T)
    found = loss_kernel.chunk_gradient(logits_TV.clone(), targets_T)
    torch.testing.assert_close(found[0], loss, rtol=1e-5, atol=1e-5)
    atol = 1e-6 if dtype == torch.float32 else 2**-9
    torch.testing.assert_close(found[1], gradient_TV, rtol=0, atol=atol)
    assert found[1].dtype == dtype


def test_what_is_not_finite_is_not_hidden() -> None:
    from kraken.model import loss_kernel

    logits_TV = torch.zeros(2, 8, device=DEVICE)
    logits_TV[1, 3] = torch.nan
    loss, gradient_TV = loss_kernel.chunk_gradient(logits_TV, torch.zeros(2, dtype=torch.int64, device=DEVICE))
    assert loss.isnan() and gradient_TV[1].isnan().any() and gradient_TV[0].isfinite().all()
