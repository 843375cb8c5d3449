"""The engine's own kernels on a CPU against torch's operators."""

import pytest
import torch
import torch.nn.functional as F

from kraken.engine import attention
from kraken.engine.attention import PagedCache, Piece
from kraken.engine.cpu_kernels import CpuKernels, cpu_kernels, huge_zeros
from kraken.engine.linear import NativeLinear, PackedLinear, PlainLinear


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    found = cpu_kernels()
    if found is None:
        pytest.skip("no C compiler with OpenMP")
    return found


# several panels with a remainder, several depths, and rows below, at and past a tile and a chunk
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 6, 8, 9, 16, 17, 33, 500])
@pytest.mark.parametrize("num_inputs", [24, 801])
@pytest.mark.parametrize("max_few_tokens", [0, 1000])
def test_linears_equal_torchs(
    kernels: CpuKernels, num_tokens: int, num_inputs: int, max_few_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kraken.engine.linear.MAX_FEW_TOKENS", max_few_tokens)
    torch.manual_seed(0)
    weight, bias = torch.randn(3, 101, num_inputs) / num_inputs**0.5, torch.randn(3, 101)
    x = torch.randn(3, num_tokens, num_inputs)
    for b in (None, bias):
        for act in ("none", "gelu"):
            found = NativeLinear(weight, b, act, kernels)(x)
            torch.testing.assert_close(found, PlainLinear(weight, b, act)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [PackedLinear, PlainLinear])
def test_gelu_after_a_linear_is_the_tanh_form(kind: type[PackedLinear] | type[PlainLinear]) -> None:
    weight, bias, x = torch.randn(1, 40, 24), torch.randn(1, 40), torch.randn(1, 7, 24)
    expected = F.gelu(F.linear(x, weight[0], bias[0]), approximate="tanh")
    torch.testing.assert_close(kind(weight, bias, "gelu")(x), expected, rtol=1e-5, atol=1e-5)


def test_gelu_of_very_large_numbers(kernels: CpuKernels) -> None:
    x = torch.tensor([[[-1e4, -30.0, -5.0, 0.0, 5.0, 30.0, 1e4]]]).transpose(1, 2)
    found = NativeLinear(torch.ones(1, 1, 1), None, "gelu", kernels)(x)
    torch.testing.assert_close(found, F.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)


def test_what_is_no_number_stays_so(kernels: CpuKernels) -> None:
    x = torch.ones(1, 3, 40)
    x[0, 1, 5] = torch.nan
    found = NativeLinear(torch.ones(1, 50, 40), None, "gelu", kernels)(x)[0]
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("head_size", [5, 64, 113])
@pytest.mark.parametrize("tokens_per_block", [1, 16])
def test_attention_equals_torchs(
    kernels: CpuKernels, head_size: int, tokens_per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single tokens and parts of prompts in one batch, blocks out of order, more keys than are held at a time."""
    torch.manual_seed(1)
    num_blocks = 1400 // tokens_per_block
    order = torch.randperm(num_blocks).tolist()
    starts, counts, pieces = [0, 700, 3, 30], [1, 1, 9, 1], []
    for start, count in zip(starts, counts, strict=True):
        num = -(-(start + count) // tokens_per_block)
        pieces.append(Piece(start, count, [order.pop() for _ in range(num)]))
    arguments = (2, 3, head_size, num_blocks, tokens_per_block, torch.float32, torch.device("cpu"))
    ours = PagedCache(*arguments)
    monkeypatch.setattr(attention, "cpu_kernels", lambda: None)
    theirs = PagedCache(*arguments)
    for cache in (ours, theirs):
        torch.manual_seed(2)
        cache.keys_LNSH.normal_(std=2.0)
        cache.values_LNSH.normal_()
    qkv = torch.randn(sum(counts), 3, 3, head_size).unbind(dim=1)  # strides as of one linear's output
    found, expected = ours.attend(pieces)(1, *qkv), theirs.attend(pieces)(1, *qkv)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.keys_LNSH, theirs.keys_LNSH) and torch.equal(ours.values_LNSH, theirs.values_LNSH)


def test_without_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert cpu_kernels.__wrapped__() is None


@pytest.mark.parametrize("shape", [(3, 5), (1100, 512)])
def test_zeros_in_large_pages_are_zeros_and_can_be_written(shape: tuple[int, ...]) -> None:
    zeros = huge_zeros(shape)
    assert zeros.shape == shape and not zeros.any()
    zeros += 1.0
    assert zeros.sum() == zeros.numel()
