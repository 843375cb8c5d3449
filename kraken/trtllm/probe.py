"""Whether TensorRT-LLM imports here, and how many GPUs there are: one line of JSON. Run as a process of its own.

python -m kraken.trtllm.probe
"""

import json

from kraken.config import ConfigError
from kraken.trtllm.compat import installed_version, require_supported_version


def probe() -> dict[str, object]:
    """The fields of `kraken.engine.placement.Machine`."""
    try:
        import tensorrt_llm  # noqa: F401  # whether it can be imported is the question

        version = require_supported_version(installed_version())
    except (ImportError, ConfigError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return {"version": None, "problem": f"tensorrt_llm cannot be used: {reason[0][:200]}", "num_gpus": 0}
    import torch

    return {"version": version, "problem": "", "num_gpus": torch.cuda.device_count()}


if __name__ == "__main__":
    print(json.dumps(probe()))
