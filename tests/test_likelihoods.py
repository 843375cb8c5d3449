"""One definition of probability, over the tokenizer's ids, for everything that reports or compares likelihoods.

The trainer's validation, the PyTorch engine, the endpoint and the Hugging Face code score the same windows with a model
that is trained, and whose vocabulary is padded by a fifth: a softmax over the padding ids would show in every token.
"""

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai
import pytest
import tiny
import torch
from served import served
from torch import Tensor

from kraken.checkpoint.reader import load_model
from kraken.config import EngineConfig, RunConfig, ServeConfig
from kraken.convert import CONFIG_NAME, read_model_config, write_exchange
from kraken.data.shards import TokenShards
from kraken.engine.engine import TorchEngine
from kraken.engine.protocol import PromptOutput, Request, SamplingParams
from kraken.evaluate import collect, parity, perplexity
from kraken.manifest import ArtefactError, finish_artefact
from kraken.model import Kraken
from kraken.model.loss import chunk_gradient, chunked_cross_entropy
from kraken.model.ways import WayGroup
from kraken.tokenizer import Tokenizer
from kraken.training.train import train
from serve.app import ServeArgs

TOLERANCE = 1e-4
"""Nats per token, in float32."""
NUM_WINDOWS = 4
MODEL = "likelihoods"

HUGGING_FACE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.inference_mode():
    logits, loss = model(ids).logits[:, :-1], model(ids, labels=ids).loss
logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
print(json.dumps({"logprobs": logprobs.tolist(), "loss": loss.item()}))
"""


def run_config() -> RunConfig:
    """261 ids in a vocabulary of 320."""
    run = tiny.config(steps=12, precision="float32", learning_rate=1e-2, validation_windows=NUM_WINDOWS)
    data = dataclasses.replace(run.data, num_trained_ids=260)
    return dataclasses.replace(run, data=data, model=dataclasses.replace(run.model, vocab_size=data.vocab_size))


@dataclass(frozen=True)
class Trained:
    """A trained model in every form, and the windows [B, T+1] of its validation."""

    data: Path
    exchange: Path
    model: Kraken
    windows: list[list[int]]
    validation_loss: float
    """The trainer's."""
    num_ids: int
    logprobs: Tensor
    """Of every token of the windows but the first, by a softmax over the tokenizer's ids, in float64."""
    padded_logprobs: Tensor
    """The same by a softmax over the padded vocabulary."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root, run = tmp_path_factory.mktemp("likelihoods"), run_config()
    tiny.prepared(root / "data", run)
    metrics = train(run, root / "data", root / "run")
    checkpoint, exchange = root / "run" / "step_000000012", root / "exchange"
    exchange.mkdir()
    converted, details = write_exchange(checkpoint, root / "data", exchange)
    fields = {"kind": "convert", "fingerprint": "tiny", "config": {}, "parents": {}}
    finish_artefact(exchange, started_at=time.monotonic(), metrics=converted, details=details, **fields)
    tokenizer = Tokenizer.load(root / "data")
    model, _ = load_model(checkpoint)
    length = run.model.context_length + 1
    shards = TokenShards(root / "data", "validation", tokenizer.num_ids)
    # the trainer's choice: every so many windows of the split, which share their first and last tokens
    starts = range(0, shards.num_tokens - length + 1, length - 1)
    starts = starts[:: max(1, len(starts) // NUM_WINDOWS)][:NUM_WINDOWS]
    windows = [shards.read(start, length).tolist() for start in starts]
    ids = torch.tensor(windows)
    with torch.inference_mode():
        logits = model(ids[:, :-1]).double()
    targets = ids[:, 1:, None]
    return Trained(
        data=root / "data",
        exchange=exchange,
        model=model,
        windows=windows,
        validation_loss=float(metrics["final_validation_loss"].value),
        num_ids=tokenizer.num_ids,
        logprobs=logits[..., : tokenizer.num_ids].log_softmax(-1).gather(-1, targets)[..., 0],
        padded_logprobs=logits.log_softmax(-1).gather(-1, targets)[..., 0],
    )


def test_padding_ids_would_show(trained: Trained) -> None:
    """Otherwise the tests below could not fail."""
    assert trained.num_ids == 261 and trained.model.config.vocab_size == 320
    assert (trained.logprobs - trained.padded_logprobs).mean() > 100 * TOLERANCE


def test_the_trainers_validation(trained: Trained) -> None:
    assert trained.validation_loss == pytest.approx(-trained.logprobs.mean().item(), abs=TOLERANCE)


def with_engine(trained: Trained, use: Callable[[TorchEngine], object]) -> object:
    async def main() -> object:
        config = EngineConfig(device="cpu", dtype="float32", num_threads=1)
        engine = TorchEngine.from_exchange(trained.exchange, config)
        try:
            return await use(engine)  # type: ignore[misc]
        finally:
            await engine.close()

    return asyncio.run(main())


def test_the_torch_engine(trained: Trained) -> None:
    async def scores(engine: TorchEngine) -> list[list[float]]:
        rows = []
        for window in trained.windows:
            sampling = SamplingParams(max_tokens=0)
            request = Request(id="r", prompt_ids=tuple(window), sampling=sampling, prompt_logprobs=True)
            (output,) = await collect(engine, request)
            assert isinstance(output, PromptOutput)
            rows.append([entry.logprob for entry in output.logprobs if entry])
        return rows

    found = torch.tensor(with_engine(trained, scores), dtype=torch.float64)
    torch.testing.assert_close(found, trained.logprobs, rtol=0, atol=TOLERANCE)


def test_the_hugging_face_code(trained: Trained, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", HUGGING_FACE, str(trained.exchange), json.dumps(trained.windows)]
    # its positions end with the context: the last token of a window is only scored
    command[-1] = json.dumps([window[:-1] for window in trained.windows])
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    expected = trained.logprobs[:, :-1]
    torch.testing.assert_close(torch.tensor(said["logprobs"], dtype=torch.float64), expected, rtol=0, atol=TOLERANCE)
    assert said["loss"] == pytest.approx(-expected.mean().item(), abs=TOLERANCE)


def test_the_endpoint(trained: Trained) -> None:
    args = ServeArgs(
        exchange=str(trained.exchange),
        engine="torch",
        engine_config=EngineConfig(device="cpu", dtype="float32", num_threads=1),
        serve_config=ServeConfig(model_name=MODEL),
    )
    with served(args) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        completion = client.completions.create(
            model=MODEL, prompt=trained.windows, max_tokens=0, echo=True, logprobs=1, temperature=0.0
        )
    rows = [choice.logprobs.token_logprobs[1:] for choice in completion.choices if choice.logprobs]
    found = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(found, trained.logprobs, rtol=0, atol=TOLERANCE)


def test_perplexity_is_the_exponential_of_the_mean(trained: Trained) -> None:
    """The metrics of an evaluation, derived from the model's logits over the whole split and the text's bytes."""
    tokenizer = Tokenizer.load(trained.data)
    shards = TokenShards(trained.data, "validation", tokenizer.num_ids)
    evaluated = with_engine(trained, lambda e: perplexity(e, shards, tokenizer, None, lambda done, count: None))
    found = {name: metric.value for name, metric in evaluated.items()}  # type: ignore[attr-defined]
    ids, T = shards.read(0, shards.num_tokens), trained.model.config.context_length
    nats = 0.0
    for start in range(0, len(ids) - 1, T):
        window = torch.from_numpy(ids[start : start + T + 1].astype(np.int64))[None]
        with torch.inference_mode():
            logits = trained.model(window[:, :-1])[..., : trained.num_ids].double()
        nats -= logits.log_softmax(-1).gather(-1, window[:, 1:, None]).sum().item()
    num_bytes = sum(len(tokenizer.token_bytes(int(i))) for i in ids[1:] if i != tokenizer.eot_id)
    assert (found["scored_tokens"], found["scored_bytes"]) == (len(ids) - 1, num_bytes)
    assert found["validation_loss"] == pytest.approx(nats / (len(ids) - 1), abs=TOLERANCE)
    assert found["validation_perplexity"] == pytest.approx(np.exp(nats / (len(ids) - 1)), rel=TOLERANCE)
    assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) / num_bytes, rel=TOLERANCE)


def test_the_gate_passes(trained: Trained) -> None:
    report = with_engine(trained, lambda e: parity(e, trained.model, [w[:20] for w in trained.windows], 8, TOLERANCE))
    assert report.passed and report.num_tokens == 32  # type: ignore[attr-defined]


@pytest.mark.parametrize("faulty", ["engine", "trainer"])
def test_the_gate_notices_a_softmax_over_the_padding_ids(
    faulty: str, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every logit is right in both cases; the log-probabilities computed from them are wrong."""
    shift = 50 * TOLERANCE
    if faulty == "trainer":
        whole = Kraken.loss
        monkeypatch.setattr(Kraken, "loss", lambda self, ids, targets, num_ids=None: whole(self, ids, targets))
    else:
        import kraken.engine.core as engine_module

        scored = engine_module.token_logprobs

        def over_more(*args: object) -> list[object]:
            entries = scored(*args)  # type: ignore[arg-type]
            return [dataclasses.replace(entry, logprob=entry.logprob - shift) for entry in entries]

        monkeypatch.setattr(engine_module, "token_logprobs", over_more)
    report = with_engine(trained, lambda e: parity(e, trained.model, [trained.windows[0][:20]], 4, TOLERANCE))
    assert not report.passed and report.max_abs_diff > shift / 2  # type: ignore[attr-defined]


