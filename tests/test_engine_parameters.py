"""Sampling parameters at the edge of what engines compute with: refused by name, or the token is the one they mean."""

import asyncio
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
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
    "presence_penalty": (-2.0, SMALLEST_FLOAT64, 2.0),
    "frequency_penalty": (-2.0, SMALLEST_FLOAT64, 2.0),
    "seed": (-(2**63), -1, 0, 2**63 - 1),
}
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}
NEUTRAL |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}


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
        SamplingInput(
            SamplingParams(**fields), seed=fields["seed"], token_index=3, seen_ids=(5, 9, 200), counts={5: 2, 9: 1}
        )
        for fields in cases
    ]
    chosen = Sampler(kernels).sample(ForwardOutput(logits_V.repeat(len(cases), 1)), inputs)
    for fields, token_id in zip(cases, chosen, strict=True):
        assert token_id is not None and 0 <= token_id < NUM_IDS, fields
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        if means_greedy(fields) and all(fields[name] == NEUTRAL[name] for name in penalties):
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


def test_penalties_act_on_what_each_request_has_generated() -> None:
    """Greedy requests of one batch against argmax over the engine's own logits, with the definition written out."""
    model_config = tiny.config().model
    info = EngineInfo(
        name="torch",
        context_length=model_config.context_length,
        num_ids=NUM_IDS,
        eot_id=NUM_IDS - 1,
        tokenizer_fingerprint="none",
    )
    kinds: list[dict[str, Any]] = [
        {},
        {"presence_penalty": 2.0},
        {"frequency_penalty": -2.0},
        {"frequency_penalty": 1.5, "presence_penalty": -0.5},
        {"logit_bias": ((7, 100.0), (9, -100.0))},
        {"logit_bias": ((7, 3.0),), "frequency_penalty": 2.0, "repetition_penalty": 1.3},
    ]

    async def complete(engine: TorchEngine, index: int, fields: dict[str, Any]) -> list[TokenOutput]:
        sampling = SamplingParams(max_tokens=12, temperature=0.0, **fields)
        request = Request(id=f"{index}", prompt_ids=(5, 6, 5), sampling=sampling, return_logits=True, num_logprobs=0)
        return [output async for output in engine.generate(request) if isinstance(output, TokenOutput)]

    async def main() -> list[list[TokenOutput]]:
        model = Kraken(model_config)
        model.init_weights(seed=0)
        engine = TorchEngine.from_model(model, info, EngineConfig(device="cpu", dtype="float32"))
        try:
            return list(await asyncio.gather(*(complete(engine, index, kind) for index, kind in enumerate(kinds))))
        finally:
            await engine.close()

    found = asyncio.run(main())
    for fields, outputs in zip(kinds, found, strict=True):
        generated: list[int] = []
        for output in outputs:
            assert output.logits_V is not None and output.logprobs
            values = output.logits_V.astype("float64")
            raw_logprob = values[output.token_id] - np.log(np.exp(values).sum())
            for token_id, bias in fields.get("logit_bias", ()):
                values[token_id] += bias
            for token_id in {5, 6, *generated}:
                penalty = fields.get("repetition_penalty", 1.0)
                values[token_id] = values[token_id] / penalty if values[token_id] > 0 else values[token_id] * penalty
            for token_id in set(generated):
                values[token_id] -= fields.get("presence_penalty", 0.0)
                values[token_id] -= fields.get("frequency_penalty", 0.0) * generated.count(token_id)
            assert output.token_id == values.argmax(), fields
            assert output.logprobs.logprob == pytest.approx(raw_logprob, abs=1e-4)
            generated.append(output.token_id)
    assert len({tuple(output.token_id for output in outputs) for outputs in found}) >= 4


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", (-1, -(2**63))),
        ("min_tokens", (-1, 17, 2**63)),
        ("temperature", (-1e-46, 100.0001, float("inf"), float("nan"))),
        ("top_p", (-1e-46, 1.0001, float("inf"), float("nan"))),
        ("top_k", (-2, -(2**63))),
        ("min_p", (-1e-46, 1.0001, float("nan"))),
        ("presence_penalty", (-2.0001, 2.0001, float("nan"))),
        ("frequency_penalty", (-2.0001, 2.0001, float("inf"))),
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
        ({"sampling": SamplingParams(logit_bias=((NUM_IDS, 1.0),))}, "logit_bias"),
        ({"sampling": SamplingParams(logit_bias=((-1, 1.0),))}, "logit_bias"),
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
