"""A stand-in for TensorRT-LLM 1.2.1; see ../README.md."""

from typing import Any

__version__ = "1.2.1"


def __getattr__(name: str) -> Any:
    if name in ("LLM", "AsyncLLM", "SamplingParams"):
        import tensorrt_llm.llmapi

        return getattr(tensorrt_llm.llmapi, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
