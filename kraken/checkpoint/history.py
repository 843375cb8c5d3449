"""The history of a training run: every report, ordered by step, as JSON lines.

It travels inside the checkpoints, so that a resumed run continues it exactly where its weights were.
"""

import json
from pathlib import Path

from kraken.manifest import ArtefactError, write_atomically

HISTORY_NAME = "history.jsonl"

History = list[dict[str, float]]
"""Reports as `Hooks.on_step` gets them, each with its `step` and the `seconds` trained until then."""


def write_history(folder: Path, history: History) -> None:
    """Write a run's reports into a folder."""
    write_atomically(folder / HISTORY_NAME, "".join(json.dumps(report) + "\n" for report in history))


def read_history(folder: Path) -> History:
    """The reports in a checkpoint or a finished run, ordered by step.

    Raises:
        ArtefactError: there are none, or they are damaged.
    """
    path = folder / HISTORY_NAME
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError as error:
        raise ArtefactError(f"{path} is missing: no finished training is in {folder}; run pretrain again") from error
    except ValueError as error:
        raise ArtefactError(
            f"{path} is damaged ({error}); delete this file and run pretrain again, which continues from a checkpoint"
        ) from error
