"""Small real artefacts for the tests: a corpus of a few files, its tokens, a model of a few thousand parameters."""

import keyword
import time
from pathlib import Path
from typing import Any

from kraken.config import ClusterConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from kraken.data.embedded import EmbeddedCorpus
from kraken.data.prepare import prepare
from kraken.manifest import Manifest, finish_artefact

WORDS = (*keyword.kwlist, "value", "index", "buffer", "naïve", "ünïcode", "漢字", "🙂")


def config(**train: Any) -> RunConfig:
    """Two ways, two layers, float64, so that equalities can be tight."""
    data = DataConfig(num_trained_ids=300, validation_fraction=0.2)
    defaults: dict[str, Any] = {
        "steps": 6,
        "sequences_per_step": 4,
        "sequences_per_microbatch": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "precision": "float64",
        "log_every": 2,
        "validate_every": 3,
        "validation_windows": 4,
        "checkpoint_every": 2,
    }
    return RunConfig(
        name="tiny",
        data=data,
        model=ModelConfig(
            num_layers=2, width=16, num_heads=4, num_ways=2, context_length=32, vocab_size=data.vocab_size
        ),
        train=TrainConfig(**(defaults | train)),
        cluster=ClusterConfig(num_workers=1),
    )


def corpus(folder: Path, num_documents: int = 40) -> EmbeddedCorpus:
    """A corpus of short files made of the words above, the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    state = 1
    for index in range(num_documents):
        words = []
        for _ in range(120):
            state = state * 1103515245 % 2**31 + 12345
            words.append(WORDS[(state >> 8) % len(WORDS)])
        (folder / f"document_{index:03d}.py").write_text(" ".join(words) + "\n")
    return EmbeddedCorpus(folder)


def prepared(folder: Path, run: RunConfig | None = None) -> Manifest:
    """Prepare the small corpus into `folder`, with a manifest."""
    run = run or config()
    source = corpus(folder.with_name(folder.name + "_corpus"))
    folder.mkdir(parents=True, exist_ok=True)
    started_at = time.monotonic()
    metrics, details = prepare(run.data, source, folder, on_progress=lambda done, total, note: None)
    return finish_artefact(
        folder,
        started_at=started_at,
        kind="prepare",
        fingerprint="tiny",
        config={},
        parents={},
        metrics=metrics,
        details=details,
    )
