"""Registry and base classes of models."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any

from tensorrt_llm._torch.attention_backend import AttentionMetadata
from tensorrt_llm._torch.model_config import ModelConfig
from tensorrt_llm._torch.modules.embedding import LMHead
from tensorrt_llm._torch.modules.linear import TensorParallelMode

MODEL_CLASS_MAPPING: dict[str, type] = {}


def register_auto_model(name: str) -> Callable[[type], type]:
    def register(cls: type) -> type:
        MODEL_CLASS_MAPPING[name] = cls
        return cls

    return register


class MetaInitException(RuntimeError):
    """Something was computed with a tensor that has no memory yet."""


class MetaInitMode(TorchDispatchMode):
    """Empty tensors are made without memory; whoever computes with one is told so."""

    allocating = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default)
    allowed = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default, torch.ops.aten.detach.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.allocating:
            return func(*args, **kwargs | {"device": "meta"})
        on_meta = tree_any(lambda x: isinstance(x, Tensor) and x.is_meta, (args, kwargs))
        if on_meta and func not in self.allowed:
            raise MetaInitException(str(func))
        return func(*args, **kwargs)


class PostInitCaller(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made.__post_init__()
        return made


class DecoderModel(nn.Module):
    def __init__(self, model_config: ModelConfig):
        super().__init__()
        self.model_config = model_config

    def forward(
        self,
        attn_metadata: AttentionMetadata,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lora_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        raise NotImplementedError


class DecoderModelForCausalLM(nn.Module, metaclass=PostInitCaller):
    def __init__(self, model: DecoderModel, *, config: ModelConfig, hidden_size: int, vocab_size: int):
        super().__init__()
        self.model_config, self.model = config, model
        self.lm_head = LMHead(
            vocab_size,
            hidden_size,
            dtype=config.torch_dtype,
            mapping=config.mapping,
            tensor_parallel_mode=TensorParallelMode.COLUMN,
            gather_output=True,
        )
        if config.pretrained_config.tie_word_embeddings:
            assert self.lm_head.tp_size == model.embed_tokens.tp_size
            assert self.lm_head.tp_mode == model.embed_tokens.tp_mode
            self.lm_head.weight = model.embed_tokens.weight

    def __post_init__(self) -> None:
        for module in self.modules():
            if callable(getattr(module, "create_weights", None)):
                module.create_weights()

    @property
    def config(self) -> Any:
        return self.model_config.pretrained_config

    def infer_max_seq_len(self) -> int:
        return getattr(self.config, "max_position_embeddings", None) or 2048

    def forward(
        self,
        attn_metadata: AttentionMetadata,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_context_logits: bool = False,
        spec_metadata: Any = None,
        lora_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Float32 logits of the last token of every request, or of all tokens."""
        hidden = self.model(
            input_ids=input_ids,
            attn_metadata=attn_metadata,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            spec_metadata=spec_metadata,
            lora_params=lora_params,
        )
        if not return_context_logits:
            ends = torch.tensor(attn_metadata.seq_lens, device=hidden.device).cumsum(0) - 1
            hidden = hidden[ends]
        return self.lm_head(hidden).float()

    def load_weights(self, weights: dict[str, Tensor], weight_mapper: Any = None, skip_modules: Any = ()) -> None:
        raise NotImplementedError("the names of this model's tensors are its own")
