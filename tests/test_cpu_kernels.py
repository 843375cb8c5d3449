"""The engine's own kernels on a CPU against torch's operators."""

import itertools
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kraken.engine.batch import ForwardOutput, SamplingInput, StepBatch, uniform
from kraken.engine.kernels.choose import choose_kernels
from kraken.engine.kernels.cpu.kernels import CpuKernels, CpuLinear
from kraken.engine.kernels.cpu.library import CpuLibrary, load_library, zeros_in_huge_pages
from kraken.engine.kernels.torch.kernels import TorchKernels
from kraken.engine.kernels.torch.linear import OneDnnLinear, TorchLinear
from kraken.engine.model.attention import PagedKVCache
from kraken.engine.protocol import SamplingParams
from kraken.engine.sampler import Sampler

CPU = torch.device("cpu")


def sample(logits_BV: torch.Tensor, inputs: list[SamplingInput]) -> list[int | None]:
    return Sampler(choose_kernels(CPU, torch.float32)).sample(ForwardOutput(logits_BV), inputs)


def library_of(dtype: torch.dtype) -> CpuLibrary:
    found = load_library(dtype)
    if found is None:
        assert not any(shutil.which(name) for name in ("cc", "gcc")), "the kernels do not compile"
        pytest.skip("no C compiler")
    return found


@pytest.fixture(scope="module")
def library() -> CpuLibrary:
    return library_of(torch.float32)


NUMS_TOKENS = [1, 2, 5, 6, 8, 9, 16, 17, 33, 500]
"""Below, at and past a tile and a chunk."""


