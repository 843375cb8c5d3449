"""Candidate shapes for a parameter budget, and what to expect of them on several devices. Nothing is run.

python -m jobs.plan --preset kraken_125m_4way
python -m jobs.plan --budget 125M --layers 12 --heads 12 --ways 4
python -m jobs.plan --preset kraken_125m_4way --devices 4 --link-gb-per-s 200 --link-latency-us 2 \\
    --matrix-tflop-per-s 250 --memory-gb-per-s 1500 --prompt-length 1024
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

from jobs.command import LineParser, run_job
from kraken.config import ConfigError, ModelConfig
from kraken.plan import cost as plan
from kraken.plan import roofline
from kraken.plan.cost import Candidate
from kraken.plan.roofline import Devices, Prediction, Workload
from kraken.presets import PRESETS

BYTES_PER_VALUE = {"bfloat16": 2, "float16": 2, "float32": 4}
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

SHAPE_OPTIONS = {
    "layers": "num_layers",
    "heads": "num_heads",
    "ways": "num_ways",
    "ffn_multiple": "ffn_multiple",
    "vocab_size": "vocab_size",
    "context_length": "context_length",
    "architecture": "architecture",
    "activation": "activation",
    "positions": "positions",
}
"""Option -> field of `ModelConfig`."""
DEVICE_OPTIONS = {
    "devices": "num_devices",
    "link_gb_per_s": "link_gb_per_s",
    "link_latency_us": "link_latency_us",
    "matrix_tflop_per_s": "matrix_tflop_per_s",
    "memory_gb_per_s": "memory_gb_per_s",
}
"""Option -> field of `Devices`; a prediction needs them all."""
WORKLOAD_OPTIONS = ("prompt_length", "batch_size", "sequences_per_step", "sequences_per_microbatch")


def main(argv: list[str]) -> None:
    options = vars(_parser().parse_args(argv))
    shape, budget = _shape_and_budget(options)
    bytes_per_value = BYTES_PER_VALUE[options["dtype"]]
    as_it_is = options["preset"] is not None and not options["budget"] and not _given(options, SHAPE_OPTIONS)
    rows = [plan.describe("preset", shape, budget, bytes_per_value)] if as_it_is else []
    others = plan.candidates(shape, budget, bytes_per_value=bytes_per_value)
    rows += [row for row in others if not as_it_is or row.config != shape]
    predictions = _predictions(rows[0].config, options)
    if options["json"]:
        content = {"budget": budget, "candidates": rows, "predictions": predictions}
        print(json.dumps(content, default=dataclasses.asdict, indent=2))
        return
    print(candidate_table(rows, budget, options["dtype"]))
    if predictions:
        print("\n" + prediction_table(predictions, rows[0].config, options["devices"]))


def _parser() -> argparse.ArgumentParser:
    parser = LineParser(
        prog="python -m jobs.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME", help="start from this preset's shape and budget")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--dtype", choices=BYTES_PER_VALUE, default="bfloat16", help="compute and cache type (bfloat16)"
    )
    shape = parser.add_argument_group("shape", "what is not given is the preset's; budget, layers and heads are needed")
    shape.add_argument("--budget", type=count, metavar="N", help="parameters, for example 125M or 1.3B")
    shape.add_argument("--layers", type=count, metavar="N")
    shape.add_argument("--heads", type=count, metavar="N", help="attention heads over all ways together")
    shape.add_argument("--ways", type=count, metavar="N", help="ways of a Kraken layer (1)")
    shape.add_argument(
        "--ffn-multiple", type=count, metavar="N", help="FFN hidden size over width (2; 4 for the baselines)"
    )
    shape.add_argument("--vocab-size", type=count, metavar="N", help="padded vocabulary (50304)")
    shape.add_argument("--context-length", type=count, metavar="N", help="tokens (1024)")
    shape.add_argument("--architecture", choices=roofline.ARCHITECTURES, help="(kraken)")
    shape.add_argument("--activation", choices=("gelu", "swiglu"), help="(gelu)")
    shape.add_argument("--positions", choices=("learned", "rope"), help="(learned)")
    devices = parser.add_argument_group("devices", "all five together predict memory, communication and latency")
    devices.add_argument("--devices", type=count, metavar="N", help="how many, in a ring")
    devices.add_argument(
        "--link-gb-per-s", type=float, metavar="N", help="10^9 bytes/s that a device sends while receiving as much"
    )
    devices.add_argument(
        "--link-latency-us", type=float, metavar="N", help="microseconds of a ring's step besides its bytes"
    )
    devices.add_argument(
        "--matrix-tflop-per-s", type=float, metavar="N", help="10^12 FLOPs/s of matrix products in --dtype"
    )
    devices.add_argument("--memory-gb-per-s", type=float, metavar="N", help="10^9 bytes/s of a device's memory")
    workload = parser.add_argument_group("workload of the devices")
    workload.add_argument("--prompt-length", type=count, metavar="N", help="tokens (the context length)")
    workload.add_argument("--batch-size", type=count, metavar="N", help="prompts at once (1)")
    workload.add_argument("--sequences-per-step", type=count, metavar="N", help="training batch (the preset's, or 480)")
    workload.add_argument(
        "--sequences-per-microbatch", type=count, metavar="N", help="run through the model at once (8)"
    )
    return parser


def count(text: str) -> int:
    """A whole number, friendly: 125M, 1.3B, 50_304, 50,304."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)([KMBT]?)", text.strip().replace("_", "").replace(",", "").upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; write it as 125M, 1.3B or 50304")
    number = round(float(match[1]) * SUFFIXES[match[2]], 3)
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0; write it as 125M, 1.3B or 50304")
    return int(number)


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _given(options: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Field -> value of the options that the command line names."""
    return {field: options[option] for option, field in names.items() if options[option] is not None}


def _shape_and_budget(options: dict[str, Any]) -> tuple[ModelConfig, int]:
    given = _given(options, SHAPE_OPTIONS)
    if options["preset"]:
        model = PRESETS[options["preset"]]().model
        if not given:
            return model, options["budget"] or plan.num_parameters(model)
        fields = dataclasses.asdict(model) | given
        return _shape(fields), options["budget"] or plan.num_parameters(model)
    missing = [_flag(option) for option in ("budget", "layers", "heads") if options[option] is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing; give them, or --preset NAME, one of: {', '.join(PRESETS)}")
    is_kraken = given.get("architecture", "kraken") in plan.WAY_ARCHITECTURES
    defaults = {"num_ways": 1, "ffn_multiple": 2 if is_kraken else 4, "vocab_size": 50_304, "context_length": 1024}
    return _shape(defaults | given), options["budget"]


def _shape(fields: dict[str, Any]) -> ModelConfig:
    """A model whose width stands for any: twice the heads, which suits every number of ways."""
    return ModelConfig(**fields | {"width": 2 * fields["num_heads"]})


def _predictions(config: ModelConfig, options: dict[str, Any]) -> list[Prediction]:
    """All architectures on the devices of the command line; none without devices."""
    given = _given(options, DEVICE_OPTIONS)
    workload = {name: options[name] for name in WORKLOAD_OPTIONS if options[name] is not None}
    if not given and not workload:
        return []
    missing = [_flag(option) for option in DEVICE_OPTIONS if options[option] is None]
    if missing:
        raise ConfigError(
            f"a prediction also needs {', '.join(missing)}; give all of them, or no device and no workload"
        )
    defaults = {"prompt_length": config.context_length}
    if options["preset"]:
        train = PRESETS[options["preset"]]().train
        defaults |= {
            "sequences_per_step": train.sequences_per_step,
            "sequences_per_microbatch": train.sequences_per_microbatch,
        }
    return roofline.compare(
        config, Devices(**given), Workload(**defaults | workload, bytes_per_value=BYTES_PER_VALUE[options["dtype"]])
    )


Column = tuple[str, Callable[[Candidate], str]]
COLUMNS: tuple[Column, ...] = (
    ("kind", lambda row: row.kind),
    ("layers", lambda row: str(row.config.num_layers)),
    ("width", lambda row: str(row.config.width)),
    ("heads", lambda row: str(row.config.num_heads)),
    ("size", lambda row: str(row.config.head_size)),
    ("ways", lambda row: str(row.config.num_ways)),
    ("ffn", lambda row: str(row.config.ffn_multiple)),
    ("parameters", lambda row: f"{row.parameters:,}"),
    ("off budget", lambda row: f"{row.deviation:+.2%}"),
    ("forward", lambda row: f"{row.forward_flops_per_token / 1e6:,.1f}"),
    ("training", lambda row: f"{row.training_flops_per_token / 1e6:,.1f}"),
    ("KV", lambda row: f"{row.kv_bytes_per_token:,}"),
    ("steps", lambda row: str(row.width_multiple)),
    ("flash", lambda row: _kernel(row, row.flash_head_size)),
    ("TRT-LLM", lambda row: _kernel(row, row.tensorrt_llm_head_size)),
    ("pad 8", lambda row: _percent(row.least_waste)),
    ("pad 64", lambda row: _percent(row.full_waste)),
    ("KV pad", lambda row: _percent(row.full_kv_waste)),
)


def _kernel(row: Candidate, head_size: int | None) -> str:
    """Whether a fused kernel takes the head size as it is, or what it is padded to."""
    if head_size is None:
        return "none"
    return "yes" if head_size == row.config.head_size else f"as {head_size}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.1%}"


def candidate_table(rows: list[Candidate], budget: int, dtype: str) -> str:
    """The candidates as aligned text, with a legend."""
    cells = [[title for title, _ in COLUMNS]] + [[cell(row) for _, cell in COLUMNS] for row in rows]
    return "\n".join(
        [
            f"budget {budget:,} parameters",
            *_lines(cells),
            "",
            "size: of a head. forward, training: MFLOP per token. KV: bytes per token in " + dtype + ".",
            "steps: largest of 64, 8, 1 that divides the width. flash, TRT-LLM: head size accepted, or padded to.",
            "pad 8: more multiply-adds with widths padded to 8 and heads for flash attention. pad 64: to 64 and for",
            "TRT-LLM; KV pad: more cache then. aligned: width a multiple of 64, head size 64, 96 or 128. reshaped:",
            "aligned with other layers or another FFN multiple, within 1 % of the budget.",
        ]
    )


def _lines(cells: list[list[str]]) -> list[str]:
    """Rows of equal length as text: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]


