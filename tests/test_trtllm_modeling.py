"""The model for TensorRT-LLM, on a stand-in of it with W processes, against the model on one device."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from trtllm_ranks import RankFailureError, Ranks, RankServer, run_with_fake

from kraken.config import ModelConfig
from kraken.convert import CODE, copy_code, model_config_json, to_exchange
from kraken.model import Kraken
from kraken.model.alignment import pad
from kraken.model.residual_norm import LAYER_NORM_EPSILON
from kraken.trtllm.checkpoint import trtllm_config
from kraken.trtllm.parts import padded_tensors

PADDED_HEAD = 32
NUM_PROMPT, NUM_DECODED = 7, 3


@pytest.fixture(scope="module")
def ranks_of() -> Iterator[Callable[..., Ranks]]:
    """`Ranks`, from one server."""
    server = RankServer()
    yield functools.partial(Ranks, server=server)
    server.close()


def shape(num_ways: int, **changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "num_layers": 3,
        "width": 24,
        "num_heads": 2 * num_ways,
        "num_ways": num_ways,
        "context_length": 16,
        "vocab_size": 192,
        "bias": True,
    }
    return ModelConfig(**(values | changes))


def random_model(config: ModelConfig) -> Kraken:
    model = Kraken(config).requires_grad_(False)
    for index, parameter in enumerate(model.parameters()):  # gains of 1 and biases of 0 would hide mistakes
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.3)
    return model


def tensors_of(model: Kraken) -> dict[str, torch.Tensor]:
    """Padded and scaled for TensorRT-LLM, here by hand."""
    c, H = model.config, PADDED_HEAD
    tensors = {"embed_tokens.weight": model.wte.weight, "embed_positions.weight": model.wpe.weight}
    modules = {"ln_f": model.ln_f} | ({} if model.conjunction is None else {"conjunction": model.conjunction})
    for name, module in modules.items():
        tensors |= {f"{name}.{kind}": tensor for kind, tensor in module.named_parameters()}
    for way in range(c.num_ways):
        for index, layer in enumerate(model.h):
            prefix = f"ways.{way}.layers.{index}"
            parts = {name: tensor[way] for name, tensor in layer.named_parameters()}
            for kind in ("weight", "bias") if c.bias else ("weight",):
                for name in ("ln_1", "ln_2"):
                    if f"{name}.{kind}" in parts:
                        tensors[f"{prefix}.{name}.{kind}"] = parts[f"{name}.{kind}"]
                for ours, theirs in (("c_fc", "fc"), ("c_proj", "proj")):
                    tensors[f"{prefix}.mlp.{theirs}.{kind}"] = parts[f"mlp.{ours}.{kind}"]
                heads = parts[f"attn.c_attn.{kind}"].unflatten(0, (3, c.heads_per_way, c.head_size))
                heads = pad(heads, H, None) if kind == "weight" else pad(heads, H)
                q, k, v = heads.flatten(1, 2)
                tensors |= {f"{prefix}.attn.q.{kind}": q * (H / c.head_size) ** 0.5, f"{prefix}.attn.k.{kind}": k}
                tensors[f"{prefix}.attn.v.{kind}"] = v
                out = parts[f"attn.c_proj.{kind}"]
                if kind == "weight":
                    out = pad(out.unflatten(1, (c.heads_per_way, c.head_size)), H).flatten(1)
                tensors[f"{prefix}.attn.o.{kind}"] = out
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def config_json(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["KrakenForCausalLM"],
        "auto_map": {"AutoConfig": CODE["AutoConfig"]},
        "model_type": "kraken",
        "architecture": config.architecture,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "head_dim": PADDED_HEAD,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": config.context_length,
        "vocab_size": config.vocab_size,
        "num_token_ids": config.vocab_size,
        "torch_dtype": "float32",
        "tie_word_embeddings": True,
        "layer_norm_eps": LAYER_NORM_EPSILON,
        "num_ways": config.num_ways,
        "bias": config.bias,
        "activation": config.activation,
        "positions": config.positions,
    }


def write(folder: Path, model: Kraken, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(model.config) | changes))
    copy_code(folder, config_json(model.config)["auto_map"])
    save_file(tensors_of(model), folder / "model.safetensors")
    return folder


def prompt(config: ModelConfig, seed: int, length: int) -> list[int]:
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def require_equal_logits(model: Kraken, ranks: Ranks, num_ids: int | None = None) -> None:
    """Two requests of different lengths, together in every step: prefill, mixed and decoding."""
    first, second = (prompt(model.config, seed, NUM_PROMPT + NUM_DECODED - seed) for seed in (0, 1))
    expected = [model(torch.tensor([ids]))[0] for ids in (first, second)]
    found: list[list[list[float]]] = [[], []]

    def step(new: dict[int, list[int]]) -> None:
        for request, logits in ranks.step(new, all_logits=True).items():
            found[request] += logits

    step({0: first[:NUM_PROMPT]})
    step({0: first[NUM_PROMPT : NUM_PROMPT + 1], 1: second[:NUM_PROMPT]})
    for offset in range(NUM_DECODED - 1):
        new = {0: first[NUM_PROMPT + 1 + offset :][:1], 1: second[NUM_PROMPT + offset :][:1]}
        step({request: ids for request, ids in new.items() if ids})
    for logits, reference in zip(found, expected, strict=True):
        logits_TV = torch.tensor(logits)
        torch.testing.assert_close(logits_TV[:, :num_ids], reference[:, :num_ids], atol=2e-5, rtol=1e-5)
        if num_ids is not None:  # padding ids can never be drawn
            assert (logits_TV[:, num_ids:] < -1e30).all()


@pytest.mark.parametrize(("num_ways", "orchestrator"), [(2, "mpi"), (4, "ray"), (6, "mpi")])
def test_logits_equal_the_model_on_one_device(
    num_ways: int, orchestrator: str, tmp_path: Path, ranks_of: Callable[..., Ranks]
) -> None:
    """With biases on every rank, which both flavours of `Mapping` would drop in places."""
    model = random_model(shape(num_ways))
    with ranks_of(write(tmp_path, model), num_ways, orchestrator=orchestrator) as ranks:
        require_equal_logits(model, ranks)
        report = ranks.report()
    assert report["meta_init"], "construction computed something, and fell back to the slow start"
    # W=6 has no one-shot kernels, which the stand-in would not have let pass
    expected_strategy = "NCCL" if num_ways == 6 else "AUTO"
    assert {strategy for _, _, strategy in report["all_reduces"]} == {expected_strategy}


@pytest.mark.parametrize(
    ("config", "num_ranks", "orchestrator"),
    [
        pytest.param(shape(2, bias=False, activation="swiglu"), 2, "ray", id="kraken-swiglu-without-bias"),
        pytest.param(shape(1, bias=False), 1, "mpi", id="kraken-one-way"),
        pytest.param(shape(1, architecture="standard", num_heads=4), 2, "ray", id="standard"),
        pytest.param(shape(1, architecture="parallel", num_heads=4), 2, "mpi", id="parallel"),
        pytest.param(shape(1, architecture="standard", activation="swiglu"), 1, "mpi", id="standard-swiglu-whole"),
    ],
)
def test_every_supported_shape_keeps_its_logits(
    config: ModelConfig, num_ranks: int, orchestrator: str, tmp_path: Path, ranks_of: Callable[..., Ranks]
) -> None:
    model = random_model(config)
    with ranks_of(write(tmp_path, model), num_ranks, orchestrator=orchestrator) as ranks:
        require_equal_logits(model, ranks)


def test_one_all_reduce_a_layer_in_float32(tmp_path: Path, ranks_of: Callable[..., Ranks]) -> None:
    """None before the first layer, one a layer after it, and the conjunction's; the sum of the ways keeps its bits."""
    config = shape(2)
    model = random_model(config)
    with ranks_of(write(tmp_path, model), 2, dtype="bfloat16") as ranks:
        ids = prompt(config, 0, NUM_PROMPT)
        found = torch.tensor(ranks.step({0: ids}, all_logits=True)[0])
        all_reduces = [(tuple(size), dtype) for size, dtype, _ in ranks.report()["all_reduces"]]
    size = (NUM_PROMPT, config.width)
    assert all_reduces == [(size, "float32")] * (config.num_layers - 1) + [(size, "bfloat16")]
    expected = model(torch.tensor([ids]))[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(torch.tensor([ids]))[0].float()
    assert (found - expected).norm() < 1.5 * (rounded - expected).norm(), "rounded more than training rounds"


def test_positions_are_clamped_and_odd_widths_take_nccl(tmp_path: Path, ranks_of: Callable[..., Ranks]) -> None:
    """Start-up runs a request longer than there are positions; no position may be read beyond the table."""
    config = shape(2, width=20)  # 16 bytes do not divide a row of it
    model = random_model(config)
    ids = prompt(config, 0, config.context_length + 5)
    with ranks_of(write(tmp_path, model), 2) as ranks:
        logits = ranks.step({0: ids}, all_logits=True)[0]
        assert {strategy for _, _, strategy in ranks.report()["all_reduces"]} == {"NCCL"}
        ranks.free(0)
        assert len(ranks.step({0: ids[:1]})[0]) == 1
    expected = model(torch.tensor([ids[: config.context_length]]))[0]
    torch.testing.assert_close(torch.tensor(logits[: config.context_length]), expected, atol=2e-5, rtol=1e-5)


def test_the_vocabulary_need_not_divide_evenly(tmp_path: Path, ranks_of: Callable[..., Ranks]) -> None:
    """192 tokens over 5 ranks: four times 39, and 36; nor does 5 divide the FFN, which is private."""
    config = shape(5, num_layers=2)
    model = random_model(config)
    with ranks_of(write(tmp_path, model), 5, strategy="NCCL") as ranks:
        ids = prompt(config, 0, NUM_PROMPT)
        found = torch.tensor(ranks.step({0: ids}, all_logits=True)[0])
        assert ranks.max_seq_len == config.context_length + 1, "a scored prompt of full length draws one token more"
    torch.testing.assert_close(found, model(torch.tensor([ids]))[0], atol=2e-5, rtol=1e-5)


def test_the_folder_of_the_converter_fits(tmp_path: Path, ranks_of: Callable[..., Ranks]) -> None:
    """What `kraken/trtllm/checkpoint.py` writes is what is written here by hand, and loads."""
    model = random_model(shape(2))
    by_hand = tensors_of(model)
    converted = padded_tensors(model.config, to_exchange(model), torch.float32)
    assert converted.keys() == by_hand.keys()
    for name, tensor in converted.items():
        torch.testing.assert_close(tensor, by_hand[name], atol=0, rtol=1e-6)
    values = model_config_json(model.config, num_ids=190, eot_id=0, dtype=torch.float32)
    config = trtllm_config(model.config, values, torch.float32)
    assert (config_json(model.config) | {"num_token_ids": 190}).items() <= config.items()
    (tmp_path / "config.json").write_text(json.dumps(config))
    copy_code(tmp_path, config["auto_map"])
    save_file(converted, tmp_path / "model.safetensors")
    with ranks_of(tmp_path, 2) as ranks:
        require_equal_logits(model, ranks, num_ids=190)


def test_more_ranks_than_ways_are_refused(tmp_path: Path, ranks_of: Callable[..., Ranks]) -> None:
    with pytest.raises(RankFailureError, match="tensor_parallel_size=2, but the model has num_ways=1 and every"):
        ranks_of(write(tmp_path, random_model(shape(1))), 2)


ALONE = """
import json, os, unittest.mock
from pathlib import Path
import torch, torch.distributed as dist
from safetensors.torch import load_file
from tensorrt_llm._torch.model_config import QuantConfig
from tensorrt_llm._torch.model_loader import build, load_config
from tensorrt_llm._torch.modules.linear import Linear, TensorParallelMode
from tensorrt_llm.mapping import Mapping
import kraken.trtllm.modeling as modeling

def message(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"

def refusal(mapping=dict(world_size=2, tp_size=2), attributes=(), **model_kwargs):
    config = load_config(Path("TWO_WAYS"), Mapping(**mapping), **model_kwargs)
    config._frozen = False
    for name, value in attributes:
        setattr(config, name, value)
    config._frozen = True
    return message(lambda: build(config, torch.device("cpu")))

settings = {
    "accepted": refusal(),
    "positions=rope": refusal(positions="rope"),
    "architecture=kraken_delayed": refusal(architecture="kraken_delayed"),
    "head_dim=113": refusal(head_dim=113),
    "tensor_parallel_size=4": refusal(mapping=dict(world_size=4, tp_size=4)),
    "tensor_parallel_size=3": refusal(mapping=dict(world_size=3, tp_size=3), architecture="standard"),
    "activation=swiglu": refusal(architecture="standard", activation="swiglu"),
    "pp_size=2": refusal(mapping=dict(world_size=4, tp_size=2, pp_size=2)),
    "cp_size=2": refusal(mapping=dict(world_size=4, tp_size=2, cp_size=2)),
    "enable_attention_dp=True": refusal(mapping=dict(world_size=2, tp_size=2, enable_attention_dp=True)),
    "lora_config": refusal(attributes=[("lora_config", object())]),
    "spec_config": refusal(attributes=[("spec_config", object())]),
    "quantised": refusal(attributes=[("quant_config", QuantConfig("FP8"))]),
    "Unknown architecture": refusal(architectures=["Other"]),
}

weights = load_file("ONE_WAY/model.safetensors")
model = build(load_config(Path("ONE_WAY"), Mapping()), torch.device("cpu"))
missing = {name: tensor for name, tensor in weights.items() if name != "ways.0.layers.1.attn.o.bias"}
tensors = {
    "accepted": message(lambda: model.load_weights(weights)),
    "ways.0.layers.1.attn.o.bias is missing": message(lambda: model.load_weights(missing)),
    "lm_head.weight is unknown": message(lambda: model.load_weights(weights | {"lm_head.weight": torch.zeros(1)})),
    "ln_f.weight has shape [1] instead of [24]": message(
        lambda: model.load_weights(weights | {"ln_f.weight": torch.zeros(1)})
    ),
}

def bias_seen(mapping):
    linear = Linear(2, 2, mapping=mapping, tensor_parallel_mode=TensorParallelMode.ROW, reduce_output=False)
    linear.load_weights([{"weight": torch.zeros(2, 2), "bias": torch.ones(2)}])
    return bool(linear(torch.zeros(1, linear.in_features)).any())

biases = [bias_seen(Mapping(world_size=2, tp_size=2, rank=rank)) for rank in (0, 1)] + [bias_seen(Mapping())]
os.environ["TLLM_DISABLE_MPI"] = "1"
with unittest.mock.patch.multiple(dist, is_initialized=lambda: True, get_rank=lambda: 1):
    biases.append(bias_seen(Mapping()))
print(json.dumps({"settings": settings, "tensors": tensors, "biases": biases}))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process without ranks found."""
    folders = {
        "TWO_WAYS": write(tmp_path_factory.mktemp("two"), random_model(shape(2))),
        "ONE_WAY": write(tmp_path_factory.mktemp("one"), random_model(shape(1))),
    }
    code = functools.reduce(lambda text, item: text.replace(item[0], str(item[1])), folders.items(), ALONE)
    return json.loads(run_with_fake(code))


def test_what_cannot_be_done_is_refused_before_tensorrt_llm_fails(alone: dict[str, Any]) -> None:
    """A head size without a kernel would abort the process, so that an answer at all says that it was refused first."""
    found = dict(alone["settings"])
    assert found.pop("accepted") == "accepted"
    assert found.pop("Unknown architecture").startswith("ValueError: Unknown architecture")
    for field, text in found.items():
        assert text.startswith("ConfigError: ") and field in text, (field, text)


def test_missing_unknown_and_misshapen_weights_are_refused(alone: dict[str, Any]) -> None:
    found = dict(alone["tensors"])
    assert found.pop("accepted") == "accepted"
    for problem, text in found.items():
        assert text.startswith("ArtefactError: 1 tensors do not fit") and problem in text, text


def test_the_stand_in_drops_row_biases_as_the_real_one_does(alone: dict[str, Any]) -> None:
    """Else the equalities above would not show that the model survives it: rank 0 of 2, rank 1 of 2, a group of one
    under MPI and, where the rank is the global one, under Ray."""
    assert alone["biases"] == [True, False, True, False]


@pytest.mark.gpu
def test_the_side_stream_runs_beside_and_joins_before_its_result_is_read() -> None:
    """Eager and captured: long work aside must be finished when it is added, and must not wait for the main stream."""
    code = """
import torch
from kraken.trtllm.modeling import SideStream

x = torch.randn(2048, 2048, device="cuda")

def slowly(start):
    def work():
        y = start
        for _ in range(50):
            y = y @ x / 45
        return y
    return work

def both(side):
    aside, main = side.run(slowly(x), slowly(x + 1))
    return aside + main

expected = both(SideStream(enabled=False))
overlapped = SideStream(enabled=True)
for _ in range(20):  # memory is used again and again
    assert torch.equal(both(overlapped), expected)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = both(overlapped)
graph.replay()
assert torch.equal(captured, expected)
main_start, side_start, main_end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
def main():
    main_start.record()
    y = slowly(x)()
    main_end.record()
    return y
def aside():
    side_start.record()
    return x.sum()
overlapped.run(aside, main)
torch.cuda.synchronize()
assert side_start.elapsed_time(main_end) > 0, "it waited for the attention"
"""
    run_with_fake(code)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [True, False])
def test_overlapped_and_blocking_agree_over_nccl(overlap: bool, tmp_path: Path, ranks_of: Callable[..., Ranks]) -> None:
    num_ways = min(4, torch.cuda.device_count() // 2 * 2)
    if num_ways < 2:
        pytest.skip("needs two GPUs")
    model = random_model(shape(num_ways))
    with ranks_of(write(tmp_path, model), num_ways, device="cuda", overlap_all_reduce=overlap) as ranks:
        require_equal_logits(model, ranks)
