"""ModelConfig: frozen after loading, but for a few attributes."""

from dataclasses import dataclass, field
from typing import Any

import torch

from tensorrt_llm._torch.distributed import AllReduceStrategy
from tensorrt_llm.mapping import Mapping

ALWAYS_ASSIGNABLE = ("extra_attrs", "pretrained_config", "quant_config", "_frozen")


@dataclass
class QuantConfig:
    quant_algo: str | None = None


@dataclass(kw_only=True)
class ModelConfig:
    pretrained_config: Any = None
    mapping: Mapping = field(default_factory=Mapping)
    quant_config: QuantConfig = field(default_factory=QuantConfig)
    quant_config_dict: dict[str, QuantConfig] | None = None
    skip_create_weights_in_init: bool = False
    spec_config: Any = None
    lora_config: Any = None
    sparse_attention_config: Any = None
    is_generation: bool = True
    max_num_tokens: int = 8192
    max_seq_len: int | None = None
    moe_max_num_tokens: int | None = None
    moe_load_balancer: Any = None
    attn_backend: str = "TRTLLM"
    moe_backend: str = "CUTLASS"
    allreduce_strategy: AllReduceStrategy = AllReduceStrategy.AUTO
    enable_min_latency: bool = False
    use_cuda_graph: bool = False
    force_dynamic_quantization: bool = False
    extra_attrs: dict[str, Any] = field(default_factory=dict, init=False)
    _frozen: bool = field(default=False, init=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_frozen", False) and name not in ALWAYS_ASSIGNABLE:
            raise AttributeError(f"Cannot modify ModelConfig.{name} - instance is frozen")
        super().__setattr__(name, value)

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.pretrained_config.dtype  # torch_dtype in the versions of transformers that 1.2.1 is used with

    def get_quant_config(self, name: str | None = None) -> QuantConfig:
        return self.quant_config
