"""Stage 3, convert: the final checkpoint becomes an exchange folder, and one for TensorRT-LLM inside it when asked."""

import shutil
from typing import Any

from kraken.config import RunConfig, to_dict
from pipelines.pretrain import final_checkpoint
from pipelines.stage import Outcome, Stage, Work

FORMAT = 4
"""Raised when the exchange format changes, so that models are converted anew."""


def section(config: RunConfig) -> dict[str, Any]:
    return {"format": FORMAT} | to_dict(config.convert)


def work(work: Work) -> Outcome:
    from kraken.convert import write_exchange
    from kraken.engine.placement import TENSORRT_LLM_FOLDER

    checkpoint = final_checkpoint(work)
    trtllm_folder = work.folder / TENSORRT_LLM_FOLDER
    shutil.rmtree(trtllm_folder, ignore_errors=True)  # an interrupted attempt's
    metrics, details = write_exchange(checkpoint, work.parent_folder("prepare"), work.folder)
    if not work.config.convert.tensorrt_llm:
        return metrics, details
    from kraken.trtllm.checkpoint import from_exchange

    made = from_exchange(work.folder, trtllm_folder, exchange_fingerprint=work.fingerprint)
    return metrics | made.metrics, details | {"tensorrt_llm": TENSORRT_LLM_FOLDER}


STAGE = Stage("convert", parents=("prepare", "pretrain"), section=section, work=work)
