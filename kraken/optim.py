"""The optimizer and its schedule: AdamW over two parameter groups, the learning rate a pure function of the step."""

import math

import torch
from torch import nn

from kraken.config import TrainConfig
from kraken.model import is_gain


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of the step that follows `step` finished ones: linear warm-up, then a cosine down to its final fraction."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    final = config.learning_rate * config.final_learning_rate_fraction
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return final + (config.learning_rate - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW with decay on matrices and embeddings, none on gains; one fused kernel per group."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        groups[is_gain(name)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[False], "weight_decay": config.weight_decay},
            {"params": groups[True], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
