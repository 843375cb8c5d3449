"""Presets: one function per run. The command lines list them, and dotted overrides vary them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from kraken.config import ClusterConfig, DataConfig, ModelConfig, RunConfig, TrainConfig


def quickstart() -> RunConfig:
    """Four ways, 2.2 M parameters, the embedded corpus: the whole pipeline in minutes on two CPU cores."""
    data = DataConfig()
    return RunConfig(
        name="quickstart",
        data=data,
        model=ModelConfig(
            num_layers=3, width=128, num_heads=8, num_ways=4, context_length=256, vocab_size=data.vocab_size
        ),
        train=TrainConfig(
            steps=400,
            sequences_per_step=2,  # many small steps: a few hundred thousand tokens are all there is time for
            learning_rate=1e-3,
            beta2=0.99,
            log_every=25,
            validate_every=100,
            checkpoint_every=100,
        ),
    )


STANDARD: dict[str, Any] = {"architecture": "standard", "num_ways": 1, "ffn_multiple": 4}
"""What makes a Kraken shape GPT-2's."""


def _vary(run: RunConfig, name: str, **model: Any) -> RunConfig:
    """`run` with another shape: the same data, optimisation and cluster."""
    return dataclasses.replace(run, name=name, model=dataclasses.replace(run.model, **model))


def kraken_10m_2way() -> RunConfig:
    """10.85 M parameters, head size 104: with the three below, the architectures compared on two CPU cores.

    The four have six layers and differ by 0.63 % at most; widths in steps of 16 come that near only with two layers.
    Rotary positions and Muon, since on so little text learned ones and AdamW leave a nat to be gained.
    """
    data = DataConfig()
    return RunConfig(
        name="kraken_10m_2way",
        data=data,
        model=ModelConfig(
            num_layers=6,
            width=312,
            num_heads=6,
            num_ways=2,
            context_length=256,
            vocab_size=data.vocab_size,
            positions="rope",
        ),
        train=TrainConfig(
            steps=1000,
            sequences_per_step=8,
            learning_rate=4.5e-3,
            optimizer="muon",
            warmup_steps=50,
            beta2=0.99,
            log_every=25,
        ),
    )


def kraken_10m_4way() -> RunConfig:
    """10.78 M parameters, head size 112: about as many heads over all ways as the standard model, as in the paper."""
    return _vary(kraken_10m_2way(), "kraken_10m_4way", width=224, num_heads=8, num_ways=4)


def standard_10m() -> RunConfig:
    """10.83 M parameters, head size 72: 0.9989 of kraken_10m_2way, 1.0052 of kraken_10m_4way."""
    return _vary(kraken_10m_2way(), "standard_10m", width=360, num_heads=5, **STANDARD)


def parallel_10m() -> RunConfig:
    """10.83 M parameters, head size 72: 0.9987 of kraken_10m_2way, 1.0050 of kraken_10m_4way."""
    return _vary(standard_10m(), "parallel_10m", architecture="parallel")


def kraken_delayed_10m_4way() -> RunConfig:
    """10.77 M parameters, the shape of kraken_10m_4way: its ways read each other a layer later."""
    return _vary(kraken_10m_4way(), "kraken_delayed_10m_4way", architecture="kraken_delayed")


def _published(
    name: str, *, layers: int, width: int, heads: int, ways: int, learning_rate: float, sequences: int
) -> RunConfig:
    """A run of the paper: GPT-2's tokens, context 1,024, 300,000 steps of `sequences` windows, on eight GPUs.

    Any number of workers that divides the batch gives the same result.
    """
    data = DataConfig(tokenizer="gpt2")
    return RunConfig(
        name=name,
        data=data,
        model=ModelConfig(
            num_layers=layers,
            width=width,
            num_heads=heads,
            num_ways=ways,
            context_length=1024,
            vocab_size=data.vocab_size,
        ),
        train=TrainConfig(
            steps=300_000,
            sequences_per_step=sequences,
            learning_rate=learning_rate,
            validate_every=1000,
            validation_windows=512,
            checkpoint_every=1000,
        ),
        cluster=ClusterConfig(num_workers=8, cpus_per_worker=4, gpus_per_worker=1),
    )


def kraken_125m_2way() -> RunConfig:
    """124.01 M parameters, head size 113; 491,520 tokens per step."""
    return _published("kraken_125m_2way", layers=12, width=678, heads=12, ways=2, learning_rate=2.5e-4, sequences=480)


def kraken_125m_4way() -> RunConfig:
    """124.48 M parameters, head size 168; 491,520 tokens per step."""
    return _published("kraken_125m_4way", layers=12, width=504, heads=12, ways=4, learning_rate=2.5e-4, sequences=480)


def kraken_125m_6way() -> RunConfig:
    """123.21 M parameters, head size 209; 491,520 tokens per step."""
    return _published("kraken_125m_6way", layers=12, width=418, heads=12, ways=6, learning_rate=2.5e-4, sequences=480)


def kraken_350m_2way() -> RunConfig:
    """350.04 M parameters, head size 111; 491,520 tokens per step."""
    return _published("kraken_350m_2way", layers=24, width=888, heads=16, ways=2, learning_rate=1.5e-4, sequences=480)


def kraken_350m_4way() -> RunConfig:
    """353.36 M parameters, head size 161; 524,288 tokens per step."""
    return _published("kraken_350m_4way", layers=24, width=644, heads=16, ways=4, learning_rate=1.5e-4, sequences=512)


