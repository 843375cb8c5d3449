"""Linears in float8: against the numbers that they stand for, and engines with them. Kernels without CUDA by Triton's
interpreter, where that is installed."""

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_engine_batching import NUM_IDS, requests, run, together
from test_engine_devices import DIVISIBLE, INFO
from torch import Tensor

from kraken.config import ConfigError, EngineConfig, ModelConfig, Quantization
from kraken.engine.batch import StepBatch
from kraken.engine.distributed.device_group import DeviceGroup
from kraken.engine.distributed.partition import Part, weights_of
from kraken.engine.engine import TorchEngine
from kraken.engine.kernels.choose import choose_kernels
from kraken.engine.kernels.norm import Norm
from kraken.engine.kernels.quantized_tensor import FLOAT8, LARGEST, QuantizedTensor
from kraken.engine.kernels.torch.kernels import TorchKernels
from kraken.engine.model.network import Network
from kraken.engine.model.quantized import Fp8Linear, require_quantizable
from kraken.engine.model_runner import ModelRunner
from kraken.engine.protocol import TokenOutput
from kraken.model import Kraken

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
STEP = 2.0**-4
"""Half a step of float8 e4m3, relative to the value."""
SMALL = 2.0**-10
"""Half a step of the smallest values."""
KERNEL_STEP = STEP if torch.cuda.is_available() else 0.51
"""The interpreter loses the carry of what it rounds up to a power of two."""


def kernels_of() -> TorchKernels:
    return choose_kernels(torch.device(DEVICE), torch.bfloat16)


def meant(rows: QuantizedTensor) -> Tensor:
    """The values that rows stand for, [W, T, I]."""
    return rows.values_WTI.double() * rows.scales_WT1.double()


def assert_near(rows: QuantizedTensor, exact_WTI: Tensor, step: float = STEP) -> None:
    """Each value within the rounding of float8, and all together nearer."""
    difference = (meant(rows) - exact_WTI.double()).abs()
    largest_WT1 = exact_WTI.abs().amax(dim=-1, keepdim=True).double()
    assert bool((difference <= exact_WTI.abs().double() * step + largest_WT1 * (SMALL / LARGEST + 1e-5)).all())
    assert difference.norm() < 0.6 * step * exact_WTI.double().norm()


def make_model(variant: str) -> Kraken:
    torch.manual_seed(1)
    shape = {"num_layers": 3, "context_length": 48, "vocab_size": 128} | DIVISIBLE[variant] | {"width": 96}
    model = Kraken(ModelConfig(**shape))
    model.init_weights(seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 and parameter.std() > 0 else parameter.normal_(1.0, 0.2)
    return model.to(torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize("with_gelu", [False, True])
def test_rows_stand_for_their_values(with_gelu: bool) -> None:
    torch.manual_seed(0)
    x_WTI = torch.randn(2, 5, 48, device=DEVICE) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1e4], device=DEVICE)[:, None]
    rows = kernels_of().quantize(x_WTI, with_gelu)
    assert rows.values_WTI.dtype == FLOAT8 and rows.scales_WT1.dtype == torch.float32
    assert_near(rows, F.gelu(x_WTI, approximate="tanh") if with_gelu else x_WTI)
    assert not meant(rows)[:, 3].any() and meant(rows).isfinite().all()


@needs_triton
@pytest.mark.parametrize("with_gelu", [False, True])
def test_the_kernel_equals_the_plain_operations(with_gelu: bool) -> None:
    from kraken.engine.kernels.cuda import quantization as quantized_kernel

    torch.manual_seed(0)
    x_WTI = torch.randn(3, 2, 5, 40, device=DEVICE)[:, 1] * 7  # of any strides
    x_WTI[:, 2] = 0
    rows = quantized_kernel.quantize(x_WTI, with_gelu)
    assert rows.values_WTI.shape == (3, 5, 40) and rows.values_WTI.dtype == FLOAT8
    assert_near(rows, F.gelu(x_WTI, approximate="tanh") if with_gelu else x_WTI, KERNEL_STEP)


@needs_triton
@pytest.mark.parametrize("num_ways", [1, 3])
def test_norms_are_quantised_where_they_are_computed(num_ways: int) -> None:
    from kraken.engine.kernels.cuda import residual_norm as residual_kernel

    torch.manual_seed(0)
    x_WTD, y_WTD = torch.randn(2, num_ways, 5, 40, device=DEVICE)
    norm = Norm(torch.randn(num_ways, 40, device=DEVICE), torch.randn(num_ways, 40, device=DEVICE))
    quantised = dataclasses.replace(norm, is_quantized=True)
    for kernel in (residual_kernel.add_norm, residual_kernel.add_reduced_norm):
        plain, rows = kernel(x_WTD, y_WTD, norm), kernel(x_WTD, y_WTD, quantised)
        assert torch.equal(plain[0], rows[0])
        assert isinstance(plain[1], Tensor) and isinstance(rows[1], QuantizedTensor)
        assert_near(rows[1], plain[1], KERNEL_STEP)


