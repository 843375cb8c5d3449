"""Exchange folder -> TensorRT-LLM folder: every way's tensors by themselves, heads padded to a size that has kernels.

Nothing is held whole: which tensor goes into which file follows from the shape alone (`kraken/trtllm/parts.py`), and
the files are written a few rows at a time. None of this needs TensorRT-LLM.
"""

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from kraken.config import ConfigError, ModelConfig
from kraken.convert import (
    CODE,
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    copy_code,
    exchange_shapes,
    read_model_config,
    weight_files,
    write_generation_config,
    write_tokenizer,
)
from kraken.manifest import ArtefactError, Manifest, finish_artefact, make_fingerprint, write_atomically
from kraken.model.residual_norm import LAYER_NORM_EPSILON
from kraken.tokenizer import Tokenizer
from kraken.trtllm.parts import Part, ReadRows, padded_head_size, padded_vocab_size, plan_parts, require_convertible
from kraken.trtllm.proof import proof_metrics, proof_shape, prove_padding

FORMAT = 2
"""Raised when the folder's format changes."""
KIND = "trtllm"
MAX_SHARD_BYTES = 5_000_000_000
DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
"""Types that can be written, as safetensors calls them. TensorRT-LLM's attention computes in the two of 2 bytes."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of weights."""

    file: str
    parts: tuple[Part, ...]


def plan_shards(parts: Iterable[Part], dtype: torch.dtype, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """Distribute tensors over files in their order; a file is larger than the limit only if it holds one tensor."""
    groups: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if groups[-1] and size + part.num_bytes(dtype) > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.num_bytes(dtype)
    if len(groups) == 1:
        return [Shard(WEIGHTS_NAME, tuple(groups[0]))]
    return [
        Shard(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def from_exchange(
    exchange: Path,
    folder: Path,
    *,
    exchange_fingerprint: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Manifest:
    """Make a TensorRT-LLM folder, manifest included; it appears whole or not at all.

    The proof of parity goes into the manifest as it is: whoever serves the folder asks `require_proven`.

    Args:
        folder: a new one, or an empty one.
        exchange_fingerprint: of an exchange folder that has no manifest yet; None reads its manifest.
    Raises:
        ConfigError: the shape cannot be converted, or `folder` is not empty.
        ArtefactError: the exchange folder is damaged, or `folder` cannot be written.
    """
    started_at = time.monotonic()
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} exists and is not empty; name another folder, or delete this one")
    fingerprint = Manifest.read(exchange).fingerprint if exchange_fingerprint is None else exchange_fingerprint
    config, values = read_model_config(exchange)
    require_convertible(config)
    tokenizer = Tokenizer.load(exchange)
    proof = prove_padding(proof_shape(config))
    section = {"format": FORMAT, "dtype": str(dtype).removeprefix("torch.")}
    parents = {"convert": fingerprint}
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_weights(exchange, partial, config, dtype, max_shard_bytes)
        write_atomically(partial / CONFIG_NAME, json.dumps(trtllm_config(config, values, dtype), indent=2))
        write_generation_config(partial, padded_vocab_size(config), tokenizer)
        copy_code(partial, trtllm_config(config, values, dtype)["auto_map"])
        write_tokenizer(partial, tokenizer, config.context_length)
        manifest = finish_artefact(
            partial,
            started_at=started_at,
            kind=KIND,
            fingerprint=make_fingerprint(KIND, section, parents),
            config=section,
            parents=parents,
            metrics=proof_metrics(proof),
            details={
                "tokenizer_fingerprint": tokenizer.fingerprint,
                "head_size": config.head_size,
                "padded_head_size": padded_head_size(config),
                "padded_vocab_size": padded_vocab_size(config),
            },
        )
        partial.rename(folder)
    except safetensors.SafetensorError as error:
        raise ArtefactError(f"the weights in {exchange} cannot be read ({error}); convert again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def trtllm_config(config: ModelConfig, values: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """`config.json`: the exchange folder's, with the sizes that TensorRT-LLM computes with.

    Head counts are those of all ranks together: its cache divides them by the number of ranks.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        **values,
        "auto_map": {"AutoConfig": CODE["AutoConfig"]},  # its weights are not those that the modelling code reads
        "num_key_value_heads": config.num_heads,
        "head_dim": padded_head_size(config),
        "intermediate_size": config.ffn_size,
        "vocab_size": padded_vocab_size(config),
        "layer_norm_eps": LAYER_NORM_EPSILON,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }


def write_weights(
    exchange: Path, folder: Path, config: ModelConfig, dtype: torch.dtype, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write every file of weights, and the index where there are several; holds a few megabytes at a time."""
    files = weight_files(exchange)
    shapes = exchange_shapes(config)
    if missing := sorted(shapes.keys() - files.keys()):
        raise ArtefactError(f"the weights in {exchange} do not fit its {CONFIG_NAME}: missing {missing[:3]}")

    def read(name: str, start: int, end: int) -> Tensor:
        # opened anew each time: a file that stays open keeps in memory whatever has been read of it
        with safetensors.safe_open(files[name], framework="pt") as file:
            rows = file.get_slice(name)
            if tuple(rows.get_shape()) != tuple(shapes[name]):
                raise ArtefactError(
                    f"{name} in {exchange} is {rows.get_shape()}, {CONFIG_NAME} asks for {list(shapes[name])}; "
                    "convert again"
                )
            return rows[start:end]

    shards = plan_shards(plan_parts(config), dtype, max_shard_bytes)
    for shard in shards:
        _write_shard(folder / shard.file, shard.parts, read, dtype)
    if len(shards) > 1:
        num_bytes = sum(part.num_bytes(dtype) for shard in shards for part in shard.parts)
        weight_map = {part.name: shard.file for shard in shards for part in shard.parts}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        write_atomically(folder / INDEX_NAME, json.dumps(index, indent=2))


def _write_shard(path: Path, parts: Iterable[Part], read: ReadRows, dtype: torch.dtype) -> None:
    """One safetensors file, a block at a time; the library's own function would hold it whole.

    The format: the length of a header (8 bytes, little-endian), the header as JSON, the tensors' bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        start, end = end, end + part.num_bytes(dtype)
        header[part.name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            for block in part.blocks(read, dtype):
                file.write(block.contiguous().flatten().view(torch.uint8).numpy().data)
