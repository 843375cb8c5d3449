"""Stage 4, evaluate: perplexity of the converted model through an engine, and the engine's parity with the trainer."""

import asyncio
import dataclasses
import json
from pathlib import Path

from kraken.choose_engine import Choice, choose_for, open_engine
from kraken.config import RunConfig
from kraken.manifest import Metric, write_atomically
from pipelines.pretrain import final_checkpoint
from pipelines.progress import ProgressLines
from pipelines.stage import Outcome, Stage, Work, section_of

PARITY_NAME = "parity.json"


def work(work: Work) -> Outcome:
    checkpoint = final_checkpoint(work)
    exchange = work.parent_folder("convert")
    choice = choose_for(exchange, work.config.engine)
    print(f"evaluate: {choice}", flush=True)
    metrics = asyncio.run(
        evaluate(work.config, choice, work.parent_folder("prepare"), checkpoint, exchange, work.folder)
    )
    entropy = work.parents["prepare"].metrics["unigram_entropy"]
    return metrics | {"unigram_entropy": entropy}, {"engine": choice.kind}


async def evaluate(
    config: RunConfig, choice: Choice, data_folder: Path, checkpoint: Path, exchange_folder: Path, folder: Path
) -> dict[str, Metric]:
    """Run both evaluations on one engine; the parity report is also written to `folder`."""
    from kraken.checkpoint.reader import load_model
    from kraken.data.shards import TokenShards
    from kraken.evaluate import parity, parity_prompts, perplexity
    from kraken.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(data_folder)
    shards = TokenShards(data_folder, "validation", tokenizer.num_ids)
    settings = config.evaluate
    engine = open_engine(choice, exchange_folder, config.engine)
    try:
        model, _ = load_model(checkpoint)
        prompts = parity_prompts(shards, config.model.context_length, settings.parity_windows, settings.parity_tokens)
        report = await parity(engine, model, prompts, settings.parity_tokens, settings.parity_tolerance)
        progress = ProgressLines("evaluate: perplexity", " windows")
        metrics = await perplexity(engine, shards, tokenizer, settings.max_windows, progress)
    finally:
        await engine.close()
    write_atomically(folder / PARITY_NAME, json.dumps(dataclasses.asdict(report) | {"passed": report.passed}, indent=2))
    return metrics | {
        "parity_max_abs_diff": Metric(report.max_abs_diff, "nats"),
        "parity_tokens": Metric(report.num_tokens, "tokens"),
        "parity_tokens_different": Metric(report.num_different, "tokens"),
        "parity_passed": Metric(float(report.passed), "1 = yes"),
    }


STAGE = Stage(
    "evaluate", parents=("prepare", "pretrain", "convert"), section=section_of("evaluate", "engine"), work=work
)