def kraken_760m_4way() -> RunConfig:
    """760.94 M parameters, head size 240; 516,096 tokens per step."""
    return _published("kraken_760m_4way", layers=24, width=960, heads=16, ways=4, learning_rate=1.5e-4, sequences=504)


# Aligned: widths in steps of 64 and head size 64 or 128, within 1 % of the published budget. Each is the first shape
# that `kraken.plan.reshaped` finds: fewest layers added or removed, then the FFN multiple (1 to 6) nearest to 2.


def kraken_125m_2way_aligned() -> RunConfig:
    """124.39 M parameters (+0.30 %), head size 64; one layer less, since no width fits twelve layers."""
    return _vary(kraken_125m_2way(), "kraken_125m_2way_aligned", num_layers=11, width=704, num_heads=22)


def kraken_125m_4way_aligned() -> RunConfig:
    """124.14 M parameters (-0.27 %), head size 128; FFN multiple 6 and one layer less, the nearest shape."""
    return _vary(kraken_125m_4way(), "kraken_125m_4way_aligned", num_layers=11, width=384, num_heads=12, ffn_multiple=6)


def kraken_125m_6way_aligned() -> RunConfig:
    """122.29 M parameters (-0.75 %), head size 128; FFN multiple 1 and two layers less, the nearest shape."""
    return _vary(kraken_125m_6way(), "kraken_125m_6way_aligned", num_layers=10, width=512, num_heads=24, ffn_multiple=1)


def kraken_350m_2way_aligned() -> RunConfig:
    """348.30 M parameters (-0.50 %), head size 64; FFN multiple 6, since no width fits 24 layers with less."""
    return _vary(kraken_350m_2way(), "kraken_350m_2way_aligned", width=640, num_heads=20, ffn_multiple=6)


def kraken_350m_4way_aligned() -> RunConfig:
    """353.34 M parameters, head size 128; FFN multiple 1 and two layers less, the nearest shape."""
    return _vary(kraken_350m_4way(), "kraken_350m_4way_aligned", num_layers=22, width=768, num_heads=24, ffn_multiple=1)


def kraken_760m_4way_aligned() -> RunConfig:
    """760.94 M parameters, head size 64: the published width is a multiple of 64; only its heads were not."""
    return _vary(kraken_760m_4way(), "kraken_760m_4way_aligned", num_heads=60)


def kraken_delayed_125m_2way() -> RunConfig:
    """124.37 M parameters, the shape of kraken_125m_2way_aligned: its ways read each other a layer later."""
    return _vary(kraken_125m_2way_aligned(), "kraken_delayed_125m_2way", architecture="kraken_delayed")


def kraken_delayed_125m_4way() -> RunConfig:
    """124.13 M parameters, the shape of kraken_125m_4way_aligned: its ways read each other a layer later."""
    return _vary(kraken_125m_4way_aligned(), "kraken_delayed_125m_4way", architecture="kraken_delayed")


def gpt2_124m() -> RunConfig:
    """GPT-2's shape, 124.37 M parameters: 0.999 of kraken_125m_4way, whose training it shares."""
    return _vary(kraken_125m_4way(), "gpt2_124m", width=768, num_heads=12, **STANDARD)


def gpt2_355m() -> RunConfig:
    """GPT-2 medium's shape, 354.60 M parameters: 1.004 of kraken_350m_4way, whose training it shares."""
    return _vary(kraken_350m_4way(), "gpt2_355m", width=1024, num_heads=16, **STANDARD)


def gpt2_774m() -> RunConfig:
    """GPT-2 large's shape, 773.58 M parameters: 1.017 of kraken_760m_4way, whose training it shares."""
    return _vary(kraken_760m_4way(), "gpt2_774m", num_layers=36, width=1280, num_heads=20, **STANDARD)


def parallel_124m() -> RunConfig:
    """gpt2_124m with the parallel block, 124.36 M parameters: 0.999 of kraken_125m_4way."""
    return _vary(gpt2_124m(), "parallel_124m", architecture="parallel")


def parallel_355m() -> RunConfig:
    """gpt2_355m with the parallel block, 354.58 M parameters: 1.003 of kraken_350m_4way."""
    return _vary(gpt2_355m(), "parallel_355m", architecture="parallel")


def parallel_774m() -> RunConfig:
    """gpt2_774m with the parallel block, 773.54 M parameters: 1.017 of kraken_760m_4way."""
    return _vary(gpt2_774m(), "parallel_774m", architecture="parallel")


PRESETS: dict[str, Callable[[], RunConfig]] = {
    preset.__name__: preset
    for preset in (
        quickstart,
        kraken_10m_2way,
        kraken_10m_4way,
        standard_10m,
        parallel_10m,
        kraken_delayed_10m_4way,
        kraken_125m_2way,
        kraken_125m_4way,
        kraken_125m_6way,
        kraken_350m_2way,
        kraken_350m_4way,
        kraken_760m_4way,
        kraken_125m_2way_aligned,
        kraken_125m_4way_aligned,
        kraken_125m_6way_aligned,
        kraken_350m_2way_aligned,
        kraken_350m_4way_aligned,
        kraken_760m_4way_aligned,
        kraken_delayed_125m_2way,
        kraken_delayed_125m_4way,
        gpt2_124m,
        gpt2_355m,
        gpt2_774m,
        parallel_124m,
        parallel_355m,
        parallel_774m,
    )
}
"""Name on the command line -> the function that builds the run."""
