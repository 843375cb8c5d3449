"""The Triton kernels of the all-reduce over peer memory against plain sums and norms.

All ranks are in one thread, and every rank sends its message before any of them waits. Without CUDA they run in
Triton's interpreter, if Triton is installed.
"""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from kraken.engine.kernels.norm import Norm

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = pytest.mark.parametrize("num_ranks", [2, 4])


def make_ranks(num_ranks: int) -> list[Any]:
    """Every rank's signals, all in this process."""
    from kraken.engine.kernels.cuda.peer import PeerKernels

    flags = [torch.zeros(num_ranks, dtype=torch.int64, device=DEVICE) for _ in range(num_ranks)]
    return [
        PeerKernels(rank, flags[rank], tuple(flags[peer][rank : rank + 1] for peer in range(num_ranks) if peer != rank))
        for rank in range(num_ranks)
    ]


def buffers(num_ranks: int, num_values: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(torch.full((num_values,), torch.nan, dtype=dtype, device=DEVICE) for _ in range(num_ranks))


def make_norm(num_ways: int, width: int, has_bias: bool) -> Norm:
    gain, bias = (torch.randn(num_ways, width, device=DEVICE) for _ in range(2))
    return Norm(gain, bias if has_bias else None)


@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_added_and_normed(num_ranks: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    T, D = 3, 24
    ranks = make_ranks(num_ranks)
    norm = make_norm(1, D, True)
    norm = Norm(norm.weight_WD.to(dtype), None if norm.bias_WD is None else norm.bias_WD.to(dtype))
    x_TD = torch.randn(T, D, device=DEVICE).to(dtype)
    both = buffers(num_ranks, T * D + 5, dtype), buffers(num_ranks, T * D + 5, dtype)
    for buffer_index in range(5):
        parts = torch.randn(num_ranks, T, D, device=DEVICE).to(dtype)
        for rank, signals in enumerate(ranks):
            signals.publish(parts[rank], both[buffer_index % 2][rank], buffer_index % 2, waits=buffer_index % 3 != 1)
        found = []
        for signals in ranks:
            out_TD = torch.empty_like(x_TD)
            normed_1TD = signals.reduce_add_norm(x_TD, both[buffer_index % 2], out_TD, norm, buffer_index % 2)
            expected = (x_TD.double() + parts.double().sum(0)).to(dtype)
            torch.testing.assert_close(out_TD, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
            torch.testing.assert_close(
                normed_1TD, norm(out_TD[None]), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05
            )
            found.append(out_TD)
        assert all(torch.equal(out_TD, found[0]) for out_TD in found)
        total_TD = torch.empty_like(x_TD)
        assert ranks[0].reduce_add_norm(None, both[buffer_index % 2], total_TD, None, buffer_index % 2) is None
        torch.testing.assert_close(total_TD, parts.double().sum(0).to(dtype), rtol=0, atol=0.05)


@SIZES
@pytest.mark.parametrize("num_ways", [1, 3])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_of_ways_divided_among_ranks(
    num_ranks: int, num_ways: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel signals, or a copy does; the output has a buffer or none; every other rank gets the sum."""
    from kraken.engine.kernels.cuda import residual_norm as residual_kernel

    monkeypatch.setattr(residual_kernel, "MAX_WAITING_PROGRAMS", 3)  # so that a program has several tokens
    torch.manual_seed(0)
    T, D = 4, 40
    ranks, norm = make_ranks(num_ranks), make_norm(num_ways, D, has_bias)
    for message in range(4):
        buffer_index, sends_signal = message % 2, message < 2
        received = [buffers(num_ranks, T * D) for _ in range(num_ranks)]  # from every rank, though none from itself
        a_RWTD, y_RWTD, z_RWTD = (torch.randn(num_ranks, num_ways, T, D, device=DEVICE) for _ in range(3))
        x_RWTD = []
        for rank, signals in enumerate(ranks):
            targets = tuple(received[peer][rank] for peer in range(num_ranks) if peer != rank)
            (out_buffer,) = buffers(1, num_ways * T * D + 8)
            x_WTD, normed_WTD = signals.add_norm(
                a_RWTD[rank], y_RWTD[rank], norm if message else None, targets, out_buffer if message == 2 else None,
                buffer_index, waits=message != 1, sends_signal=sends_signal,
            )  # fmt: skip
            assert torch.equal(x_WTD, a_RWTD[rank] + y_RWTD[rank])
            assert (x_WTD.data_ptr() == out_buffer.data_ptr()) == (message == 2)
            if message:
                torch.testing.assert_close(normed_WTD, norm(x_WTD), rtol=0, atol=2e-5)
            for target in targets:
                torch.testing.assert_close(target, x_WTD.sum(0).flatten(), rtol=0, atol=1e-5)
            x_RWTD.append(x_WTD)
        for signals in ranks:
            assert sends_signal == (int(signals._signals.peer_flags[0]) == message + 1)
            if not sends_signal:
                signals.signal(buffer_index)
        total_TD = torch.stack(x_RWTD).sum((0, 1))
        for rank, (signals, x_WTD) in enumerate(zip(ranks, x_RWTD, strict=True)):
            parts = received[rank][:rank] + received[rank][rank + 1 :]
            expected_WTD = norm(x_WTD + z_RWTD[rank] + total_TD - x_WTD)
            for waited_for in (buffer_index, None):
                next_WTD, normed_WTD = signals.add_reduced_norm(x_WTD, z_RWTD[rank], parts, norm, waited_for)
                assert torch.equal(next_WTD, x_WTD + z_RWTD[rank])
                torch.testing.assert_close(normed_WTD, expected_WTD, rtol=0, atol=5e-5)


def test_many_columns_are_published_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from kraken.engine.kernels.cuda import peer

    monkeypatch.setattr(peer, "MAX_COLUMNS", 16)
    ranks, held = make_ranks(2), buffers(2, 200)
    x_RTD = torch.randn(2, 3, 60, device=DEVICE)
    for _ in range(3):  # the count of programs that are done begins anew
        for rank in range(2):
            ranks[rank].publish(x_RTD[rank], held[rank], 0, waits=True)
        ranks[0].wait(0)
        ranks[1].skip(1)
        ranks[0].skip(1)
        ranks[0].wait(1)
    for rank in range(2):
        assert torch.equal(held[rank][:180], x_RTD[rank].flatten())
        assert ranks[rank]._signals.counters[:, 0].tolist() == [5, 6, 0]
