"""Comparing a model with the champion: perplexity on the champion's data, and the time of a completion, side by side.

The champion's own perplexity is known from its evaluation. This model's is known too where it was evaluated on the same
data; else it is measured here, through an engine, on exactly the tokens that the champion's is over.
"""

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from kraken.config import EngineConfig, RunConfig
from kraken.manifest import ArtefactError, Manifest
from kraken.storage import join, local_artefact
from pipelines.gates import Figures, is_same
from pipelines.progress import ProgressLines
from pipelines.registry import Lineage, Version

if TYPE_CHECKING:
    import numpy as np

    from kraken.engine.protocol import Engine
    from kraken.evaluate import TokenSource
    from kraken.tokenizer import Tokenizer

COMPLETION_TOKENS = 16
"""Tokens that a timed completion generates, after a prompt of half the context."""
WARM_UP_ROUNDS, TIMED_ROUNDS = 3, 15
"""Completions of each model; of the timed ones the median counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What has to be measured; small, for a task on another node."""

    exchange: str
    """Path or URI of this model."""
    champion_exchange: str
    champion_data: str
    """Path or URI of the data that the champion was evaluated on."""
    scored_tokens: int
    """How many of their validation tokens its perplexity is over."""
    engine: EngineConfig
    wants_perplexity: bool
    wants_latency: bool


def figures(
    config: RunConfig,
    evaluation: Manifest,
    own: Lineage,
    champion: Version | None,
    call: Callable[[Callable[[Question], dict[str, float]], Question], dict[str, float]],
) -> Figures:
    """What is known of the two models, measured where that is needed.

    Args:
        call: calls a function with its argument where evaluation has its resources.
    """
    if champion is None or is_same(own, champion):
        return Figures()
    theirs = champion.lineage
    is_known = (own.prepare, own.scored_tokens) == (theirs.prepare, theirs.scored_tokens)
    known: dict[str, Any] = {"perplexity": evaluation.value("validation_perplexity")} if is_known else {}
    question = Question(
        exchange=own.location,
        champion_exchange=theirs.location,
        champion_data=join(theirs.storage, "prepare", theirs.prepare[:16]),
        scored_tokens=int(theirs.scored_tokens),
        engine=config.engine,
        wants_perplexity=not is_known and config.gates.max_perplexity_increase is not None,
        wants_latency=config.gates.max_latency_increase is not None,
    )
    if not (question.wants_perplexity or question.wants_latency):
        return Figures(**known)
    try:
        return Figures(**(known | call(measure, question)))
    except ArtefactError as error:
        return Figures(**known, obstacle=str(error).partition(";")[0])


def measure(question: Question) -> dict[str, float]:
    """Fields of `Figures`, measured in this process.

    Raises:
        ArtefactError: the champion's data or model is no longer there.
    """
    return asyncio.run(_measure(question))


async def _measure(question: Question) -> dict[str, float]:
    from kraken.tokenizer import Tokenizer

    found: dict[str, float] = {}
    exchange, data = local_artefact(question.exchange), local_artefact(question.champion_data)
    tokenizer = Tokenizer.load(exchange)
    source, num_scored = validation_tokens(data, tokenizer, question.scored_tokens)
    if question.wants_perplexity:
        async with _engine(question.exchange, question.engine) as engine:
            found["perplexity"] = await perplexity_per_token(engine, source, tokenizer, num_scored)
    if question.wants_latency:
        pair = (question.exchange, question.champion_exchange)
        ours, other = (_engine(location, _for_one_request(location, question.engine)) for location in pair)
        async with ours as own, other as theirs:
            length = min(own.info.context_length, theirs.info.context_length) // 2
            prompt = [int(i) for i in source.read(0, min(length, source.num_tokens))]
            num_ids = theirs.info.num_ids
            found["latency_ms"], found["champion_latency_ms"] = await median_latencies(
                [(own, prompt), (theirs, [i % num_ids for i in prompt])]
            )
    return found


