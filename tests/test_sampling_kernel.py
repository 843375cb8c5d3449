"""The Triton kernel that inputs the next token against torch; without CUDA by Triton's interpreter, where that is
installed."""

import importlib.util
from typing import Any

import pytest
import torch

from kraken.engine.batch import ForwardOutput, SamplingInput, uniform
from kraken.engine.kernels.torch.kernels import TorchKernels
from kraken.engine.protocol import SamplingParams
from kraken.engine.sampler import Sampler

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = (0.0, 0.0)


@pytest.fixture(autouse=True)
def small_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    from kraken.engine.kernels.cuda import sampling as sampling_kernel

    monkeypatch.setattr(sampling_kernel, "TILE", 512)


def sample_ids(logits_BV: torch.Tensor, pairs: list[tuple[float, float]]) -> list[int]:
    from kraken.engine.kernels.cuda import sampling as sampling_kernel

    temperature_uniform_B2 = torch.tensor(pairs, dtype=torch.float64, device=logits_BV.device)
    found: list[int] = sampling_kernel.sample_ids(logits_BV, temperature_uniform_B2).tolist()
    return found


@pytest.mark.parametrize("num_ids", [1, 50, 513, 1300])
def test_the_most_likely_ids_equal_those_of_torch(num_ids: int) -> None:
    torch.manual_seed(0)
    logits_BV = torch.randint(-9, 5, (40, num_ids + 3), device=DEVICE).float()[:, :num_ids]  # many are equal
    found = sample_ids(logits_BV, [GREEDY] * 40)
    assert found == logits_BV.cpu().max(dim=-1).indices.tolist()
    assert found == sample_ids(logits_BV.t().contiguous().t(), [GREEDY] * 40)


def test_rows_that_are_no_numbers_have_none() -> None:
    nan, inf = torch.nan, torch.inf
    logits_BV = torch.zeros(6, 700, device=DEVICE)
    logits_BV[0, 699], logits_BV[1, 3], logits_BV[2] = nan, inf, -inf
    logits_BV[3, 5:], logits_BV[4, :600], logits_BV[5, 400] = -inf, -inf, 90
    assert sample_ids(logits_BV, [GREEDY] * 6) == [-1, -1, -1, 0, 600, 400]
    assert sample_ids(logits_BV, [(1.0, 0.5)] * 6) == [-1, -1, -1, 2, 650, 400]


@pytest.mark.parametrize("num_ids", [1, 50, 256, 1300])
@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 100.0])
def test_inputs_walk_the_distribution(num_ids: int, temperature: float) -> None:
    """Each falls where the cumulative distribution, in float64, passes the uniform number; ids without any weight are
    never drawn."""
    torch.manual_seed(1)
    logits_BV = 4 * torch.randn(60, num_ids + 5, device=DEVICE)[:, 2 : 2 + num_ids]
    if num_ids > 1:
        logits_BV[:, 1::3] = -torch.inf
    places = [0.0, 1.0 - 2.0**-53, *(uniform(3, index) for index in range(58))]
    found = sample_ids(logits_BV, [(temperature, place) for place in places])
    shares_BV = (logits_BV.double() / temperature).softmax(dim=-1).cpu()
    mass_BV = shares_BV.cumsum(dim=-1)
    for row, (token, place) in enumerate(zip(found, places, strict=True)):
        assert shares_BV[row, token] > 0
        assert mass_BV[row, token] - shares_BV[row, token] - 1e-5 <= place <= mass_BV[row, token] + 1e-5


def test_a_pass_that_inputs_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every kind: those that the pass has drawn are taken over, truncated and constrained ones are not."""
    from kraken.engine.kernels.cuda import sampling as sampling_kernel
    from kraken.engine.kernels.cuda.kernels import CudaKernels

    def sample(logits_BV: torch.Tensor, inputs: list[SamplingInput], next_B: Any = None) -> list[int | None]:
        return Sampler(CudaKernels()).sample(ForwardOutput(logits_BV, next_B), inputs)

    torch.manual_seed(2)
    logits_BV = 3 * torch.randn(6, 700, device=DEVICE)
    logits_BV[5, 0] = torch.nan
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0}, {}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.6, "temperature": 2.0}, {},
    ]  # fmt: skip
    inputs = [SamplingInput(SamplingParams(**kind), seed, 4) for seed, kind in enumerate(kinds)]
    expected = Sampler(TorchKernels()).sample(ForwardOutput(logits_BV), inputs)
    assert expected[5] is None and len(set(expected)) == 6
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Idle())
    assert sample(logits_BV, inputs) == expected
    temperature_uniform_B2 = torch.tensor(
        [row.temperature_and_uniform for row in inputs], dtype=torch.float64, device=DEVICE
    )
    next_B = sampling_kernel.sample_ids(logits_BV, temperature_uniform_B2)
    assert sample(logits_BV, inputs, next_B.cpu()) == expected
    assert sample(logits_BV[:3], inputs[:3], next_B[:3].cpu()) == expected[:3]
    penalised = SamplingInput(SamplingParams(temperature=0.0, repetition_penalty=100.0), 0, 1, {expected[0] or 0})
    other = sample(logits_BV[:2], [penalised, inputs[1]], next_B[:2].cpu())
    assert other[0] != expected[0] and other[1] == expected[1]


class Idle:
    """A stream that has nothing to do."""

    def synchronize(self) -> None:
        pass
