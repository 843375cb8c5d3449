"""A stand-in for TensorRT-LLM's LLM API: real asynchrony, real Ray workers, and the model half of this package below.

What it does on purpose is named in FAKE_TRTLLM, words separated by commas: `canned` (no model: the next id is the last
one plus one), `litter` (leaves a process in a session of its own), `hang` (never becomes ready), `slow-constructor`
(neither does the constructor over Ray end), `dead` (start fails), `no-context-logits`, `no-generation-logits`,
`shared-logits` (a token's logits are those of the next one), `no-seeds`, `die-on-7` (the ranks end when a prompt begins
with id 7), `stall-on-9` (they wait for ever), `reject-8` (workers do not take such a prompt). FAKE_TRTLLM_DELAY_S is
the time of a step.
"""

from tensorrt_llm.llmapi.llm import LLM, AsyncLLM
from tensorrt_llm.llmapi.llm_args import CudaGraphConfig, KvCacheConfig
from tensorrt_llm.llmapi.result import CompletionOutput, RequestOutput
from tensorrt_llm.llmapi.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "CudaGraphConfig",
    "KvCacheConfig",
    "RequestOutput",
    "SamplingParams",
]
