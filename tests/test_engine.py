"""Conversion, the PyTorch engine and evaluation: every path to a logit must give the same logit."""

import asyncio
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import tiny
import torch
from gate import Gate
from safetensors.torch import load_file, save_file

from kraken.checkpoint.reader import load_model
from kraken.config import ConfigError, EngineConfig
from kraken.convert import CONFIG_NAME, WEIGHTS_NAME, read_exchange, to_exchange, write_exchange
from kraken.data.loader import split_windows
from kraken.data.shards import TokenShards
from kraken.engine.batch import ForwardOutput, StepBatch
from kraken.engine.engine import TorchEngine
from kraken.engine.model_runner import ModelRunner
from kraken.engine.protocol import (
    EngineError,
    EngineInfo,
    EngineOverloaded,
    PromptOutput,
    Request,
    RequestError,
    SamplingParams,
    TokenOutput,
)
from kraken.evaluate import collect, parity, perplexity
from kraken.manifest import MANIFEST_NAME, ArtefactError, finish_artefact
from kraken.model.architecture import Kraken
from kraken.tokenizer import META_NAME, Tokenizer
from kraken.training.train import train

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Artefacts:
    data: Path
    checkpoint: Path
    exchange: Path


def convert(checkpoint: Path, data: Path, folder: Path) -> Path:
    folder.mkdir()
    metrics, details = write_exchange(checkpoint, data, folder)
    finish_artefact(
        folder,
        started_at=time.monotonic(),
        kind="convert",
        fingerprint="tiny",
        config={},
        parents={},
        metrics=metrics,
        details=details,
    )
    return folder


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    root = tmp_path_factory.mktemp("engine")
    tiny.prepared(root / "data")
    train(tiny.config(steps=20, precision="float32", learning_rate=3e-2), root / "data", root / "run")
    checkpoint = root / "run" / "step_000000020"
    return Artefacts(root / "data", checkpoint, convert(checkpoint, root / "data", root / "exchange"))


def with_engine(folder: Path, use: Callable[[TorchEngine], Awaitable[T]], **config: Any) -> T:
    """Run `use` with an engine of the folder, on an event loop of their own."""

    async def main() -> T:
        engine = TorchEngine.from_exchange(folder, EngineConfig(device="cpu", dtype="float32", **config))
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


def with_model(model: Kraken, num_ids: int, use: Callable[[TorchEngine], Awaitable[T]], **config: Any) -> T:
    """The same with a model in memory."""
    info = EngineInfo(
        name="torch",
        context_length=model.config.context_length,
        num_ids=num_ids,
        eot_id=num_ids - 1,
        tokenizer_fingerprint="none",
    )

    async def main() -> T:
        engine = TorchEngine.from_model(model, info, EngineConfig(device="cpu", dtype="float32", **config))
        try:
            return await use(engine)
        finally:
            await engine.close()
            assert engine.stats().num_free_blocks == engine.stats().num_blocks

    return asyncio.run(main())


def make_request(request_id: str, prompt: list[int], **fields: Any) -> Request:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    sampling = {"temperature": 0.0, "max_tokens": 8} | {k: v for k, v in fields.items() if k in names}
    rest = {k: v for k, v in fields.items() if k not in names}
    return Request(id=request_id, prompt_ids=tuple(prompt), sampling=SamplingParams(**sampling), **rest)


def with_model_tokens(artefacts: Artefacts, prompts: list[list[int]], num_tokens: int = 4) -> list[list[int]]:
    """Greedy tokens by whole forward passes of the trainer's model."""
    model, _ = load_model(artefacts.checkpoint)
    completions = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(num_tokens):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids]))[0, -1, :301].argmax()))
        completions.append(ids[len(prompt) :])
    return completions


async def tokens_of(engine: TorchEngine, request: Request) -> list[int]:
    return [o.token_id for o in await collect(engine, request) if isinstance(o, TokenOutput)]


def prompts_of(data: Path, *lengths: int) -> list[list[int]]:
    shards = TokenShards(data, "validation", 301)
    return [shards.read(7 * index, length).tolist() for index, length in enumerate(lengths)]


