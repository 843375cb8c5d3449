"""What TensorRT-LLM's Ray workers import before they build a model: nothing else tells them of our class.

A driver's registry of model classes reaches MPI workers, but not Ray workers. They do import the module of their
extension class, so importing this one registers ours. The class is empty because TensorRT-LLM refuses an extension
whose attributes a worker has already.
"""

import kraken.trtllm.modeling  # noqa: F401  # registers KrakenForCausalLM


class KrakenWorkerExtension:
    """Passed as `ray_worker_extension_cls`."""
