"""From a folder to a model with weights, as one rank does it."""

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig

from tensorrt_llm._torch.distributed import AllReduceStrategy
from tensorrt_llm._torch.model_config import ModelConfig
from tensorrt_llm._torch.models.modeling_auto import AutoModelForCausalLM
from tensorrt_llm._torch.models.modeling_utils import MetaInitException, MetaInitMode
from tensorrt_llm.mapping import Mapping


def load_config(folder: Path, mapping: Mapping, strategy: str = "AUTO", **model_kwargs: Any) -> ModelConfig:
    """By the folder's own configuration class; `model_kwargs` override its attributes."""
    shape = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    shape.update(model_kwargs)
    if isinstance(shape.dtype, str):
        shape.dtype = getattr(torch, shape.dtype)
    config = ModelConfig(pretrained_config=shape, mapping=mapping, allreduce_strategy=AllReduceStrategy[strategy])
    config._frozen = True
    return config


def build(config: ModelConfig, device: torch.device) -> Any:
    """A model without weights; `meta_init` says whether it could be made without memory first."""
    try:
        with MetaInitMode():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        model.meta_init = True
    except MetaInitException as error:
        print(f"Fallback to regular model init: {error}", flush=True)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        model.meta_init = False
    memory: dict[Tensor, Tensor] = {}

    def materialise(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if tensor not in memory:
            memory[tensor] = torch.full_like(tensor, float("nan"), device=device)
        return memory[tensor]

    model._apply(materialise)
    return model.to(device)


def load_model(folder: Path, config: ModelConfig, device: torch.device) -> Any:
    model: nn.Module = build(config, device)
    weights = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    accepted = inspect.getfullargspec(model.load_weights).args
    model.load_weights(weights, **({"weight_mapper": None} if "weight_mapper" in accepted else {}))
    for name, parameter in model.named_parameters():
        assert not parameter.isnan().any(), f"{name} was not loaded"
    return model
