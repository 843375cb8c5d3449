"""The published code's recipe, for measurements that are compared with it."""

import dataclasses

from kraken.config import RunConfig
from kraken.presets import PRESETS


def published_recipe(preset: str) -> RunConfig:
    """A preset's shape with learned positions, and its training with AdamW at 1e-3, whatever the preset says itself."""
    run = PRESETS[preset]()
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, positions="learned"),
        train=dataclasses.replace(run.train, optimizer="adamw", learning_rate=1e-3),
    )
