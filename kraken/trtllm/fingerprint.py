"""The record of the machine on which a TensorRT-LLM folder was accepted; another machine is refused at load.

The PyTorch backend stores no compiled engine: the folder holds weights. What was checked against our own engine (by
`jobs.doctor`, or by the first load) holds for these versions, this GPU, this number of ways and this type alone.
"""

import dataclasses
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import dacite

from kraken.manifest import ArtefactError, write_atomically

RECORD_NAME = "engine.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """Everything on which the numbers of an engine depend."""

    tensorrt_llm: str
    torch: str
    gpu: str
    num_ways: int
    dtype: str
    exchange_fingerprint: str


def require_same_machine(
    folder: Path, num_ways: int, dtype: str, exchange_fingerprint: str, version: str
) -> EngineRecord:
    """Compare this machine with the folder's record; the first load writes it.

    Args:
        version: of TensorRT-LLM.

    Raises:
        ArtefactError: names every field that differs, or the record cannot be read.
    """
    found = EngineRecord(
        tensorrt_llm=version,
        torch=metadata.version("torch"),
        gpu=gpu_name(),
        num_ways=num_ways,
        dtype=dtype,
        exchange_fingerprint=exchange_fingerprint,
    )
    path = folder / RECORD_NAME
    if not path.is_file():
        _record(path, found)
        return found
    try:
        recorded = dacite.from_dict(EngineRecord, json.loads(path.read_text()), config=dacite.Config(strict=True))
    except (ValueError, dacite.DaciteError) as error:
        raise ArtefactError(f"{path} is damaged ({error}); delete it, then run jobs.doctor tensorrt_llm") from error
    differing = [
        f"{spec.name} was {getattr(recorded, spec.name)} and is {getattr(found, spec.name)}"
        for spec in dataclasses.fields(EngineRecord)
        if getattr(recorded, spec.name) != getattr(found, spec.name)
    ]
    if differing:
        raise ArtefactError(
            f"{folder} was accepted elsewhere: {'; '.join(differing)}; run jobs.doctor tensorrt_llm here and delete "
            f"{path} to accept this machine, or convert again if the model changed"
        )
    return found


def gpu_name() -> str:
    """Model of the first GPU of this process."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"


def _record(path: Path, record: EngineRecord) -> None:
    try:
        write_atomically(path, json.dumps(dataclasses.asdict(record), indent=2))
    except OSError as error:
        raise ArtefactError(
            f"{path} cannot be written ({error.strerror}); load the folder once where it can be, so that the machine "
            "it was accepted on is recorded"
        ) from error
