"""Compare models at equal parameters and tokens: tune their learning rates alike, train several seeds each, report.

python -m jobs.compare --learning-rates 3e-3 4.5e-3 6e-3
python -m jobs.compare kraken_10m_4way standard_10m --seeds 5 --train.steps 2000
ray job submit --working-dir . -- python -m jobs.compare kraken_125m_4way gpt2_124m --storage /shared/kraken
"""

import dataclasses
import itertools
from typing import Annotated

import tyro

from jobs.command import Arguments, parse_overrides, require_preset, run_job
from kraken.config import ConfigError
from kraken.presets import PRESETS
from pipelines import compare
from pipelines.compare import CompareConfig

MODELS = ("kraken_10m_2way", "kraken_10m_4way", "kraken_delayed_10m_4way", "standard_10m", "parallel_10m")
PROG = "python -m jobs.compare"
DESCRIPTION = "Train models at equal parameters and tokens, and report their validation losses."


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareArguments(Arguments):
    """One of the models, and what is asked of the comparison."""

    num_seeds: Annotated[int, tyro.conf.arg(name="seeds")] = 3
    """Trainings of each model, with the seeds train.seed, train.seed + 1, ..."""
    learning_rates: tuple[float, ...] = ()
    """Peak learning rates to try for each model with the first seed; all its seeds get the best. None: the preset's."""
    baseline: str | None = None
    """Model that the others are measured against. None: the first standard Transformer, else the first model."""
    allow_unequal: bool = False
    """Compare models whose parameters differ by more than 2 %."""


def parse(argv: list[str]) -> tuple[CompareConfig, bool]:
    """The comparison, and whether only to show it. Settings of the run apply to all models alike.

    Raises:
        ConfigError: one line.
        SystemExit: after `--help`.
    """
    given = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    names, overrides = given or list(MODELS), argv[len(given) :]
    parsed: list[CompareArguments] = []
    about = (
        f"{DESCRIPTION}\n\nPRESETs come first and are some of: {', '.join(PRESETS)}; without any: {', '.join(MODELS)}. "
        f"Settings apply to all of them alike. The defaults below are those of {names[0]}."
    )
    for name in names:
        require_preset(name)
        try:
            arguments = parse_overrides(CompareArguments, name, f"{PROG} [PRESET ...]", about, overrides)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        if arguments.learning_rates and arguments.config.train.learning_rate != PRESETS[name]().train.learning_rate:
            raise ConfigError(
                "--train.learning-rate and --learning-rates exclude each other; give the one rate or several"
            )
        parsed.append(arguments)
    asked = parsed[0]
    config = CompareConfig(
        models=tuple(arguments.config for arguments in parsed),
        num_seeds=asked.num_seeds,
        learning_rates=asked.learning_rates,
        baseline=asked.baseline,
        allow_unequal=asked.allow_unequal,
    )
    return config, asked.dry_run


def main(argv: list[str]) -> None:
    config, is_dry_run = parse(argv)
    if is_dry_run:
        compare.require_equal_parameters(config)
        print(compare.describe(config))
        return
    print(compare.render(compare.run(config)))


if __name__ == "__main__":
    run_job(main)
