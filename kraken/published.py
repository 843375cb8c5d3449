"""Checkpoints of the published code <-> exchange folders; the weights pass through bit by bit.

The file is a torch pickle: `model` (a state dict), `model_args`, `iter_num`, `best_val_loss`, `config`, `optimizer`.
Its parameter names are the exchange format's own, plus `lm_head.weight`, which is `transformer.wte.weight` again, and:

* the prefix `_orig_mod.` on every name where the writer had compiled the model, as the published presets do;
* a causal mask `...attn.bias` [1, 1, T, T] per block where the writer had no fused attention; left out here;
* a vocabulary that need not be a multiple of 64; rows of zeros are added here, and taken off on the way back.

nanoGPT's own checkpoints have neither ways nor a word on which GELU they were trained with; they are refused.

What only the file knows goes into the manifest's details, under `published`, and from there into a file written back.
"""

import dataclasses
import re
import shutil
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import torch
from torch import Tensor

from kraken.checkpoint.reader import STEP_FOLDER
from kraken.config import ConfigError, ModelConfig, pad_vocab
from kraken.convert import exchange_shapes, read_model_config, read_tensors, write_folder
from kraken.manifest import ArtefactError, Manifest, Metric, finish_artefact, make_fingerprint, sha256_of_file
from kraken.model.alignment import pad
from kraken.tokenizer import Tokenizer

EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
COMPILED_PREFIX = "_orig_mod."
CAUSAL_MASK = re.compile(r"transformer\.h\.\d+\.\d+\.attn\.bias")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

MODEL_ARGS = {
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "n_heads_in_split"), int),
    "ffn_expansion": int,
    "bias": bool,
    "is_split": bool,
    "dropout": float,
}
"""Name -> type; the published code knows these and no others."""

N = TypeVar("N", int, float)