# several panels with a remainder, and several depths
@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
@pytest.mark.parametrize("num_inputs", [24, 801])
@pytest.mark.parametrize("num_ways", [1, 3])
def test_linears_equal_torchs(library: CpuLibrary, num_tokens: int, num_inputs: int, num_ways: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(num_ways, 101, num_inputs) / num_inputs**0.5, torch.randn(num_ways, 101)
    x = torch.randn(num_ways, num_tokens, num_inputs)
    for b in (None, bias):
        for act in ("none", "gelu"):
            found = CpuLinear(weight, b, act, library)(x)
            torch.testing.assert_close(found, TorchLinear(weight, b, act)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
@pytest.mark.parametrize("num_inputs", [24, 802])
@pytest.mark.parametrize("num_ways", [1, 3])
def test_linears_of_bfloat16_sum_in_float32(num_tokens: int, num_inputs: int, num_ways: int) -> None:
    """What is wide is as exact as a product of the same numbers in float32; what is not is that, rounded once."""
    torch.manual_seed(0)
    library = library_of(torch.bfloat16)
    weight = (torch.randn(num_ways, 101, num_inputs) / num_inputs**0.5).bfloat16()
    bias, x = torch.randn(num_ways, 101).bfloat16(), torch.randn(num_ways, num_tokens, num_inputs).bfloat16()
    for b in (None, bias):
        for act in ("none", "gelu"):
            expected = TorchLinear(weight.float(), None if b is None else b.float(), act)(x.float())
            wide = CpuLinear(weight, b, act, library, is_wide=True)(x)
            torch.testing.assert_close(wide, expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(CpuLinear(weight, b, act, library)(x), wide.bfloat16())


def test_a_linear_with_half_a_word_of_inputs_is_torchs() -> None:
    kernels = CpuKernels(library_of(torch.bfloat16))
    weight, x = torch.randn(1, 50, 40).bfloat16() / 6, torch.randn(1, 100, 40).bfloat16()
    assert not isinstance(kernels.linear(weight[:, :, :39], None), CpuLinear)
    linear = kernels.linear(weight, None, is_wide=True)
    assert isinstance(linear, CpuLinear) and linear(x).dtype == torch.float32


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 33])
@pytest.mark.parametrize("num_ways", [1, 3])
def test_onednn_equals_torch(num_tokens: int, num_ways: int) -> None:
    weight, bias = torch.randn(num_ways, 40, 24), torch.randn(num_ways, 40)
    x = torch.randn(num_ways, num_tokens, 24)
    for b in (None, bias):
        torch.testing.assert_close(OneDnnLinear(weight, b)(x), TorchLinear(weight, b)(x), rtol=0, atol=1e-4)
    assert isinstance(TorchKernels().linear(weight.double(), None), TorchLinear)


@pytest.mark.parametrize("kind", [OneDnnLinear, TorchLinear])
def test_gelu_after_a_linear_is_the_tanh_form(kind: type[OneDnnLinear] | type[TorchLinear]) -> None:
    weight, bias, x = torch.randn(1, 40, 24), torch.randn(1, 40), torch.randn(1, 7, 24)
    expected = F.gelu(F.linear(x, weight[0], bias[0]), approximate="tanh")
    torch.testing.assert_close(kind(weight, bias, "gelu")(x), expected, rtol=1e-5, atol=1e-5)


def test_gelu_of_very_large_numbers(library: CpuLibrary) -> None:
    x = torch.tensor([[[-1e4, -30.0, -5.0, 0.0, 5.0, 30.0, 1e4]]]).transpose(1, 2)
    found = CpuLinear(torch.ones(1, 1, 1), None, "gelu", library)(x)
    torch.testing.assert_close(found, F.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_so(dtype: torch.dtype) -> None:
    x = torch.ones(1, 3, 40, dtype=dtype)
    x[0, 1, 5] = torch.nan
    found = CpuLinear(torch.ones(1, 50, 40, dtype=dtype), None, "gelu", library_of(dtype))(x)[0]
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("head_size", [5, 64, 113])
@pytest.mark.parametrize("tokens_per_block", [1, 16])
@pytest.mark.parametrize("num_heads", [1, 2, 3])  # shared by the threads in both ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_torchs(dtype: torch.dtype, head_size: int, tokens_per_block: int, num_heads: int) -> None:
    """Single tokens and parts of prompts in one batch, blocks out of order, more keys than are held at a time. Torch's
    attention is in float32, also over what the kernels hold in bfloat16.

    Parts below, at and past a tile of queries, and that end within, at and past a panel of keys.
    """
    kernels = CpuKernels(library_of(dtype))
    torch.manual_seed(1)
    num_blocks = 2800 // tokens_per_block
    order = torch.randperm(num_blocks).tolist()
    starts, counts = [0, 700, 3, 30, 0, 600, 5, 0, 47], [1, 1, 9, 1, 48, 130, 2, 3, 2]
    tables = [
        [order.pop() for _ in range(-(-(start + count) // tokens_per_block))]
        for start, count in zip(starts, counts, strict=True)
    ]
    batch = StepBatch.concatenate([[0] * count for count in counts], starts, tables, counts, tokens_per_block)
    arguments = (2, num_heads, head_size, num_blocks, tokens_per_block)
    ours = PagedKVCache(*arguments, dtype, CPU, kernels)
    theirs = PagedKVCache(*arguments, torch.float32, CPU, TorchKernels())
    theirs.keys_LNSH.copy_(ours.keys_LNSH.normal_(std=2.0))
    theirs.values_LNSH.copy_(ours.values_LNSH.normal_())
    qkv = torch.randn(sum(counts), 3, num_heads, head_size, dtype=dtype)
    found = ours.attend(batch)(1, *qkv.unbind(dim=1))  # strides as of one linear's output
    expected = theirs.attend(batch)(1, *qkv.float().unbind(dim=1))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8  # of a value rounded once
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=1e-5)
    assert torch.equal(ours.keys_LNSH, theirs.keys_LNSH.to(dtype))
    assert torch.equal(ours.values_LNSH, theirs.values_LNSH.to(dtype))


def test_without_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert load_library.__wrapped__(torch.float32) is None


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_released_threads_end_and_come_back(library: CpuLibrary) -> None:
    def threads() -> set[str]:
        return {task.name for task in Path("/proc/self/task").iterdir()}

    def num_new(before: set[str], expected: int) -> int:
        """Threads that were not there before, once they are as many as expected; others may end meanwhile."""
        ends_at = time.monotonic() + 10.0
        while (found := len(threads() - before)) != expected and time.monotonic() < ends_at:
            time.sleep(0.01)
        return found

    def in_a_thread() -> None:
        torch.set_num_threads(3)
        before = threads()
        expected = linear(x)
        assert num_new(before, 2) == 2
        library.release_threads()
        assert num_new(before, 0) == 0
        assert torch.equal(linear(x), expected) and torch.get_num_threads() == 3
        assert num_new(before, 2) == 2

    linear, x = CpuLinear(torch.randn(1, 500, 40), None, "none", library), torch.randn(1, 3, 40)
    num_threads_of_torch = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(in_a_thread).result()
    finally:
        torch.set_num_threads(num_threads_of_torch)


def test_of_other_types_and_devices_there_are_none() -> None:
    for device, dtype in ((CPU, torch.float16), (CPU, torch.float64), (torch.device("meta"), torch.float32)):
        assert type(choose_kernels(device, dtype)) is TorchKernels


@pytest.mark.parametrize("shape", [(3, 5), (1100, 512), (2200, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_in_large_pages_are_zeros_and_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    zeros = zeros_in_huge_pages(shape, dtype)
    assert zeros.shape == shape and zeros.dtype == dtype and not zeros.any()
    zeros += 1.0
    assert bool((zeros == 1.0).all())


def adversarial_logits(kind: str, num_ids: int) -> torch.Tensor:
    """[6, ids], where a search that stops early or counts wrongly finds something else."""
    logits_BV = torch.randn(6, num_ids, generator=torch.Generator().manual_seed(num_ids))
    if kind == "ties":
        return (logits_BV * 2).round() / 2
    if kind == "equal":
        return torch.full_like(logits_BV, -3.0)
    if kind == "barred":  # fewer finite ones than top-k asks for, the last id among them
        logits_BV[:, : max(num_ids - 3, 0)] = -torch.inf
    if kind == "one_group":  # the most likely are neighbours
        logits_BV[:, num_ids // 2 : num_ids // 2 + 60] += 20.0
    if kind == "ascending":
        return logits_BV.sort(dim=-1).values
    if kind == "nearly_equal":  # distinct, and equal after division by a temperature
        return torch.nextafter(torch.tensor(8.0), torch.tensor(9.0)) * (1 + logits_BV.sign() * 2**-23)
    return logits_BV


@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "barred", "one_group", "ascending", "nearly_equal"])
@pytest.mark.parametrize("num_ids", [1, 3, 64, 65, 1000, 4099])
def test_inputs_equal_torchs(library: CpuLibrary, kind: str, num_ids: int) -> None:
    logits = adversarial_logits(kind, num_ids)
    padded = F.pad(logits, (0, 5), value=99.0)[:, :num_ids]  # rows apart from one another
    for top_k in (0, 1, 2, 50, 511, 512):
        for temperature in (0.7, 3.0):
            kinds = [SamplingParams(temperature=temperature, top_k=top_k), SamplingParams(temperature=0.0)]
            inputs = [SamplingInput(kinds[row % 2], row, top_k) for row in range(6)]
            assert sample(padded, inputs) == Sampler(TorchKernels()).sample(ForwardOutput(logits), inputs)


TRUNCATED: list[dict[str, Any]] = [
    {"top_p": 0.9}, {"top_p": 0.3, "temperature": 2.0}, {"top_p": 0.999, "temperature": 0.5}, {"top_p": 1e-9},
    {"min_p": 0.05}, {"min_p": 1.0}, {"min_p": 0.3, "top_p": 0.8}, {"top_p": 0.7, "top_k": 20}, {"top_k": 600},
    {"min_p": 0.01, "top_k": 40}, {"top_p": 0.95, "temperature": 1e-37},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "barred", "one_group", "ascending"])
@pytest.mark.parametrize("num_ids", [1, 3, 65, 1000, 4099])
def test_of_a_truncated_distribution_stays_what_float64_says(library: CpuLibrary, kind: str, num_ids: int) -> None:
    logits_BV = adversarial_logits(kind, num_ids)
    for params in (SamplingParams(**fields) for fields in TRUNCATED):
        inputs = [SamplingInput(params, row, 9) for row in range(len(logits_BV))]
        for token, logits_V, row_input in zip(sample(logits_BV, inputs), logits_BV, inputs, strict=True):
            place = uniform(row_input.seed, row_input.token_index)
            if token == drawn_in_float64(logits_V, params, place, params.top_p, params.min_p):
                continue
            slack = (1.0 - 2e-6, 1.0, 1.0 + 2e-6)  # where float32 may round to the other side
            allowed = {
                drawn_in_float64(logits_V, params, place * a, params.top_p * b, params.min_p * c)
                for a, b, c in itertools.product(slack, slack, slack)
            }
            assert token in allowed, (params, allowed)


def drawn_in_float64(logits_V: torch.Tensor, params: SamplingParams, place: float, top_p: float, min_p: float) -> int:
    """By sorting everything."""
    weights_V = ((logits_V - logits_V.max()).double() / params.temperature).exp()
    order_V = weights_V.sort(descending=True, stable=True).indices
    sorted_V = weights_V[order_V]
    stays_V = sorted_V >= min_p * sorted_V[0] if params.min_p < 1.0 else sorted_V == sorted_V[0]
    if params.top_p < 1.0:
        stays_V &= sorted_V.cumsum(0) - sorted_V < top_p * sorted_V.sum()
    if params.top_k:
        stays_V[params.top_k :] = False
    ids = order_V[stays_V].sort().values
    mass = weights_V[ids].cumsum(0)
    return int(ids[min(int(torch.searchsorted(mass, place * mass[-1], right=True)), len(ids) - 1)])


@pytest.mark.parametrize("num_ids", [3, 64, 200])
def test_of_equal_logits_the_lowest_ids_stay(library: CpuLibrary, num_ids: int) -> None:
    logits = torch.zeros(1, num_ids)
    logits[0, -1] = 1.0
    drawn = {sample(logits, [SamplingInput(SamplingParams(temperature=4.0, top_k=2), 0, t)])[0] for t in range(40)}
    assert drawn == {0, num_ids - 1}
    assert sample(-logits, [SamplingInput(SamplingParams(temperature=0.0), 0, 0)]) == [0]


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 63, 70, 129])
def test_rows_that_are_no_numbers_give_no_token(library: CpuLibrary, odd: float, place: int) -> None:
    logits = torch.randn(4, 130)
    logits[1:3, place] = odd
    kinds = [SamplingParams(temperature=0.0), SamplingParams(top_k=5)]
    found = sample(logits, [SamplingInput(kinds[row % 2], row, 0) for row in range(4)])
    assert [token is None for token in found] == [False, True, True, False]
    assert sample(torch.full((1, 130), -torch.inf), [SamplingInput(kinds[0], 0, 0)]) == [None]


def test_attention_to_very_large_scores_and_to_what_is_no_number(library: CpuLibrary) -> None:
    """One sequence's NaN stays with it, and a weight may be all or nothing."""
    cache = PagedKVCache(1, 2, 24, 20, 16, torch.float32, CPU, CpuKernels(library))
    q, k, v = torch.randn(120, 3, 2, 24).unbind(dim=1)
    q, k = q * 100.0, k * 100.0
    k[0] = torch.nan
    batch = StepBatch.concatenate([[0] * 60] * 2, [0, 0], [[4, 5, 6, 7], [9, 8, 11, 10]], [1, 1], 16)
    out = cache.attend(batch)(0, q, k, v)
    assert out[:60].isnan().all()
    q_NTH, k_NTH, v_NTH = (x[60:].transpose(0, 1) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q_NTH.double(), k_NTH.double(), v_NTH.double(), is_causal=True)
    torch.testing.assert_close(out[60:].transpose(0, 1), expected.float(), rtol=1e-3, atol=1e-3)
