"""Every setting of an engine is honoured or refused by name, in every engine: none is accepted and ignored.

A new field of `EngineConfig` fails these tests until it is decided for each engine.
"""

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from test_trtllm_engine import make_exchange
from trtllm_ranks import ROOT, run_with_fake

from kraken import choose_engine as choose
from kraken.choose_engine import Choice, choose_for, open_engine
from kraken.config import ConfigError, EngineConfig
from kraken.engine.echo import EchoEngine
from kraken.engine.protocol import EngineInfo
from kraken.trtllm.engine import TensorRTEngine
from kraken.trtllm.session import Launch

FIELDS = {spec.name for spec in dataclasses.fields(EngineConfig)}

OTHER_VALUES: dict[str, Any] = {
    "kind": "torch",
    "startup_timeout_s": 1.0,
    "device": "cpu",
    "dtype": "float32",
    "quantization": "fp8",
    "num_threads": 3,
    "num_devices": 2,
    "overlap": "blocking",
    "all_reduce": "nccl",
    "collective_timeout_s": 1.0,
    "max_batch_size": 3,
    "max_step_tokens": 100,
    "kv_cache_tokens": 100,
    "tokens_per_block": 32,
    "prefix_reuse": False,
    "cuda_graphs": False,
    "cuda_graph_sizes": (2, 4),
    "max_queued_requests": 3,
}
"""Field -> a value that is not the default."""

TORCH_HONOURED = FIELDS - {"kind"}
"""`kind` chooses between engines."""

TENSORRT_HONOURED: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "float32"},
    "overlap": {"model_kwargs": {"overlap_all_reduce": False}},
    "max_batch_size": {"max_batch_size": 3, "cuda_graph_config.max_batch_size": 3},
    "kv_cache_tokens": {"kv_cache_config.max_tokens": 112},  # whole blocks
    "tokens_per_block": {"kv_cache_config.tokens_per_block": 32},
    "prefix_reuse": {"kv_cache_config.enable_block_reuse": False},
    "cuda_graphs": {"cuda_graph_config": None},
    "cuda_graph_sizes": {"cuda_graph_config.batch_sizes": [2, 4], "cuda_graph_config.max_batch_size": 0},
}
"""Field -> the arguments of TensorRT-LLM that its other value changes, and to what."""
TENSORRT_OURS = {"startup_timeout_s", "max_queued_requests"}
"""Honoured by our engine around TensorRT-LLM."""
TENSORRT_REFUSED = {
    "device": "cpu",
    "quantization": "fp8",
    "num_threads": 3,
    "num_devices": 2,
    "collective_timeout_s": 1.0,
    "max_step_tokens": 100,
    "tokens_per_block": 24,
    "cuda_graph_sizes": (2, 17),
}
"""Field -> a value that is refused."""
NOT_POSSIBLE_ALONE = {"all_reduce": {"num_devices": 2}}
"""Field -> settings without which no engine takes it, and which TensorRT-LLM refuses."""

ECHO_HONOURED = {"kind", "max_batch_size", "max_queued_requests"}


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_exchange(tmp_path_factory.mktemp("exchange"))


def test_every_field_is_decided_for_every_engine() -> None:
    assert OTHER_VALUES.keys() == FIELDS
    decided = TENSORRT_HONOURED.keys() | TENSORRT_OURS | TENSORRT_REFUSED.keys() | NOT_POSSIBLE_ALONE.keys() | {"kind"}
    assert decided == FIELDS
    assert all(value != getattr(EngineConfig(), name) for name, value in OTHER_VALUES.items())


