"""Conversion: training checkpoint <-> exchange folder (config.json, safetensors, tokenizer), from one table of names.
Checkpoints of the published code use the same table, in `kraken/published.py`.

Inside the project the ways are stacked: `h.3.attn.c_attn.weight` is [W, 3*D, D]. The exchange format names every way's
matrix by itself, as the published code does: `transformer.h.{way}.3.attn.c_attn.weight` is [3*D, D]. That lets a device
read its own ways and nothing else.
"""

import functools
import json
import shutil
import time
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from kraken.checkpoint.reader import load_model
from kraken.config import ModelConfig
from kraken.huggingface.tokenizer import write_fast_tokenizer
from kraken.manifest import ArtefactError, Metric, write_atomically
from kraken.model import Kraken
from kraken.plan.cost import num_parameters
from kraken.tokenizer import Tokenizer, require_same_tokenizer

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_SIZE = "5GB"
CODE_FOLDER = Path(__file__).parent / "huggingface"
CODE = {"AutoConfig": "configuration_kraken.KrakenConfig", "AutoModelForCausalLM": "modeling_kraken.KrakenForCausalLM"}
"""Class of transformers -> the one of ours that it becomes, by the file that travels with the weights."""


def exchange_names(name: str, num_ways: int) -> list[str]:
    """The exchange names of one of our parameters: one for a parameter that all ways share, else one per way."""
    if not has_ways(name):
        return [f"transformer.{name}"]
    prefix, layer, rest = name.split(".", 2)  # h.{layer}.{rest}
    return [f"transformer.{prefix}.{way}.{layer}.{rest}" for way in range(num_ways)]


def has_ways(name: str) -> bool:
    """Whether one of our parameters stacks the ways in its first dimension."""
    return name.startswith("h.")


def exchange_parts(model: Kraken) -> dict[str, Tensor]:
    """Exchange name -> the part of the model that it names, in the model's own memory; the tied head is there once."""
    parts: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        names = exchange_names(name, model.config.num_ways)
        parts |= zip(names, values.unbind(0) if has_ways(name) else [values], strict=True)
    return parts


def exchange_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Exchange name -> shape, for everything that a model of this shape consists of."""
    with torch.device("meta"):
        return {name: part.shape for name, part in exchange_parts(Kraken(config)).items()}


def to_exchange(model: Kraken) -> dict[str, Tensor]:
    """Every parameter under its exchange names, copied."""
    # a way's matrix gets memory of its own: a file stores whole tensors, not views of one
    return {name: part.clone() for name, part in exchange_parts(model).items()}


def model_config_json(config: ModelConfig, num_ids: int, eot_id: int, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json`: the shape in Hugging Face's terms where it has them.

    Args:
        num_ids: ids of the tokenizer; the vocabulary beyond them is padding, which has no probability.
    """
    return {
        "architectures": ["KrakenForCausalLM"],
        "model_type": "kraken",
        "auto_map": CODE,
        "architecture": config.architecture,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_ways": config.num_ways,
        "max_position_embeddings": config.context_length,
        "vocab_size": config.vocab_size,
        "num_token_ids": num_ids,
        "ffn_multiple": config.ffn_multiple,
        "activation": config.activation,
        "positions": config.positions,
        "rope_base": config.rope_base,
        "bias": config.bias,
        "tie_word_embeddings": True,
        **special_ids(eot_id),
        "dtype": str(dtype).removeprefix("torch."),
    }


def special_ids(eot_id: int) -> dict[str, int]:
    """Ids of the special tokens for `config.json` and `generation_config.json`: the end-of-text id stands for all.

    `tokenizer_config.json` and the endpoint's `/tokenizer_info` name the same token.
    """
    return {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id}


