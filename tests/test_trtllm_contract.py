"""What kraken/trtllm/ uses of TensorRT-LLM exists there, as the fact file has it; and so does the stand-in."""

import json
from pathlib import Path

import pytest
from trtllm_contract import TABLE, Checker, check_file, qualified
from trtllm_ranks import RankFailureError, run_with_fake

from kraken.config import ConfigError
from kraken.trtllm import compat

FOLDER = Path(compat.__file__).parent
PROVEN_ELSEWHERE = {"session.py": "tensorrt_llm.SamplingParams.__init__: **job.sampling cannot be checked"}
"""Built from a request; the stand-in for `SamplingParams` refuses unknown names."""


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_every_symbol_and_every_keyword_is_in_the_table(path: Path) -> None:
    violations = check_file(path).violations
    allowed = PROVEN_ELSEWHERE.get(path.name)
    assert [v for v in violations if allowed is None or not v.endswith(allowed)] == []


def test_the_walk_sees_the_model() -> None:
    """An empty answer proves something only if the walk finds the uses."""
    checker = check_file(FOLDER / "modeling.py")
    assert {"Attention", "Linear", "AllReduce", "Embedding", "LayerNorm", "register_auto_model"} <= checker.used
    attributes = checker.attributes
    assert attributes["WayAttention"] == {"self.inner": "Attention"}
    assert attributes["FFN"] == {"self.fc": "Linear", "self.proj": "Linear"}
    assert attributes["KrakenLayer"]["self.all_reduce"] == "AllReduce"
    assert attributes["SplitLayer"]["self.attn"] == "Attention"
    assert attributes["SplitLayer"]["self.ln_2"] == "LayerNorm"
    assert attributes["KrakenModel"]["self.conjunction"] == "Linear"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("dense_bias=out_bias", "out_proj_bias=out_bias", "Attention.__init__ has no parameter out_proj_bias"),
        (
            '"skip_create_weights_in_init": model',
            '"skip_weights": model',
            "Linear.__init__ has no parameter skip_weights",
        ),
        ("all_reduce_params=All", "reduce=All", "Attention.forward has no parameter reduce"),
        ("enable_allreduce=reduce", "enabled=reduce", "AllReduceParams.__init__ has no parameter enabled"),
        (
            "o_proj.load_weights(weights=",
            "o_proj.load_weights(tensors=",
            "Linear.load_weights has no parameter tensors",
        ),
        ("AllReduceStrategy.NCCL", "AllReduceStrategy.RING", "AllReduceStrategy has no member RING"),
        ("model_config.mapping.tp_rank", "model_config.mapping.local_rank", "Mapping has no attribute local_rank"),
        ("model_config.torch_dtype", "model_config.dtype", "ModelConfig has no attribute dtype"),
        ("inner.qkv_proj", "inner.qkv", "Attention has no attribute qkv"),
        ("hidden_size=shape.hidden_size, vocab_size", "width=shape.hidden_size, vocab_size", "has no parameter width"),
        ("        **kwargs: Any,\n    ) -> Tensor:", "    ) -> Tensor:", "does not take what"),
        ("from kraken.trtllm.compat import Mapping as", "from tensorrt_llm.mapping import Mapping as", "instead of"),
    ],
)
def test_the_walk_notices(old: str, new: str, expected: str) -> None:
    source = (FOLDER / "modeling.py").read_text()
    assert old in source
    assert any(expected in violation for violation in Checker(source.replace(old, new), "modeling.py").violations)


def test_the_stand_in_has_the_signatures_of_the_table() -> None:
    code = """
import importlib, inspect, json
found = {}
for key in json.load(open("kraken/trtllm/signatures.json"))["symbols"]:
    if not key.startswith(("tensorrt_llm._torch.", "tensorrt_llm.mapping")):
        continue
    parts = key.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        break
    for part in parts[count:]:
        value = None if value is None else getattr(value, part, None)
    if callable(value) and not inspect.isclass(value):
        stars = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}
        parameters = inspect.signature(value).parameters.values()
        found[key] = [stars.get(p.kind, "") + p.name for p in parameters if p.name != "self"]
print(json.dumps(found))
"""
    found = json.loads(run_with_fake(code))
    used = {qualified(symbol) for symbol in check_file(FOLDER / "modeling.py").used}
    assert {key for key in TABLE if key.endswith(".__init__") and key.removesuffix(".__init__") in used} <= found.keys()
    assert {key: names for key, names in found.items() if names != TABLE[key]} == {}


@pytest.mark.parametrize("version", ["1.2.1", "1.2.2", "1.3.0rc27", "1.4.0rc1"])
def test_supported_versions(version: str) -> None:
    assert compat.require_supported_version(version) == version


@pytest.mark.parametrize("version", [None, "0.21.0", "1.2.0", "1.2.0rc6", "1.2.1rc1", "1.5.0", "2.0.0", "unknown"])
def test_other_versions_are_refused_with_the_way_out(version: str | None) -> None:
    with pytest.raises(ConfigError, match=r"1\.2\.1 and newer.*docker/tensorrt_llm.Dockerfile"):
        compat.require_supported_version(version)


def test_without_tensorrt_llm_a_name_is_refused_clearly() -> None:
    assert compat.installed_version() is None
    with pytest.raises(ConfigError, match="not installed"):
        from kraken.trtllm.compat import Linear  # noqa: F401
    with pytest.raises(ImportError):
        from kraken.trtllm.compat import NoSuchName  # noqa: F401


def test_names_of_newer_releases_are_found() -> None:
    code = """
import sys, types
import tensorrt_llm._torch.modules.attention as old
new = types.ModuleType("tensorrt_llm._torch.attention.attention")
new.Attention, moved = old.Attention, old.Attention
sys.modules["tensorrt_llm._torch.attention"] = types.ModuleType("tensorrt_llm._torch.attention")
sys.modules[new.__name__] = new
sys.modules[old.__name__] = None  # importing it now fails
from kraken.trtllm.compat import Attention
assert Attention is moved
"""
    run_with_fake(code)


def test_a_name_that_is_nowhere_says_where_it_was_sought() -> None:
    code = "import sys; sys.modules['tensorrt_llm.mapping'] = None; from kraken.trtllm.compat import Mapping"
    with pytest.raises(RankFailureError, match="TensorRT-LLM 1.2.1 has no Mapping in tensorrt_llm.mapping"):
        run_with_fake(code)


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = """
import sys, kraken.trtllm.compat
assert kraken.trtllm.compat.installed_version() == "1.2.1"
assert "tensorrt_llm" not in sys.modules
"""
    run_with_fake(code)
