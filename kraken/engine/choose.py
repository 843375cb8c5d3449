"""Which engine runs a model: one decision for serving and evaluation, with its reason in one line."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kraken.config import ConfigError, EngineConfig, EngineKind
from kraken.engine.protocol import Engine

TENSORRT_LLM_FOLDER = "tensorrt_llm"
"""Folder of the TensorRT-LLM checkpoint, inside the exchange folder."""
PROBE_TIMEOUT_S = 300.0
PROBE = "kraken.trtllm.probe"
REPLICA_ENVIRONMENT = {
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    "TLLM_DISABLE_MPI": "1",
    "TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL": "1",
}
"""What a Serve replica's environment must say before TensorRT-LLM is imported in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a machine offers to TensorRT-LLM."""

    version: str | None
    """Of the TensorRT-LLM that imports here and is supported; None when there is none."""
    problem: str = ""
    """Why there is none."""
    num_gpus: int | None = None
    """GPUs that a process here may use; None where nobody counted, since TensorRT-LLM is missing anyway."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine and why it was taken."""

    kind: Literal["torch", "tensorrt_llm"]
    reason: str

    def __str__(self) -> str:
        return f"engine {self.kind}: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where TensorRT-LLM puts its Ray workers; the group is Ray's, and is never removed by the engine."""

    group: Any
    bundle_indices: tuple[int, ...]
    """One bundle of the group per way."""


def choose(kind: EngineKind, num_ways: int, is_converted: bool, machine: Machine) -> Choice:
    """Decide.

    Args:
        is_converted: whether the model has a TensorRT-LLM folder.
        machine: where the engine will run.

    Raises:
        ConfigError: TensorRT-LLM is asked for and not possible.
    """
    if kind == "torch":
        return Choice("torch", "engine.kind=torch")
    obstacle = _obstacle(num_ways, is_converted, machine)
    if not obstacle:
        gpus = f"{machine.num_gpus} GPUs for {num_ways} ways"
        return Choice("tensorrt_llm", f"TensorRT-LLM {machine.version} imports, {gpus}")
    if kind == "tensorrt_llm":
        raise ConfigError(f"engine.kind=tensorrt_llm is not possible here: {obstacle}; mend that, or choose auto")
    return Choice("torch", obstacle)


def _obstacle(num_ways: int, is_converted: bool, machine: Machine) -> str:
    """The first thing that keeps TensorRT-LLM from running; empty when nothing does."""
    if not is_converted:
        return "the model is not converted for TensorRT-LLM (convert.tensorrt_llm=true does it)"
    if machine.num_gpus is not None and machine.num_gpus < num_ways:
        return f"{machine.num_gpus} GPUs are there, and TensorRT-LLM needs one for each of the {num_ways} ways"
    if machine.version is None:
        return machine.problem or "tensorrt_llm is not installed"
    return ""


def find_machine() -> Machine:
    """Look at the machine this process runs on.

    The import happens in a process of its own: it takes long, starts MPI and may abort.
    """
    return _probe()


@functools.cache
def _probe() -> Machine:
    if importlib.util.find_spec("tensorrt_llm") is None:
        return Machine(version=None, problem="tensorrt_llm is not installed")
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TLLM_DISABLE_MPI": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", PROBE]
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
        return Machine(**json.loads(result.stdout.strip().splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return Machine(version=None, problem=f"importing tensorrt_llm took longer than {PROBE_TIMEOUT_S:.0f} s")
    except (ValueError, TypeError, IndexError):
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        return Machine(version=None, problem=f"tensorrt_llm does not import: {last[:200]}")


def open_engine(choice: Choice, exchange: Path, config: EngineConfig, placement: Placement | None = None) -> Engine:
    """Make the chosen engine; TensorRT-LLM starts with its first request, or with `start()`.

    Args:
        placement: with it TensorRT-LLM runs as Ray workers, as it must inside a Serve replica; without it, as a process
            tree of its own.

    Raises:
        ArtefactError: the folder is incomplete, or does not fit this machine.
        ConfigError: the model cannot be divided among the devices, or its answers would be wrong.
    """
    if choice.kind == "torch":
        from kraken.engine.engine import TorchEngine  # torch is loaded only where a model is

        return TorchEngine.from_exchange(exchange, config)
    from kraken.trtllm.engine import TensorRTEngine

    return TensorRTEngine.from_exchange(exchange, config, placement)


def num_ways_of(exchange: Path) -> int:
    """Ways of the model in an exchange folder, read without torch; 1 where nothing can be read."""
    try:
        return int(json.loads((exchange / "config.json").read_text())["num_ways"])
    except (OSError, ValueError, KeyError):
        return 1  # whoever opens the folder says what is wrong with it


def choose_for(exchange: Path, config: EngineConfig, look: Callable[[], Machine] = find_machine) -> Choice:
    """`choose` for an exchange folder.

    Args:
        look: finds the machine where the engine will run; not asked when the answer cannot matter.

    Raises:
        ConfigError: TensorRT-LLM is asked for and not possible.
    """
    if config.kind == "auto" and config.device == "cpu":
        return Choice("torch", "engine.device=cpu")
    if config.kind == "auto" and config.num_devices > 1:
        return Choice("torch", f"engine.num_devices={config.num_devices}, which TensorRT-LLM does not know")
    is_converted = is_converted_for_tensorrt_llm(exchange)
    matters = config.kind != "torch" and is_converted
    machine = look() if matters else Machine(version=None)
    return choose(config.kind, num_ways_of(exchange), is_converted, machine)


def is_converted_for_tensorrt_llm(exchange: Path) -> bool:
    """Whether an exchange folder holds a TensorRT-LLM folder."""
    return (exchange / TENSORRT_LLM_FOLDER / "config.json").is_file()
