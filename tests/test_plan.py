"""Counts against the model itself, the roofline against numbers worked by hand, and the command line."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.command import USER_ERROR
from jobs.plan import count, main
from kraken.config import ConfigError, ModelConfig
from kraken.model import Kraken
from kraken.model.architecture import is_vector
from kraken.plan import cost as plan
from kraken.plan.cost import FULL_PADDING, LEAST_PADDING, WAY_ARCHITECTURES, num_parameters
from kraken.plan.roofline import ARCHITECTURES, Devices, Share, Workload, compare, predict
from kraken.presets import PRESETS

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs/plan.md").read_text()
FOUR_DEVICES = Devices(
    num_devices=4, link_gb_per_s=200, link_latency_us=2, matrix_tflop_per_s=250, memory_gb_per_s=1500
)
DEVICE_ARGUMENTS = shlex.split(
    "--devices 4 --link-gb-per-s 200 --link-latency-us 2 --matrix-tflop-per-s 250 --memory-gb-per-s 1500"
)


def preset(name: str) -> ModelConfig:
    return PRESETS[name]().model


OPTIONS = [
    {"activation": activation, "positions": positions, "bias": bias}
    for activation in ("gelu", "swiglu")
    for positions in ("learned", "rope")
    for bias in (False, True)
]
SMALL = [
    ModelConfig(
        **{"num_layers": 3, "width": 40, "num_heads": 4, "context_length": 32, "vocab_size": 128, "num_ways": 1}
        | {"architecture": architecture}
        | ({"num_ways": 4} if architecture in WAY_ARCHITECTURES else {})
        | options
    )
    for architecture in ARCHITECTURES
    for options in OPTIONS
]


@pytest.mark.parametrize("config", [preset(name) for name in PRESETS] + SMALL)
def test_the_plan_counts_what_the_model_counts(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Kraken(config)
    assert plan.num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    # six per matrix weight, the tied head included, and attention's two products (PaLM, 2022, appendix B)
    matrix_weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and not is_vector(name))
    matrix_weights -= 0 if model.wpe is None else model.wpe.weight.numel()
    attention = 12 * config.num_layers * config.num_ways * config.width * config.context_length
    assert plan.training_flops_per_token(config) == 6 * matrix_weights + attention
    keys_and_values = 2 * sum(len(layer.ln_1.weight) * config.width for layer in model.h)
    assert plan.kv_bytes_per_token(config, 2) == 2 * keys_and_values


def test_head_sizes_are_padded_to_what_kernels_take() -> None:
    sizes = {111: 128, 113: 128, 161: 256, 168: 256, 209: 256, 240: 256, 64: 64, 257: None}
    assert {size: FULL_PADDING.head_size(size) for size in sizes} == sizes
    assert [LEAST_PADDING.head_size(size) for size in (113, 168, 209, 257)] == [120, 168, 216, None]


def test_waste_is_what_the_padded_model_computes_more() -> None:
    config = preset("kraken_125m_2way")  # width 678, head size 113, FFN 1356
    # multiply-adds by hand: projections, attention, FFN; conjunction; head
    plain = 24 * (4 * 678**2 + 2 * 1024 * 678 + 2 * 678 * 1356) + 2 * 678**2 + 50304 * 678
    least = 24 * (4 * 680 * 720 + 2 * 1024 * 720 + 2 * 680 * 1360) + 2 * 680**2 + 50304 * 680
    full = 24 * (4 * 704 * 768 + 2 * 1024 * 768 + 2 * 704 * 1408) + 2 * 704**2 + 50304 * 704
    assert 2 * plain == plan.forward_flops_per_token(config)
    assert LEAST_PADDING.waste(config) == pytest.approx(least / plain - 1)
    assert FULL_PADDING.waste(config) == pytest.approx(full / plain - 1)
    assert FULL_PADDING.kv_waste(config) == pytest.approx(128 / 113 - 1)
    for name in ("gpt2_124m", "kraken_125m_4way_aligned"):
        assert LEAST_PADDING.waste(preset(name)) == FULL_PADDING.waste(preset(name)) == 0


def test_no_width_is_nearer_than_the_first_candidate() -> None:
    shape = dataclasses.replace(preset("kraken_125m_4way"), width=12)
    rows = plan.candidates(shape, 125_000_000)
    every = [dataclasses.replace(shape, width=width) for width in range(3, 1200, 3)]
    best = min(every, key=lambda config: abs(num_parameters(config) - 125_000_000))
    assert (rows[0].kind, rows[0].config) == ("exact", best)
    assert best.width == 504
    assert {row.kind for row in rows} == {"exact", "aligned", "reshaped"}
    for row in rows[3:]:
        assert row.config.width % 64 == 0
        assert row.config.head_size in (64, 96, 128)
        assert row.least_waste == row.full_waste == 0
    assert all(abs(row.deviation) <= 0.01 for row in rows if row.kind == "reshaped")


def test_rotary_candidates_have_even_head_sizes() -> None:
    shape = dataclasses.replace(preset("kraken_125m_4way"), width=12, positions="rope")
    assert all(row.config.head_size % 2 == 0 for row in plan.candidates(shape, 125_000_000))


@pytest.mark.parametrize("architecture", ["standard", "parallel"])
def test_partners_are_gpt2_shapes(architecture: plan.Architecture) -> None:
    for name, partner in (("kraken_125m_4way", "124m"), ("kraken_350m_4way", "355m")):
        prefix = "gpt2" if architecture == "standard" else "parallel"
        assert plan.matched(preset(name), architecture) == preset(f"{prefix}_{partner}")
    for name in PRESETS:
        partner = plan.matched(preset(name), architecture)
        assert num_parameters(partner) / num_parameters(preset(name)) == pytest.approx(1, abs=0.03)
        assert 48 <= partner.head_size <= 96 or partner == preset(name)


def test_a_baseline_has_a_kraken_partner() -> None:
    partner = plan.matched(preset("gpt2_124m"), "kraken", num_ways=4)
    assert (partner.num_ways, partner.ffn_multiple, partner.num_layers) == (4, 2, 12)
    assert num_parameters(partner) == pytest.approx(num_parameters(preset("gpt2_124m")), rel=0.03)


def test_the_roofline_is_the_example_worked_by_hand() -> None:
    def at(count: float, rate: float) -> float:
        return count / rate * 1e6

    matrix, memory, link = 250e12, 1500e9, 200e9
    attention_us = (
        at(2 * 1024 * 504 * 2, memory)
        + at(2 * 1024 * 504 * 1512, matrix)
        + at(2 * 1024 * 1024 * 504, matrix)
        + at(2 * 1024 * 504 * 504, matrix)
        + at(3 * 1024 * 504 * 2, memory)
    )
    ffn_us = at(9 * 1024 * 504 * 2, memory) + 2 * at(2 * 1024 * 504 * 1008, matrix) + at(2 * 1024 * 1008 * 2, memory)
    all_reduce_us = at(1.5 * 1_032_192, link) + 6 * 2
    readout_us = (
        at(3 * 1024 * 504 * 2, memory)
        + at((504 + 504 * 504 + 504) * 2, memory)
        + at((504 + 504 * 12_576 + 12_576) * 2, memory)
        + at(1.5 * 1008, link)
        + 6 * 2
        + at(0.75 * 100_608, link)
        + 3 * 2
    )
    computing_us = 12 * (attention_us + ffn_us) + readout_us

    got = predict(preset("kraken_125m_4way"), FOUR_DEVICES, Workload(prompt_length=1024))
    assert got.attention_us == pytest.approx(attention_us)
    assert got.ffn_us == pytest.approx(ffn_us)
    assert got.all_reduce_us == pytest.approx(all_reduce_us)
    assert got.readout_us == pytest.approx(readout_us)
    assert got.ttft_waited_ms * 1e3 == pytest.approx(computing_us + 11 * all_reduce_us)
    assert got.ttft_overlapped_ms * 1e3 == pytest.approx(computing_us + 11 * (all_reduce_us - attention_us))
    for number in (f"{attention_us:.3f}", f"{ffn_us:.3f}", f"{all_reduce_us:.3f}", f"{readout_us:.3f}"):
        assert f"**{number}**" in DOCUMENT
    for total in (got.ttft_waited_ms, got.ttft_overlapped_ms):
        assert f"**{total * 1e3:.1f}**" in DOCUMENT


@pytest.mark.parametrize("config", SMALL)
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_the_devices_together_do_the_work_of_the_model(config: ModelConfig, num_devices: int) -> None:
    config = dataclasses.replace(config, bias=False)
    share = Share(config, num_devices, Workload(prompt_length=32, batch_size=2))
    kernels = [*share.attention_kernels(), *share.ffn_kernels()]
    layers = num_devices * config.num_layers * sum(kernel.flops for kernel in kernels)
    # every matrix of the layers once a token; attention over half of the positions
    attention = 2 * config.num_layers * config.num_ways * config.width * 32
    assert layers == pytest.approx(64 * (2 * plan.layer_weights(config) + attention))
    copies = (num_devices - 1) * share.replicated_parameters
    assert num_devices * share.num_parameters == pytest.approx(num_parameters(config) + copies)


def test_one_device_sends_nothing_and_waits_for_nothing() -> None:
    devices = dataclasses.replace(FOUR_DEVICES, num_devices=1)
    for got in compare(preset("kraken_125m_4way"), devices, Workload(prompt_length=512)):
        assert got.ttft_waited_ms == got.ttft_overlapped_ms
        assert got.prefill_sent_bytes == 0
        assert got.data_parallel == got.model_parallel
        assert got.data_parallel.sent_bytes_per_step == 0
        assert got.weight_bytes == 2 * got.parameters


def test_only_the_krakens_hide_their_all_reduce() -> None:
    workload = Workload(prompt_length=1024)
    got = {each.config.architecture: each for each in compare(preset("kraken_350m_4way"), FOUR_DEVICES, workload)}
    assert list(got) == list(ARCHITECTURES)
    assert [got[name].num_all_reduces for name in ARCHITECTURES] == [48, 24, 23, 22]
    assert got["standard"].exposed_us == got["standard"].all_reduce_us
    assert got["kraken"].exposed_us == 0
    assert got["kraken"].ttft_overlapped_ms < got["kraken"].ttft_waited_ms
    assert got["parallel"].ttft_overlapped_ms == got["parallel"].ttft_waited_ms
    slow_link = dataclasses.replace(FOUR_DEVICES, link_gb_per_s=20)
    paper, delayed = compare(preset("kraken_350m_4way"), slow_link, workload)[2:]
    hidden_us = delayed.all_reduce_us - delayed.exposed_us
    assert hidden_us == pytest.approx(delayed.attention_us + delayed.ffn_us), "the whole layer hides it"
    assert paper.all_reduce_us - paper.exposed_us == pytest.approx(paper.attention_us)


@pytest.mark.parametrize("config", [c for c in SMALL if c.positions == "learned" and not c.bias])
def test_the_estimate_of_activations_is_near_what_autograd_keeps(config: ModelConfig) -> None:
    model = Kraken(config)
    model.init_weights(seed=0)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(torch.zeros(4, 32, dtype=torch.int64))
    measured = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)
    estimate = Share(config, 1, Workload(prompt_length=32, sequences_per_microbatch=4, bytes_per_value=4))
    assert hidden.requires_grad
    assert 0.8 < measured / estimate.activation_bytes < 1.4


def test_the_document_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    command, _, output = DOCUMENT.split("```\n$ python -m jobs.plan ")[1].split("\n```")[0].partition("\n")
    main(shlex.split(command))
    assert capsys.readouterr().out.rstrip("\n") == output


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--preset", "kraken_125m_4way", "--json", "--sequences-per-step", "64", *DEVICE_ARGUMENTS])
    content = json.loads(capsys.readouterr().out)
    assert content["budget"] == 124_476_408
    assert content["candidates"][0]["kind"] == "preset"
    assert content["candidates"][0]["config"] == dataclasses.asdict(preset("kraken_125m_4way"))
    expected = compare(preset("kraken_125m_4way"), FOUR_DEVICES, Workload(prompt_length=1024, sequences_per_step=64))
    assert content["predictions"] == [dataclasses.asdict(prediction) for prediction in expected]


def test_options_change_the_shape_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--preset", "kraken_125m_4way", "--activation", "swiglu", "--positions", "rope", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["budget"] == 124_476_408
    assert content["candidates"][0]["kind"] == "exact"
    for row in content["candidates"]:
        assert (row["config"]["activation"], row["config"]["positions"]) == ("swiglu", "rope")
    main(["--budget", "124M", "--layers", "12", "--heads", "12", "--architecture", "standard", "--json"])
    best = json.loads(capsys.readouterr().out)["candidates"][0]["config"]
    assert (best["width"], best["ffn_multiple"], best["num_ways"]) == (768, 4, 1)


@pytest.mark.parametrize(
    ("text", "number"),
    [("125M", 125_000_000), ("1.3b", 1_300_000_000), ("50_304", 50_304), ("50,304", 50_304), ("10.83m", 10_830_000)],
)
def test_counts_are_read_as_people_write_them(text: str, number: int) -> None:
    assert count(text) == number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--budget, --layers, --heads missing; give them, or --preset NAME"),
        ("--budget 0 --layers 2 --heads 2", "'0' is not a whole number above 0; write it as 125M"),
        ("--budget=-5M --layers 2 --heads 2", "'-5M' is not a number; write it as 125M"),
        ("--budget 125Q --layers 2 --heads 2", "'125Q' is not a number"),
        ("--budget 1K --layers 2 --heads 2", "makes 102,734 parameters; choose a budget near that"),
        ("--budget 125M --layers 12 --heads 12 --ways 5", "choose num_ways from [1, 2, 3, 4, 6, 12]"),
        ("--budget 125M --layers 12 --heads 12 --ways 2 --architecture standard", "choose model.num_ways=1"),
        ("--preset nosuch", "invalid choice: 'nosuch' (choose from 'quickstart',"),
        ("--preset quickstart --zzz 1", "unrecognized arguments: --zzz 1; --help lists every option"),
        ("--preset quickstart --devices 4", "also needs --link-gb-per-s, --link-latency-us, --matrix-tflop-per-s"),
        ("--preset quickstart --prompt-length 4", "also needs --devices, --link-gb-per-s"),
    ],
)
def test_bad_input_is_one_line(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        main(shlex.split(arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--devices 3", "num_devices=3 does not divide the 4 ways; choose from [1, 2, 4]"),
        ("--prompt-length 2048", "prompt_length=2048 is past the context of 1024; choose a shorter prompt"),
        ("--link-gb-per-s 0", "link_gb_per_s=0.0 is not positive"),
        ("--link-latency-us=-1", "link_latency_us=-1.0 is negative"),
    ],
)
def test_impossible_devices_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        main(["--preset", "kraken_125m_4way", *DEVICE_ARGUMENTS, *shlex.split(arguments)])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


def test_the_users_fault_exits_with_2_and_one_line() -> None:
    result = run("-m", "jobs.plan", "--budget", "1K", "--layers", "2", "--heads", "2")
    assert result.returncode == USER_ERROR
    assert result.stdout == ""
    assert result.stderr.startswith("error: budget=1000: ")
    assert result.stderr.count("\n") == 1


def test_planning_loads_no_torch() -> None:
    code = "import sys, jobs.plan; jobs.plan.main(sys.argv[1:]); print('torch' in sys.modules)"
    result = run("-c", code, "--preset", "kraken_125m_4way", *DEVICE_ARGUMENTS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "False"
