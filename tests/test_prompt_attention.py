"""A prompt's attention, by the Triton kernel or by the library, against plain attention; without CUDA by Triton's
interpreter, where that is installed."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]  # as the interpreter can


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [8, 24, 64])
@pytest.mark.parametrize("num_tokens", [1, 16, 45, 130, 300])  # the last too long for the kernel
def test_a_prompt_equals_plain_attention(num_tokens: int, head_size: int, dtype: torch.dtype) -> None:
    from kraken.engine.kernels.cuda.paged_attention import SequenceSlots
    from kraken.engine.kernels.cuda.prompt_attention import attend_prompt

    torch.manual_seed(0)
    T, N, H = num_tokens, 3, head_size
    q, k, v = torch.randn(T, 3, N, H, device=DEVICE, dtype=dtype).unbind(1)
    keys_NSH, values_NSH = torch.randn(2, N, 400, H, device=DEVICE, dtype=dtype)
    expected_keys, expected_values = keys_NSH.clone(), values_NSH.clone()
    blocks_M = torch.randperm(100)[: -(-T // 4)].to(torch.int32).to(DEVICE)
    last_1 = torch.tensor([T // 2], dtype=torch.int32, device=DEVICE)  # behind it a graph's prompt is filled up
    slots_T = (blocks_M.long()[:, None] * 4 + torch.arange(4, device=DEVICE)).flatten()[: T // 2 + 1]
    expected_keys[:, slots_T] = k[: T // 2 + 1].transpose(0, 1)
    expected_values[:, slots_T] = v[: T // 2 + 1].transpose(0, 1)
    out_TNH = attend_prompt(q, k, v, SequenceSlots(keys_NSH, values_NSH, blocks_M, last_1, 4))
    assert out_TNH.shape == (T, N, H) and out_TNH.dtype == dtype
    assert torch.equal(keys_NSH, expected_keys) and torch.equal(values_NSH, expected_values)
    exact = F.scaled_dot_product_attention(*(x.transpose(0, 1).double() for x in (q, k, v)), is_causal=True)
    atol = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(out_TNH.double(), exact.transpose(0, 1), rtol=0, atol=atol)
    others = attend_prompt(q.contiguous(), k.contiguous(), v)  # as rotated ones are
    torch.testing.assert_close(others, out_TNH, rtol=0, atol=0)