UNKNOWN_LOSS = 1e9
"""What the published code starts from: any validation is better."""
PUBLISHED_OPTIMIZER = {"learning_rate": 2.5e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What a published checkpoint holds besides tensors."""

    model_args: dict[str, Any]
    iter_num: int | None
    """Optimizer steps."""
    best_val_loss: float | None
    """Nats per token."""
    config: dict[str, Any]
    """The settings of the run that wrote it; its numbers, flags and texts."""


@dataclass(frozen=True, slots=True)
class Published:
    """A published checkpoint, read and checked."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    """By exchange name, the vocabulary padded; in the file's type, and still in the file where they can be."""
    record: Record


def from_published(path: Path, folder: Path, tokenizer: str) -> Manifest:
    """Make an exchange folder, manifest included, of a published checkpoint; each weight keeps the type it has.

    Args:
        folder: a new one, or an empty one.
        tokenizer: `gpt2`, or a folder that holds the files of a tokenizer. The checkpoint does not name its own.
    Raises:
        ConfigError: no such file or tokenizer, a folder that is not empty, or a tokenizer of too many ids.
        ArtefactError: the file is damaged, or is no published checkpoint.
    """
    started_at = time.monotonic()
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"--out={folder} exists and is not empty; name another folder, or delete this one")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out={folder} is a file; name a folder")
    published = read_published(path)
    encoding = load_tokenizer(tokenizer)
    vocab_size = published.record.model_args["vocab_size"]
    if encoding.num_ids > vocab_size:
        raise ConfigError(
            f"--tokenizer={tokenizer} has {encoding.num_ids} ids, the model in {path} only vocab_size={vocab_size}; "
            "give --tokenizer the one that its training data was made with"
        )
    sha256 = sha256_of_file(path)
    section = {"source": "published", "sha256": sha256, "tokenizer_fingerprint": encoding.fingerprint}
    record = dataclasses.asdict(published.record) | {"file": path.name, "sha256": sha256}
    # copies: a tensor of the file may be a view of another, and an exchange folder stores whole ones
    tensors = {name: x.clone(memory_format=torch.contiguous_format) for name, x in published.tensors.items()}
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_folder(partial, published.config, tensors, encoding)
        manifest = finish_artefact(
            partial,
            started_at=started_at,
            kind="convert",
            fingerprint=make_fingerprint("convert", section, {}),
            config=section,
            parents={},
            metrics={"parameters": Metric(sum(x.numel() for x in tensors.values()), "parameters")},
            details={"tokenizer_fingerprint": encoding.fingerprint, "checkpoint": path.name, "published": record},
        )
        partial.rename(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtefactError(f"{folder} could not be written ({error}); nothing is left of it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def to_published(folder: Path, path: Path) -> Record:
    """Write a finished exchange folder as a checkpoint that the published code resumes from.

    The weights are the folder's. An exchange folder has no moments, so the optimizer is one that has not stepped yet;
    unknown are written as iter_num 0 and a best_val_loss of 1e9, which is how the published code starts.

    Returns:
        What was written besides tensors and optimizer.
    Raises:
        ConfigError: the published code cannot express the model, or `path` exists.
        ArtefactError: the folder is unfinished or damaged, or `path` cannot be written.
    """
    if path.exists():
        raise ConfigError(f"--out={path} exists; name another file, or delete this one")
    if not folder.is_dir():
        raise ConfigError(f"--to-published={folder} is no folder; give the exchange folder of a converted model")
    manifest = Manifest.read(folder)
    config, _ = read_model_config(folder)
    _require_expressible(config)
    record = _record_of(manifest, config)
    tensors = dict(read_tensors(folder, config))
    vocab_size = record.model_args["vocab_size"]
    if vocab_size < len(tensors[EMBEDDING]):
        tensors[EMBEDDING] = tensors[EMBEDDING][:vocab_size].clone()
    checkpoint = {
        "model": tensors | {HEAD: tensors[EMBEDDING]},
        "optimizer": _fresh_optimizer(tensors, record.config),
        "model_args": record.model_args,
        "iter_num": record.iter_num or 0,
        "best_val_loss": UNKNOWN_LOSS if record.best_val_loss is None else record.best_val_loss,
        "config": record.config,
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise ArtefactError(f"{path} could not be written ({_reason(error)}); nothing is left of it") from error
    finally:
        partial.unlink(missing_ok=True)
    return record


def read_published(path: Path) -> Published:
    """Read a published checkpoint without running anything that it contains.

    Raises:
        ConfigError: no such file.
        ArtefactError: it is damaged, holds more than tensors and plain values, or is no published checkpoint.
    """
    checkpoint = _load(path)
    if not isinstance(checkpoint, dict):
        raise ArtefactError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint of the published code")
    for key in ("model", "model_args"):
        if not isinstance(checkpoint.get(key), dict):
            found = sorted(map(str, checkpoint))[:6]
            raise ArtefactError(
                f"{path} lacks the dict {key!r} of a checkpoint of the published code; it has {found}; give the "
                "ckpt.pt that training wrote, whole"
            )
    model_args = _checked_model_args(path, checkpoint["model_args"])
    config = _model_config(path, model_args)
    record = Record(
        model_args=model_args,
        iter_num=_number(path, checkpoint, "iter_num", int),
        best_val_loss=_number(path, checkpoint, "best_val_loss", float),
        config=_plain(checkpoint.get("config")),
    )
    return Published(config, _checked_tensors(path, checkpoint["model"], config, model_args["vocab_size"]), record)


class _NumpyType:
    """Stands in for `numpy.dtype` while a checkpoint is read; see `_numpy_number`."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.code = f"{state[1]}{self.code}"  # the byte order


def _numpy_number(kind: _NumpyType, data: bytes) -> int | float | bool:
    """Stands in for numpy's own function, which takes any type.

    Training on several GPUs leaves `best_val_loss` as a numpy number, which torch alone refuses to read.
    """
    if not re.fullmatch(r"[<>=|]?[fiub][1248]", kind.code):
        raise ValueError(f"a numpy value of type {kind.code}")
    return np.frombuffer(data, dtype=kind.code)[0].item()


STAND_INS: list[Any] = [
    (_NumpyType, "numpy.dtype"),
    (_numpy_number, "numpy.core.multiarray.scalar"),  # numpy 1
    (_numpy_number, "numpy._core.multiarray.scalar"),  # numpy 2
]
"""What reads a name of a pickle, and the name."""


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"--from-published={path} is no file; give the ckpt.pt that the published code wrote")
    try:
        with path.open("rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise ConfigError(f"--from-published={path} cannot be read ({error.strerror}); mend its permissions") from error
    if not is_archive:
        raise ArtefactError(f"{path} is no file of torch 1.6 or newer; give the ckpt.pt that the published code wrote")
    if not zipfile.is_zipfile(path):  # the directory of its contents comes last
        raise ArtefactError(f"{path} is truncated; copy it again")
    with torch.serialization.safe_globals(STAND_INS):
        try:
            return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except Exception as error:  # a file can be wrong in any way, and then anything may be raised
            if names := _unsafe_names(path):
                raise ArtefactError(
                    f"{path} holds objects that only code can read ({', '.join(names)}); such files are refused, since "
                    "they may run anything; save a dict of tensors and plain values"
                ) from error
            raise ArtefactError(
                f"{path} cannot be read ({_reason(error)}); give the ckpt.pt that the published code wrote, or copy it "
                "again"
            ) from error


def _unsafe_names(path: Path) -> list[str]:
    """The first three names of Python objects in a pickle that are not allowed; finding them runs nothing."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))[:3]
    except Exception:  # as above
        return []


def _checked_model_args(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """`model_args` with every name and type as the published code has them."""
    missing, unexpected = (
        [name for name in MODEL_ARGS if name not in found],
        sorted(map(str, found.keys() - MODEL_ARGS.keys())),
    )
    if missing or unexpected:
        raise ArtefactError(
            f"model_args in {path} are not those of the published Kraken code: missing {missing[:3]}, unexpected "
            f"{unexpected[:3]}; nanoGPT's own checkpoints and those of changed code cannot be read"
        )
    for name, kind in MODEL_ARGS.items():
        value = found[name]
        fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if not fits or (kind is int and (isinstance(value, bool) or value < 1)):
            wanted = {int: "a whole number above 0", bool: "True or False", float: "a number"}[kind]
            raise ArtefactError(f"model_args[{name!r}]={value!r} in {path} is not {wanted}; the file is damaged")
    return {name: found[name] for name in MODEL_ARGS}


def _model_config(path: Path, model_args: Mapping[str, Any]) -> ModelConfig:
    if not model_args["is_split"]:
        raise ArtefactError(
            f"model_args['is_split']=False in {path} is a standard GPT-2, which the published code could not build; "
            "only Kraken models are read"
        )
    heads, heads_per_way = model_args["n_head"], model_args["n_heads_in_split"]
    if heads % heads_per_way:
        raise ArtefactError(
            f"n_head={heads} in {path} is not divisible by n_heads_in_split={heads_per_way}; the file is damaged"
        )
    try:
        return ModelConfig(
            num_layers=model_args["n_layer"],
            width=model_args["n_embd"],
            num_heads=heads,
            num_ways=heads // heads_per_way,
            context_length=model_args["block_size"],
            vocab_size=pad_vocab(model_args["vocab_size"]),
            ffn_multiple=model_args["ffn_expansion"],
            bias=model_args["bias"],
        )
    except ConfigError as error:
        raise ArtefactError(f"model_args in {path} describe no model: {error}") from error


def _checked_tensors(path: Path, found: Mapping[str, Any], config: ModelConfig, vocab_size: int) -> dict[str, Tensor]:
    """The state dict under exchange names, with the padded embedding and without what is there twice."""
    named = {str(name).removeprefix(COMPILED_PREFIX): tensor for name, tensor in found.items()}
    tensors = {name: tensor for name, tensor in named.items() if not CAUSAL_MASK.fullmatch(name)}
    embedding = torch.Size([vocab_size, config.width])
    shapes = exchange_shapes(config) | {EMBEDDING: embedding, HEAD: embedding}
    if tensors.keys() != shapes.keys():
        missing, unexpected = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
        raise ArtefactError(
            f"the parameters in {path} do not fit its model_args: missing {missing[:3]}, unexpected {unexpected[:3]}; "
            "files of changed code cannot be read"
        )
    for name, shape in shapes.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ArtefactError(f"{name} in {path} is a {kind}, not a dense tensor of floating-point numbers")
        if tensor.shape != shape:
            raise ArtefactError(f"{name} in {path} is {list(tensor.shape)}, its model_args ask for {list(shape)}")
    head = tensors.pop(HEAD)
    if head.dtype != tensors[EMBEDDING].dtype or not torch.equal(head, tensors[EMBEDDING]):
        raise ArtefactError(f"{HEAD} differs from {EMBEDDING} in {path}; the published code ties them")
    return {name: tensor.detach() for name, tensor in tensors.items()} | {
        EMBEDDING: pad(tensors[EMBEDDING].detach(), config.vocab_size, None)
    }


def _number(path: Path, checkpoint: Mapping[str, Any], key: str, kind: type[N]) -> N | None:
    """A Python number, a numpy one, or a tensor of one element: the published code has written each of them."""
    value = checkpoint.get(key)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, int if kind is int else int | float):
        raise ArtefactError(f"{key}={value!r} in {path} is not a number of type {kind.__name__}; the file is damaged")
    return kind(value)


def _plain(config: Any) -> dict[str, Any]:
    """Settings that JSON can hold; nothing here depends on them."""
    if not isinstance(config, dict):
        return {}
    return {str(name): value for name, value in config.items() if isinstance(value, int | float | str)}


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `--tokenizer` names: `gpt2`, or a folder that holds the files of one.

    Raises:
        ConfigError: neither of the two.
        ArtefactError: GPT-2's ranks cannot be had, or the folder's files are missing or damaged.
    """
    if name == "gpt2":
        try:
            return Tokenizer.gpt2()
        except ArtefactError as error:
            reason = type(error.__cause__).__name__
            raise ArtefactError(
                f"--tokenizer=gpt2 needs GPT-2's ranks, which could not be had ({reason}); set TIKTOKEN_CACHE_DIR to a "
                "folder that holds them, or give --tokenizer FOLDER, the folder of prepared data or of a converted "
                "model that uses them"
            ) from error
    if not Path(name).is_dir():
        raise ConfigError(f"--tokenizer={name} is neither gpt2 nor a folder; give one of them")
    return Tokenizer.load(Path(name))


def _require_expressible(config: ModelConfig) -> None:
    """Refuse what the published code has no parameters for."""
    for name, wanted in (("architecture", "kraken"), ("activation", "gelu"), ("positions", "learned")):
        value = getattr(config, name)
        if value != wanted:
            raise ConfigError(
                f"model.{name}={value} does not exist in the published code, which knows only {wanted}; such a model "
                "stays an exchange folder"
            )
    if config.num_ways == 1:
        raise ConfigError(
            "model.num_ways=1: the published code sums the outputs of other ways, and fails where there are none; such "
            "a model stays an exchange folder"
        )


def _record_of(manifest: Manifest, config: ModelConfig) -> Record:
    """The record of the file that a folder was made of, or the same facts of a model that was trained here."""
    if published := manifest.details.get("published"):
        return Record(**{field.name: published[field.name] for field in dataclasses.fields(Record)})
    step = STEP_FOLDER.fullmatch(manifest.details.get("checkpoint", ""))
    return Record(
        model_args={
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_embd": config.width,
            "block_size": config.context_length,
            "bias": config.bias,
            "vocab_size": config.vocab_size,
            "dropout": 0.0,
            "n_heads_in_split": config.heads_per_way,
            "is_split": True,
            "ffn_expansion": config.ffn_multiple,
        },
        iter_num=int(step[1]) if step else None,
        best_val_loss=None,
        config={},
    )


def _fresh_optimizer(tensors: Mapping[str, Tensor], run: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of an AdamW that has not stepped; the published code does not resume without one.

    Its two groups are the tensors of two and more dimensions, which decay, and the others.
    """
    settings = {name: run.get(name, default) for name, default in PUBLISHED_OPTIMIZER.items()}
    num_matrices = sum(tensor.dim() >= 2 for tensor in tensors.values())
    common = {
        "lr": settings["learning_rate"],
        "betas": (settings["beta1"], settings["beta2"]),
        "eps": 1e-8,
        "amsgrad": False,
    }
    matrices = {"params": list(range(num_matrices)), "weight_decay": settings["weight_decay"], **common}
    vectors = {"params": list(range(num_matrices, len(tensors))), "weight_decay": 0.0, **common}
    return {"state": {}, "param_groups": [matrices, vectors]}


def _reason(error: Exception) -> str:
    """The first sentence of torch's message, without the place in its code; the rest advises to trust the file."""
    text = re.sub(r"^\[[^]]*\][ .]*", "", str(error)) or type(error).__name__
    return re.split(r"\.\s|\s\s|\n", text)[0]
