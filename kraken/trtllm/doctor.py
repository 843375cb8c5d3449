"""The acceptance test on a machine that has TensorRT-LLM: is it as this code assumes, does it compute what we compute?

`jobs/doctor.py` is its command line; `pipelines/doctor.py` adds what needs Ray Serve.

python -m kraken.trtllm.doctor prints the differences of signatures as JSON; run as a process of its own, since the
import starts MPI.
"""

import asyncio
import dataclasses
import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from kraken.config import ConfigError, EngineConfig, ModelConfig
from kraken.engine.placement import TENSORRT_LLM_FOLDER, Machine
from kraken.engine.protocol import EngineError, Request, SamplingParams
from kraken.manifest import ArtefactError
from kraken.trtllm.compat import MODULES, facts

Outcome = Literal["pass", "fail", "not possible here"]
SIGNATURES = "signatures"
MODEL_CHECKS = ("conversion", "logits and greedy tokens", "clean-up")
TIMING_CHECKS = ("TTFT overlapped", "TTFT blocking", "TTFT standard baseline")
WIDTHS = (8, 4, 2)
"""Numbers of ways to build, the largest that fits."""
USED_CLASSES = frozenset({*MODULES, "RequestOutput", "CompletionOutput", "TorchLlmArgs"})
"""A difference in these is a failure; one elsewhere in the table is only told."""
TEXT = "the quick brown fox jumps over the lazy dog, again and again; " * 16
TOLERANCE = 2.0**-5
"""Of the largest logit: how far bfloat16 may lead from float32."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Patient:
    """What is built and measured; the defaults suit a GPU."""

    num_layers: int = 12
    head_size: int = 128
    heads_per_way: int = 8
    context_length: int = 1024
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    num_prompt_tokens: int = 512
    num_timed: int = 20

    def kraken(self, num_ways: int) -> ModelConfig:
        """A Kraken with a way per GPU."""
        return self._shape("kraken", num_ways, self.heads_per_way, num_ways)

    def standard(self, num_ways: int) -> ModelConfig:
        """A standard Transformer of about as many parameters, whose heads the same GPUs can share."""
        num_heads = max(1, round(self.heads_per_way * num_ways**0.5 / num_ways)) * num_ways
        return self._shape("standard", 1, num_heads, 1)

    def _shape(self, architecture: Any, num_ways: int, heads_per_way: int, factor: int) -> ModelConfig:
        return ModelConfig(
            architecture=architecture,
            num_layers=self.num_layers,
            width=heads_per_way * self.head_size,
            num_heads=heads_per_way * factor,
            num_ways=num_ways,
            context_length=self.context_length,
            vocab_size=320,
            bias=True,
        )


# Signatures


@dataclass(frozen=True, slots=True)
class Difference:
    """A symbol that is not as the table says."""

    symbol: str
    problem: str
    is_used: bool


def compare_signatures(table: Mapping[str, Sequence[str]], renames: Mapping[str, str]) -> list[Difference]:
    """Compare the fact file with the installed package; imports TensorRT-LLM.

    Args:
        table: symbol -> names that it must know.
        renames: symbol of 1.2.1 -> where newer versions keep it.
    """
    found = []
    for symbol, names in table.items():
        if not symbol.startswith("tensorrt_llm"):
            continue
        is_used = bool(USED_CLASSES & set(symbol.split(".")))
        problem = _problem(symbol, names, renames)
        if problem:
            found.append(Difference(symbol, problem, is_used))
    return found


def _problem(symbol: str, names: Sequence[str], renames: Mapping[str, str]) -> str:
    path, kind = symbol, ""
    for suffix in (".attributes", ".fields"):
        if symbol.endswith(suffix):
            path, kind = symbol.removesuffix(suffix), suffix[1:]
    target = _find(path)
    for old, new in renames.items():
        if target is None and path.startswith(old):
            target = _find(new + path.removeprefix(old))
    if target is None:
        return "is not there"
    expected = [name for name in names if not name.startswith("*")]
    missing = [name for name in expected if not _knows(target, name, kind)]
    return f"does not know {', '.join(missing)}" if missing else ""


def _find(path: str) -> Any:
    """The object of a dotted path, through whatever modules and classes; None where there is none."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            target: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for name in parts[length:]:
            target = getattr(target, name, None)
        return target
    return None


