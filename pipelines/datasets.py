"""Data sets: what MLflow shows as the data of a pipeline, of its prepare stage and of its training."""

import posixpath
from typing import Any
from urllib.parse import urlsplit

from kraken.manifest import Manifest
from kraken.storage import Storage
from pipelines.tracking import DatasetRecord

SPLITS = {"train": "training", "validation": "validation"}
"""Split of the prepared data -> MLflow's word for how it is used."""


def datasets_of(storage: Storage, manifest: Manifest) -> list[DatasetRecord]:
    """The two splits of the prepared data that a prepare or pretrain stage made or read; none for other stages."""
    if manifest.kind == "pretrain":
        found = storage.find("prepare", manifest.parents["prepare"])
        return datasets_of(storage, found) if found is not None else []
    if manifest.kind != "prepare":
        return []
    records = []
    for split, context in SPLITS.items():
        sizes = {
            "num_rows": f"{split}_documents",
            "num_elements": f"{split}_tokens",
            "num_bytes": f"{split}_bytes",
        }
        records.append(
            DatasetRecord(
                name=f"{corpus_name(manifest.config['data'])}/{split}",
                digest=manifest.fingerprint[:16],
                location=storage.location("prepare", manifest.fingerprint),
                context=context,  # type: ignore[arg-type]
                profile={name: int(manifest.value(m)) for name, m in sizes.items() if m in manifest.metrics},
            )
        )
    return records


def corpus_name(data: dict[str, Any]) -> str:
    """A short name of a corpus: a data set's id, the first path's last part, or the kind of corpus.

    Args:
        data: the config's section as a manifest holds it.
    """
    if data["corpus"] == "huggingface":
        return str(data["dataset"]).strip("/")
    if data["paths"]:
        path = urlsplit(data["paths"][0]).path or data["paths"][0]
        return posixpath.basename(path.rstrip("/")) or str(data["corpus"])
    return str(data["corpus"])