class TestExchange:
    def test_conversion_keeps_every_logit(self, artefacts: Artefacts) -> None:
        trained, _ = load_model(artefacts.checkpoint)
        converted = read_exchange(artefacts.exchange, torch.float32)
        ids = torch.tensor(prompts_of(artefacts.data, 32))
        assert torch.equal(trained(ids), converted(ids))

    def test_names_are_the_published_ones(self, artefacts: Artefacts) -> None:
        tensors = load_file(artefacts.exchange / WEIGHTS_NAME)
        model, _ = load_model(artefacts.checkpoint)
        assert tensors.keys() == to_exchange(model).keys()
        assert tensors["transformer.h.1.0.attn.c_attn.weight"].shape == (48, 16)
        assert torch.equal(tensors["transformer.h.1.0.attn.c_attn.weight"], model.h[0].attn.c_attn.weight[1])
        assert len(tensors) == 4 + 2 * 2 * 6
        assert "lm_head.weight" not in tensors

    def test_config_names_the_architecture(self, artefacts: Artefacts) -> None:
        config = json.loads((artefacts.exchange / CONFIG_NAME).read_text())
        assert config["architectures"] == ["KrakenForCausalLM"] and config["model_type"] == "kraken"
        assert (config["vocab_size"], config["num_token_ids"], config["eos_token_id"]) == (320, 301, 300)

    def test_a_damaged_folder_is_refused(self, artefacts: Artefacts, tmp_path: Path) -> None:
        folder = convert(artefacts.checkpoint, artefacts.data, tmp_path / "exchange")
        tensors = load_file(folder / WEIGHTS_NAME)
        name = "transformer.h.0.1.mlp.c_fc.weight"
        save_file({k: v for k, v in tensors.items() if k != name}, folder / WEIGHTS_NAME)
        with pytest.raises(ArtefactError, match="missing"):
            read_exchange(folder, torch.float32)
        save_file(tensors | {name: tensors[name][:-1].clone()}, folder / WEIGHTS_NAME)
        with pytest.raises(ArtefactError, match=name):
            read_exchange(folder, torch.float32)
        (folder / MANIFEST_NAME).unlink()
        with pytest.raises(ArtefactError, match="never finished there"):
            TorchEngine.from_exchange(folder, EngineConfig())

    def test_another_tokenizer_is_refused(self, artefacts: Artefacts, tmp_path: Path) -> None:
        folder = convert(artefacts.checkpoint, artefacts.data, tmp_path / "exchange")
        other = Tokenizer.train((d.text for d in tiny.corpus(tmp_path / "corpus").documents), 290)
        size = (folder / META_NAME).stat().st_size
        other.save(folder)
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        manifest["files"] = []  # sizes changed with the tokenizer; it is the fingerprint that must object
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
        assert size
        with pytest.raises(ArtefactError, match="belongs to tokenizer"):
            TorchEngine.from_exchange(folder, EngineConfig())