def reads(path: Path) -> set[str]:
    """Fields that a module takes of a configuration, by name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            holder = node.value
            name = holder.id if isinstance(holder, ast.Name) else getattr(holder, "attr", "")
            if name.strip("_").endswith("config"):
                found.add(node.attr)
    return found & FIELDS


def test_the_torch_engine_reads_every_field() -> None:
    others = {"choose.py", "echo.py"}
    modules = [path for path in (ROOT / "kraken" / "engine").rglob("*.py") if path.name not in others]
    assert set().union(*map(reads, modules)) == TORCH_HONOURED


def launch_of(exchange: Path, **settings: Any) -> Launch:
    engine = open_engine(Choice("tensorrt_llm", "asked for"), exchange, EngineConfig(**settings))
    assert isinstance(engine, TensorRTEngine)
    launch: Launch = engine._backend._launch  # type: ignore[attr-defined]
    return launch


def test_tensorrt_llm_is_told_of_every_field_that_it_honours(exchange: Path) -> None:
    launches = {"default": launch_of(exchange)}
    launches |= {name: launch_of(exchange, **{name: OTHER_VALUES[name]}) for name in TENSORRT_HONOURED}
    code = (
        "import dataclasses, json, sys; from kraken.trtllm.session import Launch, llm_arguments\n"
        f"launches = json.loads({json.dumps({n: dataclasses.asdict(x) for n, x in launches.items()})!r})\n"
        "plain = lambda x: dataclasses.asdict(x) if dataclasses.is_dataclass(x) else repr(x)\n"
        "print(json.dumps({name: llm_arguments(Launch.from_json(x)) for name, x in launches.items()}, default=plain))"
    )
    arguments = {name: flat(values) for name, values in json.loads(run_with_fake(code)).items()}
    default = arguments.pop("default")
    assert default["kv_cache_config.enable_block_reuse"] is True
    assert default["kv_cache_config.tokens_per_block"] == EngineConfig().tokens_per_block
    for name, expected in TENSORRT_HONOURED.items():
        found = arguments[name]
        for key, value in flat(expected).items():
            assert found[key] == value and default.get(key, "nothing") != value, (name, key)
        changed = {key for key in found.keys() | default.keys() if found.get(key) != default.get(key)}
        own = {key.partition(".")[0] for key in expected} | ({"max_num_tokens"} if name == "max_batch_size" else set())
        assert {key.partition(".")[0] for key in changed} <= own, name


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of TensorRT-LLM's own configurations as keys with a dot."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key.endswith("_config"):
            found |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            found[key] = value
    return found


@pytest.mark.parametrize("name", TENSORRT_REFUSED)
def test_tensorrt_llm_refuses_what_it_cannot_do(name: str, exchange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {name: TENSORRT_REFUSED[name]}
    message = rf"engine\.{name}=.* is not possible \(.*leave it out"
    with pytest.raises(ConfigError, match=message):
        EngineConfig(kind="tensorrt_llm", **settings)
    config = EngineConfig(**settings)
    with pytest.raises(ConfigError, match=rf"engine\.{name}"):
        open_engine(Choice("tensorrt_llm", "asked for"), exchange, config)
    good = choose.Machine(version="1.2.1", num_gpus=2)
    taken = choose_for(exchange, config, lambda: good)
    assert taken.kind == "torch" and f"engine.{name}=" in taken.reason
    assert choose_for(exchange, EngineConfig(), lambda: good).kind == "tensorrt_llm"


@pytest.mark.parametrize("name", NOT_POSSIBLE_ALONE)
def test_what_needs_another_setting_is_refused_without_it(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.{name}"):
        EngineConfig(**{name: OTHER_VALUES[name]})
    with pytest.raises(ConfigError, match=r"engine\."):
        EngineConfig(kind="tensorrt_llm", **{name: OTHER_VALUES[name]}, **NOT_POSSIBLE_ALONE[name])


def test_a_cache_that_does_not_hold_one_context_is_refused(exchange: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_tokens=40 does not hold one context of 48 tokens"):
        launch_of(exchange, kv_cache_tokens=40)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_the_echo_engine(name: str) -> None:
    info = EngineInfo(name="echo", context_length=8, num_ids=4, eot_id=3, tokenizer_fingerprint="none")
    settings = {name: OTHER_VALUES[name]} | NOT_POSSIBLE_ALONE.get(name, {})
    config = EngineConfig(**settings)
    if name in ECHO_HONOURED:
        EchoEngine(info, config=config)
        return
    with pytest.raises(ConfigError, match=r"has no effect with the echo engine"):
        EchoEngine(info, config=config)
