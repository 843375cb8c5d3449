"""The Triton kernels against plain attention; without CUDA by Triton's interpreter, where that is installed."""

import importlib.util

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def plain(q_BNH: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Each row's attention over its own [N, T, H]."""
    rows = []
    for q_NH, k_NTH, v_NTH in zip(q_BNH, keys, values, strict=True):
        scores_NT = (k_NTH @ q_NH[..., None]).squeeze(-1) * q_NH.shape[-1] ** -0.5
        rows.append((scores_NT.softmax(-1)[:, None] @ v_NTH).squeeze(1))
    return torch.stack(rows)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("head_size", [16, 24])
def test_paged_decode_equals_plain_attention(num_splits: int, head_size: int) -> None:
    from kraken.engine.kernels.cuda.paged_attention import paged_decode

    torch.manual_seed(0)
    N, H, tokens_per_block, lengths = 3, head_size, 4, [1, 37, 0, 66, 4]
    B, num_blocks = len(lengths), 64
    keys_NSH, values_NSH = (torch.randn(N, num_blocks * tokens_per_block, H, device=DEVICE) for _ in range(2))
    qkv_B3NH = torch.randn(B, 3, N, H, device=DEVICE)
    q, k, v = qkv_B3NH.unbind(1)
    order = torch.randperm(num_blocks)
    tables_BM = torch.zeros(B, 17, dtype=torch.int32, device=DEVICE)
    slots = []
    for row, length in enumerate(lengths):
        blocks, order = order[: -(-length // tokens_per_block)], order[-(-length // tokens_per_block) :]
        tables_BM[row, : len(blocks)] = blocks
        positions = torch.arange(length)
        slots.append((blocks[positions // tokens_per_block] * tokens_per_block + positions % tokens_per_block).long())
    keys_before, values_before = keys_NSH.clone(), values_NSH.clone()
    for row, where in enumerate(slots):
        if len(where):
            keys_before[:, where[-1]], values_before[:, where[-1]] = k[row], v[row]
    out = paged_decode(
        q, k, v, keys_NSH, values_NSH, tables_BM, torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        tokens_per_block, num_splits,
    )  # fmt: skip
    assert torch.equal(keys_NSH, keys_before) and torch.equal(values_NSH, values_before)  # stored, and nothing else
    filled = [row for row, length in enumerate(lengths) if length]
    expected = plain(q[filled], [keys_NSH[:, slots[r]] for r in filled], [values_NSH[:, slots[r]] for r in filled])
    torch.testing.assert_close(out[filled], expected, rtol=0, atol=1e-5)
    assert (out[2] == 0).all()


def test_parts_fill_the_device_and_no_more() -> None:
    from kraken.engine.kernels.cuda.paged_attention import num_splits_for

    assert num_splits_for(1, 12, 132) == 16 and num_splits_for(8, 12, 132) == 2 and num_splits_for(64, 12, 132) == 1


def test_paged_store_writes_a_sequence_and_nothing_behind_its_end() -> None:
    from kraken.engine.kernels.cuda.paged_attention import SequenceSlots, paged_store

    torch.manual_seed(0)
    keys_NSH, values_NSH = (torch.randn(2, 12, 24, device=DEVICE) for _ in range(2))
    k_TNH, v_NTH = torch.randn(6, 2, 24, device=DEVICE), torch.randn(2, 6, 24, device=DEVICE)
    expected_keys, expected_values = keys_NSH.clone(), values_NSH.clone()
    expected_keys[:, [8, 9, 10, 11, 0]] = k_TNH[:5].transpose(0, 1)
    expected_values[:, [8, 9, 10, 11, 0]] = v_NTH[:, :5]
    blocks_M, last_1 = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([2, 0, 77], [4]))
    paged_store(k_TNH, v_NTH.transpose(0, 1), SequenceSlots(keys_NSH, values_NSH, blocks_M, last_1, 4))  # two layouts
    assert torch.equal(keys_NSH, expected_keys) and torch.equal(values_NSH, expected_values)
