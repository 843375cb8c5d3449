"""Small real artefacts for the tests: a corpus of a few files, its tokens, a model of a few thousand parameters."""

import keyword
import time
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.checkpoint.reader import CheckpointReader
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


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum (not mean) of the cross-entropy in nats over all positions, at least float32."""
    logits = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="sum")


def whole(folder: Path, kind: str) -> dict[str, Tensor]:
    """Every tensor of a kind of the checkpoint in a folder, whole, on the CPU."""
    checkpoint = CheckpointReader(folder)
    tensors: dict[str, Tensor] = {}
    for path, pieces in checkpoint._pieces[kind].items():
        with safetensors.safe_open(checkpoint.folder / path, framework="pt") as file:
            for name, piece in pieces.items():
                part = file.get_tensor(name)
                tensors.setdefault(name, part.new_empty(piece.whole))
                tensors[name][tuple(slice(s, s + n) for s, n in zip(piece.start, piece.shape, strict=True))] = part
    return tensors