@needs_triton
def test_the_norm_of_a_sum_over_devices_is_quantized_too() -> None:
    from kraken.engine.kernels.cuda.peer import PeerKernels

    torch.manual_seed(0)
    flags = [torch.zeros(2, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    ranks = [PeerKernels(rank, flags[rank], (flags[1 - rank][rank : rank + 1],)) for rank in range(2)]
    parts, slots, x_TD = torch.randn(2, 3, 40, device=DEVICE), torch.empty(2, 120, device=DEVICE), torch.zeros(3, 40)
    for rank, signals in enumerate(ranks):
        signals.publish(parts[rank], slots[rank], 0, waits=True)
    out_TD, norm = torch.empty(3, 40, device=DEVICE), Norm(torch.ones(1, 40, device=DEVICE), None, is_quantized=True)
    rows = ranks[0].reduce_add_norm(x_TD.to(DEVICE), (slots[0], slots[1]), out_TD, norm, 0)
    assert isinstance(rows, QuantizedTensor)
    assert_near(rows, norm(out_TD[None]), KERNEL_STEP)


@pytest.mark.parametrize("num_ways", [1, 2])
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_products_are_of_what_rows_and_weights_stand_for(num_ways: int, num_tokens: int) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16
    x_WTI = torch.randn(num_ways, num_tokens, 64, device=DEVICE).to(dtype)
    weight_WOI, bias_WO = torch.randn(num_ways, 32, 64, device=DEVICE).to(dtype), torch.randn(num_ways, 32).to(dtype)
    kernels = kernels_of()
    linear = Fp8Linear(weight_WOI, bias_WO.to(DEVICE), kernels)
    found = linear(x_WTI)
    assert found.shape == (num_ways, num_tokens, 32) and found.dtype == dtype
    weights = meant(kernels.quantize(weight_WOI))
    exact = meant(kernels.quantize(x_WTI)) @ weights.transpose(1, 2) + bias_WO.to(DEVICE).double()[:, None]
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(linear(kernels.quantize(x_WTI)), found, rtol=0, atol=0)
    full = F.linear(x_WTI[0], weight_WOI[0], bias_WO[0].to(DEVICE)).double()
    assert (found[0] - full).norm() / full.norm() < 0.05
    after_gelu = Fp8Linear(weight_WOI, None, kernels, gelu_before=True)(x_WTI)
    expected = meant(kernels.quantize(x_WTI, with_gelu=True)) @ weights.transpose(1, 2)
    torch.testing.assert_close(after_gelu.double(), expected, rtol=2**-7, atol=2**-7)


def logprobs(model: Kraken, quantization: Quantization, num_pieces: int) -> Tensor:
    """Of every id after each of some tokens, computed in so many pieces."""
    weights = {name: weight.clone() for name, weight in weights_of(model, Part(model.config)).items()}
    network = Network(
        Part(model.config),
        weights,
        NUM_IDS,
        DeviceGroup(choose_kernels(torch.device(DEVICE), model.wte.weight.dtype)),
        quantization,
    )
    runner = ModelRunner(network, num_blocks=16, tokens_per_block=4)
    ids = torch.randint(NUM_IDS, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    size = len(ids) // num_pieces
    batches = [
        StepBatch.concatenate([ids[start : start + size]], [start], [list(range(8))], [size], 4)
        for start in range(0, len(ids), size)
    ]
    return torch.cat([runner.forward(batch).logits_RV.log_softmax(-1).clone() for batch in batches])


@pytest.mark.parametrize("variant", DIVISIBLE)
def test_an_engine_is_near_the_one_in_full_precision(variant: str) -> None:
    model = make_model(variant).to(DEVICE)
    full, quantised = logprobs(model, "none", 1), logprobs(model, "fp8", 1)
    difference = (quantised - full).abs()
    assert 0.0 < difference.mean() < 0.1 and difference.max() < 1.0
    one_by_one = (logprobs(model, "fp8", 24) - quantised).abs()  # bfloat16's rounding, magnified by float8's
    assert one_by_one.mean() < 0.05 and one_by_one.max() < 0.5


@pytest.mark.slow
def test_two_processes_equal_one() -> None:
    """Each way is quantised by itself, wherever it is; what is left is bfloat16's rounding, magnified by float8's."""
    model, made = make_model("kraken_2way"), requests(14, max_tokens=1)
    settings: dict[str, Any] = {"quantization": "fp8", "dtype": "bfloat16", "max_batch_size": 4}
    alone, divided = (run(model, together(made), num_devices=count, num_threads=2, **settings) for count in (1, 2))
    differences = []
    for ours, theirs in zip(divided, alone, strict=True):
        first, expected = (
            next(o for o in outputs if isinstance(o, TokenOutput)).logprobs for outputs in (ours, theirs)
        )
        assert first is not None and expected is not None
        differences += [abs(found - value) for (_, found), (_, value) in zip(first.top, expected.top, strict=True)]
    assert sum(differences) / len(differences) < 0.06 and max(differences) < 0.2


def refusal(model: dict[str, Any], num_devices: int = 1, dtype: torch.dtype = torch.bfloat16) -> str:
    shape = {"num_layers": 1, "context_length": 32, "vocab_size": 128, "num_heads": 4, "num_ways": 1} | model
    with pytest.raises(ConfigError) as error:
        require_quantizable(ModelConfig(**shape), num_devices, torch.device("cpu"), dtype)
    return str(error.value)


def test_what_cannot_be_quantised_is_refused() -> None:
    assert "width of 24" in refusal({"width": 24, "ffn_multiple": 2, "num_ways": 2})
    standard = {"width": 48, "ffn_multiple": 4, "architecture": "standard"}
    assert "heads' channels of 24; leave it out" in refusal(standard, num_devices=2)
    assert "the model is in torch.float32" in refusal(standard, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"quantization=fp8 computes in bfloat16, but engine.dtype=float32"):
        EngineConfig(quantization="fp8", dtype="float32")
    with pytest.raises(ConfigError, match=r"quantization=fp8 is not possible .* with engine.kind=tensorrt_llm"):
        EngineConfig(quantization="fp8", kind="tensorrt_llm")
    model = Kraken(ModelConfig(num_layers=1, width=24, num_heads=2, num_ways=2, context_length=48, vocab_size=128))
    with pytest.raises(ConfigError, match=r"needs sizes that are multiples of 16"):
        TorchEngine.from_model(model.to(torch.bfloat16), INFO, EngineConfig(quantization="fp8", device="cpu"))
