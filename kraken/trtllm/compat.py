"""The one place where names of TensorRT-LLM are looked up: which versions will do, and where each keeps its classes.

`from kraken.trtllm.compat import Linear` imports TensorRT-LLM at that moment and not before: importing it takes seconds
and starts MPI, so nothing here does it without being asked. `installed_version` never does.
"""

import functools
import importlib
import importlib.metadata
import json
import re
from importlib.resources import files
from typing import Any

from kraken.config import ConfigError
from kraken.manifest import ArtefactError

DISTRIBUTION = "tensorrt_llm"
OLDEST = (1, 2, 1)
SUPPORTED = "1.2.1 and newer within 1.2, whose sources this code was written against"
WAY_OUT = "use the image of docker/tensorrt_llm.Dockerfile, or engine.kind=torch"
ONESHOT_RANKS = (2, 4, 8, 16)
"""Numbers of ranks for which TensorRT-LLM's own all-reduce kernels exist; any other needs NCCL."""

MODULES = {
    "AllReduce": "tensorrt_llm._torch.distributed",
    "AllReduceParams": "tensorrt_llm._torch.distributed",
    "AllReduceStrategy": "tensorrt_llm._torch.distributed",
    "AsyncLLM": "tensorrt_llm",
    "Attention": "tensorrt_llm._torch.modules.attention",
    "CudaGraphConfig": "tensorrt_llm.llmapi",
    "DecoderLayer": "tensorrt_llm._torch.modules.decoder_layer",
    "DecoderModel": "tensorrt_llm._torch.models.modeling_utils",
    "DecoderModelForCausalLM": "tensorrt_llm._torch.models.modeling_utils",
    "Embedding": "tensorrt_llm._torch.modules.embedding",
    "KvCacheConfig": "tensorrt_llm.llmapi",
    "LLM": "tensorrt_llm",
    "LayerNorm": "tensorrt_llm._torch.modules.layer_norm",
    "Linear": "tensorrt_llm._torch.modules.linear",
    "Mapping": "tensorrt_llm.mapping",
    "ModelConfig": "tensorrt_llm._torch.model_config",
    "SamplingParams": "tensorrt_llm",
    "TensorParallelMode": "tensorrt_llm._torch.modules.linear",
    "TorchLlmArgs": "tensorrt_llm.llmapi.llm_args",
    "register_auto_model": "tensorrt_llm._torch.models.modeling_utils",
}
"""Name -> the module that holds it."""


@functools.cache
def signatures() -> dict[str, list[str]]:
    """What this folder uses of TensorRT-LLM: symbol -> the parameters, attributes or members of it, and no others."""
    return json.loads(files(__package__).joinpath("signatures.json").read_text())


def installed_version() -> str | None:
    """The installed version without importing it; None where there is none."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_supported_version(version: str | None) -> str:
    """Give back a version that this code was written for.

    Raises:
        ConfigError: there is none, or it is another one.
    """
    if version is None:
        raise ConfigError(
            f"TensorRT-LLM is not installed, and engine.kind=tensorrt_llm needs it ({SUPPORTED}); {WAY_OUT}"
        )
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)(rc|a|b|\.dev)?", version)
    if numbers is not None:
        release = (int(numbers[1]), int(numbers[2]), int(numbers[3]))
        before_oldest = release < OLDEST or (release == OLDEST and numbers[4] is not None)
        if not before_oldest and release[:2] == OLDEST[:2]:
            return version
    raise ConfigError(f"TensorRT-LLM {version} is installed, but supported is {SUPPORTED}; {WAY_OUT}")


@functools.cache
def resolve(name: str) -> Any:
    """One of the names in `MODULES`.

    Raises:
        ConfigError: TensorRT-LLM is missing or of another version.
        ArtefactError: it is installed and cannot be imported, or has no such name.
    """
    version = require_supported_version(installed_version())
    try:
        importlib.import_module("tensorrt_llm")
    except (ImportError, OSError) as error:
        raise ArtefactError(
            f"TensorRT-LLM {version} is installed but cannot be imported ({error}); {WAY_OUT}"
        ) from error
    try:
        return getattr(importlib.import_module(MODULES[name]), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ArtefactError(
            f"TensorRT-LLM {version} has no {name} in {MODULES[name]}; run jobs.doctor tensorrt_llm and correct "
            "compat.MODULES"
        ) from error


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve(name)