def _knows(target: Any, name: str, kind: str) -> bool:
    """Whether a callable takes a parameter, or a class has a field, attribute or member."""
    if kind == "fields" and hasattr(target, "model_fields"):
        return name in target.model_fields
    if kind or inspect.isclass(target):
        return hasattr(target, name) or _is_mentioned(target, name)
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # compiled, without a signature
        return True
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return name in parameters or takes_any


def _is_mentioned(target: type, name: str) -> bool:
    """Whether a class declares an attribute, or sets it on its instances."""
    for base in inspect.getmro(target):
        if name in getattr(base, "__annotations__", {}) or name in getattr(base, "__slots__", ()):
            return True
        try:
            if f"self.{name}" in inspect.getsource(base):
                return True
        except (OSError, TypeError):
            continue
    return False


def check_signatures(python: str = sys.executable) -> Check:
    """`compare_signatures` in a process of its own."""
    environment = os.environ | {"TLLM_DISABLE_MPI": "1"}
    command = [python, "-m", "kraken.trtllm.doctor"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    try:
        differences = [Difference(**values) for values in json.loads(result.stdout.strip().splitlines()[-1])]
    except (ValueError, TypeError, IndexError):
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        return Check(SIGNATURES, "fail", f"they cannot be read: {last[:200]}")
    num_symbols = len(facts()["symbols"])
    used = [f"{d.symbol} {d.problem}" for d in differences if d.is_used]
    others = f"{len(differences) - len(used)} unused ones differ" if len(differences) > len(used) else ""
    if used:
        return Check(SIGNATURES, "fail", "; ".join([*used, *filter(None, [others])]))
    return Check(SIGNATURES, "pass", "; ".join([f"{num_symbols} symbols compared", *filter(None, [others])]))


# The model


def examine(machine: Machine, folder: Path, patient: Patient) -> Iterator[Check]:
    """Everything but Ray Serve, one check after the other.

    Args:
        folder: an empty one, for models; the first is left in `folder / "kraken"`.
    """
    if machine.version is None:
        names = (SIGNATURES, *MODEL_CHECKS, *TIMING_CHECKS)
        yield from (Check(name, "not possible here", machine.problem) for name in names)
        return
    yield check_signatures()
    num_ways = fitting_width(machine)
    if num_ways is None:
        reason = why_no_width(machine)
        yield from (Check(name, "not possible here", reason) for name in (*MODEL_CHECKS, *TIMING_CHECKS))
        return
    yield from _examine_model(folder, patient, num_ways)
    yield from _examine_timing(folder, patient, num_ways)


def fitting_width(machine: Machine) -> int | None:
    """The most ways that this machine has GPUs for; None where not even two."""
    return next((width for width in WIDTHS if width <= (machine.num_gpus or 0)), None)


def why_no_width(machine: Machine) -> str:
    return "there is no GPU" if not machine.num_gpus else "there is one GPU, and a Kraken has at least two ways"


def _examine_model(folder: Path, patient: Patient, num_ways: int) -> Iterator[Check]:
    started_at = time.monotonic()
    try:
        config = patient.kraken(num_ways)
        make_exchange(folder / "kraken", config, patient.dtype)
    except (ConfigError, ArtefactError) as error:
        yield Check("conversion", "fail", str(error))
        return
    yield Check("conversion", "pass", f"{num_ways} ways, {time.monotonic() - started_at:.1f} s")
    try:
        yield asyncio.run(_compare(folder / "kraken", patient))
        yield Check("clean-up", "pass", "no process is left")
    except (EngineError, ConfigError, ArtefactError) as error:
        yield Check("logits and greedy tokens", "fail", str(error))


def make_exchange(folder: Path, config: ModelConfig, dtype: str) -> None:
    """A random model as an exchange folder, with its TensorRT-LLM folder inside."""
    import torch

    from kraken.convert import to_exchange, write_folder
    from kraken.manifest import finish_artefact
    from kraken.model import Kraken
    from kraken.tokenizer import Tokenizer
    from kraken.trtllm.checkpoint import from_exchange

    started_at = time.monotonic()
    stored = torch.float32 if dtype == "float32" else torch.bfloat16
    model = Kraken(config).requires_grad_(False)
    model.init_weights(seed=0)
    model.to(stored).float()  # rounded, so that both engines hold the same numbers
    tokenizer = Tokenizer.train([TEXT], 264)
    folder.mkdir(parents=True)
    write_folder(folder, config, to_exchange(model), tokenizer)
    finish_artefact(
        folder,
        started_at=started_at,
        kind="convert",
        fingerprint=f"doctor-{config.architecture}-{config.num_ways}",
        config=dataclasses.asdict(config),
        parents={},
        metrics={},
        details={"tokenizer_fingerprint": tokenizer.fingerprint},
    )
    from_exchange(folder, folder / TENSORRT_LLM_FOLDER, dtype=stored)


async def _compare(exchange: Path, patient: Patient) -> Check:
    """Logits of prompts and generated tokens, and the greedy tokens, against our model in float32."""
    import torch

    from kraken.convert import read_exchange
    from kraken.evaluate import parity
    from kraken.trtllm.engine import TensorRTEngine

    model = read_exchange(exchange, torch.float32)
    num_tokens, length = 16, patient.num_prompt_tokens
    prompts = [[(7 * start + 3 * i) % 256 for i in range(n)] for start, n in ((1, length), (2, length // 2), (3, 1))]
    with torch.inference_mode():
        largest = float(model(torch.tensor(prompts[:1])).abs().max())
    tolerance = (1e-3 if patient.dtype == "float32" else TOLERANCE) * largest
    engine = TensorRTEngine.from_exchange(exchange, EngineConfig(kind="tensorrt_llm", dtype=patient.dtype))
    try:
        await engine.start()
        report = await parity(engine, model, prompts, num_tokens, tolerance)
        detail = (
            f"log-probabilities differ by {report.max_abs_diff:.2e} (at most {tolerance:.2e}), "
            f"{report.num_different} of {report.num_tokens} tokens; {engine.capabilities}"
        )
    finally:
        await engine.close()
    return Check("logits and greedy tokens", "pass" if report.passed else "fail", detail)


# Time to first token


def _examine_timing(folder: Path, patient: Patient, num_ways: int) -> Iterator[Check]:
    standard = patient.standard(num_ways)
    try:
        make_exchange(folder / "standard", standard, patient.dtype)
    except (ConfigError, ArtefactError) as error:
        yield Check(TIMING_CHECKS[2], "fail", str(error))
        return
    overlapped_ms = None
    for name, source, overlap in zip(TIMING_CHECKS, ("kraken", "kraken", "standard"), (True, False, True), strict=True):
        try:
            ours_ms, theirs_ms = asyncio.run(
                _time_first_token(folder / source / TENSORRT_LLM_FOLDER, patient, num_ways, overlap)
            )
        except (EngineError, ConfigError, ArtefactError) as error:
            yield Check(name, "fail", str(error))
            continue
        overlapped_ms = overlapped_ms or ours_ms
        clock = "no clock of its own" if theirs_ms is None else f"{theirs_ms:.2f} ms by its own clock"
        ratio = f", {ours_ms / overlapped_ms:.3f} times the first" if name != TIMING_CHECKS[0] else ""
        width = f"{num_ways} GPUs, {patient.num_prompt_tokens} tokens"
        yield Check(name, "pass", f"{ours_ms:.2f} ms median ({clock}){ratio}; {width}")


async def _time_first_token(
    folder: Path, patient: Patient, num_ranks: int, overlap: bool
) -> tuple[float, float | None]:
    """Median time to first token of one request at a time in ms, by our clock and by TensorRT-LLM's."""
    from kraken.trtllm.engine import TensorRTEngine

    config = EngineConfig(kind="tensorrt_llm", dtype=patient.dtype)
    engine = TensorRTEngine.from_folder(folder, config, num_ranks=num_ranks, overlap=overlap)
    try:
        await engine.start()
        times_ms = []
        for number in range(patient.num_timed + 3):
            # every prompt begins differently, so that none is found in the cache
            prompt_ids = tuple((number + 3 * i) % 256 for i in range(patient.num_prompt_tokens))
            request = Request(
                id=f"timed-{number}", prompt_ids=prompt_ids, sampling=SamplingParams(max_tokens=1, temperature=0.0)
            )
            started_at = time.perf_counter()
            async for _output in engine.generate(request):
                times_ms.append((time.perf_counter() - started_at) * 1e3)
        return median(times_ms[3:]), engine.stats().reported_ttft_ms
    finally:
        await engine.close()


def main() -> None:
    table = facts()
    differences = compare_signatures(table["symbols"], table["main_delta"]["renames"])
    print(json.dumps([dataclasses.asdict(difference) for difference in differences]))


if __name__ == "__main__":
    main()
