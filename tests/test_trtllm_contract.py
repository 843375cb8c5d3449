"""What kraken/trtllm/ uses of TensorRT-LLM exists there, as the fact file has it; and so does the stand-in."""

import json
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from trtllm_contract import TABLE, Checker, check_file
from trtllm_ranks import RankFailureError, run_with_fake

from kraken.config import ConfigError
from kraken.engine.protocol import Request, SamplingParams
from kraken.trtllm import compat
from kraken.trtllm.session import SAME_FIELDS, make_jobs

FOLDER = Path(compat.__file__).parent
PROVEN_ELSEWHERE = {"session.py": "tensorrt_llm.SamplingParams.__init__: **job.sampling cannot be checked"}
"""Built from a request: see `sampling_names`."""
UNTYPED = {
    "tensorrt_llm.LLM.shutdown": set(),
    "tensorrt_llm.llmapi.RequestOutput.abort": set(),
    "tensorrt_llm.llmapi.RequestOutput.attributes": {"outputs", "context_logits", "finished", "metrics_dict"},
    "tensorrt_llm.llmapi.CompletionOutput.attributes": {"token_ids", "finish_reason", "generation_logits"},
    "tensorrt_llm._torch.model_config.ModelConfig.attributes": {"_frozen", "lora_config", "spec_config"},
    "tensorrt_llm.mapping.Mapping.attributes": {"pp_size", "cp_size"},
}
"""Used where the walk does not know the type."""


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_every_symbol_and_every_keyword_is_in_the_table(path: Path) -> None:
    violations = check_file(path).violations
    allowed = PROVEN_ELSEWHERE.get(path.name)
    assert [v for v in violations if allowed is None or not v.endswith(allowed)] == []


def sampling_names() -> set[str]:
    """Keywords of `tensorrt_llm.SamplingParams` that requests of every kind become."""
    requests = [
        Request(id="a", prompt_ids=(1, 2), sampling=sampling, prompt_logprobs=True, num_logprobs=1)
        for sampling in (SamplingParams(temperature=0.0), SamplingParams(seed=1, stop_ids=(1,)))
    ]
    return {*SAME_FIELDS} | {name for r in requests for job in make_jobs(r, 0) if job for name in job.sampling}


def test_the_table_lists_what_is_used_and_nothing_else() -> None:
    """Otherwise the doctor would report as a failure that a name is missing which nobody needs."""
    used: dict[str, set[str]] = {"tensorrt_llm.SamplingParams.__init__": sampling_names()}
    for passed in (*(check_file(path).passed for path in FOLDER.glob("*.py")), UNTYPED):
        for key, names in passed.items():
            used.setdefault(key, set()).update(names)
    assert used == {key: set(names) for key, names in TABLE.items()}
    sources = "".join(path.read_text() for path in FOLDER.glob("*.py"))
    assert [name for names in UNTYPED.values() for name in names if name not in sources] == []


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
        ("all_reduce_params=None", "reduce=None", "Attention.forward has no parameter reduce"),
        ("enable_allreduce=False", "enabled=False", "AllReduceParams.__init__ has no parameter enabled"),
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
for key in json.load(open("kraken/trtllm/signatures.json")):
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
    assert {key for key in TABLE if key.endswith(("__init__", "forward", "generate_async"))} <= found.keys()
    del found["tensorrt_llm.AsyncLLM.__init__"]  # takes the rest as keywords
    own = {key: [name for name in names if name in TABLE[key]] for key, names in found.items()}
    assert own == {key: TABLE[key] for key in found}, "in this order, since some are passed by position"


@pytest.mark.parametrize("version", ["1.2.1", "1.2.2", "1.2.10", "1.2.2rc1"])
def test_supported_versions(version: str) -> None:
    assert compat.require_supported_version(version) == version


@pytest.mark.parametrize(
    "version", [None, "0.21.0", "1.2.0", "1.2.0rc6", "1.2.1rc1", "1.3.0rc27", "1.4.0rc1", "2.0.0", "unknown"]
)
def test_other_versions_are_refused_with_the_way_out(version: str | None) -> None:
    with pytest.raises(ConfigError, match=r"1\.2\.1 and newer.*docker/tensorrt_llm.Dockerfile"):
        compat.require_supported_version(version)


def test_without_tensorrt_llm_a_name_is_refused_clearly() -> None:
    assert compat.installed_version() is None
    with pytest.raises(ConfigError, match="not installed"):
        from kraken.trtllm.compat import Linear  # noqa: F401
    with pytest.raises(ImportError):
        from kraken.trtllm.compat import NoSuchName  # noqa: F401


def test_a_name_that_is_nowhere_says_where_it_was_sought() -> None:
    code = "import sys; sys.modules['tensorrt_llm.mapping'] = None; from kraken.trtllm.compat import Mapping"
    with pytest.raises(RankFailureError, match="TensorRT-LLM 1.2.1 has no Mapping in tensorrt_llm.mapping"):
        run_with_fake(code)


def test_the_torch_of_the_image_is_allowed() -> None:
    """Release 1.2.1 takes torch 2.9.1 up to 2.10, and its image comes with the first."""
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["project"]
    (requirement,) = (Requirement(text) for text in project["dependencies"] if text.startswith("torch"))
    assert requirement.specifier.contains("2.9.1") and requirement.specifier.contains(metadata.version("torch"))


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = """
import sys, kraken.trtllm.compat
assert kraken.trtllm.compat.installed_version() == "1.2.1"
assert "tensorrt_llm" not in sys.modules
"""
    run_with_fake(code)
