"""TensorRT-LLM: the only part of the project that imports `tensorrt_llm`, and only when it is asked for."""