class TestEquality:
    def test_cached_decoding_equals_the_full_forward(self, artefacts: Artefacts) -> None:
        model, _ = load_model(artefacts.checkpoint)
        prompts = prompts_of(artefacts.data, 1, 5, 20)
        result = with_engine(artefacts.exchange, lambda e: parity(e, model, prompts, num_tokens=12, tolerance=1e-4))
        assert result.passed and result.num_tokens == 36 and result.max_abs_diff < 1e-4

    def test_parity_notices_a_different_model(self, artefacts: Artefacts) -> None:
        model, _ = load_model(artefacts.checkpoint)
        with torch.no_grad():
            model.h[1].mlp.c_proj.weight[1] *= 1.5
        result = with_engine(
            artefacts.exchange, lambda e: parity(e, model, prompts_of(artefacts.data, 20), num_tokens=4, tolerance=1e-4)
        )
        assert not result.passed

    def test_a_full_batch_equals_one_at_a_time(self, artefacts: Artefacts) -> None:
        """More requests than rows, of different lengths, greedy and seeded, arriving and leaving at different times."""
        prompts = prompts_of(artefacts.data, 3, 9, 14, 1, 20, 6, 2)
        requests = [
            make_request(
                f"r{i}", prompt, max_tokens=4 + 2 * i % 9, temperature=float(i % 2), seed=i, top_p=0.9, num_logprobs=2
            )
            for i, prompt in enumerate(prompts)
        ]

        async def together(engine: TorchEngine) -> list[Any]:
            return await asyncio.gather(*(collect(engine, r) for r in requests))

        async def apart(engine: TorchEngine) -> list[Any]:
            return [await collect(engine, r) for r in requests]

        batched = with_engine(artefacts.exchange, together, max_batch_size=3)
        single = with_engine(artefacts.exchange, apart, max_batch_size=1)
        for many, one in zip(batched, single, strict=True):
            assert [o.token_id for o in many] == [o.token_id for o in one]
            for a, b in zip(many, one, strict=True):
                assert a.logprobs.logprob == pytest.approx(b.logprobs.logprob, abs=1e-4)
                assert a.finish_reason == b.finish_reason

    def test_prompt_logprobs_equal_the_models_loss(self, artefacts: Artefacts) -> None:
        model, _ = load_model(artefacts.checkpoint)
        (prompt,) = prompts_of(artefacts.data, 33)
        request = make_request("r", prompt, max_tokens=0, prompt_logprobs=True, num_logprobs=3)
        (output,) = with_engine(artefacts.exchange, lambda e: collect(e, request))
        assert isinstance(output, PromptOutput)
        first, *rest = output.logprobs
        assert first is None and [entry.token_id for entry in rest if entry] == prompt[1:]
        logits = model(torch.tensor([prompt[:-1]]))[0, :, :301]
        expected = torch.log_softmax(logits, -1)[range(32), prompt[1:]]
        torch.testing.assert_close(torch.tensor([e.logprob for e in rest if e]), expected.detach(), rtol=0, atol=1e-4)
        for entry in rest:
            assert entry and len(entry.top) == 3 and entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1]
            for token_id, logprob in entry.top:
                assert token_id != entry.token_id or logprob == entry.logprob

    def test_perplexity_equals_the_models_own(self, artefacts: Artefacts) -> None:
        model, _ = load_model(artefacts.checkpoint)
        tokenizer = Tokenizer.load(artefacts.data)
        shards = TokenShards(artefacts.data, "validation", 301)
        metrics = with_engine(
            artefacts.exchange, lambda e: perplexity(e, shards, tokenizer, None, lambda done, total: None)
        )
        total, count = 0.0, 0
        for start in range(0, shards.num_tokens - 1, 32):
            window = shards.read(start, min(33, shards.num_tokens - start))
            inputs, targets = split_windows(window[None])
            logits = model(inputs).clone()
            logits[..., 301:] = -math.inf  # the engine masks padding ids, training does not
            total += float(tiny.next_token_loss(logits, targets).detach())
            count += targets.numel()
        assert count == shards.num_tokens - 1 == metrics["scored_tokens"].value
        assert metrics["validation_loss"].value == pytest.approx(total / count, abs=1e-5)
        text = tokenizer.decode_bytes(i for i in shards.read(1, shards.num_tokens - 1).tolist() if i != 300)
        assert metrics["scored_bytes"].value == len(text)
        assert metrics["bits_per_byte"].value == pytest.approx(total / math.log(2) / len(text), rel=1e-5)