QUANTITIES: tuple[tuple[str, Callable[[Prediction], str]], ...] = (
    ("parameters", lambda p: f"{p.parameters:,}"),
    ("layers x width", lambda p: f"{p.config.num_layers} x {p.config.width}"),
    ("attention phase, us", lambda p: f"{p.attention_us:.1f}"),
    ("rest of a layer, us", lambda p: f"{p.ffn_us:.1f}"),
    ("one all-reduce, us", lambda p: f"{p.all_reduce_us:.1f}"),
    ("of which exposed, us", lambda p: f"{p.exposed_us:.1f}"),
    ("all-reduces of the layers", lambda p: str(p.num_all_reduces)),
    ("embedding and readout, us", lambda p: f"{p.readout_us:.1f}"),
    ("TTFT, all-reduces waited for, ms", lambda p: f"{p.ttft_waited_ms:.3f}"),
    ("TTFT, overlapped where possible, ms", lambda p: f"{p.ttft_overlapped_ms:.3f}"),
    ("sent in a prefill, MB", lambda p: f"{p.prefill_sent_bytes / 1e6:,.1f}"),
    ("serving: weights, MB", lambda p: f"{p.weight_bytes / 1e6:,.1f}"),
    ("serving: KV cache, MB", lambda p: f"{p.kv_bytes / 1e6:,.1f}"),
    ("data-parallel training: state, MB", lambda p: f"{p.data_parallel.state_bytes / 1e6:,.1f}"),
    ("  activations (estimate), MB", lambda p: f"{p.data_parallel.activation_bytes / 1e6:,.1f}"),
    ("  sent per step, MB", lambda p: f"{p.data_parallel.sent_bytes_per_step / 1e6:,.1f}"),
    ("model-parallel training: state, MB", lambda p: f"{p.model_parallel.state_bytes / 1e6:,.1f}"),
    ("  activations (estimate), MB", lambda p: f"{p.model_parallel.activation_bytes / 1e6:,.1f}"),
    ("  sent per step, MB", lambda p: f"{p.model_parallel.sent_bytes_per_step / 1e6:,.1f}"),
)


def prediction_table(predictions: list[Prediction], config: ModelConfig, num_devices: int) -> str:
    """The architectures side by side, each number for one device."""
    cells = [["", *(p.config.architecture for p in predictions)]]
    cells += [[title, *(cell(p) for p in predictions)] for title, cell in QUANTITIES]
    return "\n".join(
        [
            f"one of {num_devices} devices, predicted; the {config.architecture} model is the first of the table above",
            *_lines(cells),
            "",
            "a roofline, which no machine reaches; docs/plan.md has the formulas",
        ]
    )


if __name__ == "__main__":
    run_job(main)
