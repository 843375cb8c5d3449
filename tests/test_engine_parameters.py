"""Sampling parameters at the edge of what engines compute with: refused by name, or the token is the one they mean."""

import asyncio
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch

from kraken.config import EngineConfig
from kraken.engine.batch import ForwardOutput, SamplingInput
from kraken.engine.engine import TorchEngine
from kraken.engine.kernels.choose import choose_kernels
from kraken.engine.kernels.torch.kernels import TorchKernels
from kraken.engine.protocol import (
    MAX_STOP_STRINGS,
    ContextLengthExceeded,
    EngineInfo,
    Request,
    RequestError,
    SamplingParams,
    TokenOutput,
    check_request,
    check_stop_strings,
)
from kraken.engine.sampler import Sampler
from kraken.model import Kraken

NUM_IDS = 301
SMALLEST_FLOAT64 = 5e-324
EXTREMES: dict[str, Sequence[float]] = {
    "temperature": (0.0, SMALLEST_FLOAT64, 1e-46, 1e-40, 1e-38, 1.2e-38, 1e-30, 1.0, 100.0),
    "top_p": (0.0, SMALLEST_FLOAT64, 1e-300, 1e-46, 1e-40, 1e-10, 1e-9, 0.5, 1.0 - 1e-9, 1.0),
    "top_k": (-1, 0, 1, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30),
    "min_p": (0.0, SMALLEST_FLOAT64, 1e-46, 1e-38, 0.5, 1.0 - 1e-9, 1.0),
    "repetition_penalty": (0.01, 1.0 + 1e-12, 100.0),
    "seed": (-(2**63), -1, 0, 2**63 - 1),
}
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}


def extreme_params() -> list[dict[str, Any]]:
    """Every extreme value of every parameter, beside every extreme value of every other one."""
    pairs = itertools.combinations(EXTREMES, 2)
    return [
        NEUTRAL | {first: a, second: b}
        for first, second in pairs
        for a, b in itertools.product(EXTREMES[first], EXTREMES[second])
    ]


def means_greedy(fields: dict[str, Any]) -> bool:
    """Whether the fields leave the most likely of `NUM_IDS` ids alone; its probability is at least 1 / NUM_IDS."""
    return (
        fields["temperature"] < 2.0**-126
        or fields["top_k"] == 1
        or fields["top_p"] < 1.0 / NUM_IDS
        or fields["min_p"] == 1.0
    )


@pytest.mark.parametrize("kernels", [choose_kernels(torch.device("cpu"), torch.float32), TorchKernels()])
def test_extreme_parameters_sample_what_they_mean(kernels: TorchKernels) -> None:
    cases = extreme_params()
    logits_V = torch.randn(NUM_IDS, generator=torch.Generator().manual_seed(1)) * 8.0
    inputs = [
        SamplingInput(SamplingParams(**fields), seed=fields["seed"], token_index=3, seen_ids=(5, 9, 200))
        for fields in cases
    ]
    chosen = Sampler(kernels).sample(ForwardOutput(logits_V.repeat(len(cases), 1)), inputs)
    for fields, token_id in zip(cases, chosen, strict=True):
        assert token_id is not None and 0 <= token_id < NUM_IDS, fields
        if means_greedy(fields) and fields["repetition_penalty"] == 1.0:
            assert token_id == int(logits_V.argmax()), fields


def test_the_engine_serves_extreme_parameters() -> None:
    model_config = tiny.config().model
    info = EngineInfo(
        name="torch",
        context_length=model_config.context_length,
        num_ids=NUM_IDS,
        eot_id=NUM_IDS - 1,
        tokenizer_fingerprint="none",
    )
    alone = [NEUTRAL | {name: value} for name, values in EXTREMES.items() for value in values]

    async def complete(engine: TorchEngine, name: str, fields: dict[str, Any]) -> list[int]:
        request = Request(id=name, prompt_ids=(5, 6, 5), sampling=SamplingParams(max_tokens=6, **fields))
        return [output.token_id async for output in engine.generate(request) if isinstance(output, TokenOutput)]

    async def main() -> tuple[list[int], list[list[int]]]:
        model = Kraken(model_config)
        model.init_weights(seed=0)
        engine = TorchEngine.from_model(model, info, EngineConfig(device="cpu", dtype="float32"))
        try:
            greedy = await complete(engine, "greedy", {"temperature": 0.0})
            calls = (complete(engine, f"{index}", fields) for index, fields in enumerate(alone))
            return greedy, list(await asyncio.gather(*calls))
        finally:
            await engine.close()

    greedy, found = asyncio.run(main())
    for fields, ids in zip(alone, found, strict=True):
        assert len(ids) == 6 and all(0 <= token_id < NUM_IDS for token_id in ids), fields
        if means_greedy(fields):
            assert ids == greedy, fields


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", (-1, -(2**63))),
        ("min_tokens", (-1, 17, 2**63)),
        ("temperature", (-1e-46, 100.0001, float("inf"), float("nan"))),
        ("top_p", (-1e-46, 1.0001, float("inf"), float("nan"))),
        ("top_k", (-2, -(2**63))),
        ("min_p", (-1e-46, 1.0001, float("nan"))),
        ("repetition_penalty", (0.0, 1e-300, 1e-38, 0.0099, 100.0001, float("inf"), float("nan"))),
        ("seed", (2**63, -(2**63) - 1)),
    ],
)
def test_what_no_engine_computes_is_refused_by_name(field: str, values: Sequence[float]) -> None:
    for value in values:
        fields: dict[str, Any] = {field: value}
        with pytest.raises(RequestError, match=f"^{field}=") as caught:
            SamplingParams(**fields)
        assert caught.value.field == field


def test_requests_that_the_model_cannot_serve_are_refused_by_name() -> None:
    info = EngineInfo(name="x", context_length=32, num_ids=NUM_IDS, eot_id=0, tokenizer_fingerprint="none")
    good = Request(id="r", prompt_ids=(1, 2))
    for changes, field in (
        ({"prompt_ids": (2**70,)}, "prompt"),
        ({"prompt_ids": (-1,)}, "prompt"),
        ({"prompt_ids": ()}, "prompt"),
        ({"num_logprobs": 2**40}, "num_logprobs"),
        ({"num_logprobs": -1}, "num_logprobs"),
        ({"sampling": SamplingParams(stop_ids=(2**63,))}, "stop_ids"),
    ):
        with pytest.raises(RequestError) as caught:
            check_request(dataclasses.replace(good, **changes), info)
        assert caught.value.field == field
    with pytest.raises(ContextLengthExceeded, match="context of 32"):
        check_request(dataclasses.replace(good, sampling=SamplingParams(max_tokens=2**63)), info)


def test_stop_strings_are_bounded_and_not_empty() -> None:
    check_stop_strings([f"stop {index}" for index in range(MAX_STOP_STRINGS)])
    for stop in ([""], ["a", ""], [f"{index}" for index in range(MAX_STOP_STRINGS + 1)]):
        with pytest.raises(RequestError, match=r"^stop holds") as caught:
            check_stop_strings(stop)
        assert caught.value.field == "stop"
