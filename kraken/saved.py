"""A folder that Hugging Face transformers saved -> exchange folder: a model loaded from one, perhaps trained since.

`save_pretrained` writes the weights under the same names and the tokenizer as `tokenizer.json`, but neither tiktoken's
ranks nor a manifest. The ranks are read back from `tokenizer.json`; the manifest is made anew.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import safetensors

from kraken.config import ConfigError, ModelConfig
from kraken.convert import (
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    read_model_config,
    read_tensors,
    weight_files,
    write_folder,
)
from kraken.huggingface.tokenizer import TOKENIZER_NAME, read_fast_tokenizer
from kraken.manifest import ArtefactError, Manifest, Metric, finish_artefact, make_fingerprint, sha256_of_file
from kraken.model.residual_norm import LAYER_NORM_EPSILON
from kraken.published import load_tokenizer
from kraken.tokenizer import RANKS_NAME, Tokenizer

CHAT_TEMPLATE_NAME = "chat_template.jinja"
"""The tokenizer's chat template, which the endpoint needs for conversations."""


def from_saved(source: Path, folder: Path, tokenizer: str | None = None) -> Manifest:
    """Make an exchange folder, manifest included; each weight keeps the type it has.

    Args:
        source: what `save_pretrained` wrote, of the model and of its tokenizer.
        folder: a new one, or an empty one.
        tokenizer: `gpt2`, or a folder that holds the files of a tokenizer; None takes the one in `source`.
    Raises:
        ConfigError: no such folder, no tokenizer in it, or an output folder that is not empty.
        ArtefactError: a file is missing or damaged, or model and tokenizer do not belong together.
    """
    started_at = time.monotonic()
    if not source.is_dir():
        raise ConfigError(f"--from-huggingface={source} is no folder; give the one that save_pretrained wrote")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out={folder} exists and is not empty; name another folder, or delete this one")
    config, values = read_model_config(source)
    _require_our_arithmetic(source, config, values)
    encoding = _tokenizer_of(source) if tokenizer is None else load_tokenizer(tokenizer)
    _require_same_ids(source, values, encoding)
    if not any((source / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
        raise ArtefactError(
            f"{source} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}; save the model again by "
            "model.save_pretrained(folder), which writes safetensors"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        files = sorted(set(weight_files(source).values()))
        template = source / CHAT_TEMPLATE_NAME
        carried = [template] if template.is_file() else []
        section = {
            "source": "huggingface",
            "sha256": {path.name: sha256_of_file(path) for path in (source / CONFIG_NAME, *files, *carried)},
            "tokenizer_fingerprint": encoding.fingerprint,
        }
        tensors = dict(read_tensors(source, config))
        partial.mkdir(parents=True)
        write_folder(partial, config, tensors, encoding)
        for path in carried:
            shutil.copyfile(path, partial / path.name)
        manifest = finish_artefact(
            partial,
            started_at=started_at,
            kind="convert",
            fingerprint=make_fingerprint("convert", section, {}),
            config=section,
            parents={},
            metrics={"parameters": Metric(sum(x.numel() for x in tensors.values()), "parameters")},
            details={"tokenizer_fingerprint": encoding.fingerprint, "checkpoint": source.name},
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtefactError(
            f"{source} could not be converted to {folder} ({error}); nothing is left of it. If a file of weights is "
            "damaged, save the model again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _tokenizer_of(source: Path) -> Tokenizer:
    if (source / RANKS_NAME).is_file():
        return Tokenizer.load(source)
    if not (source / TOKENIZER_NAME).is_file():
        raise ConfigError(
            f"{source} holds no {TOKENIZER_NAME}; write it there by tokenizer.save_pretrained(folder), or give "
            "--tokenizer gpt2 or --tokenizer with the folder that the model was loaded from"
        )
    return read_fast_tokenizer(source / TOKENIZER_NAME)


def _require_our_arithmetic(source: Path, config: ModelConfig, values: dict[str, Any]) -> None:
    """Refuse settings of transformers that the model computes with there and nowhere else."""
    fixed = {"layer_norm_eps": LAYER_NORM_EPSILON, "intermediate_size": config.ffn_size, "tie_word_embeddings": True}
    for name, expected in fixed.items():
        if values.get(name, expected) != expected:
            raise ArtefactError(
                f"{source / CONFIG_NAME} says {name}={json.dumps(values[name])}, and models here compute with "
                f"{json.dumps(expected)}; only a model that was loaded from an exchange folder can come back"
            )


def _require_same_ids(source: Path, values: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that is not the model's."""
    eos = values.get("eos_token_id", tokenizer.eot_id)
    found = (values["num_token_ids"], eos[0] if isinstance(eos, list) and len(eos) == 1 else eos)
    if found != (tokenizer.num_ids, tokenizer.eot_id):
        raise ArtefactError(
            f"{source / CONFIG_NAME} says num_token_ids={found[0]} and eos_token_id={found[1]}, but the tokenizer has "
            f"{tokenizer.num_ids} ids, of which {tokenizer.eot_id} ends a text; give --tokenizer with the folder that "
            "the model was loaded from"
        )
