"""Stage 3, convert: the newest checkpoint becomes an exchange folder."""

from typing import Any

from kraken.config import RunConfig
from kraken.manifest import ArtefactError
from pipelines.stage import Outcome, Stage, Work

FORMAT = 2
"""Raised when the exchange format changes, so that models are converted anew."""


def section(config: RunConfig) -> dict[str, Any]:
    return {"format": FORMAT}


def work(work: Work) -> Outcome:
    from kraken.checkpoint import newest_checkpoint
    from kraken.convert import write_exchange

    folder = work.parent_folder("pretrain")
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise ArtefactError(f"{folder} holds no good checkpoint; delete the folder and run pretrain again")
    return write_exchange(checkpoint, work.parent_folder("prepare"), work.folder)


STAGE = Stage("convert", parents=("prepare", "pretrain"), section=section, work=work)