class ThreadedWays(WayGroup):
    """A way group whose processes are threads."""

    def __new__(cls, *args: object) -> "ThreadedWays":
        return object.__new__(cls)

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, values: list[Tensor | None]):
        for name, value in (("rank", rank), ("size", size), ("group", (barrier, values))):
            object.__setattr__(self, name, value)

    def all_gather(self, x: Tensor) -> Tensor:
        barrier, values = self.group  # type: ignore[misc]
        values[self.rank] = x.clone()
        barrier.wait()
        stacked = torch.stack([value for value in values if value is not None])
        barrier.wait()
        return stacked

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(self.all_gather(x).sum(dim=0))


@pytest.mark.parametrize("num_ids", [320, 261, 130, 3])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_vocabulary_divided_among_processes(num_ids: int, needs_gradient: bool) -> None:
    """Of 320 ids four processes hold 80 each: with few real ids some of them hold padding alone."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD, weight_VD = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (12, 320))
    targets_T = torch.randint(num_ids, (12,), generator=generator)
    whole = [x.clone().requires_grad_(needs_gradient) for x in (hidden_TD, weight_VD)]
    logits_TV = whole[0] @ whole[1][:num_ids].T
    expected = torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum")
    alone = chunked_cross_entropy(*whole, targets_T, chunk_gradient, WayGroup(), 320, num_ids)
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-10)
    barrier, values = threading.Barrier(4), [None] * 4

    def run(rank: int) -> tuple[Tensor, list[Tensor | None]]:
        ways = ThreadedWays(rank, 4, barrier, values)  # type: ignore[arg-type]
        rows = ways.part(320)
        parts = [x.clone().requires_grad_(needs_gradient) for x in (hidden_TD, weight_VD[rows.start : rows.stop])]
        loss = chunked_cross_entropy(*parts, targets_T, chunk_gradient, ways, 320, num_ids)
        if needs_gradient:
            loss.backward()
        return loss.detach(), [part.grad for part in parts]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(4)))
    for loss, _ in found:
        torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-10)
    if needs_gradient:
        expected.backward()
        torch.testing.assert_close(found[0][1][0], whole[0].grad, rtol=0, atol=1e-10)
        joined = torch.cat([gradients[1] for _, gradients in found])  # type: ignore[misc]
        torch.testing.assert_close(joined, whole[1].grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("value", "said"), [(None, "lacks 'num_token_ids'"), (321, "num_token_ids=321")])
def test_a_folder_that_does_not_say_how_many_ids_there_are(
    value: int | None, said: str, trained: Trained, tmp_path: Path
) -> None:
    values = json.loads((trained.exchange / CONFIG_NAME).read_text()) | {"num_token_ids": value}
    if value is None:
        del values["num_token_ids"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
    with pytest.raises(ArtefactError, match=said):
        read_model_config(tmp_path)