def read_model_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's shape, and the whole `config.json`, which gives the number of the tokenizer's ids as `num_token_ids`.

    Raises:
        ArtefactError: the file is missing, damaged, or describes another kind of model.
    """
    path = folder / CONFIG_NAME
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ArtefactError(f"{path} is missing: {folder} is no exchange folder; make one with jobs.convert") from error
    except ValueError as error:
        raise ArtefactError(f"{path} is damaged ({error}); convert again") from error
    if values.get("model_type") != "kraken":
        raise ArtefactError(f"{path} describes model_type={values.get('model_type')!r}; only 'kraken' can be loaded")
    try:
        config = ModelConfig(
            num_layers=values["num_hidden_layers"],
            width=values["hidden_size"],
            num_heads=values["num_attention_heads"],
            num_ways=values["num_ways"],
            context_length=values["max_position_embeddings"],
            vocab_size=values["vocab_size"],
            ffn_multiple=values["ffn_multiple"],
            architecture=values["architecture"],
            activation=values["activation"],
            positions=values["positions"],
            rope_base=values["rope_base"],
            bias=values["bias"],
        )
        num_ids = values["num_token_ids"]
    except KeyError as error:
        raise ArtefactError(f"{path} lacks {error}; convert again") from error
    if not isinstance(num_ids, int) or not 0 < num_ids <= config.vocab_size:
        raise ArtefactError(
            f"{path} says num_token_ids={num_ids}, which must be the number of the tokenizer's ids and at most "
            f"vocab_size={config.vocab_size}; convert again"
        )
    return config, values


def write_exchange(
    checkpoint_folder: Path, data_folder: Path, folder: Path
) -> tuple[dict[str, Metric], dict[str, Any]]:
    """Convert a checkpoint and the tokenizer of its data into an exchange folder.

    Returns:
        Metrics and details for the manifest, which the caller writes.
    """
    started_at = time.monotonic()
    model, checkpoint = load_model(checkpoint_folder)
    tokenizer = Tokenizer.load(data_folder)
    require_same_tokenizer(
        tokenizer.fingerprint, checkpoint.details["tokenizer_fingerprint"], str(data_folder), str(checkpoint_folder)
    )
    tensors = {name: tensor.to(torch.float32) for name, tensor in to_exchange(model).items()}
    write_folder(folder, model.config, tensors, tokenizer)
    metrics = {
        "parameters": Metric(num_parameters(model.config), "parameters"),
        "conversion_seconds": Metric(round(time.monotonic() - started_at, 3), "s"),
    }
    details = {"tokenizer_fingerprint": tokenizer.fingerprint, "checkpoint": checkpoint_folder.name}
    return metrics, details


def write_folder(folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: Tokenizer) -> None:
    """Everything of an exchange folder but its manifest.

    Args:
        tensors: by exchange name, each with memory of its own, stored in the type that it has.
    """
    save_torch_state_dict(dict(tensors), folder, max_shard_size=MAX_SHARD_SIZE, is_main_process=True)
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    values = model_config_json(config, tokenizer.num_ids, tokenizer.eot_id, dtype)
    write_atomically(folder / CONFIG_NAME, json.dumps(values, indent=2))
    write_generation_config(folder, config.vocab_size, tokenizer)
    copy_code(folder, CODE)
    write_tokenizer(folder, tokenizer, config.context_length)


def write_generation_config(folder: Path, vocab_size: int, tokenizer: Tokenizer) -> None:
    """How transformers generates by default: ids that only pad the vocabulary are never taken."""
    generation: dict[str, Any] = dict(special_ids(tokenizer.eot_id))
    if vocab_size > tokenizer.num_ids:
        generation["suppress_tokens"] = list(range(tokenizer.num_ids, vocab_size))
    write_atomically(folder / GENERATION_CONFIG_NAME, json.dumps(generation))


def copy_code(folder: Path, auto_map: Mapping[str, str]) -> None:
    """Put the files that an `auto_map` names beside the weights."""
    for module in {name.partition(".")[0] for name in auto_map.values()}:
        shutil.copyfile(CODE_FOLDER / f"{module}.py", folder / f"{module}.py")


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
    """The tokenizer in tiktoken's format and in that of transformers."""
    tokenizer.save(folder)
    write_fast_tokenizer(folder, tokenizer, context_length)


def weight_files(folder: Path) -> dict[str, Path]:
    """Exchange name -> the safetensors file that holds it, for folders with and without an index."""
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: folder / Path(file).name for name, file in weight_map.items()}
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ArtefactError(f"{path} is missing: {folder} is no exchange folder; make one with jobs.convert")
    with safetensors.safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), path)


def read_tensors(
    folder: Path, config: ModelConfig, wanted: Container[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Exchange names and tensors of a folder, one at a time, in the type in which they are stored.

    Args:
        wanted: exchange names to read; None reads all.
    Raises:
        ArtefactError: names or shapes do not fit `config`.
    """
    shapes, files = exchange_shapes(config), weight_files(folder)
    if shapes.keys() != files.keys():
        missing, unexpected = sorted(shapes.keys() - files.keys()), sorted(files.keys() - shapes.keys())
        raise ArtefactError(
            f"the weights in {folder} do not fit its {CONFIG_NAME}: missing {missing[:3]}, unexpected {unexpected[:3]};"
            " convert again"
        )
    opened = {path: safetensors.safe_open(path, framework="pt") for path in set(files.values())}
    for name, shape in shapes.items():
        if wanted is not None and name not in wanted:
            continue
        tensor = opened[files[name]].get_tensor(name)
        if tensor.shape != shape:
            raise ArtefactError(
                f"{name} in {folder} is {list(tensor.shape)}, {CONFIG_NAME} asks for {list(shape)}; convert again"
            )
        yield name, tensor


def read_exchange(folder: Path, dtype: torch.dtype) -> Kraken:
    """Build the model of an exchange folder on the CPU, reading one parameter at a time.

    Raises:
        ArtefactError: files, names or shapes do not fit `config.json`.
    """
    config, _ = read_model_config(folder)
    model = Kraken(config).to(dtype).requires_grad_(False)
    parts = exchange_parts(model)
    for name, tensor in read_tensors(folder, config):
        parts[name].copy_(tensor)
    return model
