"""Which engine runs a model. Serving and evaluation ask here, and log the reason."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kraken.config import ConfigError, EngineConfig, EngineKind
from kraken.engine.placement import TENSORRT_LLM_FOLDER, Machine, Placement
from kraken.engine.protocol import Engine

PROBE_TIMEOUT_S = 300.0
PROBE = "kraken.trtllm.probe"


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen engine and the reason."""

    kind: Literal["torch", "tensorrt_llm"]
    reason: str

    def __str__(self) -> str:
        return f"engine {self.kind}: {self.reason}"


def choose(kind: EngineKind, num_ways: int, is_converted: bool, machine: Machine) -> Choice:
    """Choose an engine.

    Args:
        is_converted: whether the model has a TensorRT-LLM folder.
        machine: the machine on which the engine will run.

    Raises:
        ConfigError: `kind` is tensorrt_llm, which cannot run.
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
    """The first reason why TensorRT-LLM cannot run; empty if it can."""
    if not is_converted:
        return "the model is not converted for TensorRT-LLM (convert.tensorrt_llm=true does it)"
    if machine.num_gpus is not None and machine.num_gpus < num_ways:
        return f"{machine.num_gpus} GPUs are there, and TensorRT-LLM needs one for each of the {num_ways} ways"
    if machine.version is None:
        return machine.problem or "tensorrt_llm is not installed"
    return ""


def find_machine() -> Machine:
    """What the machine of this process offers.

    TensorRT-LLM is imported in a process of its own, since the import takes long, starts MPI and may abort.
    """
    return _probe()


@functools.cache
def _probe() -> Machine:
    if importlib.util.find_spec("tensorrt_llm") is None:
        return Machine(version=None, problem="tensorrt_llm is not installed")
    root = str(Path(__file__).parents[1])
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
    """Create the chosen engine. TensorRT-LLM starts with its first request, or with `start()`.

    Args:
        placement: makes TensorRT-LLM run as Ray workers, which is needed inside a Serve replica; None runs it as a
            process tree of its own.

    Raises:
        ArtefactError: the folder is incomplete, or does not fit this machine.
        ConfigError: the model cannot be divided among the devices.
    """
    if choice.kind == "torch":
        from kraken.engine.engine import TorchEngine  # torch is loaded only where a model is

        return TorchEngine.from_exchange(exchange, config)
    from kraken.trtllm.engine import TensorRTEngine

    return TensorRTEngine.from_exchange(exchange, config, placement)


def num_ways_of(exchange: Path) -> int:
    """Ways of the model in an exchange folder, read without torch; 1 if the folder cannot be read."""
    try:
        return int(json.loads((exchange / "config.json").read_text())["num_ways"])
    except (OSError, ValueError, KeyError):
        return 1  # opening the folder will report what is wrong with it


def choose_for(exchange: Path, config: EngineConfig, look: Callable[[], Machine] = find_machine) -> Choice:
    """`choose` for an exchange folder.

    Args:
        look: finds what the engine's machine offers; only called if the choice depends on it.

    Raises:
        ConfigError: TensorRT-LLM is asked for and not possible.
    """
    if config.kind == "auto" and config.refused_by_tensorrt_llm:
        return Choice("torch", f"{config.refused_by_tensorrt_llm} with TensorRT-LLM")
    is_converted = is_converted_for_tensorrt_llm(exchange)
    matters = config.kind != "torch" and is_converted
    machine = look() if matters else Machine(version=None)
    return choose(config.kind, num_ways_of(exchange), is_converted, machine)


def is_converted_for_tensorrt_llm(exchange: Path) -> bool:
    """Whether an exchange folder holds a TensorRT-LLM folder."""
    return (exchange / TENSORRT_LLM_FOLDER / "config.json").is_file()
