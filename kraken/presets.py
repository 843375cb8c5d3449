"""Presets: one function per run. The command lines list them, and dotted overrides vary them."""

from collections.abc import Callable

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
            warmup_steps=40,
            beta2=0.99,
            log_every=25,
            validate_every=100,
            checkpoint_every=100,
        ),
    )


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


PRESETS: dict[str, Callable[[], RunConfig]] = {
    preset.__name__: preset
    for preset in (
        quickstart,
        kraken_125m_2way,
        kraken_125m_4way,
        kraken_125m_6way,
        kraken_350m_2way,
        kraken_350m_4way,
        kraken_760m_4way,
    )
}
"""Name on the command line -> the function that builds the run."""