class TestRequests:
    def test_a_seed_repeats_and_no_seed_varies(self, artefacts: Artefacts) -> None:
        (prompt,) = prompts_of(artefacts.data, 4)

        async def use(engine: TorchEngine) -> list[list[int]]:
            seeds = [5, 5, None, None]
            return [
                await tokens_of(engine, make_request(f"r{i}", prompt, temperature=2.0, max_tokens=20, seed=seed))
                for i, seed in enumerate(seeds)
            ]

        first, again, free, free_again = with_engine(artefacts.exchange, use)
        assert first == again
        assert free != free_again

    def test_a_stop_id_ends_the_completion(self, artefacts: Artefacts) -> None:
        (prompt,) = prompts_of(artefacts.data, 6)

        async def use(engine: TorchEngine) -> tuple[list[int], list[Any]]:
            free = await tokens_of(engine, make_request("a", prompt, max_tokens=12))
            return free, await collect(engine, make_request("b", prompt, max_tokens=12, stop_ids=(free[3],)))

        free, stopped = with_engine(artefacts.exchange, use)
        length = free.index(free[3]) + 1
        assert [o.token_id for o in stopped] == free[:length]
        assert [o.finish_reason for o in stopped] == [None] * (length - 1) + ["stop"]

    def test_the_context_can_be_filled_to_the_last_position(self, artefacts: Artefacts) -> None:
        (prompt,) = prompts_of(artefacts.data, 20)
        tokens = with_engine(artefacts.exchange, lambda e: collect(e, make_request("r", prompt, max_tokens=12)))
        assert len(tokens) == 12 and tokens[-1].finish_reason == "length"

    @pytest.mark.parametrize(
        ("prompt", "fields", "message"),
        [
            ([], {}, "prompt is empty"),
            ([301], {}, "token id 301"),
            ([-1], {}, "token id -1"),
            ([1] * 25, {"max_tokens": 8}, "exceed the context of 32"),
            ([1] * 34, {"max_tokens": 0}, "exceed the context of 32"),
            ([1], {"num_logprobs": 302}, "num_logprobs=302"),
            ([1], {"stop_ids": (301,)}, "stop_ids holds token id 301"),
            ([1], {"stop_ids": tuple(range(301)), "min_tokens": 1}, "stop_ids holds every id"),
        ],
    )
    def test_impossible_requests_are_refused(
        self, artefacts: Artefacts, prompt: list[int], fields: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(RequestError, match=message):
            with_engine(artefacts.exchange, lambda e: collect(e, make_request("r", prompt, **fields)))

    @pytest.mark.parametrize(
        "fields",
        [
            {"temperature": -1.0},
            {"top_p": -0.1},
            {"top_k": -2},
            {"min_p": 1.5},
            {"repetition_penalty": 0.0},
            {"max_tokens": -1},
            {"min_tokens": 17},
            {"seed": 2**63},
        ],
    )
    def test_impossible_sampling_is_refused(self, fields: dict[str, Any]) -> None:
        with pytest.raises(RequestError, match=next(iter(fields))):
            SamplingParams(**fields)


class TestLifetime:
    def test_an_aborted_request_frees_its_row(self, artefacts: Artefacts) -> None:
        (prompt,) = prompts_of(artefacts.data, 4)

        async def use(engine: TorchEngine) -> None:
            gate = Gate(engine)
            started = [engine.generate(make_request(f"r{i}", prompt, max_tokens=28)) for i in range(3)]
            firsts = asyncio.gather(*(anext(outputs) for outputs in started))
            await asyncio.sleep(0)  # all are queued, and some of them in the first step
            gate.go_on(2)
            await firsts
            await started[1].aclose()
            engine.abort("r0")
            engine.abort("r0")
            engine.abort("unknown")
            gate.open()
            survivor = [o.token_id async for o in started[2] if isinstance(o, TokenOutput)]
            assert len(survivor) == 27  # its first token was taken above
            alone = await tokens_of(engine, make_request("again", prompt, max_tokens=28))
            assert alone[1:] == survivor
            stats = engine.stats()
            assert (stats.num_running, stats.num_queued, stats.num_aborted) == (0, 0, 2)
            assert stats.num_finished == 2 and stats.healthy

        with_engine(artefacts.exchange, use)

    def test_the_queue_is_bounded(self, artefacts: Artefacts) -> None:
        (prompt,) = prompts_of(artefacts.data, 4)

        async def use(engine: TorchEngine) -> None:
            gate = Gate(engine)
            running = asyncio.create_task(collect(engine, make_request("running", prompt)))
            await gate.until_begun(1)
            tasks = [asyncio.create_task(collect(engine, make_request(f"r{i}", prompt))) for i in range(20)]
            await asyncio.sleep(0)
            gate.open()
            *queued, refused = await asyncio.gather(*tasks[:2], asyncio.gather(*tasks[2:], return_exceptions=True))
            assert all(isinstance(error, EngineOverloaded) for error in refused)
            assert [len(outputs) for outputs in [await running, *queued]] == [8, 8, 8]

        with_engine(artefacts.exchange, use, max_batch_size=1, max_queued_requests=2)

    def test_a_failing_step_fails_every_request_and_the_engine_says_so(
        self, artefacts: Artefacts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (prompt,) = prompts_of(artefacts.data, 4)

        async def use(engine: TorchEngine) -> None:
            def broken(*args: object) -> ForwardOutput:
                raise torch.OutOfMemoryError("no memory left")

            monkeypatch.setattr(engine._runner, "forward", broken)
            tasks = [collect(engine, make_request(f"r{i}", prompt)) for i in range(3)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(r, EngineError) and "no memory left" in str(r) for r in results)
            assert not engine.stats().healthy
            with pytest.raises(EngineError, match="failed before"):
                await collect(engine, make_request("later", prompt))

        with_engine(artefacts.exchange, use)

    def test_on_a_gpu_a_token_is_handed_out_while_the_next_is_computed(
        self, artefacts: Artefacts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """But a first token at once, and none is lost with the engine."""
        monkeypatch.setattr(ModelRunner, "is_asynchronous", True)
        (prompt,) = prompts_of(artefacts.data, 4)

        async def use(engine: TorchEngine) -> tuple[list[int], list[int]]:
            expected = await tokens_of(engine, make_request("e", prompt, max_tokens=6))
            found: list[int] = []

            async def take() -> None:
                async for output in engine.generate(make_request("r", prompt, max_tokens=6)):
                    assert isinstance(output, TokenOutput)
                    found.append(output.token_id)

            gate = Gate(engine)
            task = asyncio.create_task(take())
            for step, num_found in ((1, 0), (2, 1), (3, 1), (4, 2)):
                await gate.until_begun(step)
                await asyncio.sleep(0.01)
                assert len(found) == num_found
                gate.go_on()
            await gate.until_begun(5)
            monkeypatch.setattr(gate, "_forward", fail)
            gate.open()
            with pytest.raises(EngineError, match="no memory left"):
                await task
            return expected, found

        def fail(batch: StepBatch) -> ForwardOutput:
            raise torch.OutOfMemoryError("no memory left")

        expected, found = with_engine(artefacts.exchange, use)
        assert found == expected[:4]

    @pytest.mark.parametrize("aborted_at", ["queued", "prefill", "decode"])
    def test_an_abort_frees_the_blocks_within_one_step(self, artefacts: Artefacts, aborted_at: str) -> None:
        (prompt,) = prompts_of(artefacts.data, 20)

        async def use(engine: TorchEngine) -> None:
            gate = Gate(engine)
            task = asyncio.create_task(collect(engine, make_request("r", prompt, max_tokens=12)))
            await asyncio.sleep(0)  # queued
            step, num_computed = {"queued": (0, 0), "prefill": (1, 4), "decode": (6, 21)}[aborted_at]
            for index in range(1, step + 1):
                await gate.until_begun(index)
                if index < step:
                    gate.go_on()
            if step:
                assert [sequence.num_computed for sequence in engine._scheduler.running] == [num_computed]
            engine.abort("r")
            gate.go_on()
            await task
            async with asyncio.timeout(30):
                while engine.stats().num_free_blocks < engine.stats().num_blocks:  # until the step that ran has ended
                    await asyncio.sleep(0.001)
            stats = engine.stats()
            assert stats.num_free_blocks == stats.num_blocks and (stats.num_running, stats.num_queued) == (0, 0)
            assert gate.num_begun <= max(step, 1)  # and no other was begun for it

        with_engine(artefacts.exchange, use, max_step_tokens=4, max_batch_size=4)

    def test_a_request_whose_logits_are_no_numbers_fails_alone(
        self, artefacts: Artefacts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompts = prompts_of(artefacts.data, 4, 6, 8)

        async def use(engine: TorchEngine) -> None:
            forward = engine._runner.forward

            @torch.inference_mode()
            def poisoned(batch: StepBatch) -> ForwardOutput:
                output = forward(batch)
                for row, position in enumerate(batch.positions()[batch.logit_rows()]):
                    if position == 8:  # the second token of the longest prompt
                        output.logits_RV[row] = math.nan
                return output

            expected = [await tokens_of(engine, make_request("e", prompt)) for prompt in prompts[:2]]
            with monkeypatch.context() as patch:
                patch.setattr(engine._runner, "forward", poisoned)
                tasks = [collect(engine, make_request(f"r{i}", p, max_tokens=3)) for i, p in enumerate(prompts)]
                good, other, bad = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(bad, EngineError) and "after 9 tokens are not finite" in str(bad)
            assert [o.token_id for o in good] == expected[0][:3] and [o.token_id for o in other] == expected[1][:3]
            assert engine.stats().healthy

        with_engine(artefacts.exchange, use)

    @pytest.mark.parametrize("is_asynchronous", [False, True])
    def test_an_exception_in_one_request_stops_no_other(
        self, artefacts: Artefacts, monkeypatch: pytest.MonkeyPatch, is_asynchronous: bool
    ) -> None:
        """Three share a prefix of two blocks; the one whose forward pass fails computed it for all of them."""
        monkeypatch.setattr(ModelRunner, "is_asynchronous", is_asynchronous)
        (shared,) = prompts_of(artefacts.data, 16)

        async def use(engine: TorchEngine) -> None:
            forward, prompts = engine._runner.forward, [[*shared, 7], [*shared, 8], [*shared, 9]]
            expected = with_model_tokens(artefacts, prompts)

            def broken(batch: StepBatch) -> ForwardOutput:
                if any(batch.token_ids_T[end - 1] == 7 for end in batch.ends):
                    raise RuntimeError("no such kernel")
                return forward(batch)

            monkeypatch.setattr(engine._runner, "forward", broken)
            gate = Gate(engine)
            before = asyncio.create_task(collect(engine, make_request("before", [1], max_tokens=1)))
            await gate.until_begun(1)
            tasks = [collect(engine, make_request(f"r{i}", p, max_tokens=4)) for i, p in enumerate(prompts)]
            together = asyncio.gather(before, *tasks, return_exceptions=True)
            await asyncio.sleep(0)  # all three are queued, and planned together once that step is over
            gate.open()
            _, bad, *good = await together
            assert isinstance(bad, EngineError) and "no such kernel" in str(bad)
            assert [[o.token_id for o in outputs] for outputs in good] == expected[1:]
            stats = engine.stats()
            assert stats.healthy and stats.num_preempted == 2 and stats.num_free_blocks == stats.num_blocks

        with_engine(artefacts.exchange, use, tokens_per_block=8)

    def test_an_engine_that_fails_every_step_says_so(
        self, artefacts: Artefacts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def use(engine: TorchEngine) -> None:
            def broken(batch: StepBatch) -> ForwardOutput:
                raise RuntimeError("nothing works")

            monkeypatch.setattr(engine._runner, "forward", broken)
            for index in range(3):
                assert engine.stats().healthy
                with pytest.raises(EngineError, match="nothing works"):
                    await collect(engine, make_request(f"r{index}", [1, 2]))
            assert not engine.stats().healthy

        with_engine(artefacts.exchange, use)

    def test_a_cache_smaller_than_a_context_is_refused(self, artefacts: Artefacts) -> None:
        with pytest.raises(ConfigError, match="engine.kv_cache_tokens=16 leaves room for 16 tokens"):
            TorchEngine.from_exchange(artefacts.exchange, EngineConfig(device="cpu", kv_cache_tokens=16))

    def test_closing_ends_what_is_in_flight(self, artefacts: Artefacts) -> None:
        (prompt,) = prompts_of(artefacts.data, 4)

        async def use(engine: TorchEngine) -> None:
            task = asyncio.create_task(collect(engine, make_request("r", prompt, max_tokens=28)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await engine.close()
            await engine.close()
            with contextlib.suppress(EngineError):
                await task
            with pytest.raises(EngineError, match="closed"):
                await collect(engine, make_request("later", prompt))

        with_engine(artefacts.exchange, use)


def test_model_and_engine_agree_that_padding_is_never_produced(artefacts: Artefacts) -> None:
    """Even a model that loves a padding id cannot say it."""
    model = read_exchange(artefacts.exchange, torch.float32)
    with torch.no_grad():
        model.wte.weight[301:] = model.wte.weight[:301].mean() + 100.0

    async def use(engine: TorchEngine) -> list[int]:
        return await tokens_of(engine, make_request("r", [5, 6], temperature=5.0, max_tokens=30, seed=1))

    assert max(with_model(model, 301, use)) < 301
