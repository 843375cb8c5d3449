"""From an architecture's name to a model."""

from typing import Any

from tensorrt_llm._torch.model_config import ModelConfig
from tensorrt_llm._torch.models.extra_attrs import model_extra_attrs
from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING, DecoderModelForCausalLM


class AutoModelForCausalLM:
    @staticmethod
    def from_config(config: ModelConfig) -> Any:
        architecture = config.pretrained_config.architectures[0]
        if architecture not in MODEL_CLASS_MAPPING:
            raise ValueError(f"Unknown architecture for AutoModelForCausalLM: {architecture}")
        cls = MODEL_CLASS_MAPPING[architecture]
        if issubclass(cls, DecoderModelForCausalLM):
            config._frozen = False
            config.skip_create_weights_in_init = True
            config._frozen = True
        with model_extra_attrs(config.extra_attrs):
            model = cls(config)
        model.extra_attrs = config.extra_attrs
        return model