@contextlib.asynccontextmanager
async def _engine(location: str, config: EngineConfig) -> Any:
    """The engine that evaluation would choose, closed afterwards."""
    from kraken.choose_engine import choose_for, open_engine

    folder = local_artefact(location)
    engine = open_engine(choose_for(folder, config), folder, config)
    try:
        yield engine
    finally:
        await engine.close()


def _for_one_request(location: str, config: EngineConfig) -> EngineConfig:
    """The settings with a cache of one context only, so that two models fit beside each other."""
    from kraken.convert import read_model_config

    context_length = read_model_config(local_artefact(location))[0].context_length
    return dataclasses.replace(config, max_batch_size=1, kv_cache_tokens=context_length)


class _Tokens:
    """The first tokens of another source, or tokens in memory."""

    def __init__(self, read: "Callable[[int, int], np.ndarray]", num_tokens: int):
        self.read, self.num_tokens = read, num_tokens


def validation_tokens(data: Any, tokenizer: "Tokenizer", scored_tokens: int) -> "tuple[TokenSource, int]":
    """The text that the champion's perplexity is over, as this model's tokens, and the champion's tokens in it.

    Args:
        data: folder of the champion's prepared data.

    Raises:
        ArtefactError: the data are no longer there, or shorter than they were.
    """
    import numpy as np

    from kraken.data.shards import TokenShards
    from kraken.tokenizer import Tokenizer

    theirs = Tokenizer.load(data)
    shards = TokenShards(data, "validation", theirs.num_ids)
    if shards.num_tokens <= scored_tokens:
        raise ArtefactError(
            f"{data} holds {shards.num_tokens} validation tokens, fewer than the {scored_tokens} scored"
        )
    if theirs.fingerprint == tokenizer.fingerprint:
        return _Tokens(shards.read, scored_tokens + 1), scored_tokens
    ids = shards.read(0, scored_tokens + 1)
    own: list[int] = []
    ends = [int(end) for end in np.flatnonzero(ids == theirs.eot_id)]
    for start, end in zip([0, *(end + 1 for end in ends)], [*ends, len(ids)], strict=True):
        own += tokenizer.encode(theirs.decode(ids[start:end].tolist()))
        own += [tokenizer.eot_id] if end < len(ids) else []
    array = np.array(own, dtype=np.int64)
    return _Tokens(lambda start, length: array[start : start + length], len(array)), scored_tokens


async def perplexity_per_token(
    engine: "Engine", source: "TokenSource", tokenizer: "Tokenizer", num_tokens: int
) -> float:
    """Perplexity of a text for a model, per token of a tokenizer that makes `num_tokens` of it."""
    from kraken.evaluate import perplexity

    progress = ProgressLines("deploy: perplexity on the champion's data", " windows")
    metrics = await perplexity(engine, source, tokenizer, None, progress)
    nats = metrics["validation_loss"].value * metrics["scored_tokens"].value
    return math.exp(nats / num_tokens)


async def median_latencies(models: "Sequence[tuple[Engine, list[int]]]") -> list[float]:
    """Median milliseconds of a greedy completion by each engine, one request at a time, the engines in turn."""
    from kraken.engine.protocol import Request, SamplingParams
    from kraken.evaluate import collect

    times: list[list[float]] = [[] for _ in models]
    for round_ in range(WARM_UP_ROUNDS + TIMED_ROUNDS):
        for index in sorted(range(len(models)), reverse=bool(round_ % 2)):
            engine, prompt = models[index]
            # another first token each time, so that no prompt is found in the cache
            ids = (round_ % engine.info.num_ids, *prompt[1:])
            sampling = SamplingParams(max_tokens=COMPLETION_TOKENS, temperature=0.0)
            started_at = time.perf_counter()
            await collect(engine, Request(id=f"latency-{round_}-{index}", prompt_ids=ids, sampling=sampling))
            if round_ >= WARM_UP_ROUNDS:
                times[index].append((time.perf_counter() - started_at) * 1e3)
    return [median(each) for each in times]
