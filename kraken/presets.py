"""Presets: one function per run. The command lines list them, and dotted overrides vary them."""

from collections.abc import Callable

from kraken.config import DataConfig, ModelConfig, RunConfig, TrainConfig


def quickstart() -> RunConfig:
    """Four ways, 2.7 M parameters, the embedded corpus: the whole pipeline in minutes on two CPU cores."""
    data = DataConfig()
    return RunConfig(
        name="quickstart",
        data=data,
        model=ModelConfig(
            num_layers=4, width=128, num_heads=8, num_ways=4, context_length=256, vocab_size=data.vocab_size
        ),
        train=TrainConfig(
            steps=160,
            sequences_per_step=8,
            sequences_per_microbatch=4,
            learning_rate=3e-3,
            warmup_steps=16,
            validate_every=80,
            checkpoint_every=40,
        ),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {"quickstart": quickstart}
"""Name on the command line -> the function that builds the run."""
